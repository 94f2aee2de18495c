"""A trained model's artefact knows which records it was trained on, and those of the artefact that it began with."""

import json

import numpy as np

from multitap_jax.config import DataConfig, MeshConfig, ModelConfig, TrainConfig
from multitap_jax.data.records import load_records
from multitap_jax.data.seen import TRAINED, prints_of
from multitap_jax.stage1.run import run_training
from tests.families.common import picture
from tests.families.qwen2_vl import oracle


def test_what_a_run_learned_from_goes_along(tmp_path):
    (tmp_path / "base").mkdir()
    checkpoint = oracle(num_hidden_layers=1, vision_depth=1).write_without_torch(tmp_path / "base", 0)
    for number in range(9):
        picture(56, 56, number).save(tmp_path / f"{number}.png")
    (tmp_path / "0.png").write_bytes(b"no picture")
    rows = [
        {"id": str(n), "image": f"{n}.png", "text": "a red ball", "score": n / 8, "group": "g" if n else None}
        for n in range(9)
    ]
    seen = []
    for name, part in (("first", rows[:5]), ("second", rows[5:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        config = TrainConfig(
            model=ModelConfig(checkpoint=str(checkpoint), dtype="float32"),
            data=DataConfig(
                train=str(tmp_path / f"{name}.jsonl"), image_policy="square:56", holdout=0.0, max_rejected=0.5
            ),
            mesh=MeshConfig(data=1, fsdp=8),
            batch_size=8,
        )
        artefact = run_training(config, tmp_path / name).artefact
        seen.append(artefact.seen()[TRAINED])
        checkpoint = artefact.folder
    known = [load_records(tmp_path / f"{name}.jsonl").records for name in ("first", "second")]
    prints = prints_of([record for records in known for record in records])
    assert [len(one.pair) for one in seen] == [4, 8]  # the broken picture was never learned from
    assert [len(one.group) for one in seen] == [1, 1]
    np.testing.assert_array_equal(seen[0].among(prints)["pair"], [1, 2, 3, 4])
    np.testing.assert_array_equal(seen[1].among(prints)["pair"], range(1, 9))
