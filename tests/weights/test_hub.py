"""Import and export of Qwen2-VL weights: exact in both directions, strict about everything that does not fit."""

import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from multitap_jax.families import abstract_backbone
from multitap_jax.naming import by_name
from multitap_jax.weights.files import read_tensors
from multitap_jax.weights.hub import export_tensors, load_backbone, save_backbone
from multitap_jax.weights.mapping import WeightError
from multitap_jax.weights.stored import FolderError
from tests.tiny_qwen2_vl import tiny_config, torch_model


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A checkpoint as the hub has it, with an output head; and its tensors."""
    folder = tmp_path_factory.mktemp("hub")
    torch_model(tiny_config()).save_pretrained(folder)
    return folder, load_file(folder / "model.safetensors")


def make_folder(folder, tensors: dict, config: dict | None = None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or tiny_config()))
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / "model.safetensors")
    return folder


def backbone_tensors(tensors: dict) -> dict:
    return {key: value for key, value in tensors.items() if key != "lm_head.weight"}


def assert_same_tensors(got: dict, expected: dict):
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].dtype == value.dtype, key
        assert got[key].tobytes() == np.ascontiguousarray(value).tobytes(), key


def test_export_of_an_import_has_the_same_bytes(hub):
    folder, tensors = hub
    assert_same_tensors(dict(export_tensors(load_backbone(folder))), backbone_tensors(tensors))


def in_memory(key: str) -> str:
    return "model." + key if key.startswith("visual.") else re.sub(r"^model\.", "model.language_model.", key)


SPELLINGS = {"in memory": in_memory, "base model": lambda key: re.sub(r"^model\.", "language_model.", key)}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_loads(hub, tmp_path, spelling):
    _, tensors = hub
    renamed = {SPELLINGS[spelling](key): value for key, value in tensors.items()}
    assert renamed.keys() != tensors.keys()
    model = load_backbone(make_folder(tmp_path, renamed))
    assert_same_tensors(dict(export_tensors(model)), backbone_tensors(tensors))


def test_transformers_spellings_are_the_ones_it_writes(tmp_path):
    """Its own in-memory names and its base model saved alone, not only our idea of them."""
    oracle = torch_model(tiny_config())
    expected = {key: value.numpy() for key, value in oracle.state_dict().items() if key != "lm_head.weight"}
    oracle.save_pretrained(tmp_path / "memory", save_original_format=False)
    oracle.model.save_pretrained(tmp_path / "base")
    for name in ("memory", "base"):
        (tmp_path / name / "config.json").write_text(json.dumps(tiny_config()))
        exported = dict(export_tensors(load_backbone(tmp_path / name)))
        assert len(exported) == len(expected)
        for key, value in exported.items():
            np.testing.assert_array_equal(value, expected[in_memory(key)])


def test_shards_with_and_without_index(hub, tmp_path):
    folder, tensors = hub
    config = (folder / "config.json").read_text()
    save_backbone(load_backbone(folder), tmp_path, max_shard_bytes=200_000)
    (tmp_path / "config.json").write_text(config)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all((tmp_path / name).stat().st_size < 210_000 for name in shards)
    assert_same_tensors(dict(export_tensors(load_backbone(tmp_path))), backbone_tensors(tensors))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == backbone_tensors(tensors).keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in backbone_tensors(tensors).values())

    (tmp_path / "model.safetensors.index.json").unlink()
    assert_same_tensors(dict(export_tensors(load_backbone(tmp_path))), backbone_tensors(tensors))
    (tmp_path / shards[1]).unlink()
    with pytest.raises(FolderError, match=f"{shards[1]} is missing"):
        load_backbone(tmp_path)


def test_transformers_reads_what_we_write(hub, tmp_path):
    from transformers import Qwen2VLModel

    folder, tensors = hub
    save_backbone(load_backbone(folder), tmp_path, max_shard_bytes=200_000)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    oracle, problems = Qwen2VLModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not problems["missing_keys"]
    assert not problems["unexpected_keys"]
    written = oracle.state_dict()["language_model.layers.1.mlp.up_proj.weight"].numpy()
    np.testing.assert_array_equal(written, tensors["model.layers.1.mlp.up_proj.weight"])


def test_a_single_file_replaces_the_shards_of_an_earlier_save(hub, tmp_path):
    folder, tensors = hub
    model = load_backbone(folder)
    save_backbone(model, tmp_path, max_shard_bytes=200_000)
    save_backbone(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), backbone_tensors(tensors))
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files without it


def test_a_failed_save_leaves_the_old_file(hub, tmp_path, monkeypatch):
    folder, tensors = hub
    model = load_backbone(folder)
    save_backbone(model, tmp_path)

    def full_disk(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_backbone(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), backbone_tensors(tensors))


def test_bfloat16_files_and_parameters(hub, tmp_path):
    _, tensors = hub
    short = {key: value.astype(ml_dtypes.bfloat16) for key, value in tensors.items()}
    folder = make_folder(tmp_path / "in", short)
    wide = load_backbone(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {jnp.dtype("float32")}
    kept = load_backbone(folder, param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype("bfloat16")}
    for model, options in ((wide, {"dtype": jnp.bfloat16}), (kept, {})):
        save_backbone(model, tmp_path / "out", **options)
        assert_same_tensors(read_tensors(tmp_path / "out"), backbone_tensors(short))


def test_prefix_and_extra_tensors(hub, tmp_path):
    """The layout of the official checkpoints: the backbone under a prefix, the reward head beside it."""
    folder, tensors = hub
    head = {"reward_head.weight": np.ones((1, 64), np.float32), "reward_head.bias": np.zeros(1, np.float32)}
    save_backbone(load_backbone(folder), tmp_path, prefix="backbone_model.", extra=head)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    model = load_backbone(tmp_path, prefix="backbone_model.")
    assert_same_tensors(dict(export_tensors(model)), backbone_tensors(tensors))
    np.testing.assert_array_equal(read_tensors(tmp_path)["reward_head.weight"], head["reward_head.weight"])
    with pytest.raises(WeightError, match=r"unknown: reward_head.weight \[1, 64\] float32"):
        load_backbone(tmp_path)
    taken = {"backbone_model.model.norm.weight": np.ones(64, np.float32)}
    with pytest.raises(WeightError, match=r"names of the backbone: backbone_model\.model\.norm\.weight"):
        save_backbone(model, tmp_path, prefix="backbone_model.", extra=taken)


def test_a_tied_head_must_equal_the_token_table(hub, tmp_path):
    _, tensors = hub
    config = tiny_config(tie_word_embeddings=True)
    tied = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    model = load_backbone(make_folder(tmp_path / "tied", tied, config))
    assert_same_tensors(dict(export_tensors(model)), backbone_tensors(tensors))
    load_backbone(make_folder(tmp_path / "absent", backbone_tensors(tensors), config))
    with pytest.raises(WeightError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load_backbone(make_folder(tmp_path / "differs", tensors, config))


def test_all_problems_are_listed_at_once(hub, tmp_path):
    _, tensors = hub
    broken = dict(tensors)
    del broken["model.layers.2.mlp.up_proj.weight"]
    del broken["visual.merger.mlp.0.bias"]
    broken["model.layers.3.mlp.up_proj.weight"] = np.zeros((96, 64), np.float32)
    broken["model.norm.weight"] = np.zeros(63, np.float32)
    broken["model.language_model.layers.0.mlp.up_proj.weight"] = np.zeros((96, 64), np.float32)
    broken["visual.merger.mlp.2.bias"] = np.zeros(64, np.int32)
    with pytest.raises(WeightError) as caught:
        load_backbone(make_folder(tmp_path, broken))
    message = str(caught.value)
    assert str(tmp_path) in message
    for problem in (
        "6 tensors do not fit",
        "missing: model.layers.2.mlp.up_proj.weight [96, 64]",
        "missing: visual.merger.mlp.0.bias [128]",
        "unknown: model.layers.3.mlp.up_proj.weight [96, 64] float32",
        "wrong shape: model.norm.weight [63] float32, expected [64]",
        "wrong type: visual.merger.mlp.2.bias [64] int32, expected floating point",
        "doubled: model.l",
    ):
        assert problem in message


def test_half_a_checkpoint_names_all_that_is_missing(hub, tmp_path):
    _, tensors = hub
    text = {key: value for key, value in tensors.items() if not key.startswith("visual.")}
    with pytest.raises(WeightError) as caught:
        load_backbone(make_folder(tmp_path, text))
    assert str(caught.value).count("missing: visual.") == sum(key.startswith("visual.") for key in tensors)


def test_two_files_with_one_tensor(hub, tmp_path):
    _, tensors = hub
    make_folder(tmp_path, {})
    (tmp_path / "model.safetensors").unlink()
    save_file(tensors, tmp_path / "model-a.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, tmp_path / "model-b.safetensors")
    with pytest.raises(WeightError, match=r"doubled: model.norm.weight is in model-a.safetensors and in model-b"):
        load_backbone(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "header", "empty"])
def test_a_broken_file_is_named(hub, tmp_path, damage):
    folder, _ = hub
    data = (folder / "model.safetensors").read_bytes()
    data = {"truncated": data[:-100], "header": b"\xff" * 16 + data[16:], "empty": b""}[damage]
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(FolderError, match=r"model\.safetensors is not a whole safetensors file"):
        load_backbone(tmp_path)


def test_an_index_is_checked(hub, tmp_path):
    make_folder(tmp_path, {}).joinpath("model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    save_file({"model.norm.weight": np.ones(64, np.float32)}, tmp_path / "model-00001-of-00002.safetensors")
    here, lost = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    for weight_map, message in (
        ({"model.norm.weight": here, "x": lost}, f"{lost} is missing, but model.safetensors.index.json names it"),
        ({"model.norm.weight": here, "x": here}, f"names x \\(in {here}\\), which is not there"),
        ({"x": "../other/model.safetensors"}, "not a file of this folder"),
        ({}, "has no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(FolderError, match=message):
            load_backbone(tmp_path)


def test_folders_that_are_no_checkpoint(tmp_path):
    with pytest.raises(FolderError, match=r"config\.json does not exist"):
        load_backbone(tmp_path)
    config = tmp_path / "config.json"
    config.write_text("{")
    with pytest.raises(FolderError, match=r"config\.json is not valid JSON"):
        load_backbone(tmp_path)
    config.write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(FolderError, match=r"model_type = 'bert' is not supported; supported: .*qwen2_vl"):
        load_backbone(tmp_path)
    config.write_text(json.dumps(tiny_config()))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FolderError, match=r"no model\.safetensors.*holds pytorch_model\.bin: pickles"):
        load_backbone(tmp_path)


def test_adapters_must_be_merged_before_an_export(hub, tmp_path):
    model = load_backbone(hub[0])
    linear = model.text.layers.attention.q_proj
    linear.lora_a, linear.lora_b, linear.lora_scale = (
        nnx.Param(jnp.ones((3, 64, 2))),
        nnx.Param(jnp.ones((3, 2, 64))),
        1.0,
    )
    with pytest.raises(WeightError, match=r"merged.*text\.layers\.attention\.q_proj\.lora_a"):
        save_backbone(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_pixel_statistics_come_from_the_preprocessor(hub, tmp_path):
    make_folder(tmp_path, {})
    statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": statistics}))
    assert abstract_backbone(tmp_path).config.vision.pixels.mean == (0.5, 0.4, 0.3)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**statistics, "image_mean": [0.1, 0.1, 0.1]}))
    assert abstract_backbone(tmp_path).config.vision.pixels.mean == (0.1, 0.1, 0.1)


def test_sharded_import_reads_slices_and_keeps_shardings(hub):
    folder, tensors = hub
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rules = {"embed": "fsdp", "vision": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}

    def shardings(model):
        of = lambda axes: NamedSharding(mesh, PartitionSpec(*(rules.get(name) for name in axes)))
        return jax.tree.map(lambda p: of(p.axes), model, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))

    model = load_backbone(folder, shardings=shardings)
    kernel = by_name(model)["text.layers.mlp.up_proj.kernel"]
    assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor")), 3)
    assert kernel.addressable_shards[0].data.shape == (3, 16, 48)
    assert_same_tensors(dict(export_tensors(model)), backbone_tensors(tensors))
    tree = load_backbone(folder, shardings=shardings(abstract_backbone(folder)))
    for ours, theirs in zip(jax.tree.leaves(tree), jax.tree.leaves(model), strict=True):
        assert ours.sharding == theirs.sharding
