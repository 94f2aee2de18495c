"""Files that are either whole or absent, that one process writes at a time, and hashes that depend on content alone."""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

try:
    import fcntl
except ImportError:  # only POSIX has file locks; elsewhere two runs on one output are the user's to avoid
    fcntl = None  # type: ignore[assignment]


def canonical_hash(value: Any) -> str:
    """sha256 (hex) of a JSON value, independent of key order and white space."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_hash(tensors: Mapping[str, np.ndarray]) -> str:
    """sha256 (hex) over the name, type, shape and bytes of every tensor, whatever their order or files."""

    def digest(name: str) -> list[Any]:
        data = np.ascontiguousarray(tensors[name])
        return tensor_digest(name, data.dtype, tensors[name].shape, [data.reshape(-1).view(np.uint8)])

    return combined_hash(map(digest, tensors))


def tensor_digest(name: str, dtype: np.dtype, shape: Sequence[int], parts: Iterable[np.ndarray]) -> list[Any]:
    """Name, type, shape and sha256 (hex) of one tensor whose bytes come in parts, uint8; lets go of the interpreter."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.data)
    return [name, dtype.name, tuple(shape), found.hexdigest()]


def combined_hash(digests: Iterable[list[Any]]) -> str:
    """`tensor_hash` of the tensors with these `tensor_digest`s."""
    return canonical_hash(sorted(digests))


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


def try_lock(descriptor: int) -> bool:
    """Whether the open file is now this process's alone; the lock ends with the process, however that ends.

    True, too, where there are no locks: not POSIX, or a file system without them.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


class FolderInUseError(RuntimeError):
    """Another process is writing into the folder."""


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Holds a folder, made if need be, against a second run into it; `.lock` inside is what is locked, and goes then.

    Raises:
      FolderInUseError: another process holds it.
      NotADirectoryError: a file has its name.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: is a file, and a folder is written here; choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not try_lock(descriptor):
                raise FolderInUseError(f"{folder}: another process is writing into it; wait or choose another folder")
            if not _is_open_as(descriptor, path):
                continue  # who held it before has just taken it away
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    path.unlink()  # while it is held: nobody locks a file that is about to go
            return
        finally:
            os.close(descriptor)


def _is_open_as(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


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
