"""Vision-language backbones: one file a family, chosen by the `model_type` of its Hugging Face configuration."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from multitap_jax.backbones.qwen2_vl import Qwen2VL, Qwen2VLConfig
from multitap_jax.backbones.stack import Execution

# What the registry builds; a union once there is a second family.
Backbone = Qwen2VL

__all__ = ["Backbone", "Execution", "Qwen2VL", "Qwen2VLConfig", "UnsupportedModelError", "from_config", "num_params"]


class UnsupportedModelError(ValueError):
    """The architecture of a checkpoint is not one that is implemented."""


def _qwen2_vl(hf_config: Mapping, preprocessor: Mapping | None, rngs: nnx.Rngs, param_dtype: jnp.dtype) -> Backbone:
    return Qwen2VL(Qwen2VLConfig.from_hf(hf_config, preprocessor), rngs=rngs, param_dtype=param_dtype)


_FAMILIES: dict[str, Callable[..., Backbone]] = {"qwen2_vl": _qwen2_vl}


def from_config(
    hf_config: Mapping[str, Any],
    *,
    rngs: nnx.Rngs,
    param_dtype: Any = jnp.float32,
    preprocessor: Mapping[str, Any] | None = None,
) -> Backbone:
    """Builds the backbone that a `config.json` describes, with random weights.

    Args:
      hf_config: the contents of `config.json`.
      rngs: source of the initial weights; under `nnx.eval_shape` nothing is allocated.
      param_dtype: type of the parameters.
      preprocessor: the contents of `preprocessor_config.json` (mean and deviation of pixels); None for the usual ones.

    Raises:
      UnsupportedModelError: `model_type` is absent or not implemented.
      ConfigError: the configuration is of the right family but cannot be used.
    """
    model_type = hf_config.get("model_type")
    if model_type not in _FAMILIES:
        raise UnsupportedModelError(
            f"model_type = {model_type!r} is not supported; supported: {', '.join(sorted(_FAMILIES))}"
        )
    return _FAMILIES[model_type](hf_config, preprocessor, rngs, jnp.dtype(param_dtype))


def num_params(model: nnx.Module) -> int:
    """Number of scalars in all parameters; also of an abstract model."""
    return sum(leaf.size for leaf in jax.tree.leaves(model))
