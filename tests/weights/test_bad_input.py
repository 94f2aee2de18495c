"""Checkpoints that do not fit or are not whole: one clear error that names everything that is wrong."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from multitap_jax.weights.hub import export_tensors, load_backbone
from multitap_jax.weights.mapping import WeightError
from multitap_jax.weights.stored import FolderError
from tests.tiny_qwen2_vl import tiny_config, write_folder

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    return load_file(write_folder(tmp_path_factory.mktemp("whole"), tiny_config()) / "model.safetensors")


def write(folder, tensors, **config):
    (folder / "config.json").write_text(json.dumps(tiny_config(**config)))
    save_file(tensors, folder / "model.safetensors")
    return folder


def shards(folder, tensors, config=None) -> dict:
    """Two shards and their index, which is returned."""
    names = sorted(tensors)
    parts = {FIRST: names[::2], SECOND: names[1::2]}
    for name, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / name)
    where = {key: name for name, keys in parts.items() for key in keys}
    (folder / "config.json").write_text(json.dumps(config or tiny_config()))
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    return where


def message_of(folder, kind=WeightError) -> str:
    with pytest.raises(kind) as caught:
        load_backbone(folder)
    return str(caught.value)


def test_a_config_whose_sizes_contradict_the_tensors(tensors, tmp_path):
    write(tmp_path, tensors, intermediate_size=128, num_key_value_heads=1, vision_mlp_ratio=4, vocab_size=200)
    message = message_of(tmp_path)
    for line in (
        "config.json says intermediate_size = 128, but tensors have 96",
        "config.json says num_key_value_heads * hidden_size / num_attention_heads = 16, but tensors have 32",
        "config.json says vision_config.mlp_ratio * embed_dim = 128, but tensors have 64",
        "config.json says vocab_size = 200, but tensors have 160",
        "wrong shape: model.embed_tokens.weight [160, 64] float32, expected [200, 64]",
    ):
        assert line in message
    wrong = [key for key in tensors if ".mlp." in key and "merger" not in key and not key.endswith("fc2.bias")]
    wrong += [key for key in tensors if any(name in key for name in ("k_proj", "v_proj"))]
    assert len(wrong) > 20
    for key in wrong:  # every one of them
        assert f"wrong shape: {key} " in message, key


def test_a_config_with_another_number_of_layers(tensors, tmp_path):
    write(tmp_path, tensors, num_hidden_layers=2, vision_depth=4)
    message = message_of(tmp_path)
    assert "config.json says num_hidden_layers = 2, but there are 3 of model.layers.*" in message
    assert "config.json says vision_config.depth = 4, but there are 2 of visual.blocks.*" in message
    assert message.count("unknown: model.layers.2.") == sum(key.startswith("model.layers.2.") for key in tensors)
    assert message.count("missing: visual.blocks.3.") == sum(key.startswith("visual.blocks.1.") for key in tensors)


def test_weights_of_another_family(tensors, tmp_path):
    renamed = {key.replace("model.layers", "transformer.h").replace("visual", "eye"): v for key, v in tensors.items()}
    message = message_of(write(tmp_path, renamed))
    assert "Hardly any name is known: does config.json (its model_type) belong to these weights?" in message
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert "model_type = 'gpt2' is not supported; supported: " in message_of(tmp_path, FolderError)


@pytest.mark.parametrize(
    "dtype, name, hint",
    [
        (np.int8, "int8", "Quantised weights are not read; take the model in bfloat16"),
        (ml_dtypes.float8_e4m3fn, "float8_e4m3fn", "8-bit floats mean nothing without their scales"),
        (np.float64, "float64", "expected floating point: bfloat16, float16 or float32"),
    ],
)
def test_types_that_are_not_read(tensors, tmp_path, dtype, name, hint):
    from multitap_jax.weights.writer import write_folder as write_any

    keys = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    odd = tensors | {key: tensors[key].astype(dtype) for key in keys}
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    write_any(tmp_path, {key: (value.shape, value.dtype) for key, value in odd.items()}, odd.items(), 1 << 30)
    message = message_of(tmp_path)
    assert "2 tensors do not fit" in message
    assert all(f"wrong type: {key} [96, 64] {name}" in message for key in keys)
    assert hint in message


def test_mixed_floating_point_types_are_one_model(tensors, tmp_path):
    mixed = {key: value.astype(np.float16) if "norm" in key else value for key, value in tensors.items()}
    found = dict(export_tensors(load_backbone(write(tmp_path, mixed))))
    for key in found:
        np.testing.assert_array_equal(found[key], mixed[key].astype(np.float32))


def test_a_quantised_model_is_refused(tensors, tmp_path):
    write(tmp_path, tensors, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "config.json has a quantization_config" in message_of(tmp_path)


def test_an_untied_output_head_where_tied_was_promised(tensors, tmp_path):
    message = message_of(write(tmp_path, tensors, tie_word_embeddings=True))
    assert "lm_head.weight differs from model.embed_tokens.weight" in message
    assert "config.json must say tie_word_embeddings: false" in message


@pytest.mark.parametrize(
    "head", [np.zeros((160, 64), np.int64), np.zeros((3, 5), np.float32), np.zeros((160, 64), bool)]
)
def test_a_tensor_that_no_score_needs_must_still_be_one_of_the_model(tensors, tmp_path, head):
    """The artefact takes it along, and transformers would stumble over it."""
    write(tmp_path, {**tensors, "lm_head.weight": head})
    kind = "wrong shape" if head.shape == (3, 5) else "wrong type"
    assert f"{kind}: lm_head.weight {list(head.shape)} {head.dtype}, expected " in message_of(tmp_path)


def test_a_tied_table_may_be_there_under_the_heads_name_alone(tensors, tmp_path):
    """Writers that keep one name of a shared tensor keep the first in the alphabet."""
    alone = {key: value for key, value in tensors.items() if key != "model.embed_tokens.weight"}
    model = load_backbone(write(tmp_path, alone, tie_word_embeddings=True))
    found = dict(export_tensors(model))
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], tensors["lm_head.weight"])
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    assert "missing: model.embed_tokens.weight" in message_of(tmp_path)


def test_missing_and_broken_shards_are_all_named(tensors, tmp_path):
    shards(tmp_path, tensors)
    for name in (FIRST, SECOND):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-50])
    message = message_of(tmp_path, FolderError)
    assert message.count("is not a whole safetensors file (truncated: ") == 2
    assert FIRST in message
    assert SECOND in message
    (tmp_path / FIRST).unlink()
    message = message_of(tmp_path, FolderError)
    assert f"{FIRST} is missing, but {INDEX} names it" in message
    assert f"{SECOND} is not a whole safetensors file (truncated: " in message
    (tmp_path / SECOND).unlink()
    (tmp_path / f"{FIRST}.incomplete").write_bytes(b"")
    message = message_of(tmp_path, FolderError)
    assert f"{FIRST} is missing, but {INDEX} names it" in message
    assert f"{SECOND} is missing, but {INDEX} names it" in message
    assert f"{FIRST}.incomplete: a download or save that did not end; start it again" in message


def test_an_index_that_says_otherwise_than_the_files(tensors, tmp_path):
    where = shards(tmp_path, tensors)
    names = sorted(tensors)
    del where[names[0]]
    where[names[1]] = FIRST
    where["model.extra.weight"] = SECOND
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": where}))
    message = message_of(tmp_path, FolderError)
    assert f"does not name {names[0]}, which is in {FIRST}" in message
    assert f"names {names[1]} in {FIRST}, but it is in {SECOND}" in message
    assert f"names model.extra.weight (in {SECOND}), which is not there" in message


@pytest.mark.parametrize("outside", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors"])
def test_an_index_may_not_leave_the_folder(tensors, tmp_path, outside):
    where = shards(tmp_path, tensors)
    where |= {"x": outside, "y": "../another"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": where}))
    message = message_of(tmp_path, FolderError)
    assert repr(outside) in message
    assert "'../another'" in message
    assert "nothing is read" in message


def test_links_are_followed_and_broken_ones_named(tensors, tmp_path):
    """The hub's cache is links into a folder beside it; a link is the owner's choice, a name in the index is not."""
    (tmp_path / "here").mkdir()
    (tmp_path / "blobs").mkdir()
    shards(tmp_path / "here", tensors)
    (tmp_path / "here" / FIRST).rename(tmp_path / "blobs" / "abc")
    (tmp_path / "here" / FIRST).symlink_to("../blobs/abc")
    assert len(dict(export_tensors(load_backbone(tmp_path / "here")))) == len(tensors) - 1
    (tmp_path / "blobs" / "abc").unlink()
    assert f"{FIRST} is missing (a link to ../blobs/abc, which is not there)" in message_of(tmp_path / "here")


def test_a_half_written_folder(tensors, tmp_path):
    shards(tmp_path, tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    assert "it is not clear which are the weights" in message_of(tmp_path, FolderError)
    for name in (FIRST, SECOND, INDEX):
        (tmp_path / name).unlink()
    load_backbone(tmp_path)


def test_pickles_are_refused_with_advice(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    for name in ("pytorch_model-00001-of-00002.bin", "consolidated.00.pth"):
        (tmp_path / name).write_bytes(b"\x80\x04")
    message = message_of(tmp_path, FolderError)
    assert "consolidated.00.pth, pytorch_model-00001-of-00002.bin: pickles, which run code" in message
    assert "weights_only=True" in message
