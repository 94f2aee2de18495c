"""Mergeable second moments of (embedding, labels): all a ridge regression needs, in memory independent of the rows.

Each row is written once as the augmented vector  a = sqrt(w) * [x - s | 1 | y - t]  of width E = H + 1 + T, and one
matrix product a chunk, sum of a a^T, holds the weight, the means, the covariance, the cross moments with the labels and
the labels' own moments together. Two traps of float32 are met here (the figures are ours, n = 20k, H = 1024):

  shift        outlier dimensions of a language model have means 100 times their deviation; without the shift
               `s` the products lose 4 digits to them. The mean of about a thousand rows is near enough to `s`.
  float-float  a running float32 sum over millions of rows drifts; the sum is kept as hi + lo with the exact TwoSum of
               Knuth (TAOCP 4.2.2), 48 bits in all, and needs no 64-bit mode of JAX.

Rows fall into buckets, the folds of cross-validation: sums of buckets give every training set.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


class Moments(NamedTuple):
    """A pytree of running sums.

    Attributes:
      hi: float32[buckets, E, E], leading part of the sum of a a^T.
      lo: float32[buckets, E, E], what `hi` could not hold.
      num_rows: int32[buckets], rows of positive weight.
      shift: float32[H], s.
      label_shift: float32[T], t.
    """

    hi: jax.Array
    lo: jax.Array
    num_rows: jax.Array
    shift: jax.Array
    label_shift: jax.Array


class Statistics(NamedTuple):
    """The same sums for one set of rows, on the host in float64, about an origin of one's choice.

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


def init(num_features: int, num_objectives: int, buckets: int, shift: Array, label_shift: Array) -> Moments:
    """Empty moments; `shift` [H] and `label_shift` [T] are rough means (see the module)."""
    shift, label_shift = jnp.asarray(shift, jnp.float32), jnp.asarray(label_shift, jnp.float32)
    if shift.shape != (num_features,) or label_shift.shape != (num_objectives,):
        raise ValueError(f"shifts {shift.shape}, {label_shift.shape}; expected {(num_features,)}, {(num_objectives,)}")
    width = num_features + 1 + num_objectives
    empty = jnp.zeros((buckets, width, width), jnp.float32)
    return Moments(empty, empty.copy(), jnp.zeros(buckets, jnp.int32), shift, label_shift)


def _two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a + b as the rounded sum and its exact rounding error."""
    total = a + b
    rest = total - a
    return total, (a - (total - rest)) + (b - rest)


def _add(hi: jax.Array, lo: jax.Array, more_hi: jax.Array, more_lo: jax.Array) -> tuple[jax.Array, jax.Array]:
    total, error = _two_sum(hi, more_hi)
    return _two_sum(total, error + lo + more_lo)


@functools.partial(jax.jit, donate_argnames="moments")
def update(moments: Moments, x: Array, y: Array, weight: Array, bucket: Array | int) -> Moments:
    """Adds a chunk of n rows to one bucket. The moments passed in are consumed (their buffers are reused).

    Args:
      moments: the sums so far.
      x: [n, H] of any float type. Keep n fixed (one compilation) and between 256 and 2048 (rounding grows with n).
      y: float32[n, T]; NaN counts as absent, and the sums that involve it are meaningless in this bucket.
      weight: float32[n], >= 0; rows of weight 0 are padding.
      bucket: int32 scalar.
    """
    root = jnp.sqrt(weight)[:, None]
    labels = y - moments.label_shift[None, :]
    row = jnp.concatenate(
        [(x.astype(jnp.float32) - moments.shift[None, :]) * root, root, jnp.where(jnp.isnan(y), 0.0, labels) * root],
        axis=1,
    )
    # HIGHEST by name: the default of an accelerator is bfloat16 or TF32, which loses the digits kept below.
    gram = jax.lax.dot_general(row, row, (((0,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
    hi, lo = _add(moments.hi[bucket], moments.lo[bucket], gram, jnp.zeros_like(gram))
    count = jnp.sum(weight > 0, dtype=jnp.int32)
    return moments._replace(
        hi=moments.hi.at[bucket].set(hi),
        lo=moments.lo.at[bucket].set(lo),
        num_rows=moments.num_rows.at[bucket].add(count),
    )


@jax.jit
def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both sets of rows. Both must have been begun with the same shifts."""
    hi, lo = _add(a.hi, a.lo, b.hi, b.lo)
    return a._replace(hi=hi, lo=lo, num_rows=a.num_rows + b.num_rows)


def finalize(moments: Moments) -> list[Statistics]:
    """One `Statistics` a bucket, in float64 on the host."""
    shift, label_shift = np.asarray(moments.shift, np.float64), np.asarray(moments.label_shift, np.float64)
    return [
        Statistics(np.asarray(hi, np.float64) + np.asarray(lo, np.float64), int(count), shift, label_shift)
        for hi, lo, count in zip(moments.hi, moments.lo, moments.num_rows, strict=True)
    ]


def from_rows(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> Statistics:
    """Statistics of x [n, H], y [n, T], weight [n] directly in float64, about the origin."""
    root = np.sqrt(weight)[:, None]
    row = np.concatenate([x * root, root, y * root], axis=1, dtype=np.float64)
    return Statistics(row.T @ row, int((weight > 0).sum()), np.zeros(x.shape[1]), np.zeros(y.shape[1]))


def combine(parts: Sequence[Statistics]) -> Statistics:
    """The statistics of the union of disjoint sets of rows about one common origin."""
    gram = functools.reduce(np.add, [part.gram for part in parts])
    return parts[0]._replace(gram=gram, num_rows=sum(part.num_rows for part in parts))


def subtract(total: Statistics, part: Statistics) -> Statistics:
    """The statistics of the rows of `total` that are not in `part`."""
    return total._replace(gram=total.gram - part.gram, num_rows=total.num_rows - part.num_rows)


def select(stats: Statistics, targets: np.ndarray) -> Statistics:
    """The statistics with only the objectives `targets` (indices)."""
    features = len(stats.shift)
    keep = np.concatenate([np.arange(features + 1), features + 1 + targets])
    return stats._replace(gram=stats.gram[np.ix_(keep, keep)], label_shift=stats.label_shift[targets])


def recentre(stats: Statistics, shift: np.ndarray, label_shift: np.ndarray) -> Statistics:
    """The same rows about another origin, without the rows.

    A row moves by r * delta with r = sqrt(w) and delta = old origin - new origin, so with u = sum of r a (a column of
    the Gram) the Gram moves by  delta u^T + u delta^T + (sum of w) delta delta^T.
    """
    delta = np.concatenate([stats.shift - shift, [0.0], stats.label_shift - label_shift])
    sums = stats.gram[len(stats.shift)]
    moved = stats.gram + np.outer(delta, sums) + np.outer(sums + stats.weight * delta, delta)
    return stats._replace(gram=moved, shift=shift, label_shift=label_shift)
