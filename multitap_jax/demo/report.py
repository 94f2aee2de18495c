"""The page of the demo."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from multitap_jax.pages.charts import framed, loss_chart, objectives_chart, scatter_chart, scatter_words
from multitap_jax.pages.elements import (
    Example,
    Interval,
    escaped,
    estimate,
    facts,
    gallery,
    header,
    paragraphs,
    spelled,
    table,
    write_page,
)


@dataclasses.dataclass(frozen=True)
class ModelRow:
    """One row of the summary: a model and its agreement with people on the held-out pairs.

    `metrics` maps a metric's name ("tau_b", "tau_c", "Pearson", "Spearman") to its estimate; rows share their names.
    """

    name: str
    metrics: Mapping[str, Interval]


@dataclasses.dataclass(frozen=True)
class ObjectiveRow:
    """One ridge head: held-out tau_c, share of predictions within half a point, and the alpha that was chosen."""

    name: str
    tau: Interval
    accuracy: float
    alpha: float
    cv_score: float


@dataclasses.dataclass(frozen=True)
class ReportData:
    """All that the report shows, as plain values.

    Attributes:
      facts: (name, value) pairs on what was run: model, data, hardware, versions, command.
      phases: (name, seconds) of each phase, in order.
      models: the trained model first, then its controls (untrained, blanked pictures).
      train_loss: (step, loss) of every logged training step.
      heldout_loss: (step, loss) of every evaluation.
      human: float[N], human scores in [0, 1] of the held-out pairs.
      predicted: float[N], scores of the trained model for the same pairs.
      objectives: one row a ridge head.
      examples: (heading, examples) sections, for instance "Best ranked", "Largest errors".
      notes: paragraphs on the protocol.
    """

    facts: Sequence[tuple[str, str]]
    phases: Sequence[tuple[str, float]]
    models: Sequence[ModelRow]
    train_loss: Sequence[tuple[int, float]]
    heldout_loss: Sequence[tuple[int, float]]
    human: np.ndarray
    predicted: np.ndarray
    objectives: Sequence[ObjectiveRow]
    examples: Sequence[tuple[str, Sequence[Example]]]
    notes: Sequence[str]


def write_report(path: str | Path, data: ReportData) -> Path:
    """Writes the report to `path` (folders are made) and returns the path."""
    trained = data.models[0]
    loss_text = "Mean squared error between predicted and human score."
    scatter_text = f"{scatter_words(len(data.human))} held out. tau_c = {trained.metrics['tau_c']}."
    bars_text = "Bars: held-out tau_c with its 95 % interval. Dots: share of predictions within half a point."
    body = [
        header(
            "multitap demo",
            "Does this text fit this picture?",
            "A small model learns from the ratings of simulated annotators how well guidance fits a street scene; then "
            "each ridge head reads one rating from its frozen state. Agreement is on scenes it never saw.",
        ),
        _summary(data.models),
        "<section class=plots>",
        framed(loss_chart(data.train_loss, data.heldout_loss), "Learning", loss_text),
        framed(scatter_chart(data.human, data.predicted), "Predicted against human", scatter_text),
        "</section>",
        framed(_bars(data.objectives), "One head an objective", bars_text),
        _objective_table(data.objectives),
        *(gallery(heading, examples, alt="A street scene") for heading, examples in data.examples),
        "<h2>How it was run</h2><section class=columns>",
        facts(data.facts),
        facts([(name, f"{seconds:.1f} s") for name, seconds in data.phases]),
        "</section><h2>Protocol</h2>",
        paragraphs(data.notes),
    ]
    return write_page(path, "multitap demo report", body)


def _bars(rows: Sequence[ObjectiveRow]) -> Figure:
    bars = [(spelled(row.name), row.tau) for row in rows]
    return objectives_chart(bars, dots=[row.accuracy for row in rows], legend="within 0.5 points")


def _summary(models: Sequence[ModelRow]) -> str:
    names = list(models[0].metrics)
    rows = ([escaped(row.name), *(estimate(row.metrics[name]) for name in names)] for row in models)
    return "<h2>Agreement with the raters</h2>" + table(
        ["Model", *(escaped(name) for name in names)], rows, style="table lead-row"
    )


def _objective_table(rows: Sequence[ObjectiveRow]) -> str:
    head = ["Objective", "tau_c", "Within 0.5 points", "Alpha", "Cross-validated R²"]
    cells = (
        [escaped(spelled(r.name)), estimate(r.tau), f"{r.accuracy:.1%}", f"{r.alpha:.3g}", f"{r.cv_score:.3f}"]
        for r in rows
    )
    return table(head, cells)
