"""Each attention backend that runs on the device at hand, against dense attention: time, and the largest difference.

  python -m benchmarks.attention [--dtype=float32] [--repeats=5] [--length=2048]

Three kinds of rows: `packed` (groups of a prefix of 430 tokens and six texts of 40, as Polaris-like data is packed),
`one` (a single run, causal), and `vision` (1,600 patches of one picture and padding, key heads of their own). Printed
are the forward pass, and forward with gradients to queries, keys and values, in seconds: of the wall, and of all cores
(which is what means something on a shared machine); and the largest difference of outputs and gradients from dense
attention in float32, relative to the largest entry. A backend that refuses says why.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from multitap_jax.backbones.attention import BACKENDS, Setup, UnsupportedAttentionError, attention, make_visibility


def packed(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Segment and prefix of a row of whole groups, with padding behind them."""
    sizes, runs = [430, *[40] * 6], np.arange(1, 8)
    count = length // sum(sizes)
    segment = np.concatenate([np.repeat(runs + 7 * group, sizes) for group in range(count)] or [np.ones(length, int)])
    pad = lambda x: np.pad(x, (0, length - len(x))).astype(np.int32)
    return pad(segment), pad((segment - 1) // 7 * 7 + 1)


def rows(kind: str, length: int) -> tuple[np.ndarray, np.ndarray, bool, tuple[int, int, int]]:
    """Segment, prefix, whether it is causal, and query heads, key heads and their size."""
    if kind == "packed":
        return *packed(length), True, (12, 2, 128)
    if kind == "one":
        ones = np.ones(length, np.int32)
        return ones, ones, True, (12, 2, 128)
    picture = (np.arange(2048) < 1600).astype(np.int32)
    return picture, picture, False, (16, 16, 80)


def timed(run: Callable[..., Any], inputs: Any, repeats: int) -> tuple[Any, float, float]:
    """What it gives, and the least seconds of wall and of all cores; the first run compiles and does not count."""
    out = jax.block_until_ready(run(*inputs))
    best = [float("inf")] * 2
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        jax.block_until_ready(run(*inputs))
        best = [min(a, b - c) for a, b, c in zip(best, (time.perf_counter(), time.process_time()), start, strict=True)]
    return out, *best


def measure(kind: str, length: int, setup: Setup, batch: int, repeats: int) -> tuple[list[np.ndarray], list[float]]:
    """Outputs and gradients at real tokens, and four times."""
    segment, prefix, causal, (heads, groups, dim) = rows(kind, length)
    rng = np.random.default_rng(0)
    make = lambda heads: jnp.asarray(rng.normal(size=(batch, len(segment), heads, dim)), setup.dtype)
    q, k, v, weight = make(heads), make(groups), make(groups), make(heads)
    ids = [jnp.tile(jnp.asarray(x)[None], (batch, 1)) for x in (segment, prefix)]

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array, prefix: jax.Array) -> jax.Array:
        out = attention(q, k, v, make_visibility(segment, prefix, causal=causal, setup=setup))
        return jnp.where((segment > 0)[:, :, None, None], out, jnp.zeros((), out.dtype))

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, *ids: jax.Array) -> jax.Array:
        return jnp.sum((forward(q, k, v, *ids) * weight).astype(jnp.float32))

    out, *first = timed(jax.jit(forward), (q, k, v, *ids), repeats)
    gradients, *second = timed(jax.jit(jax.grad(loss, argnums=(0, 1, 2))), (q, k, v, *ids), repeats)
    return [np.asarray(x, np.float32) for x in (out, *gradients)], [*first, *second]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of queries, keys, values")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs; the fastest counts")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=2, help="rows")
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, {args.dtype}, {args.batch} rows; seconds: wall (all cores)")
    for kind in ("packed", "one", "vision"):
        exact, _ = measure(kind, args.length, Setup("dense"), args.batch, 0)
        for name in BACKENDS[:-1]:  # a ring needs a mesh
            try:
                found, times = measure(kind, args.length, Setup(name, args.dtype), args.batch, args.repeats)
            except (UnsupportedAttentionError, NotImplementedError, RuntimeError, ValueError) as error:
                print(f"{kind:7} {name:10} {str(error).splitlines()[0][:90]}")
                continue
            off = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, exact, strict=True))
            wall, cpu, wall_gradient, cpu_gradient = times
            print(
                f"{kind:7} {name:10} forward {wall:7.3f} ({cpu:7.3f})   with gradients {wall_gradient:7.3f} "
                f"({cpu_gradient:7.3f})   off by {off:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
