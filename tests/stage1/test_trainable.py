"""What learns, and adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from multitap_jax.backbones import Execution
from multitap_jax.config import ConfigError, MeshConfig, TrainableConfig
from multitap_jax.families import from_config
from multitap_jax.naming import by_name, path_name
from multitap_jax.parallel.mesh import make_mesh, param_shardings
from multitap_jax.reward import RewardHead, RewardModel
from multitap_jax.stage1.trainable import add_lora, merge_lora, partition
from tests.stage1.toy import toy_batch, toy_model
from tests.tiny_qwen2_vl import tiny_config

LORA = TrainableConfig(parts="lora", lora_rank=3, lora_alpha=6.0, lora_targets=("up_proj", "vision.proj"))


def count(tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def test_parts():
    model = toy_model()
    sizes = {parts: count(partition(model, parts).trainable) for parts in ("full", "head", "text")}
    assert sizes == {
        "full": count(model),
        "head": count(model.head),
        "text": count(model) - count(model.backbone.vision),
    }
    for parts in sizes:
        split = partition(model, parts)
        assert count(split.trainable) + count(split.frozen) == count(model)
        for a, b in zip(jax.tree.leaves(split.model()), jax.tree.leaves(model), strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(ConfigError, match=r"parts = 'vision': expected one of full, head, text, lora"):
        partition(model, "vision")


def test_adapters_change_nothing_at_first_and_alone_learn():
    model, batch = toy_model(), jax.tree.map(jnp.asarray, toy_batch(0))
    before = model(batch, Execution())
    add_lora(model, LORA, nnx.Rngs(0))
    np.testing.assert_array_equal(model(batch, Execution()), before)
    assert model.backbone.text.layers.up_proj.lora_a.shape == (2, 16, 3)
    assert model.backbone.text.layers.up_proj.lora_b.shape == (2, 3, 32)
    assert model.backbone.vision.proj.lora_a.shape == (48, 3)
    assert model.backbone.text.layers.up_proj.lora_scale == 2.0
    bound = 16**-0.5
    a = np.asarray(model.backbone.text.layers.up_proj.lora_a[...])
    assert 0.9 * bound < np.abs(a).max() <= bound
    leaves, _ = jax.tree_util.tree_flatten_with_path(partition(model, "lora").trainable)
    names = {path_name(path) for path, _ in leaves}
    assert {name.split(".")[-1] for name in names} == {"lora_a", "lora_b", "weight", "bias"}
    assert len(names) == 6


@pytest.mark.parametrize("real", [False, True])
def test_merging_gives_the_same_outputs_and_the_same_tree(real):
    if real:
        model = RewardModel(from_config(tiny_config(), rngs=nnx.Rngs(0)), RewardHead(64, rngs=nnx.Rngs(1)))
        config = TrainableConfig(lora_rank=4, lora_targets=("q_proj", "mlp.down_proj", "vision.layers.attention.qkv"))
        batch = toy_batch(0, 2, cells=2)._replace(patches=np.ones((2, 8, 588), np.uint8))
    else:
        model, config, batch = toy_model(), LORA, toy_batch(0)
    structure, before = jax.tree.structure(model), by_name(model)
    add_lora(model, config, nnx.Rngs(0))
    for name, value in by_name(model).items():
        if name.endswith("lora_b"):
            module = model
            for part in name.split(".")[:-1]:
                module = getattr(module, part)
            module.lora_b[...] = 0.1 * jax.random.normal(jax.random.key(0), value.shape)
    batch = jax.tree.map(jnp.asarray, batch)
    apart = model(batch, Execution())
    merged = merge_lora(model)
    assert jax.tree.structure(merged) == structure
    changed = [name for name, value in by_name(merged).items() if not np.array_equal(value, before[name])]
    assert len(changed) == len(config.lora_targets)
    assert all(name.endswith("kernel") for name in changed)
    np.testing.assert_allclose(merged(batch, Execution()), apart, rtol=1e-5, atol=1e-6)
    assert merge_lora(merged) is merged


def test_adapters_lie_like_their_kernels():
    model = toy_model()
    add_lora(model, LORA, nnx.Rngs(0))
    placed = param_shardings(model, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    linear = placed.backbone.text.layers.up_proj
    assert tuple(linear.lora_a.get_value().spec) == (None, "fsdp", None)
    assert tuple(linear.lora_b.get_value().spec) == (None, None, "tensor")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            TrainableConfig(lora_targets=("q_proj",)),
            r"'q_proj' names no linear module; there are: .*text\.layers\.up_proj",
        ),
        (TrainableConfig(lora_targets=()), r"lora_targets is empty"),
    ],
)
def test_targets_that_name_nothing(config, message):
    with pytest.raises(ConfigError, match=message):
        add_lora(toy_model(), config, nnx.Rngs(0))


def test_adapters_are_needed_for_lora():
    with pytest.raises(ConfigError, match="the model has no adapters"):
        partition(toy_model(), "lora")
