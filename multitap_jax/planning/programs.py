"""The real steps of a run, lowered for devices that need not be there, from shapes alone: no weight is allocated."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from multitap_jax.backbones import Execution
from multitap_jax.backbones.attention import backend_elsewhere
from multitap_jax.batch import PackedBatch
from multitap_jax.config import TrainConfig
from multitap_jax.families import Family
from multitap_jax.parallel.mesh import param_shardings, replicated
from multitap_jax.reward import RewardHead, RewardModel
from multitap_jax.scoring.scorer import forward
from multitap_jax.stage1.optimizer import make_optimizer, make_schedule
from multitap_jax.stage1.step import TrainState, abstract_state, make_train_step
from multitap_jax.stage1.trainable import add_lora, partition

STEPS = 1000  # of the schedule, whose length changes nothing else


class Held(NamedTuple):
    """What a training run holds between two steps, as placed `jax.ShapeDtypeStruct`s."""

    state: TrainState
    frozen: nnx.State


def abstract_model(family: Family, numbers: Any, config: TrainConfig) -> RewardModel:
    """The model of a training run, float32 as it is loaded, with adapters where they learn."""

    def build() -> RewardModel:
        backbone = family.model(numbers, rngs=nnx.Rngs(0), param_dtype=jnp.dtype("float32"))
        model = RewardModel(backbone, RewardHead(numbers.text.hidden_size, rngs=nnx.Rngs(0)))
        if config.trainable.parts == "lora":
            add_lora(model, config.trainable, nnx.Rngs(0))
        return model

    return nnx.eval_shape(build)


def held(model: RewardModel, config: TrainConfig, mesh: Mesh | AbstractMesh) -> Held:
    """What a training run holds.

    Raises:
      ConfigError: the model does not fit the mesh; names every dimension that does not divide.
    """
    param_shardings(model, mesh)  # raises for all parameters at once, whatever learns
    split = partition(model, config.trainable.parts)
    optimizer, offload = make_optimizer(config.optimizer, STEPS), config.optimizer.offload
    state = abstract_state(split, optimizer, mesh, offload=offload)  # type: ignore[arg-type]
    return Held(state, _place(split.frozen, param_shardings(split.frozen, mesh)))


def lower_training(model: RewardModel, config: TrainConfig, mesh: Mesh, batch: PackedBatch) -> jax.stages.Lowered:
    """The step of `stage1/step.py` as `train` makes it."""
    split = partition(model, config.trainable.parts)
    optimizer, schedule = make_optimizer(config.optimizer, STEPS), make_schedule(config.optimizer, STEPS)
    execution = Execution(dtype=config.model.dtype, remat=config.model.remat, attention=_attention(config, mesh))
    settings: dict[str, Any] = {"accumulation": config.accumulation, "offload": config.optimizer.offload}
    step = make_train_step(split, optimizer, schedule, execution, mesh, **settings)
    state, frozen = held(model, config, mesh)
    return step.lower(state, frozen, batch)  # type: ignore[attr-defined]


def lower_scoring(
    family: Family, numbers: Any, config: TrainConfig, mesh: Mesh, batch: PackedBatch
) -> jax.stages.Lowered:
    """The step of `scoring/scorer.py` that gives scores and embeddings, with parameters of the computation type."""
    dtype = jnp.dtype(config.model.dtype)

    def build() -> RewardModel:
        backbone = family.model(numbers, rngs=nnx.Rngs(0), param_dtype=dtype)
        return RewardModel(backbone, RewardHead(numbers.text.hidden_size, rngs=nnx.Rngs(0)))

    model = nnx.eval_shape(build)
    whole, hidden = replicated(mesh), numbers.text.hidden_size
    heads = (jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole) for shape in ((0, hidden), (0,)))
    execution = Execution(dtype=config.model.dtype, attention=_attention(config, mesh), mesh=mesh)
    placed = _place(model, param_shardings(model, mesh))
    return forward.lower(placed, *heads, batch, execution=execution, keep_embeddings=True)


def _attention(config: TrainConfig, mesh: Mesh) -> str:
    return backend_elsewhere(config.model.attention, [mesh.devices.flat[0].platform])


def _place(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
