"""An artefact in other layouts, and the official layout as an artefact.

The official PyTorch code (kaist-cvml/MULTI-TAP, models/reward_model.py) keeps its weights as `backbone_model.<name of
the tensor on the hub>` and `reward_head.weight` [1, H], `reward_head.bias` [1].
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from multitap_jax.data.processing import Contract
from multitap_jax.files import json_bytes, new_folder, tensor_hash
from multitap_jax.reward import RewardHead, RewardModel
from multitap_jax.scoring.artefact import CONFIG, Artefact, companion_files
from multitap_jax.scoring.manifest import HEADS, MANIFEST, ArtefactError
from multitap_jax.weights.files import INDEX, read_tensors, weight_files, write_folder
from multitap_jax.weights.hub import load_backbone
from multitap_jax.weights.mapping import WeightError

PREFIX = "backbone_model."
HEADS_JSON = "heads.json"
# What a reader of `export_heads` has to do, for h float32[N, H] as `Scorer.embed` gives it.
USAGE = (
    "from safetensors.numpy import load_file; import numpy as np; w = load_file('heads.safetensors')",
    "overall = 1 / (1 + np.exp(-(h @ w['reward_head.weight'][0] + w['reward_head.bias'][0])))",
    "objectives = h @ w['ridge.coef'].T + w['ridge.intercept']  # columns: names of heads.json, where fitted",
)


def export_artefact(
    folder: str | Path,
    out: str | Path,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    overwrite: bool = False,
) -> Artefact:
    """Copies an artefact, checked on both sides; with `dtype`, the backbone's tensors are converted on the way.

    Raises:
      ArtefactError: the source is none, or was edited or damaged.
      FileExistsError: `out` is in the way.
    """
    if dtype is not None:
        artefact, model, ridge = Artefact.load(folder)
        manifest = artefact.manifest
        converted = {"from": artefact.model_hash, "dtype": jnp.dtype(dtype).name}
        return Artefact.save(
            out,
            model,
            base=artefact.folder,
            contract=manifest.contract,
            overall=manifest.overall,
            ridge=ridge,
            objectives=manifest.objectives,
            source=manifest.backbone.source,
            revision=manifest.backbone.revision,
            provenance={**manifest.provenance, "converted": converted},
            dtype=dtype,
            overwrite=overwrite,
        )
    artefact = Artefact.open(folder).verify()
    with new_folder(Path(out), replaceable=_replaceable(overwrite, MANIFEST)) as new:
        weights = [artefact.folder / name for name in weight_files(artefact.folder)]
        index = [artefact.folder / INDEX] if len(weights) > 1 else []
        for path in [*_carried(artefact.folder), *weights, *index, artefact.folder / MANIFEST]:
            shutil.copyfile(path, new / path.name)
        shutil.copyfile(artefact.heads_file(), new / HEADS)
        Artefact.open(new).verify()
    return Artefact.open(out)


def export_heads(folder: str | Path, out: str | Path, *, overwrite: bool = False) -> Path:
    """Writes the heads alone, for NumPy and embeddings on disk: `heads.safetensors`, and `heads.json` about them.

    With h float32[N, H] from `Scorer.embed` or an embedding store, these lines (`usage` in heads.json) score:

        from safetensors.numpy import load_file; import numpy as np; w = load_file('heads.safetensors')
        overall = 1 / (1 + np.exp(-(h @ w['reward_head.weight'][0] + w['reward_head.bias'][0])))
        objectives = h @ w['ridge.coef'].T + w['ridge.intercept']
    """
    artefact = Artefact.open(folder)
    arrays = artefact.head_arrays()
    described = artefact.manifest.to_json()
    about = {
        key: described[key] for key in ("format_version", "contract", "overall", "objectives", "backbone", "ridge")
    }
    about |= {"hidden_size": artefact.hidden_size, "model_hash": artefact.model_hash, "usage": USAGE}
    with new_folder(Path(out), replaceable=_replaceable(overwrite, HEADS_JSON)) as new:
        save_file(arrays, new / HEADS)
        (new / HEADS_JSON).write_bytes(json_bytes(about))
    return Path(out)


def export_official(
    folder: str | Path, out: str | Path, *, max_shard_bytes: int = 5 << 30, overwrite: bool = False
) -> Path:
    """Writes the layout the official PyTorch code reads; values and types stay, one tensor is in memory at a time.

    An output embedding goes along where the artefact has one of its own. Ridge heads have no place in this layout.
    """
    artefact = Artefact.open(folder)
    heads = artefact.head_arrays()
    with new_folder(Path(out), replaceable=lambda old: overwrite and _is_official(old)) as new:
        for path in _carried(artefact.folder):
            shutil.copyfile(path, new / path.name)
        tensors = {PREFIX + name: tensor for name, tensor in read_tensors(artefact.folder).items()}
        tensors |= {name: heads[name] for name in ("reward_head.weight", "reward_head.bias")}
        headers = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        write_folder(new, headers, tensors.items(), max_shard_bytes)
    return Path(out)


def import_official(
    folder: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    contract: Contract | None = None,
    overwrite: bool = False,
) -> Artefact:
    """Makes an artefact of weights in the official layout.

    Args:
      folder: safetensors with `backbone_model.*`, `reward_head.weight`, `reward_head.bias`.
      out: the artefact to write.
      base: folder with config.json, tokenizer and processor, where `folder` does not hold them.
      contract: how the weights were trained; None is as the official code does (its positions are flat: transformers
        4.46.1 gives the forward pass no others).

    Raises:
      ArtefactError: no reward head there, or one of another shape.
      WeightError: backbone weights missing or mis-shaped; all of them are listed.
    """
    folder = Path(folder)
    base = folder if base is None else Path(base)
    head = _official_head(folder)
    dtypes = {tensor.dtype for name, tensor in read_tensors(folder).items() if name.startswith(PREFIX)}
    backbone = load_backbone(folder, param_dtype=dtypes.pop() if len(dtypes) == 1 else jnp.float32, prefix=PREFIX)
    return Artefact.save(
        out,
        RewardModel(backbone, head),
        base=base,
        contract=contract or Contract(position_mode="flat"),
        source=folder.name,
        provenance={"imported": {"layout": "official", "model_hash": tensor_hash(read_tensors(folder))}},
        overwrite=overwrite,
    )


def _official_head(folder: Path) -> RewardHead:
    found = {name: tensor for name, tensor in read_tensors(folder).items() if name.startswith("reward_head.")}
    weight, bias = found.get("reward_head.weight"), found.get("reward_head.bias")
    if weight is None or bias is None or weight.ndim != 2 or weight.shape[0] != 1 or bias.shape != (1,):
        shapes = {name: array.shape for name, array in found.items()} or "no reward_head.* in model*.safetensors"
        raise ArtefactError(
            f"{folder}: expected reward_head.weight [1, H] and reward_head.bias [1], found {shapes}; no head is ever "
            "random, so give the folder of a trained reward model in safetensors"
        )
    return RewardHead.from_arrays(weight[0].astype(np.float32), bias[0].astype(np.float32))


def _is_official(folder: Path) -> bool:
    try:
        return any(name.startswith(PREFIX) for name in read_tensors(folder))
    except WeightError:
        return False


def _carried(folder: Path) -> list[Path]:
    return [folder / CONFIG, *companion_files(folder)]


def _replaceable(overwrite: bool, mark: str) -> Callable[[Path], bool]:
    """Only a folder that an export of this kind wrote is ever replaced."""
    return lambda old: overwrite and (old / mark).is_file()
