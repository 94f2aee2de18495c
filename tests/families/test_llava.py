"""LLaVA-1.5 against transformers, from pictures and texts to states and gradients; weights in and out; scores."""

import json

import numpy as np
import pytest
from transformers import CLIPImageProcessorPil

from multitap_jax.backbones import Execution
from multitap_jax.backbones.llava import LlavaConfig
from multitap_jax.backbones.vision import CLIP_MEAN, CLIP_STD
from multitap_jax.config import ConfigError
from multitap_jax.data.chat import LLAVA, LLAVA_QWEN2
from multitap_jax.data.decode import ImageError
from multitap_jax.data.prompts import VARIANTS, Encoded, Prompter
from multitap_jax.data.stream import Pair
from multitap_jax.data.views import ViewLayout
from multitap_jax.families import FAMILIES, read_config
from multitap_jax.weights.hub import load_backbone
from tests.families.checks import check_mesh, check_score, check_weights
from tests.families.common import (
    TOLERANCE,
    batches,
    check_parity,
    contract_of,
    conversation,
    picture,
    torch_inputs,
)
from tests.families.llava import PAIRS, SIDE, WIDE, llama_tokenizer, oracle, processor
from tests.families.llava_checks import HUB, SIZES, check_adapters, check_flops, check_transformers_opens, pixels, raw

CROP = f"crop:{SIDE}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    return oracle(), oracle().write(folder), folder


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_crops_equal_the_processor(size):
    for seed in range(3):
        image = picture(size[0] + seed, size[1] + 2 * seed, seed)
        clip = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
        expected = raw(clip(images=[image], return_tensors="np")["pixel_values"], CLIP_MEAN, CLIP_STD)
        found = pixels(ViewLayout(CROP, 14, SIDE), image)
        assert np.array_equal(found, np.round(expected))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_stretched_pictures_equal_the_processor(size):
    """What does not fill a patch is not seen: 56 pixels are 4 patches of 14, 5 of 11."""
    image = picture(*size)
    clip = CLIPImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
    expected = np.round(raw(clip(images=[image], return_tensors="np")["pixel_values"], CLIP_MEAN, CLIP_STD))
    for patch in (14, 11):
        seen = SIDE // patch * patch
        found = pixels(ViewLayout(f"square:{SIDE}", patch, SIDE), image)
        assert np.array_equal(found, expected[..., :seen, :seen])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("square", [30, 80])
def test_other_squares_are_brought_to_the_tower_by_the_processor(size, square):
    image = picture(*size)
    clip = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    values = clip(images=[image.resize((square, square))], return_tensors="np")["pixel_values"]
    found = pixels(ViewLayout(f"square:{square}", 14, SIDE), image)
    assert np.array_equal(found, np.round(raw(values, CLIP_MEAN, CLIP_STD)))


@pytest.mark.parametrize("policy", ["crop:224", "native:784:7840"])
def test_a_policy_that_the_tower_cannot_take_says_which_it_can(policy):
    with pytest.raises(ImageError, match=r"write crop:336|pictures are square or crop"):
        ViewLayout(policy, 14, 336)


@pytest.mark.parametrize("scheme", ["legacy", "first", "always"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("images", [0, 1, 2])
def test_tokens_are_those_of_the_processor(scheme, variant, images):
    """In one piece, BOS by the tokenizer's own rule: a "<s>" written out would change the first word ("first")."""
    tokenizer = llama_tokenizer(scheme)
    for caption in ("a red ball", ' "quoted" and  spaced ', "newlines\nfirst", "ünïcödé 漢字 🙂", "!!! ...", "42 it's"):
        for request in (None, "Which way is safe?"):
            pair = Pair((WIDE,) * images, caption, request)
            (encoded,) = Prompter(tokenizer, variant, LLAVA).encode([caption], [request], [images])
            rendered = tokenizer.apply_chat_template(conversation(pair, variant), tokenize=False)
            whole = processor(tokenizer)(images=list(pair.images) or None, text=[rendered])["input_ids"][0]
            assert isinstance(encoded, Encoded)
            ids = [*encoded.prefix, *encoded.text]
            image = tokenizer.convert_tokens_to_ids("<image>")
            assert ids.count(image) == images
            expanded = [token for one in ids for token in [one] * (16 if one == image else 1)]
            assert expanded == list(whole)
            assert len(encoded.prefix) > 1 or not images


def test_a_cut_text_keeps_its_last_token():
    prompter = Prompter(llama_tokenizer(), "official-train", LLAVA)
    (encoded,) = prompter.encode(["a red ball is near on your left"], [None], [1])
    cut = prompter.shorten(encoded.text, 4)
    assert [*cut] == [*encoded.text[:3], encoded.text[-1]]


def test_states_and_gradients_equal_transformers(model):
    check_parity(*model, PAIRS, gradient=True, image_policy=CROP)


def test_the_evaluation_prompt(model):
    check_parity(*model, PAIRS, prompt="official-eval", image_policy=CROP)


def test_stretched_pictures_are_the_default(model):
    _, torch_model, folder = model
    assert contract_of(folder).image_policy == f"square:{SIDE}"
    assert contract_of(folder).position_mode == "flat"
    check_parity(oracle(square=True), torch_model, folder, PAIRS[:4])


SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False}
OTHERS = {
    "the last layer": ({"vision_feature_layer": -1}, {}, {}),
    "one layer, listed": ({"vision_feature_layer": [1]}, {"hidden_act": "gelu"}, {}),
    "siglip and qwen2": (
        {"vision_feature_select_strategy": "full", "multimodal_projector_bias": False},
        SIGLIP,
        {"model_type": "qwen2"},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_towers_and_decoders(name, tmp_path):
    """The pieces apart from prompts: tower, projector, decoder from one batch."""
    top, vision, text = OTHERS[name]
    other = oracle(vision=vision, text=text)
    other.config.update(top)
    torch_model = other.write(tmp_path)
    family, config = read_config(tmp_path)
    assert family.chat == (LLAVA_QWEN2 if "qwen2" in name else LLAVA)
    check_tower(torch_model, tmp_path, config.vision.num_layers)


def test_each_layer_of_the_tower(model):
    check_tower(*model[1:], 2)


def check_tower(torch_model, folder, layers):
    """Every hidden state up to the one that is looked at, and the projected features, two pictures in one row."""
    import torch

    images = [WIDE, picture(60, 200)]
    (batch,) = batches(folder, [Pair(tuple(images), "a")], contract_of(folder, image_policy=CROP))
    backbone = load_backbone(folder)
    views = np.stack([pixels(ViewLayout(CROP, 14, SIDE), image)[0] for image in images])
    numbers = backbone.config.vision.pixels
    mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (numbers.mean, numbers.std))
    values = torch.from_numpy((views.astype(np.float32) / np.float32(255) - mean) / std)
    # Pictures stand in the order in which the packer came upon them, and the row may be longer than they are.
    order = [0, 1] if np.array_equal(batch.patches[0, :16], ViewLayout(CROP, 14, SIDE).cut(WIDE, ())) else [1, 0]
    with torch.no_grad():
        expected = torch_model.model.vision_tower(values[order], output_hidden_states=True).hidden_states
        features = torch_model.model.get_image_features(values[order]).pooler_output
    found = np.asarray(backbone.vision.tower.hidden_states(batch, Execution()))
    assert len(found) == layers + 1 <= len(expected)
    for ours, theirs in zip(found, expected, strict=False):
        assert np.abs(theirs.numpy()).max() > 1
        np.testing.assert_allclose(ours[:2], theirs.numpy(), atol=TOLERANCE, rtol=0)
    projected = np.asarray(backbone.vision(batch, Execution()))[:2]
    np.testing.assert_allclose(projected, np.stack([f.numpy() for f in features]), atol=TOLERANCE, rtol=0)


def test_weights_come_and_go_in_every_spelling(model, tmp_path):
    check_weights(*model, tmp_path, hub=HUB, unused=("lm_head.", "post_layernorm", ".layers.2."))


def test_an_artefact_scores_and_opens_in_transformers(model, tmp_path):
    """With what no score needs: the tower's last layer, its last norm, the output head."""
    artefact = check_score(*model, tmp_path, [pair for pair in PAIRS if pair.images], image_policy=CROP)
    check_transformers_opens(model[1], artefact)


def test_one_device_and_eight(model):
    check_mesh(model[2], [Pair((picture(40 + 5 * i, 60, i),), f"a red ball {i}") for i in range(8)], gradient=True)


def test_adapters(model):
    targets = ("text.layers.attention.q_proj", "vision.tower.layers.attention.q_proj", "vision.projector.fc1")
    check_adapters(model[2], PAIRS[:2], contract_of(model[2]), targets)


def test_flops_are_the_compilers():
    config = oracle(vision={"hidden_size": 128, "intermediate_size": 256}, text={"hidden_size": 128}).config
    check_flops(config, views=3)


def test_a_view_is_blind_to_its_neighbours(model):
    """Padding and other pictures in the same vision row change no bit of a view's features."""
    _, _, folder = model
    backbone = load_backbone(folder)
    (batch,) = batches(folder, [Pair((WIDE, picture(60, 200)), "a")], contract_of(folder))
    whole = np.asarray(backbone.vision(batch, Execution()))
    patches = batch.patches.copy()
    patches[:, 16:] = 0
    alone = batch._replace(patches=patches, patch_segment=np.where(np.arange(patches.shape[1]) < 16, 1, 0)[None])
    np.testing.assert_array_equal(np.asarray(backbone.vision(alone, Execution()))[0], whole[0])


WRONG = {
    "text_config.model_type = 'gemma'": {"text_config": {"model_type": "gemma"}},
    "sliding window": {"text_config": {"model_type": "mistral"}},
    "attention_bias = True": {"text_config": {"model_type": "llama", "attention_bias": True}},
    "vision_config.model_type = 'pixtral'": {"vision_config": {"model_type": "pixtral"}},
    r"vision_feature_layer = \[-2, -3\]": {"vision_feature_layer": [-2, -3]},
    "vision_feature_layer = -30 is no output": {"vision_feature_layer": -30},
    "vision_feature_select_strategy = 'full'": {"vision_feature_select_strategy": "full"},
    "projector_hidden_act = 'relu'": {"projector_hidden_act": "relu"},
    r"image_size = \[336, 336\]": {"vision_config": {"image_size": [336, 336]}},
    "num_attention_heads = 3": {"vision_config": {"hidden_size": 32, "num_attention_heads": 3, "num_hidden_layers": 2}},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_not_implemented_is_named(message):
    with pytest.raises(ConfigError, match=message):
        LlavaConfig.from_hf({"model_type": "llava", **WRONG[message]})


def test_what_the_published_file_leaves_out():
    """llava-1.5-7b: sizes of Vicuna and of CLIP ViT-L/14 at 336 pixels."""
    text = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
    config = LlavaConfig.from_hf({"model_type": "llava", "image_token_index": 32000, "text_config": text})
    assert (config.text.hidden_size, config.text.intermediate_size, config.text.num_layers) == (4096, 11008, 32)
    assert (config.text.num_kv_heads, config.text.rms_norm_eps, config.text.rope.theta) == (32, 1e-5, 10000.0)
    assert (config.vision.num_layers, config.vision.stored_layers, config.vision.size) == (23, 24, 1024)
    assert config.block == (576, 576)
    assert json.dumps(config.vision.pixels.mean) == json.dumps(CLIP_MEAN)
    assert not config.tie_word_embeddings


@pytest.mark.parametrize("name", ["LlavaConfig", "LlavaOnevisionConfig"])
@pytest.mark.parametrize("sections", [{}, {"vision_config": {"image_size": 384}, "text_config": {}}], ids=str)
def test_absent_entries_mean_what_they_do_in_transformers(name, sections):
    import transformers

    theirs = getattr(transformers, name)(**json.loads(json.dumps(sections)))
    written = json.loads(theirs.to_json_string())
    family = FAMILIES[theirs.model_type]
    ours = family.config({"model_type": theirs.model_type, **sections}, None)
    assert family.config(written, None) == ours
    vision, text = theirs.vision_config, theirs.text_config
    assert (ours.vision.size, ours.vision.stored_layers) == (vision.hidden_size, vision.num_hidden_layers)
    assert (ours.vision.image_size, ours.vision.pixels.patch_size) == (vision.image_size, vision.patch_size)
    assert (ours.vision.norm_eps, ours.vision.activation) == (vision.layer_norm_eps, vision.hidden_act)
    assert ours.vision.pooler == getattr(vision, "vision_use_head", False)
    assert (ours.text.vocab_size, ours.text.intermediate_size) == (text.vocab_size, text.intermediate_size)
    assert (ours.text.num_kv_heads, ours.text.rms_norm_eps) == (text.num_key_value_heads, text.rms_norm_eps)
    assert ours.text.rope.theta == text.rope_parameters["rope_theta"]
    assert ours.image_token_id == theirs.image_token_index


def test_execution_changes_no_feature(model):
    backbone = load_backbone(model[2])
    (batch,) = batches(model[2], PAIRS[:2], contract_of(model[2]))
    expected = np.asarray(backbone.vision(batch, Execution()))
    other = Execution(attention="blockwise", layers="loop")
    np.testing.assert_allclose(backbone.vision(batch, other), expected, atol=1e-5, rtol=0)
    short = np.asarray(backbone.vision(batch, Execution(dtype="bfloat16"))).astype(np.float32)
    assert 0 < np.linalg.norm(short - expected) / np.linalg.norm(expected) < 0.03


def test_inputs_of_the_oracle_hold_every_picture(model):
    found = torch_inputs(model[0], PAIRS[3], contract_of(model[2]))
    assert found["pixel_values"].shape == (2, 3, SIDE, SIDE)
