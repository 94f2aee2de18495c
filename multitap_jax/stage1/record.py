"""`run.json`: what a run was made of, so that it can be repeated; one entry a start."""

import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from multitap_jax import __version__
from multitap_jax.config import TrainConfig, to_dict
from multitap_jax.files import json_bytes, write_atomic
from multitap_jax.weights.files import read_json

RUN_NAME = "run.json"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "grain", "safetensors")


def provenance(config: TrainConfig, fingerprint: str, steps: int) -> dict[str, Any]:
    """What the weights of a run depend on besides the machine: settings, data and versions."""
    return {
        "config": to_dict(config),
        "data": fingerprint,
        "steps": steps,
        "versions": {"multitap_jax": __version__, "jax": jax.__version__, "python": platform.python_version()},
    }


def write_run_record(workdir: Path, config: TrainConfig, fingerprint: str, steps: int, step: int, mesh: Mesh) -> None:
    """Adds this start to `workdir/run.json`: {"config", "data", "steps", "starts": [...]}, the newest settings on top.

    An entry of "starts" has the step it begins at, the time (UTC), the commit of the repository that the package
    lies in, the versions of all
    packages that compute, the kind and number of devices, the mesh and the number of processes.
    """
    path = workdir / RUN_NAME
    before = read_json(path)["starts"] if path.is_file() else []
    start = {
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "revision": revision(Path(__file__).parent),
        "versions": {"python": platform.python_version(), "multitap_jax": __version__}
        | {name: metadata.version(name) for name in _PACKAGES},
        "device": mesh.devices.flat[0].device_kind,
        "mesh": dict(mesh.shape),
        "processes": jax.process_count(),
    }
    record = {"config": to_dict(config), "data": fingerprint, "steps": steps, "starts": [*before, start]}
    write_atomic(path, json_bytes(record))


def revision(folder: Path) -> str | None:
    """The git commit of a folder, with "+" where files were changed since; None outside of a repository."""

    def git(*command: str) -> str:
        found = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, check=True)
        return found.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
