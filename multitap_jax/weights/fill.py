"""Tensors of files into parameters: stacked, permuted and sharded, one tensor on its way at a time."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from multitap_jax.weights.mapping import Slot
from multitap_jax.weights.stored import Stored, aligned_empty

BLOCK = 32  # rows that a transposition takes at a time: the lines it writes stay in the cache until they are full


def fill(
    leaf: Any,
    slots: Sequence[Slot],
    sources: Sequence[Stored],
    sharding: Sharding | None,
    on_read: Callable[[Stored, np.ndarray], None] | None = None,
) -> jax.Array:
    """The parameter made of tensors in files.

    Args:
      leaf: shape and type of the parameter.
      slots, sources: the tensors it consists of, layer after layer, or the one it is if it is not stacked.
      sharding: where it goes; None is the default device.
      on_read: is given every tensor, whole. Without it, only the rows that this process's devices hold are read.
    """
    if slots[0].layer is None:
        raw, axes = _place(sources[0], slots[0], sharding, on_read)
        return _permute(raw, axes=axes, dtype=leaf.dtype, sharding=sharding)
    stack = _zeros(shape=leaf.shape, dtype=leaf.dtype, sharding=sharding)
    for slot, source in zip(slots, sources, strict=True):
        raw, axes = _place(source, slot, sharding, on_read)
        stack = _set_layer(stack, raw, np.asarray(slot.layer, np.int32), axes=axes, sharding=sharding)
        stack.block_until_ready()  # before the next one is read
    return stack


def needed_rows(shape: tuple[int, ...], sharding: Sharding | None) -> slice:
    """The rows (leading dimension) of a tensor that the devices of this process hold, from the first to the last."""
    if not shape or sharding is None:
        return slice(0, shape[0] if shape else None)
    spans = [index[0].indices(shape[0]) for index in sharding.addressable_devices_indices_map(shape).values() if index]
    return slice(min(first for first, _, _ in spans), max(last for _, last, _ in spans))


def permuted(value: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """`value.transpose(axes)`, contiguous; a matrix in blocks, several times faster than NumPy or XLA on a CPU."""
    if axes == tuple(range(value.ndim)):
        return value
    out = aligned_empty(tuple(value.shape[axis] for axis in axes), value.dtype)
    if value.ndim != 2:
        out[...] = value.transpose(axes)
        return out
    for start in range(0, value.shape[0], BLOCK):
        out[:, start : start + BLOCK] = value[start : start + BLOCK].T
    return out


def _place(
    source: Stored, slot: Slot, sharding: Sharding | None, on_read: Callable[[Stored, np.ndarray], None] | None
) -> tuple[jax.Array, tuple[int, ...]]:
    """The tensor, in its own type, where its slice of the parameter will be; and the permutation still to be done.

    Accelerators permute in passing; for a CPU it is done here.
    """
    local = _tensor_sharding(slot, sharding, slot.inverse)
    rows = needed_rows(source.shape, None if on_read else local)
    value = source.read(rows)
    if on_read:
        on_read(source, value)
    shape, first, axes = source.shape, (rows.start, *[0] * (len(source.shape) - 1)), slot.axes
    if _on_host(sharding):
        value, axes = permuted(value, axes), tuple(range(len(axes)))
        shape, first = (tuple(numbers[axis] for axis in slot.axes) for numbers in (shape, first))
        local = _tensor_sharding(slot, sharding, axes)
    if local is None:
        return jax.device_put(value, sharding), axes

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        spans = [span.indices(size) for span, size in zip(index or (), shape, strict=True)]
        return value[tuple(slice(a - start, b - start) for (a, b, _), start in zip(spans, first, strict=False))]

    return jax.make_array_from_callback(shape, local, part), axes


def _tensor_sharding(slot: Slot, sharding: Sharding | None, order: tuple[int, ...]) -> NamedSharding | None:
    """The parameter's sharding as that of one of its tensors, dimensions in this order; None for a single device."""
    if not isinstance(sharding, NamedSharding):
        return None
    spec = list(sharding.spec) + [None] * (len(slot.shape) + 1)
    spec = spec[1:] if slot.layer is not None else spec
    return NamedSharding(sharding.mesh, PartitionSpec(*(spec[axis] for axis in order)))


def _on_host(sharding: Sharding | None) -> bool:
    devices = jax.devices() if sharding is None else sharding.device_set
    return all(device.platform == "cpu" for device in devices)


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "sharding"))
def _zeros(shape: tuple[int, ...], dtype: Any, sharding: Sharding | None) -> jax.Array:
    return _constrain(jnp.zeros(shape, dtype), sharding)


@functools.partial(jax.jit, static_argnames=("axes", "dtype", "sharding"))
def _permute(raw: jax.Array, axes: tuple[int, ...], dtype: Any, sharding: Sharding | None) -> jax.Array:
    return _constrain(raw.transpose(axes).astype(dtype), sharding)


@functools.partial(jax.jit, static_argnames=("axes", "sharding"), donate_argnames=("stack",))
def _set_layer(
    stack: jax.Array, raw: jax.Array, layer: np.ndarray, axes: tuple[int, ...], sharding: Sharding | None
) -> jax.Array:
    value = raw.transpose(axes).astype(stack.dtype)
    return _constrain(jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0), sharding)


def _constrain(value: jax.Array, sharding: Sharding | None) -> jax.Array:
    return value if sharding is None else jax.lax.with_sharding_constraint(value, sharding)
