"""Collected moments as a file, and as what processes send each other: fit anywhere, merge, solve again later.

moments = RidgeHead().collect(store)         # on each machine, its part of the rows
save(moments, "part-0.safetensors")
...
total = load("part-0.safetensors").merge(load("part-1.safetensors"))
head = RidgeHead(alphas=[1, 10]).fit_moments(total, leave_out=["dataset-b"])
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from multitap_jax.files import write_atomic
from multitap_jax.parallel.distributed import from_each_process
from multitap_jax.stage2 import moments as mm
from multitap_jax.stage2.accumulator import Accumulator, Labels
from multitap_jax.stage2.buckets import Key
from multitap_jax.stage2.certificate import Precision
from multitap_jax.stage2.rows import DataError, Rows
from multitap_jax.stage2.statistics import Statistics

FORMAT = "multitap-ridge-moments"


def to_bytes(data: Accumulator) -> bytes:
    """A safetensors file: the buckets in float64 (half of each Gram), or the rows where they are still kept."""
    arrays: dict[str, np.ndarray] = {}
    about: dict[str, Any] = {"format": FORMAT, "version": 1, "folds": data.folds, "seed": data.seed, "buckets": []}
    if data.is_empty:
        return safetensors.numpy.save({"nothing": np.zeros(1)}, {"about": json.dumps(about)})
    arrays |= {f"labels.{name}": np.asarray(value) for name, value in data.labels._asdict().items()}
    rows = data.kept
    if rows is not None:
        names, source = np.unique(rows.source, return_inverse=True)
        about["sources"] = names.tolist()
        arrays |= {f"rows.{name}": value for name, value in rows._asdict().items() if name != "source"}
        arrays["rows.source"] = source
    else:
        for number, (key, stats) in enumerate(data.statistics().items()):
            about["buckets"].append([key.source, list(key.subset), key.fold, stats.num_rows])
            arrays[f"gram.{number}"] = mm.pack(stats.gram)
            arrays["shift"], arrays["label_shift"] = stats.shift, stats.label_shift
        about["precision"] = list(data.precision)
    groups = np.array(list(data.group_sizes.items()), np.uint64).reshape(-1, 2)
    arrays["groups"] = groups
    content = {name: np.array(value, order="C") for name, value in arrays.items()}
    return safetensors.numpy.save(content, {"about": json.dumps(about)})


def from_bytes(content: bytes) -> Accumulator:
    """What `to_bytes` gave. Raises the errors of reading JSON and safetensors."""
    about = json.loads(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["about"])
    if (about["format"], about["version"]) != (FORMAT, 1):
        raise ValueError(f"format {about['format']!r} {about['version']!r}")
    arrays = safetensors.numpy.load(content)
    data = Accumulator(about["folds"], about["seed"])
    if "nothing" in arrays:
        return data
    labels = Labels(int(arrays["labels.num_rows"]), *(arrays[f"labels.{name}"] for name in Labels._fields[1:]))
    sizes = {int(group): int(count) for group, count in arrays["groups"]}
    if "rows.x" in arrays:
        rows = {name: arrays[f"rows.{name}"] for name in Rows._fields}
        rows["source"] = np.asarray(about["sources"])[rows["source"]]
        data.restore(labels, sizes, rows=Rows(**rows))
        return data
    width = len(arrays["shift"]) + 1 + len(arrays["label_shift"])
    stats = {
        Key(source, tuple(subset), fold): Statistics(
            mm.unpack(arrays[f"gram.{number}"], width), rows, arrays["shift"], arrays["label_shift"]
        )
        for number, (source, subset, fold, rows) in enumerate(about["buckets"])
    }
    data.restore(labels, sizes, stats=stats, precision=Precision(*about["precision"]))
    return data


def save(data: Accumulator, path: str | Path) -> None:
    """Writes collected moments to a file, whole or not at all."""
    write_atomic(Path(path), to_bytes(data))


def load(path: str | Path) -> Accumulator:
    """Reads what `save` wrote; more rows can be added, and others merged.

    Raises:
      DataError: a missing, damaged or foreign file.
    """
    try:
        return from_bytes(Path(path).read_bytes())
    except (OSError, ValueError, KeyError, IndexError, TypeError, safetensors.SafetensorError) as error:
        raise DataError(f"{path}: not a file of collected moments ({error}); collect them again") from error


def gather(data: Accumulator) -> Accumulator:
    """What all processes collected, merged in their order, on every process. Collective."""
    parts = [from_bytes(part) for part in from_each_process(to_bytes(data))]
    total = parts[0]
    for part in parts[1:]:
        total = part if total.is_empty else total.merge(part)
    total.shared = True
    return total
