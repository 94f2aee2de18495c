"""The plan: which pairs form which optimizer step. A pure function of its arguments, on any number of hosts.

The order comes from a keyed hash rather than from a random generator, so no library release can change it, and resuming
at step k is simply plan[k].
"""

import hashlib
from collections.abc import Sequence

import numpy as np

ORDERS = ("pairs", "groups", "none")


def _rank(seed: int, epoch: int, item: int) -> bytes:
    return hashlib.blake2b(f"{seed}/{epoch}/{item}".encode(), digest_size=16).digest()


def plan_epoch(
    groups: Sequence[int], *, seed: int, epoch: int, batch_size: int, shuffle: str, whole: bool = False
) -> list[np.ndarray]:
    """Pairs of each step of one epoch: int64[<= batch_size] indexes; only the last step may be smaller.

    Args:
      groups: group number of each pair (texts of one image share it).
      seed: the run's seed.
      epoch: counted from 0; each epoch has its own order.
      batch_size: pairs a step.
      shuffle: "pairs" shuffles pairs one by one (the official recipe); "groups" shuffles groups and keeps their pairs
        together, so that prefixes and images are shared; "none" keeps the given order.
      whole: no group is cut between two steps; then any step may be smaller, and "none" keeps the order of groups.

    Raises:
      ValueError: an unknown order, a step without a pair, or a group that is to be whole and larger than a step.
    """
    if shuffle not in ORDERS:
        raise ValueError(f"shuffle {shuffle!r}; the orders are {', '.join(ORDERS)}")
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}: a step needs at least one pair")
    pairs = range(len(groups))
    if shuffle == "pairs":
        order = sorted(pairs, key=lambda pair: _rank(seed, epoch, pair))
    elif shuffle == "groups":
        rank = {group: _rank(seed, epoch, group) for group in set(groups)}
        order = sorted(pairs, key=lambda pair: (rank[groups[pair]], pair))
    else:
        order = list(pairs)
    if whole:
        return _whole_steps(groups, order, batch_size)
    indexes = np.asarray(order, np.int64)
    return [indexes[start : start + batch_size] for start in range(0, len(indexes), batch_size)]


def _whole_steps(groups: Sequence[int], order: Sequence[int], batch_size: int) -> list[np.ndarray]:
    """Groups in the order of their first pair, as many a step as fit."""
    members: dict[int, list[int]] = {}
    for pair in order:
        members.setdefault(groups[pair], []).append(pair)
    largest = max(map(len, members.values()), default=0)
    if largest > batch_size:
        raise ValueError(
            f"a group of {largest} records is compared in one step, but batch_size = {batch_size}; raise "
            "--config.batch_size, or give its records smaller groups"
        )
    steps: list[list[int]] = [[]]
    for pairs in members.values():
        if len(steps[-1]) + len(pairs) > batch_size:
            steps.append([])
        steps[-1] += pairs
    return [np.asarray(step, np.int64) for step in steps if step]
