"""Writing safetensors folders without holding them in memory: a file is whole or absent."""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from multitap_jax.weights.files import INDEX, SINGLE
from multitap_jax.weights.mapping import WeightError
from multitap_jax.weights.stored import DTYPES

_CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}

Header = tuple[tuple[int, ...], np.dtype]  # shape and type of a tensor


def write_folder(
    folder: Path, headers: Mapping[str, Header], tensors: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int
) -> None:
    """Writes tensors, in the order of `headers`, as `model.safetensors` or as shards with an index.

    Each file appears whole or not at all. Weight files of an earlier save that are not part of this one are removed.
    """
    shards = _partition(headers, max_shard_bytes)
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    source = iter(tensors)
    for name, shard in zip(names, shards, strict=True):
        _replace(folder / name, _serialise(shard, source))
    keep = set(names)
    if len(shards) > 1:
        total = sum(_bytes(header) for header in headers.values())
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        _replace(folder / INDEX, [json.dumps(index, indent=2).encode()])
        keep.add(INDEX)
    for path in (*folder.glob("model*.safetensors"), folder / INDEX):
        if path.name not in keep:
            path.unlink(missing_ok=True)


def _serialise(shard: Mapping[str, Header], source: Iterator[tuple[str, np.ndarray]]) -> Iterator[Any]:
    """The parts of a safetensors file: length, header, then one tensor after another."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, header in shard.items():
        end = offset + _bytes(header)
        entries[name] = {"dtype": _CODES[header[1]], "shape": list(header[0]), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name, header in shard.items():
        key, tensor = next(source)
        if key != name or (tensor.shape, tensor.dtype) != header:
            raise WeightError(f"expected {name} {header} next, got {key} {tensor.shape} {tensor.dtype}")
        yield np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)


def write_file(path: Path, headers: Mapping[str, Header], tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes tensors, in the order of `headers`, as one file that is whole or absent."""
    _replace(path, _serialise(headers, iter(tensors)))


def _replace(path: Path, parts: Iterable[Any]) -> None:
    """Writes a file beside its place, flushes it to the disk, then moves it there."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _partition(headers: Mapping[str, Header], max_shard_bytes: int) -> list[dict[str, Header]]:
    shards: list[dict[str, Header]] = [{}]
    size = 0
    for name, header in headers.items():
        if shards[-1] and size + _bytes(header) > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = header
        size += _bytes(header)
    return shards


def _bytes(header: Header) -> int:
    return int(np.prod(header[0], dtype=np.int64)) * header[1].itemsize
