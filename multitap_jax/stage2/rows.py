"""Rows on their way in: checked, given a group and a fold by hash, whatever machine and order they come in."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

HASHED_COLUMNS = 64
BFLOAT16 = np.dtype(jnp.bfloat16)
FIT_ROWS = 4096
SQUARES = 1e-28, 1e30  # what sums in float32 may be made of: their low parts are 1e-8 of them, and there are 1e8 rows


class DataError(ValueError):
    """Rows that cannot be fitted; the message names the row, the objective and the remedy."""


class RawBatch(NamedTuple):
    """What a caller gives: X [n, H], Y [n, T] or [n], n groups or None (each distinct row alone), weights [n] or None,
    and the source (a data set's name) of each row or of all."""

    x: Any
    y: Any
    groups: Sequence[Any] | np.ndarray | None = None
    weight: Any = None
    source: Any = None


class Rows(NamedTuple):
    """A batch of checked rows.

    Attributes:
      x: bfloat16, float32 or float64[n, H].   y: float64[n, T] with NaN for missing.   weight: float64[n].
      group: uint64[n], hash of the group.   fold: int[n].   source: str[n].
    """

    x: np.ndarray
    y: np.ndarray
    weight: np.ndarray
    group: np.ndarray
    fold: np.ndarray
    source: np.ndarray

    def take(self, index: np.ndarray | slice) -> "Rows":
        """The rows of a mask, an index array or a slice."""
        return Rows(*(column[index] for column in self))


def concatenate(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, in order."""
    return parts[0] if len(parts) == 1 else Rows(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def weights_of(rows: Rows, source_weights: Mapping[str, float]) -> np.ndarray:
    """Sample weights float64[n] times those of the sources."""
    if not source_weights:
        return rows.weight
    return rows.weight * np.array([source_weights.get(source, 1.0) for source in rows.source.tolist()])


def _mixed(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: a bijection of uint64 that scatters."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def group_hash(groups: Sequence[Any] | np.ndarray | None, x: np.ndarray) -> np.ndarray:
    """uint64[n], equal for rows of one group.

    Without groups it is a hash of the row itself: a row that occurs twice is never trained on and held out at once,
    and the folds depend neither on the order of the rows nor on how they were split.
    """
    if groups is not None:
        names = [str(name) for name in groups]
        known = {
            name: int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
            for name in set(names)
        }
        return np.array([known[name] for name in names], np.uint64)
    columns = np.unique(np.linspace(0, x.shape[1] - 1, min(HASHED_COLUMNS, x.shape[1])).astype(np.int64))
    bits = (x[:, columns].astype(np.float32) + np.float32(0)).view(np.uint32).astype(np.uint64)  # + 0: -0 becomes 0
    keys = _mixed(np.arange(1, len(columns) + 1, dtype=np.uint64)) | np.uint64(1)
    return _mixed((_mixed(bits * keys[None, :] + keys[None, :])).sum(1, dtype=np.uint64))


def fold_of(group: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """int[n], the fold of each group hash: the same on every machine, in every order, for any part of the data."""
    if folds == 1:
        return np.zeros(len(group), np.int64)
    return (_mixed(group ^ _mixed(np.array([seed + 1], np.uint64))) % np.uint64(folds)).astype(np.int64)


def checked_rows(batches: Iterable[Sequence[Any]], folds: int, seed: int, grouped: bool = True) -> Iterator[Rows]:
    """The batches with groups, folds, weights and sources filled in; unless `grouped`, all groups and folds are 0.

    Raises:
      DataError: for shapes that do not fit, NaN or infinity in X, infinity in Y, or a bad weight.
    """
    first, shape = 0, None
    for x, y, groups, weight, source in map(_as_raw, batches):
        x, y = np.asarray(x), np.asarray(y)
        for name, value in (("X", x), ("Y", y)):
            if value.dtype.kind == "c":
                raise DataError(f"Complex data not supported: {name} is {value.dtype}; give real numbers")
        x, y = (value.astype(np.float64) if value.dtype == object else value for value in (x, y))
        if x.ndim != 2:
            raise DataError(f"X is {x.ndim}-dimensional, {x.shape}; it must be [N, H]. Reshape your data")
        x = x if x.dtype in (np.float64, BFLOAT16) else x.astype(np.float32, copy=False)
        y = (y[:, None] if y.ndim == 1 else y).astype(np.float64)
        n = len(x)
        weight = np.ones(n) if weight is None else np.asarray(weight, np.float64)
        sources = np.full(n, source or "") if source is None or isinstance(source, str) else np.asarray(source, str)
        named = n if groups is None else len(groups)
        if y.ndim != 2 or not n == len(y) == named == len(sources) or weight.shape != (n,):
            raise DataError(f"X {x.shape}, Y {y.shape}, {named} groups, weights {weight.shape}: rows must agree")
        shape = shape or (x.shape[1], y.shape[1])
        if (x.shape[1], y.shape[1]) != shape:
            raise DataError(f"rows {first} on have {x.shape[1]} features, {y.shape[1]} objectives; before: {shape}")
        if 0 in shape:
            what, given = ("feature(s)", x.shape) if shape[0] == 0 else ("objective(s)", y.shape)
            raise DataError(f"0 {what} (shape={given}) while a minimum of 1 is required.")
        _check_numbers(x, y, weight, first)
        group = group_hash(groups, x) if grouped else np.zeros(n, np.uint64)
        yield Rows(x, y, weight, group, fold_of(group, folds, seed), sources)
        first += n


def with_folds(batches: Iterable[Rows], fold: np.ndarray) -> Iterator[Rows]:
    """The rows with given folds int[N] in place of the hashed ones."""
    first = 0
    for rows in batches:
        yield rows._replace(fold=fold[first : first + len(rows.x)])
        first += len(rows.x)


def folds_of_splits(splits: Sequence[tuple[Any, Any]], num_rows: int) -> np.ndarray:
    """int[N], the fold in which each row is held out by splits (train, test): indices, or masks bool[N].

    Raises:
      DataError: the test sets are no partition of the rows, or a training set is not all the other rows.
    """
    fold = np.full(num_rows, -1)
    for number, split in enumerate(splits):
        if not isinstance(split, (list, tuple)) or len(split) != 2:
            raise DataError(f"split {number} of cv is {type(split).__name__}; a pair (train, test) is expected")
        train, test = (_row_numbers(part, num_rows, f"split {number} of cv") for part in split)
        if (fold[test] >= 0).any() or len(test) + len(train) != num_rows or len(np.intersect1d(test, train)):
            raise DataError(
                f"split {number} of cv: every row must be held out once, and trained on in all other splits"
            )
        fold[test] = number
    if (fold < 0).any():
        raise DataError(f"{(fold < 0).sum()} rows are held out by no split of cv; every row must be held out once")
    return fold


def _row_numbers(part: Any, num_rows: int, whose: str) -> np.ndarray:
    """int[n], sorted, of distinct indices from 0 to N - 1, or of a mask bool[N]."""
    given = np.asarray(part)
    if given.dtype == bool and given.shape == (num_rows,):
        return np.flatnonzero(given)
    found = np.unique(given) if given.size else np.empty(0, np.int64)
    if given.ndim != 1 or found.dtype.kind not in "iu" or len(found) < len(given):
        raise DataError(f"{whose}: distinct row numbers or a mask bool[{num_rows}] are expected, not {part!r}")
    if len(found) and not 0 <= found[0] <= found[-1] < num_rows:
        raise DataError(f"{whose} names row {found[0] if found[0] < 0 else found[-1]}; rows are 0 to {num_rows - 1}")
    return found


def _is_sound(x: np.ndarray) -> bool:
    """Whether every number of x is finite and fits float32."""
    if x.dtype == BFLOAT16:  # the exponent of NaN and infinity is all ones: the largest bits of either sign
        return bool(x.view(np.int16).max(initial=0) < 0x7F80 and x.view(np.uint16).max(initial=0) < 0xFF80)
    limit = np.finfo(np.float32).max
    if x.dtype == np.float64 and not (x.max(initial=0.0) <= limit and x.min(initial=0.0) >= -limit):
        return False
    # A sum touches every number once, and NaN and infinity survive it; one that overflows is looked at again. No
    # product: that would wake the threads of BLAS, which go on spinning on the cores that the sums on the device want.
    with np.errstate(all="ignore"):
        return bool(np.isfinite(x.sum(1)).all())


def _check_numbers(x: np.ndarray, y: np.ndarray, weight: np.ndarray, first: int) -> None:
    limit = np.finfo(np.float32).max
    bad_x = np.zeros((0, 1), bool) if _is_sound(x) else ~(np.abs(x.astype(np.float64)) <= limit)
    for name, bad, remedy in (
        ("X", bad_x, "embeddings must be finite"),
        ("Y", ~(np.isnan(y) | (np.abs(y) <= limit)), "use NaN for a missing label"),
        ("sample_weight", ~(np.isfinite(weight) & (weight >= 0))[:, None], "weights must be finite and >= 0"),
    ):
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise DataError(f"{name}[{first + row}, {column}] is NaN, infinite or negative; {remedy}")


def check_squares(rows: Rows, shift: np.ndarray, label_shift: np.ndarray) -> None:
    """Says whether products of x - shift, y - label_shift and weights can be summed in float32.

    Raises:
      DataError: deviations or weights whose squares leave its range.
    """
    fits = lambda value: not value or SQUARES[0] <= value <= SQUARES[1]
    heaviest = float(rows.weight.max(initial=0.0))
    if not fits(heaviest):
        raise DataError(
            f"sample_weight is up to {heaviest:.3g}, beyond sums in float32; divide the weights (and the alphas) by it"
        )
    for name, values, origin in (("X", rows.x, shift), ("Y", rows.y, label_shift)):
        away = np.fmax.reduce(np.abs(values.astype(np.float64) - origin[None, :]), axis=0, initial=0.0)
        constant = away <= np.finfo(np.float32).eps * np.abs(origin)  # to the rounding of the shift
        away = float(np.where(constant, 0.0, away).max())
        if not fits(heaviest * away**2):
            raise DataError(
                f"{name} deviates from its mean by up to {away:.3g}: weighted squares of that are beyond sums in "
                f"float32; divide {name} by it"
            )


def _as_raw(batch: Sequence) -> RawBatch:
    return batch if isinstance(batch, RawBatch) else RawBatch(*batch)


def array_batches(
    X: Any, Y: Any, weight: Any = None, groups: Sequence[str] | None = None, sources: Sequence[str] | None = None
) -> Callable[[], Iterator[RawBatch]]:
    """Arrays as batches, any number of times.

    Raises:
      DataError: lengths that differ, or no labels at all.
    """
    if hasattr(X, "tocsr"):
        raise TypeError("X is a sparse matrix; RidgeHead takes dense arrays: X.toarray()")
    if Y is None:
        raise DataError("RidgeHead requires y to be passed, but the target y is None")
    X, Y = np.asarray(X), np.asarray(Y)
    if X.ndim != 2:
        raise DataError(f"X is {X.ndim}-dimensional, {X.shape}; it must be [N, H]. Reshape your data")
    for name, column in (("Y", Y), ("sample_weight", weight), ("groups", groups), ("sources", sources)):
        if column is not None and np.shape(np.asarray(column))[:1] != (len(X),):
            raise DataError(f"X has {len(X)} rows, {name} has {(*np.shape(np.asarray(column)), 1)[0]}")
    if weight is not None and len(X) and not np.asarray(weight).any():
        raise DataError("sample_weight is zero for every row; some row must count")

    def batches() -> Iterator[RawBatch]:
        for i in range(0, len(X), FIT_ROWS):
            part = slice(i, i + FIT_ROWS)
            rest = (None if column is None else np.asarray(column)[part] for column in (groups, weight, sources))
            yield RawBatch(X[part], Y[part], *rest)

    return batches
