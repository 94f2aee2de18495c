"""The numbers of a Qwen2-VL model, read from its `config.json` in either layout that exists."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from multitap_jax.config import ConfigError

# Pixel statistics of OpenAI's CLIP, which Qwen2-VL's preprocessor uses.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class Qwen2VLConfig:
    """Qwen2-VL (arXiv 2409.12191); field names follow the hub's configuration where it has one.

    Attributes:
      vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads: the decoder.
      rope_theta: base of the decoder's rotary frequencies.
      mrope_section: how many of the head_dim / 2 frequencies turn with time, height and width.
      rms_norm_eps: of the decoder's norms.
      tie_word_embeddings: whether the unused output head shares the token table.
      image_token_id: id of an image placeholder token.
      max_position_embeddings: positions the model was trained for; a bound for planners, not for the code.
      vision_layers, vision_size, vision_heads, vision_intermediate_size: the vision tower.
      patch_size, temporal_patch_size, in_channels: of the patch embedding.
      merge_size: side of the square of patches merged into one image token.
      image_mean, image_std: per channel, of pixel values in [0, 1].
    """

    model_type: ClassVar[str] = "qwen2_vl"

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    rope_theta: float
    mrope_section: tuple[int, int, int]
    rms_norm_eps: float
    tie_word_embeddings: bool
    image_token_id: int
    max_position_embeddings: int
    vision_layers: int
    vision_size: int
    vision_heads: int
    vision_intermediate_size: int
    patch_size: int
    temporal_patch_size: int
    in_channels: int
    merge_size: int
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD

    @property
    def head_dim(self) -> int:
        """Size of a decoder head."""
        return self.hidden_size // self.num_heads

    @property
    def vision_head_dim(self) -> int:
        """Size of a vision head."""
        return self.vision_size // self.vision_heads

    @property
    def patch_features(self) -> int:
        """Values of one patch of one frame, the F of `PackedBatch.patches`."""
        return self.in_channels * self.patch_size**2

    def __post_init__(self) -> None:
        problems = []
        for field in dataclasses.fields(self):
            if field.type in (int, "int") and getattr(self, field.name) <= 0 and field.name != "image_token_id":
                problems.append(f"{field.name} = {getattr(self, field.name)} must be positive")
        if not problems:
            problems = list(self._inconsistencies())
        if problems:
            raise ConfigError("config.json does not describe a Qwen2-VL model:\n" + "\n".join(problems))

    def _inconsistencies(self):
        if self.hidden_size % self.num_heads:
            yield f"hidden_size = {self.hidden_size} must be divisible by num_attention_heads = {self.num_heads}"
        elif 2 * sum(self.mrope_section) != self.head_dim:
            yield f"mrope_section = {list(self.mrope_section)} must add up to half the head size {self.head_dim}"
        if self.num_heads % self.num_kv_heads:
            yield (
                f"num_attention_heads = {self.num_heads} must be divisible by num_key_value_heads = "
                f"{self.num_kv_heads} for grouped-query attention"
            )
        if self.vision_size % (4 * self.vision_heads):
            yield (
                f"vision_config.embed_dim = {self.vision_size} must be divisible by 4 * num_heads = "
                f"{4 * self.vision_heads}: rows and columns each turn a half of the rotary pairs"
            )
        if len(self.image_mean) != self.in_channels or len(self.image_std) != self.in_channels:
            yield f"image_mean and image_std need {self.in_channels} values, one a channel"
        if any(value <= 0 for value in self.image_std):
            yield f"image_std = {list(self.image_std)} must be positive"

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> "Qwen2VLConfig":
        """Reads the flat layout of the hub (before transformers 5) and the nested one (since).

        Fields that a file omits have the defaults of transformers' Qwen2VLConfig, which does not write defaults of
        nested sections. Video fields are ignored.

        Raises:
          ConfigError: another model type, a feature that is not implemented, or numbers that contradict each other.
        """
        if config.get("model_type", "qwen2_vl") != "qwen2_vl":
            raise ConfigError(f"model_type = {config['model_type']!r}: expected 'qwen2_vl'")
        text = config.get("text_config") or config
        vision, preprocessor = config.get("vision_config") or {}, preprocessor or {}
        if text.get("use_sliding_window"):
            raise ConfigError("use_sliding_window = true is not implemented; no published Qwen2-VL model uses it")
        for section, name, default in ((text, "hidden_act", "silu"), (vision, "hidden_act", "quick_gelu")):
            if section.get(name, default) != default:
                raise ConfigError(f"{name} = {section[name]!r} is not implemented; Qwen2-VL has {default!r}")
        rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
        if rope.get("rope_type", rope.get("type", "mrope")) not in ("default", "mrope"):
            raise ConfigError(f"rope type {rope.get('rope_type', rope.get('type'))!r} is not implemented; use 'mrope'")
        if "mrope_section" not in rope:
            raise ConfigError("mrope_section is missing from rope_scaling / rope_parameters of config.json")
        embed_dim = vision.get("embed_dim", 1280)
        heads = text.get("num_attention_heads", 64)
        return cls(
            vocab_size=text.get("vocab_size", 152064),
            hidden_size=text.get("hidden_size", 8192),
            intermediate_size=text.get("intermediate_size", 29568),
            num_layers=text.get("num_hidden_layers", 80),
            num_heads=heads,
            num_kv_heads=_or(text.get("num_key_value_heads", 8), heads),
            rope_theta=float(rope.get("rope_theta", text.get("rope_theta", 1e6))),
            mrope_section=tuple(rope["mrope_section"]),
            rms_norm_eps=float(text.get("rms_norm_eps", 1e-5)),
            tie_word_embeddings=bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
            image_token_id=config.get("image_token_id", 151655),
            max_position_embeddings=text.get("max_position_embeddings", 32768),
            vision_layers=vision.get("depth", 32),
            vision_size=embed_dim,
            vision_heads=vision.get("num_heads", 16),
            vision_intermediate_size=int(embed_dim * vision.get("mlp_ratio", 4)),
            patch_size=vision.get("patch_size", 14),
            temporal_patch_size=vision.get("temporal_patch_size", 2),
            in_channels=vision.get("in_chans", vision.get("in_channels", 3)),
            merge_size=vision.get("spatial_merge_size", 2),
            image_mean=tuple(preprocessor.get("image_mean") or CLIP_MEAN),
            image_std=tuple(preprocessor.get("image_std") or CLIP_STD),
        )


def _or(value: int | None, default: int) -> int:
    return default if value is None else value
