"""The parts that decoder and vision layers are made of; each computes in the type of its input.

Every parameter is an `nnx.Param` with one logical axis name a dimension (`axes`). A module built with `stack=L` holds
the parameters of L equal layers along a leading "layers" axis; `jax.lax.scan` over it hands out one layer at a time.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from multitap_jax.parallel.mesh import BATCH_AXES

Axis = str | None


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """float32 products are true float32 also on chips whose default is a shorter type; bfloat16 stays native."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def param(value: jax.Array, axes: tuple[Axis, ...]) -> nnx.Param:
    """An `nnx.Param` that carries its logical axis names; raises ValueError unless there is one a dimension."""
    if len(axes) != value.ndim:
        raise ValueError(f"a parameter of shape {value.shape} needs {value.ndim} axis names, got {axes}")
    return nnx.Param(value, axes=axes)


def _stacked(shape: tuple[int, ...], axes: tuple[Axis, ...], stack: int | None) -> tuple[tuple, tuple[Axis, ...]]:
    return (shape, axes) if stack is None else ((stack, *shape), ("layers", *axes))


class Linear(nnx.Module):
    """y = x @ kernel * kernel_scale + bias + (x @ lora_a) @ lora_b * lora_scale, with kernel [in, out].

    `kernel_scale` [out] is None but for a kernel of int8 (`scoring/quantize.py`). `lora_a` [in, r], `lora_b` [r, out]
    and `lora_scale` are None until adapters are added from outside. With `stack=L` each parameter has a leading L.
    """

    def __init__(
        self,
        axes: tuple[Axis, Axis],
        shape: tuple[int, int],
        *,
        bias: bool,
        rngs: nnx.Rngs,
        param_dtype: jnp.dtype,
        stack: int | None = None,
    ):
        kernel_shape, kernel_axes = _stacked(shape, axes, stack)
        bias_shape, bias_axes = _stacked(shape[1:], axes[1:], stack)
        kernel = jax.random.normal(rngs.params(), kernel_shape, param_dtype) * jnp.asarray(0.02, param_dtype)
        self.kernel = param(kernel, kernel_axes)
        self.bias = nnx.data(param(jnp.zeros(bias_shape, param_dtype), bias_axes) if bias else None)
        self.kernel_scale: nnx.Param | None = nnx.data(None)
        self.lora_a: nnx.Param | None = nnx.data(None)
        self.lora_b: nnx.Param | None = nnx.data(None)
        self.lora_scale: float | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., out] in the type of `x`."""
        y = _matmul(x, self.kernel[...])
        if self.kernel_scale is not None:
            y = y * _spread(self.kernel_scale[...].astype(x.dtype), y.ndim)
        if self.bias is not None:
            y = y + _spread(self.bias[...].astype(x.dtype), y.ndim)
        if self.lora_a is not None and self.lora_b is not None:
            low = _matmul(_matmul(x, self.lora_a[...]), self.lora_b[...])
            y = y + low * jnp.asarray(self.lora_scale, x.dtype)
        return y


def linears(model: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """Every `Linear` of a model with its dotted path."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            yield ".".join(map(str, path)), module


def check_not_rounded(model: nnx.Module, purpose: str) -> None:
    """Raises ValueError where kernels are of int8: such a model scores, and nothing else."""
    if any(linear.kernel_scale is not None for _, linear in linears(model)):
        raise ValueError(f"weights that were rounded to int8 cannot be {purpose}; load the model again, with full ones")


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last dimension, in float32."""

    def __init__(
        self, size: int, eps: float, *, param_dtype: jnp.dtype, stack: int | None = None, axis: Axis = "embed"
    ):
        shape, axes = _stacked((size,), (axis,), stack)
        self.scale = param(jnp.ones(shape, param_dtype), axes)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., H] -> [..., H] in the type of `x`."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * _spread(self.scale[...].astype(jnp.float32), x.ndim)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias over the last dimension, two-pass variance, in float32."""

    def __init__(self, size: int, eps: float, *, param_dtype: jnp.dtype, stack: int | None = None):
        shape, axes = _stacked((size,), ("vision",), stack)
        self.scale = param(jnp.ones(shape, param_dtype), axes)
        self.bias = param(jnp.zeros(shape, param_dtype), axes)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., E] -> [..., E] in the type of `x`."""
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        wide = wide * _spread(self.scale[...].astype(jnp.float32), x.ndim)
        return (wide + _spread(self.bias[...].astype(jnp.float32), x.ndim)).astype(x.dtype)


class Embedding(nnx.Module):
    """Token table [vocab, H]; an id outside it gives NaN, which no score survives, rather than a wrong row."""

    def __init__(self, vocab: int, size: int, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        table = jax.random.normal(rngs.params(), (vocab, size), param_dtype) * jnp.asarray(0.02, param_dtype)
        self.embedding = param(table, ("vocab", "embed"))

    def __call__(self, tokens: jax.Array, dtype: jnp.dtype, mesh: Mesh | None = None) -> jax.Array:
        """int32[...] -> [..., H] in `dtype`; `mesh` as in `Execution`."""
        take = lambda table, tokens: jnp.take(table, tokens, axis=0, mode="fill").astype(dtype)
        if mesh is not None and all(mesh.shape[axis] > 1 for axis in BATCH_AXES):
            take = _exchanged(take, mesh)
        return take(self.embedding[...], tokens)


def _exchanged(take: Callable[[jax.Array, jax.Array], jax.Array], mesh: Mesh) -> Callable[..., jax.Array]:
    """`take(table, tokens)` where the batch is spread over `data` and `fsdp`, and the columns of the table over `fsdp`.

    The devices of an `fsdp` group each look up their columns for the rows of the whole group, and exchange columns for
    rows. The layout before the exchange has to be said: left alone the partitioner finds no way from columns to rows
    where both axes are larger than 1, and gathers the rows of all groups on every device, in both passes. The batch
    dimension is mapped (`jax.vmap`), and is there to be laid out outside of the mapping only.
    """
    outer, inner = BATCH_AXES
    lookup = jax.custom_batching.custom_vmap(take)

    @lookup.def_vmap
    def mapped(size: int, batched: list[bool], table: jax.Array, tokens: jax.Array) -> tuple[jax.Array, bool]:
        x = take(table, tokens)
        for spec in (PartitionSpec(outer, *[None] * (x.ndim - 2), inner), PartitionSpec(BATCH_AXES)):
            x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
        return x, True

    return lookup


def quick_gelu(x: jax.Array) -> jax.Array:
    """x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(jnp.asarray(1.702, x.dtype) * x)


def gated(gate: jax.Array, x: jax.Array) -> jax.Array:
    """x * tanh(gate) with a gate of one value, whose tanh is taken in float32."""
    return x * jnp.tanh(gate.astype(jnp.float32)).astype(x.dtype).reshape((1,) * x.ndim)


def tanh_gelu(x: jax.Array) -> jax.Array:
    """The GELU with a tanh in place of the error function. Named, so that two models that have it are equal trees."""
    return jax.nn.gelu(x, approximate=True)


def inverse_frequencies(dim: int, theta: float) -> np.ndarray:
    """float32[dim / 2], theta^(-2i / dim)."""
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return (1.0 / np.power(np.float32(theta), exponent)).astype(np.float32)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding of [B, S, A, D] by (cos, sin) float32[B, S, 1, D / 2]; halves form the pairs (NeoX layout)."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.einsum("...i,io->...o", x, kernel.astype(x.dtype), precision=matmul_precision(x.dtype))


def _spread(vector: jax.Array, ndim: int) -> jax.Array:
    return vector.reshape((1,) * (ndim - 1) + vector.shape)
