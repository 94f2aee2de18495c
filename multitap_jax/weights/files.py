"""Safetensors folders: which files, what is in them, and how they are written without holding them in memory."""

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from multitap_jax.weights.mapping import WeightError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES: dict[str, Any] = {
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
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}


class FolderError(WeightError):
    """A checkpoint folder that lacks a file or holds a broken one; the message names the file."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises FolderError if it is missing or no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FolderError(f"{path} does not exist; a checkpoint folder needs it") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FolderError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise FolderError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def read_tensors(folder: str | Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder's `model*.safetensors`, by name; the bytes are mapped and read only when touched.

    Raises:
      FolderError: no weight file, a missing shard, or a broken file.
      WeightError: two files hold a tensor of the same name.
    """
    folder = Path(folder)
    tensors: dict[str, np.ndarray] = {}
    origin: dict[str, str] = {}
    doubled = []
    for name in weight_files(folder):
        for key, tensor in read_file(folder / name).items():
            if key in tensors:
                doubled.append(f"doubled: {key} is in {origin[key]} and in {name}")
            tensors[key], origin[key] = tensor, name
    if doubled:
        raise WeightError(f"{folder}:\n  " + "\n  ".join(doubled))
    if _indexed(folder):
        listed = read_json(folder / INDEX)["weight_map"]
        lost = [f"{key} (in {shard})" for key, shard in listed.items() if key not in tensors]
        if lost:
            raise FolderError(f"{folder / INDEX} names tensors that are not there: {', '.join(lost)}")
    return tensors


def weight_files(folder: Path) -> list[str]:
    """Names of the files that make up the weights: `model.safetensors`, else what the index names, else all shards."""
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if _indexed(folder):
        return _index_shards(folder)
    shards = sorted(path.name for path in folder.glob("model*.safetensors"))
    if not shards:
        other = sorted(path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".bin", ".pt", ".pth"))
        hint = f" It holds {', '.join(other)}: convert to safetensors named model*.safetensors." if other else ""
        raise FolderError(f"{folder} has no model.safetensors and no shards of it.{hint}")
    numbered = [
        match for match in (re.fullmatch(r"model-(\d+)-of-(\d+)\.safetensors", name) for name in shards) if match
    ]
    for total in {int(match[2]) for match in numbered}:
        there = {int(match[1]) for match in numbered if int(match[2]) == total}
        lost = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in sorted(set(range(1, total + 1)) - there)]
        if lost:
            raise FolderError(f"{folder} lacks {', '.join(lost)}")
    return shards


def read_file(path: Path) -> dict[str, np.ndarray]:
    """Mapped tensors of one safetensors file; raises FolderError if it is truncated or corrupt."""
    try:
        with safe_open(path, framework="numpy"):  # checks the header: types, sizes, no gaps, no overlap, full length
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, OSError) as error:
        raise FolderError(f"{path} is not a whole safetensors file ({error}); fetch or copy it again") from error
    header.pop("__metadata__", None)
    raw = np.memmap(path, np.uint8, mode="r")
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise FolderError(f"{path}: {name} has type {entry['dtype']}, which is not supported")
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        tensors[name] = raw[begin:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


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


def _indexed(folder: Path) -> bool:
    return not (folder / SINGLE).is_file() and (folder / INDEX).is_file()


def _index_shards(folder: Path) -> list[str]:
    listed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise FolderError(f"{folder / INDEX} has no weight_map")
    shards = sorted({str(name) for name in listed.values()})
    for name in shards:
        if Path(name).name != name:
            raise FolderError(f"{folder / INDEX} names {name!r}, which is not a file of this folder")
    lost = [name for name in shards if not (folder / name).is_file()]
    if lost:
        raise FolderError(f"{folder} lacks {', '.join(lost)}, named in {INDEX}")
    return shards
