"""multitap_jax: MULTI-TAP (arXiv 2510.00766) in JAX. Public names load on first use, so importing this is cheap.

Scorer         scores pairs with a saved model
RidgeHead      closed-form heads for any objectives on frozen embeddings
EmbeddingStore reads what `multitap embed` wrote
load_records   reads and checks a records file
kendall_tau, pearson, spearman, evaluate_pairs   agreement with human judgements
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multitap_jax.data.records import load_records
    from multitap_jax.evaluation.correlation import evaluate_pairs, kendall_tau, pearson, spearman
    from multitap_jax.scoring.scorer import Scorer
    from multitap_jax.stage2.head import RidgeHead
    from multitap_jax.stage2.store import EmbeddingStore

__version__ = "0.1.0"

_HOMES = {
    "Scorer": "multitap_jax.scoring.scorer",
    "RidgeHead": "multitap_jax.stage2.head",
    "EmbeddingStore": "multitap_jax.stage2.store",
    "load_records": "multitap_jax.data.records",
    "kendall_tau": "multitap_jax.evaluation.correlation",
    "pearson": "multitap_jax.evaluation.correlation",
    "spearman": "multitap_jax.evaluation.correlation",
    "evaluate_pairs": "multitap_jax.evaluation.correlation",
}

__all__ = [
    "EmbeddingStore",
    "RidgeHead",
    "Scorer",
    "__version__",
    "evaluate_pairs",
    "kendall_tau",
    "load_records",
    "pearson",
    "spearman",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
