"""What experiments share: the demo's folder, and how a result is kept: a table, a figure, the numbers, the page."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from multitap_jax import __version__
from multitap_jax.display import TextTable
from multitap_jax.parallel.host import hush_absent_tpu

HERE = Path(__file__).parent
PAGE = HERE / "README.md"


@dataclass(frozen=True)
class Demo:
    """The folder that `multitap demo` wrote.

    Attributes:
      train, heldout: its records.
      base: the backbone before stage 1. artefact: the checkpoint after it, with seven ridge heads.
      embeddings: of the training pairs.
    """

    folder: Path

    @property
    def train(self) -> Path:
        return self.folder / "world" / "train.jsonl"

    @property
    def heldout(self) -> Path:
        return self.folder / "world" / "heldout.jsonl"

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def artefact(self) -> Path:
        return self.folder / "train" / "artefact"

    @property
    def embeddings(self) -> Path:
        return self.folder / "embeddings"

    def scores(self, name: str) -> Path:
        """Scores of the held-out pairs: trained, untrained or blanked."""
        return self.folder / "scores" / f"{name}.jsonl"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Flags of every experiment."""
    hush_absent_tpu()
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--demo", type=Path, default=Path("demo_run"), help="what `make demo` wrote")
    made.add_argument("--output", type=Path, help="where figure and numbers go (default: runs/experiments)")
    made.add_argument(
        "--page", action="store_true", help="put all into experiments/: results, and the table in README.md"
    )
    made.add_argument("--seed", type=int, default=0)
    return made


def demo_of(options: argparse.Namespace) -> Demo:
    """The demo's folder; ends with what to do where it is not there, or not finished."""
    demo = Demo(options.demo)
    if not (demo.folder / "report.html").is_file():
        sys.exit(f"{demo.folder} holds no finished demo; run `make demo` first, or say where it is: --demo=FOLDER")
    return demo


def keep(name: str, options: argparse.Namespace, table: TextTable, figure: Figure, numbers: Mapping[str, Any]) -> None:
    """Prints the table; writes NAME.png and NAME.json; with --page puts the table between the marks of the page."""
    folder = options.output or (HERE / "results" if options.page else Path("runs") / "experiments")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=110)
    settings = {key: str(value) for key, value in vars(options).items() if key not in ("output", "page")}
    surroundings = {"multitap_jax": __version__, "python": platform.python_version(), "cores": os.cpu_count()}
    whole = {"experiment": name, "settings": settings, "surroundings": surroundings, "numbers": numbers}
    (folder / f"{name}.json").write_text(json.dumps(whole, indent=2, default=float) + "\n")
    print(table)
    print(f"wrote {folder / name}.png and .json")
    if options.page:
        into_page(name, str(table))


def into_page(name: str, text: str, page: Path = PAGE) -> None:
    """Replaces what stands between the marks of an experiment.

    Raises:
      ValueError: the page has no such marks.
    """
    first, last = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    before, found, rest = page.read_text().partition(first)
    _, closed, after = rest.partition(last)
    if not (found and closed):
        raise ValueError(f"{page}: has no marks {first.strip()} and {last.strip()} for the table")
    page.write_text(f"{before}{first}\n```\n{text}\n```\n\n{last}{after}")
