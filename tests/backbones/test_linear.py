"""The product with a kernel, whose gradient is written by hand, against the one that JAX derives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from multitap_jax.backbones import Execution
from multitap_jax.backbones.layers import Linear
from multitap_jax.backbones.stack import _remat


def make(inputs: int, outputs: int) -> Linear:
    return Linear(("embed", "mlp"), (inputs, outputs), bias=False, rngs=nnx.Rngs(0), param_dtype=jnp.float32)


def plain(kernel: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.einsum("...i,io->...o", x, kernel.astype(x.dtype), precision="highest")


def product(kernel: jax.Array, x: jax.Array) -> jax.Array:
    linear = make(*kernel.shape)
    linear.kernel.set_value(kernel)
    return linear(x)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("sizes", [(8, 12), (12, 8)], ids=["widens", "narrows"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_gradients_are_those_of_the_einsum(sizes, shape, dtype, tolerance):
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=sizes), jnp.float32)  # held in float32 whatever is computed in
    x, weight = (jnp.asarray(rng.normal(size=(*shape, size)), dtype) for size in sizes)

    def gradients(function):
        loss = lambda kernel, x: (function(kernel, x).astype(jnp.float32) * weight.astype(jnp.float32)).sum()
        mapped = lambda kernel, x: jax.vmap(loss, in_axes=(None, 0))(kernel, jnp.stack([x, -2 * x])).sum()
        return [*jax.grad(loss, (0, 1))(kernel, x), *jax.grad(mapped, (0, 1))(kernel, x)]

    for ours, theirs in zip(gradients(product), gradients(plain), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        scale = np.abs(np.asarray(theirs, np.float32)).max()
        np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (ours, theirs)), atol=tolerance * scale)


def test_rematerialisation_sees_the_product():
    """ "dots" keeps it: then no product is computed twice, as many are there as without rematerialisation."""

    def products(remat: str) -> int:
        x, wide, narrow = jnp.ones((3, 8)), jnp.ones((8, 12)), jnp.ones((12, 8))
        both = _remat(lambda x: jnp.tanh(product(narrow, jnp.tanh(product(wide, x)))), Execution(remat=remat))
        return str(jax.make_jaxpr(jax.grad(lambda x: both(x).sum()))(x)).count("dot_general")

    assert products("dots") == products("none") < products("full")
