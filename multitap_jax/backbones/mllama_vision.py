"""The vision tower of Llama-3.2-Vision (Mllama; arXiv 2407.21783, section 7): tiles, two stacks of layers, gates.

An image is T tiles of one size, of which some may be padding; they are encoded together. Each tile is its patches and
a class token, filled up to a multiple of eight. Real tokens attend to that filling and to padding tiles, as they did
when the published weights were trained, so all T tiles are encoded whatever the picture.
Letters: E size of the tower, N images (blocks of all vision rows), T tiles, g patches of a tile, U = g + 1 tokens of a
tile, W = U rounded up to a multiple of eight, K intermediate states.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from multitap_jax.backbones.attention import Keys, Queries, Visibility, make_cross_visibility
from multitap_jax.backbones.config import Section
from multitap_jax.backbones.layers import LayerNorm, Linear, gated, param
from multitap_jax.backbones.stack import Execution, collect_layers, keep_layers, pin, run_layers
from multitap_jax.backbones.vision import PatchEmbedding, Pixels, VisionAttention, VisionMLP
from multitap_jax.batch import PackedBatch

EPS = 1e-5  # of the norms around the stacks; fixed in the architecture
FILL = 8  # tokens of a tile are filled up to a multiple of this
BILINEAR = 2  # Pillow's number
STATES = ("before", "after")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The numbers of the tower; names of the hub where they differ stand in brackets.

    Attributes:
      num_layers, num_global_layers, size [hidden_size], num_heads [attention_heads], intermediate_size: sizes.
      image_size, max_num_tiles: side of a tile in pixels, and T.
      intermediate_layers: layers of the first stack whose states join the output [intermediate_layers_indices].
      intermediate_states: the state "before" such a layer, as Meta's code has it and the published weights were
        trained, or "after" it, as transformers has it since 4.56.
      aspect_ratios: arrangements (tiles high, tiles wide); their order numbers them [supported_aspect_ratios].
      output_size: E * (1 + K) [vision_output_dim].
      norm_eps: of the norms inside of layers.
      pixels: statistics and side of a patch.
      resample: Pillow's number of the filter that brings pictures to size.
    """

    num_layers: int
    num_global_layers: int
    size: int
    num_heads: int
    intermediate_size: int
    image_size: int
    max_num_tiles: int
    intermediate_layers: tuple[int, ...]
    intermediate_states: str
    aspect_ratios: tuple[tuple[int, int], ...]
    output_size: int
    norm_eps: float
    pixels: Pixels
    resample: int

    @classmethod
    def from_hf(
        cls,
        vision: Section,
        processor: Section,
        intermediate_states: str,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> "VisionConfig":
        """From the vision section; absent fields as in transformers' MllamaVisionConfig.

        Args:
          vision: the section.
          processor: the image processor's file, which must be made for tiles of the same size and number.
          intermediate_states: see the attribute.
          mean, std: of pixels, where the processor's file has none.
        """
        vision.expect("hidden_act", "gelu")
        tiles, side = vision.size("max_num_tiles", 4), vision.size("image_size", 448)
        size = processor.section("size", {"height": side, "width": side})
        found = {name: size.size(name, side) for name in ("height", "width")}
        if set(found.values()) != {side}:
            processor.wrong(f"preprocessor_config.size = {found}, but vision_config.image_size = {side}")
        if (wanted := processor.size("max_image_tiles", tiles)) != tiles:
            processor.wrong(
                f"preprocessor_config.max_image_tiles = {wanted}, but vision_config.max_num_tiles = {tiles}"
            )
        return cls(
            num_layers=vision.size("num_hidden_layers", 32),
            num_global_layers=vision.size("num_global_layers", 8),
            size=vision.size("hidden_size", 1280),
            num_heads=vision.size("attention_heads", 16),
            intermediate_size=vision.size("intermediate_size", 5120),
            image_size=side,
            max_num_tiles=tiles,
            intermediate_layers=vision.wholes("intermediate_layers_indices", (3, 7, 15, 23, 30)),
            intermediate_states=intermediate_states,
            aspect_ratios=vision.pairs("supported_aspect_ratios", arrangements(4)),
            output_size=vision.size("vision_output_dim", 7680),
            norm_eps=vision.number("norm_eps", 1e-5),
            pixels=Pixels.from_hf(vision.size("patch_size", 14), processor, mean, std),
            resample=processor.whole("resample", BILINEAR),
        )

    @property
    def tile_patches(self) -> int:
        """g."""
        return (self.image_size // self.pixels.patch_size) ** 2

    @property
    def tile_tokens(self) -> int:
        """U."""
        return self.tile_patches + 1

    @property
    def filled_tokens(self) -> int:
        """W."""
        return -(-self.tile_tokens // FILL) * FILL

    def inconsistencies(self) -> Iterator[str]:
        """What is wrong with the numbers, one sentence each."""
        if self.size % self.num_heads:
            yield f"vision_config.hidden_size = {self.size} must be divisible by attention_heads = {self.num_heads}"
        if self.image_size % self.pixels.patch_size:
            yield f"vision_config.image_size = {self.image_size} must be a multiple of patch_size"
        layers = self.intermediate_layers
        if len(set(layers)) != len(layers) or not all(0 <= layer < self.num_layers for layer in layers):
            yield (
                f"vision_config.intermediate_layers_indices = {list(layers)} must be different layers from 0 to "
                f"{self.num_layers - 1}"
            )
        if self.output_size != self.size * (1 + len(layers)):
            yield (
                f"vision_config.vision_output_dim = {self.output_size} must be hidden_size * (1 + number of "
                f"intermediate layers) = {self.size * (1 + len(layers))}"
            )
        if self.aspect_ratios != arrangements(self.max_num_tiles):
            yield (
                f"vision_config.supported_aspect_ratios must be all arrangements of up to max_num_tiles = "
                f"{self.max_num_tiles} tiles in the image processor's order"
            )
        if not 0 <= self.resample <= 5:
            yield f"resample = {self.resample} of the image processor is no filter of Pillow (0 to 5)"
        yield from self.pixels.inconsistencies()


def arrangements(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """(tiles high, tiles wide) of every rectangle of at most `max_tiles` tiles, in the published order."""
    sides = range(1, max_tiles + 1)
    return tuple((high, wide) for high in sides for wide in sides if high * wide <= max_tiles)


class TileEmbedding(nnx.Module):
    """A gated vector for each tile of each arrangement; row 0 of the table is for no image at all."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        shape = (len(config.aspect_ratios) + 1, config.max_num_tiles * config.size)
        self.embedding = param(_normal(rngs, shape, param_dtype), (None, "vision"))
        self.gate = param(jnp.zeros(1, param_dtype), (None,))

    def __call__(self, x: jax.Array, ratio: jax.Array, execution: Execution) -> jax.Array:
        """[N, T, tokens, E], int32[N] -> [N, T, tokens, E]."""
        rows = _rows(self.embedding[...], ratio, x.dtype, execution)
        return x + gated(self.gate[...], rows.reshape(*x.shape[:2], 1, x.shape[3]))


class PositionEmbedding(nnx.Module):
    """Positions inside of a tile, blended by one gate with positions inside of the whole image."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        tokens, size = config.tile_tokens, config.size
        shape = (len(config.aspect_ratios) + 1, config.max_num_tiles * tokens * size)
        self.embedding = param(_normal(rngs, (tokens, size), param_dtype), (None, "vision"))
        self.tile_embedding = param(_normal(rngs, shape, param_dtype), (None, "vision"))
        self.gate = param(jnp.zeros(1, param_dtype), (None,))

    def __call__(self, x: jax.Array, ratio: jax.Array, execution: Execution) -> jax.Array:
        """[N, T, U, E], int32[N] -> [N, T, U, E]."""
        inside = self.embedding[...].astype(x.dtype)[None, None]
        whole = _rows(self.tile_embedding[...], ratio, x.dtype, execution).reshape(x.shape)
        return x + (inside - gated(self.gate[...], inside)) + gated(self.gate[...], whole)


class VisionLayer(nnx.Module):
    """Pre-norm block; in the second stack both branches are gated."""

    def __init__(self, config: VisionConfig, *, gates: bool, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        stack = config.num_global_layers if gates else config.num_layers
        options: dict[str, Any] = {"param_dtype": param_dtype, "stack": stack}
        gate = lambda: nnx.data(param(jnp.zeros((stack, 1), param_dtype), ("layers", None)) if gates else None)
        self.norm1 = LayerNorm(config.size, config.norm_eps, **options)
        self.attention = VisionAttention(config.size, config.num_heads, bias=False, rngs=rngs, **options)
        self.attention_gate = gate()
        self.norm2 = LayerNorm(config.size, config.norm_eps, **options)
        self.mlp = VisionMLP(config.size, config.intermediate_size, _gelu, rngs=rngs, **options)
        self.mlp_gate = gate()

    def __call__(self, x: jax.Array, visibility: Visibility) -> jax.Array:
        """[N, T * W, E] -> [N, T * W, E]."""
        x = x + _through(self.attention_gate, self.attention(self.norm1(x), visibility))
        return x + _through(self.mlp_gate, self.mlp(self.norm2(x)))


class VisionModel(nnx.Module):
    """Raw patches -> states that the decoder's cross-attention sees."""

    def __init__(self, config: VisionConfig, hidden: int, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        options: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype}
        self.patch_embed = PatchEmbedding(config.pixels, config.size, bias=False, **options)
        self.class_embedding = param(_normal(rngs, (config.size,), param_dtype), ("vision",))
        self.position = PositionEmbedding(config, **options)
        self.tile_before = TileEmbedding(config, **options)
        self.tile_after = TileEmbedding(config, **options)
        self.norm_before = LayerNorm(config.size, EPS, param_dtype=param_dtype)
        self.norm_after = LayerNorm(config.size, EPS, param_dtype=param_dtype)
        self.layers = VisionLayer(config, gates=False, **options)
        self.global_layers = VisionLayer(config, gates=True, **options)
        self.projector = Linear(("mlp", "embed"), (config.output_size, hidden), bias=True, **options)
        self.config = config

    def __call__(self, batch: PackedBatch, execution: Execution) -> jax.Array:
        """[N, T * U, H] states of all images, padding tiles included."""
        x, ratio, visibility = self._prepare(batch, execution)
        shift = self.config.intermediate_states == "after"
        kept = [layer + shift for layer in self.config.intermediate_layers]
        x, states = keep_layers(self.layers, x, visibility, keep=kept, execution=execution)
        x = run_layers(self.global_layers, self._between(x, ratio, execution), visibility, execution=execution)
        # The K states of a channel stand beside each other: channel e of state k is number e * K + k.
        states = jnp.moveaxis(states, 0, -1).reshape(*x.shape[:2], -1)
        return self.projector(self._unfilled(jnp.concatenate([x, states], axis=-1)))

    def hidden_states(self, batch: PackedBatch, execution: Execution) -> tuple[jax.Array, jax.Array]:
        """[L + 1, N, T * W, E] of each stack: its input and the output of each layer."""
        x, ratio, visibility = self._prepare(batch, execution)
        first = collect_layers(self.layers, x, visibility, execution=execution)
        x = self._between(first[-1], ratio, execution)
        return first, collect_layers(self.global_layers, x, visibility, execution=execution)

    def real_tiles(self, batch: PackedBatch) -> jax.Array:
        """bool[N, T]."""
        segment = jnp.asarray(batch.patch_segment)
        return segment.reshape(-1, self.config.max_num_tiles, self.config.tile_patches)[:, :, 0] > 0

    def _prepare(self, batch: PackedBatch, execution: Execution) -> tuple[jax.Array, jax.Array, Visibility]:
        config, real = self.config, self.real_tiles(batch)
        images, tiles = real.shape
        ratio = self._ratio(batch, real)
        x = self.patch_embed(jnp.asarray(batch.patches), execution.compute_dtype)
        x = x.reshape(images, tiles, config.tile_patches, config.size)
        x = jnp.where(real[:, :, None, None], x, 0)  # a padding tile is zero after normalisation, not before
        x = self.tile_before(x, ratio, execution)
        first = jnp.broadcast_to(self.class_embedding[...].astype(x.dtype), (images, tiles, 1, config.size))
        x = self.norm_before(self.position(jnp.concatenate([first, x], axis=2), ratio, execution))
        x = jnp.pad(x, [(0, 0), (0, 0), (0, config.filled_tokens - config.tile_tokens), (0, 0)])
        token = real[:, :, None] & (np.arange(config.filled_tokens) < config.tile_tokens)[None, None, :]
        return x.reshape(images, -1, config.size), ratio, _visibility(token.reshape(images, -1), execution)

    def _ratio(self, batch: PackedBatch, real: jax.Array) -> jax.Array:
        """int32[N], the number of each image's arrangement, from 1; 0 where there is no image."""
        tiles, side = self.config.max_num_tiles, self.config.image_size // self.config.pixels.patch_size
        table = np.zeros((tiles, tiles), np.int32)
        for number, (high, wide) in enumerate(self.config.aspect_ratios, start=1):
            table[high - 1, wide - 1] = number
        last = jnp.asarray(batch.patch_position).reshape(real.shape[0], -1, 2).max(axis=1) // side
        return jnp.where(real.any(axis=1), jnp.asarray(table)[last[:, 0], last[:, 1]], 0)

    def _between(self, x: jax.Array, ratio: jax.Array, execution: Execution) -> jax.Array:
        """[N, T * W, E] -> [N, T * W, E]; the filling gets the embedding of its tile too."""
        tiles = self.norm_after(x).reshape(len(x), self.config.max_num_tiles, self.config.filled_tokens, -1)
        return self.tile_after(tiles, ratio, execution).reshape(x.shape)

    def _unfilled(self, x: jax.Array) -> jax.Array:
        """[N, T * W, ...] -> [N, T * U, ...]."""
        tiles = x.reshape(len(x), self.config.max_num_tiles, self.config.filled_tokens, -1)
        return tiles[:, :, : self.config.tile_tokens].reshape(len(x), -1, x.shape[-1])


def _visibility(real: jax.Array, execution: Execution) -> Visibility:
    """A pair is hidden where both are padding: real tokens see everything, padding sees what is real."""
    one = jnp.ones_like(real, jnp.int32)
    other = jnp.where(real, 2, 1).astype(jnp.int32)
    queries, keys = Queries(one, other, one), Keys(3 - other, one)
    return make_cross_visibility(queries, keys, setup=execution.setup)


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _rows(table: jax.Array, number: jax.Array, dtype: jnp.dtype, execution: Execution) -> jax.Array:
    """Rows of a table that is split along them; it is gathered first, as weights are, or the rows would be."""
    return jnp.take(pin(table.astype(dtype), execution), number, axis=0)


def _through(gate: Any, x: jax.Array) -> jax.Array:
    return x if gate is None else gated(gate[...], x)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(0.02, dtype)
