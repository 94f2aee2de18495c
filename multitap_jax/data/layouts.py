"""How a family's pictures become patches of vision rows and tokens of a row: size policy, patch order, positions.

A layout describes a picture by its `Grid`, a few numbers that decide everything but the pixels, known from the size in
the file's header alone. Letters: P patches of a picture, F uint8 values of a patch.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from PIL import Image

from multitap_jax.data.decode import ImageError

Grid = tuple[int, ...]

# kind -> the numbers that follow it
POLICIES = {
    "square": ("SIDE",),
    "native": ("MIN_PIXELS", "MAX_PIXELS"),
    "crop": ("SIDE",),
    "tiles": ("MAX_TILES",),
    "anyres": ("MAX_TILES",),
    "hd": ("MAX_TILES",),
}
MODES = ("mrope", "flat")


@dataclass(frozen=True, slots=True)
class ImagePolicy:
    """How a picture gets its size.

    "square:SIDE" stretches every picture to SIDE x SIDE, bicubic, as the official evaluation does (SIDE = 560); a model
    of another size gets what its image processor makes of that.
    "native:MIN_PIXELS:MAX_PIXELS" keeps the aspect ratio and the number of pixels within bounds, as the Qwen2-VL
    processor does.
    "tiles:MAX_TILES" keeps the aspect ratio and cuts the picture into at most that many tiles of the model's size, as
    the Llama-3.2-Vision processor does (MAX_TILES = 4).
    "crop:SIDE" brings the shorter side to SIDE, bicubic, and cuts SIDE x SIDE out of the middle, as the CLIP processor
    does.
    "anyres:MAX_TILES" shows a small picture of the whole and up to MAX_TILES tiles of a large one, as LLaVA-OneVision's
    processor does for a prompt with one picture (there up to 36).
    "hd:MAX_TILES" cuts a picture into up to MAX_TILES tiles and shows a small picture of the whole besides, as
    InternLM-XComposer2.5 does for a prompt with one picture (there up to 24; 6 where there are more).
    """

    kind: str
    numbers: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "ImagePolicy":
        """Reads "square:560", "native:3136:1003520" or "tiles:4". Raises ImageError naming the text and the forms."""
        kind, *numbers = text.split(":")
        if all(number.isascii() and number.isdigit() and int(number) > 0 for number in numbers):
            values = tuple(int(number) for number in numbers)
            if len(values) == len(POLICIES.get(kind, ())) > 0 and list(values) == sorted(values):
                return cls(kind, values)
        forms = " or ".join(":".join((kind, *names)) for kind, names in POLICIES.items())
        raise ImageError(
            f"image policy {text!r} is not known: write {forms}, with whole numbers from 1 on and MIN_PIXELS <= "
            "MAX_PIXELS (for example square:560, native:3136:1003520, tiles:4)"
        )

    def __str__(self) -> str:
        return ":".join(map(str, (self.kind, *self.numbers)))


class Layout(ABC):
    """What data and backbone agree on about pictures.

    Attributes:
      policy: how a picture gets its size.
      patch_size: pixels a side of a patch.
      block: patches of a block of a vision row, and the feature cells that the backbone makes of it; pictures take
        whole blocks.
      coordinates: numbers that place a patch, the last dimension of `PackedBatch.patch_position`.
      apart: the backbone keeps image features out of the row: an image is one token, which tells where it stands.
    """

    policy: ImagePolicy
    patch_size: int
    block: tuple[int, int]
    coordinates: int = 2
    apart: bool = False

    @property
    def features(self) -> int:
        """F, values of a patch."""
        return 3 * self.patch_size**2

    @abstractmethod
    def grid(self, height: int, width: int) -> Grid:
        """The grid of a picture of this size in pixels. Raises ImageError where the policy cannot take it."""

    @abstractmethod
    def cut(self, image: Image.Image, grid: Grid) -> np.ndarray:
        """uint8[P, F], the patches of an RGB picture with this grid, in the order the backbone expects."""

    @abstractmethod
    def num_patches(self, grid: Grid) -> int:
        """P."""

    @abstractmethod
    def patch_positions(self, grid: Grid) -> np.ndarray:
        """int32[P, coordinates], (row, column) of each patch, or what else `PackedBatch.patch_position` says."""

    def real_patches(self, grid: Grid) -> np.ndarray:
        """bool[P]: False where a patch only fills up a block and holds nothing of the picture."""
        return np.ones(self.num_patches(grid), bool)

    @abstractmethod
    def token_cells(self, grid: Grid) -> np.ndarray:
        """int32[tokens]: the cell, counted from the picture's first, behind each token the picture takes in a row."""

    def token_positions(self, grid: Grid, mode: str) -> tuple[np.ndarray, int]:
        """int32[tokens, 3], positions counted from the picture's first, and how far the position moves on."""
        count = len(self.token_cells(grid))
        return np.repeat(np.arange(count, dtype=np.int32)[:, None], 3, axis=1), count

    def num_tokens(self, grid: Grid) -> int:
        """Tokens that the picture takes in a row."""
        return len(self.token_cells(grid))

    def row_cells(self, patches: int) -> int:
        """Feature cells of a vision row of `patches`."""
        return patches // self.block[0] * self.block[1]


class GridLayout(Layout):
    """One rectangle of patches, m x m of which become one token (Qwen); m = 1 is plain row-major order.

    The grid is (rows, columns) in patches. Patches come in block-major order: merge block after merge block, then
    inside the block.

    Args:
      policy: an ImagePolicy or its text.
      patch_size: pixels a side of a patch.
      merge_size: m.

    Raises:
      ImageError: the square's side is no multiple of patch_size * merge_size, or another kind of policy.
    """

    def __init__(self, policy: ImagePolicy | str, patch_size: int = 14, merge_size: int = 2):
        self.policy = ImagePolicy.parse(policy) if isinstance(policy, str) else policy
        self.patch_size, self.merge = patch_size, merge_size
        self.block = (merge_size**2, 1)
        self.factor = factor = patch_size * merge_size
        check_kind(self.policy, "square", "native")
        if self.policy.kind == "square" and (side := self.policy.numbers[0]) % factor:
            down = max(1, side // factor) * factor
            raise ImageError(
                f"image policy {self.policy}: the side must be a multiple of {factor} pixels "
                f"(patch {patch_size} * merge {merge_size}); the nearest are {down} and {down + factor}"
            )

    def grid(self, height: int, width: int) -> Grid:
        if self.policy.kind == "square":
            height = width = self.policy.numbers[0]
        else:
            height, width = smart_resize(height, width, self.factor, *self.policy.numbers)
        return height // self.patch_size, width // self.patch_size

    def cut(self, image: Image.Image, grid: Grid) -> np.ndarray:
        size = (grid[1] * self.patch_size, grid[0] * self.patch_size)
        return patchify(np.asarray(image.resize(size, Image.Resampling.BICUBIC)), self.patch_size, self.merge)

    def num_patches(self, grid: Grid) -> int:
        return grid[0] * grid[1]

    def patch_positions(self, grid: Grid) -> np.ndarray:
        (rows, columns), merge = grid, self.merge
        index = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
        blocks = index.reshape(rows // merge, merge, columns // merge, merge, 2).transpose(0, 2, 1, 3, 4)
        return blocks.reshape(-1, 2).astype(np.int32)

    def token_cells(self, grid: Grid) -> np.ndarray:
        return np.arange(grid[0] * grid[1] // self.merge**2, dtype=np.int32)

    def token_positions(self, grid: Grid, mode: str) -> tuple[np.ndarray, int]:
        """M-RoPE: the image spans (0, row, column) of its merged grid; what follows stands max(rows, columns) later."""
        if mode == "flat":
            return super().token_positions(grid, mode)
        rows, columns = grid[0] // self.merge, grid[1] // self.merge
        row, column = np.divmod(np.arange(rows * columns, dtype=np.int32), columns)
        return np.stack([np.zeros_like(row), row, column], axis=1), max(rows, columns)


@dataclass(frozen=True)
class Vision:
    """What packing needs to know of a backbone: how pictures become tokens, and which positions there are.

    Attributes:
      layout: of pictures.
      placeholder: id of the image placeholder.
      position_mode: of `MODES`.
      limit: positions that there are (`Rope.limit`), or None.

    Raises:
      ValueError: an unknown position mode.
    """

    layout: Layout
    placeholder: int
    position_mode: str = "mrope"
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.position_mode not in MODES:
            raise ValueError(f"position_mode {self.position_mode!r}; the modes are {', '.join(MODES)}")

    def check_length(self, max_length: int) -> None:
        """Raises ValueError if pairs of `max_length` tokens would have positions that there are not."""
        if self.limit is not None and max_length > self.limit:
            raise ValueError(
                f"max_length = {max_length}: beyond max_position_embeddings = {self.limit} this model's rotary "
                "positions depend on the length of a pair (rope_scaling 'dynamic'), which is not implemented; choose "
                f"{self.limit} or less"
            )


def check_kind(policy: ImagePolicy, *kinds: str) -> None:
    """Raises ImageError unless the policy is one of `kinds`."""
    if policy.kind not in kinds:
        raise ImageError(f"image policy {policy}: this model's pictures are {' or '.join(kinds)}; choose one of them")


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width), both multiples of `factor`, with min_pixels <= height * width <= max_pixels where possible.

    The rule is the one of the Qwen2-VL image processor, to the same float operations and the same rounding (half to
    even), since one cell more or less moves every position that follows.
    """
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    return rows * factor, columns * factor


def patchify(pixels: np.ndarray, patch_size: int, merge_size: int) -> np.ndarray:
    """uint8[height, width, C] -> uint8[P, C * patch_size^2] in block-major order (Qwen2-VL), features (C, ph, pw)."""
    height, width, channels = pixels.shape
    block = patch_size * merge_size
    cut = pixels.reshape(height // block, merge_size, patch_size, width // block, merge_size, patch_size, channels)
    return cut.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, channels * patch_size**2)
