"""The checks of one record's fields: each gives the value in the record's type, or raises BadRecord with the reason."""

import functools
import hashlib
import math
import os
import stat
from array import array
from pathlib import Path
from typing import Any

from multitap_jax.data.decode import ImageError, decode_image
from multitap_jax.data.tables import parse_json_cell


class BadRecord(Exception):
    """Carries the reason from the check that failed to the Rejected it becomes."""


class ImagePaths:
    """Turns the image column into usable paths, under the rules of one file.

    Args:
      root: the folder of the records file, which paths are relative to.
      allow_outside_root: let paths be absolute or leave `root`.
      decode: decode every picture; otherwise only look whether the file is there.
      need: False accepts files that are absent.
      flags: what flags begin with in the remedies.
    """

    def __init__(self, root: Path, *, allow_outside_root: bool, decode: bool, need: bool, flags: str = "--"):
        self.root, self.real_root = root, os.path.realpath(root)
        self.allow_outside_root, self.decode, self.need, self.flags = allow_outside_root, decode, need, flags
        # Bounded, so that a file of any length is read in constant memory.
        self.folder_inside = functools.lru_cache(maxsize=65_536)(self._inside)
        self.problem = functools.lru_cache(maxsize=65_536)(_image_problem)

    def __call__(self, value: Any) -> tuple[Path, ...]:
        """The paths of a record's pictures, at least one. Raises BadRecord."""
        names = value if isinstance(value, list) else [value]
        if value is None or not names:
            raise BadRecord("image is missing: give a path or a list of paths")
        return tuple(self._image(name) for name in names)

    def _image(self, name: Any) -> Path:
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            raise BadRecord(f"image {short(name)} is not a path")
        path = os.path.join(self.root, _unicode(name, "image"))
        if "://" in name:
            raise BadRecord(f"image {name} is an address: nothing is fetched; download it first")
        try:
            self._check_path(name, path)
        except OSError as error:  # for example a name too long, or a loop of links
            raise BadRecord(f"image {name} cannot be reached: {error.strerror}") from None
        if self.decode and (problem := self.problem(path)) is not None:
            raise BadRecord(problem)
        return Path(path)

    def _check_path(self, name: str, path: str) -> None:
        """Refuses a path that leaves the root, also through links, and one that is no file. One `lstat` a picture."""
        folder, last = os.path.split(path)
        mode = _mode(path, follow=False)
        if not self.allow_outside_root:
            remedy = f"move it inside, or use {self.flags}allow_outside_root=True"
            if os.path.isabs(name):
                raise BadRecord(f"image {name} is absolute, but paths are relative to the records file; {remedy}")
            plain = last not in ("", ".", "..") and not (mode is not None and stat.S_ISLNK(mode))
            if not (self.folder_inside(folder) if plain else self._inside(path)):
                raise BadRecord(f"image {name} is outside the folder of the records file; {remedy}")
        if self.need:
            if mode is not None and stat.S_ISLNK(mode):
                mode = _mode(path, follow=True)
            if mode is None:
                raise BadRecord(f"image {name}: file not found in {self.root}, the folder of the records file")
            if not stat.S_ISREG(mode):
                raise BadRecord(f"image {name} is not a regular file")

    def _inside(self, path: str) -> bool:
        return os.path.commonpath([self.real_root, os.path.realpath(path)]) == self.real_root


class SeenIds:
    """The set of 64-bit hashes of all ids: open addressing in one flat array, 12 to 24 bytes an id.

    Ten million ids take 134 MB; the chance that any two of them collide (and a good record is called a duplicate) is
    n^2 / 2^65 = 3e-6.
    """

    def __init__(self) -> None:
        self.table = array("Q", [0]) * 1024
        self.count = 0

    def add(self, name: str) -> bool:
        """Adds an id; False where it was there."""
        key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") or 1  # 0 marks a gap
        slot = self._slot(key)
        if self.table[slot] == key:
            return False
        self.table[slot] = key
        self.count += 1
        if self.count * 3 > len(self.table) * 2:
            self._grow()
        return True

    def _slot(self, key: int) -> int:
        table, mask = self.table, len(self.table) - 1
        slot = key & mask
        while table[slot] not in (0, key):
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        old = self.table
        self.table = array("Q", [0]) * (2 * len(old))
        for key in old:
            if key:
                self.table[self._slot(key)] = key


def from_table(row: dict[str, Any]) -> dict[str, Any]:
    """A row of CSV or Parquet as a JSON record would have it: empty cells null, JSON cells and ratings.* unfolded."""
    cells = {name: None if value == "" else value for name, value in row.items()}
    result = {name: value for name, value in cells.items() if not name.startswith("ratings.")}
    columns = {name.removeprefix("ratings."): _cell_number(cells[name], name) for name in cells if name not in result}
    image, ratings = cells.get("image"), cells.get("ratings")
    if isinstance(image, str) and image.lstrip().startswith("["):
        result["image"] = _json_cell(image, "image")
    if isinstance(ratings, str):
        ratings = _json_cell(ratings, "ratings")
    elif isinstance(ratings, list) and all(isinstance(pair, tuple) for pair in ratings):  # Parquet's map type
        ratings = dict(ratings)
    given = [name for name, value in columns.items() if value is not None]
    if isinstance(ratings, dict) and (both := ratings.keys() & given):
        raise BadRecord(f"ratings.{min(both)} is given twice: in its own column and in the column 'ratings'")
    if ratings is None or isinstance(ratings, dict):
        ratings = columns | (ratings or {})
    result["ratings"] = ratings
    if "score" in cells:
        result["score"] = _cell_number(cells["score"], "score")
    return result


def _json_cell(text: str, name: str) -> Any:
    try:
        return parse_json_cell(text)
    except ValueError as error:
        raise BadRecord(f"{name} is not JSON: {error}") from None


def _cell_number(value: Any, name: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        raise BadRecord(f"{name} is {short(value)}, not a number") from None


def read_string(row: dict[str, Any], name: str, why: str) -> str:
    """A string that must be there and hold more than white space."""
    value = row.get(name)
    if value is None:
        raise BadRecord(f"{name} is missing: {why}")
    if not isinstance(value, str):
        raise BadRecord(f"{name} is {short(value)}, not a string")
    if not value.strip():
        raise BadRecord(f"{name} is empty: {why}")
    return _unicode(value, name)


def read_optional_string(row: dict[str, Any], name: str) -> str | None:
    """A string or None; an empty one counts as none."""
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise BadRecord(f"{name} is {short(value)}, not a string")
    return _unicode(value, name) if value else None


def _unicode(value: str, name: str) -> str:
    """Half a surrogate pair, or a byte that was no UTF-8, would stop a tokenizer far from here."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(f"{name} is not valid Unicode at character {error.start}: write the file in UTF-8") from None
    return value


def read_number(value: Any, name: str) -> float | None:
    """A finite number or None; a truth value is no number."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRecord(f"{name} is {short(value)}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadRecord(f"{name} is {number}: give a finite number, or null where there is none")
    return number


def read_ratings(value: Any) -> dict[str, float | None]:
    """Objective -> finite number or None."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadRecord(f"ratings is {short(value)}, not an object of objective: number")
    if not all(isinstance(name, str) and name.strip() for name in value):
        raise BadRecord("ratings has an objective without a name")
    return {_unicode(name, "ratings"): read_number(number, f"ratings.{name}") for name, number in value.items()}


def _mode(path: str, follow: bool) -> int | None:
    """The kind of a file, or None where there is none. Raises OSError where that cannot be told."""
    try:
        return os.stat(path, follow_symlinks=follow).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _image_problem(path: str) -> str | None:
    try:
        decode_image(path)
    except ImageError as error:
        return image_reason(error)
    return None


def image_reason(error: ImageError) -> str:
    """The words for a picture that failed, whether found while loading records or later while decoding."""
    return str(error)


def short(value: Any) -> str:
    """A value as it may stand in a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
