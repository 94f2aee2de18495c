"""The report: complete, escaped, and self-contained."""

import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from multitap_jax.demo.report import ModelRow, ObjectiveRow, ReportData, write_report
from multitap_jax.pages.elements import Example, Interval


def fabricated(folder) -> ReportData:
    image = folder / "a.png"
    Image.new("RGB", (168, 168), (200, 60, 60)).save(image)
    rng = np.random.default_rng(0)
    human = np.round(rng.uniform(0, 1, 200) * 12) / 12
    metrics = {name: Interval(0.5, 0.45, 0.55) for name in ("tau_b", "tau_c", "Pearson", "Spearman")}
    objective = ObjectiveRow("direction_accuracy", Interval(0.4, 0.3, 0.5), 0.7, 12.5, 0.3)
    examples = [Example(image, [("Near <b>left</b> & \"right\": 'red' ball.", 0.9, 0.4), ("Stop.", 0.1, 1.7)])]
    return ReportData(
        facts=[("Model", "tiny"), ("Command", "multitap demo <dir>")],
        phases=[("Render", 12.34)],
        models=[ModelRow("Trained", metrics), ModelRow("Untrained", metrics)],
        train_loss=[(i, 0.08 / (1 + i / 50)) for i in range(1, 101)],
        heldout_loss=[(50, 0.05), (100, 0.04)],
        human=human,
        predicted=np.clip(human + rng.normal(0, 0.1, 200), 0, 1),
        objectives=[objective],
        examples=[("Largest errors", examples)],
        notes=["Scenes are split, not pairs."],
    )


class Balance(HTMLParser):
    """Checks that every element that is opened is closed, in order."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_one_escaped_file_that_loads_nothing(tmp_path):
    path = write_report(tmp_path / "out" / "report.html", fabricated(tmp_path))
    page = path.read_text(encoding="utf-8")
    balance = Balance()
    balance.feed(page)
    assert not balance.open
    assert "<b>left</b>" not in page
    assert "Near &lt;b&gt;left&lt;/b&gt; &amp; &quot;right&quot;: &#x27;red&#x27; ball." in page
    assert "multitap demo &lt;dir&gt;" in page
    assert "<script" not in page
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)', page))
    assert not re.search(r"https?://|url\((?!#)|@import", page)
    assert page.count("<svg") == 3
    assert "Largest errors" in page
    assert "Scenes are split, not pairs." in page
    assert "style='width:100%'" in page
    assert "<th>Within 0.5 points</th>" in page
    assert (
        ".columns dl:last-child{grid-template-columns:1fr max-content}" in page
    )  # else seconds break letter by letter
    assert "nan" not in re.sub(r"base64,[^\"]*", "", page)


def test_report_is_deterministic_and_stands_missing_curves(tmp_path):
    data = fabricated(tmp_path)
    first = write_report(tmp_path / "1.html", data).read_bytes()
    assert write_report(tmp_path / "2.html", data).read_bytes() == first
    bare = data.__class__(**{**data.__dict__, "train_loss": [], "heldout_loss": [], "examples": []})
    assert write_report(tmp_path / "3.html", bare).is_file()
