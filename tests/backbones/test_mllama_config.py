"""What a Llama-3.2-Vision config.json must say, and what is said when it does not."""

import pytest

from multitap_jax.backbones.mllama import MllamaConfig
from multitap_jax.config import ConfigError
from tests.families.mllama import PREPROCESSOR, oracle


def config(preprocessor=PREPROCESSOR, **changes):
    return MllamaConfig.from_hf(oracle(**changes).config, preprocessor)


def test_what_a_file_leaves_out_is_the_published_11b():
    found = MllamaConfig.from_hf({"model_type": "mllama"})
    assert (found.text.hidden_size, found.text.num_layers, found.text.vocab_size) == (4096, 40, 128264)
    assert (found.text.num_heads, found.text.num_kv_heads, found.text.head_dim) == (32, 8, 128)
    assert found.cross.layers == (3, 8, 13, 18, 23, 28, 33, 38)
    assert found.cross.period == 5
    assert (found.vision.intermediate_layers, found.vision.output_size) == ((3, 7, 15, 23, 30), 7680)
    assert found.image_token_id == 128256
    assert found.vision.pixels.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))


def test_the_sizes_of_the_published_instruct_models():
    found = MllamaConfig.from_hf({"model_type": "mllama", "vision_config": {"image_size": 560}})
    assert found.block == (6400, 1)
    assert (found.vision.tile_tokens, found.vision.filled_tokens) == (1601, 1608)


def test_a_processor_without_statistics_has_transformers_own():
    assert config({"resample": 3}).vision.pixels.std == (0.5,) * 3
    assert config({"resample": 3}).vision.resample == 3


def test_all_contradictions_come_at_once():
    vision = {
        "attention_heads": 5,
        "intermediate_layers_indices": [0, 4],
        "vision_output_dim": 100,
        "patch_size": 9,
        "supported_aspect_ratios": [[1, 1], [2, 1]],
    }
    with pytest.raises(ConfigError) as error:
        config(vision_config=vision, text_config={"cross_attention_layers": [1, 3]})
    for part in (
        "hidden_size = 32 must be divisible by attention_heads = 5",
        r"intermediate_layers_indices = [0, 4] must be different layers from 0 to 3",
        "vision_output_dim = 100 must be",
        "image_size = 28 must be a multiple of patch_size",
        "supported_aspect_ratios must be all arrangements of up to max_num_tiles = 4",
        "cross_attention_layers = [1, 3] of 6 layers: layers must repeat in equal groups",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("layers", [[], [1, 5], [0, 1], [1, 4, 6], [4, 1], [0, 1, 2, 3, 4, 5]])
def test_cross_layers_must_repeat(layers):
    with pytest.raises(ConfigError, match="cross_attention_layers"):
        config(text_config={"cross_attention_layers": layers})


@pytest.mark.parametrize("layers", [[0, 3], [2, 5], [0], [5]])
def test_they_may_stand_anywhere_in_their_group(layers):
    assert config(text_config={"cross_attention_layers": layers}).cross.layers == tuple(layers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"multitap_row_mask": "llama"}, "multitap_row_mask = 'llama'.*'hf' or 'meta'"),
        ({"multitap_intermediate_states": "both"}, "multitap_intermediate_states = 'both'.*'before' or 'after'"),
        ({"text_config": {"tie_word_embeddings": True}}, "tie_word_embeddings"),
        ({"vision_config": {"hidden_act": "silu"}}, "hidden_act"),
        ({"vision_config": {"max_num_tiles": 6}}, "max_image_tiles = 4, but vision_config.max_num_tiles = 6"),
    ],
)
def test_what_cannot_be_used_is_said(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("preprocessor", "message"),
    [
        (
            {"size": {"height": 560, "width": 560}},
            "size = {'height': 560, 'width': 560}, but vision_config.image_size = 28",
        ),
        ({"max_image_tiles": 2}, "max_image_tiles = 2, but vision_config.max_num_tiles = 4"),
        ({"resample": 7}, "resample = 7"),
        ({"image_mean": [0.5]}, "image_mean"),
    ],
)
def test_a_processor_of_another_model_is_refused(preprocessor, message):
    with pytest.raises(ConfigError, match=message):
        config(preprocessor)
