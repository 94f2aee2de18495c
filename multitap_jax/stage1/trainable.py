"""Which parameters learn, and low-rank adapters (LoRA, arXiv 2106.09685)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from multitap_jax.backbones.layers import Linear, check_not_rounded, linears, matmul_precision, param
from multitap_jax.config import ConfigError, TrainableConfig
from multitap_jax.reward import RewardModel

Path = tuple[Any, ...]

_ADAPTERS = ("lora_a", "lora_b")
_LEARNS: dict[str, Callable[[Path], bool]] = {
    "full": lambda path: True,
    "head": lambda path: path[0] == "head",
    "text": lambda path: path[:2] != ("backbone", "vision"),
    "lora": lambda path: path[0] == "head" or path[-1] in _ADAPTERS,
}


class Partition(NamedTuple):
    """A model in three: its structure, the parameters that learn and those that do not (`nnx.merge` joins them).

    `block` is that of `Layout`, which the cutting into micro-batches needs.
    """

    graph: nnx.GraphDef
    trainable: nnx.State
    frozen: nnx.State
    block: tuple[int, int]

    def model(self, trainable: nnx.State | None = None) -> RewardModel:
        """The model, with other values of what learns if given."""
        return nnx.merge(self.graph, self.trainable if trainable is None else trainable, self.frozen)


def partition(model: RewardModel, parts: str) -> Partition:
    """Splits a model; no gradient is ever computed for what is frozen.

    Args:
      model: with adapters if parts is "lora".
      parts: "full", "head", "text" (all but the vision tower and its merger) or "lora" (adapters and head).

    Raises:
      ConfigError: unknown parts, or "lora" without adapters.
    """
    if parts not in _LEARNS:
        raise ConfigError(f"config.trainable.parts = {parts!r}: expected one of {', '.join(_LEARNS)}")
    graph, trainable, frozen = nnx.split(model, lambda path, _: _LEARNS[parts](path), ...)  # type: ignore[misc]
    if parts == "lora" and not any(linear.lora_a is not None for _, linear in linears(model)):
        raise ConfigError("config.trainable.parts = 'lora', but the model has no adapters; call add_lora(model) first")
    return Partition(graph, trainable, frozen, model.backbone.config.block)


def add_lora(model: nnx.Module, config: TrainableConfig, rngs: nnx.Rngs) -> None:
    """Adds adapters to every `Linear` that a target names, in place; the outputs do not change at first.

    `lora_a` [(L,) in, r] ~ U(+-1 / sqrt(in)) (the Kaiming initialisation of PEFT), `lora_b` [(L,) r, out] = 0,
    scale = alpha / r; float32. A target is the last part or parts of a module's dotted path.

    Raises:
      ConfigError: a target that names no module (the message lists the modules there are).
    """
    check_not_rounded(model, "trained")
    modules = dict(linears(model))
    chosen: dict[str, Linear] = {}
    for target in config.lora_targets:
        found = {name: module for name, module in modules.items() if f".{name}".endswith(f".{target}")}
        if not found:
            raise ConfigError(
                f"config.trainable.lora_targets: {target!r} names no linear module; there are: {', '.join(modules)}"
            )
        chosen |= found
    if not chosen:
        raise ConfigError("config.trainable.lora_targets is empty; name modules such as q_proj, v_proj")
    for _, linear in sorted(chosen.items()):
        *stack, inner, outer = linear.kernel.shape
        axes = linear.kernel.get_metadata("axes")
        bound = inner**-0.5
        a = jax.random.uniform(rngs.params(), (*stack, inner, config.lora_rank), jnp.float32, -bound, bound)
        linear.lora_a = param(a, (*axes[:-1], None))
        linear.lora_b = param(jnp.zeros((*stack, config.lora_rank, outer), jnp.float32), (*axes[:-2], None, axes[-1]))
        linear.lora_scale = config.lora_alpha / config.lora_rank


def merge_lora(model: RewardModel) -> RewardModel:
    """Folds adapters into their kernels and removes them, in place; returns the model (unchanged if it has none)."""
    check_not_rounded(model, "merged with adapters")
    for _, linear in linears(model):
        if linear.lora_a is None or linear.lora_b is None:
            continue
        a, b = linear.lora_a[...].astype(jnp.float32), linear.lora_b[...].astype(jnp.float32)
        low = jnp.einsum("...ir,...ro->...io", a, b, precision=matmul_precision(a.dtype))
        kernel = linear.kernel[...]
        linear.kernel[...] = (kernel.astype(jnp.float32) + low * jnp.float32(linear.lora_scale)).astype(kernel.dtype)
        linear.lora_a = linear.lora_b = linear.lora_scale = None
    return model
