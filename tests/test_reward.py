"""The reward head and model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from multitap_jax.backbones import Execution
from multitap_jax.reward import RewardHead
from tests.stage1.toy import toy_batch, toy_model


def test_the_head_starts_as_the_official_one():
    head = RewardHead(4096, rngs=nnx.Rngs(0))
    weight = np.asarray(head.weight[...])
    assert abs(weight.std() * 4097**0.5 - 1) < 0.05  # deviation of a deviation of 4096 draws: 1.1 %
    assert abs(weight.mean()) < 4 / 4096
    biases = [float(RewardHead(16, rngs=nnx.Rngs(seed)).bias[...]) for seed in range(200)]
    assert max(map(abs, biases)) <= 0.25
    assert max(biases) > 0.2
    assert min(biases) < -0.2


def test_the_logit_is_a_float32_product():
    head = RewardHead.from_arrays(np.arange(4, dtype=np.float32), np.float32(0.5))
    hidden = jnp.asarray([[[1, 2, 3, 4]]], jnp.bfloat16)
    logits = head(hidden)
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, [[20.5]])
    with pytest.raises(ValueError, match=r"weight \[H\] and bias \[\], got \(4,\) and \(1,\)"):
        RewardHead.from_arrays(np.zeros(4), np.zeros(1))


def test_the_model_is_head_of_backbone():
    model, batch = toy_model(), jax.tree.map(jnp.asarray, toy_batch(0))
    hidden = model.embed(batch, Execution())
    expected = np.einsum("bkh,h->bk", np.asarray(hidden), np.asarray(model.head.weight[...])) + model.head.bias[...]
    np.testing.assert_allclose(model(batch, Execution()), expected, rtol=1e-5, atol=1e-6)
