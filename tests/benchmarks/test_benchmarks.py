"""Every benchmark of models runs at a tiny size, and its sides compute the same; no time is looked at."""

import importlib.util
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[2]
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="compares with torch")
AGREEMENT = 1e-5  # float32 through two layers, relative to the largest number


def run(script: str, *flags: str) -> str:
    command = [sys.executable, ROOT / "benchmarks" / f"{script}.py", "--size=tiny", *flags]
    strict = {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **strict}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    """All numbers that the groups of a pattern match; there are some."""
    found = [float(number) for match in re.finditer(pattern, text) for number in match.groups()]
    assert found, text
    return found


def cells(text: str) -> dict[str, list[dict[str, str]]]:
    """First cell -> its rows by header, over all tables of an output."""
    out: dict[str, list[dict[str, str]]] = {}
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    headers: list[str] = []
    for line, following in zip(lines, [*lines[1:], []], strict=True):
        if set("".join(following)) == {"-"}:
            headers = line
        elif set("".join(line)) != {"-"}:
            out.setdefault(line[0], []).append(dict(zip(headers, line, strict=True)))
    return out


def check_work(rows: dict[str, list[dict[str, str]]], theirs: str, ours: str) -> None:
    """Alone both sides are asked for the same; what texts share counts once here."""
    asked = {name: [float(row["GFLOP a pair"]) for row in rows[name]] for name in (theirs, ours)}
    assert asked[ours][0] == asked[theirs][0] > 0
    assert 0 < asked[ours][1] < 0.9 * asked[theirs][1]


@needs_torch
def test_scoring():
    said = run("scoring", "--images=3", "--official-pairs=2", "--repeats=1", "--threads=1")
    found = numbers(r"scores of 3 way\(s\) differ by (\S+)", said)
    assert len(found) == 2
    assert max(found) < AGREEMENT
    rows = cells(said)
    assert {name: len(row) for name, row in rows.items()} == {"official": 2, "batched": 2, "ours": 2}
    check_work(rows, "batched", "ours")
    assert all(row["memory"].endswith("MB") for row in rows["ours"])


@pytest.mark.slow
@needs_torch
def test_training():
    said = run("training", "--pairs=6", "--repeats=1", "--threads=1", "--texts", "3", "--parts", "full", "lora")
    found = numbers(r"apart by (\S+) \((\S+)\) and (\S+) of it", said)
    assert len(found) == 3 * 2
    assert max(found) < AGREEMENT
    norms = numbers(r"gradient norm (\S+);", said)
    assert min(norms) > 1e-2
    losses = numbers(r"loss (\S+) \(after \d+ steps (\S+)\)", said)
    assert all(first != last for first, last in zip(losses[::2], losses[1::2], strict=True))
    rows = cells(said)
    for theirs, ours in zip(rows["torch"], rows["ours"], strict=True):
        assert 0 < float(ours["GFLOP a pair"]) < 0.9 * float(theirs["GFLOP a pair"])


@needs_torch
def test_embedding():
    said = run("embedding", "--images=3", "--repeats=1", "--threads=1")
    assert max(numbers(r"differ by store (\S+), torch (\S+) of", said)) < AGREEMENT
    rows = cells(said)
    check_work(rows, "torch", "embed")
    assert [row["GFLOP a pair"] for row in rows["verb"]] == [row["GFLOP a pair"] for row in rows["embed"]]


@pytest.mark.slow
def test_startup():
    rows = cells(run("startup", "--repeats=1", "--images=1"))
    empty, filled = rows["empty"][0], rows["filled"][0]
    assert (empty["found"], filled["shapes"]) == ("0", "1")
    assert int(empty["programs"]) == int(filled["programs"]) > 0
    assert all(float(row[part]) > 0 for row in (empty, filled) for part in ("verb", "imports", "load", "first"))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is a GPU")
def test_a_device_that_is_not_there():
    command = [sys.executable, ROOT / "benchmarks" / "scoring.py", "--size=tiny", "--device=gpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert "--device=gpu, but jax sees a cpu" in done.stderr


@pytest.fixture
def stub(tmp_path):
    """In the place of Python: says what it is asked for, and fails where that is `training`."""
    path = tmp_path / "python"
    path.write_text('#!/usr/bin/env bash\necho "$@"\n[[ $1 != benchmarks/training.py ]] || exit 3\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return {**os.environ, "PYTHON": str(path)}


def run_all(stub: dict[str, str], *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([ROOT / "benchmarks" / "run_all.sh", *flags], capture_output=True, text=True, env=stub)


def test_run_all_keeps_what_each_says_and_goes_on_after_a_failure(stub, tmp_path):
    done = run_all(stub, "--device=cpu", "--size=small", f"--results={tmp_path / 'results'}")
    assert done.returncode == 1
    assert done.stderr == "failed: training training-lora\n"
    kept = {file.stem: file.read_text() for file in (tmp_path / "results").iterdir()}
    expected = ("scoring", "embedding", "startup", "training")
    assert {name: kept[name] for name in expected} == {
        name: f"benchmarks/{name}.py --device=cpu --size=small\n" for name in expected
    }


def test_run_all_runs_real_sizes_on_a_gpu_alone(stub, tmp_path):
    done = run_all(stub, "--size=real", "--device=gpu", f"--results={tmp_path / 'results'}")
    assert "benchmarks/scoring.py --device=gpu --size=7b" in done.stdout
    for flags, message in ((["--size=real"], "needs --device=gpu"), (["--size=huge"], "unknown argument --size=huge")):
        done = run_all(stub, *flags)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
