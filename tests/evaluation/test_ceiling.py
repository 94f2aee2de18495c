"""Ceilings against what is known: raters of known noise, and the published judgements where they are at hand."""

import numpy as np
import pytest

from multitap_jax.evaluation.ceiling import noise_ceiling


def test_raters_of_known_noise_give_the_correlation_that_the_truth_has():
    rng = np.random.default_rng(0)
    truth = rng.standard_normal(20_000)
    for raters, noise in ((2, 1.0), (3, 0.5), (8, 2.0)):
        ratings = truth[:, None] + noise * rng.standard_normal((len(truth), raters))
        found = noise_ceiling(ratings)
        assert found.reliability == pytest.approx(1 / (1 + noise**2 / raters), abs=0.01)
        assert found.pearson == pytest.approx(np.corrcoef(truth, ratings.mean(1))[0, 1], abs=0.01)
        assert found.one_rater < found.mean_of_raters


def test_raters_who_agree_and_raters_who_guess():
    same = np.repeat(np.arange(50.0)[:, None], 3, 1)
    found = noise_ceiling(same, "b")
    assert (found.one_rater, found.mean_of_raters, found.reliability, found.pearson) == (1, 1, 1, 1)
    guesses = noise_ceiling(np.random.default_rng(1).standard_normal((5000, 3)))
    assert abs(guesses.one_rater) < 0.03
    assert guesses.pearson < 0.3
    assert noise_ceiling(np.array([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]])).reliability == 0


def test_what_is_no_table_of_ratings():
    with pytest.raises(ValueError, match=r"ratings have shape \(4, 1\): expected at least 2 pairs, with 2 ratings"):
        noise_ceiling(np.ones((4, 1)))
    with pytest.raises(ValueError, match="1 ratings are NaN or infinite"):
        noise_ceiling([[1, 2], [np.nan, 3]])
