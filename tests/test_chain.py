"""The whole chain through the command line: draw, train, embed, fit, score, evaluate, export; and what goes wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from multitap_jax import cli
from multitap_jax.demo.checkpoint import build_checkpoint
from multitap_jax.demo.run import run_demo
from multitap_jax.demo.texts import OBJECTIVES, vocabulary_sample
from multitap_jax.demo.world import build_world
from multitap_jax.stage2 import EmbeddingStore, RidgeHead
from tests.documentation import python_blocks

CONFIGS = Path(__file__).parents[1] / "configs"
ROOT = CONFIGS.parent
PATHS = ("--checkpoint=x", "--input=y", "--output=z")
TRAIN = ("train", f"--config={CONFIGS / 'lora.py'}", "--workdir=w")


def run(*arguments: str) -> int:
    return cli.main([str(argument) for argument in arguments])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("chain")


@pytest.fixture(scope="module")
def world(folder):
    return build_world(folder / "world", 12, 0, 0.25)


@pytest.fixture(scope="module")
def base(folder) -> Path:
    return build_checkpoint(folder / "base", vocabulary_sample(), seed=0)


@pytest.fixture(scope="module")
def artefact(folder, world, base) -> Path:
    """Trained with LoRA through the `train` verb on the 8 simulated devices."""
    code = run(
        "train",
        f"--config={CONFIGS / 'lora.py'}",
        f"--workdir={folder / 'run'}",
        f"--config.model.checkpoint={base}",
        f"--config.data.train={world.train}",
        f"--config.data.evaluation={world.heldout}",
        "--config.data.image_policy=square:84",
        "--config.model.dtype=float32",
        "--config.batch_size=16",
        "--config.epochs=1",
    )
    assert code == 0
    return folder / "run" / "artefact"


def test_training_leaves_an_artefact_and_its_numbers(artefact):
    metrics = lines(artefact.parent / "metrics.jsonl")
    assert any("loss" in line for line in metrics)
    assert any("evaluation" in line for line in metrics)
    manifest = json.loads((artefact / "multitap.json").read_text())
    assert manifest["contract"]["image_policy"] == "square:84"
    assert not any("lora" in name for name in load_file(artefact / "model.safetensors"))
    assert (artefact.parent / "rejected.jsonl").read_text() == ""


def test_embed_fit_score_evaluate_export(artefact, world, folder, capsys):
    assert run("embed", f"--checkpoint={artefact}", f"--input={world.train}", f"--output={folder / 'store'}") == 0
    assert run("fit", f"--checkpoint={artefact}", f"--embeddings={folder / 'store'}") == 0
    scores = folder / "scores.jsonl"
    command = ("score", f"--checkpoint={artefact}", f"--input={world.heldout}", f"--output={scores}")
    assert run(*command) == 0
    found, records = lines(scores), lines(world.heldout)
    assert [line["id"] for line in found] == [record["id"] for record in records]
    assert all(0 < line["score"] < 1 and sorted(line["scores"]) == sorted(OBJECTIVES) for line in found)
    before = scores.read_bytes()
    assert run(*command) == 0  # done already: nothing changes
    assert scores.read_bytes() == before
    note = json.loads((folder / "scores.jsonl.job.json").read_text())
    assert note["trained_on"]["target"] == "score"
    assert note["conditions"]["prompt"] == "official-train"
    assert (note["conditions"]["alpha_rule"], note["conditions"]["references"]) == ("kfold", "none seen")
    report = folder / "evaluation"
    assert (
        run("evaluate", f"--scores={scores}", f"--input={world.heldout}", f"--output={report}", "--bootstrap=50") == 0
    )
    assert {"metrics.json"} < {path.name for path in report.iterdir()}
    assert json.loads((report / "metrics.json").read_text())["dtype"] == "float32"  # noted by `score`
    for layout in ("artefact", "heads", "official", "vllm"):
        out = folder / "exports" / layout
        assert run("export", f"--checkpoint={artefact}", f"--output={out}", f"--format={layout}") == 0
        assert any(out.glob("*.safetensors"))
    assert "warning: these weights were trained for position_mode mrope" in capsys.readouterr().err
    back, again = folder / "exports" / "back", folder / "again.jsonl"
    assert run("import", f"--checkpoint={folder / 'exports' / 'official'}", f"--output={back}") == 0
    assert run("score", f"--checkpoint={back}", f"--input={world.heldout}", f"--output={again}") == 0
    assert [line["score"] for line in lines(again)] == [line["score"] for line in found]
    capsys.readouterr()


def test_records_of_training_are_known_again(artefact, world, folder, tmp_path, capsys):
    """Under other names and in another folder, by the content of their pictures and texts."""
    moved = shutil.copytree(world.train.parent, tmp_path / "moved")
    rows = [row | {"id": f"new-{row['id']}", "group": None} for row in lines(moved / world.train.name)]
    rows[0]["text"] += " And more."
    mixed = moved / "mixed.jsonl"
    mixed.write_text("".join(json.dumps(row) + "\n" for row in rows[:20] + lines(moved / world.heldout.name)[:9]))
    scores, page = tmp_path / "scores.jsonl", tmp_path / "page.html"
    assert run("score", f"--checkpoint={artefact}", f"--input={mixed}", f"--output={scores}") == 0
    capsys.readouterr()
    assert run("evaluate", f"--scores={scores}", f"--input={mixed}", "--bootstrap=0") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for who in ("the model was trained on", "the heads were fitted on"):
        assert f"19 of 29 records were among those that {who}: how" in shown
        assert f"1 of 29 records show pictures of records that {who}, with other texts or requests (new-" in shown
    assert run("report", f"--scores={scores}", f"--input={mixed}", "--bootstrap=0", f"--output={page}") == 0
    assert "19 of 29 records were among those that the heads were fitted on" in page.read_text()
    clean = folder / "scores.jsonl"
    assert run("evaluate", f"--scores={clean}", f"--input={world.heldout}", "--bootstrap=0") == 0
    assert "records were among" not in " ".join(capsys.readouterr().out.split())


def test_training_tells_of_held_out_pairs_that_it_learns_from(base, world, tmp_path, capsys):
    both = world.train.parent / "both.jsonl"
    both.write_text(world.heldout.read_text() + world.train.read_text().splitlines()[0] + "\n")
    train = ("train", f"--config={CONFIGS / 'lora.py'}", f"--workdir={tmp_path / 'run'}", "--config.batch_size=16")
    assert (
        run(
            *train,
            f"--config.model.checkpoint={base}",
            f"--config.data.train={world.train}",
            f"--config.data.evaluation={both}",
            "--config.data.image_policy=square:84",
            "--config.epochs=1",
        )
        == 0
    )
    shown = " ".join(capsys.readouterr().err.split())
    assert "held-out pairs: 1 of " in shown
    assert "records were among those that the model was trained on" in shown


def test_fitting_straight_from_records_equals_fitting_from_the_store(artefact, world, folder, capsys):
    before = load_file(artefact / "heads.safetensors")
    assert run("fit", f"--checkpoint={artefact}", f"--input={world.train}") == 0
    after = load_file(artefact / "heads.safetensors")
    np.testing.assert_array_equal(after["reward_head.weight"], before["reward_head.weight"])
    rated = sum(any(value is not None for value in row["ratings"].values()) for row in lines(world.train))
    assert len(after["seen.fitted.id"]) == rated
    for name in [name for name in after if name.startswith("seen.")]:
        np.testing.assert_array_equal(after[name], before[name])
    np.testing.assert_allclose(after["ridge.alpha"], before["ridge.alpha"], rtol=1e-6)
    scale = np.abs(before["ridge.coef"]).max()
    np.testing.assert_allclose(after["ridge.coef"], before["ridge.coef"], atol=1e-3 * scale, rtol=0)
    shown = capsys.readouterr()
    assert "tau: the rows were read only once" in " ".join(shown.out.split())
    assert "embedding" in shown.err
    assert "scoring" not in shown.err


@pytest.mark.parametrize("cv", ["gcv", "loo", "logo"])
def test_fit_chooses_alpha_as_it_is_told(artefact, world, folder, cv):
    store = folder / "store"
    if not store.exists():
        assert run("embed", f"--checkpoint={artefact}", f"--input={world.train}", f"--output={store}") == 0
    copy = shutil.copytree(artefact, folder / f"artefact-{cv}")
    assert run("fit", f"--checkpoint={copy}", f"--embeddings={store}", f"--cv={cv}") == 0
    expected, found = RidgeHead(cv=cv).fit_store(EmbeddingStore(store)), load_file(copy / "heads.safetensors")
    np.testing.assert_array_equal(found["ridge.alpha"], expected.alpha_)
    np.testing.assert_allclose(found["ridge.coef"], expected.coef_, rtol=1e-5, atol=1e-7)
    objectives = json.loads((copy / "multitap.json").read_text())["objectives"]
    np.testing.assert_allclose([one["cv_score"] for one in objectives], expected.r2_, rtol=1e-6)


def test_an_embedding_run_that_was_cut_off_goes_on(artefact, world, folder):
    store = folder / "cut"
    command = ("embed", f"--checkpoint={artefact}", f"--input={world.train}", f"--output={store}", "--shard_rows=10")
    assert run(*command) == 0
    whole = {path.name: path.read_bytes() for path in store.glob("embeddings-*.safetensors")}
    manifest = json.loads((store / "manifest.json").read_text())
    kept = manifest["shards"][:2]
    manifest |= {"shards": kept, "rows": sum(shard["rows"] for shard in kept), "complete": False}
    (store / "manifest.json").write_text(json.dumps(manifest))
    for name in sorted(whole)[2:]:
        (store / name).unlink()
    assert run(*command) == 0
    ids = [name for path in sorted(store.glob("embeddings-*.safetensors")) for name in _ids(path)]
    assert ids == [record["id"] for record in lines(world.train)]
    for name in sorted(whole)[2:]:
        for key, value in load_file(store / name).items():
            assert value.shape[0] > 0, key


def _ids(path: Path) -> list[str]:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return json.loads(json.loads(raw[8 : 8 + size])["__metadata__"]["ids"])


def test_the_demo_runs_and_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    report = run_demo(tmp_path / "demo_run", scenes=10, caption_steps=2, epochs=1)
    page = report.read_text()
    assert page.count("<svg") == 3
    assert "pictures blanked" in page
    seconds = json.loads((tmp_path / "demo_run/phases.json").read_text())["seconds"]
    run_demo(tmp_path / "demo_run", scenes=10, caption_steps=2, epochs=1)
    again = json.loads((tmp_path / "demo_run/phases.json").read_text())["seconds"]
    assert again == seconds
    with pytest.raises(ValueError, match="other settings|holds a demo"):
        run_demo(tmp_path / "demo_run", scenes=11, caption_steps=2, epochs=1)
    shown = capsys.readouterr().out.splitlines()
    rows = {name: row for row in shown for name in ("untrained", "safety") if row.strip().startswith(name)}
    assert "%" in rows["safety"]
    assert "%" not in rows["untrained"]  # half a point of a score from 0 to 1 says nothing
    monkeypatch.chdir(tmp_path)
    (example,) = [code for code in python_blocks(ROOT / "README.md") if "demo_run" in code]
    first, last = filter(None, example.splitlines())
    names: dict = {}
    exec(first, names)
    scores = eval(last, names)
    assert scores.errors == [None]
    assert 0 < scores.overall[0] < 1
    assert scores.names == OBJECTIVES


def test_the_demo_leaves_the_folders_of_others_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert run("demo", f"--workdir={tmp_path}") == 1
    assert "is not empty and holds no demo" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_teaches(verb, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main([verb, "--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0
    assert f"multitap {verb}" in text
    assert "--" in text


def test_the_program_teaches_and_corrects(capsys):
    assert run("--help") == 0
    assert "usage: multitap VERB" in capsys.readouterr().out
    assert run("scor") == 2
    assert "did you mean score?" in capsys.readouterr().err
    assert run("--version") == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("score",), 2, "--checkpoint is missing: give it as --checkpoint=VALUE"),
        (("score", "--chekpoint=x"), 2, "there is no flag --chekpoint; did you mean --checkpoint?"),
        (("score", "--dtype=float16"), 2, "--dtype=float16: expected one of float32, bfloat16"),
        (("score", "--truncate=maybe"), 2, "--truncate=maybe: expected true or false"),
        (("score", "--window=many"), 2, "--window=many: expected a whole number"),
        (("score", *PATHS, "--window=0"), 2, "--window=0: expected a whole number, 1 or more"),
        (("score", *PATHS, "--max_rejected=nan"), 2, "--max_rejected=nan: expected a share, from 0 to 1"),
        (("score", *PATHS, "--max-rejected=2"), 2, "--max_rejected=2.0: expected a share, from 0 to 1"),
        (("fog",), 2, "there is no verb 'fog'. The verbs: demo"),
        (("score", "--checkpoint=nowhere", "--input=x", "--output=y"), 1, "no such folder"),
        (("score", *PATHS, "--devices=9"), 1, "--devices=9 --fsdp=1: this process has 8, and fsdp divides devices"),
        (("embed", *PATHS, "--num_processes=2"), 1, "--num_processes and --process_id need --coordinator=HOST:PORT"),
        (("fit", "--checkpoint=nowhere"), 1, "give one of --embeddings (a folder that `embed` wrote) or --input"),
        (("fit", "--checkpoint=a", "--embeddings=b", "--input=c"), 1, "(records), not both"),
        (("evaluate", "--scores=a", "--input=b", "--target_range=1"), 1, "--target_range=1: expected two numbers"),
        (("train", "--config=nowhere.py", "--workdir=w"), 2, "--config=nowhere.py: there is no file nowhere.py"),
        ((*TRAIN, "--config.batch_size=many"), 2, "--config.batch_size=many: expected a whole number"),
        ((*TRAIN, "--config.learning_rate=1"), 2, "did you mean --config.optimizer.learning_rate?"),
        ((*TRAIN, "--config.optimizer.lr=1"), 2, "settings of config.optimizer: learning_rate"),
        ((*TRAIN, "--config.model.checkpoint=x", "--config.data.train=y"), 1, "x: no such folder. Nothing is fetched"),
        ((*TRAIN, "--config.optimizer.b1=nan"), 1, "config.optimizer.b1 = nan: expected a number in [0, 1)"),
        (
            ("train", f"--config={CONFIGS / 'official.py'}:claimd", "--workdir=w"),
            2,
            "claimd: the variants are effective",
        ),
        (("export", "--checkpoint=a", "--output=b", "--format=onnx"), 2, "onnx"),
        ((*TRAIN, "--config.bach_size=2"), 2, "--config.bach_size is not a setting; did you mean --config.batch_size?"),
    ],
)
def test_wrong_use_is_explained(arguments, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        found = run(*arguments)
    except SystemExit as stop:
        found = stop.code
    assert found == code
    assert message in capsys.readouterr().err


def test_paths_of_the_wrong_kind_are_explained(artefact, world, tmp_path, capsys):
    command = (f"--checkpoint={artefact}", f"--input={world.heldout}")
    assert run("score", *command, f"--output={tmp_path}") == 1
    assert f"{tmp_path}: is a folder; give the file for the scores" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert run("embed", *command, f"--output={tmp_path / 'file'}") == 1
    assert "file: is a file, and a folder is written here" in capsys.readouterr().err


def test_help_of_train_lists_the_settings(capsys):
    with pytest.raises(SystemExit):
        run("train", "--help")
    text = capsys.readouterr().out
    assert "--config.optimizer.warmup_ratio" in text
    assert "share of the steps in which the rate rises linearly from zero. (default: 0.0)" in " ".join(text.split())


def test_tokenizers_load_without_advice_to_install_torch(base):
    code = "import sys; from multitap_jax.data.prompts import load_tokenizer; load_tokenizer(sys.argv[1])"
    env = {name: value for name, value in os.environ.items() if "TRANSFORMERS" not in name}
    done = subprocess.run(
        [sys.executable, "-c", code, str(base)], check=True, cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert "PyTorch" not in done.stderr


def test_an_absent_tpu_is_not_spoken_of(tmp_path):
    """libtpu is here to plan with; JAX would look for its TPU whatever a verb does."""
    pytest.importorskip("libtpu")
    code = "from multitap_jax.parallel.host import hush_absent_tpu as h; h(); import jax; print(jax.devices())"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "TPU_"))}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "Device" in run.stdout
    assert not run.stderr


def test_the_program_starts_without_touching_torch():
    code = "import sys; import multitap_jax.cli, multitap_jax.scoring.scorer, multitap_jax.stage1.run; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[1]).returncode == 0
