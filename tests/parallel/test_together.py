"""Processes of one training run: meshes across them, and what becomes of the others when one dies, differs or misreads.

The run is that of the toy, which imports and compiles in a fraction of the time of a model.
"""

import json
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from multitap_jax.parallel.distributed import LOST
from tests.parallel.group import programs_kept, start, when

STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("together")


@pytest.fixture(autouse=True, scope="module")
def compiled(folder):
    with programs_kept(folder / "cache"):
        yield


def toy(run: Path, count: int, **mesh: int):
    settings = [json.dumps({"data": 1, **mesh}), json.dumps({"every_steps": 5})]
    command = [sys.executable, "-m", "tests.stage1.loop_script", str(run), "-1", str(STEPS), *settings]
    return start(command, count, run.with_name(f"{run.name}-log"))


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_end(one: Path, two: Path) -> None:
    assert losses(two) == losses(one)
    with np.load(one / "final.npz") as a, np.load(two / "final.npz") as b:
        for name in a:
            np.testing.assert_array_equal(b[name], a[name])


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    group = toy(folder / "whole", 2, fsdp=2)
    assert group.wait() == [0, 0], group.log(0) + group.log(1)
    return folder / "whole"


def test_a_tensor_axis_may_span_processes(folder, whole):
    """Both then hold the same rows of the batch, and half of every layer."""
    alone, tensor = toy(folder / "alone", 1), toy(folder / "tensor", 2, tensor=2)
    assert (alone.wait(), tensor.wait()) == ([0], [0, 0]), alone.log(0) + tensor.log(0) + tensor.log(1)
    for run in ("tensor", "whole"):
        np.testing.assert_allclose(losses(folder / run)[:5], losses(folder / "alone")[:5], rtol=2e-6)
        # Adam divides by the root of the second moment, which lifts the rounding of small gradients.
        np.testing.assert_allclose(losses(folder / run), losses(folder / "alone"), rtol=1e-4)


def test_after_kill_and_sigterm_to_one_of_them_a_run_goes_on_bit_for_bit(folder, whole):
    run = folder / "stopped"
    group = toy(run, 2, fsdp=2)
    when((run / "checkpoints" / "5").exists, group)
    group.processes[1].kill()
    codes = group.wait(120)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] in (LOST, -signal.SIGABRT), group.log(0)
    assert "process 0 of 2 lost another process" in group.log(0) or "another task died" in group.log(0)

    group = toy(run, 2, fsdp=2)
    when(lambda: f"/{STEPS}  loss" in group.log(0), group)
    group.processes[1].terminate()
    assert group.wait(120) == [143, 143], group.log(0) + group.log(1)
    assert "going on after step" in group.log(0)
    assert "stopped by SIGTERM after step" in group.log(0)
    assert len(losses(run)) < STEPS

    group = toy(run, 2, fsdp=2)
    assert group.wait() == [0, 0], group.log(0) + group.log(1)
    assert_same_end(whole, run)


def test_damage_that_one_process_alone_sees_makes_all_walk_back(folder, whole):
    run = folder / "damaged"
    shutil.copytree(whole, run)
    (run / "final.npz").unlink()
    parts = (run / "checkpoints" / str(STEPS) / "state" / "ocdbt.process_1" / "d").iterdir()
    for path in parts:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    group = toy(run, 2, fsdp=2)
    assert group.wait(120) == [0, 0], group.log(0) + group.log(1)
    assert f"checkpoints/{STEPS} is damaged" in group.log(0)
    assert f"going on after step {STEPS - 5} of {STEPS}" in group.log(0)
    assert_same_end(whole, run)


APART = """
import sys
from pathlib import Path
import jax
from multitap_jax.data.records import Rejected, RecordsError
from multitap_jax.parallel.distributed import agree, initialize, leave
from multitap_jax.stage1.rejects import Rejects

initialize()
here = jax.process_index()
agree({"same": [1, 2]})
rejects = Rejects(Path(sys.argv[1]) / "rejected.jsonl", 0.5, resumed=False, process=here)
rejects.open(Path("r.jsonl"), 4)
rejects.add(Path("r.jsonl"), [Rejected(here, f"r{here}", "gone"), Rejected(8 + here, f"s{here}", "gone")], by_all=False)
rejects.judge()  # two of four: just allowed
rejects.exchange()
assert len(rejects) == 4
try:
    rejects.judge()
except RecordsError:
    print("too many", file=sys.stderr)
try:
    agree({"same": 1, "config.batch_size": 8 + here})
except ValueError as error:
    print(error, file=sys.stderr)
    sys.stderr.flush()
    agree({})
"""


def test_what_processes_differ_in_is_named_and_what_they_lost_is_added_up(folder):
    group = start([sys.executable, "-c", APART, str(folder)], 2, folder / "apart")
    assert group.wait() == [0, 0], group.log(0) + group.log(1)
    for index in (0, 1):
        assert "too many" in group.log(index)
        assert "do not agree on\n  config.batch_size: process 0 has 8, process 1 has 9\n" in group.log(index)
    names = [(folder / name).read_text().count("gone") for name in ("rejected.jsonl", "rejected-1.jsonl")]
    assert names == [2, 2]


ASKING = """
import os
import signal
import jax
from multitap_jax.parallel.distributed import from_main, initialize, leave

initialize(heartbeat=10)
try:
    for step in range(1000):
        if step == 50 and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        from_main(step)
except Exception as error:
    leave(1, error)
"""


def test_a_process_that_asks_one_that_died_knows_that_it_was_not_its_own_fault(folder):
    group = start([sys.executable, "-c", ASKING], 2, folder / "asking")
    assert group.wait(120) == [LOST, -signal.SIGKILL], group.log(0)
    assert "process 0 of 2 lost another process" in group.log(0)
