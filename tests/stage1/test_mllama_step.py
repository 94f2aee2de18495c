"""Llama-3.2-Vision learns: the same step on a mesh with micro-batches, parts, adapters, a place for every parameter."""

import re

import jax
import numpy as np
from flax import nnx

from multitap_jax.backbones import Execution
from multitap_jax.config import MeshConfig, OptimizerConfig, TrainableConfig
from multitap_jax.parallel.mesh import make_mesh, param_shardings, shard_batch
from multitap_jax.stage1.optimizer import make_optimizer, make_schedule
from multitap_jax.stage1.step import init_state, make_train_step
from multitap_jax.stage1.trainable import add_lora, merge_lora, partition
from tests.families.common import QUICK
from tests.families.mllama import oracle, packed_cells, reward_model

MIXED = MeshConfig(data=2, fsdp=2, tensor=2)
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, weight_decay=0.1, clip_norm=0.5)


def test_a_training_step_is_the_same_on_a_mesh(tmp_path):
    """One device against eight with micro-batches and rematerialisation, which look up images inside of their cell.

    Weights are gathered there, and never the states of images.
    """
    batch, results = packed_cells(oracle().write_without_weights(tmp_path), 8), []
    for mesh_config, accumulation, remat in ((None, 1, "none"), (MIXED, 2, "full")):
        mesh = make_mesh(mesh_config or MeshConfig(), None if mesh_config else jax.devices()[:1])
        rewards = reward_model()
        split = partition(jax.device_put(rewards, param_shardings(rewards, mesh)), "full")
        optimizer, schedule = make_optimizer(OPTIMIZER, 10), make_schedule(OPTIMIZER, 10)
        step = make_train_step(split, optimizer, schedule, Execution(remat=remat), mesh, accumulation=accumulation)
        state, placed = init_state(split, optimizer, mesh), shard_batch(batch, mesh)
        step = step.lower(state, split.frozen, placed).compile(compiler_options=QUICK)
        # 68 states make up an image; no other size is 68.
        gathered = re.findall(r"= \(?f32\[([\d,]*)\].*? all-gather(?:-start)?\(", step.as_text())
        assert bool(gathered) == (mesh_config is not None)
        assert not [shape for shape in gathered if "68" in shape.split(",")]
        _, metrics = step(state, split.frozen, placed)
        assert metrics["finite"]
        results.append([float(metrics[name]) for name in ("loss", "grad_norm", "pairs")])
    np.testing.assert_allclose(results[1], results[0], rtol=2e-6)
    assert results[0][2] == 32


def test_parts_and_targets():
    rewards = reward_model()
    trainable = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(partition(rewards, "text").trainable)}
    assert "backbone.text.cross_layers.attention_gate" in trainable
    assert not any(name.startswith("backbone.vision") for name in trainable)
    assert len(nnx.to_flat_state(partition(rewards, "head").trainable)) == 2
    add_lora(rewards, TrainableConfig(lora_targets=("cross_layers.attention.q_proj",), lora_rank=2), nnx.Rngs(0))
    learns = {path[-4:] for path, _ in nnx.to_flat_state(partition(rewards, "lora").trainable) if path[0] != "head"}
    assert learns == {("cross_layers", "attention", "q_proj", part) for part in ("lora_a", "lora_b")}
    assert merge_lora(rewards).backbone.text.cross_layers.attention.q_proj.lora_a is None


def test_every_parameter_has_a_place():
    rewards = reward_model()
    placed = param_shardings(rewards, make_mesh(MIXED))
    spec = lambda variable: tuple(variable.get_value().spec)
    text, vision = placed.backbone.text, placed.backbone.vision
    assert spec(text.cross_layers.attention.k_proj.kernel) == (None, "fsdp", "tensor")
    assert spec(text.cross_layers.attention_gate) == (None, None)
    assert spec(vision.position.tile_embedding) == (None, "fsdp")
    assert spec(vision.projector.kernel) == ("tensor", "fsdp")
    for path, variable in nnx.to_flat_state(nnx.state(rewards.backbone)):
        stacked = any(str(part).endswith("layers") for part in path)
        assert (variable.get_metadata("axes")[0] == "layers") == stacked, path
