"""One entry to attention, one mask rule, several backends.

The rule is the one of `batch.py`: query `q` sees key `k` of its row when

    segment[q] > 0  and  (segment[k] == segment[q] or segment[k] == prefix[q])  and  column[k] <= column[q]

In self-attention a token has the same segment and column as a query and as a key; where they differ (a token that sees
an image, padding that is seen but does not see itself) they are given apart. Every backend honours exactly this rule or
refuses. A query that sees nothing (padding) gets a finite value and a zero or finite gradient, never NaN. Scores and
softmax are float32 whatever the type of the inputs.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from multitap_jax.backbones.layers import matmul_precision
from multitap_jax.batch import Array

# Finite, so that a row without any visible key stays finite; far below every real score.
MASKED_SCORE = -1e30
# Keys and queries a step of the blockwise backend: its scores take B * A * BLOCK^2 floats at a time.
BLOCK = 512
# Rows of scores a step of the chunked backend (queries times heads of a group), measured on Xeon cores with 2 MB of L2.
CHUNK = 1600
# Rows from which "auto" prefers it on a CPU; below, the loop costs more than the cache saves.
CHUNKED_FROM = 512


class UnsupportedAttentionError(ValueError):
    """The attention backend does not exist or cannot honour the mask rule."""


class Queries(NamedTuple):
    """What the rule asks of queries: their run (0 sees nothing), the other run they see, their column; int32[B, Sq]."""

    segment: Array
    prefix: Array
    column: Array


class Keys(NamedTuple):
    """What the rule asks of keys: their run, and the column from which on queries see them; int32[B, Sk]."""

    segment: Array
    column: Array


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("queries", "keys", "mask"), meta_fields=("ordered", "backend")
)
@dataclasses.dataclass(frozen=True)
class Visibility:
    """Who sees whom, prepared once a forward pass and shared by all layers of a stack.

    Attributes:
      queries, keys: what the rule asks of them.
      mask: bool[B, Sq, Sk] for a backend that reads the whole mask, None for the others.
      ordered: queries and keys are the same tokens and their columns count them, so late keys may be left out.
      backend: name of the backend that computes attention under it.
    """

    queries: Queries
    keys: Keys
    mask: jax.Array | None
    ordered: bool
    backend: str


def visible(queries: Queries, keys: Keys) -> jax.Array:
    """The mask rule: bool[B, Sq, Sk]."""
    segment = keys.segment[:, None, :]
    seen = (segment == queries.segment[:, :, None]) | (segment == queries.prefix[:, :, None])
    return seen & (queries.segment > 0)[:, :, None] & (keys.column[:, None, :] <= queries.column[:, :, None])


def make_visibility(segment: Array, prefix: Array | None = None, *, causal: bool, backend: str = "dense") -> Visibility:
    """Prepares the mask of self-attention.

    Args:
      segment: int32[B, S], run ids; 0 is padding.
      prefix: int32[B, S], id of the other run a token sees; None when it sees only its own.
      causal: whether keys after the query are hidden.
      backend: a name of `BACKENDS`, or "auto": "chunked" for long rows on a CPU, "dense" elsewhere.

    Raises:
      UnsupportedAttentionError: there is no such backend.
    """
    segment = jnp.asarray(segment)
    column = jnp.arange(segment.shape[1], dtype=jnp.int32) if causal else jnp.zeros(segment.shape[1], jnp.int32)
    column = jnp.broadcast_to(column[None], segment.shape)
    queries = Queries(segment, segment if prefix is None else jnp.asarray(prefix), column)
    return _prepare(queries, Keys(segment, column), causal, backend)


def make_cross_visibility(queries: Queries, keys: Keys, *, backend: str = "dense") -> Visibility:
    """Prepares the mask of queries and keys that are not the same tokens, or not under the same ids.

    Raises:
      UnsupportedAttentionError: there is no such backend.
    """
    return _prepare(Queries(*map(jnp.asarray, queries)), Keys(*map(jnp.asarray, keys)), False, backend)


def _prepare(queries: Queries, keys: Keys, ordered: bool, backend: str) -> Visibility:
    check_backend(backend)
    if backend == AUTO:
        long = queries.segment.shape[1] >= CHUNKED_FROM
        backend = "chunked" if long and jax.default_backend() == "cpu" else "dense"
    mask = visible(queries, keys) if backend == "dense" else None
    return Visibility(queries, keys, mask, ordered, backend)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility) -> jax.Array:
    """Scaled dot-product attention with grouped keys and values; query head a uses key head a // (A / G).

    Args:
      q: [B, Sq, A, D].
      k: [B, Sk, G, D], with A a multiple of G; keys are never repeated in memory.
      v: [B, Sk, G, D].
      visibility: from `make_visibility` or `make_cross_visibility`.

    Returns:
      [B, Sq, A, D] in the type of `q`.
    """
    rows, length, heads, dim = q.shape
    groups = k.shape[2]
    q = q.reshape(rows, length, groups, heads // groups, dim)
    out = BACKENDS[visibility.backend](q, k, v, visibility)
    return out.reshape(rows, length, heads, dim).astype(q.dtype)


def attention_in_parts(q: jax.Array, parts: Sequence[tuple[jax.Array, jax.Array, Visibility]]) -> jax.Array:
    """As dense `attention` over the keys of all parts together, which stay where they lie instead of being joined.

    Args:
      q: [B, Sq, A, D].
      parts: keys and values [B, Sk, G, D], and who sees them, prepared for the backend "dense".

    Returns:
      [B, Sq, A, D] in the type of `q`.
    """
    rows, length, heads, dim = q.shape
    groups = parts[0][0].shape[2]
    grouped = q.reshape(rows, length, groups, heads // groups, dim)
    scores = []
    for k, _, visibility in parts:
        assert visibility.mask is not None
        scores.append(jnp.where(visibility.mask[:, None, None], _scores(grouped, k), MASKED_SCORE))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    ends = np.cumsum([k.shape[1] for k, _, _ in parts])[:-1]
    shares = jnp.split(weights, ends, axis=-1)
    out = functools.reduce(jnp.add, [_mix(w, v) for w, (_, v, _) in zip(shares, parts, strict=True)])
    return out.reshape(rows, length, heads, dim).astype(q.dtype)


def backend_elsewhere(backend: str, platforms: Sequence[str]) -> str:
    """The backend to trace with for other platforms than the one at hand, on whose name "auto" depends.

    Dense attention runs everywhere.
    """
    return "dense" if backend == AUTO and tuple(platforms) != (jax.default_backend(),) else backend


def check_backend(backend: str) -> None:
    """Raises UnsupportedAttentionError unless `backend` is known."""
    known = (AUTO, *sorted(BACKENDS))
    if backend not in known:
        raise UnsupportedAttentionError(f"attention = {backend!r} is no backend; known: {', '.join(known)}")


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """Scaled scores float32[B, G, Q, Sq, Sk] of queries [B, Sq, G, Q, D] and keys [B, Sk, G, D]; Q = A / G."""
    precision = matmul_precision(q.dtype)
    scores = jnp.einsum("bsgqd,btgd->bgqst", q, k, preferred_element_type=jnp.float32, precision=precision)
    return scores * q.shape[-1] ** -0.5


def _mix(weights: jax.Array, v: jax.Array) -> jax.Array:
    """float32[B, Sq, G, Q, D] from weights [B, G, Q, Sq, Sk] and values [B, Sk, G, D]."""
    return jnp.einsum(
        "bgqst,btgd->bsgqd",
        weights.astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
        precision=matmul_precision(v.dtype),
    )


def _dense(q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility) -> jax.Array:
    assert visibility.mask is not None
    scores = jnp.where(visibility.mask[:, None, None], _scores(q, k), MASKED_SCORE)
    return _mix(jax.nn.softmax(scores, axis=-1), v)


def _chunked(q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility) -> jax.Array:
    """Dense attention for one block of queries of one key head after another, so that the scores stay in the cache.

    On a CPU this is several times faster than scores of all pairs at once, which go through memory. The body is
    rematerialised: the backward pass keeps no scores either.
    """
    length, dim, keys = q.shape[1], q.shape[-1], k.shape[1]
    count = -(-length * q.shape[3] // CHUNK)
    size = -(-length // count)

    def split(x: jax.Array) -> jax.Array:  # [B, Sq, ...] -> [B, count, size, ...], the tail padded with segment 0
        x = jnp.pad(x, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(x.shape[0], count, size, *x.shape[2:])

    def row(parts):
        q, k, v, queries, keyed = parts  # q [G, count, size, Q, D]; k, v [G, Sk, D]; queries [count, size]; keyed [Sk]

        def head(parts):
            q, k, v = parts

            @jax.checkpoint
            def block(parts):
                q, queries = parts
                mask = visible(*jax.tree.map(lambda x: x[None], (queries, keyed)))[0]
                precision = matmul_precision(q.dtype)
                scores = jnp.matmul(
                    q.reshape(-1, dim), k.T, preferred_element_type=jnp.float32, precision=precision
                ).reshape(size, -1, keys)
                scores = jnp.where(mask[:, None], scores * dim**-0.5, MASKED_SCORE)
                weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
                total = weights.sum(axis=-1, keepdims=True)
                mixed = jnp.matmul(
                    weights.astype(v.dtype).reshape(-1, keys),
                    v,
                    preferred_element_type=jnp.float32,
                    precision=precision,
                )
                return mixed.reshape(size, -1, dim) / total

            return jax.lax.map(block, (q, queries))

        return jax.lax.map(head, (q, k, v))

    grouped = jnp.transpose(split(q), (0, 3, 1, 2, 4, 5))
    by_head = (jnp.transpose(x, (0, 2, 1, 3)) for x in (k, v))
    out = jax.lax.map(row, (grouped, *by_head, jax.tree.map(split, visibility.queries), visibility.keys))
    out = jnp.transpose(out, (0, 2, 3, 1, 4, 5))  # [B, G, count, size, Q, D] -> [B, count, size, G, Q, D]
    return out.reshape(out.shape[0], count * size, *out.shape[3:])[:, :length]


def _blockwise(q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility) -> jax.Array:
    """Online softmax over blocks of keys, for one block of queries after another (Milakov & Gimelshein 2018).

    Both scan bodies are rematerialised, so the backward pass too holds one block of scores at a time and, for one block
    of queries, the running sums after each block of keys: memory grows linearly with S.
    """
    length = q.shape[1]

    def split(x: jax.Array) -> jax.Array:  # [B, S, ...] -> [count, B, size, ...], the tail padded with segment 0
        size = min(BLOCK, x.shape[1])
        count = -(-x.shape[1] // size)
        x = jnp.pad(x, [(0, 0), (0, count * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

    q_blocks, k_blocks, v_blocks = split(q), split(k), split(v)
    keys = (jnp.arange(len(k_blocks)), k_blocks, v_blocks, jax.tree.map(split, visibility.keys))

    @jax.checkpoint
    def query_block(carry, block):
        del carry
        index_q, q_block, queries = block

        def attend(sums, key_block):
            _, k_block, v_block, keyed = key_block
            mask = visible(queries, keyed)
            return _accumulate(sums, q_block, k_block, v_block, mask)

        @jax.checkpoint
        def key_step(sums, key_block):
            if visibility.ordered:  # a block of keys after all queries adds nothing
                return jax.lax.cond(key_block[0] <= index_q, attend, lambda sums, _: sums, sums, key_block), None
            return attend(sums, key_block), None

        _, total, mixed = jax.lax.scan(key_step, _empty_sums(q_block), keys)[0]
        total = jnp.where(total > 0, total, jnp.ones_like(total))  # a query that sees nothing gets zeros
        return None, mixed / jnp.moveaxis(total, 3, 1)[..., None]

    blocks = (jnp.arange(len(q_blocks)), q_blocks, jax.tree.map(split, visibility.queries))
    _, out = jax.lax.scan(query_block, None, blocks)
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length]


Sums = tuple[jax.Array, jax.Array, jax.Array]  # running maximum and total [B, G, Q, Sq], mixed values [B, Sq, G, Q, D]


def _empty_sums(q: jax.Array) -> Sums:
    rows, length, groups, queries, _ = q.shape
    shape = (rows, groups, queries, length)
    return jnp.full(shape, MASKED_SCORE, jnp.float32), jnp.zeros(shape, jnp.float32), jnp.zeros(q.shape, jnp.float32)


def _accumulate(sums: Sums, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> Sums:
    highest, total, mixed = sums
    mask = mask[:, None, None]
    scores = jnp.where(mask, _scores(q, k), MASKED_SCORE)
    # The result does not depend on the shift, so no gradient needs to flow through the maximum.
    raised = jax.lax.stop_gradient(jnp.maximum(highest, scores.max(axis=-1)))
    weights = jnp.where(mask, jnp.exp(scores - raised[..., None]), 0.0)
    shrink = jnp.exp(jax.lax.stop_gradient(highest) - raised)
    mixed = mixed * jnp.moveaxis(shrink, 3, 1)[..., None] + _mix(weights, v)
    return raised, total * shrink + weights.sum(axis=-1), mixed


Backend = Callable[[jax.Array, jax.Array, jax.Array, Visibility], jax.Array]
BACKENDS: dict[str, Backend] = {"dense": _dense, "chunked": _chunked, "blockwise": _blockwise}
AUTO = "auto"
