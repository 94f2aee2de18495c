"""The steps of a run, in an order that never changes: evaluate the old state, save it, take the next batch, step, log.

So a checkpoint at step k always means: k batches used, evaluated if due, and batch k not yet taken.
"""

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from multitap_jax.batch import PackedBatch
from multitap_jax.checkpoint import Checkpoints, SavePolicy
from multitap_jax.config import TrainConfig
from multitap_jax.flops import Work
from multitap_jax.parallel import watchdog
from multitap_jax.parallel.distributed import from_main
from multitap_jax.parallel.mesh import shard_batch
from multitap_jax.stage1.metrics import MetricsLog, Recorder, agreement
from multitap_jax.stage1.profiling import Profile
from multitap_jax.stage1.progress import Display, brief
from multitap_jax.stage1.step import Metrics, TrainState

TrainStep = Callable[..., tuple[TrainState, Metrics]]
EvalStep = Callable[[nnx.State, nnx.State, PackedBatch], tuple[jax.Array, jax.Array, jax.Array]]


class Dataset(Protocol):
    """What the loop needs of `PackedDataset`: in every process the same batches, of one shape, but for `patches`."""

    num_steps: int
    fingerprint: str

    def loader(self, start_step: int = 0) -> Iterator[PackedBatch]:
        """Batches from `start_step` on."""
        ...

    def record_ids(self, step: int) -> list[str]:
        """Ids of the records of a step, as `PackedBatch.record` indexes them."""
        ...

    def groups(self, step: int) -> np.ndarray:
        """int32[N], the group of each record of a step for an objective that compares; N is the same in all steps."""
        ...


@dataclasses.dataclass
class Loop:
    """What the steps of a run work with; `run` does them.

    Attributes:
      config: cadences are read.
      mesh: where everything lies.
      dataset, eval_dataset: every step of every epoch; held-out pairs, one pass, or None.
      train_step, eval_step: compiled, see `step.py`.
      frozen: what does not learn.
      checkpoints, policy: where to save, and when.
      log, recorder, display, profile: what is written and shown.
      count: the work of a batch.
      check: called with the finished steps for each batch taken, before it is used; what it raises stops the run.
      beside: what `train_step` gets besides the batch of a step.
    """

    config: TrainConfig
    mesh: Mesh
    dataset: Dataset
    eval_dataset: Dataset | None
    train_step: TrainStep
    eval_step: EvalStep
    frozen: nnx.State
    checkpoints: Checkpoints
    policy: SavePolicy
    log: MetricsLog
    recorder: Recorder
    display: Display
    profile: Profile
    count: Callable[[PackedBatch], Work]
    check: Callable[[int], None]
    beside: Callable[[int], tuple[np.ndarray, ...]] = lambda step: ()

    def run(self, step: int, state: TrainState, asked_to_stop: Callable[[int], bool]) -> tuple[int, TrainState]:
        """Goes on after `step` steps until all are done or somebody asks to stop; the last state is saved.

        `asked_to_stop` comes from `sigterm`.
        """
        total, start, batches = self.dataset.num_steps, step, self.dataset.loader(step)
        while True:
            done = step >= total
            watchdog.beat(f"step {step}")
            stop, timed = asked_to_stop(step) and not done, self._time_to_save(step)
            judged = not stop and self._judge(step, state, done)
            if stop or done or timed or (judged and self.config.checkpoint.keep_best) or self.policy.due_by_step(step):
                self.recorder.settle()
                self.checkpoints.save(step, state, self._goodness(step))
                self.policy.saved()
                watchdog.beat(f"the save of step {step}")
            if stop:
                self.display.say(f"stopped by SIGTERM after step {step} of {total}, which is being saved")
            if stop or done:
                return step, state
            first = self.recorder.paused() if step == start else contextlib.nullcontext()  # threads start; it compiles
            with first:
                with self.recorder.waiting():
                    batch = next(batches)
                self.check(step)
                self.profile.before(step)
                placed = shard_batch(batch, self.mesh)
                state, metrics = self.train_step(state, self.frozen, placed, *self.beside(step))
            self.recorder.add(step, metrics, np.asarray(batch.record), self.count(batch))
            step += 1
            if said := self.profile.after(step, metrics):
                self.display.say(said)
            self.display.advance(step)
            if step % self.config.log_every == 0 or step == total:
                line = self.recorder.line()
                self.log.add(step, **line)
                self.display.numbers(step, line)

    def _time_to_save(self, step: int) -> bool:
        """By the clock of process 0, which the others ask only now and then: clocks differ, and asking takes time."""
        if jax.process_count() > 1 and step % self.config.log_every:
            return False
        return from_main(self.policy.due_by_time())

    def _judge(self, step: int, state: TrainState, done: bool) -> bool:
        """Evaluates the state on held-out pairs if that is due and was not done before; whether it was."""
        every = self.config.evaluate_every
        due = done or (every > 0 and step % every == 0)
        if self.eval_dataset is None or not due or step in self.log.evaluations():
            return False
        self.recorder.settle()
        with self.recorder.paused():
            scores, targets = [], []
            for batch in self.eval_dataset.loader():
                found = self.eval_step(state.trainable, self.frozen, shard_batch(batch, self.mesh))
                logits, target, weight = (np.asarray(x) for x in found)
                scores.append(1 / (1 + np.exp(-logits[weight > 0].astype(np.float64))))
                targets.append(target[weight > 0])
                watchdog.beat(f"an evaluation after step {step}")
            numbers = agreement(np.concatenate(scores), np.concatenate(targets))
        self.log.add(step, evaluation=numbers)
        self.display.say(f"step {step}/{self.dataset.num_steps}  held out: {brief(numbers)}")
        return True

    def _goodness(self, step: int) -> float | None:
        """What the state of `step` is worth by its held-out numbers: greater is better; None without any."""
        name = self.config.checkpoint.best_by
        value = self.log.evaluations().get(step, {}).get(name)
        if value is None or not np.isfinite(value):
            return None
        return -value if name == "loss" else value


@contextlib.contextmanager
def explained_sigterm() -> Iterator[None]:
    """Lets SIGTERM end the process at once, with 143 and a sentence: while there is nothing to save, inside of which
    `sigterm` holds for the steps. Of several processes JAX takes the signal for itself, and the steps answer it.
    """
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        said = (
            "multitap: stopped by SIGTERM where no step was under way; the same command begins, or goes on, from there"
        )
        os.write(2, f"\n{said}\n".encode())
        os._exit(128 + signal.SIGTERM)  # not an exception: libraries catch those, and would take it for their own

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def sigterm() -> Iterator[Callable[[int], bool]]:
    """Yields what says at each step whether SIGTERM came, to this or any other process.

    All processes must ask at every step, and get the same answer at the same one. JAX itself listens where there are
    several (`distributed.initialize(saves_on_sigterm=True)`). Outside of the main thread, where Python cannot listen,
    the answer is always no.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield lambda step: received.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
