"""Shapes: a small, bounded set of batch shapes, since every new one compiles a program.

Lengths come from ladders. Row lengths and vision lengths are picked by cost, counted in padded tokens weighted by the
share of attention, whose cost grows with the row: tokens * (1 + length / (6 * hidden)) (a decoder layer costs about
24 H^2 per token outside attention and 4 S H inside it, counting a multiply-add as two).
"""

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace

from multitap_jax.data.layouts import Vision
from multitap_jax.data.packing import Shape
from multitap_jax.data.placement import Group, need, place

ROW_LENGTHS = tuple(sorted(base * 2**i for base in (64, 80, 96, 112) for i in range(12)))
WASTE = 1.25
STICKY = 1.1  # a row length already compiled is taken unless another saves a tenth
LIMIT = 12  # shapes of one row length after which waste no longer counts
SAMPLE = 128  # groups that suffice to choose a row length


def round_up(value: int, fineness: int = 4) -> int:
    """The next number of a ladder with `fineness` steps an octave (0 ... 8 10 12 14 16 20 24 28 32 ... for 4).

    At most 1 / `fineness` more than `value`.
    """
    if value <= 2 * fineness:
        return value
    step = 1 << (value.bit_length() - fineness.bit_length())
    return -(-value // step) * step


def texts_per_row(row_length: int) -> int:
    """K, the texts that a row may hold: a sixteenth of its tokens, so that K is no dimension of its own."""
    return max(row_length // 16, 4)


def vision_length(patches: Mapping[Hashable, int], multiple: int = 4) -> int:
    """P, the patches of a vision row: the largest image, rounded up a fine ladder (attention grows with its square)."""
    return round_up(-(-max(patches.values(), default=0) // multiple), fineness=32) * multiple


def images_per_row(images: Iterable[Sequence[Hashable]], vision: Vision) -> int | None:
    """I, the image tokens that a row may hold: those of the pair with most; None where images stand in the row.

    Attention to images kept apart costs S * I, whether a token sees an image or not, so rows hold as few as can be.
    """
    return max(map(len, images), default=0) if vision.layout.apart else None


def row_cost(row_length: int, hidden: int) -> float:
    """Relative cost of one row; see the module docstring."""
    return row_length * (1.0 + row_length / (6.0 * hidden))


def choose_row_length(
    groups: Sequence[Group], hidden: int, limit: int, known: Collection[int] = (), max_images: int | None = None
) -> int:
    """The cheapest row length of the ladder for these groups.

    Args:
      groups: what the rows will hold; a sample of them is placed.
      hidden: hidden size of the decoder, for the cost of a row.
      limit: longest row, unless a single pair needs more.
      known: row lengths that programs exist for; one of them is kept unless another saves a tenth.
      max_images: see `images_per_row`.

    Raises:
      ValueError: for a pair longer than the longest row of the ladder.
    """
    longest = max(g.prefix + size for g in groups for _, size in g.texts)
    fitting = [n for n in ROW_LENGTHS if n >= longest]
    if not fitting:
        raise ValueError(f"a pair of {longest} tokens is longer than the longest row, {ROW_LENGTHS[-1]} tokens")
    candidates = [n for n in fitting if n <= limit] or fitting[:1]
    sample = groups[:: -(-len(groups) // SAMPLE)]
    no_patches = {key: 0 for group in sample for key in group.images}

    def cost(length: int) -> float:
        cells = place(
            sample,
            no_patches,
            row_length=length,
            max_texts=texts_per_row(length),
            vision_length=0,
            max_images=max_images,
        )
        return need(cells).rows * row_cost(length, hidden)

    costs = {length: cost(length) for length in candidates}
    best = min(candidates, key=lambda n: (costs[n], n))
    kept = min(costs.keys() & set(known), key=lambda n: (costs[n], n), default=best)
    return kept if costs[kept] <= STICKY * costs[best] else best


class ShapeBook:
    """Remembers the shapes in use and hands out the cheapest that fits, adding one only where it saves a quarter.

    Their number is bounded: from `LIMIT` shapes of a row length on, one is added only where none fits, and then with
    its rows, vision rows and patches rounded up to powers of two.

    Args:
      hidden: hidden size of the decoder, for the cost of a row.
      cells: rows and vision rows are multiples of this.
      block: patches of a vision row are multiples of this.
    """

    def __init__(self, hidden: int, cells: int = 1, block: int = 1):
        self._hidden = hidden
        self._cells = cells
        self._block = block
        self.shapes: list[Shape] = []

    def _cost(self, shape: Shape) -> float:
        # A patch costs about as much as a quarter of a token in towers of the published proportions.
        return shape.rows * row_cost(shape.tokens, self._hidden) + shape.vision_rows * shape.patches / 4

    def fit(self, rows: int, tokens: int, vision_rows: int, patches: int, images: int = 0) -> Shape:
        """The shape for a batch whose fullest cell needs `rows` rows of `tokens` and `vision_rows` of `patches`.

        `images` is the I of `batch.py`.
        """
        wanted = Shape(
            round_up(rows) * self._cells,
            tokens,
            texts_per_row(tokens),
            round_up(vision_rows) * self._cells,
            patches if vision_rows else 0,
            images,
        )
        if wanted in self.shapes:
            return wanted
        fitting = [
            s
            for s in self.shapes
            if s.rows >= wanted.rows
            and s.tokens == wanted.tokens
            and s.vision_rows >= wanted.vision_rows
            and s.patches >= wanted.patches
            and s.images >= wanted.images
        ]
        best = min(fitting, key=self._cost, default=None)
        crowded = sum(s.tokens == wanted.tokens for s in self.shapes) >= LIMIT
        if best is not None and (crowded or self._cost(best) <= WASTE * self._cost(wanted)):
            return best
        if crowded:
            wanted = replace(
                wanted,
                rows=_power_of_two(wanted.rows, self._cells),
                vision_rows=_power_of_two(wanted.vision_rows, self._cells),
                patches=_power_of_two(wanted.patches, self._block),
            )
        self.shapes.append(wanted)
        return wanted


def _power_of_two(value: int, unit: int) -> int:
    """`unit` times the next power of two."""
    count = -(-value // unit)
    return unit << (count - 1).bit_length() if count else 0
