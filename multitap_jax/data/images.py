"""Pictures in, uint8 patches out: safe decoding, the size policy, the processor's patch order, a small cache.

Letters (R vision rows excepted, see `batch.py`): P patches of the picture, F uint8 values of a patch. Values stay raw
bytes; the backbone rescales and normalises them on the device, so the host moves four times less than with floats.
"""

import dataclasses
import hashlib
import math
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

Source = str | os.PathLike[str] | Image.Image | np.ndarray

MAX_PIXELS = 100_000_000
MAX_ASPECT = 200
# Only formats decoded in-process by a plain decoder: EPS, for one, would start Ghostscript.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """A picture that cannot be used; the message names it, says what is wrong and what to do."""


@dataclasses.dataclass(frozen=True, slots=True)
class ImagePolicy:
    """How a picture gets its size: "square:SIDE" or "native:MIN_PIXELS:MAX_PIXELS".

    "square" stretches every picture to SIDE x SIDE, bicubic, as the official evaluation does (SIDE = 560). "native"
    keeps the aspect ratio and the number of pixels within [min_pixels, max_pixels], as the Qwen2-VL processor does.
    For "square", min_pixels == max_pixels == SIDE * SIDE.
    """

    kind: str
    min_pixels: int
    max_pixels: int

    @classmethod
    def parse(cls, text: str) -> "ImagePolicy":
        """Reads "square:560" or "native:3136:1003520". Raises ImageError naming the text and the two forms."""
        kind, *numbers = text.split(":")
        if all(number.isascii() and number.isdigit() and int(number) > 0 for number in numbers):
            values = [int(number) for number in numbers]
            if kind == "square" and len(values) == 1:
                return cls(kind, values[0] ** 2, values[0] ** 2)
            if kind == "native" and len(values) == 2 and values[0] <= values[1]:
                return cls(kind, *values)
        raise ImageError(
            f"image policy {text!r} is not known: write square:SIDE (for example square:560) or "
            f"native:MIN_PIXELS:MAX_PIXELS with MIN_PIXELS <= MAX_PIXELS (for example native:3136:1003520)"
        )

    def __str__(self) -> str:
        if self.kind == "square":
            return f"square:{self.side}"
        return f"native:{self.min_pixels}:{self.max_pixels}"

    @property
    def side(self) -> int:
        """Side of the square in pixels; meaningful for "square" only."""
        return math.isqrt(self.max_pixels)

    def size(self, height: int, width: int, factor: int) -> tuple[int, int]:
        """(height, width) after the policy, both multiples of `factor` pixels (patch size * merge size).

        The native rule is the one of the Qwen2-VL image processor (its `smart_resize`), to the same float operations
        and the same rounding (half to even), since one cell more or less moves every position that follows.
        """
        if self.kind == "square":
            return self.side, self.side
        rows, columns = round(height / factor), round(width / factor)
        if rows * columns * factor**2 > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rows = max(1, math.floor(height / shrink / factor))
            columns = max(1, math.floor(width / shrink / factor))
        elif rows * columns * factor**2 < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
        return rows * factor, columns * factor


class ImagePatches(NamedTuple):
    """Attributes:
    patches: uint8[P, F], read-only; block-major (merge block, then inside the block), features (C, ph, pw).
    grid: (rows, columns) in patches; P = rows * columns.
    key: sha256 of the pixels and shape after the policy: equal for equal pictures under any name.
    """

    patches: np.ndarray
    grid: tuple[int, int]
    key: str


class ImageReader:
    """Reads pictures under one policy. Safe to call from many threads.

    Args:
      policy: an ImagePolicy or its text.
      patch_size: pixels a side of a patch.
      merge_size: patches a side of a block that becomes one token.
      cache_bytes: how many bytes of patches of files to keep (least recently used go first); 0 keeps none. A file is
        known by real path, modification time and size, so a rewritten file is read again.
      max_pixels: pictures with more pixels than this in the file are refused before they are decoded.

    Raises:
      ImageError: where the square's side is no multiple of patch_size * merge_size.
    """

    def __init__(
        self,
        policy: ImagePolicy | str,
        patch_size: int = 14,
        merge_size: int = 2,
        cache_bytes: int = 256 << 20,
        max_pixels: int = MAX_PIXELS,
    ):
        self.policy = ImagePolicy.parse(policy) if isinstance(policy, str) else policy
        self.patch_size, self.merge_size, self.max_pixels = patch_size, merge_size, max_pixels
        self.factor = patch_size * merge_size
        if self.policy.kind == "square" and self.policy.side % self.factor:
            down = max(1, self.policy.side // self.factor) * self.factor
            raise ImageError(
                f"image policy {self.policy}: the side must be a multiple of {self.factor} pixels "
                f"(patch {patch_size} * merge {merge_size}); the nearest are {down} and {down + self.factor}"
            )
        self._cache_bytes, self._held = cache_bytes, 0
        self._cache: OrderedDict[tuple[str, int, int], ImagePatches] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, source: Source) -> ImagePatches:
        """Decodes, resizes and cuts one picture. Raises ImageError, which names it and says why."""
        identity = _file_identity(source) if self._cache_bytes else None
        if identity is not None:
            with self._lock:
                if (found := self._cache.get(identity)) is not None:
                    self._cache.move_to_end(identity)
                    return found
        result = self._read(source)
        if identity is not None:
            self._remember(identity, result)
        return result

    def grid_of(self, source: Source) -> tuple[int, int]:
        """(rows, columns) in patches that a call on `source` will give, from the file's header alone."""
        if isinstance(source, np.ndarray):
            height, width = _checked_array(source).shape[:2]
        else:
            with _opened(source, self.max_pixels) as image:
                width, height = image.size
                if _orientation(image) >= 5:
                    width, height = height, width
        height, width = self._target(source, height, width)
        return height // self.patch_size, width // self.patch_size

    def _target(self, source: Source, height: int, width: int) -> tuple[int, int]:
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise ImageError(
                f"{_name(source)}: {width} x {height} pixels is more than {MAX_ASPECT} times as long as wide; crop it"
            )
        return self.policy.size(height, width, self.factor)

    def _read(self, source: Source) -> ImagePatches:
        image = decode_image(source, max_pixels=self.max_pixels)
        height, width = self._target(source, image.height, image.width)
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        patches = patchify(pixels, self.patch_size, self.merge_size)
        patches.flags.writeable = False
        grid = (height // self.patch_size, width // self.patch_size)
        digest = hashlib.sha256(f"{height}x{width}:{self.patch_size}:{self.merge_size}:".encode())
        digest.update(patches.data)
        return ImagePatches(patches, grid, digest.hexdigest())

    def _remember(self, identity: tuple[str, int, int], result: ImagePatches) -> None:
        with self._lock:
            if identity in self._cache:
                return
            self._cache[identity] = result
            self._held += result.patches.nbytes
            while self._held > self._cache_bytes:
                _, dropped = self._cache.popitem(last=False)
                self._held -= dropped.patches.nbytes


def patchify(pixels: np.ndarray, patch_size: int, merge_size: int) -> np.ndarray:
    """uint8[height, width, C] -> uint8[P, C * patch_size^2] in block-major order (Qwen2-VL), features (C, ph, pw)."""
    height, width, channels = pixels.shape
    block = patch_size * merge_size
    cut = pixels.reshape(height // block, merge_size, patch_size, width // block, merge_size, patch_size, channels)
    return cut.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, channels * patch_size**2)


def decode_image(source: Source, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """One picture as 8-bit RGB: upright (EXIF orientation), transparency on white, first frame of an animation.

    Args:
      source: a path, a PIL image, or an array: uint8, or floats in [0, 1], of shape [H, W], [H, W, 3] or [H, W, 4].
      max_pixels: limit on height * width, checked before anything is decoded.

    Raises:
      ImageError: missing, truncated, corrupt, not a picture, too large, empty, or an array of another kind.
    """
    if isinstance(source, np.ndarray):
        return _to_rgb(Image.fromarray(_checked_array(source)), "image array")
    with _opened(source, max_pixels) as image:
        turn = _TURNS.get(_orientation(image))
        image.load()
        upright = _to_rgb(image, _name(source))
        return upright if turn is None else upright.transpose(turn)


@contextmanager
def _opened(source: str | os.PathLike[str] | Image.Image, max_pixels: int) -> Iterator[Image.Image]:
    """The header of a picture, read and checked; whatever goes wrong inside becomes an ImageError."""
    name = _name(source)
    try:
        if isinstance(source, Image.Image):
            _check_size(source, name, max_pixels)
            yield source
            return
        if not stat.S_ISREG(os.stat(source).st_mode):
            raise ImageError(f"{name}: not a regular file; give the path of a picture")
        with Image.open(source, formats=_formats()) as image:
            _check_size(image, name, max_pixels)
            yield image
    except (ImageError, MemoryError):
        raise
    except FileNotFoundError:
        raise ImageError(f"{name}: file not found; check the path") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: decompression bomb ({error}); shrink the picture") from error
    except UnidentifiedImageError:
        kinds = ", ".join(_formats())
        raise ImageError(f"{name}: not a picture of a known format ({kinds}); convert it to PNG or JPEG") from None
    except Exception as error:  # decoders raise anything from OSError to struct.error on damaged bytes
        what = "truncated" if "truncated" in str(error).lower() else "cannot be decoded"
        detail = f"{type(error).__name__}: {error}"
        raise ImageError(f"{name}: {what} ({detail}); replace the file by an intact copy") from error


def _formats() -> list[str]:
    """The allowed formats this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height == 0:
        raise ImageError(f"{name}: {width} x {height} pixels, nothing to see; replace the picture")
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: decompression bomb: {width} x {height} pixels is more than the limit of {max_pixels:,}; shrink it"
        )


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8, from what is known before decoding, so that `grid_of` and decoding always agree.

    Unreadable EXIF counts as upright, as picture viewers do. Pillow itself turns TIFF upright.
    """
    if image.format == "TIFF":
        return 1
    try:
        # PngImageFile.getexif decodes the whole picture in search of a trailing chunk; the base method does not.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # as in `_opened`: damaged EXIF raises anything
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16-bit grey; Pillow's own conversion would clip it at 255
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ImageError(f"{name}: grey values outside 16 bits; save the picture with 8 or 16 bits a channel")
        image = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "F":
        image = Image.fromarray(_checked_array(np.asarray(image), name))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("LA") if image.mode == "La" else image
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image.convert("RGBA"))
    return image.convert("RGB")


def _checked_array(array: np.ndarray, name: str = "image array") -> np.ndarray:
    """uint8 array of shape [H, W], [H, W, 3] or [H, W, 4], or ImageError."""
    shape = "x".join(map(str, array.shape))
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ImageError(
            f"{name} of shape {shape}: expected height x width, or height x width x 3 or 4 (channels last)"
        )
    if array.size == 0:
        raise ImageError(f"{name} of shape {shape}: nothing to see; give a picture of at least one pixel")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise ImageError(f"{name} of dtype {array.dtype}: expected uint8, or floats in [0, 1]; convert it")
    if not np.isfinite(array).all():
        raise ImageError(f"{name} holds NaN or infinity; give floats in [0, 1]")
    if array.min() < 0 or array.max() > 1:
        raise ImageError(f"{name} has floats from {array.min():g} to {array.max():g}: expected [0, 1]; divide by 255?")
    return np.round(array.astype(np.float64) * 255).astype(np.uint8)


def _file_identity(source: Source) -> tuple[str, int, int] | None:
    if isinstance(source, (Image.Image, np.ndarray)):
        return None
    try:
        real = os.path.realpath(source)
        info = os.stat(real)
    except (OSError, ValueError):
        return None  # reading it gives the error with its reason
    return real, info.st_mtime_ns, info.st_size


def _name(source: Source) -> str:
    if isinstance(source, np.ndarray):
        return "image array"
    if isinstance(source, Image.Image):
        filename = getattr(source, "filename", "")
        return f"PIL image {filename}" if filename else f"PIL image ({source.mode})"
    return f"image {os.fspath(source)}"
