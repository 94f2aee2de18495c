"""Anybody's scores, strictly: one finite number for every record, or an error with counts and examples."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from multitap_jax.data.records import Record
from multitap_jax.data.seen import from_bytes, prints_of, told
from multitap_jax.data.tables import RecordsError, Unreadable, read_jsonl, some
from multitap_jax.scoring.journal import seen_file_of


class ScoresError(RecordsError):
    """Scores that do not fit the records; the message has counts, examples and the remedy."""


def read_scores(path: str | Path, records: Sequence[Record], field: str = "score") -> np.ndarray:
    """Scores in the order of the records.

    Args:
      path: JSON lines `{"id", FIELD}`; or, where no line has an id, as many lines as records, in their order; where
        such lines have a "text", it must be that of their record.
      records: what was scored.
      field: the number that is read; "scores.NAME" reads one of the objectives that `multitap score` writes.

    Returns:
      float64[len(records)], all finite.

    Raises:
      ScoresError: no such file, unreadable or double lines, scores that are missing, no number, NaN or infinite, ids of
        other records, another number or order of lines. A part of the records is never taken for all.
    """
    path = Path(path)
    if not path.is_file():
        raise ScoresError(f"{path}: no such scores file; check the path")
    lines = list(read_jsonl(path))
    if not lines:
        raise ScoresError(f"{path}: no scores in the file")
    if unreadable := [f"line {line}: {row.reason}" for line, row in lines if isinstance(row, Unreadable)]:
        raise ScoresError(f"{path}: {len(unreadable):,} of {len(lines):,} lines are unreadable: {some(unreadable)}")
    rows = [(line, row) for line, row in lines if isinstance(row, dict)]
    named = sum("id" in row for _, row in rows)
    if named not in (0, len(rows)):
        line = next(line for line, row in rows if "id" not in row)
        raise ScoresError(f"{path}: {len(rows) - named:,} of {len(rows):,} lines have no id, the first is line {line}")
    found = _values(path, rows, field)
    return _by_id(path, rows, found, [r.id for r in records]) if named else _in_order(path, rows, found, records)


def _values(path: Path, rows: Sequence[tuple[int, dict[str, Any]]], field: str) -> np.ndarray:
    """The number of each line, in the order of the lines."""
    outer, _, inner = field.partition(".")
    values, wrong = [], []
    for line, row in rows:
        value = row.get(outer)
        if inner:
            value = value.get(inner) if isinstance(value, dict) else None
        if is_number(value):
            values.append(float(value))
            continue
        why = row["error"] if row.get("error") is not None else f"{field} is {value!r}, not a finite number"
        wrong.append(f"line {line}" + (f", id {row['id']}" if "id" in row else "") + f": {why}")
    if wrong:
        known = ", ".join(str(name) for name in rows[0][1])
        raise ScoresError(
            f"{path}: {len(wrong):,} of {len(rows):,} lines have no usable score: {some(wrong)}. Mend them: a part of "
            f"a benchmark is not evaluated. (Line {rows[0][0]} has {known}; --score_field names what is read)"
        )
    return np.array(values, np.float64)


def _in_order(
    path: Path, rows: Sequence[tuple[int, dict[str, Any]]], found: np.ndarray, records: Sequence[Record]
) -> np.ndarray:
    if len(found) != len(records):
        raise ScoresError(
            f"{path}: {len(found):,} scores without ids for {len(records):,} records; without ids, there must be one "
            "for each record, in the order of the records"
        )
    for (line, row), record in zip(rows, records, strict=True):
        text = row.get("text")
        if isinstance(text, str) and text.split() != record.text.split():
            raise ScoresError(
                f"{path}: line {line} is of the text {text[:60]!r}, but its record, {record.id}, of "
                f"{record.text[:60]!r}: without ids, lines must be in the order of the records. Give the lines ids"
            )
    return found


def _by_id(path: Path, rows: Sequence[tuple[int, dict[str, Any]]], found: np.ndarray, ids: Sequence[str]) -> np.ndarray:
    place: dict[Any, int] = {}
    twice = []
    for index, (line, row) in enumerate(rows):
        name = row["id"] if isinstance(row["id"], str) else repr(row["id"])
        if name in place:
            twice.append(f"{name} (line {line})")
        place.setdefault(name, index)
    if twice:
        raise ScoresError(f"{path}: {len(twice):,} ids are scored more than once: {some(twice)}. Keep one line of each")
    missing = [name for name in ids if name not in place]
    if missing:
        known = set(ids)
        unknown = [name for name in place if name not in known]
        what = f"{path}: {len(missing):,} of {len(ids):,} records have no score: {some(missing)}. "
        if unknown:
            what += f"{len(unknown):,} scored ids are no records: {some(unknown)}. "
        if len(missing) == len(ids):
            what += "These are scores of other records: of another benchmark or split?"
        else:
            what += "A part of a benchmark is not evaluated: score the missing ones, too"
        raise ScoresError(what)
    return found[[place[name] for name in ids]]


def seen_before(path: str | Path, records: Sequence[Record]) -> tuple[str, ...]:
    """What to say of records that the model which made the scores has seen, as far as `multitap score` left it beside
    them. Raises ValueError where what it left is damaged."""
    beside = seen_file_of(Path(path))
    if not beside.is_file():
        return ()
    known = from_bytes(beside.read_bytes(), beside)
    return told(known, [record.id for record in records], prints_of(records))


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a JSON value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
