"""Pictures from files, PIL images and arrays to 8-bit RGB, safely: whatever is wrong becomes an ImageError."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

Source = str | os.PathLike[str] | Image.Image | np.ndarray

MAX_PIXELS = 100_000_000
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


def decode_image(source: Source, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """One picture as 8-bit RGB: upright (EXIF orientation), transparency on white, first frame of an animation.

    Args:
      source: a path, a PIL image, or an array: uint8, or floats in [0, 1], of shape [H, W], [H, W, 3] or [H, W, 4].
      max_pixels: limit on height * width, checked before anything is decoded.

    Raises:
      ImageError: missing, truncated, corrupt, not a picture, too large, empty, or an array of another kind.
    """
    if isinstance(source, np.ndarray):
        return _to_rgb(Image.fromarray(checked_array(source)), "image array")
    with opened(source, max_pixels) as image:
        turn = _TURNS.get(orientation(image))
        image.load()
        upright = _to_rgb(image, source_name(source))
        return upright if turn is None else upright.transpose(turn)


@contextmanager
def opened(source: str | os.PathLike[str] | Image.Image, max_pixels: int) -> Iterator[Image.Image]:
    """The header of a picture, read and checked; whatever goes wrong inside becomes an ImageError."""
    name = source_name(source)
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


def orientation(image: Image.Image) -> int:
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
        image = Image.fromarray(checked_array(np.asarray(image), name))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("LA") if image.mode == "La" else image
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image.convert("RGBA"))
    return image.convert("RGB")


def checked_array(array: np.ndarray, name: str = "image array") -> np.ndarray:
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


def source_name(source: Source) -> str:
    if isinstance(source, np.ndarray):
        return "image array"
    if isinstance(source, Image.Image):
        filename = getattr(source, "filename", "")
        return f"PIL image {filename}" if filename else f"PIL image ({source.mode})"
    return f"image {os.fspath(source)}"
