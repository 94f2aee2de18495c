"""Every family: official layout -> artefact -> official layout keeps every byte; transformers opens the artefact."""

import importlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from multitap_jax.families import FAMILIES
from multitap_jax.scoring.exports import ContractWarning, export_official, export_vllm
from multitap_jax.scoring.importing import import_official


# InternLM-XComposer2.5 is none of transformers': tests/families/test_xcomposer_folder.py.
@pytest.fixture(scope="module", params=sorted(FAMILIES.keys() - {"internlm2"}))
def made(request, tmp_path_factory):
    """The oracle's torch model, its own folder, and a checkpoint of the official code, keys as in memory."""
    oracle = importlib.import_module(f"tests.families.{request.param}").oracle()
    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("official")
    model = oracle.write(base)
    state = {f"backbone_model.{key}": value.numpy().copy() for key, value in model.state_dict().items()}
    hidden = model.config.get_text_config().hidden_size
    rng = np.random.default_rng(0)
    state["reward_head.weight"] = rng.standard_normal((1, hidden)).astype(np.float32)
    state["reward_head.bias"] = np.full(1, 0.5, np.float32)
    save_file(state, folder / "model.safetensors")
    return model, base, folder, state


def test_the_official_layout_and_back(made, tmp_path):
    model, base, folder, state = made
    artefact = import_official(folder, tmp_path / "artefact", base=base)
    # transformers writes the hub's spelling; what it wrote of the same model is what the artefact must hold.
    ours, theirs = load_file(artefact.folder / "model.safetensors"), load_file(base / "model.safetensors")
    assert len(ours) == len(state) - 2
    opened, info = type(model).from_pretrained(artefact.folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for key, value in opened.state_dict().items():
        assert value.numpy().tobytes() == state[f"backbone_model.{key}"].tobytes(), key
    assert sorted(v.tobytes() for v in ours.values()) == sorted(v.tobytes() for v in theirs.values())

    out = export_official(artefact.folder, tmp_path / "official")
    found = load_file(out / "model.safetensors")
    back = import_official(out, tmp_path / "back")
    assert back.model_hash == artefact.model_hash
    assert back.manifest.contract == artefact.manifest.contract
    for key in ("reward_head.weight", "reward_head.bias"):
        np.testing.assert_array_equal(found[key], state[key])
    assert {key for key in found if key.startswith("backbone_model.")} == {f"backbone_model.{key}" for key in ours}


@pytest.mark.filterwarnings(f"ignore::{ContractWarning.__module__}.{ContractWarning.__name__}")
def test_a_classifier_of_every_family(made, tmp_path):
    from transformers import AutoConfig

    model, base, folder, _ = made
    artefact = import_official(folder, tmp_path / "artefact", base=base)
    config = AutoConfig.from_pretrained(export_vllm(artefact.folder, tmp_path / "vllm"))
    assert config.architectures == [type(model).__name__.replace("ConditionalGeneration", "SequenceClassification")]
    text, original = config.get_text_config(), model.config.get_text_config()
    assert config.num_labels == text.num_labels == 1
    for name in ("hidden_size", "num_hidden_layers", "vocab_size", "rope_parameters"):
        assert getattr(text, name) == getattr(original, name), name
