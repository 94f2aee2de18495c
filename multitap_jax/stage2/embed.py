"""Streams records through a frozen model: into an embedding store, or straight into whatever consumes batches."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from multitap_jax.data.records import (
    Record,
    Rejected,
    check_rejected_share,
    iter_records,
    read_rejected,
    write_rejected,
)
from multitap_jax.data.tables import find_records_file
from multitap_jax.files import sole_writer
from multitap_jax.scoring.journal import input_fingerprint
from multitap_jax.scoring.progress import progress_bar
from multitap_jax.scoring.scorer import Scorer
from multitap_jax.stage2.store import EmbeddingStore, EmbeddingWriter

WINDOW = 1024
JUDGED_FROM = 1000  # lines from which a high share of rejected ones stops the run before its end
REJECTED = "rejected.jsonl"


class Embedded(NamedTuple):
    """A window's usable records: embeddings float32[n, H], ratings float32[n, T] (NaN where missing), and the rest."""

    ids: list[str]
    embeddings: np.ndarray
    labels: np.ndarray
    groups: list[str]
    rejected: list[Rejected]


@dataclass(frozen=True)
class EmbedSummary:
    """What an embed job did."""

    rows: int
    rejected: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.rows:,} embeddings in {self.folder}; {self.rejected:,} records rejected"


def scan(path: str | Path, *, allow_outside_root: bool = False) -> tuple[int, tuple[str, ...]]:
    """Lines of a records file and the objectives that at least one of its records is rated on, in first-seen order."""
    names: dict[str, None] = {}
    lines = 0
    for item in iter_records(path, allow_outside_root=allow_outside_root):
        lines += 1
        if isinstance(item, Record):
            names.update({name: None for name, value in item.ratings.items() if value is not None})
    return lines, tuple(names)


def embed_stream(scorer: Scorer, items: Iterator[Record | Rejected], objectives: tuple[str, ...]) -> Iterator[Embedded]:
    """Embeds records window by window, in order; those that cannot be embedded come back as rejected.

    Records of one `group`, or else with the same first picture under any name, stand in one cross-validation fold.
    """
    while window := list(islice(items, WINDOW)):
        records = [item for item in window if isinstance(item, Record)]
        rejected = [item for item in window if isinstance(item, Rejected)]
        found = scorer.embed(
            images=[list(r.images) for r in records],
            texts=[r.text for r in records],
            requests=[r.request for r in records],
        )
        good = [i for i, error in enumerate(found.errors) if error is None]
        rejected += [Rejected(records[i].line, records[i].id, e) for i, e in enumerate(found.errors) if e is not None]
        ratings = [[records[i].ratings.get(name) for name in objectives] for i in good]
        labels = [[np.nan if value is None else value for value in row] for row in ratings]
        yield Embedded(
            [records[i].id for i in good],
            found.values[good],
            np.asarray(labels, np.float32).reshape(len(good), len(objectives)),
            [records[i].group or found.pictures[i] or records[i].id for i in good],
            sorted(rejected, key=lambda r: r.line),
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
    }
    with sole_writer(folder):
        writer = EmbeddingWriter.open_or_resume(
            folder,
            hidden_size=scorer.hidden_size,
            objectives=objectives,
            model_hash=scorer.artefact.embedding_hash,
            fingerprint=json.dumps(identity, sort_keys=True),
            shard_rows=shard_rows,
        )
        rows, rejected = writer.rows_done, read_rejected(folder / REJECTED)
        if writer.complete:
            return EmbedSummary(rows, len(rejected), folder)
        with writer:
            items = iter_records(file, allow_outside_root=allow_outside_root)
            done = _skip_to(items, EmbeddingStore(folder, allow_partial=True).ids[-1] if rows else None)
            rejected = [r for r in rejected if r.line <= done.line]
            with progress_bar(lines, done.items, enabled=show_progress) as advance:
                for part in embed_stream(scorer, items, objectives):
                    if part.rejected:
                        rejected += part.rejected
                        write_rejected(folder / REJECTED, rejected)
                    writer.append(part.ids, part.embeddings, part.labels, part.groups)
                    rows += len(part.ids)
                    advance(len(part.ids) + len(part.rejected))
                    if rows + len(rejected) >= JUDGED_FROM:
                        check_rejected_share(file, rows, rejected, max_rejected)
            write_rejected(folder / REJECTED, rejected)
    # After the last shard is on disk: what was computed stays, whatever the verdict.
    check_rejected_share(file, rows, rejected, max_rejected)
    return EmbedSummary(rows, len(rejected), folder)


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
