"""Qwen2-VL (arXiv 2409.12191) as an encoder: packed tokens and pixels in, pooled hidden states out, never logits.

Same function as transformers' Qwen2VLModel followed by taking one position a text; attention, rotary positions and the
image features follow the packed layout of `batch.py`. Extra letters: E vision size, C = P / m^2 cells a vision row.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from multitap_jax.backbones.attention import Visibility, make_visibility
from multitap_jax.backbones.base import Backbone
from multitap_jax.backbones.config import check, decoder_config, expect, optional
from multitap_jax.backbones.decoder import Decoder, DecoderConfig
from multitap_jax.backbones.layers import LayerNorm, Linear, inverse_frequencies, quick_gelu
from multitap_jax.backbones.rope import Angles
from multitap_jax.backbones.stack import Execution, collect_layers, run_layers
from multitap_jax.backbones.vision import FusedAttention, PatchEmbedding, Pixels, VisionMLP, block_flops
from multitap_jax.batch import PackedBatch
from multitap_jax.config import ConfigError

# Fixed in the architecture, absent from its configuration.
VISION_EPS = 1e-6
VISION_THETA = 10000.0


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower: sizes, frames of the patch embedding, and the side m of the square merged into one token."""

    num_layers: int
    size: int
    num_heads: int
    intermediate_size: int
    merge_size: int
    frames: int
    pixels: Pixels

    def inconsistencies(self) -> Iterator[str]:
        """What is wrong with the numbers, one sentence each."""
        if self.size % (4 * self.num_heads):
            yield (
                f"vision_config.embed_dim = {self.size} must be divisible by 4 * num_heads = {4 * self.num_heads}: "
                "rows and columns each turn a half of the rotary pairs"
            )
        yield from self.pixels.inconsistencies()


@dataclasses.dataclass(frozen=True)
class Qwen2VLConfig:
    """The numbers of a Qwen2-VL model.

    Attributes:
      text, vision: of the two parts.
      tie_word_embeddings: whether the unused output head shares the token table.
      image_token_id: id of an image placeholder token.
    """

    model_type: ClassVar[str] = "qwen2_vl"

    text: DecoderConfig
    vision: VisionConfig
    tie_word_embeddings: bool
    image_token_id: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> "Qwen2VLConfig":
        """Reads the flat layout of the hub (before transformers 5) and the nested one (since).

        Fields that a file omits have the defaults of transformers' Qwen2VLConfig, which does not write defaults of
        nested sections. Video fields are ignored.

        Raises:
          ConfigError: another model type, a feature that is not implemented, or numbers that contradict each other.
        """
        expect(config, "model_type", cls.model_type)
        text, vision = config.get("text_config") or config, config.get("vision_config") or {}
        if text.get("use_sliding_window"):
            raise ConfigError("use_sliding_window = true is not implemented; no published Qwen2-VL model uses it")
        expect(vision, "hidden_act", "quick_gelu")
        decoder = decoder_config(
            text,
            vocab_size=152064,
            hidden_size=8192,
            intermediate_size=29568,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            rope_theta=1e6,
            rms_norm_eps=1e-5,
            qkv_bias=True,
        )
        if decoder.rope.sections is None:
            raise ConfigError("mrope_section is missing from rope_scaling / rope_parameters of config.json")
        size = vision.get("embed_dim", 1280)
        tower = VisionConfig(
            num_layers=vision.get("depth", 32),
            size=size,
            num_heads=vision.get("num_heads", 16),
            intermediate_size=int(size * vision.get("mlp_ratio", 4)),
            merge_size=vision.get("spatial_merge_size", 2),
            frames=vision.get("temporal_patch_size", 2),
            pixels=Pixels.from_hf(vision.get("patch_size", 14), preprocessor),
        )
        tied = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
        return check(cls(decoder, tower, tied, optional(config, "image_token_id", 151655)), "a Qwen2-VL model")

    @property
    def block(self) -> tuple[int, int]:
        """Patches of a block of a vision row, and the feature cells it becomes."""
        return self.vision.merge_size**2, 1

    def vision_flops(self, patches: int, patch_pairs: int) -> float:
        """Forward FLOPs of the tower and its merger for real patches and visible pairs of them."""
        v, cell = self.vision, self.vision.merge_size**2
        tower = v.num_layers * block_flops(v.size, v.intermediate_size, patches, patch_pairs)
        merger = patches // cell * 2 * ((cell * v.size) ** 2 + cell * v.size * self.text.hidden_size)
        return tower + patches * 2 * v.pixels.features * v.size + merger


class VisionLayer(nnx.Module):
    """Pre-norm vision block."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        options: dict[str, Any] = {"param_dtype": param_dtype, "stack": config.num_layers}
        self.norm1 = LayerNorm(config.size, VISION_EPS, **options)
        self.attention = FusedAttention(config.size, config.num_heads, rngs=rngs, **options)
        self.norm2 = LayerNorm(config.size, VISION_EPS, **options)
        self.mlp = VisionMLP(config.size, config.intermediate_size, quick_gelu, rngs=rngs, **options)

    def __call__(self, x: jax.Array, angles: Angles, visibility: Visibility) -> jax.Array:
        """[R, P, E] -> [R, P, E]."""
        x = x + self.attention(self.norm1(x), angles, visibility)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nnx.Module):
    """m^2 neighbouring patches (consecutive in block-major order) -> one cell of decoder size."""

    def __init__(self, config: VisionConfig, hidden: int, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        wide = config.size * config.merge_size**2
        self.norm = LayerNorm(config.size, VISION_EPS, param_dtype=param_dtype)
        self.fc1 = Linear(("vision", "mlp"), (wide, wide), bias=True, rngs=rngs, param_dtype=param_dtype)
        self.fc2 = Linear(("mlp", "embed"), (wide, hidden), bias=True, rngs=rngs, param_dtype=param_dtype)
        self.cell = config.merge_size**2

    def __call__(self, x: jax.Array) -> jax.Array:
        """[R, P, E] -> [R, C, H]; the GELU is the exact one, unlike the tower's."""
        rows, patches, size = x.shape
        x = self.norm(x).reshape(rows, patches // self.cell, self.cell * size)
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class VisionModel(nnx.Module):
    """Raw patches -> features of merged cells."""

    def __init__(self, config: VisionConfig, hidden: int, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        options: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype}
        self.patch_embed = PatchEmbedding(config.pixels, config.size, bias=False, frames=config.frames, **options)
        self.layers = VisionLayer(config, **options)
        self.merger = PatchMerger(config, hidden, **options)
        self.config = config

    def __call__(self, batch: PackedBatch, execution: Execution) -> jax.Array:
        """[R, C, H] features of the cells."""
        x, shared = self._prepare(batch, execution)
        return self.merger(run_layers(self.layers, x, *shared, execution=execution))

    def hidden_states(self, batch: PackedBatch, execution: Execution) -> jax.Array:
        """[L + 1, R, P, E]: the embedded patches and the output of each block."""
        x, shared = self._prepare(batch, execution)
        return collect_layers(self.layers, x, *shared, execution=execution)

    def _prepare(self, batch: PackedBatch, execution: Execution) -> tuple[jax.Array, tuple[Angles, Visibility]]:
        x = self.patch_embed(jnp.asarray(batch.patches), execution.compute_dtype)
        visibility = make_visibility(batch.patch_segment, causal=False, backend=execution.attention)
        head_dim = self.config.size // self.config.num_heads
        return x, (vision_angles(jnp.asarray(batch.patch_position), head_dim), visibility)


def vision_angles(position: jax.Array, head_dim: int) -> Angles:
    """int32[R, P, 2] (row, column) -> cosine and sine, float32[R, P, 1, D / 2]; rows turn the first half."""
    frequency = inverse_frequencies(head_dim // 2, VISION_THETA)
    angle = position.astype(jnp.float32)[..., None] * frequency[None, None, None, :]
    angle = angle.reshape(*position.shape[:2], 1, -1)
    return jnp.cos(angle), jnp.sin(angle)


class Qwen2VL(Backbone):
    """The whole encoder."""

    def __init__(self, config: Qwen2VLConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype = jnp.float32):
        self.text = Decoder(config.text, rngs=rngs, param_dtype=param_dtype)
        self.vision = VisionModel(config.vision, config.text.hidden_size, rngs=rngs, param_dtype=param_dtype)
        self.config = config
