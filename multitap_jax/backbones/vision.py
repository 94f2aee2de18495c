"""The parts of vision towers: pixel statistics, patch embedding, attention and MLP of a block.

Extra letters: E size of the tower, V inner size of its MLPs.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from multitap_jax.backbones.attention import Visibility, attention
from multitap_jax.backbones.config import Section
from multitap_jax.backbones.layers import Linear, matmul_precision, param, rotate
from multitap_jax.backbones.rope import Angles

# Pixel statistics of OpenAI's CLIP, which most preprocessors use.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class Pixels:
    """How raw pixels become numbers: side of a patch, and mean and deviation per channel of values in [0, 1]."""

    patch_size: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    @classmethod
    def from_hf(
        cls, patch_size: int, processor: Section, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
    ) -> "Pixels":
        """Statistics of the image processor's file where it names any, else those given; no other arithmetic exists."""
        for step in ("do_rescale", "do_normalize"):
            processor.expect(step, True)
        if abs(255 * processor.number("rescale_factor", 1 / 255) - 1) > 1e-6:
            processor.wrong(
                f"rescale_factor = {processor.get('rescale_factor')} is not implemented; it must be 1 / 255"
            )
        return cls(patch_size, processor.numbers("image_mean", mean), processor.numbers("image_std", std))

    @property
    def features(self) -> int:
        """Values of one patch, the F of `PackedBatch.patches`."""
        return len(self.mean) * self.patch_size**2

    def inconsistencies(self, channels: int = 3) -> Iterator[str]:
        """What is wrong with the numbers."""
        if self.patch_size <= 0:
            yield f"patch_size = {self.patch_size} must be positive"
        if len(self.mean) != channels or len(self.std) != channels:
            yield f"image_mean and image_std need {channels} values, one a channel"
        if any(value <= 0 for value in self.std):
            yield f"image_std = {list(self.std)} must be positive"

    def normalise(self, patches: jax.Array) -> jax.Array:
        """uint8[..., F] -> float32[..., F]."""
        area = self.patch_size**2
        mean, std = (np.repeat(np.asarray(value, np.float32), area) for value in (self.mean, self.std))
        shape = (1,) * (patches.ndim - 1) + (-1,)
        return (patches.astype(jnp.float32) / 255.0 - mean.reshape(shape)) / std.reshape(shape)


class PatchEmbedding(nnx.Module):
    """A convolution whose stride is its kernel, hence one product; kernel [(frames,) channels, height, width, E]."""

    def __init__(
        self,
        pixels: Pixels,
        size: int,
        *,
        bias: bool,
        frames: int | None = None,
        rngs: nnx.Rngs,
        param_dtype: jnp.dtype,
    ):
        side, lead = pixels.patch_size, () if frames is None else (frames,)
        shape = (*lead, len(pixels.mean), side, side, size)
        kernel = jax.random.normal(rngs.params(), shape, param_dtype) * jnp.asarray(0.02, param_dtype)
        self.kernel = param(kernel, (*[None] * (len(shape) - 1), "vision"))
        self.bias = nnx.data(param(jnp.zeros(size, param_dtype), ("vision",)) if bias else None)
        self.pixels = pixels
        self.frames = frames

    def __call__(self, patches: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """uint8[R, P, F] raw pixels -> [R, P, E] in `dtype`.

        A still image is shown as equal frames, so the frames' kernels are added instead of the pixels repeated.
        """
        kernel = self.kernel[...]
        if self.frames is not None:
            kernel = kernel.astype(jnp.float32).sum(axis=0)
        kernel = kernel.reshape(self.pixels.features, -1).astype(dtype)
        x = self.pixels.normalise(patches).astype(dtype)
        x = jnp.einsum("rpf,fe->rpe", x, kernel, precision=matmul_precision(dtype))
        return x if self.bias is None else x + self.bias[...].astype(dtype)[None, None, :]


class FusedAttention(nnx.Module):
    """Self-attention with one projection to queries, keys and values and rotary positions (Qwen)."""

    def __init__(self, size: int, heads: int, *, rngs: nnx.Rngs, param_dtype: jnp.dtype, stack: int):
        options: dict[str, Any] = {"bias": True, "rngs": rngs, "param_dtype": param_dtype, "stack": stack}
        self.qkv = Linear(("vision", "heads"), (size, 3 * size), **options)
        self.proj = Linear(("heads", "vision"), (size, size), **options)
        self.heads = heads

    def __call__(
        self, x: jax.Array, angles: Angles, *seen: Any, attend: Callable[..., jax.Array] = attention
    ) -> jax.Array:
        """[R, P, E] -> [R, P, E]; `attend` knows what `seen` is, `attention` takes a visibility."""
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (part.reshape(shape) for part in jnp.split(self.qkv(x), 3, axis=-1))
        out = attend(rotate(q, angles), rotate(k, angles), v, *seen)
        return self.proj(out.reshape(x.shape))


class VisionAttention(nnx.Module):
    """Self-attention with a projection each for queries, keys and values and no rotary positions (CLIP and its kin)."""

    def __init__(self, size: int, heads: int, *, bias: bool, rngs: nnx.Rngs, param_dtype: jnp.dtype, stack: int):
        options: dict[str, Any] = {"bias": bias, "rngs": rngs, "param_dtype": param_dtype, "stack": stack}
        self.q_proj, self.k_proj, self.v_proj = (Linear(("vision", "heads"), (size, size), **options) for _ in range(3))
        self.o_proj = Linear(("heads", "vision"), (size, size), **options)
        self.heads = heads

    def __call__(self, x: jax.Array, visibility: Visibility) -> jax.Array:
        """[R, P, E] -> [R, P, E]."""
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (project(x).reshape(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(attention(q, k, v, visibility).reshape(x.shape))


class VisionMLP(nnx.Module):
    """fc2(activation(fc1(x))), with biases."""

    def __init__(
        self,
        size: int,
        inner: int,
        activation: Callable[[jax.Array], jax.Array],
        *,
        rngs: nnx.Rngs,
        param_dtype: jnp.dtype,
        stack: int,
    ):
        options: dict[str, Any] = {"bias": True, "rngs": rngs, "param_dtype": param_dtype, "stack": stack}
        self.fc1 = Linear(("vision", "mlp"), (size, inner), **options)
        self.fc2 = Linear(("mlp", "vision"), (inner, size), **options)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """[R, P, E] -> [R, P, E]."""
        return self.fc2(self.activation(self.fc1(x)))


def block_flops(size: int, inner: int, patches: int, patch_pairs: int, matrices: int = 2) -> float:
    """Forward FLOPs of a tower block: four E x E projections, `matrices` of E x V, scores and mix of visible pairs."""
    return float(patches * 2 * (4 * size**2 + matrices * size * inner) + patch_pairs * 4 * size)
