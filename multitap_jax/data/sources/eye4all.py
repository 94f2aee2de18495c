"""EYE4ALL, guidance for people who see little. Multi: ratings on several dimensions; Pref: chosen and rejected answers.

Which dimensions there are is read from the data: every column of numbers is one.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from multitap_jax.data.sources.base import Dataset, Draft, Item, Layout, Request, rejected
from multitap_jax.data.sources.files import embedded, number, rows

_NOT_RATED = {"request", "response", "chosen", "rejected", "image", "id", "index", "idx", "image_id"}


def _ratings(row: dict[str, Any]) -> dict[str, float | None]:
    found = {}
    for name, value in row.items():
        if name in _NOT_RATED or name.startswith(("Unnamed", "__")) or isinstance(value, bool):
            continue
        if isinstance(value, int | float) or (isinstance(value, str) and _is_number(value)):
            found[name] = number(value, name)
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_multi(paths: Sequence[Path], request: Request) -> Iterator[Item]:
    for place, row in enumerate(rows(paths, request.at)):
        name = f"{place:05d}"
        try:
            picture, ratings = embedded(row["image"]), _ratings(row)
        except ValueError as error:
            yield rejected(name, str(error))
            continue
        yield Draft(name, picture, row["response"] or "", request=row["request"], ratings=ratings)


def _read_pref(paths: Sequence[Path], request: Request) -> Iterator[Item]:
    for place, row in enumerate(rows(paths, request.at)):
        group = f"{place:05d}"
        try:
            picture = embedded(row["image"])
        except ValueError as error:
            yield from [rejected(f"{group}/{side}", str(error)) for side in ("chosen", "rejected")]
            continue
        for side, preference in (("chosen", 1.0), ("rejected", 0.0)):
            ratings = {"preference": preference}
            text, asked = row[side] or "", row["request"]
            yield Draft(f"{group}/{side}", picture, text, request=asked, ratings=ratings, group=group)


def _layouts(columns: frozenset[str], read: Any) -> tuple[Layout, ...]:
    return tuple(Layout(pattern, columns, read, by_split=True) for pattern in ("*.parquet", "*.jsonl", "*.csv"))


_ORIGIN = "Kim et al., 2025, arXiv 2510.00766; huggingface.co/datasets/brl-xfact"

MULTI = Dataset(
    name="eye4all-multi",
    title="EYE4ALLMulti",
    layouts=_layouts(frozenset({"request", "response", "image"}), _read_multi),
    split="all",
    gives="ratings: every column of numbers, by its name",
    origin=f"{_ORIGIN}/Eye4AllMulti",
)
PREF = Dataset(
    name="eye4all-pref",
    title="EYE4ALLPref",
    layouts=_layouts(frozenset({"request", "chosen", "rejected", "image"}), _read_pref),
    split="all",
    gives="two records a row (group), preference 1 for the chosen and 0 for the rejected answer",
    origin=f"{_ORIGIN}/Eye4AllPreference",
    protocols=("eye4all-pref",),
)
