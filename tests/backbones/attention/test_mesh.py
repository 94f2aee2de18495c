"""Attention on meshes of simulated devices, against dense attention on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multitap_jax.backbones.attention import (
    Keys,
    Queries,
    Setup,
    UnsupportedAttentionError,
    attention,
    blockwise,
    chunked,
    cudnn,
    make_cross_visibility,
    make_visibility,
    splash,
)
from multitap_jax.backbones.attention.blocks import block_ranges
from multitap_jax.config import MeshConfig
from multitap_jax.parallel.mesh import make_mesh
from tests.backbones.attention.inputs import QUICK, assert_same, packed_rows, random_inputs, values_and_gradients


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 5)
    monkeypatch.setattr(blockwise, "ROWS", 12)
    monkeypatch.setattr(chunked, "CHUNK", 8)


def mesh(**sizes: int) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(**{"data": 1, **sizes}))


RINGS = {
    "one row on eight devices": ({"context": 8}, 1),
    "two rows, heads and stretches apart": ({"data": 2, "tensor": 2, "context": 2}, 2),
    "rows of two axes": ({"data": 2, "fsdp": 2, "context": 2}, 4),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", RINGS)
def test_the_ring_equals_dense_attention(name, causal):
    sizes, shards = RINGS[name]
    rows = 2 * shards
    segment, prefix = packed_rows(rows, 48)
    inputs = random_inputs(rows, 48)
    setup = Setup("auto", mesh=mesh(**sizes), along_context=True)
    assert make_visibility(segment, prefix, causal=causal, setup=setup).backend == "ring"
    got = values_and_gradients(inputs, segment, prefix, setup, causal=causal, shards=shards)
    assert_same(got, values_and_gradients(inputs, segment, prefix, Setup("dense"), causal=causal))


def test_dense_attention_is_shared_out_by_the_compiler():
    segment, prefix = packed_rows(2, 48)
    inputs = random_inputs(2, 48)
    setup = Setup("dense", mesh=mesh(data=2, context=4), along_context=True)
    got = values_and_gradients(inputs, segment, prefix, setup, shards=2)
    assert_same(got, values_and_gradients(inputs, segment, prefix, Setup("dense")))


@pytest.mark.parametrize("backend", ["blockwise", "chunked", "splash"])
def test_rows_and_heads_are_computed_where_they_lie(monkeypatch, backend):
    monkeypatch.setattr(splash, "INTERPRET", True)
    segment, prefix = packed_rows(4, 40, seed=1)
    inputs = random_inputs(4, 40, seed=1)
    setup = Setup(backend, mesh=mesh(data=2, fsdp=2, tensor=2))
    got = values_and_gradients(inputs, segment, prefix, setup, shards=4)
    assert_same(got, values_and_gradients(inputs, segment, prefix, Setup("dense")))


def test_no_device_waits_for_another_in_a_loop():
    """How long a loop runs depends on the rows of a device alone: no collective stands in a program of data shards."""
    segment, prefix = packed_rows(8, 64)
    q, k, v, _ = random_inputs(8, 64)
    setup, on = Setup("blockwise", mesh=mesh(data=8)), jax.sharding.NamedSharding(mesh(data=8), jax.P("data"))
    shard = lambda x: jax.device_put(x[:, None], on)
    see = lambda q, k, v, s, p: attention(q, k, v, make_visibility(s, p, causal=True, setup=setup))
    run = jax.jit(jax.vmap(see, spmd_axis_name=("data", "fsdp")))
    text = run.lower(*map(shard, (q, k, v, segment, prefix))).compile().as_text()
    assert "while(" in text
    assert not any(word in text for word in ("all-reduce", "all-gather", "collective-permute"))


@pytest.mark.parametrize("backend", ["auto", "blockwise", "dense"])
def test_queries_may_be_spread_where_keys_are_not(backend):
    """What tokens of spread rows see of images: the images' states lie whole on every device."""
    rng = np.random.default_rng(3)
    q, k, v, weight = *random_inputs(2, 48)[:1], *random_inputs(2, 20, seed=4)[1:3], random_inputs(2, 48, seed=5)[3]
    ids = lambda low, *shape: jnp.asarray(rng.integers(low, 4, shape).astype(np.int32))
    queries = Queries(ids(0, 2, 48), ids(1, 2, 48), ids(1, 2, 48))
    keys = Keys(ids(1, 2, 20), jnp.concatenate([jnp.zeros((2, 4), jnp.int32), ids(0, 2, 16)], axis=1))

    def run(setup: Setup):
        visibility = make_cross_visibility(queries, keys, setup=setup)

        def loss(q, k, v):
            out = jnp.where(sees[:, :, None, None], attention(q, k, v, visibility), 0.0)
            return (out * weight).sum(), out

        (_, out), gradients = jax.jit(
            jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), compiler_options=QUICK
        )(q, k, v)
        return out, *gradients

    sees = make_cross_visibility(queries, keys).prepared.any(axis=-1)
    assert 0.5 < float(sees.mean()) < 1
    assert_same(run(Setup(backend, mesh=mesh(context=8), along_context=True)), run(Setup("dense")))


def test_what_cannot_be_spread_is_refused():
    segment, prefix = packed_rows(1, 36)
    q, k, v, _ = random_inputs(1, 36)
    for backend in ("blockwise", "chunked", "splash", "cudnn"):
        with pytest.raises(
            UnsupportedAttentionError, match=rf"'{backend}' cannot compute .*context = 8 devices.*'ring'"
        ):
            make_visibility(segment, causal=True, setup=Setup(backend, mesh=mesh(context=8), along_context=True))
    visibility = make_visibility(
        segment, prefix, causal=True, setup=Setup("ring", mesh=mesh(context=8), along_context=True)
    )
    with pytest.raises(UnsupportedAttentionError, match=r"config.mesh.context = 8 does not divide a row's length, 36"):
        attention(q, k, v, visibility)
    visibility = make_visibility(segment, prefix, causal=True, setup=Setup("blockwise", mesh=mesh(tensor=8)))
    with pytest.raises(UnsupportedAttentionError, match=r"config.mesh.tensor = 8 does not divide the key heads, 2"):
        attention(q, k, v, visibility)


def test_blocks_that_nobody_sees_are_left_out():
    segment, prefix = packed_rows(3, 60, seed=7)
    column = np.broadcast_to(np.arange(60, dtype=np.int32), segment.shape)
    queries, keys = Queries(segment, prefix, column), Keys(segment, column)
    found = block_ranges(queries, keys, 7, 5)
    mask = np.asarray(make_visibility(segment, prefix, causal=True).prepared)
    left_out = 0
    for row, i in np.ndindex(found.first.shape):
        needed = [j for j in range(12) if mask[row, 7 * i : 7 * i + 7, 5 * j : 5 * j + 5].any()]
        first, end = int(found.first[row, i]), int(found.end[row, i])
        assert set(needed) <= set(range(first, end))
        left_out += 12 - (end - first)
        if needed:
            assert (first, end - 1) == (min(needed), max(needed))
    assert left_out > found.first.size * 12 / 2
    behind = Keys(segment, column + 60)  # a stretch of keys that follows all queries
    assert (
        np.asarray(block_ranges(queries, behind, 7, 5).end) == np.asarray(block_ranges(queries, behind, 7, 5).first)
    ).all()


def test_cudnn_is_given_the_rule(monkeypatch):
    """All but the kernel, which needs a GPU: the mask, its padding to even lengths, folded rows, the gradient."""
    monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")
    monkeypatch.setattr(cudnn, "DTYPES", ("float32",))
    segment, prefix = packed_rows(4, 39, seed=2)
    inputs = random_inputs(4, 39, seed=2)
    expected = values_and_gradients(inputs, segment, prefix, Setup("dense"))
    assert_same(values_and_gradients(inputs, segment, prefix, Setup("cudnn")), expected)
    setup = Setup("cudnn", mesh=mesh(data=2, fsdp=2, tensor=2))
    assert_same(values_and_gradients(inputs, segment, prefix, setup, shards=4), expected)
