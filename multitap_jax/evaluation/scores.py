"""Files of scores: lines as they are, with what is wrong with them, or one finite number for every record or an error.

A line has an `id`, a `score` and perhaps `scores` {objective: number}, `truncated` and `error`; anybody's have less.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from multitap_jax.data.records import Record
from multitap_jax.data.seen import from_bytes, prints_of, told
from multitap_jax.data.tables import RecordsError, Row, Unreadable, read_jsonl, some
from multitap_jax.scoring.journal import seen_file_of, sidecar_of


class ScoresError(RecordsError):
    """Scores that do not fit the records; the message has counts, examples and the remedy."""


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """A line of the scores file that could not be used, wholly or for one objective."""

    line: int
    id: str | None
    reason: str


@dataclasses.dataclass(slots=True)
class ScoreLines:
    """What a file of scores has.

    Attributes:
      overall: the score of each id that has one. objectives: the same of each objective, by its name.
      duplicates: ids on more than one line, of which the first counts. problems: what could not be used.
      seen: ids of all lines. lines, truncated: how many there are, and how many are of a text that was cut.
    """

    overall: dict[str, float] = dataclasses.field(default_factory=dict)
    objectives: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    duplicates: dict[str, None] = dataclasses.field(default_factory=dict)
    problems: list[Problem] = dataclasses.field(default_factory=list)
    seen: set[str] = dataclasses.field(default_factory=set)
    lines: int = 0
    truncated: int = 0


def read_lines(path: str | os.PathLike[str]) -> ScoreLines:
    """Every line of a file of scores. Raises ScoresError where there is no such file, or nothing in it."""
    scores = ScoreLines()
    for line, row in _rows(Path(path)):
        scores.lines += 1
        name = None if isinstance(row, Unreadable) else row.get("id")
        if isinstance(row, Unreadable):
            scores.problems.append(Problem(line, None, row.reason))
        elif not isinstance(name, str):
            scores.problems.append(Problem(line, None, "no id"))
        elif name in scores.seen:
            scores.duplicates[name] = None
        else:
            scores.seen.add(name)
            scores.problems += [Problem(line, name, reason) for reason in _take(scores, name, row)]
    return scores


def _take(scores: ScoreLines, name: str, row: dict[str, Any]) -> Iterator[str]:
    """Adds one line; gives what of it is no finite number."""
    value = _value(row, "score")
    if row.get("error") is not None:
        yield str(value)
        return
    scores.truncated += row.get("truncated") is True
    if isinstance(value, float):
        scores.overall[name] = value
    else:
        yield value
    objectives = row.get("scores") or {}
    if not isinstance(objectives, dict):
        yield "scores is not an object of objective: number"
        return
    for objective in objectives:
        column = scores.objectives.setdefault(objective, {})
        if isinstance(value := _number_of(objectives, objective, f"scores.{objective}"), float):
            column[name] = value
        else:
            yield value


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
    lines = list(_rows(path))
    if unreadable := [f"line {line}: {row.reason}" for line, row in lines if isinstance(row, Unreadable)]:
        raise ScoresError(f"{path}: {len(unreadable):,} of {len(lines):,} lines are unreadable: {some(unreadable)}")
    rows = [(line, row) for line, row in lines if isinstance(row, dict)]
    named = sum("id" in row for _, row in rows)
    if named not in (0, len(rows)):
        line = next(line for line, row in rows if "id" not in row)
        raise ScoresError(f"{path}: {len(rows) - named:,} of {len(rows):,} lines have no id, the first is line {line}")
    found = _values(path, rows, field)
    return _by_id(path, rows, found, [r.id for r in records]) if named else _in_order(path, rows, found, records)


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Numbers of the lines, and the lines. Raises ScoresError for no file, or none in it."""
    if not path.is_file():
        raise ScoresError(f"{path}: no such scores file; check the path")
    line = 0
    for line, row in read_jsonl(path):
        yield line, row
    if not line:
        raise ScoresError(f"{path}: no scores in the file")


def _value(row: dict[str, Any], field: str) -> float | str:
    """The number called "score" or "scores.NAME" of a line, or why it has none."""
    if row.get("error") is not None:
        return str(row["error"])
    outer, _, inner = field.partition(".")
    if not inner:
        return _number_of(row, outer, field)
    return _number_of(row[outer] if isinstance(row.get(outer), dict) else {}, inner, field)


def _number_of(row: dict[str, Any], key: str, name: str) -> float | str:
    value = row.get(key)
    return float(value) if is_number(value) else f"{name} is {value!r}, not a finite number"


def _values(path: Path, rows: Sequence[tuple[int, dict[str, Any]]], field: str) -> np.ndarray:
    """The number of each line, in the order of the lines."""
    values, wrong = [], []
    for line, row in rows:
        if isinstance(value := _value(row, field), float):
            values.append(value)
        else:
            wrong.append(f"line {line}" + (f", id {row['id']}" if "id" in row else "") + f": {value}")
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


def read_note(scores_path: str | os.PathLike[str]) -> dict[str, Any]:
    """The sidecar that `multitap score` leaves beside its output; empty without one."""
    try:
        note = json.loads(sidecar_of(Path(scores_path)).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) and isinstance(note.get("settings", {}), dict) else {}


def seen_before(path: str | Path, records: Sequence[Record]) -> tuple[str, ...]:
    """What to say of records that the model which made the scores has seen, as far as `multitap score` left it beside
    them. Raises ValueError where what it left is damaged."""
    beside = seen_file_of(Path(path))
    if not beside.is_file():
        return ()
    known = from_bytes(beside.read_bytes(), beside)
    return told(known, [record.id for record in records], prints_of(records))


def noted_seen(path: str | Path) -> str:
    """Whose records are noted beside scores, in words, "" where none are: silence about those says nothing."""
    beside = seen_file_of(Path(path))
    return " and ".join(from_bytes(beside.read_bytes(), beside)) if beside.is_file() else ""


def computed_in(note: Mapping[str, Any]) -> str | None:
    """How the scores beside this note were computed: type, and weights where they were rounded; None if not noted."""
    settings = note.get("settings", {})
    weights = f", weights of {settings['weights']}" if "weights" in settings else ""
    return f"{settings['dtype']}{weights}" if "dtype" in settings else None


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a JSON value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
