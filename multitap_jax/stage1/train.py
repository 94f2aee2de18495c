"""Stage 1 from a model and packed datasets to a trained model: what `loop.py` works with, and resuming."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from multitap_jax.backbones import Execution
from multitap_jax.batch import PackedBatch
from multitap_jax.checkpoint import CheckpointError, Checkpoints, DamagedError, SavePolicy
from multitap_jax.checksum import checksum
from multitap_jax.config import COMPARING, ConfigError, TrainConfig, dotted
from multitap_jax.flops import Work, count_work, peak_flops, train_flops
from multitap_jax.parallel.distributed import agree, is_main_process
from multitap_jax.parallel.mesh import HOST_MEMORY, make_mesh
from multitap_jax.reward import RewardModel
from multitap_jax.stage1.loop import Dataset, EvalStep, Loop, TrainStep, sigterm
from multitap_jax.stage1.metrics import MetricsLog, Recorder
from multitap_jax.stage1.objective import make_objective
from multitap_jax.stage1.optimizer import make_optimizer, make_schedule
from multitap_jax.stage1.profiling import Profile
from multitap_jax.stage1.progress import Display, summary
from multitap_jax.stage1.record import write_run_record
from multitap_jax.stage1.spikes import SpikeWatch
from multitap_jax.stage1.step import TrainState, abstract_state, init_state, make_eval_step, make_train_step
from multitap_jax.stage1.trainable import Partition, partition
from multitap_jax.weights.sources import HUB

# Folders in the working directory.
CHECKPOINTS = "checkpoints"
PROFILE = "profile"


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What the loop left.

    Attributes:
      step: finished steps. steps_now: those of this call.
      finished: False when SIGTERM stopped the run after a save (the `train` verb then exits with 143 = 128 + 15); the
        same command goes on from there.
      model: the model as trained so far, on its mesh, adapters unmerged.
      evaluation: held-out numbers of the final state (`metrics.agreement`); None without held-out pairs or unfinished.
    """

    step: int
    steps_now: int
    finished: bool
    model: RewardModel
    evaluation: dict[str, Any] | None


def train(
    config: TrainConfig,
    workdir: str | Path,
    model: RewardModel,
    dataset: Dataset,
    eval_dataset: Dataset | None = None,
    *,
    mesh: Mesh | None = None,
    check: Callable[[int], None] = lambda step: None,
    clock: Callable[[], float] = time.monotonic,
    peak: float | None = None,
) -> TrainResult:
    """Trains, or goes on with the run in `workdir`: checkpoints/, metrics.jsonl, run.json.

    Args:
      config: `config.data` is not read, it made `dataset`; of `config.model.checkpoint`, which made `model`, only
        whether it is the commit of the hub that the run began with.
      workdir: folder of the run.
      model: with adapters if `config.trainable.parts` is "lora". It is used up: what learns moves into the result.
      dataset: every step of every epoch.
      eval_dataset: held-out pairs, one pass; None for no evaluation.
      mesh: where the model lies; None makes `config.mesh`.
      check: called with the finished steps for each batch taken, before it is used, by all processes; what it raises
        stops the run.
      clock: seconds, monotonic; for the time between saves and for rates.
      peak: FLOP/s of one device for the MFU; None looks it up, and prints "n/a" where it is unknown.

    Raises:
      ConfigError: settings that contradict each other or the devices.
      ValueError: the processes of the run do not agree on settings, data, weights or checkpoints.
      CheckpointError: the run in `workdir` is another one, or all its checkpoints are damaged.
      NonFiniteError: loss or gradient is NaN or infinite; names the records. The last checkpoint is a good one.
      LossSpikeError: the loss rose by `config.spike_factor` and stayed there; names the records.
    """
    workdir, mesh, main = Path(workdir), mesh or make_mesh(config.mesh), is_main_process()
    _check(config, mesh, eval_dataset)
    workdir.mkdir(parents=True, exist_ok=True)
    split, total, offload = partition(model, config.trainable.parts), dataset.num_steps, config.optimizer.offload
    optimizer = make_optimizer(config.optimizer, total)
    target = abstract_state(split, optimizer, mesh, offload=offload)
    messages: list[str] = []
    checkpoints = _checkpoints(config, workdir, dataset, eval_dataset, split, messages.append)
    profile = Profile(workdir / PROFILE, *config.profile)
    with contextlib.closing(checkpoints), contextlib.closing(profile), sigterm() as asked_to_stop:
        restored = checkpoints.restore(target)
        start, state = restored or (0, init_state(split, optimizer, mesh, offload=offload))
        jax.block_until_ready(state)
        for leaf in jax.tree.leaves(split.trainable):  # the state has its own copy; two would not fit on a device
            leaf.delete()
        if main:
            write_run_record(workdir, config, dataset.fingerprint, total, start, mesh)
        log, began = MetricsLog(workdir / "metrics.jsonl", start, write=main), clock()
        with Display(total, start, enabled=main) as display:
            for message in messages + ([f"going on after step {start} of {total}"] if restored else []):
                display.say(message)
            train_step, eval_step = _steps(config, split, optimizer, total, mesh)
            loop = Loop(
                config=config,
                mesh=mesh,
                dataset=dataset,
                eval_dataset=eval_dataset,
                train_step=train_step,
                eval_step=eval_step,
                frozen=split.frozen,
                checkpoints=checkpoints,
                policy=SavePolicy(config.checkpoint, clock),
                log=log,
                recorder=_recorder(config, model.backbone.config, dataset, mesh, clock, peak),
                display=display,
                profile=profile,
                count=_work_counter(model.backbone.config),
                check=check,
                **({"beside": lambda step: (dataset.groups(step),)} if config.objective == COMPARING else {}),
            )
            step, state = loop.run(start, state, asked_to_stop)
            checkpoints.wait()
            display.summary(summary(log, workdir, step, total, clock() - began, step - start))
            done, judged = step >= total, step
            if done and config.checkpoint.final == "best":
                judged, state = _best(checkpoints, step, state, target, config.checkpoint.best_by, display)
    return TrainResult(
        step, step - start, done, split.model(state.trainable), log.evaluations().get(judged) if done else None
    )


def _checkpoints(
    config: TrainConfig,
    workdir: Path,
    dataset: Dataset,
    eval_dataset: Dataset | None,
    split: Partition,
    report: Callable[[str], None],
) -> Checkpoints:
    """Those of the run, once all processes agree on which run it is."""
    identity = _identity(config, dataset, checksum(split.frozen))
    checkpoints = Checkpoints(
        workdir / CHECKPOINTS,
        keep=config.checkpoint.keep,
        keep_best=config.checkpoint.keep_best,
        best_by=_judged_by(config, eval_dataset),
        identity=identity,
        report=report,
    )
    agree({**dotted(config), **identity, "weights": checksum(split.trainable), "checkpoints": checkpoints.steps()})
    return checkpoints


def _steps(
    config: TrainConfig, split: Partition, optimizer: optax.GradientTransformation, total: int, mesh: Mesh
) -> tuple[TrainStep, EvalStep]:
    """The two compiled steps of the loop."""
    execution = Execution(dtype=config.model.dtype, remat=config.model.remat, attention=config.model.attention)
    train_step = make_train_step(
        split,
        optimizer,
        make_schedule(config.optimizer, total),
        execution,
        mesh,
        accumulation=config.accumulation,
        offload=config.optimizer.offload,
        objective=make_objective(config),
    )
    return train_step, make_eval_step(split, execution, mesh)


def _check(config: TrainConfig, mesh: Mesh, eval_dataset: Dataset | None) -> None:
    wrong = []
    if mesh.shape["context"] > 1 and mesh.shape["fsdp"] > 1 and mesh.devices.flat[0].platform == "cpu":
        wrong.append(
            "config.mesh.fsdp > 1 beside config.mesh.context > 1: CPU devices may wait for each other for ever "
            "(docs/performance.md); use data beside it"
        )
    if config.checkpoint.keep_best and eval_dataset is None:
        wrong.append("config.checkpoint.keep_best needs held-out pairs: set data.holdout or data.evaluation")
    kinds = [memory.kind for memory in mesh.local_devices[0].addressable_memories()]
    if HOST_MEMORY not in kinds and (config.optimizer.offload or config.model.remat == "offload"):
        wrong.append(f"offloading needs memory of the kind {HOST_MEMORY}; these devices have {', '.join(kinds)}")
    if wrong:
        raise ConfigError("\n".join(wrong))


def _recorder(
    config: TrainConfig, backbone: Any, dataset: Dataset, mesh: Mesh, clock: Callable[[], float], peak: float | None
) -> Recorder:
    flops, peak = _flops_formula(backbone, config.trainable.parts), peak or peak_flops(mesh.devices.flat[0])
    return Recorder(dataset.record_ids, flops, mesh.size, peak, clock, SpikeWatch(config.spike_factor))


def _judged_by(config: TrainConfig, eval_dataset: Dataset | None) -> str:
    """What a held-out number is of: other pairs, or another number, make another order of the states."""
    return "" if eval_dataset is None else f"{config.checkpoint.best_by} of {eval_dataset.fingerprint[:16]}"


def _best(
    checkpoints: Checkpoints, step: int, state: TrainState, target: TrainState, name: str, display: Display
) -> tuple[int, TrainState]:
    """The best state and its step; the given one, which is used up otherwise, where it is the best or none is."""
    best = checkpoints.best()
    if best is None:
        display.say(f"no state has a finite held-out {name}: the artefact is of the last step, {step}")
    if best in (None, step):
        return step, state
    display.say(f"the artefact is of step {best}, the best by held-out {name}")
    for leaf in jax.tree.leaves(state):  # two would not fit on a device
        leaf.delete()
    try:
        return best, checkpoints.load(best, target)
    except DamagedError as error:
        raise CheckpointError(
            f"{error}; with --config.checkpoint.final=last the last state is saved instead"
        ) from error


def _identity(config: TrainConfig, dataset: Dataset, frozen: int) -> dict[str, Any]:
    """What must not change between two parts of one run. Mesh, micro-batches, remat, types and cadences may."""
    settings = dotted(config.optimizer, "config.optimizer") | dotted(config.trainable, "config.trainable")
    for name in ("mean_dtype", "offload"):
        del settings[f"config.optimizer.{name}"]
    settings |= {f"config.{key}": getattr(config, key) for key in ("batch_size", "epochs", "seed")}
    if config.objective != TrainConfig.objective:  # runs begun before there was a choice have no entry
        settings["config.objective"] = config.objective
        if config.objective == "huber":
            settings["config.huber_delta"] = config.huber_delta
    if config.model.checkpoint.startswith(HUB):  # a folder may move, a commit is what it is
        settings["config.model.checkpoint"] = config.model.checkpoint
    return {**settings, "data": dataset.fingerprint, "steps": dataset.num_steps, "frozen weights": frozen}


def _work_counter(config: Any) -> Callable[[PackedBatch], Work]:
    """What counts the work of a batch for a backbone with this configuration."""
    return functools.partial(count_work, window=getattr(config, "window", None), block=config.block)


def _flops_formula(config: Any, parts: str) -> Callable[[Work], float] | None:
    if not any(hasattr(config, name) for name in ("vision_flops", "forward_flops")):  # nobody has written it down
        return None
    return lambda work: train_flops(config, work, parts)
