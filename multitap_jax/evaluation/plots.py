"""The figures of an evaluation report, drawn without a display and without matplotlib's global state."""

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from multitap_jax.evaluation.correlation import Metrics

CROWDED = 3000  # more points than this are shown as a density


def scatter_figure(points: np.ndarray, metrics: Metrics, target: str) -> Figure:
    """Scores against human scores, both in [0, 1]; `points` is float64[N, 2], (score, human)."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    if len(points) > CROWDED:
        cells = axes.hexbin(points[:, 1], points[:, 0], gridsize=40, bins="log", cmap="viridis", extent=(0, 1, 0, 1))
        figure.colorbar(cells, label="pairs")
    else:
        axes.scatter(points[:, 1], points[:, 0], s=14, alpha=0.5, linewidths=0)
    axes.plot([0, 1], [0, 1], color="0.5", linewidth=1, linestyle="--")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="overall score")
    axes.set_xlabel(f"human: {target}, mapped to 0..1", parse_math=False)
    axes.set_title(f"tau_b {_text(metrics, 'tau_b')}\ntau_c {_text(metrics, 'tau_c')}, n = {metrics.n:,}", fontsize=10)
    return figure


def objective_figure(objectives: Mapping[str, Metrics]) -> Figure:
    """One bar an objective: Kendall tau_c with its interval."""
    figure = Figure(figsize=(6, 1.2 + 0.4 * len(objectives)), layout="constrained")
    axes = figure.subplots()
    for row, metrics in enumerate(objectives.values()):
        tau = metrics.tau_c
        if math.isnan(tau.value):
            axes.text(0, row, f" undefined: {tau.reason}", va="center", fontsize=8)
            continue
        axes.barh(row, tau.value, color="tab:blue", alpha=0.7)
        if not math.isnan(tau.interval.low):
            axes.plot([tau.interval.low, tau.interval.high], [row, row], color="black", linewidth=1.5)
    axes.set_yticks(
        range(len(objectives)), [f"{name} (n = {m.n:,})" for name, m in objectives.items()], parse_math=False
    )
    axes.invert_yaxis()
    axes.axvline(0, color="0.5", linewidth=1)
    level = next(iter(objectives.values())).level
    axes.set(xlabel=f"Kendall tau_c with people, {level:.0%} interval")
    return figure


def _text(metrics: Metrics, name: str) -> str:
    statistic = getattr(metrics, name)
    if math.isnan(statistic.value):
        return f"undefined ({statistic.reason})"
    return f"{statistic.value:.3f} ({statistic.interval.low:.3f}, {statistic.interval.high:.3f})"
