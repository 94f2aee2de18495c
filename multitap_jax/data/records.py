"""Records: what to score, and what people said about it (DESIGN 3.1).

One JSON line, CSV row or Parquet row each:
`{"id", "image": path or list, "text", "request"?, "score"?, "ratings": {objective: number or null}?, "group"?}`. A bad
record neither stops the run nor vanishes: it becomes a `Rejected` with its line and reason. Nothing is evaluated,
unpickled or fetched.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from multitap_jax.data.decode import ImageError
from multitap_jax.data.fields import (
    BadRecord,
    ImagePaths,
    SeenIds,
    from_table,
    image_reason,
    read_number,
    read_optional_string,
    read_ratings,
    read_string,
)
from multitap_jax.data.groups import Links
from multitap_jax.data.tables import (
    RecordsError,
    Row,
    Unreadable,
    find_records_file,
    nearest,
    published_as,
    read_rows,
    unit_of,
)

__all__ = [
    "Record",
    "RecordSet",
    "RecordsError",
    "Rejected",
    "check_rejected_share",
    "group_keys",
    "iter_records",
    "load_records",
    "reject_image",
    "split_by_group",
    "write_rejected",
]

COLUMNS = ("id", "image", "text", "request", "score", "ratings", "group")
_SHOWN = 5  # rejected records in a message
_MOST = 0.5  # of the records rejected, above which to accept the loss is no advice


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One image-text pair (or images-text). `line` is where it stands in its file, from 1; `images` are usable paths.

    `score` and `ratings` are in the units of the file; a rating is None where nobody gave one.
    """

    id: str
    images: tuple[Path, ...]
    text: str
    request: str | None
    score: float | None
    ratings: dict[str, float | None]
    group: str | None
    line: int

    def target(self, name: str) -> float | None:
        """The number called "score" or "ratings.NAME"; None where the record has none."""
        return self.score if name == "score" else self.ratings.get(name.removeprefix("ratings."))


@dataclasses.dataclass(frozen=True, slots=True)
class Rejected:
    """A line that gave no usable record; `id` is None where the line has no readable id."""

    line: int
    id: str | None
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class RecordSet:
    """What a file holds.

    Attributes:
      records: usable records, in input order.
      rejected: the others, in input order.
      fingerprint: sha256 over the content of `records` in order (images by path relative to the file): the same for
        the same records in any format and folder.
      objectives: names of all ratings, in first-seen order.
      unit: what `line` counts: a "line" of text, or a "row" of Parquet.
    """

    records: list[Record]
    rejected: list[Rejected]
    fingerprint: str
    objectives: tuple[str, ...]
    unit: str = "line"

    def summary(self) -> str:
        """A few lines for people: counts, objectives, the first rejections."""
        images = len({path for record in self.records for path in record.images})
        scored = sum(record.score is not None for record in self.records)
        lines = [f"{len(self.records):,} records, {images:,} image files, {scored:,} with a score"]
        for name in self.objectives:
            rated = sum(record.ratings.get(name) is not None for record in self.records)
            lines.append(f"  ratings.{name}: {rated:,}")
        if self.rejected:
            lines += [f"{len(self.rejected):,} rejected:", *_first_reasons(self.rejected, self.unit)]
        return "\n".join(lines)


def load_records(
    path: str | Path,
    *,
    allow_outside_root: bool = False,
    max_rejected: float = 0.01,
    rejected_path: Path | None = None,
    check_images: bool = False,
    require: str | None = None,
    need_images: bool = True,
    flags: str = "--",
) -> RecordSet:
    """Reads a records file, or the only one in a folder, into memory. The arguments of `iter_records`, and:

    Args:
      max_rejected: share of rejected lines above which RecordsError is raised, in [0, 1].
      rejected_path: where to write the rejected lines as JSON lines, before any error about their number.

    Raises:
      RecordsError: no file, a wrong header, no usable record, or more than `max_rejected` of the lines rejected.
    """
    file = find_records_file(path)
    records: list[Record] = []
    rejected: list[Rejected] = []
    for item in iter_records(
        file,
        allow_outside_root=allow_outside_root,
        check_images=check_images,
        require=require,
        need_images=need_images,
        flags=flags,
    ):
        if isinstance(item, Record):
            records.append(item)
        else:
            rejected.append(item)
    if rejected_path is not None:
        write_rejected(rejected_path, rejected)
    check_rejected_share(file, len(records), rejected, max_rejected, flags=flags)
    objectives = tuple(dict.fromkeys(name for record in records for name in record.ratings))
    return RecordSet(records, rejected, _fingerprint(records, file.parent), objectives, unit_of(file))


def iter_records(
    path: str | Path,
    *,
    allow_outside_root: bool = False,
    check_images: bool = False,
    require: str | None = None,
    need_images: bool = True,
    flags: str = "--",
) -> Iterator[Record | Rejected]:
    """One Record or Rejected for each line of the file, in order; only ids are remembered, in at most 24 bytes each.

    Args:
      path: a .jsonl, .csv or .parquet file, or a folder holding one of them.
      allow_outside_root: let image paths be absolute or leave the folder of the file.
      check_images: decode every picture now; False only looks whether the file is there.
      require: "score" or "ratings.NAME": records without this number are rejected.
      need_images: False accepts records whose pictures are absent (to evaluate scores that exist already).
      flags: what flags begin with in the remedies: `train` has its settings as --config.data.NAME.

    Raises:
      RecordsError: at once for a missing file or wrong header; while reading for damaged Parquet.
    """
    if require is not None and require != "score" and not (require.startswith("ratings.") and require[8:]):
        raise RecordsError(f"require={require!r}: expected 'score' or 'ratings.NAME'")
    file = find_records_file(path)
    rows = read_rows(file, _check_column)
    images = ImagePaths(
        file.parent, allow_outside_root=allow_outside_root, decode=check_images, need=need_images, flags=flags
    )
    parser = RecordParser(file, images, require, flags)
    return (parser.parse(line, row) for line, row in rows)


def check_rejected_share(
    path: Path,
    good: int,
    rejected: Sequence[Rejected],
    max_rejected: float,
    *,
    flags: str = "--",
    unit: str | None = None,
    listed: Path | None = None,
) -> None:
    """Raises RecordsError where more than `max_rejected` of the lines are rejected, or none is left.

    `flags` is as in `iter_records`; `unit` is what `Rejected.line` counts, by default what the file has; `listed` is a
    file that has them all.
    """
    more = [f"  all of them: {listed}"] if listed is not None and len(rejected) > _SHOWN else []
    reasons = "\n".join([*_first_reasons(rejected, unit or unit_of(path)), *more])
    total = good + len(rejected)
    if total == 0:
        raise RecordsError(f"{path}: no records in the file")
    if len(rejected) > max_rejected * total:
        share = len(rejected) / total
        raise RecordsError(
            f"{path}: {len(rejected):,} of {total:,} records rejected ({share:.1%}, allowed {max_rejected:.1%}):\n"
            + reasons
            + (
                f"\nMend the records, or accept the loss with {flags}max_rejected={math.ceil(share * 100) / 100:g}"
                if share <= _MOST
                else "\nSo many have one cause, as a rule; mend it, and begin with the first of these lines"
                + ("" if unit else published_as(path))  # who has a unit of its own reads no records
            )
        )
    if good == 0:
        raise RecordsError(f"{path}: no usable record:\n{reasons}")


def reject_image(record: Record, error: ImageError) -> Rejected:
    """The Rejected of a record whose picture failed to decode, with the same words as `check_images` would use."""
    return Rejected(record.line, record.id, image_reason(error))


def write_rejected(path: Path, rejected: Iterable[Rejected]) -> None:
    """Writes rejected lines as JSON lines {"line", "id", "reason"}; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for item in rejected:
            file.write(json.dumps(dataclasses.asdict(item)) + "\n")
    os.replace(partial, path)


def read_rejected(path: Path) -> list[Rejected]:
    """What `write_rejected` wrote, without a last line that a kill tore; nothing where there is no file."""
    if not path.is_file():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [Rejected(**json.loads(line)) for line in whole.splitlines()]


class RecordParser:
    """Turns rows into records; remembers the ids seen."""

    def __init__(self, file: Path, images: ImagePaths, require: str | None, flags: str):
        self.is_json = file.suffix == ".jsonl"
        self.images, self.require, self.flags = images, require, flags
        self.seen = SeenIds()

    def parse(self, line: int, row: Row) -> Record | Rejected:
        name = None
        try:
            if isinstance(row, Unreadable):
                raise BadRecord(row.reason)
            name = read_string(row, "id", "a record needs an id that no other record has")
            if not self.seen.add(name):
                raise BadRecord(f"duplicate id {name!r}: an earlier record has it")
            return self._record(name, line, row if self.is_json else from_table(row))
        except BadRecord as bad:
            return Rejected(line, name, str(bad))

    def _record(self, name: str, line: int, row: dict[str, Any]) -> Record:
        for column in row:
            if column not in COLUMNS:
                raise BadRecord(f"unknown column {column!r}{nearest(column, COLUMNS)}")
        record = Record(
            id=name,
            text=read_string(row, "text", "there is nothing to score"),
            request=read_optional_string(row, "request"),
            score=read_number(row.get("score"), "score"),
            ratings=read_ratings(row.get("ratings")),
            group=read_optional_string(row, "group"),
            images=self.images(row.get("image")),
            line=line,
        )
        if self.require is not None and record.target(self.require) is None:
            raise BadRecord(f"{self.require} is missing, and this run needs it; {self._other_target(record)}")
        return record

    def _other_target(self, record: Record) -> str:
        names = [f"ratings.{name}" for name, value in record.ratings.items() if value is not None]
        if record.score is not None:
            names.insert(0, "score")
        if not names:
            return f"add it, or name another number with {self.flags}target=ratings.NAME"
        return f"the record has {', '.join(names)}: choose one with {self.flags}target={names[0]}"


def _check_column(name: str) -> str | None:
    """For the header of CSV and Parquet: the reason why a column is not one of a record's."""
    if name in COLUMNS or (name.startswith("ratings.") and len(name) > len("ratings.")):
        return None
    return f"unknown column {name!r}{nearest(name, COLUMNS)} (columns: {', '.join(COLUMNS)}, ratings.NAME)"


def _first_reasons(rejected: Sequence[Rejected], unit: str) -> list[str]:
    lines = [f"  {unit} {item.line}: {item.reason}" for item in rejected[:_SHOWN]]
    return lines + ([f"  and {len(rejected) - _SHOWN:,} more"] if len(rejected) > _SHOWN else [])


def _fingerprint(records: list[Record], root: Path) -> str:
    digest = hashlib.sha256()
    for record in records:
        ratings = sorted((name, value) for name, value in record.ratings.items() if value is not None)
        images = [Path(os.path.relpath(path, root)).as_posix() for path in record.images]
        content = [record.id, images, record.text, record.request, record.score, ratings, record.group]
        digest.update(json.dumps(content).encode() + b"\n")
    return digest.hexdigest()


def group_keys(records: Sequence[Record]) -> list[str]:
    """One key for each record; records linked by a common group or a common image file, directly or over others,
    have the same key.

    Keys hold no absolute path: they do not change when the folder moves. Copies of a picture under two names count as
    two pictures.
    """
    real = {path: os.path.realpath(path) for record in records for path in record.images}
    base = os.path.commonpath([os.path.dirname(path) for path in real.values()]) if real else ""
    names = {path: "image:" + os.path.relpath(where, base) for path, where in real.items()}
    links, labels = Links(), []
    for record in records:
        own = [f"group:{record.group}"] * (record.group is not None) + [names[path] for path in record.images]
        labels.append(own[0])
        links.link(own)
    return [links.root(label) for label in labels]


def split_by_group(records: Sequence[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(train, held out), each in input order: about `share` of the groups of `group_keys` are held out.

    A pure function of the keys and the seed: adding records does not move the groups that are not linked to them.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share {share!r} of held-out groups: expected a number from 0 to 1")
    train: list[Record] = []
    held_out: list[Record] = []
    for record, key in zip(records, group_keys(records), strict=True):
        digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
        chosen = int.from_bytes(digest, "big") < share * 2**64
        (held_out if chosen else train).append(record)
    return train, held_out
