"""Charts in pages: in the page's own colours and letters, each with names of its own, and nothing left out."""

import re

import numpy as np
import pytest
from PIL import Image

from multitap_jax.pages.charts import (
    CROWDED,
    framed,
    inline_svg,
    loss_chart,
    objectives_chart,
    scatter_chart,
    scatter_words,
)
from multitap_jax.pages.elements import Interval

NAN = float("nan")


def some_charts():
    rng = np.random.default_rng(0)
    yield loss_chart([(step, 1 / step) for step in range(1, 90)], [(50, 0.5), (80, 0.4)])
    yield loss_chart([], [])
    yield scatter_chart(rng.random(50), rng.random(50))
    yield scatter_chart(rng.random(CROWDED + 1), rng.random(CROWDED + 1))
    yield scatter_chart(np.zeros(0), np.zeros(0), title="nothing")
    yield objectives_chart([("one", Interval(0.5, 0.4, 0.6)), ("two", Interval(-0.2, -0.4, 0.1))])
    yield objectives_chart(
        [("one", Interval(0.5, NAN, NAN)), ("none", Interval(NAN, NAN, NAN))], dots=[0.5, 0.1], legend="x"
    )


@pytest.mark.parametrize("number", range(7))
def test_they_have_the_colours_of_the_page_and_refer_to_themselves_alone(number):
    svg = inline_svg(list(some_charts())[number], "alt")
    assert not re.findall(r"#[0-9a-f]{6}(?![0-9a-f])", svg)
    assert {"--ink", "--line"} <= set(re.findall(r"var\((--\w+)\)", svg))
    assert "font-family" not in svg
    assert "http" not in svg
    names = re.findall(r' id="([^"]*)"', svg)
    assert len(set(names)) == len(names)
    assert set(re.findall(r'(?:href="|url\()#([\w-]+)', svg)) == set(names)
    assert svg == inline_svg(list(some_charts())[number], "alt")


def test_charts_of_one_page_share_no_names():
    first, second = (
        set(re.findall(r' id="([^"]*)"', framed(scatter_chart(np.ones(3) / 2, np.ones(3)), heading, "")))
        for heading in ("One", "Two")
    )
    assert first
    assert not first & second


def test_names_are_text_and_nothing_else():
    odd = '<b>$x_{$ id="fig" #23272f'
    svg = inline_svg(objectives_chart([(odd, Interval(0.5, 0.4, 0.6))]), 'a "b" <c>')
    assert '&lt;b&gt;$x_{$ id="fig" #23272f</text>' in svg
    assert 'aria-label="a &quot;b&quot; &lt;c&gt;"' in svg


def test_what_is_undefined_has_a_word_in_place_of_a_bar():
    known, unknown = (inline_svg(objectives_chart([("a", Interval(value, NAN, NAN))]), "x") for value in (0.5, NAN))
    assert "undefined" in unknown
    assert "undefined" not in known
    assert unknown.count("var(--model)") < known.count("var(--model)")
    assert (str(Interval(NAN, NAN, NAN)), str(Interval(0.5, NAN, NAN))) == ("undefined", "0.500")


def test_a_crowd_is_a_density(tmp_path):
    """Cells as strong as they are full: nothing is left out, and the page does not grow with the number of pairs."""
    few, many = (np.random.default_rng(0).random((2, n)) for n in (CROWDED + 1, 40 * CROWDED))
    svgs = [inline_svg(scatter_chart(*points), "x") for points in (few, many)]
    assert len(svgs[1]) < 1.5 * len(svgs[0])
    corner = scatter_chart(np.r_[np.zeros(5000), 1.0], np.r_[np.zeros(5000), 1.0])
    strengths = [
        float(value) for value in re.findall(r"var\(--model\); fill-opacity: ([\d.]+)", inline_svg(corner, "x"))
    ]
    assert len(strengths) == 1  # the full cell has no opacity to speak of, the other has little
    assert strengths[0] < 0.3
    corner.savefig(tmp_path / "corner.png")
    with Image.open(tmp_path / "corner.png") as image:
        assert min(image.size) > 400
    assert "stronger" in scatter_words(CROWDED + 1)
    assert "dot" in scatter_words(CROWDED)
