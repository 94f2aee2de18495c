"""align-anything, TI2T and T2I: two answers to a request (or two pictures of a prompt), rated and compared."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from multitap_jax.data.sources.base import Cursor, Dataset, Draft, Item, Layout, Request, rejected
from multitap_jax.data.sources.files import embedded, number, rows


def _judged(row: dict[str, Any], side: int) -> dict[str, float | None]:
    """The side's own ratings, whatever they are of, and which of the two is better overall."""
    ratings = {}
    for column, value in row.items():
        if found := re.fullmatch(rf"(\w+)_rate_{side}", column):
            ratings[found[1]] = number(value, column)
    overall = next((name for name in row if re.fullmatch(r"overall_(response|image)", name)), None)
    if overall is not None:
        better = number(row[overall], overall)
        if better not in (1, 2, None):
            raise ValueError(f"{overall} is {better:g}, neither 1 nor 2")
        ratings["preference"] = None if better is None else float(better == side)
    return ratings


def _pairs(paths: Sequence[Path], at: Cursor, text: str, picture: str, request: str | None) -> Iterator[Item]:
    """Two drafts a row; `text` and `picture` name their columns, with {} for the side where each has its own."""
    for place, row in enumerate(rows(paths, at)):
        group = f"{place:06d}"
        try:
            pair = [
                Draft(
                    f"{group}/{side}",
                    embedded(row[picture.format(side)]),
                    row[text.format(side)] or "",
                    request=row[request] if request else None,
                    ratings=_judged(row, side),
                    group=group,
                )
                for side in (1, 2)
            ]
        except ValueError as error:
            yield from [rejected(f"{group}/{side}", str(error)) for side in (1, 2)]
            continue
        yield from pair


def _read_answers(paths: Sequence[Path], request: Request) -> Iterator[Item]:
    return _pairs(paths, request.at, "response_{}", "image", "question")


def _read_pictures(paths: Sequence[Path], request: Request) -> Iterator[Item]:
    return _pairs(paths, request.at, "prompt", "image_{}", None)


_ORIGIN = "Ji et al., 2024; huggingface.co/datasets/PKU-Alignment/align-anything"
_GIVES = "two records a row; ratings: every NAME_rate_1 and NAME_rate_2 as NAME (0-3); preference 1 and 0"

ANSWERS = Dataset(
    name="align-anything-ti2t",
    title="align-anything TI2T",
    layouts=(
        Layout("*.parquet", frozenset({"question", "response_1", "response_2", "image"}), _read_answers, by_split=True),
    ),
    split="validation",
    gives=f"{_GIVES} by overall_response; request: the question",
    origin=_ORIGIN,
    protocols=("align-anything-ti2t",),
)
PICTURES = Dataset(
    name="align-anything-t2i",
    title="align-anything T2I",
    layouts=(Layout("*.parquet", frozenset({"prompt", "image_1", "image_2"}), _read_pictures, by_split=True),),
    split="validation",
    gives=f"{_GIVES} by overall_image; text: the prompt",
    origin=_ORIGIN,
    protocols=("align-anything-t2i",),
)
