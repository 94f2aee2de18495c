"""Streams records through a frozen model: into an embedding store, or straight into whatever consumes batches."""

import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from multitap_jax.data.groups import Links
from multitap_jax.data.records import (
    Record,
    Rejected,
    check_rejected_share,
    iter_records,
    read_rejected,
    write_rejected,
)
from multitap_jax.data.seen import FITTED, Print, Seen, print_of, to_bytes
from multitap_jax.data.stream import Pair
from multitap_jax.data.tables import find_records_file
from multitap_jax.files import canonical_hash, file_hash, sole_writer, write_atomic
from multitap_jax.parallel.distributed import divided, from_main, is_main_process
from multitap_jax.scoring.journal import input_fingerprint
from multitap_jax.scoring.occupancy import Occupancy
from multitap_jax.scoring.parts import Block, Parts, Work
from multitap_jax.scoring.progress import progress_bar
from multitap_jax.scoring.readahead import with_results
from multitap_jax.scoring.scorer import Scorer
from multitap_jax.stage2.store import SEEN, EmbeddingStore
from multitap_jax.stage2.store_writer import EmbeddingWriter

WINDOW = 1024
JUDGED_FROM = 1000  # lines from which a high share of rejected ones stops the run before its end
REJECTED = "rejected.jsonl"
PARTS = ".parts"


class Embedded(NamedTuple):
    """A window's usable records: embeddings float32[n, H], ratings float32[n, T] (NaN where missing), and the rest.

    `prints` are those of the records with a rating (`Linked.print_of`).
    """

    ids: list[str]
    embeddings: np.ndarray
    labels: np.ndarray
    groups: list[str]
    rejected: list[Rejected]
    prints: list[Print]


@dataclass(frozen=True)
class EmbedSummary:
    """What an embed job did."""

    rows: int
    rejected: int
    folder: Path
    idle: float | None = None  # share of the time in which this process's device waited for the host

    def __str__(self) -> str:
        waited = "" if self.idle is None else f"; the device waited {self.idle:.0%} of the time for the host"
        return f"{self.rows:,} embeddings in {self.folder}; {self.rejected:,} records rejected{waited}"


def scan(path: str | Path, *, allow_outside_root: bool = False) -> tuple[int, tuple[str, ...]]:
    """Lines of a records file and the objectives that at least one of its records is rated on, in first-seen order."""
    names: dict[str, None] = {}
    lines = 0
    for item in iter_records(path, allow_outside_root=allow_outside_root):
        lines += 1
        if isinstance(item, Record):
            names.update({name: None for name, value in item.ratings.items() if value is not None})
    return lines, tuple(names)


class Linked:
    """The groups and the pictures of a records file; `linked(record)` is the group of one of its records.

    Args:
      links: of the labels of all records.
      pictures: label of each picture's file: "image:" and half of its sha256, or "unreadable:" and its name.
    """

    def __init__(self, links: Links, pictures: Mapping[Path, str]):
        self._links, self._pictures = links, pictures

    def __call__(self, record: Record) -> str:
        return self._links.root(_labels(record, self._pictures)[0])

    def print_of(self, record: Record) -> Print | None:
        """What a record that a head is fitted on is known by; None for one that has no rating."""
        if all(value is None for value in record.ratings.values()):
            return None
        labels = [self._pictures[file].partition(":") for file in record.images]
        return print_of(record, [name if kind == "image" else None for kind, _, name in labels])


def link_records(
    path: str | Path, *, allow_outside_root: bool = False, advance: Callable[[int], None] = lambda lines: None
) -> Linked:
    """Reads all records and pictures of a file once; the result names the group of each of its records. Collective.

    Records with a common `group` or picture, directly or over others, have one group and stand in one cross-validation
    fold. Pictures are told by their bytes, so copies under other names are one. A group is named by the smallest of
    what it has in common, without a path, wherever the folder stands.

    Args:
      path: the records file.
      allow_outside_root: as in `iter_records`.
      advance: told how many more lines were read.
    """
    links, pictures = Links(), dict[Path, str]()
    items = iter_records(path, allow_outside_root=allow_outside_root)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="hash") as pool:
        while window := list(islice(items, WINDOW * jax.process_count())):
            records = [item for item in window if isinstance(item, Record)]
            new = [file for file in dict.fromkeys(f for r in records for f in r.images) if file not in pictures]
            labels = divided(new, lambda files: list(pool.map(_picture_label, files)))
            pictures.update(zip(new, labels, strict=True))
            for record in records:
                links.link(_labels(record, pictures))
            advance(len(window))
    return Linked(links, pictures)


def _labels(record: Record, pictures: Mapping[Path, str]) -> list[str]:
    return [f"group:{record.group}"] * (record.group is not None) + [pictures[file] for file in record.images]


def _picture_label(file: Path) -> str:
    try:
        return f"image:{file_hash(file)[:32]}"
    except OSError:  # its records will be rejected when they are embedded
        return f"unreadable:{file.name}"


def embed_stream(
    scorer: Scorer,
    lists: Iterable[Sequence[Record | Rejected]],
    objectives: tuple[str, ...],
    linked: Linked,
    occupancy: Occupancy | None = None,
) -> Iterator[Embedded]:
    """Embeds list by list, in order; records that cannot be embedded come back as rejected.

    `linked` comes from `link_records`; `lists` and `occupancy` are as in `Scorer.embed_stream`.
    """
    pairs = lambda items: [Pair.of(item) for item in items if isinstance(item, Record)]
    embed = lambda asked: scorer.embed_stream(map(pairs, asked), occupancy=occupancy)
    for items, found in with_results(lists, embed):
        records = [item for item in items if isinstance(item, Record)]
        rejected = [item for item in items if isinstance(item, Rejected)]
        good = [i for i, error in enumerate(found.errors) if error is None]
        rejected += [Rejected(records[i].line, records[i].id, e) for i, e in enumerate(found.errors) if e is not None]
        ratings = [[records[i].ratings.get(name) for name in objectives] for i in good]
        labels = [[np.nan if value is None else value for value in row] for row in ratings]
        yield Embedded(
            [records[i].id for i in good],
            found.values[good],
            np.asarray(labels, np.float32).reshape(len(good), len(objectives)),
            [linked(records[i]) for i in good],
            sorted(rejected, key=lambda r: r.line),
            [one for i in good if (one := linked.print_of(records[i])) is not None],
        )


def embed_records(
    scorer: Scorer,
    path: str | Path,
    folder: str | Path,
    *,
    shard_rows: int = 4096,
    max_rejected: float = 0.01,
    allow_outside_root: bool = False,
    show_progress: bool = False,
) -> EmbedSummary:
    """Writes the embeddings of a records file to `folder`; resumes after the last finished shard.

    A shard holds the usable ones of `shard_rows` records. Of several processes each writes its share of the shards, and
    the first enters them into the manifest, in order; any number of processes may go on with the work of any other.

    Raises:
      RecordsError: for an unusable file, or when more than `max_rejected` of its lines are.
      StoreError: if `folder` holds embeddings of another model, file or set of objectives.
      FolderInUseError: if another process is writing into `folder`.
    """
    file, folder = find_records_file(path), Path(folder)
    lines, objectives = scan(file, allow_outside_root=allow_outside_root)
    identity = {
        "input": input_fingerprint(file),
        "settings": {**scorer.settings, "truncate": scorer.truncate},
        "outside_root": allow_outside_root,
        "groups": "by group and picture",
    }
    settings = {
        "hidden_size": scorer.hidden_size,
        "objectives": objectives,
        "model_hash": scorer.artefact.embedding_hash,
        "fingerprint": json.dumps(identity, sort_keys=True),
        "shard_rows": shard_rows,
    }
    parts: Parts[Record | Rejected] = Parts(folder / PARTS, canonical_hash(settings), shard_rows)
    job = _Job(scorer, file, folder, settings, objectives, allow_outside_root, parts)
    progress = functools.partial(progress_bar, lines, enabled=show_progress and is_main_process())
    verdict = None
    if is_main_process():
        judge = lambda rows, rejected: check_rejected_share(file, rows, rejected, max_rejected)
        with sole_writer(folder):
            rows, found = job.lead(progress, judge)
            verdict = [rows, [asdict(item) for item in found]]
    elif (start := parts.begin()) is not None:
        job.follow(start, progress)
    rows, found = from_main(verdict)
    rejected = [Rejected(**item) for item in found]
    # After the last shard is on disk: what was computed stays, whatever the verdict.
    check_rejected_share(file, rows, rejected, max_rejected)
    return EmbedSummary(rows, len(rejected), folder, job.occupancy.close().idle_share)


@dataclass
class _Job:
    """What all processes of an embed job know, and what the first and the others do with it."""

    scorer: Scorer
    file: Path
    folder: Path
    settings: Mapping[str, Any]
    objectives: tuple[str, ...]
    allow_outside_root: bool
    parts: Parts[Record | Rejected]
    occupancy: Occupancy = field(default_factory=Occupancy)

    def lead(
        self, progress: Callable[..., Any], judge: Callable[[int, list[Rejected]], None]
    ) -> tuple[int, list[Rejected]]:
        """Begins or goes on with the store, does its share, enters all shards; returns rows and rejected records."""
        writer = EmbeddingWriter.open_or_resume(self.folder, **self.settings)
        rejected = read_rejected(self.folder / REJECTED)
        if writer.complete:
            self.parts.begin()
            return writer.rows_done, rejected
        with writer:
            items = self._items()
            last = EmbeddingStore(self.folder, allow_partial=True).ids[-1] if writer.rows_done else None
            done = _skip_to(items, last)
            rejected = [r for r in rejected if r.line <= done.line]
            self.parts.begin(done.items)
            linked = self._linked(progress)
            work = self._work(writer, linked)
            with progress(done.items, label="embedding") as advance:
                for block, result in self.parts.in_order(items, done.items, work, self._whole):
                    if result["rejected"]:
                        rejected += [Rejected(**item) for item in result["rejected"]]
                        write_rejected(self.folder / REJECTED, rejected)
                    writer.adopt(result["shard"])
                    advance(len(block.items))
                    if writer.rows_done + len(rejected) >= JUDGED_FROM:
                        judge(writer.rows_done, rejected)
            write_rejected(self.folder / REJECTED, rejected)
            write_atomic(self.folder / SEEN, to_bytes({FITTED: self._seen(linked, rejected)}))
        return writer.rows_done, rejected

    def follow(self, start: int, progress: Callable[..., Any]) -> None:
        """Does the share of another process than the first."""
        writer = EmbeddingWriter.open_or_resume(self.folder, **self.settings)
        work = self._work(writer, self._linked(progress))
        self.parts.follow(islice(self._items(), start, None), start, work, self._whole)

    def _items(self) -> Iterator[Record | Rejected]:
        return iter_records(self.file, allow_outside_root=self.allow_outside_root)

    def _linked(self, progress: Callable[..., Any]) -> Linked:
        """Collective, for all processes learn of all pictures."""
        with progress(label="linking records", unit="records") as advance:
            return link_records(self.file, allow_outside_root=self.allow_outside_root, advance=advance)

    def _seen(self, linked: Linked, rejected: Sequence[Rejected]) -> Seen:
        """What a head fitted on the store will have seen."""
        lost = {item.line for item in rejected}
        stored = (item for item in self._items() if isinstance(item, Record) and item.line not in lost)
        return Seen.of(one for record in stored if (one := linked.print_of(record)) is not None)

    def _work(self, writer: EmbeddingWriter, linked: Linked) -> Work[Record | Rejected]:
        """What makes shards of blocks."""
        self.parts.folder.mkdir(exist_ok=True)

        def work(blocks: Iterable[Block[Record | Rejected]]) -> Iterator[dict[str, Any]]:
            embed = lambda asked: embed_stream(
                self.scorer, (block.items for block in asked), self.objectives, linked, self.occupancy
            )
            for block, part in with_results(blocks, embed):
                path = str(self._shard(block).relative_to(self.folder))
                shard = writer.write_apart(path, part.ids, part.embeddings, part.labels, part.groups)
                yield {"shard": shard, "rejected": [asdict(item) for item in part.rejected]}

        return work

    def _shard(self, block: Block[Record | Rejected]) -> Path:
        return self.parts.path(block, ".safetensors")

    def _whole(self, block: Block[Record | Rejected]) -> bool:
        return self._shard(block).is_file()


class _Done(NamedTuple):
    items: int
    line: int


def _skip_to(items: Iterator[Record | Rejected], last_id: str | None) -> _Done:
    """Consumes `items` up to the record stored last; its place in the file."""
    if last_id is None:
        return _Done(0, 0)
    for count, item in enumerate(items, start=1):
        if isinstance(item, Record) and item.id == last_id:
            return _Done(count, item.line)
    raise ValueError(f"record {last_id!r}, embedded before, is no longer in the input; start in a new folder")
