"""What the Qwen vision-language models share: a tower with rotary positions over native sizes, and its merger.

Extra letters: E vision size, V inner size of the tower's MLPs, C = P / m^2 cells a vision row.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from multitap_jax.backbones.attention import Visibility, attention, make_visibility
from multitap_jax.backbones.base import Backbone
from multitap_jax.backbones.config import Section
from multitap_jax.backbones.decoder import Decoder, DecoderConfig
from multitap_jax.backbones.layers import LayerNorm, Linear, RMSNorm, inverse_frequencies
from multitap_jax.backbones.rope import Angles
from multitap_jax.backbones.stack import Execution, collect_layers, run_layers
from multitap_jax.backbones.vision import FusedAttention, PatchEmbedding, Pixels, block_flops
from multitap_jax.batch import PackedBatch

# Fixed in the architectures, absent from their configurations.
VISION_EPS = 1e-6
VISION_THETA = 10000.0

Norm = Callable[..., nnx.Module]  # (size, param_dtype=, stack=)
MLP = Callable[..., nnx.Module]  # (size, inner size, rngs=, param_dtype=, stack=)


def layer_norm(size: int, **options: Any) -> LayerNorm:
    """The norm of the towers of Qwen2-VL and Qwen3-VL."""
    return LayerNorm(size, VISION_EPS, **options)


def rms_norm(size: int, **options: Any) -> RMSNorm:
    """The norm of the tower of Qwen2.5-VL."""
    return RMSNorm(size, VISION_EPS, axis="vision", **options)


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """The vision tower: sizes, frames of the patch embedding, and the side m of the square merged into one token.

    `out_hidden_size` is the size of its features, that of the decoder.
    """

    # What `config.json` calls the two sizes.
    size_key: ClassVar[str] = "hidden_size"
    out_key: ClassVar[str] = "out_hidden_size"

    num_layers: int
    size: int
    num_heads: int
    intermediate_size: int
    merge_size: int
    frames: int
    pixels: Pixels
    out_hidden_size: int

    @classmethod
    def read(
        cls, vision: Section, pixels: Pixels, *, depth: int, size: int, intermediate_size: int, **others: Any
    ) -> Self:
        """Reads what the towers have in common.

        Args:
          vision: the vision section of `config.json`.
          pixels: of the tower.
          depth, size: what absent entries mean.
          intermediate_size, others: fields that are read already.
        """
        return cls(
            num_layers=vision.size("depth", depth),
            size=vision.size(cls.size_key, size),
            num_heads=vision.size("num_heads", 16),
            intermediate_size=intermediate_size,
            merge_size=vision.size("spatial_merge_size", 2),
            frames=vision.size("temporal_patch_size", 2),
            pixels=pixels,
            out_hidden_size=vision.size(cls.out_key, 3584),
            **others,
        )

    @property
    def cell(self) -> int:
        """m^2, patches that become one token."""
        return self.merge_size**2

    def inconsistencies(self) -> Iterator[str]:
        """What is wrong with the numbers, one sentence each."""
        if self.size % (4 * self.num_heads):
            yield (
                f"vision_config.{self.size_key} = {self.size} must be divisible by 4 * num_heads = "
                f"{4 * self.num_heads}: rows and columns each turn a half of the rotary pairs"
            )
        yield from self.pixels.inconsistencies()


@dataclasses.dataclass(frozen=True)
class QwenConfig:
    """The numbers of a model.

    Attributes:
      text, vision: of the two parts.
      tie_word_embeddings: whether the unused output head shares the token table.
      image_token_id: id of an image placeholder token.
    """

    model_type: ClassVar[str]

    text: DecoderConfig
    vision: TowerConfig
    tie_word_embeddings: bool
    image_token_id: int

    def inconsistencies(self) -> Iterator[str]:
        """What does not fit between the parts."""
        if self.vision.out_hidden_size != self.text.hidden_size:
            yield (
                f"vision_config.{self.vision.out_key} = {self.vision.out_hidden_size} must equal hidden_size = "
                f"{self.text.hidden_size} of the decoder"
            )

    @property
    def block(self) -> tuple[int, int]:
        """Patches of a block of a vision row, and the feature cells it becomes."""
        return self.vision.cell, 1

    def tower_flops(self, patches: int, layer_pairs: int, matrices: int = 2, mergers: int = 1) -> float:
        """Forward FLOPs of patch embedding, blocks and mergers.

        Args:
          patches: real patches.
          layer_pairs: pairs of patches that see each other, added up over the layers.
          matrices: of the MLP of a block.
          mergers: how many there are.
        """
        v = self.vision
        blocks = v.num_layers * block_flops(v.size, v.intermediate_size, patches, 0, matrices)
        blocks += layer_pairs * 4 * v.size
        merger = patches // v.cell * 2 * ((v.cell * v.size) ** 2 + v.cell * v.size * self.text.hidden_size)
        return blocks + patches * 2 * v.pixels.features * v.size + mergers * merger


def text_section(config: Section) -> Section:
    """The decoder's entries: nested since transformers 5, flat before."""
    return config.section("text_config") if config.get("text_config") else config


def qwen2_decoder(text: Section) -> DecoderConfig:
    """The decoder of Qwen2-VL and Qwen2.5-VL; absent entries mean what they mean to transformers."""
    if text.flag("use_sliding_window", False):
        text.wrong("use_sliding_window = true is not implemented; no published Qwen-VL model uses it")
    decoder = DecoderConfig.from_hf(
        text,
        vocab_size=152064,
        hidden_size=8192,
        intermediate_size=29568,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        rope_theta=1e6,
        rms_norm_eps=1e-5,
        qkv_bias=True,
    )
    if decoder.rope.sections is None:
        text.wrong("mrope_section is missing from rope_scaling / rope_parameters of config.json")
    return decoder


class TowerLayer(nnx.Module):
    """Pre-norm vision block; `attend` turns queries, keys and values into values, knowing what is seen."""

    attend: Callable[..., jax.Array] = staticmethod(attention)

    def __init__(self, config: TowerConfig, norm: Norm, mlp: MLP, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        options: dict[str, Any] = {"param_dtype": param_dtype, "stack": config.num_layers}
        self.norm1 = norm(config.size, **options)
        self.attention = FusedAttention(config.size, config.num_heads, rngs=rngs, **options)
        self.norm2 = norm(config.size, **options)
        self.mlp = mlp(config.size, config.intermediate_size, rngs=rngs, **options)

    def __call__(self, x: jax.Array, angles: Angles, *seen: Any) -> jax.Array:
        """[R, P, E] -> [R, P, E]."""
        x = x + self.attention(self.norm1(x), angles, *seen, attend=self.attend)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nnx.Module):
    """m^2 neighbouring patches (consecutive in block-major order) -> one cell of decoder size.

    The norm is of each patch, or with `joined` of the m^2 patches as one vector.
    """

    def __init__(
        self,
        config: TowerConfig,
        hidden: int,
        norm: Norm,
        *,
        joined: bool = False,
        stack: int | None = None,
        rngs: nnx.Rngs,
        param_dtype: jnp.dtype,
    ):
        wide = config.size * config.cell
        options: dict[str, Any] = {"bias": True, "rngs": rngs, "param_dtype": param_dtype, "stack": stack}
        self.norm = norm(wide if joined else config.size, param_dtype=param_dtype, stack=stack)
        self.fc1 = Linear(("vision", "mlp"), (wide, wide), **options)
        self.fc2 = Linear(("mlp", "embed"), (wide, hidden), **options)
        self.cell, self.joined = config.cell, joined

    def __call__(self, x: jax.Array) -> jax.Array:
        """[R, P, E] -> [R, C, H]; the GELU is the exact one, whatever the tower has."""
        rows, patches, size = x.shape
        join = lambda x: x.reshape(rows, patches // self.cell, self.cell * size)
        x = self.norm(join(x)) if self.joined else join(self.norm(x))
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class Tower(nnx.Module):
    """Raw patches -> features of merged cells."""

    def __init__(
        self,
        config: TowerConfig,
        hidden: int,
        norm: Norm,
        mlp: MLP,
        *,
        layer: Callable[..., nnx.Module] = TowerLayer,
        bias: bool = False,
        rngs: nnx.Rngs,
        param_dtype: jnp.dtype,
    ):
        options: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype}
        self.patch_embed = PatchEmbedding(config.pixels, config.size, bias=bias, frames=config.frames, **options)
        self.layers = layer(config, norm, mlp, **options)
        self.merger = PatchMerger(config, hidden, norm, **options)
        self.config = config

    def __call__(self, batch: PackedBatch, execution: Execution) -> jax.Array:
        """[R, C, H] features of the cells."""
        x, shared = self.prepare(batch, execution)
        return self.merger(run_layers(self.layers, x, *shared, execution=execution))

    def hidden_states(self, batch: PackedBatch, execution: Execution) -> jax.Array:
        """[L + 1, R, P, E]: the embedded patches and the output of each block."""
        x, shared = self.prepare(batch, execution)
        return collect_layers(self.layers, x, *shared, execution=execution)

    def prepare(self, batch: PackedBatch, execution: Execution) -> tuple[jax.Array, tuple[Angles, Visibility]]:
        """The embedded patches [R, P, E], and what every block gets besides them."""
        x = self.patch_embed(jnp.asarray(batch.patches), execution.compute_dtype)
        visibility = make_visibility(batch.patch_segment, causal=False, setup=execution.setup)
        return x, (self.angles(jnp.asarray(batch.patch_position)), visibility)

    def angles(self, position: jax.Array) -> Angles:
        """int32[R, P, 2] (row, column) -> cosine and sine, float32[R, P, 1, D / 2]; rows turn the first half."""
        frequency = inverse_frequencies(self.config.size // self.config.num_heads // 2, VISION_THETA)
        angle = position.astype(jnp.float32)[..., None] * frequency[None, None, None, :]
        angle = angle.reshape(*position.shape[:2], 1, -1)
        return jnp.cos(angle), jnp.sin(angle)


class QwenVL(Backbone):
    """A whole encoder, of the tower and the decoder that a family has."""

    def __init__(
        self,
        config: QwenConfig,
        tower: Callable[..., Tower],
        *,
        decoder: Callable[..., Decoder] = Decoder,
        rngs: nnx.Rngs,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        self.text = decoder(config.text, rngs=rngs, param_dtype=param_dtype)
        self.vision = tower(config.vision, config.text.hidden_size, rngs=rngs, param_dtype=param_dtype)
        self.config = config
