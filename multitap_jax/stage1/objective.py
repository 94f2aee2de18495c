"""The objective of stage 1, as sums: the step divides once by the weights of all micro-batches of all devices."""

import jax
import jax.numpy as jnp

from multitap_jax.batch import Array


def squared_error(logits: jax.Array, target: Array, weight: Array) -> tuple[jax.Array, jax.Array]:
    """Weighted squared error of sigmoid(logits) against human scores, the official loss before its mean.

    Args:
      logits: float32[B, K].
      target: float32[B, K], in [0, 1].
      weight: float32[B, K]; a pair of weight 0 adds nothing, whatever its logit.

    Returns:
      float32[] sum of weight * (sigmoid(logit) - target)^2, and float32[] sum of weights.
    """
    # Selected before the sigmoid: 0 * NaN would be NaN, in the value and in the gradient.
    counted = weight > 0
    scores = jax.nn.sigmoid(jnp.where(counted, logits.astype(jnp.float32), 0.0))
    error = jnp.where(counted, scores - target.astype(jnp.float32), 0.0)
    return jnp.sum(weight * jnp.square(error)), jnp.sum(weight)
