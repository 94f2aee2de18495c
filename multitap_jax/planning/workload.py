"""The batches of a run without its data: pairs of assumed sizes go the way of real ones, so the shapes are real.

A step's pairs are cut, grouped and placed by the code that does it in a run (`data/pipeline.py`, `data/stream.py`);
only tokens and pixels are zeros.
"""

import copy
import dataclasses
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from multitap_jax.batch import PackedBatch
from multitap_jax.config import ConfigError, TrainConfig
from multitap_jax.data.images import ImagePatches
from multitap_jax.data.layouts import ImagePolicy, Vision
from multitap_jax.data.packing import Example
from multitap_jax.data.pipeline import PackedDataset
from multitap_jax.data.prepare import Prepared
from multitap_jax.data.prompts import Encoded
from multitap_jax.data.stream import Pair, StreamPacker
from multitap_jax.families import Family
from multitap_jax.flops import Work, count_work
from multitap_jax.parallel.mesh import batch_sharding, batch_shards


@dataclass(frozen=True)
class Assumptions:
    """What is assumed of data that is not at hand.

    Attributes:
      texts_per_image: texts that are judged of one picture. A run that shuffles pairs one by one has 1 in a step.
      text_tokens: of a judged text, with what closes it.
      prompt_tokens: of what stands before the text, without pictures; 26 in the official training prompt on Qwen2-VL.
      pictures: of a pair.
      height, width: of a picture in pixels, where the image policy keeps its size.
    """

    texts_per_image: int = 6
    text_tokens: int = 40
    prompt_tokens: int = 26
    pictures: int = 1
    height: int = 768
    width: int = 1024


class Workload(NamedTuple):
    """A batch of a step.

    Attributes:
      batch: its arrays as `jax.ShapeDtypeStruct`s, placed on the mesh.
      work: the useful work in it.
      pairs: pairs in it.
      text: its shape in words.
    """

    batch: PackedBatch
    work: Work
    pairs: int
    text: str

    @property
    def tokens_used(self) -> float:
        """Share of the row tokens that are no padding."""
        return self.work.tokens / self.work.padded_tokens


class _Blank:
    """Stands for prompter and reader: every picture is blank and of one size, every text of one length."""

    closing = np.zeros(0, np.int32)

    def __init__(self, vision: Vision, assumed: Assumptions):
        self.grid = vision.layout.grid(assumed.height, assumed.width)
        self._patches = np.zeros((vision.layout.num_patches(self.grid), vision.layout.features), np.uint8)
        prompt = max(assumed.prompt_tokens, 1 + assumed.pictures)
        self.prefix = np.asarray([0] * (prompt - assumed.pictures) + [vision.placeholder] * assumed.pictures, np.int32)
        self.text = np.zeros(assumed.text_tokens, np.int32)

    def __call__(self, source: Any) -> ImagePatches:
        return ImagePatches(self._patches, self.grid, str(source))

    def encode(self, texts: Sequence[str], requests: Any, num_images: Any) -> list[Encoded]:
        return [Encoded(self.prefix, self.text) for _ in texts]


def _pixelless(vision: Vision) -> Vision:
    """The same layout with patches of one value: a batch for hundreds of chips would be gigabytes of blank pixels."""
    layout = copy.copy(vision.layout)
    layout.__class__ = type("Pixelless", (type(layout),), {"features": 1})
    return dataclasses.replace(vision, layout=layout)


def vision_of(family: Family, numbers: Any, config: TrainConfig) -> Vision:
    """Vision facts as a run has them that starts from the family's own checkpoint."""
    policy = family.image_policy if config.data.image_policy == "auto" else config.data.image_policy
    mode = family.position_modes[0] if config.model.position_mode == "auto" else config.model.position_mode
    if mode not in family.position_modes:
        raise ConfigError(f"config.model.position_mode = {mode!r}: {numbers.model_type} has {family.position_modes[0]}")
    layout = family.layout(numbers, ImagePolicy.parse(policy))
    return Vision(layout, numbers.image_token_id, mode, numbers.text.rope.limit)


def training_workload(
    config: TrainConfig, family: Family, numbers: Any, mesh: Mesh | AbstractMesh, assumed: Assumptions
) -> Workload:
    """The batch of a training step, of `config.batch_size` pairs."""
    vision = vision_of(family, numbers, config)
    features, vision = vision.layout.features, _pixelless(vision)
    blank = _Blank(vision, assumed)
    each = 1 if config.data.shuffle == "pairs" else assumed.texts_per_image
    names = [_names(pair // each, assumed) for pair in range(config.batch_size)]
    keys: list[Hashable] = list(dict.fromkeys(key for pair in names for key in pair))
    dataset = PackedDataset(
        Prepared(
            examples=[Example(blank.prefix, blank.text, pair) for pair in names],
            ids=[str(pair) for pair in range(config.batch_size)],
            lines=list(range(1, config.batch_size + 1)),
            files={key: Path(str(key)) for key in keys},
            grids=dict.fromkeys(keys, blank.grid),
            rejected=[],
        ),
        blank,  # type: ignore[arg-type]
        vision,
        hidden=numbers.text.hidden_size,
        batch_size=config.batch_size,
        shuffle="none",
        row_length=config.data.row_length,
        cells=batch_shards(mesh) * config.accumulation,
    )
    return _workload(dataset[0], features, numbers, mesh, config.batch_size)


def scoring_workload(
    config: TrainConfig,
    family: Family,
    numbers: Any,
    mesh: Mesh | AbstractMesh,
    assumed: Assumptions,
    batch_tokens: int,
) -> Workload:
    """The batch of an embedding or scoring step, of about `batch_tokens` tokens."""
    vision = vision_of(family, numbers, config)
    features, vision = vision.layout.features, _pixelless(vision)
    blank = _Blank(vision, assumed)
    packer = StreamPacker(
        blank,  # type: ignore[arg-type]
        blank,  # type: ignore[arg-type]
        vision,
        hidden=numbers.text.hidden_size,
        batch_tokens=batch_tokens,
        max_length=config.data.max_length,
        cells=batch_shards(mesh),
        workers=1,
    )
    group = len(blank.prefix) + assumed.pictures * (vision.layout.num_tokens(blank.grid) - 1)
    group += assumed.texts_per_image * assumed.text_tokens
    group += assumed.pictures * vision.layout.num_patches(blank.grid) if vision.layout.apart else 0
    pairs = max(batch_tokens // group, 1) * assumed.texts_per_image
    window = packer.window([Pair(_names(pair // assumed.texts_per_image, assumed), "") for pair in range(pairs)])
    if window.errors[0] is not None:
        raise ConfigError(f"an assumed pair cannot be scored: {window.errors[0]}")
    return _workload(next(window.batches), features, numbers, mesh, pairs)


def _names(group: int, assumed: Assumptions) -> tuple[Hashable, ...]:
    return tuple(f"{group}/{picture}" for picture in range(assumed.pictures))


def _workload(batch: PackedBatch, features: int, numbers: Any, mesh: Mesh | AbstractMesh, pairs: int) -> Workload:
    work = count_work(batch, window=getattr(numbers, "window", None), block=numbers.block)
    placed = batch_sharding(mesh)
    shapes: Any = PackedBatch(*(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed) for x in batch))  # type: ignore[arg-type]
    pixels = (*batch.patches.shape[:2], features)
    shapes = shapes._replace(patches=jax.ShapeDtypeStruct(pixels, np.uint8, sharding=placed))
    (rows, tokens), (vision_rows, patches) = batch.tokens.shape, batch.patches.shape[:2]
    return Workload(
        shapes, work, pairs, f"{rows} rows of {tokens} tokens, {vision_rows} vision rows of {patches} patches"
    )
