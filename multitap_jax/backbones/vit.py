"""The vision transformers of CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343), up to the layer that is looked at.

Same functions as transformers' CLIPVisionModel and SiglipVisionModel, of which one hidden state is taken. A picture, or
a view of one, is a square of fixed size and stands in a block of its own: patches see the patches of their block, and
CLIP's class token. Extra letters: N views, V patches of a view.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from multitap_jax.backbones.attention import Visibility, make_visibility
from multitap_jax.backbones.config import Section
from multitap_jax.backbones.layers import LayerNorm, param, quick_gelu
from multitap_jax.backbones.stack import Execution, collect_layers, run_layers
from multitap_jax.backbones.vision import PatchEmbedding, Pixels, VisionAttention, VisionMLP, block_flops
from multitap_jax.batch import PackedBatch

CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"
# What an entry means that a file leaves out: activation, epsilon of norms, side of a patch.
_DEFAULTS = {CLIP: ("quick_gelu", 1e-5, 32), SIGLIP: ("gelu_pytorch_tanh", 1e-6, 16)}
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The numbers of a tower; field names follow the hub's configuration.

    Attributes:
      kind: `CLIP` or `SIGLIP`, the `model_type` of the vision section.
      num_layers: layers that are run.
      stored_layers: layers of the checkpoint; those that are not run lie behind the state that is looked at.
      size, num_heads, intermediate_size, norm_eps: of a layer.
      activation: a name of `ACTIVATIONS`.
      image_size: pixels a side of a view; what does not fill a patch at the right and at the bottom is not seen.
      pooler: whether the checkpoint has a pooling head, which is never run.
      pixels: patches and pixel statistics.
    """

    kind: str
    num_layers: int
    stored_layers: int
    size: int
    num_heads: int
    intermediate_size: int
    norm_eps: float
    activation: str
    image_size: int
    pooler: bool
    pixels: Pixels

    @classmethod
    def from_hf(cls, section: Section, processor: Section, *, kind: str, layer: int) -> "ViTConfig":
        """Reads `vision_config`.

        Args:
          section: the section.
          processor: the image processor's file.
          kind: the kind where the section names none.
          layer: which hidden state is looked at: 0 the embeddings, 1 the first layer's output, -1 the last one's.
        """
        kind = section.expect("model_type", kind, *_DEFAULTS)
        activation, eps, patch_size = _DEFAULTS[kind]
        section.expect("num_channels", 3)
        stored = section.size("num_hidden_layers", 12)
        run = layer if layer >= 0 else stored + 1 + layer
        if not 0 < run <= stored:
            section.wrong(
                f"vision_feature_layer = {layer} is no output of one of the tower's {stored} layers: choose 1 to "
                f"{stored}, or -{stored} to -1"
            )
        statistics = (SIGLIP_MEAN, SIGLIP_STD) if kind == SIGLIP else ()
        return cls(
            kind=kind,
            num_layers=run,
            stored_layers=stored,
            size=section.size("hidden_size", 768),
            num_heads=section.size("num_attention_heads", 12),
            intermediate_size=section.size("intermediate_size", 3072),
            norm_eps=section.number("layer_norm_eps", eps),
            activation=section.expect("hidden_act", activation, *ACTIVATIONS),
            image_size=section.size("image_size", 224),
            pooler=kind == SIGLIP and section.flag("vision_use_head", True),
            pixels=Pixels.from_hf(section.size("patch_size", patch_size), processor, *statistics),
        )

    @property
    def side(self) -> int:
        """Patches a side of a view."""
        return self.image_size // self.pixels.patch_size

    @property
    def class_token(self) -> bool:
        """Whether a learned token stands before the patches, and a norm before the first layer (CLIP)."""
        return self.kind == CLIP

    def inconsistencies(self) -> Iterator[str]:
        """What is wrong with the numbers, one sentence each."""
        if self.size % self.num_heads:
            yield (
                f"vision_config.hidden_size = {self.size} must be divisible by num_attention_heads = {self.num_heads}"
            )
        if self.image_size < self.pixels.patch_size:
            yield f"vision_config.image_size = {self.image_size} holds no patch of {self.pixels.patch_size} pixels"
        yield from self.pixels.inconsistencies()

    def flops(self, patches: int) -> float:
        """Forward FLOPs for real patches; every view is whole, so it is known what they see."""
        views, tokens = patches // self.side**2, self.side**2 + self.class_token
        layers = self.num_layers * block_flops(self.size, self.intermediate_size, views * tokens, views * tokens**2)
        return layers + patches * 2 * self.pixels.features * self.size


class ViTLayer(nnx.Module):
    """Pre-norm layer."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        options: dict[str, Any] = {"param_dtype": param_dtype, "stack": config.num_layers}
        self.norm1 = LayerNorm(config.size, config.norm_eps, **options)
        self.attention = VisionAttention(config.size, config.num_heads, bias=True, rngs=rngs, **options)
        self.norm2 = LayerNorm(config.size, config.norm_eps, **options)
        activation = ACTIVATIONS[config.activation]
        self.mlp = VisionMLP(config.size, config.intermediate_size, activation, rngs=rngs, **options)

    def __call__(self, x: jax.Array, visibility: Visibility) -> jax.Array:
        """[N, V, E] -> [N, V, E]."""
        x = x + self.attention(self.norm1(x), visibility)
        return x + self.mlp(self.norm2(x))


class ViT(nnx.Module):
    """Raw patches of views -> the hidden state that is looked at, without the class token."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        options: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype}
        self.patch_embed = PatchEmbedding(config.pixels, config.size, bias=not config.class_token, **options)
        draw = lambda *shape: jax.random.normal(rngs.params(), shape, param_dtype) * jnp.asarray(0.02, param_dtype)
        self.positions = param(draw(config.side**2 + config.class_token, config.size), (None, "vision"))
        token, norm = None, None
        if config.class_token:
            token = param(draw(config.size), ("vision",))
            norm = LayerNorm(config.size, config.norm_eps, param_dtype=param_dtype)
        self.class_token, self.pre_norm = nnx.data(token), nnx.data(norm)
        self.layers = ViTLayer(config, **options)
        self.config = config

    def __call__(self, batch: PackedBatch, execution: Execution) -> jax.Array:
        """[N, V, E] of all blocks of the vision rows, in their order."""
        x, visibility = self._prepare(batch, execution)
        return run_layers(self.layers, x, visibility, execution=execution)[:, int(self.config.class_token) :]

    def hidden_states(self, batch: PackedBatch, execution: Execution) -> jax.Array:
        """[L + 1, N, (1 +) V, E]: the embeddings and the output of each layer that is run, class token included."""
        x, visibility = self._prepare(batch, execution)
        return collect_layers(self.layers, x, visibility, execution=execution)

    def _prepare(self, batch: PackedBatch, execution: Execution) -> tuple[jax.Array, Visibility]:
        view, dtype = self.config.side**2, execution.compute_dtype
        patches = jnp.asarray(batch.patches)
        x = self.patch_embed(patches.reshape(-1, view, patches.shape[-1]), dtype)
        # A block is filled by one view or by none.
        real = (jnp.asarray(batch.patch_segment).reshape(-1, view)[:, :1] > 0).astype(jnp.int32)
        if self.class_token is not None:
            token = self.class_token[...].astype(dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, x.shape[2])), x], axis=1)
        x = x + self.positions[...].astype(dtype)[None]
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        segment = jnp.broadcast_to(real, x.shape[:2])
        return x, make_visibility(segment, causal=False, setup=execution.setup)
