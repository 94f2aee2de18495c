"""Public files -> a folder of records: records.jsonl, images/, rejected.jsonl, and dataset.json that says what it is.

Every record passes the checks of `data/records.py` before it is written, so whatever reads records reads these. Until
dataset.json says "complete", the folder is none; the same command makes it again and finds the pictures it has written.
"""

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from multitap_jax.data.fields import BadRecord, ImagePaths
from multitap_jax.data.records import Record, RecordParser, Rejected, check_rejected_share, write_rejected
from multitap_jax.data.sources.base import Cursor, Dataset, Draft, Item, Layout, Request, SourceError
from multitap_jax.data.sources.files import ALL, SPLITS, find
from multitap_jax.data.sources.output import DATASET_NAME, RECORDS_NAME, Output
from multitap_jax.data.sources.pictures import Pictures
from multitap_jax.data.sources.registry import DATASETS, dataset_named
from multitap_jax.data.tables import REJECTED_NAME, RecordsError, some
from multitap_jax.files import file_hash

FORMAT_VERSION = 1
NO_IMAGES = "none"


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What became of the public files.

    Attributes:
      folder: where the records are.
      dataset, split: what they are of.
      read, written, rejected: rows of the public files that gave drafts or none; records; rows that gave no record.
      pictures: different pictures; with_pictures: whether they lie under images/.
      reasons: the reasons of the rejected, numbers and names left out, with how often each came.
      missing: of the numbers that some of the records have, how many records lack each: "score" or "ratings.NAME".
    """

    folder: Path
    dataset: str
    split: str
    read: int
    written: int
    rejected: int
    pictures: int
    with_pictures: bool
    reasons: Mapping[str, int]
    missing: Mapping[str, int]

    def __str__(self) -> str:
        pictures = f"{self.pictures:,} pictures" + ("" if self.with_pictures else " named, none taken")
        lines = [
            f"{self.folder}: {self.dataset}, split {self.split}: {self.read:,} read, {self.written:,} written, "
            f"{self.rejected:,} rejected; {pictures}"
        ]
        lines += [f"  {count:,} of {self.written:,} records have no {name}" for name, count in self.missing.items()]
        return "\n".join(lines + [f"  {count:,} rejected: {reason}" for reason, count in self.reasons.items()])


def convert(
    dataset: str,
    source: str | Path,
    output: str | Path,
    *,
    images: str | Path | None = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    max_rejected: float = 0.01,
    allow_subset: bool = False,
    advance: Callable[[int], None] = lambda rows: None,
) -> Conversion:
    """Makes the public files of a dataset into a folder of records.

    Args:
      dataset: a name of `registry.DATASETS`.
      source: the folder that holds what was downloaded, or one file.
      output: folder to write; one that holds something else is refused.
      images: folder that the pictures' names are looked up in; None looks beside the annotations; "none" takes no
        pictures (to evaluate scores that exist already).
      split: train, validation, test or all; None takes the dataset's usual one.
      columns: for "table": the record's columns -> those of the file.
      max_rejected: share of rows without a record above which the conversion fails.
      allow_subset: accept another number of records than was published.
      advance: told how many more rows were read.

    Raises:
      SourceError: other files than asked for, wrong columns or counts, missing pictures; says what to do.
    """
    known, source, output = dataset_named(dataset), Path(source), Path(output)
    split = split or known.split
    request = Request(split, dict(columns or {}))
    if request.columns and known.name != "table":
        raise SourceError(f"--columns is for --dataset=table; {known.title} has the columns it was published with")
    layout, files = find(source, known, split, DATASETS.values(), apart=output)
    roots = [] if images == NO_IMAGES else [Path(images)] if images else _roots(source, files)
    if absent := [str(root) for root in roots if not root.is_dir()]:
        raise SourceError(f"--images={absent[0]}: no such folder; give the folder of the pictures, or --images=none")
    with Output.opened(output, known, split) as opened:
        pictures = Pictures(output, roots)
        items = _placed(known, layout.read(files, request), request.at, several=len(files) > 1)
        written, missing, rejected = _write(known, split, items, pictures, opened.partial, advance)
        write_rejected(output / REJECTED_NAME, rejected)
        _check(known, request, source, pictures, written, rejected, max_rejected, allow_subset)
        note = _note(known, request, pictures, written, len(rejected)) | {"missing": missing}
        opened.finish(note | {"sources": [_described(path, source) for path in _with_beside(layout, files)]})
    return Conversion(
        folder=output,
        dataset=known.title,
        split=split,
        read=written + len(rejected),
        written=written,
        rejected=len(rejected),
        pictures=pictures.files,
        with_pictures=bool(roots),
        reasons=dict(Counter(_kind(item.reason) for item in rejected).most_common(5)),
        missing=missing,
    )


def read_dataset_note(folder: str | Path) -> dict[str, Any] | None:
    """dataset.json of a folder, or of the folder of a file; None where there is none, or one of somebody else.

    Raises:
      SourceError: damaged, or of a conversion that did not end.
    """
    path = Path(folder) if Path(folder).is_dir() else Path(folder).parent
    path /= DATASET_NAME
    if not path.is_file():
        return None
    try:
        note = json.loads(path.read_bytes())
    except ValueError as error:
        raise SourceError(f"{path}: damaged ({error}); run `multitap convert` again") from error
    if not (isinstance(note, dict) and {"dataset", "split", "complete"} <= note.keys()):
        return None
    if not note["complete"]:
        raise SourceError(f"{path}: the conversion did not end; run the same `multitap convert` again")
    return note


def _roots(source: Path, files: Sequence[Path]) -> list[Path]:
    """Where pictures are usually put: in the folder that was given, or beside the annotations."""
    top = source if source.is_dir() else source.parent
    inside = [path for path in (top / "images", *(file.parent for file in files)) if path.is_dir()]
    return list(dict.fromkeys([top, *inside]))


def _write(
    dataset: Dataset,
    split: str,
    items: Iterable[tuple[int, str, Item]],
    pictures: Pictures,
    partial: Path,
    advance: Callable[[int], None],
) -> tuple[int, dict[str, int], list[Rejected]]:
    """Writes the records to `partial`; returns how many there are, how many lack which number, and the rows without."""
    output = pictures.output
    paths = ImagePaths(output, allow_outside_root=False, decode=False, need=bool(pictures.roots))
    parser = RecordParser(output / RECORDS_NAME, paths, None, "--")
    apart = any(layout.by_split for layout in dataset.layouts)
    prefix = "" if dataset.name == "table" else dataset.name + (f"/{split}/" if apart else "/")
    written, rejected, numbers = 0, [], Counter[str]()
    with partial.open("w", encoding="utf-8") as file:
        for line, file_name, item in items:
            advance(1)
            row = _row(item, prefix, pictures) if isinstance(item, Draft) else item.reason
            found = parser.parse(line, row) if isinstance(row, dict) else Rejected(line, item.id, row)
            if isinstance(found, Record):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                written += 1
                numbers.update(_numbers(found))
            else:
                rejected.append(dataclasses.replace(found, reason=file_name + found.reason))
        file.flush()
        os.fsync(file.fileno())
    return written, {name: written - count for name, count in numbers.items() if count < written}, rejected


def _numbers(record: Record) -> Iterator[str]:
    """Names of the numbers that a record has."""
    if record.score is not None:
        yield "score"
    yield from (f"ratings.{name}" for name, value in record.ratings.items() if value is not None)


def _placed(dataset: Dataset, items: Iterable[Item], at: Cursor, *, several: bool) -> Iterator[tuple[int, str, Item]]:
    """Items with where they are from: the number of their row, line or entry (where nobody counts those, their own),
    and, where there are several, the name of their file as it stands before a reason.

    Raises SourceError for a file whose rows are not of the published form.
    """
    count = 0
    try:
        for count, item in enumerate(items, 1):
            yield at.number or count, f"{at.file.name}: " if several and at.file else "", item
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, RecordsError):
            raise
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        place = f"{at.file}: {at.unit} {at.number:,}" if at.file else f"what follows record {count:,}"
        raise SourceError(
            f"{dataset.title}: {place} is not of the published form ({what}); is the file damaged, or of another "
            "version?"
        ) from error


def _row(draft: Draft, prefix: str, pictures: Pictures) -> dict[str, Any] | str:
    """The record as JSON has it, or why its picture cannot be had."""
    try:
        image = pictures(draft.image)
    except BadRecord as bad:
        return str(bad)
    group = None if draft.group in (None, "") else f"{prefix}{draft.group}"
    values = {"request": draft.request, "score": draft.score, "ratings": dict(draft.ratings), "group": group}
    row = {"id": prefix + draft.id, "image": image, "text": draft.text}
    return row | {name: value for name, value in values.items() if value not in (None, {}, "")}


def _check(
    dataset: Dataset,
    request: Request,
    source: Path,
    pictures: Pictures,
    written: int,
    rejected: Sequence[Rejected],
    max_rejected: float,
    allow_subset: bool,
) -> None:
    """Raises SourceError or RecordsError for missing pictures, too many rejected rows, or another number of records."""
    if pictures.missing and len(rejected) > max_rejected * (written + len(rejected)):
        names = list(pictures.missing)
        raise SourceError(
            f"{len(names):,} of {len(names) + pictures.files:,} pictures of {dataset.title} are missing: "
            f"{some(names)}. Looked in {', '.join(map(str, pictures.roots))}. Give their folder as --images=FOLDER; "
            "--images=none converts without pictures, to evaluate scores that exist already"
        )
    check_rejected_share(
        source, written, rejected, max_rejected, unit=request.at.unit, listed=pictures.output / REJECTED_NAME
    )
    split = request.split
    known = dataset.counts if dataset.counts.keys() == SPLITS.keys() else {}
    published = dataset.counts.get(split) if split != ALL else sum(known.values()) or None
    if published is not None and written + len(rejected) != published and not allow_subset:
        raise SourceError(
            f"{source}: {written + len(rejected):,} records of {dataset.title} ({split}), but {published:,} were "
            "published: files are missing, or are of another version. --allow_subset=True takes what is there"
        )


def _note(dataset: Dataset, request: Request, pictures: Pictures, written: int, rejected: int) -> dict[str, Any]:
    """The content of dataset.json, but for the source files."""
    return {
        "format_version": FORMAT_VERSION,
        "dataset": dataset.name,
        "split": request.split,
        "complete": True,
        "title": dataset.title,
        "origin": dataset.origin,
        "gives": dataset.gives,
        "protocols": list(dataset.protocols),
        "records": written,
        "rejected": rejected,
        "published": dataset.counts.get(request.split),
        "pictures": pictures.files if pictures.roots else NO_IMAGES,
        "columns": dict(request.columns),
    }


def _with_beside(layout: Layout, files: Sequence[Path]) -> Iterator[Path]:
    yield from files
    yield from (files[0].with_name(name) for name in layout.beside)


def _described(path: Path, source: Path) -> dict[str, Any]:
    name = path.name if source.is_file() else path.relative_to(source).as_posix()
    return {"file": name, "bytes": path.stat().st_size, "sha256": file_hash(path)}


def _kind(reason: str) -> str:
    """A reason without what differs from row to row: quoted words, paths and numbers."""
    return re.sub(r"'[^']*'|\S*[/\d]\S*", "...", reason)
