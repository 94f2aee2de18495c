"""Records to encoded pairs for training: what is wrong with a record is found here, before the first step."""

import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from multitap_jax.data.decode import ImageError
from multitap_jax.data.images import ImageReader
from multitap_jax.data.layouts import Grid, Vision
from multitap_jax.data.packing import Example
from multitap_jax.data.prompts import Encoded, Prompter, PromptError
from multitap_jax.data.records import Record, Rejected
from multitap_jax.data.seen import Print, print_of
from multitap_jax.files import file_hash
from multitap_jax.parallel.distributed import divided

AT_ONCE = 1024  # files handed to the threads at a time: millions of them need no list of futures


class Prepared(NamedTuple):
    """Encoded pairs with what was left out.

    Attributes:
      examples, ids, lines: parallel lists: the pair, its record's id, and the line that the record stands on.
      files, grids: of the image keys.
      rejected: records that cannot be used, in input order.
      groups: the group that each pair's record names, or None; parallel to `examples`.
      prints: hashes by which each pair's record is known again (`seen.py`); parallel to `examples`.
    """

    examples: list[Example]
    ids: list[str]
    lines: list[int]
    files: dict[Hashable, Path]
    grids: dict[Hashable, Grid]
    rejected: list[Rejected]
    groups: Sequence[str | None] = ()
    prints: Sequence[Print] = ()


def target_of(record: Record, target: str, target_range: tuple[float, float]) -> float | None:
    """The number to learn, mapped so that `target_range` becomes [0, 1]; None where the record has none.

    Raises:
      ValueError: for a target that is neither "score" nor "ratings.NAME", or outside of the range.
    """
    if target != "score" and not target.startswith("ratings."):
        raise ValueError(f"target {target!r}: expected score or ratings.NAME")
    value = record.target(target)
    if value is None:
        return None
    low, high = target_range
    if not low <= value <= high:
        raise ValueError(
            f"{target} = {value:g} lies outside of target_range {low:g} to {high:g}; give the lowest and the highest "
            "value of the scale, such as --config.data.target_range='(1, 5)'"
        )
    return (value - low) / (high - low)


def prepare(
    records: Sequence[Record],
    prompter: Prompter,
    reader: ImageReader,
    vision: Vision,
    *,
    target: str = "score",
    target_range: tuple[float, float] = (0.0, 1.0),
    max_length: int = 2048,
    advance: Callable[[int], None] = lambda files: None,
) -> Prepared:
    """Encodes records for training; a record without a usable target, text or picture goes to `rejected`.

    Every distinct file is read and decoded once, by several threads, and let go again. Images are identified by a hash
    of the file's bytes, so copies of one picture are one image.

    Args:
      records: what to train on.
      prompter, reader, vision: see `Processing`.
      target, target_range: see `target_of`.
      max_length: longest pair in tokens, image tokens included.
      advance: told how many more files were decoded.

    Raises:
      ValueError: see `Vision.check_length`.
    """
    vision.check_length(max_length)
    encoded = prompter.encode([r.text for r in records], [r.request for r in records], [len(r.images) for r in records])
    pairs = [_pair(*item, target, target_range) for item in zip(records, encoded, strict=True)]
    wanted = [path for r, pair in zip(records, pairs, strict=True) if not isinstance(pair, str) for path in r.images]
    pictures, broken = _check(dict.fromkeys(wanted), reader, advance)
    named: list[str | None] = []
    prints: list[Print] = []
    out = Prepared([], [], [], {}, {}, [], named, prints)
    for record, pair in zip(records, pairs, strict=True):
        reason = pair if isinstance(pair, str) else next((broken[f] for f in record.images if f in broken), None)
        if reason is None and not isinstance(pair, str):
            found = [pictures[path] for path in record.images]
            reason = _too_long(pair, [grid for _, grid in found], vision, max_length)
            if reason is None:
                out.files.update({key: path for (key, _), path in zip(found, record.images, strict=True)})
                out.grids.update(found)
                out.examples.append(pair._replace(images=tuple(key for key, _ in found)))
                out.ids.append(record.id)
                out.lines.append(record.line)
                named.append(record.group)
                prints.append(print_of(record, [key for key, _ in found]))
        if reason is not None:
            out.rejected.append(Rejected(record.line, record.id, reason))
    return out


def _pair(record: Record, item: Encoded | PromptError, target: str, target_range: tuple[float, float]) -> Example | str:
    """The pair, still without its pictures, or what is wrong with its text or target."""
    if isinstance(item, PromptError):
        return str(item)
    try:
        value = target_of(record, target, target_range)
    except ValueError as error:
        return str(error)
    return f"the record has no {target}" if value is None else Example(item.prefix, item.text, (), value)


def _too_long(pair: Example, grids: Sequence[Grid], vision: Vision, max_length: int) -> str | None:
    length = len(pair.prefix) + len(pair.text) + sum(vision.layout.num_tokens(grid) - 1 for grid in grids)
    if length <= max_length:
        return None
    return (
        f"the pair has {length} tokens, more than max_length = {max_length}; shorten the text, or raise "
        "--config.data.max_length"
    )


def _check(
    files: Iterable[Path], reader: ImageReader, advance: Callable[[int], None]
) -> tuple[dict[Path, tuple[str, Grid]], dict[Path, str]]:
    """Key and grid of each file that holds a whole picture, and what is wrong with each other one.

    Each of several processes looks at its share of the files.
    """

    def look(path: Path) -> tuple[str, Grid] | str:
        try:
            return file_hash(path), reader.checked_grid_of(path)
        except (ImageError, OSError) as error:
            return str(error)

    def look_at_all(share: Sequence[Path]) -> list[tuple[str, Grid] | str]:
        found: list[tuple[str, Grid] | str] = []
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="check") as pool:
            for first in range(0, len(share), AT_ONCE):
                for result in pool.map(look, share[first : first + AT_ONCE]):
                    found.append(result)
                    advance(1)
        return found

    good: dict[Path, tuple[str, Grid]] = {}
    broken: dict[Path, str] = {}
    paths = list(files)
    for path, result in zip(paths, divided(paths, look_at_all), strict=True):
        if isinstance(result, str):
            broken[path] = result
        else:
            good[path] = result[0], tuple(result[1])
    return good, broken
