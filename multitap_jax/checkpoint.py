"""Checkpoints of a run: asynchronous, atomic, checked, and restored from the newest good one.

The only file that imports orbax. A checkpoint is a folder named by its step with every array of the state, and as
metadata what the run must have in common with it, and type and checksum of every array (`checksum.py`). A restored
state that differs in one bit is refused; one that is good may go to another mesh, and to other types.
"""

import contextlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from multitap_jax.checksum import checksums, on_device
from multitap_jax.config import CheckpointConfig
from multitap_jax.naming import by_name
from multitap_jax.parallel import watchdog
from multitap_jax.parallel.distributed import any_has, barrier, from_each_process, is_main_process

FORMAT = 2
SET_ASIDE = "corrupt"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used for this run; the message says what to do."""


class DamagedError(CheckpointError):
    """A checkpoint whose files are not as they were written."""


class SavePolicy:
    """When to save: every so many steps, and every so many minutes since the last save.

    Args:
      config: triggers; 0 disables one.
      clock: seconds, monotonic; tests inject their own.
    """

    def __init__(self, config: CheckpointConfig, clock: Callable[[], float] = time.monotonic):
        self._config, self._clock = config, clock
        self._last = clock()

    def due_by_step(self, step: int) -> bool:
        """Whether the state after `step` steps is one to save."""
        return step > 0 and self._config.every_steps > 0 and step % self._config.every_steps == 0

    def due_by_time(self) -> bool:
        """Whether the last save is too long ago."""
        return self._config.every_minutes > 0 and self._clock() - self._last >= 60 * self._config.every_minutes

    def saved(self) -> None:
        """Starts the time anew."""
        self._last = self._clock()


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Args:
      folder: made if need be; nothing else may be kept there.
      keep: how many of the newest stay.
      keep_best: how many of those with the greatest goodness stay besides.
      best_by: what goodness is, in words; what was judged by something else counts as not judged.
      identity: what this run and a checkpoint must have in common, as plain JSON values by dotted name.
      report: told in words what was skipped.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: int,
        keep_best: int = 0,
        best_by: str = "",
        identity: Mapping[str, Any],
        report: Callable[[str], None] = print,
    ):
        self._folder, self._identity, self._report = Path(folder).resolve(), dict(identity), report
        self._best_by = best_by
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics.get(best_by, -math.inf),
            n=keep_best,
            keep_checkpoints_without_metrics=False,
        )
        self._manager = ocp.training.Checkpointer(
            self._folder,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(max(keep, 1)), best]),
            cleanup_tmp_directories=True,
        )

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, good or not, ascending."""
        return sorted(checkpoint.step for checkpoint in self._manager.checkpoints)

    def best(self) -> int | None:
        """The step of greatest goodness, the newest of several; None where no checkpoint has one."""
        judged = self._judged()
        return max(judged, key=lambda step: (judged[step], step), default=None)

    def _judged(self) -> dict[int, float]:
        found = {c.step: c.metrics.get(self._best_by) for c in self._manager.checkpoints if c.metrics}
        return {step: value for step, value in found.items() if value is not None}

    def save(self, step: int, state: Any, goodness: float | None = None) -> bool:
        """Starts to save `state` as `step`; the arrays may be donated as soon as this returns.

        Args:
          step: finished steps.
          state: a pytree of arrays.
          goodness: greater is better; None where it was not judged.

        Returns:
          Whether there was anything to do: a step that is already saved is left as it is, unless only now it is judged
          (a run that SIGTERM stopped before an evaluation evaluates when it goes on).
        """
        saved = step in self.steps()
        if saved and (goodness is None or step in self._judged()):
            return False
        arrays = by_name(state)
        kinds = {name: x.dtype.name for name, x in arrays.items()}
        metadata = {"format": FORMAT, "identity": self._identity, "dtypes": kinds, "checksums": checksums(arrays)}
        metrics = None if goodness is None else {self._best_by: goodness}
        self._manager.save_async(step, arrays, force=True, overwrite=saved, custom_metadata=metadata, metrics=metrics)
        return True

    def restore(self, target: Any) -> tuple[int, Any] | None:
        """The newest good checkpoint as (step, state), None if there is none.

        A checkpoint that is damaged is reported, moved to the folder `corrupt` beside, and the one before is tried.

        Args:
          target: the state as `jax.ShapeDtypeStruct`s with shardings; the checkpoint may be of another mesh.

        Raises:
          CheckpointError: the checkpoint is of another run (`identity` or parameters differ), cannot be read for a
            reason outside it (permissions, too many open files, no memory left), or all are damaged.
        """
        damaged = []
        for step in reversed(self.steps()):
            try:
                state = self.load(step, target)
            except DamagedError as error:
                self._report(f"{error}, and was skipped")
                damaged.append(step)
                continue
            self._set_aside(damaged)
            return step, state
        if damaged:
            raise CheckpointError(
                f"{self._folder}: all checkpoints are damaged (steps {', '.join(map(str, sorted(damaged)))}); "
                "restore the folder from a copy, or remove it to start from the first step"
            )
        return None

    def load(self, step: int, target: Any) -> Any:
        """The state of one step; see `restore`.

        Raises:
          DamagedError: its files are not as they were written.
          CheckpointError: see `restore`.
        """
        folder, metadata, arrays, failure = self._folder / str(step), {}, {}, None
        try:
            with _in_words(folder):
                metadata = self._read_metadata(step)
                self._check_identity(step, metadata["identity"])
                arrays = self._read(step, target, metadata)
        except CheckpointError as error:
            failure = error
        _agree(failure)
        watchdog.beat(f"the reading of checkpoint {step}")
        with _in_words(folder):
            found = checksums(arrays)
            wrong = [name for name in arrays if found[name] != metadata["checksums"][name]]
            if wrong:
                raise ValueError(f"checksum of {wrong[0]} and {len(wrong) - 1} more arrays")
            wanted = by_name(target)
            return jax.tree.unflatten(
                jax.tree.structure(target), [_cast(arrays[name], x) for name, x in wanted.items()]
            )

    def wait(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait()

    def close(self) -> None:
        """Waits until everything is on disk, and lets go of the folder."""
        self._manager.close()

    def _read_metadata(self, step: int) -> dict[str, Any]:
        metadata = self._manager.metadata(step).custom_metadata
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise ValueError(f"its metadata is missing or not of format {FORMAT}")
        return metadata

    def _check_identity(self, step: int, saved: Mapping[str, Any]) -> None:
        keys = sorted(saved.keys() | self._identity.keys())
        lines = [
            f"{key}: the checkpoint has {saved.get(key)!r}, this run has {self._identity.get(key)!r}"
            for key in keys
            if saved.get(key) != self._identity.get(key)
        ]
        if lines:
            raise CheckpointError(
                f"{self._folder / str(step)} was written by a run that differs in\n  "
                + "\n  ".join(lines)
                + "\nuse the old values to go on with that run, or another --workdir to start a new one"
            )

    def _read(self, step: int, target: Any, metadata: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The arrays by name, in the types they were saved in; each process reads its parts, and waits for no other."""
        names, kinds = by_name(target), metadata["dtypes"]
        if names.keys() != kinds.keys():
            odd = ", ".join(sorted(names.keys() ^ kinds.keys())[:5])
            raise CheckpointError(
                f"{self._folder / str(step)} holds other parameters than this run has: {odd}; use another --workdir"
            )
        saved = {name: jax.ShapeDtypeStruct(x.shape, kinds[name], sharding=x.sharding) for name, x in names.items()}
        # orbax would wait at the end for all processes, also for one that cannot read its part and is elsewhere by then
        index = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
        with ocp.Context(multiprocessing_options=alone):
            return ocp.load(self._folder / str(step), saved)

    def _set_aside(self, steps: list[int]) -> None:
        """Frees the names of damaged steps, so that they can be saved anew; keeps the files for inspection."""
        if not steps:
            return
        self._manager.wait()
        if is_main_process():
            for step in steps:
                aside = self._folder.parent / SET_ASIDE / str(step)
                shutil.rmtree(aside, ignore_errors=True)
                aside.parent.mkdir(exist_ok=True)
                (self._folder / str(step)).rename(aside)
        barrier("checkpoints set aside")
        self._manager.reload()


@contextlib.contextmanager
def _in_words(folder: Path) -> Iterator[None]:
    """Makes a CheckpointError, or a DamagedError, of whatever reading a checkpoint raises."""
    try:
        with _quiet():  # orbax logs what it raises; here one sentence says it
            yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged file makes orbax, tensorstore or json raise
        if _says_nothing_of_damage(error):
            raise CheckpointError(
                f"{folder} could not be read now, which need not mean damage: {error}; nothing was changed, put "
                "the cause right and run the same command again"
            ) from error
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise DamagedError(f"checkpoint {folder} is damaged ({reason})") from error


def _agree(failure: CheckpointError | None) -> None:
    """Raises `failure`, or that of another process, in all of them; a refusal goes before damage. Collective."""
    if not any_has(failure is not None):
        return
    told = json.dumps(None if failure is None else [isinstance(failure, DamagedError), str(failure)]).encode()
    said = [json.loads(part) for part in from_each_process(told)]
    damaged, reason = min(found for found in said if found is not None)
    if failure is not None and isinstance(failure, DamagedError) == damaged:
        raise failure
    raise (DamagedError if damaged else CheckpointError)(reason)


# Status names in tensorstore's and XLA's messages that speak of the moment and not of the file.
_OF_THE_MOMENT = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "CANCELLED")


def _says_nothing_of_damage(error: Exception) -> bool:
    """Whether a good checkpoint may raise this; a file that is missing or is no file is damage."""
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    return any(status in str(error) for status in _OF_THE_MOMENT)


def _cast(x: jax.Array, target: jax.ShapeDtypeStruct) -> jax.Array:
    return x if x.dtype == target.dtype else jax.device_put(on_device(x).astype(target.dtype), target.sharding)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
