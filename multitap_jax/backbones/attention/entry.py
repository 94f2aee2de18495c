"""The one entry to attention: who sees whom, prepared once a forward pass, and attention under it."""

import dataclasses

import jax
import jax.numpy as jnp

from multitap_jax.backbones.attention import placement
from multitap_jax.backbones.attention.choice import LOOP_FROM, choose
from multitap_jax.backbones.attention.rule import DENSE, Keys, Queries, Setup, Visibility
from multitap_jax.batch import Array


def make_visibility(segment: Array, prefix: Array | None = None, *, causal: bool, setup: Setup = DENSE) -> Visibility:
    """Prepares the mask of self-attention.

    Args:
      segment: int32[B, S], run ids; 0 is padding.
      prefix: int32[B, S], id of the other run a token sees; None when it sees only its own.
      causal: whether keys after the query are hidden.
      setup: where and in what it is computed, and by what: see `choice.choose`.

    Raises:
      UnsupportedAttentionError: there is no such backend, or it cannot compute this here.
    """
    segment = jnp.asarray(segment)
    column = jnp.arange(segment.shape[1], dtype=jnp.int32) if causal else jnp.zeros(segment.shape[1], jnp.int32)
    column = jnp.broadcast_to(column[None], segment.shape)
    queries = Queries(segment, segment if prefix is None else jnp.asarray(prefix), column)
    return _prepare(queries, Keys(segment, column), setup, spread_keys=True, causal=causal)


def make_cross_visibility(queries: Queries, keys: Keys, *, setup: Setup = DENSE) -> Visibility:
    """Prepares the mask of queries and keys that are not the same tokens, or not under the same ids.

    Raises:
      UnsupportedAttentionError: see `make_visibility`.
    """
    queries, keys = Queries(*map(jnp.asarray, queries)), Keys(*map(jnp.asarray, keys))
    return _prepare(queries, keys, setup, spread_keys=False, causal=False)


def only_at(visibility: Visibility, at: jax.Array) -> Visibility:
    """The visibility of the queries at columns int32[B, K] alone, of all keys; dense where they are few.

    Where rows are spread, so are these queries, if their number divides.
    """
    queries = Queries(*(jnp.take_along_axis(x, at, axis=1) for x in visibility.queries))
    setup, count = visibility.setup, at.shape[1]
    uneven = setup.along_context and setup.mesh is not None and count % setup.mesh.shape["context"]
    if count < LOOP_FROM or uneven:
        setup = dataclasses.replace(setup, backend="dense")
    return _prepare(queries, visibility.keys, setup, spread_keys=visibility.spread_keys, causal=False)


def _prepare(queries: Queries, keys: Keys, setup: Setup, *, spread_keys: bool, causal: bool) -> Visibility:
    lengths = queries.segment.shape[1], keys.segment.shape[1]
    name = choose(setup, *lengths, spread_keys=spread_keys, causal=causal)
    return placement.prepare(Visibility(queries, keys, None, name, setup, spread_keys))


def attention(q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility) -> jax.Array:
    """Scaled dot-product attention with grouped keys and values; query head a uses key head a // (A / G).

    Args:
      q: [B, Sq, A, D].
      k: [B, Sk, G, D], with A a multiple of G; keys are never repeated in memory.
      v: [B, Sk, G, D].
      visibility: from `make_visibility` or `make_cross_visibility`.

    Returns:
      [B, Sq, A, D] in the type of `q`.

    Raises:
      UnsupportedAttentionError: the backend does not take these types, sizes or devices.
    """
    rows, length, heads, dim = q.shape
    groups = k.shape[2]
    q = q.reshape(rows, length, groups, heads // groups, dim)
    return placement.compute(q, k, v, visibility).reshape(rows, length, heads, dim).astype(q.dtype)
