"""Tiles equal those of the image processor bit for bit."""

import numpy as np
import pytest
from PIL import Image
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from multitap_jax.backbones.mllama_vision import arrangements
from multitap_jax.data.decode import ImageError
from multitap_jax.data.images import ImageReader
from multitap_jax.data.layouts import GridLayout, Vision
from multitap_jax.data.positions import expand_prefix
from multitap_jax.data.tiles import TileLayout

TILE, PATCH = 28, 7
SIZES = [
    (28, 28), (1, 1), (3, 400), (400, 3), (27, 29), (29, 27), (56, 56), (57, 56), (84, 28), (28, 112), (113, 28),
    (55, 111), (200, 300), (300, 200), (31, 95), (10, 150), (64, 70), (42, 42), (14, 56), (1000, 999),
]  # fmt: skip


def picture(height, width):
    rng = np.random.default_rng([height, width])
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def processor(max_tiles=4, side=TILE):
    """Its output before rescaling and normalisation."""
    return MllamaImageProcessorPil(
        size={"height": side, "width": side}, max_image_tiles=max_tiles, do_rescale=False, do_normalize=False
    )


def tiles_of(patches, tiles, side, patch):
    """[P, F] patches, tile after tile -> [T, 3, S, S]."""
    count = side // patch
    cut = patches.reshape(tiles, count, count, 3, patch, patch)
    return cut.transpose(0, 3, 1, 4, 2, 5).reshape(tiles, 3, side, side)


def assert_equal_to_processor(layout, image, source=None):
    theirs = processor(layout.max_tiles, layout.tile_size)([[source or image]], return_tensors="np")
    grid = layout.grid(image.height, image.width)
    ours = layout.cut(image, grid)
    assert ours.dtype == np.uint8
    assert len(ours) == layout.num_patches(grid)
    pixels = theirs["pixel_values"][0, 0]
    np.testing.assert_array_equal(tiles_of(ours, layout.max_tiles, layout.tile_size, layout.patch_size), pixels)
    real = layout.real_patches(grid).reshape(layout.max_tiles, -1)
    np.testing.assert_array_equal(real.all(axis=1), real.any(axis=1))
    np.testing.assert_array_equal(real[:, 0], theirs["aspect_ratio_mask"][0, 0].astype(bool))
    assert arrangements(layout.max_tiles).index(grid) + 1 == theirs["aspect_ratio_ids"][0, 0]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tiles_equal_the_processors(size):
    assert_equal_to_processor(TileLayout("tiles:4", TILE, 4, PATCH), picture(*size))


def test_many_sizes_choose_the_processors_canvas():
    layout, theirs = TileLayout("tiles:4", 560, 4, 14), processor(4, 560)
    rng = np.random.default_rng(0)
    from transformers.models.mllama.image_processing_pil_mllama import get_optimal_tiled_canvas

    for height, width in (*rng.integers(1, 3000, (500, 2)), *rng.integers(1, 12, (100, 2)) * 280):
        expected = get_optimal_tiled_canvas(int(height), int(width), theirs.max_image_tiles, 560)
        assert layout.grid(int(height), int(width)) == tuple(int(side) // 560 for side in expected)


def test_other_numbers_of_tiles():
    assert_equal_to_processor(TileLayout("tiles:6", TILE, 6, PATCH), picture(60, 90))
    assert_equal_to_processor(TileLayout("tiles:1", TILE, 1, PATCH), picture(60, 90))
    few = TileLayout("tiles:2", TILE, 4, PATCH)
    assert {few.grid(*size) for size in SIZES} == {(1, 1), (1, 2), (2, 1)}


@pytest.mark.parametrize("side", [28, 40, 20, 100])
def test_squares_are_what_the_official_evaluation_does(side):
    image = picture(50, 90)
    stretched = image.resize((side, side), Image.Resampling.BICUBIC)
    layout = TileLayout(f"square:{side}", TILE, 4, PATCH)
    assert_equal_to_processor(layout, image, stretched)
    assert (layout.grid(50, 90) == (1, 1)) == (side == TILE or side < TILE)


def test_the_official_square_is_one_tile_of_the_published_size():
    layout = TileLayout("square:560")
    assert layout.grid(480, 640) == (1, 1)
    assert layout.num_patches((1, 1)) == 6400
    assert layout.real_patches((1, 1)).sum() == 1600
    assert layout.num_tokens((1, 1)) == layout.row_cells(6400) == 1


def test_positions_are_those_of_the_whole_canvas():
    layout = TileLayout("tiles:4", TILE, 4, PATCH)
    image = np.arange(56 * 28 * 3, dtype=np.uint8).reshape(56, 28, 3)
    grid = layout.grid(56, 28)
    patches, positions = layout.cut(Image.fromarray(image), grid), layout.patch_positions(grid)
    for patch, (row, column) in zip(patches[: 2 * 16], positions, strict=False):
        at = image[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
        np.testing.assert_array_equal(patch.reshape(3, PATCH, PATCH).transpose(1, 2, 0), at)
    assert not positions[2 * 16 :].any()


def test_the_reader_knows_the_grid_from_the_header(tmp_path):
    picture(60, 90).save(tmp_path / "a.png")
    reader = ImageReader(TileLayout("tiles:4", TILE, 4, PATCH))
    assert reader.grid_of(tmp_path / "a.png") == reader(tmp_path / "a.png").grid == (2, 2)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("native:3136:50176", "square or tiles; choose one"),
        ("tiles:5", "this model has 4 tiles; write tiles:4"),
        ("tiles:0", "is not known"),
        ("tiles:1:2", "tiles:MAX_TILES"),
    ],
)
def test_policies_that_do_not_fit(policy, message):
    with pytest.raises(ImageError, match=message):
        TileLayout(policy)


def test_tiles_are_for_models_with_tiles():
    with pytest.raises(ImageError, match="choose one of them"):
        GridLayout("tiles:4")


def test_pictures_apart_from_each_other_are_refused():
    """With text between them a later token would see the last one only, and no official prompt has that."""
    vision = Vision(TileLayout("tiles:4", TILE, 4, PATCH), 9, "flat")
    tokens, positions, cells, start = expand_prefix(np.array([1, 9, 9, 2]), [(1, 1), (2, 2)], vision)
    np.testing.assert_array_equal(tokens, [1, 9, 9, 2])
    np.testing.assert_array_equal(positions[:, 0], [0, 1, 2, 3])
    np.testing.assert_array_equal(cells, [-1, 0, 1, -1])
    assert start == 4
    with pytest.raises(ValueError, match="next to each other"):
        expand_prefix(np.array([1, 9, 2, 9]), [(1, 1), (2, 2)], vision)
