"""Weights of 8 bits: what is rounded, by how much, and that nothing but the rounding changes a score."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from multitap_jax.backbones.layers import linears
from multitap_jax.config import MeshConfig, TrainableConfig
from multitap_jax.evaluation.scores import computed_in, read_note
from multitap_jax.parallel.mesh import make_mesh
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.scoring.job import JobError, score_file
from multitap_jax.scoring.quantize import quantize
from multitap_jax.scoring.scorer import Scorer
from multitap_jax.stage1.trainable import add_lora, merge_lora
from tests.scoring.job_fixtures import write_records
from tests.scoring.model_fixtures import pictures

TEXTS = ["a red ball", "the blue box is far away on the right", "near", "a ball is near on your left"]


def scores(scorer):
    return scorer.score(images=pictures(4), texts=TEXTS).raise_errors()


def test_every_kernel_is_rounded_to_half_a_step_of_its_column(saved):
    before = {name: np.asarray(linear.kernel[...]) for name, linear in linears(Artefact.load(saved)[1].backbone)}
    model = quantize(Artefact.load(saved)[1])
    after = dict(linears(model.backbone))
    assert before.keys() == after.keys()
    for name, wide in before.items():
        kernel, scale = np.asarray(after[name].kernel[...]), np.asarray(after[name].kernel_scale[...])[..., None, :]
        assert kernel.dtype == np.int8
        assert np.abs(kernel).max() == 127
        assert np.all(np.abs(kernel * scale - wide) <= scale / 2 * (1 + 1e-5))


def test_a_column_of_zeros_stays_zero(saved):
    model = Artefact.load(saved)[1]
    _, linear = next(linears(model.backbone))
    linear.kernel[...] = linear.kernel[...].at[..., 0].set(0)
    _, rounded = next(linears(quantize(model).backbone))
    assert not np.any(np.asarray(rounded.kernel[...])[..., 0])
    assert not np.any(np.asarray(rounded.kernel_scale[...])[..., 0])


def test_scores_are_those_of_the_widened_weights(saved):
    artefact, model, ridge = Artefact.load(saved)
    for _, linear in linears(model.backbone):
        wide = np.asarray(linear.kernel[...])
        scale = np.abs(wide).max(axis=-2, keepdims=True) / 127
        linear.kernel[...] = jnp.asarray(np.round(wide / scale) * scale, jnp.float32)
    expected = scores(Scorer(artefact, model, ridge))
    found = scores(Scorer.from_pretrained(saved, weights="int8"))
    np.testing.assert_allclose(found.logits, expected.logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.objectives, expected.objectives, rtol=0, atol=1e-4)
    assert not np.allclose(found.logits, scores(Scorer.from_pretrained(saved)).logits, rtol=0, atol=1e-5)


def test_the_given_model_stays_as_it_is_and_is_rounded_once(saved, tmp_path):
    artefact, model, ridge = Artefact.load(saved)
    before = scores(Scorer(artefact, model, ridge))
    first, second = (Scorer(artefact, model, ridge, weights="int8") for _ in range(2))
    np.testing.assert_array_equal(scores(first).logits, scores(second).logits)
    np.testing.assert_array_equal(scores(Scorer(artefact, model, ridge)).logits, before.logits)
    for use in (
        lambda: Scorer(artefact, first.model, ridge),
        lambda: quantize(first.model),
        lambda: add_lora(first.model, TrainableConfig(), nnx.Rngs(0)),
        lambda: merge_lora(first.model),
        lambda: Artefact.save(tmp_path / "new", first.model, base=saved, contract=artefact.manifest.contract),
    ):
        with pytest.raises(ValueError, match="rounded to int8 cannot be"):
            use()


def test_reports_say_that_weights_were_rounded(saved, tmp_path):
    source, output = write_records(tmp_path, 2), tmp_path / "scores.jsonl"
    score_file(Scorer.from_pretrained(saved, weights="int8"), source, output)
    assert computed_in(read_note(output)) == "float32, weights of int8"


def test_over_several_devices(saved):
    expected = scores(Scorer.from_pretrained(saved, weights="int8"))
    found = scores(Scorer.from_pretrained(saved, weights="int8", mesh=make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))))
    np.testing.assert_allclose(found.logits, expected.logits, rtol=0, atol=1e-5)


def test_with_bfloat16(saved):
    expected = scores(Scorer.from_pretrained(saved, weights="int8"))
    found = scores(Scorer.from_pretrained(saved, weights="int8", dtype="bfloat16"))
    np.testing.assert_allclose(found.overall, expected.overall, rtol=0, atol=2e-2)  # as bfloat16 with full weights


def test_a_job_is_not_continued_with_other_weights(saved, tmp_path):
    source, output = write_records(tmp_path, 2), tmp_path / "scores.jsonl"
    score_file(Scorer.from_pretrained(saved), source, output)
    with pytest.raises(JobError, match="settings"):
        score_file(Scorer.from_pretrained(saved, weights="int8"), source, output)


def test_unknown_weights_are_refused(saved):
    with pytest.raises(ValueError, match="'int4': expected full or int8"):
        Scorer.from_pretrained(saved, weights="int4")
