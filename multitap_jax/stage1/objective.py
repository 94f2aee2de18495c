"""The objectives of stage 1, as sums: the step divides once by the terms of all micro-batches of all devices."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from multitap_jax.batch import Array, PackedBatch
from multitap_jax.config import COMPARING, TrainConfig
from multitap_jax.parallel.mesh import BATCH_AXES

Sums = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a step adds up.

    Attributes:
      sums: (logits float32[shards, rows, K], micro-batch [shards, rows, ...], group) -> sum of terms, their number.
      compares: whether `group` is that of each record of the step, int32[N], and not None.
    """

    sums: Callable[[jax.Array, PackedBatch, Array | None], Sums]
    compares: bool = False


def squared_error(logits: jax.Array, target: Array, weight: Array) -> Sums:
    """Weighted squared error of sigmoid(logits) against human scores, the official loss before its mean.

    Args:
      logits: float32[B, K].
      target: float32[B, K], in [0, 1].
      weight: float32[B, K]; a pair of weight 0 adds nothing, whatever its logit.

    Returns:
      float32[] sum of weight * (sigmoid(logit) - target)^2, and float32[] sum of weights.
    """
    return jnp.sum(weight * jnp.square(_error(logits, target, weight))), jnp.sum(weight)


def huber(logits: jax.Array, target: Array, weight: Array, delta: float) -> Sums:
    """As `squared_error`, but half the square up to an error of `delta`, and linear from there on."""
    error = _error(logits, target, weight)
    return jnp.sum(weight * optax.huber_loss(error, delta=delta)), jnp.sum(weight)


def bradley_terry(logits: jax.Array, target: Array, weight: Array, record: Array, group: Array) -> Sums:
    """-log sigmoid(logit of the better - logit of the worse), over all two records of a group whose scores differ.

    Comparisons count alike, so a large group counts for more. Scores that are equal say nothing and are left out.

    Args:
      logits, target, weight: as of `squared_error`; a pair of weight 0 is compared with none.
      record: int32[B, K], index of the record within the step, -1 where there is none.
      group: int32[N], of each record of the step.

    Returns:
      float32[] sum over comparisons, and float32[] their number.
    """
    size = group.shape[0]
    place = jnp.where(record >= 0, record, size).reshape(-1)
    by_record = lambda x: jnp.zeros(size, jnp.float32).at[place].set(x.astype(jnp.float32).reshape(-1), mode="drop")
    counted = by_record(weight) > 0
    score, logit = by_record(target), by_record(jnp.where(jnp.asarray(weight) > 0, logits, 0.0))
    same = (group[:, None] == group[None, :]) & counted[:, None] & counted[None, :]
    better = same & (score[:, None] > score[None, :])
    margin = jnp.where(better, logit[:, None] - logit[None, :], 0.0)
    return jnp.sum(jnp.where(better, jax.nn.softplus(-margin), 0.0)), jnp.sum(better.astype(jnp.float32))


def _error(logits: jax.Array, target: Array, weight: Array) -> jax.Array:
    """sigmoid(logits) - target, and 0 where the weight is."""
    # Selected before the sigmoid: 0 * NaN would be NaN, in the value and in the gradient.
    counted = weight > 0
    scores = jax.nn.sigmoid(jnp.where(counted, logits.astype(jnp.float32), 0.0))
    return jnp.where(counted, scores - target.astype(jnp.float32), 0.0)


def _compared(logits: jax.Array, cell: PackedBatch, group: Array | None) -> Sums:
    """Shard by shard: the records of a group are all in one, so nothing has to travel."""
    assert group is not None
    compare = jax.vmap(bradley_terry, in_axes=(0, 0, 0, 0, None), spmd_axis_name=BATCH_AXES)
    total, count = compare(logits, cell.target, cell.weight, cell.record, jnp.asarray(group))
    return jnp.sum(total), jnp.sum(count)


def make_objective(config: TrainConfig) -> Objective:
    """The objective that a configuration asks for."""
    if config.objective == COMPARING:
        return Objective(_compared, compares=True)
    if config.objective == "huber":
        delta = config.huber_delta
        return Objective(lambda logits, cell, group: huber(logits, cell.target, cell.weight, delta))
    return Objective(lambda logits, cell, group: squared_error(logits, cell.target, cell.weight))
