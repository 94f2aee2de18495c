"""The hub, only when it is asked for by name; from a cache in the hub's layout, without a network."""

import os
from pathlib import Path

import pytest

from multitap_jax import cli
from multitap_jax.config import ModelConfig, TrainConfig
from multitap_jax.stage1.run import run_training
from multitap_jax.weights.sources import Source, SourceError, local_folder, locate
from tests.tiny_qwen2_vl import tiny_config, write_folder
from tests.weights.hub_cache import COMMIT, add_commit


@pytest.fixture
def cache(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "source", tiny_config())
    snapshot = add_commit(tmp_path / "cache", "tiny/qwen", source)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


@pytest.mark.parametrize("name", ["hub:tiny/qwen", "hub:tiny/qwen@main", f"hub:tiny/qwen@{COMMIT}"])
def test_a_cached_repository_is_found_with_its_commit(cache, name):
    assert locate(name) == Source(cache.resolve(), "tiny/qwen", COMMIT)
    assert locate(name).address == f"hub:tiny/qwen@{COMMIT}"
    assert local_folder(name) == cache.resolve()


def test_a_snapshot_given_as_a_folder_says_what_it_is(cache, tmp_path):
    assert locate(cache) == Source(cache, "tiny/qwen", COMMIT)
    assert locate(tmp_path / "source") == Source(tmp_path / "source", "source", "")
    assert locate(tmp_path / "source").address == str(tmp_path / "source")


def test_what_is_not_cached_is_not_available_offline(cache):
    for name in ("hub:tiny/other", "hub:tiny/qwen@v2"):
        with pytest.raises(SourceError, match=rf"{name}: not available; only the cache .* HF_HUB_OFFLINE is set"):
            locate(name)


def test_the_hub_cannot_be_reached(cache, monkeypatch):
    def fails(*arguments, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    with pytest.raises(SourceError, match=r"no route to host\nGive a local folder"):
        locate("hub:tiny/qwen")


def test_only_safe_files_are_asked_for(cache, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = {}

    def record(repository, **options):
        asked.update(options, repository=repository)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", record)
    assert locate("hub:tiny/qwen@v1").revision == COMMIT
    assert (asked["repository"], asked["revision"]) == ("tiny/qwen", "v1")
    wanted = ["config.json", "tokenizer.json", "merges.txt", "model-00001-of-00002.safetensors", "multitap.json",
              "model.safetensors.index.json", "heads.safetensors", "chat_template.jinja"]  # fmt: skip
    refused = ["pytorch_model.bin", "modeling_x.py", "original/model.safetensors", "a.pth", "x.pkl", "model.onnx"]
    found = filter_repo_objects(
        [*wanted, *refused], allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert sorted(found) == sorted(wanted)


def test_a_bare_name_is_never_fetched(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **o: pytest.fail("the hub was asked"))
    with pytest.raises(SourceError, match=r"Qwen/Tiny: no such folder.*hub:Qwen/Tiny names a repository"):
        locate("Qwen/Tiny")
    for name in ("hub:", "hub:Qwen", "hub:a/b/c", "hub:../x/y", "hub:a/b@"):
        with pytest.raises(SourceError, match=r"expected hub:OWNER/NAME"):
            locate(name)


def test_training_takes_the_hub_by_name(cache, tmp_path, monkeypatch):
    """Up to the records: the configuration is read from the snapshot, so the tokenizer is what is missing."""
    config = TrainConfig(model=ModelConfig(checkpoint="hub:tiny/qwen"))
    object.__setattr__(config.data, "train", str(tmp_path / "none.jsonl"))
    with pytest.raises(FileNotFoundError, match=rf"{COMMIT}: no tokenizer here"):
        run_training(config, tmp_path / "run")


@pytest.mark.parametrize("name, offline", [("hub:a/b", None), ("a/b", "1")])
def test_the_command_line_is_offline_unless_the_hub_is_named(monkeypatch, name, offline):
    seen = []

    def record(*arguments, **options):
        seen.append(os.environ.get("HF_HUB_OFFLINE"))
        raise ValueError("far enough")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("multitap_jax.scoring.importing.import_official", record)
    assert cli.main(["import", f"--checkpoint={name}", "--output=out"]) == 1
    assert seen == [offline]


@pytest.mark.parametrize("name, asks", [("hub:a/b", True), ("a/b", False)])
def test_a_setting_of_a_config_file_counts_too(name, asks):
    config = Path(__file__).parents[2] / "configs" / "lora.py"
    values = cli.parse("train", [f"--config={config}", "--workdir=run", f"--config.model.checkpoint={name}"])
    assert cli._asks_for_hub(values) is asks
