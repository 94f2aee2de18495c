"""The lists that users give, checked against each other and zipped into pairs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from multitap_jax.data.stream import Pair

Source = str | Path | Image.Image | np.ndarray
SOURCES = (str, Path, Image.Image, np.ndarray)


def make_pairs(images: Any, texts: Any, requests: Any) -> list[Pair]:
    """Checks the lists against each other and zips them.

    Raises:
      TypeError: a list is none, or holds something else.
      ValueError: lists of different lengths.
    """
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise TypeError(f"texts is a {type(texts).__name__}: give a list of strings, one for each image")
    if isinstance(images, SOURCES) or not isinstance(images, Sequence):
        raise TypeError(
            f"images is a {type(images).__name__}: give a list with one image for each text; for many texts about one "
            "image: images=[image] * len(texts)"
        )
    requests = [None] * len(texts) if requests is None else requests
    for name, items in (("images", images), ("requests", requests)):
        if len(items) != len(texts):
            raise ValueError(
                f"{len(items)} {name}, but {len(texts)} texts: they are scored pair by pair, so give as many of each; "
                f"for many texts about one image: images=[image] * len(texts)"
            )
    return [_pair(*item) for item in enumerate(zip(images, texts, requests, strict=True))]


def _pair(index: int, item: tuple[Any, Any, Any]) -> Pair:
    image, text, request = item
    sources = (image,) if isinstance(image, SOURCES) else tuple(image) if isinstance(image, list | tuple) else None
    if sources is None or not all(isinstance(source, SOURCES) for source in sources):
        raise TypeError(f"images[{index}] is a {type(image).__name__}: give a path, a PIL image, an array, or a list")
    if not isinstance(text, str):
        raise TypeError(f"texts[{index}] is a {type(text).__name__}: give a string")
    if request is not None and not isinstance(request, str):
        raise TypeError(f"requests[{index}] is a {type(request).__name__}: give a string or None")
    return Pair(sources, text, request)
