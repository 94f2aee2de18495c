"""`multitap.json`: what a saved model needs to know about itself to give the same scores again (DESIGN 3.6)."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from multitap_jax.config import ConfigError, from_config_dict
from multitap_jax.data.processing import Contract
from multitap_jax.files import canonical_hash

FORMAT_VERSION = 1
MANIFEST = "multitap.json"
HEADS = "heads.safetensors"


class ArtefactError(ValueError):
    """A folder that cannot be used as an artefact; the message names the file and the remedy."""


@dataclasses.dataclass(frozen=True)
class Overall:
    """The reward head's score: its range, and the values of which target were mapped to 0 and 1 in training."""

    range: tuple[float, float] = (0.0, 1.0)
    target: str = "score"
    target_range: tuple[float, float] = (0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Objective:
    """One output of the ridge head, in the units of the ratings it was fitted to.

    Attributes:
      name: as in the records' `ratings`.
      range: the values the ratings may take; a prediction may leave it.
      higher_is_better: direction.
      alpha: the ridge penalty chosen, None where unknown.
      cv_score: the cross-validated score of that penalty, None where unknown.
    """

    name: str
    range: tuple[float, float]
    higher_is_better: bool = True
    alpha: float | None = None
    cv_score: float | None = None


@dataclasses.dataclass(frozen=True)
class BackboneSource:
    """Where the backbone came from."""

    model_type: str
    source: str = ""
    revision: str = ""


@dataclasses.dataclass(frozen=True)
class Hashes:
    """sha256 over the backbone's tensors, the heads' tensors, and the bytes of the files beside them."""

    model: str
    heads: str
    files: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of `multitap.json`.

    Attributes:
      contract, overall, objectives, backbone, hashes: see their classes.
      ridge: `RidgeHead.metadata()`, or None where there is no ridge head.
      provenance: configuration, fingerprint of the records, versions, steps: anything JSON.
    """

    contract: Contract
    backbone: BackboneSource
    hashes: Hashes
    overall: Overall = Overall()
    objectives: tuple[Objective, ...] = ()
    ridge: dict[str, Any] | None = None
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """sha256 over all that decides a score: contract, weights, heads, tokenizer and processor files."""
        return canonical_hash([dataclasses.asdict(self.contract), dataclasses.asdict(self.hashes)])

    @property
    def embedding_hash(self) -> str:
        """sha256 over all that decides an embedding: as `fingerprint`, without the heads."""
        hashes = {"model": self.hashes.model, "files": self.hashes.files}
        return canonical_hash([dataclasses.asdict(self.contract), hashes])

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, the contract with its hash beside it."""
        contract = dataclasses.asdict(self.contract)
        return {
            "format_version": FORMAT_VERSION,
            "contract": {**contract, "hash": canonical_hash(contract)},
            "overall": dataclasses.asdict(self.overall),
            "objectives": [dataclasses.asdict(objective) for objective in self.objectives],
            "ridge": self.ridge,
            "backbone": dataclasses.asdict(self.backbone),
            "hashes": dataclasses.asdict(self.hashes),
            "provenance": self.provenance,
        }


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks `multitap.json`.

    Raises:
      ArtefactError: unreadable, of a newer format, incomplete, or with a contract that does not match its hash.
    """
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_bytes())
    except ValueError as error:
        raise ArtefactError(f"{path}: not valid JSON ({error}); restore the file from the original artefact") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if not isinstance(version, int):
        raise ArtefactError(f"{path}: format_version is missing; restore the file from the original artefact")
    if version > FORMAT_VERSION:
        raise ArtefactError(
            f"{path}: format_version {version} is newer than {FORMAT_VERSION}, the newest this version of multitap_jax "
            "reads; upgrade multitap_jax, or export the artefact again with this version"
        )
    contract = dict(_section(raw, "contract", path))
    stated = contract.pop("hash", None)
    if stated != canonical_hash(contract):
        raise ArtefactError(
            f"{path}: the contract {contract} does not match its hash {stated}: it was edited, and these weights were "
            "not trained for it. Restore the file, or train with the wanted setting and save again"
        )
    try:
        return Manifest(
            contract=from_config_dict(Contract, contract, f"{path}: contract"),
            overall=from_config_dict(Overall, _section(raw, "overall", path), f"{path}: overall"),
            objectives=_objectives(raw.get("objectives", []), path),
            ridge=raw.get("ridge"),
            backbone=from_config_dict(BackboneSource, _section(raw, "backbone", path), f"{path}: backbone"),
            hashes=Hashes(**_section(raw, "hashes", path)),
            provenance=raw.get("provenance", {}),
        )
    except (ConfigError, TypeError) as error:
        raise ArtefactError(f"{path}: {error}; restore the file from the original artefact") from error


def check_objectives(objectives: Sequence[Objective]) -> None:
    """Raises ArtefactError for a name given twice or a range that is none."""
    names = [objective.name for objective in objectives]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ArtefactError(f"objectives named twice: {', '.join(twice)}; every objective needs its own name")
    for objective in objectives:
        low, high = objective.range
        if not low <= high:
            raise ArtefactError(f"objective {objective.name}: range {low}..{high} is empty; give [lowest, highest]")


def _section(raw: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    section = raw.get(name)
    if not isinstance(section, dict):
        raise ArtefactError(f"{path}: section {name} is missing; restore the file from the original artefact")
    return section


def _objectives(raw: Any, path: Path) -> tuple[Objective, ...]:
    objectives = []
    for index, item in enumerate(raw):
        values = {key: value for key, value in dict(item).items() if value is not None}
        objectives.append(from_config_dict(Objective, values, f"{path}: objectives[{index}]"))
    check_objectives(objectives)
    return tuple(objectives)
