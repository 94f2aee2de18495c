"""When a loss has left the rails: a rule that one unlucky batch cannot trip, whatever the batch size."""

import statistics
from collections import deque
from typing import NamedTuple

RECENT = 9
BEFORE = 128
ENOUGH = 32  # losses to compare with, before anything is judged


class LossSpikeError(RuntimeError):
    """The loss rose far above what it was and stayed there; the message names the records of the worst step."""


class Spike(NamedTuple):
    """The median of the last `RECENT` losses, that of those before, and the step (from 0) of the highest of them."""

    recent: float
    before: float
    worst: int


class SpikeWatch:
    """Compares the median of the last 9 losses with the median of up to 128 before them.

    Medians, since squared errors have a long tail: with one pair a step, a loss of ten times the median comes every
    thirty steps, but five such among nine (what lifts their median) once in 200,000. A run that diverges stays above.

    Args:
      factor: how many times the median before is a spike; 0 watches nothing.
    """

    def __init__(self, factor: float):
        self._factor = factor
        self._losses: deque[tuple[float, int]] = deque(maxlen=RECENT + BEFORE)

    def see(self, step: int, loss: float) -> Spike | None:
        """Takes the loss of the next step; the spike, if it completes one."""
        if not self._factor:
            return None
        self._losses.append((loss, step))
        if len(self._losses) < RECENT + ENOUGH:
            return None
        losses = list(self._losses)
        recent = statistics.median(value for value, _ in losses[-RECENT:])
        before = statistics.median(value for value, _ in losses[:-RECENT])
        return Spike(recent, before, max(losses[-RECENT:])[1]) if recent > self._factor * before else None
