"""Where a backend computes: on one device, or on each of a mesh for the rows, heads and stretch that lie there.

The compiler shares out dense attention, but neither kernels nor loops whose length depends on the data. These run under
`jax.shard_map`: each device computes what it holds. Rows are mapped outside of the model (`jax.vmap` with
`spmd_axis_name`), so here they are whole; heads lie along `tensor`, stretches of a row along `context`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from multitap_jax.backbones.attention.choice import backend
from multitap_jax.backbones.attention.ring import AXIS
from multitap_jax.backbones.attention.rule import UnsupportedAttentionError, Visibility


def prepare(visibility: Visibility) -> Visibility:
    """With what the backend prepares; of rows that are spread each device prepares its own stretch, later."""
    if visibility.setup.along_context and visibility.backend != "dense":
        return visibility
    prepared = backend(visibility.backend).prepare(visibility.queries, visibility.keys)
    return dataclasses.replace(visibility, prepared=prepared)


def compute(q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility) -> jax.Array:
    """[B, Sq, G, Q, D] from queries [B, Sq, G, Q, D], keys and values [B, Sk, G, D].

    Raises:
      UnsupportedAttentionError: the length of a row, or the number of key heads, does not divide.
    """
    setup, mesh = visibility.setup, visibility.setup.mesh
    attend = backend(visibility.backend).attend
    if mesh is None or mesh.size == 1 or visibility.backend == "dense":
        return attend(q, k, v, visibility)
    along_q = AXIS if setup.along_context else None
    along_k = along_q if visibility.spread_keys else None
    for what, axis, size in (("a row's length", along_q, q.shape[1]), ("the key heads", "tensor", q.shape[2])):
        if axis is not None and size % mesh.shape[axis]:
            raise UnsupportedAttentionError(f"config.mesh.{axis} = {mesh.shape[axis]} does not divide {what}, {size}")
    queries, keys, whole = PartitionSpec(None, along_q), PartitionSpec(None, along_k), PartitionSpec()
    heads = lambda spec: PartitionSpec(*spec, "tensor")
    every = lambda tree, spec: jax.tree.map(lambda _: spec, tree)
    seen = dataclasses.replace(
        visibility,
        prepared=every(visibility.prepared, whole),
        queries=every(visibility.queries, queries),
        keys=every(visibility.keys, keys),
    )
    local = jax.shard_map(
        functools.partial(_local, attend),
        mesh=mesh,
        in_specs=(heads(queries), heads(keys), heads(keys), seen),
        out_specs=heads(queries),
        check_vma=False,
    )
    return local(q, k, v, visibility)


def _local(
    attend: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility
) -> jax.Array:
    if visibility.prepared is None:
        prepared = backend(visibility.backend).prepare(visibility.queries, visibility.keys)
        visibility = dataclasses.replace(visibility, prepared=prepared)
    return attend(q, k, v, visibility)
