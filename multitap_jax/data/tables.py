"""Rows out of JSON lines, CSV and Parquet files: one item a row, in order, in constant memory.

A reader yields `(line, row)`. `row` is a dict of the columns, or `Unreadable` with the reason where the line cannot be
read at all; the file goes on. What makes the whole file useless (no such file, a wrong header, damaged Parquet) raises
RecordsError.
"""

import csv
import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow
import pyarrow.parquet

MAX_LINE_BYTES = 16 << 20
SUFFIXES = (".jsonl", ".csv", ".parquet")
REJECTED_NAME = "rejected.jsonl"


class RecordsError(ValueError):
    """A records file that cannot be used; the message names the file, the lines and the remedy."""


class Unreadable(NamedTuple):
    """A line that gives no row, and why."""

    reason: str


Row = dict[str, Any] | Unreadable
# What a header check gets: the column names. It returns the reason why one of them is unusable, or None.
ColumnCheck = Callable[[str], str | None]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return result


_JSON = json.JSONDecoder(object_pairs_hook=_unique_keys)


def find_records_file(path: str | Path) -> Path:
    """The records file itself, or the only one in a folder. Raises RecordsError where there is none, or several."""
    path = Path(path)
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file() and p.name != REJECTED_NAME)
        if len(inside) != 1:
            names = ", ".join(p.name for p in inside) or "none"
            raise RecordsError(
                f"{path}: expected one records file ({', '.join(SUFFIXES)}), found {names}; name the file"
                + published_as(path)
            )
        return inside[0]
    if not path.is_file():
        raise RecordsError(f"{path}: no such records file; check the path")
    if path.suffix not in SUFFIXES:
        raise RecordsError(
            f"{path}: records are {', '.join(SUFFIXES)} files; rename or convert it" + published_as(path)
        )
    return path


def published_as(path: Path) -> str:
    """What to say besides of files that are no records, where they are those of a public dataset; else nothing."""
    from multitap_jax.data.sources.registry import hint  # which stands above, and is asked where something went wrong

    return hint(path)


def read_rows(path: Path, check_column: ColumnCheck) -> Iterator[tuple[int, Row]]:
    """Rows of a file by its suffix. The header of CSV and Parquet is checked at once, not at the first row.

    Lines count from 1 as an editor shows them (the first line of a CSV row; the row number in Parquet).
    """
    if path.suffix == ".jsonl":
        return read_jsonl(path)
    return _read_csv(path, check_column) if path.suffix == ".csv" else _read_parquet(path, check_column)


def read_jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    """Objects of a JSON-lines file; blank lines are counted but give no row."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                _skip_line(file)
                yield number, Unreadable(f"line is longer than {MAX_LINE_BYTES:,} bytes")
            elif line.strip():
                yield number, parse_json_object(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)


def unit_of(path: Path) -> str:
    """What the numbers of `read_rows` count in this file."""
    return "row" if path.suffix == ".parquet" else "line"


def parse_json_object(line: bytes) -> Row:
    """One JSON object; anything else (also an object with a key twice) is Unreadable."""
    try:
        value = _JSON.decode(line.decode())
    except UnicodeDecodeError as error:
        return Unreadable(f"not UTF-8 (byte {error.start} of the line)")
    except (ValueError, RecursionError) as error:
        return Unreadable(f"not JSON: {error}")
    if not isinstance(value, dict):
        return Unreadable(f"not a JSON object but {_json_kind(value)}")
    return value


def parse_json_cell(text: str) -> Any:
    """A JSON value inside a table's cell. Raises ValueError."""
    try:
        return _JSON.decode(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def some(items: Sequence[str], shown: int = 3) -> str:
    """The first few for a message, and how many more."""
    return ", ".join(items[:shown]) + (f" and {len(items) - shown:,} more" if len(items) > shown else "")


def _read_csv(path: Path, check_column: ColumnCheck) -> Iterator[tuple[int, Row]]:
    # surrogateescape: a byte that is no UTF-8 spoils its own record, not the file
    file = path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        reader = csv.reader(file, strict=True)
        header = next(reader, None)
        if not header:
            raise RecordsError(f"{path}: the file is empty; the first line names the columns")
        _check_header(path, header, check_column)
    except csv.Error as error:
        file.close()
        raise RecordsError(f"{path}: line 1, the header, is no CSV: {error}") from error
    except RecordsError:
        file.close()
        raise

    def rows() -> Iterator[tuple[int, Row]]:
        with file:
            while True:
                line = reader.line_num + 1
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    if reader.line_num > line:
                        # Records were swallowed by an open quote, and nobody can say where the next one begins.
                        raise RecordsError(
                            f"{path}: line {line}: the record that begins here does not end ({error}); close its quote"
                        ) from error
                    yield line, Unreadable(f"not CSV: {error}")
                    continue
                if len(cells) == len(header):
                    yield line, dict(zip(header, cells, strict=True))
                elif cells:
                    yield line, Unreadable(f"{len(cells)} cells, but the header names {len(header)} columns")

    return rows()


def _read_parquet(path: Path, check_column: ColumnCheck) -> Iterator[tuple[int, Row]]:
    try:
        table = pyarrow.parquet.ParquetFile(path)
        _check_header(path, table.schema_arrow.names, check_column)
    except (pyarrow.ArrowException, OSError) as error:
        raise RecordsError(f"{path}: damaged or no Parquet file ({error}); write it again") from error

    def rows() -> Iterator[tuple[int, Row]]:
        line = 0
        try:
            with table:
                for batch in table.iter_batches(batch_size=1024):
                    for row in batch.to_pylist():
                        line += 1
                        yield line, row
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise RecordsError(f"{path}: damaged after row {line} ({error}); write it again") from error

    return rows()


def _check_header(path: Path, names: list[str], check_column: ColumnCheck) -> None:
    problems = [problem for name in names if (problem := check_column(name)) is not None]
    problems += [f"column {name!r} twice" for name in sorted({n for n in names if names.count(n) > 1})]
    if problems:
        raise RecordsError(f"{path}: " + "; ".join(problems) + ". Rename or drop the column" + published_as(path))


def _skip_line(file: BinaryIO) -> None:
    while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
        pass


def _json_kind(value: Any) -> str:
    kinds = {list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")
