"""Second moments of one set of rows on the host, in float64, about an origin of one's choice; the rows are not needed.

With the augmented row  a = sqrt(w) [x - s | 1 | y - t]  of width E = H + 1 + T, the sum of a a^T holds the weight, the
means, the covariance, the cross moments with the labels and the labels' own moments together.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Statistics(NamedTuple):
    """Sums over one set of rows.

    Attributes:
      gram: float64[E, E], sum of a a^T with a = sqrt(w) [x - shift | 1 | y - label_shift].
      num_rows: rows of positive weight.
      shift: float64[H].
      label_shift: float64[T].
    """

    gram: np.ndarray
    num_rows: int
    shift: np.ndarray
    label_shift: np.ndarray

    @property
    def weight(self) -> float:
        """Sum of the sample weights."""
        return float(self.gram[len(self.shift), len(self.shift)])

    @property
    def mean(self) -> np.ndarray:
        """float64[H], weighted mean of x."""
        return self.shift + self.gram[len(self.shift), : len(self.shift)] / self.weight

    @property
    def label_mean(self) -> np.ndarray:
        """float64[T], weighted mean of y."""
        return self.label_shift + self.gram[len(self.shift), len(self.shift) + 1 :] / self.weight


def from_rows(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> Statistics:
    """Statistics of x [n, H], y [n, T], weight [n] directly in float64, about the origin."""
    root = np.sqrt(weight)[:, None]
    row = np.concatenate([x * root, root, y * root], axis=1, dtype=np.float64)
    return Statistics(row.T @ row, int((weight > 0).sum()), np.zeros(x.shape[1]), np.zeros(y.shape[1]))


def combine(parts: Sequence[Statistics]) -> Statistics:
    """The statistics of the union of disjoint sets of rows about one common origin."""
    gram = parts[0].gram if len(parts) == 1 else functools.reduce(np.add, [part.gram for part in parts])
    return parts[0]._replace(gram=gram, num_rows=sum(part.num_rows for part in parts))


def subtract(total: Statistics, part: Statistics) -> Statistics:
    """The statistics of the rows of `total` that are not in `part`."""
    return total._replace(gram=total.gram - part.gram, num_rows=total.num_rows - part.num_rows)


def select(stats: Statistics, targets: np.ndarray) -> Statistics:
    """The statistics with only the objectives `targets` (indices)."""
    if np.array_equal(targets, np.arange(len(stats.label_shift))):
        return stats
    features = len(stats.shift)
    keep = np.concatenate([np.arange(features + 1), features + 1 + targets])
    return stats._replace(gram=stats.gram[np.ix_(keep, keep)], label_shift=stats.label_shift[targets])


def reweight(stats: Statistics, factor: float) -> Statistics:
    """The same rows with every sample weight times `factor`; a factor of 0 leaves no row."""
    if factor == 1.0:
        return stats
    return stats._replace(gram=stats.gram * factor, num_rows=stats.num_rows if factor > 0 else 0)


def rescale(stats: Statistics, scale: np.ndarray) -> Statistics:
    """The statistics of x / scale, with scale float64[H]."""
    factor = np.concatenate([1.0 / scale, np.ones(len(stats.gram) - len(scale))])
    return stats._replace(gram=stats.gram * factor[:, None] * factor[None, :], shift=stats.shift / scale)


def recentre(stats: Statistics, shift: np.ndarray, label_shift: np.ndarray) -> Statistics:
    """The same rows about another origin, without the rows.

    A row moves by r * delta with r = sqrt(w) and delta = old origin - new origin, so with u = sum of r a (a column of
    the Gram) the Gram moves by  delta u^T + u delta^T + (sum of w) delta delta^T.
    """
    delta = np.concatenate([stats.shift - shift, [0.0], stats.label_shift - label_shift])
    if not delta.any():
        return stats
    half = stats.gram[len(stats.shift)] + 0.5 * stats.weight * delta
    moved = np.stack([delta, half], axis=1) @ np.stack([half, delta])
    moved += stats.gram
    return stats._replace(gram=moved, shift=shift, label_shift=label_shift)


def centred(stats: Statistics, fit_intercept: bool) -> Statistics:
    """`stats` about its means, or about 0 where no intercept is wanted."""
    if fit_intercept:
        return recentre(stats, stats.mean, stats.label_mean)
    return recentre(stats, np.zeros_like(stats.shift), np.zeros_like(stats.label_shift))


def squared_error(stats: Statistics, coef: np.ndarray, intercept: np.ndarray) -> np.ndarray:
    """sum w (y - x coef - intercept)^2 over the rows of `stats`: float64[C, T] for coef [C, T, H], intercept [C, T]."""
    size = len(stats.shift)
    gram, cross = stats.gram[:size, :size], stats.gram[:size, size + 1 :]
    sums, label_sums = stats.gram[size, :size], stats.gram[size, size + 1 :]
    energy = np.diagonal(stats.gram)[size + 1 :]
    offset = intercept + coef @ stats.shift - stats.label_shift[None, :]  # the intercept about the origin of `stats`
    error = np.sum((coef @ gram) * coef, axis=2) - 2.0 * np.einsum("cth,ht->ct", coef, cross) + energy[None, :]
    error += offset * (2.0 * (coef @ sums) - 2.0 * label_sums[None, :] + offset * stats.weight)
    return np.maximum(error, 0.0)
