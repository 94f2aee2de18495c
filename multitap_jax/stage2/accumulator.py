"""From a stream of rows to `Statistics` a fold and a set of objectives: the host side of the moments.

Rows are checked, given a fold by the hash of their group, and sent in fixed chunks to the bucket of their fold and of
the objectives they are rated on. Missing labels are thereby exact: an objective uses the buckets that observe it.

While the rows are few they are simply kept, and if the stream ends there, they are solved in float64 without a device.
Fewer rows than features is the classical case for the dual; here the rows are rotated into the min(N, H) directions
they span, which is the same regression (its solution lies in that span) at the same cost, so one solver does both.
"""

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import scipy.linalg

from multitap_jax.stage2 import moments as mm
from multitap_jax.stage2.moments import Statistics
from multitap_jax.stage2.refine import Rows

CHUNK_ROWS = 1024
SHIFT_ROWS = 1024
Subset = tuple[bool, ...]


class DataError(ValueError):
    """Rows that cannot be fitted; the message names the row, the objective and the remedy."""


class RawBatch(NamedTuple):
    """What a caller gives: X [n, H], Y [n, T] or [n], n groups or None (each row alone), weights [n] or None."""

    x: np.ndarray
    y: np.ndarray
    groups: Sequence[str] | None
    weight: np.ndarray | None = None


class TargetGroup(NamedTuple):
    """Objectives observed in the same rows: `targets` int[t], and their `Statistics`, one a fold."""

    targets: np.ndarray
    folds: list[Statistics]


class Collected(NamedTuple):
    """Everything a fit needs.

    Attributes:
      groups: the objectives, grouped by the rows they are observed in.
      num_rows: rows read.
      observed: int[T], rows rated on each objective.
      constant: bool[T], objectives with a single value.
      shift: float64[H], origin of the rotated features; None if nothing was rotated.
      basis: float64[H, min(N, H)], orthonormal; None if nothing was rotated.
    """

    groups: list[TargetGroup]
    num_rows: int
    observed: np.ndarray
    constant: np.ndarray
    shift: np.ndarray | None
    basis: np.ndarray | None

    @property
    def num_features(self) -> int:
        """H."""
        return len(self.groups[0].folds[0].shift) if self.basis is None else len(self.basis)

    def lift(self, coef: np.ndarray) -> np.ndarray:
        """Coefficients [..., min(N, H)] of the rotated features as those of the embeddings [..., H]."""
        return coef if self.basis is None else coef @ self.basis.T

    def lift_intercept(self, coef: np.ndarray, intercept: np.ndarray) -> np.ndarray:
        """The intercept [...] that goes with `lift(coef)`; `coef` are those of the rotated features."""
        return intercept if self.shift is None else intercept - self.lift(coef) @ self.shift

    def lift_point(self, point: np.ndarray) -> np.ndarray:
        """A point float64[min(N, H)] of the rotated features as an embedding float64[H]."""
        return point if self.basis is None or self.shift is None else self.shift + self.basis @ point


def fold_of(group: str, folds: int, seed: int) -> int:
    """The fold of a group, by hash: the same on every machine, in every order, for any part of the data."""
    digest = hashlib.blake2b(f"{seed}:{group}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % folds


def checked_rows(batches: Iterable[RawBatch], folds: int, seed: int) -> Iterator[Rows]:
    """The batches with folds and weights filled in.

    Raises:
      DataError: for shapes that do not fit, NaN or infinity in X, infinity in Y, or a bad weight.
    """
    first, shape = 0, None
    for x, y, groups, weight in map(_as_raw, batches):
        x, y = np.asarray(x), np.asarray(y)
        x = x if x.dtype == np.float64 else x.astype(np.float32)
        y = (y[:, None] if y.ndim == 1 else y).astype(np.float64)
        n = len(x)
        weight = np.ones(n) if weight is None else np.asarray(weight, np.float64)
        names = [f"row:{first + i}" for i in range(n)] if groups is None else groups
        if x.ndim != 2 or y.ndim != 2 or not n == len(y) == len(names) or weight.shape != (n,):
            raise DataError(f"X {x.shape}, Y {y.shape}, {len(names)} groups, weights {weight.shape}: rows must agree")
        shape = shape or (x.shape[1], y.shape[1])
        if (x.shape[1], y.shape[1]) != shape:
            raise DataError(f"rows {first} on have {x.shape[1]} features, {y.shape[1]} objectives; before: {shape}")
        for name, bad, remedy in (
            ("X", ~np.isfinite(x), "embeddings must be finite: remove the row or embed it again"),
            ("Y", np.isinf(y), "use NaN for a missing label"),
            ("sample_weight", ~(np.isfinite(weight) & (weight >= 0))[:, None], "weights must be finite and >= 0"),
        ):
            if bad.any():
                row, column = np.argwhere(bad)[0]
                raise DataError(f"{name}[{first + row}, {column}] is NaN, infinite or negative; {remedy}")
        yield Rows(x, y, weight, np.array([fold_of(str(name), folds, seed) for name in names], np.int64))
        first += n


def _as_raw(batch: Sequence) -> RawBatch:
    return batch if isinstance(batch, RawBatch) else RawBatch(*batch)


class Accumulator:
    """Collects rows; `add` them, then `finish`. Memory is independent of the number of rows.

    Args:
      folds: cross-validation folds, 1 for none.
      fit_intercept: whether the features may be shifted when rotated.
      keep_rows: rows that are kept and solved exactly; None: the number of features, at least `SHIFT_ROWS`.
      chunk_rows: rows a device update.
    """

    def __init__(
        self, folds: int, fit_intercept: bool = True, keep_rows: int | None = None, chunk_rows: int = CHUNK_ROWS
    ) -> None:
        self._folds, self._fit_intercept, self._keep_rows, self._chunk_rows = (
            folds,
            fit_intercept,
            keep_rows,
            chunk_rows,
        )
        self._kept: list[Rows] = []
        self._keeping = True
        # The objectives a row counts for -> its sums, one bucket a fold; and what waits to fill a chunk.
        self._sums: dict[Subset, mm.Moments] = {}
        self._pending: dict[tuple[Subset, int], list[Rows]] = {}
        self._num_rows = 0

    def add(self, rows: Rows) -> None:
        """Takes a batch of checked rows."""
        if self._num_rows == 0:
            self._observed = np.zeros(rows.y.shape[1], np.int64)
            self._low, self._high = np.full(rows.y.shape[1], np.inf), np.full(rows.y.shape[1], -np.inf)
        self._num_rows += len(rows.x)
        says_something = (rows.weight > 0) & ~np.isnan(rows.y).all(1)
        rows = Rows(*(part[says_something] for part in rows))
        self._observed += (~np.isnan(rows.y)).sum(0)
        self._low = np.fmin(self._low, np.fmin.reduce(rows.y, axis=0, initial=np.inf))
        self._high = np.fmax(self._high, np.fmax.reduce(rows.y, axis=0, initial=-np.inf))
        if not self._keeping:
            self._route(rows)
            return
        self._kept.append(rows)
        limit = max(rows.x.shape[1], SHIFT_ROWS) if self._keep_rows is None else self._keep_rows
        if sum(len(part.x) for part in self._kept) > limit:
            self._spill()

    def finish(self, objective_names: Sequence[str] | None = None) -> Collected:
        """What the rows amount to.

        Raises:
          DataError: if there was no row, or an objective without a label.
        """
        if not self._num_rows:
            raise DataError("no rows to fit")
        for index in np.flatnonzero(self._observed == 0).tolist():
            name = objective_names[index] if objective_names else f"number {index}"
            raise DataError(f"objective {name}: all {self._num_rows} labels are missing; leave it out or add labels")
        shift = basis = None
        if self._keeping:
            groups, shift, basis = self._rotated()
        else:
            groups = self._summed()
        constant = self._low >= self._high
        return Collected(groups, self._num_rows, self._observed, constant, shift, basis)

    # ---- few rows: kept, rotated, float64 ----

    def _rotated(self) -> tuple[list[TargetGroup], np.ndarray, np.ndarray]:
        rows = _concatenate(self._kept)
        x = rows.x.astype(np.float64)
        shift = x.mean(0) if self._fit_intercept and len(x) else np.zeros(x.shape[1])
        basis, triangle = scipy.linalg.qr((x - shift[None, :]).T, mode="economic")
        groups = []
        for targets in _equal_columns(~np.isnan(rows.y)):
            seen = ~np.isnan(rows.y[:, targets[0]])
            folds = []
            for fold in range(self._folds):
                chosen = seen & (rows.fold == fold)
                folds.append(mm.from_rows(triangle.T[chosen], rows.y[chosen][:, targets], rows.weight[chosen]))
            groups.append(TargetGroup(targets, folds))
        return groups, shift, basis

    # ---- many rows: moments on the device ----

    def _spill(self) -> None:
        rows = _concatenate(self._kept)
        self._kept, self._keeping = [], False
        labels = rows.y[:SHIFT_ROWS]
        shift = rows.x[:SHIFT_ROWS].mean(0, dtype=np.float64)
        label_shift = np.nansum(labels, 0) / np.maximum((~np.isnan(labels)).sum(0), 1)
        self._empty = lambda: mm.init(len(shift), len(label_shift), self._folds, shift, label_shift)
        self._route(rows)

    def _route(self, rows: Rows) -> None:
        """Queues the rows by subset and fold, and sends what fills a chunk."""
        patterns, which = np.unique(~np.isnan(rows.y), axis=0, return_inverse=True)
        for index, pattern in enumerate(patterns):
            here = which.reshape(-1) == index
            for subset in self._subsets_for(tuple(pattern.tolist())):
                for fold in np.unique(rows.fold[here]).tolist():
                    queue = self._pending.setdefault((subset, fold), [])
                    queue.append(Rows(*(column[here & (rows.fold == fold)] for column in rows)))
                    if sum(len(part.x) for part in queue) >= self._chunk_rows:
                        self._flush(subset, fold)

    def _subsets_for(self, pattern: Subset) -> list[Subset]:
        """The subsets whose sums count a row of this pattern.

        One subset a pattern costs each row one update. With more patterns than objectives (labels missing at random)
        there is one subset an objective instead, and a row costs an update an objective: memory stays bounded.
        """
        single = [tuple(row) for row in np.eye(len(pattern), dtype=bool).tolist()]
        if set(self._sums) != set(single) and pattern not in self._sums:
            if len(self._sums) < len(pattern):
                self._sums[pattern] = self._empty()
            else:
                self._regroup(single)
        if set(self._sums) != set(single):
            return [pattern]
        return [subset for subset, present in zip(single, pattern, strict=True) if present]

    def _regroup(self, subsets: Sequence[Subset]) -> None:
        """From one subset a pattern to one an objective: each takes the sums of the patterns that have it."""
        self._flush_all()
        self._sums = {
            subset: functools.reduce(
                mm.merge, [sums for pattern, sums in self._sums.items() if pattern[target]], self._empty()
            )
            for target, subset in enumerate(subsets)
        }

    def _flush(self, subset: Subset, fold: int, whole: bool = False) -> None:
        rows = _concatenate(self._pending.pop((subset, fold)))
        size, start = self._chunk_rows, 0
        while start < len(rows.x) and (whole or len(rows.x) - start >= size):
            part = Rows(*(column[start : start + size] for column in rows))
            pad = ((0, size - len(part.x)), (0, 0))
            self._sums[subset] = mm.update(
                self._sums[subset],
                np.pad(part.x.astype(np.float32), pad),
                np.pad(part.y.astype(np.float32), pad),
                np.pad(part.weight.astype(np.float32), pad[0]),
                np.int32(fold),
            )
            start += size
        if start < len(rows.x):
            self._pending[subset, fold] = [Rows(*(column[start:] for column in rows))]

    def _flush_all(self) -> None:
        for subset, fold in list(self._pending):
            self._flush(subset, fold, whole=True)

    def _summed(self) -> list[TargetGroup]:
        self._flush_all()
        stats = {subset: mm.finalize(self._sums.pop(subset)) for subset in list(self._sums)}
        groups = []
        for targets in _equal_columns(np.array(list(stats))):
            serving = [folds for subset, folds in stats.items() if subset[targets[0]]]
            folds = [mm.select(mm.combine(parts), targets) for parts in zip(*serving, strict=True)]
            groups.append(TargetGroup(targets, folds))
        return groups


def _concatenate(parts: Sequence[Rows]) -> Rows:
    return Rows(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _equal_columns(table: np.ndarray) -> list[np.ndarray]:
    """Indices of the columns of a bool table, grouped by equal content."""
    _, which = np.unique(table, axis=1, return_inverse=True)
    which = which.reshape(-1)
    return [np.flatnonzero(which == value) for value in range(which.max() + 1)]
