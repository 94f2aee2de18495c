"""Attention compiled for accelerators that are not there: TPU programs whole, GPU programs up to the library's call."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from multitap_jax.backbones.attention import Setup, attention, make_visibility
from multitap_jax.config import MeshConfig
from multitap_jax.parallel.mesh import BATCH_AXES, make_mesh
from multitap_jax.planning.chips import Topology

HEADS, GROUPS, DIM = 4, 2, 128


def step(setup: Setup, *, causal: bool, shards: bool):
    """Value and gradients of attention; rows are mapped as in a training step."""

    def one(q, k, v, segment, prefix):
        visibility = make_visibility(segment, prefix if causal else None, causal=causal, setup=setup)
        return jnp.sum(jnp.square(attention(q, k, v, visibility).astype(jnp.float32)))

    def loss(q, k, v, segment, prefix):
        return jnp.sum(jax.vmap(one, spmd_axis_name=BATCH_AXES if shards else None)(q, k, v, segment, prefix))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))


def shapes(length: int, dtype: str, place, *, shards: int = 1, along: str | None = None):
    """Queries, keys, values, segment and prefix of one row a shard."""
    x = lambda heads: jax.ShapeDtypeStruct(
        (shards, 1, length, heads, DIM),
        jnp.dtype(dtype),
        sharding=place(PartitionSpec(BATCH_AXES, None, along, "tensor")),
    )
    ids = jax.ShapeDtypeStruct((shards, 1, length), jnp.int32, sharding=place(PartitionSpec(BATCH_AXES)))
    return x(HEADS), x(GROUPS), x(GROUPS), ids, ids


@pytest.mark.tpu_plan
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (extra tpu-plan)")
@pytest.mark.parametrize(
    ("backend", "length", "dtype", "sizes", "causal"),
    [
        ("splash", 2048, "bfloat16", {"data": 2, "tensor": 2}, True),
        ("splash", 1700, "bfloat16", {"fsdp": 4}, False),
        ("blockwise", 4096, "float32", {"data": 2, "tensor": 2}, True),
        ("ring", 32768, "bfloat16", {"context": 4}, True),
    ],
    ids=str,
)
def test_kernels_and_loops_compile_for_a_v5e(backend, length, dtype, sizes, causal):
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}), Topology.parse("v5e:2x2").devices())
    context, shards = mesh.shape["context"] > 1, mesh.shape["data"] * mesh.shape["fsdp"]
    name = {("splash", True): "auto", ("ring", True): "auto"}.get((backend, causal), backend)
    setup = Setup(name, dtype, mesh, context)
    place = functools.partial(NamedSharding, mesh)
    arrays = shapes(length, dtype, place, shards=shards, along="context" if context else None)
    compiled = step(setup, causal=causal, shards=True).lower(*arrays).compile()
    text = compiled.as_text()
    kernels = text.count('custom_call_target="tpu_custom_call"')
    assert kernels == (3 if backend == "splash" else 0)  # forward, gradients to queries, to keys and values
    assert ("collective-permute" in text) == (backend == "ring")
    gathered = length**2 * HEADS * 4 / 8  # an eighth of the scores of a row
    assert compiled.memory_analysis().temp_size_in_bytes < gathered


def test_cudnn_is_called_for_values_and_gradients(monkeypatch):
    """Lowered for CUDA; whether there is a cuDNN is asked of the machine, so the test answers for it."""
    from jax._src.cudnn import fused_attention_stablehlo as library

    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(library, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(library, "is_cuda_compute_capability_equal", lambda capability: False)
    arrays = shapes(514, "bfloat16", lambda spec: None)
    arrays = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
    for causal in (True, False):
        traced = step(Setup("cudnn", "bfloat16"), causal=causal, shards=False).trace(*arrays)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("__cudnn$fmhaScaleBiasSoftmaxBackward") == 1
        assert text.count("__cudnn$fmhaScaleBiasSoftmax") >= 2
