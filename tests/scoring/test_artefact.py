"""What is saved is what is loaded, and nothing else is ever loaded."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from multitap_jax.data.processing import Contract
from multitap_jax.data.seen import FITTED, TRAINED, Print, Seen
from multitap_jax.files import canonical_hash, file_hash
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.scoring.exports import ContractWarning, export_artefact, export_heads, export_official
from multitap_jax.scoring.importing import import_official
from multitap_jax.scoring.manifest import ArtefactError, Objective, read_manifest
from multitap_jax.weights.hashing import file_tensor_hash
from multitap_jax.weights.mapping import WeightError
from multitap_jax.weights.stored import FolderError
from tests.scoring.model_fixtures import (
    CONTRACT,
    HIDDEN,
    OBJECTIVES,
    base_folder,
    save_artefact,
    tiny_backbone,
    tiny_config,
    tiny_model,
    tiny_ridge,
    weight_paths,
)


def assert_same(left, right) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), left, right)


def edit(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite(path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_round_trip(saved):
    artefact, model, ridge = Artefact.load(saved)
    assert_same(model, tiny_model())
    assert artefact.manifest.contract == CONTRACT
    penalties = tiny_ridge().alpha_
    expected = tuple(dataclasses.replace(o, alpha=float(a)) for o, a in zip(OBJECTIVES, penalties, strict=True))
    assert artefact.manifest.objectives == expected
    assert artefact.manifest.overall.target_range == (1.0, 5.0)
    assert artefact.manifest.backbone == dataclasses.replace(
        artefact.manifest.backbone, model_type="qwen2_vl", source="tiny/qwen2-vl", revision="abc"
    )
    assert artefact.manifest.provenance == {"steps": 7}
    assert artefact.hidden_size == HIDDEN
    expected = tiny_ridge()
    np.testing.assert_array_equal(ridge.coef_, expected.coef_)
    np.testing.assert_array_equal(ridge.intercept_, expected.intercept_)
    np.testing.assert_array_equal(ridge.alpha_, expected.alpha_)


def test_parameters_in_another_type_and_heads_in_float32(saved):
    _, model, _ = Artefact.load(saved, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.backbone)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(model.head)} == {jnp.dtype(jnp.float32)}


def test_the_folder_is_readable_by_others(saved, base):
    heads = load_file(saved / "heads.safetensors")
    assert {name: array.shape for name, array in heads.items()} == {
        "reward_head.weight": (1, HIDDEN),
        "reward_head.bias": (1,),
        "ridge.coef": (2, HIDDEN),
        "ridge.intercept": (2,),
        "ridge.alpha": (2,),
        "seen.trained.pair": (1,),
        "seen.trained.pictures": (1,),
        "seen.trained.group": (0,),
        "seen.trained.id": (1,),
    }
    assert {heads[name].dtype for name in heads if name.startswith("seen.")} == {np.dtype(np.int64)}
    assert json.loads((saved / "config.json").read_text()) == tiny_config()
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert (saved / name).read_bytes() == (base / name).read_bytes()
    names = {name for path in weight_paths(saved) for name in load_file(path)}
    assert {"model.embed_tokens.weight", "model.norm.weight", "visual.patch_embed.proj.weight"} <= names


def test_transformers_loads_the_folder_with_nothing_missing(saved):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    model, info = transformers.Qwen2VLForConditionalGeneration.from_pretrained(saved, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    expected = load_file(weight_paths(saved)[0])["model.embed_tokens.weight"]
    np.testing.assert_array_equal(model.get_input_embeddings().weight.detach().numpy(), expected)


def test_an_output_embedding_of_its_own_goes_along(tmp_path):
    base = base_folder(tmp_path / "untied", tie_word_embeddings=False)
    model = tiny_model(tie_word_embeddings=False)
    path = weight_paths(base)[-1]
    output = np.random.default_rng(3).standard_normal((tiny_config()["vocab_size"], HIDDEN)).astype(np.float32)
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": output}))
    Artefact.save(tmp_path / "artefact", model, base=base, contract=CONTRACT)
    found = {n: t for p in weight_paths(tmp_path / "artefact") for n, t in load_file(p).items()}
    np.testing.assert_array_equal(found["lm_head.weight"], output)
    assert_same(Artefact.load(tmp_path / "artefact")[1], model)
    with pytest.warns(ContractWarning):
        official = export_official(tmp_path / "artefact", tmp_path / "official")
    found = {n: t for p in weight_paths(official) for n, t in load_file(p).items()}
    np.testing.assert_array_equal(found["backbone_model.lm_head.weight"], output)
    assert_same(Artefact.load(import_official(official, tmp_path / "back").folder)[1], model)


def test_an_artefact_without_ridge_then_with(base, tmp_path):
    folder = tmp_path / "artefact"
    first = save_artefact(folder, base, ridge=False)
    assert Artefact.load(folder)[2] is None
    weights = {path.name: path.read_bytes() for path in weight_paths(folder)}
    second = Artefact.open(folder).add_ridge(tiny_ridge(), OBJECTIVES)
    assert second.model_hash == first.model_hash
    assert second.fingerprint != first.fingerprint
    artefact, model, ridge = Artefact.load(folder)
    assert artefact == second
    assert_same(model.head, tiny_model().head)
    np.testing.assert_array_equal(ridge.coef_, tiny_ridge().coef_)
    assert {path.name: path.read_bytes() for path in weight_paths(folder)} == weights
    third = second.add_ridge(tiny_ridge(5), OBJECTIVES)
    assert third.manifest.hashes.heads != second.manifest.hashes.heads
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_what_was_seen_stays_with_the_weights_and_goes_with_the_heads(base, tmp_path):
    seen = [Seen.of([Print(number, (number,), None, number)]) for number in range(3)]
    save_artefact(tmp_path / "artefact", base, seen={TRAINED: seen[0]})
    artefact = Artefact.open(tmp_path / "artefact").add_ridge(tiny_ridge(5), OBJECTIVES, seen[1])
    assert known(artefact) == known_of({TRAINED: seen[0], FITTED: seen[1]})
    assert (
        known(artefact.add_ridge(tiny_ridge(6), OBJECTIVES, seen[2]))["fitted"]
        == known_of({"fitted": seen[2]})["fitted"]
    )
    for dtype in (None, jnp.bfloat16):
        copy = export_artefact(artefact.folder, tmp_path / f"copy-{dtype}", dtype=dtype)
        assert known(copy) == known_of({TRAINED: seen[0], FITTED: seen[2]})
    heads = load_file(export_heads(artefact.folder, tmp_path / "heads") / "heads.safetensors")
    assert not any(name.startswith("seen.") for name in heads)
    assert known(Artefact.open(artefact.folder).add_ridge(tiny_ridge(), OBJECTIVES)) == known_of({TRAINED: seen[0]})


def known(artefact):
    return known_of(Artefact.open(artefact.folder).seen())


def known_of(seen):
    return {who: [values.tolist() for values in records] for who, records in seen.items()}


@pytest.mark.parametrize("stop", ["before the manifest", "after the manifest"])
def test_a_crash_while_heads_are_replaced_leaves_old_or_new_heads(artefact, monkeypatch, stop):
    import multitap_jax.scoring.artefact as module

    old = Artefact.open(artefact)
    write = module.write_atomic

    def crash(path, content):
        if path.name == "multitap.json":
            if stop == "after the manifest":
                write(path, content)
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(module, "write_atomic", crash)
    with pytest.raises(KeyboardInterrupt):
        old.add_ridge(tiny_ridge(5), OBJECTIVES)
    monkeypatch.undo()
    _, _, ridge = Artefact.load(artefact)
    expected = tiny_ridge(5 if stop == "after the manifest" else 0)
    np.testing.assert_array_equal(ridge.coef_, expected.coef_)
    Artefact.open(artefact).add_ridge(tiny_ridge(6), OBJECTIVES)
    np.testing.assert_array_equal(Artefact.load(artefact)[2].coef_, tiny_ridge(6).coef_)


def test_saving_does_not_replace_what_is_no_artefact(base, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="will not be replaced"):
            save_artefact(folder, base, overwrite=overwrite)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def test_saving_replaces_an_artefact_only_when_told(base, artefact):
    with pytest.raises(FileExistsError, match="not empty"):
        save_artefact(artefact, base, seed=4)
    assert_same(Artefact.load(artefact)[1], tiny_model())
    save_artefact(artefact, base, seed=4, overwrite=True)
    assert_same(Artefact.load(artefact)[1], tiny_model(4))
    assert [path.name for path in artefact.parent.iterdir()] == ["artefact"]


def test_a_model_trained_to_nan_is_not_saved(base, tmp_path):
    model = tiny_model()
    model.head.weight[...] = jnp.full(HIDDEN, jnp.nan)
    with pytest.raises(ArtefactError, match=r"NaN or infinity in reward_head\.weight"):
        Artefact.save(tmp_path / "artefact", model, base=base, contract=CONTRACT)
    assert list(tmp_path.iterdir()) == []


def test_objectives_must_fit_the_heads(base, tmp_path):
    for objectives, reason in (
        (OBJECTIVES[:1], r"ridge heads of \('safety', 'detail'\), but objectives \('safety',\)"),
        (OBJECTIVES[::-1], "give one for each, in order"),
        ((OBJECTIVES[0], Objective("detail", (1.0, 0.0))), r"range 1\.0\.\.0\.0 is empty"),
    ):
        with pytest.raises(ArtefactError, match=reason):
            Artefact.save(
                tmp_path / "a", tiny_model(), base=base, contract=CONTRACT, ridge=tiny_ridge(), objectives=objectives
            )


def test_an_edited_contract_is_refused(artefact):
    edit(artefact / "multitap.json", lambda content: content["contract"].update(image_policy="square:32"))
    with pytest.raises(ArtefactError, match=r"multitap\.json: the contract .*square:32.* does not match its hash"):
        Artefact.load(artefact)


def test_a_setting_nobody_knows_is_refused(artefact):
    def change(content):
        content["contract"]["pooler"] = "mean"
        contract = {key: value for key, value in content["contract"].items() if key != "hash"}
        content["contract"]["hash"] = canonical_hash(contract)

    edit(artefact / "multitap.json", change)
    with pytest.raises(ArtefactError, match=r"contract\.pooler is not a setting; did you mean"):
        Artefact.load(artefact)


@pytest.mark.parametrize("section", ["contract", "overall", "backbone", "hashes"])
def test_a_missing_section_is_named(artefact, section):
    edit(artefact / "multitap.json", lambda content: content.pop(section))
    with pytest.raises(ArtefactError, match=rf"multitap\.json: section {section} is missing"):
        Artefact.load(artefact)


def test_a_newer_format_is_refused(artefact):
    edit(artefact / "multitap.json", lambda content: content.update(format_version=99))
    with pytest.raises(ArtefactError, match=r"format_version 99 is newer .* upgrade"):
        Artefact.load(artefact)


def test_edited_heads_are_refused(artefact):
    rewrite(artefact / "heads.safetensors", lambda tensors: tensors["reward_head.bias"].__iadd__(1))
    with pytest.raises(ArtefactError, match=r"heads\.safetensors: was edited or damaged"):
        Artefact.load(artefact)


def test_there_is_no_random_head(artefact):
    (artefact / "heads.safetensors").unlink()
    with pytest.raises(ArtefactError, match=r"heads\.safetensors: not here, and no head is ever random"):
        Artefact.load(artefact)


def test_every_wrong_head_is_listed(artefact):
    def change(tensors):
        del tensors["reward_head.bias"]
        tensors["ridge.coef"] = tensors["ridge.coef"][:1]

    rewrite(artefact / "heads.safetensors", change)
    heads = file_tensor_hash(artefact / "heads.safetensors")
    edit(artefact / "multitap.json", lambda content: content["hashes"].update(heads=heads))
    with pytest.raises(
        ArtefactError, match=r"reward_head\.bias: missing.*; ridge\.coef: \(1, 32\), expected \(2, 32\)"
    ):
        Artefact.load(artefact)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "preprocessor_config.json"])
def test_an_edited_or_missing_companion_is_named(artefact, name):
    path = artefact / name
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ArtefactError, match=rf"{name}: content changed"):
        Artefact.load(artefact)
    path.unlink()
    with pytest.raises(ArtefactError, match=rf"{name}: missing"):
        Artefact.load(artefact)


def test_one_flipped_bit_of_a_weight_is_noticed(artefact):
    path = weight_paths(artefact)[-1]
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ArtefactError, match="not those that were saved"):
        Artefact.load(artefact)
    Artefact.load(artefact, verify_weights=False)


def test_missing_and_mis_shaped_weights_are_all_listed(artefact):
    def change(tensors):
        del tensors["model.norm.weight"]
        del tensors["visual.patch_embed.proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(3, np.float32)

    rewrite(weight_paths(artefact)[0], change)
    with pytest.raises(WeightError) as caught:
        Artefact.load(artefact)
    for name in ("model.norm.weight", "visual.patch_embed.proj.weight", "model.layers.0.self_attn.q_proj.bias"):
        assert name in str(caught.value)


def test_a_plain_backbone_has_no_reward_head(base):
    with pytest.raises(ArtefactError, match=r"without a reward head .*multitap train"):
        Artefact.load(base)


def test_folders_that_are_no_checkpoint(tmp_path):
    with pytest.raises(ArtefactError, match="no such folder"):
        Artefact.load(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ArtefactError, match=r"neither multitap\.json nor config\.json"):
        Artefact.load(tmp_path)
    with pytest.raises(ArtefactError, match="no such folder"):
        Artefact.load(tmp_path / "notes.txt")


@pytest.mark.parametrize("kind", ["absent", "cut off"])
def test_half_a_checkpoint(artefact, kind):
    path = weight_paths(artefact)[-1]
    if kind == "absent":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises((ArtefactError, FolderError, WeightError), match=str(artefact)):
        Artefact.load(artefact)


def test_a_checkpoint_of_another_architecture(base, artefact, tmp_path):
    edit(artefact / "config.json", lambda content: content.update(model_type="bert"))
    files = {"config.json": file_hash(artefact / "config.json")}
    edit(artefact / "multitap.json", lambda content: content["hashes"].update(files=files))
    with pytest.raises(FolderError, match=r"config\.json: model_type = 'bert' is not supported"):
        Artefact.load(artefact)
    with pytest.raises(FolderError, match="bert"):
        save_artefact(tmp_path / "new", artefact)


def test_a_base_of_another_size_is_refused(base, tmp_path):
    other = base_folder(tmp_path / "other", intermediate_size=64)
    with pytest.raises(ArtefactError, match=r"config\.json: describes another model"):
        save_artefact(tmp_path / "new", other)
    assert not (tmp_path / "new").exists()


def test_the_fingerprint_follows_the_contract(base, tmp_path, saved):
    other = save_artefact(tmp_path / "other", base, contract=Contract("official-eval", "flat", "square:16"))
    assert other.fingerprint != read_manifest(saved).fingerprint
    assert other.model_hash == read_manifest(saved).hashes.model


def test_weights_saved_in_another_type(base, tmp_path):
    artefact = save_artefact(tmp_path / "half", base, dtype=jnp.bfloat16)
    _, model, _ = Artefact.load(artefact.folder)
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), tiny_backbone())
    assert_same(model.backbone, expected)


def test_a_size_that_the_configuration_leaves_out_is_the_familys(base, tmp_path):
    """llava-1.5-7b's file does not say 4096."""
    artefact = save_artefact(tmp_path / "artefact", base)
    text = {"model_type": "llama", "vocab_size": 32064}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text}))
    assert dataclasses.replace(artefact, folder=tmp_path).hidden_size == 4096
