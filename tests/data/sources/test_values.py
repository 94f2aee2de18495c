"""What stands in the rows: keys that lack, values of another kind, numbers that are missing."""

import json
import math

import pytest

from multitap_jax.data.records import RecordsError, load_records
from multitap_jax.data.sources import SourceError, convert
from tests.data.sources.published import parquet, table, write


def test_odd_tables(tmp_path):
    """Keys that some rows lack, numbers as only Python writes them, and a column that is there twice."""
    rows = [{"image": "a.png", "text": "x", "request": "r", "score": 1}, {"image": "b.png", "text": "y"}, {"text": "z"}]
    write(tmp_path / "s/mine.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    done = convert("table", tmp_path / "s", tmp_path / "out", images="none", max_rejected=0.5)
    assert (done.written, done.rejected) == (2, 1)
    (record, _) = load_records(tmp_path / "out", need_images=False).records
    assert (record.request, record.score) == ("r", 1)
    table(tmp_path / "t/mine.csv", [{"image": "a.png", "text": "x", "score": score} for score in ("1_0", "10")])
    done = convert("table", tmp_path / "t", tmp_path / "out2", images="none", max_rejected=0.5)
    assert (done.written, done.reasons) == (1, {"score is ..., not a number": 1})
    write(tmp_path / "u/mine.csv", "image,text,text\na.png,x,y\n")
    with pytest.raises(SourceError, match="mine.csv: column 'text' twice"):
        convert("table", tmp_path / "u", tmp_path / "out3", images="none")


def test_values_of_another_kind(tmp_path):
    ranked = [{"id": 7, "prompt": "p", "generations": ["a.png", "b.png"], "ranking": [1, 2]}]
    write(tmp_path / "s/test.json", ranked)
    convert("imagereward", tmp_path / "s", tmp_path / "out", images="none", allow_subset=True)
    assert load_records(tmp_path / "out", need_images=False).records[0].group == "imagereward/test/7"
    write(tmp_path / "t/test.json", [{"prompt": "p", "image_path": ["a.png", 5], "rank": [1, 2]}])
    done = convert("hpdv2", tmp_path / "t", tmp_path / "out2", images="none", max_rejected=0.5)
    assert (done.written, list(done.reasons)) == (1, ["picture ... is not a name"])


def test_a_missing_number_is_no_bad_row(tmp_path):
    """NaN, as tables of numbers write it, is missing of its objective alone, and is told; infinity is an error."""
    row = {"name": "a.jpg", "prompt": "p", "mos_quality": 2.5, "mos_align": 3.0}
    rows = [
        row | {"name": f"{n}.jpg"} | extra for n, extra in enumerate([{}, {"mos_align": math.nan}, {"mos_align": ""}])
    ]
    table(tmp_path / "s/data.csv", rows)
    done = convert("agiqa-3k", tmp_path / "s", tmp_path / "out", images="none", allow_subset=True)
    assert (done.written, done.rejected, done.missing) == (3, 0, {"ratings.align": 2})
    assert "2 of 3 records have no ratings.align" in str(done)
    assert json.loads((tmp_path / "out/dataset.json").read_text())["missing"] == {"ratings.align": 2}
    found = load_records(tmp_path / "out", need_images=False)
    assert [record.ratings["align"] for record in found.records] == [3.0, None, None]
    assert [record.ratings["quality"] for record in found.records] == [2.5] * 3
    for value in ("inf", "-Infinity", "1e999", "three", "1_0"):
        table(tmp_path / "bad/data.csv", [row, row | {"name": "b.jpg", "mos_align": value}])
        with pytest.raises(RecordsError, match=r"mos_align is .*, not a (finite )?number"):
            convert("agiqa-3k", tmp_path / "bad", tmp_path / "none", images="none", allow_subset=True)


def test_a_missing_score_leaves_the_other_ratings(tmp_path):
    """A record without a score is one (it may have ratings); of datasets that have nothing else it is none."""
    row = {"prompt_id": "p", "prompt": "a cat", "image_path": "a.webp", "rank": 1, "overall_rating": 7.0}
    rows = [row | {"fidelity_rating": 2.0}, row | {"overall_rating": math.nan, "fidelity_rating": 3.0}]
    parquet(tmp_path / "s/metadata-train.parquet", rows)
    convert("imagereward", tmp_path / "s", tmp_path / "out", images="none", split="train", allow_subset=True)
    records = load_records(tmp_path / "out", need_images=False).records
    assert [(r.score, r.ratings["overall"], r.ratings["fidelity"]) for r in records] == [
        (1.0, 7.0, 2.0),
        (None, None, 3.0),
    ]
