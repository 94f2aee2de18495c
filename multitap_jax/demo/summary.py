"""What the demo says at its end: the terminal table and the data of report.html."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from multitap_jax import __version__
from multitap_jax.data.records import Record, load_records
from multitap_jax.demo.report import ModelRow, ObjectiveRow, ReportData
from multitap_jax.demo.texts import OBJECTIVES
from multitap_jax.display import TextTable
from multitap_jax.evaluation.correlation import Metrics, Statistic, evaluate_pairs
from multitap_jax.evaluation.scores import read_lines
from multitap_jax.pages.elements import Example, Interval
from multitap_jax.scoring.artefact import Artefact

BOOTSTRAP = 400
RUNS = {
    "trained": "trained",
    "untrained": "untrained",
    "blanked": "pictures blanked",
}
SHOWN = {"tau_b": "tau_b", "tau_c": "tau_c", "Pearson": "pearson", "Spearman": "spearman"}
NOTES = (
    "Pictures, texts and ratings are made by rules in multitap_jax/demo; three simulated annotators with rounding and "
    "noise rate each text. They show that the chain works and learns, not how people judge.",
    "Held-out scenes share no picture with training. tau_c is Stuart's, tau_b corrects for ties; intervals are 95 % "
    "percentile bootstrap intervals over scenes. Prompt official-train, M-RoPE positions, pictures 84 x 84, float32.",
    "The backbone is tiny, so it is first shown right captions of the training scenes, as published backbones come "
    "pre-trained. Untrained is that backbone with a new reward head; trained is after stage 1.",
    "Blanked: the trained model scores the same texts with one grey picture in place of all. What remains of the "
    "agreement is what the texts alone give away.",
    "Each ridge head is fitted on training scenes only, with its own alpha by 5-fold cross-validation over scenes.",
)


@dataclass(frozen=True)
class Judged:
    """Predicted and human numbers of the same held-out pairs, and how well they agree."""

    predicted: np.ndarray
    human: np.ndarray
    metrics: Metrics


@dataclass(frozen=True)
class Results:
    """Everything that was judged: the runs on the overall score, the objectives' heads on their own ratings."""

    records: Sequence[Record]
    runs: Mapping[str, Judged]
    objectives: Mapping[str, Judged]


def judge(heldout: Path, scores: Mapping[str, Path]) -> Results:
    """Compares the score files of the runs with the ratings of the held-out records."""
    records = load_records(heldout).records
    lines = {name: read_lines(path) for name, path in scores.items()}
    human = [float(r.score or 0) for r in records]
    runs = {
        name: _judge([found.overall.get(r.id, float("nan")) for r in records], human, records)
        for name, found in lines.items()
    }
    objectives = {}
    for name in OBJECTIVES:
        rated = [r for r in records if r.ratings.get(name) is not None]
        predicted = [lines["trained"].objectives[name][r.id] for r in rated]
        objectives[name] = _judge(predicted, [float(r.ratings[name] or 0) for r in rated], rated)
    return Results(records, runs, objectives)


def _judge(predicted: list[float], human: list[float], records: Sequence[Record]) -> Judged:
    groups = [r.group or r.id for r in records]
    metrics = evaluate_pairs(predicted, human, groups=groups, samples=BOOTSTRAP)
    return Judged(np.asarray(predicted), np.asarray(human), metrics)


def summary_table(results: Results) -> TextTable:
    """Agreement of the three runs and of the seven heads, for the terminal.

    The heads predict in points of the raters' scale, and within half of one is a hit; a score from 0 to 1 has no such
    points.
    """
    table = TextTable(
        title=f"Agreement with the ratings of {len(results.records):,} held-out pairs",
        caption="above the line the reward head's score, below it one ridge head for each kind of rating",
    )
    for name in ("", "tau_c [95 %]", "tau_b", "Pearson", "Spearman", "±0.5 points"):
        wide = name in ("", "tau_c [95 %]")
        table.add_column(name, justify="left" if wide else "right", no_wrap=wide)
    for name, judged in [*((RUNS[n], j) for n, j in results.runs.items()), *results.objectives.items()]:
        if name == OBJECTIVES[0]:
            table.add_section()
        found = judged.metrics
        others = (found.tau_b, found.pearson, found.spearman)
        table.add_row(
            name.replace("_", " "),
            f"{found.tau_c.value:.2f} [{found.tau_c.interval.low:.2f}, {found.tau_c.interval.high:.2f}]",
            *(f"{statistic.value:.2f}" for statistic in others),
            f"{found.accuracy.value:.0%}" if name in results.objectives else "",
        )
    return table


def _interval(statistic: Statistic) -> Interval:
    return Interval(statistic.value, statistic.interval.low, statistic.interval.high)


def report_data(
    results: Results, artefact: Artefact, metrics_file: Path, phases: Mapping[str, float], facts: Mapping[str, str]
) -> ReportData:
    """Gathers what report.html shows."""
    rows = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
    saved = {objective.name: objective for objective in artefact.manifest.objectives}
    trained = results.runs["trained"]
    return ReportData(
        facts=[*facts.items(), *_surroundings()],
        phases=list(phases.items()),
        models=[
            ModelRow(RUNS[name], {shown: _interval(j.metrics.statistics()[key]) for shown, key in SHOWN.items()})
            for name, j in results.runs.items()
        ],
        train_loss=[(row["step"], row["loss"]) for row in rows if row.get("loss") is not None],
        heldout_loss=[(row["step"], row["evaluation"]["loss"]) for row in rows if "evaluation" in row],
        human=trained.human,
        predicted=trained.predicted,
        objectives=[
            ObjectiveRow(
                name,
                _interval(judged.metrics.tau_c),
                judged.metrics.accuracy.value,
                saved[name].alpha or 0.0,
                saved[name].cv_score or 0.0,
            )
            for name, judged in results.objectives.items()
        ],
        examples=_examples(results.records, trained),
        notes=NOTES,
    )


def _surroundings() -> list[tuple[str, str]]:
    versions = f"multitap_jax {__version__}, jax {jax.__version__}, Python {platform.python_version()}"
    return [
        ("versions", versions),
        ("hardware", f"{os.cpu_count()} {platform.machine()} cores, {jax.device_count()} device"),
    ]


def _examples(records: Sequence[Record], judged: Judged) -> list[tuple[str, list[Example]]]:
    """Scenes ranked best and worst by the model, and those with the largest single error."""
    scenes: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        scenes.setdefault(str(record.images[0]), []).append(index)

    def agreement(indexes: list[int]) -> float:
        return float(np.corrcoef(judged.predicted[indexes], judged.human[indexes])[0, 1])

    def error(indexes: list[int]) -> float:
        return float(np.abs(judged.predicted[indexes] - judged.human[indexes]).max())

    full = [
        i for i in scenes.values() if len(i) > 2 and np.ptp(judged.human[i]) > 0 and np.ptp(judged.predicted[i]) > 0
    ]
    ranked = sorted(full, key=agreement)
    sections = [
        ("Ordered as the raters order them", ranked[::-1][:4]),
        ("Typical", ranked[len(ranked) // 2 : len(ranked) // 2 + 4]),
        ("Largest errors", sorted(full, key=error)[::-1][:4]),
    ]
    return [
        (heading, [Example(records[i[0]].images[0], _texts(records, judged, i)) for i in chosen])
        for heading, chosen in sections
        if chosen
    ]


def _texts(records: Sequence[Record], judged: Judged, indexes: list[int]) -> list[tuple[str, float, float]]:
    order = sorted(indexes, key=lambda i: -judged.human[i])
    return [(records[i].text, float(judged.human[i]), float(judged.predicted[i])) for i in order]
