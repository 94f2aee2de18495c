"""The hash of a folder's tensors (`files.tensor_hash`), read in parts or while they are loaded."""

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from multitap_jax.files import combined_hash, tensor_digest
from multitap_jax.weights.files import stored_tensors
from multitap_jax.weights.stored import Stored, read_header

WAITING = 1 << 28  # bytes that may wait to be hashed while more is read
THREADS = 4


def folder_hash(folder: str | Path) -> str:
    """The hash of all tensors of a folder; a few parts of them are in memory at a time."""
    return _hash(stored_tensors(folder).values())


def file_tensor_hash(path: Path) -> str:
    """The hash of the tensors of one safetensors file."""
    return _hash(read_header(path).values())


class ReadAlong:
    """Hashes tensors as they are read for another purpose, so that no byte is read twice.

    Args:
      folder: whose tensors are hashed.
    """

    def __init__(self, folder: str | Path):
        self._left = stored_tensors(folder)
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="hash")
        self._waiting: deque[tuple[int, Future[list[Any]]]] = deque()
        self._digests: list[list[Any]] = []

    def __call__(self, tensor: Stored, value: np.ndarray) -> None:
        """Takes a tensor's value, which must not change; waits where too much is waiting already."""
        if self._left.pop(tensor.name, None) is None:
            return
        while self._waiting and sum(size for size, _ in self._waiting) + value.nbytes > WAITING:
            self._digests.append(self._waiting.popleft()[1].result())
        parts = [np.ascontiguousarray(value).reshape(-1).view(np.uint8)]
        work = self._pool.submit(tensor_digest, tensor.name, tensor.dtype, tensor.shape, parts)
        self._waiting.append((value.nbytes, work))

    def result(self) -> str:
        """The hash of the whole folder; reads what nobody has read."""
        with self._pool as pool:
            self._digests += [work.result() for _, work in self._waiting]
            return combined_hash([*self._digests, *pool.map(_digest, self._left.values())])


def _hash(tensors: Iterable[Stored]) -> str:
    with ThreadPoolExecutor(THREADS) as pool:
        return combined_hash(pool.map(_digest, tensors))


def _digest(tensor: Stored) -> list[Any]:
    return tensor_digest(tensor.name, tensor.dtype, tensor.shape, tensor.parts())
