"""What a model has seen: records it was trained on, or its heads were fitted on, told again by their content.

On its own rows a model looks better than it is, whatever names and folders they have by then. So artefacts keep hashes
of what went into them (in heads.safetensors), `score` leaves those beside its output, and `evaluate` looks the records
up that it judges. A hash has 64 bits: of a million records judged against ten million, one is taken for another with a
chance of 5e-7.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from multitap_jax.data.records import Record
from multitap_jax.data.tables import some
from multitap_jax.files import file_hash

# Who has seen: the weights, and the ridge heads on top of them.
TRAINED, FITTED = "trained", "fitted"
_PREFIX = "seen"


class Print(NamedTuple):
    """A record's hashes; `pair` and `pictures` are of content, None and () where its pictures cannot be read.

    Attributes:
      pair: of pictures, text and request, whatever the record is called.
      pictures: of each picture's bytes.
      group, id: of these names; `group` is None where the record has none.
    """

    pair: int | None
    pictures: tuple[int, ...]
    group: int | None
    id: int


# What two records may have in common, the strongest first: a field of `Print` each.
KINDS = ("pair", "pictures", "group", "id")


class Seen(NamedTuple):
    """Hashes of all records of a set, ascending and without repetition: uint64[n] of each of `KINDS`."""

    pair: np.ndarray
    pictures: np.ndarray
    group: np.ndarray
    id: np.ndarray

    @classmethod
    def of(cls, prints: Iterable[Print]) -> "Seen":
        """The set of records with these prints; nothing else of them is kept."""
        found = [array("Q") for _ in KINDS]
        for one in prints:
            for into, kind in zip(found, KINDS, strict=True):
                into.extend(_values(one, kind))
        return cls(*(np.unique(np.frombuffer(values, np.uint64)) for values in found))

    def __or__(self, other: "Seen") -> "Seen":
        """What either has seen."""
        return Seen(*(np.union1d(mine, theirs) for mine, theirs in zip(self, other, strict=True)))

    def among(self, prints: Sequence[Print]) -> dict[str, np.ndarray]:
        """int64[n] for each of `KINDS`: which of the records are known by it, and by nothing stronger."""
        left = np.ones(len(prints), bool)
        found = {}
        for kind, known in zip(KINDS, self, strict=True):
            lists = [_values(one, kind) for one in prints]
            owner = np.repeat(np.arange(len(prints)), [len(values) for values in lists])
            flat = np.fromiter((value for values in lists for value in values), np.uint64, len(owner))
            known_here = np.zeros(len(prints), bool)
            known_here[owner[np.isin(flat, known)]] = True
            found[kind] = np.flatnonzero(known_here & left)
            left &= ~known_here
        return found


def _values(one: Print, kind: str) -> tuple[int, ...]:
    value = getattr(one, kind)
    return () if value is None else value if isinstance(value, tuple) else (value,)


def print_of(record: Record, pictures: Sequence[str | None]) -> Print:
    """The print of a record; `pictures` are the sha256 (hex) of its files, None for one that cannot be read."""
    group = None if record.group is None else _hash("group", record.group)
    if any(picture is None for picture in pictures):
        return Print(None, (), group, _hash("id", record.id))
    own = tuple(int(picture[:16], 16) for picture in pictures if picture is not None)
    return Print(_hash("pair", own, record.text, record.request), own, group, _hash("id", record.id))


def prints_of(records: Sequence[Record]) -> list[Print]:
    """The prints of records, whose picture files are read for it, each once."""
    files = list(dict.fromkeys(path for record in records for path in record.images))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="hash") as pool:
        found = dict(zip(files, pool.map(_read, files), strict=True))
    return [print_of(record, [found[path] for path in record.images]) for record in records]


def _read(path: Path) -> str | None:
    try:
        return file_hash(path)
    except OSError:
        return None


def _hash(*content: object) -> int:
    return int.from_bytes(hashlib.blake2b(json.dumps(content).encode(), digest_size=8).digest(), "big")


def to_arrays(known: Mapping[str, Seen]) -> dict[str, np.ndarray]:
    """Tensors of a safetensors file, "seen.WHO.KIND" int64: not all readers know uint64; `known` is by who has seen."""
    return {
        f"{_PREFIX}.{who}.{kind}": values.view(np.int64)
        for who, seen in known.items()
        for kind, values in zip(KINDS, seen, strict=True)
    }


def is_seen(name: str) -> bool:
    """Whether this is the name of a tensor of `to_arrays`."""
    return name.startswith(f"{_PREFIX}.")


def from_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, Seen]:
    """What `to_arrays` was given; other arrays are left alone."""
    names = {name.split(".")[1] for name in arrays if is_seen(name)}
    return {who: Seen(*(arrays[f"{_PREFIX}.{who}.{kind}"].view(np.uint64) for kind in KINDS)) for who in sorted(names)}


def to_bytes(known: Mapping[str, Seen]) -> bytes:
    """A safetensors file of `to_arrays`."""
    return safetensors.numpy.save(to_arrays(known))


def from_bytes(content: bytes, name: str | Path) -> dict[str, Seen]:
    """What `to_bytes` was given. Raises ValueError, naming the file, for anything else."""
    try:
        return from_arrays(safetensors.numpy.load(content))
    except (safetensors.SafetensorError, KeyError, IndexError) as error:
        raise ValueError(f"{name}: damaged, or no hashes of records ({error}); restore it, or do without it") from error


_WORDS = {
    "pair": "were among those that {who}: how they are judged says nothing of new ones",
    "pictures": "show pictures of records that {who}, with other texts or requests",
    "group": "are of one group with records that {who}, whose pictures are others or not to be compared",
    "id": "have the ids of records that {who}, whose pictures are others or not to be compared: one record or two?",
}
_WHO = {TRAINED: "the model was trained on", FITTED: "the heads were fitted on"}


def told(known: Mapping[str, Seen], ids: Sequence[str], prints: Sequence[Print]) -> tuple[str, ...]:
    """What there is to say of records with these ids and prints: who has seen how many, and which for example.

    Nothing where nothing is known of the model, or none of them has been seen.
    """
    lines = []
    for who in [who for who in _WHO if who in known]:
        for kind, places in known[who].among(prints).items():
            if len(places):
                what = _WORDS[kind].format(who=_WHO[who])
                lines.append(f"{len(places):,} of {len(ids):,} records {what} ({some([ids[i] for i in places])})")
    blind = sum(one.pair is None for one in prints)
    if blind and known:
        lines.append(
            f"{blind:,} of {len(ids):,} records have no pictures here, so whether the model has seen them was told by "
            "their groups and ids alone"
        )
    return tuple(lines)
