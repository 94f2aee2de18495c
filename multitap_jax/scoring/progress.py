"""The bar of long work over many pairs or pictures, on standard error."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from multitap_jax.parallel import watchdog


class _Rate(ProgressColumn):
    def __init__(self, unit: str):
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f} {self._unit}/s")


@contextlib.contextmanager
def progress_bar(
    total: int | None, done: int = 0, *, enabled: bool = True, label: str = "scoring", unit: str = "pairs"
) -> Iterator[Callable[[int], None]]:
    """Yields `advance(items)`; draws nothing where not enabled. `done` items count as there, not as fast."""
    if not enabled:
        yield lambda items: watchdog.beat(label)
        return
    columns = (
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        task = progress.add_task(label, total=total, completed=done)

        def advance(items: int) -> None:
            watchdog.beat(label)
            progress.advance(task, items)

        yield advance
