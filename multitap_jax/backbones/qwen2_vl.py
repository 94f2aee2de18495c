"""Qwen2-VL (arXiv 2409.12191) as an encoder: packed tokens and pixels in, pooled hidden states out, never logits.

Same function as transformers' Qwen2VLModel followed by taking one position a text; attention, rotary positions and the
image features follow the packed layout of `batch.py`. The parts are those of `qwen.py`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from multitap_jax.backbones.config import check, expect, optional
from multitap_jax.backbones.layers import quick_gelu
from multitap_jax.backbones.qwen import QwenConfig, QwenVL, Tower, TowerConfig, layer_norm, qwen2_decoder, tied
from multitap_jax.backbones.vision import Pixels, VisionMLP


@dataclasses.dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """The tower; its hidden_size in `config.json` is that of the decoder."""

    size_key: ClassVar[str] = "embed_dim"


@dataclasses.dataclass(frozen=True)
class Qwen2VLConfig(QwenConfig):
    """The numbers of a Qwen2-VL model."""

    model_type: ClassVar[str] = "qwen2_vl"

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
        decoder = qwen2_decoder(text)
        expect(vision, "hidden_act", "quick_gelu")
        size = optional(vision, "embed_dim", 1280)
        tower = VisionConfig(
            num_layers=optional(vision, "depth", 32),
            size=size,
            num_heads=optional(vision, "num_heads", 16),
            intermediate_size=int(size * optional(vision, "mlp_ratio", 4)),
            merge_size=optional(vision, "spatial_merge_size", 2),
            frames=optional(vision, "temporal_patch_size", 2),
            pixels=Pixels.from_hf(optional(vision, "patch_size", 14), preprocessor),
        )
        found = cls(decoder, tower, tied(config, text), optional(config, "image_token_id", 151655))
        return check(found, "a Qwen2-VL model")

    def vision_flops(self, patches: int, patch_pairs: int) -> float:
        """Forward FLOPs of the tower and its merger for real patches and visible pairs of them."""
        return self.tower_flops(patches, self.vision.num_layers * patch_pairs)


class Qwen2VL(QwenVL):
    """The whole encoder."""

    def __init__(self, config: Qwen2VLConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype = jnp.float32):
        mlp = functools.partial(VisionMLP, activation=quick_gelu)
        tower = functools.partial(Tower, norm=layer_norm, mlp=mlp)
        super().__init__(config, tower, rngs=rngs, param_dtype=param_dtype)
