"""A view of the whole picture out of its tiles, on the device: torch's bicubic interpolation, without smoothing.

A picture of h x w tiles, S pixels a side, becomes S x S pixels. Tiles travel as bytes, but the interpolated values are
fractions (multiples of 1 / 1024, exact in float32): so they are made where they are needed. Letters: R vision rows,
N blocks of a vision row, S pixels a side of a view, C channels.
"""

import jax
import jax.numpy as jnp

from multitap_jax.batch import PackedBatch

# The kernel with a = -0.75, half way between two pixels; at a pixel it takes that pixel alone.
HALF_WAY = (-3 / 32, 19 / 32, 19 / 32, -3 / 32)


def with_overview(batch: PackedBatch, side: int) -> PackedBatch:
    """The batch with float32 patches, and in the blocks of views of the whole what the tiles beside them show.

    Args:
      batch: with `patch_position` of four numbers (see `PackedBatch`).
      side: patches a side of a view.
    """
    patches, view = jnp.asarray(batch.patches), side**2
    rows, count, features = patches.shape
    place = jnp.asarray(batch.patch_position)[:, ::view]  # [R, N, 4], equal for all patches of a view
    segment = jnp.asarray(batch.patch_segment)[:, ::view]
    size = int((features // 3) ** 0.5)
    tiles = patches.astype(jnp.float32).reshape(rows, count // view, side, side, 3, size, size)
    pixels = jnp.transpose(tiles, (0, 1, 4, 2, 5, 3, 6)).reshape(rows, count // view, 3, side * size, side * size)
    # Rows and columns of the whole that a tile adds to; nothing where a block is no tile.
    down, across = (_shares(place[..., first], place[..., first + 1], side * size) for first in (0, 2))
    exact = jax.lax.Precision.HIGHEST
    part = jnp.einsum("rnij,rncjk->rncik", down, pixels, precision=exact)
    part = jnp.einsum("rncik,rnlk->rncil", part, across, precision=exact)
    is_tile = place[..., 1] > 0
    whole = ~is_tile & (segment > 0)
    own = whole[:, :, None] & is_tile[:, None, :] & (segment[:, :, None] == segment[:, None, :])
    made = jnp.einsum("rmn,rncil->rmcil", own.astype(jnp.float32), part, precision=exact)
    pixels = jnp.where(whole[:, :, None, None, None], made, pixels)
    cut = pixels.reshape(rows, count // view, 3, side, size, side, size)
    return batch._replace(patches=jnp.transpose(cut, (0, 1, 3, 5, 2, 4, 6)).reshape(rows, count, features))


def _shares(index: jax.Array, tiles: jax.Array, pixels: int) -> jax.Array:
    """float32[R, N, S, S]: what pixel j of tile `index` of `tiles` in a line adds to pixel i of the whole."""
    index, tiles = index[:, :, None, None], tiles[:, :, None, None]
    made, taken = jnp.arange(pixels, dtype=jnp.int32)[:, None], jnp.arange(pixels, dtype=jnp.int32)[None, :]
    doubled = (2 * made[None, None] + 1) * tiles - 1  # twice the place in the line of tiles
    first, half = doubled // 2, doubled % 2 == 1
    total = jnp.zeros((*index.shape[:2], pixels, pixels), jnp.float32)
    for offset, weight in zip(range(-1, 3), HALF_WAY, strict=True):
        source = jnp.clip(first + offset, 0, tiles * pixels - 1)  # beyond the edge, the edge
        share = jnp.where(half, jnp.float32(weight), jnp.float32(offset == 0))
        total = total + jnp.where(source == index * pixels + taken[None, None], share, 0.0)
    return jnp.where(tiles > 0, total, 0.0)
