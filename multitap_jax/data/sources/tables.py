"""Tables of a picture, a text and numbers: AGIQA-3K's, and anybody's with a map of columns."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from multitap_jax.data.records import COLUMNS
from multitap_jax.data.sources.base import Dataset, Draft, Item, Layout, Request, SourceError, rejected
from multitap_jax.data.sources.files import columns_of, embedded, number, rows
from multitap_jax.data.tables import nearest


def _read_agiqa(paths: Sequence[Path], request: Request) -> Iterator[Item]:
    for row in rows(paths, request.at):
        name = row["name"]
        try:
            ratings = {key.removeprefix("mos_"): number(row[key], key) for key in row if key.startswith("mos_")}
        except ValueError as error:
            yield rejected(name, str(error))
            continue
        yield Draft(name, name, row["prompt"], ratings=ratings)


def _read_table(paths: Sequence[Path], request: Request) -> Iterator[Item]:
    columns = {**_named_alike(paths), **request.columns}
    if "ratings" in columns and "ratings" not in request.columns:
        raise SourceError(
            f"{paths[0]}: its column 'ratings' holds all ratings in one, as records have them and tables do not. If "
            "these are records, they need no conversion: every verb takes them as --input. If not, give each rating a "
            "column of its own, ratings.NAME"
        )
    _check_columns(paths, columns)
    ratings = {name.removeprefix("ratings."): theirs for name, theirs in columns.items() if name.startswith("ratings.")}
    for place, row in enumerate(rows(paths, request.at)):
        name = f"{place:06d}"
        try:
            name = _text(row, columns, "id") or name
            yield Draft(
                id=name,
                image=embedded(row.get(columns["image"])),
                text=_text(row, columns, "text") or "",
                request=_text(row, columns, "request"),
                score=number(row.get(columns["score"]), columns["score"]) if "score" in columns else None,
                ratings={ours: number(row.get(theirs), theirs) for ours, theirs in ratings.items()},
                group=_text(row, columns, "group"),
            )
        except ValueError as error:
            yield rejected(name, str(error))


def _text(row: dict[str, Any], columns: dict[str, str], name: str) -> str | None:
    value = row.get(columns[name]) if name in columns else None
    return None if value in (None, "") else str(value)


def _named_alike(paths: Sequence[Path]) -> dict[str, str]:
    """The file's columns that are called as a record's are."""
    return {name: name for name in columns_of(paths[0]) if name in COLUMNS or name.startswith("ratings.")}


def _check_columns(paths: Sequence[Path], columns: dict[str, str]) -> None:
    """Raises SourceError for columns that a record does not have, that a file does not have, or that are missing."""
    known = [name for name in COLUMNS if name != "ratings"]
    for ours in columns:
        if ours not in known and not (ours.startswith("ratings.") and len(ours) > len("ratings.")):
            raise SourceError(
                f"--columns={ours}=...: a record has {', '.join(known)} and ratings.NAME"
                + "; ratings are named one by one, such as --columns=ratings.tone=tone" * (ours == "ratings")
            )
    for path in paths:
        there = columns_of(path)
        for ours, theirs in columns.items():
            if theirs not in there:
                raise SourceError(
                    f"{path}: --columns={ours}={theirs}: no such column{nearest(theirs, there)}; the file has "
                    f"{', '.join(sorted(there))}"
                )
    for needed in ("image", "text"):
        if needed not in columns:
            raise SourceError(
                f"{paths[0]}: which column is the {needed}? Say so with --columns={needed}=NAME; the file has "
                f"{', '.join(sorted(columns_of(paths[0])))}"
            )


AGIQA = Dataset(
    name="agiqa-3k",
    title="AGIQA-3K",
    layouts=(Layout("*.csv", frozenset({"name", "prompt", "mos_quality"}), _read_agiqa),),
    counts={"test": 2982},
    gives="ratings: every mos_NAME as NAME (quality, align)",
    origin="Li et al., 2023; github.com/lcysyzxdxc/AGIQA-3k-Database",
)
TABLE = Dataset(
    name="table",
    title="a table of your own",
    layouts=tuple(
        Layout(pattern, frozenset(), _read_table, by_split=True)
        for pattern in ("*.jsonl", "*.csv", "*.tsv", "*.parquet")
    ),
    split="all",
    gives="what --columns=RECORD=FILE,... says, numbers as they are; columns named as a record's need no mention",
    origin="you",
)
