"""The sums: equal to float64, whatever the chunks, the order of merging, the buckets and the origin."""

import functools

import jax
import numpy as np
import pytest

from multitap_jax.stage2 import moments as mm
from multitap_jax.stage2 import solve, spectrum
from multitap_jax.stage2 import statistics as st
from multitap_jax.stage2.statistics import centred
from tests.stage2.data import embeddings


def summed(x, y, weight, chunk, shift, label_shift, slabs=None):
    state = mm.init(x.shape[1], y.shape[1], shift, label_shift, slabs=slabs)
    for start in range(0, len(x), chunk):
        part, pad = slice(start, start + chunk), max(0, start + chunk - len(x))
        state = mm.update(
            state,
            np.pad(x[part], ((0, pad), (0, 0))),
            np.pad(y[part], ((0, pad), (0, 0))),
            np.pad(weight[part], (0, pad)),
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
    stats = mm.finalize(summed(*rows[:3], chunk, shift, label_shift))
    wide = x.astype(np.float64) - stats.shift, y.astype(np.float64) - stats.label_shift
    expected = st.from_rows(*wide, weight.astype(np.float64))
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
    assert relative(mm.finalize(state).gram[:3, :3], exact) < 1e-13
    assert relative(mm.unpack(np.asarray(state.hi, np.float64), 5)[:3, :3], exact) > 1e-9


def test_merging_is_exact_in_any_order(rows):
    x, y, weight, shift, label_shift = rows
    parts = [slice(start, start + 500) for start in range(0, 3000, 500)]
    states = [summed(x[p], y[p], weight[p], 500, shift, label_shift) for p in parts]
    forwards = mm.finalize(functools.reduce(mm.merge, states))
    backwards = mm.finalize(functools.reduce(mm.merge, states[::-1]))
    one = mm.finalize(summed(x, y, weight, 500, shift, label_shift))
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
    moved = st.recentre(st.from_rows(x, y, weight), shift, label_shift)
    expected = st.from_rows(x - shift, y - label_shift, weight)
    assert relative(moved.gram, expected.gram) < 1e-7  # 3000^2 cancels to 10^2: five of sixteen digits
    back = st.recentre(moved, np.zeros(40), np.zeros(3))
    assert relative(back.gram, st.from_rows(x, y, weight).gram) < 1e-12


def test_squared_error_equals_residuals(rows):
    x, y, weight = (part.astype(np.float64) for part in rows[:3])
    rng = np.random.default_rng(2)
    coef, intercept = rng.standard_normal((2, 3, 40)) / 10, rng.standard_normal((2, 3))
    stats = st.recentre(st.from_rows(x, y, weight), x.mean(0), y.mean(0))
    residual = y[None] - np.einsum("nh,cth->cnt", x, coef) - intercept[:, None, :]
    expected = np.sum(weight[None, :, None] * residual**2, axis=1)
    np.testing.assert_allclose(st.squared_error(stats, coef, intercept), expected, rtol=1e-9)


@pytest.mark.parametrize("slabs", [1, 2, 3, 4, 5, 7])
def test_every_layout_holds_the_same_sums(rows, slabs):
    x, y, weight, shift, label_shift = rows
    stats = mm.finalize(summed(x, y, weight, 1000, shift, label_shift, slabs))
    wide = x.astype(np.float64) - stats.shift, y.astype(np.float64) - stats.label_shift
    assert relative(stats.gram, st.from_rows(*wide, weight.astype(np.float64)).gram) < 1e-6
    np.testing.assert_array_equal(stats.gram, stats.gram.T)
    np.testing.assert_array_equal(mm.unpack(mm.pack(stats.gram, slabs), len(stats.gram)), stats.gram)


def test_reduce_adds_a_leading_axis(rows):
    x, y, weight, shift, label_shift = rows
    parts = [summed(x[p], y[p], weight[p], 500, shift, label_shift) for p in (slice(0, 900), slice(900, 3000))]
    stacked = parts[0]._replace(
        **{name: jax.numpy.stack([getattr(part, name) for part in parts]) for name in ("hi", "lo", "num_rows")}
    )
    found, expected = mm.finalize(mm.reduce(stacked)), mm.finalize(mm.merge(*parts))
    np.testing.assert_array_equal(found.gram, expected.gram)
    assert found.num_rows == expected.num_rows == 3000


def test_saved_moments_go_on_bit_for_bit(rows, tmp_path):
    x, y, weight, shift, label_shift = rows
    state = summed(x[:1000], y[:1000], weight[:1000], 500, shift, label_shift)
    mm.save(tmp_path / "moments.safetensors", state)
    loaded = mm.load(tmp_path / "moments.safetensors")
    chunk = x[1000:1500], y[1000:1500], weight[1000:1500]
    for one, two in zip(mm.update(loaded, *chunk), mm.update(state, *chunk), strict=True):
        np.testing.assert_array_equal(one, two)


def test_the_device_solution_equals_the_host():
    """Float32 is forced; the float64 residuals bring it to 1e-7 all the same."""
    x, y = embeddings(3000)
    stats = mm.finalize(summed(x, y, np.ones(3000, np.float32), 1000, x.mean(0), y.mean(0)))
    about = centred(stats, True)
    factor = spectrum.eigen(about.gram[:40, :40], about.gram[:40, 41:])
    for share in (1e-5, 1e-3, 1e-1):
        alpha = np.array([1.0, 2.0, 1.0]) * share * factor.values[-1]
        host, device = factor.coefficients(alpha), solve.solve_on_device(stats, alpha)
        np.testing.assert_allclose(device, host, rtol=1e-6, atol=1e-7 * np.abs(host).max(1).min())
    low_rank = st.from_rows(x[:20].astype(np.float64), y[:20].astype(np.float64), np.ones(20))
    with pytest.raises(np.linalg.LinAlgError, match="solver='host'"):
        solve.solve_on_device(low_rank, np.full(3, 1e-12))


@pytest.mark.parametrize("form", ["eigen", "tridiagonal", "dual"])
def test_every_factorisation_gives_the_same_answers(form, monkeypatch):
    monkeypatch.setattr(spectrum, "EIGEN_UP_TO", 1)
    rng = np.random.default_rng(0)
    rows, labels = rng.standard_normal((12, 30)) * np.arange(1, 31)[None, :], rng.standard_normal((12, 3))
    gram, cross = rows.T @ rows, rows.T @ labels
    alphas = np.array([1e-3, 1.0, 1e4])
    factor = {
        "eigen": lambda: spectrum.eigen(gram, cross),
        "tridiagonal": lambda: spectrum.tridiagonal(gram, cross, alphas[0]),
        "dual": lambda: spectrum.dual(rows, labels),
    }[form]()
    assert type(factor).__name__.lower() == form
    path, new = factor.path(alphas), rng.standard_normal((5, 30))
    for index, alpha in enumerate(alphas):
        inverse = np.linalg.inv(gram + alpha * np.eye(30))
        coef = inverse @ cross
        scale = np.abs(inverse).max()
        np.testing.assert_allclose(factor.coefficients(np.full(3, alpha)), coef.T, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(factor.inverse(new, alpha), new @ inverse, rtol=1e-6, atol=1e-8 * scale)
        np.testing.assert_allclose(path.fit[index], np.sum(cross * coef, 0), rtol=1e-8)
        np.testing.assert_allclose(path.norm[index], np.sum(coef**2, 0), rtol=1e-6)
        assert path.freedom[index] == pytest.approx(np.trace(gram @ inverse), rel=1e-8)


def test_shifts_must_fit():
    with pytest.raises(ValueError, match="expected"):
        mm.init(4, 2, np.zeros(3), np.zeros(2))
