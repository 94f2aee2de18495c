"""Texts of one picture stay in one fold: however the picture is called, and whatever else links records."""

import json
import shutil

import numpy as np
from PIL import Image

from multitap_jax.data.records import Record, iter_records
from multitap_jax.stage2.embed import link_records


def write(folder, rows):
    path = folder / "ratings.jsonl"
    path.write_text("".join(json.dumps({"text": "x", **row}) + "\n" for row in rows))
    return path


def groups(path):
    group_of = link_records(path)
    return {r.id: group_of(r) for r in iter_records(path) if isinstance(r, Record)}


def test_groups_join_over_names_copies_and_all_pictures_of_a_record(tmp_path):
    rng = np.random.default_rng(0)
    for name in "abcde":
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "copy.png")
    rows = [
        {"id": "plain", "image": "a.png"},
        {"id": "copy", "image": "copy.png"},
        {"id": "named", "image": "a.png", "group": "scene"},  # a group does not take a record away from its picture
        {"id": "same group", "image": "b.png", "group": "scene"},
        {"id": "second picture", "image": ["c.png", "b.png"]},
        {"id": "third", "image": "c.png"},
        {"id": "apart", "image": "d.png"},
        {"id": "apart too", "image": "e.png", "group": "other"},
    ]
    found = groups(write(tmp_path, rows))
    assert len({found[row["id"]] for row in rows[:6]}) == 1
    assert len(set(found.values())) == 3
    backwards = groups(write(tmp_path, rows[::-1]))
    assert backwards == found
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in tmp_path.glob("*.png"):
        shutil.copy(file, moved / file.name)
    assert groups(write(moved, rows)) == found


def test_a_picture_that_vanishes_does_not_stop_the_linking(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    path = write(tmp_path, [{"id": "1", "image": "a.png"}])
    records = [r for r in iter_records(path) if isinstance(r, Record)]
    monkeypatch.setattr("multitap_jax.stage2.embed.iter_records", lambda *a, **k: iter(records))
    (tmp_path / "a.png").unlink()
    assert link_records(path)(records[0]) == "unreadable:a.png"
