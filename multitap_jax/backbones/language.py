"""The language head: logits of the next token, which a score never needs, but those who write or weigh tokens do."""

import jax
import jax.numpy as jnp
from flax import nnx

from multitap_jax.backbones.layers import matmul_precision, param


class LanguageHead(nnx.Module):
    """logits = weight h, with weight [vocab, H]: the token table itself where a model ties the two."""

    def __init__(self, weight: jax.Array):
        self.weight = param(weight, ("vocab", "embed"))

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Final-norm states [..., H] -> logits float32[..., vocab]; the product is in the type of the weight."""
        weight = self.weight[...]
        return jnp.einsum(
            "...h,vh->...v",
            hidden.astype(weight.dtype),
            weight,
            preferred_element_type=jnp.float32,
            precision=matmul_precision(weight.dtype),
        )
