"""Placement holds its invariants on anything hypothesis thinks of; plans are permutations that never change."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multitap_jax.data.placement import Group, PackingError, need, place
from multitap_jax.data.plan import plan_epoch
from multitap_jax.data.shapes import ROW_LENGTHS, ShapeBook, choose_row_length, round_up

ROW, TEXTS, VISION = 64, 4, 32


@st.composite
def worlds(draw):
    patches = {f"i{n}": 4 * draw(st.integers(1, VISION // 4)) for n in range(draw(st.integers(1, 5)))}
    groups, record = [], 0
    for _ in range(draw(st.integers(1, 8))):
        prefix = draw(st.integers(1, 30))
        sizes = draw(st.lists(st.integers(1, 34), min_size=1, max_size=7))
        images = tuple(draw(st.lists(st.sampled_from(sorted(patches)), max_size=2, unique=True)))
        groups.append(Group(prefix, images, tuple((record + i, size) for i, size in enumerate(sizes))))
        record += len(sizes)
    return groups, patches, record


@given(world=worlds(), cells=st.sampled_from([1, 2, 4]))
@settings(max_examples=150, deadline=None)
def test_every_text_stands_once_and_nothing_overflows(world, cells):
    groups, patches, records = world
    placed = place(groups, patches, row_length=ROW, max_texts=TEXTS, vision_length=VISION, cells=cells)
    assert len(placed) == cells
    seen = [record for cell in placed for row in cell.rows for piece in row for record, _ in piece.texts]
    assert sorted(seen) == list(range(records))
    for cell in placed:
        for row in cell.rows:
            used = sum(groups[p.group].prefix + sum(size for _, size in p.texts) for p in row)
            assert used <= ROW
            assert sum(len(p.texts) for p in row) <= TEXTS
        keys = [key for row in cell.vision for key in row]
        wanted = {key for row in cell.rows for p in row for key in groups[p.group].images}
        assert len(keys) == len(set(keys))
        assert set(keys) == wanted
        assert all(sum(patches[key] for key in row) <= VISION for row in cell.vision)
    assert place(groups, patches, row_length=ROW, max_texts=TEXTS, vision_length=VISION, cells=cells) == placed
    assert need(placed).rows == max(len(c.rows) for c in placed)


def test_a_pair_longer_than_a_row_is_an_error_with_its_lengths():
    with pytest.raises(PackingError, match="60 prefix tokens and 5 text tokens exceed rows of 64"):
        place([Group(60, (), ((0, 5),))], {}, row_length=64, max_texts=4, vision_length=0)


def test_an_image_larger_than_a_vision_row_is_an_error():
    with pytest.raises(PackingError, match="40 patches"):
        place([Group(6, ("a",), ((0, 5),))], {"a": 40}, row_length=64, max_texts=4, vision_length=VISION)


@given(groups=st.lists(st.integers(0, 9), min_size=1, max_size=60), size=st.integers(1, 9), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_a_plan_visits_every_pair_once_and_is_a_pure_function(groups, size, seed):
    for order in ("pairs", "groups", "none"):
        plan = plan_epoch(groups, seed=seed, epoch=1, batch_size=size, shuffle=order)
        again = plan_epoch(groups, seed=seed, epoch=1, batch_size=size, shuffle=order)
        assert [step.tolist() for step in plan] == [step.tolist() for step in again]
        assert sorted(i for step in plan for i in step) == list(range(len(groups)))
        assert all(len(step) == size for step in plan[:-1])


def test_group_order_keeps_groups_together_and_epochs_differ():
    groups = [i % 10 for i in range(60)]
    first = [groups[i] for step in plan_epoch(groups, seed=0, epoch=0, batch_size=6, shuffle="groups") for i in step]
    assert all(len(set(first[i : i + 6])) == 1 for i in range(0, 60, 6))
    second = [groups[i] for step in plan_epoch(groups, seed=0, epoch=1, batch_size=6, shuffle="groups") for i in step]
    assert first != second


def test_the_order_of_a_plan_is_part_of_the_format():
    plan = plan_epoch(list(range(6)), seed=42, epoch=0, batch_size=6, shuffle="pairs")
    assert plan[0].tolist() == PINNED


PINNED = [2, 5, 4, 1, 3, 0]


def test_shapes_stay_few():
    book = ShapeBook(hidden=64)
    for rows in range(1, 40):
        for vision in (0, 1, 7, 8, 9, 30):
            shape = book.fit(rows, 256, vision, 100)
            assert shape.rows >= rows
            assert shape.vision_rows >= vision
    assert len(book.shapes) <= 12 + 6 * 5
    assert all(round_up(n) >= n for n in range(2000))
    assert max(round_up(n) / n for n in range(1, 2000)) <= 1.25


def test_row_length_suits_the_groups():
    short = [Group(10, (), ((i, 12),)) for i in range(50)]
    assert choose_row_length(short, hidden=64, limit=4096) in ROW_LENGTHS[:4]
    long = [Group(500, (), tuple((i, 40) for i in range(6)))]
    assert choose_row_length(long, hidden=64, limit=4096) >= 540


def test_a_row_length_in_use_is_kept_unless_another_saves_a_tenth():
    groups = [Group(100, (), ((i, 20 + i % 7),)) for i in range(100)]
    found = {known: choose_row_length(groups, hidden=512, limit=4096, known=[known]) for known in (160, 256, 512)}
    assert choose_row_length(groups, hidden=512, limit=4096) == 128
    assert found == {160: 128, 256: 256, 512: 128}


def test_crowded_shapes_still_divide_among_cells_and_blocks(monkeypatch):
    monkeypatch.setattr("multitap_jax.data.shapes.LIMIT", 0)
    for cells in (1, 3, 6):
        shape = ShapeBook(hidden=64, cells=cells, block=36).fit(rows=5, tokens=64, vision_rows=3, patches=72)
        assert (shape.rows, shape.vision_rows, shape.patches) == (8 * cells, 4 * cells, 72)
