"""How much of a stream's time the device had work: what tells a slow model from a host that does not keep up."""

import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax

Output = TypeVar("Output")


class Occupancy:
    """Watches the batches of one stream, which a device computes one after another.

    Args:
      clock: seconds, of any beginning.

    Attributes:
      busy: seconds between the start of a batch and its end, on a device that had nothing else of the stream.
      idle: seconds in which every batch so far was finished and the next not yet given. Programs in the making do not
        count: that happens once a shape.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.busy = self.idle = 0.0
        self._followed = 0
        self._clock, self._ready = clock, float("inf")
        self._shapes: set[Hashable] = set()
        self._waiting = ThreadPoolExecutor(1, thread_name_prefix="occupancy")

    def watch(self, start: Callable[[], Output], shape: Hashable) -> Output:
        """The arrays of `start()`, which gives a batch of this shape to the device, after compiling for a new one."""
        asked = self._clock()
        output = start()
        given = self._clock()
        self._waiting.submit(self._follow, given if shape in self._shapes else asked, given, output)
        self._shapes.add(shape)
        return output

    def close(self) -> "Occupancy":
        """Itself, when all batches are finished."""
        self._waiting.shutdown()
        return self

    @property
    def idle_share(self) -> float | None:
        """0 to 1; None before a second batch, since waiting for the first is no sign of anything."""
        return self.idle / (self.busy + self.idle) if self._followed > 1 else None

    def _follow(self, needed: float, given: float, output: object) -> None:
        self.idle += max(needed - self._ready, 0.0)
        started = given if self._ready == float("inf") else max(given, self._ready)
        jax.block_until_ready(output)
        self._ready = self._clock()
        self.busy += self._ready - started
        self._followed += 1
