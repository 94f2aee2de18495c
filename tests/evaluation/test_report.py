"""Reports: the join is right, and everything left out of it is named."""

import io
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from multitap_jax.cli import main
from multitap_jax.data.records import load_records
from multitap_jax.data.seen import FITTED, TRAINED, Seen, prints_of, to_bytes
from multitap_jax.data.tables import RecordsError
from multitap_jax.evaluation import evaluate_files, evaluate_pairs
from multitap_jax.evaluation.page import write_evaluation

SHARED = Path(os.environ.get("MULTITAP_SHARED_DATA", Path(__file__).parents[2].parent / "shared/data"))


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path):
    """Twelve records on six pictures (none of them there), human scores from 1 to 5, two objectives."""
    rng = np.random.default_rng(0)
    records, scores = [], []
    for i in range(12):
        ratings = {"safety": float(rng.integers(0, 4)), "depth": None if i < 3 else float(rng.random())}
        records.append(
            {"id": f"r{i}", "image": f"{i // 2}.png", "text": "x", "score": float(1 + i % 5), "ratings": ratings}
        )
        scores.append(
            {
                "id": f"r{i}",
                "score": float(rng.random()),
                "scores": {"safety": float(rng.normal()), "depth": float(rng.normal())},
                "n_tokens": 5,
                "truncated": i == 1,
                "error": None,
            }
        )
    return tmp_path, records, scores


def report_of(folder, records, scores, **options):
    settings = {"target_range": (1, 5), "bootstrap_samples": 20} | options
    return evaluate_files(write(folder / "s.jsonl", scores), write(folder / "r.jsonl", records), **settings)


def shown(report):
    console = Console(file=io.StringIO(), width=300)
    console.print(report.table())
    return console.file.getvalue()


def test_the_numbers_are_those_of_the_pairs(files):
    folder, records, scores = files
    report = report_of(folder, records, scores[::-1], dtype="bfloat16")
    human = [(record["score"] - 1) / 4 for record in records]
    groups = [record["image"] for record in records]
    assert report.overall == evaluate_pairs([s["score"] for s in scores], human, groups=groups, samples=20)
    depth = [(s["scores"]["depth"], r["ratings"]["depth"], r["image"]) for s, r in zip(scores, records, strict=True)][
        3:
    ]
    guesses, truths, pictures = zip(*depth, strict=True)
    assert report.objectives["depth"] == evaluate_pairs(guesses, truths, groups=pictures, samples=20)
    assert (report.objectives["safety"].n, report.objectives["depth"].n) == (12, 9)
    assert not any(report.lists().values())
    assert (report.n_records, report.n_scores, report.truncated) == (12, 12, 1)
    for words in (
        "[1, 5] to [0, 1]",
        "tau_b and tau_c",
        "n = 12",
        "20 samples",
        "6 groups",
        "bfloat16",
        "1 texts trunc",
    ):
        assert words in report.protocol
    assert report.protocol.split()[0] in shown(report)
    assert "mapped" not in report_of(folder, records, scores, target="none", target_range=(0, 1)).protocol
    assert "[1, 5]" in shown(report)
    rated = report_of(folder, records, scores, target="ratings.safety", target_range=(0, 3))
    assert rated.points[:, 1].tolist() == [record["ratings"]["safety"] / 3 for record in records]


def test_everything_left_out_is_named(files):
    folder, records, scores = files
    records[0]["score"] = None
    records[1]["text"] = ""
    records[2]["ratings"]["tone"] = 1.0
    scores[3] |= {"score": None, "error": "image 1.png: truncated"}
    scores[4]["score"] = math.nan
    scores[5]["score"] = 10**400
    scores[6]["scores"]["depth"] = None
    scores[7]["scores"] = [1]
    del scores[8]
    report = report_of(
        folder, records, [*scores, scores[0] | {"score": 0.9}, "{", {"score": 1}, {"id": "zz", "score": 1}]
    )
    assert report.unrated == ["r0"]
    assert [item.id for item in report.rejected] == ["r1"]
    assert report.missing == ["r8"]
    assert report.duplicates == ["r0"]
    assert report.unknown == ["zz"]
    assert report.unpredicted == ["tone"]
    problems = {(problem.line, problem.id): problem.reason for problem in report.problems}
    assert problems[4, "r3"] == "image 1.png: truncated"
    assert problems[5, "r4"] == "score is nan, not a finite number"
    assert problems[6, "r5"] == f"score is {10**400}, not a finite number"
    assert problems[7, "r6"] == "scores.depth is None, not a finite number"
    assert "not an object" in problems[8, "r7"]
    assert "not JSON" in problems[13, None]
    assert problems[14, None] == "no id"
    assert len(problems) == 7
    assert report.overall.n == 12 - 1 - 1 - 1 - 3
    text = shown(report)
    for words in (
        "1 records without a score: r8",
        "7 unusable lines",
        "r0",
        "zz",
        "tone",
        "line 2, id r1: text is empty",
    ):
        assert words in text
    listed = json.loads(report.to_json())
    assert listed["missing"] == ["r8"]
    assert listed["problems"][0] == {"line": 4, "id": "r3", "reason": "image 1.png: truncated"}


def test_saved_report_holds_metrics_and_pictures(files):
    folder, records, scores = files
    for score in scores:
        score["scores"]["depth"] = 1.0
        score["scores"]["unheard"] = 1.0
    report = report_of(folder, records, scores)
    report.save(folder / "out" / "report")
    saved = json.loads((folder / "out/report/metrics.json").read_text())
    assert saved["overall"]["tau_b"]["value"] == report.overall.tau_b.value
    assert saved["overall"]["samples"] == 20
    assert saved["objectives"]["depth"]["tau_b"]["value"] is None
    assert saved["objectives"]["depth"]["tau_b"]["reason"] == "all predictions are equal"
    assert saved["objectives"]["unheard"]["n"] == 0
    assert "depth: tau undefined: all predictions are equal" in shown(report)
    for name in ("overall.png", "objectives.png"):
        with Image.open(folder / "out/report" / name) as picture:
            assert min(picture.size) > 200
            assert len(np.unique(np.asarray(picture.convert("L")))) > 10


def test_names_are_drawn_as_they_are(files):
    """Not read as formulas, which these are not."""
    folder, records, scores = files
    odd = "$a_{$"
    for record, score in zip(records, scores, strict=True):
        record["ratings"][odd], score["scores"][odd] = record["score"], score["score"]
    report = report_of(folder, records, scores, target=f"ratings.{odd}")
    report.save(folder / "out")
    page = write_evaluation(folder / "out/page.html", report, folder / "s.jsonl", folder / "r.jsonl")
    assert page.read_text().count(">$a {$") == 2  # in the table and in the chart


def test_scores_on_another_scale_are_told(files):
    folder, records, scores = files
    assert report_of(folder, records, scores).warnings == ()
    for score in scores[:5]:
        score["score"] += 50
    report = report_of(folder, records, scores)
    (warning,) = report.warnings
    assert warning.startswith("5 of 12 overall scores lie outside 0 to 1, the first of r0")
    assert "WARNING: 5 of 12" in shown(report)


def test_wrong_files_and_ranges_are_refused(files):
    folder, records, scores = files
    with pytest.raises(RecordsError, match=r"record 'r4' \(line 5\): score = 5 lies outside target_range \(1, 4\)"):
        report_of(folder, records, scores, target_range=(1, 4))
    with pytest.raises(RecordsError, match=r"no record has ratings.tone; it has score, ratings.safety, ratings.depth"):
        report_of(folder, records, scores, target="ratings.tone")
    with pytest.raises(RecordsError, match="the first below the second"):
        report_of(folder, records, scores, target_range=(1, 1))
    with pytest.raises(RecordsError, match="expected 'score' or"):
        report_of(folder, records, scores, target="safety")
    with pytest.raises(RecordsError, match="no such scores file"):
        evaluate_files(folder / "none.jsonl", folder / "r.jsonl")
    with pytest.raises(RecordsError, match="no scores"):
        report_of(folder, records, [])


def test_the_table_fits_80_columns_and_prints_as_text(files, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    folder, records, scores = files
    report = report_of(folder, records, scores)
    rows = str(report.table()).splitlines()
    assert max(map(len, rows)) <= 80
    (line,) = (row for row in rows if row.strip().startswith("safety"))
    tau = report.objectives["safety"].tau_c
    assert f"{tau.value:.2f} [{tau.interval.low:.2f}, {tau.interval.high:.2f}]" in line


def test_the_objectives_can_be_compared_alone(files):
    folder, records, scores = files
    report = report_of(folder, [r | {"score": None} for r in records], scores, target="none")
    assert report.objectives["safety"].n == 12
    assert "overall score" not in shown(report)
    report.save(folder / "alone")
    assert {path.name for path in (folder / "alone").iterdir()} == {"metrics.json", "objectives.png"}


def test_the_target_is_the_one_that_was_trained_on(files):
    """As `multitap score` notes it beside its output; what is asked for goes before."""
    folder, records, scores = files
    note = {"trained_on": {"target": "ratings.safety", "target_range": [0, 3]}, "settings": {"dtype": "bfloat16"}}
    (folder / "s.jsonl.job.json").write_text(json.dumps(note))
    found = report_of(folder, records, scores, target_range=None)
    assert (found.target, found.dtype) == ("ratings.safety", "bfloat16")
    assert found.points[:, 1].tolist() == [record["ratings"]["safety"] / 3 for record in records]
    assert report_of(folder, records, scores, target="score").target == "score"
    assert not found.warnings
    wider = report_of(folder, records, scores, target_range=(0, 6))
    assert wider.points[:, 1].tolist() == [record["ratings"]["safety"] / 6 for record in records]


def test_records_that_the_model_has_seen_are_told(files):
    """Whatever they are called by now; of those that were scored alone."""
    folder, records, scores = files
    for number in range(6):
        Image.new("RGB", (4, 4), (40 * number, 0, 0)).save(folder / f"{number}.png")
    report_of(folder, records, scores)
    there = load_records(folder / "r.jsonl").records
    seen = {TRAINED: Seen.of(prints_of(there[:3])), FITTED: Seen.of(prints_of(there[10:]))}
    (folder / "s.jsonl.seen.safetensors").write_bytes(to_bytes(seen))
    for record, score in zip(records, scores, strict=True):
        record["id"] = score["id"] = f"new-{record['id']}"
    found = report_of(folder, records, scores[:11])
    assert found.warnings == (
        "4 of 11 records were among those that the model was trained on: how they are judged says nothing of new ones "
        "(new-r0, new-r1, new-r2 and 1 more)",
        "1 of 11 records were among those that the heads were fitted on: how they are judged says nothing of new ones "
        "(new-r10)",
    )
    assert "WARNING: 4 of 11 records were among" in shown(found)
    page = write_evaluation(folder / "page.html", found, folder / "s.jsonl", folder / "r.jsonl").read_text()
    assert "4 of 11 records were among those that the model was trained on" in page
    (folder / "s.jsonl.seen.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"s.jsonl.seen.safetensors: damaged"):
        report_of(folder, records, scores)


@pytest.mark.skipif(not (SHARED / "benchmarks").is_dir(), reason="the published scores are not at hand")
def test_published_fleur_figures_from_files(tmp_path):
    judged = json.loads((SHARED / "benchmarks/flickr8k_expert.json").read_text())
    lines = (SHARED / "benchmarks/fleur_flickr8k_expert_scores.jsonl").read_text().splitlines()
    rows = [human for image in judged.values() for human in image["human_judgement"]]
    records, scores = [], []
    for i, line in enumerate(lines):
        three, found = rows[3 * i : 3 * i + 3], json.loads(line)
        assert {row["caption"] for row in three} == {found["text"]}
        mean = sum(row["rating"] for row in three) / 3
        records.append({"id": str(i), "image": found["image"], "text": found["text"], "score": mean})
        scores.append({"id": str(i), "score": found["score"]})
    report = report_of(tmp_path, records, scores, target_range=(1, 4), bootstrap_samples=5)
    assert report.overall.tau_c.value == pytest.approx(0.55986, abs=5.01e-6)
    assert report.overall.tau_b.value == pytest.approx(0.57698, abs=5.01e-6)
    assert report.overall.pearson.value == pytest.approx(0.7915, abs=5.01e-5)
    assert (report.overall.n, report.overall.n_groups) == (5664, 1000)


def test_preferences_are_not_pooled_over_groups(tmp_path):
    """They are comparable inside a group alone."""
    records = [
        {"id": f"{g}/{i}", "image": "a.png", "text": "x", "group": str(g), "ratings": {"preference": 1 - i}}
        for g in range(3)
        for i in range(2)
    ]
    scores = [{"id": record["id"], "score": 0.5} for record in records]
    for target in (None, "ratings.preference"):
        with pytest.raises(
            RecordsError, match=r"ratings.preference orders records of one group only.*--benchmark=NAME"
        ):
            report_of(tmp_path, records, scores, target=target)


def test_lines_without_ids_are_told_so(tmp_path, capsys):
    record = {"id": "a", "image": "a.png", "text": "x", "score": 0.5}
    arguments = [f"--scores={write(tmp_path / 's.jsonl', [{'score': 1}])}"]
    assert main(["evaluate", *arguments, f"--input={write(tmp_path / 'r.jsonl', [record])}"]) == 1
    assert "no line has an id, by which scores and records are joined" in capsys.readouterr().err
