"""`multitap import`: what it keeps of official checkpoints, what it refuses; scores are in tests/families."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from multitap_jax import cli
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.scoring.exports import ContractWarning, export_official
from multitap_jax.scoring.importing import import_official
from multitap_jax.scoring.manifest import ArtefactError
from multitap_jax.scoring.scorer import Scorer
from tests.families.official import PICTURES, RECIPES, TEXTS

RECIPE = RECIPES["qwen2_vl"]


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The torch model, its backbone's own folder, and its state as one file without config.json or tokenizer."""
    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("official")
    return RECIPE.write(base, folder), base, folder


def run(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_an_import_holds_the_checkpoints_own_tensors(official, tmp_path):
    _, base, folder = official
    artefact = import_official(folder, tmp_path / "artefact", base=base)
    given = {RECIPE.rename(name).removeprefix("backbone_model."): value for name, value in
             load_file(folder / "model.safetensors").items() if name.startswith("backbone_model.")}  # fmt: skip
    found = load_file(artefact.folder / "model.safetensors")
    assert found.keys() == given.keys()
    for name, value in given.items():
        assert found[name].tobytes() == value.tobytes(), name
    contract = artefact.manifest.contract
    assert (contract.prompt, contract.position_mode, contract.image_policy) == ("official-train", "flat", "square:560")
    assert (artefact.folder / "tokenizer.json").is_file()


def test_transformers_opens_what_was_imported(official, tmp_path):
    import transformers

    _, base, folder = official
    artefact = import_official(folder, tmp_path / "artefact", base=base)
    model, info = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        artefact.folder, output_loading_info=True
    )
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = load_file(folder / "model.safetensors")["backbone_model.lm_head.weight"]
    np.testing.assert_array_equal(model.lm_head.weight.detach().numpy(), expected)


def test_export_and_import_give_the_same_scores_whatever_the_contract(official, tmp_path):
    _, base, folder = official
    chosen = {"prompt": "official-eval", "position_mode": "mrope", "image_policy": "native:3136:12544"}
    first = import_official(folder, tmp_path / "first", base=base, **chosen)
    with pytest.warns(ContractWarning, match=r"position_mode mrope \(official: flat\)"):
        out = export_official(first.folder, tmp_path / "official", max_shard_bytes=200_000)
    back = import_official(out, tmp_path / "back")
    assert back.manifest.contract == first.manifest.contract
    assert back.model_hash == first.model_hash
    pairs = {"images": list(PICTURES), "texts": list(TEXTS)}
    scores = [Scorer.from_pretrained(artefact.folder).score(**pairs).overall for artefact in (first, back)]
    np.testing.assert_array_equal(*scores)
    path = out / "multitap_contract.json"
    path.write_text(path.read_text().replace("mrope", "flat"))
    with pytest.raises(ArtefactError, match=r"multitap_contract\.json: the contract does not match its hash"):
        import_official(out, tmp_path / "edited")


def test_an_export_of_the_official_contract_warns_of_nothing(official, tmp_path, capsys):
    _, base, folder = official
    artefact = import_official(folder, tmp_path / "artefact", base=base).folder
    out = tmp_path / "out"
    assert run("export", f"--checkpoint={artefact}", "--format=official", f"--output={out}") == 0
    assert "warning" not in capsys.readouterr().err


def test_everything_that_is_wrong_is_said_at_once(official, tmp_path):
    _, base, folder = official
    tensors = load_file(folder / "model.safetensors")
    del tensors["reward_head.bias"], tensors["backbone_model.model.visual.merger.mlp.0.bias"]
    tensors["reward_head.weight"] = np.zeros((2, 64), np.float32)
    tensors["backbone_model.model.language_model.norm.weight"] = np.zeros(63, np.float32)
    tensors["value_head.weight"] = np.zeros(3, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    with pytest.raises(ArtefactError) as caught:
        import_official(tmp_path, tmp_path / "out")
    for problem in (
        "reward_head.weight: [2, 64], expected [1, 64]",
        "reward_head.bias: missing, expected [1]",
        "unknown: value_head.weight",
        "missing: backbone_model.visual.merger.mlp.0.bias [128]",
        "wrong shape: backbone_model.model.language_model.norm.weight [63] float32, expected [64]",
        "has no tokenizer: give the backbone's own folder, --base=FOLDER",
    ):
        assert problem in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_imported(official, tmp_path):
    _, base, folder = official
    with pytest.raises(ArtefactError, match=r"without a reward head.*multitap train --config"):
        import_official(base, tmp_path / "out")
    with pytest.raises(ArtefactError, match=r"has no config\.json; give the backbone's own folder: --base=FOLDER"):
        import_official(folder, tmp_path / "out")
    artefact = import_official(folder, tmp_path / "artefact", base=base)
    with pytest.raises(ArtefactError, match="is an artefact already"):
        import_official(artefact.folder, tmp_path / "out")
    with pytest.raises(ArtefactError, match=r"multitap import --checkpoint="):
        Artefact.open(export_official(artefact.folder, tmp_path / "official"))


def test_a_tokenizer_of_another_model_leaves_nothing_behind(official, tmp_path):
    _, base, folder = official
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text(json.dumps({**config, "image_token_id": 3}))
    (tmp_path / "in" / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(ValueError, match="the two files belong to different models"):
        import_official(tmp_path / "in", tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()
