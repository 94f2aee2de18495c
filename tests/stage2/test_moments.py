"""The sums: equal to float64, whatever the chunks, the order of merging, the buckets and the origin."""

import functools

import jax
import numpy as np
import pytest

from multitap_jax.stage2 import moments as mm
from multitap_jax.stage2 import solve
from multitap_jax.stage2.accumulator import Accumulator, RawBatch, checked_rows, fold_of
from tests.stage2.data import embeddings, with_missing


def summed(x, y, weight, chunk, shift, label_shift):
    state = mm.init(x.shape[1], y.shape[1], 1, shift, label_shift)
    for start in range(0, len(x), chunk):
        part, pad = slice(start, start + chunk), max(0, start + chunk - len(x))
        state = mm.update(
            state,
            np.pad(x[part], ((0, pad), (0, 0))),
            np.pad(y[part], ((0, pad), (0, 0))),
            np.pad(weight[part], (0, pad)),
            np.int32(0),
        )
    return state


def relative(found, expected):
    scale = np.sqrt(np.diagonal(expected))
    return np.max(np.abs(found - expected) / np.outer(scale, scale))


@pytest.fixture(scope="module")
def rows():
    x, y = embeddings(3000)
    weight = np.random.default_rng(0).gamma(1.0, size=3000).astype(np.float32)
    return x, y, weight, x[:500].mean(0), y[:500].mean(0)


@pytest.mark.parametrize("chunk", [64, 1000, 2048])
def test_sums_equal_float64_for_any_chunk(rows, chunk):
    x, y, weight, shift, label_shift = rows
    stats = mm.finalize(summed(*rows[:3], chunk, shift, label_shift))[0]
    wide = x.astype(np.float64) - stats.shift, y.astype(np.float64) - stats.label_shift
    expected = mm.from_rows(*wide, weight.astype(np.float64))
    assert relative(stats.gram, expected.gram) < 1e-6
    assert stats.num_rows == expected.num_rows == np.sum(weight > 0)
    np.testing.assert_allclose(stats.mean, np.average(x.astype(np.float64), axis=0, weights=weight), rtol=1e-5)


def test_float_float_keeps_what_float32_drops():
    # 3000 updates of one row each: the exact sum of float32 products is known in float64.
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((3000, 3)).astype(np.float32) + 1, np.zeros((3000, 1), np.float32)
    x = x.astype(jax.numpy.bfloat16).astype(np.float32)  # products of bfloat16 are exact in float32
    state = summed(x, y, np.ones(3000, np.float32), 1, np.zeros(3), np.zeros(1))
    exact = x.astype(np.float64).T @ x.astype(np.float64)
    assert relative(mm.finalize(state)[0].gram[:3, :3], exact) < 1e-13
    assert relative(np.asarray(state.hi[0, :3, :3], np.float64), exact) > 1e-9


def test_merging_is_exact_in_any_order(rows):
    x, y, weight, shift, label_shift = rows
    parts = [slice(start, start + 500) for start in range(0, 3000, 500)]
    states = [summed(x[p], y[p], weight[p], 500, shift, label_shift) for p in parts]
    forwards = mm.finalize(functools.reduce(mm.merge, states))[0]
    backwards = mm.finalize(functools.reduce(mm.merge, states[::-1]))[0]
    one = mm.finalize(summed(x, y, weight, 500, shift, label_shift))[0]
    assert relative(backwards.gram, forwards.gram) < 1e-13
    assert relative(one.gram, forwards.gram) < 1e-13
    assert one.num_rows == forwards.num_rows == backwards.num_rows


def test_update_compiles_once(rows):
    before = mm.update._cache_size()
    summed(*rows[:3], 700, rows[3], rows[4])
    assert mm.update._cache_size() == before + 1


def test_recentring_equals_starting_elsewhere(rows):
    x, y, weight = (part.astype(np.float64) for part in rows[:3])
    rng = np.random.default_rng(1)
    shift, label_shift = x.mean(0) + rng.standard_normal(40), y.mean(0) + rng.standard_normal(3)
    moved = mm.recentre(mm.from_rows(x, y, weight), shift, label_shift)
    expected = mm.from_rows(x - shift, y - label_shift, weight)
    assert relative(moved.gram, expected.gram) < 1e-7  # 3000^2 cancels to 10^2: five of sixteen digits
    back = mm.recentre(moved, np.zeros(40), np.zeros(3))
    assert relative(back.gram, mm.from_rows(x, y, weight).gram) < 1e-12


def test_squared_error_equals_residuals(rows):
    x, y, weight = (part.astype(np.float64) for part in rows[:3])
    rng = np.random.default_rng(2)
    coef, intercept = rng.standard_normal((2, 3, 40)) / 10, rng.standard_normal((2, 3))
    stats = mm.recentre(mm.from_rows(x, y, weight), x.mean(0), y.mean(0))
    residual = y[None] - np.einsum("nh,cth->cnt", x, coef) - intercept[:, None, :]
    expected = np.sum(weight[None, :, None] * residual**2, axis=1)
    np.testing.assert_allclose(solve.squared_error(stats, coef, intercept), expected, rtol=1e-9)


def collect(x, y, groups, *, folds=3, chunk=128, batch=200, keep=100):
    collector = Accumulator(folds, keep_rows=keep, chunk_rows=chunk)
    raw = [RawBatch(x[i : i + batch], y[i : i + batch], groups[i : i + batch]) for i in range(0, len(x), batch)]
    for rows in checked_rows(raw, folds, 0):
        collector.add(rows)
    return collector


@pytest.mark.parametrize(("share", "buckets"), [(0.0, 1), (0.02, None), (0.4, 3)])
@pytest.mark.parametrize(("chunk", "batch"), [(64, 77), (256, 1500)])
def test_every_fold_and_objective_has_exactly_its_rows(share, buckets, chunk, batch):
    x, y = embeddings(1500)
    y = with_missing(y, share)
    y[:600, 1] = np.nan  # the patterns change on the way
    groups = [str(i // 4) for i in range(1500)]
    collector = collect(x, y, groups, chunk=chunk, batch=batch)
    assert len(collector._sums) <= 3  # memory stays bounded, however many patterns there are
    data = collector.finish(("a", "b", "c"))
    fold = np.array([fold_of(group, 3, 0) for group in groups])
    found = 0
    for group in data.groups:
        for number, stats in enumerate(group.folds):
            for column, target in enumerate(group.targets):
                seen = (fold == number) & ~np.isnan(y[:, target])
                wide = x[seen].astype(np.float64) - stats.shift, y[seen][:, [target]] - stats.label_shift[[column]]
                expected = mm.from_rows(*wide, np.ones(seen.sum()))
                own = mm.select(stats, np.array([column]))
                assert own.num_rows == seen.sum()
                assert relative(own.gram, expected.gram) < 1e-6
                found += 1
    assert found == 9
    if buckets == 3:
        assert [len(group.targets) for group in data.groups] == [1, 1, 1]


def test_folds_depend_on_the_group_and_seed_alone():
    names = [f"image-{i}" for i in range(3000)]
    folds = np.array([fold_of(name, 5, 0) for name in names])
    np.testing.assert_allclose(np.bincount(folds) / 3000, 0.2, atol=0.03)
    assert [fold_of(name, 5, 0) for name in names[:6]] == [int(v) for v in folds[:6]]
    assert np.any(folds != [fold_of(name, 5, 1) for name in names])


def test_the_device_solution_equals_the_host():
    x, y = embeddings(3000)
    stats = mm.finalize(summed(x, y, np.ones(3000, np.float32), 1000, x.mean(0), y.mean(0)))[0]
    spectrum = solve.decompose(stats)
    for share in (1e-5, 1e-3, 1e-1):
        alpha = np.array([1.0, 2.0, 1.0]) * share * spectrum.values[-1]
        host = spectrum.solve(alpha[None])[0][0]
        device = solve.solve_on_device(stats, alpha)
        np.testing.assert_allclose(device, host, rtol=1e-4, atol=1e-4 * np.abs(host).max(1).min())
    low_rank = mm.from_rows(x[:20].astype(np.float64), y[:20].astype(np.float64), np.ones(20))
    with pytest.raises(np.linalg.LinAlgError, match="solver='host'"):
        solve.solve_on_device(low_rank, np.full(3, 1e-12))


def test_shifts_must_fit():
    with pytest.raises(ValueError, match="expected"):
        mm.init(4, 2, 1, np.zeros(3), np.zeros(2))
