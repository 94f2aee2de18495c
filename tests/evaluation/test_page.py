"""The page of an evaluation: complete, escaped, self-contained, and readable in a browser of any width."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from multitap_jax import cli
from multitap_jax.evaluation.page import write_evaluation
from multitap_jax.evaluation.report import evaluate_files

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Forty texts of ten pictures, one of which is not there."""
    folder, rng = tmp_path_factory.mktemp("page"), np.random.default_rng(0)
    records, scores = [], []
    for picture in range(10):
        if picture:
            pixels = rng.integers(0, 256, (300, 400, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{picture}.png")
        for text in range(4):
            name, human = f"{picture}-{text}", float(rng.random())
            words = f"Text {name} with <script>alert(1)</script> & more words than fit on one line of a phone"
            ratings = {"safety": 1 + 4 * human, "never_rated": None}
            records.append({"id": name, "image": f"{picture}.png", "text": words, "score": human, "ratings": ratings})
            guess = float(np.clip(human + rng.normal(0, 0.2), 0, 1))
            scores.append({"id": name, "score": guess, "scores": {"safety": 5 * guess}, "error": None})
    scores[7]["error"], scores[7]["score"] = "image broke", None
    for name, rows in (("records", records), ("scores", scores)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = evaluate_files(folder / "scores.jsonl", folder / "records.jsonl", bootstrap_samples=50)
    return write_evaluation(folder / "out" / "page.html", report, folder / "scores.jsonl", folder / "records.jsonl")


def test_it_is_one_file_that_loads_and_runs_nothing(page):
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    sources = re.findall(r'src="([^"]*)', text)
    assert len(sources) >= 2 * 5
    assert text.count("<svg") == 2
    assert all(re.match(r"data:image/(png|jpeg);base64,", source) for source in sources)
    assert not re.search(r"https?://|url\((?!#)|@import", text)


def test_it_says_what_was_compared_and_what_was_not(page):
    text = re.sub(r"data:image[^\"]*", "", page.read_text(encoding="utf-8"))
    for words in (
        "Overall score",
        "Safety",
        "<td>39</td>",
        "Scored too high",
        "Scored too low",
        "As people see it",
        "0.png",  # the picture that is not there is named
        "1 unusable lines of scores",
        "image broke",
        "1 rated objectives without a prediction",
        "samples of 10 whole groups",
    ):
        assert words in text, words


def test_pages_are_the_same_each_time(page):
    folder = page.parent.parent
    report = evaluate_files(folder / "scores.jsonl", folder / "records.jsonl", bootstrap_samples=50)
    again = write_evaluation(folder / "again.html", report, folder / "scores.jsonl", folder / "records.jsonl")
    assert again.read_bytes() == page.read_bytes()


def test_the_verb_writes_the_same_page(page):
    folder = page.parent.parent
    arguments = [f"--scores={folder / 'scores.jsonl'}", f"--input={folder / 'records.jsonl'}", "--bootstrap=50"]
    assert cli.main(["report", *arguments, f"--output={folder / 'verb.html'}"]) == 0
    assert (folder / "verb.html").read_bytes() == page.read_bytes()


@pytest.mark.parametrize("name", ["oid-star", "nebula"])
def test_a_benchmark_has_its_page(tmp_path, name):
    """An accuracy inside groups, and a correlation."""
    lines, scores = [], []
    for picture in range(8):
        for text in range(2):
            score = (picture * 3 + text * 5) % 7 / 7
            record = {"id": f"{picture}/{text}", "image": f"{picture}.png", "text": f"<i>{text}</i>", "score": score}
            lines.append(json.dumps(record | {"group": str(picture)}))
            scores.append(json.dumps({"id": record["id"], "score": 10 * score + text}))
    (tmp_path / "records.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "scores.jsonl").write_text("\n".join(scores) + "\n")
    out = tmp_path / "page.html"
    arguments = [f"--scores={tmp_path / 'scores.jsonl'}", f"--input={tmp_path / 'records.jsonl'}", "--bootstrap=50"]
    assert cli.main(["report", *arguments, f"--benchmark={name}", "--allow_subset", f"--output={out}"]) == 0
    text = re.sub(r"data:image[^\"]*", "", out.read_text(encoding="utf-8"))
    heading = "Scored too high" if name == "nebula" else "Ordered as people did"
    for words in (name, heading, "&lt;i&gt;0&lt;/i&gt;", "not noted beside the scores", "0.png"):
        assert words in text, words
    assert ("NOT the published number" in text) == (name == "nebula")


def browsed(page, folder, width, script, *options):
    """What a script, an expression of the page's document d, says of it in an iframe: windows have a least width."""
    probe = folder / "probe.html"
    probe.write_text(
        f'<iframe id=f src="{page.as_uri()}" style="width:{width}px;height:900px;border:0"></iframe><pre id=o></pre>'
        "<script>document.getElementById('f').onload=e=>{const d=e.target.contentDocument;"
        f"document.getElementById('o').textContent='measured '+({script})}}</script>"
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += [*options, f"--user-data-dir={folder / 'profile'}", "--allow-file-access-from-files", "--dump-dom"]
    done = subprocess.run(
        [str(CHROMIUM), *flags, "--virtual-time-budget=20000", probe.as_uri()],
        capture_output=True, text=True, timeout=180, check=True,
    )  # fmt: skip
    found = re.search(r"measured (.*?)</pre>", done.stdout)
    assert found, done.stdout[:500] + done.stderr[-500:]
    return found[1]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_within_its_width(page, width, tmp_path):
    script = "[d.documentElement.scrollWidth,[...d.images].filter(i=>!i.naturalWidth).length,"
    script += "d.querySelectorAll('article').length,...[...d.querySelectorAll('svg')].map(s=>s.clientWidth)]"
    wide, broken, cards, *charts = map(int, browsed(page, tmp_path, width, script).split(","))
    assert wide <= width
    assert (broken, cards, len(charts)) == (0, 18, 2)
    assert all(300 < chart <= 560 for chart in charts)


def luminance(colour: str) -> float:
    """Of WCAG 2, from "rgb(1, 2, 3)"."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize(("scheme", "dark"), [(1, False), (0, True)])
def test_charts_are_read_on_light_and_dark_ground(page, scheme, dark, tmp_path):
    """Letters stand off the ground as WCAG asks (4.5), bars and dots as it asks of graphics (3)."""
    style = "d.defaultView.getComputedStyle"
    fills = lambda what: f"[...d.querySelectorAll('.plot {what}')].map(e=>{style}(e).fill)"
    script = f"[{style}(d.querySelector('.plot')).backgroundColor,...{fills('text')},'|',...{fills('[style*=model]')}]"
    script += ".join(';')"
    found = browsed(page, tmp_path, 1280, script, f"--blink-settings=preferredColorScheme={scheme}")
    (ground, *letters), marks = (part.strip(";").split(";") for part in found.split("|"))
    assert (luminance(ground) < 0.1) == dark
    contrast = lambda colour: (
        (max(luminance(colour), luminance(ground)) + 0.05) / (min(luminance(colour), luminance(ground)) + 0.05)
    )
    assert len(letters) > 15
    assert min(map(contrast, letters)) >= 4.5
    assert min(contrast(mark) for mark in marks if mark.startswith("rgb")) >= 3
