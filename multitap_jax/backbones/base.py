"""What every backbone is: a decoder and a vision tower, from a packed batch to pooled hidden states."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from multitap_jax.backbones.decoder import place_features
from multitap_jax.backbones.stack import Execution, pin
from multitap_jax.batch import PackedBatch


class Backbone(nnx.Module):
    """An encoder; `backbone(batch, execution)` gives the pooled hidden states. As it stands: image features in the row.

    Attributes:
      config: its numbers: `model_type`, `text` (a `DecoderConfig`), `vision`, `tie_word_embeddings`, `image_token_id`,
        `block` (see `data.layouts.Layout`) and `vision_flops`.
      text: token table, decoder layers, final norm.
      vision: the vision tower with its projector; `vision(batch, execution)` gives the features of all cells.
    """

    config: Any
    text: Any
    vision: Any

    def __call__(self, batch: PackedBatch, execution: Execution) -> jax.Array:
        """Final-norm hidden states at `batch.pool`, float32[B, K, H]."""
        x, more, each = self.inputs(batch, execution)
        return self.text(x, batch, execution, *more, each=each)

    def hidden_states(self, batch: PackedBatch, execution: Execution) -> jax.Array:
        """[L + 1, B, S, H]: the embeddings and the output of each decoder layer, before the final norm."""
        x, more, each = self.inputs(batch, execution)
        return self.text.hidden_states(x, batch, execution, *more, each=each)

    def inputs(self, batch: PackedBatch, execution: Execution) -> tuple[jax.Array, tuple[Any, ...], tuple[Any, ...]]:
        """The embeddings [B, S, H]; what all decoder layers get besides; what each gets of its own."""
        return self.embed(batch, execution), (), ()

    def embed(self, batch: PackedBatch, execution: Execution) -> jax.Array:
        """[B, S, H]: token embeddings, replaced by image features at image tokens."""
        x = self.text.embed(jnp.asarray(batch.tokens), execution.compute_dtype, execution.mesh)
        if batch.patches.shape[0] == 0:  # text only: the shape says so, the tower is not even compiled
            return x
        return place_features(x, pin(self.vision(batch, execution), execution).reshape(-1, x.shape[-1]), batch)
