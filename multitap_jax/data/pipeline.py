"""The training pipeline: records -> plan -> packed batches of one fixed shape, read ahead by grain.

Everything that decides a batch is known before the first step (token lengths from the tokenizer, image sizes from
the file headers), so one shape that holds every step is found once and the training step compiles once. Pixels are
decoded on demand by the loader's threads.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

from multitap_jax.batch import PackedBatch
from multitap_jax.data.decode import ImageError
from multitap_jax.data.images import ImagePatches, ImageReader
from multitap_jax.data.layouts import Grid, Vision
from multitap_jax.data.packing import Example, Shape, group_examples, pack
from multitap_jax.data.placement import Cell, Need, need, place
from multitap_jax.data.plan import plan_epoch
from multitap_jax.data.prompts import Prompter, PromptError
from multitap_jax.data.records import Record, Rejected
from multitap_jax.data.shapes import (
    ROW_LENGTHS,
    choose_row_length,
    images_per_row,
    round_up,
    texts_per_row,
    vision_length,
)


class Prepared(NamedTuple):
    """Encoded pairs with what was left out: parallel lists `examples`, `ids`; files and grids of the image keys."""

    examples: list[Example]
    ids: list[str]
    files: dict[Hashable, Path]
    grids: dict[Hashable, Grid]
    rejected: list[Rejected]


def target_of(record: Record, target: str, target_range: tuple[float, float]) -> float | None:
    """The number to learn, mapped so that `target_range` becomes [0, 1]; None where the record has none.

    Raises:
      ValueError: for a target that is neither "score" nor "ratings.NAME", or outside of the range.
    """
    if target == "score":
        value = record.score
    elif target.startswith("ratings."):
        value = record.ratings.get(target.removeprefix("ratings."))
    else:
        raise ValueError(f"target {target!r}: expected score or ratings.NAME")
    if value is None:
        return None
    low, high = target_range
    if not low <= value <= high:
        raise ValueError(f"{target} = {value} lies outside of target_range {low} to {high}")
    return (value - low) / (high - low)


def prepare(
    records: Sequence[Record],
    prompter: Prompter,
    reader: ImageReader,
    vision: Vision,
    *,
    target: str = "score",
    target_range: tuple[float, float] = (0.0, 1.0),
    max_length: int = 2048,
) -> Prepared:
    """Encodes records for training; a record without a usable target, text or image header goes to `rejected`.

    Images are identified by a hash of the file's bytes, so copies of one picture are one image.
    """
    encoded = prompter.encode([r.text for r in records], [r.request for r in records], [len(r.images) for r in records])
    out = Prepared([], [], {}, {}, [])
    known: dict[Path, Hashable] = {}
    for record, item in zip(records, encoded, strict=True):
        try:
            if isinstance(item, PromptError):
                raise item
            value = target_of(record, target, target_range)
            if value is None:
                raise ValueError(f"the record has no {target}")
            for path in record.images:
                if path not in known:
                    key = hashlib.sha256(path.read_bytes()).hexdigest()
                    out.grids[key] = reader.grid_of(path)
                    known[path] = key
                    out.files[key] = path
            keys = tuple(known[path] for path in record.images)
            cells = sum(vision.layout.num_tokens(out.grids[key]) - 1 for key in keys)
            length = len(item.prefix) + cells + len(item.text)
            if length > max_length:
                raise ValueError(f"the pair has {length} tokens, more than max_length = {max_length}")
        except (PromptError, ImageError, ValueError, OSError) as error:
            out.rejected.append(Rejected(record.line, record.id, str(error)))
            continue
        out.examples.append(Example(item.prefix, item.text, keys, value))
        out.ids.append(record.id)
    return out


class PackedDataset:
    """Packed batches of all steps of a run, every one of the same shape.

    Args:
      prepared: encoded pairs.
      reader: decodes images.
      vision: vision facts of the backbone.
      hidden: hidden size, for the choice of the row length.
      batch_size: pairs a step.
      epochs: passes over the pairs.
      seed: of the order.
      shuffle: see `plan_epoch`.
      row_length: tokens a row; 0 chooses.
      cells: data shards x micro-batches; each gets an equal contiguous share of rows and of vision rows.
      on_failure: told of each image that could not be decoded; its pairs get weight 0.

    Attributes:
      num_steps: steps of all epochs.
      shape: the shape of every batch.
      fingerprint: hash of everything that decides which pair stands in which step.
    """

    def __init__(
        self,
        prepared: Prepared,
        reader: ImageReader,
        vision: Vision,
        *,
        hidden: int,
        batch_size: int,
        epochs: int = 1,
        seed: int = 0,
        shuffle: str = "groups",
        row_length: int = 0,
        cells: int = 1,
        on_failure: Callable[[str, str], None] | None = None,
    ):
        if not prepared.examples:
            raise ValueError("no usable pairs: every record was rejected or the file is empty")
        self._data, self._reader, self._vision, self._cells = prepared, reader, vision, cells
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._told: set[Hashable] = set()
        numbers: dict[tuple, int] = {}
        groups = [numbers.setdefault((e.images, e.prefix.tobytes()), len(numbers)) for e in prepared.examples]
        self._plan = [
            step
            for epoch in range(epochs)
            for step in plan_epoch(groups, seed=seed, epoch=epoch, batch_size=batch_size, shuffle=shuffle)
        ]
        self.num_steps = len(self._plan)
        self.pairs_per_step = batch_size
        self._patches = {key: vision.layout.num_patches(grid) for key, grid in prepared.grids.items()}
        self._vision_length = vision_length(self._patches, vision.layout.block[0])
        self._max_images = images_per_row([e.images for e in prepared.examples], vision)
        self._row_length = self._choose_row_length(hidden, row_length)
        needs = [self._place(step)[2] for step in self._plan]
        self.shape = Shape(
            rows=round_up(max(n.rows for n in needs)) * cells,
            tokens=self._row_length,
            texts=texts_per_row(self._row_length),
            vision_rows=round_up(max(n.vision_rows for n in needs)) * cells,
            patches=self._vision_length,
            images=self._max_images or 0,
        )
        self.fingerprint = self._hash(batch_size, epochs, seed, shuffle)

    def _choose_row_length(self, hidden: int, wanted: int) -> int:
        sizes = [
            len(e.prefix) + len(e.text) + sum(self._vision.layout.num_tokens(self._data.grids[k]) - 1 for k in e.images)
            for e in self._data.examples
        ]
        longest = max(sizes)
        if wanted:
            if wanted < longest:
                name = self._data.ids[sizes.index(longest)]
                raise ValueError(
                    f"config.data.row_length = {wanted}, but record {name!r} alone has {longest} tokens; "
                    "raise it, or give 0 to have it chosen"
                )
            return wanted
        sample = self._plan[: max(1, len(self._plan) // 8)][:16]
        groups = [g for step in sample for g in group_examples(self._examples(step), self._data.grids, self._vision)[0]]
        chosen = choose_row_length(groups, hidden, limit=4096, max_images=self._max_images)
        return next(n for n in ROW_LENGTHS if n >= max(longest, chosen))

    def _hash(self, batch_size: int, epochs: int, seed: int, shuffle: str) -> str:
        settings = [batch_size, epochs, seed, shuffle, str(self._vision.layout.policy)]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for example, name in zip(self._data.examples, self._data.ids, strict=True):
            digest.update(name.encode() + example.prefix.tobytes() + example.text.tobytes())
            digest.update(json.dumps([list(example.images), example.target, example.weight]).encode())
        vision = self._vision
        facts = [vision.layout.features, *vision.layout.block, vision.placeholder, vision.position_mode]
        digest.update(json.dumps(facts).encode())
        return digest.hexdigest()

    def _examples(self, step: np.ndarray) -> list[Example]:
        return [self._data.examples[i] for i in step]

    def _place(self, step: np.ndarray) -> tuple[list, list[Cell], Need]:
        groups, prefixes = group_examples(self._examples(step), self._data.grids, self._vision)
        cells = place(
            groups,
            self._patches,
            row_length=self._row_length,
            max_texts=texts_per_row(self._row_length),
            vision_length=self._vision_length,
            max_images=self._max_images,
            cells=self._cells,
        )
        return [groups, prefixes], cells, need(cells)

    def _read(self, key: Hashable, broken: set[Hashable]) -> ImagePatches:
        path = self._data.files[key]
        grid = self._data.grids[key]
        try:
            image = self._reader(path)
            if image.grid != grid:
                raise ImageError(f"{path}: the picture changed while the run was going on")
            return image
        except (ImageError, OSError) as error:
            broken.add(key)
            with self._lock:
                if key not in self._told and self._on_failure is not None:
                    self._on_failure(str(path), str(error))
                self._told.add(key)
            return ImagePatches(np.zeros((self._patches[key], self._vision.layout.features), np.uint8), grid, str(key))

    def __getitem__(self, step: int) -> PackedBatch:
        """The batch of one step; NumPy arrays of `shape`."""
        examples = self._examples(self._plan[step])
        (groups, prefixes), cells, _ = self._place(self._plan[step])
        broken: set[Hashable] = set()
        images = {key: self._read(key, broken) for cell in cells for row in cell.vision for key in row}
        if broken:
            examples = [e._replace(weight=0.0) if broken.intersection(e.images) else e for e in examples]
        return pack(examples, images, groups, prefixes, cells, self.shape, self._vision)

    def record_ids(self, step: int) -> list[str]:
        """Ids of the records of a step, in the order that `PackedBatch.record` indexes."""
        return [self._data.ids[i] for i in self._plan[step]]

    def loader(self, start_step: int = 0, *, num_threads: int = 2, read_ahead: int = 4) -> Iterator[PackedBatch]:
        """Batches from `start_step` on, built ahead of their use by `num_threads` threads."""
        steps = grain.MapDataset.range(start_step, self.num_steps)
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=read_ahead)
        return iter(steps.map(lambda step: self[int(step)]).to_iter_dataset(options))

    @property
    def efficiency(self) -> float:
        """Share of the tokens of all batches that are no padding."""
        used = 0
        for step in self._plan:
            groups, _ = group_examples(self._examples(step), self._data.grids, self._vision)
            used += sum(g.prefix + sum(size for _, size in g.texts) for g in groups)
        return used / (self.num_steps * self.shape.rows * self.shape.tokens)
