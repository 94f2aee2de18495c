"""Rotary positions on the host (Qwen2-VL, arXiv 2409.12191, section 2.1; official flat mode, transformers 4.46.1).

Text tokens advance all three axes together; what an image does is the layout's to say: in `mrope` mode it spans a
rectangle of positions, in `flat` mode, the only one most models know, it advances like text.
"""

from collections.abc import Sequence

import numpy as np

from multitap_jax.data.layouts import Grid, Vision


def expand_prefix(
    prefix: np.ndarray, grids: Sequence[Grid], vision: Vision
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Expands image placeholders of a prefix and gives every token its position.

    Args:
      prefix: int32[p] with one placeholder per image, in order.
      grids: of each image.
      vision: layout, placeholder and position mode.

    Returns:
      tokens int32[q]; positions int32[q, 3]; cell int32[q]: cells of each image counted from its first, offset by
      those of the images before it, -1 for text; the position at which a text that follows starts.

    Raises:
      ValueError: placeholders and grids differ in number, or images that the backbone keeps apart stand apart.
    """
    where = np.flatnonzero(prefix == vision.placeholder)
    if len(where) != len(grids):
        raise ValueError(f"the prompt has {len(where)} image placeholders, but the record has {len(grids)} images")
    if vision.layout.apart and np.any(np.diff(where) != 1):
        raise ValueError("the images of a prompt must stand next to each other: later texts see all of them or none")
    tokens, positions, cells = [], [], []
    current = 0

    def text(run: np.ndarray) -> None:
        nonlocal current
        tokens.append(run)
        positions.append(np.repeat(np.arange(current, current + len(run))[:, None], 3, axis=1))
        cells.append(np.full(len(run), -1))
        current += len(run)

    start = taken = 0
    for end, grid in zip(where, grids, strict=True):
        text(prefix[start:end])
        start = int(end) + 1
        local = vision.layout.token_cells(grid)
        offsets, advance = vision.layout.token_positions(grid, vision.position_mode)
        tokens.append(np.full(len(local), vision.placeholder))
        positions.append(current + offsets)
        cells.append(taken + local)
        taken += vision.layout.row_cells(vision.layout.num_patches(grid))
        current += advance
    text(prefix[start:])
    return (
        np.concatenate(tokens).astype(np.int32),
        np.concatenate(positions).astype(np.int32),
        np.concatenate(cells).astype(np.int32),
        current,
    )
