"""Exact leave-one-out and leave-one-group-out, in a second pass over the rows; no model is ever refitted.

With z a centred row and H = z D z^T + 1 / (sum of w), D = (S + alpha)^-1, the residuals e of a group's rows, were the
group held out (mean and intercept included), are  (I - H W)^-1 e,  W = diag(w) (Woodbury; for one row the classical
e / (1 - h), Cook & Weisberg, 1982). Rows of weight 0, and rows without the label, come out as what the head that has
not seen their group predicts. A fold is a group too, and so k-fold of few rows is done the same way.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from multitap_jax.stage2.rows import Rows, concatenate

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
