"""Llama-3.2-Vision against transformers and against a reference of its own, from pictures and texts to states."""

import json
import shutil

import jax
import numpy as np
import pytest

from multitap_jax.data.layouts import ImagePolicy
from multitap_jax.families import family_of, read_config
from multitap_jax.weights.hub import load_backbone
from tests.families.common import (
    FLOAT32,
    TOLERANCE,
    assert_same_states,
    batches,
    check_parity,
    contract_of,
    states,
    torch_inputs,
    torch_states,
)
from tests.families.mllama import LARGE, PAIRS, POLICY, SMALL, TALL, TILE, WIDE, oracle
from tests.families.mllama_reference import Reference


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mllama")
    return oracle(), oracle().write(folder), folder


def reading(folder, tmp_path, **entries):
    """The same weights read another way: `multitap_*` entries of config.json."""
    out = shutil.copytree(folder, tmp_path / "read")
    config = json.loads((out / "config.json").read_text())
    entries = {f"multitap_{name}": value for name, value in entries.items()}
    (out / "config.json").write_text(json.dumps(config | entries))
    return out


def pair_inputs(model, pair):
    tensors = torch_inputs(model[0], pair, contract_of(model[2], image_policy=POLICY))
    return {name: value.numpy() for name, value in tensors.items()}


def test_the_pictures_take_one_to_four_tiles(model):
    family, config = read_config(model[2])
    layout = family.layout(config, ImagePolicy.parse(POLICY))
    grids = [layout.grid(image.height, image.width) for image in (SMALL, WIDE, TALL, LARGE)]
    assert grids == [(1, 1), (1, 2), (3, 1), (2, 2)]


def test_states_and_gradients_equal_transformers(model):
    """All that the tower and the decoder can be asked for at once: 0 to 2 images of 1 to 4 tiles, texts that share one.

    transformers computes each pair alone, so this is also packed equals alone, with gradients.
    """
    check_parity(*model, PAIRS, gradient=True, image_policy=POLICY)


def test_stretched_pictures_equal_transformers(model):
    stretched = oracle(side=TILE)
    check_parity(stretched, *model[1:], PAIRS, prompt="official-eval", image_policy=f"square:{TILE}")


def test_a_square_larger_than_a_tile_is_tiled_as_the_processor_does(model):
    check_parity(oracle(side=40), *model[1:], PAIRS[:3], image_policy="square:40")


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("meta", [True, False])
def test_every_reading_equals_the_reference(model, tmp_path, before, meta):
    names = {"intermediate_states": "before" if before else "after", "row_mask": "meta" if meta else "hf"}
    folder = reading(model[2], tmp_path, **names)
    reference = Reference(folder, before=before, meta=meta)
    expected = np.stack([reference(pair_inputs(model, pair))[0][-1] for pair in PAIRS])
    contract = contract_of(folder, image_policy=POLICY)
    assert_same_states(states(load_backbone(folder), folder, PAIRS, contract), expected)
    apart = np.abs(expected - torch_states(*model[:2], PAIRS, contract)).max(axis=1)
    with_images = np.array([bool(pair.images) for pair in PAIRS])
    assert (apart[with_images] > 0.1).all() if before or meta else (apart < TOLERANCE).all()
    assert (apart[~with_images] < TOLERANCE).all()


def test_published_weights_are_read_before_and_hf(model):
    config = {key: value for key, value in oracle().config.items() if not key.startswith("multitap_")}
    found = family_of(config).config(config, None)
    assert (found.vision.intermediate_states, found.cross.row_mask) == ("before", "hf")


def test_every_layer_equals_the_reference(model):
    """Both stacks of the tower and all decoder layers, of a pair with two images."""
    pair, folder = PAIRS[3], model[2]
    reference = Reference(folder, before=False, meta=False)
    _, decoder, towers = reference(pair_inputs(model, pair))
    (batch,) = batches(folder, [pair], contract_of(folder, image_policy=POLICY))
    run = jax.jit(lambda model: (model.hidden_states(batch, FLOAT32), model.vision.hidden_states(batch, FLOAT32)))
    got, (local, whole) = jax.tree.map(np.asarray, run(load_backbone(folder)))
    got = got[:, 0, : len(decoder[0])]
    np.testing.assert_allclose(got, np.stack(decoder), atol=TOLERANCE, rtol=0)
    order = np.argsort(batch.image_cell[0][batch.image_token[0]])  # vision rows need not keep the prompt's order
    for row, image in enumerate(order):
        expected = np.stack(towers[image])
        np.testing.assert_allclose(local[:, row], expected[: len(local)], atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(whole[:, row], expected[len(local) :], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("layers", [[0, 3], [2, 5]])
def test_cross_attention_may_come_first_or_last_in_its_group(tmp_path, layers):
    changed = oracle(text_config={"cross_attention_layers": layers})
    check_parity(changed, changed.write(tmp_path), tmp_path, PAIRS[:3], image_policy=POLICY)
