"""How a stack of equal layers is run: execution choices, the scan over layers, rematerialisation."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from multitap_jax.backbones.attention import check_backend

_POLICIES = {
    # Keep the products with weights (the dear part), recompute norms, activations and attention scores.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a forward pass is computed; none of it changes the mathematics.

    Attributes:
      dtype: computation type, "float32" or "bfloat16"; norms, softmax and rotary angles stay float32.
      remat: what the backward pass recomputes: "none", "dots" (all but weight products), "full" (all of a layer).
      attention: attention backend, a name of `attention.BACKENDS`, or "auto", the fastest for platform and length.
      layers: "scan" compiles one layer; "loop" unrolls them (for debugging; same values).
      mesh: where the parameters are sharded; activations are then held to the batch's sharding, so that weights are
        gathered and not activations. A mapped batch dimension gets its axes from `jax.vmap(spmd_axis_name=...)`.

    Raises:
      ValueError: a value is not among the above.
    """

    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"
    layers: str = "scan"
    mesh: jax.sharding.Mesh | None = None

    def __post_init__(self) -> None:
        choices = {"dtype": ("float32", "bfloat16"), "remat": ("none", *_POLICIES), "layers": ("scan", "loop")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        check_backend(self.attention)

    @property
    def compute_dtype(self) -> jnp.dtype:
        """`dtype` as a type."""
        return jnp.dtype(self.dtype)


def run_layers(layers: Any, x: jax.Array, *shared: Any, execution: Execution) -> jax.Array:
    """x <- layer(x, *shared) for each layer of a stacked module.

    Args:
      layers: a module whose every array has a leading layer axis L.
      x: [B, S, H], the input of the first layer.
      *shared: what every layer gets besides: rotary angles, visibility.
      execution: scan or loop, and what to rematerialise.

    Returns:
      [B, S, H], the output of the last layer.
    """
    pin = functools.partial(_pin, execution.mesh)
    step = lambda x, layer: (pin(layer(pin(x), *shared)), None)
    if execution.remat != "none":
        # A scan keeps XLA from merging the recomputation with the forward pass; an unrolled loop needs the barrier.
        step = jax.checkpoint(step, policy=_POLICIES[execution.remat], prevent_cse=execution.layers == "loop")
    if execution.layers == "scan":
        return jax.lax.scan(step, x, layers)[0]
    for layer in _unstack(layers):
        x, _ = step(x, layer)
    return x


def _pin(mesh: jax.sharding.Mesh | None, x: jax.Array) -> jax.Array:
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*[None] * x.ndim)))


def collect_layers(layers: Any, x: jax.Array, *shared: Any, execution: Execution) -> jax.Array:
    """As `run_layers`, but returns [L + 1, B, S, H]: the input and the output of every layer. Nothing is recomputed."""

    def step(x: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
        x = layer(x, *shared)
        return x, x

    if execution.layers == "scan":
        return jnp.concatenate([x[None], jax.lax.scan(step, x, layers)[1]])
    outputs = [x]
    for layer in _unstack(layers):
        outputs.append(layer(outputs[-1], *shared))
    return jnp.stack(outputs)


def _unstack(layers: Any) -> list[Any]:
    """The L modules of a stacked one."""
    count = jax.tree.leaves(layers)[0].shape[0]
    return [jax.tree.map(lambda leaf, index=index: leaf[index], layers) for index in range(count)]
