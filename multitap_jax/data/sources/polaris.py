"""Polaris: 131,020 judgements of captions (from 0 to 1), as Parquet of the Hub or as CSV; and Polaris*, pairs of it.

Polaris* are the official code's pairs: of validation rows that people gave at most 0.5, the first reference must beat
the candidate.
"""

import json
from ast import literal_eval
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from multitap_jax.data.sources.base import Cursor, Dataset, Draft, Item, Layout, Read, Request, mapped, rejected
from multitap_jax.data.sources.files import embedded, number, rows

HUB = frozenset({"refs", "cand", "img", "human_score"})
TABLE = frozenset({"mt", "refs", "score", "imgid"})
STAR_BELOW = 0.5


def _judged(paths: Sequence[Path], at: Cursor) -> Iterator[tuple[str, Any, str, Any, float] | Item]:
    """(id, picture, candidate, references, score) of each row, whichever form it is in."""
    for place, row in enumerate(rows(paths, at)):
        name, hub = f"{place:06d}", "cand" in row
        try:
            picture = embedded(row["img"]) if hub else _file(row["imgid"])
            score = number(row["human_score" if hub else "score"], "human_score")
            if score is None:
                raise ValueError("no human_score")
            mapped(score, 0, 1, "human_score")
        except ValueError as error:
            yield rejected(name, str(error))
            continue
        yield name, picture, row["cand" if hub else "mt"] or "", row["refs"], score


def _file(name: str) -> str:
    return name if Path(name).suffix else f"{name}.jpg"


def _read(paths: Sequence[Path], request: Request) -> Iterator[Item]:
    for found in _judged(paths, request.at):
        if isinstance(found, tuple):
            name, picture, candidate, _, score = found
            yield Draft(name, picture, candidate, score=score)
        else:
            yield found


def _read_star(paths: Sequence[Path], request: Request) -> Iterator[Item]:
    for found in _judged(paths, request.at):
        if not isinstance(found, tuple):
            yield found
            continue
        name, picture, candidate, references, score = found
        if score > STAR_BELOW:
            continue
        try:
            first = _references(references)[0]
        except (ValueError, SyntaxError, IndexError, TypeError, MemoryError, RecursionError):
            yield rejected(name, f"refs is {str(references)[:40]!r}, not a list of captions")
            continue
        for side, text, preference in (("ref", first, 1.0), ("cand", candidate, 0.0)):
            yield Draft(f"{name}/{side}", picture, text, ratings={"preference": preference}, group=name)


def _references(value: Any) -> list[str]:
    """A list, also as CSV has it: JSON, or a literal of Python (parsed as data, never run)."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = literal_eval(value)
    if not isinstance(value, list | tuple):
        raise ValueError("no list")
    return [str(text) for text in value]


def _layouts(read: Read) -> tuple[Layout, ...]:
    """Both published forms, read so."""
    return tuple(Layout(*form, read, by_split=True) for form in (("*.parquet", HUB), ("*.csv", TABLE)))


_ORIGIN = "Wada et al., CVPR 2024; huggingface.co/datasets/yuwd/Polaris, or polaris_{train,val,test}.csv of Polos"

POLARIS = Dataset(
    name="polaris",
    title="Polaris",
    layouts=_layouts(_read),
    counts={"train": 78630, "validation": 26268, "test": 26122},
    gives="score: human_score, as it is",
    origin=_ORIGIN,
    protocols=("polaris",),
)
STAR = Dataset(
    name="polaris-star",
    title="Polaris*",
    layouts=_layouts(_read_star),
    split="validation",
    gives="two records (first reference, candidate) of each row with human_score <= 0.5, preference 1 and 0",
    origin=_ORIGIN,
    protocols=("polaris-star",),
)
