"""Llama-3.2-Vision keeps images apart: who sees them, how often they are encoded, and that packing changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multitap_jax.backbones import Execution
from multitap_jax.backbones.attention import Setup, blockwise, chunked
from multitap_jax.backbones.cross import see
from multitap_jax.data.processing import Processing
from multitap_jax.data.stream import Pair
from multitap_jax.weights.hub import load_backbone
from tests.families.common import FLOAT32, QUICK, batches, contract_of, conversation, forward, states, torch_inputs
from tests.families.mllama import LARGE, PAIRS, POLICY, SMALL, TALL, WIDE, oracle, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("mllama")
    oracle().write(out)
    return out


@pytest.fixture(scope="module")
def backbone(folder):
    return load_backbone(folder)


def packed(folder, pairs):
    (batch,) = batches(folder, pairs, contract_of(folder, image_policy=POLICY))
    return batch


def test_who_sees_what_is_the_processors_mask(folder, backbone):
    """Tile by tile, also where image tokens follow each other and where text follows them."""
    tower = backbone.vision
    tokens = tower.config.tile_tokens
    for pair in (PAIRS[0], PAIRS[3], Pair((SMALL, LARGE, WIDE), "a ball")):
        batch = packed(folder, [pair])
        states = np.zeros((len(batch.patches), 4 * tokens, 64), np.float32)
        sight = see(batch, states, tower.real_tiles(batch), row_mask="hf", setup=Setup())
        inputs = torch_inputs(oracle(), pair, contract_of(folder, image_policy=POLICY))
        expected = inputs["cross_attention_mask"][0].numpy().astype(bool)
        length = len(expected)
        tiles = np.asarray(sight.visibility.prepared)[0, :length].reshape(length, -1, tokens)
        early = ~expected.any(axis=(1, 2))
        assert early.any()
        seen = np.where(early[:, None], True, expected.reshape(length, -1))
        np.testing.assert_array_equal(tiles, np.repeat(seen[:, :, None], tiles.shape[2], axis=2))
        np.testing.assert_array_equal(np.asarray(sight.sees)[0, :length], ~early)
        assert not np.asarray(sight.visibility.prepared)[0, length:].any()


def test_a_pair_gets_what_it_gets_alone(folder, backbone):
    """Whatever else is in the batch; without an image, the program alone does not even have a tower."""
    contract = contract_of(folder, image_policy=POLICY)
    together = states(backbone, folder, PAIRS, contract)
    for index in (2, 5):
        alone = states(backbone, folder, [PAIRS[index]], contract)
        np.testing.assert_allclose(together[index], alone[0], atol=5e-6, rtol=0)


def test_a_picture_is_encoded_once(folder):
    """Three pictures in nine pairs, in any group: three images in the tower."""
    pairs = [Pair((image,), f"a ball {n}", r) for image in (SMALL, WIDE) for n in range(2) for r in (None, "Which?")]
    batch = packed(folder, [*pairs, Pair((TALL, SMALL), "a box")])
    assert (batch.patch_segment.max(axis=1) > 0).sum() == 3
    assert batch.patch_segment.max() == 1
    assert len(np.unique(batch.image_cell[batch.image_cell >= 0])) == 3
    assert batch.image_token.shape[1] == 2


def test_pictures_out_of_the_row_count_when_a_batch_is_cut(folder):
    """Else a batch of short texts holds a hundred pictures, and memory goes with pictures."""
    pairs = [Pair((image,), f"a ball {n}") for image in (SMALL, WIDE, TALL) for n in range(2)]
    contract = contract_of(folder, image_policy=POLICY)
    (whole,) = batches(folder, pairs, contract, batch_tokens=16384)
    patches = whole.patches.shape[1]
    apart = batches(folder, pairs, contract, batch_tokens=patches + 60)
    assert [int((batch.patch_segment.max(axis=1) > 0).sum()) for batch in apart] == [1, 1, 1]
    assert sorted(int(i) for batch in apart for i in batch.record[batch.record >= 0]) == list(range(6))


@pytest.mark.parametrize("setting", [{"layers": "loop"}, {"attention": "blockwise"}, {"attention": "chunked"}], ids=str)
def test_execution_changes_no_value(folder, backbone, monkeypatch, setting):
    monkeypatch.setattr(blockwise, "BLOCK", 16)
    monkeypatch.setattr(chunked, "CHUNK", 24)
    batch = packed(folder, PAIRS)
    expected = np.asarray(forward(backbone, batch, FLOAT32))
    got = np.asarray(forward(backbone, batch, Execution(**setting)))
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)


def test_padding_is_finite_and_counts_for_nothing(folder, backbone):
    """A cell without a group: rows and vision rows of nothing but padding, whose tiles are all padding too."""
    (batch,) = batches(folder, PAIRS[:1], contract_of(folder, image_policy=POLICY), cells=2)
    assert (batch.segment.max(axis=1) == 0).any()
    assert (batch.patch_segment.max(axis=1) == 0).any()
    weight = np.asarray(batch.record >= 0, np.float32)

    def loss(model):
        hidden = model(batch, FLOAT32)
        return jnp.sum(jnp.tanh(hidden.sum(axis=-1) * 0.1) * weight), hidden

    gradient, hidden = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)(backbone)
    assert np.isfinite(hidden).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    alone = states(backbone, folder, PAIRS[:1], contract_of(folder, image_policy=POLICY))
    np.testing.assert_allclose(np.asarray(hidden)[batch.record >= 0], alone, atol=5e-6, rtol=0)


def test_bfloat16_is_near_float32(folder, backbone):
    batch = packed(folder, PAIRS)
    exact, short = (np.asarray(forward(backbone, batch, Execution(dtype=dtype))) for dtype in ("float32", "bfloat16"))
    assert short.dtype == np.float32
    exact, short = (x[batch.record >= 0] for x in (exact, short))
    error = np.linalg.norm(short - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert 0 < error.max() < 0.04


@pytest.mark.parametrize("prompt", ["official-train", "official-eval", "official-stage2"])
def test_prompts_are_those_of_the_chat_template(folder, prompt):
    prompter = Processing.from_folder(folder, contract_of(folder, prompt=prompt)).prompter
    for images in range(3):
        for request in (None, "Which way is safe?"):
            pair = Pair((SMALL,) * images, ' a "red" ball\n is near ', request)
            rendered = tokenizer().apply_chat_template(conversation(pair, prompt), tokenize=False)
            expected = tokenizer()(rendered)["input_ids"]
            assert tokenizer().convert_ids_to_tokens(expected[:2]) == ["<|begin_of_text|>"] * 2
            (found,) = prompter.encode([pair.text], [request], [images])
            assert [*found.prefix, *found.text] == expected
            assert tokenizer().convert_ids_to_tokens(int(found.text[-1])) == "<|eot_id|>"
