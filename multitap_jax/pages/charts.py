"""Charts: figures drawn without a display and without matplotlib's global state, and what pages show of them.

A figure is drawn in five colours. In a page, as SVG, those are the page's own (the variables of style.css), so that it
follows light, dark and paper; saved as a picture it is dark on white.
"""

import io
import re
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from multitap_jax.pages.elements import Interval, escaped

_INK, _SOFT, _LINE, _MODEL, _HUMAN = "#23272f", "#8a919c", "#e6e8ec", "#2f6db5", "#d97b29"
_VARIABLES = {_INK: "ink", _SOFT: "soft", _LINE: "line", _MODEL: "model", _HUMAN: "human"}
CROWDED = 3000  # more points than this are shown as a density


def loss_chart(train: Sequence[tuple[int, float]], heldout: Sequence[tuple[int, float]]) -> Figure:
    """Both loss curves; the noisy training loss is shown faint under its running mean."""
    figure, axes = _axes(3.6)
    if train:
        steps, losses = np.array(train, float).T
        axes.plot(steps, losses, color=_MODEL, alpha=0.22, linewidth=0.8)
        window = max(1, len(losses) // 25)
        sums = np.cumsum(np.concatenate([[0.0], losses]))
        smooth = (sums[window:] - sums[:-window]) / window
        label = "training" + (f", mean of {window}" if window > 1 else "")
        axes.plot(steps[window - 1 :], smooth, color=_MODEL, linewidth=1.8, label=label)
    if heldout:
        steps, losses = np.array(heldout, float).T
        axes.plot(steps, losses, color=_HUMAN, linewidth=1.8, marker="o", markersize=4, label="held out")
    axes.set(xlabel="step", ylabel="mean squared error", ylim=(0, None))
    if train or heldout:
        axes.legend(frameon=False, fontsize=9, labelcolor=_INK)
    return figure


def scatter_chart(
    human: np.ndarray, predicted: np.ndarray, *, label: str = "human score", title: str | None = None
) -> Figure:
    """Predicted against human scores float[N], both in [0, 1], with the diagonal of perfect agreement.

    Many points are shown as a density, the stronger the more of them, on a scale of logarithms.
    """
    figure, axes = _axes(3.6)
    axes.plot([0, 1], [0, 1], color=_SOFT, linewidth=1, linestyle=(0, (4, 3)))
    if len(human) > CROWDED:
        cells = axes.hexbin(human, predicted, gridsize=40, extent=(0, 1, 0, 1), mincnt=1, linewidths=0, zorder=2)
        counts = np.log1p(np.asarray(cells.get_array()))
        shades = np.empty((len(counts), 4))
        shades[:, :3], shades[:, 3] = to_rgb(_MODEL), np.minimum(0.1 + 0.9 * counts / counts.max(), 1)
        cells.set(array=None, facecolor=shades)
    else:
        # Human scores sit on a grid; a little jitter (fixed seed) shows how many dots lie on one spot.
        jitter = np.random.default_rng(0).uniform(-0.012, 0.012, len(human))
        alpha = float(np.clip(20 / np.sqrt(max(len(human), 1)), 0.3, 0.8))
        axes.scatter(np.asarray(human) + jitter, predicted, s=9, color=_MODEL, alpha=alpha, linewidths=0)
    axes.set(ylabel="predicted score", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axes.set_xlabel(label, parse_math=False)
    if title is not None:
        axes.set_title(title, fontsize=10, color=_INK, parse_math=False)
    return figure


def scatter_words(pairs: int) -> str:
    """What a scatter chart of so many pairs shows."""
    if pairs > CROWDED:
        return f"The stronger the colour, the more of {pairs:,} pairs"
    return f"Each dot is one of {pairs:,} pairs"


def objectives_chart(
    rows: Sequence[tuple[str, Interval]], *, what: str = "tau_c", dots: Sequence[float] | None = None, legend: str = ""
) -> Figure:
    """A bar a row: its `what` with its interval, or that it is undefined; and, where given, a dot called `legend`."""
    figure, axes = _axes(0.42 * len(rows) + 1.1)
    places = np.arange(len(rows))[::-1]
    numbers = np.array([[tau.value, tau.low, tau.high] for _, tau in rows], float).reshape(-1, 3)
    known = ~np.isnan(numbers[:, 0])
    value, low, high = numbers[known].T
    axes.barh(places[known], value, 0.58, color=_MODEL, label=what)
    axes.hlines(places[known], low, high, color=_INK, linewidth=1.6)
    for place in places[~known]:
        axes.text(0.01, place, "undefined", va="center", fontsize=9, color=_INK)
    if dots is not None:
        axes.scatter(dots, places, s=30, color=_HUMAN, zorder=3, label=legend)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9, labelcolor=_INK)
    else:
        axes.set_xlabel(what, parse_math=False)
    axes.set_yticks(places, [name for name, _ in rows], parse_math=False)
    least = float(np.nanmin(numbers[:, :2], initial=0.0))
    axes.set(xlim=(least - 0.05 * (least < 0), 1.0), ylim=(-0.6, len(rows) - 0.4))
    axes.axvline(0, color=_SOFT, linewidth=1)
    axes.grid(axis="y", visible=False)
    return figure


def framed(figure: Figure, heading: str, caption: str) -> str:
    """The element of a page with the figure, its heading and its words."""
    svg = inline_svg(figure, f"{heading}: {caption}")
    return f"<figure><h2>{escaped(heading)}</h2>{svg}<figcaption>{escaped(caption)}</figcaption></figure>"


def inline_svg(figure: Figure, alt: str) -> str:
    """The figure as SVG in the colours and letters of a page; the same for the same figure and words."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    whole = buffer.getvalue()
    box = re.search(r'viewBox="([^"]*)"', whole)
    assert box is not None
    body = whole[whole.index(">", box.end()) + 1 : whole.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    used = set(re.findall(r"#([\w-]+)", body))
    body = re.sub(r"<[^>]*>", lambda tag: _as_of_a_page(tag[0], used), body)
    return f'<svg class=plot role=img aria-label="{escaped(alt)}" viewBox="{box[1]}">{body}</svg>'


def _as_of_a_page(tag: str, used: set[str]) -> str:
    """A tag of matplotlib's: without its letters and the names that nothing refers to, in the colours of the page."""
    tag = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", tag)
    tag = re.sub(r"font-family: [^;\"]*(; )?", "", tag).replace("xlink:href", "href").replace("\n", " ")
    for colour, name in _VARIABLES.items():
        tag = tag.replace(colour, f"var(--{name})")
    return tag


def _axes(height: float) -> tuple[Figure, Axes]:
    """A figure outside pyplot's global state, with quiet spines on white ground."""
    figure = Figure(figsize=(5.0, height), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_SOFT)
    axes.tick_params(color=_SOFT, labelcolor=_INK, labelsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(_INK)
    axes.grid(color=_LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes
