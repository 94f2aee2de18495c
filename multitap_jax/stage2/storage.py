"""A folder of files that are whole or absent: on this machine, or behind any URL that fsspec knows."""

import mmap
import os
from pathlib import Path
from typing import Any, Protocol

from multitap_jax.files import sync_folder, write_atomic


class Folder(Protocol):
    """Named files in one place."""

    def make(self) -> None:
        """Creates the folder if need be."""
        ...

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        ...

    def read(self, name: str, count: int | None = None) -> bytes:
        """Its bytes, or the first `count` of them."""
        ...

    def view(self, name: str) -> memoryview:
        """All its bytes, read-only; those of this machine's disk are mapped, not copied."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Writes a file; a reader sees all of it or the file before."""
        ...

    def rename(self, name: str, new: str) -> None:
        """Gives a file another name, in place of any that has it."""
        ...


class LocalFolder:
    """A folder of this machine."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)

    def __str__(self) -> str:
        return str(self._path)

    def make(self) -> None:
        self._path.mkdir(parents=True, exist_ok=True)

    def exists(self, name: str) -> bool:
        return (self._path / name).is_file()

    def read(self, name: str, count: int | None = None) -> bytes:
        with (self._path / name).open("rb") as file:
            return file.read(-1 if count is None else count)

    def view(self, name: str) -> memoryview:
        with (self._path / name).open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return memoryview(b"")  # an empty file cannot be mapped
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def write(self, name: str, content: bytes) -> None:
        write_atomic(self._path / name, content)

    def rename(self, name: str, new: str) -> None:
        os.replace(self._path / name, self._path / new)
        sync_folder(self._path)


class RemoteFolder:
    """A folder behind a URL such as gs://bucket/embeddings; object stores show an object only once it is whole."""

    def __init__(self, url: str) -> None:
        try:
            import fsspec
        except ImportError as error:
            raise ImportError(f"{url}: reading and writing URLs needs fsspec; pip install fsspec") from error
        self._url = url.rstrip("/")
        self._files: Any
        self._files, self._root = fsspec.core.url_to_fs(self._url)

    def __str__(self) -> str:
        return self._url

    def _name(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def make(self) -> None:
        self._files.makedirs(self._root, exist_ok=True)

    def exists(self, name: str) -> bool:
        return bool(self._files.exists(self._name(name)))

    def read(self, name: str, count: int | None = None) -> bytes:
        return bytes(self._files.cat_file(self._name(name), start=0, end=count))

    def view(self, name: str) -> memoryview:
        return memoryview(self.read(name))

    def write(self, name: str, content: bytes) -> None:
        self._files.pipe_file(self._name(name), content)

    def rename(self, name: str, new: str) -> None:
        self._files.mv(self._name(name), self._name(new))


def open_folder(path: str | Path) -> Folder:
    """The folder of a local path or of a URL (anything with ://)."""
    return RemoteFolder(str(path)) if "://" in str(path) else LocalFolder(path)
