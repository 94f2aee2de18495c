"""Streams records through a frozen model: into an embedding store, or straight into whatever consumes batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from multitap_jax.data.records import Record, Rejected, file_fingerprint, iter_records, scan_objectives, write_rejected
from multitap_jax.data.stream import Pair
from multitap_jax.scoring.progress import progress_bar
from multitap_jax.scoring.scorer import Scorer
from multitap_jax.stage2.store import EmbeddingWriter

WINDOW = 1024


class Embedded(NamedTuple):
    """Embeddings float32[n, H] and ratings float32[n, T] (NaN where missing) of consecutive usable records."""

    ids: list[str]
    embeddings: np.ndarray
    labels: np.ndarray
    groups: list[str]
    rejected: list[Rejected]


@dataclass(frozen=True)
class EmbedSummary:
    """What an embed job did."""

    rows: int
    rejected: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.rows} embeddings in {self.folder}; {self.rejected} records rejected"
