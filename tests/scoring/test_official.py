"""`multitap import`: what it keeps of official checkpoints, what it refuses; scores are in tests/families."""

import json

import numpy as np
import pytest
from PIL import Image
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
    said = capsys.readouterr()
    assert "warning" not in said.err
    assert "note" not in said.out


def test_an_export_without_room_for_ridge_heads_says_so(official, tmp_path, capsys):
    _, base, folder = official
    artefact = import_official(folder, tmp_path / "artefact", base=base).folder
    rated = tmp_path / "rated.jsonl"
    lines = []
    for index in range(12):
        picture = tmp_path / f"{index}.png"
        Image.new("RGB", (64, 64), (20 * index, 100, 200 - 15 * index)).save(picture)
        ratings = {"realism": 1.0 + index % 5, "appeal": 5.0 - index % 3}
        lines.append({"id": str(index), "image": picture.name, "text": TEXTS[index % len(TEXTS)], "ratings": ratings})
    rated.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run("fit", f"--checkpoint={artefact}", f"--input={rated}") == 0
    assert run("export", f"--checkpoint={artefact}", "--format=official", f"--output={tmp_path / 'out'}") == 0
    assert "no place for 2 ridge heads" in capsys.readouterr().out


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
        "reward_head.weight: [2, 64] float32, expected [1, 64]",
        "reward_head.bias: missing, expected [1]",
        "unknown: value_head.weight",
        "missing: backbone_model.visual.merger.mlp.0.bias [128]",
        "wrong shape: backbone_model.model.language_model.norm.weight [63] float32, expected [64]",
        "has no tokenizer; give the backbone's own folder: --base=FOLDER",
    ):
        assert problem in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_no_number_and_a_prompt_that_nobody_knows(official, tmp_path):
    _, base, folder = official
    tensors = load_file(folder / "model.safetensors")
    tensors["reward_head.weight"] = np.full((1, 64), np.nan, np.float32)
    tensors["reward_head.bias"] = np.zeros(1, np.int64)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ArtefactError) as caught:
        import_official(tmp_path, tmp_path / "out", base=base, prompt="nope")
    for problem in (
        "reward_head.weight: holds NaN or infinity",
        "reward_head.bias: [1] int64, expected [1] of bfloat16, float16 or float32",
        "unknown prompt variant 'nope'",
    ):
        assert problem in str(caught.value)


def shards_of(tensors, folder):
    """Two files, the head's in the second."""
    names = sorted(tensors)
    folder.mkdir()
    for number, keys in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        save_file({key: tensors[key] for key in keys}, folder / f"model-{number:05d}-of-00002.safetensors")
    return folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors"


def test_broken_files_hide_nothing_else(official, tmp_path):
    """Shard missing or cut off, base folder missing or empty, head mis-shaped: one message."""
    _, base, folder = official
    tensors = load_file(folder / "model.safetensors")
    tensors["reward_head.weight"] = np.zeros((2, 64), np.float32)
    first, _ = shards_of(tensors, tmp_path / "in")
    first.write_bytes(first.read_bytes()[:-8])
    (tmp_path / "empty").mkdir()
    head = "reward_head.weight: [2, 64] float32, expected [1, {}]"
    cut = f"{first.name} is not a whole safetensors file (truncated: it has"
    no_config = f"no config.json in {tmp_path / 'in'} or {tmp_path / 'empty'}; give the backbone's own folder"
    cases = {
        tmp_path / "absent": (
            cut,
            f"{tmp_path / 'absent'}: no such folder",
            f"no config.json in {tmp_path / 'in'};",
            head.format("H"),
        ),
        tmp_path / "empty": (cut, no_config, f"{tmp_path / 'empty'} has no tokenizer", head.format("H")),
        base: (cut, head.format(64)),
    }
    for given, expected in cases.items():
        message = problems_of(tmp_path, given)
        assert all(problem in message for problem in expected), message
        assert "missing" not in message  # what a broken file holds is not known
    first.unlink()
    assert f"{first.name} is missing" in problems_of(tmp_path, base)
    assert head.format(64) in problems_of(tmp_path, base)
    for path in (tmp_path / "in").iterdir():
        path.unlink()
    message = problems_of(tmp_path, tmp_path / "empty")
    assert "has no model.safetensors and no shards of it" in message
    assert no_config in message
    with pytest.raises(ArtefactError, match=r"(?s)nowhere: no such folder.*absent: no such folder"):
        import_official(tmp_path / "nowhere", tmp_path / "out", base=tmp_path / "absent")


def problems_of(folder, base) -> str:
    with pytest.raises(ArtefactError) as caught:
        import_official(folder / "in", folder / "out", base=base)
    assert not (folder / "out").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    "chosen", [{"image_policy": "square:55"}, {"image_policy": "tiles:4"}, {"prompt": "x"}], ids=str
)
def test_a_contract_that_the_model_cannot_take_writes_nothing(official, tmp_path, chosen):
    _, base, folder = official
    with pytest.raises(ValueError, match="square:55: the side must be|are square or native|'x'"):
        import_official(folder, tmp_path / "out", base=base, **chosen)
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_imported(official, tmp_path):
    _, base, folder = official
    with pytest.raises(ArtefactError, match=r"without a reward head.*multitap train --config"):
        import_official(base, tmp_path / "out")
    with pytest.raises(ArtefactError, match=r"no config\.json in .*; give the backbone's own folder: --base=FOLDER"):
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
