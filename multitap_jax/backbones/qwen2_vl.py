"""Qwen2-VL (arXiv 2409.12191) as an encoder: packed tokens and pixels in, pooled hidden states out, never logits.

Same function as transformers' Qwen2VLModel followed by taking one position a text; attention, rotary positions and the
image features follow the packed layout of `batch.py`. Extra letters: E vision size, C = P / m^2 cells a vision row.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from multitap_jax.backbones.attention import Visibility, attention, make_visibility
from multitap_jax.backbones.layers import (
    Embedding,
    LayerNorm,
    Linear,
    RMSNorm,
    inverse_frequencies,
    matmul_precision,
    param,
    quick_gelu,
    rotate,
)
from multitap_jax.backbones.qwen2_vl_config import Qwen2VLConfig
from multitap_jax.backbones.stack import Execution, collect_layers, run_layers
from multitap_jax.batch import PackedBatch

__all__ = ["Qwen2VL", "Qwen2VLConfig"]

# Fixed in the architecture, absent from its configuration.
VISION_EPS = 1e-6
VISION_THETA = 10000.0

Angles = tuple[jax.Array, jax.Array]  # cosine and sine, float32[B, S, 1, D / 2]


class TextAttention(nnx.Module):
    """Causal grouped-query self-attention with rotary positions; biases on q, k, v only."""

    def __init__(self, config: Qwen2VLConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype, stack: int):
        hidden, dim = config.hidden_size, config.head_dim
        heads, groups = config.num_heads * dim, config.num_kv_heads * dim
        options: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype, "stack": stack}
        self.q_proj = Linear(("embed", "heads"), (hidden, heads), bias=True, **options)
        self.k_proj = Linear(("embed", "kv_heads"), (hidden, groups), bias=True, **options)
        self.v_proj = Linear(("embed", "kv_heads"), (hidden, groups), bias=True, **options)
        self.o_proj = Linear(("heads", "embed"), (heads, hidden), bias=False, **options)
        self.head_dim = dim

    def __call__(self, x: jax.Array, angles: Angles, visibility: Visibility) -> jax.Array:
        """[B, S, H] -> [B, S, H]."""
        shape = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_proj(x).reshape(shape), angles)
        k = rotate(self.k_proj(x).reshape(shape), angles)
        v = self.v_proj(x).reshape(shape)
        return self.o_proj(attention(q, k, v, visibility).reshape(*x.shape[:2], -1))


class TextMLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Qwen2VLConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype, stack: int):
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

    def __init__(self, config: Qwen2VLConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype, stack: int):
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype, stack=stack)
        self.attention = TextAttention(config, rngs=rngs, param_dtype=param_dtype, stack=stack)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype, stack=stack)
        self.mlp = TextMLP(config, rngs=rngs, param_dtype=param_dtype, stack=stack)

    def __call__(self, x: jax.Array, angles: Angles, visibility: Visibility) -> jax.Array:
        """[B, S, H] -> [B, S, H]."""
        x = x + self.attention(self.attention_norm(x), angles, visibility)
        return x + self.mlp(self.mlp_norm(x))


class TextModel(nnx.Module):
    """Token table, stacked decoder layers, final norm."""

    def __init__(self, config: Qwen2VLConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        self.embed = Embedding(config.vocab_size, config.hidden_size, rngs=rngs, param_dtype=param_dtype)
        self.layers = TextLayer(config, rngs=rngs, param_dtype=param_dtype, stack=config.num_layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype)
        self.config = config

    def angles(self, positions: jax.Array) -> Angles:
        """M-RoPE: each of the D / 2 frequencies turns with the axis (time, height, width) that its section names.

        int32[B, S, 3] -> cosine and sine, float32[B, S, 1, D / 2].
        """
        axis = np.repeat(np.arange(3), self.config.mrope_section)
        frequency = inverse_frequencies(self.config.head_dim, self.config.rope_theta)
        angle = positions[:, :, axis].astype(jnp.float32) * frequency[None, None, :]
        return jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]


class VisionAttention(nnx.Module):
    """Self-attention among the patches of one image."""

    def __init__(self, config: Qwen2VLConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype, stack: int):
        size = config.vision_size
        options: dict[str, Any] = {"bias": True, "rngs": rngs, "param_dtype": param_dtype, "stack": stack}
        self.qkv = Linear(("vision", "heads"), (size, 3 * size), **options)
        self.proj = Linear(("heads", "vision"), (size, size), **options)
        self.heads = config.vision_heads

    def __call__(self, x: jax.Array, angles: Angles, visibility: Visibility) -> jax.Array:
        """[R, P, E] -> [R, P, E]."""
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (part.reshape(shape) for part in jnp.split(self.qkv(x), 3, axis=-1))
        out = attention(rotate(q, angles), rotate(k, angles), v, visibility)
        return self.proj(out.reshape(x.shape))


class VisionMLP(nnx.Module):
    """fc2(quick_gelu(fc1(x)))."""

    def __init__(self, config: Qwen2VLConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype, stack: int):
        size, inner = config.vision_size, config.vision_intermediate_size
        options: dict[str, Any] = {"bias": True, "rngs": rngs, "param_dtype": param_dtype, "stack": stack}
        self.fc1 = Linear(("vision", "mlp"), (size, inner), **options)
        self.fc2 = Linear(("mlp", "vision"), (inner, size), **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[R, P, E] -> [R, P, E]."""
        return self.fc2(quick_gelu(self.fc1(x)))


class VisionLayer(nnx.Module):
    """Pre-norm vision block."""

    def __init__(self, config: Qwen2VLConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype, stack: int):
        self.norm1 = LayerNorm(config.vision_size, VISION_EPS, param_dtype=param_dtype, stack=stack)
        self.attention = VisionAttention(config, rngs=rngs, param_dtype=param_dtype, stack=stack)
        self.norm2 = LayerNorm(config.vision_size, VISION_EPS, param_dtype=param_dtype, stack=stack)
        self.mlp = VisionMLP(config, rngs=rngs, param_dtype=param_dtype, stack=stack)

    def __call__(self, x: jax.Array, angles: Angles, visibility: Visibility) -> jax.Array:
        """[R, P, E] -> [R, P, E]."""
        x = x + self.attention(self.norm1(x), angles, visibility)
        return x + self.mlp(self.norm2(x))


class PatchEmbedding(nnx.Module):
    """A convolution whose stride is its kernel, hence one product; kernel [frames, channels, height, width, E]."""

    def __init__(self, config: Qwen2VLConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        side = config.patch_size
        shape = (config.temporal_patch_size, config.in_channels, side, side, config.vision_size)
        kernel = jax.random.normal(rngs.params(), shape, param_dtype) * jnp.asarray(0.02, param_dtype)
        self.kernel = param(kernel, (None, None, None, None, "vision"))
        self.config = config

    def __call__(self, patches: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """uint8[R, P, F] raw pixels -> [R, P, E] in `dtype`.

        A still image is shown as equal frames, so the frames' kernels are added instead of the pixels repeated.
        """
        area = self.config.patch_size**2
        mean, std = (
            np.repeat(np.asarray(value, np.float32), area) for value in (self.config.image_mean, self.config.image_std)
        )
        pixels = (patches.astype(jnp.float32) / 255.0 - mean[None, None, :]) / std[None, None, :]
        kernel = self.kernel[...].astype(jnp.float32).sum(axis=0).reshape(self.config.patch_features, -1).astype(dtype)
        return jnp.einsum("rpf,fe->rpe", pixels.astype(dtype), kernel, precision=matmul_precision(dtype))


class PatchMerger(nnx.Module):
    """m^2 neighbouring patches (consecutive in block-major order) -> one cell of decoder size."""

    def __init__(self, config: Qwen2VLConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        wide = config.vision_size * config.merge_size**2
        self.norm = LayerNorm(config.vision_size, VISION_EPS, param_dtype=param_dtype)
        self.fc1 = Linear(("vision", "mlp"), (wide, wide), bias=True, rngs=rngs, param_dtype=param_dtype)
        self.fc2 = Linear(("mlp", "embed"), (wide, config.hidden_size), bias=True, rngs=rngs, param_dtype=param_dtype)
        self.cell = config.merge_size**2

    def __call__(self, x: jax.Array) -> jax.Array:
        """[R, P, E] -> [R, C, H]; the GELU is the exact one, unlike the tower's."""
        rows, patches, size = x.shape
        x = self.norm(x).reshape(rows, patches // self.cell, self.cell * size)
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class VisionModel(nnx.Module):
    """Raw patches -> features of merged cells."""

    def __init__(self, config: Qwen2VLConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        self.patch_embed = PatchEmbedding(config, rngs=rngs, param_dtype=param_dtype)
        self.layers = VisionLayer(config, rngs=rngs, param_dtype=param_dtype, stack=config.vision_layers)
        self.merger = PatchMerger(config, rngs=rngs, param_dtype=param_dtype)
        self.config = config

    def __call__(self, batch: PackedBatch, execution: Execution) -> jax.Array:
        """[R, C, H] features of the cells."""
        x, shared = self._prepare(batch, execution)
        return self.merger(run_layers(self.layers, x, *shared, execution=execution))

    def hidden_states(self, batch: PackedBatch, execution: Execution) -> jax.Array:
        """[L + 1, R, P, E]: the embedded patches and the output of each block."""
        x, shared = self._prepare(batch, execution)
        return collect_layers(self.layers, x, *shared, execution=execution)

    def angles(self, position: jax.Array) -> Angles:
        """int32[R, P, 2] (row, column) -> cosine and sine, float32[R, P, 1, D / 2]; rows turn the first half."""
        frequency = inverse_frequencies(self.config.vision_head_dim // 2, VISION_THETA)
        angle = position.astype(jnp.float32)[..., None] * frequency[None, None, None, :]
        angle = angle.reshape(*position.shape[:2], 1, -1)
        return jnp.cos(angle), jnp.sin(angle)

    def _prepare(self, batch: PackedBatch, execution: Execution) -> tuple[jax.Array, tuple[Angles, Visibility]]:
        x = self.patch_embed(jnp.asarray(batch.patches), execution.compute_dtype)
        segment = jnp.asarray(batch.patch_segment)
        visibility = make_visibility(segment, causal=False, backend=execution.attention)
        return x, (self.angles(jnp.asarray(batch.patch_position)), visibility)


class Qwen2VL(nnx.Module):
    """The whole encoder; `backbone(batch, execution)` gives the pooled hidden states."""

    def __init__(self, config: Qwen2VLConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype = jnp.float32):
        self.text = TextModel(config, rngs=rngs, param_dtype=param_dtype)
        self.vision = VisionModel(config, rngs=rngs, param_dtype=param_dtype)
        self.config = config

    def __call__(self, batch: PackedBatch, execution: Execution) -> jax.Array:
        """Final-norm hidden states at `batch.pool`, float32[B, K, H]."""
        x, shared = self._prepare(batch, execution)
        x = run_layers(self.text.layers, x, *shared, execution=execution)
        # The norm is per token, so it is applied to the few that are kept.
        pooled = jnp.take_along_axis(x, jnp.asarray(batch.pool)[:, :, None], axis=1)
        return self.text.norm(pooled.astype(jnp.float32))

    def hidden_states(self, batch: PackedBatch, execution: Execution) -> jax.Array:
        """[L + 1, B, S, H]: the embeddings and the output of each decoder layer, before the final norm."""
        x, shared = self._prepare(batch, execution)
        return collect_layers(self.text.layers, x, *shared, execution=execution)

    def embed(self, batch: PackedBatch, execution: Execution) -> jax.Array:
        """[B, S, H]: token embeddings, replaced by image features at image tokens."""
        x = self.text.embed(jnp.asarray(batch.tokens), execution.compute_dtype)
        if batch.patches.shape[0] == 0:  # text only: the shape says so, the tower is not even compiled
            return x
        features = self.vision(batch, execution).reshape(-1, x.shape[-1])
        cell = jnp.asarray(batch.image_cell)
        image = jnp.take(features, jnp.maximum(cell, 0), axis=0, mode="fill")
        return jnp.where(cell[:, :, None] >= 0, image, x)

    def _prepare(self, batch: PackedBatch, execution: Execution) -> tuple[jax.Array, tuple[Angles, Visibility]]:
        x = self.embed(batch, execution)
        visibility = make_visibility(
            jnp.asarray(batch.segment), jnp.asarray(batch.prefix), causal=True, backend=execution.attention
        )
        return x, (self.text.angles(jnp.asarray(batch.positions)), visibility)
