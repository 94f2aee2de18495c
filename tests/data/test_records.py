"""Records: what is read, what is rejected and why, in every format."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from multitap_jax.data.decode import ImageError
from multitap_jax.data.fields import SeenIds
from multitap_jax.data.images import ImageReader
from multitap_jax.data.layouts import GridLayout
from multitap_jax.data.records import (
    Record,
    RecordsError,
    Rejected,
    group_keys,
    iter_records,
    load_records,
    reject_image,
    split_by_group,
    write_rejected,
)

SHARED = Path(os.environ.get("MULTITAP_SHARED_DATA", Path(__file__).parents[2].parent / "shared/data"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set").mkdir()
    root = tmp_path / "set"
    for i, name in enumerate(["a.png", "b.png", "c.png"]):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(root / name)
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    return root


def write(folder, *lines):
    path = folder / "pairs.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def base(**changes):
    return {"id": "1", "image": "a.png", "text": "a cat"} | changes


def test_a_full_record(folder):
    path = write(
        folder,
        base(request="What?", score=1, ratings={"safety": 0.5, "depth": None}, group="g", image=["a.png", "b.png"]),
        "",
        base(id="2", ratings={"tone": 2}),
    )
    result = load_records(path)
    first, second = result.records
    assert first == Record(
        "1", (folder / "a.png", folder / "b.png"), "a cat", "What?", 1.0, {"safety": 0.5, "depth": None}, "g", 1
    )
    assert isinstance(first.score, float)
    assert (second.line, second.request, second.score, second.group) == (3, None, None, None)
    assert result.objectives == ("safety", "depth", "tone")
    assert (first.target("score"), first.target("ratings.safety"), first.target("ratings.none")) == (1.0, 0.5, None)
    assert "2 records, 2 image files, 1 with a score" in result.summary()


BAD = {
    "not JSON": ("{", "not JSON"),
    "python literal": ("{'id': '1'}", "not JSON"),
    "deep": ("[" * 100_000, "not JSON"),
    "key twice": ('{"id": "1", "id": "2"}', "key 'id' twice"),
    "list": ("[1]", "not a JSON object but a list"),
    "number": ("3", "not a JSON object but a number"),
    "unknown column": (base(txet="x"), "unknown column 'txet'; did you mean 'text'?"),
    "dotted ratings": (base() | {"ratings.x": 1}, "unknown column 'ratings.x'"),
    "no id": ({"image": "a.png", "text": "x"}, "id is missing: a record needs an id"),
    "id number": (base(id=5), "id is 5, not a string"),
    "no text": ({"id": "1", "image": "a.png"}, "text is missing"),
    "empty text": (base(text=""), "text is empty"),
    "white text": (base(text=" \n\t "), "text is empty"),
    "text list": (base(text=["x"]), "text is ['x'], not a string"),
    "surrogate": ('{"id": "1", "image": "a.png", "text": "x\\ud800"}', "text is not valid Unicode at character 1"),
    "request number": (base(request=1), "request is 1, not a string"),
    "group number": (base(group=1), "group is 1, not a string"),
    "no image": ({"id": "1", "text": "x"}, "image is missing"),
    "no images": (base(image=[]), "image is missing"),
    "image number": (base(image=3), "image 3 is not a path"),
    "image nul": (base(image="a\0.png"), "is not a path"),
    "image address": (base(image="https://x.org/a.png"), "nothing is fetched"),
    "missing file": (base(image="none.png"), "image none.png: file not found"),
    "missing below a file": (base(image="a.png/b.png"), "file not found"),
    "folder": (base(image="."), "not a regular file"),
    "long name": (base(image="x" * 5000), "cannot be reached"),
    "absolute": (base(image="/etc/passwd"), "is absolute"),
    "dots": (base(image="../outside.png"), "outside the folder"),
    "dots at the end": (base(image=".."), "outside the folder"),
    "hidden dots": (base(image="a/../../outside.png"), "outside the folder"),
    "score NaN": ('{"id": "1", "image": "a.png", "text": "x", "score": NaN}', "score is nan"),
    "score inf": ('{"id": "1", "image": "a.png", "text": "x", "score": -1e999}', "score is -inf"),
    "score huge": (base(score=10**400), "score is inf"),
    "score text": (base(score="0.5"), "score is '0.5', not a number"),
    "score bool": (base(score=True), "score is True, not a number"),
    "rating NaN": (base(ratings={"x": float("nan")}), "ratings.x is nan"),
    "rating bool": (base(ratings={"x": False}), "ratings.x is False, not a number"),
    "ratings list": (base(ratings=[1]), "ratings is [1], not an object"),
    "nameless rating": (base(ratings={" ": 1}), "objective without a name"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_records_are_rejected_with_the_reason(folder, case):
    line, reason = BAD[case]
    path = write(folder, base(id="good"), "", line)
    good, bad = iter_records(path)
    assert isinstance(good, Record)
    assert isinstance(bad, Rejected)
    assert bad.line == 3
    assert reason in bad.reason


def test_duplicate_ids_and_bytes_that_are_no_utf8(folder):
    path = folder / "pairs.jsonl"
    lines = [json.dumps(base()).encode(), b'{"id": "\xff"}', json.dumps(base(text="other")).encode()]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    good, broken, twice = iter_records(path)
    assert isinstance(good, Record)
    assert "not UTF-8" in broken.reason
    assert twice == Rejected(3, "1", "duplicate id '1': an earlier record has it")


def test_a_rejected_line_keeps_its_id_to_itself(folder):
    first, second = iter_records(write(folder, base(text=""), base()))
    assert (first.id, second.id) == ("1", "1")
    assert "duplicate" in second.reason


def test_a_line_without_end_is_rejected_whole(folder, monkeypatch):
    monkeypatch.setattr("multitap_jax.data.tables.MAX_LINE_BYTES", 100)
    items = list(iter_records(write(folder, base(text="x" * 1000), base())))
    assert "longer than 100 bytes" in items[0].reason
    assert (items[1].id, items[1].line) == ("1", 2)


def test_links_that_leave_the_root_are_refused(folder):
    (folder / "link.png").symlink_to("../outside.png")
    (folder / "up").symlink_to("..")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "inside.png").symlink_to("a.png")
    names = ["link.png", "up/outside.png", "loop.png", "inside.png", "up/set/a.png"]
    path = write(folder, *[base(id=name, image=name) for name in names])
    link, up, loop, inside, back = iter_records(path)
    assert "outside the folder" in link.reason
    assert "outside the folder" in up.reason
    assert "cannot be reached" in loop.reason
    assert isinstance(inside, Record)
    assert isinstance(back, Record)
    allowed = list(iter_records(path, allow_outside_root=True))
    assert [isinstance(item, Record) for item in allowed] == [True, True, False, True, True]
    absolute = write(folder, base(image=str(folder.parent / "outside.png")))
    (record,) = iter_records(absolute, allow_outside_root=True)
    assert record.images == (folder.parent / "outside.png",)


def test_require_and_absent_pictures(folder):
    path = write(folder, base(score=1), base(id="2", ratings={"x": 1}), base(id="3", ratings={"x": None}))
    assert [isinstance(item, Record) for item in iter_records(path, require="score")] == [True, False, False]
    kept = list(iter_records(path, require="ratings.x"))
    assert kept[2].reason == (
        "ratings.x is missing, and this run needs it; add it, or name another number with --target=ratings.NAME"
    )
    (without, *_) = (r for r in iter_records(path, require="score", flags="--config.data.") if isinstance(r, Rejected))
    assert without.reason == (
        "score is missing, and this run needs it; the record has ratings.x: "
        "choose one with --config.data.target=ratings.x"
    )
    with pytest.raises(RecordsError, match="expected 'score' or"):
        iter_records(path, require="ratings.")
    with pytest.raises(RecordsError, match="expected 'score' or"):
        iter_records(path, require="rating")
    absent = write(folder, base(image="none.png"), base(id="2", image="../x.png"))
    kept = list(iter_records(absent, need_images=False))
    assert isinstance(kept[0], Record)
    assert "outside" in kept[1].reason


def test_too_many_rejected_lines_stop_the_run_with_reasons(folder, tmp_path):
    path = write(folder, *[base(id=str(i)) for i in range(97)], base(id="x", text=""), "{", base(id="y", score="no"))
    rejected = tmp_path / "out" / "rejected.jsonl"
    with pytest.raises(RecordsError) as caught:
        load_records(path, rejected_path=rejected)
    message = str(caught.value)
    assert "3 of 100 records rejected (3.0%, allowed 1.0%)" in message
    assert "line 98: text is empty" in message
    assert "--max_rejected=0.03" in message
    assert [json.loads(line)["line"] for line in rejected.read_text().splitlines()] == [98, 99, 100]
    result = load_records(path, max_rejected=0.03)
    assert (len(result.records), len(result.rejected)) == (97, 3)
    assert "3 rejected" in result.summary()


def test_nothing_usable_is_an_error(folder):
    with pytest.raises(RecordsError, match="no records"):
        load_records(write(folder))
    with pytest.raises(RecordsError, match="no usable record"):
        load_records(write(folder, "{"), max_rejected=1.0)


def test_which_file(folder):
    with pytest.raises(RecordsError, match="found none"):
        load_records(folder)
    write(folder, base())
    write_rejected(folder / "rejected.jsonl", [])
    assert len(load_records(folder).records) == 1
    (folder / "more.csv").write_text("id\n")
    with pytest.raises(RecordsError, match=r"more\.csv, pairs\.jsonl"):
        load_records(folder)
    with pytest.raises(RecordsError, match="no such records file"):
        load_records(folder / "none.jsonl")
    (folder / "pairs.txt").write_text("")
    with pytest.raises(RecordsError, match="rename or convert"):
        load_records(folder / "pairs.txt")


def test_check_images_decodes(folder):
    whole = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "not.png").write_text("hello")
    path = write(folder, base(), base(id="2", image="cut.png"), base(id="3", image="not.png"))
    assert all(isinstance(item, Record) for item in iter_records(path))
    good, cut, other = iter_records(path, check_images=True)
    assert isinstance(good, Record)
    assert "cut.png" in cut.reason
    assert "not a picture" in other.reason
    late = list(iter_records(path))[1]
    with pytest.raises(ImageError) as caught:
        ImageReader(GridLayout("square:56"))(late.images[0])
    assert reject_image(late, caught.value) == cut


ROWS = [
    {"id": "1", "image": "a.png", "text": 'say "hi", twice\nover', "score": 0.5, "ratings": {"x": 1.0, "y": 2.0}},
    {"id": "2", "image": ["a.png", "b.png"], "text": "null", "request": "Why?", "ratings": {"y": 3.0}, "group": "g"},
]


def write_csv(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_the_same_records_in_every_format(folder, tmp_path):
    expected = load_records(write(folder, *ROWS))
    (folder / "pairs.jsonl").unlink()
    sheet = write_csv(
        folder / "pairs.csv",
        ["id", "image", "text", "score", "request", "group", "ratings.x", "ratings.y"],
        [
            ["1", "a.png", ROWS[0]["text"], "0.5", "", "", "1", "2"],
            ["2", '["a.png", "b.png"]', "null", "", "Why?", "g", "", "3"],
        ],
    )
    from_csv = load_records(sheet)
    assert [record.line for record in from_csv.records] == [2, 4]
    sheet.unlink()
    columns = {name: [row.get(name) for row in ROWS] for name in ("id", "text", "score", "request", "group")}
    columns["image"] = [["a.png"], ["a.png", "b.png"]]
    pq.write_table(pa.table(columns | {"ratings": [row["ratings"] for row in ROWS]}), folder / "pairs.parquet")
    from_struct = load_records(folder)
    maps = pa.array([list(row["ratings"].items()) for row in ROWS], pa.map_(pa.string(), pa.float32()))
    pq.write_table(pa.table(columns | {"ratings": maps}), folder / "pairs.parquet")
    from_map = load_records(folder)
    texts = {"ratings": [json.dumps(row["ratings"]) for row in ROWS]}
    pq.write_table(pa.table(columns | texts), folder / "pairs.parquet")
    from_text = load_records(folder)
    for other in (from_csv, from_struct, from_map, from_text):
        assert other.fingerprint == expected.fingerprint
        assert other.objectives == ("x", "y")
        assert [record.images for record in other.records] == [record.images for record in expected.records]


def test_bad_table_rows(folder):
    header = ["id", "image", "text", "score", "ratings", "ratings.x"]
    rows = [
        ["1", "a.png", "x", "nan", "", ""],
        ["2", "a.png", "x", "high", "", ""],
        ["3", "a.png", "", "1", "", ""],
        ["4", "a.png", "x"],
        [],
        ["5", "[a.png", "x", "", "", ""],
        ["6", "a.png", "x", "", "{", ""],
        ["7", "a.png", "x", "", '{"x": 1}', "2"],
        ["8", "a.png", "x", "", '{"x": true}', ""],
        ["9", "a.png", "x", "", "[1]", ""],
        ["10", "a.png", "x", "", "", "inf"],
        ["11", "a.png", "x", "", "", "1"],
    ]
    path = write_csv(folder / "pairs.csv", header, rows)
    with path.open("ab") as file:
        file.write(b'12,a.png,\xff,,,\r\n13,a.png,"x"y,,,\r\n14,a.png,ok,,,\r\n')
    *items, latin, quote, last = iter_records(path)
    reasons = [item.reason for item in items[:-1]]
    for reason, expected in zip(
        reasons[:5],
        ["is nan", "not a number", "text is missing", "3 cells, but the header names 6", "image is not JSON"],
        strict=True,
    ):
        assert expected in reason
    for reason, expected in zip(
        reasons[5:],
        ["ratings is not JSON", "ratings.x is given twice", "not a number", "not an object", "ratings.x is inf"],
        strict=True,
    ):
        assert expected in reason
    assert [item.line for item in items[3:5]] == [5, 7]
    assert (items[0].id, items[4].id) == ("1", "5")
    assert items[-1].ratings == {"x": 1.0}
    assert "text is not valid Unicode" in latin.reason
    assert "not CSV" in quote.reason
    assert (last.id, last.line) == ("14", 16)


def test_a_wrong_header_stops_at_once(folder):
    path = write_csv(folder / "pairs.csv", ["id", "imgae", "text", "text"], [])
    with pytest.raises(RecordsError, match=r"unknown column 'imgae'; did you mean 'image'.*column 'text' twice"):
        iter_records(path)
    path.write_text("")
    with pytest.raises(RecordsError, match="the file is empty"):
        iter_records(path)
    parquet = folder / "pairs.parquet"
    pq.write_table(pa.table({"id": ["1"], "caption": ["x"]}), parquet)
    with pytest.raises(RecordsError, match="unknown column 'caption'"):
        iter_records(parquet)
    parquet.write_bytes(parquet.read_bytes()[:50])
    with pytest.raises(RecordsError, match="damaged or no Parquet"):
        iter_records(parquet)


def test_parquet_values_of_other_types_are_rejected(folder):
    picture = pa.array([{"bytes": b"x", "path": None}])
    table = {"id": ["1"], "text": ["x"], "image": picture}
    pq.write_table(pa.table(table), folder / "pairs.parquet")
    (item,) = iter_records(folder)
    assert "is not a path" in item.reason
    table = {"id": ["1", "2"], "text": ["x", "x"], "image": ["a.png"] * 2, "score": pa.array([float("nan"), None])}
    pq.write_table(pa.table(table), folder / "pairs.parquet")
    item, good = iter_records(folder)
    assert "score is nan" in item.reason
    assert good.score is None


def test_the_fingerprint_follows_content_not_place(folder, tmp_path):
    before = load_records(write(folder, base(), base(id="2"))).fingerprint
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    assert load_records(moved).fingerprint == before
    assert load_records(write(moved, base(id="2"), base())).fingerprint != before
    assert load_records(write(moved, base(), base(id="2", text="b"))).fingerprint != before


def record(name, *images, group=None):
    return Record(name, tuple(Path("/data/images") / image for image in images), "x", None, None, {}, group, 1)


def test_groups_link_records_through_images_and_groups():
    records = [
        record("1", "a"),
        record("2", "b", "a"),
        record("3", "c", group="g"),
        record("4", "b", group="g"),
        record("5", "d"),
        record("6", "e", group="h"),
        record("7", "f", group="h"),
    ]
    keys = group_keys(records)
    assert keys[0] == keys[1] == keys[2] == keys[3]
    assert keys[5] == keys[6]
    assert len(set(keys)) == 3
    assert sorted(group_keys(records[::-1])) == sorted(keys)
    moved = [
        Record(r.id, tuple(Path("/mnt") / p.name for p in r.images), "x", None, None, {}, r.group, 1) for r in records
    ]
    assert group_keys(moved) == keys
    assert group_keys([]) == []


def test_split_is_deterministic_and_never_parts_a_group():
    rng = np.random.default_rng(0)
    records = [record(str(i), str(rng.integers(400))) for i in range(2000)]
    train, held = split_by_group(records, 0.25, seed=1)
    assert {r.images for r in train}.isdisjoint({r.images for r in held})
    assert sorted(int(r.id) for r in train + held) == list(range(2000))
    assert [int(r.id) for r in train] == sorted(int(r.id) for r in train)
    assert 0.18 < len({r.images for r in held}) / len({r.images for r in records}) < 0.32
    assert split_by_group(records, 0.25, seed=1) == (train, held)
    assert split_by_group(records, 0.25, seed=2) != (train, held)
    assert split_by_group(records, 0, seed=1) == (records, [])
    assert split_by_group(records, 1, seed=1) == ([], records)
    with pytest.raises(ValueError, match="share"):
        split_by_group(records, 1.5, seed=1)


def test_seen_ids_equals_a_set():
    rng = np.random.default_rng(0)
    seen, oracle = SeenIds(), set()
    for name in map(str, rng.integers(0, 3000, 6000)):
        assert seen.add(name) == (name not in oracle)
        oracle.add(name)
    assert seen.count == len(oracle) > 1024 * 2 / 3


@pytest.mark.skipif(not (SHARED / "avt_ai_images").is_dir(), reason="real pictures are not at hand")
def test_real_ratings():
    result = load_records(SHARED / "avt_ai_images", check_images=True, require="ratings.realism")
    assert (len(result.records), result.rejected) == (108, [])
    assert result.objectives == ("prompt_matching", "realism", "appeal")
