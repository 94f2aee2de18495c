"""AdamW against torch's, schedules against their formulas, placement of the moments."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from multitap_jax.config import OptimizerConfig
from multitap_jax.stage1.objective import squared_error
from multitap_jax.stage1.optimizer import make_optimizer, make_schedule


def test_the_update_is_torchs():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start, grads = rng.standard_normal(50).astype(np.float32), rng.standard_normal((6, 50)).astype(np.float32)
    config = OptimizerConfig(learning_rate=3e-3, weight_decay=0.1, clip_norm=1.0, schedule="cosine", warmup_ratio=0.3)
    schedule = make_schedule(config, 6)
    theirs = torch.nn.Parameter(torch.tensor(start))
    optimizer = torch.optim.AdamW([theirs], lr=3e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    ours, tx = jnp.asarray(start), make_optimizer(config, 6)
    state = tx.init(ours)
    for step, grad in enumerate(grads):
        optimizer.param_groups[0]["lr"] = float(schedule(step))
        theirs.grad = torch.tensor(grad)
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        optimizer.step()
        updates, state = tx.update(jnp.asarray(grad), state, ours)
        ours = optax.apply_updates(ours, updates)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-6, atol=1e-7)


def test_the_cosine_is_transformers():
    config = OptimizerConfig(learning_rate=2.0, schedule="cosine", warmup_ratio=0.1)
    schedule = make_schedule(config, 45)
    warmup = 5  # ceil(4.5)
    for step in range(46):
        if step < warmup:
            expected = 2.0 * step / warmup
        else:
            expected = 2.0 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (45 - warmup)))
        np.testing.assert_allclose(float(schedule(step)), expected, rtol=1e-6, atol=1e-6)


def test_constant_is_constant():
    assert [float(make_schedule(OptimizerConfig(learning_rate=0.5), 10)(s)) for s in (0, 5, 100)] == [0.5] * 3


def test_clipping_can_be_switched_off():
    tx = make_optimizer(OptimizerConfig(clip_norm=0.0, b1=0.0, b2=0.0, eps=1.0, weight_decay=0.0, learning_rate=1.0), 1)
    grad = jnp.full(4, 3.0)
    updates, _ = tx.update(grad, tx.init(grad), grad)
    np.testing.assert_allclose(updates, -3.0 / (3.0 + 1.0) * np.ones(4), rtol=1e-6)


def test_the_objective_is_a_sum_and_ignores_what_has_no_weight():
    logits = jnp.asarray([[0.0, 2.0], [jnp.nan, -1.0]])
    target = np.array([[1.0, 0.25], [0.0, 0.5]], np.float32)
    weight = np.array([[1.0, 0.5], [0.0, 1.0]], np.float32)
    value = lambda x: squared_error(x, target, weight)[0]
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    expected = 0.5**2 + 0.5 * (sigmoid(2) - 0.25) ** 2 + (sigmoid(-1) - 0.5) ** 2
    np.testing.assert_allclose(float(value(logits)), expected, rtol=1e-6)
    assert float(squared_error(logits, target, weight)[1]) == 2.5
    gradient = np.asarray(jax.grad(value)(logits))
    assert gradient[1, 0] == 0.0
    assert np.isfinite(gradient).all()
