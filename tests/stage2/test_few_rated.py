"""An objective that few of many rows rate: fewer rows than features, so that a fit could go through every label."""

import numpy as np
import pytest

from multitap_jax.stage2 import RidgeHead

FEATURES, RATED = 120, 40


def rated_by_few(seed, rows=1200):
    """(X [rows, 120], Y [rows, 2], the second rated in the first 40 rows only); a spectrum that falls, and means."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, FEATURES)) * np.exp(-np.arange(FEATURES) / 20) + 5 * rng.normal(size=FEATURES)
    y = x[:, :8].sum(1) + rng.normal(size=rows)
    y = np.stack([y, y], axis=1)
    y[RATED:, 1] = np.nan
    return x.astype(np.float32), y


@pytest.mark.parametrize("cv", ["gcv", 5, "loo", "logo"])
def test_it_is_fitted_from_its_rows_as_if_alone(cv):
    for seed in range(4):
        x, y = rated_by_few(seed)
        head = RidgeHead(cv=cv).fit(x, y)
        alone = RidgeHead(head.cv_results_["alphas"][:, 1], cv=cv).fit(x[:RATED], y[:RATED, 1])
        np.testing.assert_allclose(head.cv_results_["mse"][:, 1], alone.cv_results_["mse"][:, 0], rtol=1e-6)
        np.testing.assert_allclose(head.predict(x)[:, 1], alone.predict(x), rtol=1e-5)
        if cv != "gcv":
            predicted = head.cv_predictions_[:RATED, 1]
            np.testing.assert_allclose(predicted, alone.cv_predictions_[:, 0], rtol=1e-5)
            assert np.isfinite(head.cv_predictions_).all()
        deviation = (h.predict(x[:5], return_std=True)[1] for h in (head, alone))
        np.testing.assert_allclose(next(deviation)[:, 1], next(deviation), rtol=1e-5)


def test_in_a_single_pass_no_alpha_wins_by_the_rounding_of_sums():
    for seed in range(8):
        x, y = rated_by_few(seed)
        head = RidgeHead(cv="gcv").fit_stream(iter([(x, y, None)]))
        alone = RidgeHead(head.cv_results_["alphas"][:, 1], cv="gcv").fit(x[:RATED], y[:RATED, 1])
        true = alone.cv_results_["mse"][:, 0]
        assert true[head.cv_results_["best_index"][1]] < 1.1 * true.min()


@pytest.mark.parametrize("rows", [500, 1200])
def test_an_objective_that_is_constant_without_a_source_is_recognised(rows):
    x, y = rated_by_few(0, rows)
    source = np.where(np.arange(rows) % 2, "a", "b")
    y[:, 1] = np.where(source == "b", 3.3, y[:, 0])
    head = RidgeHead([0.1, 10.0], cv=3)
    head.fit_moments(head.collect([(x, y, None, None, source)]), leave_out=["a"])
    assert not head.coef_[1].any()
    assert head.intercept_[1] == pytest.approx(3.3, rel=1e-5)  # the sums began where the labels of "a" lie
    assert np.isnan(head.r2_[1])
    assert "objective_1: constant labels, the head predicts that constant" in head.notes_
