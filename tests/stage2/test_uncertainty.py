"""Deviations against the textbook's matrices; leverage; what a head keeps of them."""

import numpy as np
import pytest

from multitap_jax.stage2 import DataError, RidgeHead
from tests.stage2.data import embeddings, with_missing


def textbook(x, y, weight, alpha, new):
    """(bayes, sandwich, leverage over its mean) float64[n] of one objective by explicit inverses."""
    total = weight.sum()
    mean, label_mean = weight @ x / total, weight @ y / total
    wide, labels = x - mean, y - label_mean
    gram = (wide * weight[:, None]).T @ wide
    inverse = np.linalg.inv(gram + alpha * np.eye(x.shape[1]))
    coef = inverse @ (wide * weight[:, None]).T @ labels
    freedom = np.trace(gram @ inverse)
    noise = weight @ (labels - wide @ coef) ** 2 / (len(x) - 1 - freedom)
    rows = new - mean
    leverage = np.einsum("nh,hk,nk->n", rows, inverse, rows) + 1 / total
    sandwich = np.einsum("nh,hk,nk->n", rows, inverse @ gram @ inverse, rows) + 1 / total
    typical = (freedom + 1) / len(x)
    return np.sqrt(noise * (1 + leverage)), np.sqrt(noise * (1 + sandwich)), leverage / typical


@pytest.mark.parametrize("rows", [1500, 200, 30])
@pytest.mark.parametrize("cv", [3, "gcv"])
def test_deviations_equal_the_textbook(rows, cv):
    x, y = embeddings(rows, 30 if rows > 30 else 45)
    y = with_missing(y, 0.2)
    weight = np.random.default_rng(0).uniform(0.5, 2.0, rows)
    head = RidgeHead([1e3, 1e4], cv=cv).fit(x, y, sample_weight=weight)
    new = x[:20].astype(np.float64) + np.random.default_rng(1).standard_normal((20, x.shape[1]))
    predicted, bayes = head.predict(new, return_std=True)
    _, sandwich = head.predict(new, return_std=True, std="sandwich")
    np.testing.assert_array_equal(predicted, head.predict(new))
    for target in range(3):
        seen = ~np.isnan(y[:, target])
        wide = x[seen].astype(np.float64), y[seen, target].astype(np.float64), weight[seen]
        expected = textbook(*wide, head.alpha_[target], new)
        np.testing.assert_allclose(bayes[:, target], expected[0], rtol=1e-5)
        np.testing.assert_allclose(sandwich[:, target], expected[1], rtol=1e-5)
        np.testing.assert_allclose(head.leverage(new)[:, target], expected[2], rtol=1e-4)
    assert (sandwich <= bayes).all()


def test_deviations_cover_new_labels_as_often_as_they_say():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3000, 20))
    truth = rng.standard_normal(20) / 5
    y = x @ truth + 0.7 * rng.standard_normal(3000)
    head = RidgeHead(cv="gcv").fit(x[:300], y[:300])
    for kind in ("bayes", "sandwich"):
        predicted, deviation = head.predict(x[300:], return_std=True, std=kind)
        covered = np.mean(np.abs(predicted - y[300:]) < 1.96 * deviation)
        assert covered == pytest.approx(0.95, abs=0.02)


def test_leverage_flags_what_the_training_rows_do_not_span():
    x, y = embeddings(500, rank=7)
    head = RidgeHead().fit(x, y)
    assert not head.out_of_domain(embeddings(300, rank=7, seed=9)[0], above=10.0).any()
    strange = x[:5].copy()
    strange[:, 20] += 100
    assert head.out_of_domain(strange).all()


@pytest.mark.parametrize("rows", [1500, 500, 30])
def test_a_saved_head_can_keep_its_uncertainty(rows, tmp_path):
    x, y = embeddings(rows)
    head = RidgeHead(cv="gcv").fit(x, with_missing(y, 0.2))
    head.save(tmp_path / "small")
    head.save(tmp_path / "whole", uncertainty=True)
    whole = RidgeHead.load(tmp_path / "whole")
    for one, two in zip(whole.predict(x, return_std=True), head.predict(x, return_std=True), strict=True):
        np.testing.assert_array_equal(one, two)
    small = RidgeHead.load(tmp_path / "small")
    np.testing.assert_array_equal(small.predict(x), head.predict(x))
    with pytest.raises(ValueError, match="uncertainty=True"):
        small.predict(x, return_std=True)
    with pytest.raises(ValueError, match="std='x'"):
        head.predict(x, return_std=True, std="x")


def test_objectives_added_later_leave_the_others_alone():
    x, y = embeddings(1500)
    head = RidgeHead(cv=3).fit(x, y[:, :2], objective_names=["a", "b"])
    before = head.coef_.copy(), head.predict(x, return_std=True)
    head.add_objectives(x, y[:, 2], ["c"])
    together = RidgeHead(cv=3).fit(x, y, objective_names=["a", "b", "c"])
    np.testing.assert_array_equal(head.coef_[:2], before[0])
    after = head.predict(x, return_std=True)
    np.testing.assert_array_equal(after[0][:, :2], before[1][0])
    np.testing.assert_array_equal(after[1][:, :2], before[1][1])
    np.testing.assert_allclose(after[0][:, 2], together.predict(x)[:, 2], rtol=1e-5)
    np.testing.assert_allclose(after[1][:, 2], together.predict(x, return_std=True)[1][:, 2], rtol=1e-4)
    assert head.objective_names_ == ("a", "b", "c")
    np.testing.assert_allclose(head.cv_predictions_, together.cv_predictions_, rtol=1e-4, atol=1e-4)
    assert set(head.intervals(samples=100)) == {"a", "b", "c"}
    with pytest.raises(DataError, match=r"\['b'\] are fitted already"):
        head.add_objectives(x, y[:, 2], ["b"])
    with pytest.raises(DataError, match="fitted on"):
        head.add_objectives(x[:, :3], y[:, 2], ["d"])


def test_intervals_hold_the_score_and_resample_groups():
    x, y = embeddings(400)
    pairs = np.repeat(np.arange(100), 4)
    head = RidgeHead(cv=4).fit(x, y, groups=pairs, objective_names=["a", "b", "c"])
    found = head.intervals(samples=200)
    for index, name in enumerate("abc"):
        tau = found[name].tau_b
        assert tau.value == pytest.approx(head.tau_[index])
        assert tau.interval.low < tau.value < tau.interval.high
        assert found[name].n_groups == 100
    with pytest.raises(ValueError, match="no held-out predictions"):
        RidgeHead(cv="gcv").fit(x, y).intervals()


def test_partial_fit_in_any_parts_equals_one_fit():
    x, y = embeddings(1500)
    groups = np.arange(1500) // 2
    whole = RidgeHead([1e3, 1e4]).fit(x, y, groups=groups)
    for cuts in ([700], [100, 1100]):
        head = RidgeHead([1e3, 1e4])
        for part in np.split(np.arange(1500), cuts):
            head.partial_fit(x[part], y[part], groups=groups[part])
        np.testing.assert_array_equal(head.alpha_, whole.alpha_)
        np.testing.assert_allclose(head.predict(x), whole.predict(x), rtol=1e-4, atol=1e-4)
        assert head.n_rows_ == 1500
