"""Full precision: takes what float32 products left in the coefficients out again, by passes over the rows."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from multitap_jax.parallel.distributed import sum_over_processes
from multitap_jax.stage2.rows import Rows, weights_of

TOLERANCE = 1e-7  # error of the predictions, in standard deviations of the labels
BLOCK_ROWS = 512  # rows in float64 at a time: they stay in the cache
MAX_PASSES = 20


class Refined(NamedTuple):
    """coef float64[T, H]; passes over the rows; error float64[T] of the predictions, in deviations of the labels."""

    coef: np.ndarray
    passes: int
    error: np.ndarray


def refine(
    replay: Callable[[], Iterable[Rows]],
    precondition: Callable[[np.ndarray], np.ndarray],
    coef: np.ndarray,
    alpha: np.ndarray,
    mean: np.ndarray,
    scale: np.ndarray,
    label_mean: np.ndarray,
    label_energy: np.ndarray,
    targets: np.ndarray,
    source_weights: Mapping[str, float],
    left_after: Callable[[np.ndarray], np.ndarray],
    shared: bool = False,
) -> Refined:
    """Conjugate gradients on the normal equations of the rows themselves, in float64.

    The solution of the float32 statistics is the start and their inverse the preconditioner, so one to three passes
    (4 N H T operations each) do. Where the certificate vouches for it, a whole step ends the search without another
    pass to measure its length: plain iterative refinement, which diverges where alpha is below the error of the Gram.
    Hestenes & Stiefel (1952), all objectives side by side. With several processes each reads its own rows, and the
    sums are added up.

    Args:
      replay: gives the rows anew at each call.
      precondition: [T, H] -> [T, H], the approximate inverse of S + alpha.
      coef: float64[T, H] of x / scale, the start.
      alpha: float64[T].
      mean, scale: float64[T, H], origin and unit of x / scale an objective.
      label_mean: float64[T].
      label_energy: float64[T], sum w (y - label_mean)^2; 0 leaves an objective as it is.
      targets: int[T], columns of the labels.
      source_weights: by which a source's sample weights are multiplied.
      left_after: [T, H] -> [T], the error expected to be left by a whole step of the preconditioner (certificate.py).
      shared: whether other processes hold other rows of the same fit.
    """
    active, offset_of = label_energy > 0, lambda direction: np.sum(mean * direction, axis=1)[None, :]

    def gather(value_of: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        """sum w (x / scale - mean) value(y, x) over the rows in which the objective is observed: [T, H]."""
        out, block = np.zeros_like(coef), np.empty((BLOCK_ROWS, coef.shape[1]))
        for rows in replay():
            weight, labels = weights_of(rows, source_weights), rows.y[:, targets]
            for start in range(0, len(labels), BLOCK_ROWS):
                part = slice(start, start + BLOCK_ROWS)
                y, x = labels[part], block[: len(labels[part])]
                x[...] = rows.x[part]
                value = value_of(y, x) * weight[part, None] * ~np.isnan(y)
                out += (value.T @ x) / scale - value.sum(0)[:, None] * mean
        return np.where(active[:, None], sum_over_processes(out, shared), 0.0)

    start = coef
    residual = (
        gather(lambda y, x: np.nan_to_num(y) - label_mean[None, :] - (x @ (start / scale).T - offset_of(start)))
        - np.where(active, alpha, 0.0)[:, None] * coef
    )
    direction, previous = np.zeros_like(coef), np.full(len(coef), np.inf)
    for passes in range(1, MAX_PASSES + 1):
        step = precondition(residual)
        # squared distance to the solution, as the preconditioner measures it
        decrease = np.sum(residual * step, axis=1)
        error = np.sqrt(decrease / np.where(active, label_energy, 1.0))
        if passes == MAX_PASSES or error.max() <= TOLERANCE:
            break
        left = np.where(active, left_after(step), 0.0)
        if left.max() <= TOLERANCE:
            return Refined(coef + step, passes, left)
        direction = step + (decrease / previous)[:, None] * direction
        current = direction
        product = gather(lambda _, x: x @ (current / scale).T - offset_of(current))  # noqa: B023
        product += alpha[:, None] * direction
        curvature = np.sum(direction * product, axis=1)
        length = np.where(curvature > 0, decrease, 0.0) / np.where(curvature > 0, curvature, 1.0)
        coef, residual = coef + length[:, None] * direction, residual - length[:, None] * product
        previous = np.where(decrease > 0, decrease, 1.0)
    return Refined(coef, passes, error)
