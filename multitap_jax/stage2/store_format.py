"""Embeddings on disk: N rows of (id, group, embedding, labels), in checksummed shards, written once, resumable.

A folder holds `embeddings-00000.safetensors`, `embeddings-00001.safetensors`, ... and `manifest.json`. A shard has the
tensors `embeddings` [n, H] (float32 or bfloat16) and `labels` float32[n, T] (NaN: not rated), and in its metadata the
JSON lists `ids` and `groups`. Shards are counted, never sorted by name. Reading one needs nothing of this package:

    from safetensors.numpy import load_file            # safetensors.torch / .flax for bfloat16
    shard = load_file("embeddings-00000.safetensors")
    x, y = shard["embeddings"], shard["labels"]

The manifest is the truth: a shard counts once the manifest names it, and the manifest is replaced only after the shard
has reached the disk. A kill at any point therefore loses at most the rows since the last shard, and a torn shard file
is simply written again.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from multitap_jax.stage2.storage import Folder

FORMAT = "multitap-embeddings"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(jnp.bfloat16)}
_STORED = {"F32": np.dtype(np.float32), "BF16": np.dtype(jnp.bfloat16)}
_ENTRIES = {
    "hidden_size": "a number",
    "objectives": "distinct names",
    "dtype": f"one of {', '.join(DTYPES)}",
    "model_hash": "text",
    "fingerprint": "text",
    "total": "a number or null",
    "rows": "a number",
    "complete": "true or false",
    "shards": "a list",
}
_SHOWN = 20  # problems of a manifest


class StoreError(ValueError):
    """An embedding store that cannot be used as asked; the message names the file, the value and the remedy."""


class Entry(NamedTuple):
    """A shard as the manifest counts it."""

    file: str
    rows: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a store holds. It never changes: more rows are another manifest, which counts once it is on disk.

    Attributes:
      hidden_size: H.   objectives: names of the T label columns.   dtype: a key of `DTYPES`.
      model_hash, fingerprint: identity of the model, and of the records.
      total: rows the finished store will have; None if not known.
      complete: whether it is finished.   shards: in the order of the rows.
    """

    hidden_size: int
    objectives: tuple[str, ...]
    dtype: str
    model_hash: str
    fingerprint: str
    total: int | None
    complete: bool
    shards: tuple[Entry, ...] = ()

    @functools.cached_property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.rows for shard in self.shards)

    def with_shard(self, shard: Entry) -> "Manifest":
        """One that counts another shard."""
        complete = self.rows + shard.rows == self.total
        return dataclasses.replace(self, shards=(*self.shards, shard), complete=complete)

    def to_bytes(self) -> bytes:
        """Its file."""
        entries = {**dataclasses.asdict(self), "rows": self.rows, "shards": [shard._asdict() for shard in self.shards]}
        about = {"format": FORMAT, "version": FORMAT_VERSION}
        return json.dumps(about | {key: entries[key] for key in _ENTRIES}, indent=1).encode()


def shard_name(index: int) -> str:
    """File name of shard `index`, counted from 0."""
    return f"embeddings-{index:05d}.safetensors"


def read_manifest(folder: Folder) -> Manifest:
    """The manifest of a store.

    Raises:
      StoreError: there is none, or it is something else, or all that it lacks or contradicts itself in.
    """
    path = f"{folder}/{MANIFEST}"
    if not folder.exists(MANIFEST):
        raise StoreError(f"{path}: no such file; an embedding store is a folder that EmbeddingWriter has written")
    try:
        data = json.loads(folder.read(MANIFEST))
        found = (data["format"], data["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: not a manifest of an embedding store ({error}); write the store anew") from error
    if found != (FORMAT, FORMAT_VERSION):
        raise StoreError(f"{path}: format {found}, but this version reads {(FORMAT, FORMAT_VERSION)}")
    if problems := _problems(data) or _contradictions(data):
        more = [f"and {len(problems) - _SHOWN} more"] * (len(problems) > _SHOWN)
        listed = "\n  ".join(problems[:_SHOWN] + more)
        raise StoreError(f"{path}: cannot be right:\n  {listed}\nrestore it, or write the store anew")
    entries = {key: data[key] for key in _ENTRIES if key != "rows"}
    shards = tuple(Entry(*(shard[key] for key in Entry._fields)) for shard in data["shards"])
    return Manifest(**{**entries, "objectives": tuple(data["objectives"]), "shards": shards})


def _problems(data: dict[str, Any]) -> list[str]:
    """Entries that are missing, or not of their kind."""
    number = lambda value, least: type(value) is int and value >= least
    fits = {
        "hidden_size": lambda value: number(value, 1),
        "objectives": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
        "dtype": lambda value: isinstance(value, str) and value in DTYPES,
        "total": lambda value: value is None or number(value, 0),
        "rows": lambda value: number(value, 0),
        "complete": lambda value: isinstance(value, bool),
        "shards": lambda value: isinstance(value, list),
    }
    problems = [f"{key} is missing" for key in _ENTRIES if key not in data]
    for key, kind in _ENTRIES.items():
        if key in data and not fits.get(key, lambda value: isinstance(value, str))(data[key]):
            problems.append(f"{key} is {data[key]!r}, expected {kind}")
    for index, shard in enumerate(data["shards"] if isinstance(data.get("shards"), list) else []):
        whole = isinstance(shard, dict) and number(shard.get("rows"), 1) and isinstance(shard.get("sha256"), str)
        if not whole or shard.get("file") != shard_name(index):
            problems.append(f"shard {index} is {shard!r}, expected the file {shard_name(index)!r}, its rows and sha256")
    return problems


def _contradictions(data: dict[str, Any]) -> list[str]:
    """Entries that are each of their kind, but not true together."""
    problems, rows, total = [], sum(shard["rows"] for shard in data["shards"]), data["total"]
    if data["rows"] != rows:
        problems.append(f"rows is {data['rows']}, but its shards have {rows}")
    if total is not None and data["complete"] != (rows == total):
        problems.append(f"complete is {data['complete']}, with {rows} rows of {total}")
    if len(set(data["objectives"])) != len(data["objectives"]):
        problems.append(f"objectives {data['objectives']} are not distinct")
    return problems


def shard_bytes(ids: Sequence[str], embeddings: np.ndarray, labels: np.ndarray, groups: Sequence[str]) -> bytes:
    """The file of a shard."""
    return safetensors.numpy.save(
        {"embeddings": np.ascontiguousarray(embeddings), "labels": np.ascontiguousarray(labels)},
        metadata={"ids": json.dumps(list(ids)), "groups": json.dumps(list(groups))},
    )


def shard_content(data: memoryview) -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
    """(embeddings, labels, ids, groups) of a shard; the arrays are views of its bytes.

    Raises:
      KeyError, ValueError, TypeError: it is no shard.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:start]))
    x, y = (_array(header[tensor], data[start:]) for tensor in ("embeddings", "labels"))
    ids, groups = (json.loads(header["__metadata__"][names]) for names in ("ids", "groups"))
    return x, y, ids, groups


def shard_ids(folder: Folder, name: str) -> list[str]:
    """The record ids of a shard, from the head of its file."""
    size = int.from_bytes(folder.read(name, 8), "little")
    return json.loads(json.loads(folder.read(name, 8 + size)[8:])["__metadata__"]["ids"])


def _array(entry: dict[str, Any], data: memoryview) -> np.ndarray:
    """The tensor that an entry of a safetensors header describes: a view of the bytes after the header."""
    first, last = entry["data_offsets"]
    return np.frombuffer(data[first:last], _STORED[entry["dtype"]]).reshape(entry["shape"])
