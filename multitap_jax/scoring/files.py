"""Files that are either whole or absent, and hashes that depend on content alone."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open


def canonical_hash(value: Any) -> str:
    """sha256 (hex) of a JSON value, independent of key order and white space."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_hash(paths: Iterable[Path]) -> str:
    """sha256 (hex) over the name, dtype, shape and bytes of every tensor in some safetensors files.

    The same tensors give the same hash however they are cut into files. Files are mapped, not read into memory, and
    tensors are hashed side by side (hashlib lets go of the interpreter lock).

    Raises:
      ValueError: for a file that is no whole safetensors file (the message names it), or a tensor present twice.
    """
    tensors: dict[str, tuple[str, list[int], np.ndarray]] = {}
    for path in sorted(paths):
        for name, dtype, shape, data in _mapped_tensors(path):
            if name in tensors:
                raise ValueError(f"{path}: tensor {name} is in two files of the folder; remove the stale one")
            tensors[name] = (dtype, shape, data)
    names = sorted(tensors)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(lambda name: hashlib.sha256(tensors[name][2].data).hexdigest(), names))
    return canonical_hash([[name, *tensors[name][:2], digest] for name, digest in zip(names, digests, strict=True)])


def tensor_dtypes(paths: Iterable[Path]) -> dict[str, str]:
    """Name -> dtype, as safetensors spells it, of all tensors in some files; only headers are read."""
    return {name: dtype for path in paths for name, dtype, *_ in _mapped_tensors(path)}


def load_matching(paths: Iterable[Path], pattern: str) -> dict[str, np.ndarray]:
    """The tensors whose whole name matches a regular expression; nothing else is read."""
    found: dict[str, np.ndarray] = {}
    for path in paths:
        names = [name for name, *_ in _mapped_tensors(path) if re.fullmatch(pattern, name)]
        if names:
            with safe_open(path, framework="numpy") as file:
                found |= {name: file.get_tensor(name) for name in names}
    return found


def _mapped_tensors(path: Path) -> list[tuple[str, str, list[int], np.ndarray]]:
    """(name, dtype, shape, uint8[bytes]) of each tensor: 8 bytes of header length, the JSON header, then the data."""
    size = path.stat().st_size
    if size < 8:
        raise ValueError(f"{path}: not a safetensors file ({size} bytes); copy it again")
    data = np.memmap(path, np.uint8, "r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    try:
        header = json.loads(data[8:start].tobytes())
        entries = [
            (name, entry["dtype"], entry["shape"], *entry["data_offsets"])
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: the safetensors header is damaged ({error}); copy the file again") from error
    end = start + max((stop for *_, stop in entries), default=0)
    if end != size:
        raise ValueError(f"{path}: {size} bytes, but its header says {end}; it is cut off or damaged, copy it again")
    return [(name, dtype, shape, data[start + first : start + stop]) for name, dtype, shape, first, stop in entries]


def sync_folder(folder: Path) -> None:
    """Makes renames and new names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file so that a reader, or a crash, sees the old content or the new and nothing between."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def json_bytes(value: Any) -> bytes:
    """Indented JSON, as people read it; NaN and infinity are errors."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


@contextlib.contextmanager
def new_folder(folder: Path, *, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """Yields an empty sibling folder that takes the name `folder` when the block ends well, and vanishes otherwise.

    An existing non-empty `folder` is replaced only where `replaceable(folder)` is true. There is a moment, between two
    renames, in which a replaced folder has its `.old` name; a crash there loses nothing, the next call clears it up.

    Raises:
      FileExistsError: when `folder` is in the way; nothing was written.
    """
    folder = Path(os.path.abspath(folder))
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FileExistsError(f"{folder}: is not a folder; choose another name")
    occupied = folder.is_dir() and any(folder.iterdir())
    if occupied and not replaceable(folder):
        raise FileExistsError(f"{folder}: is not empty and will not be replaced; choose another name or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        old = folder.with_name(f".{folder.name}.old")
        if occupied:
            if old.exists():
                shutil.rmtree(old)
            os.rename(folder, old)
        os.rename(temporary, folder)
        sync_folder(folder.parent)
        if occupied:
            shutil.rmtree(old)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
