"""A benchmark's report on as many pairs as Polaris has, with 1,000 bootstrap resamples: time and peak memory.

  python benchmarks/evaluation.py            131,020 synthetic pairs; about two minutes

Each part runs in a process of its own, from files as `multitap evaluate --benchmark` and `multitap compare` read them.
Besides: Kendall's tau_c of a few resamples one at a time with scipy, which is what the bootstrap replaces.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

PAIRS, PICTURES, LEVELS = 131_020, 13_691, 33  # about as Polaris: means of several ratings in quarters
RESAMPLES, ONE_AT_A_TIME = 1000, 20


def write_files(folder: Path, pairs: int) -> None:
    """Records with a human score from 0 to 1, and two sets of scores of float32 precision."""
    rng = np.random.default_rng(0)
    human = rng.integers(0, LEVELS, pairs) / (LEVELS - 1)
    picture = rng.integers(0, PICTURES, pairs)
    scores = [np.float32(human + rng.normal(size=pairs) * spread) for spread in (0.4, 0.45)]
    with (folder / "records.jsonl").open("w") as file:
        for i in range(pairs):
            row = {"id": f"pair-{i}", "image": f"{picture[i]}.jpg", "text": "a caption", "score": float(human[i])}
            file.write(json.dumps(row) + "\n")
    for name, values in zip(("a", "b"), scores, strict=True):
        lines = (json.dumps({"id": f"pair-{i}", "score": float(values[i])}) for i in range(pairs))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def evaluate(folder: Path) -> str:
    from multitap_jax.evaluation.benchmark import evaluate_benchmark
    from multitap_jax.evaluation.protocols import Protocol

    found = evaluate_benchmark(
        Protocol("polaris-like", "", "tau_c"),
        folder / "records.jsonl",
        folder / "a.jsonl",
        bootstrap_samples=RESAMPLES,
    ).value
    low, high = found.interval
    return f"tau_c {100 * found.value:.3f} ({100 * low:.3f} to {100 * high:.3f}), {found.interval.samples:,} resamples"


def compare(folder: Path) -> str:
    from multitap_jax.evaluation.compare import compare_files
    from multitap_jax.evaluation.protocols import Protocol

    found = compare_files(
        Protocol("polaris-like", "", "tau_c"),
        folder / "records.jsonl",
        folder / "a.jsonl",
        folder / "b.jsonl",
        bootstrap_samples=RESAMPLES,
    )
    return f"difference {100 * found.difference:.3f}, p = {found.p_value:.3g}, {found.samples:,} resamples of two files"


def one_at_a_time(folder: Path) -> str:
    from scipy import stats

    human, pred = (
        np.array([json.loads(line)["score"] for line in (folder / name).read_text().splitlines()])
        for name in ("records.jsonl", "a.jsonl")
    )
    rng = np.random.default_rng(0)
    began = time.process_time()
    for _ in range(ONE_AT_A_TIME):
        drawn = rng.integers(len(human), size=len(human))
        stats.kendalltau(pred[drawn], human[drawn], variant="c", method="asymptotic")
    each = (time.process_time() - began) / ONE_AT_A_TIME
    return f"scipy: {each * 1000:.0f} ms of CPU a resample, {each * RESAMPLES:.0f} s for {RESAMPLES:,}"


def measured(part: Callable[[Path], str], folder: Path, queue: "multiprocessing.Queue[str]") -> None:
    """Runs a part and reports its words, wall and CPU time, and the peak memory of the process."""
    wall, cpu = time.monotonic(), time.process_time()
    words = part(folder)
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    queue.put(f"{part.__name__:14} {wall:6.1f} s  {cpu:6.1f} s CPU  {peak:5.2f} GiB  {words}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    context = multiprocessing.get_context("spawn")
    pairs = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as name:
        write_files(Path(name), pairs)
        print(f"{pairs:,} pairs of {PICTURES:,} pictures")
        for part in (evaluate, compare, one_at_a_time):
            queue = context.Queue()
            process = context.Process(target=measured, args=(part, Path(name), queue))
            process.start()
            print(queue.get(), flush=True)
            process.join()


if __name__ == "__main__":
    main()
