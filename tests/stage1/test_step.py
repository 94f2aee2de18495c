"""The step: same numbers on any mesh and with any number of micro-batches, compiled once, nothing replicated."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from multitap_jax.backbones import Execution
from multitap_jax.config import ConfigError, MeshConfig, OptimizerConfig, TrainableConfig
from multitap_jax.families import from_config
from multitap_jax.parallel.mesh import make_mesh, param_shardings, shard_batch
from multitap_jax.reward import RewardHead, RewardModel
from multitap_jax.stage1.optimizer import make_optimizer, make_schedule
from multitap_jax.stage1.step import init_state, make_eval_step, make_train_step, split_cells
from multitap_jax.stage1.trainable import add_lora, partition
from tests.stage1.toy import ToyDataset, toy_batch, toy_model
from tests.tiny_qwen2_vl import tiny_config

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, clip_norm=0.5)
FLOAT32 = Execution()
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "mixed": MeshConfig(data=2, fsdp=2, tensor=2),
}


def mesh_of(config: MeshConfig | None):
    return make_mesh(config or MeshConfig(), None if config else jax.devices()[:1])


def run(
    config, *, steps=3, settings=OPTIMIZER, accumulation=1, parts="full", execution=FLOAT32, model=None, batches=None
):
    mesh = mesh_of(config)
    model = model or toy_model()
    if parts == "lora":
        add_lora(model, TrainableConfig(lora_targets=("up_proj",), lora_rank=2), nnx.Rngs(3))
    split = partition(jax.device_put(model, param_shardings(model, mesh)), parts)
    optimizer, schedule = make_optimizer(settings, 10), make_schedule(settings, 10)
    state = init_state(split, optimizer, mesh)
    step = make_train_step(split, optimizer, schedule, execution, mesh, accumulation=accumulation)
    history = []
    for index in range(steps):
        batch = batches[index] if batches else toy_batch(index)
        state, metrics = step(state, split.frozen, shard_batch(batch, mesh))
        history.append(jax.tree.map(np.asarray, metrics))
    assert step._cache_size() == 1
    return state, history


def losses(history):
    return np.array([float(m["loss"]) for m in history])


def test_the_step_is_the_obvious_gradient_descent():
    """Against a step written out by hand on the whole batch: mean squared error, clip, AdamW."""
    model = toy_model()
    graph, params = nnx.split(model)

    def loss(params, batch):
        scores = jax.nn.sigmoid(nnx.merge(graph, params)(batch, Execution()))
        here = batch.record >= 0
        return jnp.sum(jnp.where(here, (scores - batch.target) ** 2, 0.0)) / here.sum().astype(jnp.float32)

    tx = make_optimizer(OPTIMIZER, 10)
    opt_state, expected = tx.init(params), []
    for index in range(3):
        value, grads = jax.value_and_grad(loss)(params, jax.tree.map(jnp.asarray, toy_batch(index)))
        expected.append((float(value), float(optax.global_norm(grads))))
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    state, history = run(None)
    found = [(float(m["loss"]), float(m["grad_norm"])) for m in history]
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    for a, b in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert int(state.step) == 3
    assert [float(m["pairs"]) for m in history] == [float(toy_batch(i).weight.sum()) for i in range(3)]


# A sum over 8 shards adds the same float32 numbers in another order, which moves the last bits of a loss (2^-24 = 6e-8
# relative, a few of them). Later steps see weights that differ so; Adam divides by the root of the second moment, which
# amplifies where a gradient is near zero. Hence 1e-6 for the losses.
@pytest.mark.parametrize(("name", "accumulation"), [("data", 1), ("fsdp", 1), ("mixed", 1), ("data", 2), ("mixed", 2)])
def test_the_same_losses_on_every_mesh(name, accumulation):
    batches = [toy_batch(i, 16, cells=16) for i in range(3)]
    _, one = run(None, batches=batches)
    _, many = run(MESHES[name], accumulation=accumulation, batches=batches)
    np.testing.assert_allclose(losses(many), losses(one), rtol=1e-6)


@pytest.mark.parametrize("parts", ["full", "head", "text", "lora"])
def test_accumulation_does_not_change_the_step(parts):
    one_state, one = run(None, parts=parts)
    four_state, four = run(None, parts=parts, accumulation=4)
    np.testing.assert_allclose(losses(four), losses(one), rtol=1e-6)
    for a, b in zip(jax.tree.leaves(one_state.trainable), jax.tree.leaves(four_state.trainable), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_bfloat16_computes_on_float32_master_weights():
    state, history = run(None, execution=Execution(dtype="bfloat16"))
    _, exact = run(None)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.trainable, state.opt_state[1][0].mu))} == {
        jnp.dtype("float32")
    }
    # bfloat16 has 8 bits: 2^-9 = 2e-3 a rounding, a few of them on the way to a score.
    np.testing.assert_allclose(losses(history), losses(exact), rtol=2e-2)
    assert not np.array_equal(losses(history), losses(exact))


@pytest.mark.parametrize("parts", ["full", "lora"])
def test_moments_lie_where_their_parameters_lie(parts):
    state, _ = run(MESHES["mixed"], parts=parts)
    moments = state.opt_state[1][0]
    for tree in (moments.mu, moments.nu):
        for moment, value in zip(jax.tree.leaves(tree), jax.tree.leaves(state.trainable), strict=True):
            assert moment.sharding == value.sharding
            assert moment.dtype == jnp.float32
    whole = [x for x in jax.tree.leaves(moments.mu) if x.ndim and x.sharding.is_fully_replicated]
    assert not whole


def test_a_batch_that_is_not_finite_changes_nothing_and_names_its_pairs():
    bad = toy_batch(0)
    model = toy_model()
    model.backbone.text.embed.embedding[...] = model.backbone.text.embed.embedding[...].at[5].set(jnp.nan)
    before = jax.tree.map(np.asarray, nnx.state(model))
    tokens = np.where(bad.tokens == 5, 6, bad.tokens)
    tokens[3, 0] = 5
    cell = bad.image_cell.copy()
    cell[3, 0] = -1
    state, history = run(None, model=model, steps=1, batches=[bad._replace(tokens=tokens, image_cell=cell)])
    assert not history[0]["finite"]
    np.testing.assert_array_equal(history[0]["bad"], (np.arange(8) == 3)[:, None] & (bad.weight > 0))
    assert int(state.step) == 0
    for a, b in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)


def test_pairs_of_weight_zero_do_not_matter():
    batch = toy_batch(0)
    _, one = run(None, steps=1, batches=[batch])
    changed = batch._replace(target=np.where(batch.weight > 0, batch.target, 0.9).astype(np.float32))
    _, two = run(None, steps=1, batches=[changed])
    np.testing.assert_array_equal(losses(one), losses(two))


def test_a_step_without_a_pair_that_counts_leaves_weights_and_moments():
    """Decay and momentum would move them all the same."""
    state, _ = run(None, steps=1)
    batches = [toy_batch(0), toy_batch(1)._replace(weight=np.zeros_like(toy_batch(1).weight))]
    after, history = run(None, steps=2, batches=batches)
    assert (float(history[1]["pairs"]), bool(history[1]["finite"])) == (0.0, True)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_evaluation_gives_the_logits_of_the_model():
    model, batch = toy_model(), toy_batch(0)
    expected = model(jax.tree.map(jnp.asarray, batch), Execution())
    for config in (None, MESHES["mixed"]):
        mesh = mesh_of(config)
        split = partition(jax.device_put(model, param_shardings(model, mesh)), "head")
        found = make_eval_step(split, Execution(), mesh)(split.trainable, split.frozen, shard_batch(batch, mesh))
        np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found[1], batch.target)
        np.testing.assert_array_equal(found[2], batch.weight)


def test_cells_are_cut_and_renumbered():
    batch = toy_batch(0, cells=4)
    cells = split_cells(batch, 2, 2, (4, 1))
    for micro in range(2):
        for shard in range(2):
            rows = slice(2 * (2 * shard + micro), 2 * (2 * shard + micro) + 2)
            np.testing.assert_array_equal(cells.tokens[micro, shard], batch.tokens[rows])
            local = batch.image_cell[rows]
            np.testing.assert_array_equal(
                cells.image_cell[micro, shard], np.where(local >= 0, local - 4 * (2 * shard + micro), -1)
            )
    with pytest.raises(ConfigError, match="3 micro-batches"):
        split_cells(batch, 1, 3, (4, 1))


def test_the_real_backbone_on_a_mesh():
    """Qwen2-VL, all parameters, remat: one device against eight.

    The gradient of a key bias is zero but for rounding, and Adam's first update is its sign: with a rate as large as
    the toy's, that noise would be visible in the second loss.
    """
    config, results = tiny_config(num_hidden_layers=2, vision_depth=1), []
    for mesh_config, remat in ((None, "none"), (MESHES["mixed"], "full")):
        model = RewardModel(from_config(config, rngs=nnx.Rngs(0)), RewardHead(64, rngs=nnx.Rngs(1)))
        settings = dataclasses.replace(OPTIMIZER, learning_rate=1e-4)
        batches = [real_batch(i) for i in range(2)]
        _, history = run(
            mesh_config, steps=2, model=model, batches=batches, execution=Execution(remat=remat), settings=settings
        )
        results.append(losses(history))
    np.testing.assert_allclose(results[1], results[0], rtol=1e-6)


def real_batch(seed: int, rows: int = 4, tokens: int = 6):
    toy = toy_batch(seed, rows=rows, tokens=tokens, cells=rows)
    rng = np.random.default_rng(seed)
    return toy._replace(
        patches=rng.integers(0, 256, (rows, 8, 588)).astype(np.uint8),
        positions=np.tile(np.arange(tokens, dtype=np.int32)[None, :, None], (rows, 1, 3)),
        segment=np.tile(np.repeat(np.array([1, 2, 3], np.int32), [tokens - 3, 2, 1]), (rows, 1)),
        prefix=np.ones((rows, tokens), np.int32),
    )


@pytest.mark.parametrize("config", [MESHES["fsdp"], MeshConfig(data=2, fsdp=4)])
def test_fsdp_gathers_weights_and_never_activations(config):
    """Otherwise every device would hold the activations of the whole batch. The length of the rows, 46, tells them."""
    mesh, length = make_mesh(config), 46
    model = RewardModel(
        from_config(tiny_config(num_hidden_layers=2, vision_depth=1), rngs=nnx.Rngs(0)),
        RewardHead(64, rngs=nnx.Rngs(1)),
    )
    split = partition(jax.device_put(model, param_shardings(model, mesh)), "full")
    optimizer = make_optimizer(OPTIMIZER, 10)
    step = make_train_step(split, optimizer, make_schedule(OPTIMIZER, 10), Execution(remat="full"), mesh)
    batch = shard_batch(real_batch(0, 8, length), mesh)
    text = step.lower(init_state(split, optimizer, mesh), split.frozen, batch).compile().as_text()
    # An all-to-all leaves each device with its own share; so the looked-up embeddings go from slices of H to rows.
    moved = re.findall(r"= \(?(\w+\[[\d,]*\].*?) (all-gather|all-reduce|collective-permute)(?:-start)?\(", text)
    assert any(kind == "all-gather" for _, kind in moved)
    floats = [shape for result, _ in moved for shape in re.findall(r"f32\[([\d,]+)\]", result)]
    assert [shape for shape in floats if str(length) in shape.split(",")] == []


def test_the_toy_dataset_repeats_itself():
    one, two = ToyDataset().batch(3), next(ToyDataset().loader(3))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)
