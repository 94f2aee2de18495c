"""Attention inside windows of a picture: patches are sorted by window, and a block of them sees its neighbours alone.

A mask over window ids says exactly who sees whom, but costs P keys a query. Sorted by window, the patches of a window
of w patches stand together, so within blocks of w a query finds its whole window in its own block and the two beside
it: 3 w keys a query whatever the pictures' sizes, and shapes that do not depend on them. Windows are cut at the
borders of a picture, so they hold w patches or fewer. Sorting moves whole cells, and attention over whole pictures does
not mind the order, so a tower sorts once before its layers and sorts back once behind them.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from multitap_jax.backbones.attention import (
    DENSE,
    Keys,
    Queries,
    Setup,
    Visibility,
    attention,
    make_cross_visibility,
    make_visibility,
)


class Windows(NamedTuple):
    """Cells sorted by window.

    Attributes:
      order: int32[R, C], the cell that comes to each place.
      segment: int32[R, P], window ids of the sorted patches, from 1; 0 is padding.
    """

    order: jax.Array
    segment: jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=("blocks",), meta_fields=("width",))
@dataclasses.dataclass(frozen=True)
class Local:
    """Who sees whom among blocks of `width` queries and the 3 `width` keys around them, folded into rows."""

    blocks: Visibility
    width: int


def sort_windows(position: jax.Array, segment: jax.Array, side: int, cell: int) -> Windows:
    """Sorts cells by picture, row of windows and column of windows.

    Args:
      position: int32[R, P, 2], (row, column) of the patches, whole cells one after another.
      segment: int32[R, P], picture ids, 0 at padding.
      side: patches a side of a window, a multiple of that of a cell.
      cell: patches of a cell.
    """
    window = position[:, ::cell] // side
    count = window.shape[1]
    keys = (segment[:, ::cell], window[:, :, 0], window[:, :, 1])
    place = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32)[None], keys[0].shape)
    *sorted_keys, order = jax.lax.sort((*keys, place), dimension=1, is_stable=True, num_keys=3)
    stacked = jnp.stack(sorted_keys)
    new = jnp.any(stacked[:, :, 1:] != stacked[:, :, :-1], axis=0)
    number = 1 + jnp.cumsum(jnp.pad(new, ((0, 0), (1, 0))), axis=1, dtype=jnp.int32)
    return Windows(order, jnp.repeat(jnp.where(sorted_keys[0] > 0, number, 0), cell, axis=1))


def sort_cells(x: jax.Array, order: jax.Array) -> jax.Array:
    """[R, P, ...] with its cells in the order int32[R, C]; P is C or a multiple of it."""
    cells = x.reshape(*order.shape, -1)
    return jnp.take_along_axis(cells, order[:, :, None], axis=1, mode="clip").reshape(x.shape)


def unsort_cells(x: jax.Array, order: jax.Array) -> jax.Array:
    """The inverse of `sort_cells`."""
    return sort_cells(x, jnp.argsort(order, axis=1))


def make_local_visibility(segment: jax.Array, width: int, *, setup: Setup = DENSE) -> Visibility | Local:
    """Prepares attention inside runs of equal `segment`, at most `width` long; a plain mask where that costs no more.

    Args:
      segment: int32[R, P], equal ids side by side; runs of 0, which sees nothing, may be of any length.
      width: of the longest run.
      setup: see `make_visibility`.

    Raises:
      UnsupportedAttentionError: there is no such backend.
    """
    if segment.shape[1] <= 3 * width:
        return make_visibility(segment, causal=False, setup=setup)
    ids, around = _blocks(segment, width), _around(segment, width)
    queries = Queries(ids, ids, jnp.zeros_like(ids))
    return Local(make_cross_visibility(queries, Keys(around, jnp.zeros_like(around)), setup=setup), width)


def local_attention(q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility | Local) -> jax.Array:
    """As `attention`, also under a `Local` visibility."""
    if isinstance(visibility, Visibility):
        return attention(q, k, v, visibility)
    width = visibility.width
    out = attention(_blocks(q, width), _around(k, width), _around(v, width), visibility.blocks)
    return out.reshape(q.shape[0], -1, *q.shape[2:])[:, : q.shape[1]]


def scoped_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, whole: Visibility, local: Visibility | Local, full: jax.Array
) -> jax.Array:
    """As `attention`, under `whole` where bool[] `full`, else under `local`; only one of the two is computed."""
    branches = (functools.partial(attention, visibility=whole), functools.partial(local_attention, visibility=local))
    return jax.lax.cond(full, *branches, q, k, v)


def _blocks(x: jax.Array, width: int) -> jax.Array:
    """[R, P, ...] -> [R * n, width, ...], the tail padded with zeros."""
    x = _pad(x, 0, -x.shape[1] % width)
    return x.reshape(-1, width, *x.shape[2:])


def _around(x: jax.Array, width: int) -> jax.Array:
    """[R, P, ...] -> [R * n, 3 width, ...]: each block between the one before and the one after it."""
    length = x.shape[1] + -x.shape[1] % width
    x = _pad(x, width, length - x.shape[1] + width)
    parts = (x[:, start : start + length].reshape(-1, width, *x.shape[2:]) for start in (0, width, 2 * width))
    return jnp.concatenate(list(parts), axis=1)


def _pad(x: jax.Array, before: int, after: int) -> jax.Array:
    return jnp.pad(x, [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2))
