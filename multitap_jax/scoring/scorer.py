"""`Scorer`: pairs in, scores out, whatever the batch, the order or the grouping (DESIGN 3.7).

    scorer = Scorer.from_pretrained("run/artefact")
    scores = scorer.score(images=["dog.jpg", "dog.jpg"], texts=["A dog runs.", "Two cats sleep."])
    scores.overall      # float32[2], 0 to 1
    scores.objectives   # float32[2, T], in the units of the ratings; columns are scores.names

Windows of pairs are decoded and packed by a thread while the device computes, also across the lists of a stream;
results find their pair by the index that each batch carries, so nothing depends on how pairs were put together.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from multitap_jax.backbones import Execution
from multitap_jax.backbones.layers import check_not_rounded
from multitap_jax.batch import PackedBatch
from multitap_jax.data.processing import Processing
from multitap_jax.data.seen import Seen
from multitap_jax.data.stream import Pair, StreamPacker
from multitap_jax.parallel import watchdog
from multitap_jax.parallel.mesh import batch_shards, param_shardings, replicated, shard_batch
from multitap_jax.reward import RewardModel
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.scoring.occupancy import Occupancy
from multitap_jax.scoring.pairs import Source, make_pairs
from multitap_jax.scoring.progress import progress_bar
from multitap_jax.scoring.quantize import WEIGHTS, quantize
from multitap_jax.scoring.readahead import read_ahead, with_results
from multitap_jax.scoring.results import Embeddings, Ranking, Results, Scores
from multitap_jax.stage1.step import forward as run_cells
from multitap_jax.stage1.step import join_cells, split_cells
from multitap_jax.stage2.head import RidgeHead
from multitap_jax.weights.sources import locate

IN_FLIGHT = 3  # batches on the device before the host waits for the first
WINDOW = 256  # pairs that are grouped by picture; the pictures of two or three windows are in memory at once
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Scorer:
    """A loaded model that scores pairs. Calls may come from several threads.

    Args:
      artefact: where the model came from.
      model: backbone and reward head.
      ridge: heads of the objectives, if any.
      dtype: "float32" (scores repeat to 1e-5 in any batch) or "bfloat16" (faster).
      weights: "full" (as `dtype` says) or "int8", rounded as `quantize.py` says, once they are loaded.
      batch_tokens: about how many tokens a batch holds; bounds device memory.
      max_length: longest pair in tokens, image tokens included.
      truncate: cut the tail of longer texts, where a call does not say otherwise.
      attention: attention backend, see docs/performance.md.
      mesh: devices to spread batches and parameters over (`parallel.mesh.make_mesh`); None is one device.
      workers: threads that decode pictures; None: one for each core, from 4 to 16.

    Attributes:
      artefact: the artefact.
      names: names of the objectives.
      settings: JSON of what decides a score besides the artefact.

    Raises:
      ConfigError: `max_length` is more than the model was made for.
    """

    def __init__(
        self,
        artefact: Artefact,
        model: RewardModel,
        ridge: RidgeHead | None = None,
        *,
        dtype: str = "float32",
        weights: str = "full",
        batch_tokens: int = 16384,
        max_length: int = 2048,
        truncate: bool = False,
        attention: str = "auto",
        mesh: jax.sharding.Mesh | None = None,
        workers: int | None = None,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r}: expected {' or '.join(DTYPES)}")
        model.backbone.config.text.check_length(max_length)
        if weights not in WEIGHTS:
            raise ValueError(f"weights {weights!r}: expected {' or '.join(WEIGHTS)}")
        check_not_rounded(model, "scored with as they are: a scorer rounds what it is given")
        model = quantize(model) if weights == "int8" else model
        self.artefact, self.truncate, self._dtype = artefact, truncate, dtype
        self.names = tuple(objective.name for objective in artefact.manifest.objectives)
        self.settings: dict[str, Any] = {"dtype": dtype, "max_length": max_length}
        if weights != "full":  # jobs begun before there was a choice have no entry
            self.settings["weights"] = weights
        processing = Processing.from_folder(artefact.folder, artefact.manifest.contract)
        hidden = artefact.hidden_size
        self._packer = StreamPacker(
            processing.prompter,
            processing.reader,
            processing.vision,
            hidden=hidden,
            batch_tokens=batch_tokens,
            max_length=max_length,
            cells=1 if mesh is None else batch_shards(mesh),
            workers=workers,
        )
        heads = (np.zeros((0, hidden)), np.zeros(0)) if ridge is None else (ridge.coef_, ridge.intercept_)
        shardings = None if mesh is None else (param_shardings(model, mesh), replicated(mesh), replicated(mesh))
        self._weights = jax.device_put((model, *(np.asarray(head, np.float32) for head in heads)), shardings)
        self._mesh = mesh
        self._execution = Execution(dtype=dtype, attention=attention, mesh=mesh)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None, **options: Any
    ) -> "Scorer":
        """Loads an artefact, each device only what it will hold; `options` are those of the class.

        Raises:
          ArtefactError, WeightError: not an artefact, edited, damaged or incomplete; there is no random head.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r}: expected {' or '.join(DTYPES)}")
        shardings = None if mesh is None else lambda backbone: param_shardings(backbone, mesh)
        loaded = Artefact.load(path, DTYPES[dtype], shardings=shardings)
        return cls(*loaded, dtype=dtype, mesh=mesh, **options)

    @property
    def fingerprint(self) -> str:
        """sha256 of the artefact: contract, weights, heads, tokenizer and processor."""
        return self.artefact.fingerprint

    @property
    def checkpoint(self) -> str:
        """Where the artefact is: its folder, or hub:OWNER/NAME@COMMIT."""
        return locate(self.artefact.folder).address

    @property
    def trained_on(self) -> dict[str, Any]:
        """The human score that the overall score stands for: `target`, and the `target_range` mapped to 0 and 1."""
        overall = self.artefact.manifest.overall
        return {"target": overall.target, "target_range": list(overall.target_range)}

    @property
    def seen(self) -> dict[str, Seen]:
        """The records that weights and heads have seen, as far as it was noted (`data/seen.py`)."""
        return self.artefact.seen()

    @property
    def conditions(self) -> dict[str, str]:
        """What a report of its scores has to say: prompt variant, position mode, image policy, pooling, alpha rule, and
        that no reference captions are seen."""
        manifest = self.artefact.manifest
        rule = manifest.ridge["criterion"] if manifest.ridge else "no ridge heads"
        return {**dataclasses.asdict(manifest.contract), "alpha_rule": str(rule), "references": "none seen"}

    @property
    def model(self) -> RewardModel:
        """Backbone and reward head as they lie on the devices."""
        return self._weights[0]

    @property
    def hidden_size(self) -> int:
        """H of the backbone."""
        return self.artefact.hidden_size

    @property
    def num_shapes(self) -> int:
        """Batch shapes used so far; each was compiled once."""
        return len(self._packer.book.shapes)

    def score(
        self,
        *,
        images: Sequence[Source | Sequence[Source]],
        texts: Sequence[str],
        requests: Sequence[str | None] | None = None,
        batch_size: int | None = None,
        show_progress: bool = False,
        truncate: bool | None = None,
    ) -> Scores:
        """Scores pair by pair: images[i] with texts[i].

        Args:
          images: N paths, PIL images or arrays (uint8, or floats in [0, 1]; height, width, channels), or lists of them
            where a text is about several.
          texts: N texts.
          requests: what each image was asked about, or None for the standard request.
          batch_size: pairs a batch at most; None lets `batch_tokens` decide. Scores do not depend on it.
          show_progress: draw a bar on standard error.
          truncate: cut the tail of texts that are too long instead of giving them an error; the end of the turn, whose
            last token is judged, stays.

        Raises:
          ValueError, TypeError: lists of different lengths, or of something else. What is wrong with a single pair
            stands in its place in `errors`.
        """
        pairs = make_pairs(images, texts, requests)
        return self._scores(self._run(pairs, False, batch_size, show_progress, truncate))

    def score_stream(
        self, lists: Iterable[Sequence[Pair]], *, truncate: bool | None = None, occupancy: Occupancy | None = None
    ) -> Iterator[Scores]:
        """Scores of each list of pairs, in order, of as many as there are: the next are made ready meanwhile.

        `lists` is asked from another thread, some batches ahead, and results come when later lists are there, or no
        more: to ask one thing at a time, use `score`. `occupancy` learns of each batch. For the rest, see `score`.
        """
        return (self._scores(found) for found in self._stream(lists, False, truncate, occupancy=occupancy))

    def _scores(self, found: Results) -> Scores:
        return Scores(
            overall=scipy.special.expit(found.logits),
            logits=found.logits,
            objectives=found.objectives,
            names=self.names,
            n_tokens=found.n_tokens,
            truncated=found.truncated,
            errors=found.errors,
        )

    def embed(
        self,
        *,
        images: Sequence[Source | Sequence[Source]],
        texts: Sequence[str],
        requests: Sequence[str | None] | None = None,
        batch_size: int | None = None,
        show_progress: bool = False,
        truncate: bool | None = None,
    ) -> Embeddings:
        """Hidden states at the judged token, `values` float32[N, H]: features of stage 2. Arguments: see `score`."""
        pairs = make_pairs(images, texts, requests)
        return _embeddings(self._run(pairs, True, batch_size, show_progress, truncate))

    def embed_stream(
        self, lists: Iterable[Sequence[Pair]], *, occupancy: Occupancy | None = None
    ) -> Iterator[Embeddings]:
        """As `score_stream`, with hidden states."""
        return (_embeddings(found) for found in self._stream(lists, True, None, occupancy=occupancy))

    def rank(self, *, text: str, images: Sequence[Source], request: str | None = None) -> Ranking:
        """Orders images by how well one text fits them."""
        scores = self.score(images=images, texts=[text] * len(images), requests=[request] * len(images))
        return Ranking(np.argsort(-scores.overall, kind="stable"), scores)

    def _run(
        self, pairs: list[Pair], embeddings: bool, batch_size: int | None, show_progress: bool, truncate: bool | None
    ) -> Results:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size = {batch_size}: at least 1 pair")
        with progress_bar(len(pairs), enabled=show_progress) as advance:
            (results,) = self._stream([pairs], embeddings, truncate, batch_size or WINDOW, advance)
        return results

    def _stream(
        self,
        lists: Iterable[Sequence[Pair]],
        embeddings: bool,
        truncate: bool | None,
        window: int = WINDOW,
        advance: Callable[[int], None] = lambda pairs: watchdog.beat("scoring"),
        occupancy: Occupancy | None = None,
    ) -> Iterator[Results]:
        """The results of each list, whole: a list's end goes through the queue behind its last batch."""
        pending: deque[tuple[Results, np.ndarray | None, Any]] = deque()

        def settle() -> Iterator[Results]:
            results, index, computed = pending.popleft()
            if index is not None:
                advance(results.collect(index, computed))
            else:
                results.refuse_non_finite(self._dtype)
                yield results

        for results, batch, index in read_ahead(self._batches(lists, embeddings, truncate, window)):
            pending.append((results, index, None if batch is None else self._compute(batch, embeddings, occupancy)))
            while len(pending) > IN_FLIGHT:
                yield from settle()
        while pending:
            yield from settle()

    def _batches(
        self, lists: Iterable[Sequence[Pair]], embeddings: bool, truncate: bool | None, window: int
    ) -> Iterator[tuple[Results, PackedBatch | None, np.ndarray | None]]:
        """Packed batches with the index int32[B, K] of the pair behind each of their texts, -1 for none; two Nones
        after the last batch of a list."""
        truncate = self.truncate if truncate is None else truncate

        def windows() -> Iterator[tuple[Results, int, bool, Sequence[Pair]]]:
            for pairs in lists:
                results = Results.empty(len(pairs), len(self.names), self.artefact.hidden_size if embeddings else 0)
                for start in range(0, max(len(pairs), 1), window):
                    yield results, start, start + window >= len(pairs), pairs[start : start + window]

        pack = lambda asked: self._packer.windows((pairs for *_, pairs in asked), truncate=truncate)
        for (results, start, last, _), found in with_results(windows(), pack):
            results.note(start, found)
            for batch in found.batches:
                yield results, batch, np.where(batch.record >= 0, batch.record + start, -1)
            if last:
                yield results, None, None

    def _compute(self, batch: PackedBatch, embeddings: bool, occupancy: Occupancy | None) -> Any:
        """Starts a batch; the arrays that come back are not yet computed."""
        placed = jax.device_put(batch) if self._mesh is None else shard_batch(batch, self._mesh)
        start = lambda: forward(*self._weights, placed, execution=self._execution, keep_embeddings=embeddings)
        return start() if occupancy is None else occupancy.watch(start, (batch.tokens.shape, batch.patches.shape))


def _embeddings(found: Results) -> Embeddings:
    return Embeddings(
        values=found.embeddings,
        logits=found.logits,
        n_tokens=found.n_tokens,
        truncated=found.truncated,
        errors=found.errors,
        pictures=found.pictures,
    )


@functools.partial(jax.jit, static_argnames=("execution", "keep_embeddings"))
def forward(
    model: RewardModel,
    coef: jax.Array,
    intercept: jax.Array,
    batch: PackedBatch,
    *,
    execution: Execution,
    keep_embeddings: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Logits float32[B, K], objectives float32[B, K, T], and hidden states float32[B, K, H] where they are wanted."""
    hidden = _embed(model, batch, execution)
    objectives = jnp.einsum("bkh,th->bkt", hidden, coef, precision="highest") + intercept[None, None, :]
    return model.head(hidden), objectives, hidden if keep_embeddings else None


def _embed(model: RewardModel, batch: PackedBatch, execution: Execution) -> jax.Array:
    """Hidden states float32[B, K, H]; on a mesh shard by shard, so that weights are gathered and not activations."""
    if execution.mesh is None:
        return model.embed(batch, execution)
    cells = split_cells(batch, batch_shards(execution.mesh), 1, model.backbone.config.block)
    hidden = run_cells(model.embed, jax.tree.map(lambda x: x[0], cells), execution)
    return join_cells(hidden[None])
