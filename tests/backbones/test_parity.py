"""Qwen2-VL against transformers' torch model on random weights with O(1) activations, float32."""

import jax
import numpy as np
import pytest

from multitap_jax.backbones import Execution
from multitap_jax.weights.hub import load_backbone
from tests.goldens import CASES, groups
from tests.tiny_qwen2_vl import pack, tiny_config, torch_inputs, torch_model, torch_pooled, write_folder

torch = pytest.importorskip("torch")

TOLERANCE = 2e-5
FLOAT32 = Execution()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2_vl")
    oracle = torch_model(tiny_config())
    return oracle, load_backbone(write_folder(folder, tiny_config()))


forward = jax.jit(lambda model, batch, execution: model(batch, execution), static_argnums=2)


@pytest.mark.parametrize("mode", ["mrope", "flat"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("case", CASES)
def test_pooled_states_equal_transformers(models, case, padding, mode):
    oracle, backbone = models
    pairs = groups(1, CASES[case])
    expected = torch_pooled(oracle, pairs, padding=padding, mode=mode)
    batch = pack([[pair] for pair in pairs], mode=mode)
    got = np.asarray(forward(backbone, batch, FLOAT32))[:, 0]
    assert got.dtype == np.float32
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0)


def recorded(modules, run) -> list[np.ndarray]:
    """Outputs of torch modules during `run`."""
    outputs: list[np.ndarray] = []
    keep = lambda module, args, output: outputs.append((output[0] if isinstance(output, tuple) else output).numpy())
    hooks = [module.register_forward_hook(keep) for module in modules]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return outputs


@pytest.mark.parametrize("layers", ["scan", "loop"])
def test_every_layer_equals_transformers(models, layers):
    oracle, backbone = models
    execution = Execution(layers=layers)
    (pair,) = groups(2, [[(4, 6), (8, 2)]])
    batch = pack([[pair]])
    run = lambda: oracle.model(**torch_inputs([pair]), use_cache=False)

    vision = backbone.vision.hidden_states(batch, execution)
    expected = recorded([oracle.model.visual.patch_embed, *oracle.model.visual.blocks], run)
    assert len(vision) == len(expected) == 3
    for ours, theirs in zip(vision, expected, strict=True):
        np.testing.assert_allclose(ours[0], theirs, atol=TOLERANCE, rtol=0)

    merged = backbone.vision(batch, execution)
    np.testing.assert_allclose(merged[0], recorded([oracle.model.visual.merger], run)[0], atol=TOLERANCE, rtol=0)

    text = backbone.hidden_states(batch, execution)
    expected = recorded(oracle.model.language_model.layers, run)
    assert len(text) == len(expected) + 1 == 4
    for ours, theirs in zip(text[1:], expected, strict=True):
        np.testing.assert_allclose(ours[0], theirs[0], atol=TOLERANCE, rtol=0)
