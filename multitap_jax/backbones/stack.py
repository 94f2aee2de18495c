"""How a stack of equal layers is run: execution choices, the scan over layers, rematerialisation."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from multitap_jax.backbones.attention import Setup, check_backend

_POLICIES = {
    # Keep the products with weights (the dear part), recompute norms, activations and attention scores.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    "full": jax.checkpoint_policies.nothing_saveable,
}

_GROUP = "group"  # name of a layer's parameters as they are looked up


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a forward pass is computed; none of it changes the mathematics.

    Attributes:
      dtype: computation type, "float32" or "bfloat16"; norms, softmax and rotary angles stay float32.
      remat: what the backward pass recomputes: "none", "dots" (all but weight products), "offload" (the same, and
        the products wait in the memory of the host), "full" (all of a layer).
      attention: attention backend, a name of `attention.BACKENDS`, or "auto": by platform, type, length and mesh.
      layers: "scan" compiles one layer; "loop" unrolls them (for debugging; same values).
      mesh: where the parameters are sharded; activations are then held to the batch's sharding, so that weights are
        gathered and not activations. A mapped batch dimension gets its axes from `jax.vmap(spmd_axis_name=...)`.
      along_context: rows [B, S, ...] are spread over the mesh axis `context` by S; see `along_rows`.

    Raises:
      ValueError: a value is not among the above.
    """

    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"
    layers: str = "scan"
    mesh: jax.sharding.Mesh | None = None
    along_context: bool = False

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

    @property
    def setup(self) -> Setup:
        """What attention is computed with."""
        return Setup(self.attention, self.dtype, self.mesh, self.along_context)

    def along_rows(self) -> "Execution":
        """The execution of a decoder, whose rows the devices of `context` share; towers compute theirs whole."""
        shared = self.mesh is not None and self.mesh.shape["context"] > 1
        return dataclasses.replace(self, along_context=shared)


def run_layers(layers: Any, x: jax.Array, *shared: Any, each: tuple[Any, ...] = (), execution: Execution) -> jax.Array:
    """x <- layer(x, *shared, *own) for each layer of a stacked module.

    Args:
      layers: a module whose every array has a leading layer axis L; L may be 0.
      x: [B, S, H], the input of the first layer.
      *shared: what every layer gets besides: rotary angles, visibility.
      each: what every layer gets of its own: arrays (or trees of them) with a leading L, of which it gets its slice.
      execution: scan or loop, and what to rematerialise.

    Returns:
      [B, S, H], the output of the last layer.
    """
    step = _step(shared, execution)
    return run_groups(lambda x, part: (step(x, *part), None), x, (layers, *each), execution=execution)[0]


def run_to(
    at: jax.Array,
    layers: Any,
    x: jax.Array,
    shared: tuple[Any, ...],
    last: tuple[Any, ...],
    *,
    each: tuple[Any, ...] = (),
    execution: Execution,
) -> jax.Array:
    """As `run_layers`, but the last layer computes the tokens at columns int32[B, K] alone: [B, K, H].

    Args:
      at: the columns; the last layer gets them as an argument of that name.
      layers, x, shared, each, execution: as in `run_layers`, L at least 1.
      last: what the last layer gets in place of `shared`.
    """
    end = ending(at, shared, last, execution)
    step = lambda state, part: (end(*part[:1], *state, *part[1:]), None)
    return run_groups(step, start(x, at), (is_last(num_layers(layers)), layers, *each), execution=execution)[0][1]


def ending(
    at: jax.Array, shared: tuple[Any, ...], last: tuple[Any, ...], execution: Execution
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(bool[] is_last, x [B, S, H], found [B, K, H], layer, *own) -> x and found: one of them new, by the layer.

    One place of a scanned stack can so be two layers, without its weights being cut in two, which would copy them.
    """
    rows, few = execution, dataclasses.replace(execution, along_context=False)
    # Recomputed inside of a branch, a layer's weights are gathered once for that and for its gradient.
    of_all = _remat(lambda x, layer, *own: pin(layer(x, *shared, *own), rows), execution)
    of_few = _remat(lambda x, layer, *own: pin(layer(x, *last, *own, at=at), few), execution)

    def step(is_last: jax.Array, x: jax.Array, found: jax.Array, *layer: Any) -> tuple[jax.Array, jax.Array]:
        x = pin(x, rows)
        return jax.lax.cond(is_last, lambda: (x, of_few(x, *layer)), lambda: (of_all(x, *layer), found))

    # And around both, so that what a branch reads is not saved once more for each layer.
    return _remat(step, execution, jax.checkpoint_policies.everything_saveable)


def start(x: jax.Array, at: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What `ending` is given first."""
    return x, jnp.zeros((*at.shape, x.shape[-1]), x.dtype)


def is_last(count: int) -> np.ndarray:
    """bool[count], false but for the last."""
    return np.arange(count) == count - 1


def run_layer(layer: Any, x: jax.Array, *shared: Any, execution: Execution) -> jax.Array:
    """layer(x, *shared) for one layer that is not stacked, sharded and rematerialised as those of a stack."""
    return _step(shared, execution)(x, layer)


def run_groups(
    step: Callable[[Any, Any], tuple[Any, Any]], x: Any, groups: Any, *, execution: Execution
) -> tuple[Any, Any]:
    """As `jax.lax.scan(step, x, groups)`, scanned or unrolled as `execution` says.

    A group is whatever stands at one index of the leading axis of all arrays of `groups`: a layer, layers of several
    kinds that repeat together, a layer and its number.
    """
    if execution.layers == "scan":
        return jax.lax.scan(step, x, groups)
    outputs = []
    for group in _unstack(groups):
        x, output = step(x, group)
        outputs.append(output)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs) if outputs else None


def keep_layers(
    layers: Any, x: jax.Array, *shared: Any, keep: Sequence[int], each: tuple[Any, ...] = (), execution: Execution
) -> tuple[jax.Array, jax.Array]:
    """As `run_layers`, and also gives states on the way, without holding the others.

    Args:
      keep: which of the L + 1 states that `collect_layers` gives, each at most once; 0 is `x`, i + 1 follows layer i.

    Returns:
      [B, S, H], the output of the last layer; [len(keep), B, S, H], the states of `keep`, in its order.
    """
    step = _step(shared, execution)
    slots = np.full(num_layers(layers) + 1, len(keep), np.int32)  # the slot after the last takes what nobody wants
    slots[list(keep)] = np.arange(len(keep))

    def put(states: jax.Array, x: jax.Array, slot: Any) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(states, x, slot, 0)

    def group(carry: tuple[jax.Array, jax.Array], part: tuple[Any, ...]) -> tuple[Any, None]:
        (x, states), (slot, layer, *own) = carry, part
        x = step(x, layer, *own)
        return (x, put(states, x, slot)), None

    states = put(jnp.zeros((len(keep) + 1, *x.shape), x.dtype), x, jnp.asarray(slots[0]))
    groups = (jnp.asarray(slots[1:]), layers, *each)
    (x, states), _ = run_groups(group, (x, states), groups, execution=execution)
    return x, states[: len(keep)]


def _step(shared: tuple[Any, ...], execution: Execution) -> Callable[..., jax.Array]:
    """(x, layer, *own) -> layer(x, *shared, *own), held to the batch's sharding and rematerialised as asked."""
    return _remat(lambda x, layer, *own: pin(layer(pin(x, execution), *shared, *own), execution), execution)


def _remat(
    step: Callable[..., Any], execution: Execution, otherwise: Callable[..., bool] | None = None
) -> Callable[..., Any]:
    """`step`, of which the backward pass recomputes what `execution` says, or else what `otherwise` does not save."""
    policy = _POLICIES.get(execution.remat, otherwise)
    if policy is None:
        return step
    # A scan keeps XLA from merging the recomputation with the forward pass; an unrolled loop needs the barrier.
    return jax.checkpoint(step, policy=policy, prevent_cse=execution.layers == "loop")


def pin(x: jax.Array, execution: Execution) -> jax.Array:
    """Holds an activation [rows, S, ...] to the batch's sharding; see `Execution`."""
    if execution.mesh is None:
        return x
    spec = PartitionSpec(None, "context" if execution.along_context else None, *[None] * (x.ndim - 2))
    return jax.lax.with_sharding_constraint(x, NamedSharding(execution.mesh, spec))


def collect_layers(
    layers: Any, x: jax.Array, *shared: Any, each: tuple[Any, ...] = (), execution: Execution
) -> jax.Array:
    """As `run_layers`, but returns [L + 1, B, S, H]: the input and the output of every layer. Nothing is recomputed."""

    def step(x: jax.Array, slices: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        layer, *own = slices
        x = layer(x, *shared, *own)
        return x, x

    outputs = run_groups(step, x, (layers, *each), execution=execution)[1]
    return x[None] if outputs is None else jnp.concatenate([x[None], outputs])


def num_layers(layers: Any) -> int:
    """L of a stacked module."""
    return jax.tree.leaves(layers)[0].shape[0]


def _unstack(stacked: Any) -> list[Any]:
    """The L slices of stacked trees."""
    count = num_layers(stacked)
    return [jax.tree.map(lambda leaf, index=index: jnp.asarray(leaf)[index], stacked) for index in range(count)]
