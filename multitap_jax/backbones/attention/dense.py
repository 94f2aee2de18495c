"""Attention over all pairs at once: the reference, and the fastest for short rows and for few queries."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from multitap_jax.backbones.attention.rule import MASKED_SCORE, Keys, Queries, Visibility, visible
from multitap_jax.backbones.layers import matmul_precision


def prepare(queries: Queries, keys: Keys) -> jax.Array:
    """The whole mask, bool[B, Sq, Sk]."""
    return visible(queries, keys)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility) -> jax.Array:
    """float32[B, Sq, G, Q, D] from queries [B, Sq, G, Q, D], keys and values [B, Sk, G, D]."""
    return _mix(jax.nn.softmax(_masked_scores(q, k, visibility), axis=-1), v)


def attention_in_parts(q: jax.Array, parts: Sequence[tuple[jax.Array, jax.Array, Visibility]]) -> jax.Array:
    """As dense attention over the keys of all parts together, which stay where they lie instead of being joined.

    Args:
      q: [B, Sq, A, D].
      parts: keys and values [B, Sk, G, D], and who sees them, prepared for the backend "dense".

    Returns:
      [B, Sq, A, D] in the type of `q`.
    """
    rows, length, heads, dim = q.shape
    groups = parts[0][0].shape[2]
    grouped = q.reshape(rows, length, groups, heads // groups, dim)
    scores = [_masked_scores(grouped, k, visibility) for k, _, visibility in parts]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    ends = np.cumsum([k.shape[1] for k, _, _ in parts])[:-1]
    shares = jnp.split(weights, ends, axis=-1)
    out = functools.reduce(jnp.add, [_mix(w, v) for w, (_, v, _) in zip(shares, parts, strict=True)])
    return out.reshape(rows, length, heads, dim).astype(q.dtype)


def _masked_scores(q: jax.Array, k: jax.Array, visibility: Visibility) -> jax.Array:
    """Scaled scores float32[B, G, Q, Sq, Sk] of queries [B, Sq, G, Q, D] and keys [B, Sk, G, D]."""
    precision = matmul_precision(q.dtype)
    scores = jnp.einsum("bsgqd,btgd->bgqst", q, k, preferred_element_type=jnp.float32, precision=precision)
    return jnp.where(visibility.prepared[:, None, None], scores * q.shape[-1] ** -0.5, MASKED_SCORE)


def _mix(weights: jax.Array, v: jax.Array) -> jax.Array:
    """float32[B, Sq, G, Q, D] from weights [B, G, Q, Sq, Sk] and values [B, Sk, G, D]."""
    return jnp.einsum(
        "bgqst,btgd->bsgqd",
        weights.astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
        precision=matmul_precision(v.dtype),
    )
