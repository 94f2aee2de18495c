"""The conversion: pictures, wrong folders, wrong counts, and what a kill leaves."""

import json
import os

import pytest

from multitap_jax.cli import main
from multitap_jax.data.decode import decode_image
from multitap_jax.data.records import RecordsError, load_records
from multitap_jax.data.sources import SourceError, convert, read_dataset_note
from multitap_jax.files import FolderInUseError
from tests.data.sources.published import flickr_json, hub_image, parquet, picture, table, write

POLARIS = {"refs": ["a"], "cand": "a cat", "img": hub_image(1), "human_score": 0.25}


def polaris(folder, rows=3, **changes):
    parquet(
        folder / "data/test-00000-of-00001.parquet", [POLARIS | {"cand": f"cat {i}"} | changes for i in range(rows)]
    )
    return folder


def test_embedded_pictures_are_written_once_and_read_back(tmp_path):
    folder = tmp_path / "hub"
    rows = [POLARIS | {"img": hub_image(i % 2)} for i in range(5)]
    rows.append(POLARIS | {"img": {"bytes": picture(7, "WEBP"), "path": None}})
    parquet(folder / "test.parquet", rows)
    done = convert("polaris", folder, tmp_path / "out", allow_subset=True)
    assert (done.written, done.pictures, done.with_pictures) == (6, 3, True)
    found = load_records(tmp_path / "out", check_images=True).records
    assert len({record.images for record in found}) == 3
    assert decode_image(found[1].images[0]).getpixel((0, 0)) == (1, 0, 0)
    assert found[5].images[0].suffix == ".webp"
    again = convert("polaris", folder, tmp_path / "out", allow_subset=True)
    assert str(again) == str(done)


def test_embedded_pictures_stay_where_they_are_if_none_are_taken(tmp_path):
    done = convert("polaris", polaris(tmp_path / "s"), tmp_path / "out", images="none", allow_subset=True)
    assert (done.written, done.with_pictures) == (3, False)
    assert not (tmp_path / "out/images").exists()


@pytest.mark.parametrize("links", [True, False])
def test_another_folder_of_pictures_gives_its_own(tmp_path, monkeypatch, links):
    """Also where its pictures are called the same and are as large."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *paths: os.stat(tmp_path / "nothing"))
    table(tmp_path / "s/mine.csv", [{"image": "1.bmp", "text": "x"}])
    for colour, folder in enumerate(("wrong", "right"), 1):
        write(tmp_path / folder / "1.bmp", picture(colour, "BMP"))
        convert("table", tmp_path / "s", tmp_path / "out", images=tmp_path / folder)
        (record,) = load_records(tmp_path / "out").records
        assert record.images[0].read_bytes() == picture(colour, "BMP")


def test_pictures_beside_are_linked_wherever_the_folder_lies(tmp_path):
    flickr_json(tmp_path / "s/flickr8k.json", [[1, 2, 3], [1, 1, 1]])
    for name in ("im0.jpg", "im1.jpg"):
        write(tmp_path / "Flicker8k_Dataset" / name, picture(1, "JPEG"))
    done = convert(
        "flickr8k-expert", tmp_path / "s", tmp_path / "out", images=tmp_path / "Flicker8k_Dataset", allow_subset=True
    )
    assert done.pictures == 2
    (first, _) = load_records(tmp_path / "out", check_images=True).records
    assert os.path.samefile(first.images[0], tmp_path / "Flicker8k_Dataset/im0.jpg")


def test_pictures_are_copied_where_there_are_no_links(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    table(tmp_path / "s/data.csv", [{"image": "deep/a.png", "text": "x"}])
    write(tmp_path / "s/a.png", picture(4))
    convert("table", tmp_path / "s/data.csv", tmp_path / "out")
    (record,) = load_records(tmp_path / "out").records
    assert record.images[0].read_bytes() == picture(4)


@pytest.mark.parametrize("name", ["../../secret.png", "a/../../secret.png", "", "x\0.png"])
def test_names_that_leave_the_folder_are_rejected(tmp_path, name):
    write(tmp_path / "secret.png", picture(1))
    write(tmp_path / "s/set/mine.jsonl", json.dumps({"image": name, "text": "x"}) + "\n")
    with pytest.raises(RecordsError, match="1 of 1 records rejected"):
        convert("table", tmp_path / "s/set", tmp_path / "out")
    assert not list((tmp_path / "out").glob("images/**/*.png"))


def test_absolute_names_and_addresses_are_looked_up_by_their_last_part(tmp_path):
    rows = [{"image": "/srv/data/a.png", "text": "x"}, {"image": "https://x.org/deep/b.png", "text": "y"}]
    table(tmp_path / "s/mine.csv", rows)
    write(tmp_path / "s/a.png", picture(1))
    write(tmp_path / "s/b.png", picture(2))
    assert convert("table", tmp_path / "s", tmp_path / "out").pictures == 2


@pytest.mark.parametrize("names", [("A/1.png", "B/1.png"), ("/A/1.png", "/B/1.png"), ("x://h/A/1.png", "A/B/1.png")])
def test_pictures_of_two_folders_are_not_one(tmp_path, names):
    """The name's last part alone would give both the picture of one of them."""
    table(tmp_path / "s/mine.csv", [{"image": name, "text": "x"} for name in names])
    write(tmp_path / "s/A/1.png", picture(1))
    with pytest.raises(RecordsError, match=f"(?s)1 of 2 .*{names[1]} and {names[0]} are both .*A/1.png.*folder above"):
        convert("table", tmp_path / "s/mine.csv", tmp_path / "out", images=tmp_path / "s/A")


def test_a_name_too_long_for_a_file_is_rejected(tmp_path):
    table(tmp_path / "s/mine.csv", [{"image": name, "text": "x"} for name in ("1.png", "long" * 100)])
    write(tmp_path / "s/1.png", picture(1))
    done = convert("table", tmp_path / "s/mine.csv", tmp_path / "out", max_rejected=0.5)
    assert (done.written, done.rejected) == (1, 1)


def test_a_picture_may_be_named_in_two_ways(tmp_path):
    table(tmp_path / "s/mine.csv", [{"image": name, "text": "x"} for name in ("1.png", "A/1.png", "./1.png")])
    write(tmp_path / "s/1.png", picture(1))
    assert convert("table", tmp_path / "s/mine.csv", tmp_path / "out").written == 3
    for name in ("A/2.png", "B/2.png"):  # as the hub's cache keeps equal files: links to one
        (tmp_path / "t" / name).parent.mkdir(parents=True)
        (tmp_path / "t" / name).symlink_to(tmp_path / "s/1.png")
    table(tmp_path / "t/mine.csv", [{"image": name, "text": "x"} for name in ("A/2.png", "B/2.png")])
    assert convert("table", tmp_path / "t/mine.csv", tmp_path / "out2").written == 2


def test_missing_pictures_are_counted_with_examples(tmp_path):
    flickr_json(tmp_path / "s/flickr8k.json", [[1, 2, 3]] * 5)
    write(tmp_path / "s/im0.jpg", picture(1))
    message = r"4 of 5 pictures of Flickr8k-Expert are missing: Flickr8k_Dataset/im1.jpg, .* and 1 more.*--images=none"
    with pytest.raises(SourceError, match=message):
        convert("flickr8k-expert", tmp_path / "s", tmp_path / "out", allow_subset=True)
    with pytest.raises(SourceError, match=r"--images=.*nowhere: no such folder"):
        convert("flickr8k-expert", tmp_path / "s", tmp_path / "out", images=tmp_path / "nowhere")
    done = convert("flickr8k-expert", tmp_path / "s", tmp_path / "out", allow_subset=True, max_rejected=0.8)
    assert (done.written, done.rejected) == (1, 4)
    assert done.reasons == {f"picture ... is not in {'...'}": 4}
    assert "4 rejected" in str(done)


def test_wrong_folders_say_what_they_are(tmp_path):
    row = {"file_name": "x", "image": hub_image(1), "refs": ["r"], "mt": "m", "human_score": 0.5}
    parquet(tmp_path / "nebula/data/test-0.parquet", [row])
    with pytest.raises(SourceError, match=r"this is not Polaris\. Looked for \*\.parquet with cand, human_score.*"):
        convert("polaris", tmp_path / "nebula", tmp_path / "out")
    with pytest.raises(SourceError, match=r"It looks like Nebula\. There: data/test-0\.parquet"):
        convert("polaris", tmp_path / "nebula", tmp_path / "out")
    with pytest.raises(SourceError, match="no such file or folder"):
        convert("polaris", tmp_path / "none", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="There: no files"):
        convert("polaris", tmp_path / "empty", tmp_path / "out")
    with pytest.raises(SourceError, match="not known; did you mean 'polaris'"):
        convert("polarsi", tmp_path / "nebula", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_belong_together_lie_together(tmp_path):
    judged = write(tmp_path / "s/ExpertAnnotations.txt", "a.jpg\tb.jpg#0\t1\t1\t2\n")
    captions = write(tmp_path / "s/deep/Flickr8k.token.txt", "b.jpg#0\tA bird .\n")
    with pytest.raises(SourceError, match="Beside ExpertAnnotations.txt there is no Flickr8k.token.txt"):
        convert("flickr8k-expert", tmp_path / "s", tmp_path / "out", images="none")
    captions.rename(tmp_path / "s/Flickr8k.token.txt")
    for number, source in enumerate((tmp_path / "s", judged)):
        done = convert("flickr8k-expert", source, tmp_path / f"out{number}", images="none", allow_subset=True)
        assert done.written == 1
        note = json.loads((tmp_path / f"out{number}/dataset.json").read_text())
        assert [entry["file"] for entry in note["sources"]] == ["ExpertAnnotations.txt", "Flickr8k.token.txt"]


def test_missing_columns_name_the_near_ones(tmp_path):
    row = {"refs": ["a"], "cand": "x", "img": hub_image(1), "human_scores": 0.5}
    parquet(tmp_path / "s/test.parquet", [row])
    with pytest.raises(SourceError, match="has no column 'human_score'; did you mean 'human_scores'"):
        convert("polaris", tmp_path / "s", tmp_path / "out")
    write(tmp_path / "t/ExpertAnnotations.txt", "")
    with pytest.raises(SourceError, match=r"Beside ExpertAnnotations.txt there is no Flickr8k.token.txt"):
        convert("flickr8k-expert", tmp_path / "t", tmp_path / "out")


def test_damaged_files(tmp_path):
    path = polaris(tmp_path / "s") / "data/test-00000-of-00001.parquet"
    content = bytearray(path.read_bytes())
    content[4:200] = b"\0" * 196
    path.write_bytes(bytes(content))
    with pytest.raises(SourceError, match=r"(?s)(damaged|no Parquet).*download it again"):
        convert("polaris", tmp_path / "s", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    path.unlink()
    polaris(tmp_path / "s")
    assert convert("polaris", tmp_path / "s", tmp_path / "out", allow_subset=True).written == 3
    write(tmp_path / "t/data.csv", "image,text\na.png\n")
    with pytest.raises(SourceError, match="line 2 has not as many cells as the header"):
        convert("table", tmp_path / "t", tmp_path / "out2")


@pytest.mark.parametrize("name", ["composite.json", "mine.jsonl"])
def test_json_that_is_nested_too_deeply(tmp_path, name):
    first = '{"image": "a.png", "text": "x"}\n' * (name == "mine.jsonl")
    write(tmp_path / "s" / name, first + "[" * 200_000)
    with pytest.raises(SourceError, match=f"{name}.*(this is not Composite|no JSON)"):
        convert("table" if first else "composite", tmp_path / "s" / name, tmp_path / "out", images="none")


def test_a_file_that_was_mended_is_read_anew(tmp_path):
    table(tmp_path / "s/mine.csv", [{"file": "a.png", "text": "x"}])
    with pytest.raises(SourceError, match="which column is the image"):
        convert("table", tmp_path / "s", tmp_path / "out", images="none")
    table(tmp_path / "s/mine.csv", [{"image": "a.png", "text": "x"}])
    assert convert("table", tmp_path / "s", tmp_path / "out", images="none").written == 1
    for name in ("dog", "horse"):
        pair = {"image": f"{name}.jpg", "captions": [name, "two"], "label": 1, "references": []}
        write(tmp_path / "t/pascal.json", {"HC": [pair]})
        convert("pascal-50s", tmp_path / "t", tmp_path / "out2", images="none", allow_subset=True)
        assert load_records(tmp_path / "out2", need_images=False).records[0].text == name


def test_bytes_that_are_no_text(tmp_path):
    """In another encoding a caption would be another; it is not taken with question marks in it."""
    write(tmp_path / "s/mine.csv", "image,text\na.png,Caf\u00e9\nb.png,Tea\n".encode("latin-1"))
    done = convert("table", tmp_path / "s", tmp_path / "out", images="none", max_rejected=0.5)
    assert (done.written, done.rejected) == (1, 1)
    assert "text is not valid Unicode at character" in next(iter(done.reasons))
    rows = [{"image": "\ud800.png", "text": "x"}, {"image": "b.png", "text": "y"}]
    write(tmp_path / "t/mine.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write(tmp_path / "t/b.png", picture(1))
    str(convert("table", tmp_path / "t", tmp_path / "out2", max_rejected=0.5)).encode()  # may be printed


def test_rows_that_are_not_of_the_published_form(tmp_path):
    pair = {"image": "a.jpg", "captions": ["one", "two"], "label": 1, "references": []}
    write(tmp_path / "s/pascal.json", {"HC": [pair, {"image": "b.jpg"}]})
    with pytest.raises(SourceError, match="what follows record 2 is not of the published form \\(no 'label'\\)"):
        convert("pascal-50s", tmp_path / "s", tmp_path / "out", images="none")
    flickr_json(tmp_path / "t/flickr8k.json", [[1, 2, "three"]])
    with pytest.raises(SourceError, match="what follows record 0 .*could not convert string to float: 'three'"):
        convert("flickr8k-expert", tmp_path / "t", tmp_path / "out2", images="none")


def test_wrong_counts(tmp_path):
    with pytest.raises(SourceError, match=r"3 records of Polaris \(test\), but 26,122 were published.*--allow_subset"):
        convert("polaris", polaris(tmp_path / "s"), tmp_path / "out")


def test_all_splits_are_counted_only_where_each_is_known(tmp_path):
    row = {"prompt_id": "p", "prompt": "x", "rank": 1, "overall_rating": 4, "image": hub_image(1)}
    for name in ("train", "test"):
        parquet(tmp_path / f"s/{name}.parquet", [row | {"prompt_id": name}])
    assert convert("imagereward", tmp_path / "s", tmp_path / "out", split="all").written == 2
    with pytest.raises(SourceError, match=r"3 records of Polaris \(all\), but 131,020 were published"):
        convert("polaris", polaris(tmp_path / "t"), tmp_path / "out2", split="all")


def test_bytes_that_are_no_picture(tmp_path):
    polaris(tmp_path / "s", img={"bytes": b"<html>", "path": None})
    with pytest.raises(RecordsError, match=r"(?s)3 of 3 records rejected.*begins with b'<html>'"):
        convert("polaris", tmp_path / "s", tmp_path / "out", allow_subset=True)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    write(tmp_path / "out/thesis.txt", "years of work")
    with pytest.raises(SourceError, match="holds something else than Polaris"):
        convert("polaris", polaris(tmp_path / "s"), tmp_path / "out", allow_subset=True)
    convert("polaris", tmp_path / "s", tmp_path / "out2", allow_subset=True)
    with pytest.raises(SourceError, match=r"holds something else than Polaris \(all\)"):
        convert("polaris", tmp_path / "s", tmp_path / "out2", split="all", allow_subset=True)


def test_what_was_made_before_stays_until_the_new_is_whole(tmp_path):
    convert("polaris", polaris(tmp_path / "s"), tmp_path / "out", allow_subset=True)
    before = (tmp_path / "out/records.jsonl").read_bytes()
    polaris(tmp_path / "s", rows=4)
    with pytest.raises(SourceError, match="26,122 were published"):
        convert("polaris", tmp_path / "s", tmp_path / "out")
    assert (tmp_path / "out/records.jsonl").read_bytes() == before
    assert read_dataset_note(tmp_path / "out")["records"] == 3
    assert not list((tmp_path / "out").glob("*.partial"))
    assert convert("polaris", tmp_path / "s", tmp_path / "out", allow_subset=True).written == 4


def test_what_a_kill_left_is_made_whole(tmp_path):
    class Killed(BaseException):
        pass

    def kill(rows):
        if (tmp_path / "out/images").exists():
            raise Killed

    with pytest.raises(Killed):
        convert("polaris", polaris(tmp_path / "s"), tmp_path / "out", allow_subset=True, advance=kill)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"dataset.json", "images"}
    with pytest.raises(SourceError, match="the conversion did not end; run the same `multitap convert` again"):
        read_dataset_note(tmp_path / "out")
    write(tmp_path / "out/records.jsonl.partial", '{"id": "half')
    (old,) = (tmp_path / "out/images").glob("*/*.png")
    write(old.with_name(old.name + ".partial"), b"half")
    old.write_bytes(b"torn")
    done = convert("polaris", tmp_path / "s", tmp_path / "out", allow_subset=True)
    assert (done.written, len(load_records(tmp_path / "out", check_images=True).records)) == (3, 3)


def test_public_files_in_the_place_of_records_are_recognised(tmp_path):
    """Whatever form they have: the message says how they become records."""
    table(tmp_path / "csv/polaris_test.csv", [{"mt": "x", "refs": "[]", "score": "0", "imgid": "x"}])
    write(tmp_path / "json/test.json", [{"id": "p", "prompt": "x", "generations": ["a"], "ranking": [1]}])
    polaris(tmp_path / "hub")
    row = {"request": "How?", "response": "So.", "image": "a.png"}
    write(tmp_path / "eye.jsonl", json.dumps(row) + "\n")
    for path, name in (
        ("csv/polaris_test.csv", "polaris or --dataset=polaris-star"),
        ("json/test.json", "imagereward"),
        ("json", "imagereward"),
        ("hub", "polaris or --dataset=polaris-star"),
        ("hub/data/test-00000-of-00001.parquet", "polaris or --dataset=polaris-star"),
        ("eye.jsonl", "eye4all-multi"),
    ):
        with pytest.raises(RecordsError) as caught:
            load_records(tmp_path / path)
        asked = f"multitap convert --dataset={name} --source={tmp_path / path} --output=RECORDS"
        assert str(caught.value).endswith(asked), caught.value
    write(tmp_path / "mine.csv", "id,image,text,mood\n")
    for path in ("none.csv", "mine.csv"):
        with pytest.raises(RecordsError) as caught:
            load_records(tmp_path / path)
        assert "convert --dataset" not in str(caught.value)


def test_what_fails_leaves_nothing_but_the_reasons(tmp_path):
    rows = [POLARIS | {"cand": f"cat {i}", "human_score": 1.5 if i < 7 else 0.5} for i in range(20)]
    parquet(tmp_path / "s/test-00000-of-00001.parquet", rows)
    with pytest.raises(
        RecordsError, match=r"(?s)  row 1: human_score 1.5 lies.*and 2 more\n  all of them: .*rejected.jsonl"
    ):
        convert("polaris", tmp_path / "s", tmp_path / "out", allow_subset=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rejected.jsonl"]
    assert len((tmp_path / "out/rejected.jsonl").read_text().splitlines()) == 7
    done = convert("polaris", tmp_path / "s", tmp_path / "out", allow_subset=True, max_rejected=0.5)
    assert (done.written, done.rejected) == (13, 7)
    with pytest.raises(SourceError, match="26,122 were published"):
        convert("polaris", polaris(tmp_path / "t"), tmp_path / "new/out")
    assert not (tmp_path / "new/out").exists()
    write(tmp_path / "mine/thesis.txt", "years of work")
    with pytest.raises(SourceError, match="holds something else"):
        convert("polaris", tmp_path / "t", tmp_path / "mine", allow_subset=True)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="26,122 were published"):
        convert("polaris", tmp_path / "t", tmp_path / "empty")
    assert not list((tmp_path / "empty").iterdir())


def test_rows_are_named_as_their_file_counts_them(tmp_path):
    """Lines of text as an editor shows them, rows of Parquet, entries of JSON; and the file, if there are several."""
    good, bad = {"image": "a.png", "text": "x\ny"}, {"image": "a.png", "text": "x", "score": "many"}
    found = {}
    for suffix, write_rows in (
        ("csv", table),
        ("tsv", lambda path, rows: table(path, rows, "\t")),
        ("jsonl", lambda path, rows: write(path, "".join(json.dumps(row) + "\n\n" for row in rows))),
        ("parquet", parquet),
    ):
        rows = [good | {"score": ""}, bad, good | {"score": ""}, bad]
        write_rows(tmp_path / suffix / f"mine.{suffix}", rows)
        convert("table", tmp_path / suffix, tmp_path / f"out-{suffix}", images="none", max_rejected=0.6)
        lines = (tmp_path / f"out-{suffix}/rejected.jsonl").read_text().splitlines()
        found[suffix] = [json.loads(line)["line"] for line in lines]
        unit = "row" if suffix == "parquet" else "line"
        with pytest.raises(RecordsError, match=f"  {unit} {found[suffix][0]}: score is 'many', not a number"):
            convert("table", tmp_path / suffix, tmp_path / "none", images="none")
    assert found == {"csv": [4, 7], "tsv": [4, 7], "jsonl": [3, 7], "parquet": [2, 4]}
    entry = {"prompt": "p", "image_path": ["a.jpg"], "rank": [1]}
    write(tmp_path / "hpd/test.json", [entry, entry | {"rank": []}])
    with pytest.raises(RecordsError, match="  entry 2: 1 pictures, but 0 judgements"):
        convert("hpdv2", tmp_path / "hpd", tmp_path / "none", images="none")
    write(tmp_path / "hpd/test_two.json", [entry | {"rank": []}])
    with pytest.raises(RecordsError, match=r"  entry 1: test_two.json: 1 pictures"):
        convert("hpdv2", tmp_path / "hpd", tmp_path / "none", images="none")
    parquet(tmp_path / "records.parquet", [good | {"id": "a"}, good | {"id": "b", "text": ""}])
    with pytest.raises(RecordsError, match="  row 2: text is missing"):
        load_records(tmp_path / "records.parquet", need_images=False)


def test_two_at_a_time_are_refused(tmp_path):
    def again(rows):
        convert("polaris", tmp_path / "s", tmp_path / "out", allow_subset=True)

    with pytest.raises(FolderInUseError, match="another process is writing into it"):
        convert("polaris", polaris(tmp_path / "s"), tmp_path / "out", allow_subset=True, advance=again)


def test_an_output_inside_the_source_is_not_read(tmp_path):
    write(tmp_path / "s/mine.jsonl", json.dumps({"image": "a.png", "text": "x"}) + "\n")
    write(tmp_path / "s/a.png", picture(1))
    for _ in range(2):
        assert convert("table", tmp_path / "s", tmp_path / "s/out").written == 1


def test_notes_of_others_are_none_of_ours(tmp_path):
    assert read_dataset_note(tmp_path) is None
    write(tmp_path / "dataset.json", {"name": "theirs"})
    assert read_dataset_note(tmp_path) is None
    write(tmp_path / "dataset.json", "{")
    with pytest.raises(SourceError, match="damaged"):
        read_dataset_note(tmp_path / "records.jsonl")


def test_splits(tmp_path):
    flickr_json(tmp_path / "s/flickr8k.json", [[1, 2, 3]])
    with pytest.raises(SourceError, match="Flickr8k-Expert has one split, test; leave out --split=train"):
        convert("flickr8k-expert", tmp_path / "s", tmp_path / "out", split="train", images="none")
    for name in ("train", "test"):
        write(tmp_path / f"t/{name}.jsonl", json.dumps({"id": name, "image": "a.png", "text": "x"}) + "\n")
    for split, count in (("train", 1), (None, 2), ("all", 2)):
        done = convert("table", tmp_path / "t", tmp_path / f"out-{split}", split=split, images="none")
        assert done.written == count
    with pytest.raises(SourceError, match=r"no file of the split 'tset'.*train \(1\)"):
        convert("table", tmp_path / "t", tmp_path / "out", split="tset", images="none")


def test_columns_are_for_tables(tmp_path):
    with pytest.raises(SourceError, match="--columns is for --dataset=table"):
        convert("polaris", polaris(tmp_path / "s"), tmp_path / "out", columns={"text": "cand"})


def test_the_verb(tmp_path, capsys):
    polaris(tmp_path / "s")
    command = ["convert", "--dataset=polaris", f"--source={tmp_path / 's'}", f"--output={tmp_path / 'out'}"]
    assert main([*command, "--allow-subset"]) == 0
    assert "3 read, 3 written, 0 rejected; 1 pictures" in capsys.readouterr().out
    assert main(command) == 1
    assert "26,122 were published" in capsys.readouterr().err
    table_of = ["convert", "--dataset=table", f"--source={tmp_path / 's'}", f"--output={tmp_path / 'out3'}"]
    assert main([*table_of, "--columns=image=img,text=cand,score=human_score"]) == 0
    assert load_records(tmp_path / "out3").records[0].score == 0.25
    assert main([*table_of, "--columns=text"]) == 1
    assert "'text' is not RECORD=FILE" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert "polaris  Polaris (train 78,630, validation 26,268, test* 26,122)" in capsys.readouterr().out
