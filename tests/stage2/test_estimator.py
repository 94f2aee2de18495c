"""scikit-learn's own checks of an estimator, and input that must be refused in a clear sentence."""

import warnings

import numpy as np
import pytest
from sklearn.model_selection import KFold, cross_val_score
from sklearn.utils.estimator_checks import check_estimator

from multitap_jax.stage2 import DataError, RidgeHead, persist
from tests.stage2.data import embeddings, sklearn_predictions


@pytest.mark.parametrize("params", [{}, {"cv": "gcv"}, {"cv": "loo"}], ids=str)
def test_scikit_learns_estimator_checks_pass(params):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the checks warn about what is not installed
        results = check_estimator(RidgeHead(**params), on_skip=None)
    assert len(results) > 50
    failed = [r["check_name"] for r in results if r["status"] not in ("passed", "skipped")]
    assert not failed


def test_it_works_inside_scikit_learn():
    x, y = embeddings(120)
    assert cross_val_score(RidgeHead(cv="gcv"), x, y, cv=3).shape == (3,)


@pytest.mark.parametrize("cv", [5, "gcv", "loo", "logo"])
def test_one_row_is_refused(cv):
    with pytest.raises(DataError, match=r"n_samples = 1|one fold|two groups"):
        RidgeHead(cv=cv).fit(np.ones((1, 3)), np.ones(1))


@pytest.mark.parametrize("rows", [4, 7])
def test_fewer_rows_or_groups_than_folds_is_exact_on_the_folds_there_are(rows):
    x, y = embeddings(rows, 6)
    for groups in (None, np.arange(rows) // 2 * 7):
        head = RidgeHead([10.0, 1e4], cv=8).fit(x, y, groups=groups)
        assert head.cv_results_["fold_mse"].shape[0] == 8
        filled = np.isfinite(head.cv_results_["fold_mse"][:, 0, 0])
        assert 2 <= filled.sum() <= rows
        expected = sklearn_predictions(x, y, head.alpha_, x)
        np.testing.assert_allclose(head.predict(x), expected, rtol=1e-4)


@pytest.mark.parametrize("alphas", [[0.0], [-1.0, 1.0], [np.nan], [np.inf], []])
def test_alphas_must_be_positive(alphas):
    with pytest.raises(ValueError, match="every alpha must be a positive number"):
        RidgeHead(alphas).fit(*embeddings(60))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_features_that_are_not_finite_numbers_are_named(value):
    x, y = embeddings(2000, 8)
    wide = x.astype(np.float64)
    wide[1700, 5] = value
    with pytest.raises(DataError, match=r"X\[1700, 5\]"):
        RidgeHead(cv="gcv").fit(wide, y)
    with pytest.raises(DataError, match="NaN or infinity"):
        RidgeHead(cv="gcv").fit(x, y).predict(np.full((1, 8), np.nan))


def test_huge_but_finite_features_are_taken():
    x, y = embeddings(60, 8)
    large, groups = x.astype(np.float64) * 1e30, np.arange(60)
    head, usual = RidgeHead().fit(large, y, groups=groups), RidgeHead().fit(x, y, groups=groups)
    np.testing.assert_allclose(head.predict(large), usual.predict(x), rtol=1e-4)


def test_weights_and_lengths():
    x, y = embeddings(60)
    with pytest.raises(DataError, match="zero for every row"):
        RidgeHead().fit(x, y, sample_weight=np.zeros(60))
    with pytest.raises(DataError, match="groups has 3"):
        RidgeHead().fit(x, y, groups=["a", "b", "c"])
    with pytest.raises(DataError, match="sample_weight has 5"):
        RidgeHead().fit(x, y, sample_weight=np.ones(5))
    with pytest.raises(DataError, match="2 objective names for 3"):
        RidgeHead().fit(x, y, objective_names=["a", "b"])
    with pytest.raises(DataError, match="expecting 40 features"):
        RidgeHead().partial_fit(x, y).partial_fit(x[:, :3], y)


@pytest.mark.parametrize("cv", [None, 2.7, 5.0, float("nan"), True, 1, -3, "all", KFold(3), np.arange(3)], ids=repr)
def test_a_cv_that_says_no_folds_is_refused(cv):
    with pytest.raises(ValueError, match=r"^cv=.*: a number of folds from 2 on, one of gcv, loo, logo, or for arrays"):
        RidgeHead(cv=cv).fit(*embeddings(60, 8))
    if isinstance(cv, KFold):
        assert RidgeHead(cv=list(cv.split(np.zeros((60, 8))))).fit(*embeddings(60, 8)).criterion_ == "kfold"


@pytest.mark.parametrize("seed", [None, -5, 0.5, 2**64, "one"])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ValueError, match=r"^seed=.*: a whole number from 0"):
        RidgeHead(seed=seed).fit(*embeddings(60, 8))


def test_numbers_of_numpy_are_parameters_like_any_other(tmp_path):
    x, y = embeddings(60, 8)
    head = RidgeHead(cv=np.int64(3), seed=np.uint8(7))
    np.testing.assert_array_equal(head.fit(x, y).coef_, RidgeHead(cv=3, seed=7).fit(x, y).coef_)
    persist.save(head.collect([(x, y)]), tmp_path / "moments")
    assert persist.load(tmp_path / "moments").seed == 7


def test_names_are_given_once():
    x, y = embeddings(60, 8)
    with pytest.raises(DataError, match=r"objective names \['a'\] are given more than once"):
        RidgeHead().fit(x, y, objective_names=["a", "b", "a"])


@pytest.mark.parametrize("bad", ["row", "label", "name", "twice"])
def test_a_partial_fit_that_fails_adds_no_row(bad):
    """Though the batches before the bad row are sound."""
    x, y = embeddings(5000, 8)
    names, broken, labels = ["a", "b", "c"], x.copy(), y.copy()
    if bad == "row":
        broken[4500, 0] = np.nan
    elif bad == "label":
        labels[4500, 0] = np.inf
    wrong = {"name": ["a"], "twice": ["a", "a", "b"]}.get(bad, names)
    once = RidgeHead([1e4], cv=3).partial_fit(x, y, objective_names=names)
    head = RidgeHead([1e4], cv=3)
    with pytest.raises(DataError):
        head.partial_fit(broken, labels, objective_names=wrong)
    head.partial_fit(x, y, objective_names=names)
    assert head.n_rows_ == 5000
    np.testing.assert_array_equal(head.coef_, once.coef_)
