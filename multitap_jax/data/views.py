"""Pictures as square views of a fixed side, each one block of a vision row (LLaVA and its kin).

A picture is one view, or, under an anyres policy, a small view of the whole and tiles of a large one; extra letter: V
patches of a view.
"""

import numpy as np
from PIL import Image

from multitap_jax.data.decode import ImageError
from multitap_jax.data.layouts import Grid, ImagePolicy, Layout, check_kind, patchify

Size = tuple[int, int]  # height, width


class ViewLayout(Layout):
    """One view a picture, all of whose patches are tokens, in row-major order.

    The grid is empty: all pictures have the same. "square:SIDE" stretches every picture to SIDE x SIDE, bicubic, and
    brings that to the model's size, bicubic again where it is another one, as the official code's LLaVA does.

    Args:
      policy: an ImagePolicy or its text, of a kind among `kinds`.
      patch_size: pixels a side of a patch.
      image_size: pixels a side of a view; what does not fill a patch at the right and at the bottom is cut off.

    Raises:
      ImageError: a crop of another side than the model's, or another kind of policy.
    """

    kinds: tuple[str, ...] = ("square", "crop")

    def __init__(self, policy: ImagePolicy | str, patch_size: int, image_size: int):
        self.policy = ImagePolicy.parse(policy) if isinstance(policy, str) else policy
        self.patch_size, self.image_size, self.side = patch_size, image_size, image_size // patch_size
        self.block = (self.side**2, self.side**2)
        check_kind(self.policy, *self.kinds)
        if self.policy.kind == "crop" and self.policy.numbers[0] != image_size:
            raise ImageError(
                f"image policy {self.policy}: this model looks at {image_size} x {image_size} pixels and nothing else; "
                f"write crop:{image_size}"
            )

    def grid(self, height: int, width: int) -> Grid:
        return ()

    def cut(self, image: Image.Image, grid: Grid) -> np.ndarray:
        if self.policy.kind == "crop":
            return self._view(center_crop(image, self.image_size))
        return self._view(self._squeezed(image))

    def _squeezed(self, image: Image.Image) -> Image.Image:
        """The whole picture as a view, its aspect ratio lost."""
        sides = (self.policy.numbers[0], self.image_size) if self.policy.kind == "square" else (self.image_size,)
        for side in sides:  # a picture that has the size already is copied
            image = image.resize((side, side), Image.Resampling.BICUBIC)
        return image

    def _view(self, image: Image.Image) -> np.ndarray:
        """uint8[V, F] of a picture of `image_size` x `image_size`."""
        seen = self.side * self.patch_size
        return patchify(np.asarray(image)[:seen, :seen], self.patch_size, 1)

    def num_patches(self, grid: Grid) -> int:
        return self.block[0]

    def patch_positions(self, grid: Grid) -> np.ndarray:
        own = np.stack(np.divmod(np.arange(self.block[0], dtype=np.int32), self.side), axis=1)
        return np.tile(own, (self.num_patches(grid) // self.block[0], 1))

    def token_cells(self, grid: Grid) -> np.ndarray:
        return np.arange(self.block[1], dtype=np.int32)


def center_crop(image: Image.Image, side: int) -> Image.Image:
    """The middle of a picture whose shorter side was brought to `side`, bicubic (the CLIP processor's rounding)."""
    short, long = sorted(image.size)
    longer = int(side * long / short)
    width, height = (side, longer) if image.width <= image.height else (longer, side)
    left, top = (width - side) // 2, (height - side) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + side, top + side))
