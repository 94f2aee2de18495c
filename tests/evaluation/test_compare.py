"""Two files of scores: the paired bootstrap finds what is there, and nothing where there is nothing."""

import dataclasses
import json

import numpy as np
import pytest

from multitap_jax.cli import main
from multitap_jax.evaluation.compare import compare_files, compare_scores
from multitap_jax.evaluation.correlation import _resamples, kendall_tau
from multitap_jax.evaluation.protocols import Benchmark, Protocol, ProtocolError

PLAIN = Protocol("score", "", "tau_c")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def benchmark_of(tmp_path, human, per_image=4):
    rows = [
        {"id": f"r{i}", "image": f"{i // per_image}.png", "text": "x", "score": float(y)} for i, y in enumerate(human)
    ]
    return Benchmark.open(PLAIN, write(tmp_path / "records.jsonl", rows))


def test_equal_to_differences_of_single_resamples(tmp_path):
    rng = np.random.default_rng(0)
    human = rng.integers(0, 5, 80) / 4
    first, second = human + rng.normal(size=80) / 2, human + rng.normal(size=80)
    benchmark = benchmark_of(tmp_path, human)
    found = compare_scores(benchmark, first, second, bootstrap_samples=150, seed=3)
    taus = [
        (kendall_tau(first[i], human[i], "c"), kendall_tau(second[i], human[i], "c"))
        for i in _resamples(80, benchmark.groups, 150, 3)
    ]
    differences = np.array([a - b for a, b in taus])
    assert list(found.interval) == pytest.approx(np.quantile(differences, [0.025, 0.975]).tolist(), abs=1e-14)
    assert found.difference == kendall_tau(first, human, "c") - kendall_tau(second, human, "c")
    smaller = min((differences <= 0).sum(), (differences >= 0).sum())
    assert found.p_value == pytest.approx(min(1, 2 * (smaller + 1) / 151))


def test_a_better_one_is_found_and_equals_are_not(tmp_path):
    rng = np.random.default_rng(1)
    human = rng.random(400)
    benchmark = benchmark_of(tmp_path, human)
    good, bad = human + rng.normal(size=400) / 5, rng.normal(size=400)
    assert compare_scores(benchmark, good, bad).p_value == pytest.approx(2 / 1001)
    same = compare_scores(benchmark, good, good)
    assert (same.difference, same.p_value, *same.interval) == (0, 1, 0, 0)


def test_no_difference_is_called_one_about_as_often_as_it_says(tmp_path):
    rng = np.random.default_rng(2)
    human = rng.random(120)
    benchmark = benchmark_of(tmp_path, human, per_image=1)
    values = [
        compare_scores(
            benchmark, human + rng.normal(size=120), human + rng.normal(size=120), bootstrap_samples=200, seed=i
        ).p_value
        for i in range(200)
    ]
    assert 0.01 <= np.mean(np.array(values) < 0.05) <= 0.11
    assert 0.35 <= np.mean(np.array(values) < 0.5) <= 0.65


def test_files_and_the_verb(tmp_path, capsys):
    rng = np.random.default_rng(0)
    human = rng.random(60)
    benchmark = benchmark_of(tmp_path, human)
    ids = [record.id for record in benchmark.records]
    scores = [{"id": name, "score": float(y + rng.normal() / 9), "raw": 1} for name, y in zip(ids, human, strict=True)]
    one = write(tmp_path / "one.jsonl", scores)
    two = write(tmp_path / "two.jsonl", [row | {"score": float(rng.random())} for row in scores[::-1]])
    records = tmp_path / "records.jsonl"
    found = compare_files(PLAIN, records, one, two)
    assert found.names == ("one.jsonl", "two.jsonl")
    command = ["compare", f"--input={records}", f"--scores={one}"]
    assert main([*command, f"--against={two}", f"--output={tmp_path / 'c.json'}"]) == 0
    shown = capsys.readouterr().out
    assert "Paired bootstrap: p < 0.002 (two-sided), 1,000 samples of 15 whole groups" in shown
    assert "More samples could tell of a smaller p." in shown
    near = compare_files(PLAIN, records, one, one).words()
    assert "p = 1 (two-sided)" in near
    assert "More samples" not in near
    assert json.loads((tmp_path / "c.json").read_text())["difference"] == found.difference
    assert main([*command, f"--against={one}", "--against_field=raw"]) == 1
    assert "one.jsonl: raw: tau_c is undefined: all its scores are equal" in capsys.readouterr().err
    assert main([*command, f"--against={two}", "--benchmark=foil"]) == 1
    assert "60 of 60 records lack ratings.preference" in capsys.readouterr().err
    assert main([*command, f"--against={two}", "--ties=half"]) == 1
    assert "--ties" in capsys.readouterr().err


def test_names_are_shown_as_they_are(tmp_path):
    found = compare_scores(benchmark_of(tmp_path, np.arange(6) / 6), np.arange(6.0), -np.arange(6.0))
    odd = dataclasses.replace(found, names=("run[a].jsonl", "[/b].jsonl"), benchmark="ratings.[/c]")
    assert all(name in str(odd.table()) for name in (*odd.names, odd.benchmark))


def test_a_part_is_not_compared(tmp_path):
    benchmark_of(tmp_path, np.arange(6) / 6)
    scores = [{"id": f"r{i}", "score": i} for i in range(6)]
    one, two = write(tmp_path / "one.jsonl", scores), write(tmp_path / "two.jsonl", scores[1:])
    with pytest.raises(ValueError, match=r"two.jsonl: 1 of 6 records have no score: r0"):
        compare_files(PLAIN, tmp_path / "records.jsonl", one, two)
    flat = write(tmp_path / "flat.jsonl", [row | {"score": 0} for row in scores])
    with pytest.raises(ProtocolError, match=r"flat.jsonl: tau_c is undefined: all its scores are equal"):
        compare_files(PLAIN, tmp_path / "records.jsonl", one, flat)
    benchmark_of(tmp_path, np.full(6, 0.5))
    with pytest.raises(ProtocolError, match=r"one.jsonl.*: tau_c is undefined: people rated all records alike"):
        compare_files(PLAIN, tmp_path / "records.jsonl", one, one)
