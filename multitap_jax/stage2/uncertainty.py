"""How sure a head is: the leverage of new rows, and two standard deviations of its predictions.

With S, alpha and the noise variance s^2 = RSS / (n - 1 - edf) of a fit, and x centred:

  leverage  h = x (S + alpha)^-1 x + 1 / sum of w: how far x is from what was trained on; no label enters
  bayes     s sqrt(1 + h): the posterior predictive of a Gaussian prior of precision alpha / s^2
  sandwich  s sqrt(1 + x (S + alpha)^-1 S (S + alpha)^-1 x + 1 / sum of w): sampling variance, bias not counted

Both count the noise of a new label.
"""

from typing import Any, NamedTuple

import numpy as np

from multitap_jax.stage2 import spectrum
from multitap_jax.stage2.certificate import Precision
from multitap_jax.stage2.systems import System

KINDS = ("bayes", "sandwich")
_FACTORS = {kind.__name__: kind for kind in (spectrum.Eigen, spectrum.Tridiagonal, spectrum.Dual)}


class Posterior(NamedTuple):
    """Of the objectives `targets` int[t], which share their training rows.

    Attributes:
      factor: of S, about `mean`, in units of `scale`.
      weight: sum of w; infinite without an intercept.
      alpha: float64[t].   noise: float64[t], standard deviation s; NaN where no degree of freedom is left.
      typical: float64[t], mean leverage of the training rows.
    """

    targets: np.ndarray
    factor: Any
    mean: np.ndarray
    scale: np.ndarray
    weight: float
    alpha: np.ndarray
    noise: np.ndarray
    typical: np.ndarray

    @classmethod
    def of(cls, system: System, alpha: np.ndarray, fit_intercept: bool, precision: Precision) -> "Posterior":
        """From a solved system at the chosen alphas, and the precision of its sums."""
        noise, typical = np.full(len(alpha), np.nan), np.empty(len(alpha))
        for value in np.unique(alpha):
            own = np.flatnonzero(alpha == value)
            rss, _, path = system.residual_energy(np.array([value]), precision)
            freedom = system.num_rows - int(fit_intercept) - float(path.freedom[0])
            typical[own] = (float(path.freedom[0]) + int(fit_intercept)) / system.num_rows
            if freedom > 0:
                noise[own] = np.sqrt(rss[0, own] / freedom)
        weight = system.weight if fit_intercept else np.inf
        return cls(system.targets, system.factor, system.mean, system.scale, weight, alpha, noise, typical)

    def variances(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(leverage float64[n, t], its sandwich float64[n, t]) of x [n, H], without the noise."""
        rows = x.astype(np.float64) / self.scale[None, :] - self.mean[None, :]
        leverage, sandwich = np.empty((2, len(rows), len(self.alpha)))
        for value in np.unique(self.alpha):
            own = self.alpha == value
            solved = self.factor.inverse(rows, float(value))
            quadratic = np.sum(rows * solved, axis=1)
            leverage[:, own] = (quadratic + 1.0 / self.weight)[:, None]
            # S = (S + alpha) - alpha on both sides of it
            inner = np.maximum(quadratic - value * np.sum(solved**2, axis=1), 0.0)
            sandwich[:, own] = (inner + 1.0 / self.weight)[:, None]
        return leverage, sandwich

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Named arrays for a safetensors file."""
        own = {name: np.asarray(value) for name, value in self._asdict().items() if name != "factor"}
        return own | {f"{type(self.factor).__name__}.{name}": v for name, v in self.factor._asdict().items()}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "Posterior":
        """What `to_arrays` gave."""
        kind = next(name for key in arrays for name in _FACTORS if key.startswith(f"{name}."))
        parts = {field: arrays[f"{kind}.{field}"] for field in _FACTORS[kind]._fields}
        # In the layout that LAPACK gave them, so that products round as they did.
        factor = _FACTORS[kind](
            **{n: np.asfortranarray(v) if n in ("vectors", "packed") else v for n, v in parts.items()}
        )
        rest: dict[str, Any] = {name: arrays[name] for name in cls._fields if name != "factor"}
        rest["weight"] = float(rest["weight"])
        return cls(factor=factor, **rest)
