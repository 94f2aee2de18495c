"""LLaVA-1.5 (arXiv 2310.03744) as an encoder: a CLIP or SigLIP tower, a two-layer projector, a decoder.

Same function as transformers' LlavaModel followed by taking one position a text. A picture is one view; each of its
patches becomes one token.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from multitap_jax.backbones.base import Backbone
from multitap_jax.backbones.config import Section, tied
from multitap_jax.backbones.decoder import Decoder, DecoderConfig
from multitap_jax.backbones.layers import Linear
from multitap_jax.backbones.stack import Execution
from multitap_jax.backbones.vit import CLIP, SIGLIP, ViT, ViTConfig
from multitap_jax.batch import PackedBatch

# What an absent vision section means: CLIP ViT-L/14 at 336 pixels.
_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
# What an entry means that the text section leaves out, by its `model_type`.
_DECODERS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "qwen2": {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "qkv_bias": True,
    },
}


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """The numbers of a LLaVA model.

    Attributes:
      text, vision: of the decoder and of the tower.
      decoder: what the decoder is, the `model_type` of the text section.
      projector_bias: whether the projector's maps have biases.
      tie_word_embeddings: whether the unused output head shares the token table.
      image_token_id: id of an image placeholder token.
    """

    model_type: ClassVar[str] = "llava"
    text: DecoderConfig
    decoder: str
    vision: ViTConfig
    projector_bias: bool
    tie_word_embeddings: bool
    image_token_id: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> "LlavaConfig":
        """Reads `config.json`; what it leaves out means what it does in transformers' LlavaConfig.

        Raises:
          ConfigError: another model type, a feature that is not implemented, or numbers that contradict each other.
        """
        root = Section(config)
        root.expect("model_type", cls.model_type)
        layer = feature_layer(root, -2)
        tower = tower_config(root, preprocessor, kind=CLIP, layer=layer, published=_VISION, strategy="default")
        decoder, text = text_config(root, "llama")
        found = cls(text, decoder, tower, **projector_and_tokens(root, 32000))
        return root.settle(found, "a LLaVA model")

    @property
    def block(self) -> tuple[int, int]:
        """Patches of a block of a vision row (a view), and the feature cells it becomes."""
        return self.vision.side**2, self.vision.side**2

    def vision_flops(self, patches: int, patch_pairs: int) -> float:
        """Forward FLOPs of tower and projector for real patches; a patch sees its view, whatever `patch_pairs` says."""
        return self.vision.flops(patches) + projector_flops(self.vision, self.text, patches)


def text_config(config: Section, kind: str) -> tuple[str, DecoderConfig]:
    """What the decoder is (`kind` where its section does not say), and its numbers."""
    text = config.section("text_config")
    kind = text.expect("model_type", kind, *_DECODERS)
    windowed = text.flag("use_sliding_window", False) if kind == "qwen2" else text.entries.get("sliding_window", 4096)
    if windowed and kind != "llama":
        text.wrong(
            f"text_config describes a {kind} decoder with a sliding window, which is not implemented; for rows shorter "
            "than the window, sliding_window = null gives the same scores"
        )
    for name in ("attention_bias", "mlp_bias") if kind == "llama" else ():
        text.expect(name, False)
    same: dict[str, Any] = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    return kind, DecoderConfig.from_hf(text, **same, **_DECODERS[kind], rope_theta=10000.0, rms_norm_eps=1e-6)


def feature_layer(config: Section, default: int) -> int:
    """The hidden state of the tower that is looked at; a list of one counts as one."""
    found = config.get("vision_feature_layer", default)
    if isinstance(found, list | tuple):
        if len(found) == 1 and isinstance(found[0], int):
            return found[0]
        config.wrong(f"vision_feature_layer = {found!r} is not implemented; this family has a single layer")
        return default
    return config.whole("vision_feature_layer", default)


def tower_config(
    config: Section,
    preprocessor: Mapping[str, Any] | None,
    *,
    kind: str,
    layer: int,
    published: Mapping[str, Any],
    strategy: str,
) -> ViTConfig:
    """The tower's numbers from the whole of `config.json`; the other arguments are what absent entries mean."""
    config.expect("projector_hidden_act", "gelu")
    section = config.section("vision_config", published)
    tower = ViTConfig.from_hf(section, config.beside(preprocessor), kind=kind, layer=layer)
    wanted = "full" if tower.kind == SIGLIP else "default"
    if (found := config.get("vision_feature_select_strategy", strategy)) != wanted:
        config.wrong(
            f"vision_feature_select_strategy = {found!r} is not implemented for a {tower.kind}: {wanted!r} gives all "
            "of its patches and nothing else"
        )
    return tower


def projector_and_tokens(config: Section, image_token: int) -> dict[str, Any]:
    """The fields besides text and vision; `image_token` is the placeholder where no entry names one."""
    return {
        "projector_bias": config.flag("multimodal_projector_bias", True),
        "tie_word_embeddings": tied(config, config.section("text_config")),
        "image_token_id": config.whole("image_token_index", config.whole("image_token_id", image_token)),
    }


def projector_flops(vision: ViTConfig, text: DecoderConfig, patches: int) -> float:
    """Forward FLOPs of the projector."""
    return float(patches * 2 * (vision.size + text.hidden_size) * text.hidden_size)


class Projector(nnx.Module):
    """fc2(gelu(fc1(x))), with the exact GELU."""

    def __init__(self, size: int, hidden: int, *, bias: bool, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        options: dict[str, Any] = {"bias": bias, "rngs": rngs, "param_dtype": param_dtype}
        self.fc1 = Linear(("vision", "mlp"), (size, hidden), **options)
        self.fc2 = Linear(("mlp", "embed"), (hidden, hidden), **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, V, E] -> [N, V, H]."""
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class VisionModel(nnx.Module):
    """Raw patches -> features of decoder size, one a patch."""

    def __init__(self, config: Any, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        options: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype}
        self.tower = ViT(config.vision, **options)
        self.projector = Projector(config.vision.size, config.text.hidden_size, bias=config.projector_bias, **options)

    def __call__(self, batch: PackedBatch, execution: Execution) -> jax.Array:
        """[N, V, H] features of the views, N being all blocks of all vision rows."""
        return self.projector(self.tower(batch, execution))


class Llava(Backbone):
    """The whole encoder."""

    def __init__(self, config: LlavaConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype = jnp.float32):
        self.text = Decoder(config.text, rngs=rngs, param_dtype=param_dtype)
        self.vision = VisionModel(config, rngs=rngs, param_dtype=param_dtype)
        self.config = config
