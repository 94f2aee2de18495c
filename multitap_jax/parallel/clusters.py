"""Where a process stands in its run: told by flags, by MULTITAP_* variables, or by the cluster it was started on."""

import importlib.util
import re
import socket
from collections.abc import Mapping
from typing import NamedTuple

from multitap_jax.parallel.host import has_tpu

PORT = 8476  # of process 0, where nobody chose another: MULTITAP_PORT does
AUTO = "auto"


class Place(NamedTuple):
    """One process of a run.

    Attributes:
      how: who said so, for the log.
      coordinator: HOST:PORT of process 0; "" where JAX asks the cluster itself, and then the next two are not known.
      processes: processes of the run.
      process: this one, from 0.
      local_devices: numbers of the accelerators of this machine that are for this process; None: all it can see.
      method: the name of JAX's own way to ask the cluster, "deactivate" where everything is known.
    """

    how: str
    coordinator: str
    processes: int
    process: int
    local_devices: tuple[int, ...] | None = None
    method: str = "deactivate"

    @property
    def name(self) -> str:
        """Which process this is, for messages."""
        known = f"process {self.process} of {self.processes}" if self.coordinator else "the process"
        return f"{known} on {socket.gethostname()}"

    def __str__(self) -> str:
        if not self.coordinator:
            return f"one of the processes that {self.how} knows of"
        return f"process {self.process} of {self.processes} (from {self.how}), process 0 at {self.coordinator}"


def find_place(
    coordinator: str | None, num_processes: int | None, process_id: int | None, environ: Mapping[str, str]
) -> Place | None:
    """The place of this process; None where it is alone, which it is unless somebody names a coordinator.

    Args:
      coordinator: HOST:PORT of process 0, or "auto": look for Slurm, JobSet and Cloud TPU. MULTITAP_COORDINATOR is
        taken where it is None, MULTITAP_NUM_PROCESSES and MULTITAP_PROCESS_ID for the other two.
      num_processes: processes of the run.
      process_id: this process, from 0.
      environ: environment variables.

    Raises:
      ValueError: what is given is incomplete or contradicts itself, or "auto" finds no cluster.
    """
    given = coordinator is not None
    coordinator = coordinator or environ.get("MULTITAP_COORDINATOR")
    if not coordinator:
        if num_processes is not None or process_id is not None:
            raise ValueError("--num_processes and --process_id need --coordinator=HOST:PORT, the address of process 0")
        return None
    if coordinator == AUTO:
        return _detect(environ)
    count = num_processes if num_processes is not None else _number(environ, "MULTITAP_NUM_PROCESSES")
    index = process_id if process_id is not None else _number(environ, "MULTITAP_PROCESS_ID")
    if count is None or index is None:
        raise ValueError(
            f"coordinator {coordinator} is given, so are needed: --num_processes or MULTITAP_NUM_PROCESSES (is {count})"
            f" and --process_id or MULTITAP_PROCESS_ID (is {index}); or coordinator auto on Slurm, JobSet or Cloud TPU"
        )
    port = re.fullmatch(r".+:(\d{1,5})", coordinator)
    if port is None or not 0 < int(port[1]) < 2**16:
        raise ValueError(f"coordinator {coordinator!r}: expected HOST:PORT of process 0, such as 10.0.0.1:{PORT}")
    if count < 1:
        raise ValueError(f"num_processes = {count}: expected 1 or more")
    if not 0 <= index < count:
        raise ValueError(f"process_id = {index}: expected 0 to {count - 1}, for num_processes = {count}")
    return Place("flags" if given else "MULTITAP_* variables", coordinator, count, index)


def _detect(environ: Mapping[str, str]) -> Place:
    port = environ.get("MULTITAP_PORT", str(PORT))
    if environ.get("SLURM_STEP_NODELIST"):
        return _slurm(environ, port)
    if "TPU_WORKER_HOSTNAMES" in environ or "TPU_PROCESS_ADDRESSES" in environ:
        return Place("Cloud TPU on GKE", "", 0, 0, None, "gketpu")
    if "JOBSET_NAME" in environ:
        return _jobset(environ, port)
    # libtpu alone says nothing: `multitap plan` needs it where no TPU is.
    if has_tpu() and importlib.util.find_spec("libtpu") is not None:
        return Place("Cloud TPU", "", 0, 0, None, "gcetpu")
    missing = "libtpu is not installed: pip install -e '.[tpu]'" if has_tpu() else "this machine has no TPU"
    raise ValueError(
        "coordinator auto, but no cluster was found: neither a step of Slurm (SLURM_STEP_NODELIST; start with srun), "
        f"nor JobSet (JOBSET_NAME; see launch/jobset.yaml), nor Cloud TPU ({missing}). "
        "Give --coordinator=HOST:PORT --num_processes=N --process_id=I instead"
    )


def _slurm(environ: Mapping[str, str], port: str) -> Place:
    """The first node of the step has process 0. Of several tasks on a node each takes the accelerator of its number."""
    nodes = environ["SLURM_STEP_NODELIST"]
    # "node001", "node001,other2", "node[001-015]", "node[001,007-015],other2"
    found = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    if found is None:
        raise ValueError(f"SLURM_STEP_NODELIST = {nodes!r}: no list of nodes; give --coordinator=HOST:PORT")
    host = found[1] + (found[2] or "")
    count, index = _needed(environ, "SLURM_NTASKS"), _needed(environ, "SLURM_PROCID")
    # "8(x2)", "1,2(x3)": of some nodes in a row
    several = set(re.findall(r"(?:^|,)(\d+)", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))) != {"1"}
    bound = len([x for x in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x]) == 1
    local = (_needed(environ, "SLURM_LOCALID"),) if several and not bound else None
    return Place(f"Slurm job {environ.get('SLURM_JOB_ID', '?')}", f"{host}:{port}", count, index, local)


def _jobset(environ: Mapping[str, str], port: str) -> Place:
    """The first pod of the first job has process 0; launch/jobset.yaml fills these variables in."""
    name, job = environ["JOBSET_NAME"], environ.get("JOBSET_REPLICATED_JOB", "workers")
    jobs, pods = _needed(environ, "JOBSET_JOBS"), _needed(environ, "JOBSET_PODS_PER_JOB")
    index = _needed(environ, "JOBSET_JOB_INDEX") * pods + _needed(environ, "JOB_COMPLETION_INDEX")
    return Place(f"JobSet {name}", f"{name}-{job}-0-0.{name}:{port}", jobs * pods, index)


def _needed(environ: Mapping[str, str], name: str) -> int:
    value = _number(environ, name)
    if value is None:
        raise ValueError(f"{name} is not set, though coordinator auto found its cluster; see launch/ for what sets it")
    return value


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if text is None or text == "":
        return None
    if not text.isdigit():
        raise ValueError(f"{name} = {text!r}: expected a whole number")
    return int(text)
