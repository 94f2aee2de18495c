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
    read: Callable[[Stored, slice], np.ndarray] = Stored.read,
) -> jax.Array:
    """The parameter made of tensors in files.

    Args:
      leaf: shape and type of the parameter.
      slots, sources: the tensors it consists of, layer after layer, or the one it is if it is not stacked.
      sharding: where it goes; None is the default device.
      read: gives rows of a tensor; it is asked for those that this process's devices hold, once a tensor.
    """
    if _on_host(sharding):
        out = aligned_empty(leaf.shape, np.dtype(leaf.dtype))
        for slot, source in zip(slots, sources, strict=True):
            permute_into(out if slot.layer is None else out[slot.layer], read(source, slice(None)), slot.axes)
        return jax.device_put(out, sharding)  # takes the memory over
    if slots[0].layer is None:
        raw = _place(sources[0], slots[0], sharding, read)
        return _permute(raw, axes=slots[0].axes, dtype=leaf.dtype, sharding=sharding)
    stack = _zeros(shape=leaf.shape, dtype=leaf.dtype, sharding=sharding)
    for slot, source in zip(slots, sources, strict=True):
        raw = _place(source, slot, sharding, read)
        stack = _set_layer(stack, raw, np.asarray(slot.layer, np.int32), axes=slot.axes, sharding=sharding)
        stack.block_until_ready()  # before the next one is read
    return stack


def needed_rows(shape: tuple[int, ...], sharding: Sharding | None) -> slice:
    """The rows (leading dimension) of a tensor that the devices of this process hold, from the first to the last."""
    if not shape or sharding is None:
        return slice(0, shape[0] if shape else None)
    spans = [index[0].indices(shape[0]) for index in sharding.addressable_devices_indices_map(shape).values() if index]
    return slice(min(first for first, _, _ in spans), max(last for _, last, _ in spans))


def permute_into(out: np.ndarray, value: np.ndarray, axes: tuple[int, ...]) -> None:
    """`out[...] = value.transpose(axes)`; a matrix in blocks, which is several times faster than NumPy or XLA alone."""
    if out.dtype == value.dtype:  # NumPy moves integers faster than types it does not know, such as bfloat16
        bits = np.dtype(f"u{value.dtype.itemsize}")
        out, value = out.view(bits), value.view(bits)
    if axes != (1, 0):
        out[...] = value.transpose(axes)
        return
    for start in range(0, value.shape[0], BLOCK):
        out[:, start : start + BLOCK] = value[start : start + BLOCK].T


def _place(
    source: Stored, slot: Slot, sharding: Sharding | None, read: Callable[[Stored, slice], np.ndarray]
) -> jax.Array:
    """Puts a tensor, still in its own layout and type, where its slice of the parameter will be."""
    local = _tensor_sharding(slot, sharding)
    rows = needed_rows(source.shape, local)
    value = read(source, rows)
    if local is None:
        return jax.device_put(value, sharding)

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        if not index:
            return value
        first, last, _ = index[0].indices(source.shape[0])
        return value[(slice(first - rows.start, last - rows.start), *index[1:])]

    return jax.make_array_from_callback(source.shape, local, part)


def _tensor_sharding(slot: Slot, sharding: Sharding | None) -> NamedSharding | None:
    """The parameter's sharding as that of one of its tensors; None for a single device."""
    if not isinstance(sharding, NamedSharding):
        return None
    spec = list(sharding.spec) + [None] * (len(slot.shape) + 1)
    spec = spec[1:] if slot.layer is not None else spec
    return NamedSharding(sharding.mesh, PartitionSpec(*(spec[axis] for axis in slot.inverse)))


def _on_host(sharding: Sharding | None) -> bool:
    """Whether the parameter will be in this process's memory, as one piece: then it is made there."""
    devices: Any = [jax.local_devices()[0]] if sharding is None else list(sharding.device_set)
    return len(devices) == 1 and bool(devices[0].platform == "cpu")


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
