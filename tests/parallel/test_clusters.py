"""Where a process stands: from flags, variables, Slurm, JobSet and Cloud TPU; and what is wrong, in words."""

import os
import subprocess
import time

import jax
import pytest

from multitap_jax.parallel import clusters
from multitap_jax.parallel.clusters import find_place
from multitap_jax.parallel.distributed import (
    LOST,
    OtherProcessError,
    all_or_none,
    barrier,
    divided,
    from_each_process,
    from_main,
    initialize,
    is_main_process,
    leave,
)
from tests.parallel.group import CLI, ROOT, environment, free_port, start

SLURM = {
    "MULTITAP_COORDINATOR": "auto",
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[007,009-011],other",
    "SLURM_NTASKS": "5",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x5)",
}


def test_flags_come_before_variables():
    assert find_place(None, None, None, {}) is None
    variables = {"MULTITAP_COORDINATOR": "a:1", "MULTITAP_NUM_PROCESSES": "4", "MULTITAP_PROCESS_ID": "3"}
    assert find_place(None, None, None, variables)[:4] == ("MULTITAP_* variables", "a:1", 4, 3)
    assert find_place("b:2", 2, 0, variables)[:4] == ("flags", "b:2", 2, 0)
    assert str(find_place("b:2", 2, 0, {})) == "process 0 of 2 (from flags), process 0 at b:2"


@pytest.mark.parametrize(
    ("nodes", "host"), [("n1", "n1"), ("n1,n2", "n1"), ("n[07-12]", "n07"), ("gpu-a[1,3-4],b", "gpu-a1")]
)
def test_slurm_gives_the_first_node_process_0(nodes, host):
    place = find_place(None, None, None, SLURM | {"SLURM_STEP_NODELIST": nodes})
    assert place[:5] == ("Slurm job 7", f"{host}:{clusters.PORT}", 5, 2, None)
    assert find_place("auto", None, None, SLURM | {"MULTITAP_PORT": "99"}).coordinator == "node007:99"


def test_of_several_tasks_on_a_node_each_takes_its_gpu():
    several = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "5"}
    assert find_place(None, None, None, several).local_devices == (5,)
    assert find_place(None, None, None, several | {"SLURM_STEP_TASKS_PER_NODE": "1,8(x2)"}).local_devices == (5,)
    assert find_place(None, None, None, several | {"CUDA_VISIBLE_DEVICES": "0"}).local_devices is None


def test_cloud_tpu_is_asked_by_jax(monkeypatch):
    place = find_place("auto", None, None, {"TPU_WORKER_HOSTNAMES": "a,b", "JOBSET_NAME": "x"})
    assert (place.method, place.coordinator) == ("gketpu", "")
    monkeypatch.setattr(clusters, "has_tpu", lambda: True)
    monkeypatch.setattr(clusters.importlib.util, "find_spec", lambda name: object() if name == "libtpu" else None)
    assert find_place("auto", None, None, {}).method == "gcetpu"
    monkeypatch.setattr(clusters.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"libtpu is not installed: pip install -e '\.\[tpu\]'"):
        find_place("auto", None, None, {})


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (("a:1", None, 0), {}, r"--num_processes or MULTITAP_NUM_PROCESSES \(is None\).*PROCESS_ID \(is 0\)"),
        ((None, 2, None), {}, r"need --coordinator=HOST:PORT"),
        (("a", 2, 0), {}, r"coordinator 'a': expected HOST:PORT of process 0"),
        (("a:0", 2, 0), {}, r"coordinator 'a:0': expected HOST:PORT of process 0"),
        (("a:99999", 2, 0), {}, r"coordinator 'a:99999': expected HOST:PORT of process 0"),
        (("a:1", 0, 0), {}, r"num_processes = 0: expected 1 or more"),
        (("a:1", 2, 2), {}, r"process_id = 2: expected 0 to 1, for num_processes = 2"),
        (("a:1", None, None), {"MULTITAP_NUM_PROCESSES": "two"}, r"MULTITAP_NUM_PROCESSES = 'two': expected a whole"),
        (
            ("auto", None, None),
            {},
            r"no cluster was found: neither a step of Slurm.*nor JobSet.*TPU \(this machine has",
        ),
        (("auto", None, None), {"SLURM_STEP_NODELIST": ""}, r"no cluster was found: neither a step of Slurm"),
        (("auto", None, None), {"JOBSET_NAME": "x"}, r"JOBSET_JOBS is not set, though .* launch/"),
    ],
)
def test_what_is_wrong_is_said(arguments, variables, message, monkeypatch):
    monkeypatch.setattr(clusters, "has_tpu", lambda: False)  # libtpu may be here to plan with
    with pytest.raises(ValueError, match=message):
        find_place(*arguments, variables)


def test_a_single_process_needs_nobody(monkeypatch):
    monkeypatch.delenv("MULTITAP_COORDINATOR", raising=False)
    assert initialize() is None
    barrier("alone")
    assert is_main_process()
    assert from_main({"a": [1]}) == {"a": [1]}
    assert from_each_process(b"x") == [b"x"]
    assert divided([1, 2, 3], lambda items: [2 * item for item in items]) == [2, 4, 6]
    monkeypatch.setenv("MULTITAP_COORDINATOR", "localhost:1")
    with pytest.raises(ValueError, match="MULTITAP_NUM_PROCESSES"):
        initialize()


EVALUATE = ["evaluate", "--scores=s.jsonl", "--input=i.jsonl", "--join_timeout=3", "--num_processes=2"]


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (1, "process 1 of 2 waited 3 s for process 0 at localhost:{port} in vain (Connection refused). Check that"),
        (
            0,
            "process 0 waited 3 s at localhost:{port} for process 1, and not all have come. Check that NUM_P",
        ),
    ],
)
def test_a_process_that_waits_in_vain_says_for_whom_and_what_to_check(index, said):
    port, began = free_port(), time.monotonic()
    command = [*CLI, *EVALUATE, f"--coordinator=localhost:{port}", f"--process_id={index}"]
    found = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert found.returncode == 75
    assert said.format(port=port) in found.stderr
    assert time.monotonic() - began < 60


HANG = """
import sys, time
from multitap_jax.parallel.distributed import barrier, initialize
from multitap_jax.parallel.watchdog import watched

def hang():
    time.sleep(300)

place = initialize(timeout=60)
with watched(4, place.name):
    if place.process == 1:
        hang()
    barrier("never")
"""


def test_a_process_that_hangs_ends_and_so_does_the_one_that_waits_for_it(tmp_path):
    group = start([*CLI[:1], "-c", HANG], 2, tmp_path)
    codes = group.wait(120)
    assert 75 in codes
    assert all(code in (75, 76, -6) for code in codes), group.log(0) + group.log(1)
    stuck = next(group.log(index) for index in (1, 0) if codes[index] == 75)
    assert "has made no progress for 4 s, since its start; either it hangs" in stuck
    assert "most recent call first" in stuck


def error_of(during: Exception, then: Exception) -> Exception:
    """What arrives when handling one error ends in another."""
    try:
        try:
            raise during
        finally:
            raise then
    except Exception as error:
        return error


RESET = "UNKNOWN: Gloo AllGather failed: [pair.cc:538] Read error [127.0.0.1]:43233: Connection reset by peer"
BARRIER = "INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: Task 1 heartbeat timeout."


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("its own"), 1),
        (OSError("/data/gloomy/heartbeats.jsonl: no such file"), 1),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), 1),
        (OtherProcessError("process 1 of 2 failed (StoreError: damaged), and the run with it"), LOST),
        (ValueError(f"row 3: {RESET}"), 1),
        (jax.errors.JaxRuntimeError(RESET), LOST),
        (ValueError(RESET), LOST),
        (jax.errors.JaxRuntimeError(BARRIER), LOST),
        (error_of(jax.errors.JaxRuntimeError(RESET), ValueError("a save was under way")), LOST),
    ],
)
def test_the_echo_of_another_process_has_its_own_exit_code(monkeypatch, error, code):
    codes = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(os, "_exit", codes.append)
    leave(1, error)
    assert codes == [code]


def test_one_process_alone_needs_no_agreement():
    assert all_or_none(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        all_or_none(lambda: 1 // 0)
