"""The demo's world: deterministic, valid, and honest (the score is not in the text)."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from multitap_jax.demo.render import SIZE, render_scene
from multitap_jax.demo.scenes import SIDES, Scene, Thing, draw_scene, scene_rng
from multitap_jax.demo.texts import (
    OBJECTIVES,
    annotate,
    rule_ratings,
    vocabulary_sample,
    write_text,
    write_texts,
)
from multitap_jax.demo.world import build_world

BALL = Thing("left", "near", "red", "ball", "matte", 1)
BOXES = Thing("right", "far", "blue", "box", "striped", 2)
SCENE = Scene((BALL, BOXES))


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def guidance(*faults, seed=0):
    return write_text(SCENE, faults, np.random.default_rng(seed))


def test_world_is_complete_deterministic_and_split_by_scene(tmp_path):
    first = build_world(tmp_path / "a", 10, seed=3, heldout_share=0.2)
    again = build_world(tmp_path / "b", 10, seed=3, heldout_share=0.2)
    train, heldout = read(first.train), read(first.heldout)
    assert len(train) == 48
    assert len(heldout) == 12
    assert not {r["group"] for r in train} & {r["group"] for r in heldout}
    assert len({r["id"] for r in train + heldout}) == 60
    for path in ("train.jsonl", "heldout.jsonl", "images/00007.png"):
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
    for record in train + heldout:
        assert set(record["ratings"]) == set(OBJECTIVES)
        assert all(1 <= value <= 5 for value in record["ratings"].values())
        assert record["score"] == pytest.approx((record["ratings"]["overall"] - 1) / 4, abs=1e-4)
        with Image.open(again.train.parent / record["image"]) as image:
            assert image.size == (SIZE, SIZE)
            assert image.mode == "RGB"


def test_a_complete_world_is_kept_and_another_replaced(tmp_path):
    paths = build_world(tmp_path, 4, seed=0, heldout_share=0.5)
    stamp = (tmp_path / "images/00000.png").stat().st_mtime_ns
    build_world(tmp_path, 4, seed=0, heldout_share=0.5)
    assert (tmp_path / "images/00000.png").stat().st_mtime_ns == stamp
    paths.heldout.unlink()
    build_world(tmp_path, 4, seed=0, heldout_share=0.5)
    assert paths.heldout.is_file()
    build_world(tmp_path, 3, seed=0, heldout_share=0.5)
    assert len(list((tmp_path / "images").iterdir())) == 3


@pytest.mark.parametrize(("num_scenes", "share"), [(1, 0.5), (4, 0.0), (4, 1.0), (4, 0.95)])
def test_an_empty_side_of_the_split_is_refused(tmp_path, num_scenes, share):
    with pytest.raises(ValueError, match="both sides of the split"):
        build_world(tmp_path, num_scenes, seed=0, heldout_share=share)


def test_a_right_text_is_rated_best_throughout():
    said = guidance()
    ratings = rule_ratings(SCENE, said)
    assert "Near left: red ball." in said.text
    assert "Far right: two striped blue boxes." in said.text
    assert {name for name, value in ratings.items() if value == 5} >= set(OBJECTIVES) - {"conciseness", "overall"}


@pytest.mark.parametrize(
    ("fault", "hurt"),
    [("direction", "direction_accuracy"), ("depth", "depth_accuracy"), ("attribute", "hallucination")],
)
def test_a_fault_hurts_its_own_objective_and_overall(fault, hurt):
    for seed in range(20):
        ratings = rule_ratings(SCENE, guidance(fault, seed=seed))
        right = rule_ratings(SCENE, guidance(seed=seed))
        assert ratings[hurt] < right[hurt]
        untouched = {"direction_accuracy", "depth_accuracy", "sufficiency", "hallucination"} - {hurt}
        if fault != "attribute":
            assert all(ratings[name] == 5 for name in untouched)
        assert ratings["overall"] < 5


def test_number_fault_leaves_out_or_makes_up():
    fewer, more = [], []
    for seed in range(40):
        said = guidance("number", seed=seed)
        (fewer if len(said.things) == 1 else more).append(rule_ratings(SCENE, said))
    assert fewer
    assert more
    assert all(r["sufficiency"] < 5 and r["hallucination"] == 5 for r in fewer)
    assert all(r["sufficiency"] == 5 and r["hallucination"] < 5 for r in more)


def test_advice_into_a_near_thing_is_unsafe():
    said = guidance("direction", seed=1)
    ratings = {side: rule_ratings(SCENE, type(said)(said.things, side, "")) for side in SIDES}
    assert ratings["left"]["safety"] == 1
    assert ratings["right"]["safety"] == 5
    assert rule_ratings(SCENE, type(said)(said.things, "", ""))["safety"] == 3


def test_advice_never_contradicts_the_claims():
    for index in range(200):
        scene = draw_scene(scene_rng(0, index, 0))
        for said in write_texts(scene, scene_rng(0, index, 2)):
            claimed = {thing.side: thing.depth for thing in said.things}
            assert claimed.get(said.advice) != "near"
            assert len(claimed) == len(said.things)


def test_the_text_alone_hardly_tells_the_score():
    """A least-squares fit on word counts, the strongest blind cheat at hand, explains next to nothing."""
    texts, scores = [], []
    for index in range(1500):
        rng = scene_rng(5, index, 2)
        scene = draw_scene(scene_rng(5, index, 0))
        for said in write_texts(scene, rng):
            if not said.filler:
                texts.append(said.text.lower().replace(".", " .").replace(":", "").split())
                scores.append(annotate(rule_ratings(scene, said), rng)["overall"])
    words = sorted({word for text in texts for word in text})
    counts = np.array([[Counter(text)[word] for word in words] for text in texts], float)
    counts = np.concatenate([counts, np.ones((len(texts), 1))], 1)
    target = np.array(scores)
    half = len(target) // 2
    fit = np.linalg.lstsq(counts[:half], target[:half], rcond=None)[0]
    explained = np.corrcoef(counts[half:] @ fit, target[half:])[0, 1] ** 2
    assert explained < 0.03


def test_vocabulary_is_small_and_complete():
    words = {word for text in vocabulary_sample() for word in text.replace(".", " ").replace(":", " ").split()}
    assert len(words) < 150
    for index in range(100):
        scene = draw_scene(scene_rng(1, index, 0))
        for said in write_texts(scene, scene_rng(1, index, 2)):
            assert set(said.text.replace(".", " ").replace(":", " ").split()) <= words


def test_pictures_differ_where_scenes_do():
    left = np.asarray(render_scene(SCENE, np.random.default_rng(0)), int)
    moved = Scene((Thing("right", "near", "red", "ball", "matte", 1), BOXES))
    right = np.asarray(render_scene(moved, np.random.default_rng(0)), int)

    def redness(pixels):
        strong = (pixels[..., 0] > 150) & (pixels[..., 1] < 90) & (pixels[..., 2] < 90)
        return strong[:, : SIZE // 2].sum(), strong[:, SIZE // 2 :].sum()

    assert redness(left)[0] > 10 * redness(left)[1]
    assert redness(right)[1] > 10 * redness(right)[0]
