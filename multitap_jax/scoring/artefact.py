"""One saved thing: backbone, heads, tokenizer, image processor and the contract they were trained under (DESIGN 3.6).

A folder that three worlds read: transformers (`config.json`, `model*.safetensors` with hub names, tokenizer and
processor files), NumPy (`heads.safetensors`), and this package (`multitap.json`). It is written whole or not at all,
and what it says about itself is checked when it is read.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save as tensors_to_bytes

from multitap_jax.backbones.layers import check_not_rounded
from multitap_jax.data.processing import Contract
from multitap_jax.data.seen import FITTED, Seen, from_arrays, is_seen, to_arrays
from multitap_jax.families import read_config
from multitap_jax.files import file_hash, json_bytes, write_atomic
from multitap_jax.parallel.distributed import barrier, is_main_process, whole
from multitap_jax.reward import RewardHead, RewardModel
from multitap_jax.scoring.manifest import (
    HEADS,
    MANIFEST,
    ArtefactError,
    Manifest,
    Objective,
    Overall,
    read_manifest,
)
from multitap_jax.scoring.saving import (
    CONFIG,
    Contents,
    check_same_model,
    checked_objectives,
    head_arrays,
    write_artefact,
)
from multitap_jax.stage2.head import RidgeHead
from multitap_jax.weights.files import stored_tensors
from multitap_jax.weights.hashing import ReadAlong, file_tensor_hash, folder_hash
from multitap_jax.weights.hub import export_tensors, load_backbone, save_backbone, unused_tensors
from multitap_jax.weights.sources import local_folder
from multitap_jax.weights.stored import read_header


@dataclasses.dataclass(frozen=True)
class Artefact:
    """A saved model's folder and what its `multitap.json` says.

    Attributes:
      folder: where it is.
      manifest: contract, objectives, hashes, provenance.
    """

    folder: Path
    manifest: Manifest

    @property
    def model_hash(self) -> str:
        """sha256 over names, dtypes, shapes and values of the backbone's tensors."""
        return self.manifest.hashes.model

    @property
    def embedding_hash(self) -> str:
        """sha256 over all that decides an embedding."""
        return self.manifest.embedding_hash

    @property
    def fingerprint(self) -> str:
        """sha256 over all that decides a score."""
        return self.manifest.fingerprint

    @property
    def hidden_size(self) -> int:
        """H of the backbone."""
        return int(read_config(self.folder)[1].text.hidden_size)

    @classmethod
    def open(cls, folder: str | Path) -> "Artefact":
        """Reads the manifest and checks the files beside it against their hashes; weights are left alone.

        `folder` may name a repository of the hub, hub:OWNER/NAME (`weights/sources.py`).

        Raises:
          SourceError: the hub's repository is not to be had.
          ArtefactError: no artefact, or one that was edited, cut off, or made by a newer version.
        """
        folder = local_folder(folder)
        _check_is_artefact(folder)
        manifest = read_manifest(folder)
        wrong = [
            f"{name}: {'missing' if not (folder / name).is_file() else 'content changed'}"
            for name, stated in manifest.hashes.files.items()
            if not (folder / name).is_file() or file_hash(folder / name) != stated
        ]
        if wrong:
            raise ArtefactError(
                f"{folder}: files differ from those saved ({'; '.join(wrong)}), so scores would too; restore them from "
                "the original artefact"
            )
        return cls(folder, manifest)

    @classmethod
    def save(
        cls,
        folder: str | Path,
        model: RewardModel,
        *,
        base: str | Path,
        contract: Contract,
        overall: Overall | None = None,
        ridge: RidgeHead | None = None,
        objectives: Sequence[Objective] = (),
        source: str = "",
        revision: str = "",
        provenance: Mapping[str, Any] | None = None,
        seen: Mapping[str, Seen] | None = None,
        dtype: jax.typing.DTypeLike | None = None,
        overwrite: bool = False,
    ) -> "Artefact":
        """Writes an artefact: whole, or not at all. All processes of a run must call it; the first one writes.

        Args:
          folder: where to; must be empty or absent, or, with `overwrite`, hold an artefact.
          model: backbone and reward head.
          base: folder whose `config.json`, tokenizer, processor and tensors without use for a score go along.
          contract: what turns a pair into tokens, positions and pixels.
          overall: the target the reward head was trained on.
          ridge: heads of the objectives, with `objectives` describing them in the same order.
          source, revision: the backbone's origin, for people.
          provenance: anything JSON: configuration, fingerprint of the records, versions, steps.
          seen: the records that weights and heads have seen (`data/seen.py`), by who has.
          dtype: of the backbone's tensors on disk, None for that of the parameters; heads are float32 always.

        Raises:
          FileExistsError: the folder is in the way.
          ArtefactError: `base` describes another model; ridge head and objectives do not fit each other; NaN in a head.
        """
        check_not_rounded(model, "saved")
        base = Path(base)
        check_same_model(model, base)
        head = RewardHead.from_arrays(whole(model.head.weight[...]), whole(model.head.bias[...]))
        if not is_main_process():
            for _ in export_tensors(model.backbone):  # its part in bringing each tensor together
                pass
            barrier("artefact")
            return cls.open(folder)

        def write_weights(new: Path) -> None:
            save_backbone(model.backbone, new, dtype=dtype, extra=unused_tensors(base))

        contents = Contents(
            head=head,
            ridge=ridge,
            objectives=objectives,
            config=base,
            companions=base,
            contract=contract,
            overall=overall or Overall(),
            source=source or base.name,
            revision=revision,
            provenance=provenance or {},
            seen=seen or {},
        )
        manifest = write_artefact(Path(folder), contents, write_weights, overwrite=overwrite)
        barrier("artefact")
        return cls(Path(folder), manifest)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        *,
        shardings: Any = None,
        verify_weights: bool = True,
    ) -> tuple["Artefact", RewardModel, RidgeHead | None]:
        """Reads an artefact, or says why not; nothing is ever filled in.

        Args:
          folder: an artefact.
          param_dtype: of the backbone's parameters in memory; heads are float32 always.
          shardings: where the backbone's parameters go, as `load_backbone` takes it.
          verify_weights: compare the weights with their hash, taken while they are read.

        Raises:
          ArtefactError: not an artefact, edited, cut off, of a newer format.
          WeightError: weights missing or of another shape; all of them are listed.
        """
        artefact = cls.open(folder)
        head, ridge = artefact.load_heads()
        # A process of several reads only its own part of the weights, so there the hash takes a pass of its own.
        along = ReadAlong(artefact.folder) if verify_weights and jax.process_count() == 1 else None
        backbone = load_backbone(artefact.folder, param_dtype=param_dtype, shardings=shardings, on_read=along)
        if along is not None:
            artefact._check_model_hash(along.result())
        elif verify_weights:
            artefact.verify()
        return artefact, RewardModel(backbone, head), ridge

    def verify(self) -> "Artefact":
        """Itself, after reading all weights and comparing them with their hash; raises ArtefactError."""
        self._check_model_hash(folder_hash(self.folder))
        return self

    def _check_model_hash(self, found: str) -> None:
        if found != self.model_hash:
            raise ArtefactError(
                f"{self.folder}: the weights in model*.safetensors are not those that were saved; restore them from "
                "the original artefact, or save them as a new one with Artefact.save"
            )

    def heads_file(self) -> Path:
        """The file whose tensors are the heads the manifest speaks of; raises ArtefactError where none is."""
        return _heads_file(self.folder, self.manifest.hashes.heads)

    def load_heads(self) -> tuple[RewardHead, RidgeHead | None]:
        """The reward head and the ridge head, checked against hash and shapes.

        Raises:
          ArtefactError: edited, missing or mis-shaped; all of it is listed.
        """
        arrays = self.head_arrays()
        head = RewardHead.from_arrays(arrays["reward_head.weight"][0], arrays["reward_head.bias"][0])
        if self.manifest.ridge is None:
            return head, None
        ridge = {name: array for name, array in arrays.items() if name.startswith("ridge.")}
        return head, RidgeHead.from_arrays(ridge, self.manifest.ridge)

    def head_arrays(self) -> dict[str, np.ndarray]:
        """reward_head.weight float32[1, H], .bias [1]; if fitted, ridge.coef float32[T, H], .intercept, .alpha [T]."""
        path = self.heads_file()
        arrays = {name: tensor.read() for name, tensor in read_header(path).items() if not is_seen(name)}
        hidden = self.hidden_size
        targets = len(self.manifest.objectives)
        expected = {"reward_head.weight": (1, hidden), "reward_head.bias": (1,)}
        if self.manifest.ridge is not None:
            expected |= {"ridge.coef": (targets, hidden), "ridge.intercept": (targets,), "ridge.alpha": (targets,)}
        wrong = [
            f"{name}: {arrays[name].shape if name in arrays else 'missing'}, expected {shape}"
            for name, shape in expected.items()
            if name not in arrays or arrays[name].shape != shape
        ]
        if wrong:
            raise ArtefactError(f"{path}: {'; '.join(wrong)}; restore the file, or train and save the heads again")
        return arrays

    def seen(self) -> dict[str, Seen]:
        """The records that weights ("trained") and ridge head ("fitted") have seen, as far as it was noted."""
        stored = read_header(self.heads_file())
        return from_arrays({name: tensor.read() for name, tensor in stored.items() if is_seen(name)})

    def add_ridge(self, head: RidgeHead, objectives: Sequence[Objective], seen: Seen | None = None) -> "Artefact":
        """Writes a ridge head into the folder in place of the one there, if any; weights and reward head stay.

        `seen` are the records that the head was fitted on, None where they are not known. A crash at any point leaves
        the old heads or the new ones, whole: the new heads wait under another name until the manifest, replaced in one
        step, asks for them.
        """
        reward, _ = self.load_heads()
        known = {who: records for who, records in self.seen().items() if who != FITTED}
        known |= {} if seen is None else {FITTED: seen}
        data = tensors_to_bytes(head_arrays(reward, head) | to_arrays(known))
        waiting = _waiting(self.folder)
        write_atomic(waiting, data)
        manifest = dataclasses.replace(
            self.manifest,
            objectives=checked_objectives(head, objectives),
            ridge=head.metadata(),
            hashes=dataclasses.replace(self.manifest.hashes, heads=file_tensor_hash(waiting)),
        )
        write_atomic(self.folder / MANIFEST, json_bytes(manifest.to_json()))
        waiting.replace(self.folder / HEADS)
        return Artefact(self.folder, manifest)


def _check_is_artefact(folder: Path) -> None:
    if (folder / MANIFEST).is_file():
        return
    if not folder.is_dir():
        raise ArtefactError(
            f"{folder}: no such folder; give that of a saved model, as `multitap train` leaves in artefact/"
        )
    if not (folder / CONFIG).is_file():
        inside = folder / "artefact"
        where = (
            f"{inside}, which is one"
            if (inside / MANIFEST).is_file()
            else "the folder that training or an export wrote"
        )
        raise ArtefactError(
            f"{folder}: neither {MANIFEST} nor {CONFIG} is here, so this is no saved model; give {where}"
        )
    if any(name.startswith(("backbone_model.", "reward_head.")) for name in stored_tensors(folder)):
        raise ArtefactError(
            f"{folder}: weights in the official layout, without {MANIFEST}; turn them into an artefact first: "
            f"multitap import --checkpoint={folder} --base=FOLDER_OF_THE_BACKBONE --output=ARTEFACT"
        )
    raise ArtefactError(
        f"{folder}: a backbone without a reward head ({MANIFEST} is not here), so it cannot score. Train one: "
        f"multitap train --config=configs/official.py --config.model.checkpoint={folder}"
    )


def _waiting(folder: Path) -> Path:
    return folder / f".{HEADS}.new"


def _heads_file(folder: Path, stated: str) -> Path:
    """The heads the manifest speaks of: in their place, or waiting for it after a crash (see `add_ridge`)."""
    present = [path for path in (folder / HEADS, _waiting(folder)) if path.is_file()]
    if not present:
        raise ArtefactError(
            f"{folder / HEADS}: not here, and no head is ever random; restore it from the original artefact"
        )
    for path in present:
        if file_tensor_hash(path) == stated:
            return path
    raise ArtefactError(
        f"{folder / HEADS}: was edited or damaged (its sha256 is not that of {MANIFEST}); restore it from the original "
        "artefact, or train and save the heads again"
    )
