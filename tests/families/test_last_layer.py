"""The last layer computes the tokens that are pooled and no more; they come out as if it computed all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from multitap_jax.backbones import Execution
from multitap_jax.backbones.stack import run_layers
from multitap_jax.families import from_config
from multitap_jax.weights.hub import load_backbone
from tests.families import internlm2, llava, llava_onevision, mllama, qwen2_5_vl, qwen2_vl, qwen3_vl
from tests.families.checks import assert_same_gradients, total_and_states
from tests.families.common import FLOAT32, QUICK, batches, contract_of
from tests.families.qwen_checks import PAIRS
from tests.tiny_qwen2_vl import pack, random_group, tiny_config

# Mllama's groups end in a layer that attends to text, or to images.
CASES = {
    "qwen2_vl": (qwen2_vl.oracle, {}, PAIRS, qwen2_vl.POLICY),
    "qwen2_5_vl": (qwen2_5_vl.oracle, {}, PAIRS, qwen2_vl.POLICY),
    "qwen3_vl": (qwen3_vl.oracle, {}, PAIRS, qwen3_vl.POLICY),
    "llava": (llava.oracle, {}, llava.PAIRS, None),
    "llava_onevision": (llava_onevision.oracle, {}, llava_onevision.PAIRS, None),
    "mllama": (mllama.oracle, {}, mllama.PAIRS, mllama.POLICY),
    "mllama, images last": (
        mllama.oracle,
        {"text_config": {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]}},
        mllama.PAIRS,
        mllama.POLICY,
    ),
    "xcomposer": (internlm2.oracle, {}, internlm2.PAIRS, internlm2.HD),
}


ALIKE = ("qwen2_5_vl", "llava_onevision")  # decoders that others have, too


def whole(model, batch):
    """Every layer of every token, then what is pooled."""
    return model.text.pool(model.hidden_states(batch, FLOAT32)[-1], batch)


@pytest.mark.parametrize(
    ("name", "execution"),
    [
        *(pytest.param(name, {}, marks=[pytest.mark.slow] * (name in ALIKE)) for name in CASES),
        ("qwen2_vl", {"layers": "loop", "remat": "full"}),
        ("mllama", {"remat": "dots"}),
    ],
    ids=str,
)
def test_what_is_pooled_is_that_of_the_whole_layer(tmp_path, name, execution):
    make, changes, pairs, policy = CASES[name]
    folder = make(**changes).write_without_torch(tmp_path)
    chosen = {} if policy is None else {"image_policy": policy}
    batch, model = batches(folder, pairs[:2], contract_of(folder, **chosen))[0], load_backbone(folder)

    def run(forward):
        step = jax.value_and_grad(lambda *x: total_and_states(forward, *x), has_aux=True)
        return jax.jit(step, compiler_options=QUICK)(model, batch)

    (_, expected), wanted = run(whole)
    (_, states), gradients = run(lambda model, batch: model(batch, Execution(**execution)))
    here = batch.record >= 0
    np.testing.assert_allclose(states[here], expected[here], atol=1e-5, rtol=0)
    assert_same_gradients(gradients, wanted, floor=1e-3)


def test_texts_without_images_end_in_the_layer_before(tmp_path):
    """Layers that attend to images are passed by, the last one too."""
    make, changes, pairs, policy = CASES["mllama, images last"]
    folder = make(**changes).write_without_torch(tmp_path)
    (batch,) = batches(folder, [pair for pair in pairs if not pair.images], contract_of(folder, image_policy=policy))
    assert not batch.image_token.size
    model = load_backbone(folder)
    found, expected = (
        jax.jit(run, compiler_options=QUICK)(model, batch) for run in (lambda m, b: m(b, FLOAT32), whole)
    )
    here = batch.record >= 0
    np.testing.assert_allclose(found[here], expected[here], atol=1e-5, rtol=0)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_the_weights_of_the_other_layers_are_not_copied(remat):
    """Of eight layers, ending otherwise costs less memory than two, forward and backward."""
    model = from_config(tiny_config(num_hidden_layers=8, intermediate_size=4096), rngs=nnx.Rngs(0))
    batch, execution = pack([[random_group(np.random.default_rng(0), [], [4])]]), Execution(remat=remat)
    layers = sum(leaf.nbytes for leaf in jax.tree.leaves(model.text.layers))

    def plain(model):
        shared = model.text.shared(batch, execution)
        x = run_layers(model.text.layers, model.embed(batch, execution), *shared, execution=execution)
        return jnp.sum(model.text.pool(x, batch))

    def temporary(run):
        compiled = jax.jit(run, compiler_options=QUICK).lower(model).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ending = lambda model: jnp.sum(model(batch, execution))
    for both in ((plain, ending), map(jax.grad, (plain, ending))):
        without, found = map(temporary, both)
        assert found < without + layers / 4
