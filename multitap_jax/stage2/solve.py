"""Ridge regression in closed form: scores of every alpha, the choice, and the last step.

For one set of training rows with weighted means m, n the objective is  sum w (y - b - x W)^2 + alpha |W|^2, whose
solution is  W = (S + alpha I)^-1 c,  b = n - m W,  with S and c the moments about the means (Hoerl & Kennard, 1970).
The matrices are few and small (H x H), so they are solved on the host, where LAPACK's float64 is exact enough for any
alpha and JAX needs no 64-bit mode; `solve_on_device` does the last step in float32 on the accelerator, with corrections
by float64 residuals until it is as exact.

Letters: C alphas, Q folds, H features, T objectives (all of them observed in the same rows).
"""

import jax
import jax.numpy as jnp
import numpy as np

from multitap_jax.stage2.spectrum import Path
from multitap_jax.stage2.statistics import Statistics, centred

MIN_FREEDOM = 1e-4  # below this share of residual degrees of freedom the GCV ratio is 0 / 0
CORRECTIONS = 30


def auto_alphas(trace: float, num_features: int, count: int = 20) -> np.ndarray:
    """float64[count]: 1e-6 to 1e2 times the mean eigenvalue trace / H of the centred X^T X: free of scale and rows."""
    spread = trace / num_features
    return np.logspace(-6.0, 2.0, count) * (spread if spread > 0 else 1.0)


def residual_energy(path: Path, label_energy: np.ndarray, alphas: np.ndarray) -> np.ndarray:
    """sum w (y - prediction)^2 over the training rows, float64[C, T]: yy - c^T W - alpha |W|^2."""
    return np.maximum(label_energy[None, :] - path.fit - alphas[:, None] * path.norm, 0.0)


def gcv(path: Path, rss: np.ndarray, num_rows: float, fit_intercept: bool = True) -> np.ndarray:
    """Generalised cross-validation (Golub, Heath & Wahba, 1979): n RSS / (n - 1 - edf)^2, float64[C, T].

    Infinite where the fit interpolates (fewer than `MIN_FREEDOM` n degrees of freedom are left).
    """
    freedom = num_rows - float(fit_intercept) - path.freedom
    usable = (freedom > MIN_FREEDOM * num_rows)[:, None]
    return np.where(usable, num_rows * rss / np.where(usable, freedom[:, None], 1.0) ** 2, np.inf)


def choose(score: np.ndarray, reference: np.ndarray, per_target: bool) -> np.ndarray:
    """Index of the alpha with the smallest score: int[T] from score [C, T].

    Args:
      score: mean squared errors, alphas ascending; infinite where an alpha may not be chosen.
      reference: float64[T], error of the best constant; 0 marks a constant objective, which takes the largest alpha.
      per_target: each objective its own alpha, or one for all by the mean of score / reference (the best mean R2).
    """
    relative = score / np.where(reference > 0, reference, 1.0)[None, :]
    if not per_target:
        varied = relative[:, reference > 0]
        relative = np.broadcast_to(varied.mean(1, keepdims=True), score.shape) if varied.size else relative
    return np.where(reference > 0, np.argmin(relative, axis=0), len(score) - 1)


@jax.jit
def _cholesky(gram: jax.Array, alpha: jax.Array) -> jax.Array:
    return jnp.linalg.cholesky(gram + alpha * jnp.eye(gram.shape[0], dtype=gram.dtype))


@jax.jit
def _back_substitute(lower: jax.Array, right: jax.Array) -> jax.Array:
    return jax.scipy.linalg.cho_solve((lower, True), right)


def solve_on_device(stats: Statistics, alpha: np.ndarray, fit_intercept: bool = True) -> np.ndarray:
    """coef float64[T, H] at alpha [T] by a float32 Cholesky on the device.

    Exactness: each round solves for the float64 residual of the round before and adds, so the error shrinks by
    eps (lambda_max + alpha) / alpha a round, down to float64's own.

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
        lower = _cholesky(on_device, jnp.float32(value / scale))
        solution, before = np.zeros((size, len(targets))), np.inf
        for _ in range(CORRECTIONS):
            residual = cross[:, targets] - gram @ solution - value * solution
            right = residual / (np.abs(residual).max() or 1.0)
            step = np.asarray(_back_substitute(lower, jnp.asarray(right, jnp.float32)), np.float64)
            step *= np.abs(residual).max() / scale
            moved = np.abs(step).max()
            if not moved < 0.5 * before:
                break
            solution, before = solution + step, moved
        if not np.isfinite(step).all() or moved > 1e-6 * np.abs(solution).max():
            raise np.linalg.LinAlgError(f"alpha = {value:.3g} is too small for float32; use solver='host'")
        coef[targets] = solution.T
    return coef
