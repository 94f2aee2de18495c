"""What shorter types do to scores: the rank correlation of each with float32, and the bytes of the weights.

  python benchmarks/precision.py --checkpoint=demo_run/train/artefact --input=demo_run/world/heldout.jsonl

Scores the same records in float32, in bfloat16, and with weights of int8 under both. Printed for each: the largest
difference of a score from float32's, Kendall's tau-b with float32's scores, tau-c with the human scores where the
records have them, the bytes of all parameters, and the seconds of one pass after a first one that compiled.
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np

from multitap_jax import Scorer
from multitap_jax.data.records import load_records
from multitap_jax.data.stream import Pair
from multitap_jax.evaluation.correlation import kendall_tau

WAYS = (("float32", "full"), ("bfloat16", "full"), ("float32", "int8"), ("bfloat16", "int8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--input", type=Path, required=True, help="records; `score` is the human one")
    parser.add_argument("--limit", type=int, default=2000, help="records at most")
    args = parser.parse_args()
    records = load_records(args.input).records[: args.limit]
    pairs = [Pair.of(record) for record in records]
    human = np.array([np.nan if record.score is None else record.score for record in records])
    rated, exact = np.isfinite(human), None
    print(f"{len(records):,} records, {rated.sum():,} with a human score")
    print(f"{'weights':8s} {'computed in':12s} {'MB':>8s} {'max diff':>9s} {'tau-b':>8s} {'human':>8s} {'seconds':>8s}")
    for dtype, weights in WAYS:
        scorer = Scorer.from_pretrained(args.checkpoint, dtype=dtype, weights=weights)
        for _ in range(2):
            start = time.perf_counter()
            (found,) = scorer.score_stream([pairs])
            seconds = time.perf_counter() - start
        found.raise_errors()
        exact = found.overall if exact is None else exact
        tau = kendall_tau(found.overall[rated], human[rated], "c") if rated.any() else float("nan")
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(scorer.model)) / 1e6
        print(
            f"{weights:8s} {dtype:12s} {size:8.1f} {np.abs(found.overall - exact).max():9.1e} "
            f"{kendall_tau(found.overall, exact):8.4f} {tau:8.4f} {seconds:8.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
