"""The heads alone, for NumPy and embeddings on disk."""

from pathlib import Path

from multitap_jax.files import json_bytes, new_folder
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.scoring.exports.common import replaceable, write_tensors
from multitap_jax.scoring.manifest import HEADS

HEADS_JSON = "heads.json"
# What a reader has to do, for h float32[N, H] as `Scorer.embed` gives it.
USAGE = (
    "from safetensors.numpy import load_file; import numpy as np; w = load_file('heads.safetensors')",
    "overall = 1 / (1 + np.exp(-(h @ w['reward_head.weight'][0] + w['reward_head.bias'][0])))",
    "objectives = h @ w['ridge.coef'].T + w['ridge.intercept']  # columns: names of heads.json, where fitted",
)


def export_heads(folder: str | Path, out: str | Path, *, overwrite: bool = False) -> Path:
    """Writes the heads alone: `heads.safetensors`, and `heads.json` about them.

    With h float32[N, H] from `Scorer.embed` or an embedding store, these lines (`usage` in heads.json) score:

        from safetensors.numpy import load_file; import numpy as np; w = load_file('heads.safetensors')
        overall = 1 / (1 + np.exp(-(h @ w['reward_head.weight'][0] + w['reward_head.bias'][0])))
        objectives = h @ w['ridge.coef'].T + w['ridge.intercept']

    Raises:
      ArtefactError: the source is none, or was edited or damaged.
      FileExistsError: `out` is in the way.
    """
    artefact = Artefact.open(folder)
    described = artefact.manifest.to_json()
    about = {
        key: described[key] for key in ("format_version", "contract", "overall", "objectives", "backbone", "ridge")
    }
    about |= {"hidden_size": artefact.hidden_size, "model_hash": artefact.model_hash, "usage": USAGE}
    with new_folder(Path(out), replaceable=replaceable(overwrite, HEADS_JSON)) as new:
        write_tensors(new / HEADS, artefact.head_arrays())
        (new / HEADS_JSON).write_bytes(json_bytes(about))
    return Path(out)
