"""LLaVA-OneVision (arXiv 2408.03326) as an encoder: a SigLIP tower, a two-layer projector, a Qwen2 decoder.

Same function as transformers' LlavaOnevisionModel followed by taking one position a text. A picture is a view, or a
view and tiles (`data.anyres`); a learned newline ends what stands in the row of tokens as a line.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from multitap_jax.backbones.base import Backbone
from multitap_jax.backbones.config import Section
from multitap_jax.backbones.decoder import Decoder, DecoderConfig
from multitap_jax.backbones.layers import param
from multitap_jax.backbones.llava import (
    VisionModel,
    feature_layer,
    projector_and_tokens,
    projector_flops,
    text_config,
    tower_config,
)
from multitap_jax.backbones.stack import Execution
from multitap_jax.backbones.vit import SIGLIP, ViTConfig
from multitap_jax.batch import MIX_UNIT, PackedBatch

# What absent entries mean: SigLIP so400m/14 at 384 pixels, up to 6 x 6 tiles.
_VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
_SIDES = range(384, 2305, 384)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How pictures are cut; see `data.anyres.AnyresLayout`."""

    image_size: int
    pinpoints: tuple[tuple[int, int], ...]
    max_views: int

    def inconsistencies(self) -> Iterator[str]:
        """What is wrong with the numbers."""
        wrong = [size for size in self.pinpoints if any(side <= 0 or side % self.image_size for side in size)]
        if wrong or not self.pinpoints:
            found = ", ".join(map(str, wrong[:3])) or "the list is empty"
            yield f"image_grid_pinpoints must be multiples of image_size = {self.image_size}: {found}"


@dataclasses.dataclass(frozen=True)
class LlavaOnevisionConfig:
    """The numbers of a LLaVA-OneVision model; see `LlavaConfig`.

    Attributes:
      tiles: how pictures are cut.
    """

    model_type: ClassVar[str] = "llava_onevision"
    text: DecoderConfig
    vision: ViTConfig
    tiles: Tiles
    projector_bias: bool
    tie_word_embeddings: bool
    image_token_id: int

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None
    ) -> "LlavaOnevisionConfig":
        """Reads `config.json`; what it leaves out means what it does in transformers' LlavaOnevisionConfig.

        Video entries are ignored.

        Raises:
          ConfigError: another model type, a feature that is not implemented, or numbers that contradict each other.
        """
        root = Section(config)
        root.expect("model_type", cls.model_type)
        layer = feature_layer(root, -1)
        tower = tower_config(root, preprocessor, kind=SIGLIP, layer=layer, published=_VISION, strategy="full")
        _, text = text_config(root, "qwen2")
        tiles = _tiles(root, preprocessor, tower.image_size)
        found = cls(text, tower, tiles, **projector_and_tokens(root, 151646))
        return root.settle(found, "a LLaVA-OneVision model")

    @property
    def block(self) -> tuple[int, int]:
        """Patches of a block of a vision row (a view), and the feature cells it becomes: one each, and a newline."""
        return self.vision.side**2, self.vision.side**2 + 1

    def vision_flops(self, patches: int, patch_pairs: int) -> float:
        """Forward FLOPs of tower and projector for real patches; a patch sees its view, whatever `patch_pairs` says."""
        return self.vision.flops(patches) + projector_flops(self.vision, self.text, patches)


def _tiles(config: Section, preprocessor: Mapping[str, Any] | None, image_size: int) -> Tiles:
    ratio = config.get("vision_aspect_ratio", "anyres_max_9")
    if (found := re.fullmatch(r"anyres_max_(\d+)", str(ratio))) is None:
        config.wrong(f"vision_aspect_ratio = {ratio!r} is not implemented; this family has 'anyres_max_N'")
    pinpoints = config.pairs("image_grid_pinpoints", [(tall, wide) for tall in _SIDES for wide in _SIDES])
    if config.beside(preprocessor).pairs("image_grid_pinpoints", pinpoints) != pinpoints:
        config.wrong(
            "image_grid_pinpoints of config.json and of preprocessor_config.json differ; the two files belong to "
            "different models"
        )
    return Tiles(image_size, pinpoints, int(found[1]) if found else 9)


class OnevisionModel(VisionModel):
    """Raw patches -> features of cells: those of a view's patches, or a mix of them, then a newline."""

    def __init__(self, config: LlavaOnevisionConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        super().__init__(config, rngs=rngs, param_dtype=param_dtype)
        newline = jax.random.normal(rngs.params(), (config.text.hidden_size,), param_dtype)
        self.newline = param(newline * jnp.asarray(config.text.hidden_size**-0.5, param_dtype), ("embed",))

    def __call__(self, batch: PackedBatch, execution: Execution) -> jax.Array:
        """[N, V + 1, H] features of the views' cells."""
        x = super().__call__(batch, execution)
        if batch.patch_position.shape[-1] > 2:  # the shape says whether there are maps to resize
            x = mix(x.reshape(*batch.patch_segment.shape, x.shape[-1]), batch).reshape(x.shape)
        newline = jnp.broadcast_to(self.newline[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        return jnp.concatenate([x, newline], axis=1)


def mix(x: jax.Array, batch: PackedBatch) -> jax.Array:
    """[R, P, H] features -> [R, P, H]: each the mix of four of its picture that `patch_position` asks for."""
    segment, position = jnp.asarray(batch.patch_segment), jnp.asarray(batch.patch_position)
    column = jnp.arange(segment.shape[1], dtype=jnp.int32)[None]
    starts = jnp.pad(segment[:, 1:] != segment[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = jax.lax.cummax(jnp.where(starts, column, 0), axis=1)
    right, lower = (position[..., index, None].astype(jnp.float32) * MIX_UNIT for index in (4, 5))
    total = jnp.zeros(x.shape, jnp.float32)
    for index, weight in enumerate(
        ((1 - lower) * (1 - right), (1 - lower) * right, lower * (1 - right), lower * right)
    ):
        source = jnp.take_along_axis(x, (first + position[..., index])[..., None], axis=1)
        total = total + weight * source.astype(jnp.float32)
    return total.astype(x.dtype)


class LlavaOnevision(Backbone):
    """The whole encoder."""

    def __init__(self, config: LlavaOnevisionConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype = jnp.float32):
        self.text = Decoder(config.text, rngs=rngs, param_dtype=param_dtype)
        self.vision = OnevisionModel(config, rngs=rngs, param_dtype=param_dtype)
        self.config = config
