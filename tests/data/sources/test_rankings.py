"""Readers of pictures that people ranked or chose between."""

import pytest

from tests.data.sources.published import records_of, write


def test_hpdv2(tmp_path):
    test = {"prompt": "p", "image_path": ["a.jpg", "b.jpg"], "rank": [1, 2], "raw_annotations": []}
    train = {"prompt": "p", "file_path": ["c.jpg", "d.jpg"], "human_preference": [0, 1]}
    write(tmp_path / "s/test.json", [test])
    write(tmp_path / "s/train.json", [train])
    ranked, _ = records_of("hpdv2", tmp_path / "s")
    chosen, _ = records_of("hpdv2", tmp_path / "s", split="train")
    assert [r["ratings"]["preference"] for r in ranked.values()] == [-1.0, -2.0]
    assert [r["ratings"]["preference"] for r in chosen.values()] == [0.0, 1.0]


def test_a_missing_rank_is_a_missing_preference(tmp_path):
    write(tmp_path / "h/test.json", [{"prompt": "p", "image_path": ["a.jpg", "b.jpg"], "rank": [1, None]}])
    found, _ = records_of("hpdv2", tmp_path / "h")
    assert [r["ratings"]["preference"] for r in found.values()] == [-1.0, None]
    ranking = {"id": "i", "prompt": "p", "generations": ["a.jpg", "b.jpg"], "ranking": [None, 2]}
    write(tmp_path / "i/test.json", [ranking])
    found, _ = records_of("imagereward", tmp_path / "i")
    assert [r["ratings"]["preference"] for r in found.values()] == [None, -2.0]


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        (("test_anime.json", "test_photo.json"), ("test_anime/000000", "test_photo/000000")),
        (("a/test.json", "b/test.json"), ("a/test/000000", "b/test/000000")),
    ],
)
def test_records_of_two_files_are_not_one(tmp_path, files, ids):
    entry = {"prompt": "p", "image_path": ["a.jpg", "b.jpg"], "rank": [1, 2]}
    for name in files:
        write(tmp_path / "s" / name, [entry])
    found, rejected = records_of("hpdv2", tmp_path / "s")
    assert not rejected
    assert list(found) == [f"{name}/{side}" for name in ids for side in (0, 1)]
    assert {record["group"] for record in found.values()} == {f"hpdv2/test/{name}" for name in ids}
    rated = {"dataset": [{"image": "a.jpg", "caption": "x", "human": 3}]}
    for name in ("x/composite.json", "y/composite.json"):
        write(tmp_path / "c" / name, rated)
    assert list(records_of("composite", tmp_path / "c")[0]) == ["x/composite/00000", "y/composite/00000"]
