"""The layout of the official PyTorch code.

kaist-cvml/MULTI-TAP (models/reward_model.py) keeps its weights as `backbone_model.<name of the tensor on the hub>` and
`reward_head.weight` [1, H], `reward_head.bias` [1], and knows one way to make a pair into tokens. What an artefact was
trained for goes along in a file of our own, which `multitap import` reads and the official code never looks at.
"""

import dataclasses
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from multitap_jax.config import ConfigError, from_config_dict
from multitap_jax.data.decode import ImageError
from multitap_jax.data.layouts import ImagePolicy
from multitap_jax.data.processing import Contract
from multitap_jax.families import Family, read_config
from multitap_jax.files import canonical_hash, json_bytes, new_folder
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.scoring.exports.common import copy_carried
from multitap_jax.scoring.manifest import ArtefactError
from multitap_jax.scoring.saving import CONFIG
from multitap_jax.weights.files import read_json, stored_tensors
from multitap_jax.weights.mapping import WeightError
from multitap_jax.weights.writer import write_folder

PREFIX = "backbone_model."
HEAD = ("reward_head.weight", "reward_head.bias")
CONTRACT = "multitap_contract.json"
SQUARE = "square:560"


class ContractWarning(UserWarning):
    """Another program will read the export in another way than the artefact was trained for."""


def official_contract(family: Family, config: Any, prompt: str = "official-train") -> Contract:
    """How the official code makes a pair into tokens, for a family and its configuration (`families.read_config`).

    Positions are flat: transformers 4.46.1, which it pins, gives a plain forward pass no others. Pictures are squeezed
    to 560 x 560, whatever the image processor makes of that then; a model that cannot take it, which the official code
    does not know either, has its own policy.
    """
    position_mode = "flat" if "flat" in family.position_modes else family.position_modes[0]
    contract = Contract.of(family, prompt=prompt, position_mode=position_mode)
    try:
        family.layout(config, ImagePolicy.parse(SQUARE))
    except ImageError:
        return contract
    return dataclasses.replace(contract, image_policy=SQUARE)


def export_official(
    folder: str | Path, out: str | Path, *, max_shard_bytes: int = 5 << 30, overwrite: bool = False
) -> Path:
    """Writes the layout the official PyTorch code reads; values and types stay, one tensor is in memory at a time.

    An output embedding goes along where the artefact has one of its own. Ridge heads have no place in this layout. A
    `ContractWarning` says where the official code would read the weights otherwise than they were trained.

    Raises:
      ArtefactError: the source is none, or was edited or damaged.
      FileExistsError: `out` is in the way.
    """
    artefact = Artefact.open(folder)
    heads = artefact.head_arrays()
    contract = artefact.manifest.contract
    stored = {PREFIX + name: tensor for name, tensor in stored_tensors(artefact.folder).items()}
    headers = {name: (tensor.shape, tensor.dtype) for name, tensor in stored.items()}
    headers |= {name: (heads[name].shape, heads[name].dtype) for name in HEAD}

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, tensor in stored.items():
            yield name, tensor.read()
        yield from ((name, heads[name]) for name in HEAD)

    with new_folder(Path(out), replaceable=lambda old: overwrite and is_official(old)) as new:
        copy_carried(artefact.folder, new)
        (new / CONTRACT).write_bytes(json_bytes(_described(contract)))
        write_folder(new, headers, tensors(), max_shard_bytes)
    family, numbers = read_config(artefact.folder)
    differences = _differences(contract, official_contract(family, numbers, contract.prompt))
    differences += _unofficial(family, read_json(artefact.folder / CONFIG))
    if differences:
        warnings.warn(
            f"these weights were trained for {'; '.join(differences)}: the official code would give other scores. "
            f"`multitap import` reads {CONTRACT} and gives the same ones",
            ContractWarning,
            stacklevel=2,
        )
    return Path(out)


def read_contract(folder: Path) -> Contract | None:
    """The contract beside weights in the official layout, None where there is none.

    Raises:
      ArtefactError: unreadable, or edited.
    """
    path = folder / CONTRACT
    if not path.is_file():
        return None
    try:
        found = dict(json.loads(path.read_bytes())["contract"])
        stated = found.pop("hash", None)
        contract = from_config_dict(Contract, found, f"{path}: contract")
    except (ValueError, TypeError, KeyError, ConfigError) as error:
        raise ArtefactError(f"{path}: holds no contract ({error}); restore the file") from error
    if stated != canonical_hash(dataclasses.asdict(contract)):
        raise ArtefactError(f"{path}: the contract does not match its hash, it was edited; restore the file")
    return contract


def is_official(folder: Path) -> bool:
    """Whether a folder holds weights in this layout."""
    try:
        return any(name.startswith(PREFIX) for name in stored_tensors(folder))
    except WeightError:
        return False


def _described(contract: Contract) -> dict[str, dict[str, str]]:
    values = dataclasses.asdict(contract)
    return {"contract": {**values, "hash": canonical_hash(values)}}


def _differences(contract: Contract, official: Contract) -> list[str]:
    ours, theirs = dataclasses.asdict(contract), dataclasses.asdict(official)
    return [f"{name} {ours[name]} (official: {theirs[name]})" for name in ours if ours[name] != theirs[name]]


def _unofficial(family: Family, config: Mapping[str, Any]) -> list[str]:
    """Where a `config.json` is read otherwise than the official code computes (`Family.official`)."""
    return [
        f"{name} {config.get(name, 'by default')} (official: {value})"
        for name, value in family.official.items()
        if config.get(name) != value
    ]
