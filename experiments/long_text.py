"""What a long text costs, and whether its score stays: the same pairs with more and more sentences that say nothing.

  python -m experiments.long_text [--demo=demo_run] [--lengths=256,1024,4096,12288]

Filler goes before the guidance that is judged, or behind it. The judge has seen no text of more than some 60 tokens in
training, so nothing promises that its scores stay; what is exact is that a long text is read to its end, and what is
measured is how far its score moves, whether pairs keep their order, and what a token costs.
"""

import argparse
import time
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments.common import demo_of, keep, parser
from multitap_jax.data.records import Record, load_records
from multitap_jax.display import TextTable
from multitap_jax.evaluation.correlation import kendall_tau
from multitap_jax.scoring.scorer import Scorer

FILLER = "As you may know, there are things here. I hope that you enjoy your walk. Let me tell you what I see."


class Row(NamedTuple):
    """Scores of the pairs at one length: tokens a pair, and against the pairs as they are."""

    where: str
    tokens: float
    people: float
    order: float
    moved: float
    seconds: float


def lengthened(record: Record, words: int, where: str) -> str:
    """The text with about so many words of filler before it or behind it."""
    filler = FILLER.split()
    more = " ".join((filler * (words // len(filler) + 1))[:words])
    return f"{more} {record.text}" if where == "before" else f"{record.text} {more}"


def measure(options: argparse.Namespace) -> list[Row]:
    """Scores all pairs at each length; compilation is not counted."""
    demo = demo_of(options)
    records = load_records(demo.heldout).records[: options.pairs]
    human = np.array([record.score for record in records], np.float64)
    longest = max(options.lengths)
    scorer = Scorer.from_pretrained(demo.artefact, max_length=2 * longest + 1024)
    images, requests = [list(record.images) for record in records], [record.request for record in records]

    def scores(texts: list[str]) -> tuple[np.ndarray, float, float]:
        ask = lambda: scorer.score(images=images, texts=texts, requests=requests)
        ask()
        start = time.perf_counter()
        found = ask()
        if failed := [error for error in found.errors if error]:
            raise SystemExit(f"{len(failed)} of {len(texts)} pairs have no score: {failed[0]}")
        return found.overall, float(np.mean(found.n_tokens)), time.perf_counter() - start

    plain, tokens, seconds = scores([record.text for record in records])
    rows = [Row("as it is", tokens, kendall_tau(plain, human, "c"), 1.0, 0.0, seconds / len(records))]
    for where in ("before", "behind"):
        for length in options.lengths:
            found, tokens, seconds = scores([lengthened(record, length, where) for record in records])
            moved = float(np.abs(found - plain).mean())
            people, order = kendall_tau(found, human, "c"), kendall_tau(found, plain)
            rows.append(Row(where, tokens, people, order, moved, seconds / len(records)))
    return rows


def table_of(rows: list[Row]) -> TextTable:
    """A row a length."""
    table = TextTable(title="The same pairs, with filler that says nothing")
    for name in ("filler", "tokens", "tau_c with people", "tau_b with short", "score moved", "s a pair", "us a token"):
        table.add_column(name, justify="left" if name == "filler" else "right")
    for row in rows:
        cost = (f"{row.seconds:.3f}", f"{1e6 * row.seconds / row.tokens:.0f}")
        table.add_row(row.where, f"{row.tokens:,.0f}", *(f"{v:.3f}" for v in (row.people, row.order, row.moved)), *cost)
    return table


def figure_of(rows: list[Row]) -> Figure:
    """Order kept, and cost, over length."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for where, mark in (("before", "o-"), ("behind", "s-")):
        found = [rows[0], *(row for row in rows if row.where == where)]
        tokens = [row.tokens for row in found]
        left.plot(tokens, [row.people for row in found], mark, label=f"filler {where} the text")
        right.plot(tokens, [row.seconds for row in found], mark, label=f"filler {where} the text")
    left.set(xscale="log", xlabel="tokens a pair", ylabel="Kendall tau_c with people")
    left.axhline(0, color="0.7", linewidth=1)
    right.set(xscale="log", yscale="log", xlabel="tokens a pair", ylabel="seconds a pair")
    left.legend(fontsize=8)
    return figure


def main() -> None:
    """Runs the experiment."""
    flags = parser(__doc__)
    flags.add_argument("--pairs", type=int, default=48, help="held-out pairs")
    flags.add_argument(
        "--lengths", type=lambda text: [int(part) for part in text.split(",")], default=[256, 1024, 4096, 12288],
        help="words of filler",
    )  # fmt: skip
    options: argparse.Namespace = flags.parse_args()
    rows = measure(options)
    keep("long_text", options, table_of(rows), figure_of(rows), {"rows": [row._asdict() for row in rows]})


if __name__ == "__main__":
    main()
