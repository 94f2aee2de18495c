"""Full precision: takes what float32 products left in the coefficients out again, by passes over the rows."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from multitap_jax.parallel.distributed import sum_over_processes
from multitap_jax.stage2.rows import Rows, weights_of

TOLERANCE = 1e-7  # error of the predictions, in standard deviations of the labels
BLOCK_ROWS = 64  # rows in float64 at a time: they stay in the cache
MAX_PASSES = 20


class Start(NamedTuple):
    """What is refined, T objectives side by side.

    Attributes:
      coef: float64[T, H] of x / scale.   alpha: float64[T].
      mean, scale: float64[T, H], origin and unit of x / scale an objective.
      label_mean: float64[T].
      label_energy: float64[T], sum w (y - label_mean)^2; 0 leaves an objective as it is.
    """

    coef: np.ndarray
    alpha: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    label_mean: np.ndarray
    label_energy: np.ndarray


class Again(NamedTuple):
    """The rows once more.

    Attributes:
      replay: gives them anew at each call.
      targets: int[T], columns of the labels.
      source_weights: by which a source's sample weights are multiplied.
      shared: whether other processes hold other rows of the same fit.
    """

    replay: Callable[[], Iterable[Rows]]
    targets: np.ndarray
    source_weights: Mapping[str, float]
    shared: bool = False

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(x float64[n, H], y float64[n, T], weight float64[n]) of few rows; x is overwritten by the next."""
        for rows in self.replay():
            weight, labels = weights_of(rows, self.source_weights), rows.y[:, self.targets]
            block = np.empty((BLOCK_ROWS, rows.x.shape[1]))
            for first in range(0, len(labels), BLOCK_ROWS):
                part = slice(first, first + BLOCK_ROWS)
                x = block[: len(labels[part])]
                x[...] = rows.x[part]
                yield x, labels[part], weight[part]


class Refined(NamedTuple):
    """coef float64[T, H]; passes over the rows; error float64[T] of the predictions, in deviations of the labels."""

    coef: np.ndarray
    passes: int
    error: np.ndarray


def refine(
    again: Again,
    start: Start,
    precondition: Callable[[np.ndarray], np.ndarray],
    left_after: Callable[[np.ndarray], np.ndarray],
) -> Refined:
    """Conjugate gradients on the normal equations of the rows themselves, in float64.

    The solution of the float32 statistics is the start and their inverse the preconditioner, so one to three passes
    (4 N H T operations each) do. Where the certificate vouches for it, a whole step ends the search without another
    pass to measure its length: plain iterative refinement, which diverges where alpha is below the error of the Gram.
    Hestenes & Stiefel (1952), all objectives side by side. With several processes each reads its own rows, and the
    sums are added up.

    Args:
      again: the rows.
      start: the coefficients.
      precondition: [T, H] -> [T, H], the approximate inverse of S + alpha.
      left_after: [T, H] -> [T], the error expected to be left by a whole step of the preconditioner (certificate.py).
    """
    coef, active = start.coef, start.label_energy > 0
    alpha = np.where(active, start.alpha, 0.0)[:, None]
    residual = _row_sums(again, start, coef, labels=True) - alpha * coef
    direction, previous = np.zeros_like(coef), np.full(len(coef), np.inf)
    for passes in range(1, MAX_PASSES + 1):
        step = precondition(residual)
        # squared distance to the solution, as the preconditioner measures it
        decrease = np.sum(residual * step, axis=1)
        error = np.sqrt(decrease / np.where(active, start.label_energy, 1.0))
        if passes == MAX_PASSES or error.max() <= TOLERANCE:
            break
        left = np.where(active, left_after(step), 0.0)
        if left.max() <= TOLERANCE:
            return Refined(coef + step, passes, left)
        direction = step + (decrease / previous)[:, None] * direction
        product = alpha * direction - _row_sums(again, start, direction, labels=False)
        curvature = np.sum(direction * product, axis=1)
        length = np.where(curvature > 0, decrease, 0.0) / np.where(curvature > 0, curvature, 1.0)
        coef, residual = coef + length[:, None] * direction, residual - length[:, None] * product
        previous = np.where(decrease > 0, decrease, 1.0)
    return Refined(coef, passes, error)


def _row_sums(again: Again, start: Start, coef: np.ndarray, *, labels: bool) -> np.ndarray:
    """sum w z (y - label_mean - z coef), z = x / scale - mean, over the rows with that label: float64[T, H].

    Without `labels` y - label_mean counts as 0. Objectives that are not refined get 0.
    """
    inner, total = np.zeros_like(coef), np.zeros(len(coef))
    of_x, origin = (coef / start.scale).T, np.sum(start.mean * coef, axis=1)
    for x, y, weight in again.blocks():
        value = origin - x @ of_x
        if labels:
            value += np.nan_to_num(y) - start.label_mean
        value *= weight[:, None] * ~np.isnan(y)
        inner += value.T @ x
        total += value.sum(0)
    found = inner / start.scale - total[:, None] * start.mean
    return np.where(start.label_energy[:, None] > 0, sum_over_processes(found, again.shared), 0.0)
