"""Moments on a mesh, and one head from many processes.

Rows are split over every axis but `tensor`; each device sums its own rows, so an update needs no collective at all, and
one reduction at the end adds the devices up. The slabs of the Gram are split over `tensor`: a device then holds
1 / tensor of it, which is what a very wide embedding (H of 16k and more) asks for.

Processes do not share arrays while rows stream: each has its own devices and its own rows, at its own pace. At the end
`gather` hands every process the sums of all, so every process solves the same system and gets the same head.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from multitap_jax.stage2 import moments as mm
from multitap_jax.stage2.statistics import Statistics

TENSOR = "tensor"


class OneDevice:
    """Sums on the default device."""

    row_shards = 1

    def init(self, num_features: int, num_objectives: int, shift: np.ndarray, label_shift: np.ndarray) -> mm.Moments:
        """Empty moments."""
        return mm.init(num_features, num_objectives, shift, label_shift)

    def update(self, moments: mm.Moments, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> mm.Moments:
        """The moments with a chunk of rows added."""
        return mm.update(moments, x, y, weight)

    def finalize(self, moments: mm.Moments) -> Statistics:
        """The sums on the host."""
        return mm.finalize(moments)


class OnMesh:
    """Sums on the devices of `mesh` that belong to this process.

    `Moments` here have a leading axis: `hi` float32[R, K, e, (K//2 + 1) e] for R row shards, split as (rows, tensor).
    """

    def __init__(self, mesh: Mesh) -> None:
        local = mesh.local_mesh
        self.tensor = local.shape.get(TENSOR, 1)
        self.rows = tuple(axis for axis in local.axis_names if axis != TENSOR)
        self.row_shards = local.size // self.tensor
        if mesh.shape.get(TENSOR, 1) != self.tensor:
            raise ValueError(
                f"the tensor axis of {mesh.shape} spans processes; ridge moments stay within one: use a smaller tensor"
            )
        # Only local devices: no process ever waits for another while rows stream.
        self.mesh = Mesh(local.devices, local.axis_names)
        split = TENSOR if TENSOR in local.axis_names else None
        specs: Any = (P(self.rows, split), P(self.rows, split), P(self.rows), P(), P())
        self._spec = mm.Moments(*specs)
        self._update = jax.jit(
            jax.shard_map(
                functools.partial(_update_shard, split=split),
                mesh=self.mesh,
                in_specs=(self._spec, P(self.rows), P(self.rows), P(self.rows)),
                out_specs=self._spec,
                check_vma=False,  # a device's number of rows is the same along `tensor`, which only we know
            ),
            donate_argnums=0,
        )

    def init(self, num_features: int, num_objectives: int, shift: np.ndarray, label_shift: np.ndarray) -> mm.Moments:
        """Empty moments on the mesh."""
        slabs = -(-mm.default_slabs(num_features) // self.tensor) * self.tensor
        shape = (self.row_shards, *mm.slab_shape(num_features + 1 + num_objectives, slabs))
        empty = np.zeros(shape, np.float32)
        counts = np.zeros(self.row_shards, np.int32)
        return self._put((empty, empty, counts, np.asarray(shift, np.float32), np.asarray(label_shift, np.float32)))

    def _put(self, moments: Any) -> mm.Moments:
        return mm.Moments(
            *(
                jax.device_put(value, NamedSharding(self.mesh, spec))
                for value, spec in zip(moments, list[Any](self._spec), strict=True)
            )
        )

    def update(self, moments: mm.Moments, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> mm.Moments:
        """The moments with a chunk of rows added; the rows are a multiple of `row_shards`."""
        sharding = NamedSharding(self.mesh, P(self.rows))
        return self._update(moments, *(jax.device_put(part, sharding) for part in (x, y, weight)))

    def finalize(self, moments: mm.Moments) -> Statistics:
        """The one reduction over the devices, then the sums on the host."""
        return mm.finalize(mm.reduce(moments))


def _update_shard(moments: mm.Moments, x: Any, y: Any, weight: Any, *, split: str | None) -> mm.Moments:
    """One device's part: its rows, times the slabs that it holds."""
    _, own, size, _ = moments.hi.shape
    shards = 1 if split is None else jax.lax.axis_size(split)
    first = 0 if split is None else jax.lax.axis_index(split) * own
    columns = mm.augmented(moments, x, y, weight, own * shards, size)
    products = mm.slab_products(columns, first, own)
    hi, lo = mm.add_pairs(moments.hi[0], moments.lo[0], products)
    count = moments.num_rows + jnp.sum(weight > 0, dtype=jnp.int32)
    return moments._replace(hi=hi[None], lo=lo[None], num_rows=count)
