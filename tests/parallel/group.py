"""Starts processes of one run on this machine, as a launcher would."""

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = [sys.executable, "-m", "tests.parallel.verbs_script"]
CLI = [sys.executable, "-m", "multitap_jax.cli"]


def environment(**changes: object) -> dict[str, str]:
    """This one's, for a process that sees one simulated device and finds the package."""
    settings = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": 1, "COLUMNS": 200, **changes}
    return {**os.environ, **{name: str(value) for name, value in settings.items()}}


@contextlib.contextmanager
def programs_kept(cache: Path) -> Iterator[None]:
    """Processes started in here find each other's compiled programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@dataclasses.dataclass
class Group:
    """Running processes of one run and the files that they write standard error to."""

    processes: list[subprocess.Popen]
    logs: list[Path]

    def wait(self, seconds: float = 300) -> list[int]:
        """Exit codes; what still runs after `seconds` is killed and fails the test."""
        end = time.monotonic() + seconds
        try:
            return [process.wait(max(end - time.monotonic(), 0.1)) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def log(self, index: int) -> str:
        return self.logs[index].read_text()


def start(command: list[str], count: int, folder: Path, **changes: object) -> Group:
    """Starts `count` processes with MULTITAP_* set; one process runs alone, without them."""
    folder.mkdir(parents=True, exist_ok=True)
    port, processes, logs = free_port(), [], []
    for index in range(count):
        place = {"COORDINATOR": f"localhost:{port}", "NUM_PROCESSES": count, "PROCESS_ID": index} if count > 1 else {}
        variables = environment(**{f"MULTITAP_{name}": value for name, value in place.items()}, **changes)
        logs.append(folder / f"{index}.log")
        with logs[-1].open("w") as log:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, stderr=log))
    return Group(processes, logs)


def when(happened: Callable[[], bool], group: Group) -> None:
    """Waits for something that a running process does."""
    while not happened():
        assert all(process.poll() is None for process in group.processes), group.log(0) + group.log(1)
        time.sleep(0.02)


def verbs(commands: list[list[object]], count: int, folder: Path, **changes: object) -> Group:
    """Verbs one after another in `count` processes."""
    return start(
        [*SCRIPT, json.dumps([[str(part) for part in command] for command in commands])], count, folder, **changes
    )
