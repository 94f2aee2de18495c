"""The loop: resumes bit for bit after any death, stops on SIGTERM and NaN, refuses another run's checkpoints."""

import contextlib
import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
from flax import nnx

from multitap_jax.backbones import Execution
from multitap_jax.checkpoint import CheckpointError
from multitap_jax.config import (
    CheckpointConfig,
    ConfigError,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainableConfig,
    TrainConfig,
)
from multitap_jax.flops import Work
from multitap_jax.stage1.metrics import MetricsLog, NonFiniteError, Recorder
from multitap_jax.stage1.progress import describe
from multitap_jax.stage1.spikes import LossSpikeError, SpikeWatch
from multitap_jax.stage1.train import train
from multitap_jax.stage1.trainable import add_lora, merge_lora
from tests.stage1.toy import ToyDataset, toy_batch, toy_model

CONFIG = TrainConfig(
    model=ModelConfig(dtype="float32"),
    optimizer=OptimizerConfig(learning_rate=1e-2, schedule="cosine"),
    mesh=MeshConfig(data=1, fsdp=8),
    checkpoint=CheckpointConfig(every_steps=2, keep=2),
    evaluate_every=3,
    log_every=1,
)


class Terminating(ToyDataset):
    """Sends its process a SIGTERM while batch 3 is taken."""

    def batch(self, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().batch(step)


@dataclasses.dataclass
class Turning(ToyDataset):
    """One batch again and again, whose targets the model has, until at `turn` they are the opposite."""

    turn: int = 0

    def __post_init__(self):
        batch = jax.tree.map(jax.numpy.asarray, toy_batch(0))
        self.scores = np.asarray(jax.jit(lambda: jax.nn.sigmoid(toy_model()(batch, Execution())))())

    def batch(self, step):
        batch = toy_batch(0)
        target = self.scores + 0.02 if step < self.turn else 1 - np.round(self.scores)
        return batch._replace(target=np.where(batch.weight > 0, target, 0).astype(np.float32))


class Empty(ToyDataset):
    """Its second batch has no pair that counts."""

    def batch(self, step):
        batch = super().batch(step)
        return batch._replace(weight=np.zeros_like(batch.weight)) if step == 1 else batch


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def curve(workdir):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines(workdir) if "loss" in line]


def assert_same_model(one, two):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: (workdir, result)."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, train(CONFIG, workdir, toy_model(), ToyDataset(), ToyDataset(num_steps=2, offset=100))


def test_a_run_leaves_what_it_promises(whole):
    workdir, result = whole
    assert (result.step, result.finished) == (6, True)
    assert json.loads((workdir / "run.json").read_text())["config"]["optimizer"]["schedule"] == "cosine"
    assert [line["step"] for line in lines(workdir) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    evaluations = {line["step"]: line["evaluation"] for line in lines(workdir) if "evaluation" in line}
    assert list(evaluations) == [0, 3, 6]
    assert result.evaluation == evaluations[6]
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["4", "6"]
    first = next(line for line in lines(workdir) if "loss" in line)
    assert first["mfu"] is None
    assert first["packing_efficiency"] == 1.0
    assert first["pairs_per_second"] > 0


def test_the_held_out_numbers_are_those_of_the_model(whole):
    _, result = whole
    errors = []
    for step in range(2):
        batch = toy_batch(100 + step)
        scores = jax.nn.sigmoid(result.model(jax.tree.map(jax.numpy.asarray, batch), Execution()))
        here = batch.weight > 0
        errors += list((np.asarray(scores)[here] - batch.target[here]) ** 2)
    np.testing.assert_allclose(result.evaluation["loss"], np.mean(errors), rtol=1e-5)
    assert result.evaluation["pairs"] == len(errors)


def test_sigterm_saves_and_the_rest_is_bit_for_bit(whole, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    held_out = ToyDataset(num_steps=2, offset=100)
    stopped = train(CONFIG, tmp_path, toy_model(), Terminating(), held_out)
    assert signal.getsignal(signal.SIGTERM) is before
    assert (stopped.step, stopped.finished, stopped.evaluation) == (4, False, None)
    result = train(CONFIG, tmp_path, toy_model(), ToyDataset(), held_out)
    assert result.finished
    assert_same_model(result.model, whole[1].model)
    assert curve(tmp_path) == curve(whole[0])
    assert result.evaluation == whole[1].evaluation


def test_a_finished_run_does_nothing_more(whole, capsys):
    workdir, result = whole
    before = (workdir / "metrics.jsonl").read_text()
    again = train(CONFIG, workdir, toy_model(7), ToyDataset(), ToyDataset(num_steps=2, offset=100))
    assert_same_model(again.model, result.model)
    assert again.evaluation == result.evaluation
    assert (workdir / "metrics.jsonl").read_text() == before
    assert "going on after step 6 of 6" in capsys.readouterr().err


def test_nan_stops_the_run_and_names_the_records(tmp_path):
    with pytest.raises(NonFiniteError, match=r"step 4: loss = nan.*step3-pair0, step3-pair1.*not applied"):
        train(CONFIG, tmp_path, toy_model(), ToyDataset(poison=3))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_a_loss_that_rises_and_stays_stops_the_run_and_names_the_records(tmp_path):
    config = dataclasses.replace(
        CONFIG,
        evaluate_every=0,
        spike_factor=3.0,
        optimizer=OptimizerConfig(learning_rate=0.0),
        checkpoint=CheckpointConfig(every_steps=0),
    )
    with pytest.raises(LossSpikeError, match=r"step 45: the median loss.*records step\d\d-pair0, .*spike_factor=0"):
        train(config, tmp_path, toy_model(), Turning(num_steps=60, turn=40))
    assert lines(tmp_path)[-1]["step"] == 44


def test_one_unlucky_batch_is_no_spike():
    watch = SpikeWatch(10.0)
    rng = np.random.default_rng(0)
    losses = 0.02 * rng.standard_normal(20_000) ** 2  # one pair a step
    assert max(losses) > 30 * np.median(losses)
    assert not any(watch.see(step, loss) for step, loss in enumerate(losses))
    found = [spike for step in range(20_000, 20_010) if (spike := watch.see(step, 0.3 + 0.01 * (step % 3)))]
    assert found[0].recent == pytest.approx(0.31, abs=0.011)
    assert 20_000 <= found[0].worst < 20_010
    quiet = SpikeWatch(0.0)
    assert not any(quiet.see(step, float(step > 100)) for step in range(200))


def test_a_step_without_pairs_is_logged_without_a_loss(tmp_path, capsys):
    train(dataclasses.replace(CONFIG, evaluate_every=0), tmp_path, toy_model(), Empty())
    assert [line["loss"] is None for line in lines(tmp_path) if "loss" in line] == [False, True] + [False] * 4
    assert "n/a (no pair counted)" in capsys.readouterr().err


def test_the_check_stops_the_run_before_the_batch_is_used(tmp_path):
    calls = []

    def check(step):
        assert step == len(calls)
        calls.append(len(lines(tmp_path)))
        if len(calls) == 3:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        train(dataclasses.replace(CONFIG, evaluate_every=0), tmp_path, toy_model(), ToyDataset(), check=check)
    assert calls[:2] == [0, 1]
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    ("change", "dataset", "message"),
    [
        (
            {"optimizer": OptimizerConfig(learning_rate=3e-3)},
            ToyDataset(),
            r"config\.optimizer\.learning_rate: .*0\.003",
        ),
        ({}, ToyDataset(fingerprint="other"), r"data: the checkpoint has 'toy', this run has 'other'"),
        ({"seed": 1}, ToyDataset(), r"config\.seed: .*42.*1.*another --workdir"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(whole, change, dataset, message):
    config = dataclasses.replace(CONFIG, **change)
    with pytest.raises(CheckpointError, match="(?s)" + message):
        train(config, whole[0], toy_model(), dataset)


def test_lora_learns_with_the_backbone_frozen_and_refuses_another_backbone(tmp_path):
    config = dataclasses.replace(CONFIG, trainable=TrainableConfig(parts="lora", lora_targets=("up_proj",)))

    def adapted(seed):
        model = toy_model(seed)
        add_lora(model, config.trainable, nnx.Rngs(0))
        return model

    result = train(config, tmp_path, adapted(0), ToyDataset())
    base = toy_model()
    np.testing.assert_array_equal(
        result.model.backbone.text.embed.embedding[...], base.backbone.text.embed.embedding[...]
    )
    assert np.abs(np.asarray(result.model.backbone.text.layers.up_proj.lora_b[...])).max() > 0
    assert len(jax.tree.leaves(merge_lora(result.model))) == len(jax.tree.leaves(base))
    with pytest.raises(CheckpointError, match="frozen weights"):
        train(config, tmp_path, adapted(1), ToyDataset())


def test_settings_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="wait for each other for ever"):
        mesh = MeshConfig(data=2, fsdp=2, context=2)
        train(dataclasses.replace(CONFIG, mesh=mesh), tmp_path, toy_model(), ToyDataset())
    with pytest.raises(ConfigError, match="the model has no adapters"):
        train(dataclasses.replace(CONFIG, trainable=TrainableConfig(parts="lora")), tmp_path, toy_model(), ToyDataset())


def test_rates_are_numbers_that_people_read():
    line = {"loss": 0.25, "seconds_per_step": 0.01234, "pairs_per_second": 1013.2, "mfu": None}
    line |= {"tokens_per_second": 1e6, "packing_efficiency": 0.9}
    assert "0.0123 s/step  1,013 pairs/s  1,000,000 tokens/s" in describe(line | {"data_wait": 0.01})
    assert "waits" not in describe(line | {"data_wait": 0.01})
    assert describe(line | {"data_wait": 0.25}).endswith("waits for data 25% of the time")


def test_the_time_that_the_loop_waits_for_data_is_told():
    now = [0.0]
    recorder = Recorder(lambda step: [], None, 1, None, lambda: now[0])

    def pass_time(seconds, context):
        with context:
            now[0] += seconds

    with recorder.paused():  # as the first step, which compiles
        pass_time(50, recorder.waiting())
    zero = dict.fromkeys(("loss", "grad_norm", "lr", "mean_score", "pairs", "terms"), np.float32(1)) | {"finite": True}
    for _ in range(2):
        pass_time(1, recorder.waiting())
        pass_time(3, contextlib.nullcontext())
        recorder.add(0, zero, np.zeros(0, np.int32), Work(1, 1, 0, 0, 1, pooled=1, pooled_pairs=1))
    line = recorder.line()
    assert (line["seconds_per_step"], line["data_wait"]) == (4, 0.25)


def test_the_log_drops_what_lies_beyond_the_step_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in range(1, 5):
        log.add(step, loss=0.5 / step, mfu=float("nan"))
    path.write_text(path.read_text() + '{"step": 5, "lo')
    assert [line["step"] for line in MetricsLog(path, 3).lines] == [1, 2, 3]
    assert lines(tmp_path)[-1] == {"step": 3, "loss": 0.5 / 3, "mfu": None}
