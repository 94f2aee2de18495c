"""Checkpoints of a run: asynchronous, atomic, checked, and restored from the newest good one.

The only file that imports orbax. A checkpoint is a folder named by its step with every array of the state, and as
metadata what the run must have in common with it, and a checksum of every array. The checksum is a sum of bits modulo
2^32, computed on the devices: it does not depend on the mesh, and a restored state that differs in one bit is refused.
"""

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from multitap_jax.config import CheckpointConfig
from multitap_jax.parallel.distributed import barrier, is_main_process
from multitap_jax.parallel.mesh import path_name

FORMAT = 1
SET_ASIDE = "corrupt"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used for this run; the message says what to do."""


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
      identity: what this run and a checkpoint must have in common, as plain JSON values by dotted name.
      report: told in words what was skipped.
    """

    def __init__(
        self, folder: str | Path, *, keep: int, identity: Mapping[str, Any], report: Callable[[str], None] = print
    ):
        self._folder, self._identity, self._report = Path(folder).resolve(), dict(identity), report
        policy = ocp.training.preservation_policies.LatestN(max(keep, 1))
        self._manager = ocp.training.Checkpointer(
            self._folder, preservation_policy=policy, cleanup_tmp_directories=True
        )

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, good or not, ascending."""
        return sorted(checkpoint.step for checkpoint in self._manager.checkpoints)

    def save(self, step: int, state: Any) -> bool:
        """Starts to save `state` as `step`; the arrays may be donated as soon as this returns.

        Returns:
          Whether there was anything to do: a step that is already saved is left as it is.
        """
        if step in self.steps():
            return False
        arrays = _by_name(state)
        metadata = {"format": FORMAT, "identity": self._identity, "checksums": _checksums(arrays)}
        self._manager.save_async(step, arrays, force=True, custom_metadata=metadata)
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
        steps = self.steps()
        damaged = []
        for step in reversed(steps):
            try:
                with _quiet():  # orbax logs what it raises; here one sentence says it
                    metadata = self._read_metadata(step)
                    self._check_identity(step, metadata["identity"])
                    state = self._load(step, target, metadata["checksums"])
            except (CheckpointError, MemoryError):
                raise
            except Exception as error:  # whatever a damaged file makes orbax, tensorstore or json raise
                if _says_nothing_of_damage(error):
                    raise CheckpointError(
                        f"{self._folder / str(step)} could not be read now, which need not mean damage: {error}; "
                        "nothing was changed, put the cause right and run the same command again"
                    ) from error
                reason = (str(error) or type(error).__name__).splitlines()[0][:200]
                self._report(f"checkpoint {self._folder / str(step)} is damaged and was skipped: {reason}")
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

    def _load(self, step: int, target: Any, checksums: Mapping[str, int]) -> Any:
        names = _by_name(target)
        if names.keys() != checksums.keys():
            odd = ", ".join(sorted(names.keys() ^ checksums.keys())[:5])
            raise CheckpointError(
                f"{self._folder / str(step)} holds other parameters than this run has: {odd}; use another --workdir"
            )
        arrays = self._manager.load(step, names)
        found = _checksums(arrays)
        wrong = [name for name in names if found[name] != checksums[name]]
        if wrong:
            raise ValueError(f"checksum of {wrong[0]} and {len(wrong) - 1} more arrays")
        return jax.tree.unflatten(jax.tree.structure(target), [arrays[name] for name in names])

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


# Status names in tensorstore's and XLA's messages that speak of the moment and not of the file.
_OF_THE_MOMENT = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "CANCELLED")


def _says_nothing_of_damage(error: Exception) -> bool:
    """Whether a good checkpoint may raise this; a file that is missing or is no file is damage."""
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    return any(status in str(error) for status in _OF_THE_MOMENT)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def checksum(tree: Any) -> int:
    """One number for all bits of all arrays and their names, the same on any mesh."""
    total = 0
    for name, value in sorted(_checksums(_by_name(tree)).items()):
        total = (total * 1000003 + value + sum(name.encode())) % 2**32
    return total


def _by_name(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves}


@jax.jit
def _bit_sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def bits(x: jax.Array) -> jax.Array:
        unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        values = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
        # Weighted by place, so that the same values in another order or shape do not pass.
        place = jnp.ones(x.shape, jnp.uint32)
        for axis, size in enumerate(x.shape):
            step = np.uint32((2 * size + 2 * axis + 1) * 2654435761 % 2**32)
            place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * step
        return jnp.sum(values * place, dtype=jnp.uint32)

    return {name: bits(x) for name, x in arrays.items()}


def _checksums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    return {name: int(np.asarray(value)) for name, value in _bit_sums(dict(arrays)).items()}
