"""Stage 2: many objectives from frozen embeddings, each by its own closed-form ridge regression.

store.py        EmbeddingWriter, EmbeddingStore: embeddings on disk, checksummed and resumable
accumulator.py  rows -> folds and buckets;  missing labels;  few rows kept whole
moments.py      Moments: the mergeable sums on the device;  Statistics: the same on the host
solve.py        every alpha, objective and fold from the statistics
refine.py       full precision by a pass over the rows
fitting.py      choose alpha, solve, refine, measure
head.py         RidgeHead, what users see;  plots.py draws it
"""

from multitap_jax.stage2.accumulator import DataError
from multitap_jax.stage2.head import RidgeHead
from multitap_jax.stage2.store import EmbeddingStore, EmbeddingWriter, StoreError

__all__ = ["DataError", "EmbeddingStore", "EmbeddingWriter", "RidgeHead", "StoreError"]
