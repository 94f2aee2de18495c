"""Gives the demo's tiny backbone what published ones have: it has seen pictures with captions before stage 1.

Next-token prediction on right descriptions of the training scenes (never of held-out ones, never with a rating). A
backbone with random weights would have to discover from scores alone which word means which thing; that takes longer
than a demo may. The reward head and everything about ratings is left to stage 1.
"""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from multitap_jax.backbones import Backbone, Execution
from multitap_jax.backbones.layers import matmul_precision
from multitap_jax.batch import PackedBatch
from multitap_jax.config import OptimizerConfig
from multitap_jax.data.pipeline import PackedDataset
from multitap_jax.data.prepare import prepare
from multitap_jax.data.processing import Processing
from multitap_jax.data.records import Record, load_records
from multitap_jax.demo.scenes import draw_scene, scene_rng
from multitap_jax.demo.texts import caption
from multitap_jax.demo.world import scene_index
from multitap_jax.stage1.optimizer import make_optimizer
from multitap_jax.stage1.step import settled

BATCH = 16
CAPTION_STREAM = 3
OPTIMIZER = OptimizerConfig(
    learning_rate=3e-3, schedule="cosine", warmup_ratio=0.05, weight_decay=0.0, b2=0.98, clip_norm=1.0
)


def caption_loss(backbone: Backbone, batch: PackedBatch) -> tuple[jax.Array, jax.Array]:
    """Mean cross entropy of the next token over all text tokens, and the share of them that is predicted right."""
    execution = Execution()
    hidden = backbone.text.norm(backbone.hidden_states(batch, execution)[-1])
    table = backbone.text.embed.embedding[...]
    logits = jnp.einsum("bsh,vh->bsv", hidden, table, precision=matmul_precision(hidden.dtype))[:, :-1]
    tokens, segment, prefix = (jnp.asarray(x) for x in (batch.tokens, batch.segment, batch.prefix))
    counted = (segment[:, 1:] == segment[:, :-1]) & (segment[:, 1:] != prefix[:, 1:])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    right = (jnp.argmax(logits, axis=-1) == tokens[:, 1:]) & counted
    count = jnp.maximum(counted.sum(), 1).astype(jnp.float32)
    return jnp.sum(jnp.where(counted, losses, 0.0)) / count, right.sum().astype(jnp.float32) / count


def pretrain(backbone: Backbone, processing: Processing, train: Path, *, seed: int, steps: int) -> Backbone:
    """Teaches `backbone` to describe the pictures of the training scenes.

    Args:
      backbone: with random weights; left as it is.
      processing: prompt and pictures, as stage 1 will use them.
      train: the training records of the world; only their pictures are used.
      seed: seed of the world and of the order.
      steps: optimizer steps of 16 captions.

    Returns:
      The pre-trained backbone.
    """
    records = _captions(train, seed)
    prepared = prepare(records, processing.prompter, processing.reader, processing.vision)
    dataset = PackedDataset(
        prepared,
        processing.reader,
        processing.vision,
        hidden=backbone.config.text.hidden_size,
        batch_size=BATCH,
        epochs=-(-steps * BATCH // len(records)),
        seed=seed,
        shuffle="pairs",
    )
    optimizer = make_optimizer(OPTIMIZER, steps)
    graph, params = nnx.split(backbone)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, batch):
        objective = lambda params: caption_loss(nnx.merge(graph, params), batch)
        (loss, right), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, state = optimizer.update(settled(grads), state, params)
        return optax.apply_updates(params, updates), state, loss, right

    with _bar() as progress:
        task = progress.add_task("captions", total=steps, loss="", right="")
        for batch, number in zip(dataset.loader(), range(1, steps + 1), strict=False):
            params, state, loss, right = step(params, state, batch)
            if number % 20 == 0 or number == steps:
                progress.update(task, completed=number, loss=f"{float(loss):.3f}", right=f"{float(right):.0%}")
    Console(stderr=True).print(f"next token of a caption: {float(right):.0%} right after {steps} steps")
    return nnx.merge(graph, params)


def _captions(train: Path, seed: int) -> list[Record]:
    """A right description of each training scene, in two orders of mention."""
    return list(_each_caption(load_records(train).records, seed))


def _each_caption(records: list[Record], seed: int) -> Iterator[Record]:
    for image, record in {r.images: r for r in records}.items():
        index = scene_index(record)
        scene, rng = draw_scene(scene_rng(seed, index, 0)), scene_rng(seed, index, CAPTION_STREAM)
        for number in range(2):
            yield Record(f"{index}/{number}", image, caption(scene, rng), record.request, 0.0, {}, None, index)


def _bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  right {task.fields[right]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))
