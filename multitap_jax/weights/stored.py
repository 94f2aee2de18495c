"""One safetensors file: what is in it by its header alone, and its tensors one at a time.

The format (github.com/huggingface/safetensors): 8 bytes with the length of the header, the header (JSON: name -> type,
shape, place), then the tensors, without gaps. Files are read, not mapped: mapped pages count as this process's memory.
"""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from multitap_jax.weights.mapping import WeightError

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
LONGEST_HEADER = 100_000_000  # as the format's own reader has it
ALIGNMENT = 64
HASHED = 16 << 20  # bytes of a part of a tensor
PART = 1 << 30  # bytes asked for at once; Linux gives no more than 2 GiB


class FolderError(WeightError):
    """A checkpoint folder that lacks a file or holds a broken one; the message names the file."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor of a file: its header, and where its bytes are.

    Attributes:
      path: the file.
      name: the tensor's name in it.
      shape, dtype: of the tensor.
      begin: offset of its first byte in the file.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    begin: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        """The tensor, or some consecutive rows of it, in memory of its own; reads no other bytes.

        Raises:
          FolderError: the file has become shorter, or cannot be read.
        """
        if not self.shape:
            return self._read(self.begin, (), self.dtype)
        first, last, _ = rows.indices(self.shape[0])
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return self._read(self.begin + first * row, (max(last - first, 0), *self.shape[1:]), self.dtype)

    def parts(self) -> Iterator[np.ndarray]:
        """The bytes of the tensor, uint8, a bounded part at a time."""
        for start in range(0, self.nbytes, HASHED):
            yield self._read(self.begin + start, (min(HASHED, self.nbytes - start),), np.dtype(np.uint8))

    def _read(self, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        out = aligned_empty(shape, dtype)
        view = out.reshape(-1).view(np.uint8).data
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise FolderError(f"{self.path}: cannot be read ({error.strerror}); fetch or copy it again") from error
        try:
            while view:
                count = os.preadv(descriptor, [view[:PART]], offset)
                if not count:
                    raise FolderError(f"{self.path}: ended while {self.name} was read; something is changing the file")
                view, offset = view[count:], offset + count
        finally:
            os.close(descriptor)
        return out


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """As `np.empty`, at an address that jax takes over on a CPU instead of copying."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % ALIGNMENT
    return raw[first : first + size].view(dtype).reshape(shape)


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, by name, in the order of their bytes.

    Raises:
      FolderError: not such a file, truncated, or with a header that contradicts itself; all that is wrong is listed.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            if size < 8 or length > min(LONGEST_HEADER, size - 8):
                raise _broken(path, f"it has {size} bytes, and its header should have {length}")
            header = json.loads(file.read(length))
    except (OSError, ValueError) as error:
        if isinstance(error, FolderError):
            raise
        raise _broken(path, f"its header cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise _broken(path, "its header is no JSON object")
    header.pop("__metadata__", None)
    tensors, problems = {}, []
    for name, entry in header.items():
        try:
            tensors[name] = _stored(path, name, entry, 8 + length)
        except (ValueError, TypeError, KeyError) as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise _broken(path, "; ".join(problems))
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes)))
    ends = [8 + length, *(tensor.begin + tensor.nbytes for tensor in tensors.values())]
    for (name, tensor), end in zip(tensors.items(), ends, strict=False):
        if tensor.begin != end:
            raise _broken(path, f"{name} begins at byte {tensor.begin}, and what is before it ends at {end}")
    if ends[-1] != size:
        what = "truncated" if size < ends[-1] else "too long"
        raise _broken(path, f"{what}: it has {size} bytes, and its header describes {ends[-1]}")
    return tensors


def _stored(path: Path, name: str, entry: Any, data: int) -> Stored:
    code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if code not in DTYPES:
        raise ValueError(f"its type is {code}, which is none of {', '.join(DTYPES)}")
    if not all(isinstance(number, int) and number >= 0 for number in itertools.chain(shape, (begin, end))):
        raise ValueError(f"shape {shape} or place {begin}..{end} is impossible")
    tensor = Stored(path, name, shape, np.dtype(DTYPES[code]), data + begin)
    if tensor.nbytes != end - begin:
        raise ValueError(f"{code} {list(shape)} takes {tensor.nbytes} bytes, and it has {end - begin}")
    return tensor


def _broken(path: Path, what: str) -> FolderError:
    return FolderError(f"{path} is not a whole safetensors file ({what}); fetch or copy it again")
