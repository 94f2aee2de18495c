"""Tables that `print` shows, too."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


class TextTable(Table):
    """A narrow rich table whose `str` is its text, so that a plain script can print it."""

    def __init__(self, *headers: str, **options: object):
        super().__init__(*headers, **{"box": SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0), **options})  # type: ignore[arg-type]

    def __str__(self) -> str:
        console = Console(color_system=None, force_terminal=False, force_jupyter=False)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip("\n")
