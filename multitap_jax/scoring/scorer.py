"""`Scorer`: pairs in, scores out, whatever the batch, the order or the grouping (DESIGN 3.7).

    scorer = Scorer.from_pretrained("run/artefact")
    scores = scorer.score(images=["dog.jpg", "dog.jpg"], texts=["A dog runs.", "Two cats sleep."])
    scores.overall      # float32[2], 0 to 1
    scores.objectives   # float32[2, T], in the units of the ratings; columns are scores.names

Windows of pairs are decoded and packed by a thread while the device computes; results find their pair by the index
that each batch carries, so nothing depends on how pairs were put together.
"""

import functools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from multitap_jax.backbones import Execution
from multitap_jax.batch import Array, PackedBatch
from multitap_jax.data.processing import Processing
from multitap_jax.data.stream import Pair, StreamPacker, Window
from multitap_jax.reward import RewardModel
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.scoring.progress import progress_bar
from multitap_jax.stage2.head import RidgeHead

Source = str | Path | Image.Image | np.ndarray
WINDOW = 256  # pairs whose pictures are in memory at once
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True)
class Scores:
    """Scores of N pairs, in the order they were given.

    Attributes:
      overall: float32[N], sigmoid of the logit, 0 to 1, higher is better; NaN where `errors` says why.
      logits: float32[N], the reward head's output.
      objectives: float32[N, T], the ridge heads' outputs in the units of the ratings.
      names: names of the T objectives.
      n_tokens: int64[N], tokens of each pair scored alone, image tokens included; 0 where there is an error.
      truncated: bool[N], whether the tail of the text was cut.
      errors: None, or why the pair has no score.
    """

    overall: np.ndarray
    logits: np.ndarray
    objectives: np.ndarray
    names: tuple[str, ...]
    n_tokens: np.ndarray
    truncated: np.ndarray
    errors: list[str | None]

    def raise_errors(self) -> "Scores":
        """Itself, where every pair has a score. Raises ScoringError, naming the pairs, where one has none."""
        _raise(self.errors)
        return self


@dataclass(frozen=True)
class Embeddings:
    """Hidden states of N pairs, what stage 2 is fitted on; `errors`, `n_tokens`, `truncated` as in `Scores`.

    Attributes:
      values: float32[N, H], last token's final hidden state; NaN where there is an error.
      logits: float32[N], the reward head's output.
    """

    values: np.ndarray
    logits: np.ndarray
    n_tokens: np.ndarray
    truncated: np.ndarray
    errors: list[str | None]


@dataclass(frozen=True)
class Ranking:
    """Images ordered by how well a text fits them: `order` int64[N], best first, those without a score last."""

    order: np.ndarray
    scores: Scores


class ScoringError(ValueError):
    """Pairs that have no score; the message names them."""


class Scorer:
    """A loaded model that scores pairs. Calls from several threads take turns.

    Args:
      artefact: where the model came from.
      model: backbone and reward head.
      ridge: heads of the objectives, if any.
      dtype: "float32" (scores repeat to 1e-5 in any batch) or "bfloat16" (faster).
      batch_tokens: about how many tokens a batch holds; bounds device memory.
      max_length: longest pair in tokens, image tokens included.
      mesh: devices to spread batches and parameters over (`parallel.make_mesh`); None is one device.
      workers: threads that decode pictures.

    Attributes:
      artefact: the artefact.
      names: names of the objectives.
    """

    def __init__(
        self,
        artefact: Artefact,
        model: RewardModel,
        ridge: RidgeHead | None = None,
        *,
        dtype: str = "float32",
        batch_tokens: int = 16384,
        max_length: int = 2048,
        mesh: jax.sharding.Mesh | None = None,
        workers: int = 4,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r}: expected {' or '.join(DTYPES)}")
        self.artefact = artefact
        self.names = tuple(objective.name for objective in artefact.manifest.objectives)
        self.settings = {"dtype": dtype, "max_length": max_length}
        processing = Processing.from_folder(artefact.folder, artefact.manifest.contract)
        self._packer = StreamPacker(
            processing.prompter,
            processing.reader,
            processing.vision,
            hidden=artefact.hidden_size,
            batch_tokens=batch_tokens,
            max_length=max_length,
            cells=1 if mesh is None else data_shards(mesh),
            workers=workers,
        )
        hidden = artefact.hidden_size
        coef = np.zeros((0, hidden), np.float32) if ridge is None else np.asarray(ridge.coef_, np.float32)
        intercept = np.zeros((0,), np.float32) if ridge is None else np.asarray(ridge.intercept_, np.float32)
        self._device = Device(mesh)
        self._weights = (self._device.place(model), *jax.device_put((coef, intercept), self._device.replicated))
        execution = Execution(dtype=dtype)
        # Float32 means float32: accelerators would otherwise multiply in fewer bits.
        self._precision = "highest" if dtype == "float32" else None
        self._score = jax.jit(functools.partial(_score, execution))
        self._embed = jax.jit(functools.partial(_embed, execution))
        self._lock = threading.Lock()
