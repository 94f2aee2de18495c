"""Embeddings on disk: N rows of (id, group, embedding, labels), in checksummed shards, written once, resumable.

A folder holds `embeddings-00000.safetensors`, `embeddings-00001.safetensors`, ... and `manifest.json`. A shard has the
tensors `embeddings` [n, H] (float32 or bfloat16) and `labels` float32[n, T] (NaN: not rated), and in its metadata the
JSON lists `ids` and `groups`. Shards are counted, never sorted by name. Reading one needs nothing of this package:

    from safetensors.numpy import load_file            # safetensors.torch / .flax for bfloat16
    shard = load_file("embeddings-00000.safetensors")
    x, y = shard["embeddings"], shard["labels"]

The manifest is the truth: a shard counts once the manifest names it, and the manifest is replaced only after the shard
has reached the disk. A kill at any point therefore loses at most the rows since the last shard, and a torn shard file
is simply written again.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from multitap_jax.stage2.storage import Folder, open_folder

FORMAT = "multitap-embeddings"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(jnp.bfloat16)}
_STORED = {"F32": np.dtype(np.float32), "BF16": np.dtype(jnp.bfloat16)}

Shard = tuple[np.ndarray, np.ndarray, list[str]]


class StoreError(ValueError):
    """An embedding store that cannot be used as asked; the message names the file, the value and the remedy."""


def shard_name(index: int) -> str:
    """File name of shard `index`, counted from 0."""
    return f"embeddings-{index:05d}.safetensors"


def _read_manifest(folder: Folder) -> dict[str, Any]:
    path = f"{folder}/{MANIFEST}"
    if not folder.exists(MANIFEST):
        raise StoreError(f"{path}: no such file; an embedding store is a folder that EmbeddingWriter has written")
    try:
        manifest = json.loads(folder.read(MANIFEST))
        found = (manifest["format"], manifest["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: not a manifest of an embedding store ({error}); write the store anew") from error
    if found != (FORMAT, FORMAT_VERSION):
        raise StoreError(f"{path}: format {found}, but this version reads {(FORMAT, FORMAT_VERSION)}")
    for index, shard in enumerate(manifest["shards"]):
        if shard["file"] != shard_name(index):
            raise StoreError(f"{path}: shard {index} is named {shard['file']!r}, expected {shard_name(index)!r}")
    return manifest


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
        shard_rows: int = 4096,
        dtype: str = "float32",
        fingerprint: str = "",
    ) -> None:
        self._folder = open_folder(folder)
        if dtype not in _DTYPES:
            raise StoreError(f"dtype={dtype!r}: an embedding store holds one of {', '.join(_DTYPES)}")
        if hidden_size < 1 or shard_rows < 1 or len(set(objectives)) != len(objectives):
            raise StoreError(f"{hidden_size=}, {shard_rows=} must be positive and objectives unique: {objectives}")
        if self._folder.exists(MANIFEST):
            raise StoreError(f"{self._folder} holds a store already; continue it with EmbeddingWriter.open_or_resume")
        self._start(
            {
                "format": FORMAT,
                "version": FORMAT_VERSION,
                "hidden_size": hidden_size,
                "objectives": list(objectives),
                "dtype": dtype,
                "model_hash": model_hash,
                "fingerprint": fingerprint,
                "total": total,
                "rows": 0,
                "complete": total == 0,
                "shards": [],
            },
            shard_rows,
        )
        self._folder.make()
        self._write_manifest()

    def _start(self, manifest: dict[str, Any], shard_rows: int) -> None:
        self._manifest = manifest
        self._shard_rows = shard_rows
        self._ids: list[str] = []
        self._groups: list[str] = []
        self._embeddings: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []

    @classmethod
    def open_or_resume(cls, folder: str | Path, **arguments: Any) -> "EmbeddingWriter":
        """Continues the store in `folder` after its `rows_done` rows, or begins it. Takes the arguments of the class.

        Raises:
          StoreError: if the store was begun with another model, other objectives or other records.
        """
        where = open_folder(folder)
        if not where.exists(MANIFEST):
            return cls(folder, **arguments)
        if arguments.get("shard_rows", 1) < 1:
            raise StoreError(f"shard_rows={arguments['shard_rows']}: a shard has at least one row")
        manifest = _read_manifest(where)
        wanted = {"total": None, "dtype": "float32", "fingerprint": "", **arguments}
        wanted["objectives"] = list(wanted["objectives"])
        shard_rows = wanted.pop("shard_rows", 4096)
        differences = [
            f"  {key}: the store has {manifest[key]!r}, this run has {value!r}"
            for key, value in wanted.items()
            if manifest[key] != value
        ]
        if differences:
            raise StoreError(
                f"{where}/{MANIFEST}: cannot be continued by this run:\n" + "\n".join(differences) + "\n"
                "write into another folder, or repeat the settings the store was begun with"
            )
        writer = cls.__new__(cls)
        writer._folder = where
        writer._start(manifest, shard_rows)
        return writer

    @property
    def rows_done(self) -> int:
        """Rows that are safe on disk: a resumed run continues with this row."""
        return self._manifest["rows"]

    @property
    def complete(self) -> bool:
        """Whether the store is finished; nothing can be appended any more."""
        return self._manifest["complete"]

    def append(self, ids: Sequence[str], embeddings: np.ndarray, labels: np.ndarray, groups: Sequence[str]) -> None:
        """Adds n rows.

        Args:
          ids: n record ids.
          embeddings: [n, H], finite; any float type.
          labels: [n, T]; NaN where a record has no rating.
          groups: n names; rows of one name (the texts of one image) stay together in cross-validation. "" stands alone.

        Raises:
          StoreError: on a shape that does not fit, an embedding or label that is infinite, an embedding that is NaN,
            or more rows than `total`.
        """
        embeddings, labels = self._checked(ids, embeddings, labels, groups)
        n, total = len(ids), self._manifest["total"]
        reached = self.rows_done + len(self._ids) + n
        if self._manifest["complete"] or (total is not None and reached > total):
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
        n, hidden, objectives = len(ids), self._manifest["hidden_size"], self._manifest["objectives"]
        if embeddings.shape != (n, hidden) or labels.shape != (n, len(objectives)) or len(groups) != n:
            raise StoreError(
                f"{n} ids came with embeddings {embeddings.shape}, labels {labels.shape}, {len(groups)} groups; "
                f"expected {(n, hidden)}, {(n, len(objectives))}, {n}"
            )
        for name, bad in (("embedding", ~np.isfinite(embeddings)), ("labels", np.isinf(labels))):
            if bad.any():
                raise StoreError(f"record {ids[int(np.argmax(bad.any(1)))]!r}: its {name} holds NaN or infinity")
        return embeddings.astype(_DTYPES[self._manifest["dtype"]]), labels

    def _commit(self, rows: int) -> None:
        embeddings, labels = _joined(self._embeddings), _joined(self._labels)
        data = _shard_bytes(self._ids[:rows], embeddings[:rows], labels[:rows], self._groups[:rows])
        name = shard_name(len(self._manifest["shards"]))
        self._folder.write(name, data)
        self._enter(name, rows, hashlib.sha256(data).hexdigest())
        self._embeddings, self._labels = [embeddings[rows:]], [labels[rows:]]
        del self._ids[:rows], self._groups[:rows]

    def _enter(self, name: str, rows: int, sha256: str) -> None:
        self._manifest["shards"].append({"file": name, "rows": rows, "sha256": sha256})
        self._manifest["rows"] += rows
        self._manifest["complete"] = self._manifest["rows"] == self._manifest["total"]
        self._write_manifest()

    def write_apart(
        self, name: str, ids: Sequence[str], embeddings: np.ndarray, labels: np.ndarray, groups: Sequence[str]
    ) -> dict[str, Any]:
        """Writes rows as a shard that does not count yet, in a file of the folder; returns what `adopt` must be given.

        Any process may do so. Arguments and errors are those of `append`.
        """
        embeddings, labels = self._checked(ids, embeddings, labels, groups)
        data = _shard_bytes(list(ids), embeddings, labels, list(groups))
        self._folder.write(name, data)
        return {"name": name, "rows": len(ids), "sha256": hashlib.sha256(data).hexdigest()}

    def adopt(self, shard: Mapping[str, Any]) -> None:
        """Makes what `write_apart` wrote the next shard; without rows it is none."""
        if self._ids:
            raise StoreError(f"{self._folder}: {len(self._ids)} appended rows are not in a shard yet; close first")
        if shard["rows"]:
            name = shard_name(len(self._manifest["shards"]))
            self._folder.rename(shard["name"], name)
            self._enter(name, shard["rows"], shard["sha256"])

    def _write_manifest(self) -> None:
        self._folder.write(MANIFEST, json.dumps(self._manifest, indent=1).encode())

    def close(self) -> None:
        """Commits the rows at hand; a store of unknown total is thereby finished. May be called again."""
        if self._ids:
            self._commit(len(self._ids))
        if self._manifest["total"] is None and not self._manifest["complete"]:
            self._manifest["complete"] = True
            self._write_manifest()

    def __enter__(self) -> "EmbeddingWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()


class EmbeddingStore:
    """Reads a store shard by shard, in the order the rows were written.

    Args:
      folder: path or URL of what `EmbeddingWriter` wrote.
      verify: check each shard against its SHA-256 the first time it is read.
      allow_partial: accept a store that is still being written.
      model_hash: of the model whose embeddings are expected; None: any.

    Raises:
      StoreError: if there is no store, it is unfinished, or another model's. Reading raises it for a missing or damaged
        shard.
    """

    def __init__(
        self, folder: str | Path, *, verify: bool = True, allow_partial: bool = False, model_hash: str | None = None
    ) -> None:
        self.folder = str(folder)
        self._folder = open_folder(folder)
        self._manifest = _read_manifest(self._folder)
        self._unverified = set(range(len(self._manifest["shards"]))) if verify else set()
        if not self._manifest["complete"] and not allow_partial:
            raise StoreError(
                f"{self.folder}: unfinished, {self.num_rows} of {self._manifest['total'] or 'an unknown number of'} "
                "rows; let the embedding run finish, or pass allow_partial=True"
            )
        self.objectives: tuple[str, ...] = tuple(self._manifest["objectives"])
        self.hidden_size: int = self._manifest["hidden_size"]
        self.model_hash: str = self._manifest["model_hash"]
        if model_hash is not None and model_hash != self.model_hash:
            raise StoreError(
                f"{self.folder}: made by the model {self.model_hash[:12]}, but embeddings of {model_hash[:12]} are "
                "expected; embeddings of two models do not mix: embed again with this one"
            )
        self.fingerprint: str = self._manifest["fingerprint"]

    @property
    def num_rows(self) -> int:
        """N."""
        return self._manifest["rows"]

    @property
    def ids(self) -> list[str]:
        """The N record ids in order (reads the headers of all shards)."""
        ids: list[str] = []
        for index in range(len(self._manifest["shards"])):
            name = self._name(index)
            size = int.from_bytes(self._folder.read(name, 8), "little")
            ids += json.loads(json.loads(self._folder.read(name, 8 + size)[8:])["__metadata__"]["ids"])
        return ids

    def batches(
        self,
        rows: int = 2048,
        *,
        read_ahead: int | None = None,
        share: tuple[int, int] = (0, 1),
        as_stored: bool = False,
    ) -> Iterator[tuple[np.ndarray, np.ndarray, list[str]]]:
        """Yields (X float32[n, H], Y float32[n, T] with NaN for missing, n groups), n <= rows, in order.

        Args:
          rows: largest n.
          read_ahead: shards that a thread reads while earlier ones are used; None: 2, or 0 on a machine of one or two
            cores, where the thread only takes time from the sums.
          share: (p, P): only every P-th shard, from p on.
          as_stored: X in the type it is kept in, float32 or bfloat16, without a copy.
        """
        indices = range(share[0], len(self._manifest["shards"]), share[1])
        ahead = (2 if (os.cpu_count() or 1) > 2 else 0) if read_ahead is None else read_ahead
        for x, y, groups in _ahead(self._shard, indices, ahead):
            for start in range(0, len(x), rows):
                stop = start + rows
                part = x[start:stop]
                yield part if as_stored else part.astype(np.float32), y[start:stop], groups[start:stop]

    def load(self) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """The whole store in memory: (X float32[N, H], Y float32[N, T], N groups)."""
        x = np.empty((self.num_rows, self.hidden_size), np.float32)
        y = np.empty((self.num_rows, len(self.objectives)), np.float32)
        groups: list[str] = []
        for part_x, part_y, part_groups in self.batches():
            x[len(groups) : len(groups) + len(part_x)] = part_x
            y[len(groups) : len(groups) + len(part_x)] = part_y
            groups += part_groups
        return x, y, groups

    def _name(self, index: int) -> str:
        name = shard_name(index)
        if not self._folder.exists(name):
            raise StoreError(
                f"{self.folder}/{name}: missing, but {MANIFEST} counts it; restore it or write the store anew"
            )
        return name

    def _shard(self, index: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
        name, entry = self._name(index), self._manifest["shards"][index]
        path, data = f"{self.folder}/{name}", self._folder.view(name)
        if index in self._unverified:
            found = hashlib.sha256(data).hexdigest()
            if found != entry["sha256"]:
                raise StoreError(
                    f"{path}: damaged, SHA-256 {found[:12]}... but {MANIFEST} says {entry['sha256'][:12]}...; "
                    "restore it or write the store anew"
                )
            self._unverified.remove(index)
        try:
            start = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(bytes(data[8:start]))
            x, y = (_array(header[tensor], data[start:]) for tensor in ("embeddings", "labels"))
            ids, groups = (json.loads(header["__metadata__"][names]) for names in ("ids", "groups"))
        except (KeyError, ValueError, TypeError) as error:
            raise StoreError(f"{path}: not a readable shard ({error}); write the store anew") from error
        shapes = (entry["rows"], self.hidden_size), (entry["rows"], len(self.objectives))
        if (x.shape, y.shape) != shapes or len(ids) != entry["rows"] or len(groups) != entry["rows"]:
            raise StoreError(
                f"{path}: embeddings {x.shape}, labels {y.shape}; {MANIFEST} says {shapes[0]}, {shapes[1]}"
            )
        # A row without a group is its own group: its id, which no other row shares.
        return x, y, [group or f"id:{record}" for group, record in zip(groups, ids, strict=True)]


def _ahead(read: Callable[[int], Shard], indices: Sequence[int], ahead: int) -> Iterator[Shard]:
    """read(i) for every index, in order, with up to `ahead` of them read in advance by a thread."""
    if not ahead:
        yield from map(read, indices)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="embeddings") as pool:
        waiting = deque(pool.submit(read, index) for index in indices[:ahead])
        try:
            for index in [*indices[ahead:], *[None] * ahead][: len(indices)]:
                part = waiting.popleft()
                if index is not None:
                    waiting.append(pool.submit(read, index))
                yield part.result()
        finally:
            for part in waiting:
                part.cancel()


def _shard_bytes(ids: list[str], embeddings: np.ndarray, labels: np.ndarray, groups: list[str]) -> bytes:
    return safetensors.numpy.save(
        {"embeddings": np.ascontiguousarray(embeddings), "labels": np.ascontiguousarray(labels)},
        metadata={"ids": json.dumps(ids), "groups": json.dumps(groups)},
    )


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)  # a long append is cut into shards without copies


def _array(entry: dict[str, Any], data: memoryview) -> np.ndarray:
    """The tensor that an entry of a safetensors header describes: a view of the bytes after the header."""
    first, last = entry["data_offsets"]
    return np.frombuffer(data[first:last], _STORED[entry["dtype"]]).reshape(entry["shape"])
