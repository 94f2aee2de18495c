"""The same artefact elsewhere, in the same or another type."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp

from multitap_jax.files import new_folder
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.scoring.exports.common import copy_carried, replaceable
from multitap_jax.scoring.manifest import HEADS, MANIFEST
from multitap_jax.weights.files import INDEX, weight_files


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
        return _convert(folder, out, dtype, overwrite)
    artefact = Artefact.open(folder).verify()
    with new_folder(Path(out), replaceable=replaceable(overwrite, MANIFEST)) as new:
        copy_carried(artefact.folder, new)
        weights = weight_files(artefact.folder)
        for name in [*weights, *([INDEX] if len(weights) > 1 else []), MANIFEST]:
            shutil.copyfile(artefact.folder / name, new / name)
        shutil.copyfile(artefact.heads_file(), new / HEADS)
        Artefact.open(new).verify()
    return Artefact.open(out)


def _convert(folder: str | Path, out: str | Path, dtype: jax.typing.DTypeLike, overwrite: bool) -> Artefact:
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
        seen=artefact.seen(),
        provenance={**manifest.provenance, "converted": converted},
        dtype=dtype,
        overwrite=overwrite,
    )
