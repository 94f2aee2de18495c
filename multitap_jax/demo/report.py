"""Writes the demo's report: one self-contained HTML file, plots as embedded PNG, no script, no external resource."""

import base64
import dataclasses
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


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
class Example:
    """A held-out picture (path of a file on disk) with some of its texts: (text, human score, predicted score)."""

    image: Path
    texts: Sequence[tuple[str, float, float]]


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
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    trained = data.models[0]
    loss_text = "Mean squared error between predicted and human score."
    scatter_text = f"Each dot is a held-out pair. tau_c = {trained.metrics['tau_c']}."
    bars_text = "Bars: held-out tau_c with its 95 % interval. Dots: share of predictions within half a point."
    body = [
        "<header><p class=kicker>multitap demo</p><h1>Does this text fit this picture?</h1>",
        "<p class=lead>A small model learns from the ratings of simulated annotators how well guidance fits a street "
        "scene; then each ridge head reads one rating from its frozen state. Agreement is on scenes it never saw.</p>"
        "</header>",
        _summary(data.models),
        "<section class=plots>",
        _figure(plot_loss(data.train_loss, data.heldout_loss), "Learning", loss_text),
        _figure(plot_scatter(data.human, data.predicted), "Predicted against human", scatter_text),
        "</section>",
        _figure(plot_objectives(data.objectives), "One head an objective", bars_text),
        _objective_table(data.objectives),
        *(_gallery(heading, examples) for heading, examples in data.examples),
        "<h2>How it was run</h2><section class=columns>",
        _facts([(name, value) for name, value in data.facts]),
        _facts([(name, f"{seconds:.1f} s") for name, seconds in data.phases]),
        "</section><h2>Protocol</h2>",
        *(f"<p>{_text(note)}</p>" for note in data.notes),
    ]
    page = _PAGE.replace("{{style}}", _STYLE).replace("{{body}}", "\n".join(body))
    path.write_text(page, encoding="utf-8")
    return path


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _table(header: Iterable[str], rows: Iterable[Iterable[str]], *, style: str = "table") -> str:
    """A table of finished (escaped) cells; the first column names the row; `style` is a list of CSS classes."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    lines = []
    for row in rows:
        first, *rest = row
        lines.append(f"<tr><th scope=row>{first}</th>" + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>")
    return f"<div class='{style}'><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def _estimate(interval: Interval) -> str:
    return f"<b>{interval.value:.3f}</b> <small>{interval.low:.3f} to {interval.high:.3f}</small>"


def _summary(models: Sequence[ModelRow]) -> str:
    names = list(models[0].metrics)
    rows = ([_text(row.name), *(_estimate(row.metrics[name]) for name in names)] for row in models)
    return "<h2>Agreement with the raters</h2>" + _table(
        ["Model", *(_text(name) for name in names)], rows, style="table lead-row"
    )


def _objective_table(rows: Sequence[ObjectiveRow]) -> str:
    header = ["Objective", "tau_c", "Within 0.5 points", "Alpha", "Cross-validated R²"]
    cells = (
        [_text(_spell(r.name)), _estimate(r.tau), f"{r.accuracy:.1%}", f"{r.alpha:.3g}", f"{r.cv_score:.3f}"]
        for r in rows
    )
    return _table(header, cells)


def _spell(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _facts(pairs: Sequence[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in pairs) + "</dl>"


def _figure(png: bytes, heading: str, caption: str) -> str:
    source = base64.b64encode(png).decode("ascii")
    alt = f"{heading}: {caption}"
    return (
        f'<figure><h2>{_text(heading)}</h2><img class=plot src="data:image/png;base64,{source}" alt="{_text(alt)}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _gallery(heading: str, examples: Sequence[Example]) -> str:
    return f"<h2>{_text(heading)}</h2><section class=gallery>{''.join(_card(e) for e in examples)}</section>"


def _card(example: Example) -> str:
    source = base64.b64encode(Path(example.image).read_bytes()).decode("ascii")
    kind = "jpeg" if Path(example.image).suffix.lower() in (".jpg", ".jpeg") else "png"
    lines = []
    for text, human, predicted in sorted(example.texts, key=lambda row: -row[1]):
        lines.append(f"<li><p>{_text(text)}</p>{_score('human', human)}{_score('model', predicted)}</li>")
    picture = f'<img src="data:image/{kind};base64,{source}" alt="A street scene">'
    return f"<article>{picture}<ul>{''.join(lines)}</ul></article>"


def _score(who: str, value: float) -> str:
    """A labelled bar for a score in [0, 1]."""
    width = 100 * min(max(value, 0.0), 1.0)
    bar = f"<span class=track><span class={who} style='width:{width:.0f}%'></span></span>"
    return f"<span class=score><i>{who}</i>{bar}<b>{value:.2f}</b></span>"


_INK, _SOFT, _BLUE, _ORANGE = "#23272f", "#8a919c", "#2f6db5", "#d97b29"


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure outside pyplot's global state, quiet spines, white ground (which the page frames in dark mode)."""
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_SOFT)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.grid(color="#e6e8ec", linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def plot_loss(train: Sequence[tuple[int, float]], heldout: Sequence[tuple[int, float]]) -> bytes:
    """PNG of both loss curves; the noisy training loss is shown faint under its running mean."""
    figure, axes = _axes(5.6, 3.9)
    if train:
        steps, losses = np.array(train, float).T
        axes.plot(steps, losses, color=_BLUE, alpha=0.22, linewidth=0.8)
        window = max(1, len(losses) // 25)
        sums = np.cumsum(np.concatenate([[0.0], losses]))
        smooth = (sums[window:] - sums[:-window]) / window
        axes.plot(
            steps[window - 1 :],
            smooth,
            color=_BLUE,
            linewidth=1.8,
            label="training" + (f", mean of {window}" if window > 1 else ""),
        )
    if heldout:
        steps, losses = np.array(heldout, float).T
        axes.plot(steps, losses, color=_ORANGE, linewidth=1.8, marker="o", markersize=4, label="held out")
    axes.set(xlabel="step", ylabel="mean squared error", ylim=(0, None))
    if train or heldout:
        axes.legend(frameon=False, fontsize=9)
    return _png(figure)


def plot_scatter(human: np.ndarray, predicted: np.ndarray) -> bytes:
    """PNG of predicted against human scores with the diagonal of perfect agreement."""
    figure, axes = _axes(5.6, 3.9)
    axes.plot([0, 1], [0, 1], color=_SOFT, linewidth=1, linestyle=(0, (4, 3)))
    # Human scores sit on a grid; a little jitter (fixed seed) shows how many dots lie on one spot.
    jitter = np.random.default_rng(0).uniform(-0.012, 0.012, len(human))
    axes.scatter(np.asarray(human) + jitter, predicted, s=9, color=_BLUE, alpha=0.35, linewidths=0)
    axes.set(xlabel="human score", ylabel="predicted score", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    return _png(figure)


def plot_objectives(rows: Sequence[ObjectiveRow]) -> bytes:
    """PNG of one bar an objective (tau_c with its interval) and one dot (share within half a point)."""
    figure, axes = _axes(10.0, 0.42 * len(rows) + 1.1)
    places = np.arange(len(rows))[::-1]
    values = np.array([row.tau.value for row in rows])
    errors = np.array([[row.tau.value - row.tau.low, row.tau.high - row.tau.value] for row in rows]).T.reshape(2, -1)
    axes.barh(places, values, 0.58, color=_BLUE, xerr=np.maximum(errors, 0), ecolor=_INK, capsize=2.5, label="tau_c")
    axes.scatter([row.accuracy for row in rows], places, s=30, color=_ORANGE, zorder=3, label="within 0.5 points")
    axes.set_yticks(places, [_spell(row.name) for row in rows])
    axes.set(xlim=(min(0.0, float(values.min(initial=0.0)) - 0.05), 1.0))
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return _png(figure)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>multitap demo report</title>
<style>{{style}}</style>
</head>
<body><main>
{{body}}
</main></body>
</html>
"""

_STYLE = """
:root{--ink:#1f242c;--soft:#626b78;--line:#dfe3e8;--ground:#fbfbfa;--card:#fff;--human:#d97b29;--model:#2f6db5}
@media (prefers-color-scheme:dark){
:root{--ink:#e8eaed;--soft:#a2aab6;--line:#343a44;--ground:#15181d;--card:#1d2128;--human:#e89a55;--model:#6aa5ea}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);
font:16px/1.55 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1120px;margin:0 auto;padding:56px 32px 96px}
h1{font-size:40px;line-height:1.15;letter-spacing:-.02em;margin:.1em 0 .3em}
h2{font-size:20px;letter-spacing:-.01em;margin:52px 0 14px}
.kicker{color:var(--soft);text-transform:uppercase;letter-spacing:.12em;font-size:12px;margin:0}
.lead{color:var(--soft);font-size:18px;max-width:46em;margin:0}
.table{overflow-x:auto;margin-top:18px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:10px 14px 10px 0;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap;font-weight:400}
thead th{color:var(--soft);font-size:13px}
.lead-row tbody tr:first-child th{font-weight:600}
small{color:var(--soft);font-size:12.5px}
.plots{display:grid;grid-template-columns:1fr 1fr;gap:28px}
figure{margin:0}
.plot{width:100%;height:auto;display:block;border:1px solid var(--line);border-radius:10px;background:#fff;padding:6px}
figcaption{color:var(--soft);font-size:13.5px;margin-top:8px}
.gallery{display:grid;grid-template-columns:1fr 1fr;gap:20px}
article{display:grid;grid-template-columns:168px 1fr;gap:18px;background:var(--card);border:1px solid var(--line);
border-radius:12px;padding:16px;align-items:start}
article img{width:168px;border-radius:8px;display:block}
ul{list-style:none;margin:0;padding:0;display:grid;gap:12px}
li p{margin:0 0 3px;font-size:14px;line-height:1.4}
.score{display:grid;grid-template-columns:52px 1fr 36px;align-items:center;gap:8px;font-size:12px;line-height:1.35}
.score i{font-style:normal;color:var(--soft)}
.score b{font-weight:500;font-variant-numeric:tabular-nums}
.track{height:5px;border-radius:3px;background:var(--line);overflow:hidden;display:block}
.track span{height:100%;display:block}
.track .human{background:var(--human)}.track .model{background:var(--model)}
.columns{display:grid;grid-template-columns:1.2fr 1fr;gap:48px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:6px 20px;margin:0;font-size:14.5px;align-content:start}
.columns dl:last-child{grid-template-columns:1fr max-content}
dt{color:var(--soft)}dd{margin:0;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
@media (max-width:820px){.plots,.gallery,.columns{grid-template-columns:1fr}article{grid-template-columns:1fr}}
"""
