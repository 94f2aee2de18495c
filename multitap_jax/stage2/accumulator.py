"""From a stream of rows to sums: what a fit needs to know, in memory that does not grow with the rows.

Rows go in fixed chunks to the bucket of their source, of the objectives they are rated on, and of their fold. Missing
labels are thereby exact: an objective uses the buckets that observe it.

While the rows are few (not more than features, or a thousand) they are simply kept, and if the stream ends there they
are solved exactly in float64 without a device, in the dual form where they are fewer than the features (dual.py).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from multitap_jax.stage2 import moments as mm
from multitap_jax.stage2 import statistics as st
from multitap_jax.stage2.certificate import Precision
from multitap_jax.stage2.rows import DataError, Rows, check_squares, concatenate
from multitap_jax.stage2.sharded import OneDevice, OnMesh
from multitap_jax.stage2.statistics import Statistics

CHUNK_ROWS = 2048
SHIFT_ROWS = 1024
Subset = tuple[bool, ...]


class Key(NamedTuple):
    """A bucket: rows of one source, rated on `subset` of the objectives (or counted for it), in one fold."""

    source: str
    subset: Subset
    fold: int


class Labels(NamedTuple):
    """What is known of the labels: rows read, and float64 or int [T] rows rated, lowest and highest label."""

    num_rows: int
    observed: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Accumulator:
    """Collects rows: `add` them; `merge` others; then `fitting.fit_heads` solves.

    Args:
      folds: cross-validation folds, 1 for none.
      seed: of the fold hash; kept so that merged parts agree.
      keep_rows: rows that are kept and solved exactly; None: the number of features, at least `SHIFT_ROWS`.
      chunk_rows: rows a device and update; what is left in the end goes in quarters if two of them hold it.
      mesh: devices to sum on; None: the default device.
      count_groups: whether leave-one-group-out will need the size of every group (16 bytes or so a group).
    """

    def __init__(
        self,
        folds: int,
        seed: int = 0,
        *,
        keep_rows: int | None = None,
        chunk_rows: int = CHUNK_ROWS,
        mesh: jax.sharding.Mesh | None = None,
        count_groups: bool = False,
    ) -> None:
        self.folds, self.seed = folds, seed
        self._keep_rows = keep_rows
        self._device = OneDevice() if mesh is None else OnMesh(mesh)
        self._chunk_rows = chunk_rows * self._device.row_shards
        self._rest_rows = max(chunk_rows // 4, 1) * self._device.row_shards
        self._kept: list[Rows] = []
        self._shifts: tuple[np.ndarray, np.ndarray] | None = None  # set when rows are no longer kept
        self._sums: dict[Key, mm.Moments] = {}
        self._merged: dict[Key, Statistics] = {}
        self._pending: dict[Key, list[Rows]] = {}
        self._in_flight: jax.Array | None = None
        self._labels: Labels | None = None
        self.precision = Precision()
        self.group_sizes: dict[int, int] = {}
        self._count_groups = count_groups
        self.shared = False  # whether other processes hold other rows of the same fit (persist.gather)

    # ---- what is known ----

    @property
    def labels(self) -> Labels:
        """Counts and ranges of the labels.

        Raises:
          DataError: if there was no row.
        """
        if self._labels is None or not self._labels.num_rows:
            raise DataError("no rows to fit: 0 sample(s) were given, while a minimum of 1 is required")
        return self._labels

    @property
    def is_empty(self) -> bool:
        """Whether no row was added."""
        return self._labels is None

    @property
    def num_features(self) -> int:
        """H."""
        return self._kept[0].x.shape[1] if self._shifts is None else len(self._shifts[0])

    @property
    def kept(self) -> Rows | None:
        """All rows, where they are still kept; x float32 or float64."""
        if self._shifts is not None:
            return None
        rows = concatenate(self._kept)
        self._kept = [rows]
        return rows if rows.x.dtype == np.float64 else rows._replace(x=rows.x.astype(np.float32, copy=False))

    def restore(
        self,
        labels: Labels,
        group_sizes: dict[int, int],
        *,
        rows: Rows | None = None,
        stats: dict[Key, Statistics] | None = None,
        precision: Precision | None = None,
    ) -> None:
        """Sets the state of an empty accumulator to what another had: its rows, or its sums."""
        self._labels, self.group_sizes = labels, group_sizes
        if rows is not None:
            self._kept = [rows]
        else:
            assert stats is not None
            self._merged, self._shifts = stats, _origin(next(iter(stats.values())))
            self.precision = precision or Precision()

    # ---- rows in ----

    def add(self, rows: Rows) -> None:
        """Takes a batch of checked rows.

        Raises:
          DataError: rows of another width than before (`partial_fit` may be called with anything).
        """
        width = rows.x.shape[1], rows.y.shape[1]
        if self._labels is not None and width != (self.num_features, len(self._labels.observed)):
            before = (self.num_features, len(self._labels.observed))
            raise DataError(f"rows have {width[0]} features and {width[1]} objectives; the rows before had {before}")
        says_something = (rows.weight > 0) & ~np.isnan(rows.y).all(1)
        total = len(rows.x)
        if self._count_groups:
            for group, count in zip(*np.unique(rows.group, return_counts=True), strict=True):
                self.group_sizes[int(group)] = self.group_sizes.get(int(group), 0) + int(count)
        if not says_something.all():
            rows = rows.take(says_something)
        self._labels = _joined_labels(self._labels, _labels_of(rows, total))
        if self._shifts is not None:
            self._route(rows)
            return
        self._kept.append(rows)
        self._spill_if_many()

    def _spill_if_many(self) -> None:
        limit = max(self.num_features, SHIFT_ROWS) if self._keep_rows is None else self._keep_rows
        if sum(len(part.x) for part in self._kept) > limit:
            self._spill()

    def _spill(self) -> None:
        rows, self._kept = concatenate(self._kept), []
        labels = rows.y[:SHIFT_ROWS]
        label_shift = np.nansum(labels, 0) / np.maximum((~np.isnan(labels)).sum(0), 1)
        shift = rows.x[:SHIFT_ROWS].mean(0, dtype=np.float64).astype(np.float32)  # as the device has it
        self._shifts = shift.astype(np.float64), label_shift
        check_squares(rows.take(slice(SHIFT_ROWS)), *self._shifts)
        self._route(rows)

    def _route(self, rows: Rows) -> None:
        """Queues the rows by bucket, and sends what fills a chunk."""
        if not len(rows.x):
            return
        seen = ~np.isnan(rows.y)
        patterns, which = (seen[:1], np.zeros(len(seen), np.int64)) if seen.all() else _distinct(seen)
        for source in np.unique(rows.source).tolist():
            for fold in range(self.folds):
                here = (rows.source == source) & (rows.fold == fold)
                for index, pattern in enumerate(patterns):
                    chosen = np.flatnonzero(here & (which == index))
                    if not len(chosen):
                        continue
                    part = rows if len(chosen) == len(rows.x) else rows.take(chosen)
                    for subset in self._subsets_for(source, tuple(pattern.tolist())):
                        key = Key(source, subset, fold)
                        queue = self._pending.setdefault(key, [])
                        queue.append(part)
                        if sum(len(waiting.x) for waiting in queue) >= self._chunk_rows:
                            self._flush(key)

    def _subsets_for(self, source: str, pattern: Subset) -> list[Subset]:
        """The subsets whose sums count a row of this pattern.

        One subset a pattern costs each row one update. With more patterns than objectives (labels missing at random)
        there is one subset an objective instead, and a row costs an update an objective: memory stays bounded.
        """
        single = [tuple(row) for row in np.eye(len(pattern), dtype=bool).tolist()]
        present = {key.subset for key in (*self._sums, *self._pending) if key.source == source}
        alone = len(present) >= len(pattern) and present <= set(single)
        if not alone and pattern not in present and len(present) >= len(pattern):
            self._regroup(source, single)
            alone = True
        return [subset for subset, rated in zip(single, pattern, strict=True) if rated] if alone else [pattern]

    def _regroup(self, source: str, subsets: Sequence[Subset]) -> None:
        """From one subset a pattern to one an objective: each takes the sums of the patterns that have it."""
        self.flush()
        old = {key: self._sums.pop(key) for key in list(self._sums) if key.source == source}
        for target, subset in enumerate(subsets):
            for fold in range(self.folds):
                parts = [sums for key, sums in old.items() if key.subset[target] and key.fold == fold]
                self._sums[Key(source, subset, fold)] = functools.reduce(mm.merge, parts, self._empty())

    def _empty(self) -> mm.Moments:
        """Without a shift of the labels: those are few, and shifted here in float64."""
        assert self._shifts is not None
        shift, label_shift = self._shifts
        return self._device.init(len(shift), len(label_shift), shift, np.zeros_like(label_shift))

    def _chunk(self, rows: Rows) -> list[np.ndarray]:
        """x, labels and weights as the device takes them; float64 less the shift before it is rounded."""
        assert self._shifts is not None
        shift, label_shift = self._shifts
        x = (rows.x - shift[None, :]).astype(np.float32) if rows.x.dtype == np.float64 else rows.x
        return [x, (rows.y - label_shift[None, :]).astype(np.float32), rows.weight.astype(np.float32)]

    def _flush(self, key: Key, whole: bool = False) -> None:
        rows = concatenate(self._pending.pop(key))
        size, start = self._chunk_rows, 0
        while start < len(rows.x) and (whole or len(rows.x) - start >= size):
            if len(rows.x) - start <= 2 * self._rest_rows:
                size = self._rest_rows  # many buckets end in a part of a chunk; two shapes compile, no more
            part = rows.take(slice(start, start + size))
            chunk = self._chunk(part)
            spare = size - len(part.x)
            if spare:
                chunk = [np.pad(column, ((0, spare),) + ((0, 0),) * (column.ndim - 1)) for column in chunk]
            fresh = key not in self._sums
            before = self._empty() if fresh else self._sums.pop(key)
            # One chunk at a time is summed while the next is prepared: chunks that wait are memory.
            jax.block_until_ready(self._in_flight)
            shift = before.shift
            # Donated with the rest, so a copy: the sums of chunks with and without float64 rows are about one origin.
            given = before._replace(shift=shift * 0.0) if part.x.dtype == np.float64 else before
            sums = self._device.update(given, *chunk)
            self._in_flight = sums.num_rows
            if fresh and not self.precision.chunks:
                self.precision = self.precision.probe(self._device.finalize(sums), *chunk)
            self._sums[key] = sums._replace(shift=shift) if given is not before else sums
            start += size
        if start < len(rows.x):
            self._pending[key] = [rows.take(slice(start, None))]

    def flush(self) -> None:
        """Sends what waits to fill a chunk."""
        for key in list(self._pending):
            self._flush(key, whole=True)

    # ---- sums out ----

    def settle(self) -> None:
        """Says that no more rows follow: the sums become statistics for good, one by one, and leave the device."""
        if self._shifts is not None:
            self._merged = self.statistics(last=True)

    def statistics(self, last: bool = False) -> dict[Key, Statistics]:
        """The sums of every bucket, about one origin (`kept` is None). Unless `last`, more rows may follow."""
        assert self._shifts is not None
        self.flush()
        found = dict(self._merged)
        for key in list(self._sums):
            stats = self._device.finalize(self._sums.pop(key) if last else self._sums[key])
            if not np.isfinite(np.diagonal(stats.gram)).all():
                raise DataError(
                    "some rows are so large or weigh so much that their squares overflow float32; scale them"
                )
            stats = stats._replace(label_shift=self._shifts[1])
            found[key] = st.combine([found[key], st.recentre(stats, *_origin(found[key]))]) if key in found else stats
        origin = _origin(next(iter(found.values())))
        return {key: st.recentre(stats, *origin) for key, stats in found.items()}

    def merge(self, other: "Accumulator") -> "Accumulator":
        """Takes in what another accumulator collected, on whatever machine; returns self.

        Raises:
          DataError: other folds, seed, features or objectives.
        """
        if (other.folds, other.seed) != (self.folds, self.seed):
            raise DataError(
                f"moments with folds={other.folds}, seed={other.seed} cannot be merged into {self.folds}, {self.seed}"
            )
        if other._labels is None:
            return self
        if self._labels is not None:
            own = self.num_features, len(self._labels.observed)
            if (other.num_features, len(other._labels.observed)) != own:
                raise DataError(
                    f"moments of {other.num_features} features, {len(other._labels.observed)} objectives cannot be "
                    f"merged into those of {own}"
                )
        self._labels = _joined_labels(self._labels, other._labels)
        for group, count in other.group_sizes.items():
            self.group_sizes[group] = self.group_sizes.get(group, 0) + count
        if self._shifts is None and other._shifts is None:
            self._kept += other._kept
            self._spill_if_many()
            return self
        if other._shifts is None:
            self._route(concatenate(other._kept))
            return self
        if self._shifts is None:
            kept, self._kept, self._shifts = self._kept, [], other._shifts
            for rows in kept:
                self._route(rows)
        self.precision = self.precision.joined(other.precision)
        for key, stats in other.statistics().items():
            moved = st.recentre(stats, *self._shifts)
            self._merged[key] = st.combine([self._merged[key], moved]) if key in self._merged else moved
        return self


def _origin(stats: Statistics) -> tuple[np.ndarray, np.ndarray]:
    return stats.shift, stats.label_shift


def _labels_of(rows: Rows, total: int) -> Labels:
    low = np.fmin.reduce(rows.y, axis=0, initial=np.inf)
    high = np.fmax.reduce(rows.y, axis=0, initial=-np.inf)
    return Labels(total, (~np.isnan(rows.y)).sum(0), low, high)


def _joined_labels(a: Labels | None, b: Labels) -> Labels:
    if a is None:
        return b
    return Labels(a.num_rows + b.num_rows, a.observed + b.observed, np.fmin(a.low, b.low), np.fmax(a.high, b.high))


def _distinct(seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows of a boolean array [n, T], and the index int[n] of each row among them."""
    packed = np.ascontiguousarray(np.packbits(seen, axis=1))
    _, first, which = np.unique(
        packed.view(np.dtype((np.void, packed.shape[1]))).reshape(-1), return_index=True, return_inverse=True
    )
    return seen[first], which.reshape(-1)
