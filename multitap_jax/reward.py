"""The reward model: a backbone and a linear head; score = sigmoid(weight . h + bias) (arXiv 2510.00766, section 3)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from multitap_jax.backbones import Backbone, Execution
from multitap_jax.batch import PackedBatch


class RewardHead(nnx.Module):
    """logit = weight . h + bias, always in float32: scores that are rounded tie, and ties cost rank correlation."""

    def __init__(self, hidden_size: int, *, rngs: nnx.Rngs):
        """As the official code: weight normal with deviation 1 / sqrt(H + 1), bias U(+-1 / sqrt(H))."""
        bound = hidden_size**-0.5
        weight = jax.random.normal(rngs.params(), (hidden_size,), jnp.float32) * (hidden_size + 1) ** -0.5
        self.weight = nnx.Param(weight, axes=("embed",))
        self.bias = nnx.Param(jax.random.uniform(rngs.params(), (), jnp.float32, -bound, bound), axes=())

    @classmethod
    def from_arrays(cls, weight: ArrayLike, bias: ArrayLike) -> "RewardHead":
        """The head with weight [H] and bias [], kept in float32.

        Raises:
          ValueError: for other shapes.
        """
        weight, bias = jnp.asarray(weight, jnp.float32), jnp.asarray(bias, jnp.float32)
        if weight.ndim != 1 or bias.ndim != 0:
            raise ValueError(f"a reward head has weight [H] and bias [], got {weight.shape} and {bias.shape}")
        head = cls(weight.shape[0], rngs=nnx.Rngs(0))
        head.weight[...], head.bias[...] = weight, bias
        return head

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """[..., H] -> logits float32[...]."""
        weight, bias = self.weight[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        return jnp.einsum("...h,h->...", hidden.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST) + bias


class RewardModel(nnx.Module):
    """`model(batch, execution)` gives logits; their sigmoid (in float32) is the overall score."""

    def __init__(self, backbone: Backbone, head: RewardHead):
        self.backbone = backbone
        self.head = head

    def embed(self, batch: PackedBatch, execution: Execution) -> jax.Array:
        """float32[B, K, H], the pooled hidden states."""
        return self.backbone(batch, execution)

    def __call__(self, batch: PackedBatch, execution: Execution) -> jax.Array:
        """float32[B, K] logits; meaningless where `batch.record` is -1."""
        return self.head(self.embed(batch, execution))
