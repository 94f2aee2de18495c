"""What the tests of attention share: packed rows, random queries, keys and values, and a gradient to compare."""

import jax
import jax.numpy as jnp
import numpy as np

from multitap_jax.backbones.attention import Setup, attention, make_visibility

QUICK = {"xla_backend_optimization_level": 0}  # compiling is most of the time here


def packed_rows(rows: int, length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Segment and prefix of rows of groups with up to three texts, with padding behind them."""
    rng = np.random.default_rng(seed)
    segment, prefix = np.zeros((2, rows, length), np.int32)
    for row in range(rows):
        at, run = 0, 0
        while at < length - 6:
            run += 1
            first = run
            for part in range(rng.integers(1, 5)):
                size = min(int(rng.integers(1, 6 if part else 12)), length - 3 - at)
                run += part > 0
                segment[row, at : at + size], prefix[row, at : at + size] = run, first
                at += size
    return segment, prefix


def random_inputs(rows: int, length: int, heads: int = 4, groups: int = 2, dim: int = 8, seed: int = 0):
    """q, k, v and a weight for each output, zero at nothing."""
    rng = np.random.default_rng(seed)
    make = lambda heads: jnp.asarray(rng.normal(size=(rows, length, heads, dim)).astype(np.float32))
    return make(heads), make(groups), make(groups), make(heads)


def values_and_gradients(inputs, segment, prefix, setup: Setup, *, causal: bool = True, shards: int = 1):
    """The output at real tokens, and the gradients to q, k and v of a loss that reads these alone.

    With `shards` the rows are mapped outside of the model, as in a training step.
    """
    cut = lambda x: jnp.asarray(x).reshape(shards, -1, *x.shape[1:])
    q, k, v, weight, segment, prefix = map(cut, (*inputs, segment, prefix))

    def one(q, k, v, segment, prefix):
        return attention(q, k, v, make_visibility(segment, prefix, causal=causal, setup=setup))

    def loss(q, k, v):
        out = jax.vmap(one, spmd_axis_name=("data", "fsdp"))(q, k, v, segment, prefix)
        out = jnp.where((segment > 0)[..., None, None], out, 0.0)
        return (out * weight).sum(), out

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), compiler_options=QUICK)
    (_, out), gradients = run(q, k, v)
    return [np.asarray(x).reshape(-1, *x.shape[2:]) for x in (out, *gradients)]


def assert_same(got, expected, tolerance: float = 5e-6):
    """All within `tolerance` of the largest of each."""
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        assert np.isfinite(a).all(), name
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, float(np.abs(b).max())), rtol=0, err_msg=name)
