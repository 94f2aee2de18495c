"""Pictures as tiles of the model's size and a view of the whole (InternLM-XComposer2.5, arXiv 2407.03320).

The published image transformation, to the same rounding: the longer side becomes as many tiles as the picture needs and
the policy allows, the shorter one follows, bilinear, and is filled up with white at its end. The view of the whole is
computed on the device (`backbones/overview.py`); where there is one tile it is the view of the whole, and is encoded
once for both.
"""

import math

import numpy as np
from PIL import Image

from multitap_jax.data.layouts import Grid, ImagePolicy
from multitap_jax.data.views import ViewLayout

WHITE = (255, 255, 255)


class HdLayout(ViewLayout):
    """One view ("square:SIDE") or tiles ("hd:MAX_TILES"), always told twice: as a whole, and as tiles.

    In the row of tokens stand the lines of the whole, a separator, and the lines of the map of tiles; a newline ends
    each line. A block's cells are m x m patches each and, as the last two, a newline and a separator.

    The grid of an hd picture is (tiles down, tiles across). Of more tiles than one the first block is the whole.

    Args:
      policy: an ImagePolicy or its text.
      patch_size, image_size: see `ViewLayout`.
      merge: m, patches a side of a cell.

    Raises:
      ImageError: see `ViewLayout`.
    """

    kinds = ("square", "hd")

    def __init__(self, policy: ImagePolicy | str, patch_size: int, image_size: int, merge: int):
        super().__init__(policy, patch_size, image_size)
        self.cells = self.side // merge
        self.block = (self.side**2, self.cells**2 + 2)
        self.tiled = self.policy.kind == "hd"
        self.coordinates = 4 if self.tiled else 2

    def grid(self, height: int, width: int) -> Grid:
        if not self.tiled:
            return ()
        tall, wide = self._size(height, width)
        down, across = -(-tall // self.image_size), -(-wide // self.image_size)
        return down, across

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that a picture is resized to."""
        if width < height:
            tall, wide = self._size(width, height)
            return wide, tall
        ratio, tiles = width / height, 1
        while tiles * math.ceil(tiles / ratio) <= self.policy.numbers[0]:
            tiles += 1
        wide = min(math.ceil(width / self.image_size), tiles - 1) * self.image_size
        return max(int(wide / ratio), 1), wide

    def cut(self, image: Image.Image, grid: Grid) -> np.ndarray:
        if not self.tiled:
            return super().cut(image, grid)
        (down, across), side = grid, self.image_size
        tall, wide = self._size(image.height, image.width)
        # Turned before it is resized, as published: the filter's rounding depends on which side comes first.
        turned = image.width < image.height
        upright = image.transpose(Image.Transpose.TRANSPOSE) if turned else image
        resized = upright.resize((tall, wide) if turned else (wide, tall), Image.Resampling.BILINEAR)
        canvas = Image.new("RGB", (across * side, down * side), WHITE)
        canvas.paste(resized.transpose(Image.Transpose.TRANSPOSE) if turned else resized, (0, 0))
        corners = [(row * side, column * side) for row in range(down) for column in range(across)]
        tiles = [self._view(canvas.crop((left, top, left + side, top + side))) for top, left in corners]
        whole = [np.zeros_like(tiles[0])] if len(tiles) > 1 else []
        return np.concatenate(whole + tiles)

    def num_patches(self, grid: Grid) -> int:
        return self.block[0] * self._blocks(grid)

    def _blocks(self, grid: Grid) -> int:
        """Views that are encoded."""
        tiles = math.prod(grid)
        return tiles + (tiles > 1)

    def patch_positions(self, grid: Grid) -> np.ndarray:
        """With hd int32[P, 4], where a patch's tile stands (see `batch.py`)."""
        if not self.tiled:
            return super().patch_positions(grid)
        down, across = grid
        places = [(row, down, column, across) for row in range(down) for column in range(across)]
        whole = [(0, 0, 0, 0)] if len(places) > 1 else []
        return np.repeat(np.asarray(whole + places, np.int32), self.block[0], axis=0)

    def token_cells(self, grid: Grid) -> np.ndarray:
        down, across = grid if self.tiled else (1, 1)
        view, side = self.block[1], self.cells
        newline, separator = view - 2, view - 1
        first = self._blocks(grid) - down * across  # block of the first tile
        blocks = (first + np.arange(down * across)).reshape(down, across)
        lines = np.arange(side**2).reshape(side, side)
        tiles = blocks[:, None, :, None] * view + lines[None, :, None, :]
        whole = _with_newlines(lines, newline)
        parts = [whole, np.asarray([separator]), _with_newlines(tiles.reshape(down * side, across * side), newline)]
        return np.concatenate(parts).astype(np.int32)


def _with_newlines(lines: np.ndarray, newline: int) -> np.ndarray:
    """Cells line by line, [rows, columns] -> [rows * (columns + 1)]."""
    return np.concatenate([lines, np.full((len(lines), 1), newline)], axis=1).reshape(-1)
