"""Weights in the official layout as an artefact; bytes are copied, one tensor in memory at a time."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from multitap_jax.data.processing import Contract, Processing
from multitap_jax.families import read_config
from multitap_jax.reward import RewardHead
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.scoring.exports.official import HEAD, PREFIX, official_contract, read_contract
from multitap_jax.scoring.manifest import MANIFEST, ArtefactError
from multitap_jax.scoring.saving import CONFIG, Contents, companion_files, write_artefact
from multitap_jax.weights.files import stored_tensors
from multitap_jax.weights.finite import FiniteCheck
from multitap_jax.weights.hashing import folder_hash
from multitap_jax.weights.hub import backbone_tensors
from multitap_jax.weights.mapping import WeightError
from multitap_jax.weights.sources import locate
from multitap_jax.weights.stored import Stored
from multitap_jax.weights.writer import write_folder


def import_official(
    checkpoint: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    prompt: str = "auto",
    position_mode: str = "auto",
    image_policy: str = "auto",
    max_shard_bytes: int = 5 << 30,
    overwrite: bool = False,
) -> Artefact:
    """Makes an artefact of weights in the official layout.

    Args:
      checkpoint: folder (or hub:OWNER/NAME) with `backbone_model.*`, `reward_head.weight`, `reward_head.bias` in
        safetensors; its own `config.json` counts where it has one.
      out: the artefact to write.
      base: the backbone's own folder (or hub:OWNER/NAME): tokenizer and processor, which the official checkpoints lack.
      prompt, position_mode, image_policy: how the weights were trained. "auto" is what `multitap_contract.json` in the
        folder says, else what the official code does: official-train, flat positions, pictures squeezed to 560 x 560.
      max_shard_bytes: the largest file, but for a single tensor that is larger.
      overwrite: replace an artefact at `out`.

    Raises:
      ArtefactError: no reward head, no tokenizer, weights that are missing or mis-shaped. All of it is listed.
      FileExistsError: `out` is in the way.
    """
    found = locate(checkpoint)
    folder = found.folder
    companions = folder if base is None else locate(base).folder
    tensors = stored_tensors(folder)
    _check_layout(folder, tensors)
    config_folder = folder if (folder / CONFIG).is_file() else companions
    chosen = {"prompt": prompt, "position_mode": position_mode, "image_policy": image_policy}
    contract = _contract(folder, config_folder, {name: value for name, value in chosen.items() if value != "auto"})
    problems: list[str] = []
    head = _head(tensors, read_config(config_folder)[1].text.hidden_size, problems)
    backbone: dict[str, Stored] = {}
    try:
        backbone = backbone_tensors(folder, config_folder=config_folder, prefix=PREFIX)
    except WeightError as error:
        problems.append(str(error))
    if not any(path.name.startswith(("tokenizer", "vocab")) for path in companion_files(companions)):
        problems.append(f"{companions} has no tokenizer: give the backbone's own folder, --base=FOLDER")
    if problems or head is None:
        raise ArtefactError(f"{folder} cannot be imported:\n  " + "\n  ".join(problems))
    contents = Contents(
        head=head,
        config=config_folder,
        companions=companions,
        contract=contract,
        source=found.name,
        revision=found.revision,
        provenance={"imported": {"layout": "official", "model_hash": folder_hash(folder)}},
    )

    def write_weights(new: Path) -> None:
        headers, finite = {key: (tensor.shape, tensor.dtype) for key, tensor in backbone.items()}, FiniteCheck()
        write_folder(new, headers, _values(backbone, finite), max_shard_bytes)
        finite.judge(folder)

    def check(new: Path) -> None:
        Processing.from_folder(new, contract)  # tokenizer and configuration belong together, or nothing is written

    manifest = write_artefact(Path(out), contents, write_weights, check=check, overwrite=overwrite)
    return Artefact(Path(out), manifest)


def _values(tensors: Mapping[str, Stored], finite: FiniteCheck) -> Iterator[tuple[str, np.ndarray]]:
    for key, tensor in tensors.items():
        value = tensor.read()
        finite(tensor, value)
        yield key, value


def _check_layout(folder: Path, tensors: Mapping[str, Stored]) -> None:
    if (folder / MANIFEST).is_file():
        raise ArtefactError(f"{folder}: is an artefact already; `multitap export` copies it")
    if not any(name.startswith((PREFIX, "reward_head.")) for name in tensors):
        raise ArtefactError(
            f"{folder}: a backbone without a reward head: no {PREFIX}* and no reward_head.* is in its files, and no "
            "head is ever random. Give a trained reward model, or train one: "
            f"multitap train --config=configs/official.py --config.model.checkpoint={folder}"
        )


def _contract(folder: Path, config_folder: Path, chosen: Mapping[str, str]) -> Contract:
    if not (config_folder / CONFIG).is_file():
        raise ArtefactError(f"{folder}: has no {CONFIG}; give the backbone's own folder: --base=FOLDER")
    saved = read_contract(folder) or official_contract(*read_config(config_folder))
    return dataclasses.replace(saved, **chosen)


def _head(tensors: Mapping[str, Stored], hidden: int, problems: list[str]) -> RewardHead | None:
    """The reward head, or None and why not in `problems`."""
    expected = dict(zip(HEAD, ((1, hidden), (1,)), strict=True))
    wrong = [
        f"{name}: {list(tensors[name].shape) if name in tensors else 'missing'}, expected {list(shape)}"
        for name, shape in expected.items()
        if name not in tensors or tensors[name].shape != shape
    ]
    wrong += [f"unknown: {name}" for name in tensors if not name.startswith(PREFIX) and name not in expected]
    problems += wrong
    if wrong:
        return None
    weight, bias = (tensors[name].read().astype(np.float32) for name in HEAD)
    return RewardHead.from_arrays(weight[0], bias[0])
