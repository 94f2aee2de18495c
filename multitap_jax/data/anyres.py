"""Large pictures as a small view of the whole and tiles of a large one (LLaVA-OneVision, arXiv 2408.03326).

Among the allowed resolutions the one is taken that keeps most of the picture and wastes least. The picture is brought
into it with its aspect ratio, on black, and cut into tiles, each a view. The patches of the tiles form one map; what
holds only black is cut off it, it is resized where it is larger than MAX views, and a learned newline ends each row.
Same arithmetic as transformers' image processor and model, to the same rounding, since a token more or less moves every
position that follows. Extra letter: V patches of a view.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from multitap_jax.batch import MIX_UNIT
from multitap_jax.data.decode import ImageError
from multitap_jax.data.layouts import Grid, ImagePolicy
from multitap_jax.data.views import ViewLayout

Size = tuple[int, int]  # height, width


class AnyresLayout(ViewLayout):
    """One view and a newline a picture ("square:SIDE"), or a view and tiles with a newline after each row ("anyres").

    The grid of an anyres picture is (tiles down, tiles across, rows, columns): rows and columns of the map without
    black. A block's cells are its patches and, as the last one, a newline.

    Args:
      policy: an ImagePolicy or its text; "anyres:MAX_TILES" allows the resolutions of at most that many tiles.
      patch_size, image_size: see `ViewLayout`.
      pinpoints: (height, width) of the allowed resolutions in pixels, multiples of image_size.
      max_views: a map of more patches than this many views have is resized to about as many.

    Raises:
      ImageError: see `ViewLayout`; or no resolution has so few tiles.
    """

    kinds = ("square", "anyres")

    def __init__(
        self, policy: ImagePolicy | str, patch_size: int, image_size: int, pinpoints: Sequence[Size], max_views: int
    ):
        super().__init__(policy, patch_size, image_size)
        view = self.side**2
        self.block, self.max_views = (view, view + 1), max_views
        self.tiled = self.policy.kind == "anyres"
        if self.tiled:
            self.coordinates = 6
            limit = self.policy.numbers[0] * image_size**2
            self.pinpoints = [size for size in pinpoints if math.prod(size) <= limit]
            if not self.pinpoints:
                fewest = min(map(math.prod, pinpoints)) // image_size**2
                raise ImageError(f"image policy {self.policy}: this model's pictures have {fewest} tiles or more")

    def grid(self, height: int, width: int) -> Grid:
        if not self.tiled:
            return ()
        tall, wide = best_resolution((height, width), self.pinpoints)
        down, across = tall // self.image_size, wide // self.image_size
        rows, columns = down * self.side, across * self.side
        if width / height > columns / rows:
            rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
        return down, across, rows, columns

    def cut(self, image: Image.Image, grid: Grid) -> np.ndarray:
        views = [self._squeezed(image)]
        if self.tiled:
            (down, across), side = grid[:2], self.image_size
            large = fit_on_black(image, (down * side, across * side))
            corners = [(row * side, column * side) for row in range(down) for column in range(across)]
            views += [large.crop((left, top, left + side, top + side)) for top, left in corners]
        return np.concatenate([self._view(view) for view in views])

    def num_patches(self, grid: Grid) -> int:
        return self.block[0] * (1 + grid[0] * grid[1] if self.tiled else 1)

    def resized(self, grid: Grid) -> Size:
        """Rows and columns of the map of tiles as it stands in the row of tokens."""
        rows, columns = grid[2:]
        ratio = math.sqrt(rows * columns / (self.max_views * self.side**2))
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)

    def patch_positions(self, grid: Grid) -> np.ndarray:
        """With anyres int32[P, 6], what each patch's cell is mixed from (see `batch.py`).

        The view of the whole stays as it is; the map, cut and resized, fills the cells of the tiles from the first on.
        """
        if not self.tiled:
            return super().patch_positions(grid)
        (rows, columns), (tall, wide), view = grid[2:], self.resized(grid), self.block[0]
        upper, lower, below = bilinear(rows, tall)
        left, right, beside = bilinear(columns, wide)
        patch = self._map(grid)
        corners = [patch[np.ix_(row, column)].reshape(-1) for row in (upper, lower) for column in (left, right)]
        out = np.zeros((self.num_patches(grid), 6), np.int32)
        out[:, :4] = np.arange(len(out))[:, None]
        out[view : view + tall * wide] = np.stack([*corners, np.tile(beside, tall), np.repeat(below, wide)], axis=1)
        return out

    def _map(self, grid: Grid) -> np.ndarray:
        """int[rows, columns], which patch of the picture stands where in the map of its tiles, black cut off."""
        (down, across, rows, columns), side, view = grid, self.side, self.block[0]
        tiles = np.arange(view, self.num_patches(grid)).reshape(down, across, side, side)
        whole = tiles.transpose(0, 2, 1, 3).reshape(down * side, across * side)
        top, left = (down * side - rows) // 2, (across * side - columns) // 2
        return whole[top : top + rows, left : left + columns]

    def token_cells(self, grid: Grid) -> np.ndarray:
        view, newline = self.block
        if not self.tiled:
            return np.arange(newline, dtype=np.int32)
        tall, wide = self.resized(grid)
        block, place = np.divmod(np.arange(tall * wide), view)
        lines = ((1 + block) * newline + place).reshape(tall, wide)
        lines = np.concatenate([lines, np.full((tall, 1), view)], axis=1)
        return np.concatenate([np.arange(view), lines.reshape(-1)]).astype(np.int32)


def best_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The resolution that keeps most pixels of a picture, of these the one that wastes least, of these the first."""
    height, width = size

    def merit(pinpoint: Size) -> tuple[int, int]:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - math.prod(pinpoint)

    return max(pinpoints, key=merit)


def fit_on_black(image: Image.Image, size: Size) -> Image.Image:
    """A picture as large as fits into (height, width), bicubic, in the middle of black."""
    height, width = size
    across, down = width / image.width, height / image.height
    if across < down:
        inner = (width, min(math.ceil(image.height * across), height))
    else:
        inner = (min(math.ceil(image.width * down), width), height)
    canvas = Image.new("RGB", (width, height))
    resized = image.resize(inner, Image.Resampling.BICUBIC)
    canvas.paste(resized, ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return canvas


def bilinear(size: int, resized: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Resizing along one axis: first source, second source, and the second's weight in multiples of `MIX_UNIT`; int32.

    As torch's interpolate without aligned corners and without smoothing, whose places are float32, rounded once.
    """
    scale = np.float64(np.float32(size) / np.float32(max(resized, 1)))
    places = np.maximum((scale * (np.arange(resized) + 0.5) - 0.5).astype(np.float32), np.float32(0))
    first = np.minimum(places.astype(np.int32), size - 1)
    weight = np.rint((places - first.astype(np.float32)).astype(np.float64) / MIX_UNIT).astype(np.int32)
    return first, np.minimum(first + 1, size - 1), weight
