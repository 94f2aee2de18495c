"""Each experiment runs as its command says, on a demo of a few scenes, and keeps a table, a figure and the numbers."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from experiments import independence, long_text, multi_objective, noise_ceiling, rating_noise, single_objective
from experiments.common import into_page
from multitap_jax.demo.run import run_demo

RUNS = {
    "independence": (independence, []),
    "long_text": (long_text, ["--pairs=4", "--lengths=16,96"]),
    "multi_objective": (multi_objective, ["--pairs=6", "--learned=12"]),
    "noise_ceiling": (noise_ceiling, []),
    "rating_noise": (rating_noise, ["--seeds=1"]),
    "single_objective": (single_objective, ["--pairs=12", "--learned=24"]),
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    run_demo(folder, scenes=14, caption_steps=2, epochs=1)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_it_runs(demo, name, tmp_path, capsys, monkeypatch):
    module, arguments = RUNS[name]
    monkeypatch.setattr(sys, "argv", [name, f"--demo={demo}", f"--output={tmp_path}", *arguments])
    module.main()
    assert f"wrote {tmp_path / name}.png" in capsys.readouterr().out
    with Image.open(tmp_path / f"{name}.png") as figure:
        assert min(figure.size) > 100
    kept = json.loads((tmp_path / f"{name}.json").read_text())
    assert kept["experiment"] == name
    assert kept["numbers"]


def test_the_truth_stands_under_the_ceiling_that_its_raters_set(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", f"--demo={demo}", f"--output={tmp_path}"])
    noise_ceiling.main()
    for case in json.loads((tmp_path / "noise_ceiling.json").read_text())["numbers"]["cases"]:
        assert case["tau_single"] <= case["ceiling"]["mean_of_raters"] + 0.1, case["name"]


def test_real_raters_and_their_scorer(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    with (tmp_path / "records.jsonl").open("w") as records, (tmp_path / "scores.jsonl").open("w") as scores:
        for index in range(60):
            truth = rng.normal()
            said = {f"rater_{r}": truth + rng.normal() for r in range(3)}
            records.write(json.dumps({"id": str(index), "image": "a.png", "text": "a", "ratings": said}) + "\n")
            scores.write(json.dumps({"id": str(index), "score": truth}) + "\n")
    arguments = ["--ratings=rater_0,rater_1,rater_2", f"--scores={tmp_path / 'scores.jsonl'}"]
    arguments += [f"--input={tmp_path / 'records.jsonl'}", f"--output={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    noise_ceiling.main()
    (case,) = json.loads((tmp_path / "noise_ceiling_real.json").read_text())["numbers"]["cases"]
    assert 0.3 < case["tau_single"] < case["ceiling"]["mean_of_raters"]


def test_without_a_demo_it_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", f"--demo={tmp_path}"])
    with pytest.raises(SystemExit, match="holds no finished demo; run `make demo` first"):
        independence.main()


def test_the_page_keeps_what_stands_around_a_table(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- one -->\nold\n<!-- /one -->\nafter\n")
    into_page("one", "new", page)
    assert page.read_text() == "before\n<!-- one -->\n\n```\nnew\n```\n\n<!-- /one -->\nafter\n"
    with pytest.raises(ValueError, match="has no marks <!-- two -->"):
        into_page("two", "new", page)
