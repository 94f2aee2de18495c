"""Every layout holds the same numbers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from multitap_jax.data.processing import Contract
from multitap_jax.files import tensor_hash
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.scoring.exports import ContractWarning, export_artefact, export_heads, export_official
from multitap_jax.scoring.importing import import_official
from multitap_jax.scoring.manifest import ArtefactError
from multitap_jax.weights.files import read_tensors
from multitap_jax.weights.hub import load_backbone
from tests.scoring.model_fixtures import HIDDEN, tiny_model, tiny_ridge, weight_paths

# The fixtures' contract is not the official one, and the export says so: asserted once, below.
pytestmark = pytest.mark.filterwarnings("ignore::multitap_jax.scoring.exports.ContractWarning")


def same(left, right) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), left, right)))


def test_a_copy_is_the_same_artefact(saved, tmp_path):
    copy = export_artefact(saved, tmp_path / "copy")
    assert copy.fingerprint == Artefact.open(saved).fingerprint
    assert {p.name for p in copy.folder.iterdir()} == {p.name for p in saved.iterdir()}
    with pytest.raises(FileExistsError):
        export_artefact(saved, tmp_path / "copy")
    export_artefact(saved, tmp_path / "copy", overwrite=True)


def test_a_damaged_artefact_is_not_copied(artefact, tmp_path):
    path = weight_paths(artefact)[0]
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ArtefactError):
        export_artefact(artefact, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_conversion_to_bfloat16_keeps_heads_and_says_where_it_came_from(saved, tmp_path):
    copy = export_artefact(saved, tmp_path / "half", dtype=jnp.bfloat16)
    artefact, model, ridge = Artefact.load(copy.folder)
    assert same(model.head, tiny_model().head)
    np.testing.assert_array_equal(ridge.coef_, tiny_ridge().coef_)
    assert artefact.manifest.provenance["converted"] == {
        "from": Artefact.open(saved).model_hash,
        "dtype": "bfloat16",
    }
    assert sum(p.stat().st_size for p in weight_paths(copy.folder)) < 0.6 * sum(
        p.stat().st_size for p in weight_paths(saved)
    )


def test_heads_alone_score_with_the_lines_of_the_documentation(saved, tmp_path, monkeypatch):
    out = export_heads(saved, tmp_path / "heads")
    about = json.loads((out / "heads.json").read_text())
    assert [objective["name"] for objective in about["objectives"]] == ["safety", "detail"]
    assert about["hidden_size"] == HIDDEN
    h = np.random.default_rng(0).standard_normal((5, HIDDEN)).astype(np.float32)
    scope = {"h": h}
    monkeypatch.chdir(out)
    for line in about["usage"]:
        assert line in export_heads.__doc__ + "  # columns: names of heads.json, where fitted" or "#" in line
        exec(line, scope)
    model = tiny_model()
    logits = np.asarray(model.head(jnp.asarray(h)[None]))[0]
    np.testing.assert_allclose(scope["overall"], 1 / (1 + np.exp(-logits)), rtol=1e-5)
    np.testing.assert_allclose(scope["objectives"], tiny_ridge().predict(h), rtol=1e-4, atol=1e-4)


def test_the_official_layout_and_back(saved, tmp_path):
    with pytest.warns(ContractWarning, match=r"position_mode mrope \(official: flat\); image_policy square:16"):
        out = export_official(saved, tmp_path / "official")
    names = {name: array for path in weight_paths(out) for name, array in load_file(path).items()}
    assert all(name.startswith(("backbone_model.", "reward_head.")) for name in names)
    assert names["reward_head.weight"].shape == (1, HIDDEN)
    assert names["reward_head.bias"].shape == (1,)
    original = {name: array for path in weight_paths(saved) for name, array in load_file(path).items()}
    for name, array in original.items():
        np.testing.assert_array_equal(names[f"backbone_model.{name}"], array)
    model = tiny_model()
    assert same(load_backbone(out, param_dtype=jnp.float32, prefix="backbone_model."), model.backbone)
    back = import_official(out, tmp_path / "back")
    _, again, ridge = Artefact.load(back.folder)
    assert same(again, model)
    assert ridge is None
    assert back.model_hash == Artefact.open(saved).model_hash
    assert back.manifest.contract == Artefact.open(saved).manifest.contract
    (out / "multitap_contract.json").unlink()
    taken = import_official(out, tmp_path / "official's own").manifest.contract
    assert taken == Contract("official-train", "flat", "square:560")


def test_the_official_layout_in_shards(saved, tmp_path):
    whole = export_official(saved, tmp_path / "whole")
    parts = export_official(saved, tmp_path / "parts", max_shard_bytes=20_000)
    assert len(weight_paths(whole)) == 1
    assert len(weight_paths(parts)) > 3
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    tensors = read_tensors(parts)
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    assert tensor_hash(tensors) == tensor_hash(read_tensors(whole))
    assert same(Artefact.load(import_official(parts, tmp_path / "back").folder)[1], tiny_model())


def test_the_official_layout_is_no_artefact_yet(saved, tmp_path):
    out = export_official(saved, tmp_path / "official")
    with pytest.raises(ArtefactError, match=r"official layout.*multitap import --checkpoint=.* --base="):
        Artefact.load(out)


def test_no_head_is_made_up_for_weights_without_one(base, tmp_path):
    with pytest.raises(ArtefactError, match=r"no reward_head\.\* .* no head is ever random.*multitap train"):
        import_official(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_replaces_only_its_own_kind(saved, base, tmp_path):
    export_official(saved, tmp_path / "official")
    export_official(saved, tmp_path / "official", overwrite=True)
    for write in (export_heads, export_artefact):
        with pytest.raises(FileExistsError):
            write(saved, tmp_path / "official", overwrite=True)
    export_heads(saved, tmp_path / "heads")
    with pytest.raises(FileExistsError):
        export_official(saved, tmp_path / "heads", overwrite=True)
