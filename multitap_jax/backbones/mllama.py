"""Llama-3.2-Vision (Mllama; arXiv 2407.21783, section 7) as an encoder: a tiled tower, a decoder with cross-attention.

Same function as transformers' MllamaModel followed by taking one position a text.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from multitap_jax.backbones.base import Backbone
from multitap_jax.backbones.config import Section
from multitap_jax.backbones.cross import ROW_MASKS, CrossConfig, CrossDecoder, Sight, see
from multitap_jax.backbones.decoder import DecoderConfig
from multitap_jax.backbones.mllama_vision import STATES, VisionConfig, VisionModel
from multitap_jax.backbones.stack import Execution, pin
from multitap_jax.backbones.vision import CLIP_MEAN, CLIP_STD, block_flops
from multitap_jax.batch import PackedBatch
from multitap_jax.flops import Flops, Work, decoder_flops

# Rows of the token table beyond the vocabulary: the image token and room that was never used.
EXTRA_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class MllamaConfig:
    """The numbers of a Llama-3.2-Vision model.

    Attributes:
      text, vision, cross: of the parts; `text.vocab_size` counts all rows of the token table.
      image_token_id: id of the image token.
    """

    model_type: ClassVar[str] = "mllama"
    tie_word_embeddings: ClassVar[bool] = False

    text: DecoderConfig
    vision: VisionConfig
    cross: CrossConfig
    image_token_id: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> "MllamaConfig":
        """Reads `config.json`; absent fields have the defaults of transformers' MllamaConfig.

        Two entries of our own, which transformers ignores, say whose reading of the architecture is computed:
        `multitap_intermediate_states` ("before", the default, or "after") and `multitap_row_mask` ("hf", the default,
        or "meta"); see `VisionConfig.intermediate_states` and `CrossConfig.row_mask`.

        Raises:
          ConfigError: another model type, a feature that is not implemented, or numbers that contradict each other.
        """
        root = Section(config)
        root.expect("model_type", cls.model_type)
        text, vision = root.section("text_config"), root.section("vision_config")
        for section in (root, text):
            section.expect("tie_word_embeddings", False)
        decoder = DecoderConfig.from_hf(
            text,
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=40,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=131072,
            rope_theta=5e5,
            rms_norm_eps=1e-5,
        )
        decoder = dataclasses.replace(decoder, vocab_size=decoder.vocab_size + EXTRA_TOKENS)
        cross = CrossConfig(
            decoder.num_layers,
            text.wholes("cross_attention_layers", (3, 8, 13, 18, 23, 28, 33, 38)),
            root.expect("multitap_row_mask", *ROW_MASKS),
        )
        states = root.expect("multitap_intermediate_states", *STATES)
        # An image processor without statistics of its own halves and shifts; without one at all, the published one.
        statistics = (CLIP_MEAN, CLIP_STD) if preprocessor is None else ((0.5,) * 3, (0.5,) * 3)
        tower = VisionConfig.from_hf(vision, root.beside(preprocessor), states, *statistics)
        image = root.whole("image_token_index", root.whole("image_token_id", 128256))
        return root.settle(cls(decoder, tower, cross, image), "a Llama-3.2-Vision model")

    @property
    def reading(self) -> str:
        """How this reading of the architecture differs from that of transformers since 4.56; "" where it does not."""
        if self.vision.intermediate_states == "after" and self.cross.row_mask == "hf":
            return ""
        return (
            "transformers since 4.56 takes the tower's intermediate states after their layers, this model takes them "
            f"{self.vision.intermediate_states} (row mask: {self.cross.row_mask}): it gives other scores there"
        )

    @property
    def block(self) -> tuple[int, int]:
        """An image takes the patches of all its tiles, and is one cell."""
        return self.vision.max_num_tiles * self.vision.tile_patches, 1

    def forward_flops(self, work: Work) -> Flops:
        """Forward FLOPs of `work`; what padding tiles cost counts, since real tokens attend to them."""
        text, v, cross = self.text, self.vision, len(self.cross.layers)
        width, groups = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
        ends_in_cross = work.images > 0 and self.cross.layers[-1] == text.num_layers - 1
        own = dataclasses.replace(text, num_layers=text.num_layers - cross)
        decoder = decoder_flops(own, work, last=not ends_in_cross)
        if work.images:
            states = work.images * v.max_num_tiles * v.tile_tokens
            keys = states * 4 * text.hidden_size * groups
            asking = 2 * text.hidden_size * (2 * width + 3 * text.intermediate_size)
            layer = lambda tokens, pairs: keys + tokens * asking + pairs // v.tile_patches * v.tile_tokens * 4 * width
            decoder += (cross - ends_in_cross) * layer(work.tokens, work.cross_pairs)
            decoder += ends_in_cross * layer(work.pooled, work.pooled_cross_pairs)
        return Flops(float(decoder), float(self._vision_flops(work)))

    def _vision_flops(self, work: Work) -> float:
        v = self.vision
        row = v.max_num_tiles * v.filled_tokens
        # Of the row^2 pairs of an image with t real tiles those are hidden whose tokens are both padding:
        # (row - t U)^2. Over all images, t adds up to patches / g and t^2 to patch_pairs / g^2.
        tokens, squares = (
            part // v.tile_patches**power * v.tile_tokens**power
            for power, part in ((1, work.patches), (2, work.patch_pairs))
        )
        tower = block_flops(v.size, v.intermediate_size, work.images * row, 2 * row * tokens - squares)
        embedding = work.patches * 2 * v.pixels.features * v.size
        projector = work.images * v.max_num_tiles * v.tile_tokens * 2 * v.output_size * self.text.hidden_size
        return (v.num_layers + v.num_global_layers) * tower + embedding + projector


class Mllama(Backbone):
    """The whole encoder."""

    def __init__(self, config: MllamaConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype = jnp.float32):
        self.text = CrossDecoder(config.text, config.cross, rngs=rngs, param_dtype=param_dtype)
        self.vision = VisionModel(config.vision, config.text.hidden_size, rngs=rngs, param_dtype=param_dtype)
        self.config = config

    def __call__(self, batch: PackedBatch, execution: Execution) -> jax.Array:
        return self.text.run(self.embed(batch, execution), self.sight(batch, execution), batch, execution)

    def hidden_states(self, batch: PackedBatch, execution: Execution) -> jax.Array:
        return self.text.states(self.embed(batch, execution), self.sight(batch, execution), batch, execution)

    def embed(self, batch: PackedBatch, execution: Execution) -> jax.Array:
        """[B, S, H]: token embeddings; the image token has one of its own."""
        return self.text.embed(jnp.asarray(batch.tokens), execution.compute_dtype, execution.mesh)

    def sight(self, batch: PackedBatch, execution: Execution) -> Sight | None:
        """The encoded images and who sees them; None for a batch whose shape has no image."""
        if batch.patches.shape[0] == 0 or batch.image_token.shape[1] == 0:
            return None
        states, real = pin(self.vision(batch, execution), execution), self.vision.real_tiles(batch)
        return see(batch, states, real, row_mask=self.config.cross.row_mask, setup=execution.along_rows().setup)
