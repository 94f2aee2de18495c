"""What a model has seen is told by content: by pair, then picture, then group, then id."""

import dataclasses
import shutil

import numpy as np
import pytest
from PIL import Image

from multitap_jax.data.records import Record
from multitap_jax.data.seen import FITTED, KINDS, TRAINED, Seen, from_bytes, print_of, prints_of, to_bytes, told


def record(name, images, text="a car", request=None, group=None):
    return Record(name, tuple(images), text, request, None, {}, group, 1)


@pytest.fixture
def pictures(tmp_path):
    """Three pictures; the fourth file is a copy of the first."""
    for number, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (4, 4), color).save(tmp_path / f"{number}.png")
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "0.png", tmp_path / "elsewhere" / "copy.png")
    return [tmp_path / "0.png", tmp_path / "1.png", tmp_path / "2.png", tmp_path / "elsewhere" / "copy.png"]


def places(found):
    return {kind: where.tolist() for kind, where in found.items() if len(where)}


def test_a_record_is_known_again_by_the_strongest_of_what_it_shares(pictures):
    red, green, blue, copy = pictures
    seen = Seen.of(prints_of([record("a", [red], group="g"), record("b", [green, red], "two cars")]))
    judged = [
        record("renamed", [copy]),
        record("a", [copy], "a dog", group="g"),
        record("c", [red], request="Describe the car."),
        record("d", [blue], group="g"),
        record("b", [blue]),
        record("e", [blue], group="h"),
        record("f", [copy, green], "two cars"),
    ]
    found = places(seen.among(prints_of(judged)))
    assert found == {"pair": [0], "pictures": [1, 2, 6], "group": [3], "id": [4]}


def test_it_agrees_with_a_slow_search():
    rng = np.random.default_rng(0)

    def draw(number):
        hashes = [f"{value:016x}{0:048x}" for value in rng.integers(0, 30, int(rng.integers(1, 3)))]
        group = f"g{rng.integers(0, 40)}" if rng.random() < 0.5 else None
        one = record(f"r{rng.integers(0, 60)}", [f"{number}.png"], f"text {rng.integers(0, 2)}", group=group)
        return print_of(one, [None] if rng.random() < 0.2 else hashes)

    known, judged = [draw(number) for number in range(20)], [draw(number) for number in range(200)]
    slow = {kind: [] for kind in KINDS}
    for place, one in enumerate(judged):
        shared = {
            "pair": one.pair is not None and any(one.pair == other.pair for other in known),
            "pictures": any(set(one.pictures) & set(other.pictures) for other in known),
            "group": one.group is not None and any(one.group == other.group for other in known),
            "id": any(one.id == other.id for other in known),
        }
        if first := next((kind for kind in KINDS if shared[kind]), None):
            slow[first].append(place)
    assert all(slow.values())
    assert {kind: where.tolist() for kind, where in Seen.of(known).among(judged).items()} == slow


def test_names_of_different_kinds_are_not_mixed_up(pictures):
    seen = Seen.of(prints_of([record("x", [pictures[0]], group="y")]))
    assert not places(seen.among(prints_of([record("y", [pictures[1]], group="x")])))


def test_sets_merge_and_survive_a_file(pictures):
    red, green, blue, _ = pictures
    first, second = (Seen.of(prints_of([record(name, [path])])) for name, path in (("a", red), ("b", green)))
    both = first | second
    assert places(both.among(prints_of([record("1", [red]), record("2", [green]), record("3", [blue])]))) == {
        "pair": [0, 1]
    }
    back = from_bytes(to_bytes({TRAINED: both, FITTED: first}), "file")
    for who, seen in ((TRAINED, both), (FITTED, first)):
        for kind, kept in zip(KINDS, seen, strict=True):
            assert kept.dtype == np.uint64
            np.testing.assert_array_equal(getattr(back[who], kind), kept)
    assert from_bytes(to_bytes({}), "file") == {}
    with pytest.raises(ValueError, match="file: damaged, or no hashes"):
        from_bytes(to_bytes({TRAINED: both})[:-3], "file")


def test_it_is_told_with_counts_and_examples(pictures, tmp_path):
    red, green, *_ = pictures
    train = [record(f"t{number}", [red], f"text {number}", group="g") for number in range(5)]
    known = {TRAINED: Seen.of(prints_of(train)), FITTED: Seen.of(prints_of(train[:1]))}
    judged = [dataclasses.replace(one, id=f"e{number}") for number, one in enumerate(train)]
    judged += [record("new", [green]), record("gone", [tmp_path / "gone.png"], group="g")]
    lines = told(known, [one.id for one in judged], prints_of(judged))
    assert lines[0] == (
        "5 of 7 records were among those that the model was trained on: how they are judged says nothing of new ones "
        "(e0, e1, e2 and 2 more)"
    )
    assert lines[1].startswith("1 of 7 records are of one group with records that the model was trained on")
    assert lines[1].endswith("(gone)")
    assert lines[2].startswith("1 of 7 records were among those that the heads were fitted on")
    assert lines[3].startswith("4 of 7 records show pictures of records that the heads were fitted on")
    assert lines[-1].startswith("1 of 7 records have no pictures here")
    assert told({}, ["gone"], prints_of(judged[-1:])) == ()
    assert told(known, ["new"], prints_of(judged[-2:-1])) == ()
