"""Llama-3.2-Vision's weights in and out: every byte, every spelling, a token table with eight rows more."""

import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from multitap_jax.backbones.mllama import MllamaConfig
from multitap_jax.data.processing import Contract
from multitap_jax.families import read_config
from multitap_jax.naming import by_name
from multitap_jax.reward import RewardHead, RewardModel
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.weights import mllama
from multitap_jax.weights.hub import load_backbone
from multitap_jax.weights.mapping import WeightError
from tests.families.checks import check_weights
from tests.families.common import random_weight
from tests.families.mllama import oracle

HEAD = "language_model.lm_head.weight"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    model = oracle().write(folder)
    return folder, load_file(folder / "model.safetensors"), model


def assert_same_bytes(got, expected):
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].dtype == value.dtype, key
        assert got[key].tobytes() == np.ascontiguousarray(value).tobytes(), key


def without_head(tensors):
    return {key: value for key, value in tensors.items() if key != HEAD}


def test_weights_come_and_go_in_every_spelling(hub, tmp_path):
    folder, tensors, model = hub
    assert HEAD in tensors
    check_weights(oracle(), model, folder, tmp_path)


def test_rules_are_one_to_one_and_name_every_parameter(hub):
    _, config = read_config(hub[0])
    rules = mllama.table(config).rules
    assert len({rule.path for rule in rules}) == len({(rule.key, rule.layers) for rule in rules}) == len(rules)
    assert {rule.path for rule in rules} == by_name(load_backbone(hub[0])).keys()


def test_what_does_not_fit_is_listed_with_the_hubs_layer_numbers(hub, tmp_path):
    folder, tensors, _ = hub
    wrong = dict(tensors)
    del wrong["language_model.model.layers.4.cross_attn_attn_gate"]
    embedding = "language_model.model.embed_tokens.weight"
    wrong[embedding] = wrong[embedding][:-8]
    save_file(wrong, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(WeightError, match=r"(?s)2 tensors.*embed_tokens.*missing: .*layers\.4\.cross_attn_attn_gate"):
        load_backbone(tmp_path)


def test_an_artefact_opens_with_transformers(hub, tmp_path):
    """With the output head that no score needs, and with our entries in config.json, which transformers ignores."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    folder, tensors, model = hub
    head = RewardHead.from_arrays(random_weight("reward", (64,), 0), np.float32(0.2))
    contract = Contract(position_mode="flat", image_policy="tiles:4")
    Artefact.save(tmp_path / "artefact", RewardModel(load_backbone(folder), head), base=folder, contract=contract)
    assert_same_bytes(load_file(tmp_path / "artefact" / "model.safetensors"), tensors)
    assert json.loads((tmp_path / "artefact" / "config.json").read_text())["multitap_intermediate_states"] == "after"
    found, report = transformers.MllamaForConditionalGeneration.from_pretrained(
        tmp_path / "artefact", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for key, value in model.state_dict().items():
        assert found.state_dict()[key].equal(value), key


def test_published_names_of_a_real_model():
    """Names of tensors read in a public listing of Llama-3.2-11B-Vision-Instruct, and the numbers of its layers."""
    table = mllama.table(MllamaConfig.from_hf({"model_type": "mllama"}))
    assert table.unused_shapes == {"language_model.lm_head.weight": (128256, 4096)}
    keys = {rule.key for rule in table.rules}
    assert "language_model.model.layers.{layer}.cross_attn_attn_gate" in keys
    assert "vision_model.global_transformer.layers.{layer}.gate_ffn" in keys
    cross = next(rule for rule in table.rules if rule.key.endswith("cross_attn.q_norm.weight"))
    own = next(rule for rule in table.rules if rule.key.endswith("self_attn.q_proj.weight") and rule.layers)
    assert cross.layers == tuple(range(3, 40, 5))
    assert own.layers[:5] == (0, 1, 2, 4, 5)
    assert len(own.layers) == 32
    assert all(re.fullmatch(r"[a-z_.{}0-9]+", key) for key in keys)


def test_parameters_count_as_published():
    """10.67 B and 88.59 B: with the output head, which we leave out (reference counts of the two published sizes)."""
    from flax import nnx

    from multitap_jax.families import from_config, num_params

    sizes = {
        10.670e9: {"vision_config": {"image_size": 560}},
        88.593e9: {
            "text_config": {
                "hidden_size": 8192,
                "num_hidden_layers": 100,
                "num_attention_heads": 64,
                "intermediate_size": 28672,
                "cross_attention_layers": list(range(3, 100, 5)),
            },
            "vision_config": {"image_size": 560},
        },
    }
    for published, config in sizes.items():
        model = nnx.eval_shape(lambda config=config: from_config({"model_type": "mllama", **config}, rngs=nnx.Rngs(0)))
        head = 128256 * model.config.text.hidden_size
        assert num_params(model) + head == pytest.approx(published, rel=1e-4)
        assert all(leaf.size for leaf in jax.tree.leaves(model))
