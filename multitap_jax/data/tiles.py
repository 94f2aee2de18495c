"""Pictures as tiles of one size (Llama-3.2-Vision): the image processor's canvas, cut up and filled up to T tiles.

The rules are those of transformers' MllamaImageProcessor, to the same float operations and the same rounding.
"""

import math

import numpy as np
from PIL import Image

from multitap_jax.data.decode import ImageError
from multitap_jax.data.layouts import Grid, ImagePolicy, Layout, check_kind, patchify


class TileLayout(Layout):
    """A canvas of tiles, as many high and wide as suit the picture; the backbone keeps images out of the row.

    The grid is (tiles high, tiles wide). Patches come tile after tile (row-major), row-major inside a tile; T - high *
    wide tiles of padding follow, whose positions are 0. The picture stands in the canvas's upper left corner, keeps its
    aspect ratio, and is padded with zeros. "square:SIDE" first stretches every picture to SIDE x SIDE, bicubic, as the
    official evaluation does; with SIDE equal to that of a tile it then is one tile.

    Args:
      policy: an ImagePolicy or its text.
      tile_size: pixels a side of a tile.
      max_tiles: T, tiles of an image, padding included.
      patch_size: pixels a side of a patch.
      resample: filter of the second resize.

    Raises:
      ImageError: a policy of another kind, or one with more tiles than the model has.
    """

    apart = True

    def __init__(
        self,
        policy: ImagePolicy | str,
        tile_size: int = 560,
        max_tiles: int = 4,
        patch_size: int = 14,
        resample: Image.Resampling = Image.Resampling.BILINEAR,
    ):
        self.policy = ImagePolicy.parse(policy) if isinstance(policy, str) else policy
        check_kind(self.policy, "square", "tiles")
        self.tile_size, self.max_tiles, self.patch_size, self.resample = tile_size, max_tiles, patch_size, resample
        self.side = tile_size // patch_size
        self.block = (max_tiles * self.side**2, 1)
        self.tiles = max_tiles if self.policy.kind == "square" else self.policy.numbers[0]
        if self.tiles > max_tiles:
            raise ImageError(f"image policy {self.policy}: this model has {max_tiles} tiles; write tiles:{max_tiles}")

    def grid(self, height: int, width: int) -> Grid:
        if self.policy.kind == "square":
            height = width = self.policy.numbers[0]
        return best_canvas(height, width, self.tile_size, self.tiles)

    def cut(self, image: Image.Image, grid: Grid) -> np.ndarray:
        if self.policy.kind == "square":
            image = image.resize((self.policy.numbers[0],) * 2, Image.Resampling.BICUBIC)
        (high, wide), side = grid, self.tile_size
        height, width = fit(image.height, image.width, high * side, wide * side, side)
        canvas = np.zeros((high * side, wide * side, 3), np.uint8)
        canvas[:height, :width] = np.asarray(image.resize((width, height), self.resample))
        # Tiles one above the other are a picture whose patches in row-major order are those of tile after tile.
        tall = canvas.reshape(high, side, wide, side, 3).transpose(0, 2, 1, 3, 4).reshape(-1, side, 3)
        real = patchify(tall, self.patch_size, 1)
        return np.concatenate([real, np.zeros((self.block[0] - len(real), real.shape[1]), np.uint8)])

    def num_patches(self, grid: Grid) -> int:
        return self.block[0]

    def patch_positions(self, grid: Grid) -> np.ndarray:
        (high, wide), side = grid, self.side
        index = np.stack(np.meshgrid(np.arange(high * side), np.arange(wide * side), indexing="ij"), axis=-1)
        tiles = index.reshape(high, side, wide, side, 2).transpose(0, 2, 1, 3, 4).reshape(-1, 2)
        return np.pad(tiles, [(0, self.block[0] - len(tiles)), (0, 0)]).astype(np.int32)

    def real_patches(self, grid: Grid) -> np.ndarray:
        return np.arange(self.block[0]) < grid[0] * grid[1] * self.side**2

    def token_cells(self, grid: Grid) -> np.ndarray:
        return np.zeros(1, np.int32)


def best_canvas(height: int, width: int, tile: int, max_tiles: int) -> tuple[int, int]:
    """(tiles high, tiles wide): the least enlargement there is, else the least reduction; then the smallest area."""
    sides = range(1, max_tiles + 1)
    canvases = [(high, wide) for high in sides for wide in sides if high * wide <= max_tiles]
    scales = [min(high * tile / height, wide * tile / width) for high, wide in canvases]
    best = min((scale for scale in scales if scale >= 1), default=max(scales))
    equal = [canvas for canvas, scale in zip(canvases, scales, strict=True) if scale == best]
    return min(equal, key=lambda canvas: canvas[0] * canvas[1])


def fit(height: int, width: int, canvas_height: int, canvas_width: int, tile: int) -> tuple[int, int]:
    """(height, width) of the picture in its canvas: it fits, keeps its aspect ratio, and fills at least one tile."""
    target_height, target_width = max(min(height, canvas_height), tile), max(min(width, canvas_width), tile)
    scale_height, scale_width = target_height / height, target_width / width
    if scale_width < scale_height:
        return min(math.floor(height * scale_width) or 1, target_height), target_width
    return target_height, min(math.floor(width * scale_height) or 1, target_width)
