"""Stage 2: many objectives from frozen embeddings, each by its own closed-form ridge regression.

store_format.py embeddings on disk, checksummed and resumable; store_writer.py EmbeddingWriter; store.py EmbeddingStore
rows.py         checked rows, their groups and folds
moments.py      Moments: mergeable sums on a device;  sharded.py: on a mesh, and over processes
statistics.py   the same sums on the host, in float64
accumulator.py  a stream of rows, kept while they are few;  buckets.py: sums of many
persist.py      saves, loads and merges them
spectrum.py     three factorisations;  threads.py: on how many threads;  systems.py: which objectives share one
solve.py        scores and the choice of alpha;  kfold.py, leave_out.py, heldout.py: rows not seen
certificate.py  what float32 may have cost;  refine.py: passes that take it out again
passes.py       errors at every alpha by another pass over the rows
final.py        the heads at the chosen alphas;  fitting.py: all of it in order
head.py         RidgeHead, what users see; fitted.py: what needs no rows; uncertainty.py, plots.py
head_params.py  its parameters;  head_files.py: it on disk;  head_tables.py: its tables and scores
"""

from multitap_jax.stage2.accumulator import Accumulator
from multitap_jax.stage2.head import RidgeHead
from multitap_jax.stage2.rows import DataError
from multitap_jax.stage2.store import EmbeddingStore
from multitap_jax.stage2.store_format import StoreError
from multitap_jax.stage2.store_writer import EmbeddingWriter

__all__ = ["Accumulator", "DataError", "EmbeddingStore", "EmbeddingWriter", "RidgeHead", "StoreError"]
