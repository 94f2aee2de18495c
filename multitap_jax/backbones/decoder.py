"""The text decoder of the Llama and Qwen families: pre-norm, grouped-query attention, rotary positions, gated MLP.

One module for all of them; what differs (biases, norms of queries and keys, rotary frequencies) stands in
`DecoderConfig`. Letters: see `batch.py`.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from multitap_jax.backbones.attention import Visibility, attention, make_visibility, only_at
from multitap_jax.backbones.config import Section
from multitap_jax.backbones.layers import Embedding, Linear, RMSNorm, rotate
from multitap_jax.backbones.rope import Angles, Rope
from multitap_jax.backbones.stack import Execution, collect_layers, run_to
from multitap_jax.batch import PackedBatch
from multitap_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The numbers of a decoder; field names follow the hub's configuration.

    Attributes:
      vocab_size: rows of the token table.
      hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim: sizes.
      rope: rotary frequencies.
      max_positions: tokens of the longest row that the model was made for [max_position_embeddings].
      rms_norm_eps: of all norms.
      qkv_bias: whether the projections to queries, keys and values have biases (Qwen2).
      qk_norm: whether each head of queries and keys is normalised before it turns (Qwen3).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    max_positions: int
    rms_norm_eps: float
    qkv_bias: bool = False
    qk_norm: bool = False

    @classmethod
    def from_hf(
        cls,
        text: Section,
        *,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        num_key_value_heads: int | None,
        max_position_embeddings: int,
        rope_theta: float,
        rms_norm_eps: float,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        head_dim: int | None = None,
    ) -> "DecoderConfig":
        """Reads the text section of `config.json`; the arguments are what an absent entry means."""
        text.expect("hidden_act", "silu")
        hidden = text.size("hidden_size", hidden_size)
        heads = text.size("num_attention_heads", num_attention_heads)
        # Unlike elsewhere, null is not the default: as many groups as there are query heads.
        groups = num_key_value_heads if "num_key_value_heads" not in text.entries else None
        head_dim = text.size("head_dim", head_dim or max(hidden // heads, 1))
        if text.get("head_dim") is None and hidden % heads:
            text.wrong(f"hidden_size = {hidden} must be divisible by num_attention_heads = {heads}")
        return cls(
            vocab_size=text.size("vocab_size", vocab_size),
            hidden_size=hidden,
            intermediate_size=text.size("intermediate_size", intermediate_size),
            num_layers=text.size("num_hidden_layers", num_hidden_layers),
            num_heads=heads,
            num_kv_heads=text.size("num_key_value_heads", groups or heads),
            head_dim=head_dim,
            rope=Rope.from_hf(text, theta=rope_theta),
            max_positions=text.size("max_position_embeddings", max_position_embeddings),
            rms_norm_eps=text.number("rms_norm_eps", rms_norm_eps),
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
        )

    def check_length(self, max_length: int) -> None:
        """Raises ConfigError where pairs may have more tokens than the model was made for."""
        if max_length > self.max_positions:
            raise ConfigError(
                f"max_length = {max_length}: the model was made for rows of {self.max_positions} tokens "
                "(max_position_embeddings in its config.json); beyond them its positions mean nothing to it"
            )

    def inconsistencies(self) -> Iterator[str]:
        """What is wrong with the numbers besides their signs, one sentence each."""
        if self.num_heads % self.num_kv_heads:
            yield (
                f"num_attention_heads = {self.num_heads} must be divisible by num_key_value_heads = "
                f"{self.num_kv_heads} for grouped-query attention"
            )
        if self.head_dim % 2:
            yield f"head_dim = {self.head_dim} must be even: rotary positions turn pairs"
        yield from self.rope.inconsistencies(self.head_dim)


# Queries, keys and values of new tokens, and what is seen -> mixed values; what writes tokens remembers keys in it.
Attend = Callable[[jax.Array, jax.Array, jax.Array, Visibility], jax.Array]


class TextAttention(nnx.Module):
    """Causal grouped-query self-attention with rotary positions."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype, stack: int):
        hidden, dim = config.hidden_size, config.head_dim
        heads, groups = config.num_heads * dim, config.num_kv_heads * dim
        options: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype, "stack": stack}
        self.q_proj = Linear(("embed", "heads"), (hidden, heads), bias=config.qkv_bias, **options)
        self.k_proj = Linear(("embed", "kv_heads"), (hidden, groups), bias=config.qkv_bias, **options)
        self.v_proj = Linear(("embed", "kv_heads"), (hidden, groups), bias=config.qkv_bias, **options)
        self.o_proj = Linear(("heads", "embed"), (heads, hidden), bias=False, **options)
        norm = lambda: RMSNorm(dim, config.rms_norm_eps, axis=None, param_dtype=param_dtype, stack=stack)
        self.q_norm = nnx.data(norm() if config.qk_norm else None)
        self.k_norm = nnx.data(norm() if config.qk_norm else None)
        self.head_dim = dim

    def __call__(
        self,
        x: jax.Array,
        angles: Angles,
        visibility: Visibility,
        *,
        at: jax.Array | None = None,
        attend: Attend = attention,
    ) -> jax.Array:
        """[B, S, H] -> [B, S, H], or [B, K, H] where only tokens `at` ask; see `TextLayer`."""
        asking, turned = x, angles
        if at is not None:
            asking, turned = jax.tree.map(lambda tokens: take_tokens(tokens, at), (x, angles))
        q, k, v = (
            project(tokens).reshape(*tokens.shape[:2], -1, self.head_dim)
            for project, tokens in ((self.q_proj, asking), (self.k_proj, x), (self.v_proj, x))
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out = attend(rotate(q, turned), rotate(k, angles), v, visibility)
        return self.o_proj(out.reshape(*asking.shape[:2], -1))


class TextMLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype, stack: int):
        hidden, inner = config.hidden_size, config.intermediate_size
        options: dict[str, Any] = {"bias": False, "rngs": rngs, "param_dtype": param_dtype, "stack": stack}
        self.gate_proj = Linear(("embed", "mlp"), (hidden, inner), **options)
        self.up_proj = Linear(("embed", "mlp"), (hidden, inner), **options)
        self.down_proj = Linear(("mlp", "embed"), (inner, hidden), **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, S, H] -> [B, S, H]."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class TextLayer(nnx.Module):
    """Pre-norm decoder layer."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype, stack: int):
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype, stack=stack)
        self.attention = TextAttention(config, rngs=rngs, param_dtype=param_dtype, stack=stack)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype, stack=stack)
        self.mlp = TextMLP(config, rngs=rngs, param_dtype=param_dtype, stack=stack)

    def __call__(
        self,
        x: jax.Array,
        angles: Angles,
        visibility: Visibility,
        *,
        at: jax.Array | None = None,
        attend: Attend = attention,
    ) -> jax.Array:
        """[B, S, H] -> [B, S, H].

        With `at`, int32[B, K], the output [B, K, H] of the tokens at these columns alone, to whom `visibility` then
        belongs: the others give keys and values and nothing else.
        """
        mixed = self.attention(self.attention_norm(x), angles, visibility, at=at, attend=attend)
        x = (x if at is None else take_tokens(x, at)) + mixed
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nnx.Module):
    """Token table, stacked decoder layers (of `layer`, a `TextLayer` or what is called as one), final norm."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        layer: Callable[..., nnx.Module] = TextLayer,
        rngs: nnx.Rngs,
        param_dtype: jnp.dtype,
    ):
        self.embed = Embedding(config.vocab_size, config.hidden_size, rngs=rngs, param_dtype=param_dtype)
        self.layers = layer(config, rngs=rngs, param_dtype=param_dtype, stack=config.num_layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype)
        self.config = config

    def __call__(
        self, x: jax.Array, batch: PackedBatch, execution: Execution, *more: Any, each: tuple[Any, ...] = ()
    ) -> jax.Array:
        """[B, S, H] input embeddings -> float32[B, K, H], final-norm states at `batch.pool`.

        `more` goes to all layers besides angles and visibility, slices of `each` to one (`stack.run_layers`).
        """
        execution, at = execution.along_rows(), jnp.asarray(batch.pool)
        angles, visibility = self.shared(batch, execution)
        shared, last = (angles, visibility, *more), (angles, only_at(visibility, at), *more)
        return self.final(run_to(at, self.layers, x, shared, last, each=each, execution=execution))

    def hidden_states(
        self, x: jax.Array, batch: PackedBatch, execution: Execution, *more: Any, each: tuple[Any, ...] = ()
    ) -> jax.Array:
        """[L + 1, B, S, H]: the embeddings `x` and the output of each layer, before the final norm."""
        execution = execution.along_rows()
        shared = (*self.shared(batch, execution), *more)
        return collect_layers(self.layers, x, *shared, each=each, execution=execution)

    def shared(self, batch: PackedBatch, execution: Execution) -> tuple[Angles, Visibility]:
        """What every layer gets besides its input."""
        visibility = make_visibility(batch.segment, batch.prefix, causal=True, setup=execution.setup)
        return self.config.rope.angles(jnp.asarray(batch.positions), self.config.head_dim), visibility

    def pool(self, x: jax.Array, batch: PackedBatch) -> jax.Array:
        """[B, S, H] -> float32[B, K, H]: the norm is per token, so it is applied to the few that are kept."""
        return self.final(take_tokens(x, jnp.asarray(batch.pool)))

    def final(self, x: jax.Array) -> jax.Array:
        """[..., H] -> float32[..., H]: the final norm."""
        return self.norm(x.astype(jnp.float32))


def take_tokens(x: jax.Array, at: jax.Array) -> jax.Array:
    """[B, K, ...] from [B, S, ...] and columns int32[B, K]."""
    return jnp.take_along_axis(x, at.reshape(*at.shape, *[1] * (x.ndim - 2)), axis=1)


def place_features(x: jax.Array, features: jax.Array, batch: PackedBatch) -> jax.Array:
    """[B, S, H] token embeddings with image features [cells of the batch, H] at image tokens."""
    cell = jnp.asarray(batch.image_cell)
    return jnp.where(cell[:, :, None] >= 0, image_features(features, cell).astype(x.dtype), x)


def image_features(features: jax.Array, cell: jax.Array) -> jax.Array:
    """[B, S, H]: the features [cells of the batch, H] that int32[B, S] `cell` names; anything where it is negative."""
    return jnp.take(features, jnp.maximum(cell, 0), axis=0, mode="fill")
