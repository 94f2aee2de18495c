"""The decoder of InternLM2 (arXiv 2403.17297) with Partial LoRA (InternLM-XComposer2, arXiv 2401.16420).

Pre-norm, grouped queries, rotary positions, gated MLP, as `decoder.py` has them; but one projection makes queries, keys
and values, and every linear map has a low-rank addition that only image tokens get. Letters: see `batch.py`; r rank.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from multitap_jax.backbones.attention import Visibility, attention
from multitap_jax.backbones.decoder import Attend, DecoderConfig, take_tokens
from multitap_jax.backbones.layers import Axis, Linear, RMSNorm, rotate
from multitap_jax.backbones.rope import Angles

Image = jax.Array | None  # bool[B, S], which tokens are image tokens; None: no token gets the additions


@dataclasses.dataclass(frozen=True)
class PartialConfig:
    """The additions of image tokens.

    Attributes:
      rank: r.
      alpha: they are scaled by alpha / r.
    """

    rank: int
    alpha: float


class PartialLinear(Linear):
    """y = x @ kernel, and at image tokens + (x @ A) @ B * alpha / r."""

    def __init__(
        self,
        axes: tuple[Axis, Axis],
        shape: tuple[int, int],
        partial: PartialConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: jnp.dtype,
        stack: int,
    ):
        options: dict[str, Any] = {"bias": False, "rngs": rngs, "param_dtype": param_dtype, "stack": stack}
        super().__init__(axes, shape, **options)
        self.partial_a = Linear((axes[0], None), (shape[0], partial.rank), **options)
        self.partial_b = Linear((None, axes[1]), (partial.rank, shape[1]), **options)
        self.partial_scale = partial.alpha / partial.rank

    def __call__(self, x: jax.Array, image: Image = None) -> jax.Array:
        """[B, S, in] -> [B, S, out]."""
        y = super().__call__(x)
        if image is None:
            return y
        low = self.partial_a(x)
        low = jnp.where(image[:, :, None], low, jnp.zeros_like(low))
        return y + self.partial_b(low) * jnp.asarray(self.partial_scale, x.dtype)


class PartialAttention(nnx.Module):
    """Causal grouped-query self-attention.

    The fused projection's columns are [G, A / G + 2, D]: of each group its queries, its key, its value. So whole groups
    go to a device where the kernel is split along them.
    """

    def __init__(
        self, config: DecoderConfig, partial: PartialConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype, stack: int
    ):
        hidden, dim = config.hidden_size, config.head_dim
        options: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype, "stack": stack}
        heads, groups = config.num_heads, config.num_kv_heads
        fused = (hidden, (heads + 2 * groups) * dim)
        self.qkv_proj = PartialLinear(("embed", "kv_heads"), fused, partial, **options)
        self.o_proj = PartialLinear(("heads", "embed"), (heads * dim, hidden), partial, **options)
        self.groups, self.head_dim = groups, dim

    def __call__(
        self,
        x: jax.Array,
        angles: Angles,
        visibility: Visibility,
        image: Image,
        *,
        at: jax.Array | None = None,
        attend: Attend = attention,
    ) -> jax.Array:
        """[B, S, H] -> [B, S, H], or [B, K, H] where only tokens `at` ask; see `decoder.TextLayer`.

        The fused projection makes the queries of all tokens even then: cutting it would copy its kernel.
        """
        fused = self.qkv_proj(x, image).reshape(*x.shape[:2], self.groups, -1, self.head_dim)
        q = fused[:, :, :, :-2].reshape(*x.shape[:2], -1, self.head_dim)
        k, v = fused[:, :, :, -2], fused[:, :, :, -1]
        turned = angles
        if at is not None:
            q, turned, image = jax.tree.map(lambda tokens: take_tokens(tokens, at), (q, angles, image))
        out = attend(rotate(q, turned), rotate(k, angles), v, visibility)
        return self.o_proj(out.reshape(*q.shape[:2], -1), image)


class PartialMLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(
        self, config: DecoderConfig, partial: PartialConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype, stack: int
    ):
        hidden, inner = config.hidden_size, config.intermediate_size
        options: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype, "stack": stack}
        self.gate_proj = PartialLinear(("embed", "mlp"), (hidden, inner), partial, **options)
        self.up_proj = PartialLinear(("embed", "mlp"), (hidden, inner), partial, **options)
        self.down_proj = PartialLinear(("mlp", "embed"), (inner, hidden), partial, **options)

    def __call__(self, x: jax.Array, image: Image) -> jax.Array:
        """[B, S, H] -> [B, S, H]."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x, image)) * self.up_proj(x, image), image)


class PartialLayer(nnx.Module):
    """Pre-norm decoder layer."""

    def __init__(
        self, config: DecoderConfig, partial: PartialConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype, stack: int
    ):
        options: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype, "stack": stack}
        norm = lambda: RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype, stack=stack)
        self.attention_norm, self.attention = norm(), PartialAttention(config, partial, **options)
        self.mlp_norm, self.mlp = norm(), PartialMLP(config, partial, **options)

    def __call__(
        self,
        x: jax.Array,
        angles: Angles,
        visibility: Visibility,
        image: Image = None,
        *,
        at: jax.Array | None = None,
        attend: Attend = attention,
    ) -> jax.Array:
        """[B, S, H] -> [B, S, H], or [B, K, H] with `at`, int32[B, K]; see `decoder.TextLayer`."""
        mixed = self.attention(self.attention_norm(x), angles, visibility, image, at=at, attend=attend)
        if at is not None:
            x, image = jax.tree.map(lambda tokens: take_tokens(tokens, at), (x, image))
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x), image)


def partial_flops(config: DecoderConfig, partial: PartialConfig) -> int:
    """Forward FLOPs of the additions for one image token, which is never pooled: keys and values in the last layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, groups = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    keys = hidden + 2 * groups
    others = heads + (heads + hidden) + 3 * (hidden + inner)
    return 2 * partial.rank * (config.num_layers * keys + (config.num_layers - 1) * others)
