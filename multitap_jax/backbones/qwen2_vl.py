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

from multitap_jax.backbones.config import Section, tied
from multitap_jax.backbones.layers import quick_gelu
from multitap_jax.backbones.qwen import (
    QwenConfig,
    QwenVL,
    Tower,
    TowerConfig,
    layer_norm,
    qwen2_decoder,
    text_section,
)
from multitap_jax.backbones.vision import Pixels, VisionMLP


@dataclasses.dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """The tower; its hidden_size in `config.json` is that of the decoder."""

    size_key: ClassVar[str] = "embed_dim"
    out_key: ClassVar[str] = "hidden_size"


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
        root = Section(config)
        root.expect("model_type", cls.model_type)
        text, vision = text_section(root), root.section("vision_config")
        decoder = qwen2_decoder(text)
        vision.expect("hidden_act", "quick_gelu")
        tower = VisionConfig.read(
            vision,
            Pixels.from_hf(vision.size("patch_size", 14), root.beside(preprocessor)),
            depth=32,
            size=1280,
            intermediate_size=int(vision.size("embed_dim", 1280) * vision.number("mlp_ratio", 4)),
        )
        found = cls(decoder, tower, tied(root, text), root.whole("image_token_id", 151655))
        return root.settle(found, "a Qwen2-VL model")

    def vision_flops(self, patches: int, patch_pairs: int) -> float:
        """Forward FLOPs of the tower and its merger for real patches and visible pairs of them."""
        return self.tower_flops(patches, self.vision.num_layers * patch_pairs)


class Qwen2VL(QwenVL):
    """The whole encoder."""

    def __init__(self, config: Qwen2VLConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype = jnp.float32):
        mlp = functools.partial(VisionMLP, activation=quick_gelu)
        tower = functools.partial(Tower, norm=layer_norm, mlp=mlp)
        super().__init__(config, tower, rngs=rngs, param_dtype=param_dtype)
