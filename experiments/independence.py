"""Does each ridge head keep its own objective when people rate two of them alike, or against each other?

  python -m experiments.independence [--demo=demo_run]

Two objectives are made on the demo's embeddings: linear in them, correlated as we say, and rated with noise. Each
gets its head by the house's own procedure; held-out scenes then tell what the head follows. Beside them stands one
blended score, the ridge head of the mean of both ratings: what there is where objectives are mixed into one number.
"""

import argparse
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments.common import demo_of, keep, parser
from multitap_jax.display import TextTable
from multitap_jax.evaluation.correlation import kendall_tau, pearson
from multitap_jax.stage2 import EmbeddingStore, RidgeHead

CORRELATIONS = (-0.9, -0.6, -0.3, 0.0, 0.3, 0.6, 0.9)
DIRECTIONS = 8  # principal components that an objective is made of
NOISE = 1.0  # standard deviation of a rating; objectives have 1


class Row(NamedTuple):
    """One correlation: between the objectives in truth, ratings and heads; what heads follow; tau with the truth."""

    correlation: float
    ratings: float
    heads: float
    own: float
    other: float
    tau_own: float
    tau_blended: float


def objectives(embeddings: np.ndarray, correlation: float, rng: np.random.Generator) -> np.ndarray:
    """Two true objectives [N, 2] of variance 1 that correlate so, linear in the leading principal components."""
    centred = embeddings - embeddings.mean(0)
    parts, _, _ = np.linalg.svd(centred, full_matrices=False)
    whitened = parts[:, : 2 * DIRECTIONS] * np.sqrt(len(embeddings))
    mix = np.linalg.qr(rng.standard_normal((2 * DIRECTIONS, 2)))[0]
    first, second = (whitened @ mix).T
    return np.stack([first, correlation * first + np.sqrt(1 - correlation**2) * second], axis=1)


def measure(embeddings: np.ndarray, groups: np.ndarray, correlation: float, rng: np.random.Generator) -> Row:
    """Fits on four scenes of five, and looks at the rest."""
    true = objectives(embeddings, correlation, rng)
    ratings = true + NOISE * rng.standard_normal(true.shape)
    _, scene = np.unique(groups, return_inverse=True)
    held = scene % 5 == 0
    fit = lambda y: RidgeHead().fit(embeddings[~held], y[~held], groups=groups[~held]).predict(embeddings[held])
    heads, blended = fit(ratings), fit(ratings.mean(1))
    seen = true[held] - true[held].mean(0)
    mixture = np.linalg.lstsq(seen, heads - heads.mean(0), rcond=None)[0]
    return Row(
        correlation,
        pearson(*ratings[held].T),
        pearson(*heads.T),
        float(np.diag(mixture).mean()),
        float((mixture[0, 1] + mixture[1, 0]) / 2),
        float(np.mean([kendall_tau(heads[:, i], seen[:, i]) for i in range(2)])),
        float(np.mean([kendall_tau(blended, seen[:, i]) for i in range(2)])),
    )


def table_of(rows: list[Row]) -> TextTable:
    """A row a correlation."""
    table = TextTable(title="Two objectives on the same embeddings, held-out scenes")
    heads = ("truth", "ratings", "heads", "own", "other", "tau, own head", "tau, blended")
    for name in heads:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(f"{row.correlation:+.1f}", *(f"{value:+.3f}" for value in row[1:]))
    table.caption = "truth, ratings, heads: correlation of the two; own, other: what a head's prediction is made of"
    return table


def figure_of(rows: list[Row]) -> Figure:
    """Correlations on the left, tau on the right."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    truth = [row.correlation for row in rows]
    left.plot(truth, truth, color="0.6", linestyle="--", linewidth=1, label="as in the truth")
    left.plot(truth, [row.heads for row in rows], "o-", label="heads")
    left.plot(truth, [row.ratings for row in rows], "s-", label="ratings (noise weakens)", alpha=0.6)
    left.set(xlabel="true correlation of the two objectives", ylabel="correlation found")
    left.legend(fontsize=8)
    right.plot(truth, [row.tau_own for row in rows], "o-", label="a head for each")
    right.plot(truth, [row.tau_blended for row in rows], "s-", label="one blended score", color="tab:red")
    right.set(xlabel="true correlation of the two objectives", ylabel="Kendall tau_b with the true objective")
    right.legend(fontsize=8)
    return figure


def run(options: argparse.Namespace) -> list[Row]:
    """All correlations."""
    embeddings, _, groups = EmbeddingStore(demo_of(options).embeddings).load()
    rng = np.random.default_rng(options.seed)
    return [measure(embeddings.astype(np.float64), np.asarray(groups), c, rng) for c in CORRELATIONS]


def main() -> None:
    """Runs the experiment."""
    options = parser(__doc__).parse_args()
    rows = run(options)
    keep("independence", options, table_of(rows), figure_of(rows), {"rows": [row._asdict() for row in rows]})


if __name__ == "__main__":
    main()
