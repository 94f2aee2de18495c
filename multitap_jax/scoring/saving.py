"""Writing an artefact's folder: weights, config.json, companions, heads and manifest, all of it or nothing."""

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save as tensors_to_bytes

from multitap_jax.data.processing import Contract
from multitap_jax.data.seen import Seen, to_arrays
from multitap_jax.families import abstract_backbone
from multitap_jax.files import file_hash, json_bytes, new_folder
from multitap_jax.reward import RewardHead, RewardModel
from multitap_jax.scoring.manifest import (
    HEADS,
    MANIFEST,
    ArtefactError,
    BackboneSource,
    Hashes,
    Manifest,
    Objective,
    Overall,
    check_objectives,
)
from multitap_jax.stage2.head import RidgeHead
from multitap_jax.weights.files import read_json
from multitap_jax.weights.hashing import file_tensor_hash, folder_hash

CONFIG = "config.json"
# What a tokenizer or an image processor is made of; never code.
COMPANIONS = (
    "tokenizer*.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.*",
    "*processor_config.json",
    "generation_config.json",
)


@dataclasses.dataclass(frozen=True)
class Contents:
    """What an artefact holds besides its weights.

    Attributes:
      head, ridge: the heads; `objectives` describe those of `ridge`, in its order.
      config: the folder whose `config.json` goes along.
      companions: the folder whose tokenizer, processor and generation files go along.
      contract: what turns a pair into tokens, positions and pixels.
      overall: the target the reward head was trained on.
      source, revision: the backbone's origin, for people.
      provenance: anything JSON.
      seen: the records that weights and heads have seen (`data/seen.py`), by who has.
      entries: go into config.json where it does not have them.
    """

    head: RewardHead
    config: Path
    companions: Path
    contract: Contract
    ridge: RidgeHead | None = None
    objectives: Sequence[Objective] = ()
    overall: Overall = dataclasses.field(default_factory=Overall)
    source: str = ""
    revision: str = ""
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seen: Mapping[str, Seen] = dataclasses.field(default_factory=dict)
    entries: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def write_artefact(
    folder: Path,
    contents: Contents,
    write_weights: Callable[[Path], None],
    *,
    check: Callable[[Path], object] = lambda new: None,
    overwrite: bool = False,
) -> Manifest:
    """Writes an artefact and returns its manifest.

    Args:
      folder: where to; must be empty or absent, or, with `overwrite`, hold an artefact.
      contents: all but the weights.
      write_weights: puts the weights into the folder it is given.
      check: looks at the whole before it takes its place; what it raises leaves nothing behind.
      overwrite: replace an artefact.

    Raises:
      FileExistsError: the folder is in the way.
      ArtefactError: ridge head and objectives do not fit each other; NaN in a head.
    """
    config = {**contents.entries, **read_config_json(contents.config)}
    objectives = checked_objectives(contents.ridge, contents.objectives)
    heads = tensors_to_bytes(head_arrays(contents.head, contents.ridge) | to_arrays(contents.seen))
    with new_folder(folder, replaceable=lambda old: overwrite and (old / MANIFEST).is_file()) as new:
        write_weights(new)
        (new / CONFIG).write_bytes(json_bytes(config))
        for path in companion_files(contents.companions):
            shutil.copyfile(path, new / path.name)
        (new / HEADS).write_bytes(heads)
        manifest = Manifest(
            contract=contents.contract,
            overall=contents.overall,
            objectives=objectives,
            ridge=contents.ridge.metadata() if contents.ridge is not None else None,
            backbone=BackboneSource(config["model_type"], contents.source, contents.revision),
            hashes=Hashes(
                model=folder_hash(new),
                heads=file_tensor_hash(new / HEADS),
                files={path.name: file_hash(path) for path in [new / CONFIG, *companion_files(new)]},
            ),
            provenance=dict(contents.provenance),
        )
        (new / MANIFEST).write_bytes(json_bytes(manifest.to_json()))
        check(new)
    return manifest


def companion_files(folder: Path) -> list[Path]:
    """Tokenizer, processor and generation files of a model folder, sorted by name."""
    return sorted({path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()})


def read_config_json(folder: Path) -> dict[str, Any]:
    config = read_json(folder / CONFIG)
    if "model_type" not in config:
        raise ArtefactError(f"{folder / CONFIG}: model_type is missing; restore the file")
    return config


def check_same_model(model: RewardModel, base: Path) -> None:
    described = abstract_backbone(base)
    given, expected = (
        (jax.tree.structure(tree), [leaf.shape for leaf in jax.tree.leaves(tree)])
        for tree in (model.backbone, described)
    )
    if given != expected:
        raise ArtefactError(
            f"{base / CONFIG}: describes another model than the one to be saved, which could not be loaded again; give "
            "the folder that the backbone was loaded from as base"
        )


def head_arrays(head: RewardHead, ridge: RidgeHead | None) -> dict[str, np.ndarray]:
    arrays = {
        "reward_head.weight": np.asarray(head.weight[...], np.float32)[None, :],
        "reward_head.bias": np.asarray(head.bias[...], np.float32)[None],
    }
    if ridge is not None:
        arrays |= {name: np.ascontiguousarray(array) for name, array in ridge.to_arrays().items()}
    unusable = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if unusable:
        raise ArtefactError(f"NaN or infinity in {', '.join(unusable)}: not saved; look at the end of the training log")
    return arrays


def checked_objectives(ridge: RidgeHead | None, objectives: Sequence[Objective]) -> tuple[Objective, ...]:
    """The objectives, checked against the heads they describe, with the penalties the heads were fitted with."""
    heads = () if ridge is None else tuple(ridge.objective_names_)
    names = tuple(objective.name for objective in objectives)
    if heads != names:
        raise ArtefactError(
            f"ridge heads of {heads}, but objectives {names} describe them; give one for each, in order"
        )
    check_objectives(objectives)
    alphas = () if ridge is None else tuple(float(alpha) for alpha in ridge.alpha_)
    pairs = zip(objectives, alphas, strict=True)
    return tuple(dataclasses.replace(objective, alpha=alpha) for objective, alpha in pairs)
