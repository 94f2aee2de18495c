"""The training pipeline: records -> plan -> packed batches of one fixed shape, read ahead by grain.

Everything that decides a batch is known before the first step (`prepare` has the token lengths, and has seen every
picture), so one shape that holds every step is found once and the training step compiles once. Pixels are decoded again
on demand by the loader's threads: all of them would not fit into memory.
"""

import functools
import hashlib
import json
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence

import grain
import numpy as np

from multitap_jax.batch import PackedBatch
from multitap_jax.data.decode import ImageError
from multitap_jax.data.groups import Links
from multitap_jax.data.images import ImagePatches, ImageReader, decoding_pool
from multitap_jax.data.layouts import Vision
from multitap_jax.data.packing import Example, Shape, group_examples, pack
from multitap_jax.data.placement import Cell, Need, need, place
from multitap_jax.data.plan import plan_epoch
from multitap_jax.data.prepare import Prepared
from multitap_jax.data.records import Rejected
from multitap_jax.data.shapes import (
    ROW_LENGTHS,
    choose_row_length,
    images_per_row,
    round_up,
    texts_per_row,
    vision_length,
)


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
      own: the cells whose pictures this process reads, ascending: `patches` of its batches has their vision rows alone
        (`pack`). All processes place all cells, from lengths. None: all cells.
      compare: records of a group will be compared: of the group they name, else of the same pictures and request. All
        of them stand in one step and one cell, and so do groups that share a prefix.
      on_failure: told once, by a thread of the loader, of the records of a picture that cannot be read any more; they
        have weight 0 in the batches built without it.

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
        own: Sequence[int] | None = None,
        compare: bool = False,
        on_failure: Callable[[list[Rejected]], None] | None = None,
    ):
        if not prepared.examples:
            raise ValueError("no usable pairs: every record was rejected or the file is empty")
        self._data, self._reader, self._vision, self._cells = prepared, reader, vision, cells
        self._own = range(cells) if own is None else own
        self._on_failure = on_failure
        self._lock, self._pool = threading.Lock(), decoding_pool()
        self._told: set[Hashable] = set()
        numbers: dict[tuple, int] = {}
        groups = [numbers.setdefault((e.images, e.prefix.tobytes()), len(numbers)) for e in prepared.examples]
        self._compared, self._bonds = compared_groups(groups, prepared.groups) if compare else ([], [])
        plan = functools.partial(plan_epoch, self._bonds or groups, seed=seed, batch_size=batch_size)
        self._plan = [step for epoch in range(epochs) for step in plan(epoch=epoch, shuffle=shuffle, whole=compare)]
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
        digest.update(json.dumps(self._compared).encode() if self._compared else b"")
        vision = self._vision
        facts = [vision.layout.features, *vision.layout.block, vision.placeholder, vision.position_mode]
        digest.update(json.dumps(facts).encode())
        return digest.hexdigest()

    def _examples(self, step: np.ndarray) -> list[Example]:
        return [self._data.examples[i] for i in step]

    def _place(self, step: np.ndarray) -> tuple[list, list[Cell], Need]:
        groups, prefixes = group_examples(self._examples(step), self._data.grids, self._vision)
        bonds = [self._bonds[step[group.texts[0][0]]] for group in groups] if self._bonds else None
        cells = place(
            groups,
            self._patches,
            row_length=self._row_length,
            max_texts=texts_per_row(self._row_length),
            vision_length=self._vision_length,
            max_images=self._max_images,
            cells=self._cells,
            bonds=bonds,
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
            self._tell(key, str(error))
            return self._blank(key, self._patches[key])

    def _blank(self, key: Hashable, patches: int) -> ImagePatches:
        pixels = np.zeros((patches, self._vision.layout.features), np.uint8)
        return ImagePatches(pixels, self._data.grids[key], str(key))

    def _tell(self, key: Hashable, reason: str) -> None:
        with self._lock:
            if key in self._told:
                return
            self._told.add(key)
        if self._on_failure is not None:
            rows = zip(self._data.examples, self._data.lines, self._data.ids, strict=True)
            self._on_failure([Rejected(line, name, reason) for example, line, name in rows if key in example.images])

    def __getitem__(self, step: int) -> PackedBatch:
        """The batch of one step; NumPy arrays of `shape`."""
        examples = self._examples(self._plan[step])
        (groups, prefixes), cells, _ = self._place(self._plan[step])
        broken: set[Hashable] = set()
        mine = {key for cell in self._own for row in cells[cell].vision for key in row}
        every = dict.fromkeys(key for cell in cells for row in cell.vision for key in row)
        decoding = {key: self._pool.submit(self._read, key, broken) for key in every if key in mine}
        images = {key: decoding[key].result() if key in decoding else self._blank(key, 0) for key in every}
        if broken:
            examples = [e._replace(weight=0.0) if broken.intersection(e.images) else e for e in examples]
        return pack(examples, images, groups, prefixes, cells, self.shape, self._vision, mine=self._own)

    def record_ids(self, step: int) -> list[str]:
        """Ids of the records of a step, in the order that `PackedBatch.record` indexes."""
        return [self._data.ids[i] for i in self._plan[step]]

    def groups(self, step: int) -> np.ndarray:
        """int32[pairs_per_step]: which records of a step are compared, by equal numbers; -1 beyond its records."""
        out = np.full(self.pairs_per_step, -1, np.int32)
        out[: len(self._plan[step])] = [self._compared[index] for index in self._plan[step]]
        return out

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


def compared_groups(prefixes: Sequence[int], named: Sequence[str | None]) -> tuple[list[int], list[int]]:
    """Of each pair, the number of the group it is compared in, and the number of its bond: what shares a step and cell.

    A bond joins groups that share a prefix, which is laid out once.

    Args:
      prefixes: number of each pair's prefix.
      named: the group that its record names, or None, for that of its prefix.
    """
    labels = [f"prefix:{p}" if name is None else f"group:{name}" for p, name in zip(prefixes, named, strict=True)]
    links = Links()
    for prefix, label in zip(prefixes, labels, strict=True):
        links.link([label, f"prefix:{prefix}"])
    numbers: dict[str, int] = {}
    count = lambda label: numbers.setdefault(label, len(numbers))
    return [count(label) for label in labels], [count(f"bond:{links.root(label)}") for label in labels]
