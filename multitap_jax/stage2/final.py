"""The heads at the chosen alphas: solved, certified, refined where float32 sums fell short, and rounded."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from multitap_jax.stage2 import solve
from multitap_jax.stage2.accumulator import Accumulator
from multitap_jax.stage2.certificate import correction_error, prediction_error
from multitap_jax.stage2.refine import TOLERANCE, Again, Start, refine
from multitap_jax.stage2.systems import System

if TYPE_CHECKING:
    from multitap_jax.stage2.fitting import Settings

REFINE_ABOVE = (
    1e-5  # expected error of the predictions, in deviations of the labels; the true one is several times less
)
NOTE_ABOVE = 1e-4


def final_heads(
    every: list[System],
    data: Accumulator,
    settings: "Settings",
    alpha: np.ndarray,
    flat: np.ndarray,
    again: Again | None,
    names: Sequence[str],
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(coef float32[T, H], intercept float64[T], notes) at alpha [T]; 0 coefficients where `flat` bool[T].

    Args:
      again: the rows, where they are not kept and can be read again.
    """
    start = _solved(every, settings, alpha, flat)
    expected = np.where(flat, 0.0, _each(every, start.coef, _certified(prediction_error, data, alpha)))
    coef, notes = start.coef, []
    if settings.solver == "device" and any(system.total is None for system in every):
        notes.append("few rows: solved exactly on the host")
    if again is not None and (settings.refine is True or (settings.refine and (expected > REFINE_ABOVE).any())):
        precondition = lambda system, residual: system.factor.inverse(residual, alpha[system.targets])
        settled = refine(
            again,
            start,
            lambda residual: _each(every, residual, precondition),
            lambda step: _each(every, step, _certified(correction_error, data, alpha)),
        )
        coef = settled.coef
        for i in np.flatnonzero(settled.error > 100 * TOLERANCE).tolist():
            notes.append(
                f"{names[i]}: alpha {alpha[i]:.3g} is too small to solve fully; error left: {settled.error[i]:.0e}"
            )
    else:
        for i in np.flatnonzero(expected > NOTE_ABOVE).tolist():
            notes.append(
                f"{names[i]}: alpha {alpha[i]:.3g} is small for a single float32 pass (expected error "
                f"{expected[i]:.0e}); fit a store instead"
            )
    # What is saved is what predicts: the intercept makes up for the rounding to float32.
    rounded = (coef / start.scale).astype(np.float32)
    return rounded, start.label_mean - np.sum(start.mean * start.scale * rounded, axis=1), notes


def _solved(every: list[System], settings: "Settings", alpha: np.ndarray, flat: np.ndarray) -> Start:
    """The solutions of the systems, side by side; nothing is to be refined where they are from rows, or `flat`."""
    shape = len(alpha), len(every[0].mean)
    start = Start(np.zeros(shape), alpha, np.zeros(shape), np.ones(shape), *np.zeros((2, len(alpha))))
    for system in every:
        which = system.targets
        if settings.solver == "device" and system.total is not None:
            start.coef[which] = solve.solve_on_device(system.total, alpha[which], settings.fit_intercept)
        else:
            start.coef[which] = system.factor.coefficients(alpha[which])
        start.mean[which], start.scale[which] = system.mean[None, :], system.scale[None, :]
        start.label_mean[which] = system.label_mean
        start.label_energy[which] = 0.0 if system.total is None else system.label_energy
    start.coef[flat], start.label_energy[flat] = 0.0, 0.0
    return start


def _each(every: list[System], values: np.ndarray, function: Callable[[System, np.ndarray], np.ndarray]) -> np.ndarray:
    """function(system, its rows of `values` [T, H]) of every system, in the order of the objectives."""
    parts = [function(system, values[system.targets]) for system in every]
    out = np.empty((len(values), *parts[0].shape[1:]))
    for system, part in zip(every, parts, strict=True):
        out[system.targets] = part
    return out


def _certified(
    rule: Callable[..., np.ndarray], data: Accumulator, alpha: np.ndarray
) -> Callable[[System, np.ndarray], np.ndarray]:
    """`prediction_error` or `correction_error` of coefficients [t, H] of a system; without sums there is none."""

    def error(system: System, coef: np.ndarray) -> np.ndarray:
        if system.total is None:
            return np.zeros(len(coef))
        values = np.zeros(coef.shape[1])
        values[: len(system.factor.values)] = system.factor.values
        return rule(data.precision, system.total, values, coef, alpha[system.targets], system.label_energy)

    return error
