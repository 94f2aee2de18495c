"""Every attention backend against a loop over queries and keys, the mask rule spelled out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multitap_jax.backbones import attention as module
from multitap_jax.backbones.attention import Setup, attention, blockwise, chunked, make_visibility, splash

SEGMENT = np.array([[1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 0, 0], [1, 1, 2, 2, 2, 2, 2, 3, 0, 0, 0, 0, 0]], np.int32)
PREFIX = np.array([[1, 1, 1, 1, 1, 1, 1, 1, 4, 4, 4, 0, 0], [1, 1, 1, 1, 1, 1, 1, 3, 0, 0, 0, 0, 0]], np.int32)

QUICK = {"xla_backend_optimization_level": 0}  # compiling is most of the time here


# On one device, in any type; `splash` as its kernels are interpreted on a CPU.
BACKENDS = ("dense", "chunked", "blockwise", "splash")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 4)
    monkeypatch.setattr(blockwise, "ROWS", 9)
    monkeypatch.setattr(chunked, "CHUNK", 4)
    monkeypatch.setattr(splash, "INTERPRET", True)


def inputs(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    make = lambda heads: rng.normal(size=(*SEGMENT.shape, heads, 8)).astype(np.float32)
    return make(6), make(2), make(2)


def slow(q, k, v, causal: bool) -> np.ndarray:
    """float64, one query and one head at a time; zeros where nothing is seen."""
    out = np.zeros(q.shape)
    rows, length, heads, dim = q.shape
    for b, s, a in np.ndindex(rows, length, heads):
        group = a // (heads // k.shape[2])
        seen = [
            t
            for t in range(length)
            if SEGMENT[b, s] > 0 and SEGMENT[b, t] in (SEGMENT[b, s], PREFIX[b, s]) and (t <= s or not causal)
        ]
        if seen:
            scores = np.array([q[b, s, a].astype(np.float64) @ k[b, t, group] for t in seen]) / dim**0.5
            weights = np.exp(scores - scores.max())
            out[b, s, a] = (weights / weights.sum()) @ v[b, seen, group]
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_equals_the_slow_loop(backend, causal):
    q, k, v = inputs()
    got = attention(*map(jnp.asarray, (q, k, v)), make_visibility(SEGMENT, PREFIX, causal=causal, setup=Setup(backend)))
    real = SEGMENT > 0
    np.testing.assert_allclose(np.asarray(got)[real], slow(q, k, v, causal)[real], atol=2e-6, rtol=0)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_gradients_agree_and_padding_gives_none(backend, causal):
    q, k, v = inputs(1)
    weight = jnp.asarray(
        np.random.default_rng(2).normal(size=q.shape).astype(np.float32) * (SEGMENT > 0)[..., None, None]
    )

    def gradients(backend):
        visibility = make_visibility(jnp.asarray(SEGMENT), jnp.asarray(PREFIX), causal=causal, setup=Setup(backend))
        loss = lambda q, k, v: (attention(q, k, v, visibility) * weight).sum()
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)), compiler_options=QUICK)(q, k, v)

    for dense, other in zip(gradients("dense"), gradients(backend), strict=True):
        np.testing.assert_allclose(other, dense, atol=5e-6, rtol=0)
        for gradient in (dense, other):
            assert np.isfinite(gradient).all()
            assert not np.asarray(gradient)[SEGMENT == 0].any()


def test_unseen_keys_do_not_leak():
    """What stands at positions a query may not see, even huge values, changes nothing."""
    q, k, v = inputs(3)
    for backend in BACKENDS:
        visibility = make_visibility(SEGMENT, PREFIX, causal=True, setup=Setup(backend))
        run = lambda k, v, visibility=visibility: np.asarray(attention(*map(jnp.asarray, (q, k, v)), visibility))
        before = run(k, v)
        loud_k, loud_v = k.copy(), v.copy()
        loud_k[0, 5:8], loud_v[0, 5:8] = 1e4, 1e4  # segment 3, seen by itself alone
        after, others = run(loud_k, loud_v), (SEGMENT[0] != 3) & (SEGMENT[0] > 0)
        np.testing.assert_array_equal(before[0, others], after[0, others])


def test_blockwise_memory_is_linear_in_length(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 128)
    monkeypatch.setattr(blockwise, "ROWS", 128)

    def temporary_bytes(length: int) -> int:
        ids, x = jnp.ones((1, length), jnp.int32), jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        visible = lambda: make_visibility(ids, causal=True, setup=Setup("blockwise"))
        loss = lambda q, k, v: attention(q, k, v, visible()).sum()
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), compiler_options=QUICK).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(2048), temporary_bytes(8192)
    assert long < 4.2 * short
    assert long < 8192**2 * 2 * 4 / 8  # an eighth of one dense float32 score matrix


def test_bfloat16_stays_near_float32():
    q, k, v = inputs(4)
    for backend in BACKENDS:
        visibility = make_visibility(SEGMENT, PREFIX, causal=True, setup=Setup(backend))
        short = attention(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), visibility)
        assert short.dtype == jnp.bfloat16
        real = SEGMENT > 0
        exact = slow(q, k, v, True)[real]
        np.testing.assert_allclose(np.asarray(short, np.float32)[real], exact, atol=0.05, rtol=0)


def test_queries_and_keys_of_their_own_equal_the_slow_loop():
    """Fewer keys than queries, other ids and columns on each side: what cross-attention asks for."""
    rng = np.random.default_rng(3)
    make = lambda *shape: rng.normal(size=shape).astype(np.float32)
    q, k, v = make(2, 11, 6, 8), make(2, 7, 2, 8), make(2, 7, 2, 8)
    ids = lambda low, *shape: rng.integers(low, 4, shape).astype(np.int32)
    queries = module.Queries(ids(0, 2, 11), ids(1, 2, 11), ids(0, 2, 11))
    keys = module.Keys(ids(1, 2, 7), ids(0, 2, 7))
    expected, real = np.zeros(q.shape), np.zeros((2, 11), bool)
    for b, s, a in np.ndindex(2, 11, 6):
        wanted = (queries.segment[b, s], queries.prefix[b, s])
        seen = [
            t
            for t in range(7)
            if queries.segment[b, s] > 0 and keys.segment[b, t] in wanted and keys.column[b, t] <= queries.column[b, s]
        ]
        if seen:
            real[b, s] = True
            scores = np.array([q[b, s, a].astype(np.float64) @ k[b, t, a // 3] for t in seen]) / 8**0.5
            weights = np.exp(scores - scores.max())
            expected[b, s, a] = (weights / weights.sum()) @ v[b, seen, a // 3]
    assert real.any()
    assert not real.all()
    for backend in BACKENDS:
        visibility = module.make_cross_visibility(queries, keys, setup=Setup(backend))
        got = np.asarray(attention(*map(jnp.asarray, (q, k, v)), visibility))
        np.testing.assert_allclose(got[real], expected[real], atol=2e-6, rtol=0, err_msg=backend)
        assert np.isfinite(got).all()
