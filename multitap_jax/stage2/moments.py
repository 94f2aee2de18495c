"""Mergeable second moments of (embedding, labels) on the device: all a ridge regression needs, whatever the rows.

`Moments` is one bucket; the accumulator keeps one for each fold, set of rated objectives and source, in a dict, which
JAX sees as one pytree. A chunk of rows is written once as  A = sqrt(w) [x - s | 1 | y - t]  and costs one product
A^T A (see statistics.py). Two traps of float32 are met here (measured with n = 20k, H = 1024):

  shift        outlier dimensions of a language model have means 100 times their deviation; without the shift
               `s` the products lose 4 digits to them. The mean of about a thousand rows is near enough to `s`.
  float-float  a running float32 sum over millions of rows drifts; the sum is kept as hi + lo with the exact TwoSum of
               Knuth (TAOCP 4.2.2), 48 bits in all, and needs no 64-bit mode of JAX.

The product is symmetric, so only half is computed, in a layout without special cases: of K slabs of e columns, slab p
is multiplied with the slabs p, p+1, ..., p + K//2 (mod K). For odd K every pair is met once, as in a triangle of
blocks, yet all slabs are alike: an array [K, e, (K//2 + 1) e], which a mesh can split by its first axis. Each slab is
written as an array of its own: a product of column ranges of one wide array would copy both of them first.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from multitap_jax.files import write_atomic
from multitap_jax.stage2.statistics import Statistics

Array = jax.Array | np.ndarray
MANY_FEATURES = 3000  # from here on nine slabs are faster than seven on a CPU


class Moments(NamedTuple):
    """A pytree of running sums.

    Attributes:
      hi: float32[K, e, (K//2 + 1) e], leading part of the slabs of the sum of a a^T.
      lo: the same shape, what `hi` could not hold.
      num_rows: int32 scalar, rows of positive weight.
      shift: float32[H], s.
      label_shift: float32[T], t.
    """

    hi: jax.Array
    lo: jax.Array
    num_rows: jax.Array
    shift: jax.Array
    label_shift: jax.Array


def default_slabs(num_features: int) -> int:
    """K for the default backend: more slabs waste less of the product, fewer keep an accelerator's products large."""
    if jax.default_backend() != "cpu":
        return 3
    return 9 if num_features >= MANY_FEATURES else 7


def slab_shape(width: int, slabs: int) -> tuple[int, int, int]:
    """Shape of `Moments.hi` for `width` = E columns, padded to a multiple of `slabs`."""
    size = -(-width // slabs)
    return slabs, size, (slabs // 2 + 1) * size


def init(
    num_features: int, num_objectives: int, shift: Array, label_shift: Array, *, slabs: int | None = None
) -> Moments:
    """Empty moments; `shift` [H] and `label_shift` [T] are rough means (see the module).

    Raises:
      ValueError: shifts of another length.
    """
    shift, label_shift = jnp.asarray(shift, jnp.float32), jnp.asarray(label_shift, jnp.float32)
    if shift.shape != (num_features,) or label_shift.shape != (num_objectives,):
        raise ValueError(f"shifts {shift.shape}, {label_shift.shape}; expected {(num_features,)}, {(num_objectives,)}")
    slabs = slabs or default_slabs(num_features)
    empty = jnp.zeros(slab_shape(num_features + 1 + num_objectives, slabs), jnp.float32)
    return Moments(empty, empty.copy(), jnp.zeros((), jnp.int32), shift, label_shift)


def _two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a + b as the rounded sum and its exact rounding error."""
    total = a + b
    rest = total - a
    return total, (a - (total - rest)) + (b - rest)


def add_pairs(
    hi: jax.Array, lo: jax.Array, more_hi: jax.Array, more_lo: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(hi, lo) + (more_hi, more_lo) in float-float."""
    total, error = _two_sum(hi, more_hi)
    return _two_sum(total, error + lo if more_lo is None else error + lo + more_lo)


def augmented(moments: Moments, x: Array, y: Array, weight: Array, slabs: int, size: int) -> list[jax.Array]:
    """The columns of A = sqrt(w) [x - s | 1 | y - t | 0 ...], 0 for a missing label: `slabs` of float32[n, size]."""
    root = jnp.sqrt(weight)[:, None]
    labels = jnp.where(jnp.isnan(y), 0.0, y - moments.label_shift[None, :])
    features = x.shape[1]
    spare = slabs * size - features - 1 - y.shape[1]
    tail = jnp.concatenate([root, labels * root, jnp.zeros((len(root), spare), jnp.float32)], axis=1)
    out = []
    for start in range(0, slabs * size, size):
        middle, stop = min(max(features, start), start + size), start + size  # features up to `middle`, then the tail
        inner = (x[:, start:middle].astype(jnp.float32) - moments.shift[None, start:middle]) * root
        outer = tail[:, max(start - features, 0) : stop - features] if stop > features else tail[:, :0]
        out.append(jnp.concatenate([inner, outer], axis=1))
    return out


def slab_products(columns: list[jax.Array], first: Array | int, own: int) -> jax.Array:
    """The products of `own` slabs from `first` on with those after them: float32[own, e, (K//2 + 1) e]."""
    count = len(columns)
    columns = jax.lax.optimization_barrier(columns)  # written once, not recomputed in every product
    if isinstance(first, int):
        slab = lambda index: columns[(first + index) % count]
    else:
        stacked = jnp.stack(columns)
        slab = lambda index: jax.lax.dynamic_index_in_dim(stacked, (first + index) % count, keepdims=False)

    def product(left: jax.Array, right: jax.Array) -> jax.Array:
        # HIGHEST by name: the default of an accelerator is bfloat16 or TF32, which loses the digits kept below.
        return jax.lax.dot_general(left, right, (((0,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)

    reach = count // 2 + 1
    rows = [jnp.concatenate([product(slab(p), slab(p + k)) for k in range(reach)], axis=1) for p in range(own)]
    return jnp.stack(rows)


@functools.partial(jax.jit, donate_argnames="moments")
def update(moments: Moments, x: Array, y: Array, weight: Array) -> Moments:
    """Adds a chunk of n rows. The moments passed in are consumed (their buffers are reused).

    Args:
      moments: the sums so far.
      x: [n, H] of any float type. Keep n fixed (one compilation) and between 256 and 2048 (rounding grows with n).
      y: float32[n, T]; NaN counts as absent, and the sums that involve it are meaningless in this bucket.
      weight: float32[n], >= 0; rows of weight 0 are padding.
    """
    slabs, size, _ = moments.hi.shape
    columns = augmented(moments, x, y, weight, slabs, size)
    hi, lo = add_pairs(moments.hi, moments.lo, slab_products(columns, 0, slabs))
    return moments._replace(hi=hi, lo=lo, num_rows=moments.num_rows + jnp.sum(weight > 0, dtype=jnp.int32))


@jax.jit
def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both sets of rows, begun with the same shifts (else merge their `finalize`, recentred)."""
    hi, lo = add_pairs(a.hi, a.lo, b.hi, b.lo)
    return a._replace(hi=hi, lo=lo, num_rows=a.num_rows + b.num_rows)


@jax.jit
def reduce(stacked: Moments) -> Moments:
    """The sum over a leading axis of `hi`, `lo` and `num_rows`, such as the devices of a mesh, in float-float."""

    def add(carry: tuple[jax.Array, jax.Array], part: tuple[jax.Array, jax.Array]):
        return add_pairs(*carry, *part), None

    (hi, lo), _ = jax.lax.scan(add, (stacked.hi[0], stacked.lo[0]), (stacked.hi[1:], stacked.lo[1:]))
    return stacked._replace(hi=hi, lo=lo, num_rows=stacked.num_rows.sum(dtype=jnp.int32))


def unpack(slabs: np.ndarray, width: int) -> np.ndarray:
    """The symmetric matrix [width, width] of slabs [K, e, (K//2 + 1) e]."""
    count, size, _ = slabs.shape
    full = np.empty((count * size, count * size), slabs.dtype)
    for p in range(count):
        for step in range(count // 2 + 1):
            q = (p + step) % count
            block = slabs[p, :, step * size : (step + 1) * size]
            full[q * size : (q + 1) * size, p * size : (p + 1) * size] = block.T
            full[p * size : (p + 1) * size, q * size : (q + 1) * size] = block
    return full[:width, :width]


def pack(full: np.ndarray, slabs: int = 3) -> np.ndarray:
    """The slabs of a symmetric matrix: what `unpack` undoes."""
    count, size, reach = slab_shape(len(full), slabs)
    spare = count * size - len(full)
    padded = np.pad(full, ((0, spare), (0, spare)))
    padded = np.concatenate([padded, padded[:, : reach - size]], axis=1)
    return np.stack([padded[p * size : (p + 1) * size, p * size : p * size + reach] for p in range(count)])


def finalize(moments: Moments) -> Statistics:
    """The sums in float64 on the host."""
    shift, label_shift = np.asarray(moments.shift, np.float64), np.asarray(moments.label_shift, np.float64)
    slabs = np.asarray(moments.hi, np.float64)
    slabs += np.asarray(moments.lo)
    return Statistics(unpack(slabs, len(shift) + 1 + len(label_shift)), int(moments.num_rows), shift, label_shift)


def save(path: str | Path, moments: Moments) -> None:
    """Writes moments to a safetensors file, bit for bit."""
    arrays = {name: np.array(value, order="C") for name, value in moments._asdict().items()}
    write_atomic(Path(path), safetensors.numpy.save(arrays, {"format": "multitap-moments"}))


def load(path: str | Path) -> Moments:
    """Reads what `save` wrote."""
    arrays = safetensors.numpy.load(Path(path).read_bytes())
    return Moments(**{name: jnp.asarray(arrays[name]) for name in Moments._fields})
