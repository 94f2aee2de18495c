"""Sums of the bits of sharded arrays, computed on the devices: they do not depend on the mesh."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from multitap_jax.naming import by_name


def checksum(tree: Any) -> int:
    """One number for all bits of all arrays and their names, the same on any mesh."""
    total = 0
    for name, value in sorted(checksums(by_name(tree)).items()):
        total = (total * 1000003 + value + sum(name.encode())) % 2**32
    return total


def on_device(x: jax.Array) -> jax.Array:
    """The array in the memory that its devices compute in; arrays may lie in that of the host (`optimizer.offload`)."""
    if _is_near(x):
        return x
    return jax.device_put(x, x.sharding.with_memory_kind(_near_kind(x)))


def _is_near(x: jax.Array) -> bool:
    return x.sharding.memory_kind == _near_kind(x)


def _near_kind(x: jax.Array) -> str:
    return next(iter(x.sharding.addressable_devices)).default_memory().kind  # type: ignore[attr-defined]


def _bit_sum(x: jax.Array) -> jax.Array:
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    values = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    # Weighted by place, so that the same values in another order or shape do not pass.
    place = jnp.ones(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        step = np.uint32((2 * size + 2 * axis + 1) * 2654435761 % 2**32)
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * step
    return jnp.sum(values * place, dtype=jnp.uint32)


@jax.jit
def _bit_sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _bit_sum(x) for name, x in arrays.items()}


def checksums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """A sum of all bits of each array, modulo 2^32.

    What lies on the devices is summed by one program; what lies in the host's memory array by array, since the devices
    may not have room for all of it.
    """
    near = {name: x for name, x in arrays.items() if _is_near(x)}
    sums = jax.device_get(_bit_sums(near))
    for name in arrays.keys() - near.keys():
        sums |= jax.device_get(_bit_sums({name: on_device(arrays[name])}))
    return {name: int(value) for name, value in sums.items()}
