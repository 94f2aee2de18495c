"""Exact leave-one-out and leave-one-group-out, in a second pass over the rows; no model is ever refitted.

With z a centred row and H = z D z^T + 1 / (sum of w), D = (S + alpha)^-1, the residuals e of a group's rows, were the
group held out (mean and intercept included), are  (I - H W)^-1 e,  W = diag(w) (Woodbury; for one row the classical
e / (1 - h), Cook & Weisberg, 1982). Rows of weight 0, and rows without the label, come out as what the head that has
not seen their group predicts. A fold is a group too, and so k-fold of few rows is done the same way.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from multitap_jax.stage2.rows import Rows, concatenate

IN_FLIGHT = 2  # chunks
LARGE_GROUP = 32  # rows; from here on half a product is worth a loop over the alphas


class Basis(NamedTuple):
    """A fitted total, in a basis where S is diagonal.

    Attributes:
      vectors: float64[H, r]; z = (x / scale - mean) vectors.
      mean: float64[H], origin of x / scale.   scale: float64[H].
      values: float64[r], eigenvalues.   projected: float64[r, T].
      label_mean: float64[T].   weight: sum of w; infinite without an intercept, which no row then moves.
    """

    vectors: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    values: np.ndarray
    projected: np.ndarray
    label_mean: np.ndarray
    weight: float


def left_out(
    z: np.ndarray, y: np.ndarray, weight: np.ndarray, basis: Basis, alphas: np.ndarray, per_column: bool = False
) -> np.ndarray:
    """Residuals of one group's rows, had the group been held out.

    Args:
      z: float64[m, r].   y: float64[m, T], NaN: no label.   weight: float64[m], 0 where the row is not trained on.
      basis: the total.
      alphas: float64[C]; with `per_column` one an objective, float64[T].

    Returns: float64[C, m, T], or [m, T] with `per_column`; where there is no label, minus the prediction.
    """
    labels = np.where(np.isnan(y), 0.0, y - basis.label_mean[None, :])
    base = np.where(np.isnan(y), -basis.label_mean[None, :], 0.0)
    inverse = 1.0 / (basis.values[None, :] + alphas[:, None])
    if per_column:
        error = labels + base - z @ (basis.projected * inverse.T)
        error = error.T[:, :, None]
    else:
        error = (labels + base)[None] - z @ (basis.projected[None] * inverse[:, :, None])
    if len(z) == 1:
        leverage = (inverse @ z[0] ** 2 + 1.0 / basis.weight) * weight[0]
        out = error / (1.0 - leverage)[:, None, None]
    else:
        hat = _hats(z, inverse) + 1.0 / basis.weight
        out = np.linalg.solve(np.eye(len(z))[None] - hat * weight[None, None, :], error)
    return out[:, :, 0].T if per_column else out


def _hats(z: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """z diag(inverse_c) z^T for every c, float64[C, m, m]; a large one as the product of a matrix with itself, half."""
    if len(z) < LARGE_GROUP:
        return (z[None] * inverse[:, None, :]) @ z.T
    return np.stack([scaled @ scaled.T for scaled in (z * root[None, :] for root in np.sqrt(inverse))])


@jax.jit
def rotate(x: jax.Array, mean: jax.Array, turn: jax.Array) -> jax.Array:
    """(x - mean) turn, float32 products by name; x [n, H] of any float type, turn float32[H, r]."""
    return jnp.dot(x.astype(jnp.float32) - mean[None, :], turn, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _single_scores(x, labels, weight, mean, turn, solution, inverse, share):
    """sum of w (e / (1 - w h))^2 of a chunk, every alpha at once: [C, t]; solution [r, C t], inverse [C, r]."""
    z = rotate(x, mean, turn)
    predicted = jnp.dot(z, solution, precision=jax.lax.Precision.HIGHEST).reshape(len(z), -1, labels.shape[1])
    leverage = (jnp.dot(z * z, inverse.T, precision=jax.lax.Precision.HIGHEST) + share) * weight[:, None]
    out = (labels[:, None, :] - predicted) / (1.0 - leverage)[:, :, None]
    return jnp.sum(out * out * weight[:, None, None], axis=0)


class Pass:
    """Turns rows into z on the device, in chunks of one shape (one compilation)."""

    def __init__(self, basis: Basis, chunk_rows: int) -> None:
        self.basis, self._rows = basis, chunk_rows
        self._mean = jnp.asarray(basis.mean * basis.scale, jnp.float32)
        self._zero = jnp.zeros_like(self._mean)
        self._turn = jnp.asarray(basis.vectors / basis.scale[:, None], jnp.float32)

    def inputs(self, rows: Rows) -> Iterator[tuple[tuple[Any, ...], Rows]]:
        """(the arguments of `rotate`, the rows) piece by piece; the last piece is filled up with rows of 0."""
        for start in range(0, len(rows.x), self._rows):
            part = rows.take(slice(start, start + self._rows))
            x, mean = part.x, self._mean
            if x.dtype == np.float64:  # its mean is taken off before it is rounded
                x, mean = (x - (self.basis.mean * self.basis.scale)[None, :]).astype(np.float32), self._zero
            yield (_filled(x, self._rows), mean, self._turn), part

    def chunks(self, rows: Rows) -> Iterator[tuple[jax.Array, Rows]]:
        """(z float32[chunk_rows, r] with spare rows at the end, the rows) piece by piece."""
        for inputs, part in self.inputs(rows):
            yield rotate(*inputs), part


def single_scores(passes: Pass, rows: Iterable[Rows], columns: np.ndarray, alphas: np.ndarray) -> np.ndarray:
    """Leave-one-out: sum of w e^2, float64[C, t], of the objectives `columns` (all of them rated in the same rows)."""
    basis = passes.basis
    inverse = 1.0 / (basis.values[None, :] + alphas[:, None])
    solution = np.transpose(basis.projected[None] * inverse[:, :, None], (1, 0, 2)).reshape(len(basis.values), -1)
    device = [jnp.asarray(value, jnp.float32) for value in (solution, inverse, 1.0 / basis.weight)]
    total, waiting = np.zeros((len(alphas), len(columns))), deque[jax.Array]()
    for batch in rows:
        for inputs, part in passes.inputs(batch):
            y = part.y[:, columns] - basis.label_mean[None, :]
            seen = ~np.isnan(y[:, 0])
            labels = _filled(np.where(seen[:, None], y, 0.0).astype(np.float32), len(inputs[0]))
            weight = _filled((part.weight * seen).astype(np.float32), len(inputs[0]))
            waiting.append(_single_scores(inputs[0], labels, weight, *inputs[1:], *device))
            if len(waiting) > IN_FLIGHT:  # the device is busy while the next rows are read
                total += np.asarray(waiting.popleft(), np.float64)
    return sum((np.asarray(part, np.float64) for part in waiting), total)


def _filled(column: np.ndarray, rows: int) -> np.ndarray:
    """`column` [n, ...] with zeros up to `rows`; itself where it has as many."""
    spare = rows - len(column)
    return np.pad(column, ((0, spare),) + ((0, 0),) * (column.ndim - 1)) if spare else column


def whole_groups(batches: Iterable[Rows], sizes: dict[int, int]) -> Iterator[list[Rows]]:
    """The rows in whole groups, whatever the order they come in.

    Rows wait until their group is complete; texts of one image usually stand together, and then few wait.
    """
    waiting: dict[int, list[Rows]] = {}
    for batch in batches:
        order = np.argsort(batch.group, kind="stable")
        names, starts = np.unique(batch.group[order], return_index=True)
        done = []
        for name, index in zip(names.tolist(), np.split(order, starts[1:]), strict=True):
            parts = waiting.setdefault(name, [])
            parts.append(batch.take(index))
            if sum(len(part.x) for part in parts) == sizes[name]:
                done.append(concatenate(waiting.pop(name)))
        if done:
            yield done


def single_residuals(
    z: np.ndarray, y: np.ndarray, weight: np.ndarray, basis: Basis, alpha: np.ndarray | float
) -> np.ndarray:
    """`left_out` with every row a group of its own, all rows at once: float64[n, T] at alpha [T], or one for all."""
    inverse = 1.0 / (basis.values[None, :] + np.atleast_1d(alpha)[:, None])
    error = np.where(np.isnan(y), 0.0, y) - basis.label_mean[None, :] - z @ (basis.projected * inverse.T)
    leverage = (z**2 @ inverse.T + 1.0 / basis.weight) * (weight[:, None] * ~np.isnan(y))
    return error / (1.0 - leverage)


def single_energy(z: np.ndarray, y: np.ndarray, weight: np.ndarray, basis: Basis, alphas: np.ndarray) -> np.ndarray:
    """Sum of w e^2 of `single_residuals` at every alpha, float64[C, T]; every row has every label."""
    inverse = 1.0 / (basis.values[None, :] + alphas[:, None])
    free = 1.0 - (z**2 @ inverse.T + 1.0 / basis.weight) * weight[:, None]
    solution = (basis.projected[None] * inverse[:, :, None]).transpose(1, 0, 2)
    predicted = (z @ solution.reshape(len(solution), -1)).reshape(len(z), len(alphas), -1)
    residual = ((y - basis.label_mean[None, :])[:, None, :] - predicted) / free[:, :, None]
    return np.einsum("nct,n->ct", residual**2, weight)
