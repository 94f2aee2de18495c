"""From a stream of rows to sums: what a fit needs to know, in memory that does not grow with the rows.

While the rows are few (not more than features, or a thousand) they are simply kept, and if the stream ends there they
are solved exactly in float64 without a device, in the dual form where they are fewer than the features. More of them
are summed (buckets.py).
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from multitap_jax.stage2 import statistics as st
from multitap_jax.stage2.buckets import Buckets, Key
from multitap_jax.stage2.certificate import Precision
from multitap_jax.stage2.rows import DataError, Rows, check_squares, concatenate
from multitap_jax.stage2.sharded import OneDevice, OnMesh
from multitap_jax.stage2.statistics import Statistics

CHUNK_ROWS = 2048
SHIFT_ROWS = 1024


class Labels(NamedTuple):
    """What is known of the labels: rows read, and float64 or int [T] rows rated, lowest and highest label."""

    num_rows: int
    observed: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, y: np.ndarray, num_rows: int) -> "Labels":
        """Of y [n, T], which are what is rated of so many rows."""
        low = np.fmin.reduce(y, axis=0, initial=np.inf)
        return cls(num_rows, (~np.isnan(y)).sum(0), low, np.fmax.reduce(y, axis=0, initial=-np.inf))

    def joined(self, other: "Labels") -> "Labels":
        """Of both."""
        low, high = np.fmin(self.low, other.low), np.fmax(self.high, other.high)
        return Labels(self.num_rows + other.num_rows, self.observed + other.observed, low, high)


class Accumulator:
    """Collects rows: `add` them; `merge` others; then `fitting.fit_heads` solves.

    Args:
      folds: cross-validation folds, 1 for none.
      seed: of the fold hash; kept so that merged parts agree.
      keep_rows: rows that are kept and solved exactly; None: the number of features, at least `SHIFT_ROWS`.
      chunk_rows: of the buckets.
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
        self._keep_rows, self._chunk_rows, self._count_groups = keep_rows, chunk_rows, count_groups
        self._device = OneDevice() if mesh is None else OnMesh(mesh)
        self._kept: list[Rows] = []
        self._buckets: Buckets | None = None  # where rows go when they are no longer kept
        self._merged: dict[Key, Statistics] = {}  # what others summed
        self._labels: Labels | None = None
        self.group_sizes: dict[int, int] = {}
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
        return self._kept[0].x.shape[1] if self._buckets is None else len(self._buckets.shift)

    @property
    def precision(self) -> Precision:
        """That of the sums."""
        return Precision() if self._buckets is None else self._buckets.precision

    @property
    def kept(self) -> Rows | None:
        """All rows, where they are still kept; x float32 or float64."""
        if self._buckets is not None:
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
            self._merged = stats
            self._open(*_origin(next(iter(stats.values()))), precision or Precision())

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
            groups, counts = np.unique(rows.group, return_counts=True)
            self._count(dict(zip(groups.tolist(), counts.tolist(), strict=True)))
        if not says_something.all():
            rows = rows.take(says_something)
        self._know(Labels.of(rows.y, total))
        self._take(rows)

    def _count(self, sizes: Mapping[int, int]) -> None:
        for group, count in sizes.items():
            self.group_sizes[group] = self.group_sizes.get(group, 0) + count

    def _know(self, labels: Labels) -> None:
        self._labels = labels if self._labels is None else self._labels.joined(labels)

    def _take(self, rows: Rows) -> None:
        """Keeps the rows, or sums them: all of them once they are many."""
        if self._buckets is not None:
            self._buckets.add(rows)
            return
        self._kept.append(rows)
        limit = max(self.num_features, SHIFT_ROWS) if self._keep_rows is None else self._keep_rows
        if sum(len(part.x) for part in self._kept) > limit:
            self._spill()

    def _spill(self) -> None:
        rows, self._kept = concatenate(self._kept), []
        labels = rows.y[:SHIFT_ROWS]
        label_shift = np.nansum(labels, 0) / np.maximum((~np.isnan(labels)).sum(0), 1)
        shift = (
            rows.x[:SHIFT_ROWS].mean(0, dtype=np.float64).astype(np.float32).astype(np.float64)
        )  # as the device has it
        check_squares(rows.take(slice(SHIFT_ROWS)), shift, label_shift)
        self._open(shift, label_shift, Precision()).add(rows)

    def _open(self, shift: np.ndarray, label_shift: np.ndarray, precision: Precision) -> Buckets:
        """From here on rows are summed, about these rough means."""
        self._buckets = Buckets(self.folds, shift, label_shift, self._device, self._chunk_rows, precision)
        return self._buckets

    # ---- sums out ----

    def settle(self) -> None:
        """Says that no more rows follow: the sums become statistics for good, one by one, and leave the device."""
        if self._buckets is not None:
            self._merged = self.statistics(last=True)

    def statistics(self, last: bool = False) -> dict[Key, Statistics]:
        """The sums of every bucket, about one origin (`kept` is None). Unless `last`, more rows may follow."""
        assert self._buckets is not None
        found = _united(self._merged, self._buckets.statistics(last))
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
        self._know(other._labels)
        self._count(other.group_sizes)
        if other._buckets is None:
            self._take(concatenate(other._kept))
            return self
        if self._buckets is None:
            kept, self._kept = self._kept, []
            buckets = self._open(other._buckets.shift, other._buckets.label_shift, Precision())
            for rows in kept:
                buckets.add(rows)
        assert self._buckets is not None
        self._buckets.precision = self._buckets.precision.joined(other.precision)
        origin = self._buckets.shift, self._buckets.label_shift
        moved = {key: st.recentre(stats, *origin) for key, stats in other.statistics().items()}
        self._merged = _united(self._merged, moved)
        return self


def _origin(stats: Statistics) -> tuple[np.ndarray, np.ndarray]:
    return stats.shift, stats.label_shift


def _united(a: Mapping[Key, Statistics], b: Mapping[Key, Statistics]) -> dict[Key, Statistics]:
    """The sums of both, a bucket of both about the origin that it has in the first."""
    found = dict(a)
    for key, stats in b.items():
        found[key] = st.combine([a[key], st.recentre(stats, *_origin(a[key]))]) if key in a else stats
    return found
