"""The same pair gives the same state and the same gradient however it is packed and however it is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from multitap_jax.backbones import Execution
from multitap_jax.backbones.attention import blockwise
from multitap_jax.backbones.stack import collect_layers, run_layers
from multitap_jax.batch import PackedBatch
from multitap_jax.families import from_config, num_params
from multitap_jax.naming import by_name
from multitap_jax.weights.hub import load_backbone
from tests.tiny_qwen2_vl import pack, random_group, tiny_config, write_folder

FLOAT32 = Execution()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2_vl")
    write_folder(folder, tiny_config())
    return load_backbone(folder)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 16)
    monkeypatch.setattr(blockwise, "ROWS", 32)


DIRECTION = np.random.default_rng(9).normal(size=64).astype(np.float32)


def loss(model, batch: PackedBatch, execution: Execution):
    """A sum over pairs of something that is not linear in the state, as training has."""
    h = model(batch, execution)
    return jnp.sum(jnp.tanh(jnp.einsum("bkh,h->bk", h, DIRECTION) * 0.1) * jnp.asarray(batch.weight)), h


# Compiling is most of the time here, so the machine code is left unoptimised; the graph is the same.
QUICK = {"xla_backend_optimization_level": 0}
forward = jax.jit(lambda model, batch, execution: model(batch, execution), static_argnums=2, compiler_options=QUICK)
value_and_gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2, compiler_options=QUICK)


def assert_same_gradients(got, expected):
    expected = by_name(expected)
    for path, gradient in by_name(got).items():
        largest = float(np.abs(expected[path]).max())
        assert np.isfinite(gradient).all(), path
        np.testing.assert_allclose(gradient, expected[path], atol=2e-5 * max(largest, 1), rtol=0, err_msg=path)


def packed_rows():
    """Several groups a row, several texts a prefix, several images a prefix, one group without an image."""
    rng = np.random.default_rng(4)
    first = random_group(rng, [(4, 6)], [5, 2, 7])
    second = random_group(rng, [(2, 4), (6, 2)], [3, 3])
    return [[first, second, random_group(rng, [], [6])], [random_group(rng, [(8, 4)], [4, 9, 1])]]


@pytest.mark.parametrize("mode", ["mrope", "flat"])
def test_packing_equals_each_pair_alone(backbone, mode):
    rows = packed_rows()
    packed = pack(rows, mode=mode, row_length=96, vision_length=64, spare=1)
    (_, states), gradient = value_and_gradient(backbone, packed, FLOAT32)

    total = None
    for b, row in enumerate(rows):
        pairs = [group.alone(index) for group in row for index in range(len(group.texts))]
        for k, pair in enumerate(pairs):
            alone = pack([[pair]], mode=mode, row_length=48, vision_length=32)
            if not pair.images:  # the vision tower sees a row of padding only
                empty = np.zeros((1, 32, packed.patches.shape[-1]), np.uint8)
                ids = np.zeros((1, 32), np.int32)
                alone = alone._replace(patches=empty, patch_segment=ids, patch_position=np.zeros((1, 32, 2), np.int32))
            (_, state), part = value_and_gradient(backbone, alone, FLOAT32)
            np.testing.assert_allclose(states[b, k], state[0, 0], atol=2e-5, rtol=0)
            total = part if total is None else jax.tree.map(jnp.add, total, part)
    assert_same_gradients(gradient, total)


@pytest.mark.parametrize("setting", [{"layers": "loop"}, {"attention": "blockwise"}, {"attention": "chunked"}], ids=str)
def test_execution_changes_no_value(backbone, setting):
    batch = pack(packed_rows(), row_length=96, vision_length=64, spare=1)
    expected = forward(backbone, batch, FLOAT32)
    np.testing.assert_allclose(forward(backbone, batch, Execution(**setting)), expected, atol=1e-5, rtol=0)


EXECUTIONS = {
    "dots": Execution(remat="dots"),
    "full": Execution(remat="full"),
    "offload": Execution(remat="offload"),
    "loop, full": Execution(layers="loop", remat="full"),
    "blockwise, full": Execution(attention="blockwise", remat="full"),
}


@pytest.mark.parametrize("name", EXECUTIONS)
def test_execution_changes_neither_values_nor_gradients(backbone, name):
    batch = pack(packed_rows(), row_length=96, vision_length=64, spare=1)
    (_, expected), expected_gradient = value_and_gradient(backbone, batch, FLOAT32)
    (_, got), gradient = value_and_gradient(backbone, batch, EXECUTIONS[name])
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)
    assert_same_gradients(gradient, expected_gradient)


def test_bfloat16_is_near_float32(backbone):
    batch = pack(packed_rows())
    exact, short = (np.asarray(forward(backbone, batch, Execution(dtype=dtype))) for dtype in ("float32", "bfloat16"))
    assert short.dtype == np.float32
    real = batch.weight > 0
    error = np.linalg.norm(short[real] - exact[real], axis=-1) / np.linalg.norm(exact[real], axis=-1)
    assert 0 < error.max() < 0.04


def test_a_row_of_padding_is_finite(backbone):
    batch = pack([packed_rows()[1], []], row_length=96, vision_length=64, spare=4)  # shapes as above: no new compile
    (_, states), gradient = value_and_gradient(backbone, batch, FLOAT32)
    assert np.isfinite(states).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_a_token_outside_the_vocabulary_is_loud(backbone):
    batch = pack([[random_group(np.random.default_rng(0), [], [4])]])
    batch.tokens[0, 2] = 160
    assert np.isnan(forward(backbone, batch, FLOAT32)).all()


def test_adapters_equal_merged_kernels(backbone):
    graph, state = nnx.split(backbone)
    adapted, merged = nnx.merge(graph, state), nnx.merge(graph, state)
    rng = np.random.default_rng(5)
    for name in ("q_proj", "v_proj"):
        linear = getattr(adapted.text.layers.attention, name)
        stack, inputs, outputs = linear.kernel.shape
        a, b = (rng.normal(size=(stack, *shape)).astype(np.float32) for shape in ((inputs, 2), (2, outputs)))
        linear.lora_a, linear.lora_b = nnx.Param(jnp.asarray(a)), nnx.Param(jnp.asarray(b))
        linear.lora_scale = 0.1
        target = getattr(merged.text.layers.attention, name)
        target.kernel = nnx.Param(target.kernel[...] + 0.1 * jnp.asarray(a @ b))
    batch = pack(packed_rows())
    expected = np.asarray(forward(merged, batch, FLOAT32))
    assert np.abs(expected - np.asarray(forward(backbone, batch, FLOAT32))).max() > 0.1
    np.testing.assert_allclose(forward(adapted, batch, FLOAT32), expected, atol=2e-5, rtol=0)


def test_parameters_carry_one_axis_name_a_dimension():
    model = nnx.eval_shape(lambda: from_config(tiny_config(), rngs=nnx.Rngs(0)))
    names = {"layers", "embed", "heads", "kv_heads", "mlp", "vocab", "vision", None}
    for path, parameter in nnx.to_flat_state(nnx.state(model)):
        assert len(parameter.axes) == parameter.ndim, path
        assert set(parameter.axes) <= names, path
        assert (parameter.axes[0] == "layers") == ("layers" in path)
    assert num_params(model) == sum(leaf.size for leaf in jax.tree.leaves(model))


def test_collected_outputs_end_with_the_result(backbone):
    layers, x = backbone.text.layers.mlp, jnp.ones((1, 2, 64), jnp.float32)
    outputs = collect_layers(layers, x, execution=FLOAT32)
    assert outputs.shape == (4, 1, 2, 64)
    np.testing.assert_array_equal(outputs[0], x)
    np.testing.assert_array_equal(outputs[-1], run_layers(layers, x, execution=FLOAT32))


@pytest.mark.parametrize(
    "setting", [{"dtype": "float16"}, {"remat": "some"}, {"layers": "map"}, {"attention": "magic"}]
)
def test_an_unknown_execution_is_refused(setting):
    (value,) = setting.values()
    with pytest.raises(ValueError, match=value):
        Execution(**setting)
