"""Configurations in both layouts, and sentences for those that cannot be used."""

import pytest
from flax import nnx

from multitap_jax.backbones.qwen2_vl import Qwen2VLConfig
from multitap_jax.config import ConfigError
from multitap_jax.families import FAMILIES, UnsupportedModelError, from_config
from tests.tiny_qwen2_vl import tiny_config


def test_both_layouts_give_the_same_configuration():
    """The nested layout is the one that transformers itself writes from the flat one."""
    import transformers

    for changes in ({}, {"tie_word_embeddings": True}):
        flat = tiny_config(**changes)
        nested = transformers.Qwen2VLConfig(**tiny_config(**changes)).to_dict()
        assert "hidden_size" not in nested
        assert Qwen2VLConfig.from_hf(nested) == Qwen2VLConfig.from_hf(flat)
        assert Qwen2VLConfig.from_hf(flat).tie_word_embeddings == bool(changes)


def test_a_nested_tie_from_before_transformers_5_counts():
    config = tiny_config()
    del config["tie_word_embeddings"]
    config["text_config"] = {**config, "tie_word_embeddings": True}
    assert Qwen2VLConfig.from_hf(config).tie_word_embeddings


def test_derived_sizes():
    config = Qwen2VLConfig.from_hf(tiny_config())
    assert (config.text.head_dim, config.vision.intermediate_size, config.vision.pixels.features) == (16, 64, 588)
    assert hash(config) == hash(Qwen2VLConfig.from_hf(tiny_config()))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_size": 66}, "hidden_size = 66 must be divisible by num_attention_heads = 4"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 must be divisible by num_key_value_heads = 3"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}}, "must add up to half the head size 16"),
        ({"rope_scaling": None}, "mrope_section is missing"),
        ({"rope_scaling": {"type": "yarn", "mrope_section": [2, 3, 3]}}, "rope type 'yarn' is not implemented"),
        ({"use_sliding_window": True}, "use_sliding_window = true is not implemented"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not implemented"),
        ({"vision_num_heads": 16}, "embed_dim = 32 must be divisible by 4"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0 must be a positive whole number"),
        ({"model_type": "qwen2"}, "model_type = 'qwen2': expected 'qwen2_vl'"),
    ],
)
def test_what_cannot_be_used_is_said(changes, message):
    with pytest.raises(ConfigError, match=message):
        Qwen2VLConfig.from_hf(tiny_config(**changes))


@pytest.mark.parametrize("statistics", [{"image_mean": [0.5]}, {"image_std": [1.0, 1.0, 0.0]}])
def test_pixel_statistics_are_checked(statistics):
    with pytest.raises(ConfigError, match="image_"):
        Qwen2VLConfig.from_hf(tiny_config(), statistics)


@pytest.mark.parametrize(
    "step", [{"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1.0}, {"rescale_factor": "1/255"}]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_that_are_prepared_otherwise_are_refused(family, step):
    with pytest.raises(ConfigError, match=f"{next(iter(step))} = .* (is not implemented|must be)"):
        FAMILIES[family].config({"model_type": family}, {**step, "image_mean": [0.5] * 3})


@pytest.mark.parametrize("config", [{}, {"model_type": "clip"}, {"model_type": ["qwen2_vl"]}])
def test_another_family_is_refused_with_the_known_ones(config):
    with pytest.raises(UnsupportedModelError, match=r"is not supported; supported: .*qwen2_vl"):
        from_config(config, rngs=nnx.Rngs(0))


UNREADABLE = {
    "hidden_size": ["64", 64.5, True, [64], -64],
    "rms_norm_eps": ["1e-6", 0, float("nan")],
    "use_sliding_window": ["false", 0],
    "rope_scaling": [
        "mrope",
        {"type": "mrope", "mrope_section": [2, 3]},
        {"type": "mrope", "mrope_section": "2, 3, 3"},
    ],
    "vision_config": ["tower", {"depth": "2"}],
    "image_token_id": ["<image>"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in UNREADABLE.items() for value in values])
def test_an_entry_of_the_wrong_kind_is_named_with_its_value(name, value):
    section = isinstance(value, dict)
    entry, value = next(reversed(value.items())) if section else (name, value)
    with pytest.raises(ConfigError) as caught:
        Qwen2VLConfig.from_hf({**tiny_config(), name: {entry: value} if section else value})
    assert f"{entry} = {value!r} must be" in str(caught.value)


def test_everything_wrong_is_said_at_once_and_text_that_no_number_reads_is_not():
    changes = {"hidden_size": "64", "vision_depth": "2", "hidden_act": "gelu", "use_sliding_window": True}
    with pytest.raises(ConfigError) as caught:
        from_config(tiny_config(**changes, transformers_version="5.23", _name_or_path="2"), rngs=nnx.Rngs(0))
    assert str(caught.value).splitlines()[1:] == [
        "use_sliding_window = true is not implemented; no published Qwen-VL model uses it",
        "hidden_act = 'gelu' is not implemented; this family has 'silu'",
        "hidden_size = '64' must be a positive whole number",
        "vision_config.depth = '2' must be a positive whole number",
        "(model_type = 'qwen2_vl' picked the family: is it right?)",
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_names_all_that_it_cannot_do(family):
    sections = {
        "text_config": {"hidden_act": "relu", "num_hidden_layers": "8", "rope_scaling": {"rope_type": "yarn"}},
        "vision_config": {"hidden_act": "swish", "hidden_size": None, "patch_size": [14, 14]},
    }
    with pytest.raises(ConfigError) as caught:
        config = {"model_type": family, **sections["text_config"], **sections}  # some keep the text's entries on top
        from_config(config, rngs=nnx.Rngs(0), preprocessor={"image_std": "one"})
    for part in (
        "hidden_act = 'relu' is not implemented",
        "num_hidden_layers = '8' must be",
        "rope type 'yarn' is not implemented",
        "hidden_act = 'swish' is not implemented",
        "vision_config.patch_size = [14, 14] must be",
        "preprocessor_config.image_std = 'one' must be a list of numbers",
    ):
        assert part in str(caught.value)


def test_contradictions_join_the_features_but_not_numbers_that_nobody_could_read():
    wrong = {"hidden_act": "gelu", "vision_num_heads": 16}
    with pytest.raises(ConfigError, match=r"hidden_act = 'gelu'(.|\n)*embed_dim = 32 must be divisible"):
        Qwen2VLConfig.from_hf(tiny_config(**wrong))
    with pytest.raises(ConfigError) as caught:
        Qwen2VLConfig.from_hf(tiny_config(**wrong, vision_embed_dim="32"))
    assert "divisible" not in str(caught.value)


def test_null_means_absent_and_a_misfit_names_the_family_that_was_asked_for():
    config = tiny_config(rope_theta=None, vision_patch_size=None)
    found = Qwen2VLConfig.from_hf(config)
    assert (found.text.rope.theta, found.vision.pixels.patch_size) == (1e6, 14)
    with pytest.raises(ConfigError, match=r"not implemented(.|\n)*model_type = 'qwen2_vl' picked the family"):
        from_config(tiny_config(hidden_act="gelu"), rngs=nnx.Rngs(0))
