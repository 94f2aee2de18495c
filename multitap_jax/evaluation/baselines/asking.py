"""Puts many prompts to a model: packed by a thread while the device computes, answers back in their places."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from multitap_jax.batch import PackedBatch
from multitap_jax.data.shapes import round_up
from multitap_jax.data.stream import Pair, StreamPacker
from multitap_jax.scoring.progress import progress_bar
from multitap_jax.scoring.readahead import read_ahead
from multitap_jax.scoring.scorer import IN_FLIGHT, WINDOW


@dataclass
class Asked:
    """What is known of N prompts: why one has no answer, or None; its tokens, asked alone, 0 with an error."""

    errors: list[str | None]
    n_tokens: np.ndarray

    @property
    def lost(self) -> np.ndarray:
        """bool[N], prompts without an answer."""
        return np.asarray([error is not None for error in self.errors], bool)


class Asker:
    """Packs prompts and hands out answers; calls from several threads take turns.

    Args:
      packer: of prompts, which are pairs of images and a `text` in the words of `JudgePrompter`.
    """

    def __init__(self, packer: StreamPacker):
        self._packer, self._lock = packer, threading.Lock()

    def __call__(
        self,
        prompts: Sequence[Pair],
        compute: Callable[[PackedBatch], Any],
        collect: Callable[[np.ndarray, Any], np.ndarray],
        *,
        together: int = 1,
        show_progress: bool = False,
    ) -> Asked:
        """Asks all prompts.

        Args:
          prompts: see `packer`.
          compute: a batch on the device to arrays [B, K, ...].
          collect: is given int64[n], places in `prompts`, and arrays [n, ...]; says which are numbers, bool[n].
          together: so many consecutive prompts belong to one pair, and come in one window.
          show_progress: draw a bar on standard error.
        """
        asked = Asked([None] * len(prompts), np.zeros(len(prompts), np.int64))
        window = max(WINDOW // together, 1) * together

        def settle(index: np.ndarray, found: Any) -> int:
            held = index >= 0
            places = index[held]
            good = collect(places, jax.tree.map(lambda x: np.asarray(x)[held], found))
            for place in places[~good]:
                asked.errors[place] = "the model gave NaN or infinity for this prompt; try dtype float32"
                asked.n_tokens[place] = 0
            return len(places)

        with self._lock, progress_bar(len(prompts), enabled=show_progress, label="asking", unit="prompts") as advance:
            pending: deque[tuple[np.ndarray, Any]] = deque()
            for batch, index in read_ahead(self._batches(prompts, window, asked)):
                pending.append((index, compute(jax.device_put(batch))))
                if len(pending) > IN_FLIGHT:
                    advance(settle(*pending.popleft()))
            while pending:
                advance(settle(*pending.popleft()))
        return asked

    def _batches(self, prompts: Sequence[Pair], window: int, asked: Asked) -> Iterator[tuple[PackedBatch, np.ndarray]]:
        """Packed batches, no wider than their fullest row, with each text's place in `prompts`, -1 for none."""
        for start in range(0, len(prompts), window):
            found = self._packer.window(prompts[start : start + window], truncate=None)
            asked.errors[start : start + window] = found.errors
            asked.n_tokens[start : start + window] = found.n_tokens
            for batch in found.batches:
                # Rows have room for many texts; here each place has logits of the whole vocabulary to pay.
                used = round_up(int((batch.record >= 0).sum(axis=1).max()))
                texts = {name: getattr(batch, name)[:, :used] for name in ("pool", "record", "target", "weight")}
                batch = batch._replace(**texts)
                yield batch, np.where(batch.record >= 0, batch.record + start, -1)
