"""`EmbeddingStore`: reads an embedding store (store_format.py) shard by shard."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from multitap_jax.data.seen import FITTED, Seen, from_bytes
from multitap_jax.stage2.storage import open_folder
from multitap_jax.stage2.store_format import MANIFEST, StoreError, read_manifest, shard_content, shard_ids

SEEN = "seen.safetensors"  # beside the shards: by what the rated records will be known again

Shard = tuple[np.ndarray, np.ndarray, list[str]]


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
        self._manifest = read_manifest(self._folder)
        self._unverified = set(range(len(self._manifest.shards))) if verify else set()
        if not self._manifest.complete and not allow_partial:
            raise StoreError(
                f"{self.folder}: unfinished, {self.num_rows} of {self._manifest.total or 'an unknown number of'} "
                "rows; let the embedding run finish, or pass allow_partial=True"
            )
        self.objectives: tuple[str, ...] = self._manifest.objectives
        self.hidden_size: int = self._manifest.hidden_size
        self.model_hash: str = self._manifest.model_hash
        if model_hash is not None and model_hash != self.model_hash:
            raise StoreError(
                f"{self.folder}: made by the model {self.model_hash[:12]}, but embeddings of {model_hash[:12]} are "
                "expected; embeddings of two models do not mix: embed again with this one"
            )
        self.fingerprint: str = self._manifest.fingerprint

    @property
    def num_rows(self) -> int:
        """N."""
        return self._manifest.rows

    @property
    def ids(self) -> list[str]:
        """The N record ids in order (reads the headers of all shards)."""
        ids: list[str] = []
        for index in range(len(self._manifest.shards)):
            ids += shard_ids(self._folder, self._name(index))
        return ids

    @property
    def seen(self) -> Seen | None:
        """What a head fitted on the rows will have seen, where `multitap embed` wrote them. Raises StoreError."""
        if not self._folder.exists(SEEN):
            return None
        try:
            return from_bytes(self._folder.read(SEEN), f"{self.folder}/{SEEN}")[FITTED]
        except (ValueError, KeyError) as error:
            raise StoreError(str(error)) from error

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
        indices = range(share[0], len(self._manifest.shards), share[1])
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
        name = self._manifest.shards[index].file
        if not self._folder.exists(name):
            raise StoreError(
                f"{self.folder}/{name}: missing, but {MANIFEST} counts it; restore it or write the store anew"
            )
        return name

    def _shard(self, index: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
        name, entry = self._name(index), self._manifest.shards[index]
        path, data = f"{self.folder}/{name}", self._folder.view(name)
        if index in self._unverified:
            found = hashlib.sha256(data).hexdigest()
            if found != entry.sha256:
                raise StoreError(
                    f"{path}: damaged, SHA-256 {found[:12]}... but {MANIFEST} says {entry.sha256[:12]}...; "
                    "restore it or write the store anew"
                )
            self._unverified.remove(index)
        try:
            x, y, ids, groups = shard_content(data)
        except (KeyError, ValueError, TypeError) as error:
            raise StoreError(f"{path}: not a readable shard ({error}); write the store anew") from error
        shapes = (entry.rows, self.hidden_size), (entry.rows, len(self.objectives))
        if (x.shape, y.shape) != shapes or len(ids) != entry.rows or len(groups) != entry.rows:
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
