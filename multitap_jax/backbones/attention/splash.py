"""Google's TPU kernels for attention with sparse masks, which come with JAX (splash attention).

Its segment ids are compared for equality, which cannot say that a text sees its prefix; two calls, one for each, would
double the products. But it takes any mask as an array, finds the blocks of pairs that are not seen at all, and leaves
them out. So scores are never in memory but the mask is, one byte a pair of a row for each of the passes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from multitap_jax.backbones.attention.rule import Keys, Queries, UnsupportedAttentionError, Visibility, visible

LANES = 128
BLOCK = 512
INTERPRET = False  # kernels run as JAX operations, for tests on a CPU


def prepare(queries: Queries, keys: Keys) -> Any:
    """The library's kernel of each row, with its blocks sorted by what is seen in them."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    mask = visible(queries, keys)
    mask = jnp.pad(mask, ((0, 0), (0, -mask.shape[1] % LANES), (0, -mask.shape[2] % LANES)))
    bq, bk = (_block(size) for size in mask.shape[1:])
    sizes = splash_attention.BlockSizes(
        block_q=bq,
        block_kv=bk,
        block_q_dkv=bq,
        block_kv_dkv=bk,
        block_q_dq=bq,
        block_kv_dq=bk,
    )
    kernel = functools.partial(
        splash_attention.make_splash_mha,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=INTERPRET,
    )
    return jax.vmap(kernel)(mask[:, None])


def attend(q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility) -> jax.Array:
    """[B, Sq, G, Q, D] from queries [B, Sq, G, Q, D], keys and values [B, Sk, G, D].

    Raises:
      UnsupportedAttentionError: single precision, whose products the kernels would shorten.
    """
    rows, length, groups, heads, dim = q.shape
    if q.dtype != jnp.bfloat16 and not INTERPRET:
        raise UnsupportedAttentionError(
            f"attention = 'splash' takes bfloat16, not {q.dtype.name}; use 'blockwise', or 'auto'"
        )

    def by_head(x: jax.Array) -> jax.Array:  # [B, S, heads, D] -> [B, heads, whole blocks, whole lanes]
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES), (0, 0), (0, -dim % LANES)))
        return jnp.swapaxes(x, 1, 2)

    scaled = (q * jnp.asarray(dim**-0.5, q.dtype)).reshape(rows, length, groups * heads, dim)
    out = jax.lax.map(_row, (visibility.prepared, by_head(scaled), by_head(k), by_head(v)))
    return jnp.swapaxes(out, 1, 2)[:, :length, :, :dim].reshape(q.shape)


def _row(parts: Any) -> jax.Array:
    kernel, *inputs = parts
    # A flag, which comes out of the loop as an array.
    kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
    return kernel(*inputs)


def _block(length: int) -> int:
    """The largest block of whole lanes up to BLOCK that divides a length of whole lanes."""
    return max(size for size in range(LANES, BLOCK + 1, LANES) if length % size == 0)
