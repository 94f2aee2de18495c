"""The linear systems of a fit: objectives that are rated in the same rows share one factorisation.

Few rows give systems from the rows themselves, in float64 (dual where rows < features); many rows give systems from the
statistics of their folds. An objective that few of many rows rate takes those rows, where they can be read again: with
fewer rows than features a fit goes through every label, and what is left over is lost in the rounding of sums.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from multitap_jax.stage2 import spectrum
from multitap_jax.stage2 import statistics as st
from multitap_jax.stage2.accumulator import Accumulator
from multitap_jax.stage2.buckets import Key
from multitap_jax.stage2.certificate import Precision, residual_error, varies
from multitap_jax.stage2.leave_out import Basis
from multitap_jax.stage2.rows import DataError, Rows, concatenate, weights_of
from multitap_jax.stage2.solve import residual_energy
from multitap_jax.stage2.statistics import Statistics


@dataclasses.dataclass
class System:
    """The regression of the objectives `targets`; features are x / scale throughout.

    Attributes:
      targets: int[t] among the chosen objectives.
      factor: the factorisation about the means.
      mean: float64[H] of x / scale, label_mean float64[t]; both 0 without an intercept.
      scale: float64[H], 1 where features are taken as they are.
      label_energy: float64[t], sum w (y - label_mean)^2, the error of the best constant.
      weight, num_rows: of the rows that are rated.
      trace: of the centred S.
      total, folds: statistics, where the rows were summed.
      constant: bool[t], whether the labels that count are all the same, as far as the sums can tell.
      rows: the rows that are rated, where they were kept or read again.
    """

    targets: np.ndarray
    factor: spectrum.Factor
    mean: np.ndarray
    label_mean: np.ndarray
    scale: np.ndarray
    label_energy: np.ndarray
    weight: float
    num_rows: int
    trace: float
    constant: np.ndarray
    total: Statistics | None = None
    folds: Sequence[Statistics] = ()
    rows: Rows | None = None

    def basis(self, intercept: bool) -> Basis:
        """Where S is diagonal."""
        factor = self.factor
        if isinstance(factor, spectrum.Dual):
            root = np.sqrt(factor.values)
            known = root > 1e-13 * root.max()
            inverse = np.where(known, 1.0 / np.where(known, root, 1.0), 0.0)
            vectors = (factor.rows.T @ factor.vectors) * inverse[None, :]
            projected = root[:, None] * factor.projected
        else:
            assert isinstance(factor, spectrum.Eigen)
            vectors, projected = factor.vectors, factor.projected
        weight = self.weight if intercept else np.inf
        return Basis(vectors, self.mean, self.scale, factor.values, projected, self.label_mean, weight)

    def centred_rows(self, x: np.ndarray) -> np.ndarray:
        """x / scale - mean, float64[n, H]."""
        return x.astype(np.float64) / self.scale[None, :] - self.mean[None, :]

    def residual_energy(self, alphas: np.ndarray, precision: Precision) -> tuple[np.ndarray, np.ndarray, spectrum.Path]:
        """(sum w (y - prediction)^2 float64[C, t], how far rounding may have moved it, the path it is from).

        It is a small difference of large sums, and no less than its error.
        """
        path = self.factor.path(alphas)
        error = np.zeros_like(path.fit)
        if self.total is not None:
            error = residual_error(precision, self.total, self.coefficient_table(alphas))
        return np.maximum(residual_energy(path, self.label_energy, alphas), error), error, path

    def coefficient_table(self, alphas: np.ndarray) -> np.ndarray:
        """Of x / scale, at every one of the alphas [C]: float64[C, t, H]."""
        count = len(self.targets)
        every: Any = self.factor
        every = every._replace(projected=np.tile(every.projected, (1, len(alphas))))  # all in one product
        return every.coefficients(np.repeat(alphas, count)).reshape(len(alphas), count, -1)

    def coefficients(self, alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(coef float64[t, H] of x itself, intercept float64[t]) at alpha [t]."""
        coef = self.factor.coefficients(alpha)
        return coef / self.scale[None, :], self.label_mean - coef @ self.mean


def build(
    data: Accumulator,
    *,
    fit_intercept: bool,
    standardize: bool,
    eigenvectors: bool,
    smallest_alpha: float,
    targets: np.ndarray,
    source_weights: Mapping[str, float],
    names: Sequence[str],
    replay: Callable[[], Iterable[Rows]] | None = None,
) -> list[System]:
    """The systems of the objectives `targets` (indices); a source's rows count `source_weights` times (default 1).

    Args:
      eigenvectors: whether a full eigendecomposition is needed, or the cheaper tridiagonal form will do.
      smallest_alpha: that will be asked for.
      replay: gives all rows again; None if they are gone, or if other processes have some of them.

    Raises:
      DataError: an objective without a label.
    """
    rows = data.kept
    if rows is not None:
        rows = _counted(rows, source_weights)
        seen = ~np.isnan(rows.y[:, targets])
        _check_rated(seen.sum(0), names, data.labels.num_rows)
        return [_from_rows(rows, targets, own, seen[:, own[0]], fit_intercept, standardize) for own in _equal(seen)]
    stats = {key: st.reweight(value, source_weights.get(key.source, 1.0)) for key, value in data.statistics().items()}
    stats = {key: value for key, value in stats.items() if value.num_rows}
    buckets = sorted({key[:2] for key in stats})
    present = np.array([[subset[target] for target in targets] for _, subset in buckets], bool)
    present = present.reshape(-1, len(targets))
    _check_rated(present.sum(0), names, data.labels.num_rows)
    every, few = {}, []
    for number, own in enumerate(_equal(present)):
        serving = [bucket for bucket, has in zip(buckets, present[:, own[0]], strict=True) if has]
        if replay is not None and _are_few(stats, serving, data.folds, data.num_features):
            few.append((number, own))
            continue
        folds = list(_folds(stats, serving, data.folds, targets[own]))
        every[number] = _from_folds(
            own, folds, data.precision, fit_intercept, standardize, eigenvectors, smallest_alpha
        )
    if few:
        assert replay is not None
        rows = _reread(replay, targets[np.concatenate([own for _, own in few])], source_weights)
        for number, own in few:
            seen = ~np.isnan(rows.y[:, targets[own[0]]])
            every[number] = _from_rows(rows, targets, own, seen, fit_intercept, standardize)
    return [every[number] for number in sorted(every)]


def _counted(rows: Rows, source_weights: Mapping[str, float]) -> Rows:
    """The rows that count at all, weighted by their source."""
    weight = weights_of(rows, source_weights)
    return rows._replace(weight=weight).take(np.flatnonzero(weight > 0))


def _reread(replay: Callable[[], Iterable[Rows]], targets: np.ndarray, source_weights: Mapping[str, float]) -> Rows:
    """The rows with a label of any of the `targets`."""
    parts = (_counted(rows.take(~np.isnan(rows.y[:, targets]).all(1)), source_weights) for rows in replay())
    return concatenate([part for part in parts if len(part.x)])


def _are_few(stats: Mapping[Key, Statistics], serving: Sequence[tuple], folds: int, num_features: int) -> bool:
    """Whether a fit (without a fold, where there are folds) has fewer rows than features, and all fit into memory."""
    keys = [[Key(source, subset, fold) for source, subset in serving] for fold in range(folds)]
    counts = [sum(stats[key].num_rows for key in own if key in stats) for own in keys]
    training = sum(counts) - (max(counts) if folds > 1 else 0)
    return training < num_features and sum(counts) <= 2 * num_features


def _check_rated(rated: np.ndarray, names: Sequence[str], num_rows: int) -> None:
    for index in np.flatnonzero(rated == 0).tolist():
        raise DataError(
            f"objective {names[index]}: all {num_rows} labels are missing (or of sources left out); leave the "
            "objective out or add labels"
        )


def _equal(seen: np.ndarray) -> list[np.ndarray]:
    """Indices of the columns, those that are equal together, in order of first appearance."""
    _, first, which = np.unique(seen, axis=1, return_index=True, return_inverse=True)
    return [np.flatnonzero(which.reshape(-1) == group) for group in np.argsort(first)]


def _folds(
    stats: Mapping[Key, Statistics], serving: Sequence[tuple], folds: int, targets: np.ndarray
) -> Iterator[Statistics]:
    example = st.select(next(iter(stats.values())), targets)
    for fold in range(folds):
        keys = [Key(source, subset, fold) for source, subset in serving]
        parts = [stats[key] for key in keys if key in stats]
        if parts:
            yield st.combine([st.select(part, targets) for part in parts])
        else:
            yield example._replace(gram=np.zeros_like(example.gram), num_rows=0)


def _from_folds(
    own: np.ndarray,
    folds: list[Statistics],
    precision: Precision,
    fit_intercept: bool,
    standardize: bool,
    eigenvectors: bool,
    smallest_alpha: float,
) -> System:
    total = st.combine(folds)
    size = len(total.shift)
    scale, varied = np.ones(size), varies(precision, total)
    if standardize:
        spread = np.diagonal(st.centred(total, True).gram)[:size] / total.weight
        scale = np.where(varied[:size], np.sqrt(np.maximum(spread, 0.0)), 1.0)
        folds, total = [st.rescale(fold, scale) for fold in folds], st.rescale(total, scale)
    about = st.centred(total, fit_intercept)
    gram, cross = about.gram[:size, :size], about.gram[:size, size + 1 :]
    factor: spectrum.Factor = (
        spectrum.eigen(gram, cross) if eigenvectors else spectrum.tridiagonal(gram, cross, smallest_alpha)
    )
    energy = np.maximum(np.diagonal(about.gram)[size + 1 :], 0.0)
    trace = float(np.trace(gram) if fit_intercept else np.trace(st.centred(total, True).gram[:size, :size]))
    return System(
        own,
        factor,
        about.shift,
        about.label_shift,
        scale,
        energy,
        total.weight,
        total.num_rows,
        trace,
        ~varied[size + 1 :],
        total=total,
        folds=folds,
    )


def _from_rows(
    rows: Rows, targets: np.ndarray, own: np.ndarray, seen: np.ndarray, fit_intercept: bool, standardize: bool
) -> System:
    rows = rows if seen.all() else rows.take(np.flatnonzero(seen))
    rows = rows._replace(y=rows.y[:, targets[own]])
    x, weight = rows.x.astype(np.float64), rows.weight  # a copy, changed in place below
    total, size = weight.sum(), x.shape[1]
    centre = weight @ x / total
    scale = np.ones(size)
    if standardize:
        spread = weight @ (x - centre[None, :]) ** 2 / total
        rounding = len(x) * np.finfo(np.float64).eps * np.abs(centre)  # a constant feature is no nearer to its mean
        scale = np.where(spread > rounding**2, np.sqrt(spread), 1.0)
        x /= scale[None, :]
    mean = centre / scale if fit_intercept else np.zeros(size)
    label_mean = weight @ rows.y / total if fit_intercept else np.zeros(len(own))
    root = np.sqrt(weight)[:, None]
    x -= mean[None, :]
    x *= root
    labels = (rows.y - label_mean[None, :]) * root
    factor: spectrum.Factor = spectrum.dual(x, labels) if len(x) < size else spectrum.eigen(x.T @ x, x.T @ labels)
    about_origin = 0.0 if fit_intercept else total * np.sum((centre / scale) ** 2)
    trace = max(float(factor.values.sum() - about_origin), 0.0)
    energy, constant = np.sum(labels**2, 0), rows.y.min(0) == rows.y.max(0)
    return System(own, factor, mean, label_mean, scale, energy, float(total), len(x), trace, constant, rows=rows)
