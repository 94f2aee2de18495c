"""The bar of a long scoring run, on standard error."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} pairs/s")


@contextlib.contextmanager
def progress_bar(total: int | None, done: int = 0, *, enabled: bool = True) -> Iterator[Callable[[int], None]]:
    """Yields `advance(pairs)`; draws nothing where not enabled. `done` pairs count as there, not as fast."""
    if not enabled:
        yield lambda pairs: None
        return
    columns = (
        TextColumn("scoring"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        task = progress.add_task("scoring", total=total, completed=done)
        yield lambda pairs: progress.advance(task, pairs)
