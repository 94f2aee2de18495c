"""Pictures of a fitted `RidgeHead`, each drawn on given matplotlib axes (or new ones) and returned."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from multitap_jax.stage2.head import RidgeHead


def alpha_curves(head: RidgeHead, ax: Axes | None = None) -> Axes:
    """R2 over alpha by the criterion of the fit, a line an objective, the chosen alpha marked."""
    ax = ax or plt.subplots()[1]
    results = head.cv_results_
    for index, name in enumerate(head.objective_names_):
        curve = results["r2"][:, index]
        if not np.isfinite(curve).any():
            continue  # a constant objective has no curve
        shown = np.where(np.isfinite(curve), curve, np.nan)
        (line,) = ax.semilogx(results["alphas"][:, index], shown, label=name)
        ax.plot(head.alpha_[index], head.r2_[index], "o", color=line.get_color())
    ax.set(xlabel="alpha", ylabel=f"$R^2$ ({head.criterion_})")
    # Far too small an alpha can be worse than any constant; what matters is near the top.
    top = ax.get_ylim()[1]
    ax.set_ylim(max(ax.get_ylim()[0], top - 1.5), top)
    ax.legend()
    return ax


def predicted_vs_human(
    predicted: np.ndarray, human: np.ndarray, name: str = "", ax: Axes | None = None, max_points: int = 20_000
) -> Axes:
    """Predictions [N] over human ratings [N] (NaN: not rated), evenly thinned to `max_points`, with the diagonal."""
    ax = ax or plt.subplots()[1]
    seen = _thinned(human, max_points)
    ax.plot(human[seen], predicted[seen], ".", alpha=0.3)
    low, high = np.min([predicted[seen], human[seen]]), np.max([predicted[seen], human[seen]])
    ax.plot([low, high], [low, high], "k--", linewidth=1)
    ax.set(xlabel="human", ylabel="predicted", title=name)
    return ax


def residuals(
    predicted: np.ndarray, human: np.ndarray, name: str = "", ax: Axes | None = None, max_points: int = 20_000
) -> Axes:
    """Human minus predicted over the predictions [N], with the mean in ten bins of equally many rows.

    A head that is right on average everywhere has its means on the line at 0.
    """
    ax = ax or plt.subplots()[1]
    every = np.flatnonzero(~np.isnan(human))
    seen = _thinned(human, max_points)
    ax.plot(predicted[seen], human[seen] - predicted[seen], ".", alpha=0.3)
    bins = np.array_split(every[np.argsort(predicted[every], kind="stable")], 10)
    centres = [(predicted[part].mean(), (human[part] - predicted[part]).mean()) for part in bins if len(part)]
    ax.plot(*np.transpose(centres), "o-", color="C1", label="mean of a tenth")
    ax.axhline(0, color="k", linestyle="--", linewidth=1)
    ax.set(xlabel="predicted", ylabel="human - predicted", title=name)
    ax.legend()
    return ax


def objective_correlation(values: np.ndarray, names: tuple[str, ...], title: str = "", ax: Axes | None = None) -> Axes:
    """Pearson correlations between objectives: `values` [N, T], predictions or ratings, NaN: not rated.

    Each pair over the rows that have both; blank where fewer than three do, or one is constant.
    """
    ax = ax or plt.subplots()[1]
    table = correlations(values)
    ax.imshow(table, vmin=-1, vmax=1, cmap="RdBu_r")
    ticks = np.arange(len(names))
    ax.set_xticks(ticks, names, rotation=45, ha="right")
    ax.set_yticks(ticks, names)
    for row, column in np.argwhere(np.isfinite(table)):
        dark = abs(table[row, column]) > 0.6
        text = f"{table[row, column]:.2f}"
        ax.text(column, row, text, ha="center", va="center", fontsize=8, color="w" if dark else "k")
    ax.set_title(title)
    return ax


def correlations(values: np.ndarray) -> np.ndarray:
    """float64[T, T], Pearson correlation of each pair of columns over the rows that have both; NaN where undefined."""
    count = values.shape[1]
    table = np.full((count, count), np.nan)
    for i in range(count):
        for j in range(count):
            both = ~np.isnan(values[:, i]) & ~np.isnan(values[:, j])
            pair = values[both][:, [i, j]].astype(np.float64)
            if len(pair) > 2 and (pair.std(0) > 0).all():
                table[i, j] = np.corrcoef(pair.T)[0, 1]
    return table


def _thinned(human: np.ndarray, max_points: int) -> np.ndarray:
    seen = np.flatnonzero(~np.isnan(human))
    return seen[:: max(1, -(-len(seen) // max_points))]
