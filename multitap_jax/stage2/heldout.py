"""Errors and predictions of rows by heads that have not seen them: folds, single rows, or whole groups held out."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import scipy.stats

from multitap_jax.parallel.distributed import from_each_process, sum_over_processes
from multitap_jax.stage2 import kfold, leave_out
from multitap_jax.stage2.accumulator import Accumulator
from multitap_jax.stage2.kfold import FoldScore
from multitap_jax.stage2.passes import Pass, single_scores
from multitap_jax.stage2.rows import DataError, Rows, concatenate, weights_of
from multitap_jax.stage2.spectrum import Dual, Eigen
from multitap_jax.stage2.systems import System

if TYPE_CHECKING:
    from multitap_jax.stage2.fitting import Settings

Replay = Callable[[], Iterable[Rows]]


class HeldOut(NamedTuple):
    """Predictions float64[N, T] of each row by heads that have not seen it, labels float64[N, T], groups uint64[N]."""

    predicted: np.ndarray
    labels: np.ndarray
    groups: np.ndarray

    def tau(self, constant: np.ndarray, shared: bool) -> np.ndarray:
        """Kendall's tau-b float64[T] over the rows of all processes; NaN for constant labels or fewer than three."""
        predicted, labels = self.predicted, self.labels
        if shared:
            predicted, labels = (
                np.concatenate([np.frombuffer(part, np.float64) for part in from_each_process(own.tobytes())])
                for own in (predicted, labels)
            )
            predicted, labels = predicted.reshape(-1, len(constant)), labels.reshape(-1, len(constant))
        tau = np.full(len(constant), np.nan)
        for target in np.flatnonzero(~constant):
            seen = ~np.isnan(labels[:, target])
            if seen.sum() > 2:  # the p-value that scipy computes along divides by n - 2
                # float32 without what they share: equal rows stay ties, and an offset ties no others
                middle = labels[seen, target].mean()
                pair = ((column[seen, target] - middle).astype(np.float32) for column in (predicted, labels))
                tau[target] = scipy.stats.kendalltau(*pair, method="asymptotic").statistic
        return tau

    def rounded(self) -> "HeldOut":
        """Both in float32."""
        return HeldOut(self.predicted.astype(np.float32), self.labels.astype(np.float32), self.groups)


def _row_basis(system: System, intercept: bool) -> tuple[np.ndarray, leave_out.Basis]:
    """(z float64[n, r] of the rows the system was made of, its basis)."""
    assert system.rows is not None
    factor, weight = system.factor, system.rows.weight
    if isinstance(factor, Dual):  # the vectors of the features are not needed, and cost as much as the kernel
        root = np.sqrt(factor.values)
        z = factor.vectors * root[None, :] / np.sqrt(weight)[:, None]
        basis = leave_out.Basis(
            np.empty((0, 0)),
            system.mean,
            system.scale,
            factor.values,
            root[:, None] * factor.projected,
            system.label_mean,
            system.weight if intercept else np.inf,
        )
        return z, basis
    basis = system.basis(intercept)
    return system.centred_rows(system.rows.x) @ basis.vectors, basis


def _blocks(rows: Rows, names: np.ndarray) -> list[np.ndarray]:
    order = np.argsort(names, kind="stable")
    return np.split(order, np.unique(names[order], return_index=True)[1][1:])


def fold_errors(system: System, folds: int, alphas: np.ndarray, intercept: bool, name: str) -> list[FoldScore]:
    """The held-out error of every fold.

    Raises:
      DataError: fewer than two folds have rows.
    """
    if system.rows is None:
        filled = sum(fold.num_rows > 0 for fold in system.folds)
    else:
        filled = len(np.unique(system.rows.fold))
    if filled < 2:
        raise DataError(
            f"objective {name}: its {system.num_rows} rated rows fall into one fold, so nothing can be held out; give "
            "more groups, other groups, or cv='gcv'"
        )
    if system.rows is None:
        assert isinstance(system.factor, Eigen)
        assert system.total is not None
        return kfold.fold_scores(system.total, system.folds, system.factor, alphas, intercept)
    z, basis = _row_basis(system, intercept)
    scores = []
    for fold in range(folds):
        index = np.flatnonzero(system.rows.fold == fold)
        weight = system.rows.weight[index]
        error = np.zeros((len(alphas), len(system.targets)))
        if len(index):
            residual = leave_out.left_out(z[index], system.rows.y[index], weight, basis, alphas)
            error = np.einsum("cmt,m->ct", residual**2, weight)
        scores.append(FoldScore(error, float(weight.sum())))
    return scores


def single_errors(
    system: System, data: Accumulator, settings: "Settings", alphas: np.ndarray, replay: Replay | None, name: str
) -> np.ndarray:
    """Sum of w e^2 with every row ("loo") or group ("logo") held out in turn: float64[C, t].

    Raises:
      DataError: the rows are gone, or there is one group.
    """
    if settings.criterion == "logo" and data.shared:
        raise DataError("cv='logo' needs all rows of a group in one process; use folds, or one process")
    by_group, total = settings.criterion == "logo", np.zeros((len(alphas), len(system.targets)))
    one_group = DataError(f"objective {name}: all rated rows are of one group; leave-one-group-out needs two groups")
    if system.rows is not None:
        if by_group and len(np.unique(system.rows.group)) < 2:
            raise one_group
        z, basis = _row_basis(system, settings.fit_intercept)
        rows = system.rows
        if not by_group:
            return leave_out.single_energy(z, rows.y, rows.weight, basis, alphas)
        for index in _blocks(rows, rows.group):
            residual = leave_out.left_out(z[index], rows.y[index], rows.weight[index], basis, alphas)
            total += np.einsum("cmt,m->ct", residual**2, rows.weight[index])
        return total
    if replay is None:
        raise DataError(f"cv={settings.criterion!r} reads the rows twice: fit arrays, a store or a list of batches")
    basis = system.basis(settings.fit_intercept)
    passes = Pass(basis.vectors, basis.mean, basis.scale)
    columns = settings.targets[system.targets]
    weighted = (rows._replace(weight=weights_of(rows, settings.source_weights)) for rows in replay())
    if not by_group:
        return sum_over_processes(single_scores(passes, basis, weighted, columns, alphas), data.shared)
    for groups in leave_out.whole_groups(weighted, data.group_sizes):
        rows = concatenate(groups)
        z = np.concatenate([np.asarray(z, np.float64)[: len(part.x)] for z, part in passes.chunks(rows)])
        start = 0
        for group in groups:
            own = slice(start, start + len(group.x))
            start = own.stop
            y = group.y[:, columns]
            weight = group.weight * ~np.isnan(y[:, 0])
            if np.count_nonzero(weight) == system.num_rows:
                raise one_group
            if weight.any():
                residual = leave_out.left_out(z[own], y, weight, basis, alphas)
                total += np.einsum("cmt,m->ct", residual**2, weight)
    return sum_over_processes(total, data.shared)


def predict(
    every: list[System],
    data: Accumulator,
    settings: "Settings",
    alpha: np.ndarray,
    flat: np.ndarray,
    replay: Replay,
) -> HeldOut:
    """Held-out predictions of every row at the chosen alphas, in the order of the rows (of this process)."""
    if settings.criterion == "kfold":
        predicted = _by_fold_heads(every, data.folds, settings, alpha, replay)
    else:
        predicted = _by_leaving_out(every, data, settings, alpha, replay)
    labels, groups = _no_rows(alpha), [np.empty(0, np.uint64)]
    for rows in replay():
        labels.append(rows.y[:, settings.targets])
        groups.append(rows.group)
    given = np.concatenate(labels)
    for target in np.flatnonzero(flat):
        predicted[:, target] = next(system.label_mean[0] for system in every if target in system.targets)
    return HeldOut(predicted, given, np.concatenate(groups))


def _no_rows(alpha: np.ndarray) -> list[np.ndarray]:
    """What per-row arrays float64[n, T] are appended to: a process may have no rows of its own."""
    return [np.empty((0, len(alpha)))]


def _by_fold_heads(
    every: list[System], folds: int, settings: "Settings", alpha: np.ndarray, replay: Replay
) -> np.ndarray:
    coef = np.zeros((folds, len(alpha), len(every[0].mean)))
    intercept = np.zeros((folds, len(alpha)))
    for system in every:
        own = alpha[system.targets]
        for fold in range(folds):
            if system.rows is None:
                assert isinstance(system.factor, Eigen)
                assert system.total is not None
                w, b = kfold.fold_head(system.total, system.folds[fold], system.factor, own, settings.fit_intercept)
            else:
                w, b = _fold_head_of_rows(system, fold, own, settings.fit_intercept)
            coef[fold, system.targets], intercept[fold, system.targets] = w / system.scale[None, :], b
    parts = _no_rows(alpha)
    for rows in replay():
        x, out = rows.x.astype(np.float64), np.empty((len(rows.x), len(alpha)))
        for fold in np.unique(rows.fold):
            here = np.flatnonzero(rows.fold == fold)
            out[here] = x[here] @ coef[fold].T + intercept[fold][None, :]
        parts.append(out)
    return np.concatenate(parts)


def _fold_head_of_rows(system: System, fold: int, alpha: np.ndarray, intercept: bool) -> tuple[np.ndarray, np.ndarray]:
    """The head without one fold: the total's, less what the fold's left-out residuals had pulled it to."""
    assert system.rows is not None
    coef, label_mean = system.factor.coefficients(alpha), system.label_mean.copy()
    index = np.flatnonzero(system.rows.fold == fold)
    if len(index):
        z, basis = _row_basis(system, intercept)
        weight = system.rows.weight[index]
        residual = leave_out.left_out(z[index], system.rows.y[index], weight, basis, alpha, per_column=True)
        pull = (residual * weight[:, None]).T @ system.centred_rows(system.rows.x[index])
        coef -= system.factor.inverse(pull, alpha)
        label_mean -= (residual * weight[:, None]).sum(0) / basis.weight
    return coef, label_mean - coef @ system.mean


def _by_leaving_out(
    every: list[System], data: Accumulator, settings: "Settings", alpha: np.ndarray, replay: Replay
) -> np.ndarray:
    bases = [system.basis(settings.fit_intercept) for system in every]
    passes = [
        Pass(basis.vectors, basis.mean, basis.scale) if system.rows is None else None
        for system, basis in zip(every, bases, strict=True)
    ]

    def residuals(rows: Rows, groups: list[np.ndarray] | None) -> np.ndarray:
        out = np.empty((len(rows.x), len(alpha)))
        weight = weights_of(rows, settings.source_weights)
        for system, basis, turning in zip(every, bases, passes, strict=True):
            if turning is None:
                z = system.centred_rows(rows.x) @ basis.vectors
            else:
                z = np.concatenate([np.asarray(z)[: len(p.x)] for z, p in turning.chunks(rows)]).astype(float)
            y, own = rows.y[:, settings.targets[system.targets]], alpha[system.targets]
            if groups is None:
                out[:, system.targets] = leave_out.single_residuals(z, y, weight, basis, own)
                continue
            trained = weight * ~np.isnan(y[:, 0])
            for index in groups:
                out[np.ix_(index, system.targets)] = leave_out.left_out(
                    z[index], y[index], trained[index], basis, own, per_column=True
                )
        return np.nan_to_num(rows.y[:, settings.targets]) - out

    if settings.criterion == "loo":
        return np.concatenate([*_no_rows(alpha), *(residuals(rows, None) for rows in replay())])
    # Whole groups come in another order than the rows: a running number of the row takes them back.
    first, predicted = 0, np.empty((data.labels.num_rows, len(alpha)))

    def numbered() -> Iterable[Rows]:
        nonlocal first
        for rows in replay():
            yield rows._replace(fold=np.arange(first, first + len(rows.x)))
            first += len(rows.x)

    for groups in leave_out.whole_groups(numbered(), data.group_sizes):
        rows = concatenate(groups)
        predicted[rows.fold] = residuals(rows, _blocks(rows, rows.group))
    return predicted[:first]
