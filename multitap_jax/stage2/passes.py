"""Further passes over the rows on the device, in chunks of one shape: their errors at every alpha at once."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from multitap_jax.stage2.leave_out import Basis
from multitap_jax.stage2.rows import Rows

PASS_ROWS = 2048  # a chunk
IN_FLIGHT = 2  # chunks


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def rotate(x: jax.Array, mean: jax.Array, turn: jax.Array) -> jax.Array:
    """(x - mean) turn, float32 products by name; x [n, H] of any float type, turn float32[H, r]."""
    return _dot(x.astype(jnp.float32) - mean[None, :], turn)


@jax.jit
def _training_scores(x, mean, turn, labels, weight):
    """Of a chunk and every alpha at once, [H + 1, C t]: sum of w e (x - mean), and of w e^2; turn [H, C t]."""
    z = x.astype(jnp.float32) - mean[None, :]
    residual = jnp.tile(labels, (1, turn.shape[1] // labels.shape[1])) - _dot(z, turn)
    weighted = residual * weight[:, None]
    return jnp.concatenate([_dot(z.T, weighted), jnp.sum(residual * weighted, axis=0, keepdims=True)])


@jax.jit
def _single_scores(x, mean, turn, labels, weight, solution, inverse, share):
    """sum of w (e / (1 - w h))^2 of a chunk, every alpha at once: [C, t]; solution [r, C t], inverse [C, r]."""
    z = rotate(x, mean, turn)
    predicted = _dot(z, solution).reshape(len(z), -1, labels.shape[1])
    leverage = (_dot(z * z, inverse.T) + share) * weight[:, None]
    out = (labels[:, None, :] - predicted) / (1.0 - leverage)[:, :, None]
    return jnp.sum(out * out * weight[:, None, None], axis=0)


class Pass:
    """(x / scale - mean) vectors on the device, in chunks of one shape (one compilation).

    Args:
      vectors: float64[H, r].   mean, scale: float64[H].
    """

    def __init__(self, vectors: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> None:
        self._origin = mean * scale
        self._mean = jnp.asarray(self._origin, jnp.float32)
        self._zero = jnp.zeros_like(self._mean)
        self._turn = jnp.asarray(vectors / scale[:, None], jnp.float32)

    def inputs(self, rows: Rows) -> Iterator[tuple[tuple[Any, ...], Rows]]:
        """(the arguments of `rotate`, the rows) piece by piece; the last piece is filled up with rows of 0."""
        for start in range(0, len(rows.x), PASS_ROWS):
            part = rows.take(slice(start, start + PASS_ROWS))
            x, mean = part.x, self._mean
            if x.dtype == np.float64:  # its mean is taken off before it is rounded
                x, mean = (x - self._origin[None, :]).astype(np.float32), self._zero
            yield (_filled(x), mean, self._turn), part

    def chunks(self, rows: Rows) -> Iterator[tuple[jax.Array, Rows]]:
        """(z float32[PASS_ROWS, r] with spare rows at the end, the rows) piece by piece."""
        for inputs, part in self.inputs(rows):
            yield rotate(*inputs), part

    def total(
        self,
        scores: Callable[..., jax.Array],
        rows: Iterable[Rows],
        columns: np.ndarray,
        label_mean: np.ndarray,
        *device: jax.Array,
    ) -> np.ndarray:
        """The sum of scores(x, mean, turn, labels, weight, *device) over the chunks, float64; 0 without rows."""
        total, waiting = np.zeros(()), deque[jax.Array]()
        for batch in rows:
            for inputs, part in self.inputs(batch):
                y = part.y[:, columns] - label_mean[None, :]
                seen = ~np.isnan(y[:, 0])
                labels = _filled(np.where(seen[:, None], y, 0.0).astype(np.float32))
                weight = _filled((part.weight * seen).astype(np.float32))
                waiting.append(scores(*inputs, labels, weight, *device))
                if len(waiting) > IN_FLIGHT:  # the device is busy while the next rows are read
                    total = total + np.asarray(waiting.popleft(), np.float64)
        return sum((np.asarray(part, np.float64) for part in waiting), total)


def single_scores(
    passes: Pass, basis: Basis, rows: Iterable[Rows], columns: np.ndarray, alphas: np.ndarray
) -> np.ndarray:
    """Leave-one-out: sum of w e^2, float64[C, t], of the objectives `columns` (all of them rated in the same rows)."""
    inverse = 1.0 / (basis.values[None, :] + alphas[:, None])
    solution = np.transpose(basis.projected[None] * inverse[:, :, None], (1, 0, 2)).reshape(len(basis.values), -1)
    device = [jnp.asarray(value, jnp.float32) for value in (solution, inverse, 1.0 / basis.weight)]
    found = passes.total(_single_scores, rows, columns, basis.label_mean, *device)
    return np.broadcast_to(found, (len(alphas), len(columns)))


def training_scores(
    coef: np.ndarray,
    mean: np.ndarray,
    scale: np.ndarray,
    label_mean: np.ndarray,
    rows: Iterable[Rows],
    columns: np.ndarray,
) -> np.ndarray:
    """Sums over the rows at coef [R, H] of x / scale, alpha-major: float64[R, H + 1], R = C t; `columns` as above.

    With z = x / scale - mean and e = y - label_mean - z coef they are those of w e z, and in the end of w e^2.
    """
    passes = Pass(coef.T, mean, scale)
    found = np.broadcast_to(passes.total(_training_scores, rows, columns, label_mean), (len(mean) + 1, len(coef)))
    return found.T / np.append(scale, 1.0)[None, :]


def _filled(column: np.ndarray) -> np.ndarray:
    """`column` [n, ...] with zeros up to `PASS_ROWS`; itself where it has as many."""
    spare = PASS_ROWS - len(column)
    return np.pad(column, ((0, spare),) + ((0, 0),) * (column.ndim - 1)) if spare else column
