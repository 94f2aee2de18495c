"""Folds, rows and groups held out: equal to refitting without them, one by one, in float64."""

import numpy as np
import pytest

from multitap_jax.stage2 import DataError, RidgeHead, kfold
from multitap_jax.stage2.rows import fold_of, group_hash
from tests.stage2.data import embeddings, relative_error, sklearn_predictions, with_missing

ALPHAS = np.logspace(1, 5, 5)


def refits(x, y, weight, blocks, alphas, *, fit_intercept=True):
    """Held-out predictions [C, N, T] by a float64 refit without each block of rows."""
    out = np.empty((len(alphas), *y.shape))
    for block in blocks:
        train = np.setdiff1d(np.arange(len(x)), block)
        for index, alpha in enumerate(alphas):
            w = None if weight is None else weight[train]
            columns = np.full(y.shape[1], alpha)
            out[index, block] = sklearn_predictions(
                x[train], y[train], columns, x[block], weight=w, fit_intercept=fit_intercept
            )
    return out


def mean_squares(held_out, y, weight):
    squares = np.where(np.isnan(y), 0.0, (held_out - y) ** 2 * weight[None, :, None])
    return squares.sum(1) / (weight[:, None] * ~np.isnan(y)).sum(0)[None, :]


@pytest.mark.parametrize(("rows", "features"), [(60, 12), (30, 45), (1200, 12)])
@pytest.mark.parametrize("cv", ["loo", "logo"])
def test_leaving_out_equals_refitting(rows, features, cv, monkeypatch):
    x, y = embeddings(rows, features)
    y = with_missing(y, 0.2)
    rng = np.random.default_rng(0)
    weight = rng.uniform(0.5, 2.0, rows)
    groups = rng.permutation(np.arange(rows) // 3)  # scattered: a group is not in one piece
    head = RidgeHead(ALPHAS[1:4], cv=cv).fit(x, y, sample_weight=weight, groups=groups)
    few = np.arange(rows) if rows < 100 else rng.choice(rows, 20, replace=False)
    singles = [np.array([i]) for i in few]
    blocks = singles if cv == "loo" else [np.flatnonzero(groups == g) for g in np.unique(groups[few])]
    held_out = refits(x, y, weight, blocks, ALPHAS[1:4])
    checked = np.concatenate(blocks)
    chosen = held_out[head.cv_results_["best_index"], :, np.arange(3)].T
    assert relative_error(head.cv_predictions_[checked], chosen[checked]) < 1e-4
    if rows < 100:
        np.testing.assert_allclose(head.cv_results_["mse"], mean_squares(held_out, y, weight), rtol=1e-5)
    else:  # the scores rest on the same residuals as the predictions
        best = head.cv_results_["best_index"]
        own = mean_squares(head.cv_predictions_[None], y, weight)[0]
        np.testing.assert_allclose(head.cv_results_["mse"][best, np.arange(3)], own, rtol=1e-4)
    assert np.isfinite(head.tau_).all()


@pytest.mark.parametrize("cv", ["loo", 4])
@pytest.mark.parametrize("rows", [50, 1200])
def test_without_intercept(rows, cv):
    x, y = embeddings(rows, 12)
    x[:, 1:4] -= x[:, 1:4].mean(0)
    head = RidgeHead(ALPHAS[:3], cv=cv, fit_intercept=False).fit(x, y)
    fold = np.arange(rows) if cv == "loo" else fold_of(group_hash(None, x), 4, 0)
    few = np.unique(fold)[:20]
    held_out = refits(x, y, None, [np.flatnonzero(fold == f) for f in few], ALPHAS[:3], fit_intercept=False)
    chosen = held_out[head.cv_results_["best_index"], :, np.arange(3)].T
    rows = np.isin(fold, few)
    assert relative_error(head.cv_predictions_[rows], chosen[rows]) < 1e-4


@pytest.mark.parametrize("transform", [True, False])
def test_conjugate_gradients_equal_a_loop_of_refits(transform, monkeypatch):
    """The path of wide embeddings, forced on narrow ones."""
    monkeypatch.setattr(kfold, "DIRECT_UP_TO", 0)
    x, y = embeddings(1500, 40 if transform else 150)
    y = with_missing(y, 0.05 if transform else 0.0)
    weight = np.random.default_rng(6).uniform(0.5, 2.0, 1500)
    groups = [f"image-{i // 3}" for i in range(1500)]
    # 5 C T < H takes the other branch
    alphas = ALPHAS[1:] if transform else ALPHAS[1:3]
    head = RidgeHead(alphas, cv=4).fit(x, y, sample_weight=weight, groups=groups)
    fold = fold_of(group_hash(groups, x), 4, 0)
    held_out = refits(x, y, weight, [np.flatnonzero(fold == f) for f in range(4)], alphas)
    np.testing.assert_allclose(head.cv_results_["mse"], mean_squares(held_out, y, weight), rtol=3e-5)
    chosen = held_out[head.cv_results_["best_index"], :, np.arange(3)].T
    assert relative_error(head.cv_predictions_, chosen) < 1e-4


def assert_equal_to_refits(head, x, y, groups):
    fold = fold_of(group_hash(groups, x), head.cv, 0)
    blocks = [np.flatnonzero(fold == f) for f in range(head.cv)]
    held_out = refits(x, y, None, blocks, head.alphas)
    np.testing.assert_allclose(head.cv_results_["mse"], mean_squares(held_out, y, np.ones(len(x))), rtol=1e-3)


def test_a_fold_that_has_not_converged_is_solved_alone(monkeypatch):
    monkeypatch.setattr(kfold, "DIRECT_UP_TO", 0)
    monkeypatch.setattr(kfold, "ITERATIONS", 1)
    kfold._iterate.clear_cache()
    x, y = embeddings(1100, 60)
    head = RidgeHead([1.0, 1e4], cv=3).fit(x, y)
    kfold._iterate.clear_cache()
    assert_equal_to_refits(head, x, y, None)


@pytest.mark.parametrize("once", [True, False])
def test_folds_with_fewer_training_rows_than_features_equal_refits(once, monkeypatch):
    monkeypatch.setattr(kfold, "DIRECT_UP_TO", 0)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1100, 90)).astype(np.float32)
    y = np.repeat(x[:, :20].sum(1, keepdims=True) / 4 + 0.1 * rng.standard_normal((1100, 1)), 2, axis=1)
    y[100:, 1] = np.nan
    head = RidgeHead([0.03, 0.3, 3.0], cv=5)
    head.fit_stream(iter([(x, y, None)])) if once else head.fit(x, y)
    assert_equal_to_refits(head, x, y, None)


def test_features_of_one_group_alone_equal_refits(monkeypatch):
    """Directions of which the training rows say nothing, and a residual of theirs neither."""
    monkeypatch.setattr(kfold, "DIRECT_UP_TO", 0)
    rng = np.random.default_rng(2)
    x = rng.standard_normal((1200, 30)).astype(np.float32)
    x[:, 28:] *= 10 * (np.arange(1200) < 60)[:, None]
    y = x[:, [0, 28]] + x[:, [28, 29]] / 10 + 0.3 * rng.standard_normal((1200, 2))
    groups = ["one"] * 60 + list(range(1140))
    assert_equal_to_refits(RidgeHead([0.1, 1.0, 10.0], cv=4).fit(x, y, groups=groups), x, y, groups)


@pytest.mark.parametrize("rows", [1500, 200, 30])
def test_standardised_features_equal_scaling_first(rows):
    x, y = embeddings(rows)
    y = with_missing(y, 0.2)
    alphas = [1.0, 100.0]
    head = RidgeHead(alphas, cv="gcv", standardize=True).fit(x, y)
    new = embeddings(100, seed=4)[0].astype(np.float64)
    expected = np.empty((100, 3))
    for target in range(3):
        seen = ~np.isnan(y[:, target])
        wide = x[seen].astype(np.float64)
        mean, scale = wide.mean(0), wide.std(0)
        scaled, own = (wide - mean) / scale, y[seen][:, [target]]
        expected[:, [target]] = sklearn_predictions(scaled, own, head.alpha_[[target]], (new - mean) / scale)
    assert relative_error(head.predict(new), expected) < 1e-5


@pytest.mark.parametrize("rows", [1500, 200])
@pytest.mark.parametrize("value", [0.1, 12345.678])
def test_a_standardised_constant_feature_has_no_coefficient(rows, value):
    x, y = embeddings(rows)
    x = x.astype(np.float64)
    x[:, 5] = value
    head = RidgeHead([1.0], cv="gcv", standardize=True).fit(x, y)
    assert np.abs(head.coef_[:, 5]).max() < 1e-6
    rest = RidgeHead([1.0], cv="gcv", standardize=True).fit(np.delete(x, 5, 1), y)
    assert relative_error(head.predict(x), rest.predict(np.delete(x, 5, 1))) < 1e-5


def test_given_splits_are_kept():
    x, y = embeddings(90)
    order = np.random.default_rng(0).permutation(90)
    splits = [(np.setdiff1d(order, part), part) for part in np.split(order, 3)]
    head = RidgeHead(ALPHAS, cv=splits).fit(x, y)
    held_out = refits(x, y, None, [test for _, test in splits], ALPHAS)
    np.testing.assert_allclose(head.cv_results_["mse"], mean_squares(held_out, y, np.ones(90)), rtol=1e-5)
    with pytest.raises(DataError, match="split 1 of cv"):
        RidgeHead(cv=[splits[0], splits[0]]).fit(x, y)
    with pytest.raises(DataError, match="held out by no split"):
        RidgeHead(cv=splits[:2]).fit(x, y)


def test_splits_are_row_numbers_or_masks_that_exist():
    x, y = embeddings(90)
    half, rest = np.arange(90) < 45, np.arange(90) >= 45
    numbers = [(np.flatnonzero(rest), np.flatnonzero(half)), (list(range(45)), list(range(45, 90)))]
    masks = RidgeHead(ALPHAS, cv=[(rest, half), (half, rest)]).fit(x, y)
    np.testing.assert_array_equal(masks.coef_, RidgeHead(ALPHAS, cv=numbers).fit(x, y).coef_)
    for train, said in (
        (np.arange(45, 91)[1:], "split 0 of cv names row 90; rows are 0 to 89"),
        (np.arange(-45, 0), "split 0 of cv names row -45"),
        (np.arange(45, 90) / 1.0, "split 0 of cv: distinct row numbers or a mask"),
        (np.r_[45:89, 88], "split 0 of cv: distinct row numbers or a mask"),
        (rest[:50], "split 0 of cv: distinct row numbers or a mask"),
        (None, "split 0 of cv: distinct row numbers or a mask"),
    ):
        with pytest.raises(DataError, match=said):
            RidgeHead(cv=[(train, np.arange(45)), numbers[1]]).fit(x, y)
    with pytest.raises(DataError, match="split 1 of cv is ndarray; a pair"):
        RidgeHead(cv=[numbers[0], np.arange(45)]).fit(x, y)


def test_splits_are_for_arrays_and_for_the_choice_of_alpha():
    x, y = embeddings(1200, 12)
    half = np.arange(1200) < 600
    head = RidgeHead(ALPHAS, cv=[(~half, half), (half, ~half)])
    for fit in (
        lambda: head.fit_stream([(x, y)]),
        lambda: head.collect([(x, y)]),
        lambda: head.partial_fit(x, y),
    ):
        with pytest.raises(ValueError, match="cv is a list of splits, which know rows by their number"):
            fit()
    head.set_params(selection="train-mse")  # which holds no row out
    np.testing.assert_array_equal(head.fit(x, y).coef_, RidgeHead(ALPHAS, selection="train-mse").fit(x, y).coef_)


def test_a_second_pass_needs_the_rows_again():
    x, y = embeddings(1200, 12)
    with pytest.raises(DataError, match="reads the rows twice"):
        RidgeHead(cv="loo").fit_stream(iter([(x, y, None)]))


@pytest.mark.parametrize("rows", [60, 1200])
def test_leaving_a_group_out_needs_two(rows):
    x, y = embeddings(rows, 12)
    with pytest.raises(DataError, match="two groups"):
        RidgeHead(cv="logo").fit(x, y, groups=["one"] * rows)
    y[rows // 2 :, 1] = np.nan
    groups = ["one"] * (rows // 2) + ["another", "a third"] * (rows // 4)
    with pytest.raises(DataError, match="objective_1: all rated rows are of one group"):
        RidgeHead(cv="logo").fit(x, y, groups=groups)


@pytest.mark.parametrize("cv", [2, "loo", "logo"])
def test_two_rated_rows_have_no_tau(cv):
    x, y = embeddings(30, 4, 2)
    y[2:, 1] = np.nan
    tau = RidgeHead(cv=cv).fit(x, y, groups=range(30)).tau_
    assert np.isfinite(tau[0])
    assert np.isnan(tau[1])
