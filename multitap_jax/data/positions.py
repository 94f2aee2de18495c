"""Rotary positions on the host (Qwen2-VL, arXiv 2409.12191, section 2.1; official flat mode, transformers 4.46.1).

`mrope`: text tokens advance all three axes together; an image that starts at position c spans (c, c + row, c + column)
over its merged grid and the next token stands at c + max(rows, columns). `flat`: one running position on all axes.
"""

from collections.abc import Sequence

import numpy as np

MODES = ("mrope", "flat")


def expand_prefix(
    prefix: np.ndarray, placeholder: int, grids: Sequence[tuple[int, int]], mode: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Expands image placeholders of a prefix and gives every token its position.

    Args:
      prefix: int32[p] with one placeholder per image, in order.
      placeholder: id of the placeholder token.
      grids: merged (rows, columns) of each image.
      mode: "mrope" or "flat".

    Returns:
      tokens int32[q]; positions int32[q, 3]; cell int32[q]: running index over the images' merged cells, -1 for text;
      the position at which a text that follows starts.

    Raises:
      ValueError: if placeholders and grids differ in number, or for an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"position mode {mode!r}; the modes are {', '.join(MODES)}")
    where = np.flatnonzero(prefix == placeholder)
    if len(where) != len(grids):
        raise ValueError(f"the prompt has {len(where)} image placeholders, but the record has {len(grids)} images")
    tokens, positions, cells = [], [], []
    start = current = taken = 0
    for end, (rows, columns) in zip([*where, len(prefix)], [*grids, (0, 0)], strict=True):
        run = prefix[start:end]
        tokens.append(run)
        positions.append(np.repeat(np.arange(current, current + len(run))[:, None], 3, axis=1))
        cells.append(np.full(len(run), -1))
        current += len(run)
        start = end + 1
        count = rows * columns
        if not count:
            continue
        tokens.append(np.full(count, placeholder))
        cells.append(np.arange(taken, taken + count))
        taken += count
        if mode == "flat":
            positions.append(np.repeat(np.arange(current, current + count)[:, None], 3, axis=1))
            current += count
        else:
            row, column = np.divmod(np.arange(count), columns)
            positions.append(np.stack([np.full(count, current), current + row, current + column], axis=1))
            current += max(rows, columns)
    return (
        np.concatenate(tokens).astype(np.int32),
        np.concatenate(positions).astype(np.int32),
        np.concatenate(cells).astype(np.int32),
        current,
    )
