"""One training step and one evaluation step, each one compiled program.

Rows of a batch are looked at as [shards, micro-batches, rows of a cell]: a cell is what one device shard holds of one
micro-batch, and the packer fills each cell with its own rows of text and of vision. So micro-batches are cut without
moving a byte between devices, and the model is mapped over shards (`jax.vmap`), which keeps the look-up of image
features inside of a shard instead of gathering all features everywhere.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from multitap_jax.backbones import Execution
from multitap_jax.batch import Array, PackedBatch
from multitap_jax.config import ConfigError, TrainConfig
from multitap_jax.parallel.mesh import (
    BATCH_AXES,
    HOST_MEMORY,
    batch_sharding,
    batch_shards,
    param_shardings,
    replicated,
)
from multitap_jax.stage1.objective import Objective, make_objective
from multitap_jax.stage1.optimizer import state_shardings
from multitap_jax.stage1.trainable import Partition

Metrics = dict[str, jax.Array]
SQUARED_ERROR = make_objective(TrainConfig())


@functools.partial(jax.tree_util.register_dataclass, data_fields=("step", "trainable", "opt_state"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes: int32[] updates made, float32 master weights of what learns, the optimizer's state."""

    step: Any
    trainable: nnx.State
    opt_state: Any


def abstract_state(
    partition: Partition, optimizer: optax.GradientTransformation, mesh: Mesh, *, offload: bool = False
) -> TrainState:
    """Shapes, types and placement of a run's state, as `jax.ShapeDtypeStruct`s: what a checkpoint is restored onto.

    With `offload` the moments lie in the memory of the host.
    """
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), partition.trainable)
    placed = param_shardings(partition.trainable, mesh)
    opt_state, opt_placed = state_shardings(optimizer, params, placed, replicated(mesh))
    if offload:
        put = lambda x, sharding: sharding.with_memory_kind(HOST_MEMORY) if x.ndim else sharding
        opt_placed = jax.tree.map(put, opt_state, opt_placed)
    shapes = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, opt_state)
    shardings = TrainState(replicated(mesh), placed, opt_placed)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def init_state(
    partition: Partition, optimizer: optax.GradientTransformation, mesh: Mesh, *, offload: bool = False
) -> TrainState:
    """The state before the first step, placed on the mesh; copies, so that the partition outlives donation."""

    def build(trainable: nnx.State) -> TrainState:
        params = jax.tree.map(lambda x: x.astype(jnp.float32), trainable)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(partition, optimizer, mesh, offload=offload))
    trainable = jax.device_put(partition.trainable, shardings.trainable)
    return jax.jit(build, out_shardings=shardings)(trainable)


def split_cells(batch: PackedBatch, shards: int, micro: int, block: tuple[int, int]) -> PackedBatch:
    """[rows, ...] -> [micro, shards, rows / (shards * micro), ...]; `image_cell` counts from the start of its cell.

    Raises:
      ConfigError: rows or vision rows do not divide.
    """
    for name, size in (("rows", batch.tokens.shape[0]), ("vision rows", batch.patches.shape[0])):
        if size % (shards * micro):
            raise ConfigError(
                f"a batch of {size} {name} cannot be cut into {shards} shards x {micro} micro-batches "
                "(config.accumulation); build the dataset with that many cells"
            )

    def cut(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        return jnp.moveaxis(x.reshape(shards, micro, x.shape[0] // (shards * micro), *x.shape[1:]), 1, 0)

    out = PackedBatch(*map(cut, batch))
    rows, patches = out.patches.shape[2:4]
    features = rows * (patches // block[0] * block[1])
    number = jnp.arange(shards, dtype=jnp.int32)[None, :] * micro + jnp.arange(micro, dtype=jnp.int32)[:, None]
    first = features * number
    local = out.image_cell - first[:, :, None, None]
    return out._replace(image_cell=jnp.where(out.image_cell >= 0, local, -1))


def join_cells(x: jax.Array) -> jax.Array:
    """[micro, shards, rows, ...] -> [all rows, ...] in the order of the batch."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[3:])


def forward(model: Any, cell: PackedBatch, execution: Execution) -> jax.Array:
    """Logits float32[shards, rows, K] of one micro-batch [shards, rows, ...]."""
    run = lambda part: model(part, execution)
    return jax.vmap(run, spmd_axis_name=BATCH_AXES)(cell)


def settled(grads: Any) -> Any:
    """Gradients that are whole before anything reads them.

    XLA's CPU runtime (jaxlib 0.10.2) was seen to sum a norm from gradients in the making where cores are busy: in one
    step of fifteen with three processes on two cores, by up to 8 %, and never in 360 steps behind this barrier.
    """
    return jax.lax.optimization_barrier(grads)


def _make_gradients(
    graph: nnx.GraphDef, execution: Execution, objective: Objective, accumulation: int
) -> Callable[[nnx.State, nnx.State, PackedBatch, Array | None], tuple[Any, jax.Array, jax.Array, jax.Array]]:
    """`gradients(trainable, frozen, cells, group) -> gradients of the sum, sum, terms, logits[micro, ...]`."""

    def loss(
        trainable: nnx.State, frozen: nnx.State, cell: PackedBatch, group: Array | None
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        logits = forward(nnx.merge(graph, trainable, frozen), cell, execution)
        total, count = objective.sums(logits, cell, group)
        return total, (total, count, logits)

    def accumulate(
        trainable: nnx.State, frozen: nnx.State, cells: PackedBatch, group: Array | None
    ) -> tuple[Any, Any, Any, jax.Array]:
        gradient = jax.grad(loss, has_aux=True)
        if accumulation == 1:  # no second copy of the gradients
            grads, (total, count, logits) = gradient(trainable, frozen, jax.tree.map(lambda x: x[0], cells), group)
            return grads, total, count, logits[None]

        def add(sums, cell):
            grads, (total, count, logits) = gradient(trainable, frozen, cell, group)
            return jax.tree.map(jnp.add, sums, (grads, total, count)), logits

        zero = (jax.tree.map(jnp.zeros_like, trainable), jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
        (grads, total, count), logits = jax.lax.scan(add, zero, cells)
        return grads, total, count, logits

    return accumulate


def make_train_step(
    partition: Partition,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    execution: Execution,
    mesh: Mesh,
    *,
    accumulation: int = 1,
    offload: bool = False,
    objective: Objective = SQUARED_ERROR,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Compiles `step(state, frozen, batch) -> (state, metrics)`; the given state is donated.

    The gradient is that of the mean over all terms of the step (pairs, or comparisons of two), whatever the number of
    micro-batches and devices. Where loss or gradient are not finite the state is returned as it was, so a state is
    always a good one; also where nothing counts, since decay and momentum would move the weights for no reason.

    Where the objective compares, the step takes one thing more, int32[N], the group of each record of the step; all
    records of a group must stand in one cell.

    Metrics, on every device: `loss`, `grad_norm` (before clipping), `lr`, `mean_score`, `pairs`, `terms`, float32[];
    `finite`, bool[]; `bad`, bool[B, K]: pairs whose logit is not finite.
    """
    shards, execution = batch_shards(mesh), dataclasses.replace(execution, mesh=mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(partition, optimizer, mesh, offload=offload))
    near = jax.tree.map(lambda x: x.sharding, abstract_state(partition, optimizer, mesh).opt_state)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    gradients = _make_gradients(partition.graph, execution, objective, accumulation)

    def step(state: TrainState, frozen: nnx.State, batch: PackedBatch, *group: Array) -> tuple[TrainState, Metrics]:
        cells = split_cells(batch, shards, accumulation, partition.block)
        grads, total, count, logits = gradients(state.trainable, frozen, cells, *(group or (None,)))
        grads = settled(grads) if on_cpu else grads
        terms = jnp.maximum(count, 1.0)
        grads = jax.tree.map(lambda g: g / terms, grads)
        norm, mean = optax.global_norm(grads), total / terms
        finite = jnp.isfinite(mean) & jnp.isfinite(norm)
        update = finite & (count > 0)
        if offload:
            state = dataclasses.replace(state, opt_state=jax.device_put(state.opt_state, near))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        new = TrainState(state.step + 1, optax.apply_updates(state.trainable, updates), opt_state)
        metrics = {
            "loss": mean,
            "grad_norm": norm,
            "lr": jnp.asarray(schedule(state.step), jnp.float32),
            "terms": count,
            "finite": finite,
            **_score_metrics(join_cells(logits), batch),
        }
        return jax.tree.map(lambda kept, put: jnp.where(update, put, kept), state, new), metrics

    return jax.jit(
        step,
        in_shardings=(shardings, None, batch_sharding(mesh), *[replicated(mesh)] * objective.compares),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def _score_metrics(logits: jax.Array, batch: PackedBatch) -> Metrics:
    """What is known of the scores of float32[B, K] logits."""
    counted = jnp.asarray(batch.weight) > 0
    scores, pairs = jnp.where(counted, jax.nn.sigmoid(logits), 0.0), jnp.sum(jnp.asarray(batch.weight))
    mean = jnp.sum(scores) / jnp.maximum(pairs, 1.0)
    return {"mean_score": mean, "pairs": pairs, "bad": counted & ~jnp.isfinite(logits)}


def make_eval_step(
    partition: Partition, execution: Execution, mesh: Mesh
) -> Callable[[nnx.State, nnx.State, PackedBatch], tuple[jax.Array, jax.Array, jax.Array]]:
    """Compiles `step(trainable, frozen, batch) -> logits, target, weight`, float32[B, K] each, on every device.

    Target and weight are those of the batch: another process may know better which of its own pairs count.
    """
    shards, execution = batch_shards(mesh), dataclasses.replace(execution, mesh=mesh)

    def step(trainable: nnx.State, frozen: nnx.State, batch: PackedBatch) -> tuple[jax.Array, jax.Array, jax.Array]:
        cells = jax.tree.map(lambda x: x[0], split_cells(batch, shards, 1, partition.block))
        logits = join_cells(forward(nnx.merge(partition.graph, trainable, frozen), cells, execution)[None])
        return logits, jnp.asarray(batch.target), jnp.asarray(batch.weight)

    return jax.jit(step, out_shardings=replicated(mesh))
