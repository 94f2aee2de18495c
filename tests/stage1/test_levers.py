"""Settings that trade memory for time, and what is written on request; none changes what is computed."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multitap_jax.backbones import Execution
from multitap_jax.config import CheckpointConfig, ConfigError, OptimizerConfig
from multitap_jax.parallel.mesh import make_mesh, shard_batch
from multitap_jax.stage1.optimizer import make_optimizer, make_schedule
from multitap_jax.stage1.step import init_state, make_train_step
from multitap_jax.stage1.train import train
from multitap_jax.stage1.trainable import partition
from tests.stage1.test_train import CONFIG, assert_same_model, curve
from tests.stage1.toy import ToyDataset, toy_batch, toy_model


def three_steps(offload=False, **settings):
    """(state, losses) after three steps."""
    mesh, split = make_mesh(CONFIG.mesh), partition(toy_model(), "full")
    config = OptimizerConfig(learning_rate=1e-2, **settings)
    optimizer = make_optimizer(config, 10)
    state = init_state(split, optimizer, mesh, offload=offload)
    step = make_train_step(split, optimizer, make_schedule(config, 10), Execution(), mesh, offload=offload)
    losses = []
    for index in range(3):
        state, metrics = step(state, split.frozen, shard_batch(toy_batch(index), mesh))
        losses.append(float(metrics["loss"]))
    assert step._cache_size() == 1
    return state, losses


def moments(state):
    return [x for x in jax.tree.leaves(state.opt_state) if x.ndim]


def test_moments_on_the_host_change_no_bit():
    (near, losses), (far, found) = three_steps(), three_steps(offload=True)
    assert found == losses
    assert_same_model(far.trainable, near.trainable)
    assert {x.sharding.memory_kind for x in moments(far)} == {"pinned_host"}
    assert [x.sharding.spec for x in moments(far)] == [x.sharding.spec for x in moments(near)]
    assert "pinned_host" not in {x.sharding.memory_kind for x in jax.tree.leaves(far.trainable)}


def test_a_mean_in_bfloat16_is_adamw_but_for_its_rounding():
    """Against the formulas of AdamW written out; the mean is rounded where it is kept, and nothing else is."""
    rounded = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    config = OptimizerConfig(learning_rate=1e-2, mean_dtype="bfloat16", clip_norm=0)
    optimizer, rng = make_optimizer(config, 10), np.random.default_rng(0)
    params = jnp.asarray(rng.standard_normal(50), jnp.float32)
    state, x, mean, square = optimizer.init(params), np.asarray(params, np.float64), np.zeros(50), np.zeros(50)
    for step in range(1, 4):
        gradient = rng.standard_normal(50).astype(np.float32)
        updates, state = optimizer.update(jnp.asarray(gradient), state, params)
        params = params + updates
        mean = config.b1 * mean + (1 - config.b1) * gradient
        square = config.b2 * square + (1 - config.b2) * gradient.astype(np.float64) ** 2
        ratio = mean / (1 - config.b1**step) / (np.sqrt(square / (1 - config.b2**step)) + config.eps)
        x = x - config.learning_rate * (ratio + config.weight_decay * x)
        mean = rounded(mean)
        np.testing.assert_allclose(params, x, atol=2e-6)
    kinds = sorted(str(leaf.dtype) for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert kinds == ["bfloat16", "float32"]


def test_offloading_needs_a_place(monkeypatch, tmp_path):
    config = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(offload=True))
    device = type(jax.devices()[0])
    monkeypatch.setattr(device, "addressable_memories", lambda self: [self.default_memory()])
    with pytest.raises(ConfigError, match="offloading needs memory of the kind pinned_host; these devices have"):
        train(config, tmp_path, toy_model(), ToyDataset())


def test_the_best_cannot_be_kept_without_held_out_pairs(tmp_path):
    config = dataclasses.replace(CONFIG, checkpoint=CheckpointConfig(keep_best=1))
    with pytest.raises(ConfigError, match=r"keep_best needs held-out pairs: set data\.holdout"):
        train(config, tmp_path, toy_model(), ToyDataset())


def test_a_trace_on_request(tmp_path, capsys):
    train(dataclasses.replace(CONFIG, profile=(2, 2)), tmp_path, toy_model(), ToyDataset())
    assert "wrote a trace of 2 steps to" in capsys.readouterr().err
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    train(CONFIG, tmp_path / "without", toy_model(), ToyDataset())
    assert not (tmp_path / "without" / "profile").exists()
    assert curve(tmp_path) == curve(tmp_path / "without")


def test_the_record_says_what_a_run_was_made_of(tmp_path):
    train(CONFIG, tmp_path, toy_model(), ToyDataset())
    train(CONFIG, tmp_path, toy_model(), ToyDataset())
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["data"], record["steps"], record["config"]["seed"]) == ("toy", 6, 42)
    assert [start["step"] for start in record["starts"]] == [0, 6]
    last = record["starts"][-1]
    assert last["versions"]["jax"] == jax.__version__
    assert last["device"] == jax.devices()[0].device_kind
    assert (last["mesh"], last["processes"]) == ({"data": 1, "fsdp": 8, "tensor": 1, "context": 1}, 1)
    assert last["revision"] is None or len(last["revision"].rstrip("+")) == 40
