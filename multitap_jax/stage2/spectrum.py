"""Three factorisations of S + alpha I that serve every alpha; all of them LAPACK in float64 on the host.

  Eigen        S = V diag(lambda) V^T: what cross-validation needs
  Tridiagonal  S = Q T Q^T: enough for GCV, at a third of the price; each alpha is then O(H)
  Dual         B B^T = U diag(lambda) U^T for n rows B of S = B^T B, where n < H

All give the same three answers: `path` (sums that GCV and the training error need), `coefficients`, and `inverse`.
"""

from typing import NamedTuple, Protocol

import numpy as np
import scipy.linalg

EIGEN_UP_TO = 256  # below, an eigendecomposition costs nothing


class Path(NamedTuple):
    """For alphas [C]: `fit` float64[C, T] = c^T W, `norm` [C, T] = |W|^2, `freedom` [C] = trace of the hat matrix."""

    fit: np.ndarray
    norm: np.ndarray
    freedom: np.ndarray


class Factor(Protocol):
    """(S + alpha I)^-1 for any alpha, with the cross moments c [H, T] it was made for."""

    @property
    def values(self) -> np.ndarray:
        """float64[r], eigenvalues of S; those left out are 0."""
        ...

    def path(self, alphas: np.ndarray) -> Path:
        """Sums at each of the alphas [C]."""
        ...

    def coefficients(self, alpha: np.ndarray) -> np.ndarray:
        """W^T = ((S + alpha_t)^-1 c_t) float64[T, H], alpha [T]."""
        ...

    def inverse(self, rows: np.ndarray, alpha: np.ndarray | float) -> np.ndarray:
        """(S + alpha)^-1 times each of the rows float64[n, H]; alpha one for all, or float64[n]."""
        ...


class Eigen(NamedTuple):
    """`values` float64[H] clipped at 0, `vectors` float64[H, H] in columns, `projected` float64[H, T] = V^T c."""

    values: np.ndarray
    vectors: np.ndarray
    projected: np.ndarray

    def path(self, alphas: np.ndarray) -> Path:
        inverse = 1.0 / (self.values[None, :] + alphas[:, None])
        energy = self.projected**2
        return Path(inverse @ energy, inverse**2 @ energy, inverse @ self.values)

    def coefficients(self, alpha: np.ndarray) -> np.ndarray:
        return (self.projected.T / (self.values[None, :] + alpha[:, None])) @ self.vectors.T

    def inverse(self, rows: np.ndarray, alpha: np.ndarray | float) -> np.ndarray:
        return ((rows @ self.vectors) / (self.values[None, :] + np.atleast_1d(alpha)[:, None])) @ self.vectors.T


class Tridiagonal(NamedTuple):
    """`packed`, `tau`: the reflectors of Q as LAPACK's sytrd leaves them; `diagonal`, `off`: T; `projected` = Q^T c."""

    values: np.ndarray
    packed: np.ndarray
    tau: np.ndarray
    diagonal: np.ndarray
    off: np.ndarray
    projected: np.ndarray

    def _solve(self, right: np.ndarray, alpha: float) -> np.ndarray:
        banded = np.stack([self.diagonal + alpha, np.append(self.off, 0.0)])
        return scipy.linalg.solveh_banded(banded, right, lower=True, check_finite=False)

    def path(self, alphas: np.ndarray) -> Path:
        fit, norm = np.empty((2, len(alphas), self.projected.shape[1]))
        for index, alpha in enumerate(alphas):
            solution = self._solve(self.projected, alpha)
            fit[index], norm[index] = np.sum(solution * self.projected, 0), np.sum(solution**2, 0)
        return Path(fit, norm, (self.values[None, :] / (self.values[None, :] + alphas[:, None])).sum(1))

    def coefficients(self, alpha: np.ndarray) -> np.ndarray:
        columns = [self._solve(self.projected[:, t], value) for t, value in enumerate(alpha)]
        return _rotated(self.packed, self.tau, np.stack(columns, axis=1), transpose=False).T

    def inverse(self, rows: np.ndarray, alpha: np.ndarray | float) -> np.ndarray:
        turned = _rotated(self.packed, self.tau, rows.T, transpose=True)
        for value in np.unique(alpha):
            own = np.broadcast_to(alpha == value, len(rows))
            turned[:, own] = self._solve(turned[:, own], value)
        return _rotated(self.packed, self.tau, turned, transpose=False).T


class Dual(NamedTuple):
    """`rows` float64[n, H] = B, `vectors` float64[n, n] = U, `values` [n]; `projected` [n, T] = U^T b, c = B^T b."""

    values: np.ndarray
    vectors: np.ndarray
    rows: np.ndarray
    projected: np.ndarray

    def path(self, alphas: np.ndarray) -> Path:
        inverse = 1.0 / (self.values[None, :] + alphas[:, None])
        energy = self.values[:, None] * self.projected**2
        return Path(inverse @ energy, inverse**2 @ energy, inverse @ self.values)

    def coefficients(self, alpha: np.ndarray) -> np.ndarray:
        return ((self.projected.T / (self.values[None, :] + alpha[:, None])) @ self.vectors.T) @ self.rows

    def inverse(self, rows: np.ndarray, alpha: np.ndarray | float) -> np.ndarray:
        # Woodbury: outside of what the rows span, S is 0 and the inverse is 1 / alpha.
        column = np.atleast_1d(alpha)[:, None]
        inside = ((rows @ self.rows.T) @ self.vectors) / (self.values[None, :] + column)
        return (rows - (inside @ self.vectors.T) @ self.rows) / column


def eigen(gram: np.ndarray, cross: np.ndarray) -> Eigen:
    """The eigendecomposition of S = gram [H, H]; eigenvalues that rounding pushed below 0 become 0."""
    values, vectors = scipy.linalg.eigh(gram, driver="evd", check_finite=False)
    return Eigen(np.maximum(values, 0.0), vectors, vectors.T @ cross)


def dual(rows: np.ndarray, labels: np.ndarray) -> Dual:
    """The kernel form of S = B^T B, c = B^T b for rows B [n, H] and labels b [n, T], both times sqrt(w) and centred."""
    values, vectors = scipy.linalg.eigh(rows @ rows.T, driver="evd", check_finite=False)
    return Dual(np.maximum(values, 0.0), vectors, rows, vectors.T @ labels)


def tridiagonal(gram: np.ndarray, cross: np.ndarray, smallest_alpha: float) -> Tridiagonal | Eigen:
    """The tridiagonal form, or the eigendecomposition where H is small or rounding made S + alpha indefinite."""
    if len(gram) <= EIGEN_UP_TO:
        return eigen(gram, cross)
    lwork = int(scipy.linalg.lapack.dsytrd_lwork(len(gram), lower=1)[0])
    packed, diagonal, off, tau, info = scipy.linalg.lapack.dsytrd(gram, lower=1, lwork=lwork)
    values = scipy.linalg.eigvalsh_tridiagonal(diagonal, off, check_finite=False, lapack_driver="sterf")
    if info or values[0] <= -0.5 * smallest_alpha:
        return eigen(gram, cross)
    projected = _rotated(packed, tau, cross, transpose=True)
    return Tridiagonal(np.maximum(values, 0.0), packed, tau, diagonal, off, projected)


def _rotated(packed: np.ndarray, tau: np.ndarray, right: np.ndarray, *, transpose: bool) -> np.ndarray:
    """Q^T right or Q right [H, k]: sytrd's reflectors, one row down, are those of a QR decomposition (ormqr)."""
    trans = "T" if transpose else "N"
    reflectors, below = packed[1:, :-1], np.asfortranarray(right[1:])
    lwork = int(scipy.linalg.lapack.dormqr("L", trans, reflectors, tau, below, -1)[1][0])
    turned, _, info = scipy.linalg.lapack.dormqr("L", trans, reflectors, tau, below, lwork)
    assert info == 0
    return np.concatenate([right[:1], turned])
