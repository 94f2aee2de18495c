"""Agreement statistics: hand-computed cases, a slow obvious count, and published figures."""

import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from multitap_jax.evaluation import correlation
from multitap_jax.evaluation.correlation import (
    accuracy_within,
    bootstrap,
    evaluate_pairs,
    kendall_tau,
    mse,
    pearson,
    sample_count,
    spearman,
    undefined_reason,
)

SHARED = Path(os.environ.get("MULTITAP_SHARED_DATA", Path(__file__).parents[2].parent / "shared/data"))


def test_by_hand():
    # five concordant pairs, one discordant, no ties: (5 - 1) / 6
    assert kendall_tau([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(2 / 3, abs=1e-15)
    # pairs: 1 tied in pred, 1 in human, 4 concordant: tau_b = 4 / sqrt(5 * 5), tau_c = 4 * 2 * 3 / (16 * 2)
    assert kendall_tau([1, 1, 2, 3], [1, 2, 3, 3], "b") == pytest.approx(0.8, abs=1e-15)
    assert kendall_tau([1, 1, 2, 3], [1, 2, 3, 3], "c") == pytest.approx(0.75, abs=1e-15)
    assert pearson([0, 1, 2], [0, 1, 5]) == pytest.approx(5 / math.sqrt(28), abs=1e-15)
    assert spearman([0, 1, 2], [0, 1, 5]) == pytest.approx(1, abs=1e-15)
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2, abs=1e-15)
    assert mse([0, 1], [1, 3]) == 2.5
    assert accuracy_within([0, 0, 0, 0], [0.5, -0.5, 0.50001, 2]) == 0.5
    assert accuracy_within([0, 0], [0.1, 0.3], tolerance=0.2) == 0.5


def slow_taus(pred, human):
    score, pred_tied, human_tied, total = 0, 0, 0, 0
    for i, j in itertools.combinations(range(len(pred)), 2):
        left, right = np.sign(pred[i] - pred[j]), np.sign(human[i] - human[j])
        score, total = score + left * right, total + 1
        pred_tied, human_tied = pred_tied + (left == 0), human_tied + (right == 0)
    m = min(len(set(pred)), len(set(human)))
    return (
        score / math.sqrt((total - pred_tied) * (total - human_tied)),
        2 * m * score / (len(pred) ** 2 * (m - 1)),
        pred_tied,
        human_tied,
    )


def test_equal_to_the_slow_count():
    rng = np.random.default_rng(0)
    for _ in range(20):
        pred, human = rng.integers(0, 6, 30) / 8, rng.integers(1, 5, 30).astype(float)
        tau_b, tau_c, pred_tied, human_tied = slow_taus(pred, human)
        metrics = evaluate_pairs(pred, human, samples=2)
        assert metrics.tau_b.value == kendall_tau(pred, human, "b") == pytest.approx(tau_b, abs=1e-12)
        assert metrics.tau_c.value == kendall_tau(pred, human, "c") == pytest.approx(tau_c, abs=1e-12)
        assert (metrics.ties_pred, metrics.ties_human) == (pred_tied, human_tied)
        assert metrics.pearson.value == pytest.approx(stats.pearsonr(pred, human).statistic, abs=1e-12)
        assert metrics.spearman.value == pytest.approx(stats.spearmanr(pred, human).statistic, abs=1e-12)
        both = sum(a == b for a, b in itertools.combinations(zip(pred, human, strict=True), 2))
        assert metrics.ties_both == both


def test_undefined_is_nan_with_a_reason_and_no_warning():
    for measure in (kendall_tau, pearson, spearman):
        assert math.isnan(measure([1, 1, 1], [1, 2, 3]))
        assert math.isnan(measure([0.1] * 7, [0.1] * 7))
        assert math.isnan(measure([1], [1]))
        assert math.isnan(measure([], []))
    assert undefined_reason([1, 1], [1, 2]) == "all predictions are equal"
    assert undefined_reason([1, 1], [2, 2]) == "all predictions and all human scores are equal"
    assert undefined_reason([1], [2]) == "1 pairs: a correlation needs two"
    assert undefined_reason([1, 2], [2, 2.5]) is None
    metrics = evaluate_pairs([1, 1, 1], [1, 2, 3], samples=10)
    assert math.isnan(metrics.tau_b.value)
    assert metrics.tau_b.reason == "all predictions are equal"
    assert math.isnan(metrics.tau_b.interval.low)
    assert metrics.tau_b.interval.undefined == 10
    assert metrics.mse.reason is None
    assert metrics.mse.value == pytest.approx(5 / 3)
    empty = evaluate_pairs([], [])
    assert (empty.n, empty.samples, empty.mse.reason) == (0, 0, "no pairs")


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="1 of 2 predictions are NaN or infinite, the first at index 1"):
        kendall_tau([1, float("nan")], [1, 2])
    with pytest.raises(ValueError, match="human scores are NaN"):
        mse([1, 2], [float("inf"), 2])
    with pytest.raises(ValueError, match="2 predictions but 3 human"):
        pearson([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="shape"):
        spearman([[1]], [[1]])
    with pytest.raises(ValueError, match="expected 'b' or 'c'"):
        kendall_tau([1, 2], [1, 2], "a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="level"):
        bootstrap(pearson, [1, 2], [1, 2], level=95)
    with pytest.raises(ValueError, match="3 group labels for 2 pairs"):
        bootstrap(pearson, [1, 2], [1, 2], groups=["a", "b", "c"])


def test_pearson_at_extreme_scales():
    assert pearson([1e300, 2e300, 4e300], [1e-300, 2e-300, 4e-300]) == pytest.approx(1)


def test_bootstrap_covers_the_mean_as_theory_says():
    rng = np.random.default_rng(1)
    values = rng.normal(size=400)
    low, high = bootstrap(lambda p, h: float(p.mean()), values, values, samples=2000, seed=3)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.01)
    assert high == pytest.approx(values.mean() + half, abs=0.01)
    again = bootstrap(lambda p, h: float(p.mean()), values, values, samples=2000, seed=3)
    assert (again.low, again.high, again.samples) == (low, high, 2000)
    narrow = bootstrap(lambda p, h: float(p.mean()), values, values, samples=2000, level=0.5)
    assert low < narrow.low < narrow.high < high


def test_groups_are_resampled_whole():
    rng = np.random.default_rng(2)
    labels = np.repeat([f"g{i}" for i in range(20)], rng.integers(1, 6, 20))
    rng.shuffle(labels)
    members = {label: set(np.flatnonzero(labels == label)) for label in labels}
    for index in correlation._resamples(len(labels), labels, 20, seed=0):
        counts = np.bincount(index, minlength=len(labels))
        for rows in members.values():
            assert len({counts[row] for row in rows}) == 1
        assert sum(counts[min(rows)] for rows in members.values()) == 20
    # ten copies of each pair say nothing new: the interval is that of the pairs themselves
    pred, human = rng.normal(size=50), rng.normal(size=50)
    single = bootstrap(pearson, pred, human, samples=500)
    copies = bootstrap(pearson, pred.repeat(10), human.repeat(10), groups=np.arange(50).repeat(10), samples=500)
    assert list(copies) == pytest.approx(list(single), abs=1e-12)
    alone = bootstrap(pearson, pred, human, groups=["one"] * 50)
    assert math.isnan(alone.low)
    assert alone.samples == 0


def test_evaluate_pairs_equals_its_parts():
    rng = np.random.default_rng(3)
    human = rng.random(40)
    pred = (human + rng.normal(size=40) * 0.2).astype(np.float32)
    groups = [str(i // 2) for i in range(40)]
    metrics = evaluate_pairs(pred, human, groups=groups, samples=50, seed=4, level=0.9, tolerance=0.1)
    parts = {
        "tau_b": kendall_tau,
        "tau_c": lambda p, h: kendall_tau(p, h, "c"),
        "pearson": pearson,
        "spearman": spearman,
        "mse": mse,
        "accuracy": lambda p, h: accuracy_within(p, h, 0.1),
    }
    for name, statistic in metrics.statistics().items():
        assert statistic.value == parts[name](pred, human)
        assert statistic.interval == bootstrap(parts[name], pred, human, groups=groups, samples=50, seed=4, level=0.9)
        assert statistic.interval.low <= statistic.value <= statistic.interval.high
    assert (metrics.n, metrics.n_groups, metrics.samples) == (40, 20, 50)


def test_large_inputs_draw_fewer_samples_and_say_so():
    assert [sample_count(n, 1000) for n in (0, 100, 20_000, 40_000, 10**6)] == [1000, 1000, 1000, 500, 100]
    assert sample_count(10**6, 10) == 10


@pytest.mark.skipif(not (SHARED / "benchmarks").is_dir(), reason="the published scores are not at hand")
def test_published_fleur_figures():
    judged = json.loads((SHARED / "benchmarks/flickr8k_expert.json").read_text())
    ratings = np.array([h["rating"] for image in judged.values() for h in image["human_judgement"]])
    lines = (SHARED / "benchmarks/fleur_flickr8k_expert_scores.jsonl").read_text().splitlines()
    scores = [json.loads(line) for line in lines]
    smooth, raw = (np.array([score[key] for score in scores]) for key in ("score", "raw_score"))
    assert (len(ratings), len(smooth)) == (16_992, 5_664)
    mean = ratings.reshape(-1, 3).mean(axis=1)
    figures = [
        (kendall_tau(smooth.repeat(3), ratings, "c"), 0.53026),
        (kendall_tau(smooth.repeat(3), ratings, "b"), 0.52666),
        (kendall_tau(smooth, mean, "c"), 0.55986),
        (kendall_tau(smooth, mean, "b"), 0.57698),
        (kendall_tau(raw.repeat(3), ratings, "c"), 0.34911),
        (kendall_tau(raw.repeat(3), ratings, "b"), 0.56082),
        (kendall_tau(mean.repeat(3), ratings, "c"), 0.70561),
        (kendall_tau(mean.repeat(3), ratings, "b"), 0.80224),
    ]
    for found, published in figures:
        assert found == pytest.approx(published, abs=5.01e-6)
    assert pearson(smooth, mean) == pytest.approx(0.7915, abs=5.01e-5)
