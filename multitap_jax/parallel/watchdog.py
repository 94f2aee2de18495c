"""Ends a process that makes no progress any more, with a sentence and the stacks of its threads, instead of hanging.

One process that hangs makes all others of its run wait in the next collective, so each of them sees that nothing goes
on and ends; whoever launched them starts the run anew, and it goes on from the last checkpoint or line. A process that
died needs no watchdog: jax.distributed notices that its heartbeats stop.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command may well succeed
LOOKS = 8  # in the time that is allowed without progress
LONGEST_NAP = 5.0


class Watchdog:
    """Counts the time since the last `beat`, and ends the process when it is too long.

    Args:
      seconds: allowed without progress.
      who: which process this is, for the message.
      clock: seconds, monotonic; tests inject their own.
      end: ends the process with a code, at once, whatever its threads wait for.
      out: where the message goes; the stacks need one that is a file.
    """

    def __init__(
        self,
        seconds: float,
        *,
        who: str = "this process",
        clock: Callable[[], float] = time.monotonic,
        end: Callable[[int], object] = os._exit,
        out: TextIO | None = None,
    ):
        self.seconds, self.nap = seconds, min(seconds / LOOKS, LONGEST_NAP)
        self._who, self._clock, self._end, self._out = who, clock, end, out or sys.stderr
        self._idle, self._looked, self._doing = 0.0, clock(), "its start"

    def beat(self, doing: str | None = None) -> None:
        """Says that there is progress, and what was reached."""
        self._idle = 0.0
        self._doing = doing or self._doing

    def look(self) -> None:
        """Ends the process if there was no progress for too long; called every `nap` seconds."""
        now = self._clock()
        # A process that was itself stopped (a debugger, a laptop that slept) has not been idle for all that time.
        self._idle += min(now - self._looked, 2 * self.nap)
        self._looked = now
        if self._idle < self.seconds:
            return
        print(
            f"multitap: {self._who} has made no progress for {self._idle:.0f} s, since {self._doing}; either it hangs, "
            "as below, or it waits for a process that does. It ends now, so that the run can be started again; the "
            f"same command goes on where it was saved. --watchdog (now {self.seconds:g} s) allows more, 0 any time",
            file=self._out,
            flush=True,
        )
        faulthandler.dump_traceback(file=self._out, all_threads=True)
        self._end(EXIT_CODE)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Looks by a thread as long as the context is open."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(self.nap):
                self.look()

        thread = threading.Thread(target=watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


_current: Watchdog | None = None


def beat(doing: str | None = None) -> None:
    """Tells the watchdog of this process, if there is one, of progress; costs nothing."""
    if _current is not None:
        _current.beat(doing)


@contextlib.contextmanager
def watched(seconds: float, who: str = "this process") -> Iterator[None]:
    """Has this process watched while the context is open; 0 seconds is no watch."""
    global _current
    if seconds <= 0:
        yield
        return
    _current = Watchdog(seconds, who=who)
    try:
        with _current.running():
            yield
    finally:
        _current = None
