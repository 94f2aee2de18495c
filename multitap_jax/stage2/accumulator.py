"""From a stream of rows to `Statistics` a fold and a set of objectives: the host side of the moments.

Rows are checked, given a fold by the hash of their group, and sent in fixed chunks to the bucket of their fold and of
the objectives they are rated on. Missing labels are thereby exact: an objective uses the buckets that observe it.

While the rows are few they are simply kept, and if the stream ends there, they are solved in float64 without a device.
Fewer rows than features is the classical case for the dual; here the rows are rotated into the min(N, H) directions
they span, which is the same regression (its solution lies in that span) at the same cost, so one solver does both.
"""

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
        self._moments: mm.Moments  # once the rows are too many to be kept
        self._keeping = True
        self._subsets: list[tuple[bool, ...]] = []  # the objectives a bucket serves; bucket = subset * folds + fold
        self._pending: dict[int, list[Rows]] = {}
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
            groups = self._bucket_groups()
        constant = self._low >= self._high
        return Collected(groups, self._num_rows, self._observed, constant, shift, basis)

    # ---- few rows: kept, rotated, float64 ----

    def _rotated(self) -> tuple[list[TargetGroup], np.ndarray, np.ndarray]:
        rows = Rows(*(np.concatenate(parts) for parts in zip(*self._kept, strict=True)))
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
        rows = Rows(*(np.concatenate(parts) for parts in zip(*self._kept, strict=True)))
        self._kept, self._keeping = [], False
        labels = rows.y[:SHIFT_ROWS]
        count = np.maximum((~np.isnan(labels)).sum(0), 1)
        shift, label_shift = rows.x[:SHIFT_ROWS].mean(0, dtype=np.float64), np.nansum(labels, 0) / count
        self._moments = mm.init(rows.x.shape[1], rows.y.shape[1], 0, shift, label_shift)
        self._empty = mm.init(rows.x.shape[1], rows.y.shape[1], self._folds, shift, label_shift)
        self._route(rows)

    def _route(self, rows: Rows) -> None:
        """Queues the rows by bucket, and sends what fills a chunk."""
        patterns, which = np.unique(~np.isnan(rows.y), axis=0, return_inverse=True)
        for index, pattern in enumerate(patterns):
            here = which.reshape(-1) == index
            for subset in self._subsets_for(tuple(pattern.tolist())):
                for fold in np.unique(rows.fold[here]):
                    part = Rows(*(column[here & (rows.fold == fold)] for column in rows))
                    bucket = subset * self._folds + int(fold)
                    self._pending.setdefault(bucket, []).append(part)
                    if sum(len(queued.x) for queued in self._pending[bucket]) >= self._chunk_rows:
                        self._flush(bucket)

    def _subsets_for(self, pattern: tuple[bool, ...]) -> list[int]:
        """Indices of the subsets that count a row of this pattern.

        One subset a pattern costs each row one update. With more patterns than objectives (labels missing at random)
        there is one subset an objective instead, and a row costs an update an objective: memory stays bounded.
        """
        single = [tuple(bool(v) for v in row) for row in np.eye(len(pattern), dtype=bool)]
        if pattern not in self._subsets and self._subsets != single:
            if len(self._subsets) < len(pattern):
                self._subsets.append(pattern)
                self._moments = mm.concatenate([self._moments, self._empty])
            else:
                self._regroup(single)
        if self._subsets == single:
            return [index for index, present in enumerate(pattern) if present]
        return [self._subsets.index(pattern)]

    def _regroup(self, subsets: list[tuple[bool, ...]]) -> None:
        """From one subset a pattern to one an objective: sums of buckets."""
        for bucket in list(self._pending):
            self._flush(bucket, whole=True)
        parts = []
        for target in range(len(subsets)):
            total = self._empty
            for index, pattern in enumerate(self._subsets):
                if pattern[target]:
                    total = mm.merge(total, mm.take(self._moments, index * self._folds, self._folds))
            parts.append(total)
        self._moments, self._subsets = mm.concatenate(parts), subsets

    def _flush(self, bucket: int, whole: bool = False) -> None:
        rows = Rows(*(np.concatenate(parts) for parts in zip(*self._pending.pop(bucket), strict=True)))
        size, start = self._chunk_rows, 0
        while start < len(rows.x) and (whole or len(rows.x) - start >= size):
            part = Rows(*(column[start : start + size] for column in rows))
            pad = ((0, size - len(part.x)), (0, 0))
            self._moments = mm.update(
                self._moments,
                np.pad(part.x.astype(np.float32), pad),
                np.pad(part.y.astype(np.float32), pad),
                np.pad(part.weight.astype(np.float32), pad[0]),
                np.int32(bucket),
            )
            start += size
        if start < len(rows.x):
            self._pending[bucket] = [Rows(*(column[start:] for column in rows))]

    def _bucket_groups(self) -> list[TargetGroup]:
        for bucket in list(self._pending):
            self._flush(bucket, whole=True)
        stats, groups = mm.finalize(self._moments), []
        for targets in _equal_columns(np.array(self._subsets)):
            serving = [index for index, subset in enumerate(self._subsets) if subset[targets[0]]]
            folds = []
            for fold in range(self._folds):
                parts = [stats[index * self._folds + fold] for index in serving]
                folds.append(mm.select(mm.combine(parts), targets))
            groups.append(TargetGroup(targets, folds))
        return groups


def _equal_columns(table: np.ndarray) -> list[np.ndarray]:
    """Indices of the columns of a bool table, grouped by equal content."""
    _, which = np.unique(table, axis=1, return_inverse=True)
    which = which.reshape(-1)
    return [np.flatnonzero(which == value) for value in range(which.max() + 1)]
