"""The training loop of stage 1: one page, resumable at every step."""

import contextlib
import dataclasses
import functools
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from multitap_jax.backbones import Execution
from multitap_jax.batch import PackedBatch
from multitap_jax.checkpoint import Checkpoints, SavePolicy, checksum
from multitap_jax.config import ConfigError, TrainConfig, to_dict
from multitap_jax.flops import Work, count_work, peak_flops, train_flops
from multitap_jax.parallel.distributed import agree, is_main_process
from multitap_jax.parallel.mesh import make_mesh, shard_batch
from multitap_jax.reward import RewardModel
from multitap_jax.stage1.metrics import MetricsLog, Recorder, agreement
from multitap_jax.stage1.optimizer import make_optimizer, make_schedule
from multitap_jax.stage1.progress import Display, brief, summary
from multitap_jax.stage1.spikes import SpikeWatch
from multitap_jax.stage1.step import abstract_state, init_state, make_eval_step, make_train_step
from multitap_jax.stage1.trainable import partition
from multitap_jax.weights.sources import HUB

CHECKPOINTS = "checkpoints"  # folder in the working directory


class Dataset(Protocol):
    """What the loop needs of `PackedDataset`. Every process gets the same whole batches, all of one shape."""

    num_steps: int
    fingerprint: str

    def loader(self, start_step: int = 0) -> Iterator[PackedBatch]:
        """Batches from `start_step` on."""
        ...

    def record_ids(self, step: int) -> list[str]:
        """Ids of the records of a step, as `PackedBatch.record` indexes them."""
        ...


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
    check: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
    peak: float | None = None,
) -> TrainResult:
    """Trains, or goes on with the run in `workdir`: checkpoints/, metrics.jsonl, config.json.

    Args:
      config: `config.data` is not read, it made `dataset`; of `config.model.checkpoint`, which made `model`, only
        whether it is the commit of the hub that the run began with.
      workdir: folder of the run.
      model: with adapters if `config.trainable.parts` is "lora". It is used up: what learns moves into the result.
      dataset: every step of every epoch.
      eval_dataset: held-out pairs, one pass; None for no evaluation.
      mesh: where the model lies; None makes `config.mesh`.
      check: called with each batch taken, before it is used; what it raises stops the run.
      clock: seconds, monotonic; for the time between saves and for rates.
      peak: FLOP/s of one device for the MFU; None looks it up, and prints "n/a" where it is unknown.

    Raises:
      ConfigError: settings that contradict each other or the number of devices.
      CheckpointError: the run in `workdir` is another one, or all its checkpoints are damaged.
      NonFiniteError: loss or gradient is NaN or infinite; names the records. The last checkpoint is a good one.
      LossSpikeError: the loss rose by `config.spike_factor` and stayed there; names the records.
    """
    workdir, mesh, main = Path(workdir), mesh or make_mesh(config.mesh), is_main_process()
    if mesh.shape["context"] > 1:
        raise ConfigError("config.mesh.context > 1: no attention backend shares a sequence yet; use data, fsdp, tensor")
    workdir.mkdir(parents=True, exist_ok=True)
    if main:
        (workdir / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")
    split, total = partition(model, config.trainable.parts), dataset.num_steps
    optimizer, schedule = make_optimizer(config.optimizer, total), make_schedule(config.optimizer, total)
    execution = Execution(dtype=config.model.dtype, remat=config.model.remat, attention=config.model.attention)
    train_step = make_train_step(split, optimizer, schedule, execution, mesh, accumulation=config.accumulation)
    eval_step = make_eval_step(split, execution, mesh)
    frozen, policy = split.frozen, SavePolicy(config.checkpoint, clock)
    messages: list[str] = []
    checkpoints = Checkpoints(
        workdir / CHECKPOINTS,
        keep=config.checkpoint.keep,
        identity=_identity(config, dataset, checksum(frozen)),
        report=messages.append,
    )
    with contextlib.closing(checkpoints), _sigterm() as sigterm:
        restored = checkpoints.restore(abstract_state(split, optimizer, mesh))
        step, state = restored or (0, init_state(split, optimizer, mesh))
        jax.block_until_ready(state)
        for leaf in jax.tree.leaves(split.trainable):  # the state has its own copy; two would not fit on a device
            leaf.delete()
        log = MetricsLog(workdir / "metrics.jsonl", step, write=main)
        flops = _flops_formula(model.backbone.config, config.trainable.parts)
        peak, spikes = peak or peak_flops(mesh.devices.flat[0]), SpikeWatch(config.spike_factor)
        recorder = Recorder(dataset.record_ids, flops, mesh.size, peak, clock, spikes)
        count = _work_counter(model.backbone.config)
        batches, start, began = dataset.loader(step), step, clock()
        with Display(total, step, enabled=main) as display:
            for message in messages:
                display.say(message)
            if restored:
                display.say(f"going on after step {step} of {total}")
            # The order never changes: evaluate the old state -> save -> take the next batch -> step -> log.
            # So a checkpoint at step k always means: k batches used, evaluated if due, and batch k not yet taken.
            while True:
                done = step >= total
                stop, timed = sigterm.is_set() and not done, policy.due_by_time()
                if step % config.log_every == 0 or done:
                    stop, timed = agree(stop, timed)
                elif jax.process_count() > 1:  # processes ask each other only now and then
                    stop = timed = False
                # 1. Evaluate.
                due = done or (config.evaluate_every > 0 and step % config.evaluate_every == 0)
                if eval_dataset is not None and due and not stop and step not in log.evaluations():
                    recorder.settle()
                    with recorder.paused():
                        numbers = _evaluate(functools.partial(eval_step, state.trainable, frozen), eval_dataset, mesh)
                    log.add(step, evaluation=numbers)
                    display.say(f"step {step}/{total}  held out: {brief(numbers)}")
                # 2. Save.
                if stop or done or timed or policy.due_by_step(step):
                    recorder.settle()
                    checkpoints.save(step, state)
                    policy.saved()
                if stop or done:
                    break
                # 3. Take the next batch.
                batch = next(batches)
                check()
                # 4. Step.
                with recorder.paused() if step == start else contextlib.nullcontext():  # the first call compiles
                    state, metrics = train_step(state, frozen, shard_batch(batch, mesh))
                recorder.add(step, metrics, np.asarray(batch.record), count(batch))
                step += 1
                # 5. Log.
                display.advance(step)
                if step % config.log_every == 0 or step == total:
                    line = recorder.line()
                    log.add(step, **line)
                    display.numbers(step, line)
            checkpoints.wait()
            evaluation = log.evaluations().get(step) if done else None
            display.summary(summary(log, workdir, step, total, clock() - began, step - start))
    return TrainResult(step, step - start, done, split.model(state.trainable), evaluation)


def _identity(config: TrainConfig, dataset: Dataset, frozen: int) -> dict[str, Any]:
    """What must not change between two parts of one run. Mesh, micro-batches, remat and cadences may."""
    values = {
        "optimizer": to_dict(config.optimizer),
        "trainable": to_dict(config.trainable),
        "model": {"dtype": config.model.dtype},
    }
    flat = {f"config.{s}.{k}": v for s, section in values.items() for k, v in section.items()}
    flat |= {f"config.{key}": getattr(config, key) for key in ("batch_size", "epochs", "seed")}
    if config.model.checkpoint.startswith(HUB):  # a folder may move, a commit is what it is
        flat["config.model.checkpoint"] = config.model.checkpoint
    plain = json.loads(json.dumps(flat))  # as it comes back from a file: tuples are lists
    return {**plain, "data": dataset.fingerprint, "steps": dataset.num_steps, "frozen weights": frozen}


def _evaluate(step: Callable[[PackedBatch], jax.Array], dataset: Dataset, mesh: Mesh) -> dict[str, Any]:
    scores, targets = [], []
    for batch in dataset.loader():
        logits = np.asarray(step(shard_batch(batch, mesh)), np.float32)
        counted = np.asarray(batch.weight) > 0
        scores.append(1 / (1 + np.exp(-logits[counted].astype(np.float64))))
        targets.append(np.asarray(batch.target)[counted])
    return agreement(np.concatenate(scores), np.concatenate(targets))


def _work_counter(config: Any) -> Callable[[PackedBatch], Work]:
    """What counts the work of a batch for a backbone with this configuration."""
    return functools.partial(count_work, window=getattr(config, "window", None), block=config.block)


def _flops_formula(config: Any, parts: str) -> Callable[[Work], float] | None:
    if not any(hasattr(config, name) for name in ("vision_flops", "forward_flops")):  # nobody has written it down
        return None
    return lambda work: train_flops(config, work, parts)


@contextlib.contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; outside of the main thread, where Python cannot listen, it is never set."""
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)
