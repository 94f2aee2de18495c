"""Pictures in, uint8 patches out: the layout's size policy and patch order, and a small cache.

Letters (R vision rows excepted, see `batch.py`): P patches of the picture, F uint8 values of a patch. Values stay raw
bytes; the backbone rescales and normalises them on the device, so the host moves four times less than with floats.
"""

import hashlib
import os
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image

from multitap_jax.data.decode import (
    MAX_PIXELS,
    ImageError,
    Source,
    checked_array,
    decode_image,
    opened,
    orientation,
    source_name,
)
from multitap_jax.data.layouts import Grid, Layout
from multitap_jax.parallel.host import cores

MAX_ASPECT = 200


class ImagePatches(NamedTuple):
    """Attributes:
    patches: uint8[P, F], read-only, in the layout's order; features (C, ph, pw).
    grid: the layout's description of the picture's shape; (rows, columns) in patches for most.
    key: sha256 of the pixels and shape after the policy: equal for equal pictures under any name.
    """

    patches: np.ndarray
    grid: Grid
    key: str


def decoding_pool(workers: int | None = None) -> ThreadPoolExecutor:
    """Threads that decode pictures, which mostly happens outside of Python's lock; None: one a core, from 4 to 16."""
    return ThreadPoolExecutor(workers or min(max(cores(), 4), 16), thread_name_prefix="decode")


class ImageReader:
    """Reads pictures in one layout. Safe to call from many threads.

    Args:
      layout: size policy and patch order.
      cache_bytes: how many bytes of patches of files to keep (least recently used go first); 0 keeps none. A file is
        known by real path, modification time and size, so a rewritten file is read again.
      max_pixels: pictures with more pixels than this in the file are refused before they are decoded.
    """

    def __init__(self, layout: Layout, cache_bytes: int = 256 << 20, max_pixels: int = MAX_PIXELS):
        self.layout, self.max_pixels = layout, max_pixels
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

    def grid_of(self, source: Source) -> Grid:
        """The grid that a call on `source` will give, from the file's header alone."""
        if isinstance(source, np.ndarray):
            height, width = checked_array(source).shape[:2]
        else:
            with opened(source, self.max_pixels) as image:
                width, height = image.size
                if orientation(image) >= 5:
                    width, height = height, width
        return self._grid(source, height, width)

    def checked_grid_of(self, source: Source) -> Grid:
        """As `grid_of`, after decoding the whole picture, so that one that breaks below its header is found now."""
        image = decode_image(source, max_pixels=self.max_pixels)
        grid, stated = self._grid(source, image.height, image.width), self.grid_of(source)
        if grid != stated:
            raise ImageError(f"{source_name(source)}: its header says {stated}, its pixels {grid}; save it anew")
        return grid

    def _grid(self, source: Source, height: int, width: int) -> Grid:
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise ImageError(
                f"{source_name(source)}: {width} x {height} pixels is more than {MAX_ASPECT} times as long as wide; "
                "crop it"
            )
        return self.layout.grid(height, width)

    def _read(self, source: Source) -> ImagePatches:
        image = decode_image(source, max_pixels=self.max_pixels)
        grid = self._grid(source, image.height, image.width)
        patches = np.ascontiguousarray(self.layout.cut(image, grid))
        patches.flags.writeable = False
        digest = hashlib.sha256(f"{grid}:{self.layout.patch_size}:{self.layout.block}:".encode())
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


def _file_identity(source: Source) -> tuple[str, int, int] | None:
    if isinstance(source, (Image.Image, np.ndarray)):
        return None
    try:
        real = os.path.realpath(source)
        info = os.stat(real)
    except (OSError, ValueError):
        return None  # reading it gives the error with its reason
    return real, info.st_mtime_ns, info.st_size
