"""Processes of one run: how they find each other, and agree on a decision."""

import os

import jax
import numpy as np
from jax.experimental import multihost_utils


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the processes of a run; does nothing unless asked to.

    Asked to is: a coordinator is given, or MULTITAP_COORDINATOR is set ("auto" leaves all three values to JAX's own
    detection of Slurm, Cloud TPU and Kubernetes). MULTITAP_NUM_PROCESSES and MULTITAP_PROCESS_ID give the other two.

    Args:
      coordinator: HOST:PORT of process 0, or "auto".
      num_processes: processes of the run.
      process_id: this process, from 0.

    Raises:
      ValueError: a coordinator without the number of processes or without this process's id.
    """
    coordinator = coordinator or os.environ.get("MULTITAP_COORDINATOR")
    if not coordinator:
        return
    if coordinator == "auto":
        jax.distributed.initialize()
        return
    count = num_processes if num_processes is not None else os.environ.get("MULTITAP_NUM_PROCESSES")
    index = process_id if process_id is not None else os.environ.get("MULTITAP_PROCESS_ID")
    if count is None or index is None:
        raise ValueError(
            f"coordinator {coordinator} is given, so are needed: MULTITAP_NUM_PROCESSES (is {count}) and "
            f"MULTITAP_PROCESS_ID (is {index}); or set MULTITAP_COORDINATOR=auto"
        )
    jax.distributed.initialize(coordinator, int(count), int(index))


def is_main_process() -> bool:
    """Whether this process writes files and prints."""
    return jax.process_index() == 0


def agree(stop: bool, save: bool) -> tuple[bool, bool]:
    """One answer for all processes: stop if any of them wants to, save if process 0 does (clocks differ).

    Collective: every process must call it at the same step.
    """
    if jax.process_count() == 1:
        return stop, save
    answers = np.asarray(multihost_utils.process_allgather(np.asarray([stop, save], np.int32)))
    return bool(answers[:, 0].any()), bool(answers[0, 1])


def barrier(name: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
