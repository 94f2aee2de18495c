"""RidgeHead against scikit-learn in float64 and against loops that refit everything."""

import io
import os

import numpy as np
import pytest
import scipy.stats
from rich.console import Console
from safetensors.numpy import load_file, save_file
from sklearn.base import clone
from sklearn.linear_model import Ridge

from multitap_jax.stage2 import DataError, RidgeHead
from multitap_jax.stage2.rows import fold_of, group_hash
from tests.stage2.data import embeddings, relative_error, sklearn_predictions, with_missing

MANY, FEW = 2600, 30  # above SHIFT_ROWS: moments on the device; below the 40 features: the dual case
ALPHAS = np.logspace(-2, 4, 7)
LARGER = ALPHAS[2:]  # from 1e-6 of the largest eigenvalue on, where float32 statistics alone give 4 digits


@pytest.mark.parametrize("rows", [MANY, 500, FEW])
@pytest.mark.parametrize("rank", [None, 7])
@pytest.mark.parametrize(
    "params",
    [{}, {"cv": "gcv"}, {"selection": "train-mse"}, {"solver": "device"}, {"fit_intercept": False}],
    ids=lambda params: "-".join(map(str, params.values())) or "default",
)
def test_predictions_equal_sklearn_in_float64(rows, rank, params):
    x, y = embeddings(rows, rank=rank)
    new = embeddings(300, rank=rank, seed=9)[0]
    head = RidgeHead(ALPHAS, **params).fit(x, y)
    expected = sklearn_predictions(x, y, head.alpha_, new, fit_intercept=head.fit_intercept)
    # Without an intercept nothing makes up for float32 coefficients times means of 3000.
    assert relative_error(head.predict(new), expected) < (1e-5 if head.fit_intercept else 1e-4)


@pytest.mark.parametrize("rows", [MANY, FEW])
def test_coefficients_equal_sklearn(rows):
    x, y = embeddings(rows)
    head = RidgeHead(ALPHAS).fit(x, y)
    for target in range(y.shape[1]):
        model = Ridge(head.alpha_[target], solver="cholesky").fit(x.astype(np.float64), y[:, target].astype(np.float64))
        np.testing.assert_allclose(head.coef_[target], model.coef_, rtol=1e-4, atol=1e-4 * np.abs(model.coef_).max())
        np.testing.assert_allclose(head.intercept_[target], model.intercept_, rtol=1e-4)


@pytest.mark.parametrize("solver", ["host", "device"])
def test_a_single_pass_equals_sklearn(solver):
    x, y = embeddings(MANY)
    batches = ((x[i : i + 331], y[i : i + 331], None) for i in range(0, MANY, 331))
    head = RidgeHead(LARGER, solver=solver).fit_stream(batches)
    assert head.cv_predictions_ is None
    assert relative_error(head.predict(x), sklearn_predictions(x, y, head.alpha_, x)) < 1e-4


def test_a_tiny_alpha_on_low_rank_rows_is_refined_to_float64():
    x, y = embeddings(MANY, rank=7)
    new = embeddings(300, rank=7, seed=9)[0]
    alphas = [1e-3]  # 1e-9 of the largest eigenvalue, while 33 of the 40 eigenvalues are 0
    head = RidgeHead(alphas, selection="train-mse").fit(x, y)
    assert relative_error(head.predict(new), sklearn_predictions(x, y, head.alpha_, new)) < 1e-5
    assert not head.notes_
    once = RidgeHead(alphas, selection="train-mse").fit_stream(iter([(x, y, None)]))
    assert "single float32 pass" in once.notes_[0]
    hopeless = RidgeHead([1e-7], selection="train-mse").fit(x, y)
    assert "too small to solve fully" in hopeless.notes_[0]


@pytest.mark.parametrize("rows", [MANY, 400, FEW])
@pytest.mark.parametrize("blocks", [True, False], ids=["by-source", "at-random"])
def test_missing_labels_equal_separate_fits(rows, blocks):
    x, y = embeddings(rows, objectives=4)
    if blocks:  # two datasets, each with its own objectives, one shared
        y[: rows // 2, 0] = np.nan
        y[rows // 2 :, 1] = np.nan
    else:
        y = with_missing(y, 0.3)
    head = RidgeHead(ALPHAS, cv="gcv").fit(x, y)
    np.testing.assert_array_equal(head.n_observed_, (~np.isnan(y)).sum(0))
    assert relative_error(head.predict(x), sklearn_predictions(x, y, head.alpha_, x)) < 1e-5
    for target in range(4):
        seen = ~np.isnan(y[:, target])
        alone = RidgeHead(ALPHAS, cv="gcv").fit(x[seen], y[seen, target])
        np.testing.assert_allclose(head.cv_results_["mse"][:, target], alone.cv_results_["mse"][:, 0], rtol=2e-3)


@pytest.mark.parametrize("rows", [MANY, FEW])
def test_sample_weights_equal_sklearn(rows):
    x, y = embeddings(rows)
    y = with_missing(y, 0.2)
    weight = np.random.default_rng(5).gamma(1.0, size=rows)
    weight[::7] = 0.0
    head = RidgeHead(ALPHAS).fit(x, y, sample_weight=weight)
    assert relative_error(head.predict(x), sklearn_predictions(x, y, head.alpha_, x, weight=weight)) < 1e-5


def loop_over_folds(x, y, weight, groups, folds):
    """Mean squared held-out error float64[C, T] by refitting scikit-learn, and the held-out predictions [C, N, T]."""
    fold = fold_of(group_hash(groups, x), folds, 0)
    held_out = np.empty((len(LARGER), *y.shape))
    for index, alpha in enumerate(LARGER):
        for number in range(folds):
            train, test = fold != number, fold == number
            alphas = np.full(y.shape[1], alpha)
            held_out[index, test] = sklearn_predictions(x[train], y[train], alphas, x[test], weight=weight[train])
    squares = np.where(np.isnan(y)[None, :, :], 0.0, (held_out - y[None, :, :]) ** 2 * weight[None, :, None])
    return squares.sum(1) / (weight[:, None] * ~np.isnan(y)).sum(0)[None, :], held_out


@pytest.mark.parametrize("rows", [1500, 36])
@pytest.mark.parametrize("per_target", [True, False])
def test_kfold_equals_a_loop_of_refits(rows, per_target):
    x, y = embeddings(rows)
    y = with_missing(y, 0.1)
    weight = np.random.default_rng(6).uniform(0.5, 2.0, rows)
    groups = [f"image-{i // 3}" for i in range(rows)]
    head = RidgeHead(LARGER, cv=4, alpha_per_target=per_target).fit(x, y, sample_weight=weight, groups=groups)
    mse, held_out = loop_over_folds(x, y, weight, groups, 4)
    np.testing.assert_allclose(head.cv_results_["mse"], mse, rtol=1e-4)
    variance = np.array([np.cov(y[s, t], aweights=weight[s], ddof=0) for t in range(3) for s in [~np.isnan(y[:, t])]])
    best = np.argmin(mse, 0) if per_target else np.full(3, np.argmin((mse / variance[None, :]).mean(1)))
    np.testing.assert_array_equal(head.alpha_, LARGER[best])
    chosen = np.take_along_axis(held_out, best[None, None, :], axis=0)[0]
    assert relative_error(head.cv_predictions_, chosen) < 1e-4
    seen = ~np.isnan(y[:, 0])
    tau = scipy.stats.kendalltau(chosen[seen, 0], y[seen, 0]).statistic
    assert head.tau_[0] == pytest.approx(tau, abs=1e-3)
    np.testing.assert_allclose(head.r2_, 1 - mse[best, np.arange(3)] / variance, rtol=1e-3)


@pytest.mark.parametrize("rows", [1500, 36])
@pytest.mark.parametrize("fit_intercept", [True, False])
def test_gcv_equals_the_hat_matrix(rows, fit_intercept):
    x, y = embeddings(rows)
    head = RidgeHead(ALPHAS, cv="gcv", fit_intercept=fit_intercept).fit(x, y)
    wide, labels = x.astype(np.float64), y.astype(np.float64)
    if fit_intercept:
        wide, labels = wide - wide.mean(0), labels - labels.mean(0)
    expected = np.empty((len(ALPHAS), 3))
    for index, alpha in enumerate(ALPHAS):
        hat = wide @ np.linalg.solve(wide.T @ wide + alpha * np.eye(wide.shape[1]), wide.T)
        rest = rows - fit_intercept - np.trace(hat)
        expected[index] = rows * np.sum((labels - hat @ labels) ** 2, 0) / rest**2
    np.testing.assert_allclose(head.cv_results_["mse"], expected, rtol=1e-4)
    np.testing.assert_array_equal(head.alpha_, ALPHAS[np.argmin(expected, 0)])


@pytest.mark.parametrize("params", [{"cv": "gcv"}, {"selection": "train-mse"}, {"cv": "gcv", "standardize": True}])
@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
def test_training_errors_equal_float64_where_sums_lose_them(params, wide):
    """With weights and with missing labels, down to alphas of 1e-10 of the largest eigenvalue."""
    x, y = embeddings(1700)
    x = x.astype(np.float64) if wide else x
    y[:300, 1] = np.nan
    weight = np.random.default_rng(6).uniform(0.5, 2.0, 1700)
    alphas = np.logspace(-4, 4, 9)
    head = RidgeHead(alphas, **params).fit(x, y, sample_weight=weight)
    for target in range(3):
        seen = ~np.isnan(y[:, target])
        w, rows, labels = weight[seen], x[seen].astype(np.float64), y[seen, target].astype(np.float64)
        rows, labels = rows - np.average(rows, axis=0, weights=w), labels - np.average(labels, weights=w)
        rows = rows / np.sqrt(np.average(rows**2, axis=0, weights=w)) if head.standardize else rows
        u, s, _ = np.linalg.svd(rows * np.sqrt(w)[:, None], full_matrices=False)
        share = s**2 / (s**2 + alphas[:, None])
        rss = np.sum((np.sqrt(w) * labels - (share * (u.T @ (np.sqrt(w) * labels))) @ u.T) ** 2, axis=1)
        n = len(w)
        expected = rss * n**2 / (n - 1 - share.sum(1)) ** 2 if "cv" in params else rss
        np.testing.assert_allclose(head.cv_results_["mse"][:, target], expected / w.sum(), rtol=1e-5)


def test_training_error_always_takes_the_smallest_alpha():
    x, y = embeddings(MANY)
    head = RidgeHead([100.0, 1e-3, 10.0], selection="train-mse").fit(x, y)
    np.testing.assert_array_equal(head.alpha_, 1e-3)
    expected = np.mean((sklearn_predictions(x, y, head.alpha_, x) - y) ** 2, 0)
    np.testing.assert_allclose(head.cv_results_["mse"][0], expected, rtol=1e-4)


def test_store_stream_and_arrays_agree_in_any_batching():
    x, y = embeddings(MANY)
    groups = [f"g{i // 2}" for i in range(MANY)]
    whole = RidgeHead().fit(x, y, groups=groups)
    for size in (100, 1999):
        parts = [(x[i : i + size], y[i : i + size], groups[i : i + size]) for i in range(0, MANY, size)]
        head = RidgeHead().fit_stream(parts)
        np.testing.assert_allclose(head.alpha_, whole.alpha_, rtol=1e-5)
        assert relative_error(head.predict(x), whole.predict(x)) < 1e-5
        assert relative_error(head.cv_predictions_, whole.cv_predictions_) < 1e-4


def test_automatic_alphas_follow_the_scale_and_report_an_edge():
    x, y = embeddings(MANY)
    head, scaled = RidgeHead().fit(x, y), RidgeHead().fit(x * np.float32(8), y)
    np.testing.assert_allclose(scaled.alpha_, 64 * head.alpha_, rtol=1e-5)
    eigenvalues = np.linalg.eigvalsh(np.cov(x.T.astype(np.float64)) * (MANY - 1))
    np.testing.assert_allclose(head.cv_results_["alphas"][[0, -1], 0], eigenvalues.mean() * np.array([1e-6, 1e2]), 1e-5)
    assert "lower edge" in RidgeHead([1e6, 1e7]).fit(x, y).notes_[0]
    assert "upper edge" in RidgeHead([1e-3, 1e-2]).fit(x, np.random.default_rng(0).standard_normal(MANY)).notes_[0]


@pytest.mark.parametrize("rows", [MANY, 400])
@pytest.mark.parametrize("per_target", [True, False])
def test_a_constant_objective_predicts_its_constant(rows, per_target):
    x, y = embeddings(rows)
    y[:, 1] = 0.7
    head = RidgeHead(alpha_per_target=per_target).fit(x, y, objective_names=["a", "b", "c"])
    assert not head.coef_[1].any()
    np.testing.assert_allclose(head.predict(x)[:, 1], 0.7, rtol=1e-6)
    assert any(note.startswith("b: constant") for note in head.notes_)
    others = RidgeHead(alpha_per_target=per_target).fit(x, y[:, [0, 2]])
    np.testing.assert_allclose(head.alpha_[[0, 2]], others.alpha_, rtol=1e-5)


@pytest.mark.parametrize("cv", [3, "gcv"])
def test_without_intercept_a_constant_is_an_objective_like_any_other(cv):
    x, y = embeddings(MANY)
    y[:, 1] = 0.7
    head = RidgeHead([1.0, 100.0], cv=cv, fit_intercept=False).fit(x, y)
    alpha = float(head.alpha_[1])
    expected = Ridge(alpha, fit_intercept=False).fit(x.astype(np.float64), y[:, 1].astype(np.float64)).coef_
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(head.coef_[1], expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert head.intercept_[1] == pytest.approx(0.0, abs=1e-6)


def test_errors_name_what_is_wrong():
    x, y = embeddings(60)
    broken = x.copy()
    broken[41, 5] = np.nan
    with pytest.raises(DataError, match=r"X\[41, 5\]"):
        RidgeHead().fit(broken, y)
    with pytest.raises(DataError, match=r"Y\[7, 2\].*NaN for a missing"):
        RidgeHead().fit(x, np.where(np.arange(180).reshape(60, 3) == 23, np.inf, y))
    with pytest.raises(DataError, match="objective safety: all 60 labels are missing"):
        RidgeHead().fit(x, y * np.array([[1, np.nan, 1]]), objective_names=("a", "safety", "c"))
    with pytest.raises(DataError, match="fall into one fold"):
        RidgeHead().fit(x, y, groups=["one image"] * 60)
    with pytest.raises(DataError, match="no rows"):
        RidgeHead().fit_stream([])
    with pytest.raises(DataError, match="X has 60 rows, Y has 59"):
        RidgeHead().fit(x, y[:59])
    with pytest.raises(DataError, match=r"sample_weight\[0, 0\]"):
        RidgeHead().fit(x, y, sample_weight=-np.ones(60))
    with pytest.raises(DataError, match="before"):
        RidgeHead().fit_stream([(x, y, None), (x[:, :9], y, None)])
    with pytest.raises(ValueError, match="not fitted"):
        RidgeHead().predict(x)
    with pytest.raises(DataError, match=r"\[N, 40\]"):
        RidgeHead().fit(x, y).predict(x[:, :3])


@pytest.mark.parametrize(
    "params", [{"cv": 1}, {"cv": "all"}, {"alphas": [0.0]}, {"alphas": "many"}, {"selection": "best"}, {"solver": "x"}]
)
def test_parameters_that_make_no_sense_are_refused(params):
    with pytest.raises(ValueError, match=next(iter(params))):
        RidgeHead(**params).fit(*embeddings(60))


def test_scikit_learn_habits():
    head = clone(RidgeHead(cv=3, alphas=ALPHAS))
    assert head.get_params()["cv"] == 3
    head.set_params(cv=4)
    with pytest.raises(ValueError, match="no parameter"):
        head.set_params(folds=3)
    x, y = embeddings(200)
    y = with_missing(y, 0.1)
    predicted = head.fit(x, y).predict(x)
    r2 = [
        1 - np.sum((y[s, t] - predicted[s, t]) ** 2) / np.sum((y[s, t] - y[s, t].mean()) ** 2)
        for t in range(3)
        for s in [~np.isnan(y[:, t])]
    ]
    assert head.score(x, y) == pytest.approx(np.mean(r2), rel=1e-5)
    assert head.coef_.shape == (3, 40)
    assert head.n_features_in_ == 40


@pytest.mark.parametrize("name", ["heads", "mine.safetensors"])
def test_a_saved_head_predicts_the_same_bits(tmp_path, name):
    x, y = embeddings(200)
    y[:, 2] = 1.0
    head = RidgeHead(ALPHAS).fit(x, y, objective_names=["safety", "clarity", "style"])
    head.save(tmp_path / name)
    loaded = RidgeHead.load(tmp_path / name)
    np.testing.assert_array_equal(loaded.predict(x), head.predict(x))
    assert loaded.metadata() == head.metadata()
    assert loaded.objective_names_ == ("safety", "clarity", "style")
    assert loaded.to_arrays()["ridge.coef"].dtype == np.float32
    arrays = loaded.to_arrays()
    del arrays["ridge.alpha"]
    arrays["ridge.intercept"] = arrays["ridge.intercept"][:2]
    with pytest.raises(DataError, match=r"(?s)intercept.*alpha: missing"):
        RidgeHead.from_arrays(arrays, head.metadata())
    with pytest.raises(DataError, match="not a saved RidgeHead"):
        RidgeHead.load(tmp_path / "nothing")


@pytest.mark.parametrize("call", [1, 2])
def test_a_kill_while_a_head_is_saved_leaves_it_or_the_one_before(tmp_path, monkeypatch, call):
    """And no coefficients under the metadata of others: fewer rows, other names and alphas of the same shape."""
    x, y = embeddings(200)
    before = RidgeHead([1e3], cv="gcv").fit(x[:100], y[:100], objective_names=["a", "b", "c"])
    after = RidgeHead([1e4], cv="gcv").fit(x, y, objective_names=["c", "b", "a"])
    before.save(tmp_path / "heads")
    replace, calls = os.replace, iter(range(1, 100))

    def dying(source, target):
        if next(calls) == call:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        after.save(tmp_path / "heads")
    whole, found = (before, after)[call - 1], RidgeHead.load(tmp_path / "heads")
    assert found.metadata() == whole.metadata()
    np.testing.assert_array_equal(found.coef_, whole.coef_)


def test_a_head_with_its_metadata_beside_it_alone_is_read(tmp_path):
    """As they were saved before the tensors had them too."""
    x, y = embeddings(200)
    head = RidgeHead([1e3]).fit(x, y)
    file = head.save(tmp_path / "mine.safetensors")
    save_file(load_file(file), file)
    assert RidgeHead.load(file).metadata() == head.metadata()


def test_summary_shows_every_objective_and_note():
    x, y = embeddings(200)
    y[:, 1] = 2.0
    head = RidgeHead().fit(x, y, objective_names=["safety", "clarity", "style"])
    page = io.StringIO()
    Console(width=120, file=page).print(head.summary())
    assert "objective" in str(head.summary())  # what print shows in a plain script
    text = page.getvalue()
    assert all(word in text for word in ("safety", "clarity", "style", "kfold", "constant labels"))
