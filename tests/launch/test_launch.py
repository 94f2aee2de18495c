"""The launchers: sound shell and YAML, the right words to the right programs, and all processes end when one fails."""

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

from multitap_jax import cli
from multitap_jax.parallel.clusters import PORT, find_place

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Puts programs of our own in the place of those that a launcher calls."""

    def write(name: str, body: str) -> Path:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("MULTITAP", raising=False)
    return write


def launch(script: str, *arguments: str, **changes: str) -> subprocess.CompletedProcess:
    options = {"capture_output": True, "text": True, "timeout": 120, "env": {**os.environ, **changes}}
    return subprocess.run([LAUNCH / script, *arguments], **options)


def test_the_scripts_are_sound_shell():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "shellcheck is missing: pip install -e '.[check]'"
    scripts = [*SCRIPTS, *LAUNCH.parent.glob("benchmarks/*.sh")]
    found = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    assert len(scripts) == 4
    assert all(os.access(path, os.X_OK) for path in scripts)


SHOW = 'echo "$MULTITAP_PROCESS_ID of $MULTITAP_NUM_PROCESSES at $MULTITAP_COORDINATOR: $*"'


def test_local_starts_every_process_with_its_place(programs):
    programs("multitap", SHOW)
    for arguments in (["3", "train", "--workdir=a b"], ["3", "--workdir=a b"]):
        found = launch("local.sh", *arguments)
        assert (found.returncode, found.stderr) == (0, "")
        said = sorted(found.stdout.splitlines())
        port = said[0].partition("localhost:")[2].partition(":")[0]
        assert said == [f"{i} of 3 at localhost:{port}: train --workdir=a b" for i in range(3)]


def test_local_shares_out_the_gpus(programs):
    programs("multitap", 'echo "$MULTITAP_PROCESS_ID $CUDA_VISIBLE_DEVICES"')
    programs("nvidia-smi", "seq 0 3")
    variables = {"JAX_PLATFORMS": "", "CUDA_VISIBLE_DEVICES": ""}
    assert sorted(launch("local.sh", "2", "train", **variables).stdout.splitlines()) == ["0 0,1", "1 2,3"]
    variables["CUDA_VISIBLE_DEVICES"] = "5,7"
    assert sorted(launch("local.sh", "2", "train", **variables).stdout.splitlines()) == ["0 5", "1 7"]
    found = launch("local.sh", "3", "train", **variables)
    assert (found.returncode, found.stdout) == (2, "")
    assert "3 processes, but 2 GPUs" in found.stderr


def test_local_ends_all_when_one_fails(programs):
    programs("multitap", "[[ $MULTITAP_PROCESS_ID == 1 ]] && exit 7; exec sleep 100")
    began = time.monotonic()
    found = launch("local.sh", "3", "train")
    assert found.returncode == 7
    assert "a process ended with code 7" in found.stderr
    assert time.monotonic() - began < 60


def test_local_says_once_what_all_have_to_say(programs):
    words = 'echo "multitap: process $MULTITAP_PROCESS_ID of 4 failed" >> $MULTITAP_LAST_WORDS'
    programs("multitap", f"(( MULTITAP_PROCESS_ID == 2 )) && echo other >> $MULTITAP_LAST_WORDS || {words}; exit 7")
    found = launch("local.sh", "4", "train")
    assert found.returncode == 7
    assert "process 0, 1, 3 of 4:\nmultitap: this process failed\nprocess 2 of 4:\nother\n" in found.stderr


def test_local_gives_one_explanation_of_a_wrong_command(programs):
    """By the program itself, which would print it once a process."""
    program = f"{sys.executable} -m multitap_jax.cli"
    arguments = ["train", f"--config={LAUNCH.parent / 'configs/lora.py'}", "--workdir=w", "--config.bach_size=2"]
    changes = {"MULTITAP": program, "PYTHONPATH": str(LAUNCH.parent), "JAX_PLATFORMS": "cpu"}
    found = launch("local.sh", "2", *arguments, **changes)
    assert found.returncode == 2
    assert found.stderr.count("did you mean --config.batch_size?") == 1
    assert "process 0, 1 of 2:\nmultitap train: --config.bach_size is not a setting" in found.stderr


def test_local_passes_sigterm_on_and_waits_for_the_saves(programs, tmp_path):
    saved = tmp_path / "saved"
    programs(
        "multitap", f"trap 'kill $!; sleep 0.5; echo x >> {saved}; exit 143' TERM; touch {saved}; sleep 100 & wait"
    )
    run = subprocess.Popen([LAUNCH / "local.sh", "2", "train"], stderr=subprocess.PIPE, text=True)
    while not saved.exists():
        time.sleep(0.05)
    time.sleep(0.5)
    run.terminate()
    _, errors = run.communicate(timeout=60)
    assert (run.returncode, saved.read_text()) == (143, "x\nx\n"), errors


@pytest.mark.parametrize("script", ["local.sh", "tpu_vm.sh"])
def test_wrong_usage_is_explained(script):
    found = launch(script, "--config=c.py")
    assert found.returncode == 2
    assert f"usage: launch/{script}" in found.stderr


def test_local_tells_the_one_that_failed_from_those_that_lost_it(programs):
    programs("multitap", "case $MULTITAP_PROCESS_ID in 0) exit 76;; 1) sleep 1; exit 7;; *) sleep 2; exit 134;; esac")
    assert launch("local.sh", "3", "train").returncode == 7
    programs("multitap", "[[ $MULTITAP_PROCESS_ID == 0 ]] && exit 76; exec sleep 100")
    assert launch("local.sh", "2", "train").returncode == 76


@pytest.mark.parametrize(("code", "restarts", "requeued"), [(143, 0, 1), (75, 3, 1), (76, 10, 0), (1, 0, 0), (0, 0, 0)])
def test_slurm_runs_the_verb_and_queues_again_what_may_go_on(programs, tmp_path, code, restarts, requeued):
    log = tmp_path / "log"
    programs("srun", f'echo "srun $MULTITAP_COORDINATOR $*" >> {log}; exit {code}')
    programs("scontrol", f'echo "scontrol $*" >> {log}')
    found = launch("slurm.sbatch", "--workdir=w", SLURM_JOB_ID="12", SLURM_RESTART_COUNT=str(restarts))
    assert found.returncode == code
    expected = ["srun auto --kill-on-bad-exit=1 multitap train --workdir=w"] + ["scontrol requeue 12"] * requeued
    assert log.read_text().splitlines() == expected


def test_slurm_does_not_queue_again_what_one_process_has_explained(programs, tmp_path):
    """The others, which lost it, have the higher code, and that is the one srun gives."""
    log = tmp_path / "log"
    programs("srun", "echo out; echo 'srun: error: n1: tasks 1,3-4: Exited with exit code 1' >&2; exit 76")
    programs("scontrol", f'echo "scontrol $*" >> {log}')
    found = launch("slurm.sbatch", "train", SLURM_JOB_ID="12")
    assert (found.returncode, found.stdout) == (76, "out\n")
    assert "not queued again: srun: error: n1: tasks 1,3-4: Exited with exit code 1" in found.stderr
    assert not log.exists()


def test_tpu_vm_quotes_what_it_sends(programs, tmp_path):
    programs("gcloud", f'printf "%s\\n" "$@" > {tmp_path / "log"}')
    assert launch("tpu_vm.sh", "pod", "us-a", "score", "--input=a b.jsonl", MULTITAP_FOLDER="my folder").returncode == 0
    said = (tmp_path / "log").read_text().splitlines()
    assert said[:-1] == ["compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=us-a", "--worker=all"]
    folder, _, command = said[-1].removeprefix("--command=").partition(" && ")
    assert shlex.split(folder) == ["cd", "my folder"]
    assert shlex.split(command) == ["MULTITAP_COORDINATOR=auto", ".venv/bin/multitap", "score", "--input=a b.jsonl"]


def test_the_jobset_is_sound_and_gives_every_pod_its_place():
    manifest = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    schema = json.loads(Path(__file__).with_name("jobset_schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(manifest, schema)
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    stated = {
        f"metadata.annotations['jobset.sigs.k8s.io/{key}']": value
        for key, value in {"jobset-name": "multitap", "replicatedjob-name": job["name"], "job-index": "0"}.items()
    }
    variables = {
        entry["name"]: entry.get("value") or stated[entry["valueFrom"]["fieldRef"]["fieldPath"]]
        for entry in container["env"]
    }
    assert int(variables["JOBSET_PODS_PER_JOB"]) == spec["parallelism"] == spec["completions"]
    assert int(variables["JOBSET_JOBS"]) == job["replicas"]
    place = find_place(None, None, None, {**variables, "JOB_COMPLETION_INDEX": "3"})
    assert (place.processes, place.process) == (16, 3)
    assert place.coordinator == f"multitap-workers-0-0.multitap:{PORT}"
    assert container["ports"] == [{"containerPort": PORT}]
    names = [rule["onExitCodes"]["containerName"] for rule in spec["podFailurePolicy"]["rules"]]
    assert names == [container["name"]]
    assert (LAUNCH.parent / container["args"][1].removeprefix("--config=")).is_file()
    arguments = [f"--config={LAUNCH.parent / 'configs/official.py'}", *container["args"][2:]]
    assert cli.parse(container["args"][0], arguments).workdir == "/data/run"
