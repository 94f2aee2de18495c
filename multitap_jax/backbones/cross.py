"""A decoder with layers that attend to images kept apart from the row (Llama 3, arXiv 2407.21783, section 7).

An image is one token of a row; its states are computed once, whatever the number of texts and rows that see it. A token
sees the images of its own group that stand before it. A text without an image passes the cross-attention layers by,
also in a batch with images. Extra letters: N images, X states of an image, T tiles that they fall into.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from multitap_jax.backbones.attention import (
    Keys,
    Queries,
    Setup,
    Visibility,
    attention,
    make_cross_visibility,
    only_at,
)
from multitap_jax.backbones.decoder import Decoder, DecoderConfig, TextMLP, take_tokens
from multitap_jax.backbones.layers import Linear, RMSNorm, gated, param
from multitap_jax.backbones.stack import (
    Execution,
    collect_layers,
    ending,
    is_last,
    num_layers,
    run_groups,
    run_layer,
    run_layers,
    start,
)
from multitap_jax.batch import PackedBatch

ROW_MASKS = ("hf", "meta")


@dataclasses.dataclass(frozen=True)
class CrossConfig:
    """Where the decoder attends to images.

    Attributes:
      num_layers: decoder layers of both kinds.
      layers: numbers of the cross-attention layers [cross_attention_layers]; they recur with one period.
      row_mask: what a token that stands before the images of its group gets from a cross-attention layer: "hf", as in
        transformers, the mean over all tiles that attention gives it, but nothing from the MLP; "meta", as in Meta's
        code, nothing.
    """

    num_layers: int
    layers: tuple[int, ...]
    row_mask: str

    @property
    def period(self) -> int:
        """Layers of a group, of which one attends to images."""
        return self.num_layers // len(self.layers)

    @property
    def self_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that attend to text."""
        return tuple(sorted(set(range(self.num_layers)) - set(self.layers)))

    def inconsistencies(self) -> Iterator[str]:
        """What is wrong with the numbers."""
        count, layers = self.num_layers, self.layers
        if not layers or count % len(layers) or layers != tuple(range(layers[0], count, count // len(layers))):
            yield (
                f"text_config.cross_attention_layers = {list(layers)} of {count} layers: layers must repeat in equal "
                "groups with one cross-attention layer each, always at the same place (as 3, 8, 13, ... of 40)"
            )
        elif count == len(layers):
            yield f"text_config.cross_attention_layers = {list(layers)} leaves no layer of {count} that attends to text"


class Sight(NamedTuple):
    """What the tokens of a batch see of its images; prepared once a forward pass, shared by all cross layers.

    Attributes:
      states: [N, X, H], of each image.
      cell: int32[B, I], the image behind each image token, -1 where there is none.
      visibility: of the keys [B, I * X] of a row's images.
      attends: bool[B, S], tokens that get something from attention.
      sees: bool[B, S], tokens that see an image, and so get something from the MLP too.
    """

    states: jax.Array
    cell: jax.Array
    visibility: Visibility
    attends: jax.Array
    sees: jax.Array

    def only_at(self, at: jax.Array) -> "Sight":
        """What the tokens at columns int32[B, K] see."""
        seen = only_at(self.visibility, at)
        return self._replace(visibility=seen, attends=take_tokens(self.attends, at), sees=take_tokens(self.sees, at))


class CrossAttention(nnx.Module):
    """Attention of tokens to image states: heads of queries and keys are normalised, nothing turns."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype, stack: int):
        hidden, dim = config.hidden_size, config.head_dim
        heads, groups = config.num_heads * dim, config.num_kv_heads * dim
        options: dict[str, Any] = {"bias": False, "rngs": rngs, "param_dtype": param_dtype, "stack": stack}
        self.q_proj = Linear(("embed", "heads"), (hidden, heads), **options)
        self.k_proj = Linear(("embed", "kv_heads"), (hidden, groups), **options)
        self.v_proj = Linear(("embed", "kv_heads"), (hidden, groups), **options)
        self.o_proj = Linear(("heads", "embed"), (heads, hidden), **options)
        norm = lambda: RMSNorm(dim, config.rms_norm_eps, axis=None, param_dtype=param_dtype, stack=stack)
        self.q_norm, self.k_norm = norm(), norm()
        self.head_dim = dim

    def __call__(self, x: jax.Array, sight: Sight) -> jax.Array:
        """[B, S, H] -> [B, S, H]."""
        split = lambda y: y.reshape(*y.shape[:2], -1, self.head_dim)
        q = self.q_norm(split(self.q_proj(x)))
        k, v = self.k_norm(split(self.k_proj(sight.states))), split(self.v_proj(sight.states))
        out = attention(q, _of_rows(k, sight.cell), _of_rows(v, sight.cell), sight.visibility)
        return self.o_proj(out.reshape(*x.shape[:2], -1))


class CrossLayer(nnx.Module):
    """Pre-norm layer of cross-attention and MLP, each behind a gate."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype, stack: int):
        options: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype, "stack": stack}
        norm = lambda: RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype, stack=stack)
        gate = lambda: param(jnp.zeros((stack, 1), param_dtype), ("layers", None))
        self.attention_norm, self.attention_gate = norm(), gate()
        self.attention = CrossAttention(config, **options)
        self.mlp_norm, self.mlp_gate = norm(), gate()
        self.mlp = TextMLP(config, **options)

    def __call__(self, x: jax.Array, sight: Sight, *, at: jax.Array | None = None) -> jax.Array:
        """[B, S, H] -> [B, S, H], or [B, K, H] of tokens `at` alone, int32[B, K], of whom `sight` then is."""
        x = x if at is None else take_tokens(x, at)
        out = jnp.where(sight.attends[:, :, None], self.attention(self.attention_norm(x), sight), 0)
        x = x + gated(self.attention_gate[...], out)
        out = jnp.where(sight.sees[:, :, None], self.mlp(self.mlp_norm(x)), 0)
        return x + gated(self.mlp_gate[...], out)


class CrossDecoder(Decoder):
    """A decoder whose layers come in equal groups: some that attend to text, one that attends to images, some more."""

    def __init__(self, config: DecoderConfig, cross: CrossConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        own = dataclasses.replace(config, num_layers=len(cross.self_layers))
        super().__init__(own, rngs=rngs, param_dtype=param_dtype)
        self.cross_layers = CrossLayer(config, rngs=rngs, param_dtype=param_dtype, stack=len(cross.layers))
        self.cross = cross

    def run(self, x: jax.Array, sight: Sight | None, batch: PackedBatch, execution: Execution) -> jax.Array:
        """[B, S, H] input embeddings -> float32[B, K, H], final-norm states at `batch.pool`; without images if None."""
        execution, at = execution.along_rows(), jnp.asarray(batch.pool)
        angles, visibility = shared = self.shared(batch, execution)
        end = ending(at, shared, (angles, only_at(visibility, at)), execution)
        end_in_cross = None if sight is None else ending(at, (sight,), (sight.only_at(at),), execution)

        def group(state: tuple[jax.Array, jax.Array], part: Any) -> tuple[tuple[jax.Array, jax.Array], None]:
            (x, found), (last, layers) = state, part
            before, cross, after = self._split(layers)
            if sight is None or end_in_cross is None:
                after = layers[0]
            else:
                x = run_layers(before, x, *shared, execution=execution)
                if not num_layers(after):
                    return end_in_cross(last, x, found, cross), None
                x = run_layer(cross, x, sight, execution=execution)
            x = run_layers(cut(after, 0, -1), x, *shared, execution=execution)
            return end(last, x, found, jax.tree.map(lambda leaf: leaf[-1], after)), None

        groups = (is_last(len(self.cross.layers)), self._groups())
        return self.final(run_groups(group, start(x, at), groups, execution=execution)[0][1])

    def states(self, x: jax.Array, sight: Sight | None, batch: PackedBatch, execution: Execution) -> jax.Array:
        """[L + 1, B, S, H]: the embeddings and the output of each layer, its input where it is passed by."""
        execution = execution.along_rows()
        shared = self.shared(batch, execution)

        def group(x: jax.Array, layers: Any) -> tuple[jax.Array, jax.Array]:
            before, cross, after = self._split(layers)
            first = collect_layers(before, x, *shared, execution=execution)
            x = first[-1] if sight is None else cross(first[-1], sight)
            outputs = jnp.concatenate([first[1:], collect_layers(after, x, *shared, execution=execution)])
            return outputs[-1], outputs

        outputs = run_groups(group, x, self._groups(), execution=execution)[1]
        assert outputs is not None
        return jnp.concatenate([x[None], outputs.reshape(-1, *x.shape)])

    def _groups(self) -> tuple[Any, Any]:
        """Self-attention layers [groups, period - 1, ...] and cross-attention layers [groups, ...]."""
        shape = (len(self.cross.layers), self.cross.period - 1)
        return jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), self.layers), self.cross_layers

    def _split(self, group: tuple[Any, Any]) -> tuple[Any, Any, Any]:
        """The layers of one group before, at and after its cross-attention; only this group's weights are copied."""
        layers, cross = group
        place = self.cross.layers[0]
        return cut(layers, 0, place), cross, cut(layers, place, None)


def see(batch: PackedBatch, states: jax.Array, real: jax.Array, *, row_mask: str, setup: Setup) -> Sight:
    """Who sees which image, by the processor's rule for images that stand next to each other in their prompt.

    From an image token on, a token of the group sees the real tiles of that image. A token that precedes all images of
    its group has a row of the mask without a single key, where softmax spreads over everything: transformers lets it
    attend to all tiles of all images of the group, padding included.

    Args:
      batch: with `image_token` and `image_cell`.
      states: [N, X, H].
      real: bool[N, T], tiles that are no padding.
      row_mask: see `CrossConfig`.
      setup: of attention.
    """
    segment, prefix = jnp.asarray(batch.segment), jnp.asarray(batch.prefix)
    at = jnp.asarray(batch.image_token)
    look_up = lambda values: jnp.take_along_axis(jnp.asarray(values), jnp.maximum(at, 0), axis=1)
    cell = jnp.where(at >= 0, look_up(batch.image_cell), -1)
    run = jnp.where(at >= 0, look_up(segment), 0)
    length = segment.shape[1]
    column = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], segment.shape)
    own = (run[:, None, :] == prefix[:, :, None]) & (run > 0)[:, None, :]  # [B, S, I]
    sees = (own & (at[:, None, :] <= column[:, :, None])).any(axis=2)
    early = own.any(axis=2) & ~sees
    queries = Queries(segment, jnp.where(early, -prefix, prefix), jnp.where(early, length, column))
    tiles = jnp.take(real, jnp.maximum(cell, 0), axis=0)  # [B, I, T]
    tile_run = jnp.where(tiles, run[:, :, None], -run[:, :, None])
    spread = lambda values: jnp.repeat(values, states.shape[1] // real.shape[1], axis=2).reshape(len(at), -1)
    keys = Keys(spread(tile_run), spread(jnp.broadcast_to(at[:, :, None], tiles.shape)))
    attends = sees | early if row_mask == "hf" else sees
    return Sight(states, cell, make_cross_visibility(queries, keys, setup=setup), attends, sees)


def _of_rows(values: jax.Array, cell: jax.Array) -> jax.Array:
    """[N, X, G, D] of images -> [B, I * X, G, D] of the images of each row."""
    taken = jnp.take(values, jnp.maximum(cell, 0), axis=0, mode="fill")
    return taken.reshape(cell.shape[0], -1, *values.shape[2:])


def cut(layers: Any, first: int, end: int | None) -> Any:
    """Some of the layers of a stack."""
    return jax.tree.map(lambda leaf: leaf[first:end], layers)
