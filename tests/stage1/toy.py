"""A toy reward model and dataset: the call signatures of the real ones, a fraction of their cost."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from multitap_jax.backbones import Execution
from multitap_jax.backbones.layers import Embedding, Linear
from multitap_jax.batch import PackedBatch
from multitap_jax.reward import RewardHead, RewardModel

HIDDEN, VOCAB, FEATURES = 16, 32, 12


@dataclasses.dataclass(frozen=True)
class ToyTextConfig:
    hidden_size: int = HIDDEN


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    text: ToyTextConfig = ToyTextConfig()
    block: tuple[int, int] = (4, 1)


class ToyStack(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        options = {"bias": True, "rngs": rngs, "param_dtype": jnp.float32, "stack": 2}
        self.up_proj = Linear(("embed", "mlp"), (HIDDEN, 2 * HIDDEN), **options)
        self.down_proj = Linear(("mlp", "embed"), (2 * HIDDEN, HIDDEN), **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down_proj(jnp.tanh(self.up_proj(x)))


class ToyVision(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.proj = Linear(("vision", "mlp"), (FEATURES * 4, HIDDEN), bias=True, rngs=rngs, param_dtype=jnp.float32)


class ToyText(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = Embedding(VOCAB, HIDDEN, rngs=rngs, param_dtype=jnp.float32)
        self.layers = ToyStack(rngs)


class ToyBackbone(nnx.Module):
    """Pooled state = tanh layers over the token at `pool` plus the mean image feature and tokens of its row."""

    def __init__(self, rngs: nnx.Rngs):
        self.text, self.vision, self.config = ToyText(rngs), ToyVision(rngs), ToyConfig()

    def __call__(self, batch: PackedBatch, execution: Execution) -> jax.Array:
        dtype = execution.compute_dtype
        x = self.text.embed(batch.tokens, dtype, execution.mesh)
        patches = batch.patches.astype(dtype) / jnp.asarray(255, dtype)
        rows, count, _ = patches.shape
        features = self.vision.proj(patches.reshape(rows * count // 4, 4 * FEATURES))
        image = jnp.take(features, jnp.maximum(batch.image_cell, 0), axis=0)
        x = jnp.where(batch.image_cell[:, :, None] >= 0, image, x)
        x, _ = jax.lax.scan(lambda x, layer: (layer(x), None), x, self.text.layers)
        x = x.astype(jnp.float32)
        pooled = jnp.take_along_axis(x, batch.pool[:, :, None], axis=1)
        return pooled + jnp.mean(x, axis=1, keepdims=True)


def toy_model(seed: int = 0) -> RewardModel:
    """Weights of size O(1 / sqrt(fan in)), so that every parameter matters."""
    model = RewardModel(ToyBackbone(nnx.Rngs(seed)), RewardHead(HIDDEN, rngs=nnx.Rngs(seed + 1)))
    rng = np.random.default_rng(seed)

    def fill(x: jax.Array) -> jax.Array:
        scale = x.shape[-2] ** -0.5 if x.ndim > 1 else 0.5
        return jnp.asarray(scale * rng.standard_normal(x.shape), jnp.float32)

    return jax.tree.map(fill, model)


def toy_batch(seed: int, rows: int = 8, tokens: int = 6, texts: int = 3, *, cells: int = 8) -> PackedBatch:
    """Random tokens and pictures; rows of a cell use only the vision rows of their cell. About a third has no pair."""
    rng = np.random.default_rng([7, seed])
    patches = 8
    here = rng.random((rows, texts)) < 0.7
    here[0, 0] = True
    row_cells = patches // 4
    cell_of = np.arange(rows) // (rows // cells)
    each = rows // cells * row_cells
    image = cell_of[:, None] * each + rng.integers(0, each, (rows, tokens))
    segment = np.tile(np.arange(1, tokens + 1, dtype=np.int32), (rows, 1))
    return PackedBatch(
        tokens=rng.integers(0, VOCAB, (rows, tokens)).astype(np.int32),
        positions=np.zeros((rows, tokens, 3), np.int32),
        segment=segment,
        prefix=segment,
        image_cell=np.where(rng.random((rows, tokens)) < 0.4, image, -1).astype(np.int32),
        pool=np.where(here, rng.integers(0, tokens, (rows, texts)), 0).astype(np.int32),
        record=np.where(here, np.cumsum(here).reshape(here.shape) - 1, -1).astype(np.int32),
        target=np.where(here, rng.random((rows, texts)), 0).astype(np.float32),
        weight=here.astype(np.float32),
        image_token=np.full((rows, 0), -1, np.int32),
        patches=rng.integers(0, 256, (rows, patches, FEATURES)).astype(np.uint8),
        patch_position=np.zeros((rows, patches, 2), np.int32),
        patch_segment=np.ones((rows, patches), np.int32),
    )


@dataclasses.dataclass
class ToyDataset:
    """The members of `PackedDataset` that the loop uses; `poison` is a step whose first target is NaN."""

    num_steps: int = 6
    fingerprint: str = "toy"
    rows: int = 8
    poison: int | None = None
    pairs_per_step: int = 24
    offset: int = 0

    def batch(self, step: int) -> PackedBatch:
        batch = toy_batch(step + self.offset, self.rows)
        if step == self.poison:
            batch.target[0, 0] = np.nan
        return batch

    def loader(self, start_step: int = 0) -> Iterator[PackedBatch]:
        return (self.batch(step) for step in range(start_step, self.num_steps))

    def record_ids(self, step: int) -> list[str]:
        count = int((self.batch(step).record >= 0).sum())
        return [f"step{step}-pair{i}" for i in range(count)]
