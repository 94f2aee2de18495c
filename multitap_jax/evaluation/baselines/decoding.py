"""Greedy decoding with a cache of keys and values, on the packed layout: continuations of one row share what is in it.

The texts of a packed row each end where an answer begins. The row's keys and values are computed once, images and
prefix included, and are only read from then on; a step adds one token to every text of the row. What a token sees
follows from the one mask rule (`backbones/attention/`): a new token belongs to its text's run and has a column of its
own behind the row. Shapes are fixed, so that a batch shape and a number of tokens compile one program. Letters: see
`batch.py`; T tokens written at most, V vocabulary.

Keys and values that are no numbers would reach, through a masked weight (0 x NaN), what must not see them: they become
zeros, and the state of every text that does see them becomes NaN. So a failure stays with its text.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from multitap_jax.backbones import Backbone, Execution
from multitap_jax.backbones.attention import (
    Keys,
    Queries,
    Visibility,
    attention,
    attention_in_parts,
    make_cross_visibility,
)
from multitap_jax.backbones.language import LanguageHead
from multitap_jax.backbones.stack import run_groups
from multitap_jax.batch import PackedBatch


class Memory(NamedTuple):
    """Rotated keys, and values, of all layers: [L, B, tokens, G, D]."""

    keys: jax.Array
    values: jax.Array


class Written(NamedTuple):
    """What was written after each text.

    Attributes:
      tokens: int32[B, K, T], 0 from the stop token on.
      length: int32[B, K], tokens before the stop token.
      stopped: bool[B, K], whether a stop token came before the room was used up.
      finite: bool[B, K], whether all logits that decided were finite.
    """

    tokens: jax.Array
    length: jax.Array
    stopped: jax.Array
    finite: jax.Array


class _Places(NamedTuple):
    """Of each text: its run, the run it sees besides, and the position of its last token; int32[B, K]."""

    segment: jax.Array
    prefix: jax.Array
    position: jax.Array


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "stop", "execution"))
def greedy(
    backbone: Backbone,
    head: LanguageHead,
    batch: PackedBatch,
    *,
    max_new_tokens: int,
    stop: Sequence[int],
    execution: Execution,
) -> Written:
    """Continues every text of a batch with its most likely tokens, all of them together, until all have stopped.

    Args:
      backbone: whose image features stand in the row.
      head: of the same model.
      batch: texts that end where the continuation begins.
      max_new_tokens: T, at least 1.
      stop: tokens that end a continuation (a tuple).
      execution: see `Execution`; decoding itself is dense.
    """
    hidden, row = read_row(backbone, batch, execution)
    first, finite = pick(head, hidden)
    rows, texts = first.shape
    config, dtype = backbone.config.text, row.keys.dtype
    room = max(max_new_tokens - 1, 1) * texts  # the last token is written, not read
    shape = (config.num_layers, rows, room, config.num_kv_heads, config.head_dim)
    own = Memory(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    places = _places(batch)
    real = jnp.asarray(batch.record) >= 0
    tokens = jnp.zeros((rows, texts, max_new_tokens), jnp.int32)

    def ends(token: jax.Array) -> jax.Array:
        return functools.reduce(jnp.logical_or, [token == end for end in stop], jnp.zeros(token.shape, bool))

    def going(state: tuple[Any, ...]) -> jax.Array:
        step, *_, stopped = state
        return (step < max_new_tokens) & ~jnp.all(stopped)

    def advance(state: tuple[Any, ...]) -> tuple[Any, ...]:
        step, token, own, tokens, length, finite, stopped = state
        hidden, own = write_one(backbone, token, step - 1, places, batch, row, own, execution)
        token, good = pick(head, hidden)
        finite = finite & (good | stopped)
        stopped = stopped | ends(token)
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, jnp.where(stopped, 0, token), step, 2)
        return step + 1, token, own, tokens, length + (~stopped).astype(jnp.int32), finite, stopped

    stopped = ends(first) | ~real
    tokens = tokens.at[:, :, 0].set(jnp.where(stopped, 0, first))
    start = (jnp.ones((), jnp.int32), first, own, tokens, (~stopped).astype(jnp.int32), finite, stopped)
    *_, tokens, length, finite, stopped = jax.lax.while_loop(going, advance, start)
    return Written(tokens, length, stopped, finite)


def _settled(k: jax.Array, v: jax.Array) -> tuple[Memory, jax.Array]:
    """Keys and values [B, tokens, G, D] with zeros for tokens where they are not numbers; bool[B, tokens], where."""
    lost = ~(jnp.isfinite(k) & jnp.isfinite(v)).all(axis=(-2, -1))
    zero = lambda x: jnp.where(lost[..., None, None], jnp.zeros((), x.dtype), x)
    return Memory(zero(k), zero(v)), lost


def read_row(backbone: Backbone, batch: PackedBatch, execution: Execution) -> tuple[jax.Array, Memory]:
    """Final-norm states float32[B, K, H] at the pools, and the keys and values of every token [L, B, S, G, D].

    The state of a text that sees a token without numbers is NaN; the others are as if it had stood in another row.
    """
    x, more, each = backbone.inputs(batch, execution)
    shared = backbone.text.shared(batch, execution)

    def step(x: jax.Array, part: tuple[Any, ...]) -> tuple[jax.Array, tuple[Memory, jax.Array]]:
        layer, *own = part
        seen: list[tuple[Memory, jax.Array]] = []

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility) -> jax.Array:
            seen.append(_settled(k, v))
            return attention(q, *seen[0][0], visibility)

        return layer(x, *shared, *more, *own, attend=attend), seen.pop()

    x, (memory, lost) = run_groups(step, x, (backbone.text.layers, *each), execution=execution)
    runs = jnp.where(lost.any(axis=0), jnp.asarray(batch.segment), 0)[:, None]  # [B, 1, S], 0 for tokens that are whole
    places = _places(batch)
    spoilt = (runs > 0) & ((runs == places.segment[..., None]) | (runs == places.prefix[..., None]))
    return jnp.where(spoilt.any(axis=-1)[..., None], jnp.nan, backbone.text.pool(x, batch)), memory


def write_one(
    backbone: Backbone,
    token: jax.Array,
    step: jax.Array,
    places: _Places,
    batch: PackedBatch,
    row: Memory,
    own: Memory,
    execution: Execution,
) -> tuple[jax.Array, Memory]:
    """Reads one token more of each text.

    Args:
      backbone: of the model.
      token: int32[B, K].
      step: int32[], tokens that each text got before.
      places: of the texts.
      batch, row: the packed rows, and the memory of them.
      own: memory of the tokens written, [L, B, T * K, G, D]: all texts' first token, then all texts' second.
      execution: see `greedy`.

    Returns:
      float32[B, K, H], final-norm states of the tokens, NaN for those without numbers; the memory with them.
    """
    text, texts = backbone.text, token.shape[1]
    position = places.position + 1 + step
    angles = text.config.rope.angles(jnp.stack([position] * 3, axis=-1), text.config.head_dim)
    sees_row, sees_own = _sight(places, batch, step, own.keys.shape[2] // texts)

    def layer_step(x: jax.Array, part: tuple[Any, Memory, Memory]) -> tuple[jax.Array, tuple[Memory, jax.Array]]:
        layer, row, own = part
        grown: list[tuple[Memory, jax.Array]] = []

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility) -> jax.Array:
            put = lambda memory, new: jax.lax.dynamic_update_slice_in_dim(memory, new, step * texts, 1)
            new, lost = _settled(k, v)
            mine = Memory(*map(put, own, new))
            grown.append((mine, lost))
            return attention_in_parts(q, [(*row, sees_row), (*mine, visibility)])

        return layer(x, angles, sees_own, attend=attend), grown.pop()

    x = text.embed(token, execution.compute_dtype)
    x, (own, lost) = run_groups(layer_step, x, (text.layers, row, own), execution=execution)
    return jnp.where(lost.any(axis=0)[..., None], jnp.nan, text.norm(x.astype(jnp.float32))), own


def pick(head: LanguageHead, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
    """After states [B, K, H], the most likely next token, int32[B, K], the first of equals; whether it is a number."""
    logits = head(hidden)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.isfinite(jnp.max(logits, axis=-1))


class FirstTokens(NamedTuple):
    """How likely the first token of an answer is what: logarithms of probabilities over the whole vocabulary.

    Attributes:
      wanted: float32[B, K, W], of the tokens that were asked for.
      top, token: float32 and int32[B, K, top], of the most likely tokens, the likeliest first.
    """

    wanted: jax.Array
    top: jax.Array
    token: jax.Array


@functools.partial(jax.jit, static_argnames=("top", "execution"))
def first_tokens(
    backbone: Backbone, head: LanguageHead, batch: PackedBatch, wanted: jax.Array, *, top: int, execution: Execution
) -> FirstTokens:
    """What the answer to every text of a batch begins with, by one forward; `wanted` int32[W] are tokens.

    Logits are made where an answer begins and nowhere else, a row at a time: those of all would not fit.
    """

    def row(hidden: jax.Array) -> FirstTokens:
        logits = head(hidden)
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        best, token = jax.lax.top_k(logits, min(top, logits.shape[-1]))
        return FirstTokens(jnp.take(logits, wanted, axis=-1) - total, best - total, token)

    return jax.lax.map(row, backbone(batch, execution))


def _places(batch: PackedBatch) -> _Places:
    at = jnp.asarray(batch.pool)
    look_up = lambda values: jnp.take_along_axis(jnp.asarray(values), at, axis=1)
    # Where there is no text there is no run, and what is written there nobody sees.
    segment = jnp.where(jnp.asarray(batch.record) >= 0, look_up(batch.segment), 0)
    return _Places(segment, look_up(batch.prefix), look_up(batch.positions[:, :, 0]))


def _sight(places: _Places, batch: PackedBatch, step: jax.Array, room: int) -> tuple[Visibility, Visibility]:
    """What the tokens of this step see of the row, and of the tokens written: those of their own text up to them."""
    segment = jnp.asarray(batch.segment)
    rows, texts = places.segment.shape
    behind = jnp.broadcast_to(step, places.segment.shape)
    queries = Queries(places.segment, places.prefix, behind)
    order = jnp.broadcast_to(jnp.repeat(jnp.arange(room, dtype=jnp.int32), texts)[None], (rows, room * texts))
    in_row = Keys(segment, jnp.zeros_like(segment))
    written = Keys(jnp.tile(places.segment, (1, room)), order)
    return make_cross_visibility(queries, in_row), make_cross_visibility(queries, written)
