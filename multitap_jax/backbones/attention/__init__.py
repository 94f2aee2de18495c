"""Attention behind one entry: one mask rule (`rule.py`), a file for each backend, and who chooses (`choice.py`).

docs/performance.md says which backend is taken when, and what each costs.
"""

from multitap_jax.backbones.attention.choice import AUTO, BACKENDS, backend_elsewhere, check_backend
from multitap_jax.backbones.attention.dense import attention_in_parts
from multitap_jax.backbones.attention.entry import attention, make_cross_visibility, make_visibility, only_at
from multitap_jax.backbones.attention.rule import (
    DENSE,
    Keys,
    Queries,
    Setup,
    UnsupportedAttentionError,
    Visibility,
    visible,
)

__all__ = [
    "AUTO",
    "BACKENDS",
    "DENSE",
    "Keys",
    "Queries",
    "Setup",
    "UnsupportedAttentionError",
    "Visibility",
    "attention",
    "attention_in_parts",
    "backend_elsewhere",
    "check_backend",
    "make_cross_visibility",
    "make_visibility",
    "only_at",
    "visible",
]
