"""Qwen3-VL (arXiv 2511.21631), the dense models, as an encoder.

Same function as transformers' Qwen3VLModel on still images. Against Qwen2-VL: queries and keys of the decoder are
normalised, its heads have a size of their own, and frequencies go to time, height and width in turn; the tower adds a
learned table of positions, interpolated to each picture's grid; and states on the way through the tower are added, each
through a merger of its own, to the image tokens behind the first decoder layers (DeepStack, arXiv 2406.04334). Letters
as in `qwen.py`; K states on the way.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from multitap_jax.backbones.attention import Visibility, attention
from multitap_jax.backbones.config import Section, tied
from multitap_jax.backbones.decoder import (
    Attend,
    Decoder,
    DecoderConfig,
    TextLayer,
    image_features,
    place_features,
    take_tokens,
)
from multitap_jax.backbones.layers import param, tanh_gelu
from multitap_jax.backbones.qwen import (
    PatchMerger,
    QwenConfig,
    QwenVL,
    Tower,
    TowerConfig,
    layer_norm,
    text_section,
)
from multitap_jax.backbones.rope import Angles
from multitap_jax.backbones.stack import Execution, keep_layers, pin
from multitap_jax.backbones.vision import Pixels, VisionMLP
from multitap_jax.batch import PackedBatch

HALF = (0.5, 0.5, 0.5)  # mean and deviation of pixels


@dataclasses.dataclass(frozen=True)
class DeepstackTowerConfig(TowerConfig):
    """The tower: what `TowerConfig` has, and

    Attributes:
      num_positions: rows of the position table, a square.
      deepstack: the layers whose states go to the decoder, deepstack_visual_indexes of `config.json`.
    """

    num_positions: int
    deepstack: tuple[int, ...]

    @property
    def side(self) -> int:
        """Positions a side of the table."""
        return math.isqrt(self.num_positions)

    def inconsistencies(self) -> Iterator[str]:
        """What is wrong with the numbers, one sentence each."""
        yield from super().inconsistencies()
        if self.side**2 != self.num_positions:
            yield (
                f"vision_config.num_position_embeddings = {self.num_positions} must be a square: the table is "
                "a grid of as many rows as columns"
            )
        found = list(self.deepstack)
        if not found:
            yield "vision_config.deepstack_visual_indexes is empty; all published Qwen3-VL models name some layers"
        if wrong := [i for i in found if not 0 <= i < self.num_layers]:
            yield f"vision_config.deepstack_visual_indexes names {wrong}, but depth = {self.num_layers}"
        if found != sorted(set(found)):
            yield f"vision_config.deepstack_visual_indexes = {found} must be in ascending order, each layer once"


@dataclasses.dataclass(frozen=True)
class Qwen3VLConfig(QwenConfig):
    """The numbers of a Qwen3-VL model."""

    model_type: ClassVar[str] = "qwen3_vl"

    vision: DeepstackTowerConfig

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> "Qwen3VLConfig":
        """Reads `config.json` as the hub has it and as transformers 5 writes it; both nest the text section.

        Fields that a file omits have the defaults of transformers' Qwen3VLConfig, which does not write defaults of
        nested sections. Video fields are ignored.

        Raises:
          ConfigError: another model type, a feature that is not implemented, or numbers that contradict each other.
        """
        root = Section(config)
        root.expect("model_type", cls.model_type)
        text, vision = text_section(root), root.section("vision_config")
        text.expect("attention_bias", False)
        vision.expect("hidden_act", "gelu_pytorch_tanh")
        decoder = DecoderConfig.from_hf(
            text,
            vocab_size=151936,
            hidden_size=4096,
            intermediate_size=22016,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            head_dim=128,
            max_position_embeddings=128000,
            rope_theta=5e5,
            rms_norm_eps=1e-6,
            qk_norm=True,
        )
        if not text.merged("rope_scaling", "rope_parameters").flag("mrope_interleaved", True):
            text.wrong("mrope_interleaved = false is not implemented; frequencies of Qwen3-VL are interleaved")
        sections = decoder.rope.sections or (24, 20, 20)
        rotary = dataclasses.replace(decoder.rope, sections=sections, interleaved=True)
        tower = DeepstackTowerConfig.read(
            vision,
            Pixels.from_hf(vision.size("patch_size", 16), root.beside(preprocessor), mean=HALF, std=HALF),
            depth=27,
            size=1152,
            intermediate_size=vision.size("intermediate_size", 4304),
            num_positions=vision.size("num_position_embeddings", 2304),
            deepstack=vision.wholes("deepstack_visual_indexes", (8, 16, 24)),
        )
        found = cls(
            dataclasses.replace(decoder, rope=rotary),
            tower,
            tied(root, text),
            root.whole("image_token_id", 151655),
        )
        return root.settle(found, "a Qwen3-VL model")

    def inconsistencies(self) -> Iterator[str]:
        """What does not fit between the parts."""
        yield from super().inconsistencies()
        if len(self.vision.deepstack) > self.text.num_layers:
            yield (
                f"vision_config.deepstack_visual_indexes names {len(self.vision.deepstack)} layers, but the decoder "
                f"has {self.text.num_layers} to add them to"
            )

    def vision_flops(self, patches: int, patch_pairs: int) -> float:
        """Forward FLOPs of the tower and all its mergers for real patches and visible pairs of them.

        Interpolating positions and adding states to tokens are no products of matrices and not counted.
        """
        v = self.vision
        return self.tower_flops(patches, v.num_layers * patch_pairs, mergers=1 + len(v.deepstack))


class PositionTable(nnx.Module):
    """A square table of learned positions, stretched over each picture's grid: corners on corners, bilinear between."""

    def __init__(self, config: DeepstackTowerConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        shape = (config.num_positions, config.size)
        table = jax.random.normal(rngs.params(), shape, param_dtype) * jnp.asarray(0.02, param_dtype)
        self.table = param(table, (None, "vision"))
        self.side = config.side

    def __call__(self, position: jax.Array, last: jax.Array) -> jax.Array:
        """float32[R, P, E].

        Args:
          position: int32[R, P, 2], (row, column) of each patch.
          last: int32[R, P, 2], those of the last patch of its picture.
        """
        place = position.astype(jnp.float32) * (self.side - 1) / jnp.maximum(last, 1).astype(jnp.float32)
        first = jnp.floor(place)
        share = place - first
        low = first.astype(jnp.int32)
        taps = (low, jnp.minimum(low + 1, self.side - 1))
        weights = (1 - share, share)
        total = jnp.zeros((*position.shape[:2], self.table.shape[1]), jnp.float32)
        for row in (0, 1):
            for column in (0, 1):
                index = taps[row][:, :, 0] * self.side + taps[column][:, :, 1]
                weight = weights[row][:, :, 0] * weights[column][:, :, 1]
                rows = jnp.take(self.table[...], index, axis=0, mode="fill")
                total = total + rows.astype(jnp.float32) * weight[:, :, None]
        return total


class DeepstackTower(Tower):
    """Raw patches -> features of merged cells, and those of states on the way."""

    config: DeepstackTowerConfig

    def __init__(self, config: DeepstackTowerConfig, hidden: int, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        options: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype}
        mlp = functools.partial(VisionMLP, activation=tanh_gelu)
        super().__init__(config, hidden, layer_norm, mlp, bias=True, **options)
        self.positions = PositionTable(config, **options)
        self.deepstack = PatchMerger(config, hidden, layer_norm, joined=True, stack=len(config.deepstack), **options)

    def __call__(self, batch: PackedBatch, execution: Execution) -> jax.Array:
        """[R, C, H] features of the cells."""
        return self.features(batch, execution)[0]

    def features(self, batch: PackedBatch, execution: Execution) -> tuple[jax.Array, jax.Array]:
        """[R, C, H] features of the cells; [K, R, C, H] those of the states on the way."""
        x, shared = self.prepare(batch, execution)
        keep = [index + 1 for index in self.config.deepstack]
        x, kept = keep_layers(self.layers, x, *shared, keep=keep, execution=execution)
        return self.merger(x), jax.vmap(lambda merger, x: merger(x))(self.deepstack, kept)

    def prepare(self, batch: PackedBatch, execution: Execution) -> tuple[jax.Array, tuple[Angles, Visibility]]:
        """The embedded patches with their positions [R, P, E], and what every block gets besides them."""
        x, shared = super().prepare(batch, execution)
        position, segment = jnp.asarray(batch.patch_position), jnp.asarray(batch.patch_segment)
        last = last_positions(position, segment, 1 + segment.shape[1] // self.config.cell)
        return x + self.positions(position, last).astype(x.dtype), shared


def last_positions(position: jax.Array, segment: jax.Array, count: int) -> jax.Array:
    """int32[R, P, 2]: (row, column) of the last patch of each patch's picture; `count` is above all `segment`."""
    largest = functools.partial(jax.ops.segment_max, num_segments=count)
    return jnp.take_along_axis(jax.vmap(largest)(position, segment), segment[:, :, None], axis=1)


class DeepstackLayer(TextLayer):
    """Decoder layer; behind the first K, image tokens get the features of a state on the way through the tower."""

    def __call__(
        self,
        x: jax.Array,
        angles: Angles,
        visibility: Visibility,
        *deepstack: jax.Array,
        at: jax.Array | None = None,
        attend: Attend = attention,
    ) -> jax.Array:
        """[B, S, H] -> [B, S, H], or [B, K, H].

        Args:
          x, angles, visibility, at, attend: as `TextLayer` has them.
          *deepstack: nothing for a batch without pictures, else features [K, cells of the batch, H], image_cell
            int32[B, S], and the number of the layer, int32[].
        """
        x = super().__call__(x, angles, visibility, at=at, attend=attend)
        if not deepstack:
            return x
        features, cell, layer = deepstack
        cell = cell if at is None else take_tokens(cell, at)

        def add(x: jax.Array) -> jax.Array:
            image = image_features(jax.lax.dynamic_index_in_dim(features, layer, keepdims=False), cell)
            return x + jnp.where(cell[:, :, None] >= 0, image.astype(x.dtype), jnp.zeros((), x.dtype))

        return jax.lax.cond(layer < len(features), add, lambda x: x, x)


class Qwen3VL(QwenVL):
    """The whole encoder."""

    vision: DeepstackTower

    def __init__(self, config: Qwen3VLConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype = jnp.float32):
        decoder = functools.partial(Decoder, layer=DeepstackLayer)
        super().__init__(config, DeepstackTower, decoder=decoder, rngs=rngs, param_dtype=param_dtype)

    def inputs(self, batch: PackedBatch, execution: Execution) -> tuple[jax.Array, tuple[Any, ...], tuple[Any, ...]]:
        """The embeddings [B, S, H]; what all decoder layers get besides; what each gets of its own."""
        x = self.text.embed(jnp.asarray(batch.tokens), execution.compute_dtype, execution.mesh)
        if batch.patches.shape[0] == 0:
            return x, (), ()
        found = (pin(features, execution) for features in self.vision.features(batch, execution))
        cells, deepstack = (f.reshape(*f.shape[:-3], -1, f.shape[-1]) for f in found)
        layer = np.arange(self.config.text.num_layers, dtype=np.int32)
        return place_features(x, cells, batch), (deepstack, jnp.asarray(batch.image_cell)), (layer,)
