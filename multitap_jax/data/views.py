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

    The grid is empty: all pictures have the same.

    Args:
      policy: an ImagePolicy or its text, of a kind among `kinds`.
      patch_size: pixels a side of a patch.
      image_size: pixels a side of a view; what does not fill a patch at the right and at the bottom is cut off.

    Raises:
      ImageError: another side than the model's, or another kind of policy.
    """

    kinds: tuple[str, ...] = ("square", "crop")

    def __init__(self, policy: ImagePolicy | str, patch_size: int, image_size: int):
        self.policy = ImagePolicy.parse(policy) if isinstance(policy, str) else policy
        self.patch_size, self.image_size, self.side = patch_size, image_size, image_size // patch_size
        self.block = (self.side**2, self.side**2)
        check_kind(self.policy, *self.kinds)
        if self.policy.kind in ("square", "crop") and self.policy.numbers[0] != image_size:
            raise ImageError(
                f"image policy {self.policy}: this model looks at {image_size} x {image_size} pixels and nothing else; "
                f"write {self.policy.kind}:{image_size}"
            )

    def grid(self, height: int, width: int) -> Grid:
        return ()

    def cut(self, image: Image.Image, grid: Grid) -> np.ndarray:
        side = self.image_size
        if self.policy.kind == "crop":
            return self._view(center_crop(image, side))
        return self._view(image.resize((side, side), Image.Resampling.BICUBIC))

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
