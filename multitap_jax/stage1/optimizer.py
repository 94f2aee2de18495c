"""AdamW with clipping, and learning-rate schedules; the numbers of torch.optim.AdamW and of transformers' cosine."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding

from multitap_jax.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate by step (from 0).

    "constant" keeps `learning_rate` after the warm-up; "cosine" falls to 0 at `total_steps`. The warm-up rises linearly
    from 0 over ceil(warmup_ratio * total_steps) steps, so the first step of a warm-up has rate 0, as in transformers.
    """
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if config.schedule == "constant":
        after = optax.constant_schedule(config.learning_rate)
    else:
        after = optax.cosine_decay_schedule(config.learning_rate, max(total_steps - warmup, 1))
    if warmup:
        after = optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warmup), after], [warmup])
    return _with_standard_promotion(after)


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Clip by global norm (0 disables), then AdamW: decoupled decay on every parameter, biases and norms included.

    The mean of the gradients has the type that `config.mean_dtype` says, that of their squares the type of the
    parameters, which are float32 master weights.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity()
    adamw = optax.adamw(
        make_schedule(config, total_steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mu_dtype=config.mean_dtype,
    )
    chain = optax.chain(clip, adamw)

    def update(gradient: Any, state: Any, params: Any) -> tuple[Any, Any]:
        # The mean is rounded where it is kept only; left in bfloat16, its decay of 0.9 would be 0.898.
        mean = jax.tree.map(lambda x: x.astype(jnp.float32), optax.tree_utils.tree_get(state, "mu"))
        return chain.update(gradient, optax.tree_utils.tree_set(state, mu=mean), params)

    return optax.GradientTransformation(chain.init, _with_standard_promotion(update))


def _with_standard_promotion(function: Callable) -> Callable:
    """Optax mixes Python numbers, integer counters and floats, which strict promotion (our tests') would refuse."""

    @functools.wraps(function)
    def relaxed(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return relaxed


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
