"""Public files on disk: finding those of a dataset, telling which dataset they are of, and their rows in a stream."""

import csv
import functools
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet

from multitap_jax.data.sources.base import Cursor, Dataset, Layout, SourceError
from multitap_jax.data.tables import nearest, some

SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
ALL = "all"
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_LINE_ENDS = re.compile(r"\r\n|\r|\n")


def find(
    folder: Path, dataset: Dataset, split: str, others: Iterable[Dataset], apart: Path | None = None
) -> tuple[Layout, list[Path]]:
    """The files of a split of a dataset, sorted by name, and the form they are in.

    Args:
      folder: where the user has them, at any depth; or one file.
      dataset, split: what is looked for; the split "all" takes every file.
      others: known datasets, to say what the files are instead.
      apart: a folder whose files are not looked at, the output's.

    Raises:
      SourceError: no such folder; nothing in it fits: says what was looked for, what is there, and what it looks like.
    """
    if not folder.exists():
        raise SourceError(f"{folder}: no such file or folder; give what you downloaded as --source=FOLDER")
    there = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else [folder]
    if apart is not None:
        there = [path for path in there if apart.absolute() not in path.absolute().parents]
    other_splits: dict[str, int] = {}
    for layout in dataset.layouts:
        files = _fitting(layout, there)
        found = [split_of(path, folder) for path in files]
        if layout.by_split and split != ALL:
            files = [path for path, name in zip(files, found, strict=True) if name == split]
        if files and not layout.by_split and split != dataset.split:
            raise SourceError(f"{dataset.title} has one split, {dataset.split}; leave out --split={split}")
        if files:
            return layout, files
        for name in found:
            other_splits[name or "unnamed"] = other_splits.get(name or "unnamed", 0) + 1
    if other_splits:
        what = ", ".join(f"{name} ({count})" for name, count in other_splits.items())
        raise SourceError(
            f"{folder}: no file of the split {split!r} of {dataset.title}, as file and folder names tell; there are "
            f"files of {what}. Choose with --split; --split=all takes all files"
        )
    raise SourceError(_not_found(folder, dataset, there, others))


def _fitting(layout: Layout, there: Sequence[Path]) -> list[Path]:
    fits = lambda path: path.match(layout.pattern) and not _absent(layout, path) and layout.columns <= columns_of(path)
    return [path for path in there if fits(path)]


def _absent(layout: Layout, path: Path) -> list[str]:
    """The files that should lie beside this one, and do not."""
    return [name for name in layout.beside if not path.with_name(name).is_file()]


def split_of(path: Path, folder: Path) -> str | None:
    """The split that a file's name, or that of a folder above it, says it is of; the nearest to the file counts."""
    inside = path.relative_to(folder) if path != folder else Path(path.name)
    for part in reversed(inside.parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            for split, names in SPLITS.items():
                if word in names:
                    return split
    return None


def _not_found(folder: Path, dataset: Dataset, there: Sequence[Path], others: Iterable[Dataset]) -> str:
    looked = "; or ".join(str(layout) for layout in dataset.layouts)
    lines = [f"{folder}: this is not {dataset.title}. Looked for {looked}."]
    for layout in dataset.layouts:
        for path in [path for path in there if path.match(layout.pattern)][:1]:
            columns = columns_of(path)
            missing = sorted(layout.columns - columns)
            if missing and columns & layout.columns:
                hints = (f"{name!r}{nearest(name, columns - layout.columns)}" for name in missing)
                lines.append(f"{path.name} has no column {', '.join(hints)}.")
        if absent := [_absent(layout, path) for path in there if path.match(layout.pattern) and _absent(layout, path)]:
            lines.append(f"Beside {layout.pattern} there is no {', '.join(absent[0])}.")
    if alike := [other.title for other in looking_like(there, others) if other is not dataset]:
        lines.append(f"It looks like {' or '.join(alike)}.")
    names = [str(path.relative_to(folder)) if path != folder else path.name for path in there]
    lines.append(f"There: {some(names, 5) or 'no files'}.")
    return " ".join(lines)


def looking_like(there: Sequence[Path], datasets: Iterable[Dataset]) -> list[Dataset]:
    """Datasets of which some of these files have a published form, as their columns tell."""
    return [one for one in datasets if any(_fitting(form, there) for form in one.layouts if form.columns)]


def told_apart(paths: Sequence[Path]) -> list[str]:
    """A name for each file that no other has: its own without the suffix, and as many folders before it as it takes."""
    names: list[str] = []
    for depth in range(1, max((len(path.parts) for path in paths), default=0) + 1):
        names = ["/".join((*path.parts[-depth:-1], path.stem)) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def columns_of(path: Path) -> frozenset[str]:
    """Column names of a table; for JSON the keys of its first entry; none where the file is of another kind."""
    return _columns_of(path, _state(path))


def _state(path: Path) -> tuple[int, int]:
    """What is another one when the file has been written anew."""
    found = path.stat()
    return found.st_mtime_ns, found.st_size


@functools.lru_cache(maxsize=4096)
def _columns_of(path: Path, state: tuple[int, int]) -> frozenset[str]:
    try:
        if path.suffix == ".parquet":
            return frozenset(pyarrow.parquet.read_schema(path).names)
        if path.suffix in _DELIMITERS:
            return frozenset(_header(path))
        if path.suffix == ".jsonl":
            with path.open("rb") as file:
                first = json.loads(file.readline() or b"{}")
            return frozenset(first) if isinstance(first, dict) else frozenset()
        if path.suffix == ".json":
            return frozenset(_first_entry(read_json(path)))
    except (pyarrow.ArrowException, OSError, ValueError, RecursionError, csv.Error):
        pass  # not readable as what its name says: then it is not what is looked for
    return frozenset()


def _first_entry(value: Any) -> dict[str, Any]:
    """The first object that holds a plain value, down through lists and objects of nothing but lists and objects."""
    while isinstance(value, list | dict):
        if isinstance(value, list):
            value = value[0] if value else None
        elif isinstance(value.get("annotations"), list):  # the form that COCO made usual: facts, images, annotations
            value = value["annotations"]
        elif value and all(isinstance(inner, list | dict) for inner in value.values()):
            value = next(iter(value.values()))
        else:
            return value
    return {}


def read_json(path: Path) -> Any:
    """The content of a JSON file; the last one read is kept. Raises SourceError where it is damaged."""
    return _read_json(path, _state(path))


@functools.lru_cache(maxsize=1)
def _read_json(path: Path, state: tuple[int, int]) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: damaged or no JSON ({error}); download it again") from error


def delimiter_of(path: Path, line: str) -> str:
    """Tabs in .tsv; in .csv commas, or the semicolons that some publish."""
    if path.suffix == ".tsv":
        return "\t"
    return ";" if line.count(";") > line.count(",") else ","


def _header(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        line = file.readline()
    return next(csv.reader([line], delimiter=delimiter_of(path, line)), [])


def rows(
    paths: Sequence[Path],
    at: Cursor,
    columns: Sequence[str] | None = None,
    *,
    ragged: bool = False,
    quoted: bool = True,
) -> Iterator[dict[str, Any]]:
    """Rows of tables (Parquet, CSV, TSV, JSON lines) one after another, in constant memory.

    Args:
      paths: of the files.
      at: is moved to each row: its line in text, its number in Parquet.
      columns: those of Parquet that are read; None reads all.
      ragged: let rows of CSV have more or fewer cells than the header.
      quoted: cells of CSV may stand in quotes; False reads quotes as they are.

    Raises:
      SourceError: damaged files, or a row whose cells do not match the header.
    """
    for path in paths:
        found: Iterable[tuple[int, dict[str, Any]]]
        if path.suffix == ".parquet":
            found, unit = enumerate(_parquet_rows(path, columns), 1), "row"
        else:
            found, unit = _json_lines(path) if path.suffix == ".jsonl" else _csv_rows(path, ragged, quoted), "line"
        for number, row in found:
            at.move(path, unit, number)
            yield row


def _parquet_rows(path: Path, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            there = table.schema_arrow.names
            wanted = None if columns is None else [name for name in columns if name in there]
            for batch in table.iter_batches(batch_size=64, columns=wanted):  # rows may hold pictures of megabytes
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise SourceError(f"{path}: damaged or no Parquet file ({error}); download it again") from error


def _csv_rows(path: Path, ragged: bool, quoted: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    # surrogateescape: a byte that is no UTF-8 spoils its own record, and is not taken for another letter
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        line = file.readline()
        file.seek(0)
        quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        reader = csv.DictReader(file, delimiter=delimiter_of(path, line), quoting=quoting, strict=True)
        try:
            names = [name for name in reader.fieldnames or () if name]
            if twice := next((name for name in names if names.count(name) > 1 and not ragged), None):
                raise SourceError(f"{path}: column {twice!r} twice; rename or drop one of them")
            for row in reader:
                if not ragged and (None in row or None in row.values()):
                    raise SourceError(f"{path}: line {reader.line_num} has not as many cells as the header; mend it")
                within = sum(len(_LINE_ENDS.findall(cell)) for cell in row.values() if isinstance(cell, str))
                yield reader.line_num - within, row
        except csv.Error as error:
            raise SourceError(f"{path}: line {reader.line_num} is no CSV ({error}); download it again") from error


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise SourceError(f"{path}: line {number} is no JSON ({error}); download it again") from error
                yield number, row


def entries(path: Path, at: Cursor, value: Any) -> Iterator[Any]:
    """The entries of a list that a JSON file holds."""
    for number, entry in enumerate(value, 1):
        at.move(path, "entry", number)
        yield entry


def lines(path: Path, cells: int, at: Cursor | None = None) -> Iterator[list[str]]:
    """Cells of a text file with tabs and no header. Raises SourceError for a line with too few."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            found = line.rstrip("\n").split("\t")
            if len(found) < cells:
                raise SourceError(f"{path}: line {number} has {len(found)} cells, expected {cells} with tabs between")
            if at is not None:
                at.move(path, "line", number)
            yield found


def number(value: Any, name: str) -> float | None:
    """A number of a cell; None where it is empty or NaN, which is how tables of numbers write that there is none.

    Raises ValueError, naming it, for what is no number and for what is infinite.
    """
    if value is None or value == "":
        return None
    try:
        if isinstance(value, bool) or (isinstance(value, str) and "_" in value):  # Python would take 1_0 for 10
            raise ValueError
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} is {str(value)[:40]!r}, not a number") from None
    if math.isinf(found):
        raise ValueError(f"{name} is {found}, not a finite number")
    return None if math.isnan(found) else found


def minus(rank: Any) -> float | None:
    """The preference that a rank stands for, None without one; raises as `number`."""
    found = number(rank, "rank")
    return None if found is None else -found


def embedded(value: Any) -> str | bytes:
    """A picture of a Hub table: its bytes, or its name where it lies beside. Raises ValueError where it is neither."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, str | bytes) or not value:
        raise ValueError(f"the picture is {str(value)[:40]!r}, neither bytes nor a name")
    return value
