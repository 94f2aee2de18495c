"""Long inputs shared out among the processes of a run: each does its own blocks, and the first puts them in order.

A block is a stretch of the input. What became of it waits in a file until its turn comes, so whatever a process had
finished stays when the run is killed, and a run of another number of processes takes it up. A lone process has no
files: its blocks are always in turn.
"""

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import jax

from multitap_jax.files import write_atomic
from multitap_jax.parallel import watchdog
from multitap_jax.parallel.distributed import agree, from_main, is_main_process, wait_until
from multitap_jax.scoring.readahead import with_results

AHEAD = 64  # blocks that process 0 may be ahead of the others: it remembers their records
Item = TypeVar("Item")


class Block(NamedTuple, Generic[Item]):
    """Records of the input, and the place of the first of them, from 0."""

    first: int
    items: list[Item]


def blocks(items: Iterator[Item], size: int, first: int = 0) -> Iterator[Block[Item]]:
    """Cuts what follows record `first` at the multiples of `size`, wherever it begins."""
    while part := list(islice(items, size - first % size)):
        yield Block(first, part)
        first += len(part)


Work = Callable[[Iterable[Block[Item]]], Iterator[Any]]


class Parts(Generic[Item]):
    """The blocks of one job.

    Args:
      folder: where results wait; the first process makes it at `begin` and removes it at the end. Further files of
        results may be put there.
      identity: hash of what decides the results; files of another job are not taken for those of this one.
      size: records a block.
    """

    def __init__(self, folder: Path, identity: str, size: int):
        self.folder, self._identity, self._size = folder, identity[:16], size
        self._index, self._count = jax.process_index(), jax.process_count()
        self._held: dict[int, Any] = {}

    def begin(self, start: int | None = None) -> int | None:
        """How many records are done: what the first process gives, None for nothing left to do. Collective.

        Raises:
          ValueError: the processes would not do the same job.
        """
        agree({"job": self._identity, "records a block": self._size})
        if self._count > 1 and is_main_process() and start is not None:
            self.folder.mkdir(exist_ok=True)
        return from_main(start)

    def path(self, block: Block[Item], suffix: str) -> Path:
        """A name of its own for a file of a block."""
        last = block.first + len(block.items)
        return self.folder / f"{block.first:012d}-{last:012d}.{self._identity}{suffix}"

    def in_order(
        self,
        items: Iterator[Item],
        start: int,
        work: Work[Item],
        whole: Callable[[Block[Item]], bool] = lambda block: True,
    ) -> Iterator[tuple[Block[Item], Any]]:
        """In the first process: all blocks with their results, in order; it does its own share on the way.

        Args:
          items: the input after its first `start` records.
          start: see `begin`.
          work: makes the JSON results of blocks, in their order; it may ask for blocks before it gives results.
          whole: whether other files of a finished block are still there.
        """
        waiting: deque[Block[Item]] = deque()
        for _ in self._do(items, start, work, whole, waiting.append):
            while waiting and (self._has(waiting[0], whole) or (len(waiting) > AHEAD and not self._mine(waiting[0]))):
                yield self._take(waiting.popleft(), whole)
        while waiting:
            yield self._take(waiting.popleft(), whole)
        shutil.rmtree(self.folder, ignore_errors=True)

    def follow(
        self,
        items: Iterator[Item],
        start: int,
        work: Work[Item],
        whole: Callable[[Block[Item]], bool] = lambda block: True,
    ) -> None:
        """In all other processes: does their share, then waits until the first has put everything in order."""
        deque(self._do(items, start, work, whole), maxlen=0)
        wait_until(lambda: not self.folder.exists(), self._files)

    def _do(
        self,
        items: Iterator[Item],
        start: int,
        work: Work[Item],
        whole: Callable[[Block[Item]], bool],
        see: Callable[[Block[Item]], None] = lambda block: None,
    ) -> Iterator[None]:
        """Does this process's share, a block a turn; `see` is told of every block of the input."""

        def share() -> Iterator[Block[Item]]:
            for block in blocks(items, self._size, start):
                mine = self._mine(block) and not self._has(block, whole)  # before `see`, after which it may be taken
                see(block)
                if mine:
                    yield block

        for block, result in with_results(share(), work):  # where work computes, another thread asks share()
            watchdog.beat(f"record {block.first + len(block.items)}")
            if self._count == 1:
                self._held[block.first] = result
            else:
                write_atomic(self.path(block, ".json"), json.dumps(result).encode())
            yield

    def _mine(self, block: Block[Item]) -> bool:
        return block.first // self._size % self._count == self._index

    def _has(self, block: Block[Item], whole: Callable[[Block[Item]], bool]) -> bool:
        return block.first in self._held or (self.path(block, ".json").is_file() and whole(block))

    def _take(self, block: Block[Item], whole: Callable[[Block[Item]], bool]) -> tuple[Block[Item], Any]:
        wait_until(lambda: self._has(block, whole), self._files)
        if block.first in self._held:
            return block, self._held.pop(block.first)
        path = self.path(block, ".json")
        result = json.loads(path.read_bytes())
        path.unlink()
        return block, result

    def _files(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("*")) if self.folder.exists() else []
