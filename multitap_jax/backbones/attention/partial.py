"""Attention over some of the keys, and how what comes of several such parts is put together.

A part gives the mixed values normalised over its own keys, and the logarithm of the sum of its exponentiated scores
(lse). Parts over different keys join exactly; and the gradient of the whole is a sum over parts, each computed with the
output and the lse of the whole (Dao et al., arXiv 2205.14135, section 3.1 and appendix B).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from multitap_jax.backbones.attention.rule import MASKED_SCORE


class Part(NamedTuple):
    """Mixed values float32[B, Sq, G, Q, D] and lse float32[B, Sq, G, Q]; `MASKED_SCORE` where nothing is seen."""

    out: jax.Array
    lse: jax.Array


def nothing(q: jax.Array) -> Part:
    """The part over no keys at all, for queries [B, Sq, G, Q, D]."""
    return Part(jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], MASKED_SCORE, jnp.float32))


def join(one: Part, other: Part) -> Part:
    """The part over the keys of both."""
    lse = jnp.logaddexp(one.lse, other.lse)
    share = lambda part: part.out * jnp.exp(part.lse - lse)[..., None]
    return Part(share(one) + share(other), lse)


def fold_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays that all have leading rows, whose rows a mapped axis (`jax.vmap`) adds to.

    So a loop whose length depends on the data stays one loop, and a kernel that knows rows need not know of mapping.
    Not differentiable; to be used inside of functions that have a derivative of their own.
    """
    folded = jax.custom_batching.custom_vmap(function)

    @folded.def_vmap
    def rule(size: int, batched: Any, *args: Any) -> tuple[Any, Any]:
        spread = lambda x, mapped: x if mapped else jnp.broadcast_to(x[None], (size, *x.shape))
        joined = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.tree.map(spread, args, tuple(batched)))
        out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), folded(*joined))
        return out, jax.tree.map(lambda _: True, out)

    return folded
