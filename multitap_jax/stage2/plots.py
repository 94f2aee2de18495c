"""Two pictures of a fitted `RidgeHead`, each drawn on given matplotlib axes (or new ones) and returned."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from multitap_jax.stage2.head import RidgeHead


def alpha_curves(head: RidgeHead, ax: Axes | None = None) -> Axes:
    """R2 over alpha by the criterion of the fit, a line an objective, the chosen alpha marked."""
    ax = ax or plt.subplots()[1]
    results = head.cv_results_
    for index, name in enumerate(head.objective_names_):
        if np.isnan(results["r2"][:, index]).all():
            continue  # a constant objective has no curve
        (line,) = ax.semilogx(results["alphas"][:, index], results["r2"][:, index], label=name)
        ax.plot(head.alpha_[index], head.r2_[index], "o", color=line.get_color())
    ax.set(xlabel="alpha", ylabel=f"$R^2$ ({head.criterion_})")
    ax.legend()
    return ax


def predicted_vs_human(
    predicted: np.ndarray, human: np.ndarray, name: str = "", ax: Axes | None = None, max_points: int = 20_000
) -> Axes:
    """Predictions [N] over human ratings [N] (NaN: not rated), evenly thinned to `max_points`, with the diagonal."""
    ax = ax or plt.subplots()[1]
    seen = np.flatnonzero(~np.isnan(human))
    seen = seen[:: max(1, -(-len(seen) // max_points))]
    ax.plot(human[seen], predicted[seen], ".", alpha=0.3)
    low, high = np.min([predicted[seen], human[seen]]), np.max([predicted[seen], human[seen]])
    ax.plot([low, high], [low, high], "k--", linewidth=1)
    ax.set(xlabel="human", ylabel="predicted", title=name)
    return ax
