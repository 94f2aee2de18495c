"""Placement: which texts stand in which row, decided from lengths alone (pure, deterministic).

Texts of one image form a group; a group is laid out once as [prefix][text]...; groups too long for a row are split and
repeat their prefix. Rows and vision rows are divided into equal contiguous *cells* (data shards x micro-batches): rows
of a cell only use images of the same cell, so nothing has to travel between devices to place an image.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class PackingError(ValueError):
    """A pair that fits into no row; the message gives the lengths and the remedy."""


class Group(NamedTuple):
    """Texts that share a prefix: its length, image tokens expanded; its image keys; (record, length) of each text."""

    prefix: int
    images: tuple[Hashable, ...]
    texts: tuple[tuple[int, int], ...]


class Piece(NamedTuple):
    """What one row holds of a group: the group's index and (record, length) of the texts placed here."""

    group: int
    texts: tuple[tuple[int, int], ...]
    length: int


@dataclass
class Cell:
    """Rows (lists of pieces) and vision rows (lists of image keys) of one cell."""

    rows: list[list[Piece]] = field(default_factory=list)
    vision: list[list[Hashable]] = field(default_factory=list)


class Need(NamedTuple):
    """Rows and vision rows that the fullest cell needs."""

    rows: int
    vision_rows: int


def split_groups(groups: Sequence[Group], row_length: int, max_texts: int) -> list[Piece]:
    """Cuts groups into pieces of at most `row_length` tokens and `max_texts` texts, in order."""
    pieces = []
    for index, group in enumerate(groups):
        taken: list[tuple[int, int]] = []
        length = group.prefix
        for record, size in group.texts:
            if group.prefix + size > row_length:
                raise PackingError(
                    f"record {record}: {group.prefix} prefix tokens and {size} text tokens exceed rows of {row_length}"
                )
            if taken and (length + size > row_length or len(taken) == max_texts):
                pieces.append(Piece(index, tuple(taken), length))
                taken, length = [], group.prefix
            taken.append((record, size))
            length += size
        pieces.append(Piece(index, tuple(taken), length))
    return pieces


Size = tuple[int, ...]  # of an item, in every dimension in which a bin is bounded; the first one decides the order


def _best_fit(sizes: Sequence[Size], capacity: Size) -> list[list[int]]:
    """Best-fit decreasing: items -> bins whose sums stay within `capacity` in every dimension."""
    bins: list[list[int]] = []
    room: list[Size] = []
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i][0], i)):
        size = sizes[item]
        fits = [b for b, left in enumerate(room) if all(x >= y for x, y in zip(left, size, strict=True))]
        if fits:
            best = min(fits, key=lambda b: (room[b][0], b))
        else:
            best = len(bins)
            bins.append([])
            room.append(capacity)
        bins[best].append(item)
        room[best] = tuple(x - y for x, y in zip(room[best], size, strict=True))
    return bins


def place(
    groups: Sequence[Group],
    patches: Mapping[Hashable, int],
    *,
    row_length: int,
    max_texts: int,
    vision_length: int,
    max_images: int | None = None,
    cells: int = 1,
    bonds: Sequence[Hashable] | None = None,
) -> list[Cell]:
    """Places groups into `cells` cells; best-fit decreasing within a cell, the emptiest cell first.

    Args:
      groups: what to place.
      patches: patches of each image key.
      row_length: tokens a row (S).
      max_texts: texts a row (K).
      vision_length: patches a vision row (P).
      max_images: image tokens a row (I) where the backbone keeps images apart; None: as many as there is room for.
      cells: number of cells.
      bonds: a label of each group; groups of one label share a cell, whatever it costs. None: each stands for itself,
        and may be cut between cells, unless its images are kept apart: then each cell would encode them anew.

    Raises:
      PackingError: for a pair longer than a row or an image larger than a vision row.
    """
    pieces = split_groups(groups, row_length, max_texts)
    shares: list[list[Piece]] = [[] for _ in range(cells)]
    load = [0] * cells
    bound: dict[Hashable, list[Piece]] = {}
    for number, piece in enumerate(pieces):
        whole = piece.group if max_images is not None else number
        bound.setdefault(whole if bonds is None else bonds[piece.group], []).append(piece)
    size = lambda unit: sum(piece.length for piece in unit)
    by_size = lambda unit: (-size(unit), unit[0].group, unit[0].texts[0][0])
    for unit in sorted(bound.values(), key=by_size) if cells > 1 else bound.values():
        emptiest = load.index(min(load))
        shares[emptiest] += unit
        load[emptiest] += size(unit)
    out = []
    for share in shares:
        images = [len(groups[p.group].images) if max_images is not None else 0 for p in share]
        sizes = [(p.length, len(p.texts), count) for p, count in zip(share, images, strict=True)]
        bins = _best_fit(sizes, (row_length, max_texts, max_images or 0))
        rows = [[share[i] for i in sorted(row)] for row in bins]
        keys = list(dict.fromkeys(key for row in rows for piece in row for key in groups[piece.group].images))
        for key in keys:
            if patches[key] > vision_length:
                raise PackingError(f"an image of {patches[key]} patches exceeds vision rows of {vision_length}")
        pictures = _best_fit([(patches[key],) for key in keys], (vision_length,))
        out.append(Cell(rows, [[keys[i] for i in sorted(row)] for row in pictures]))
    return out


def need(cells: Sequence[Cell]) -> Need:
    """Rows and vision rows of the fullest cell."""
    return Need(max(len(c.rows) for c in cells), max(len(c.vision) for c in cells))
