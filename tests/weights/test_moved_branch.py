"""A branch of the hub that moves while a run or a job is stopped: noticed, named, and the commit goes on."""

import json

import numpy as np
import pytest

from multitap_jax.checkpoint import CheckpointError
from multitap_jax.config import DataConfig, MeshConfig, ModelConfig, TrainConfig
from multitap_jax.data.processing import Contract
from multitap_jax.reward import RewardHead, RewardModel
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.scoring.job import score_file
from multitap_jax.scoring.journal import JobError
from multitap_jax.scoring.scorer import Scorer
from multitap_jax.stage1.run import run_training
from multitap_jax.weights.hub import load_backbone
from tests.families.common import direction, picture
from tests.families.qwen2_vl import oracle
from tests.weights.hub_cache import add_commit

FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder


def base_folder(folder, seed):
    folder.mkdir()
    return oracle(num_hidden_layers=1, vision_depth=1).write_without_torch(folder, seed)


def records(folder, count):
    lines = []
    for number in range(count):
        picture(56, 56, number).save(folder / f"{number}.png")
        lines.append({"id": str(number), "image": f"{number}.png", "text": "a red ball", "score": number / count})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "pairs.jsonl"


def test_a_training_run_goes_on_with_its_commit_alone(cache, tmp_path):
    """All weights learn, so none of the base's is left to compare: what differs is the commit."""
    add_commit(cache, "tiny/qwen", base_folder(tmp_path / "first", 0), FIRST)
    config = lambda revision: TrainConfig(
        model=ModelConfig(checkpoint=f"hub:tiny/qwen@{revision}", dtype="float32"),
        data=DataConfig(train=str(records(tmp_path, 8)), image_policy="square:56", holdout=0.0),
        mesh=MeshConfig(data=1, fsdp=8),
        batch_size=8,
    )
    found = run_training(config("main"), tmp_path / "run")
    assert found.artefact.manifest.backbone.revision == FIRST
    exact = f"hub:tiny/qwen@{FIRST}"
    assert found.artefact.manifest.provenance["config"]["model"]["checkpoint"] == exact
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["model"]["checkpoint"] == exact
    add_commit(cache, "tiny/qwen", base_folder(tmp_path / "second", 1), SECOND)
    with pytest.raises(CheckpointError) as caught:
        run_training(config("main"), tmp_path / "run")
    moved = f"config.model.checkpoint: the checkpoint has '{exact}', this run has 'hub:tiny/qwen@{SECOND}'"
    assert moved in str(caught.value)
    again = run_training(config(FIRST), tmp_path / "run")
    assert again.artefact.fingerprint == found.artefact.fingerprint


def artefact_folder(folder, base, seed):
    weight = direction(64) * np.float32(0.1 + seed)
    model = RewardModel(load_backbone(base), RewardHead.from_arrays(weight, np.float32(0)))
    contract = Contract("official-train", "flat", "square:56")
    return Artefact.save(folder, model, base=base, contract=contract).folder


def test_a_scoring_job_goes_on_with_its_model_alone(cache, tmp_path):
    """The same files under another commit are the same model; others are not, and the commits are named."""
    base, source, output = base_folder(tmp_path / "base", 0), records(tmp_path, 4), tmp_path / "scores.jsonl"
    first = artefact_folder(tmp_path / "first", base, 0)
    add_commit(cache, "tiny/scores", first, FIRST)
    job = lambda name: score_file(Scorer.from_pretrained(name), source, output)
    job("hub:tiny/scores")
    whole, lines = output.read_bytes(), output.read_text().splitlines()
    assert json.loads((tmp_path / "scores.jsonl.job.json").read_text())["checkpoint"] == f"hub:tiny/scores@{FIRST}"
    output.write_bytes(whole[: len(whole) // 2])
    add_commit(cache, "tiny/scores", artefact_folder(tmp_path / "second", base, 1), SECOND)
    with pytest.raises(JobError) as caught:
        job("hub:tiny/scores")
    assert "begun with another model" in str(caught.value)
    named = f'checkpoint: "hub:tiny/scores@{FIRST}" then, "hub:tiny/scores@{SECOND}" now; give the same model'
    assert named in str(caught.value)
    summary = job(f"hub:tiny/scores@{FIRST}")
    assert 0 < summary.resumed < 4 == summary.lines
    assert output.read_text().splitlines()[: summary.resumed] == lines[: summary.resumed]
    output.write_bytes(whole[: len(whole) // 2])
    add_commit(cache, "tiny/scores", first, "3" * 40)
    assert 0 < job("hub:tiny/scores").resumed < 4
