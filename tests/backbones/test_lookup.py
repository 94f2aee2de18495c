"""Looking up token embeddings on a mesh: the values and gradients of one device, and nothing gathered whole."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from multitap_jax.backbones.layers import Embedding
from multitap_jax.config import MeshConfig
from multitap_jax.parallel.mesh import batch_sharding, batch_shards, make_mesh, param_shardings
from multitap_jax.planning.overheard import overheard

VOCAB, SIZE, LENGTH = 64, 32, 23


def compiled(config, weight):
    """loss and gradient of a table on a mesh; what the partitioner complains of."""
    mesh = make_mesh(config)
    table = Embedding(VOCAB, SIZE, rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    table = jax.device_put(table, param_shardings(table, mesh))
    tokens = np.random.default_rng(1).integers(0, VOCAB, (8, LENGTH)).astype(np.int32)
    cells = jax.device_put(tokens.reshape(batch_shards(mesh), -1, LENGTH), batch_sharding(mesh))

    def loss(table, tokens):
        look = lambda part: table(part, jnp.dtype("float32"), mesh)
        x = jax.vmap(look, spmd_axis_name=("data", "fsdp"))(tokens)
        x = jax.lax.with_sharding_constraint(x, batch_sharding(mesh))
        spread = jax.lax.with_sharding_constraint(weight.reshape(x.shape), batch_sharding(mesh))
        return jnp.sum(jnp.tanh(x) * spread)

    said = []
    with overheard(said):
        placed = jax.tree.map(lambda x: x.sharding, table)
        program = jax.jit(jax.value_and_grad(loss), out_shardings=(None, placed)).lower(table, cells).compile()
    return program, program(table, cells), tokens, "".join(said)


@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(2, 4, 1), (4, 2, 1), (2, 2, 2), (1, 8, 1)])
def test_rows_are_exchanged_and_not_gathered(data, fsdp, tensor):
    weight = jnp.asarray(np.random.default_rng(2).standard_normal((8, LENGTH, SIZE)), jnp.float32)
    program, (value, gradient), tokens, said = compiled(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), weight)
    table = Embedding(VOCAB, SIZE, rngs=nnx.Rngs(0), param_dtype=jnp.float32).embedding[...]
    obvious = lambda table: jnp.sum(jnp.tanh(table[tokens]) * weight)
    np.testing.assert_allclose(value, obvious(table), rtol=1e-5)
    np.testing.assert_allclose(gradient.embedding[...], jax.grad(obvious)(table), rtol=1e-5, atol=1e-6)
    assert "rematerialization" not in said
    assert "all-to-all" in program.as_text()
    gathered = re.findall(r"= \(?f32\[([\d,]*)\]\S* all-gather", program.as_text())
    rows = [shape for shape in gathered if str(LENGTH) in shape.split(",")]
    own = 8 // (data * fsdp) * LENGTH * SIZE  # of a device
    assert all(math.prod(map(int, shape.split(","))) <= own for shape in rows), rows


def test_an_unknown_token_is_nan_on_a_mesh_too():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    table = Embedding(VOCAB, SIZE, rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    table = jax.device_put(table, param_shardings(table, mesh))
    tokens = jax.device_put(np.array([[[1, VOCAB]], [[2, 3]], [[4, 5]], [[6, 7]]], np.int32), batch_sharding(mesh))
    look = lambda part: table(part, jnp.dtype("float32"), mesh)
    found = jax.jit(jax.vmap(look, spmd_axis_name=("data", "fsdp")))(tokens)
    expected = np.zeros((4, 1, 2), bool)
    expected[0, 0, 1] = True
    np.testing.assert_array_equal(np.isnan(found).all(-1), expected)
    np.testing.assert_array_equal(np.isnan(found).any(-1), expected)
