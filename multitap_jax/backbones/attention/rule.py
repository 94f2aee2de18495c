"""The mask rule of `batch.py`, and what a forward pass prepares of it.

Query `q` sees key `k` of its row when

    segment[q] > 0  and  (segment[k] == segment[q] or segment[k] == prefix[q])  and  column[k] <= column[q]

In self-attention a token has the same segment and column as a query and as a key; where they differ (a token that sees
an image, padding that is seen but does not see itself) they are given apart. Every backend honours exactly this rule or
refuses. A query that sees nothing (padding) gets a finite value and a zero or finite gradient, never NaN. Scores and
softmax are float32 whatever the type of the inputs.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from multitap_jax.batch import Array

# Finite, so that a row without any visible key stays finite; far below every real score.
MASKED_SCORE = -1e30


class UnsupportedAttentionError(ValueError):
    """The attention backend does not exist, or cannot honour what it is asked for."""


class Queries(NamedTuple):
    """What the rule asks of queries: their run (0 sees nothing), the other run they see, their column; int32[B, Sq]."""

    segment: Array
    prefix: Array
    column: Array


class Keys(NamedTuple):
    """What the rule asks of keys: their run, and the column from which on queries see them; int32[B, Sk]."""

    segment: Array
    column: Array


@dataclasses.dataclass(frozen=True)
class Setup:
    """Where and in what attention is computed; static.

    Attributes:
      backend: a name of `choice.BACKENDS`, or "auto".
      dtype: type of queries, keys and values.
      mesh: devices that share the work, None for one device.
      along_context: rows are spread over the mesh axis `context`.
    """

    backend: str = "dense"
    dtype: str = "float32"
    mesh: Mesh | None = None
    along_context: bool = False

    @property
    def platform(self) -> str:
        """Of the devices that compute."""
        return jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform


DENSE = Setup()


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("queries", "keys", "prepared"),
    meta_fields=("backend", "setup", "spread_keys"),
)
@dataclasses.dataclass(frozen=True)
class Visibility:
    """Who sees whom, prepared once a forward pass and shared by all layers of a stack.

    Attributes:
      queries, keys: what the rule asks of them.
      prepared: what the backend makes of them once; every array has a leading B.
      backend: name of the backend that computes attention under it.
      setup: what it was chosen for.
      spread_keys: keys too are spread where rows are (`Setup.along_context`); else each device has all of them.
    """

    queries: Queries
    keys: Keys
    prepared: Any
    backend: str
    setup: Setup
    spread_keys: bool


def visible(queries: Queries, keys: Keys) -> jax.Array:
    """The mask rule: bool[B, Sq, Sk]."""
    segment = keys.segment[:, None, :]
    seen = (segment == queries.segment[:, :, None]) | (segment == queries.prefix[:, :, None])
    return seen & (queries.segment > 0)[:, :, None] & (keys.column[:, None, :] <= queries.column[:, :, None])
