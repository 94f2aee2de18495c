"""How far float32 products can have moved the predictions: measured, not assumed.

The first chunk of rows is multiplied again in float64 with a few random vectors, which gives the relative rounding
error of the device's products on these very rows (it also finds a device that silently multiplies in TF32 or bfloat16).
To first order a Gram error dG moves the coefficients by -(S + alpha)^-1 dG w; with entries of dG of deviation eps
sqrt(G_ii G_jj) the error of the predictions follows from the spectrum, without another look at the rows.
"""

from typing import NamedTuple

import numpy as np

from multitap_jax.stage2 import threads
from multitap_jax.stage2.statistics import Statistics

PROBES = 4
BLOCK_ROWS = 256  # in float64 at a time: they stay in the cache
FLOOR = 3e-8  # no float32 product is better than this
ALIKE = 2048 * 2.0**-24  # a chunk of equal numbers: their rounding errors are equal too, and add up
SAFETY = 8.0  # outlier dimensions make rounding errors less independent than the model takes them to be


class Precision(NamedTuple):
    """`error`: largest relative entry error of a chunk's Gram; `chunks` probed."""

    error: float = FLOOR
    chunks: int = 0

    def probe(self, stats: Statistics, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> "Precision":
        """Compares the sums of one chunk with the chunk itself."""
        scale = np.sqrt(np.maximum(np.diagonal(stats.gram), 0.0))
        safe = np.where(scale > 0, scale, 1.0)
        vectors = np.random.default_rng(0).standard_normal((len(scale), PROBES)) / safe[:, None]
        exact, labels = np.zeros_like(vectors), np.where(np.isnan(y), 0.0, y - stats.label_shift[None, :])
        with threads.for_matrices(BLOCK_ROWS):
            for start in range(0, len(x), BLOCK_ROWS):
                part = slice(start, start + BLOCK_ROWS)
                count = np.ones((len(labels[part]), 1))
                row = np.concatenate([x[part] - stats.shift[None, :], count, labels[part]], axis=1, dtype=np.float64)
                exact += row.T @ ((row @ vectors) * weight[part, None].astype(np.float64))
        difference = (stats.gram @ vectors - exact) / safe[:, None] / np.sqrt(max((scale > 0).sum(), 1))
        return self.joined(Precision(float(np.sqrt(np.mean(difference**2))), 1))

    def joined(self, other: "Precision") -> "Precision":
        """The worse of both."""
        return Precision(max(self.error, other.error), self.chunks + other.chunks)


def prediction_error(
    precision: Precision,
    total: Statistics,
    values: np.ndarray,
    coef: np.ndarray,
    alpha: np.ndarray,
    label_energy: np.ndarray,
) -> np.ndarray:
    """float64[T], expected error of the predictions, in deviations of the labels.

    Args:
      precision: what was measured.
      total: the statistics about the origin they were summed at.
      values: float64[H], eigenvalues of S.
      coef: float64[T, H].
      alpha: float64[T].
      label_energy: float64[T], sum w (y - origin)^2; where it is 0 there is nothing to predict, and no error.
    """
    size = len(total.shift)
    diagonal = np.maximum(np.diagonal(total.gram), 0.0)
    offset = (total.label_mean - total.label_shift) - coef @ (total.mean - total.shift)
    energy = (coef**2) @ diagonal[:size] + diagonal[size + 1 :] + offset**2 * total.weight
    return _moved(precision, total, values, energy, alpha, label_energy)


def varies(precision: Precision, total: Statistics) -> np.ndarray:
    """bool[E], whether the sums can tell the variance of a column from 0: a difference of sums about their origin."""
    diagonal = np.diagonal(total.gram)
    row = total.gram[len(total.shift)]
    return diagonal - row**2 / total.weight > max(_entry_error(precision, total), ALIKE) * diagonal


def residual_error(precision: Precision, total: Statistics, coef: np.ndarray) -> np.ndarray:
    """How far the residual sums of squares of coef [C, T, H], taken from the sums, may be off: float64[C, T].

    RSS = v G v with v = [-w, 1]; a Gram error dG moves it by a dG v with |a| <= |v|, the change of w included.
    """
    size = len(total.shift)
    diagonal = np.maximum(np.diagonal(total.gram), 0.0)
    energy = (coef**2) @ diagonal[:size] + diagonal[None, size + 1 :]
    return np.sqrt(2.0) * _entry_error(precision, total) * energy


def correction_error(
    precision: Precision,
    total: Statistics,
    values: np.ndarray,
    correction: np.ndarray,
    alpha: np.ndarray,
    label_energy: np.ndarray,
) -> np.ndarray:
    """What is left of an error after `correction` float64[T, H], solved with the same sums for exact residuals.

    It is the error of the correction itself, much as `prediction_error` is that of the coefficients. Infinite where
    the error of the Gram may exceed alpha, so that a second correction need not be smaller than the first.
    """
    size = len(total.shift)
    diagonal = np.maximum(np.diagonal(total.gram), 0.0)
    energy = (correction**2) @ diagonal[:size] + (correction @ (total.mean - total.shift)) ** 2 * total.weight
    left = _moved(precision, total, values, energy, alpha, label_energy)
    return np.where(_entry_error(precision, total) * diagonal[:size].sum() < 0.5 * alpha, left, np.inf)


def _entry_error(precision: Precision, total: Statistics) -> float:
    return SAFETY * precision.error / np.sqrt(max(total.num_rows / 2048.0, 1.0))


def _moved(
    precision: Precision,
    total: Statistics,
    values: np.ndarray,
    energy: np.ndarray,
    alpha: np.ndarray,
    label_energy: np.ndarray,
) -> np.ndarray:
    """float64[T], what a Gram error does to predictions by coefficients w of `energy` sum of G_ii w_i^2."""
    trace = np.maximum(np.diagonal(total.gram)[: len(total.shift)], 0.0).mean()
    # A rotation spreads the diagonal evenly over the eigenvectors, on average: trace(G) / H each.
    spread = np.sum(values[None, :] / (values[None, :] + alpha[:, None]) ** 2, axis=1) * trace
    safe = np.where(label_energy > 0, label_energy, 1.0)
    return np.where(label_energy > 0, _entry_error(precision, total) * np.sqrt(energy * spread / safe), 0.0)
