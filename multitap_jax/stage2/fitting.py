"""From collected statistics to heads: choose each alpha, solve, refine, and measure on held-out rows."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from multitap_jax.stage2 import solve
from multitap_jax.stage2.accumulator import Collected, DataError, TargetGroup
from multitap_jax.stage2.moments import Statistics, combine
from multitap_jax.stage2.refine import TOLERANCE, Rows, refine

STREAM_FLOOR = 1e-6  # of the largest eigenvalue: with a smaller alpha one float32 pass does not give 4 digits
Replay = Callable[[], Iterable[Rows]]


class Settings(NamedTuple):
    """The parameters of `RidgeHead`, checked; `criterion` is "kfold", "gcv" or "train-mse"."""

    alphas: np.ndarray | None
    criterion: str
    alpha_per_target: bool
    fit_intercept: bool
    solver: str


class HeadFit(NamedTuple):
    """What a fit gives; the fields are the attributes of `RidgeHead` with the same names."""

    coef: np.ndarray
    intercept: np.ndarray
    alpha: np.ndarray
    cv_results: dict[str, np.ndarray]
    cv_predictions: np.ndarray | None
    notes: list[str]


class System(NamedTuple):
    """The regression of the objectives `targets`, which are observed in the same rows."""

    targets: np.ndarray
    total: Statistics
    spectrum: solve.Spectrum


class Criterion(NamedTuple):
    """What the choice rests on: `mse` [C, T], `reference` [T], `fold_mse` [Q, C, T], fold paths.

    The reference is the error of the best constant, or of 0 where there is no intercept.
    """

    mse: np.ndarray
    reference: np.ndarray
    fold_mse: np.ndarray | None
    paths: list[list[solve.FoldPath]]


def fit_heads(data: Collected, settings: Settings, names: Sequence[str], replay: Replay | None) -> HeadFit:
    """Fits every objective; `replay` gives the rows again, None if they are gone."""
    systems = [_system(group, settings.fit_intercept) for group in data.groups]
    alphas = _alpha_table(systems, data, settings)
    criterion = _criterion(systems, data, settings, alphas, names)
    flat = criterion.reference == 0
    best = solve.choose(criterion.mse, criterion.reference, settings.alpha_per_target)
    alpha = np.take_along_axis(alphas, best[None, :], axis=0)[0]
    notes = [f"{names[i]}: constant labels, the head predicts that constant" for i in np.flatnonzero(flat).tolist()]
    if settings.criterion != "train-mse" and len(alphas) > 1:
        for i in np.flatnonzero(~flat & ((best == 0) | (best == len(alphas) - 1))).tolist():
            notes.append(f"{names[i]}: alpha {alpha[i]:.3g} is at the {'lower' if best[i] == 0 else 'upper'} edge")
    coef, intercept = _solve(systems, data, settings, alpha, flat, replay, names, notes)
    results = {
        "alphas": alphas,
        "mse": criterion.mse,
        "r2": 1.0 - criterion.mse / np.where(flat, np.nan, criterion.reference)[None, :],
        "best_index": best,
    }
    predictions = None
    if criterion.fold_mse is not None:
        results["fold_mse"] = criterion.fold_mse
        if replay is not None:
            predictions, results["tau"] = _held_out(systems, data, criterion.paths, best, replay)
    return HeadFit(coef, intercept, alpha, results, predictions, notes)


def _system(group: TargetGroup, fit_intercept: bool) -> System:
    total = combine(group.folds)
    return System(group.targets, total, solve.decompose(total, fit_intercept))


def _alpha_table(systems: list[System], data: Collected, settings: Settings) -> np.ndarray:
    """Ascending alphas float64[C, T]; the automatic ones follow the rows of each objective, or their mean."""
    targets = len(data.observed)
    if settings.alphas is not None:
        return np.repeat(np.unique(settings.alphas.astype(np.float64))[:, None], targets, axis=1)
    columns: list[Any] = [None] * targets
    for system in systems:
        for target in system.targets:
            columns[target] = solve.auto_alphas(system.total, data.num_features)
    table = np.stack(columns, axis=1)
    return table if settings.alpha_per_target else np.broadcast_to(table.mean(1, keepdims=True), table.shape)


def _criterion(
    systems: list[System], data: Collected, settings: Settings, alphas: np.ndarray, names: Sequence[str]
) -> Criterion:
    mse, reference = np.empty(alphas.shape), np.empty(alphas.shape[1])
    folds = len(data.groups[0].folds)
    fold_mse = np.full((folds, *alphas.shape), np.nan) if settings.criterion == "kfold" else None
    paths: list[list[solve.FoldPath]] = []
    for system, group in zip(systems, data.groups, strict=True):
        own, total, which = alphas[:, system.targets], system.total, system.targets
        reference[which] = system.spectrum.label_energy / total.weight
        if fold_mse is not None:
            if sum(fold.num_rows > 0 for fold in group.folds) < 2:
                raise DataError(
                    f"objective {names[which[0]]}: its {total.num_rows} rated rows fall into one fold, so nothing can "
                    "be held out; give more groups, other groups, or cv='gcv'"
                )
            paths.append(solve.kfold(group.folds, own, settings.fit_intercept))
            mse[:, which] = sum(path.error for path in paths[-1]) / total.weight
            for index, path in enumerate(paths[-1]):
                if path.weight > 0:
                    fold_mse[index][:, which] = path.error / path.weight
        elif settings.criterion == "gcv":
            mse[:, which] = solve.gcv(system.spectrum, own, settings.fit_intercept)
            n = total.num_rows
            freedom = max(n - int(settings.fit_intercept), 1)
            reference[which] *= total.weight * n / freedom**2  # GCV of the best constant
            if np.isinf(mse[:, which]).all():
                raise DataError(f"objective {names[which[0]]}: {n} rows leave GCV no degrees of freedom; use folds")
        else:
            coef, intercept = system.spectrum.solve(own)
            mse[:, which] = solve.squared_error(total, coef, intercept) / total.weight
    if settings.fit_intercept:  # exactly, where sums leave a rounding error
        reference = np.where(data.constant, 0.0, reference)
    return Criterion(mse, reference, fold_mse, paths)


def _solve(
    systems: list[System],
    data: Collected,
    settings: Settings,
    alpha: np.ndarray,
    flat: np.ndarray,
    replay: Replay | None,
    names: Sequence[str],
    notes: list[str],
) -> tuple[np.ndarray, np.ndarray]:
    """(coef float32[T, H], intercept float64[T]) at the chosen alphas; refined where the statistics were float32."""
    targets = len(alpha)
    coef, mean = np.zeros((targets, data.num_features)), np.zeros((targets, data.num_features))
    label_mean, energy = np.zeros(targets), np.zeros(targets)
    for which, total, spectrum in systems:
        if settings.solver == "device":
            own = solve.solve_on_device(total, alpha[which], settings.fit_intercept)
        else:
            own = spectrum.solve(alpha[None, which])[0][0]
        coef[which], mean[which] = data.lift(own), data.lift_point(spectrum.mean)
        label_mean[which], energy[which] = spectrum.label_mean, solve.label_variance_energy(total)
    coef[flat], energy[flat] = 0.0, 0.0

    if data.basis is None and replay is not None:

        def precondition(residual: np.ndarray) -> np.ndarray:
            out = np.empty_like(residual)
            for which, _, spectrum in systems:
                out[which] = spectrum.precondition(residual[which], alpha[which])
            return out

        refined = refine(replay, precondition, coef, alpha, mean, label_mean, energy)
        coef = refined.coef
        for i in np.flatnonzero(refined.error > 100 * TOLERANCE).tolist():
            notes.append(
                f"{names[i]}: alpha {alpha[i]:.3g} is too small to solve fully; error left: {refined.error[i]:.0e}"
            )
    elif data.basis is None:
        for which, _, spectrum in systems:
            for i in which[~flat[which] & (alpha[which] < STREAM_FLOOR * spectrum.values[-1])].tolist():
                notes.append(
                    f"{names[i]}: alpha {alpha[i]:.3g} is small for a single float32 pass; fit a store instead"
                )
    coef = coef.astype(np.float32)  # what is saved is what predicts: the intercept makes up for the rounding
    return coef, label_mean - np.sum(mean * coef, axis=1)


def _held_out(
    systems: list[System], data: Collected, paths: list[list[solve.FoldPath]], best: np.ndarray, replay: Replay
) -> tuple[np.ndarray, np.ndarray]:
    """Predictions float32[N, T] of each row by the heads that have not seen its fold, and Kendall tau-b float64[T]."""
    folds = len(paths[0])
    coef, intercept = np.zeros((folds, len(best), data.num_features)), np.zeros((folds, len(best)))
    for system, own in zip(systems, paths, strict=True):
        for fold, path in enumerate(own):
            column = np.arange(len(system.targets))
            chosen = path.coef[best[system.targets], column], path.intercept[best[system.targets], column]
            coef[fold, system.targets] = data.lift(chosen[0])
            intercept[fold, system.targets] = data.lift_intercept(*chosen)
    predictions, labels = [], []
    for rows in replay():
        x, out = rows.x.astype(np.float64), np.empty(rows.y.shape, np.float32)
        for fold in np.unique(rows.fold):
            here = rows.fold == fold
            out[here] = x[here] @ coef[fold].T + intercept[fold][None, :]
        predictions.append(out)
        labels.append(rows.y.astype(np.float32))
    predicted, given = np.concatenate(predictions), np.concatenate(labels)
    tau = np.full(len(best), np.nan)
    for target in np.flatnonzero(~data.constant):
        seen = ~np.isnan(given[:, target])
        tau[target] = scipy.stats.kendalltau(predicted[seen, target], given[seen, target]).statistic
    return predicted, tau
