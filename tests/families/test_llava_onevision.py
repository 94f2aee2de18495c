"""LLaVA-OneVision against transformers, from pictures and texts to states and gradients; weights in and out; scores."""

import numpy as np
import pytest
from transformers import SiglipImageProcessorPil
from transformers.image_processing_utils import select_best_resolution

from multitap_jax.backbones import Execution
from multitap_jax.backbones.llava_onevision import LlavaOnevisionConfig
from multitap_jax.batch import MIX_UNIT
from multitap_jax.config import ConfigError
from multitap_jax.data.anyres import AnyresLayout, best_resolution, bilinear
from multitap_jax.data.chat import LLAVA_QWEN2
from multitap_jax.data.decode import ImageError
from multitap_jax.data.prompts import VARIANTS, Encoded, Prompter
from multitap_jax.data.stream import Pair
from multitap_jax.families import read_config
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
from tests.families.llava_checks import HUB, SIZES, check_adapters, check_flops, check_transformers_opens, pixels, raw
from tests.families.llava_onevision import (
    LARGE,
    MEAN,
    PAIRS,
    PINPOINTS,
    SIDE,
    STD,
    WIDE,
    image_processor,
    oracle,
    qwen_tokenizer,
    tokens_of,
)

TILES = "anyres:16"
SEEN = SIDE // 14 * 14
PUBLISHED = LlavaOnevisionConfig.from_hf({"model_type": "llava_onevision"})


def layout(policy: str = TILES) -> AnyresLayout:
    return AnyresLayout(policy, 14, SIDE, [tuple(size) for size in PINPOINTS], 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava_onevision")
    return oracle(), oracle().write(folder), folder


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_views_and_tiles_equal_the_processor(size):
    for seed in range(3):
        image = picture(size[0] + seed, size[1] + 2 * seed, seed)
        found = image_processor()(images=[image], return_tensors="np")
        expected = np.round(raw(found["pixel_values"][0], MEAN, STD))[..., :SEEN, :SEEN]
        assert np.array_equal(pixels(layout(), image), expected)
        assert np.array_equal(pixels(layout(f"square:{SIDE}"), image), expected[:1])
        assert layout().num_tokens(layout().grid(image.height, image.width)) == tokens_of(found, 0)
        siglip = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
        view = np.round(raw(siglip(images=[image], return_tensors="np")["pixel_values"], MEAN, STD))
        assert np.array_equal(view[..., :SEEN, :SEEN], expected[:1])


def test_resolutions_and_tokens_of_any_size_are_those_of_transformers():
    """With the published pinpoints; sizes of photographs, of strips, and round ones where ties are likely."""
    from transformers import LlavaOnevisionProcessor

    theirs, tiles = object.__new__(LlavaOnevisionProcessor), PUBLISHED.tiles
    theirs.num_image_tokens, theirs.vision_aspect_ratio = 729, "anyres_max_9"
    ours = AnyresLayout("anyres:36", 14, 384, tiles.pinpoints, tiles.max_views)
    pinpoints = [list(size) for size in tiles.pinpoints]
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(np.log(40), np.log(5000), (300, 2))).astype(int).tolist()
    sizes += [[96 * a, 96 * b] for a in range(1, 30, 4) for b in range(1, 30, 4)]
    for height, width in sizes:
        best = select_best_resolution((height, width), pinpoints)
        assert best_resolution((height, width), tiles.pinpoints) == tuple(best)
        grid = ours.grid(height, width)
        features, newlines = theirs._get_unpadded_features(height, width, 27, 27, best[0] // 384, best[1] // 384)
        assert ours.num_tokens(grid) == 729 + features + newlines
        assert ours.token_cells(grid).max() < ours.row_cells(ours.num_patches(grid))
        assert ours.patch_positions(grid)[:, :4].max() < ours.num_patches(grid)


@pytest.mark.parametrize(("size", "resized"), [(16, 9), (81, 70), (162, 89), (5, 5), (27, 1)])
def test_bilinear_places_are_those_of_torch(size, resized):
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(size).standard_normal((1, 1, size)).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(values), resized, mode="linear").numpy()[0, 0]
    first, second, weight = bilinear(size, resized)
    share = weight * MIX_UNIT
    np.testing.assert_allclose(
        values[0, 0, first] * (1 - share) + values[0, 0, second] * share, expected, atol=5e-7, rtol=0
    )


def test_fewer_tiles_may_be_allowed():
    few = layout("anyres:4")
    grids = [few.grid(image.height, image.width) for image in (LARGE, WIDE, picture(300, 20), picture(20, 300))]
    assert max(grid[0] * grid[1] for grid in grids) == 4
    assert few.grid(WIDE.height, WIDE.width) == layout().grid(WIDE.height, WIDE.width)
    with pytest.raises(ImageError, match="have 2 tiles or more"):
        AnyresLayout("anyres:1", 14, SIDE, [(SIDE, 2 * SIDE)], 3)
    squeezed = layout(f"square:{SIDE}").cut(LARGE.resize((80, 80)), ())
    assert np.array_equal(layout("square:80").cut(LARGE, ()), squeezed)
    with pytest.raises(ImageError, match="square or anyres"):
        layout(f"crop:{SIDE}")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("images", [0, 1, 2])
def test_tokens_are_those_of_the_chat_template(variant, images):
    tokenizer = qwen_tokenizer()
    for caption in ("a red ball", ' "quoted" and  spaced ', "newlines\nfirst", "ünïcödé 漢字 🙂", "!!! ...", "42 it's"):
        for request in (None, "Which way is safe?"):
            pair = Pair((WIDE,) * images, caption, request)
            (encoded,) = Prompter(tokenizer, variant, LLAVA_QWEN2).encode([caption], [request], [images])
            rendered = tokenizer.apply_chat_template(conversation(pair, variant), tokenize=False)
            assert isinstance(encoded, Encoded)
            ids = [*encoded.prefix, *encoded.text]
            assert ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]
            assert ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_states_and_gradients_equal_transformers(model):
    assert {layout().resized(g) == g[2:] for g in (layout().grid(i.height, i.width) for i in (WIDE, LARGE))} == {
        True,
        False,
    }
    check_parity(*model, PAIRS, gradient=True, image_policy=TILES)


def test_the_evaluation_prompt(model):
    check_parity(*model, PAIRS, prompt="official-eval", image_policy=TILES)


def test_one_view_is_the_default(model):
    _, torch_model, folder = model
    assert contract_of(folder).image_policy == f"square:{SIDE}"
    check_parity(oracle(tiles=False), torch_model, folder, PAIRS[:5])


def test_each_layer_of_the_tower(model):
    """Every hidden state, before the last norm, for two views of one picture and what fills up the row."""
    import torch

    _, torch_model, folder = model
    (batch,) = batches(folder, [PAIRS[0]], contract_of(folder, image_policy=TILES))
    found = np.asarray(load_backbone(folder).vision.tower.hidden_states(batch, Execution()))
    values = torch_inputs(oracle(), PAIRS[0], contract_of(folder))["pixel_values"][0]
    with torch.no_grad():
        expected = torch_model.model.vision_tower(values, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(theirs.numpy()).max() > 1
        np.testing.assert_allclose(ours[: len(theirs)], theirs.numpy(), atol=TOLERANCE, rtol=0)


def test_weights_come_and_go_in_every_spelling(model, tmp_path):
    check_weights(*model, tmp_path, hub=HUB, unused=("lm_head.", "post_layernorm"))


def test_an_artefact_scores_and_opens_in_transformers(tmp_path):
    """With what no score needs: a layer behind the one that is looked at, the last norm, the pooling head."""
    reference = oracle(vision={"num_hidden_layers": 3, "vision_use_head": True})
    reference.config["vision_feature_layer"] = -2
    folder = tmp_path / "base"
    folder.mkdir()
    torch_model = reference.write(folder)
    pairs = [pair for pair in PAIRS if pair.images]
    (tmp_path / "scores").mkdir()
    artefact = check_score(reference, torch_model, folder, tmp_path / "scores", pairs, image_policy=TILES)
    check_transformers_opens(torch_model, artefact)


def test_one_device_and_eight(model):
    pairs = [Pair((picture(60 + 35 * i, 90, i),), f"a red ball {i}") for i in range(8)]
    check_mesh(model[2], pairs, gradient=True, image_policy=TILES)


def test_adapters(model):
    targets = ("text.layers.attention.q_proj", "vision.tower.layers.attention.q_proj", "vision.projector.fc1")
    check_adapters(model[2], PAIRS[:2], contract_of(model[2], image_policy=TILES), targets)


def test_flops_are_the_compilers():
    config = oracle(vision={"hidden_size": 128, "intermediate_size": 256}, text={"hidden_size": 128}).config
    check_flops(config, views=3)


WRONG = {
    "vision_aspect_ratio = 'pad'": {"vision_aspect_ratio": "pad"},
    r"multiples of image_size = 384: \(384, 400\)": {"image_grid_pinpoints": [[384, 384], [384, 400]]},
    "text_config.model_type = 'qwen3'": {"text_config": {"model_type": "qwen3"}},
    "sliding window": {"text_config": {"model_type": "qwen2", "use_sliding_window": True}},
    "vision_feature_select_strategy = 'default'": {"vision_feature_select_strategy": "default"},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_not_implemented_is_named(message):
    with pytest.raises(ConfigError, match=message):
        LlavaOnevisionConfig.from_hf({"model_type": "llava_onevision", **WRONG[message]})


def test_files_of_different_models_are_noticed(model):
    config = {"model_type": "llava_onevision"}
    with pytest.raises(ConfigError, match="differ; the two files belong to different models"):
        LlavaOnevisionConfig.from_hf(config, {"image_grid_pinpoints": [[384, 384]]})
    assert read_config(model[2])[1].tiles.max_views == 3


def test_what_an_empty_file_means():
    """SigLIP so400m at 384 pixels, 27 x 27 patches of which the last six pixels are no part; up to 36 tiles."""
    assert (PUBLISHED.vision.num_layers, PUBLISHED.vision.stored_layers, PUBLISHED.vision.size) == (26, 26, 1152)
    assert PUBLISHED.block == (729, 730)
    assert PUBLISHED.vision.pixels.mean == (0.5, 0.5, 0.5)
    assert (len(PUBLISHED.tiles.pinpoints), PUBLISHED.tiles.max_views) == (36, 9)
    assert (PUBLISHED.text.hidden_size, PUBLISHED.text.num_kv_heads, PUBLISHED.image_token_id) == (4096, 32, 151646)
