"""Sums on the device, a bucket for each source, set of rated objectives and fold.

Rows go in fixed chunks to the bucket of their source, of the objectives they are rated on, and of their fold. Missing
labels are thereby exact: an objective uses the buckets that observe it.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from multitap_jax.stage2 import moments as mm
from multitap_jax.stage2.certificate import Precision
from multitap_jax.stage2.rows import DataError, Rows, concatenate
from multitap_jax.stage2.sharded import OneDevice, OnMesh
from multitap_jax.stage2.statistics import Statistics

Subset = tuple[bool, ...]


class Key(NamedTuple):
    """A bucket: rows of one source, rated on `subset` of the objectives (or counted for it), in one fold."""

    source: str
    subset: Subset
    fold: int


class Buckets:
    """Sums of rows: `add` them; `statistics` gives the sums.

    Args:
      folds: number of folds.
      shift: float64[H] of float32 values, rough means of the rows; label_shift: float64[T], those of the labels.
      device: what sums.
      chunk_rows: rows a device and update; what is left in the end goes in quarters if two of them hold it.
      precision: of sums that these will be added to.

    Attributes:
      sums: the moments of every bucket so far.
      precision: what was measured.
    """

    def __init__(
        self,
        folds: int,
        shift: np.ndarray,
        label_shift: np.ndarray,
        device: OneDevice | OnMesh,
        chunk_rows: int,
        precision: Precision,
    ) -> None:
        self.shift, self.label_shift, self.precision = shift, label_shift, precision
        self.sums: dict[Key, mm.Moments] = {}
        self._folds, self._device = folds, device
        self._chunk_rows = chunk_rows * device.row_shards
        self._rest_rows = max(chunk_rows // 4, 1) * device.row_shards
        self._pending: dict[Key, list[Rows]] = {}
        self._in_flight: jax.Array | None = None

    def add(self, rows: Rows) -> None:
        """Queues the rows by bucket, and sums what fills a chunk."""
        if not len(rows.x):
            return
        seen = ~np.isnan(rows.y)
        patterns, which = (seen[:1], np.zeros(len(seen), np.int64)) if seen.all() else _distinct(seen)
        for source in np.unique(rows.source).tolist():
            for fold in range(self._folds):
                here = (rows.source == source) & (rows.fold == fold)
                for index, pattern in enumerate(patterns):
                    chosen = np.flatnonzero(here & (which == index))
                    if not len(chosen):
                        continue
                    part = rows if len(chosen) == len(rows.x) else rows.take(chosen)
                    for subset in self._subsets_for(source, tuple(pattern.tolist())):
                        self._queue(Key(source, subset, fold), part)

    def _queue(self, key: Key, rows: Rows) -> None:
        queue = self._pending.setdefault(key, [])
        queue.append(rows)
        if sum(len(waiting.x) for waiting in queue) >= self._chunk_rows:
            self._send(key)

    def _subsets_for(self, source: str, pattern: Subset) -> list[Subset]:
        """The subsets whose sums count a row of this pattern.

        One subset a pattern costs each row one update. With more patterns than objectives (labels missing at random)
        there is one subset an objective instead, and a row costs an update an objective: memory stays bounded.
        """
        single = [tuple(row) for row in np.eye(len(pattern), dtype=bool).tolist()]
        present = {key.subset for key in (*self.sums, *self._pending) if key.source == source}
        alone = len(present) >= len(pattern) and present <= set(single)
        if not alone and pattern not in present and len(present) >= len(pattern):
            self._regroup(source, single)
            alone = True
        return [subset for subset, rated in zip(single, pattern, strict=True) if rated] if alone else [pattern]

    def _regroup(self, source: str, subsets: Sequence[Subset]) -> None:
        """From one subset a pattern to one an objective: each takes the sums of the patterns that have it."""
        self.flush()
        old = {key: self.sums.pop(key) for key in list(self.sums) if key.source == source}
        for target, subset in enumerate(subsets):
            for fold in range(self._folds):
                parts = [sums for key, sums in old.items() if key.subset[target] and key.fold == fold]
                self.sums[Key(source, subset, fold)] = functools.reduce(mm.merge, parts, self._empty())

    def _empty(self) -> mm.Moments:
        """Without a shift of the labels: those are few, and shifted here in float64."""
        return self._device.init(len(self.shift), len(self.label_shift), self.shift, np.zeros_like(self.label_shift))

    def flush(self) -> None:
        """Sums what waits to fill a chunk."""
        for key in list(self._pending):
            self._send(key, whole=True)

    def _send(self, key: Key, whole: bool = False) -> None:
        rows = concatenate(self._pending.pop(key))
        size, start = self._chunk_rows, 0
        while start < len(rows.x) and (whole or len(rows.x) - start >= size):
            if len(rows.x) - start <= 2 * self._rest_rows:
                size = self._rest_rows  # many buckets end in a part of a chunk; two shapes compile, no more
            self._sum(key, rows.take(slice(start, start + size)), size)
            start += size
        if start < len(rows.x):
            self._pending[key] = [rows.take(slice(start, None))]

    def _sum(self, key: Key, rows: Rows, size: int) -> None:
        """Adds a chunk of at most `size` rows to its bucket; rows of weight 0 fill it up."""
        chunk = self._chunk(rows, size)
        fresh = key not in self.sums
        before = self._empty() if fresh else self.sums.pop(key)
        # One chunk at a time is summed while the next is prepared: chunks that wait are memory.
        jax.block_until_ready(self._in_flight)
        shift = before.shift
        # Donated with the rest, so a copy: the sums of chunks with and without float64 rows are about one origin.
        given = before._replace(shift=shift * 0.0) if rows.x.dtype == np.float64 else before
        sums = self._device.update(given, *chunk)
        self._in_flight = sums.num_rows
        if fresh and not self.precision.chunks:
            self.precision = self.precision.probe(self._device.finalize(sums), *chunk)
        self.sums[key] = sums._replace(shift=shift) if given is not before else sums

    def _chunk(self, rows: Rows, size: int) -> list[np.ndarray]:
        """x, labels and weights as the device takes them; float64 less the shift before it is rounded."""
        x = (rows.x - self.shift[None, :]).astype(np.float32) if rows.x.dtype == np.float64 else rows.x
        chunk = [x, (rows.y - self.label_shift[None, :]).astype(np.float32), rows.weight.astype(np.float32)]
        spare = size - len(x)
        return [np.pad(part, ((0, spare),) + ((0, 0),) * (part.ndim - 1)) for part in chunk] if spare else chunk

    def statistics(self, last: bool = False) -> dict[Key, Statistics]:
        """The sums of every bucket. Unless `last`, more rows may follow; else they leave the device one by one.

        Raises:
          DataError: sums that overflowed.
        """
        self.flush()
        found = {}
        for key in list(self.sums):
            stats = self._device.finalize(self.sums.pop(key) if last else self.sums[key])
            if not np.isfinite(np.diagonal(stats.gram)).all():
                raise DataError(
                    "some rows are so large or weigh so much that their squares overflow float32; scale them"
                )
            found[key] = stats._replace(label_shift=self.label_shift)
        return found


def _distinct(seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows of a boolean array [n, T], and the index int[n] of each row among them."""
    packed = np.ascontiguousarray(np.packbits(seen, axis=1))
    _, first, which = np.unique(
        packed.view(np.dtype((np.void, packed.shape[1]))).reshape(-1), return_index=True, return_inverse=True
    )
    return seen[first], which.reshape(-1)
