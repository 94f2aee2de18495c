"""`EmbeddingWriter`: rows into a new embedding store, or on with one that was begun (store_format.py)."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from multitap_jax.stage2.storage import Folder, open_folder
from multitap_jax.stage2.store_format import (
    DTYPES,
    MANIFEST,
    Entry,
    Manifest,
    StoreError,
    read_manifest,
    shard_bytes,
    shard_name,
)

SHARD_ROWS = 4096


class EmbeddingWriter:
    """Appends rows to a new store; each full shard is committed before the next begins.

    Use as a context manager: leaving it normally closes the store, leaving it by an exception commits nothing further,
    exactly as a kill would.

    Args:
      folder: a path, or a URL that fsspec knows; made if absent; must hold no store yet (`open_or_resume` goes on).
      hidden_size: H.
      objectives: names of the T label columns; may be empty.
      model_hash: identity of the weights and preprocessing that make the embeddings.
      total: rows the finished store will have; None if not known, then `close` declares it finished.
      shard_rows: rows a shard.
      dtype: "float32" or "bfloat16" (half the size, about 3 significant digits).
      fingerprint: identity of the records the rows come from, in order.

    Raises:
      StoreError: if the folder holds a store already, or an argument makes no sense.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        hidden_size: int,
        objectives: Sequence[str],
        model_hash: str,
        total: int | None = None,
        shard_rows: int = SHARD_ROWS,
        dtype: str = "float32",
        fingerprint: str = "",
    ) -> None:
        if dtype not in DTYPES:
            raise StoreError(f"dtype={dtype!r}: an embedding store holds one of {', '.join(DTYPES)}")
        if hidden_size < 1 or len(set(objectives)) != len(objectives):
            raise StoreError(f"{hidden_size=} must be positive and objectives unique: {objectives}")
        where = open_folder(folder)
        if where.exists(MANIFEST):
            raise StoreError(f"{where} holds a store already; continue it with EmbeddingWriter.open_or_resume")
        about = (hidden_size, tuple(objectives), dtype, model_hash, fingerprint)
        self._start(where, Manifest(*about, total=total, complete=total == 0), shard_rows)
        where.make()
        self._keep(self._manifest)

    def _start(self, folder: Folder, manifest: Manifest, shard_rows: int) -> None:
        if shard_rows < 1:
            raise StoreError(f"{shard_rows=}: a shard has at least one row")
        self._folder, self._manifest, self._shard_rows = folder, manifest, shard_rows
        self._ids: list[str] = []
        self._groups: list[str] = []
        self._embeddings: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []

    @classmethod
    def open_or_resume(cls, folder: str | Path, *, shard_rows: int = SHARD_ROWS, **arguments: Any) -> "EmbeddingWriter":
        """Continues the store in `folder` after its `rows_done` rows, or begins it. Takes the arguments of the class.

        Raises:
          StoreError: if the store was begun with another model, other objectives or other records.
        """
        where = open_folder(folder)
        if not where.exists(MANIFEST):
            return cls(folder, shard_rows=shard_rows, **arguments)
        manifest = read_manifest(where)
        wanted = {"total": None, "dtype": "float32", "fingerprint": "", **arguments}
        wanted["objectives"] = tuple(wanted["objectives"])
        differences = [
            f"  {key}: the store has {getattr(manifest, key)!r}, this run has {value!r}"
            for key, value in wanted.items()
            if getattr(manifest, key) != value
        ]
        if differences:
            raise StoreError(
                f"{where}/{MANIFEST}: cannot be continued by this run:\n" + "\n".join(differences) + "\n"
                "write into another folder, or repeat the settings the store was begun with"
            )
        writer = cls.__new__(cls)
        writer._start(where, manifest, shard_rows)
        return writer

    @property
    def rows_done(self) -> int:
        """Rows that are safe on disk: a resumed run continues with this row."""
        return self._manifest.rows

    @property
    def complete(self) -> bool:
        """Whether the store is finished; nothing can be appended any more."""
        return self._manifest.complete

    def append(self, ids: Sequence[str], embeddings: np.ndarray, labels: np.ndarray, groups: Sequence[str]) -> None:
        """Adds n rows.

        Args:
          ids: n record ids.
          embeddings: [n, H], finite; any float type.
          labels: [n, T]; NaN where a record has no rating.
          groups: n names; rows of one name (the texts of one image) stay together in cross-validation. "" stands alone.

        Raises:
          StoreError: on a shape that does not fit, an embedding or label that is infinite, an embedding that is NaN,
            or more rows than `total`; no row was taken.
          OSError: of the disk. The rows were taken; the next `append` or `close` writes them.
        """
        embeddings, labels = self._checked(ids, embeddings, labels, groups)
        n, total = len(ids), self._manifest.total
        reached = self.rows_done + len(self._ids) + n
        if self.complete or (total is not None and reached > total):
            raise StoreError(
                f"{self._folder}: {reached} rows, but the store is complete with {total or self.rows_done}"
            )
        self._ids += ids
        self._groups += groups
        self._embeddings.append(embeddings)
        self._labels.append(labels)
        while len(self._ids) >= self._shard_rows:
            self._commit(self._shard_rows)
        if reached == total:
            self.close()

    def _checked(
        self, ids: Sequence[str], embeddings: np.ndarray, labels: np.ndarray, groups: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings and labels in the types that are stored; see `append`."""
        embeddings = np.asarray(embeddings).astype(np.float32)
        labels = np.asarray(labels).astype(np.float32)
        n, hidden, objectives = len(ids), self._manifest.hidden_size, self._manifest.objectives
        if embeddings.shape != (n, hidden) or labels.shape != (n, len(objectives)) or len(groups) != n:
            raise StoreError(
                f"{n} ids came with embeddings {embeddings.shape}, labels {labels.shape}, {len(groups)} groups; "
                f"expected {(n, hidden)}, {(n, len(objectives))}, {n}"
            )
        for name, bad in (("embedding", ~np.isfinite(embeddings)), ("labels", np.isinf(labels))):
            if bad.any():
                raise StoreError(f"record {ids[int(np.argmax(bad.any(1)))]!r}: its {name} holds NaN or infinity")
        return embeddings.astype(DTYPES[self._manifest.dtype]), labels

    def _commit(self, rows: int) -> None:
        embeddings, labels = _joined(self._embeddings), _joined(self._labels)
        data = shard_bytes(self._ids[:rows], embeddings[:rows], labels[:rows], self._groups[:rows])
        name = self._next_name()
        self._folder.write(name, data)
        self._keep(self._manifest.with_shard(Entry(name, rows, hashlib.sha256(data).hexdigest())))
        self._embeddings, self._labels = [embeddings[rows:]], [labels[rows:]]
        del self._ids[:rows], self._groups[:rows]

    def _next_name(self) -> str:
        return shard_name(len(self._manifest.shards))

    def _keep(self, manifest: Manifest) -> None:
        """Makes a manifest the store's: on disk first, so that a disk that fails leaves both as they were."""
        self._folder.write(MANIFEST, manifest.to_bytes())
        self._manifest = manifest

    def write_apart(
        self, name: str, ids: Sequence[str], embeddings: np.ndarray, labels: np.ndarray, groups: Sequence[str]
    ) -> dict[str, Any]:
        """Writes rows as a shard that does not count yet, in a file of the folder; returns what `adopt` must be given.

        Any process may do so. Arguments and errors are those of `append`.
        """
        embeddings, labels = self._checked(ids, embeddings, labels, groups)
        data = shard_bytes(ids, embeddings, labels, groups)
        self._folder.write(name, data)
        return {"name": name, "rows": len(ids), "sha256": hashlib.sha256(data).hexdigest()}

    def adopt(self, shard: Mapping[str, Any]) -> None:
        """Makes what `write_apart` wrote the next shard; without rows it is none."""
        if self._ids:
            raise StoreError(f"{self._folder}: {len(self._ids)} appended rows are not in a shard yet; close first")
        if shard["rows"]:
            name = self._next_name()
            self._folder.rename(shard["name"], name)
            self._keep(self._manifest.with_shard(Entry(name, shard["rows"], shard["sha256"])))

    def close(self) -> None:
        """Commits the rows at hand; a store of unknown total is thereby finished. May be called again."""
        if self._ids:
            self._commit(len(self._ids))
        if self._manifest.total is None and not self.complete:
            self._keep(dataclasses.replace(self._manifest, complete=True))

    def __enter__(self) -> "EmbeddingWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)  # a long append is cut into shards without copies
