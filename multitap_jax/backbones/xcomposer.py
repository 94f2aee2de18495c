"""InternLM-XComposer2.5 (arXiv 2407.03320) as an encoder: a CLIP tower, a projector, an InternLM2 decoder.

Same function as the published modelling code (InternLMXComposer2ForCausalLM) followed by taking one position a text. A
picture is square views: one of the whole and, where that shows less than the picture holds, tiles (`data/hd.py`). Four
neighbouring patches become one token; learned vectors end each line of tokens and stand between whole and tiles.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from multitap_jax.backbones.base import Backbone
from multitap_jax.backbones.config import Section, tied
from multitap_jax.backbones.decoder import Decoder, DecoderConfig
from multitap_jax.backbones.internlm2 import Image, PartialConfig, PartialLayer, partial_flops
from multitap_jax.backbones.layers import param
from multitap_jax.backbones.llava import Projector
from multitap_jax.backbones.overview import with_overview
from multitap_jax.backbones.stack import Execution
from multitap_jax.backbones.vit import CLIP, ViT, ViTConfig
from multitap_jax.batch import PackedBatch
from multitap_jax.flops import Flops, Work, decoder_flops

ARCHITECTURE = "InternLMXComposer2ForCausalLM"
MERGE = 2  # m x m patches of a view become one cell
# CLIP ViT-L/14 at 560 pixels, which the published code builds whatever config.json says.
_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 560,
    "patch_size": 14,
}
# What the official MULTI-TAP code computes: it hands over pixels from 0 to 1 as they are, and no mask of image tokens.
OFFICIAL = {"multitap_partial_lora": "off", "multitap_pixels": "raw"}


@dataclasses.dataclass(frozen=True)
class XComposerConfig:
    """The numbers of an InternLM-XComposer2.5 model.

    Attributes:
      text, vision: of the decoder and of the tower.
      partial: of the additions that image tokens get.
      applied: whether they get them.
      tie_word_embeddings: whether the unused output head shares the token table.
      image_token_id: id of an image placeholder token.
    """

    model_type: ClassVar[str] = "internlm2"
    text: DecoderConfig
    vision: ViTConfig
    partial: PartialConfig
    applied: bool
    tie_word_embeddings: bool
    image_token_id: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> "XComposerConfig":
        """Reads `config.json`; what it leaves out means what it does in the published configuration class.

        Entries of our own say whose reading of the architecture is computed: `multitap_partial_lora` ("image", the
        default, or "off") and `multitap_pixels` ("normalised", the default, or "raw": values from 0 to 1); see
        `OFFICIAL`. Others are constants of the published code: `multitap_plora_rank`, `multitap_plora_alpha`,
        `vision_config`. Image tokens are held by the last reserved token that no chat needs, [UNUSED_TOKEN_144].

        Raises:
          ConfigError: another model type or architecture, a feature that is not implemented, or numbers that contradict
            each other.
        """
        root = Section(config)
        root.expect("model_type", cls.model_type)
        if ARCHITECTURE not in str([root.get("architectures"), root.get("auto_map")]):
            root.wrong(
                f"architectures = {root.get('architectures')!r} is not implemented; of this model_type only "
                f"InternLM-XComposer2.5 is, with [{ARCHITECTURE!r}]"
            )
        if root.flag("bias", True):
            root.wrong("bias = true (or absent) is not implemented; the published models say bias: false")
        text = DecoderConfig.from_hf(
            root,
            vocab_size=103168,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=None,
            max_position_embeddings=2048,
            rope_theta=10000.0,
            rms_norm_eps=1e-6,
        )
        rank = root.size("multitap_plora_rank", 256)
        partial = PartialConfig(rank, root.number("multitap_plora_alpha", rank))
        tower = ViTConfig.from_hf(
            root.section("vision_config", _VISION), root.beside(preprocessor), kind=CLIP, layer=-1
        )
        if root.expect("multitap_pixels", "normalised", "raw") == "raw":
            pixels = dataclasses.replace(tower.pixels, mean=(0.0,) * 3, std=(1.0,) * 3)
            tower = dataclasses.replace(tower, pixels=pixels)
        applied = root.expect("multitap_partial_lora", "image", "off") == "image"
        image = root.whole("image_token_id", text.vocab_size - 3)
        return root.settle(
            cls(text, tower, partial, applied, tied(root, root), image), "an InternLM-XComposer2.5 model"
        )

    def inconsistencies(self) -> Iterator[str]:
        """What is wrong with the tower for this family."""
        if self.vision.side % MERGE:
            yield (
                f"vision_config.image_size = {self.vision.image_size}: {self.vision.side} patches a side of "
                f"{self.vision.pixels.patch_size} pixels are not a multiple of {MERGE}"
            )

    @property
    def block(self) -> tuple[int, int]:
        """Patches of a view, and its cells: one for four patches, the end of a line, the end of the whole."""
        return self.vision.side**2, self.vision.side**2 // MERGE**2 + 2

    def forward_flops(self, work: Work) -> Flops:
        """Forward FLOPs of `work`; what makes a view of the whole out of tiles is left out (0.2 % of the tower)."""
        additions = work.image_tokens * partial_flops(self.text, self.partial) if self.applied else 0
        hidden, joined = self.text.hidden_size, MERGE**2 * self.vision.size
        projector = work.patches // MERGE**2 * 2 * (joined + hidden) * hidden
        return Flops(float(decoder_flops(self.text, work) + additions), self.vision.flops(work.patches) + projector)


class XComposerVision(nnx.Module):
    """Raw patches of views -> features of decoder size: of cells, of the end of a line, of the end of the whole."""

    def __init__(self, config: XComposerConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        options: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype}
        joined = MERGE**2 * config.vision.size
        self.tower = ViT(config.vision, **options)
        self.projector = Projector(joined, config.text.hidden_size, bias=True, **options)
        # In the shapes of the published tensors.
        self.newline = param(jnp.zeros((1, 1, 1, joined), param_dtype), (None, None, None, "vision"))
        self.separator = param(jnp.zeros((1, 1, joined), param_dtype), (None, None, "vision"))
        self.side = config.vision.side

    def __call__(self, batch: PackedBatch, execution: Execution) -> jax.Array:
        """[N, V / m^2 + 2, H] of the views, N being all blocks of all vision rows."""
        if batch.patch_position.shape[-1] > 2:  # the shape says whether there are tiles
            batch = with_overview(batch, self.side)
        x = self.tower(batch, execution)
        views, _, size = x.shape
        x = x.reshape(views, self.side // MERGE, MERGE, self.side // MERGE, MERGE, size)
        x = jnp.transpose(x, (0, 1, 3, 2, 4, 5)).reshape(views, -1, MERGE**2 * size)
        learned = [mark[...].astype(x.dtype).reshape(1, 1, -1) for mark in (self.newline, self.separator)]
        marks = self.projector(jnp.concatenate(learned, axis=1))
        return jnp.concatenate([self.projector(x), jnp.broadcast_to(marks, (views, 2, marks.shape[-1]))], axis=1)


class XComposer(Backbone):
    """The whole encoder."""

    def __init__(self, config: XComposerConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype = jnp.float32):
        layer = functools.partial(PartialLayer, partial=config.partial)
        self.text = Decoder(config.text, layer=layer, rngs=rngs, param_dtype=param_dtype)
        self.vision = XComposerVision(config, rngs=rngs, param_dtype=param_dtype)
        self.config = config

    def inputs(self, batch: PackedBatch, execution: Execution) -> tuple[jax.Array, tuple[Image], tuple[()]]:
        """The embeddings [B, S, H]; which tokens are image tokens."""
        seen = self.config.applied and batch.patches.shape[0] > 0
        image = jnp.asarray(batch.image_cell) >= 0 if seen else None
        return self.embed(batch, execution), (image,), ()
