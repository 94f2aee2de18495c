"""Packing without a plan: any pairs in, packed batches of a bounded set of shapes out (scoring and embedding).

Pairs arrive in windows. In a window, pairs that share an image (by content) and a request form a group, whatever their
order; each batch records which pairs of the window it holds, so results go back to their places.
"""

import threading
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from multitap_jax.batch import PackedBatch
from multitap_jax.data.decode import ImageError
from multitap_jax.data.images import ImagePatches, ImageReader, decoding_pool
from multitap_jax.data.layouts import Grid, Vision
from multitap_jax.data.packing import Example, group_examples, pack
from multitap_jax.data.placement import Group, need, place
from multitap_jax.data.prompts import Encoded, PromptError, SupportsEncode
from multitap_jax.data.records import Record
from multitap_jax.data.shapes import ShapeBook, choose_row_length, images_per_row, texts_per_row, vision_length


class Pair(NamedTuple):
    """What is scored: images (paths, PIL images or arrays), a text, and the request that it answers, if any."""

    images: tuple[Any, ...]
    text: str
    request: str | None = None

    @classmethod
    def of(cls, record: Record) -> "Pair":
        """What a record asks to be scored."""
        return cls(record.images, record.text, record.request)


@dataclass
class Window:
    """A prepared window: what is known of each pair, and the batches that hold those without an error.

    Attributes:
      errors: why a pair cannot be scored, or None; parallel to the pairs, as are the next two.
      n_tokens: tokens of the pair scored alone: prefix, image tokens and text.
      truncated: whether the tail of its text was cut.
      pictures: content key of the first picture of each pair, None without one or with an error.
      batches: packed batches; `PackedBatch.record` indexes the pairs of the window.
    """

    errors: list[str | None]
    n_tokens: list[int]
    truncated: list[bool]
    pictures: list[str | None]
    batches: Iterator[PackedBatch] = field(default_factory=lambda: iter(()))


class StreamPacker:
    """Packs windows of pairs.

    Args:
      prompter: turns texts into tokens.
      reader: decodes images.
      vision: vision facts of the backbone.
      hidden: hidden size of the decoder, for the choice of row lengths.
      batch_tokens: about how many tokens a batch holds; bounds device memory. Where the backbone keeps images apart
        from the row, each of their patches counts as one.
      max_length: longest pair in tokens, image tokens included.
      cells: data shards of the mesh.
      workers: threads that decode images; None: one for each core this process may use, from 4 to 16.

    Attributes:
      book: the shapes handed out so far.

    Raises:
      ValueError: see `Vision.check_length`.
    """

    def __init__(
        self,
        prompter: SupportsEncode,
        reader: ImageReader,
        vision: Vision,
        *,
        hidden: int,
        batch_tokens: int = 16384,
        max_length: int = 2048,
        cells: int = 1,
        workers: int | None = None,
    ):
        vision.check_length(max_length)
        self._prompter, self._reader, self._vision = prompter, reader, vision
        self._hidden, self._cells = hidden, cells
        self.batch_tokens, self.max_length = batch_tokens, max_length
        self.book = ShapeBook(hidden, cells, vision.layout.block[0])
        self._encoding = threading.Lock()
        self._pool = decoding_pool(workers)

    def window(self, pairs: Sequence[Pair], *, truncate: bool | None = False) -> Window:
        """Prepares a window; its batches are packed as they are asked for.

        Texts that are too long are cut with `truncate`, else they get an error; None: they must not be cut.
        """
        return next(self.windows([pairs], truncate=truncate))

    def windows(self, lists: Iterable[Sequence[Pair]], *, truncate: bool | None = False) -> Iterator[Window]:
        """A window for each list; the pictures of the next are being decoded while one is packed and used."""
        waiting: tuple[Sequence[Pair], dict[Hashable, Future[ImagePatches | str]]] | None = None
        for pairs in lists:
            upcoming = pairs, self._decode(pairs)
            if waiting is not None:
                yield self._prepare(*waiting, truncate)
            waiting = upcoming
        if waiting is not None:
            yield self._prepare(*waiting, truncate)

    def _prepare(
        self, pairs: Sequence[Pair], decoded: dict[Hashable, "Future[ImagePatches | str]"], truncate: bool | None
    ) -> Window:
        results = {source: future.result() for source, future in decoded.items()}
        images = {source: found for source, found in results.items() if isinstance(found, ImagePatches)}
        failures = {source: found for source, found in results.items() if isinstance(found, str)}
        out = Window([None] * len(pairs), [0] * len(pairs), [False] * len(pairs), [None] * len(pairs))
        with self._encoding:  # a tokenizer that is used by two threads at once may refuse
            encoded = self._prompter.encode(
                [p.text for p in pairs], [p.request for p in pairs], [len(p.images) for p in pairs]
            )
        grids: dict[Hashable, Grid] = {image.key: image.grid for image in images.values()}
        examples: list[Example] = []
        usable: list[int] = []
        for index, (pair, item) in enumerate(zip(pairs, encoded, strict=True)):
            sources = [_identity(source) for source in pair.images]
            error = next((failures[s] for s in sources if s in failures), None)
            if error is None and isinstance(item, PromptError):
                error = str(item)
            if error is None and isinstance(item, Encoded):
                keys = tuple(images[s].key for s in sources)
                prefix = len(item.prefix) + sum(self._vision.layout.num_tokens(grids[key]) - 1 for key in keys)
                error = self._fit(out, index, item, prefix, keys, examples, truncate)
            out.errors[index] = error
            if error is None:
                usable.append(index)
                out.pictures[index] = images[sources[0]].key if sources else None
        by_key: dict[Hashable, ImagePatches] = {image.key: image for image in images.values()}
        out.batches = self._batches(examples, usable, by_key, grids)
        return out

    def _fit(
        self,
        out: Window,
        index: int,
        item: Encoded,
        prefix: int,
        keys: tuple[Hashable, ...],
        examples: list[Example],
        truncate: bool | None,
    ) -> str | None:
        """Adds the pair to `examples` if it is short enough or may be cut; else says why not."""
        text, room = item.text, self.max_length - prefix
        if len(text) > room:
            if truncate is None:
                whole = prefix + len(text)
                return f"the prompt has {whole} tokens, more than {self.max_length}; shorten it, or raise max_length"
            if room <= len(self._prompter.closing):
                return (
                    f"image and prompt alone take {prefix} of {self.max_length} tokens; "
                    "raise max_length (--max_length), or train with a smaller image policy"
                )
            if not truncate:
                return (
                    f"the text has {len(text)} tokens, but only {room} of {self.max_length} are left beside image and "
                    "prompt; shorten it, raise max_length (--max_length), or have it cut with truncate (--truncate)"
                )
            text = self._prompter.shorten(text, room)
            out.truncated[index] = True
        out.n_tokens[index] = prefix + len(text)
        examples.append(Example(item.prefix, text, keys))
        return None

    def _decode(self, pairs: Sequence[Pair]) -> dict[Hashable, "Future[ImagePatches | str]"]:
        """Begins to decode each distinct source: source identity -> image, or what is wrong with it."""
        sources = {_identity(source): source for pair in pairs for source in pair.images}

        def read(source: Any) -> ImagePatches | str:
            try:
                return self._reader(source)
            except (ImageError, OSError) as error:
                return str(error)

        return {identity: self._pool.submit(read, source) for identity, source in sources.items()}

    def _batches(
        self,
        examples: list[Example],
        usable: list[int],
        images: dict[Hashable, ImagePatches],
        grids: dict[Hashable, Grid],
    ) -> Iterator[PackedBatch]:
        if not examples:
            return
        groups, prefixes = self._bounded(*group_examples(examples, grids, self._vision))
        layout = self._vision.layout
        patches = {key: layout.num_patches(grid) for key, grid in grids.items()}
        longest = vision_length(patches, layout.block[0])
        max_images = images_per_row([example.images for example in examples], self._vision)
        known = {shape.tokens for shape in self.book.shapes}
        row_length = choose_row_length(groups, self._hidden, max(self.max_length, 4096), known, max_images)
        lookup = np.asarray([*usable, -1], np.int32)
        for first, last in self._cuts(groups, patches if layout.apart else {}):
            part = groups[first:last]
            cells = place(
                part,
                patches,
                row_length=row_length,
                max_texts=texts_per_row(row_length),
                vision_length=longest,
                max_images=max_images,
                cells=self._cells,
            )
            rows, vision_rows = need(cells)
            shape = self.book.fit(rows, row_length, vision_rows, longest, max_images or 0)
            batch = pack(examples, images, part, prefixes[first:last], cells, shape, self._vision)
            yield batch._replace(record=lookup[batch.record])

    def _bounded(self, groups: Sequence[Group], prefixes: Sequence[np.ndarray]) -> tuple[list[Group], list[np.ndarray]]:
        """Splits groups that alone exceed a batch (an image with thousands of texts)."""
        out: list[tuple[Group, np.ndarray]] = []
        for group, prefix in zip(groups, prefixes, strict=True):
            part: list[tuple[int, int]] = []
            size = group.prefix
            for text in group.texts:
                if part and size + text[1] > self.batch_tokens:
                    out.append((group._replace(texts=tuple(part)), prefix))
                    part, size = [], group.prefix
                part.append(text)
                size += text[1]
            out.append((group._replace(texts=tuple(part)), prefix))
        return [g for g, _ in out], [p for _, p in out]

    def _cuts(self, groups: Sequence[Group], apart: Mapping[Hashable, int]) -> Iterator[tuple[int, int]]:
        """Consecutive spans of groups of about `batch_tokens` tokens; `apart` has those of images outside of rows."""
        start = tokens = 0
        for index, group in enumerate(groups):
            size = group.prefix + sum(length for _, length in group.texts)
            size += sum(apart.get(key, 0) for key in group.images)
            if tokens and tokens + size > self.batch_tokens:
                yield start, index
                start, tokens = index, 0
            tokens += size
        yield start, len(groups)


def _identity(source: Any) -> Hashable:
    """Files are the same source if their paths are equal; objects if they are the same object."""
    return str(source) if isinstance(source, str | Path) else id(source)
