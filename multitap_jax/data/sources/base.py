"""What a reader of a public dataset gives, and what the table of datasets says of each."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from multitap_jax.data.records import Rejected
from multitap_jax.data.tables import RecordsError


class SourceError(RecordsError):
    """Public files that are not what was asked for; the message says what was looked for and what is there."""


@dataclasses.dataclass(frozen=True, slots=True)
class Draft:
    """A record before its picture has a place.

    Attributes:
      id: unique in the dataset; `convert` puts the dataset's name before it.
      image: the picture's name in the public files, or its bytes where they are embedded.
      score: the one number people gave the pair, mapped to 0..1; None where there is none.
      ratings: the numbers as published. `preference` is comparable inside a group alone, higher is better: 1 and 0 for
        a chosen and a rejected answer, minus the published rank for rankings.
      group: what is compared or split together: the prompt of a ranking, the two sides of a pair. What stands before
        its first slash is the category that results are broken down by. `convert` puts the name before it, too.
    """

    id: str
    image: str | bytes
    text: str
    request: str | None = None
    score: float | None = None
    ratings: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    group: str | None = None


@dataclasses.dataclass(slots=True)
class Cursor:
    """Where reading stands, for what is said of a row: a `unit` of a file and its number, from 1; 0: nobody counts."""

    file: Path | None = None
    unit: str = "record"
    number: int = 0

    def move(self, file: Path, unit: str, number: int) -> None:
        """To a row, a line or an entry that is about to be given away."""
        self.file, self.unit, self.number = file, unit, number


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for: the split, and for tables without a form of their own the columns.

    `at` is moved by who reads the files.
    """

    split: str
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    at: Cursor = dataclasses.field(default_factory=Cursor)


# Draft, or what is wrong with a row; `convert` fills in the `line` of a Rejected, from where the reading stands.
Item = Draft | Rejected
Read = Callable[[Sequence[Path], Request], Iterator[Item]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """One form in which a dataset is published.

    Attributes:
      pattern: name of its files, as for `Path.match`.
      columns: what the files must have (for JSON: the keys of their first entry).
      read: gives the drafts of these files, in order.
      beside: names of other files that it needs.
      by_split: whether file or folder names say which split they are of.
    """

    pattern: str
    columns: frozenset[str]
    read: Read
    beside: tuple[str, ...] = ()
    by_split: bool = False

    def __str__(self) -> str:
        columns = f" with {', '.join(sorted(self.columns))}" if self.columns else ""
        return " and ".join([f"{self.pattern}{columns}", *self.beside])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A row of the table of datasets.

    Attributes:
      name: as --dataset takes it. title: as people write it.
      layouts: the forms it is read in; the first that fits is taken.
      split: the split that is read unless another is asked for.
      counts: published number of records of each split, where it is known.
      gives: what becomes of the published fields, in words.
      protocols: the benchmarks that count it (`evaluation/protocols.py`).
      origin: where it is published and by whom.
    """

    name: str
    title: str
    layouts: tuple[Layout, ...]
    gives: str
    origin: str
    split: str = "test"
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    protocols: tuple[str, ...] = ()


def mapped(value: float, low: float, high: float, name: str = "rating") -> float:
    """A published rating on 0..1. Raises ValueError, naming the scale, where it lies outside."""
    if not low <= value <= high:
        raise ValueError(f"{name} {value:g} lies outside the published scale {low:g} to {high:g}")
    return (value - low) / (high - low)


def rejected(name: str | None, reason: str) -> Rejected:
    """A row that gives no record."""
    return Rejected(0, name, reason)
