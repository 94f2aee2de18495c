"""K-fold cross-validation from the statistics of the folds: the rows are not needed.

Holding fold k out leaves S_k = S - G_k. Instead of one eigendecomposition a fold there is one of the total, and
conjugate gradients for each fold in its basis, where diag((1 - n_k / n) lambda + alpha) is nearly the inverse already:
three to eight iterations for all alphas and objectives at once, and nothing but matrix products, on the device.

Conjugate gradients stopped early regularise, and could look better than the alpha they stand for. Their residual says
how far they are, unless the fold holds nearly all there is of some direction: the training rows then say little of it,
and a small residual nothing. So that share is measured; a fold that it or the residual speaks against is solved alone.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from multitap_jax.stage2.spectrum import Eigen, eigen
from multitap_jax.stage2.statistics import Statistics, centred, combine, recentre, squared_error, subtract

DIRECT_UP_TO = 512  # features; below, an eigendecomposition a fold in float64 is quicker
ITERATIONS = 32
SCORE_TOLERANCE = 1e-4  # error of the held-out predictions, in deviations of the labels
LEAST_LEFT = 0.01  # of a direction to the training rows: less is beyond the residuals of float32
SHARE_ROUNDS, SHARE_VECTORS = 4, 2  # of a power iteration, at least; a share near 1 stands out at once
HEAD_TOLERANCE = 1e-9
HEAD_ITERATIONS = 200


class FoldScore(NamedTuple):
    """Held-out sum of w (y - prediction)^2, float64[C, T], and the fold's weight."""

    error: np.ndarray
    weight: float


def fold_scores(
    total: Statistics, folds: Sequence[Statistics], spectrum: Eigen, alphas: np.ndarray, fit_intercept: bool
) -> list[FoldScore]:
    """The held-out error of every fold, alpha [C] and objective. Empty folds give 0."""
    nothing = FoldScore(np.zeros((len(alphas), len(total.label_shift))), 0.0)
    if len(total.shift) <= DIRECT_UP_TO:
        score = lambda fold: _refitted(folds, fold, alphas, fit_intercept)
    else:
        iteration = _Iteration(total, spectrum, alphas, fit_intercept)

        def score(fold: Statistics) -> np.ndarray:
            found = None if total.num_rows - fold.num_rows < len(total.shift) else iteration.score(fold)
            return _refitted(folds, fold, alphas, fit_intercept) if found is None else found

    return [FoldScore(score(fold), fold.weight) if fold.num_rows else nothing for fold in folds]


def _refitted(folds: Sequence[Statistics], held_out: Statistics, alphas: np.ndarray, fit_intercept: bool) -> np.ndarray:
    # The others' sums, not the total's less the fold's: of a feature that the fold alone has, those leave the rounding.
    others = combine([fold for fold in folds if fold is not held_out and fold.num_rows])
    size = len(others.shift)
    about = centred(others, fit_intercept)
    apart = eigen(about.gram[:size, :size], about.gram[:size, size + 1 :])
    coef = np.stack([apart.coefficients(np.full(len(others.label_shift), alpha)) for alpha in alphas])
    return squared_error(held_out, coef, about.label_shift[None, :] - coef @ about.shift)


class _Iteration:
    """Conjugate gradients for one fold after the other; what they share is on the device once."""

    def __init__(self, total: Statistics, spectrum: Eigen, alphas: np.ndarray, fit_intercept: bool) -> None:
        size = len(total.shift)
        self._origin = (
            (total.mean, total.label_mean) if fit_intercept else (np.zeros(size), np.zeros_like(total.label_shift))
        )
        about = recentre(total, *self._origin)
        self._labels = about.gram[:, size + 1 :].copy()  # [E, T], all that the training rows' own sums are needed for
        self._sums, self._weight, self._intercept = about.gram[:size, size].copy(), total.weight, fit_intercept
        self._spectrum, self._alphas = spectrum, alphas
        self._scale = spectrum.values.mean() or 1.0
        self._shared = (
            jnp.asarray(spectrum.values / self._scale, jnp.float32),
            jnp.asarray(spectrum.vectors, jnp.float32),
            jnp.asarray(alphas / self._scale, jnp.float32),
        )
        # 4 H^3 once, or 4 H^2 more per column and iteration
        self._transform = size < 5 * len(alphas) * len(total.label_shift)

    def score(self, held_out: Statistics) -> np.ndarray | None:
        """Held-out sum of squares float64[C, T], None if that of some alpha has not converged for certain."""
        size = len(held_out.shift)
        fold = recentre(held_out, *self._origin)
        unit = np.sqrt(self._scale)  # x / unit: eigenvalues about 1, and float32 far from its limits
        sums, fold_labels = fold.gram[:size, size], fold.gram[:, size + 1 :]
        train_labels, train_weight = self._labels - fold_labels, self._weight - fold.weight
        shift = float(self._intercept) / train_weight  # without an intercept the training rows' mean is not removed
        mean, label_mean = (self._sums - sums) * shift, train_labels[size] * shift
        turned = lambda value: self._spectrum.vectors.T @ (value / unit)
        device = functools.partial(jnp.asarray, dtype=jnp.float32)
        values, vectors, alphas = self._shared
        error, residual, share = _iterate(
            values,
            vectors,
            jnp.asarray(np.multiply(fold.gram[:size, :size], 1.0 / self._scale, dtype=np.float32, casting="same_kind")),
            device(turned(train_labels[:size] - train_weight * np.outer(mean, label_mean))),
            device(turned(fold_labels[:size])),
            device(turned(mean)),
            device(turned(sums)),
            (device(train_weight), device(fold.weight), device(label_mean), device(fold_labels[size])),
            device(np.diagonal(fold_labels[size + 1 :])),
            device(np.diagonal(self._labels[size + 1 :])),
            alphas,
            transform=self._transform,
        )
        # S - G_k + alpha >= (1 - share) (S + alpha): what a residual leaves undone is at most 1 / (1 - share) of it.
        left = np.maximum(1.0 - np.asarray(share), 0.0)
        if left.min() < LEAST_LEFT or not (np.asarray(residual) <= SCORE_TOLERANCE * left[:, None]).all():
            return None
        return np.maximum(np.asarray(error, np.float64), 0.0)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames="transform")
def _iterate(
    values, vectors, fold_gram, cross, fold_cross, mean, sums, means, fold_energy, energy, alphas, *, transform
):
    """(held-out error, residual in deviations of the labels), float32[C, T], share of the fold; all in the eigenbasis.

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

    # n m m^T: what the training rows say about their own mean
    shift = lambda u: train_weight * mean[:, None] * _dot(mean, u)[None, :]
    apply = lambda u, held_u: (values[:, None] + alpha) * u - held_u - shift(u)  # (S - G_k - n m m^T + alpha) u

    right = jnp.tile(cross, (1, count))
    precondition = 1.0 / (train_weight / (train_weight + fold_weight) * values[:, None] + alpha)
    w = precondition * right
    held_w = held(w)
    r = right - apply(w, held_w)
    z = precondition * r
    floor = jnp.maximum(tile(energy), jnp.finfo(jnp.float32).tiny)

    def step(carry):
        index, w, held_w, r, p, rho, v, _ = carry
        held_p, held_v = jnp.split(held(jnp.concatenate([p, v], axis=1)), [p.shape[1]], axis=1)
        v, share = _towards_largest(v, held_v + shift(v), values, alphas)
        product = apply(p, held_p)
        length = rho / jnp.maximum(jnp.sum(p * product, 0), jnp.finfo(jnp.float32).tiny)
        length = jnp.where(rho > 0, length, 0.0)[None, :]
        w, held_w, r = w + length * p, held_w + length * held_p, r - length * product
        z = precondition * r
        new = jnp.sum(r * z, 0)
        p = z + (new / jnp.where(rho > 0, rho, 1.0))[None, :] * p
        return index + 1, w, held_w, r, p, new, v, share

    def going(carry):
        index, *_, rho, _, share = carry
        # A tenth of the tolerance: the residual is that of the recursion, which float32 lets drift a little.
        enough = jnp.repeat(jnp.minimum(0.1, 0.5 * (1.0 - share)) * SCORE_TOLERANCE, targets)
        return (index < ITERATIONS) & ((index < SHARE_ROUNDS) | jnp.any(jnp.sqrt(rho / floor) > enough))

    v = jax.random.normal(jax.random.key(0), (len(values), SHARE_VECTORS))
    start = 0, w, held_w, r, z, jnp.sum(r * z, 0), v, jnp.zeros(count)
    _, w, held_w, _, _, rho, _, share = jax.lax.while_loop(going, step, start)
    # sum over the fold of (y - label_mean - (x - mean) w)^2 from its sums about the total's mean
    inside = _dot(mean, w)
    outside = _dot(sums, w)
    label_mean, label_sums = tile(label_mean), tile(label_sums)
    offset = label_mean - inside
    error = tile(fold_energy) - 2.0 * jnp.sum(w * jnp.tile(fold_cross, (1, count)), 0) + jnp.sum(w * held_w, 0)
    error += offset * (2.0 * outside - 2.0 * label_sums + fold_weight * offset)
    return error.reshape(count, targets), jnp.sqrt(rho / floor).reshape(count, targets), share


def _towards_largest(
    v: jax.Array, held_v: jax.Array, values: jax.Array, alphas: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A step of the power iteration for the direction v of which the fold holds most, and its share so far.

    The share v G v / v (S + alpha) v, float32[C], is 1 where the training rows have nothing of v, and 0.3 or so where
    all rows are alike; the step is that of (S + a)^-1/2 G (S + a)^-1/2 at the smallest alpha a.
    """
    tiny = jnp.finfo(jnp.float32).tiny
    whole = jnp.sum(values[:, None] * v**2, 0)[None, :] + alphas[:, None] * jnp.sum(v**2, 0)[None, :]
    share = jnp.minimum((jnp.sum(v * held_v, 0)[None, :] / jnp.maximum(whole, tiny)).max(1), 1.0)
    v = held_v / (values + alphas.min())[:, None]
    return v / jnp.maximum(jnp.linalg.norm(v, axis=0, keepdims=True), tiny), share


def fold_head(
    total: Statistics, held_out: Statistics, spectrum: Eigen, alpha: np.ndarray, fit_intercept: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(coef float64[T, H], intercept float64[T]) of the heads without one fold, at alpha [T].

    Conjugate gradients; an eigendecomposition where they do not settle, or would seem to with too few training rows.
    """
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
    settled = lambda: np.sqrt(np.maximum(rho, 0) / energy).max() <= HEAD_TOLERANCE
    for _ in range(HEAD_ITERATIONS if train.num_rows >= size else 0):
        if settled():
            break
        product = direction @ gram + alpha[:, None] * direction
        curvature = np.sum(direction * product, 1)
        length = np.where(curvature > 0, rho, 0.0) / np.where(curvature > 0, curvature, 1.0)
        coef, r = coef + length[:, None] * direction, r - length[:, None] * product
        z = precondition(r)
        new = np.sum(r * z, 1)
        direction, rho = z + (new / np.where(rho > 0, rho, 1.0))[:, None] * direction, new
    if train.num_rows < size or not settled():
        coef = eigen(gram, right.T).coefficients(alpha)
    return coef, train.label_shift - coef @ train.shift
