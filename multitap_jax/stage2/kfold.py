"""K-fold cross-validation from the statistics of the folds: the rows are not needed.

Holding fold k out leaves S_k = S - G_k. Instead of one eigendecomposition a fold there is one of the total, and
conjugate gradients for each fold in its basis, where diag((1 - n_k / n) lambda + alpha) is nearly the inverse already:
three to eight iterations for all alphas and objectives at once, and nothing but matrix products, on the device.

Conjugate gradients stopped early regularise, and could look better than the alpha they stand for. So what has not
converged is not a candidate: its error is infinite.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from multitap_jax.stage2.spectrum import Eigen, eigen
from multitap_jax.stage2.statistics import Statistics, centred, recentre, squared_error, subtract

DIRECT_UP_TO = 512  # features; below, an eigendecomposition a fold in float64 is quicker
ITERATIONS = 16
SCORE_TOLERANCE = 1e-4  # error of the held-out predictions, in deviations of the labels
HEAD_TOLERANCE = 1e-9
HEAD_ITERATIONS = 200


class FoldScore(NamedTuple):
    """Held-out sum of w (y - prediction)^2, float64[C, T] (infinite: not converged), and the fold's weight."""

    error: np.ndarray
    weight: float


def fold_scores(
    total: Statistics, folds: Sequence[Statistics], spectrum: Eigen, alphas: np.ndarray, fit_intercept: bool
) -> list[FoldScore]:
    """The held-out error of every fold, alpha [C] and objective. Empty folds give 0."""
    nothing = np.zeros((len(alphas), len(total.label_shift)))
    return [
        FoldScore(_score(total, fold, spectrum, alphas, fit_intercept), fold.weight)
        if fold.num_rows
        else FoldScore(nothing, 0.0)
        for fold in folds
    ]


def _score(
    total: Statistics, held_out: Statistics, spectrum: Eigen, alphas: np.ndarray, fit_intercept: bool
) -> np.ndarray:
    size = len(total.shift)
    if size <= DIRECT_UP_TO:
        about = centred(subtract(total, held_out), fit_intercept)
        apart = eigen(about.gram[:size, :size], about.gram[:size, size + 1 :])
        coef = np.stack([apart.coefficients(np.full(len(total.label_shift), alpha)) for alpha in alphas])
        return squared_error(held_out, coef, about.label_shift[None, :] - coef @ about.shift)
    origin = (total.mean, total.label_mean) if fit_intercept else (np.zeros(size), np.zeros_like(total.label_shift))
    fold = recentre(held_out, *origin)
    train = recentre(subtract(total, held_out), *origin)
    train_mean = (train.mean - origin[0], train.label_mean - origin[1])
    if not fit_intercept:
        train_mean = tuple(np.zeros_like(value) for value in train_mean)
    cross = train.gram[:size, size + 1 :] - train.weight * np.outer(*train_mean)
    scale = spectrum.values.mean() or 1.0
    unit = np.sqrt(scale)  # x / unit: eigenvalues about 1, and float32 far from its limits
    targets = len(total.label_shift)
    sums, label_sums = fold.gram[size, :size] / unit, fold.gram[size, size + 1 :]
    device = functools.partial(jnp.asarray, dtype=jnp.float32)
    # 4 H^3 once, or 4 H^2 more per column and iteration
    transform = size < 5 * len(alphas) * targets
    error, residual = _iterate(
        device(spectrum.values / scale),
        device(spectrum.vectors),
        device(fold.gram[:size, :size] / scale),
        device(spectrum.vectors.T @ cross / unit),
        device(spectrum.vectors.T @ (fold.gram[:size, size + 1 :] / unit)),
        device(spectrum.vectors.T @ (train_mean[0] / unit)),
        device(spectrum.vectors.T @ sums),
        (device(train.weight), device(fold.weight), device(train_mean[1]), device(label_sums)),
        device(np.diagonal(fold.gram)[size + 1 :]),
        device(np.diagonal(train.gram)[size + 1 :] + np.diagonal(fold.gram)[size + 1 :]),
        device(alphas / scale),
        transform=transform,
    )
    error = np.asarray(error, np.float64)
    return np.where(np.asarray(residual) <= SCORE_TOLERANCE, np.maximum(error, 0.0), np.inf)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames="transform")
def _iterate(
    values, vectors, fold_gram, cross, fold_cross, mean, sums, means, fold_energy, energy, alphas, *, transform
):
    """(held-out error, residual in deviations of the labels), float32[C, T] each; everything in the eigenbasis.

    With mean = train mean and sums = fold sums about the total's mean; columns are alpha-major: C T of them.
    """
    train_weight, fold_weight, label_mean, label_sums = means
    targets = cross.shape[1]
    count = len(alphas)
    alpha = jnp.repeat(alphas, targets)[None, :]
    tile = lambda row: jnp.tile(row, count)
    if transform:
        turned = _dot(_dot(vectors.T, fold_gram), vectors)
        held = lambda u: _dot(turned, u)
    else:
        held = lambda u: _dot(vectors.T, _dot(fold_gram, _dot(vectors, u)))

    def apply(u: jax.Array, held_u: jax.Array) -> jax.Array:
        # (S - G_k - n m m^T + alpha) u: what the training rows say about their own mean
        shift = train_weight * mean[:, None] * _dot(mean, u)[None, :]
        return (values[:, None] + alpha) * u - held_u - shift

    right = jnp.tile(cross, (1, count))
    share = train_weight / (train_weight + fold_weight)
    precondition = 1.0 / (share * values[:, None] + alpha)
    w = precondition * right
    held_w = held(w)
    r = right - apply(w, held_w)
    z = precondition * r
    floor = jnp.maximum(tile(energy), jnp.finfo(jnp.float32).tiny)

    def step(carry):
        index, w, held_w, r, p, rho = carry
        held_p = held(p)
        product = apply(p, held_p)
        length = rho / jnp.maximum(jnp.sum(p * product, 0), jnp.finfo(jnp.float32).tiny)
        length = jnp.where(rho > 0, length, 0.0)[None, :]
        w, held_w, r = w + length * p, held_w + length * held_p, r - length * product
        z = precondition * r
        new = jnp.sum(r * z, 0)
        p = z + (new / jnp.where(rho > 0, rho, 1.0))[None, :] * p
        return index + 1, w, held_w, r, p, new

    def going(carry):
        # A tenth of the tolerance: the residual is that of the recursion, which float32 lets drift a little.
        return (carry[0] < ITERATIONS) & jnp.any(jnp.sqrt(carry[-1] / floor) > 0.1 * SCORE_TOLERANCE)

    _, w, held_w, _, _, rho = jax.lax.while_loop(going, step, (0, w, held_w, r, z, jnp.sum(r * z, 0)))
    # sum over the fold of (y - label_mean - (x - mean) w)^2 from its sums about the total's mean
    inside = _dot(mean, w)
    outside = _dot(sums, w)
    label_mean, label_sums = tile(label_mean), tile(label_sums)
    offset = label_mean - inside
    error = tile(fold_energy) - 2.0 * jnp.sum(w * jnp.tile(fold_cross, (1, count)), 0) + jnp.sum(w * held_w, 0)
    error += offset * (2.0 * outside - 2.0 * label_sums + fold_weight * offset)
    return error.reshape(count, targets), jnp.sqrt(rho / floor).reshape(count, targets)


def fold_head(
    total: Statistics, held_out: Statistics, spectrum: Eigen, alpha: np.ndarray, fit_intercept: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(coef float64[T, H], intercept float64[T]) of the heads without one fold, at alpha [T]; conjugate gradients."""
    size = len(total.shift)
    train = centred(subtract(total, held_out) if held_out.num_rows else total, fit_intercept)
    gram, right = train.gram[:size, :size], train.gram[:size, size + 1 :].T
    share = train.weight / total.weight
    denominator = share * spectrum.values[None, :] + alpha[:, None]
    precondition = lambda r: ((r @ spectrum.vectors) / denominator) @ spectrum.vectors.T
    energy = np.maximum(np.diagonal(train.gram)[size + 1 :], np.finfo(float).tiny)
    coef = precondition(right)
    r = right - (coef @ gram + alpha[:, None] * coef)
    z = precondition(r)
    direction, rho = z, np.sum(r * z, 1)
    for _ in range(HEAD_ITERATIONS):
        if np.sqrt(np.maximum(rho, 0) / energy).max() <= HEAD_TOLERANCE:
            break
        product = direction @ gram + alpha[:, None] * direction
        curvature = np.sum(direction * product, 1)
        length = np.where(curvature > 0, rho, 0.0) / np.where(curvature > 0, curvature, 1.0)
        coef, r = coef + length[:, None] * direction, r - length[:, None] * product
        z = precondition(r)
        new = np.sum(r * z, 1)
        direction, rho = z + (new / np.where(rho > 0, rho, 1.0))[:, None] * direction, new
    return coef, train.label_shift - coef @ train.shift
