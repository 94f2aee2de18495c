"""Attention with memory linear in length, on any device: online softmax over blocks of keys.

Blocks that no query of a block sees are left out by what `blocks.py` says of their ids, so a row of many short groups
costs little more than the pairs that see each other. The backward pass keeps queries, keys, values, output and lse, and
computes the scores again: five products for the two of the forward pass. (Milakov & Gimelshein, arXiv 1805.02867; Rabe
& Staats, arXiv 2112.05682; Dao et al., arXiv 2205.14135.)
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from multitap_jax.backbones.attention.blocks import Ranges, block_ranges
from multitap_jax.backbones.attention.partial import Part, fold_rows
from multitap_jax.backbones.attention.rule import MASKED_SCORE, Keys, Queries, Visibility, visible
from multitap_jax.backbones.layers import matmul_precision

# Keys of a block, and rows of scores (queries times heads of a group) of a block: a tile of scores takes ROWS * BLOCK
# floats, for one key head at a time on a CPU, where it should stay in the cache, and for all of them elsewhere.
BLOCK = 256
ROWS = 1024


class Prepared(NamedTuple):
    """What the rule asks, and which blocks of keys a block of queries needs."""

    queries: Queries
    keys: Keys


class Tiles(NamedTuple):
    """One row, cut into blocks of queries [n, G, size * Q, D] and of keys [m, G, size, D], with what the rule asks."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    queries: Queries  # [n, size]
    keys: Keys  # [m, size]
    ranges: Ranges  # [n]


def prepare(queries: Queries, keys: Keys) -> Prepared:
    """What is prepared once a forward pass."""
    return Prepared(queries, keys)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility) -> jax.Array:
    """[B, Sq, G, Q, D] from queries [B, Sq, G, Q, D], keys and values [B, Sk, G, D]."""
    return _attend(visibility.setup.platform == "cpu", q, k, v, visibility.prepared)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(serial: bool, q: jax.Array, k: jax.Array, v: jax.Array, prepared: Prepared) -> jax.Array:
    return forward(serial, q, k, v, prepared).out.astype(q.dtype)


def _attend_fwd(serial: bool, q: jax.Array, k: jax.Array, v: jax.Array, prepared: Prepared) -> tuple[jax.Array, Any]:
    part = forward(serial, q, k, v, prepared)
    out = part.out.astype(q.dtype)
    return out, (q, k, v, prepared, out, part.lse)


def _attend_bwd(serial: bool, kept: Any, given: jax.Array) -> tuple[Any, ...]:
    q, k, v, prepared, out, lse = kept
    gradients = backward(serial, q, k, v, prepared, lse, given, correction(out, given))
    return *(g.astype(x.dtype) for g, x in zip(gradients, (q, k, v), strict=True)), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def correction(out: jax.Array, given: jax.Array) -> jax.Array:
    """float32[B, Sq, G, Q]: what each score's gradient is lowered by, for the softmax sums to one."""
    return jnp.sum(out.astype(jnp.float32) * given.astype(jnp.float32), axis=-1)


def forward(serial: bool, q: jax.Array, k: jax.Array, v: jax.Array, prepared: Prepared) -> Part:
    """The part over these keys; not differentiable. `serial`: one key head after another."""
    group = functools.partial(_by_group, serial, _forward_group)

    def rows(q: jax.Array, k: jax.Array, v: jax.Array, prepared: Prepared, ranges: Ranges) -> Part:
        def row(parts: Any) -> Part:
            tiles = _tiles(*parts)
            out, lse = group(tiles)
            return Part(*(_untile(x, parts[0].shape[:3]) for x in (out, lse)))

        return jax.lax.map(row, (q, k, v, prepared, ranges))

    return fold_rows(rows)(q, k, v, prepared, _ranges(q, prepared))


def backward(
    serial: bool,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    prepared: Prepared,
    lse: jax.Array,
    given: jax.Array,
    lowered: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of a whole to queries, and to these of its keys and values, float32.

    Args:
      serial, q, k, v, prepared: as in `forward`.
      lse: float32[B, Sq, G, Q], of the whole.
      given: [B, Sq, G, Q, D], gradient to the output of the whole.
      lowered: `correction` of the whole.
    """
    group = functools.partial(_by_group, serial, _backward_group)

    def rows(*args: Any) -> Any:
        def row(parts: Any) -> Any:
            *inputs, lse, given, lowered = parts
            tiles, size = _tiles(*inputs), _size(inputs[0])
            per_query = [_tile_queries(x, size) for x in (given, lse[..., None], lowered[..., None])]
            dq, dk, dv = group(tiles, *per_query)
            unblock = lambda x, like: jnp.moveaxis(x, 1, 2).reshape(-1, *like.shape[1:])[: like.shape[0]]
            return _untile(dq, inputs[0].shape[:3]), unblock(dk, inputs[1]), unblock(dv, inputs[2])

        return jax.lax.map(row, args)

    return fold_rows(rows)(q, k, v, prepared, _ranges(q, prepared), lse, given, lowered)


def _by_group(serial: bool, function: Any, tiles: Tiles, *per_query: jax.Array) -> Any:
    """`function` over all key heads at once, or one after another; [n, G, ...] in and out."""
    if not serial:
        return function(tiles, *per_query)

    def one(parts: Any) -> Any:
        (q, k, v), rest = parts[0], parts[1:]
        expand = lambda x: x[:, None]
        out = function(tiles._replace(q=expand(q), k=expand(k), v=expand(v)), *map(expand, rest))
        return jax.tree.map(lambda x: x[:, 0], out)

    swap = lambda x: jnp.swapaxes(x, 0, 1)
    out = jax.lax.map(one, jax.tree.map(swap, (tuple(tiles[:3]), *per_query)))
    return jax.tree.map(swap, out)


def _forward_group(tiles: Tiles) -> tuple[jax.Array, jax.Array]:
    """[n, G, size * Q, D] and [n, G, size * Q, 1]."""

    def block(parts: Any) -> tuple[jax.Array, jax.Array]:
        q, queries, ranges = parts

        def attend(j: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            highest, total, mixed = sums
            k, v, keys = (jax.tree.map(lambda x: _at(x, j), x) for x in (tiles.k, tiles.v, tiles.keys))
            scores = _scores(q, k, queries, keys)
            raised = jnp.maximum(highest, scores.max(axis=-1, keepdims=True))
            weights = jnp.exp(scores - raised)
            shrink = jnp.exp(highest - raised)
            return raised, total * shrink + weights.sum(axis=-1, keepdims=True), mixed * shrink + _product(weights, v)

        empty = jnp.zeros((*q.shape[:-1], 1), jnp.float32)
        start = (empty + MASKED_SCORE, empty, jnp.zeros(q.shape, jnp.float32))
        highest, total, mixed = jax.lax.fori_loop(ranges.first, ranges.end, attend, start)
        # What is summed before the first key that is seen shrinks to nothing; where none is seen, it has to go.
        some = highest > MASKED_SCORE
        total = jnp.where(some, total, 1.0)
        return jnp.where(some, mixed / total, 0.0), jnp.where(some, highest + jnp.log(total), MASKED_SCORE)

    return jax.lax.map(block, (tiles.q, tiles.queries, tiles.ranges))


def _backward_group(
    tiles: Tiles, given: jax.Array, lse: jax.Array, lowered: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients like tiles.q, tiles.k and tiles.v, float32."""

    def block(sums: tuple[jax.Array, jax.Array], parts: Any) -> Any:
        q, given, lse, lowered, queries, ranges = parts
        lse = jnp.where(lse > MASKED_SCORE, lse, 0.0)  # so that nothing seen is weighted with nothing

        def attend(j: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq, dk, dv = sums
            k, v, keys = (jax.tree.map(lambda x: _at(x, j), x) for x in (tiles.k, tiles.v, tiles.keys))
            weights = jnp.exp(_scores(q, k, queries, keys) - lse)
            dscores = weights * (_product(given, jnp.swapaxes(v, -1, -2)) - lowered) * q.shape[-1] ** -0.5
            turned = lambda x: jnp.swapaxes(x, -1, -2)
            add = lambda total, x: jax.lax.dynamic_update_index_in_dim(total, _at(total, j) + x, j, 0)
            dk = add(dk, _product(turned(dscores), q))
            return dq + _product(dscores, k), dk, add(dv, _product(turned(weights), given))

        dq = jnp.zeros(q.shape, jnp.float32)
        dq, *sums = jax.lax.fori_loop(ranges.first, ranges.end, attend, (dq, *sums))
        return tuple(sums), dq

    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
    parts = (tiles.q, given, lse, lowered, tiles.queries, tiles.ranges)
    (dk, dv), dq = jax.lax.scan(block, (zeros(tiles.k), zeros(tiles.v)), parts)
    return dq, dk, dv


def _scores(q: jax.Array, k: jax.Array, queries: Queries, keys: Keys) -> jax.Array:
    """Scores float32[G, size * Q, size] of a tile, `MASKED_SCORE` where a query does not see a key."""
    scores = _product(q, jnp.swapaxes(k, -1, -2)) * q.shape[-1] ** -0.5
    seen = visible(*jax.tree.map(lambda x: x[None], (queries, keys)))  # [1, queries, keys]
    by_query = scores.reshape(scores.shape[0], seen.shape[1], -1, seen.shape[2])
    return jnp.where(seen[:, :, None], by_query, MASKED_SCORE).reshape(scores.shape)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """float32[G, n, m] = [G, n, l] [G, l, m], in the shorter of the two types."""
    dtype = min(a.dtype, b.dtype, key=lambda dtype: jnp.dtype(dtype).itemsize)
    return jnp.matmul(
        a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32, precision=matmul_precision(dtype)
    )


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)


def _size(q: jax.Array) -> int:
    """Queries of a block of [Sq, G, Q, D]."""
    return _even(q.shape[0], max(ROWS // q.shape[2], 1))


def _even(length: int, most: int) -> int:
    """The size of equal blocks of at most `most`, with as little padding as their number allows."""
    return -(-length // -(-length // most))


def _ranges(q: jax.Array, prepared: Prepared) -> Ranges:
    return block_ranges(*prepared, _size(q[0]), _even(prepared.keys.segment.shape[1], BLOCK))


def _split(x: jax.Array, size: int) -> jax.Array:
    """[S, ...] -> [n, size, ...], the tail padded with zeros: segment 0."""
    x = jnp.pad(x, [(0, -x.shape[0] % size)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, size, *x.shape[1:])


def _tile_queries(x: jax.Array, size: int) -> jax.Array:
    """[Sq, G, Q, ...] -> [n, G, size * Q, ...]."""
    x = jnp.moveaxis(_split(x, size), 2, 1)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _untile(x: jax.Array, like: tuple[int, ...]) -> jax.Array:
    """[n, G, size * Q, D or 1] -> [Sq, G, Q, D] or [Sq, G, Q] of the shape `like`."""
    length, groups, heads = like
    x = jnp.moveaxis(x.reshape(*x.shape[:2], -1, heads, x.shape[-1]), 1, 2)
    x = x.reshape(-1, groups, heads, x.shape[-1])[:length]
    return x[..., 0] if x.shape[-1] == 1 else x


def _tiles(q: jax.Array, k: jax.Array, v: jax.Array, prepared: Prepared, ranges: Ranges) -> Tiles:
    size, block = _size(q), _even(k.shape[0], BLOCK)
    by_head = lambda x: jnp.moveaxis(_split(x, block), 2, 1)
    cut = lambda size: lambda x: _split(jnp.asarray(x), size)
    queries, keys = jax.tree.map(cut(size), prepared.queries), jax.tree.map(cut(block), prepared.keys)
    return Tiles(_tile_queries(q, size), by_head(k), by_head(v), queries, keys, ranges)
