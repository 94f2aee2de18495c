"""Long rows through whole models: equal to dense attention, memory linear in length, shared out over devices."""

import jax
import numpy as np
import pytest

from benchmarks.long_context import MODELS, long_row, loss, make_model
from multitap_jax.backbones import Execution
from multitap_jax.backbones.attention import entry, make_visibility
from multitap_jax.config import ConfigError, MeshConfig
from multitap_jax.naming import by_name
from multitap_jax.parallel.mesh import make_mesh
from tests.families.checks import SAME_GRADIENT

QUICK = {"xla_backend_optimization_level": 0}


def computed(model, batch, execution: Execution):
    """States of the texts, gradients of all parameters, bytes of temporaries."""
    step = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2)
    compiled = step.lower(model, batch, execution).compile({} if batch.tokens.size > 1024 else QUICK)
    (_, states), gradients = compiled(model, batch)
    return np.asarray(states), by_name(gradients), compiled.memory_analysis().temp_size_in_bytes


def assert_same(found, expected):
    """States and gradients; what has no gradient is what a row without images passes by."""
    assert np.abs(expected[0]).max() > 1
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5, rtol=0)
    moved = {path for path, gradient in expected[1].items() if np.abs(gradient).max() > 0}
    assert {path for path in expected[1] if path.startswith("text.") and "cross" not in path} <= moved
    for path, gradient in found[1].items():
        atol = SAME_GRADIENT * float(np.abs(expected[1][path]).max())
        np.testing.assert_allclose(gradient, expected[1][path], atol=atol, rtol=0, err_msg=path)


@pytest.mark.parametrize("name", MODELS)
def test_a_row_of_4096_tokens_equals_dense_attention(name):
    model, batch = make_model(name), long_row(name, 4096)
    backend = make_visibility(batch.segment, batch.prefix, causal=True, setup=Execution().setup).backend
    assert backend == "blockwise"
    found = computed(model, batch, Execution(remat="full"))
    expected = computed(model, batch, Execution(attention="dense", remat="full"))
    assert_same(found, expected)
    assert found[2] < expected[2] / 4


@pytest.mark.parametrize("name", MODELS)
def test_memory_grows_with_the_length_and_not_with_its_square(name):
    model = jax.eval_shape(lambda: make_model(name))

    def temporary(length: int) -> int:
        step = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2, compiler_options=QUICK)
        compiled = step.lower(model, long_row(name, length), Execution(remat="full")).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(16384), temporary(131072)
    assert long < 8.2 * short
    assert long < 131072**2 / 8  # bytes: an eighth of a mask of all pairs


@pytest.mark.parametrize(
    ("name", "apart"),
    [("llama-3.2", True), pytest.param("qwen2-vl", True, marks=pytest.mark.slow), ("qwen2-vl", False)],
)
def test_eight_devices_share_a_row(monkeypatch, name, apart):
    """Stretches of 128 tokens: states and gradients of one device; what is pooled is shared out where it is much."""
    model, batch = make_model(name), long_row(name, 1024)
    if apart:
        monkeypatch.setattr(entry, "LOOP_FROM", 8)
        twice = {field: np.repeat(getattr(batch, field), 2, axis=1) for field in ("pool", "record", "target", "weight")}
        batch = batch._replace(**twice)
    expected = computed(model, batch, Execution(attention="blockwise"))
    mesh = make_mesh(MeshConfig(data=1, context=8))
    model, batch = jax.device_put((model, batch), jax.sharding.NamedSharding(mesh, jax.P()))
    assert_same(computed(model, batch, Execution(mesh=mesh)), expected)


def test_a_model_says_how_long_a_row_it_was_made_for():
    limit = {name: make_model(name).config.text for name in MODELS}
    assert {name: text.max_positions for name, text in limit.items()} == {"llama-3.2": 131072, "qwen2-vl": 32768}
    for text in limit.values():
        text.check_length(text.max_positions)
        with pytest.raises(
            ConfigError, match=rf"max_length = {text.max_positions + 1}: the model was made for rows of"
        ):
            text.check_length(text.max_positions + 1)
