"""Packing: encoded pairs and decoded images -> a `PackedBatch` of a given shape.

`place` (data/placement.py) decides where everything stands; here the arrays are filled. Both are pure functions of
their arguments, so the same pairs always give the same batch.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from multitap_jax.batch import PackedBatch
from multitap_jax.data.images import ImagePatches
from multitap_jax.data.layouts import Grid, Vision
from multitap_jax.data.placement import Cell, Group
from multitap_jax.data.positions import expand_prefix


class Example(NamedTuple):
    """One encoded pair: prefix (one placeholder an image), text with its closing tokens, image keys, target, weight."""

    prefix: np.ndarray
    text: np.ndarray
    images: tuple[Hashable, ...]
    target: float = 0.0
    weight: float = 1.0


@dataclass(frozen=True, order=True)
class Shape:
    """The sizes of a batch, one compiled program each: letters as in `batch.py`."""

    rows: int
    tokens: int
    texts: int
    vision_rows: int
    patches: int
    images: int = 0

    def __str__(self) -> str:
        apart = f" and {self.images} images" if self.images else ""
        return (
            f"{self.rows} rows of {self.tokens} tokens with room for {self.texts} texts{apart} each, "
            f"{self.vision_rows} vision rows of {self.patches} patches"
        )


def group_examples(
    examples: Sequence[Example], grids: Mapping[Hashable, Grid], vision: Vision
) -> tuple[list[Group], list[np.ndarray]]:
    """Groups pairs that share images and prompt, in order of first appearance; also returns each group's prefix."""
    found: dict[tuple, int] = {}
    texts: list[list[tuple[int, int]]] = []
    prefixes: list[np.ndarray] = []
    lengths: list[int] = []
    images: list[tuple[Hashable, ...]] = []
    for index, example in enumerate(examples):
        key = (example.images, example.prefix.tobytes())
        if key not in found:
            found[key] = len(texts)
            texts.append([])
            prefixes.append(example.prefix)
            extra = sum(vision.layout.num_tokens(grids[image]) - 1 for image in example.images)
            lengths.append(len(example.prefix) + extra)
            images.append(example.images)
        texts[found[key]].append((index, len(example.text)))
    return [Group(n, i, tuple(t)) for n, i, t in zip(lengths, images, texts, strict=True)], prefixes


def empty_batch(shape: Shape, vision: Vision, patch_rows: int | None = None) -> PackedBatch:
    """A batch of padding only; `patches` has `patch_rows` of the vision rows, None for all."""
    b, s, k, r, p, i = (getattr(shape, f.name) for f in fields(shape))
    return PackedBatch(
        tokens=np.zeros((b, s), np.int32),
        positions=np.zeros((b, s, 3), np.int32),
        segment=np.zeros((b, s), np.int32),
        prefix=np.zeros((b, s), np.int32),
        image_cell=np.full((b, s), -1, np.int32),
        pool=np.zeros((b, k), np.int32),
        record=np.full((b, k), -1, np.int32),
        target=np.zeros((b, k), np.float32),
        weight=np.zeros((b, k), np.float32),
        image_token=np.full((b, i), -1, np.int32),
        patches=np.zeros((r if patch_rows is None else patch_rows, p, vision.layout.features), np.uint8),
        patch_position=np.zeros((r, p, vision.layout.coordinates), np.int32),
        patch_segment=np.zeros((r, p), np.int32),
    )


def pack(
    examples: Sequence[Example],
    images: Mapping[Hashable, ImagePatches],
    groups: Sequence[Group],
    prefixes: Sequence[np.ndarray],
    cells: Sequence[Cell],
    shape: Shape,
    vision: Vision,
    *,
    mine: Sequence[int] | None = None,
) -> PackedBatch:
    """Fills a batch of `shape` as `place` decided.

    Args:
      examples: the pairs; `Group.texts` and `PackedBatch.record` index them.
      images: decoded images by key.
      groups, prefixes: from `group_examples`.
      cells: from `place`; each takes an equal, contiguous share of rows and of vision rows.
      shape: the shape of the batch; rows and vision_rows are multiples of len(cells).
      vision: vision facts of the backbone.
      mine: the cells, ascending, whose pixels this process uploads; `patches` then has their vision rows and no others,
        and of the other cells' images only the grids are read. None: all cells.
    """
    rows_each, vision_each = shape.rows // len(cells), shape.vision_rows // len(cells)
    mine = range(len(cells)) if mine is None else mine
    batch = empty_batch(shape, vision, len(mine) * vision_each)
    for place, number in enumerate(mine):
        _fill_pixels(np.asarray(batch.patches)[place * vision_each :], cells[number], images)
    for number, cell in enumerate(cells):
        first_cell = _fill_vision(batch, cell, number * vision_each, images, vision)
        for offset, pieces in enumerate(cell.rows):
            row = number * rows_each + offset
            column = segment = text = 0
            seen: list[int] = []
            for piece in pieces:
                group = groups[piece.group]
                grids = [images[key].grid for key in group.images]
                tokens, positions, local, start = expand_prefix(prefixes[piece.group], grids, vision)
                base = np.concatenate(
                    [
                        first_cell[key] + np.arange(vision.layout.row_cells(vision.layout.num_patches(grid)))
                        for key, grid in zip(group.images, grids, strict=True)
                    ]
                    or [np.zeros(1, np.int64)]
                )
                segment += 1
                own = segment
                _put(batch, row, column, tokens, positions, own, own)
                span = slice(column, column + len(tokens))
                batch.image_cell[row, span] = np.where(local >= 0, base[local], -1)
                seen.extend(column + np.flatnonzero(local >= 0) if vision.layout.apart else ())
                column += len(tokens)
                for record, size in piece.texts:
                    segment += 1
                    at = np.repeat(np.arange(start, start + size)[:, None], 3, axis=1)
                    _put(batch, row, column, examples[record].text, at, segment, own)
                    column += size
                    batch.pool[row, text] = column - 1
                    batch.record[row, text] = record
                    batch.target[row, text] = examples[record].target
                    batch.weight[row, text] = examples[record].weight
                    text += 1
            batch.image_token[row, : len(seen)] = seen
    return batch


def _put(
    batch: PackedBatch, row: int, column: int, tokens: np.ndarray, at: np.ndarray, segment: int, prefix: int
) -> None:
    span = slice(column, column + len(tokens))
    batch.tokens[row, span] = tokens
    batch.positions[row, span] = at
    batch.segment[row, span] = segment
    batch.prefix[row, span] = prefix


def _fill_vision(
    batch: PackedBatch, cell: Cell, first_row: int, images: Mapping[Hashable, ImagePatches], vision: Vision
) -> dict[Hashable, int]:
    """Describes the images of a cell in its vision rows; returns the first merged cell of each image."""
    first_cell: dict[Hashable, int] = {}
    layout = vision.layout
    row_cells = layout.row_cells(batch.patch_segment.shape[1])
    for offset, keys in enumerate(cell.vision):
        row, column = first_row + offset, 0
        for number, key in enumerate(keys, start=1):
            grid = images[key].grid
            span = slice(column, column + layout.num_patches(grid))
            batch.patch_position[row, span] = layout.patch_positions(grid)
            batch.patch_segment[row, span] = np.where(layout.real_patches(grid), number, 0)
            first_cell[key] = row * row_cells + layout.row_cells(column)
            column = span.stop
    return first_cell


def _fill_pixels(patches: np.ndarray, cell: Cell, images: Mapping[Hashable, ImagePatches]) -> None:
    """Writes the pixels of a cell's images into its vision rows, where `_fill_vision` says they are."""
    for row, keys in enumerate(cell.vision):
        column = 0
        for key in keys:
            pixels = images[key].patches
            patches[row, column : column + len(pixels)] = pixels
            column += len(pixels)
