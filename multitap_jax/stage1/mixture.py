"""Training records out of several files, some of them cut so that no human score outweighs another.

The official mixture is all of Polaris and a part of ImageReward in which every rating occurs as often as the rarest.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from multitap_jax.config import ConfigError, DataConfig
from multitap_jax.data.records import Record
from multitap_jax.data.tables import find_records_file

Origin = Mapping[str, Path]  # the records file that each id is from


def record_files(names: str) -> list[Path]:
    """The records files of a setting: one, or several with commas between; none for "".

    Raises:
      RecordsError: one is no records file, nor a folder that holds one.
    """
    return [find_records_file(name.strip()) for name in names.split(",") if name.strip()]


def balanced(records: Sequence[Record], target: str, seed: int) -> list[Record]:
    """Of every value of the target as many records as its rarest value has, drawn at random, in input order.

    The official rule; which records are drawn is another matter than in pandas, which drew them there.
    """
    values = np.array([record.target(target) for record in records], np.float64)
    _, level, counts = np.unique(values, return_inverse=True, return_counts=True)
    if not len(counts):
        return []
    order = np.random.default_rng(seed).permutation(len(records))
    by_level = order[np.argsort(level[order], kind="stable")]
    starts = np.cumsum(counts) - counts
    kept = np.concatenate([by_level[start : start + counts.min()] for start in starts])
    return [records[row] for row in np.sort(kept)]


def training_records(data: DataConfig, seed: int, load: Callable[[Path], list[Record]]) -> tuple[list[Record], Origin]:
    """All of `data.train` and the balanced part of `data.balanced`, with the file that each id is from.

    Args:
      data: the settings.
      seed: of the balancing.
      load: reads the usable records of one file, all of which have the target.

    Raises:
      ConfigError: a file is named twice, or two of them have an id in common.
    """
    plain, even = record_files(data.train), record_files(data.balanced)
    records: list[Record] = []
    origin: dict[str, Path] = {}
    for file in [*plain, *even]:
        found = load(file)
        found = balanced(found, data.target, seed) if file in even else found
        for record in found:
            if record.id in origin:
                raise ConfigError(
                    f"id {record.id!r} is in {origin[record.id]} and in {file}: ids are unique in a run; name each "
                    "file once in config.data.train and config.data.balanced, and give its records ids of their own"
                )
            origin[record.id] = file
        records += found
    return records, origin
