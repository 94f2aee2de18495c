"""Bootstrap of Kendall's tau and of shares for all resamples at once: a resample is a column of weights.

A resample draws whole groups with replacement, so each pair counts as often as its group was drawn: an integer weight.
Concordant minus discordant comparisons are then w' A w, with A[i, j] = sign(x_i - x_j) sign(y_i - y_j) / 2. A is never
held: comparisons between different blocks of x and different blocks of y are counted on a grid of blocks by running
sums, the others (inside a block of x; inside a block of y but not of x) by products with small dense matrices. 1,000
resamples cost a few matrix products of the machine's full speed instead of 1,000 sorts, and the counts are exact.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from multitap_jax.evaluation.correlation import group_draws

BLOCK = 512  # values a block, about: what keeps both the dense products and the grid small for 1e4 to 1e6 pairs
WEIGHTS = 32_000_000  # weights held at a time, float32
CELLS = 4_000_000  # cells of the grid held at a time, float64


def weights(n: int, groups: Sequence[str] | np.ndarray | None, samples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of n pairs is in each resample: arrays float32[n, S], S resamples each, `samples` in all.

    The resamples are those of `correlation.bootstrap` with the same groups and seed. None where there are fewer than
    two groups to draw from.
    """
    member, number, drawn = group_draws(n, groups, samples, seed)
    at_once = max(1, min(256, WEIGHTS // max(n, 1)))
    columns: list[np.ndarray] = []
    for chosen in drawn:
        columns.append(np.bincount(chosen, minlength=number))
        if len(columns) == at_once:
            yield np.stack(columns, axis=1).astype(np.float32)[member]
            columns = []
    if columns:
        yield np.stack(columns, axis=1).astype(np.float32)[member]


class Taus:
    """Kendall's tau of weighted resamples of the same pairs; x and y are float64[n]."""

    def __init__(self, x: np.ndarray, y: np.ndarray):
        cells = _Side(x), _Side(y)
        # Rows in the order of the cells of the grid, so that what is summed lies together.
        self._order = np.lexsort((cells[1].block, cells[0].block))
        self._x, self._y = _Side(x[self._order]), _Side(y[self._order])
        cell = self._x.block * self._y.blocks + self._y.block
        self._cells, self._starts = np.unique(cell, return_index=True)

    def __call__(self, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tau_b, tau_c), float64[S], of resamples with weights float32[n, S]; NaN where one side is constant.

        Equal to `correlation.kendall_tau` of the pairs, each repeated as often as it weighs.
        """
        w = w[self._order]
        size = w.sum(axis=0, dtype=np.float64)
        balance = self._inside(w) + self._across(w)
        total = size * (size - 1) / 2
        (ties_x, levels_x), (ties_y, levels_y) = self._x.ties(w), self._y.ties(w)
        fewer = np.minimum(levels_x, levels_y)
        with np.errstate(divide="ignore", invalid="ignore"):
            b = balance / np.sqrt(total - ties_x) / np.sqrt(total - ties_y)
            c = 2 * balance * fewer / (size**2 * (fewer - 1))
        undefined = fewer < 2
        return np.where(undefined, np.nan, b), np.where(undefined, np.nan, c)

    def _inside(self, w: np.ndarray) -> np.ndarray:
        """Comparisons inside a block of x, and inside a block of y between different blocks of x."""
        total = np.zeros(w.shape[1])
        x, y = self._x, self._y
        for side in (x, y):
            for rows in side.mixed_blocks():
                signs = _signs(x.level[rows])
                signs *= _signs(y.level[rows])
                if side is y:
                    signs *= x.block[rows, None] != x.block[rows]
                part = w[rows]
                # Below 2^24 in float32 as long as a block's weights sum to less: exact integers.
                total += np.einsum("is,is->s", signs @ part, part, dtype=np.float64) / 2
        return total

    def _across(self, w: np.ndarray) -> np.ndarray:
        """Comparisons between different blocks of x and of y, on the grid of blocks."""
        shape = self._x.blocks, self._y.blocks
        held = np.add.reduceat(w, self._starts, axis=0)
        at_once = max(1, CELLS // (shape[0] * shape[1]))
        parts = []
        for first in range(0, w.shape[1], at_once):
            part = held[:, first : first + at_once]
            flat = np.zeros((shape[0] * shape[1], part.shape[1]))
            flat[self._cells] = part
            grid = flat.reshape(*shape, -1)
            below = np.cumsum(grid, axis=0) - grid  # in lower blocks of x, same block of y
            lower = np.cumsum(below, axis=1)
            parts.append(np.einsum("xys,xys->s", grid, 2 * lower - below - lower[:, -1:]))
        return np.concatenate(parts)


class _Side:
    """One side of the pairs: level[n], the rank of each value among the distinct ones, and block[n] of its level."""

    def __init__(self, values: np.ndarray):
        _, self.level, counts = np.unique(values, return_inverse=True, return_counts=True)
        start = np.cumsum(counts) - counts
        # A level never spans blocks, and one that would fill a block has it to itself: its comparisons are all ties.
        large = counts > BLOCK
        new = np.diff(start // BLOCK, prepend=0) > 0
        new |= large | np.concatenate([[False], large[:-1]])
        new[0] = False
        block = np.cumsum(new)
        self.block = block[self.level]
        self.blocks = int(block[-1]) + 1
        shared = counts[self.level] > 1
        order = np.argsort(self.level, kind="stable")
        self._shared = order[shared[order]]
        self._starts = np.flatnonzero(np.diff(self.level[self._shared], prepend=-1))

    def mixed_blocks(self) -> Iterator[np.ndarray]:
        """The rows of each block that holds more than one level."""
        order = np.argsort(self.block, kind="stable")
        for rows in np.split(order, np.searchsorted(self.block[order], np.arange(1, self.blocks))):
            if (self.level[rows] != self.level[rows[0]]).any():
                yield rows

    def ties(self, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tied comparisons, levels that occur) of each resample."""
        tied = _choose_two(w)
        occur = np.count_nonzero(w, axis=0)
        if len(self._shared):
            shared = w[self._shared]
            held = np.add.reduceat(shared, self._starts, axis=0)
            tied += _choose_two(held) - _choose_two(shared)
            occur += np.count_nonzero(held, axis=0) - np.count_nonzero(shared, axis=0)
        return tied, occur


def _choose_two(w: np.ndarray) -> np.ndarray:
    return (np.einsum("is,is->s", w, w, dtype=np.float64) - w.sum(axis=0, dtype=np.float64)) / 2


def _signs(values: np.ndarray) -> np.ndarray:
    """float32[m, m], the sign of each difference of ranks, which stay below 2^24: exact in float32."""
    small = (values - values.min()).astype(np.float32)
    differences = small[:, None] - small
    return np.sign(differences, out=differences)


def shares(hits: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Weighted mean of `hits` float64[n] in each resample; NaN where it is empty."""
    with np.errstate(invalid="ignore"):
        return (hits @ w) / w.sum(axis=0, dtype=np.float64)
