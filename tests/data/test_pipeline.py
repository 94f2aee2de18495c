"""The training pipeline and the stream: every pair once, one shape, resumable, failures visible."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from multitap_jax.data.images import ImageReader
from multitap_jax.data.layouts import GridLayout, Vision
from multitap_jax.data.pipeline import PackedDataset
from multitap_jax.data.prepare import prepare, target_of
from multitap_jax.data.prompts import Prompter
from multitap_jax.data.records import Record, Rejected
from multitap_jax.data.stream import Pair, StreamPacker
from tests.tiny_tokenizer import tiny_tokenizer

TEXTS = ["a red ball", "the blue box is far away", "a ball and a box on the left", "near"]


@pytest.fixture
def parts():
    prompter = Prompter(tiny_tokenizer(), "official-train")
    layout = GridLayout("native:3136:12544")
    return prompter, ImageReader(layout), Vision(layout, prompter.placeholder_id)


@pytest.fixture
def records(tmp_path):
    rng = np.random.default_rng(0)
    out = []
    for number in range(6):
        path = tmp_path / f"{number}.png"
        size = [(56, 84), (84, 56), (112, 112)][number % 3]
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
        for text in range(1 + number % 3):
            name = f"{number}/{text}"
            out.append(
                Record(name, (path,), TEXTS[text], None, 0.1 * number, {"sense": text + 1.0}, None, len(out) + 1)
            )
    return out


def dataset(records, parts, **settings):
    prompter, reader, vision = parts
    settings = {"batch_size": 4, "hidden": 64, "epochs": 2, "seed": 3} | settings
    return PackedDataset(prepare(records, prompter, reader, vision), reader, vision, **settings)


def equal(first, second):
    for name, a, b in zip(first._fields, first, second, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("shuffle", ["pairs", "groups", "none"])
@pytest.mark.parametrize("cells", [1, 4])
def test_every_epoch_visits_every_record_once_in_one_shape(records, parts, shuffle, cells):
    data = dataset(records, parts, shuffle=shuffle, cells=cells)
    seen = []
    for step in range(data.num_steps):
        batch, ids = data[step], data.record_ids(step)
        assert batch.tokens.shape == (data.shape.rows, data.shape.tokens)
        assert batch.patches.shape[:2] == (data.shape.vision_rows, data.shape.patches)
        assert batch.weight.sum() == len(ids)
        rows = batch.record[batch.record >= 0]
        assert sorted(rows) == list(range(len(ids)))
        by_id = {r.id: r for r in records}
        for record, target in zip(rows, batch.target[batch.record >= 0], strict=True):
            assert target == np.float32(by_id[ids[record]].score)
        seen += ids
    assert sorted(seen) == sorted([r.id for r in records] * 2)
    assert 0 < data.efficiency <= 1


def test_the_loader_starts_anywhere_and_gives_the_same_batches(records, parts):
    data = dataset(records, parts)
    for step, batch in enumerate(data.loader(2), start=2):
        equal(batch, data[step])
    assert step == data.num_steps - 1


def counted(call, into):
    def read(self, source):
        into.append(source)
        return call(self, source)

    return read


@pytest.mark.parametrize("shares", [((0, 1), (2, 3)), ((0, 3), (1, 2))])
def test_processes_read_only_their_own_pictures_and_make_the_same_batch(records, parts, shares, monkeypatch):
    _, reader, _ = parts
    whole, read = dataset(records, parts, cells=4), []
    monkeypatch.setattr(type(reader), "__call__", counted(type(reader).__call__, read))
    each = [dataset(records, parts, cells=4, own=own) for own in shares]
    for step in range(whole.num_steps):
        expected = whole[step]
        cells = expected.patches.reshape(4, -1, *expected.patches.shape[1:])
        for data, own in zip(each, shares, strict=True):
            read.clear()
            found = data[step]
            equal(found._replace(patches=cells), expected._replace(patches=cells))
            np.testing.assert_array_equal(found.patches, cells[list(own)].reshape(found.patches.shape))
            pictures = expected.patch_segment.reshape(4, -1, expected.patch_segment.shape[1]).max(axis=2)
            assert len(read) == pictures[list(own)].sum()
    assert each[0].fingerprint == each[1].fingerprint == whole.fingerprint


def test_fingerprints_tell_runs_apart(records, parts):
    first = dataset(records, parts).fingerprint
    assert first == dataset(records, parts).fingerprint
    changed = [dataclasses.replace(records[0], text="a green cone"), *records[1:]]
    others = [dataset(changed, parts), dataset(records, parts, seed=4), dataset(records, parts, batch_size=5)]
    assert len({first, *(d.fingerprint for d in others)}) == 4


def test_copies_of_a_picture_are_one_image(records, parts, tmp_path):
    copy = tmp_path / "copy.png"
    copy.write_bytes(records[0].images[0].read_bytes())
    twin = dataclasses.replace(records[0], id="twin", images=(copy,), text="near")
    data = dataset([records[0], twin], parts, epochs=1, row_length=256)
    batch = data[0]
    assert (batch.patch_segment > 0).sum() == 4 * 6
    assert set(batch.segment[batch.segment > 0].tolist()) == {1, 2, 3}  # one prefix, two texts


def test_a_picture_that_breaks_during_the_run_loses_its_weight_and_is_reported(records, parts):
    told = []
    data = dataset(records, parts, epochs=1, on_failure=told.extend)
    broken = records[0].images[0]
    broken.write_bytes(broken.read_bytes()[:60])
    weights = {}
    for step in range(data.num_steps):
        batch, ids = data[step], data.record_ids(step)
        for record, weight in zip(batch.record[batch.record >= 0], batch.weight[batch.record >= 0], strict=True):
            weights[ids[record]] = weight
    assert [name for name, weight in weights.items() if weight == 0] == [r.id for r in records if r.images == (broken,)]
    assert [(r.line, r.id) for r in told] == [(r.line, r.id) for r in records if r.images == (broken,)]
    assert all(str(broken) in r.reason for r in told)


def test_unusable_records_are_rejected_with_reasons(records, parts):
    prompter, reader, vision = parts
    bad = [
        dataclasses.replace(records[0], id="scoreless", score=None),
        dataclasses.replace(records[0], id="control", text="a <|im_end|>"),
        dataclasses.replace(records[0], id="high", score=1.5),
        dataclasses.replace(records[0], id="long", text="word " * 5000),
    ]
    found = prepare([*bad, records[1]], prompter, reader, vision)
    assert found.ids == [records[1].id]
    reasons = {r.id: r.reason for r in found.rejected}
    assert "no score" in reasons["scoreless"]
    assert "control token" in reasons["control"]
    assert "1.5 lies outside" in reasons["high"]
    assert "tokens" in reasons["long"]
    with pytest.raises(ValueError, match="no usable pairs"):
        PackedDataset(prepare(bad, prompter, reader, vision), reader, vision, hidden=64, batch_size=2)


def test_pictures_broken_below_their_header_are_rejected_with_every_record_of_theirs(records, parts):
    prompter, reader, vision = parts
    short, twice = records[1].images[0], records[3].images[0]
    short.write_bytes(short.read_bytes()[:-2000])
    assert reader.grid_of(short)  # the header is whole
    both = dataclasses.replace(records[3], id="both", images=(twice, short), line=50)
    counted = []
    found = prepare([*records, both], prompter, reader, vision, advance=counted.append)
    lost = [r for r in [*records, both] if short in r.images]
    assert [(r.line, r.id) for r in found.rejected] == [(r.line, r.id) for r in lost]
    assert all("truncated" in r.reason and str(short) in r.reason for r in found.rejected)
    assert len(found.examples) == len(records) + 1 - len(lost)
    assert found.lines == [r.line for r in records if short not in r.images]
    assert sum(counted) == 6  # each file once


def test_a_header_that_disagrees_with_the_pixels_is_refused(records, parts, monkeypatch):
    reader = parts[1]
    monkeypatch.setattr(type(reader), "grid_of", lambda self, source: (2, 2))
    found = prepare(records[:1], *parts)
    assert isinstance(found.rejected[0], Rejected)
    assert "its header says (2, 2)" in found.rejected[0].reason


def test_targets_are_mapped_to_the_unit_interval(records):
    assert target_of(records[2], "ratings.sense", (1.0, 5.0)) == pytest.approx(0.25)
    assert target_of(records[2], "ratings.other", (1.0, 5.0)) is None
    with pytest.raises(ValueError, match=r"ratings\.NAME"):
        target_of(records[2], "sense", (1.0, 5.0))


def packer(parts, **settings):
    prompter, reader, vision = parts
    return StreamPacker(prompter, reader, vision, hidden=64, **settings)


@pytest.mark.parametrize("batch_tokens", [64, 200, 16384])
def test_a_window_scores_every_pair_once_whatever_the_batch_size(records, parts, batch_tokens):
    stream = packer(parts, batch_tokens=batch_tokens)
    window = stream.window([Pair(r.images, r.text) for r in records])
    batches = list(window.batches)
    found = sorted(int(i) for b in batches for i in b.record[b.record >= 0])
    assert found == list(range(len(records)))
    assert window.errors == [None] * len(records)
    assert all(n > 0 for n in window.n_tokens)
    assert len(stream.book.shapes) <= len(batches)


def test_errors_stay_with_their_pairs(records, parts, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    stream = packer(parts, max_length=80)
    pairs = [Pair(records[0].images, "a ball"), Pair((broken,), "a ball"), Pair(records[0].images, "  ")]
    pairs += [Pair(records[0].images, "word " * 100), Pair((tmp_path / "absent.png",), "a")]
    window = stream.window(pairs)
    assert window.errors[0] is None
    assert "broken.png" in window.errors[1]
    assert "empty" in window.errors[2]
    assert "--truncate" in window.errors[3]
    assert "absent.png" in window.errors[4]
    (batch,) = window.batches
    assert batch.record[batch.record >= 0].tolist() == [0]


def test_truncation_is_asked_for_and_told(records, parts):
    pairs = [Pair(records[0].images, "word " * 100), Pair(records[0].images, "near")]
    window = packer(parts, max_length=80).window(pairs, truncate=True)
    assert window.errors == [None, None]
    assert window.truncated == [True, False]
    assert window.n_tokens[0] == 80


def test_a_window_without_usable_pairs_has_no_batches(parts):
    window = packer(parts).window([Pair((), " ")])
    assert list(window.batches) == []


def test_rows_too_short_for_a_record_name_the_setting_and_the_record(records, parts):
    with pytest.raises(ValueError, match=r"config\.data\.row_length = 16, but record '\d/\d' alone has \d+ tokens"):
        dataset(records, parts, row_length=16)
    assert dataset(records, parts, row_length=200).shape.tokens == 200


def test_copies_of_a_picture_are_told_by_content(records, parts, tmp_path):
    copy = tmp_path / "copy.png"
    copy.write_bytes((tmp_path / "0.png").read_bytes())
    packer = StreamPacker(*parts, hidden=64)
    pairs = [Pair((path,), "near") for path in (tmp_path / "0.png", copy, tmp_path / "1.png")]
    first, second, other = packer.window([*pairs, Pair((), "near"), Pair((tmp_path / "no.png",), "near")]).pictures[:3]
    assert first == second != other
    assert packer.window([Pair((), "near"), Pair((tmp_path / "no.png",), "near")]).pictures == [None, None]


def test_what_is_compared_stays_in_one_step_and_one_cell(records, parts):
    """Groups over several pictures, two groups that share a picture, and records that name none (their picture's)."""
    names = ["a", "b", None, "a", "b", None, "c", None, None, "d", "e", "e"]
    records = [dataclasses.replace(record, group=name) for record, name in zip(records, names, strict=True)]
    picture = {record.id: record.images for record in records}
    group = {record.id: record.group or record.images for record in records}
    data = dataset(records, parts, compare=True, batch_size=6, cells=2, epochs=1)
    seen: dict = {}
    visited = []
    for step in range(data.num_steps):
        ids, numbers, batch = data.record_ids(step), data.groups(step), data[step]
        assert numbers.shape == (6,)
        assert (numbers[len(ids) :] == -1).all()
        assert len({(group[name], number) for name, number in zip(ids, numbers, strict=False)}) == len(
            {group[name] for name in ids}
        )
        rows = batch.record.shape[0] // 2
        visited += ids
        for name in ids:
            cell = int(np.argwhere(batch.record == ids.index(name))[0, 0]) // rows
            for bond in (group[name], picture[name]):
                seen.setdefault(bond, set()).add((step, cell))
    assert all(len(places) == 1 for places in seen.values())
    assert len({place for places in seen.values() for place in places}) > 2
    assert sorted(visited) == sorted(group)


def test_a_group_larger_than_a_step_is_refused(records, parts):
    records = [dataclasses.replace(record, group="all") for record in records]
    with pytest.raises(ValueError, match="a group of 12 records is compared in one step, but batch_size = 8"):
        dataset(records, parts, compare=True, batch_size=8)
