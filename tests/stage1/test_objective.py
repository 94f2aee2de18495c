"""Objectives against slow obvious ones, and comparisons of whole groups on any mesh."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multitap_jax.backbones import Execution
from multitap_jax.checkpoint import CheckpointError
from multitap_jax.config import ConfigError, MeshConfig, OptimizerConfig, TrainConfig, from_config_dict
from multitap_jax.parallel.mesh import make_mesh, param_shardings, shard_batch
from multitap_jax.stage1.objective import bradley_terry, huber, make_objective
from multitap_jax.stage1.optimizer import make_optimizer, make_schedule
from multitap_jax.stage1.step import init_state, make_train_step
from multitap_jax.stage1.train import train
from multitap_jax.stage1.trainable import partition
from tests.stage1.toy import ToyDataset, toy_batch, toy_model

COMPARING = TrainConfig(objective="bradley-terry")


def slow_bradley_terry(logits, target, weight, record, group):
    """Two loops over records in float64; also the gradient, written down by hand."""
    total, count, gradient = 0.0, 0, np.zeros(logits.shape)
    places = [place for place in np.ndindex(*logits.shape) if record[place] >= 0 and weight[place] > 0]
    for a in places:
        for b in places:
            if group[record[a]] == group[record[b]] and target[a] > target[b]:
                margin = float(logits[a]) - float(logits[b])
                total += np.log1p(np.exp(-margin))
                push = -1 / (1 + np.exp(margin))
                gradient[a] += push
                gradient[b] -= push
                count += 1
    return total, count, gradient


def random_step(seed: int = 0):
    """Logits and a batch's arrays; two records tie, some have no weight, one of them a logit that is no number."""
    rng = np.random.default_rng(seed)
    record = np.full((3, 5), -1, np.int32)
    record[0, :4], record[1, :2], record[2, :3] = [3, 0, 8, 5], [1, 2], [4, 6, 7]
    weight = (record >= 0).astype(np.float32)
    weight[0, 1] = 0
    target = np.where(record >= 0, rng.integers(0, 4, record.shape) / 3, 0).astype(np.float32)
    logits = rng.standard_normal(record.shape).astype(np.float32)
    logits[0, 1] = np.nan
    group = np.array([0, 0, 1, 0, 1, 1, 2, 1, 0, -1], np.int32)
    return logits, target, weight, record, group


@pytest.mark.parametrize("seed", range(3))
def test_comparisons_are_those_of_two_loops(seed):
    logits, *rest = random_step(seed)
    total, count, gradient = slow_bradley_terry(logits, *rest)
    assert count > 4
    found = bradley_terry(logits, *rest)
    np.testing.assert_allclose(found, (total, count), rtol=1e-6)
    got = jax.grad(lambda x: bradley_terry(x, *rest)[0])(jnp.asarray(logits))
    np.testing.assert_allclose(got, gradient, atol=1e-6)


def test_scores_that_are_all_equal_say_nothing():
    logits, target, weight, record, group = random_step()
    found = bradley_terry(logits, np.full_like(target, 0.5), weight, record, group)
    assert tuple(map(float, found)) == (0.0, 0.0)


def test_huber_is_half_the_square_and_then_a_line():
    scores = np.array([[0.5, 0.55, 0.9, 0.1]])
    logits = np.log(scores / (1 - scores)).astype(np.float32)
    weight = np.array([[1, 1, 1, 0]], np.float32)
    total, count = huber(logits, np.full((1, 4), 0.5, np.float32), weight, 0.1)
    np.testing.assert_allclose((total, count), (0.5 * 0.05**2 + 0.1 * (0.4 - 0.05), 3), rtol=1e-5)


# What moves all logits of a group alike has a gradient of zero but for rounding, and Adam's first update is its sign:
# with a larger rate that noise would be visible in the second loss.
OPTIMIZER = OptimizerConfig(learning_rate=1e-4)


def run(mesh_config, accumulation, batches, groups):
    mesh = make_mesh(mesh_config or MeshConfig(), None if mesh_config else jax.devices()[:1])
    model = toy_model()
    split = partition(jax.device_put(model, param_shardings(model, mesh)), "full")
    optimizer, schedule = make_optimizer(OPTIMIZER, 10), make_schedule(OPTIMIZER, 10)
    state, history = init_state(split, optimizer, mesh), []
    options = {"accumulation": accumulation, "objective": make_objective(COMPARING)}
    step = make_train_step(split, optimizer, schedule, Execution(), mesh, **options)
    for batch, group in zip(batches, groups, strict=True):
        state, metrics = step(state, split.frozen, shard_batch(batch, mesh), group)
        history.append({name: float(metrics[name]) for name in ("loss", "grad_norm", "pairs", "terms")})
    assert step._cache_size() == 1
    return history


def test_the_same_comparisons_on_every_mesh_and_with_every_accumulation():
    """Groups as the packer leaves them: each in the rows of one cell."""
    batches = [toy_batch(i, 16, cells=16) for i in range(2)]
    groups = []
    for batch in batches:  # 16 cells of a row each
        group = np.full(48, -1, np.int32)
        row, column = np.nonzero(batch.record >= 0)
        group[batch.record[row, column]] = row
        groups.append(group)
    one = run(None, 1, batches, groups)
    logits = toy_model()(jax.tree.map(jnp.asarray, batches[0]), Execution())
    first = batches[0]
    total, count, _ = slow_bradley_terry(np.asarray(logits), first.target, first.weight, first.record, groups[0])
    np.testing.assert_allclose([one[0]["loss"], one[0]["terms"]], [total / count, count], rtol=1e-5)
    assert one[0]["pairs"] == first.weight.sum() != count
    for mesh, accumulation in ((None, 4), (MeshConfig(data=8), 2), (MeshConfig(data=2, fsdp=2, tensor=2), 1)):
        many = run(mesh, accumulation, batches, groups)
        np.testing.assert_allclose(list(many[0].values()), list(one[0].values()), rtol=1e-6)
        np.testing.assert_allclose([m["loss"] for m in many], [m["loss"] for m in one], rtol=1e-6)


class GroupedDataset(ToyDataset):
    def groups(self, step: int) -> np.ndarray:
        return np.arange(24, dtype=np.int32) // 4


def test_a_run_learns_an_order_and_does_not_go_on_with_another_objective(tmp_path):
    config = TrainConfig(
        objective="bradley-terry", optimizer=OptimizerConfig(learning_rate=0.03), log_every=1, mesh=MeshConfig(data=1)
    )
    mesh = make_mesh(config.mesh, jax.devices()[:1])

    class Same(GroupedDataset):
        def batch(self, step):
            return super().batch(0)

    result = train(config, tmp_path, toy_model(), Same(num_steps=12), mesh=mesh)
    assert result.finished
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert losses[-1] < 0.7 * losses[0]
    with pytest.raises(CheckpointError, match=r"config\.objective"):
        train(dataclasses.replace(config, objective="mse"), tmp_path, toy_model(), Same(num_steps=12), mesh=mesh)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "hinge"}, "expected one of mse, huber, bradley-terry"),
        ({"objective": "huber", "huber_delta": 0.0}, "huber_delta = 0"),
        ({"objective": "bradley-terry", "data": {"shuffle": "pairs"}}, "tears groups apart"),
        ({"objective": "bradley-terry", "checkpoint": {"keep_best": 1}}, "take 'tau_b'"),
    ],
)
def test_settings_that_do_not_go_together(changes, message):
    with pytest.raises(ConfigError, match=message):
        from_config_dict(TrainConfig, changes)
