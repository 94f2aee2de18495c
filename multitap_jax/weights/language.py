"""The output embedding of a checkpoint, which the import of backbones leaves in the file."""

from pathlib import Path

import jax
import numpy as np

from multitap_jax.backbones import Backbone
from multitap_jax.backbones.language import LanguageHead
from multitap_jax.families import weight_table
from multitap_jax.weights.fill import permute_into
from multitap_jax.weights.finite import FiniteCheck
from multitap_jax.weights.hub import unused_tensors
from multitap_jax.weights.mapping import WeightError
from multitap_jax.weights.stored import aligned_empty


def load_language_head(folder: str | Path, backbone: Backbone) -> LanguageHead:
    """The language head of a folder's model, in the type of the backbone's token table.

    Args:
      folder: holds `config.json` and `model*.safetensors`.
      backbone: the model loaded from it; where embeddings are tied, head and token table share one array.

    Raises:
      WeightError: the head is missing, of another shape, or holds NaN or infinity.
    """
    table = backbone.text.embed.embedding[...]
    if backbone.config.tie_word_embeddings:
        return LanguageHead(table)
    key = next(key for key, other in weight_table(backbone).unused.items() if other is not None)
    stored = unused_tensors(folder).get(key)
    if stored is None or stored.shape != table.shape:
        found = "is not here" if stored is None else f"has shape {list(stored.shape)}, expected {list(table.shape)}"
        raise WeightError(
            f"{folder}: {key}, the language head, {found}. Scores do not need it, but who writes or weighs tokens "
            "does; take the folder of the whole model"
        )
    finite, value = FiniteCheck(), stored.read()
    finite(stored, value)
    finite.judge(Path(folder))
    out = aligned_empty(value.shape, np.dtype(table.dtype))
    permute_into(out, value, (0, 1))
    return LanguageHead(jax.device_put(out, table.sharding))
