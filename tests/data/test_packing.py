"""A packed batch says the same as each pair alone: tokens, positions, visibility, images, and every pair once."""

import numpy as np
import pytest

from multitap_jax.data.images import ImagePatches
from multitap_jax.data.layouts import GridLayout, Vision
from multitap_jax.data.packing import Example, Shape, group_examples, pack
from multitap_jax.data.placement import need, place
from multitap_jax.data.positions import expand_prefix

IMAGE = 99
LAYOUT = GridLayout("native:4:4096", patch_size=2, merge_size=2)
VISION = Vision(LAYOUT, IMAGE)


def picture(rng, rows, columns, key):
    return ImagePatches(rng.integers(0, 255, (rows * columns, 12), dtype=np.uint8), (rows, columns), key)


def world(seed=0):
    rng = np.random.default_rng(seed)
    images = {"a": picture(rng, 4, 6, "a"), "b": picture(rng, 2, 2, "b"), "c": picture(rng, 8, 4, "c")}

    def words(n):
        return rng.integers(1, 90, n).astype(np.int32)

    prefix = np.array([1, 2, IMAGE, 3], np.int32)
    double = np.array([1, IMAGE, 4, IMAGE, 3], np.int32)
    examples = [Example(prefix, words(5), ("a",), 0.1), Example(prefix, words(7), ("b",), 0.2)]
    examples += [Example(prefix, words(n), ("a",), 0.3) for n in (3, 9, 4)]
    examples += [Example(double, words(6), ("c", "b"), 0.4), Example(np.array([7, 8], np.int32), words(4), (), 0.5)]
    return examples, images


def packed(examples, images, cells=1, row_length=64):
    grids = {key: image.grid for key, image in images.items()}
    patches = {key: len(image.patches) for key, image in images.items()}
    groups, prefixes = group_examples(examples, grids, VISION)
    placed = place(groups, patches, row_length=row_length, max_texts=4, vision_length=32, cells=cells)
    wanted = need(placed)
    shape = Shape(wanted.rows * cells, row_length, 4, wanted.vision_rows * cells, 32)
    return pack(examples, images, groups, prefixes, placed, shape, VISION)


def alone(example, images, mode="mrope"):
    """What one pair is without packing: tokens, positions, and the patches behind each image token."""
    grids = [images[key].grid for key in example.images]
    tokens, positions, cell, start = expand_prefix(example.prefix, grids, Vision(LAYOUT, IMAGE, mode))
    at = np.repeat(np.arange(start, start + len(example.text))[:, None], 3, axis=1)
    pixels = np.concatenate(
        [images[key].patches.reshape(-1, 4, 12) for key in example.images] or [np.zeros((0, 4, 12))]
    )
    seen = [pixels[c] if c >= 0 else None for c in [*cell, *[-1] * len(example.text)]]
    return np.concatenate([tokens, example.text]), np.concatenate([positions, at]), seen


@pytest.mark.parametrize("cells", [1, 2, 4])
def test_what_each_text_sees_is_the_pair_alone(cells):
    examples, images = world()
    batch = packed(examples, images, cells)
    visited = []
    for row, slot in np.argwhere(batch.record >= 0):
        example = examples[batch.record[row, slot]]
        last = batch.pool[row, slot]
        column = np.arange(batch.tokens.shape[1])
        segment, prefix = batch.segment[row], batch.prefix[row]
        visible = (column <= last) & ((segment == segment[last]) | (segment == prefix[last]))
        tokens, positions, pixels = alone(example, images)
        np.testing.assert_array_equal(batch.tokens[row, visible], tokens)
        np.testing.assert_array_equal(batch.positions[row, visible], positions)
        patches = batch.patches.reshape(-1, 4, 12)
        for cell, pixel in zip(batch.image_cell[row, visible], pixels, strict=True):
            assert (cell < 0) == (pixel is None)
            if pixel is not None:
                np.testing.assert_array_equal(patches[cell], pixel)
        # Prefix tokens see only the prefix, so sharing it is exact.
        inside = visible & (segment == prefix[last])
        assert np.all(prefix[inside] == segment[inside])
        assert batch.target[row, slot] == np.float32(example.target)
        assert batch.weight[row, slot] == 1
        visited.append(int(batch.record[row, slot]))
    assert sorted(visited) == list(range(len(examples)))
    assert batch.weight.sum() == len(examples)


@pytest.mark.parametrize("cells", [1, 2, 4])
def test_rows_use_only_images_of_their_own_cell(cells):
    examples, images = world()
    batch = packed(examples, images, cells)
    row_cells = batch.patches.shape[1] // 4
    vision_cell = batch.image_cell // (row_cells * (batch.patches.shape[0] // cells))
    row_of = np.arange(batch.tokens.shape[0]) // (batch.tokens.shape[0] // cells)
    where = batch.image_cell >= 0
    np.testing.assert_array_equal(vision_cell[where], np.broadcast_to(row_of[:, None], where.shape)[where])


def test_each_image_is_laid_out_once_and_a_prefix_once_per_row():
    examples, images = world()
    batch = packed(examples, images)
    used = sum(len(image.patches) for image in images.values())
    assert (batch.patch_segment > 0).sum() == used
    starts = (batch.tokens == 1) & (batch.segment == batch.prefix) & (batch.segment > 0)
    assert starts.sum() == 3  # one prefix for image a (4 texts), one for b, one for c and b


def test_padding_is_marked_everywhere():
    examples, images = world()
    batch = packed(examples, images)
    pad = batch.segment == 0
    assert np.all(batch.tokens[pad] == 0)
    assert np.all(batch.prefix[pad] == 0)
    assert np.all(batch.image_cell[pad] == -1)
    assert np.all(batch.weight[batch.record < 0] == 0)


def test_patch_positions_are_block_major():
    assert LAYOUT.patch_positions((2, 4)).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]


def test_mrope_and_flat_positions_by_hand():
    prefix = np.array([5, IMAGE, 6], np.int32)
    tokens, positions, cell, start = expand_prefix(prefix, [(4, 6)], VISION)
    assert tokens.tolist() == [5, *[IMAGE] * 6, 6]
    assert positions.tolist() == [
        [0, 0, 0], [1, 1, 1], [1, 1, 2], [1, 1, 3], [1, 2, 1], [1, 2, 2], [1, 2, 3], [4, 4, 4]
    ]  # fmt: skip
    assert cell.tolist() == [-1, 0, 1, 2, 3, 4, 5, -1]
    assert start == 5
    assert expand_prefix(prefix, [(4, 6)], Vision(LAYOUT, IMAGE, "flat"))[1][:, 1].tolist() == list(range(8))


@pytest.mark.parametrize(("grids", "mode"), [([], "mrope"), ([(2, 2), (2, 2)], "mrope"), ([(2, 2)], "mrop")])
def test_wrong_prompts_are_refused(grids, mode):
    with pytest.raises(ValueError, match=r"placeholders|mode"):
        expand_prefix(np.array([5, IMAGE, 6], np.int32), grids, Vision(LAYOUT, IMAGE, mode))
