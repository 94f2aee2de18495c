"""NaN and infinity in weights: no load and no import is silent about them."""

import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from multitap_jax.config import MeshConfig
from multitap_jax.parallel.mesh import make_mesh, param_shardings
from multitap_jax.scoring.importing import import_official
from multitap_jax.weights import finite
from multitap_jax.weights.finite import all_finite
from multitap_jax.weights.hub import load_backbone
from multitap_jax.weights.mapping import WeightError
from tests.tiny_qwen2_vl import tiny_config, write_folder

NORM, TABLE, TOWER = "model.norm.weight", "model.embed_tokens.weight", "visual.blocks.1.mlp.fc1.weight"


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_bits_say_what_numpy_says(dtype, monkeypatch):
    monkeypatch.setattr(finite, "BLOCK", 16)
    largest = float(ml_dtypes.finfo(dtype).max)
    whole = np.asarray([0.0, -0.0, largest, -largest, 1e-8, *np.linspace(-3, 3, 40)], dtype)
    assert all_finite(whole)
    assert all_finite(whole.reshape(5, 9).T)
    assert all_finite(whole[:0])
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        for place in (0, 15, 16, len(whole) - 1):
            broken = whole.copy()
            broken[place] = value
            assert not np.isfinite(broken).all()
            assert not all_finite(broken)


def broken_folder(folder):
    """Three tensors with what is no number, in a folder that is otherwise whole."""
    write_folder(folder, tiny_config())
    tensors = load_file(folder / "model.safetensors")
    tensors[NORM][3] = np.nan
    tensors[TABLE][7, :2] = [np.inf, -np.inf]
    tensors[TOWER][5, 1:4] = [np.nan, np.inf, np.nan]
    save_file(tensors, folder / "model.safetensors")
    return tensors


def expected_lines(tensors):
    return (
        "3 tensors hold NaN or infinity",
        f"{NORM}: 1 NaN and 0 infinite of 64",
        f"{TABLE}: 0 NaN and 2 infinite of {tensors[TABLE].size}",
        f"{TOWER}: 2 NaN and 1 infinite of {tensors[TOWER].size}",
    )


PLACES = {
    "one device": lambda: None,
    "copies on eight": lambda: NamedSharding(make_mesh(MeshConfig(data=8)), PartitionSpec()),
    "parts on eight": lambda: lambda model: param_shardings(model, make_mesh(MeshConfig(fsdp=4, tensor=2))),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("watched", [False, True])
def test_a_load_names_every_tensor_with_counts(tmp_path, place, watched):
    tensors, seen = broken_folder(tmp_path), {}
    on_read = (lambda tensor, value: seen.update({tensor.name: value.shape})) if watched else None
    with pytest.raises(WeightError) as caught:
        load_backbone(tmp_path, shardings=PLACES[place](), on_read=on_read)
    for line in expected_lines(tensors):
        assert line in str(caught.value)
    if watched:
        assert seen == {name: value.shape for name, value in tensors.items() if name != "lm_head.weight"}


def test_a_long_list_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(finite, "NAMED", 1)
    broken_folder(tmp_path)
    with pytest.raises(WeightError, match=r"3 tensors hold.*\n.*\n  and 2 more tensors\nTake a checkpoint from before"):
        load_backbone(tmp_path)


def test_an_import_writes_nothing(tmp_path):
    tensors = broken_folder(tmp_path / "base")
    official = {f"backbone_model.{name}": value for name, value in tensors.items()}
    official |= {"reward_head.weight": np.zeros((1, 64), np.float32), "reward_head.bias": np.zeros(1, np.float32)}
    (tmp_path / "official").mkdir()
    save_file(official, tmp_path / "official" / "model.safetensors")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightError) as caught:
        import_official(tmp_path / "official", tmp_path / "out", base=tmp_path / "base")
    assert f"backbone_model.{TOWER}: 2 NaN and 1 infinite" in str(caught.value)
    assert not (tmp_path / "out").exists()
