"""The charts of pages, as PNG bytes, drawn without a display and without matplotlib's global state."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from multitap_jax.pages.elements import Interval, spelled

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


def loss_chart(train: Sequence[tuple[int, float]], heldout: Sequence[tuple[int, float]]) -> bytes:
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


def scatter_chart(human: np.ndarray, predicted: np.ndarray) -> bytes:
    """PNG of predicted against human scores with the diagonal of perfect agreement."""
    figure, axes = _axes(5.6, 3.9)
    axes.plot([0, 1], [0, 1], color=_SOFT, linewidth=1, linestyle=(0, (4, 3)))
    # Human scores sit on a grid; a little jitter (fixed seed) shows how many dots lie on one spot.
    jitter = np.random.default_rng(0).uniform(-0.012, 0.012, len(human))
    axes.scatter(np.asarray(human) + jitter, predicted, s=9, color=_BLUE, alpha=0.35, linewidths=0)
    axes.set(xlabel="human score", ylabel="predicted score", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    return _png(figure)


def objectives_chart(rows: Sequence[tuple[str, Interval, float | None]], what: str = "tau_c") -> bytes:
    """PNG of one bar an objective (`what` with its interval) and, where it is known, one dot (share within a half)."""
    figure, axes = _axes(10.0, 0.42 * len(rows) + 1.1)
    places = np.arange(len(rows))[::-1]
    values = np.nan_to_num([tau.value for _, tau, _ in rows])
    errors = np.nan_to_num([[tau.value - tau.low, tau.high - tau.value] for _, tau, _ in rows]).T.reshape(2, -1)
    axes.barh(places, values, 0.58, color=_BLUE, xerr=np.maximum(errors, 0), ecolor=_INK, capsize=2.5, label=what)
    dots = [(share, place) for (_, _, share), place in zip(rows, places, strict=True) if share is not None]
    if dots:
        shares, where = np.array(dots).T
        axes.scatter(shares, where, s=30, color=_ORANGE, zorder=3, label="within 0.5 points")
    axes.set_yticks(places, [spelled(name) for name, _, _ in rows], parse_math=False)
    axes.set(xlim=(min(0.0, float(values.min(initial=0.0)) - 0.05), 1.0))
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return _png(figure)
