"""A trace of some steps by jax.profiler, on request."""

from pathlib import Path

import jax


class Profile:
    """Traces `count` steps from step `first` (counted from 0) on; opens in Perfetto, TensorBoard or XProf.

    Args:
      folder: where the trace goes.
      first, count: which steps; a count of 0 traces none.
    """

    def __init__(self, folder: Path, first: int, count: int):
        self._folder, self._first, self._last = folder, first, first + count
        self._running = False

    def before(self, step: int) -> None:
        """To be called before a step is started; a run that resumes inside of the range traces the rest of it."""
        if not self._running and self._first <= step < self._last:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, outputs: object) -> str | None:
        """To be called when `step` steps were started; says where the trace is once the last one is done."""
        if not self._running or step < self._last:
            return None
        jax.block_until_ready(outputs)
        self.close()
        return f"wrote a trace of {self._last - self._first} steps to {self._folder}"

    def close(self) -> None:
        """Ends a trace that still runs."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
