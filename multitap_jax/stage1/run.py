"""A stage-1 run from files to artefact: records -> packed datasets -> model on a mesh -> loop -> saved artefact."""

import json
import platform
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from rich.console import Console

from multitap_jax import __version__
from multitap_jax.config import ConfigError, TrainConfig, to_dict
from multitap_jax.data.pipeline import PackedDataset, prepare
from multitap_jax.data.processing import Contract, Processing
from multitap_jax.data.records import (
    Record,
    Rejected,
    check_rejected_share,
    load_records,
    split_by_group,
    write_rejected,
)
from multitap_jax.families import read_config
from multitap_jax.files import sole_writer
from multitap_jax.parallel.mesh import make_mesh, param_shardings
from multitap_jax.reward import RewardHead, RewardModel
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.scoring.manifest import MANIFEST, Overall
from multitap_jax.stage1.train import TrainResult, train
from multitap_jax.stage1.trainable import add_lora, merge_lora
from multitap_jax.weights.hub import load_backbone
from multitap_jax.weights.sources import locate


@dataclass(frozen=True)
class RunResult:
    """What a run left: the loop's result, and the artefact once all steps are done."""

    result: TrainResult
    artefact: Artefact | None

    @property
    def exit_code(self) -> int:
        """0 when finished, 143 when stopped by SIGTERM after saving."""
        return 0 if self.artefact is not None else 128 + signal.SIGTERM


def run_training(config: TrainConfig, workdir: str | Path) -> RunResult:
    """Runs (or resumes) stage 1 in `workdir` and saves `workdir/artefact` at the end.

    Raises:
      ConfigError, RecordsError, WeightError, ImageError, ...: with what is wrong and what to do.
      FolderInUseError: another run is writing into `workdir`.
    """
    with sole_writer(Path(workdir)):
        return _run(config, Path(workdir), Console(stderr=True))


def _run(config: TrainConfig, workdir: Path, console: Console) -> RunResult:
    if not config.model.checkpoint or not config.data.train:
        missing = "model.checkpoint" if not config.model.checkpoint else "data.train"
        raise ConfigError(f"config.{missing} is empty; give it as --config.{missing}=PATH")
    checkpoint = locate(config.model.checkpoint)
    base = checkpoint.folder
    mesh = make_mesh(config.mesh)
    processing = Processing.from_folder(base, _contract(config, base))
    rejected: list[Rejected] = []
    train_records, held_out = _records(config, rejected)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    model = _model(config, base, mesh)
    hidden = model.backbone.config.text.hidden_size
    dataset = _dataset(config, processing, train_records, hidden, rejected, cells=shards * config.accumulation)
    evaluation = (
        _dataset(config, processing, held_out, hidden, rejected, cells=shards, held_out=True) if held_out else None
    )
    write_rejected(workdir / "rejected.jsonl", rejected)
    console.print(
        f"{len(train_records)} training and {len(held_out)} held-out pairs, {len(rejected)} rejected; "
        f"{dataset.num_steps} steps of {config.batch_size} pairs as {dataset.shape}, one compiled shape, "
        f"{dataset.efficiency:.0%} of its tokens used"
    )
    result = train(config, workdir, model, dataset, evaluation, mesh=mesh)
    write_rejected(workdir / "rejected.jsonl", rejected)
    lost = len({r.id for r in rejected if r.line == 0})
    if lost:
        console.print(f"[bold]{lost} pictures broke while they were read[/]; their pairs did not count: rejected.jsonl")
    if not result.finished:
        return RunResult(result, None)
    provenance = _provenance(config, dataset)
    if (saved := _finished_before(workdir / "artefact", result, provenance)) is not None:
        console.print(f"{saved.folder} is from this run and stays as it is")
        return RunResult(result, saved)
    artefact = Artefact.save(
        workdir / "artefact",
        merge_lora(result.model),
        base=base,
        contract=processing.contract,
        overall=Overall(target=config.data.target, target_range=config.data.target_range),
        source=checkpoint.name,
        revision=checkpoint.revision,
        provenance=provenance,
        overwrite=True,
    )
    console.print(f"saved {artefact.folder}")
    return RunResult(result, artefact)


def _finished_before(folder: Path, result: TrainResult, provenance: dict[str, Any]) -> Artefact | None:
    """The artefact of an earlier end of this run, which may have ridge heads by now; None if there is none."""
    if result.steps_now or not (folder / MANIFEST).is_file():
        return None
    saved = Artefact.open(folder)
    return saved if saved.manifest.provenance == json.loads(json.dumps(provenance)) else None


def _contract(config: TrainConfig, base: Path) -> Contract:
    """The settings that the scores will depend on; "auto" takes the artefact's, else the family's."""
    saved = Artefact.open(base).manifest.contract if (base / MANIFEST).is_file() else None
    chosen = {"position_mode": config.model.position_mode, "image_policy": config.data.image_policy}
    kept = {name: getattr(saved, name) for name in chosen} if saved else {}
    chosen = {name: value for name, value in chosen.items() if value != "auto"}
    return Contract.of(read_config(base)[0], prompt=config.data.prompt, **{**kept, **chosen})


def _records(config: TrainConfig, rejected: list[Rejected]) -> tuple[list[Record], list[Record]]:
    def load(path: str) -> list[Record]:
        found = load_records(
            path,
            allow_outside_root=config.data.allow_outside_root,
            max_rejected=config.data.max_rejected,
            require=config.data.target,
        )
        rejected.extend(found.rejected)
        return list(found.records)

    records = load(config.data.train)
    if config.data.evaluation:
        return records, load(config.data.evaluation)
    if config.data.holdout <= 0:
        return records, []
    return split_by_group(records, config.data.holdout, config.seed)


def _dataset(
    config: TrainConfig,
    processing: Processing,
    records: list[Record],
    hidden: int,
    rejected: list[Rejected],
    *,
    cells: int,
    held_out: bool = False,
) -> PackedDataset:
    prepared = prepare(
        records,
        processing.prompter,
        processing.reader,
        processing.vision,
        target=config.data.target,
        target_range=config.data.target_range,
        max_length=config.data.max_length,
    )
    rejected.extend(prepared.rejected)
    source = (config.data.evaluation if held_out else "") or config.data.train
    check_rejected_share(Path(source), len(prepared.examples), prepared.rejected, config.data.max_rejected)
    return PackedDataset(
        prepared,
        processing.reader,
        processing.vision,
        hidden=hidden,
        batch_size=max(config.batch_size // config.accumulation, 1) if held_out else config.batch_size,
        epochs=1 if held_out else config.epochs,
        seed=config.seed,
        shuffle="none" if held_out else config.data.shuffle,
        row_length=config.data.row_length,
        cells=cells,
        # A picture has no line of its own; its records are named by the loop's log, the picture by its path.
        on_failure=lambda path, reason: rejected.append(Rejected(0, path, reason)),
    )


def _model(config: TrainConfig, base: Path, mesh: jax.sharding.Mesh) -> RewardModel:
    """Backbone and head on the mesh: an artefact keeps its trained head, a plain model gets a new one."""
    if (base / MANIFEST).is_file():
        _, model, _ = Artefact.load(base, shardings=lambda backbone: param_shardings(backbone, mesh))
    else:
        backbone = load_backbone(base, shardings=lambda backbone: param_shardings(backbone, mesh))
        model = RewardModel(backbone, RewardHead(backbone.config.text.hidden_size, rngs=nnx.Rngs(config.seed)))
    if config.trainable.parts == "lora":
        add_lora(model, config.trainable, nnx.Rngs(config.seed + 1))
    return jax.device_put(model, param_shardings(model, mesh))


def _provenance(config: TrainConfig, dataset: PackedDataset) -> dict[str, Any]:
    return {
        "config": to_dict(config),
        "data": dataset.fingerprint,
        "steps": dataset.num_steps,
        "versions": {"multitap_jax": __version__, "jax": jax.__version__, "python": platform.python_version()},
    }
