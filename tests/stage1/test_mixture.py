"""Several files of records, and the official rule that balances ratings."""

import json
from collections import Counter
from pathlib import Path

import pytest

from multitap_jax.config import ConfigError, DataConfig
from multitap_jax.data.records import Record, RecordsError, load_records
from multitap_jax.data.sources import convert
from multitap_jax.stage1.mixture import balanced, record_files, training_records
from tests.data.sources.published import hub_image, parquet, picture, write


def record(name, score):
    return Record(name, (Path("a.png"),), "text", None, score, {"x": 2 * score}, None, 1)


def slow(records, target):
    """Every value keeps as many as the rarest: counts alone, which is what the rule fixes."""
    counts = Counter(item.target(target) for item in records)
    return dict.fromkeys(counts, min(counts.values()))


def test_every_value_keeps_as_many_as_the_rarest():
    records = [record(f"r{i}", score) for i, score in enumerate([0, 1, 0.5] * 7 + [0] * 30 + [1] * 5)]
    for target in ("score", "ratings.x"):
        kept = balanced(records, target, 42)
        assert Counter(item.target(target) for item in kept) == slow(records, target)
        assert kept == sorted(kept, key=records.index)
        assert kept == balanced(records, target, 42)
    assert kept != balanced(records, "ratings.x", 43)
    assert balanced([], "score", 0) == []
    assert balanced(records[:3], "score", 0) == records[:3]


def test_each_record_of_a_value_is_drawn_about_as_often():
    records = [record(f"r{i}", 0.0) for i in range(10)] + [record(f"s{i}", 1.0) for i in range(5)]
    drawn = Counter(item.id for seed in range(400) for item in balanced(records, "score", seed))
    assert all(150 < drawn[f"r{i}"] < 250 for i in range(10))


def rows(folder, name, scores):
    write(folder / "a.png", picture(1))
    lines = [{"id": f"{name}{i}", "image": "a.png", "text": "x", "score": s} for i, s in enumerate(scores)]
    return write(folder / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def test_files_together(tmp_path):
    one, two = rows(tmp_path / "a", "p", [0, 1, 1]), rows(tmp_path / "b", "q", [1])
    three = rows(tmp_path / "c", "r", [0, 0, 0, 1])
    data = DataConfig(train=f"{one}, {two}", balanced=str(three.parent))
    assert record_files(data.train) == [one, two]
    found, origin = training_records(data, 42, lambda file: load_records(file).records)
    assert [item.id for item in found[:4]] == ["p0", "p1", "p2", "q0"]
    assert sorted(item.score for item in found[4:]) == [0, 1]
    assert origin[found[-1].id] == three
    with pytest.raises(ConfigError, match=r"id 'p0' is in .*p.jsonl and in .*p.jsonl: ids are unique in a run"):
        training_records(DataConfig(train=f"{one},{one}"), 42, lambda file: load_records(file).records)
    with pytest.raises(RecordsError, match="no such records file"):
        record_files(f"{one},{tmp_path / 'none'}")


def test_the_official_mixture_of_small_sets(tmp_path):
    """Polaris and ImageReward as published, converted, mixed: one scale, and ratings of ImageReward balanced."""
    polaris = [{"refs": ["a"], "cand": f"cat {i}", "img": hub_image(i), "human_score": i / 8} for i in range(6)]
    parquet(tmp_path / "hub/train-00000-of-00001.parquet", polaris)
    rated = [
        {"image": hub_image(50 + i), "prompt_id": f"p{i // 4}", "prompt": "a cat", "rank": 1, "overall_rating": rating}
        for i, rating in enumerate([1, 1, 1, 4, 4, 7, 7, 7, 7])
    ]
    parquet(tmp_path / "reward/train-00000-of-00001.parquet", rated)
    for name, source in (("polaris", "hub"), ("imagereward", "reward")):
        convert(name, tmp_path / source, tmp_path / name / "train", split="train", allow_subset=True)
    data = DataConfig(train=str(tmp_path / "polaris/train"), balanced=str(tmp_path / "imagereward/train"))
    found, origin = training_records(data, 42, lambda file: load_records(file, require="score").records)
    assert [item.score for item in found[:6]] == [i / 8 for i in range(6)]
    assert Counter(item.score for item in found[6:]) == {0.0: 2, 0.5: 2, 1.0: 2}
    assert len(origin) == 12
