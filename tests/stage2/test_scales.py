"""Offsets and scales: what float64 rows lose when they become float32, and what float32 sums cannot hold."""

import numpy as np
import pytest

from multitap_jax.stage2 import DataError, RidgeHead


def rows_of(count, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 6)).astype(np.float32).astype(np.float64)
    return x, x[:, :2] @ np.ones((2, 2)) + 0.5 * rng.standard_normal((count, 2))


@pytest.mark.parametrize("cv", [3, "loo", "logo", "gcv"])
@pytest.mark.parametrize("count", [300, 1100])
def test_an_offset_of_float64_rows_or_labels_changes_nothing(count, cv):
    x, y = rows_of(count)
    groups = np.arange(count) // 2
    head = RidgeHead([0.1, 10.0], cv=cv).fit(x, y, groups=groups)
    moved = RidgeHead([0.1, 10.0], cv=cv).fit(x + 2.0**20, y + 2.0**20, groups=groups)
    np.testing.assert_allclose(moved.coef_, head.coef_, atol=5e-6)
    wide = moved.coef_.astype(np.float64)
    np.testing.assert_allclose((x + 2.0**20) @ wide.T + moved.intercept_ - 2.0**20, head.predict(x), atol=2e-5)
    np.testing.assert_allclose(moved.cv_results_["mse"], head.cv_results_["mse"], rtol=1e-5)
    if cv != "gcv":
        np.testing.assert_allclose(moved.tau_, head.tau_, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_batches_of_both_kinds_are_summed_about_one_origin(dtype):
    x, y = rows_of(2400)
    x += 64.0
    parts = [(x[:1200].astype(dtype), y[:1200], None), (x[1200:].astype(np.float32), y[1200:], None)]
    parts += [(x[:100], y[:100], None)]
    head = RidgeHead([0.1, 10.0], cv="gcv").fit_stream(iter(parts))
    whole = RidgeHead([0.1, 10.0], cv="gcv").fit(np.concatenate([x, x[:100]]), np.concatenate([y, y[:100]]))
    np.testing.assert_allclose(head.coef_, whole.coef_, rtol=1e-4)


@pytest.mark.parametrize(
    ("scale", "weight", "named"),
    [
        (1e-20, 1.0, "X deviates"),
        (1e20, 1.0, "X deviates"),
        (1.0, 1e39, "sample_weight"),
        (1.0, 1e-50, "sample_weight"),
    ],
)
def test_squares_that_float32_cannot_hold_are_refused(scale, weight, named):
    x, y = rows_of(1100)
    alphas = np.array([1.0, 10.0]) * scale**2 * weight
    with pytest.raises(DataError, match=named):
        RidgeHead(alphas, cv="gcv").fit(x * scale, y, sample_weight=np.full(1100, weight))
    few = RidgeHead(alphas, cv="gcv").fit(x[:500] * scale, y[:500], sample_weight=np.full(500, weight))
    assert (few.r2_ > 0.5).all()  # float64 holds them


def test_small_or_large_labels_and_later_rows_are_refused_too():
    x, y = rows_of(3000)
    with pytest.raises(DataError, match="Y deviates"):
        RidgeHead([1.0], cv="gcv").fit(x, y * 1e-25)
    x[2900] = 1e25
    with pytest.raises(DataError, match="overflow float32"):
        RidgeHead([1.0], cv="gcv").fit(x, y)
    for small in (1e-9, 1e9):
        x, y = rows_of(1100)
        assert (RidgeHead([small**2], cv="gcv").fit(x * small, y / small).r2_ > 0.5).all()
