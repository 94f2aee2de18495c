"""NVIDIA's fused attention (cuDNN), as `jax.nn.dot_product_attention` offers it.

Its own masks know causality and the lengths of padded rows, not segments: the rule goes in as a mask of all pairs,
which is added to the scores of every head. So scores are never in memory but the mask is, two bytes a pair of a row.
Half precision only. The backward pass computes the forward pass again, to which the library adds its own gradient.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from multitap_jax.backbones.attention.partial import fold_rows
from multitap_jax.backbones.attention.rule import Keys, Queries, UnsupportedAttentionError, Visibility, visible

DTYPES = ("bfloat16", "float16")
IMPLEMENTATION: Literal["cudnn", "xla"] = "cudnn"  # "xla" for tests of all but the kernel, on a CPU


def prepare(queries: Queries, keys: Keys) -> jax.Array:
    """The whole mask, bool[B, Sq, Sk]; lengths even, since the library's gradient of a masked row needs that."""
    mask = visible(queries, keys)
    return jnp.pad(mask, ((0, 0), (0, mask.shape[1] % 2), (0, mask.shape[2] % 2)))


def attend(q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility) -> jax.Array:
    """[B, Sq, G, Q, D] from queries [B, Sq, G, Q, D], keys and values [B, Sk, G, D].

    Raises:
      UnsupportedAttentionError: single precision, or a head size that the library does not take.
    """
    *lead, groups, heads, dim = q.shape
    if q.dtype.name not in DTYPES or dim % 8 or dim > 256:
        raise UnsupportedAttentionError(
            f"attention = 'cudnn' takes {' or '.join(DTYPES)} and heads of a multiple of 8 up to 256, not "
            f"{q.dtype.name} and {dim}; use 'blockwise', or 'auto'"
        )
    even = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))
    out = _attend(even(q.reshape(*lead, groups * heads, dim)), even(k), even(v), visibility.prepared)
    return out[:, : lead[1]].reshape(q.shape)


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    return fold_rows(_library)(q, k, v, mask)


def _attend_fwd(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> tuple[jax.Array, Any]:
    return _attend(q, k, v, mask), (q, k, v, mask)


def _attend_bwd(kept: Any, given: jax.Array) -> tuple[Any, ...]:
    def rows(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, given: jax.Array) -> Any:
        return jax.vjp(functools.partial(_library, mask=mask), q, k, v)[1](given)

    return *fold_rows(rows)(*kept, given), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _library(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, Sq, A, D] from q of that shape, k and v [B, Sk, G, D], mask [B, Sq, Sk]; rows must not be mapped."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation=IMPLEMENTATION)
