"""All resamples at once: equal to one at a time, whatever the ties, groups and blocks."""

import numpy as np
import pytest

from multitap_jax.evaluation import resampling
from multitap_jax.evaluation.correlation import _resamples, kendall_tau
from multitap_jax.evaluation.resampling import Taus, shares, weights


def case(seed, n, pred_levels, human_levels):
    rng = np.random.default_rng(seed)
    human = rng.integers(0, human_levels, n).astype(float)
    pred = rng.integers(0, pred_levels, n) / 7 + human / human_levels * (seed % 3)
    return pred, human, rng.integers(0, max(n // 3, 2), n)


@pytest.mark.parametrize("block", [1, 3, 8, 512])
@pytest.mark.parametrize("levels", [(5, 3), (1000, 7), (4, 1000), (1000, 1000), (2, 2), (1, 4)])
def test_equal_to_one_resample_at_a_time(monkeypatch, block, levels):
    monkeypatch.setattr(resampling, "BLOCK", block)
    for seed, n in enumerate((3, 40, 257)):
        pred, human, groups = case(seed, n, *levels)
        for labels in (None, groups):
            drawn = [pair for w in weights(n, labels, 12, seed) for pair in zip(*Taus(pred, human)(w), strict=True)]
            singles = list(_resamples(n, labels, 12, seed))
            expected = [(kendall_tau(pred[i], human[i]), kendall_tau(pred[i], human[i], "c")) for i in singles]
            np.testing.assert_allclose(drawn, expected, rtol=0, atol=1e-15)


def test_the_chunks_do_not_matter(monkeypatch):
    pred, human, groups = case(1, 200, 50, 5)
    whole = np.concatenate([Taus(pred, human)(w) for w in weights(200, groups, 30, 0)], axis=1)
    monkeypatch.setattr(resampling, "WEIGHTS", 200 * 7)
    monkeypatch.setattr(resampling, "CELLS", 1)
    parts = list(weights(200, groups, 30, 0))
    assert [part.shape[1] for part in parts] == [7, 7, 7, 7, 2]
    assert np.array_equal(np.concatenate([Taus(pred, human)(w) for w in parts], axis=1), whole)


def test_weights_draw_whole_groups_and_shares_are_means():
    groups = np.array(["a", "a", "b", "c"])
    (w,) = weights(4, groups, 50, 3)
    assert w.dtype == np.float32
    assert np.array_equal(w[0], w[1])
    assert (w[[0, 2, 3]].sum(axis=0) == 3).all()
    hits = np.array([1.0, 0.0, 0.5, 1.0])
    for column in range(50):
        index = np.arange(4).repeat(w[:, column].astype(int))
        assert shares(hits, w)[column] == pytest.approx(hits[index].mean(), abs=1e-15)
    assert list(weights(4, ["x"] * 4, 10, 0)) == []
    assert np.isnan(shares(np.ones(1), np.zeros((1, 1), np.float32)))[0]


def test_one_large_level_beside_small_ones():
    """A level that fills a block has it to itself: no dense matrix of its size is made."""
    values = np.concatenate([np.zeros(5000), np.arange(1, 40), np.full(3000, 50.0), [60.0]])
    rng = np.random.default_rng(0)
    other = rng.normal(size=len(values))
    side = resampling._Side(values)
    assert max(len(rows) for rows in side.mixed_blocks()) < 1024
    (w,) = weights(len(values), None, 5, 0)
    drawn = Taus(values, other)(w)[0]
    singles = [kendall_tau(values[i], other[i]) for i in _resamples(len(values), None, 5, 0)]
    np.testing.assert_allclose(drawn, singles, rtol=0, atol=1e-15)
