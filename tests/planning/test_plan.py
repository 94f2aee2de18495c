"""`multitap plan` on simulated devices: what it counts, what it says, and what it refuses."""

import dataclasses
import itertools
import json
import re
import sys

import pytest

from multitap_jax import cli
from multitap_jax.config import ConfigError, DataConfig, MeshConfig, ModelConfig, TrainableConfig, TrainConfig
from multitap_jax.flops import Work, forward_flops
from multitap_jax.parallel.listing import placements
from multitap_jax.parallel.mesh import make_mesh
from multitap_jax.planning import chips, planner, report
from multitap_jax.planning.chips import CHIPS, Chip, Topology
from multitap_jax.planning.compiled import Compiled, Memory, _warnings
from multitap_jax.planning.cost import Collective, Cost
from multitap_jax.planning.hlo import Array
from multitap_jax.planning.planner import fits, make_plan
from multitap_jax.planning.programs import abstract_model, held
from multitap_jax.planning.published import PUBLISHED, read_model
from multitap_jax.planning.remedies import candidates, changes
from multitap_jax.planning.roofline import roofline
from multitap_jax.planning.workload import Assumptions, scoring_workload, training_workload
from tests.shardings import CONFIGS
from tests.tiny_qwen2_vl import tiny_config

CPU = Topology.parse("cpu:8")
MIXED = MeshConfig(data=2, fsdp=2, tensor=2)
CONFIG = TrainConfig(
    mesh=MIXED,
    model=ModelConfig(dtype="float32"),
    data=DataConfig(image_policy="square:56", row_length=64),
    batch_size=16,
)
ASSUMED = Assumptions(texts_per_image=2, text_tokens=6, prompt_tokens=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a config.json and nothing else."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(tiny_config()))
    return folder


@pytest.fixture(scope="module")
def plan(folder):
    return make_plan(CONFIG, str(folder), CPU, ASSUMED)


def test_the_steps_are_counted_to_the_formula(folder):
    """Of padded rows, since dense attention computes every pair; three layers in one loop count three times, and all
    of them as whole ones: the loop chooses between a whole and a last layer, and what it may compute counts."""
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(data=2, fsdp=4))
    training, scoring = make_plan(config, str(folder), CPU, ASSUMED).steps
    _, numbers = read_model(str(folder))

    def counted(step):
        (rows, tokens), (pictures, patches) = step.workload.batch.tokens.shape, step.workload.batch.patches.shape[:2]
        text, vision = (rows * tokens, rows * tokens**2), (pictures * patches, pictures * patches**2)
        padded = Work(*text, *vision, rows * tokens, *text)
        return 8 * step.compiled.cost.flops / forward_flops(numbers, padded).total

    assert counted(scoring) == pytest.approx(1, rel=1e-4)
    assert 2.9 < counted(training) < 3  # pixels have no gradient


def test_arguments_are_what_is_held_and_the_batch(plan, folder):
    training = plan.steps[0]
    model = abstract_model(*read_model(str(folder)), CONFIG)
    trees = held(model, CONFIG, make_mesh(MIXED))
    between = sum(array.bytes_per_device for tree in trees for array in placements(tree))
    batch = sum(array.bytes_per_device for array in placements(training.workload.batch))
    assert plan.held == between
    # A batch without images apart has an argument without bytes; some arrays of the batch are not read at all.
    assert between < training.compiled.memory.arguments <= between + batch
    assert plan.params == sum(array.bytes // 4 for array in placements(trees.state.trainable))


def test_scoring_gathers_weights_and_never_activations(folder):
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(data=2, fsdp=4))
    (scoring,) = make_plan(config, str(folder), CPU, ASSUMED, steps=("scoring",)).steps
    activations = scoring.workload.batch.tokens.size // 8 * 64 * 4  # of one shard, one layer
    large = [item for item in scoring.compiled.cost.collectives if item.payload >= activations / 4]
    # Looked-up embeddings alone change places, from columns to rows within an fsdp group.
    assert {item.kind for item in large} == {"all-to-all"}
    assert sum(item.payload * item.runs for item in large) <= 2 * activations


def test_the_shapes_are_those_of_the_packer(plan):
    shape = plan.steps[0].workload
    assert shape.pairs == 16
    # 8 pictures over 4 shards; 3 + 3 prompt tokens and 4 cells of picture, twice 6 of text.
    assert shape.batch.tokens.shape == (4, 64)
    assert shape.batch.patches.shape == (8, 16, 588)
    assert shape.work.tokens == 8 * (8 - 1 + 4 + 2 * 6)
    alone = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, shuffle="pairs"))
    spread = training_workload(alone, *read_model("qwen2-vl-2b"), make_mesh(MIXED), ASSUMED)
    assert spread.batch.patches.shape[0] == 16  # each pair has its own picture


def test_images_out_of_the_row_and_pairs_without_pictures_have_shapes_too():
    mesh = make_mesh(MIXED)
    config = TrainConfig(mesh=MIXED, batch_size=8, data=DataConfig(shuffle="groups"))
    assert (
        training_workload(config, *read_model("llama-3.2-vision-11b"), mesh, Assumptions()).batch.image_token.shape[1]
        == 1
    )
    scoring = scoring_workload(config, *read_model("llama-3.2-vision-11b"), mesh, Assumptions(), 8 * 16384)
    assert scoring.batch.patches.shape[0] * scoring.batch.patches.shape[1] <= 1.25 * 8 * 16384
    plain = scoring_workload(config, *read_model("qwen3-vl-4b"), mesh, Assumptions(pictures=0), 4096)
    assert plain.work.patches == 0
    with pytest.raises(ConfigError, match=r"an assumed pair cannot be scored: the text has 4000 tokens"):
        scoring_workload(config, *read_model("qwen3-vl-4b"), mesh, Assumptions(text_tokens=4000), 4096)


def test_the_verb_prints_writes_and_exits(folder, tmp_path, capfd):
    shardings, out = tmp_path / "shardings.txt", tmp_path / "plan.json"
    command = [f"--config={CONFIGS / 'lora.py'}", f"--model={folder}", "--topology=cpu:8", "--step=training"]
    command += ["--config.data.image_policy=square:56", "--config.batch_size=8", "--texts-per-image=2"]
    assert cli.main(["plan", *command, f"--json={out}", f"--shardings={shardings}"]) == 0
    said = capfd.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    for words in ("LoRA training on cpu:8 (8 chips, fsdp=8)", "training step: 8 pairs", "temporaries", "all-reduce"):
        assert words in said
    found = json.loads(out.read_text())
    assert found["fits"]
    assert found["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1, "context": 1}
    step = found["steps"]["training"]
    assert step["memory"]["peak"] >= step["memory"]["arguments"] > found["held"]
    assert step["collectives"][0]["sent"] > 0
    assert "lora_a" in shardings.read_text()


def test_help_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["plan", "--help"])
    said = capsys.readouterr().out
    for words in ("--topology=v5e:8x8", "Exit code: 0 every step fits", "MFU  <=", "llama-3.2-vision-90b", "--verify"):
        assert words in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v9:8x8"], r"topology 'v9:8x8': known are v5e:8x8, v5p:4x4x4, v6e:8x8 and cpu:8"),
        (["--topology=v5p:8x8"], r"v5p takes three sides of 1 or more"),
        (["--topology=cpu:8", "--slices=2"], r"simulated devices of a CPU form no slices"),
        (["--topology=cpu:8", "--model=qwen-vl-7b"], r"'qwen-vl-7b' is no folder.*did you mean qwen2-vl-7b\?"),
        (["--topology=cpu:8", "--config.mesh.fsdp=3"], r"fsdp=3.*3, must equal the number of devices, 8"),
        (
            ["--topology=cpu:8", "--config.mesh.tensor=8"],
            r"config\.mesh\.tensor = 8 does not divide text\.num_heads = 28",
        ),
        (
            ["--topology=cpu:8", "--json=nowhere/plan.json"],
            r"--json=nowhere/plan.json: there is no folder nowhere; make it",
        ),
        (["--topology=cpu:9"], r"JAX was started with 8 CPU devices"),
        (["--topology=cpu:8", "--picture=big"], r"--picture=big: expected WIDTHxHEIGHT"),
        (["--topology=cpu:8", "--config.data.image_policy=square:561"], r"must be a multiple of 28 pixels"),
    ],
)
def test_what_does_not_fit_together_is_named(flags, message, capsys):
    command = [f"--config={CONFIGS / 'official.py'}", "--model=qwen2-vl-7b", *flags]
    assert cli.main(["plan", *command]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_missing_libtpu_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ConfigError, match=r"needs libtpu: pip install -e '\.\[tpu-plan\]'"):
        Topology.parse("v5e:8x8").devices()


def test_published_names_are_models():
    assert {f"qwen2-vl-{size}" for size in ("2b", "7b", "72b")} <= set(PUBLISHED)
    assert {f"llama-3.2-vision-{size}" for size in ("11b", "90b")} <= set(PUBLISHED)


def collective(sent: float, *devices: int) -> Collective:
    return Collective("collective-permute", (Array("pred", (int(sent),)),), 1, devices, "")


def test_the_roofline_is_the_slowest_of_what_overlaps():
    chip = Chip("TPU v5e", 16, memory_bandwidth=10.0, link_bandwidth=5.0, outer_bandwidth=1.0, dimensions=2)
    spent = Cost(197e12 * 3, 40.0, (collective(10, 0, 1), collective(5, 0, 2)))
    found = roofline(spent, chip, useful=197e12 * 4, slice_of=[0, 0, 1, 1])
    assert (found.compute, found.memory, found.links, found.outer) == (3, 4, 2, 5)
    assert (found.seconds, found.bound) == (5, "slices")
    assert found.mfu == pytest.approx(4 / (5 * 4))


def test_chips_have_the_peaks_of_flops():
    assert {name: chip.flops for name, chip in CHIPS.items()} == {"v5e": 197e12, "v5p": 459e12, "v6e": 918e12}


def step_of(peak: int | None, limit_needed: int | None = None) -> Compiled:
    memory = None if peak is None else Memory(1, 0, 0, 1, 0, peak)
    return Compiled(1.0, memory, Cost(1.0, 1.0, ()), limit_needed)


def test_what_does_not_fit_gets_remedies(folder, monkeypatch, capsys):
    """The compiler is replaced: no chip is too small for a tiny model."""
    answers = iter([step_of(None, 40 << 30), step_of(20 << 30), step_of(10 << 30)])
    monkeypatch.setattr(planner, "compile_step", lambda *args, **options: next(answers))
    monkeypatch.setattr(chips, "_described", lambda topology: chips._simulated(8))
    config = dataclasses.replace(CONFIG, model=ModelConfig(remat="none"))
    found = make_plan(config, str(folder), Topology.parse("v5e:2x4"), ASSUMED, steps=("training",), verify=2)
    assert not found.fits
    first, second = found.remedies
    assert first.settings == ("--config.mesh.data=1", "--config.mesh.fsdp=4")
    assert first.held < found.held
    assert second.settings == ("--config.model.remat=dots", *first.settings)
    assert fits(second.compiled, found.limit)
    assert not fits(first.compiled, found.limit)
    from rich.console import Console

    report.print_plan(found, Console(width=80))
    said = capsys.readouterr().out
    assert "it would need 40.00 GiB or more on a chip" in said
    assert "DOES NOT FIT: the training step needs more than 15.75 GiB on each chip" in said
    assert "10.00 GiB fits" in said
    assert report.to_json(found)["steps"]["training"]["needed"] == 40 << 30


def test_remedies_come_in_the_order_of_their_price(folder):
    config = dataclasses.replace(CONFIG, batch_size=64)
    workload = training_workload(config, *read_model(str(folder)), make_mesh(MIXED), ASSUMED)
    mesh, given = dict(make_mesh(MIXED).shape), [set()]
    for _, changed in candidates(config, mesh, workload):
        given.append(set(changes(config, changed)))
    assert [sorted(after - before) for before, after in itertools.pairwise(given)] == [
        ["--config.mesh.data=1", "--config.mesh.fsdp=4"],
        ["--config.model.remat=dots"],
        ["--config.model.remat=full"],
        ["--config.accumulation=4"],
        ["--config.mesh.tensor=4"],
        ["--config.optimizer.offload=True"],
        ["--config.trainable.parts=lora"],
    ]
    only = TrainConfig(trainable=TrainableConfig(parts="lora"), model=ModelConfig(remat="full"), batch_size=1)
    workload = training_workload(only, *read_model(str(folder)), make_mesh(MeshConfig(), chips._simulated(1)), ASSUMED)
    assert list(candidates(only, dict.fromkeys(("data", "fsdp", "tensor", "context"), 1), workload)) == []


def test_arrays_that_the_partitioner_gathers_are_told():
    said = (
        "W1 spmd_partitioner.cc:652] [SPMD] Involuntary full rematerialization. The compiler was not able to go from "
        "sharding {a} to {b} without doing a full rematerialization of the tensor for HLO operation: "
        "%add.3 = f32[8], sharding={c}. As the last resort ...\n"
        "W1 another.cc:1] harmless\nW1 x.cc:1] Involuntary full rematerialization.\n"
    )
    assert _warnings([said, said]) == ("%add.3 = f32[8]", "an operation that it does not name")


def test_few_pairs_on_many_chips_are_remarked(plan):
    few = dataclasses.replace(plan.steps[0], workload=plan.steps[0].workload._replace(pairs=1))
    few = dataclasses.replace(few, workload=few.workload._replace(work=few.workload.work._replace(tokens=10)))
    (note,) = report.notes(few, plan)
    assert "1 pairs a step for 4 cells" in note
