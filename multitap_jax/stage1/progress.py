"""What a person sees of a run: a bar on a terminal, plain lines elsewhere, a table at the end."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from multitap_jax.stage1.metrics import MetricsLog

TELL_FROM = 0.05  # share of the time spent waiting for data that is worth a word


class Display:
    """A context that shows progress on standard error; silent where not `enabled`.

    Args:
      total: steps of the run.
      done: steps that were finished before.
      enabled: True in the first process only.
    """

    def __init__(self, total: int, done: int, *, enabled: bool = True):
        self._console = Console(file=sys.stderr, quiet=not enabled)
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        self._total = total
        self._progress = Progress(
            *columns, console=self._console, disable=not (enabled and self._console.is_terminal), transient=True
        )
        self._task = self._progress.add_task("training", total=total, completed=done, numbers="")

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def advance(self, step: int) -> None:
        """Moves the bar to `step`."""
        self._progress.update(self._task, completed=step)

    def numbers(self, step: int, line: Mapping[str, Any]) -> None:
        """Shows a log line: beside the bar on a terminal, as text elsewhere."""
        text = describe(line)
        self._progress.update(self._task, completed=step, numbers=text)
        if not self._console.is_terminal:
            self.say(f"step {step}/{self._total}  {text}")

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def summary(self, rows: Mapping[str, str]) -> None:
        """Prints a table of two columns."""
        table = Table(show_header=False, title="stage 1", title_justify="left")
        for name, value in rows.items():
            table.add_row(name, value)
        self._console.print(table)


def describe(line: Mapping[str, Any]) -> str:
    """A log line in words and units."""
    used = "n/a" if line["mfu"] is None else f"{line['mfu']:.1%}"
    loss = "n/a (no pair counted)" if line["loss"] is None else f"{line['loss']:.5f}"
    waits = line["data_wait"]
    host = f"  waits for data {waits:.0%} of the time" if waits >= TELL_FROM else ""
    return (
        f"loss {loss}  {_three(line['seconds_per_step'])} s/step  {_three(line['pairs_per_second'])} pairs/s  "
        f"{line['tokens_per_second']:,.0f} tokens/s  packing {line['packing_efficiency']:.0%}  MFU {used}{host}"
    )


def _three(number: float) -> str:
    """Three digits, never as a power of ten."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}" if number >= 1e-3 else f"{number:.6f}"


def brief(numbers: Mapping[str, Any]) -> str:
    """Held-out numbers in one line."""
    names = ("loss", "tau_b", "tau_c", "pearson", "spearman")
    return "  ".join(f"{name} {'n/a' if numbers[name] is None else format(numbers[name], '.4f')}" for name in names)


def summary(log: MetricsLog, workdir: Path, step: int, total: int, seconds: float, steps: int) -> dict[str, str]:
    """The rows of the table at the end: `steps` of the `step` finished ones were done now, in `seconds`."""
    losses = [line["loss"] for line in log.lines if line.get("loss") is not None]
    rows = {"steps": f"{step} of {total}, {steps} of them now in {seconds:.1f} s"}
    if losses:
        rows["training loss"] = f"{losses[0]:.5f} -> {losses[-1]:.5f}"
    evaluations = sorted(log.evaluations().items())
    if evaluations:
        rows["held out, first"] = f"step {evaluations[0][0]}: {brief(evaluations[0][1])}"
        rows["held out, last"] = f"step {evaluations[-1][0]}: {brief(evaluations[-1][1])}"
    rows["run"] = str(workdir) if step >= total else f"{workdir} (stopped; the same command goes on)"
    return rows
