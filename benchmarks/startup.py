"""How long `multitap score` takes until the first score is written, with nothing compiled before and with everything.

  python benchmarks/startup.py [--device=cpu|gpu] [--size=small|2b|7b] [--images=2] [--repeats=3]

An artefact with random weights and a file of records with six texts a picture are written once. Then the verb scores
them in processes of their own: first with an empty folder of compiled programs (JAX_COMPILATION_CACHE_DIR), then with
the folder as this left it. Beside the whole time of the verb (verb), a process that takes its steps one by one says
where it goes:

  python    the interpreter begins          imports   jax, its device, the package, the tokenizer's library
  load      `Scorer.from_pretrained`        first     the job on the file, until its scores are written
  compiled  of load and first: in XLA, or read from the folder; the rest is tracing, lowering, pictures and computing
  steady    the same file again, all programs at hand

Printed: medians of the repeats; programs that were asked for, those found in the folder (jax keeps the ones that took a
second or more), and the shapes of batches that the scorer used. The files are in the page cache.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TEXTS = 6
PARTS = ("verb", "python", "imports", "load", "first", "compiled", "steady")
COUNTS = ("programs", "found", "shapes")
COMPILED = "/jax/core/compile/backend_compile_duration"  # what jax tells its monitors; looking it up is part of it
FOUND = "/jax/compilation_cache/cache_hits"


def child(began: float, arguments: list[str]) -> dict[str, float]:
    """The verb's steps one by one: seconds and counts."""
    marks = [("python", time.time() - began)]
    last = time.perf_counter()

    def mark(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        marks.append((name, now - last))
        last = now

    from multitap_jax.parallel.host import keep_freed_memory

    keep_freed_memory()
    import jax
    from transformers import AutoTokenizer  # noqa: F401

    from multitap_jax import cli
    from multitap_jax.scoring.job import score_file
    from multitap_jax.verbs.common import load_scorer

    compiled: list[float] = []
    found: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(seconds) if name == COMPILED else None
    )
    jax.monitoring.register_event_listener(lambda name, **_: found.append(name) if name == FOUND else None)
    values = cli.parse("score", arguments)
    jax.devices()
    mark("imports")
    scorer = load_scorer(values)
    mark("load")
    score_file(scorer, values.input, values.output)
    mark("first")
    counts = {"compiled": sum(compiled), "programs": len(compiled), "found": len(found), "shapes": scorer.num_shapes}
    score_file(scorer, values.input, f"{values.output}.again")
    mark("steady")
    return dict(marks) | counts


def measure(artefact: Path, records: Path, folder: Path, dtype: str) -> dict[str, float]:
    """One start of the verb, and one of the child, with a folder of compiled programs each."""
    arguments = [f"--checkpoint={artefact}", f"--input={records}", f"--dtype={dtype}"]
    seconds: dict[str, Any] = {}
    for who in ("verb", "child"):
        given = [*arguments, f"--output={tempfile.mkdtemp(dir=folder)}/scores.jsonl"]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / who)}
        began = time.time()
        mine = ("-m", "multitap_jax.cli", "score") if who == "verb" else (__file__, f"--child={began}")
        command = [sys.executable, *mine, *given]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
        if who == "verb":
            seconds["verb"] = time.time() - began
        else:
            seconds |= json.loads(done.stdout.splitlines()[-1])
    return seconds


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1].startswith("--child="):
        print(json.dumps(child(float(sys.argv[1].partition("=")[2]), sys.argv[2:])))
        return
    import numpy as np
    from common import add_flags, start, table  # beside this file
    from workload import make_pairs, make_workload, size_of, write_records

    from multitap_jax.families import num_params
    from multitap_jax.scoring.artefact import Artefact

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, repeats=3)
    parser.add_argument("--images", type=int, default=2, help=f"pictures with {TEXTS} texts each")
    args = parser.parse_args()
    size = size_of(args.size)
    start(args)
    with tempfile.TemporaryDirectory() as name:
        folder, rng = Path(name), np.random.default_rng(0)
        workload = make_workload(folder / "base", size)
        workload.save_weights()
        artefact = Artefact.save(
            folder / "artefact", workload.model, base=folder / "base", contract=workload.processing.contract
        )
        records, pairs = write_records(folder / "records", make_pairs(args.images, TEXTS, rng, side=size.side), rng)
        parameters = num_params(workload.model) / 1e6
        rows = []
        found: dict[str, list[dict[str, float]]] = {"empty": [], "filled": []}
        for turn in range(args.repeats):
            programs = folder / f"turn-{turn}"
            programs.mkdir()
            for seconds in found.values():  # the folder is empty, then it is filled
                seconds.append(measure(artefact.folder, records, programs, size.dtype))
    print(f"{parameters:,.1f} M parameters, {size.dtype}; {len(pairs)} pairs; seconds, medians of {args.repeats}\n")
    for state, seconds in found.items():
        cells = [f"{statistics.median(turn[part] for turn in seconds):.2f}" for part in PARTS]
        rows.append((state, *cells, *(f"{seconds[-1][count]:.0f}" for count in COUNTS)))
    print(table(("compiled programs", *PARTS, *COUNTS), rows))


if __name__ == "__main__":
    main()
