"""Weights in the official layout as an artefact; bytes are copied, one tensor in memory at a time."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from multitap_jax.data.layouts import ImagePolicy
from multitap_jax.data.processing import Contract, Processing
from multitap_jax.data.prompts import check_variant
from multitap_jax.families import Family, read_config
from multitap_jax.reward import RewardHead
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.scoring.exports.official import HEAD, PREFIX, official_contract, read_contract
from multitap_jax.scoring.manifest import MANIFEST, ArtefactError
from multitap_jax.scoring.saving import CONFIG, Contents, companion_files, write_artefact
from multitap_jax.weights.files import read_json, scan_tensors
from multitap_jax.weights.finite import FiniteCheck, all_finite
from multitap_jax.weights.hashing import folder_hash
from multitap_jax.weights.hub import backbone_tensors
from multitap_jax.weights.mapping import DTYPES_IN_WORDS, WEIGHT_DTYPES
from multitap_jax.weights.sources import Source, locate
from multitap_jax.weights.stored import FolderError, Stored
from multitap_jax.weights.writer import write_folder

T = TypeVar("T")
_BASE = "give the backbone's own folder: --base=FOLDER"


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
      ArtefactError: files, folders or tensors that are missing, broken or mis-shaped, no tokenizer, no reward head. All
        of it is listed.
      WeightError: NaN or infinity among the weights.
      FileExistsError: `out` is in the way.
    """
    chosen = {"prompt": prompt, "position_mode": position_mode, "image_policy": image_policy}
    parts = _parts(checkpoint, base, {name: value for name, value in chosen.items() if value != "auto"})
    folder, backbone = parts.source.folder, parts.backbone
    contents = Contents(
        head=parts.head,
        config=parts.config,
        companions=parts.companions,
        contract=parts.contract,
        source=parts.source.name,
        revision=parts.source.revision,
        provenance={"imported": {"layout": "official", "model_hash": folder_hash(folder)}},
        entries=parts.entries,
    )

    def write_weights(new: Path) -> None:
        headers, finite = {key: (tensor.shape, tensor.dtype) for key, tensor in backbone.items()}, FiniteCheck()
        write_folder(new, headers, _values(backbone, finite), max_shard_bytes)
        finite.judge(folder)

    def check(new: Path) -> None:
        # Tokenizer and configuration belong together, or nothing is written.
        Processing.from_folder(new, parts.contract)

    manifest = write_artefact(Path(out), contents, write_weights, check=check, overwrite=overwrite)
    return Artefact(Path(out), manifest)


def _values(tensors: Mapping[str, Stored], finite: FiniteCheck) -> Iterator[tuple[str, np.ndarray]]:
    for key, tensor in tensors.items():
        value = tensor.read()
        finite(tensor, value)
        yield key, value


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What an import needs, checked.

    Attributes:
      source: the checkpoint.
      config, companions: the folders that config.json, and tokenizer and processor, come from.
      contract: how the weights were trained.
      entries: of config.json that say so too (`Family.official`), unless a contract beside the weights does.
      head: the reward head.
      backbone: hub key -> tensor.
    """

    source: Source
    config: Path
    companions: Path
    contract: Contract
    entries: Mapping[str, Any]
    head: RewardHead
    backbone: Mapping[str, Stored]


def _parts(checkpoint: str | Path, base: str | Path | None, chosen: Mapping[str, str]) -> _Parts:
    """Everything that an import needs, or an ArtefactError that lists everything that is wrong."""
    problems: list[str] = []
    tensors: Mapping[str, Stored] = {}
    whole, head, backbone, contract, settings = False, None, None, None, None
    source = _tried(problems, lambda: locate(checkpoint))
    named = source if base is None else _tried(problems, lambda: locate(base))
    folders = [place.folder for place in (source, named) if place]
    present = [folder for folder in folders if (folder / CONFIG).is_file()]
    config = next((folder for folder in present if _names_a_model(folder)), next(iter(present), None))
    if source:
        tensors, whole = _tensors(source.folder, problems)
    if config:
        settings = _tried(problems, lambda: read_config(config))
    elif folders:
        problems.append(f"no {CONFIG} in {' or '.join(map(str, dict.fromkeys(folders)))}; {_BASE}")
    if source and settings:
        contract = _tried(problems, lambda: _contract(source.folder, *settings, chosen))
    if tensors:
        head = _head(tensors, settings[1].text.hidden_size if settings else None, whole, problems)
    if source and settings and whole:
        backbone = _tried(problems, lambda: backbone_tensors(source.folder, config_folder=config, prefix=PREFIX))
    if named and not any(path.name.startswith(("tokenizer", "vocab")) for path in companion_files(named.folder)):
        problems.append(f"{named.folder} has no tokenizer; {_BASE}")
    if problems or not (source and config and named and contract and head and backbone):
        raise ArtefactError(f"{checkpoint} cannot be imported:\n  " + "\n  ".join(problems))
    entries = settings[0].official if settings and read_contract(source.folder) is None else {}
    return _Parts(source, config, named.folder, contract, entries, head, backbone)


def _names_a_model(folder: Path) -> bool:
    """Whether a folder's config.json says what its model is; the official code's own, of its reward model, need not."""
    try:
        return bool(read_json(folder / CONFIG).get("model_type"))
    except FolderError:
        return True  # whoever reads it says what is wrong


def _tried(problems: list[str], call: Callable[[], T]) -> T | None:
    """What `call` gives; or None, and what it says in `problems`."""
    try:
        return call()
    except (ValueError, OSError) as error:
        problems.append(str(error))
        return None


def _tensors(folder: Path, problems: list[str]) -> tuple[Mapping[str, Stored], bool]:
    """The tensors that can be read, and whether these are all.

    Raises:
      ArtefactError: weights that are of another kind altogether; nothing else need be said of them.
    """
    if (folder / MANIFEST).is_file():
        raise ArtefactError(f"{folder}: is an artefact already; `multitap export` copies it")
    scanned = _tried(problems, lambda: scan_tensors(folder))
    if scanned is None:
        return {}, False
    tensors, broken = scanned
    problems += broken
    if not broken and not any(name.startswith((PREFIX, "reward_head.")) for name in tensors):
        raise ArtefactError(
            f"{folder}: a backbone without a reward head: no {PREFIX}* and no reward_head.* is in its files, and no "
            "head is ever random. Give a trained reward model, or train one: "
            f"multitap train --config=configs/official.py --config.model.checkpoint={folder}"
        )
    return tensors, not broken


def _contract(folder: Path, family: Family, config: Any, chosen: Mapping[str, str]) -> Contract:
    saved = read_contract(folder) or official_contract(family, config)
    contract = dataclasses.replace(saved, **chosen)
    check_variant(contract.prompt)
    family.layout(config, ImagePolicy.parse(contract.image_policy))  # before anything is copied
    return contract


def _head(tensors: Mapping[str, Stored], hidden: int | None, whole: bool, problems: list[str]) -> RewardHead | None:
    """The reward head, or None and why not in `problems`.

    Args:
      hidden: H, None where no configuration says it.
      whole: whether all tensors are known, so that one that is not there is missing.
    """
    values: dict[str, np.ndarray] = {}
    wrong = [f"unknown: {name}" for name in tensors if not name.startswith(PREFIX) and name not in HEAD]
    for name, shape in zip(HEAD, ((1, hidden), (1,)), strict=True):
        expected = str(["H" if size is None else size for size in shape]).replace("'", "")
        if name in tensors:
            found = tensors[name]
            same = len(found.shape) == len(shape) and all(
                a in (None, b) for a, b in zip(shape, found.shape, strict=True)
            )
            if not same or found.dtype.name not in WEIGHT_DTYPES:
                wrong.append(
                    f"{name}: {list(found.shape)} {found.dtype.name}, expected {expected} of {DTYPES_IN_WORDS}"
                )
                continue
            values[name] = found.read()
            if not all_finite(values[name]):
                wrong.append(f"{name}: holds NaN or infinity; take a checkpoint from before its training failed")
        elif whole:
            wrong.append(f"{name}: missing, expected {expected}")
    problems += wrong
    if wrong or not whole:
        return None
    weight, bias = (values[name].astype(np.float32) for name in HEAD)
    return RewardHead.from_arrays(weight[0], bias[0])
