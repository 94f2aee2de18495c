"""Every reader on a small file of the published form: the records are those the file says."""

import json
import math
import os
from pathlib import Path

import pytest

from multitap_jax.data.sources import DATASETS, SourceError, convert
from tests.data.sources.published import (
    flickr_json,
    hub_image,
    parquet,
    pascal_mats,
    picture,
    records_of,
    table,
    write,
)

SHARED = Path(os.environ.get("MULTITAP_SHARED_DATA", Path(__file__).parents[3].parent / "shared/data"))


def test_flickr8k_expert_json(tmp_path):
    flickr_json(tmp_path / "s/flickr8k.json", [[1, 2, 4], [4, 4, 4], [1, 1, 5]])
    found, rejected = records_of("flickr8k-expert", tmp_path / "s", max_rejected=0.5)
    assert found["im0/0"] == {
        "id": "flickr8k-expert/im0/0",
        "image": "images/Flickr8k_Dataset/im0.jpg",
        "text": "a dog 0 .",
        "score": 4 / 9,
        "ratings": {"expert_1": 1.0, "expert_2": 2.0, "expert_3": 4.0},
    }
    assert found["im1/0"]["score"] == 1.0
    assert rejected == ["rating 5 lies outside the published scale 1 to 4"]


def test_flickr8k_expert_means_that_are_equal_stay_equal(tmp_path):
    flickr_json(tmp_path / "s/flickr8k.json", [[1, 2, 3], [3, 2, 1], [2, 2, 2], [1, 1, 4]])
    found, _ = records_of("flickr8k-expert", tmp_path / "s")
    assert len({record["score"] for record in found.values()}) == 1


def test_flickr8k_as_published(tmp_path):
    folder = tmp_path / "s"
    write(folder / "Flickr8k.token.txt", "\ufeffa.jpg#0\tA dog .\na.jpg#1\tA cat .\nb.jpg#0\tA bird .\n")
    write(
        folder / "ExpertAnnotations.txt",
        "\ufeffa.jpg\tb.jpg#0\t1\t1\t2\nb.jpg\tb.jpg#0\t4\t4\t4\nb.jpg\ta.jpg#1\t2\t3\t3\n",
    )
    write(folder / "CrowdFlowerAnnotations.txt", "a.jpg\tb.jpg#0\t0.25\t1\t3\nb.jpg\ta.jpg#0\tnan\t0\t0\n")
    expert, _ = records_of("flickr8k-expert", folder)
    assert {name: record["text"] for name, record in expert.items()} == {"a/0": "A bird .", "b/2": "A cat ."}
    crowd, rejected = records_of("flickr8k-cf", folder, max_rejected=0.5)
    assert (crowd["a/0"]["score"], crowd["a/0"]["text"]) == (0.25, "A bird .")
    assert rejected == ["share of yes nan lies outside the published scale 0 to 1"]


def test_flickr8k_cf_json_and_its_neighbour(tmp_path):
    flickr_json(tmp_path / "s/crowdflower_flickr8k.json", [[0.0, 0.75], [1.0], [math.nan]])
    found, rejected = records_of("flickr8k-cf", tmp_path / "s", max_rejected=0.5)
    assert [record["score"] for record in found.values()] == [0.0, 0.75, 1.0]
    assert "nan" in rejected[0]
    flickr_json(tmp_path / "t/crowdflower_flickr8k.json", [[1.0, 4.0, 2.0]])
    with pytest.raises(SourceError, match="It looks like Flickr8k-Expert: --dataset=flickr8k-expert"):
        records_of("flickr8k-cf", tmp_path / "t")
    flickr_json(tmp_path / "u/flickr8k.json", [[0.0, 0.5, 0.25]])
    with pytest.raises(SourceError, match="It looks like Flickr8k-CF"):
        records_of("flickr8k-expert", tmp_path / "u")
    flickr_json(tmp_path / "v/flickr8k.json", [[1.0, 2.0]])
    with pytest.raises(SourceError, match="im0: expected 3 judgements of each pair in a row"):
        records_of("flickr8k-expert", tmp_path / "v")


def test_composite(tmp_path):
    entries = [
        {"image": "COCO/a.jpg", "caption": "A  cat.", "human": 3, "refs": []},
        {"image": "b", "caption": "x", "human": 0},
    ]
    write(tmp_path / "s/composite.json", {"dataset": entries})
    found, rejected = records_of("composite", tmp_path / "s", max_rejected=0.5)
    assert found["composite/00000"]["score"] == 0.5
    assert found["composite/00000"]["ratings"] == {"correctness": 3.0}
    assert found["composite/00000"]["text"] == "A cat."
    assert rejected == ["correctness 0 lies outside the published scale 1 to 5"]
    header = "Input.image_url;Input.text1;Input.text2;Answer.Q1Answer;Answer.Q2Answer\n"
    write(tmp_path / "t/8k_correctness.csv", header + "http://x.org/8k/p.jpg;A cat.;A dog.;5;1\n;;;;\nsum;2\n")
    found, _ = records_of("composite", tmp_path / "t")
    assert {name: (r["image"], r["text"], r["score"]) for name, r in found.items()} == {
        "8k/0000/1": ("images/p.jpg", "A cat.", 1.0),
        "8k/0000/2": ("images/p.jpg", "A dog.", 0.0),
    }


def test_pascal_50s_json(tmp_path):
    pair = {"image": "VOC/a.jpg", "captions": ["one ", "two"], "label": 1, "references": ["r"] * 5}
    write(tmp_path / "s/pascal_50s.json", {"HI": [pair, pair | {"label": 0}], "MM": [pair | {"label": None}]})
    found, rejected = records_of("pascal-50s", tmp_path / "s", max_rejected=0.5)
    assert found["HI/0000/a"]["group"] == "pascal-50s/HI/0000"
    assert [r["ratings"]["preference"] for r in found.values()] == [0.0, 1.0, 1.0, 0.0]
    assert found["HI/0000/a"]["text"] == "one"
    assert len(rejected) == 2


def test_pascal_50s_mat(tmp_path):
    pascal_mats(
        tmp_path / "s", [("a.jpg", "one", "two", 1, 30), ("b.jpg", "three", "four", 4, 10), ("b.jpg", "x", "y", 2, 24)]
    )
    found, _ = records_of("pascal-50s", tmp_path / "s")
    assert {name: record["ratings"]["preference"] for name, record in found.items()} == {
        "HC/0000/a": 1.0,
        "HC/0000/b": 0.0,
        "MM/0001/a": 0.0,
        "MM/0001/b": 1.0,
        "HI/0002/a": 1.0,
        "HI/0002/b": 1.0,
    }
    assert found["MM/0001/b"]["text"] == "four"
    assert found["MM/0001/b"]["image"] == "images/b.jpg"


@pytest.mark.parametrize("content", [b"", b"x" * 600, b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(512)])
def test_pascal_50s_mat_that_is_none(tmp_path, content):
    pascal_mats(tmp_path, [("1.jpg", "a", "b", 1, 30)])
    (tmp_path / "consensus_pascal.mat").write_bytes(content)
    with pytest.raises(SourceError, match="consensus_pascal.mat: damaged or no MATLAB file"):
        convert("pascal-50s", tmp_path, tmp_path / "out", images="none")


def test_foil(tmp_path):
    notes = [
        {
            "caption": "a cat",
            "id": 7,
            "image_id": 42,
            "foil": False,
            "foil_word": "ORIG",
            "target_word": "ORIG",
            "foil_id": 1,
        },
        {
            "caption": "a dog",
            "id": 7,
            "image_id": 42,
            "foil": True,
            "foil_word": "dog",
            "target_word": "cat",
            "foil_id": 2,
        },
        {
            "caption": "a bus",
            "id": 8,
            "image_id": 43,
            "foil": True,
            "foil_word": "bus",
            "target_word": "car",
            "foil_id": 3,
        },
    ]
    images = [{"id": 42, "file_name": "COCO_val2014_000000000042.jpg"}]
    content = {"info": {"version": "1"}, "images": images, "annotations": notes}
    write(tmp_path / "s/foilv1.0_test_2017.json", content)
    found, rejected = records_of("foil", tmp_path / "s", max_rejected=0.5)
    assert {name: (r["text"], r["ratings"]["preference"]) for name, r in found.items()} == {
        "7/0/foil": ("a dog", 0.0),
        "7/0/true": ("a cat", 1.0),
    }
    assert rejected == ["0 true captions for 1 foils, expected one"]


POLARIS_ROWS = [
    {"refs": ["a ref", "b"], "cand": "a cat", "img": hub_image(1), "human_score": 0.25},
    {"refs": ["c"], "cand": "a dog", "img": hub_image(2), "human_score": 0.75},
    {"refs": ["c"], "cand": "a bus", "img": hub_image(2), "human_score": float("nan")},
]


def test_polaris_parquet(tmp_path):
    parquet(tmp_path / "s/data/validation-00000-of-00002.parquet", POLARIS_ROWS[:2])
    parquet(tmp_path / "s/data/validation-00001-of-00002.parquet", POLARIS_ROWS[2:])
    parquet(tmp_path / "s/data/train-00000-of-00001.parquet", POLARIS_ROWS[:1])
    found, rejected = records_of("polaris", tmp_path / "s", split="validation", images=None, max_rejected=0.5)
    assert [(name, r["score"]) for name, r in found.items()] == [
        ("000000", 0.25),
        ("000001", 0.75),
    ]
    assert rejected == ["validation-00001-of-00002.parquet: no human_score"]
    assert len(records_of("polaris", tmp_path / "s", split="train", images=None)[0]) == 1
    with pytest.raises(SourceError, match=r"no file of the split 'test' of Polaris.*validation \(2\)"):
        records_of("polaris", tmp_path / "s")
    pairs, _ = records_of("polaris-star", tmp_path / "s", images=None, max_rejected=0.5)
    assert {name: (r["text"], r["ratings"]["preference"]) for name, r in pairs.items()} == {
        "000000/ref": ("a ref", 1.0),
        "000000/cand": ("a cat", 0.0),
    }


def test_polaris_csv(tmp_path):
    rows = [
        {"mt": "a cat", "refs": "['it\\'s a ref', 'b']", "score": "0.5", "imgid": "x.jpg"},
        {"mt": "a dog", "refs": '["c"]', "score": "1.5", "imgid": "y"},
    ]
    table(tmp_path / "s/polaris_val.csv", rows)
    found, rejected = records_of("polaris", tmp_path / "s", split="validation", max_rejected=0.5)
    assert found["000000"]["image"] == "images/x.jpg"
    assert rejected == ["human_score 1.5 lies outside the published scale 0 to 1"]
    pairs, _ = records_of("polaris-star", tmp_path / "s", max_rejected=0.5)
    assert pairs["000000/ref"]["text"] == "it's a ref"


def test_references_are_parsed_and_never_run(tmp_path):
    hostile = "__import__('pathlib').Path('ran').touch()"
    table(tmp_path / "s/polaris_val.csv", [{"mt": "x", "refs": hostile, "score": "0", "imgid": "x"}] * 1)
    with pytest.raises(ValueError, match="not a list of captions"):
        records_of("polaris-star", tmp_path / "s")
    assert not Path("ran").exists()


@pytest.mark.parametrize("references", ['"one caption"', "'one caption'", "7", "{}", "[" * 20_000])
def test_references_that_are_no_list(tmp_path, references):
    """Of a text the first letter would be the reference."""
    rows = [{"mt": "a cat", "refs": given, "score": "0.25", "imgid": "x.jpg"} for given in ("['a ref']", references)]
    table(tmp_path / "s/polaris_val.csv", rows)
    pairs, rejected = records_of("polaris-star", tmp_path / "s", max_rejected=0.5)
    assert set(pairs) == {"000000/ref", "000000/cand"}
    assert "not a list of captions" in rejected[0]


def test_nebula(tmp_path):
    row = {"file_name": "x.jpg", "image": hub_image(3), "refs": ["r"], "mt": "a cat", "human_score": 0.5}
    parquet(tmp_path / "s/data/test-00000-of-00001.parquet", [row, row | {"human_score": None}])
    found, rejected = records_of("nebula", tmp_path / "s", images=None, max_rejected=0.5)
    assert found["00000"]["score"] == 0.5
    assert rejected == ["no human_score"]


def test_oid_star(tmp_path):
    rows = [
        ("k1", "one", 0.9),
        ("k2", "alone", 1.0),
        ("k1", "two", 0.1),
        ("k3", "a", 1),
        ("k3", "b", 1),
        ("k3", "c", 1),
    ]
    names = ("IMAGE_KEY", "CAPTION_PRED", "ROUNDED_AVG_USER_RATING")
    content = [dict(zip(names, row, strict=True)) for row in rows]
    table(tmp_path / "s/OID-rated-image-captions.v2.dev.alignment.tsv", content, delimiter="\t")
    found, _ = records_of("oid-star", tmp_path / "s")
    path = tmp_path / "t/OID-rated-image-captions.v2.dev.alignment.tsv"
    captions = ['"Stop" is written on it', 'a 5" pipe, "so to speak']
    write(path, "\t".join(names) + "\n" + "".join(f"k1\t{caption}\t0.5\n" for caption in captions))
    assert [r["text"] for r in records_of("oid-star", tmp_path / "t")[0].values()] == captions  # it has no quoting
    assert {name: (r["score"], r["group"]) for name, r in found.items()} == {
        "k1/0": (0.9, "oid-star/validation/k1"),
        "k1/1": (0.1, "oid-star/validation/k1"),
    }


def test_imagereward(tmp_path):
    entry = {"id": "p", "prompt": "a cat", "generations": ["x/0.webp", "x/1.webp"], "ranking": [2, 1]}
    write(tmp_path / "s/data/test.json", [entry, entry | {"id": "q", "ranking": [1]}])
    found, rejected = records_of("imagereward", tmp_path / "s", max_rejected=0.5)
    assert {name: (r["ratings"], r["group"]) for name, r in found.items()} == {
        "p/0": ({"preference": -2.0}, "imagereward/test/p"),
        "p/1": ({"preference": -1.0}, "imagereward/test/p"),
    }
    assert rejected == ["2 pictures, but 1 ranks"]
    row = {
        "prompt_id": "p",
        "prompt": "a cat",
        "image_path": "images/a.webp",
        "rank": 1,
        "overall_rating": 7,
        "image_text_alignment_rating": 4,
        "fidelity_rating": 2,
    }
    parquet(
        tmp_path / "s/metadata-train.parquet",
        [row, row | {"overall_rating": 4, "rank": 2}, row | {"overall_rating": 9}],
    )
    found, rejected = records_of("imagereward", tmp_path / "s", split="train", max_rejected=0.5)
    assert [record["score"] for record in found.values()] == [1.0, 0.5]
    assert found["p/0"]["ratings"] == {"overall": 7.0, "alignment": 4.0, "fidelity": 2.0, "preference": -1.0}
    assert rejected == ["overall_rating 9 lies outside the published scale 1 to 7"]
    embedded = {name: value for name, value in row.items() if name != "image_path"} | {"image": hub_image(5)}
    parquet(tmp_path / "t/train-00000-of-00001.parquet", [embedded])
    assert len(records_of("imagereward", tmp_path / "t", split="train", images=None)[0]) == 1


def test_visionreward_dimensions_come_from_the_data(tmp_path):
    rows = [
        {"image": hub_image(9), "prompt": "p", "annotation": {"symmetry": 1, "hands": None}, "meta_result": [1, 0]},
    ]
    parquet(tmp_path / "s/data/train-00000-of-00001.parquet", rows)
    found, _ = records_of("visionreward-image", tmp_path / "s", images=None)
    assert found["000000"]["ratings"] == {"symmetry": 1.0, "hands": None, "meta_00": 1.0, "meta_01": 0.0}


def test_align_anything(tmp_path):
    row = {
        "question": "Where?",
        "response_1": "Here.",
        "response_2": "There.",
        "image": hub_image(1),
        "overall_response": 2,
        "safety_rate_1": 3,
        "safety_rate_2": 1,
        "safety_rationale": "words",
    }
    parquet(tmp_path / "s/text-image-to-text/val_1k.parquet", [row, row | {"overall_response": 3}])
    found, rejected = records_of("align-anything-ti2t", tmp_path / "s", images=None, max_rejected=0.5)
    assert [(r["text"], r["ratings"], r["request"]) for r in found.values()] == [
        ("Here.", {"safety": 3.0, "preference": 0.0}, "Where?"),
        ("There.", {"safety": 1.0, "preference": 1.0}, "Where?"),
    ]
    assert rejected == ["overall_response is 3, neither 1 nor 2"] * 2
    row = {"prompt": "p", "image_1": hub_image(1), "image_2": hub_image(2), "overall_image": 1, "aesthetics_rate_1": 2}
    parquet(tmp_path / "t/text-to-image/val.parquet", [row])
    found, _ = records_of("align-anything-t2i", tmp_path / "t", images=None)
    assert [r["ratings"] for r in found.values()] == [{"aesthetics": 2.0, "preference": 1.0}, {"preference": 0.0}]
    assert found["000000/1"]["image"] != found["000000/2"]["image"]


def test_eye4all_dimensions_come_from_the_data(tmp_path):
    row = {
        "request": "How?",
        "response": "So.",
        "image": hub_image(1),
        "overall_score": 4.0,
        "safety": "3",
        "model": "x",
    }
    parquet(tmp_path / "s/test.parquet", [row, row | {"overall_score": None}])
    found, _ = records_of("eye4all-multi", tmp_path / "s", images=None)
    assert [r["ratings"] for r in found.values()] == [{"overall_score": 4.0, "safety": 3.0}, {"safety": 3.0}]
    table(tmp_path / "t/pref.csv", [{"request": "How?", "chosen": "So.", "rejected": "No.", "image": "a.jpg"}])
    pairs, _ = records_of("eye4all-pref", tmp_path / "t")
    assert [(r["text"], r["ratings"]["preference"], r["request"]) for r in pairs.values()] == [
        ("So.", 1.0, "How?"),
        ("No.", 0.0, "How?"),
    ]


def test_agiqa(tmp_path):
    row = {
        "name": "a.jpg",
        "prompt": "p",
        "adj1": "",
        "style": "",
        "mos_quality": 2.5,
        "std_quality": 1,
        "mos_align": 3,
    }
    table(tmp_path / "s/data.csv", [row])
    write(tmp_path / "s/a.jpg", picture(1))
    found, _ = records_of("agiqa-3k", tmp_path / "s", images=None)
    assert found["a.jpg"]["ratings"] == {"quality": 2.5, "align": 3.0}


def test_a_table_of_ones_own(tmp_path):
    rows = [
        {"file": "a.jpg", "caption": "a cat", "mos": "3.5", "tone": ""},
        {"file": "a.jpg", "caption": "x", "mos": "nan", "tone": "1"},
        {"file": "a.jpg", "caption": "y", "mos": "inf", "tone": "1"},
    ]
    table(tmp_path / "s/mine.csv", rows)
    write(tmp_path / "s/a.jpg", picture(1))
    columns = {"text": "caption", "image": "file", "score": "mos", "ratings.tone": "tone"}
    found, rejected = records_of("table", tmp_path / "s", images=None, columns=columns, max_rejected=0.5)
    common = {"image": "images/a.jpg"}
    assert found == {
        "000000": common | {"id": "000000", "text": "a cat", "score": 3.5, "ratings": {"tone": None}},
        "000001": common | {"id": "000001", "text": "x", "ratings": {"tone": 1.0}},
    }
    assert rejected == ["mos is inf, not a finite number"]
    with pytest.raises(SourceError, match="--columns=text=captoin: no such column; did you mean 'caption'"):
        records_of("table", tmp_path / "s", columns=columns | {"text": "captoin"})
    with pytest.raises(SourceError, match="which column is the text"):
        records_of("table", tmp_path / "s", columns={"image": "file"})
    with pytest.raises(SourceError, match=r"--columns=ratings=...: a record has .*ratings are named one by one"):
        records_of("table", tmp_path / "s", columns=columns | {"ratings": "tone"})
    record = {"id": "q", "image": "a.jpg", "text": "t", "ratings": {"x": 2}}
    write(tmp_path / "r/mine.jsonl", json.dumps(record) + "\n")
    with pytest.raises(SourceError, match=r"mine.jsonl: its column 'ratings' holds all .* need no conversion"):
        records_of("table", tmp_path / "r")
    with pytest.raises(SourceError, match="--columns=caption=...: a record has id, image"):
        records_of("table", tmp_path / "s", columns={"caption": "caption"})
    write(tmp_path / "t/mine.jsonl", json.dumps({"id": "q", "image": "a.jpg", "text": "t", "ratings.x": 2}) + "\n")
    assert records_of("table", tmp_path / "t")[0]["q"]["ratings"] == {"x": 2.0}


def test_every_dataset_has_a_test_of_its_own():
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert all(f'records_of("{name}"' in text for name in DATASETS)


@pytest.mark.skipif(not (SHARED / "benchmarks").is_dir(), reason="the published annotations are not at hand")
@pytest.mark.parametrize(("name", "count"), [("flickr8k-expert", 5664), ("pascal-50s", 8000), ("imagereward", 2720)])
def test_the_published_annotations(tmp_path, name, count):
    done = convert(name, SHARED / "benchmarks", tmp_path / "out", images="none")
    assert (done.written, done.rejected) == (count, 0)
    note = json.loads((tmp_path / "out/dataset.json").read_text())
    assert (note["records"], note["published"], note["complete"]) == (count, count, True)
    (source,) = note["sources"]
    assert len(source["sha256"]) == 64


def test_the_documentation_has_a_row_for_each():
    text = (Path(__file__).parents[3] / "docs/datasets.md").read_text()
    first = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert all(any(f"`{name}`" in cell for cell in first) for name in DATASETS)
