"""A text that says of every array of a run where it lies: to be read, and to be kept and compared."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from multitap_jax.naming import path_name
from multitap_jax.parallel.mesh import HOST_MEMORY


class Placed(NamedTuple):
    """An array: its logical axes ("-" where a dimension has none), partition, bytes, and bytes on each device.

    What lies in the memory of the host takes none on a device.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    axes: str
    spec: str
    bytes: int
    bytes_per_device: int

    @property
    def whole(self) -> bool:
        """Whether each device holds all of it."""
        return self.bytes_per_device == self.bytes


def placements(tree: Any) -> list[Placed]:
    """Every array of a tree, in its order.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s with a `NamedSharding`; those of parameters in an `nnx.Variable` that
        names their logical axes.

    Raises:
      ValueError: names the arrays whose place nobody has declared.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
    found, lost = [], []
    for path, leaf in leaves:
        axes = leaf.get_metadata().get("axes") if isinstance(leaf, nnx.Variable) else None
        array = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        if not isinstance(getattr(array, "sharding", None), NamedSharding):
            lost.append(path_name(path))
            continue
        found.append(_placed(path_name(path), array, axes))
    if lost:
        raise ValueError(f"no sharding is declared for {', '.join(lost)}")
    return found


def _placed(name: str, array: Any, axes: Any) -> Placed:
    shape, size = tuple(array.shape), np.dtype(array.dtype).itemsize
    parts = [*array.sharding.spec, *[None] * len(shape)][: len(shape)]
    word = lambda part: "-" if part is None else part if isinstance(part, str) else "+".join(part)
    local = math.prod(array.sharding.shard_shape(shape))
    named = "" if axes is None else ", ".join(axis or "-" for axis in axes)
    spec = ", ".join(map(word, parts))
    if array.sharding.memory_kind == HOST_MEMORY:
        spec, local = f"{spec} on the host", 0
    return Placed(name, np.dtype(array.dtype).name, shape, named, spec, math.prod(shape) * size, local * size)


def listing(mesh: Any, trees: Mapping[str, Any]) -> str:
    """A line an array: name, type and shape, logical axes, partition, bytes on each device; sums at the end of a part.

    Args:
      mesh: that everything lies on.
      trees: parts by name; see `placements`.

    Raises:
      ValueError: see `placements`.
    """
    sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    lines = [f"mesh {sizes}: {mesh.size} devices"]
    for part, tree in trees.items():
        if arrays := placements(tree):
            lines += ["", f"{part}:", *_part(arrays)]
    return "\n".join(lines) + "\n"


def _part(arrays: list[Placed]) -> Iterator[str]:
    rows = [
        (a.name, f"{a.dtype}[{','.join(map(str, a.shape))}]", f"({a.axes})" if a.axes else "", f"({a.spec})")
        for a in arrays
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
    for row, array in zip(rows, arrays, strict=True):
        words = "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True) if width)
        yield f"  {words}  {array.bytes_per_device:>13,}"
    total, whole = sum(a.bytes_per_device for a in arrays), sum(a.bytes for a in arrays if a.whole)
    yield f"  {len(arrays)} arrays, {total:,} bytes on each device, of which {whole:,} are the same on all"
