"""Several processes over Gloo do what one does: train, embed, fit, score, evaluate."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from multitap_jax.demo.checkpoint import build_checkpoint
from multitap_jax.demo.texts import vocabulary_sample
from multitap_jax.demo.world import build_world
from multitap_jax.stage2 import EmbeddingStore
from tests.parallel.group import CLI, ROOT, programs_kept, start, verbs, when


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(autouse=True, scope="module")
def compiled(folder):
    with programs_kept(folder / "cache"):
        yield


@pytest.fixture(scope="module")
def world(folder):
    paths = build_world(folder / "world", 12, 0, 0.25)
    broken = json.loads(paths.train.read_text().splitlines()[0]) | {"id": "broken", "image": "nowhere.png"}
    with paths.train.open("a") as file:
        file.write(json.dumps(broken) + "\n")
    build_checkpoint(folder / "base", vocabulary_sample(), seed=0)
    return paths


def training(folder, world, workdir, *more) -> list[object]:
    return [
        "train",
        f"--config={ROOT / 'configs' / 'lora.py'}",
        f"--workdir={workdir}",
        f"--config.model.checkpoint={folder / 'base'}",
        f"--config.data.train={world.train}",
        f"--config.data.evaluation={world.heldout}",
        "--config.data.image_policy=square:84",
        "--config.data.max_rejected=0.1",
        "--config.model.dtype=float32",
        "--config.batch_size=16",
        "--config.epochs=1",
        "--config.log_every=1",
        *more,
    ]


def after_training(world, artefact, out, *more) -> list[list[object]]:
    model, source = f"--checkpoint={artefact}", f"--input={world.train}"
    return [
        ["embed", model, source, f"--output={out / 'store'}", "--shard_rows=10", "--max_rejected=0.1"],
        ["fit", model, f"--embeddings={out / 'store'}"],
        ["score", model, source, f"--output={out / 'scores.jsonl'}", "--window=10", "--max_rejected=0.1", *more],
        ["evaluate", f"--scores={out / 'scores.jsonl'}", source, f"--output={out / 'report'}", "--bootstrap=20"],
        ["fit", model, source, "--max_rejected=0.1"],
    ]


def losses(workdir: Path) -> list[float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] if "loss" in line else line["evaluation"]["loss"] for line in lines]


@pytest.fixture(scope="module")
def alone(folder, world) -> Path:
    out = folder / "alone"
    group = verbs([training(folder, world, out / "run")], 1, out)
    assert group.wait() == [0], group.log(0)
    for name in ("one", "two"):
        shutil.copytree(out / "run" / "artefact", folder / name)
    group = verbs(after_training(world, folder / "one", out), 1, out)
    assert group.wait() == [0], group.log(0)
    return out


@pytest.fixture(scope="module")
def pair(folder, world, alone) -> Path:
    """Two processes of two devices each."""
    out = folder / "pair"
    both = ("--devices=2", "--fsdp=2")
    commands = [training(folder, world, out / "run"), *after_training(world, folder / "two", out, *both)]
    group = verbs(commands, 2, out, JAX_NUM_CPU_DEVICES=2)
    assert group.wait() == [0, 0], group.log(0) + group.log(1)
    return out


def test_two_processes_train_to_the_losses_and_the_weights_of_one(alone, pair):
    np.testing.assert_allclose(losses(pair / "run"), losses(alone / "run"), rtol=3e-6)
    for name in ("model", "heads"):
        one, two = (load_file(out / "run" / "artefact" / f"{name}.safetensors") for out in (alone, pair))
        assert one.keys() == two.keys()
        for key in one:
            np.testing.assert_allclose(two[key].astype(np.float32), one[key].astype(np.float32), rtol=1e-5, atol=1e-6)
    for out in (alone, pair):
        rejected = [json.loads(line) for line in (out / "run" / "rejected.jsonl").read_text().splitlines()]
        assert [entry["id"] for entry in rejected] == ["broken"]
    assert not list((pair / "run").glob("rejected-*"))


def test_two_processes_embed_the_same_rows_in_the_same_order(alone, pair):
    one, two = (EmbeddingStore(out / "store") for out in (alone, pair))
    assert one.ids == two.ids
    assert len(one.ids) == 54
    for (x, y, groups), (x2, y2, groups2) in zip(one.batches(64), two.batches(64), strict=True):
        np.testing.assert_allclose(x2, x, atol=2e-5)
        np.testing.assert_array_equal(y2, y)
        assert groups == groups2
    assert (pair / "store" / "rejected.jsonl").read_text() == (alone / "store" / "rejected.jsonl").read_text()
    assert not (pair / "store" / ".parts").exists()


def test_two_processes_fit_the_same_heads(folder, alone, pair):
    one, two = (load_file(folder / name / "heads.safetensors") for name in ("one", "two"))
    np.testing.assert_allclose(two["ridge.alpha"], one["ridge.alpha"], rtol=1e-6)
    for name in [name for name in one if name.startswith("seen.")]:
        np.testing.assert_array_equal(two[name], one[name])
    scale = np.abs(one["ridge.coef"]).max()
    np.testing.assert_allclose(two["ridge.coef"], one["ridge.coef"], atol=1e-3 * scale, rtol=0)
    objectives = [json.loads((folder / name / "multitap.json").read_text())["objectives"] for name in ("one", "two")]
    assert [o["range"] for o in objectives[0]] == [o["range"] for o in objectives[1]]


def test_two_processes_write_the_same_lines(alone, pair):
    one, two = (list(map(json.loads, (out / "scores.jsonl").read_text().splitlines())) for out in (alone, pair))
    assert [{**line, "score": 0, "scores": 0} for line in one] == [{**line, "score": 0, "scores": 0} for line in two]
    assert one[-1]["error"] is not None
    for a, b in zip(one[:-1], two[:-1], strict=True):
        assert b["score"] == pytest.approx(a["score"], abs=1e-5)
        assert list(b["scores"].values()) == pytest.approx(list(a["scores"].values()), abs=1e-3)
    assert not (pair / "scores.jsonl.parts").exists()
    numbers = [json.loads((out / "report" / "metrics.json").read_text()) for out in (alone, pair)]
    assert numbers[1]["overall"]["n"] == numbers[0]["overall"]["n"] == 54


def test_four_processes_share_parameters_and_heads(folder, world, alone):
    out = folder / "four"
    mesh = ("--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    group = start([*CLI, *map(str, training(folder, world, out / "run", *mesh))], 4, out)
    assert group.wait() == [0] * 4, group.log(0) + group.log(3)
    np.testing.assert_allclose(losses(out / "run"), losses(alone / "run"), rtol=3e-6)


def test_what_two_began_to_score_one_finishes(folder, world, alone):
    out = folder / "begun" / "scores.jsonl"
    command = ["score", f"--checkpoint={folder / 'one'}", f"--input={world.train}", f"--output={out}"]
    command = [*CLI, *command, "--window=2", "--max_rejected=0.1", "--heartbeat_timeout=10"]
    group = start(command, 2, folder / "begun")
    when(lambda: out.exists() and out.stat().st_size > 0, group)
    group.processes[1].kill()
    assert group.wait(90)[0] != 0
    begun = len(out.read_text().splitlines())
    assert 0 < begun < 55
    lone = start(command, 1, folder / "begun")
    assert lone.wait() == [0], lone.log(0)
    found, expected = ([json.loads(line) for line in path.read_text().splitlines()] for path in (out, alone / out.name))
    assert [line["id"] for line in found] == [line["id"] for line in expected]
    for a, b in zip(found[:-1], expected[:-1], strict=True):
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)
    assert not out.with_name("scores.jsonl.parts").exists()


def test_the_local_launcher_trains_to_the_losses_of_one_process(folder, world, alone):
    out = folder / "launched"
    command = [str(ROOT / "launch" / "local.sh"), "2", *map(str, training(folder, world, out / "run"))]
    group = start(command, 1, out, MULTITAP=" ".join(CLI))
    assert group.wait() == [0], group.log(0)
    np.testing.assert_allclose(losses(out / "run"), losses(alone / "run"), rtol=3e-6)
