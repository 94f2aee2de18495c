"""AdamW with clipping, and learning-rate schedules; the numbers of torch.optim.AdamW and of transformers' cosine."""

import math
from typing import Any

import jax
import optax
from jax.sharding import Sharding

from multitap_jax.config import ConfigError, OptimizerConfig


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate by step (from 0).

    "constant" keeps `learning_rate` after the warm-up; "cosine" falls to 0 at `total_steps`. The warm-up rises linearly
    from 0 over ceil(warmup_ratio * total_steps) steps, so the first step of a warm-up has rate 0, as in transformers.

    Raises:
      ConfigError: an unknown schedule or a ratio outside of [0, 1).
    """
    if not 0 <= config.warmup_ratio < 1:
        raise ConfigError(f"config.optimizer.warmup_ratio = {config.warmup_ratio}: expected a number in [0, 1)")
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if config.schedule == "constant":
        after = optax.constant_schedule(config.learning_rate)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, max(total_steps - warmup, 1))
    else:
        raise ConfigError(f"config.optimizer.schedule = {config.schedule!r}: expected 'constant' or 'cosine'")
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warmup), after], [warmup])


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Clip by global norm (0 disables), then AdamW: decoupled decay on every parameter, biases and norms included.

    Moments have the type of the parameters, which are float32 master weights.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity()
    adamw = optax.adamw(
        make_schedule(config, total_steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    return optax.chain(clip, adamw)


def state_shardings(
    optimizer: optax.GradientTransformation, params: Any, shardings: Any, otherwise: Sharding
) -> tuple[Any, Any]:
    """Abstract optimizer state of `params`, and its placement: each moment lies where its parameter lies.

    Without this a compiled `init` would leave the moments whole on every device.

    Args:
      optimizer: what will be applied.
      params: parameters or their shapes.
      shardings: their placement, the same pytree.
      otherwise: placement of counters.
    """
    abstract = jax.eval_shape(optimizer.init, params)
    placed = optax.tree_map_params(
        optimizer, lambda _, sharding: sharding, abstract, shardings, transform_non_params=lambda _: otherwise
    )
    return abstract, placed
