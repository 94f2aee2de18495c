"""From collected sums or rows to heads: choose each alpha, solve, refine where float32 may have hurt, and measure."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from multitap_jax.parallel.distributed import sum_over_processes
from multitap_jax.stage2 import heldout, solve, systems
from multitap_jax.stage2.accumulator import Accumulator
from multitap_jax.stage2.final import final_heads
from multitap_jax.stage2.passes import training_scores
from multitap_jax.stage2.refine import Again
from multitap_jax.stage2.rows import DataError, Rows, weights_of
from multitap_jax.stage2.spectrum import Path
from multitap_jax.stage2.systems import System
from multitap_jax.stage2.uncertainty import Posterior

REREAD_ABOVE = 1e-5  # share of a training error that rounding may have moved it by
Replay = Callable[[], Iterable[Rows]]


class Settings(NamedTuple):
    """The parameters of `RidgeHead`, checked; `criterion` is "kfold", "gcv", "loo", "logo" or "train-mse"."""

    alphas: np.ndarray | None
    criterion: str
    alpha_per_target: bool
    fit_intercept: bool
    standardize: bool
    solver: str
    refine: str | bool
    cv_predictions: bool
    targets: np.ndarray
    source_weights: Mapping[str, float]


class HeadFit(NamedTuple):
    """What a fit gives; the fields are the attributes of `RidgeHead` with the same names."""

    coef: np.ndarray
    intercept: np.ndarray
    alpha: np.ndarray
    cv_results: dict[str, np.ndarray]
    held_out: heldout.HeldOut | None
    observed: np.ndarray
    posteriors: list[Posterior]
    notes: list[str]


class Criterion(NamedTuple):
    """What the choice rests on: `mse` [C, T], `doubt` [C, T] (how much less it may seem than it is, by rounding),
    `reference` [T] (error of the best constant), `fold_mse` [Q, C, T]."""

    mse: np.ndarray
    doubt: np.ndarray
    reference: np.ndarray
    fold_mse: np.ndarray | None


def fit_heads(data: Accumulator, settings: Settings, names: Sequence[str], replay: Replay | None) -> HeadFit:
    """Fits every chosen objective; `replay` gives the rows again, None if they are gone.

    Raises:
      DataError: an objective without labels, or a criterion that these rows cannot serve.
    """
    needs_vectors = settings.criterion in ("kfold", "loo", "logo")
    every = systems.build(
        data,
        fit_intercept=settings.fit_intercept,
        standardize=settings.standardize,
        eigenvectors=needs_vectors,
        smallest_alpha=0.0 if settings.alphas is None else float(settings.alphas.min()),
        targets=settings.targets,
        source_weights=settings.source_weights,
        names=names,
        replay=None if data.shared else replay,
    )
    for system in every:
        if system.num_rows < 2:
            raise DataError(
                f"objective {names[system.targets[0]]}: {system.num_rows} sample(s) with a label (n_samples = 1); a "
                "fit needs two rows, so add labels or leave the objective out"
            )
    constant = (data.labels.low >= data.labels.high)[settings.targets]
    for system in every:  # of the sources that count
        constant[system.targets] |= system.constant
    alphas = _alpha_table(every, data.num_features, settings)
    criterion = _criterion(every, data, settings, alphas, names, replay)
    if settings.fit_intercept:  # exactly, where sums leave a rounding error
        criterion = criterion._replace(reference=np.where(constant, 0.0, criterion.reference))
    flat = criterion.reference == 0
    best = solve.choose(criterion.mse + criterion.doubt, criterion.reference, settings.alpha_per_target)
    alpha = np.take_along_axis(alphas, best[None, :], axis=0)[0]
    notes = _notes(names, alpha, best, flat, criterion.mse, settings.criterion)
    again = None
    if replay is not None and data.kept is None:
        again = Again(replay, settings.targets, settings.source_weights, data.shared)
    coef, intercept, more = final_heads(every, data, settings, alpha, flat, again, names)
    results = {
        "alphas": alphas,
        "mse": criterion.mse,
        "r2": 1.0 - criterion.mse / np.where(flat, np.nan, criterion.reference)[None, :],
        "best_index": best,
    }
    if criterion.fold_mse is not None:
        results["fold_mse"] = criterion.fold_mse
    held_out = None
    if settings.cv_predictions and needs_vectors and replay is not None:
        held_out = heldout.predict(every, data, settings, alpha, flat, replay)
        results["tau"] = held_out.tau(constant, data.shared)
        held_out = held_out.rounded()
    observed = np.zeros(len(alpha), np.int64)
    for system in every:
        observed[system.targets] = system.num_rows
    posteriors = [
        Posterior.of(system, alpha[system.targets], settings.fit_intercept, data.precision) for system in every
    ]
    return HeadFit(coef, intercept, alpha, results, held_out, observed, posteriors, notes + more)


def _alpha_table(every: list[System], num_features: int, settings: Settings) -> np.ndarray:
    """Ascending alphas float64[C, T]; the automatic ones follow the rows of each objective, or their mean."""
    targets = len(settings.targets)
    if settings.alphas is not None:
        return np.repeat(np.unique(settings.alphas.astype(np.float64))[:, None], targets, axis=1)
    columns: list[np.ndarray] = [np.empty(0)] * targets
    for system in every:
        for target in system.targets:
            columns[target] = solve.auto_alphas(system.trace, num_features)
    table = np.stack(columns, axis=1)
    return table if settings.alpha_per_target else np.broadcast_to(table.mean(1, keepdims=True), table.shape)


def _criterion(
    every: list[System],
    data: Accumulator,
    settings: Settings,
    alphas: np.ndarray,
    names: Sequence[str],
    replay: Replay | None,
) -> Criterion:
    mse, doubt, reference = np.empty(alphas.shape), np.zeros(alphas.shape), np.empty(alphas.shape[1])
    fold_mse = np.full((data.folds, *alphas.shape), np.nan) if settings.criterion == "kfold" else None
    for system in every:
        which = system.targets
        own = alphas[:, which[0]]  # objectives of one system have the same rows, hence the same alphas
        name = names[which[0]]
        reference[which] = system.label_energy / system.weight
        if fold_mse is not None:
            parts = heldout.fold_errors(system, data.folds, own, settings.fit_intercept, name)
            mse[:, which] = sum(part.error for part in parts) / system.weight
            for index, part in enumerate(parts):
                if part.weight > 0:
                    fold_mse[index][:, which] = part.error / part.weight
        elif settings.criterion in ("loo", "logo"):
            mse[:, which] = heldout.single_errors(system, data, settings, own, replay, name) / system.weight
        elif settings.criterion == "gcv":
            rss, error, path = _training_errors(system, data, settings, own, replay)
            n = system.num_rows
            mse[:, which] = solve.gcv(path, rss, n, settings.fit_intercept) / (system.weight / n)
            doubt[:, which] = solve.gcv(path, error, n, settings.fit_intercept) / (system.weight / n)
            freedom = max(n - int(settings.fit_intercept), 1)
            reference[which] *= n**2 / freedom**2  # GCV of the best constant
        else:
            rss, *_ = _training_errors(system, data, settings, own, replay)
            # It falls with alpha: what rounding adds is no reason to take a larger one.
            mse[:, which] = np.minimum.accumulate(rss[::-1])[::-1] / system.weight
        if not np.isfinite(mse[:, which]).any(0).all():
            raise DataError(
                f"objective {name}: {system.num_rows} rows, and no alpha has a usable score by {settings.criterion}; "
                "give larger alphas, more rows, or another cv"
            )
    return Criterion(mse, doubt, reference, fold_mse)


def _training_errors(
    system: System, data: Accumulator, settings: Settings, alphas: np.ndarray, replay: Replay | None
) -> tuple[np.ndarray, np.ndarray, Path]:
    """`System.residual_energy`, and from the rows themselves where sums leave it in doubt and they can be read again.

    As a difference of sums it has their rounding: with features that nearly cancel, the terms are thousands of times
    what is left. Errors of predictions have no such trouble, and their products with the rows say how far the
    coefficients are from the solution; the error there follows. What is left is far less than that correction.
    """
    rss, doubt, path = system.residual_energy(alphas, data.precision)
    if replay is None or not (doubt > REREAD_ABOVE * rss).any():
        return rss, doubt, path
    weighted = (rows._replace(weight=weights_of(rows, settings.source_weights)) for rows in replay())
    coef, columns = system.coefficient_table(alphas).reshape(rss.size, -1), settings.targets[system.targets]
    sums = training_scores(coef, system.mean, system.scale, system.label_mean, weighted, columns)
    sums, alpha = sum_over_processes(sums, data.shared), np.repeat(alphas, len(columns))
    residual = sums[:, :-1] - alpha[:, None] * coef
    step = system.factor.inverse(residual, alpha)
    moved = np.sum(step * (residual + alpha[:, None] * (2.0 * coef + step)), axis=1)
    return np.maximum(sums[:, -1] - moved, 0.0).reshape(rss.shape), np.abs(moved).reshape(rss.shape), path


def _notes(
    names: Sequence[str], alpha: np.ndarray, best: np.ndarray, flat: np.ndarray, mse: np.ndarray, criterion: str
) -> list[str]:
    notes = [f"{names[i]}: constant labels, the head predicts that constant" for i in np.flatnonzero(flat).tolist()]
    if criterion == "train-mse" or len(mse) < 2:
        return notes
    for i in np.flatnonzero(~flat).tolist():
        usable = np.flatnonzero(np.isfinite(mse[:, i]))
        if best[i] in (usable[0], len(mse) - 1):
            notes.append(
                f"{names[i]}: alpha {alpha[i]:.3g} is at the {'lower' if best[i] < len(mse) - 1 else 'upper'} edge"
            )
    return notes
