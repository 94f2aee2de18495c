"""Which blocks of keys a block of queries needs: what lets a loop over blocks leave out what nobody sees."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from multitap_jax.backbones.attention.rule import Keys, Queries

_LARGEST = jnp.iinfo(jnp.int32).max


class Ranges(NamedTuple):
    """For each block of queries the blocks of keys from `first` to before `end` hold all that it sees; int32[B, n]."""

    first: jax.Array
    end: jax.Array


def block_ranges(queries: Queries, keys: Keys, query_block: int, key_block: int) -> Ranges:
    """Compares least and largest ids and columns of blocks: never too narrow, and tight where runs are contiguous.

    Lengths are rounded up to whole blocks.
    """
    segment, prefix, column = (jnp.asarray(x) for x in queries)
    real = segment > 0
    low = lambda x: _blocks(jnp.where(real, x, _LARGEST), query_block, _LARGEST).min(axis=2)
    high = lambda x: _blocks(jnp.where(real, x, -_LARGEST), query_block, -_LARGEST).max(axis=2)
    key_segment, key_column = (jnp.asarray(x) for x in keys)
    key_low = lambda x: _blocks(x, key_block, _LARGEST).min(axis=2)[:, None, :]
    key_high = lambda x: _blocks(x, key_block, -_LARGEST).max(axis=2)[:, None, :]
    least, most = key_low(key_segment), key_high(key_segment)
    meets = lambda ids: (low(ids)[:, :, None] <= most) & (least <= high(ids)[:, :, None])
    needed = (meets(segment) | meets(prefix)) & (key_low(key_column) <= high(column)[:, :, None])
    count = needed.shape[2]
    first = jnp.argmax(needed, axis=2).astype(jnp.int32)
    end = count - jnp.argmax(needed[:, :, ::-1], axis=2).astype(jnp.int32)
    return Ranges(first, jnp.where(needed.any(axis=2), end, first))


def _blocks(x: jax.Array, size: int, fill: int) -> jax.Array:
    """int32[B, S] -> int32[B, n, size], the tail filled."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)), constant_values=fill)
    return x.reshape(x.shape[0], -1, size)
