"""An evaluation as one self-contained HTML page: numbers, charts, pictures with the largest errors, the protocol."""

import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from multitap_jax import __version__
from multitap_jax.data.records import Record, iter_records
from multitap_jax.evaluation.benchmark import BenchmarkReport
from multitap_jax.evaluation.correlation import Metrics
from multitap_jax.evaluation.report import NO_TARGET, EvaluationReport, interval_of, tau_bars
from multitap_jax.pages.charts import framed, objectives_chart, scatter_chart, scatter_words
from multitap_jax.pages.elements import (
    Example,
    escaped,
    estimate,
    facts,
    folded,
    gallery,
    header,
    paragraphs,
    spelled,
    table,
    write_page,
)

TITLE = "How well do the scores agree with people?"
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
    title: str = TITLE,
    allow_outside_root: bool = False,
) -> Path:
    """Writes the page of an evaluation.

    Args:
      path: of the page; folders are made.
      report: of these scores and records (`evaluate_files`).
      scores_path, records_path: what it was made of; the pictures of examples come from the records, and one that is
        not there is named in its place.
      title: of the page.
      allow_outside_root: as in `load_records`.
    """
    rows = dict(report.objectives) if report.target == NO_TARGET else {"overall score": report.overall}
    rows |= report.objectives
    items = iter_records(records_path, allow_outside_root=allow_outside_root, need_images=False)
    records = (item for item in items if isinstance(item, Record))
    points = dict(zip(report.ids, report.points.tolist(), strict=True))
    body = [
        header("multitap report", title, _subject(scores_path, records_path)),
        _agreement(rows),
        *_warnings(report.warnings),
        *_charts(report),
        *_pictures(points, records),
        "<h2>Protocol</h2>",
        paragraphs([report.protocol]),
        *_left_out(report),
        "<h2>How it was made</h2>",
        facts(_facts(report, scores_path, records_path)),
    ]
    return write_page(path, title, body)


def write_benchmark(
    path: str | Path,
    report: BenchmarkReport,
    scores_path: str | Path,
    records_path: str | Path,
    *,
    title: str = TITLE,
) -> Path:
    """Writes the page of a benchmark.

    A correlation is shown by its records, an accuracy by its comparisons.
    """
    rows = {report.statistic: report.value, **report.categories}
    cells = [[escaped(name), estimate(interval_of(found, 100))] for name, found in rows.items()]
    others = [[escaped(name), f"<b>{100 * value:.3f}</b>"] for name, value in report.others.items()]
    compared = report.statistic == "accuracy"
    body = [
        header("multitap report", title, f"{report.benchmark}: {_subject(scores_path, records_path)}"),
        "<h2>Agreement</h2>" + table(["", "x 100, 95% interval"], cells + others, style="table lead-row"),
        *_warnings(report.warnings),
        *(_comparisons(report) if compared else _judgements(report)),
        "<h2>Protocol</h2>",
        paragraphs(report.words().splitlines()),
        "<h2>How it was made</h2>",
        facts(
            [
                ("scores", str(scores_path)),
                ("records", f"{records_path}, {report.n_records:,}"),
                *((name.replace("_", " "), value) for name, value in report.conditions.items()),
                ("versions", _versions()),
            ]
        ),
    ]
    return write_page(path, title, body)


def _judgements(report: BenchmarkReport) -> Iterator[str]:
    """Chart and pictures; both sides from their smallest number (0) to their largest (1), which no tau minds."""
    benchmark = report.counted
    points = np.stack([_stretched(report.scores), _stretched(benchmark.human_means())], axis=1)
    words = f"{scatter_words(len(points))}, both sides from their smallest number, 0, to their largest, 1."
    yield framed(scatter_chart(points[:, 1], points[:, 0]), "Predicted against human", words)
    yield from _pictures({r.id: p for r, p in zip(benchmark.records, points.tolist(), strict=True)}, benchmark.records)


def _comparisons(report: BenchmarkReport) -> Iterator[str]:
    """Accuracy by category, and the comparisons that the scores lose and win by most, side by side."""
    benchmark, scores = report.counted, report.scores
    if report.categories:
        bars = [(name, interval_of(found)) for name, found in report.categories.items()]
        chart = objectives_chart(bars, what="accuracy")
        yield framed(chart, "Categories", "Share of comparisons ordered as people did.")
    level = _stretched(scores)
    margin = scores[benchmark.rows[:, 0]] - scores[benchmark.rows[:, 1]]
    order = np.argsort(margin, kind="stable")
    for heading, chosen, words in (
        ("Ordered the other way round", [i for i in order if margin[i] <= 0], "Lost by most."),
        ("Ordered as people did", [i for i in order[::-1] if margin[i] > 0], "Won by most."),
    ):
        cards = [card for i in chosen[: CARDS // 2] for card in _sides(benchmark.records, benchmark.rows[i], level)]
        words += " People preferred the side of human 1.00; scores are shown from the smallest, 0, to the largest, 1."
        if cards:
            yield gallery(heading, cards, words=words)


def _sides(records: Sequence[Record], row: np.ndarray, level: np.ndarray) -> list[Example]:
    """The two sides of a comparison (better, worse): one card of one picture, or two."""
    better, worse = ((records[i], human, float(level[i])) for i, human in zip(row, (1.0, 0.0), strict=True))
    if better[0].images == worse[0].images:
        return [Example(better[0].images[0], [(record.text, human, ours) for record, human, ours in (better, worse)])]
    return [Example(record.images[0], [(record.text, human, ours)]) for record, human, ours in (better, worse)]


def _subject(scores_path: str | Path, records_path: str | Path) -> str:
    return f"{Path(scores_path).name} against {Path(records_path).name}."


def _stretched(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.full(len(values), 0.5)


def _warnings(warnings: Sequence[str]) -> Iterator[str]:
    for warning in warnings:
        yield f"<p class=note>{escaped(warning)}</p>"


def _agreement(rows: dict[str, Metrics]) -> str:
    names = {"tau_c": "tau_c", "tau_b": "tau_b", "pearson": "Pearson", "spearman": "Spearman"}
    cells = (
        [escaped(spelled(name)), f"{m.n:,}", *(estimate(interval_of(getattr(m, key))) for key in names)]
        for name, m in rows.items()
    )
    return "<h2>Agreement</h2>" + table(["", "n", *names.values()], cells, style="table lead-row")


def _charts(report: EvaluationReport) -> Iterator[str]:
    yield "<section class=plots>"
    if report.target != NO_TARGET:
        tau = interval_of(report.overall.tau_c)
        words = f"{scatter_words(report.overall.n)}, both sides mapped to 0..1. tau_c = {tau}."
        yield framed(scatter_chart(report.points[:, 1], report.points[:, 0]), "Predicted against human", words)
    if report.objectives:
        level = f"{next(iter(report.objectives.values())).level:.0%}"
        bars = objectives_chart(tau_bars(report.objectives))
        yield framed(bars, "Objectives", f"tau_c with people, {level} interval.")
    yield "</section>"


def _pictures(points: Mapping[str, Sequence[float]], records: Iterable[Record]) -> Iterator[str]:
    """Sections of pictures, chosen by their texts' errors; `points` has (score, human score) of records by id."""
    pictures: dict[Path, list[Record]] = {}
    for record in records:
        if record.id in points:
            pictures.setdefault(record.images[0], []).append(record)
    errors = {path: [points[r.id][0] - points[r.id][1] for r in shown] for path, shown in pictures.items()}
    order = {
        "Scored too high": sorted(errors, key=lambda path: -max(errors[path])),
        "Scored too low": sorted(errors, key=lambda path: min(errors[path])),
        "As people see it": sorted(errors, key=lambda path: float(np.mean(np.abs(errors[path])))),
    }
    for heading, words in _SECTIONS.items() if pictures else ():
        chosen = order[heading][:CARDS]
        yield gallery(heading, [_example(path, pictures[path], points) for path in chosen], words=words)


def _example(path: Path, records: Sequence[Record], points: Mapping[str, Sequence[float]]) -> Example:
    """A picture with the texts of largest error."""
    shown = sorted(records, key=lambda record: -abs(points[record.id][0] - points[record.id][1]))[:TEXTS]
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
    yield "versions", _versions()


def _versions() -> str:
    return f"multitap_jax {__version__}, jax {jax.__version__}, Python {platform.python_version()}"
