"""Weights of 8 bits for scoring: about half the memory of bfloat16 (the token table stays), once they are rounded.

Each column of a kernel [in, out] is rounded to 255 steps of its own, symmetric about 0: kernel = round(w / scale),
scale = max |w| / 127 over `in` (round to nearest: LLM.int8(), arXiv 2208.07339, section 2, without its outliers). Only
weights are rounded: they are widened to the computation type, exactly, and the scale multiplies the product, so
activations, norms, token table and heads stay as they are. Nothing is trained on such weights.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from multitap_jax.backbones.layers import check_not_rounded, linears, param
from multitap_jax.reward import RewardModel

WEIGHTS = ("full", "int8")


def quantize(model: RewardModel) -> RewardModel:
    """A model whose backbone has kernels of int8 in every `Linear`; all else it shares with the given one.

    Raises ValueError where they are of int8 already.
    """
    check_not_rounded(model, "rounded once more")
    model = nnx.merge(*nnx.split(model))
    for _, linear in linears(model.backbone):
        axes = linear.kernel.get_metadata("axes")
        kernel, scale = _rounded(linear.kernel[...])
        linear.kernel, linear.kernel_scale = param(kernel, axes), param(scale, (*axes[:-2], axes[-1]))
    return model


@jax.jit
def _rounded(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8[(L,) in, out] and float32[(L,) out] of a kernel [(L,) in, out]; a column of zeros has scale 0."""
    wide = kernel.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-2, keepdims=True) / 127.0
    steps = jnp.round(wide / jnp.where(scale > 0, scale, 1.0))
    return steps.astype(jnp.int8), jnp.squeeze(scale, -2)
