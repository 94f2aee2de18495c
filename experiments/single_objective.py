"""One objective: what stage 1 adds to a backbone that is asked as it comes off the shelf.

  python -m experiments.single_objective [--demo=demo_run] [--pairs=240]

The demo's held-out pairs, scored by the base model in the ways that need no training (the probability of "Yes", the
expected number from 0 to 9), by a ridge head on the base's frozen states, and by the model after stage 1, which is
also shown blanked pictures. Agreement is with the overall rating.
"""

import argparse
from collections.abc import Iterator

import numpy as np

from experiments.common import Demo, demo_of, keep, parser
from multitap_jax.data.records import Record, load_records
from multitap_jax.display import TextTable
from multitap_jax.evaluation.baselines import Judge
from multitap_jax.evaluation.correlation import Metrics, evaluate_pairs
from multitap_jax.evaluation.report import tau_bars
from multitap_jax.evaluation.scores import read_scores
from multitap_jax.pages.charts import objectives_chart
from multitap_jax.scoring.scorer import Scorer
from multitap_jax.stage2 import RidgeHead


def asked(records: list[Record]) -> dict[str, list]:
    """Pairs as judges and scorers take them."""
    return {
        "images": [list(record.images) for record in records],
        "texts": [record.text for record in records],
        "requests": [record.request for record in records],
    }


def measures(options: argparse.Namespace, demo: Demo, records: list[Record]) -> Iterator[tuple[str, np.ndarray]]:
    """Name and scores float[N] of each way to score the records."""
    judge = Judge.from_pretrained(demo.base, image_policy="square:84")
    yield "off the shelf: P(yes)", judge.p_yes(**asked(records)).p_yes
    yield "off the shelf: expected number", judge.expected_score(**asked(records), top=None).scores
    untrained = Scorer.from_pretrained(demo.folder / "untrained")
    learned = load_records(demo.train).records[: options.learned]
    states, heldout = (untrained.embed(**asked(part)).values for part in (learned, records))
    target = np.array([record.score for record in learned])
    groups = [str(record.group) for record in learned]
    yield "frozen base, ridge head", RidgeHead().fit(states, target, groups=groups).predict(heldout)
    everything = load_records(demo.heldout).records
    ids = [record.id for record in everything]
    for name, said in {"trained": "stage 1", "blanked": "stage 1, pictures blanked"}.items():
        scores = dict(zip(ids, read_scores(demo.scores(name), everything), strict=True))
        yield said, np.array([scores[record.id] for record in records])


def measure(options: argparse.Namespace) -> dict[str, Metrics]:
    """Agreement of each with the overall rating."""
    demo = demo_of(options)
    records = load_records(demo.heldout).records[: options.pairs]
    human = np.array([record.score for record in records], np.float64)
    groups = [str(record.group) for record in records]
    found = {}
    for name, scores in measures(options, demo, records):
        usable = np.isfinite(scores)
        if not usable.all():
            name += f" ({(~usable).sum()} without an answer)"
        kept = [group for group, good in zip(groups, usable, strict=True) if good]
        found[name] = evaluate_pairs(scores[usable], human[usable], groups=kept, samples=400)
    return found


def table_of(found: dict[str, Metrics]) -> TextTable:
    """A row a way to score."""
    table = TextTable(title="Agreement with the overall rating of held-out pairs")
    for name in ("", "n", "tau_c [95 %]", "Pearson", "Spearman"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, metrics in found.items():
        tau = metrics.tau_c
        interval = f"{tau.value:.2f} [{tau.interval.low:.2f}, {tau.interval.high:.2f}]"
        table.add_row(name, f"{metrics.n}", interval, f"{metrics.pearson.value:.2f}", f"{metrics.spearman.value:.2f}")
    return table


def main() -> None:
    """Runs the experiment."""
    flags = parser(__doc__)
    flags.add_argument("--pairs", type=int, default=240, help="held-out pairs")
    flags.add_argument("--learned", type=int, default=2400, help="training pairs of the ridge head")
    options = flags.parse_args()
    found = measure(options)
    numbers = {name: {key: s.value for key, s in metrics.statistics().items()} for name, metrics in found.items()}
    keep("single_objective", options, table_of(found), objectives_chart(tau_bars(found)), numbers)


if __name__ == "__main__":
    main()
