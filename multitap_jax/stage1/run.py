"""A stage-1 run from files to artefact: records -> packed datasets -> model on a mesh -> loop -> saved artefact."""

import contextlib
import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from rich.console import Console
from rich.markup import escape

from multitap_jax.config import COMPARING, ConfigError, TrainConfig, dotted
from multitap_jax.data.decode import ImageError
from multitap_jax.data.pipeline import PackedDataset
from multitap_jax.data.prepare import Prepared, prepare
from multitap_jax.data.processing import Contract, Processing
from multitap_jax.data.records import Record, Rejected, iter_records, split_by_group
from multitap_jax.data.seen import TRAINED, Seen, told
from multitap_jax.data.tables import REJECTED_NAME, find_records_file
from multitap_jax.families import read_config
from multitap_jax.files import sole_writer
from multitap_jax.parallel.distributed import agree, from_main, is_main_process
from multitap_jax.parallel.host import keep_compiled_programs
from multitap_jax.parallel.mesh import batch_shards, make_mesh, own_shards, param_shardings
from multitap_jax.reward import RewardHead, RewardModel
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.scoring.manifest import MANIFEST, Overall
from multitap_jax.scoring.progress import progress_bar
from multitap_jax.stage1.loop import explained_sigterm
from multitap_jax.stage1.mixture import Origin, training_records
from multitap_jax.stage1.record import provenance
from multitap_jax.stage1.rejects import FLAGS, Rejects
from multitap_jax.stage1.train import CHECKPOINTS, TrainResult, train
from multitap_jax.stage1.trainable import add_lora, merge_lora
from multitap_jax.weights.hub import load_backbone
from multitap_jax.weights.sources import Source, locate


@dataclasses.dataclass(frozen=True)
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
      CheckpointError: the run in `workdir` is another one; also where its branch of the hub has moved meanwhile.
      FolderInUseError: another run is writing into `workdir`.
    """
    main = is_main_process()
    with sole_writer(Path(workdir)) if main else contextlib.nullcontext(), explained_sigterm():
        return _run(config, Path(workdir), Console(stderr=True, quiet=not main))


def _run(config: TrainConfig, workdir: Path, console: Console) -> RunResult:
    given = {"model.checkpoint": config.model.checkpoint, "data.train": config.data.train}
    if missing := [name for name, value in given.items() if not value]:
        raise ConfigError("\n".join(f"config.{name} is empty; give it as --config.{name}=PATH" for name in missing))
    keep_compiled_programs(config.compilation_cache)
    checkpoint = locate(config.model.checkpoint)
    base = checkpoint.folder
    # A branch of the hub may move while a run is stopped: what is recorded, and compared, is the commit.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, checkpoint=checkpoint.address))
    agree(dotted(config))
    mesh = make_mesh(config.mesh)
    processing = Processing.from_folder(base, _contract(config, base))
    rejects = Rejects(
        workdir / REJECTED_NAME,
        config.data.max_rejected,
        resumed=any((workdir / CHECKPOINTS).glob("[0-9]*")),
        process=jax.process_index(),
    )
    train_records, held_out, origins = _records(config, rejects)
    model = _model(config, base, mesh)
    model.backbone.config.text.check_length(config.data.max_length)
    common = config, processing, rejects, model.backbone.config.text.hidden_size, mesh
    prepared = _prepared(config, processing, rejects, train_records, origins[0])
    dataset, seen = _dataset(*common, prepared, origins[0], config.accumulation), Seen.of(prepared.prints)
    evaluation = None
    if held_out:
        prepared = _prepared(config, processing, rejects, held_out, origins[1], held_out=True)
        for sentence in told({TRAINED: seen}, prepared.ids, prepared.prints):
            console.print(f"[bold]held-out pairs:[/] {escape(sentence)}")
        evaluation = _dataset(*common, prepared, origins[1], held_out=True)
    console.print(
        f"{len(train_records)} training and {len(held_out)} held-out pairs, {len(rejects)} rejected; "
        f"{dataset.num_steps} steps of {config.batch_size} pairs, each packed into {dataset.shape}; "
        f"{dataset.efficiency:.0%} of the tokens are used"
    )
    before = len(rejects)

    def check(step: int, last: bool = False) -> None:
        if last or step % config.log_every == 0:
            rejects.exchange()
        rejects.judge()

    result = train(config, workdir, model, dataset, evaluation, mesh=mesh, check=check)
    check(result.step, last=True)
    if lost := len(rejects) - before:
        console.print(f"[bold]{lost} records lost their picture during the run[/] and did not count: {REJECTED_NAME}")
    if not result.finished:
        return RunResult(result, None)
    origin = provenance(config, dataset.fingerprint, dataset.num_steps)
    if from_main(_finished_before(workdir / "artefact", result, origin)):
        console.print(f"{workdir / 'artefact'} is from this run and stays as it is")
        return RunResult(result, Artefact.open(workdir / "artefact"))
    artefact = _saved(config, workdir / "artefact", checkpoint, processing.contract, result, origin, seen)
    console.print(f"saved {artefact.folder}")
    return RunResult(result, artefact)


def _saved(
    config: TrainConfig,
    folder: Path,
    checkpoint: Source,
    contract: Contract,
    result: TrainResult,
    origin: dict[str, Any],
    seen: Seen,
) -> Artefact:
    """The artefact of a run; where it began with an artefact, its model has seen the records of that one, too."""
    base = checkpoint.folder
    before = Artefact.open(base).seen().get(TRAINED) if (base / MANIFEST).is_file() else None
    return Artefact.save(
        folder,
        merge_lora(result.model),
        base=base,
        contract=contract,
        overall=Overall(target=config.data.target, target_range=config.data.target_range),
        source=checkpoint.name,
        revision=checkpoint.revision,
        provenance=origin,
        seen={TRAINED: seen if before is None else before | seen},
        overwrite=True,
    )


def _finished_before(folder: Path, result: TrainResult, origin: dict[str, Any]) -> bool:
    """Whether there is an artefact of an earlier end of this run, which may have ridge heads by now."""
    if result.steps_now or not (folder / MANIFEST).is_file():
        return False
    return Artefact.open(folder).manifest.provenance == json.loads(json.dumps(origin))


def _contract(config: TrainConfig, base: Path) -> Contract:
    """The settings that the scores will depend on; "auto" takes the artefact's, else the family's."""
    saved = Artefact.open(base).manifest.contract if (base / MANIFEST).is_file() else None
    chosen = {"position_mode": config.model.position_mode, "image_policy": config.data.image_policy}
    kept = {name: getattr(saved, name) for name in chosen} if saved else {}
    chosen = {name: value for name, value in chosen.items() if value != "auto"}
    return Contract.of(read_config(base)[0], prompt=config.data.prompt, **{**kept, **chosen})


def _records(config: TrainConfig, rejects: Rejects) -> tuple[list[Record], list[Record], tuple[Origin, Origin]]:
    """Training and held-out records, and for both the file that each id is from."""

    def load(file: Path) -> list[Record]:
        items = list(
            iter_records(
                file,
                allow_outside_root=config.data.allow_outside_root,
                require=config.data.target,
                flags=FLAGS,
            )
        )
        rejects.open(file, len(items))
        rejects.add(file, [item for item in items if isinstance(item, Rejected)])
        rejects.judge()
        return [item for item in items if isinstance(item, Record)]

    records, origin = training_records(config.data, config.seed, load)
    if config.data.evaluation:
        held_out = load(file := find_records_file(config.data.evaluation))
        return records, held_out, (origin, {record.id: file for record in held_out})
    if config.data.holdout <= 0:
        return records, [], (origin, origin)
    return *split_by_group(records, config.data.holdout, config.seed), (origin, origin)


def _prepared(
    config: TrainConfig,
    processing: Processing,
    rejects: Rejects,
    records: list[Record],
    origin: Origin,
    *,
    held_out: bool = False,
) -> Prepared:
    """Encoded pairs; what is wrong with a record is found here."""
    files = -(-len({path for record in records for path in record.images}) // jax.process_count())  # of this process
    label = f"checking {'held-out' if held_out else 'training'} pictures"
    with progress_bar(files, enabled=is_main_process(), label=label, unit="pictures") as advance:
        prepared = prepare(
            records,
            processing.prompter,
            processing.reader,
            processing.vision,
            target=config.data.target,
            target_range=config.data.target_range,
            max_length=config.data.max_length,
            advance=advance,
        )
    rejects.add_from(origin, prepared.rejected)
    rejects.judge()
    return prepared


def _dataset(
    config: TrainConfig,
    processing: Processing,
    rejects: Rejects,
    hidden: int,
    mesh: jax.sharding.Mesh,
    prepared: Prepared,
    origin: Origin,
    accumulation: int = 1,
    *,
    held_out: bool = False,
) -> PackedDataset:
    own = own_shards(mesh)
    shared = len(own) * jax.process_count() > batch_shards(mesh)

    def lost(broken: list[Rejected]) -> None:
        rejects.add_from(origin, broken, by_all=False)
        if shared:  # the others would go on with what this process leaves out
            raise ImageError(
                f"{broken[0].reason} (record {broken[0].id}); config.mesh.tensor gives its row to others, too, "
                "which may have read it: put the picture right, and give all processes the same command again"
            )

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
        cells=batch_shards(mesh) * accumulation,
        own=[shard * accumulation + part for shard in own for part in range(accumulation)],
        compare=config.objective == COMPARING and not held_out,
        on_failure=lost,
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
