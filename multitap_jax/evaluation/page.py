"""An evaluation as one self-contained HTML page: numbers, charts, pictures with the largest errors, the protocol."""

import platform
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from multitap_jax import __version__
from multitap_jax.data.records import Record, iter_records
from multitap_jax.evaluation.correlation import Metrics, Statistic
from multitap_jax.evaluation.report import NO_TARGET, EvaluationReport
from multitap_jax.pages.charts import objectives_chart, scatter_chart
from multitap_jax.pages.elements import (
    Example,
    Interval,
    escaped,
    estimate,
    facts,
    figure,
    folded,
    gallery,
    header,
    paragraphs,
    spelled,
    table,
    write_page,
)

CARDS, TEXTS = 6, 6  # pictures of a section, texts of a picture
LISTED = 200  # ids of a kind that is left out; metrics.json has all
_SECTIONS = {
    "Scored too high": "Pictures with the texts whose score is above people's by most.",
    "Scored too low": "Pictures with the texts whose score is below people's by most.",
    "As people see it": "Pictures whose texts are scored as people score them.",
}


def write_evaluation(
    path: str | Path,
    report: EvaluationReport,
    scores_path: str | Path,
    records_path: str | Path,
    *,
    title: str = "How well do the scores agree with people?",
    more: Sequence[str] = (),
    allow_outside_root: bool = False,
) -> Path:
    """Writes the page.

    Args:
      path: of the page; folders are made.
      report: of these scores and records (`evaluate_files`).
      scores_path, records_path: what it was made of; the pictures of examples come from the records, and one that is
        not there is named in its place.
      title: of the page.
      more: finished HTML that goes between the charts and the pictures, such as a benchmark's table.
      allow_outside_root: as in `load_records`.
    """
    rows = dict(report.objectives) if report.target == NO_TARGET else {"overall score": report.overall}
    rows |= report.objectives
    body = [
        header("multitap report", title, f"{Path(scores_path).name} against {Path(records_path).name}."),
        _agreement(rows),
        *_charts(report),
        *more,
        *_pictures(report, records_path, allow_outside_root),
        "<h2>Protocol</h2>",
        paragraphs([report.protocol]),
        *_left_out(report),
        "<h2>How it was made</h2>",
        facts(_facts(report, scores_path, records_path)),
    ]
    return write_page(path, title, body)


def _interval(statistic: Statistic) -> Interval:
    return Interval(statistic.value, statistic.interval.low, statistic.interval.high)


def _agreement(rows: dict[str, Metrics]) -> str:
    names = {"tau_c": "tau_c", "tau_b": "tau_b", "pearson": "Pearson", "spearman": "Spearman"}
    cells = (
        [escaped(spelled(name)), f"{m.n:,}", *(estimate(_interval(getattr(m, key))) for key in names)]
        for name, m in rows.items()
    )
    return "<h2>Agreement</h2>" + table(["", "n", *names.values()], cells, style="table lead-row")


def _charts(report: EvaluationReport) -> Iterator[str]:
    if report.target != NO_TARGET:
        tau = _interval(report.overall.tau_c)
        words = f"Each dot is one of {report.overall.n:,} pairs, both sides mapped to 0..1. tau_c = {tau}."
        chart = figure(scatter_chart(report.points[:, 1], report.points[:, 0]), "Predicted against human", words)
        yield f"<section class=plots>{chart}</section>"
    if report.objectives:
        rows = [(name, _interval(metrics.tau_c), None) for name, metrics in report.objectives.items()]
        level = f"{next(iter(report.objectives.values())).level:.0%}"
        yield figure(objectives_chart(rows), "Objectives", f"tau_c with people, {level} interval.")


def _pictures(report: EvaluationReport, records_path: str | Path, allow_outside_root: bool) -> Iterator[str]:
    """Sections of pictures, chosen by their texts' errors."""
    if not report.ids:
        return
    error = dict(zip(report.ids, report.points[:, 0] - report.points[:, 1], strict=True))
    points = dict(zip(report.ids, report.points.tolist(), strict=True))
    items = iter_records(records_path, allow_outside_root=allow_outside_root, need_images=False)
    pictures: dict[Path, list[Record]] = {}
    for item in items:
        if isinstance(item, Record) and item.id in error:
            pictures.setdefault(item.images[0], []).append(item)
    signed = {path: [error[record.id] for record in records] for path, records in pictures.items()}
    order = {
        "Scored too high": sorted(signed, key=lambda path: -max(signed[path])),
        "Scored too low": sorted(signed, key=lambda path: min(signed[path])),
        "As people see it": sorted(signed, key=lambda path: float(np.mean(np.abs(signed[path])))),
    }
    for heading, words in _SECTIONS.items():
        chosen = order[heading][:CARDS]
        yield gallery(heading, [_example(path, pictures[path], points, error) for path in chosen], words=words)


def _example(path: Path, records: Sequence[Record], points: dict[str, list[float]], error: dict[str, float]) -> Example:
    """A picture with the texts of largest error."""
    shown = sorted(records, key=lambda record: -abs(error[record.id]))[:TEXTS]
    return Example(path, [(record.text, points[record.id][1], points[record.id][0]) for record in shown])


def _left_out(report: EvaluationReport) -> Iterator[str]:
    for kind, items in report.lists().items():
        if items:
            rest = [f"and {len(items) - LISTED:,} more"] if len(items) > LISTED else []
            yield folded(f"{len(items):,} {kind}", [*items[:LISTED], *rest])


def _facts(report: EvaluationReport, scores_path: str | Path, records_path: str | Path) -> Iterator[tuple[str, str]]:
    yield "scores", f"{scores_path}, {report.n_scores:,} lines"
    yield "records", f"{records_path}, {report.n_records:,} usable"
    yield "computed in", report.dtype
    yield "cut texts", f"{report.truncated:,}"
    overall = report.overall
    yield "bootstrap", f"{overall.samples:,} samples of {overall.n_groups:,} whole groups"
    yield "versions", f"multitap_jax {__version__}, jax {jax.__version__}, Python {platform.python_version()}"
