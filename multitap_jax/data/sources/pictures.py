"""Where the pictures of a converted dataset lie: all under its own folder, so that nothing downstream needs a flag.

Embedded ones are written once under the hash of their bytes. Files are hard links to where they lie, which cost no
space, and copies where the file system has no links (or is another one).
"""

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from multitap_jax.data.fields import BadRecord

FOLDER = "images"
_KINDS = ((b"\xff\xd8\xff", ".jpg"), (b"\x89PNG", ".png"), (b"GIF8", ".gif"), (b"BM", ".bmp"), (b"II*\0", ".tif"))


class Pictures:
    """Puts pictures into `output/images`; a second run finds what the first has put there.

    Args:
      output: the folder of the converted dataset.
      roots: folders that published names are looked up in; empty takes no pictures and keeps the names.

    Attributes:
      files: different pictures so far. missing: names that no root has.
    """

    def __init__(self, output: Path, roots: Sequence[Path]):
        self.output, self.roots = output, roots
        self.missing: dict[str, None] = {}
        self._known: dict[str, str | None] = {}
        self._named: dict[Path, str] = {}  # the longest name that each file was found by

    @property
    def files(self) -> int:
        return sum(path is not None for path in self._known.values())

    def __call__(self, image: str | bytes) -> str:
        """The picture's path relative to the output folder. Raises BadRecord where there is none to be had."""
        if not isinstance(image, str | bytes):
            raise BadRecord(f"picture {image!r} is not a name")
        name = hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else image
        if name not in self._known:
            self._known[name] = self._written(name, image) if isinstance(image, bytes) else self._linked(image)
        found = self._known[name]
        if found is None:
            self.missing[name] = None
            raise BadRecord(f"picture {name} is not in {', '.join(map(str, self.roots))}")
        return found

    def _written(self, name: str, content: bytes) -> str:
        suffix = next((suffix for magic, suffix in _KINDS if content.startswith(magic)), None)
        if suffix is None and content[:4] == b"RIFF" and content[8:12] == b"WEBP":
            suffix = ".webp"
        if suffix is None:
            raise BadRecord(f"the embedded picture begins with {content[:8]!r}, no kind that is known")
        place = f"{FOLDER}/{name[:2]}/{name[:32]}{suffix}"
        path = self.output / place
        if self.roots and not (path.is_file() and path.stat().st_size == len(content)):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".partial")
            partial.write_bytes(content)
            os.replace(partial, path)
        return place

    def _linked(self, name: str) -> str | None:
        parts = _plain_parts(name)
        place = "/".join((FOLDER, *parts))
        if not self.roots:
            return place
        source = self._source(parts)
        if source is None:
            return None
        self._check_alone(name, source)
        source = source.resolve()  # a link to the link itself would break
        path = self.output / place
        if path.exists() and (path.samefile(source) or _written_of(path) == _written_of(source)):
            return place
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.unlink(missing_ok=True)
        try:
            os.link(source, partial)
        except OSError:
            shutil.copy2(source, partial)
        os.replace(partial, path)
        return place

    def _check_alone(self, name: str, source: Path) -> None:
        """Refuses a file for two names whose folders differ: it is at most the picture of one of them."""
        first = self._named.setdefault(source, name)
        short, long = sorted((_all_parts(first), _all_parts(name)), key=len)
        if short != long[len(long) - len(short) :]:
            raise BadRecord(f"pictures {name} and {first} are both found as {source}: give the folder above theirs")
        if len(_all_parts(name)) > len(_all_parts(first)):
            self._named[source] = name

    def _source(self, parts: tuple[str, ...]) -> Path | None:
        """The file whose path ends as the published name does, the longest end first: folders are often renamed."""
        for start in range(len(parts)):
            for root in self.roots:
                path = root.joinpath(*parts[start:])
                if _is_file(path):
                    return path
        return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long
        return False


def _written_of(path: Path) -> tuple[int, int]:
    """What a copy has of the file that it was made of."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _all_parts(name: str) -> tuple[str, ...]:
    """The parts of a published name, without an address's scheme and the root."""
    path = PurePosixPath(name.replace("\\", "/").rpartition("://")[2])
    return path.parts[path.is_absolute() :]


def _plain_parts(name: str) -> tuple[str, ...]:
    """The parts of a published name. Of an address or an absolute path the last one alone."""
    if "\0" in name or not name.strip() or name != name.encode(errors="replace").decode():
        raise BadRecord(f"picture {name!r} is not a name")
    path = PurePosixPath(name.replace("\\", "/"))
    parts = (path.name,) if "://" in name or path.is_absolute() else path.parts
    if ".." in parts or parts in ((), ("",)):
        raise BadRecord(f"picture {name} leaves its folder")
    return tuple(parts)
