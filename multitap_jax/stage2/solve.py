"""Ridge regression in closed form, from `Statistics`: every alpha, every objective, every fold, without the rows.

For one set of training rows with weighted means m, n the objective is  sum w (y - b - x W)^2 + alpha |W|^2, whose
solution is  W = (S + alpha I)^-1 c,  b = n - m W,  with S and c the moments about the means (Hoerl & Kennard, 1970).
One eigendecomposition S = V diag(lambda) V^T serves all alphas and objectives.

The matrices are small (E x E) and few, so they are solved on the host: LAPACK in float64 is exact enough for any alpha
and needs no 64-bit mode of JAX. `solve_on_device` does the last step in float32 on the accelerator, corrected once.

Letters: C alphas, Q folds, H features, T objectives (all of them observed in the same rows).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from multitap_jax.stage2.moments import Statistics, combine, recentre, subtract

MIN_FREEDOM = 1e-4  # below this share of residual degrees of freedom the GCV ratio is 0 / 0


class Spectrum(NamedTuple):
    """The normal equations of one training set in the eigenbasis of S.

    Attributes:
      values: float64[H], eigenvalues of S, clipped at 0 (rounding can push the smallest below).
      vectors: float64[H, H], eigenvectors in columns.
      projected: float64[H, T], V^T c.
      mean: float64[H], the origin of x: the mean, or 0 without intercept.
      label_mean: float64[T], the origin of y.
      label_energy: float64[T], sum w (y - label_mean)^2.
      num_rows: rows.
    """

    values: np.ndarray
    vectors: np.ndarray
    projected: np.ndarray
    mean: np.ndarray
    label_mean: np.ndarray
    label_energy: np.ndarray
    num_rows: int

    def solve(self, alphas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(coef float64[C, T, H], intercept float64[C, T]) for alphas [C, T]."""
        scaled = self.projected.T[None, :, :] / (self.values[None, None, :] + alphas[:, :, None])
        coef = scaled @ self.vectors.T
        return coef, self.label_mean[None, :] - coef @ self.mean

    def precondition(self, residual: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        """(S + alpha)^-1 residual, row by row: residual [T, H], alpha [T]."""
        return ((residual @ self.vectors) / (self.values[None, :] + alpha[:, None])) @ self.vectors.T


def centred(stats: Statistics, fit_intercept: bool) -> Statistics:
    """`stats` about its means, or about 0 where no intercept is wanted."""
    if fit_intercept:
        return recentre(stats, stats.mean, stats.label_mean)
    return recentre(stats, np.zeros_like(stats.shift), np.zeros_like(stats.label_shift))


def decompose(stats: Statistics, fit_intercept: bool = True) -> Spectrum:
    """The eigendecomposition that serves all alphas."""
    about, size = centred(stats, fit_intercept), len(stats.shift)
    values, vectors = scipy.linalg.eigh(about.gram[:size, :size])
    return Spectrum(
        values=np.maximum(values, 0.0),
        vectors=vectors,
        projected=vectors.T @ about.gram[:size, size + 1 :],
        mean=about.shift,
        label_mean=about.label_shift,
        label_energy=np.diagonal(about.gram)[size + 1 :],
        num_rows=stats.num_rows,
    )


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


def auto_alphas(total: Statistics, num_features: int, count: int = 20) -> np.ndarray:
    """float64[count]: 1e-6 to 1e2 times the mean eigenvalue of the centred X^T X, so free of scale and of rows.

    `num_features` is H, also where the features of `total` were rotated into fewer.
    """
    size = len(total.shift)
    spread = float(np.trace(centred(total, True).gram[:size, :size])) / num_features
    return np.logspace(-6.0, 2.0, count) * (spread if spread > 0 else 1.0)


def label_variance_energy(total: Statistics) -> np.ndarray:
    """float64[T], sum w (y - mean y)^2: the error of the best constant."""
    return squared_error(total, np.zeros((1, len(total.label_shift), len(total.shift))), total.label_mean[None, :])[0]


def gcv(spectrum: Spectrum, alphas: np.ndarray, fit_intercept: bool = True) -> np.ndarray:
    """Generalised cross-validation (Golub, Heath & Wahba, 1979): n RSS / (n - 1 - edf)^2, float64[C, T].

    Infinite where the fit interpolates (fewer than `MIN_FREEDOM` n degrees of freedom are left).
    """
    inverse = 1.0 / (spectrum.values[None, :, None] + alphas[:, None, :])
    energy = spectrum.projected[None, :, :] ** 2 * inverse
    residual = spectrum.label_energy[None, :] - energy.sum(1) - alphas * (energy * inverse).sum(1)
    freedom = spectrum.num_rows - float(fit_intercept) - (spectrum.values[None, :, None] * inverse).sum(1)
    usable = freedom > MIN_FREEDOM * spectrum.num_rows
    score = spectrum.num_rows * np.maximum(residual, 0.0) / np.where(usable, freedom, 1.0) ** 2
    return np.where(usable, score, np.inf)


class FoldPath(NamedTuple):
    """From training on all folds but one: held-out `error` [C, T], `weight`, `coef` [C, T, H], `intercept` [C, T]."""

    error: np.ndarray
    weight: float
    coef: np.ndarray
    intercept: np.ndarray


def kfold(folds: Sequence[Statistics], alphas: np.ndarray, fit_intercept: bool = True) -> list[FoldPath]:
    """Exact cross-validation: fold q is held out by subtracting its statistics from the total. Empty folds give 0."""
    total, paths = combine(folds), []
    for held_out in folds:
        train = subtract(total, held_out) if held_out.num_rows else total
        coef, intercept = decompose(train, fit_intercept).solve(alphas)
        paths.append(FoldPath(squared_error(held_out, coef, intercept), held_out.weight, coef, intercept))
    return paths


def choose(score: np.ndarray, reference: np.ndarray, per_target: bool) -> np.ndarray:
    """Index of the alpha with the smallest score: int[T] from score [C, T].

    Args:
      score: mean squared errors, alphas ascending.
      reference: float64[T], error of the best constant; 0 marks a constant objective, which takes the largest alpha.
      per_target: each objective its own alpha, or one for all by the mean of score / reference (the best mean R2).
    """
    relative = score / np.where(reference > 0, reference, 1.0)[None, :]
    if not per_target:
        varied = relative[:, reference > 0]
        relative = np.broadcast_to(varied.mean(1, keepdims=True), score.shape) if varied.size else relative
    return np.where(reference > 0, np.argmin(relative, axis=0), len(score) - 1)


@jax.jit
def _cholesky_solve(gram: jax.Array, alpha: jax.Array, right: jax.Array) -> jax.Array:
    shifted = gram + alpha * jnp.eye(gram.shape[0], dtype=gram.dtype)
    return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(shifted), True), right)


def solve_on_device(stats: Statistics, alpha: np.ndarray, fit_intercept: bool = True) -> np.ndarray:
    """coef float64[T, H] at alpha [T] by a float32 Cholesky on the device and one refinement with a float64 residual.

    Raises:
      numpy.linalg.LinAlgError: if alpha is too small for float32 (below about 1e-7 of the largest eigenvalue).
    """
    about, size = centred(stats, fit_intercept), len(stats.shift)
    gram, cross = about.gram[:size, :size], about.gram[:size, size + 1 :]
    scale = np.trace(gram) / size or 1.0  # keeps float32 far from overflow; alpha is scaled alike
    on_device = jnp.asarray(gram / scale, jnp.float32)
    coef = np.empty((len(alpha), size))
    for value in np.unique(alpha):
        targets = np.flatnonzero(alpha == value)
        ridge = jnp.float32(value / scale)

        def solve(right: np.ndarray, ridge: jax.Array = ridge) -> np.ndarray:
            return np.asarray(_cholesky_solve(on_device, ridge, jnp.asarray(right / scale, jnp.float32)), np.float64)

        solution = solve(cross[:, targets])
        solution += solve(cross[:, targets] - gram @ solution - value * solution)
        if not np.isfinite(solution).all():
            raise np.linalg.LinAlgError(f"alpha = {value:.3g} is too small for float32; use solver='host'")
        coef[targets] = solution.T
    return coef
