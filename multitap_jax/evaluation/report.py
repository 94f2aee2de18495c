"""A report from two files: what was scored and what people said. Nothing that could not be compared is hidden."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from multitap_jax.data.records import Record, Rejected, group_keys, iter_records
from multitap_jax.data.tables import RecordsError
from multitap_jax.display import TextTable
from multitap_jax.evaluation.correlation import Metrics, Statistic, evaluate_pairs
from multitap_jax.evaluation.scores import Problem, ScoreLines, computed_in, read_lines, read_note, seen_before
from multitap_jax.pages.charts import objectives_chart, scatter_chart
from multitap_jax.pages.elements import Interval, spelled

NO_TARGET = "none"  # compare the objectives only
PREFERENCE = "ratings.preference"
_OF_A_GROUP = (
    f"{PREFERENCE} orders records of one group only; count it by a protocol, --benchmark=NAME (`multitap evaluate "
    "--help` lists them)"
)
SHOWN = 3  # examples of a problem in the table; the JSON lists all


@dataclasses.dataclass(frozen=True)
class EvaluationReport:
    """Agreement of a scores file with the records' human scores.

    Attributes:
      protocol: what was compared, how, in words.
      target: the human score that `overall` was compared with: "score", "ratings.NAME", or "none".
      dtype: of the computation that made the scores, or "unknown".
      overall: overall score against the target, both in [0, 1].
      objectives: every predicted objective against the ratings of its name, in the units of the ratings.
      n_records, n_scores: usable records, lines of the scores file.
      truncated: scored lines whose text was cut.
      unrated: ids of scored records without the target. missing: of records without a line of scores.
      duplicates: ids on more than one line of scores (the first counts). unknown: ids that are no record.
      unpredicted: rated objectives that the scores do not have.
      problems: lines of scores with an error, or without a usable number. rejected: unusable records.
      warnings: what makes the numbers mean less than they seem.
      points: float64[N, 2], (score, target) of the pairs of `overall`. ids: their N records.
    """

    protocol: str
    target: str
    dtype: str
    overall: Metrics
    objectives: dict[str, Metrics]
    n_records: int
    n_scores: int
    truncated: int
    unrated: list[str]
    missing: list[str]
    duplicates: list[str]
    unknown: list[str]
    unpredicted: list[str]
    problems: list[Problem]
    rejected: list[Rejected]
    warnings: tuple[str, ...]
    points: np.ndarray = dataclasses.field(repr=False)
    ids: list[str] = dataclasses.field(repr=False)

    def lists(self) -> dict[str, list[str]]:
        """Everything that was not compared, by kind, as text."""
        return {
            "records without a score": self.missing,
            "scored records without a human score": self.unrated,
            "ids scored more than once (the first counts)": self.duplicates,
            "scored ids that are no record": self.unknown,
            "rated objectives without a prediction": self.unpredicted,
            "unusable lines of scores": [f"line {p.line}, id {p.id}: {p.reason}" for p in self.problems],
            "rejected records": [f"line {r.line}, id {r.id}: {r.reason}" for r in self.rejected],
        }

    def table(self) -> TextTable:
        """Correlations and the counts of what was left out, in 80 columns; `to_json` has all numbers and intervals."""
        table = TextTable(title="Agreement with people", caption=Text(self._caption()), caption_justify="left")
        for name in ("", "n", f"tau_c [{self.overall.level:.0%}]", "tau_b", "Pearson", "Spearman"):
            table.add_column(name, justify="left" if name == "" else "right", no_wrap=name != "")
        for name, metrics in self._rows():
            others = (_cell(getattr(metrics, statistic)) for statistic in ("tau_b", "pearson", "spearman"))
            table.add_row(Text(name), f"{metrics.n:,}", _cell(metrics.tau_c, interval=True), *others)
        return table

    def _rows(self) -> list[tuple[str, Metrics]]:
        """A list: an objective may well be called "overall score" too."""
        return [*([] if self.target == NO_TARGET else [("overall score", self.overall)]), *self.objectives.items()]

    def to_json(self) -> str:
        """The whole report; numbers that do not exist are null, with their reason."""
        return json.dumps(plain(shown(self)), indent=2, allow_nan=False)

    def save(self, folder: str | Path) -> None:
        """Writes metrics.json, overall.png (scores against people) and, with objectives, objectives.png."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text(self.to_json() + "\n", encoding="utf-8")
        if self.target != NO_TARGET:
            label = f"human: {self.target}, mapped to 0..1"
            title = f"tau_c {interval_of(self.overall.tau_c)}, n = {self.overall.n:,}"
            chart = scatter_chart(self.points[:, 1], self.points[:, 0], label=label, title=title)
            chart.savefig(folder / "overall.png")
        if self.objectives:
            what = f"Kendall's tau_c with people, {self.overall.level:.0%} interval"
            objectives_chart(tau_bars(self.objectives), what=what).savefig(folder / "objectives.png")

    def _caption(self) -> str:
        lines = [self.protocol, *(f"WARNING: {warning}" for warning in self.warnings)]
        for kind, items in self.lists().items():
            if items:
                more = ", ..." if len(items) > SHOWN else ""
                lines.append(f"{len(items):,} {kind}: {', '.join(items[:SHOWN])}{more}")
        lines += [f"{name}: tau undefined: {m.tau_b.reason}" for name, m in self._rows() if m.tau_b.reason]
        return "\n".join(lines)


def evaluate_files(
    scores_path: str | os.PathLike[str],
    records_path: str | os.PathLike[str],
    *,
    target: str | None = None,
    target_range: tuple[float, float] | None = None,
    bootstrap_samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    tolerance: float = 0.5,
    dtype: str | None = None,
    allow_outside_root: bool = False,
) -> EvaluationReport:
    """Joins scores with records by id and measures their agreement. The pictures need not be there.

    Args:
      scores_path: JSON lines `{"id", "score", "scores": {objective: number}, "truncated", "error"}`.
      records_path: records file or folder.
      target: "score" or "ratings.NAME": what people said about the whole; "none" compares the objectives only. None
        takes what the model was trained on, where `multitap score` noted it, else "score".
      target_range: values of the target that map to 0 and 1. None takes the noted ones with the noted target, else 0
        and 1.
      bootstrap_samples, seed, level: of the intervals; records that share a group or picture are resampled together.
      tolerance: of the accuracy.
      dtype: of the computation that made the scores, for the report; None takes what `multitap score` noted.
      allow_outside_root: as in `load_records`.

    Raises:
      RecordsError: a file is missing or of the wrong kind; no record has the target, or one lies outside its range.
    """
    note = read_note(scores_path)
    target, target_range = _target(note, target, target_range, records_path)
    items = list(iter_records(Path(records_path), allow_outside_root=allow_outside_root, need_images=False))
    records = [item for item in items if isinstance(item, Record)]
    scores = read_lines(scores_path)
    dtype = dtype or computed_in(note) or "unknown"
    _check_target(records, target, records_path)
    groups = dict(zip((record.id for record in records), group_keys(records), strict=True))
    options: dict[str, Any] = {"samples": bootstrap_samples, "seed": seed, "level": level, "tolerance": tolerance}
    scored = [] if target == NO_TARGET else [record for record in records if record.id in scores.overall]
    rated = [record for record in scored if record.target(target) is not None]
    points = [(scores.overall[record.id], _on_scale(record, target, *target_range)) for record in rated]
    pred, human = np.array(points, np.float64).reshape(-1, 2).T
    objectives = _objectives(records, scores, groups, options)
    overall = evaluate_pairs(pred, human, groups=[groups[record.id] for record in rated], **options)
    rejected = [item for item in items if isinstance(item, Rejected)]
    return EvaluationReport(
        protocol=_protocol(target, target_range, overall, objectives, scores.truncated, dtype),
        target=target,
        dtype=dtype,
        overall=overall,
        objectives=objectives,
        n_records=len(records),
        n_scores=scores.lines,
        truncated=scores.truncated,
        unrated=[record.id for record in scored if record.target(target) is None],
        missing=[record.id for record in records if record.id not in scores.seen],
        duplicates=list(scores.duplicates),
        unknown=sorted(scores.seen - groups.keys() - {item.id for item in rejected}),
        unpredicted=[n for n in dict.fromkeys(n for r in records for n in r.ratings) if n not in scores.objectives],
        problems=scores.problems,
        rejected=rejected,
        warnings=(
            *seen_before(Path(scores_path), [r for r in records if r.id in scores.seen]),
            *_off_scale(pred, rated),
        ),
        points=np.stack([pred, human], axis=1),
        ids=[record.id for record in rated],
    )


def _objectives(
    records: list[Record], scores: ScoreLines, groups: dict[str, str], options: dict[str, Any]
) -> dict[str, Metrics]:
    """Every predicted objective against the ratings of its name."""
    out = {}
    for name, values in scores.objectives.items():
        pairs = [(r.id, values[r.id], y) for r in records if r.id in values and (y := r.ratings.get(name)) is not None]
        ids, guesses, truths = zip(*pairs, strict=True) if pairs else ((), (), ())
        out[name] = evaluate_pairs(guesses, truths, groups=[groups[i] for i in ids], **options)
    return out


def _off_scale(pred: np.ndarray, rated: list[Record]) -> tuple[str, ...]:
    """A warning where scores are not on the scale that the error, the accuracy and the charts are of; else nothing."""
    off = np.flatnonzero((pred < 0) | (pred > 1))
    if not len(off):
        return ()
    first = f"{rated[off[0]].id}: {pred[off[0]]:g}"
    return (
        f"{len(off):,} of {len(pred):,} overall scores lie outside 0 to 1, the first of {first}; correlations do not "
        "mind, but squared error, accuracy, charts and chosen pictures mean nothing",
    )


def _target(
    note: dict[str, Any],
    target: str | None,
    target_range: tuple[float, float] | None,
    records_path: str | os.PathLike[str],
) -> tuple[str, tuple[float, float]]:
    """What was asked for, else what the model was trained on, else the score. Raises RecordsError for what is none."""
    trained = note.get("trained_on")
    name, scale = "score", (0.0, 1.0)
    if isinstance(trained, dict) and target in (None, trained.get("target")):
        name, scale = str(trained["target"]), trained["target_range"]
    target, (low, high) = target or name, target_range or scale
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise RecordsError(f"target_range {(low, high)}: expected two finite numbers, the first below the second")
    if target == PREFERENCE:
        raise RecordsError(f"{records_path}: {_OF_A_GROUP}")
    if target not in ("score", NO_TARGET) and not target.startswith("ratings."):
        raise RecordsError(f"target {target!r}: expected 'score' or 'ratings.NAME' (--target), or 'none'")
    return target, (float(low), float(high))


def _check_target(records: list[Record], target: str, path: str | os.PathLike[str]) -> None:
    """Raises RecordsError, naming the numbers there are, where no record has the target."""
    if target == NO_TARGET or not records or any(record.target(target) is not None for record in records):
        return
    there = ["score"] * any(record.score is not None for record in records)
    rated = dict.fromkeys(f"ratings.{n}" for r in records for n, value in r.ratings.items() if value is not None)
    there += [name for name in rated if name != PREFERENCE]
    if PREFERENCE in rated and not there:
        raise RecordsError(f"{path}: {_OF_A_GROUP}")
    choice = f"it has {', '.join(there)}: choose one with --target={there[0]}" if there else "it has no human scores"
    raise RecordsError(f"{path}: no record has {target}; {choice}, or compare the objectives only with --target=none")


def _on_scale(record: Record, target: str, low: float, high: float) -> float:
    value = record.target(target)
    assert value is not None  # the caller chose the records that have one
    if not low <= value <= high:
        raise RecordsError(
            f"record {record.id!r} (line {record.line}): {target} = {value:g} lies outside target_range "
            f"({low:g}, {high:g}); give the lowest and the highest value of their scale, such as --target_range=1,5"
        )
    return (value - low) / (high - low)


def _protocol(
    target: str,
    target_range: tuple[float, float],
    overall: Metrics,
    objectives: dict[str, Metrics],
    truncated: int,
    dtype: str,
) -> str:
    low, high = target_range
    mapped = "" if target_range == (0.0, 1.0) else f", mapped from [{low:g}, {high:g}] to [0, 1]"
    first = f"its overall score against {target}{mapped}; "
    counts = (
        f"n = {overall.n:,} records with a score and a human score; of their {overall.n * (overall.n - 1) // 2:,} "
        f"pairs {overall.ties_pred:,} have equal scores, {overall.ties_human:,} equal human scores. "
    )
    metrics = overall
    if target == NO_TARGET:
        first, counts, metrics = "", "", next(iter(objectives.values()), overall)
    return (
        f"Each record counts once: {first}objectives against the ratings of their name, in the units of the ratings. "
        "tau_b and tau_c are Kendall's: tau_b is corrected for pairs of records with equal numbers, tau_c is Stuart's. "
        f"The accuracy in metrics.json is the share within {metrics.tolerance:g} of what people said. "
        f"Intervals: {metrics.level:.0%} percentile bootstrap, {metrics.samples:,} samples of whole groups "
        f"({metrics.n_groups:,} groups of records that share a group or picture). "
        f"{counts}Scores computed in dtype {dtype}; {truncated:,} texts truncated."
    )


def interval_of(statistic: Statistic, times: float = 1) -> Interval:
    """A statistic as pages and charts show it."""
    return Interval(times * statistic.value, times * statistic.interval.low, times * statistic.interval.high)


def tau_bars(found: Mapping[str, Metrics]) -> list[tuple[str, Interval]]:
    """Rows of `objectives_chart`: the tau_c of each, and of how many pairs."""
    return [(f"{spelled(name)} (n = {m.n:,})", interval_of(m.tau_c)) for name, m in found.items()]


def _cell(statistic: Statistic, *, interval: bool = False) -> str:
    if math.isnan(statistic.value):
        return "-"
    if not interval or math.isnan(statistic.interval.low):
        return f"{statistic.value:.2f}"
    return f"{statistic.value:.2f} [{statistic.interval.low:.2f}, {statistic.interval.high:.2f}]"


def shown(report: Any) -> dict[str, Any]:
    """The fields of a dataclass that are shown; others are of records one by one."""
    return {field.name: getattr(report, field.name) for field in dataclasses.fields(report) if field.repr}


def plain(value: Any) -> Any:
    """Dataclasses to dicts, NaN to null, all the way down."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
