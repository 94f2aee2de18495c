"""How ways are timed: in turns, beside the device's own rate of matrix products; and the memory they take."""

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import Devices, table  # beside this file
from workload import Asked

from multitap_jax.backbones.layers import matmul_precision

PRODUCTS = 5  # matrix products a turn
SETTLED = 0.5  # seconds after which XLA has freed what it computed with; it may do so after its results are there
SIDES = {"cpu": 2048, "gpu": 8192}


class Way(NamedTuple):
    """A way to do a piece of work.

    Attributes:
      run: does one turn, and waits for its end.
      pairs: of a turn.
      asked: what they ask for.
      torch: whether torch does it.
    """

    run: Callable[[], Any]
    pairs: int
    asked: Asked
    torch: bool = False


class Seconds(NamedTuple):
    """What a turn takes, by the clock and of the processor."""

    wall: float
    cpu: float


def interleaved(ways: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Seconds]:
    """Median seconds of each way; ways take turns, so that noise of the machine meets all alike.

    Each must have run before: the first call compiles.
    """
    clocks: dict[str, list[Seconds]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            way()
            clocks[name].append(Seconds(time.perf_counter() - wall, time.process_time() - cpu))
    return {name: Seconds(*map(statistics.median, zip(*clock, strict=True))) for name, clock in clocks.items()}


class Products:
    """Square matrix products in the type that is computed with: what the device gives where nothing else is done.

    Attributes:
      ways: of "products, XLA" and, where it is there, "products, torch"; they belong among the ways that are timed.
    """

    def __init__(self, devices: Devices, dtype: str, side: int | None = None):
        side = side or SIDES[devices.kind]
        values = np.random.default_rng(0).standard_normal((2, side, side), dtype=np.float32) / side**0.5
        self._flops = 2.0 * side**3 * PRODUCTS
        self.label = f"{PRODUCTS} products of {side} x {side} in {dtype}"
        x, weight = jnp.asarray(values[0], jnp.dtype(dtype)), jnp.asarray(values[1], jnp.dtype(dtype))
        multiply = jax.jit(lambda x, weight: jnp.matmul(x, weight, precision=matmul_precision(x.dtype)))

        def ours() -> None:
            y = x
            for _ in range(PRODUCTS):  # each waits for the one before
                y = multiply(y, weight)
            y.block_until_ready()

        self.ways: dict[str, Callable[[], None]] = {"products, XLA": ours}
        if devices.torch is not None:
            self.ways["products, torch"] = _torch_products(values, dtype, devices.torch)
        for way in self.ways.values():
            way()  # compiles

    def rates(self, seconds: Mapping[str, Seconds]) -> dict[str, float]:
        """FLOP/s of each way of products."""
        return {name: self._flops / seconds[name].wall for name in self.ways}

    def best(self, seconds: Mapping[str, Seconds]) -> float:
        """FLOP/s of the fastest of them: the roof, whoever reached it."""
        return max(self.rates(seconds).values())

    def line(self, seconds: Mapping[str, Seconds]) -> str:
        """The rates in words."""
        said = ", ".join(f"{name.split()[1]} {rate / 1e9:,.0f} GFLOP/s" for name, rate in self.rates(seconds).items())
        return f"{self.label}: {said}; shares below are of the faster"


def _torch_products(values: np.ndarray, dtype: str, device: str) -> Callable[[], None]:
    import torch

    x, weight = (torch.tensor(value, dtype=getattr(torch, dtype), device=device) for value in values)

    def way() -> None:
        y = x
        for _ in range(PRODUCTS):
            y = y @ weight
        if device == "cuda":
            torch.cuda.synchronize()

    return way


def peak_memory(way: Callable[[], Any], devices: Devices, *, torch_side: bool = False) -> float | None:
    """Megabytes at the peak of a turn that was done before; None where nothing tells.

    On a CPU by how much this process grew for it (activations and whatever else it makes; weights were there). On a
    GPU what the side's own allocator held at most, weights included; jax's never forgets, so its peak is that of all
    turns so far.
    """
    if devices.kind == "gpu" and torch_side:
        import torch

        torch.cuda.reset_peak_memory_stats()
        way()
        return torch.cuda.max_memory_allocated() / 1e6
    if devices.kind == "gpu":
        way()
        return (devices.jax.memory_stats() or {}).get("peak_bytes_in_use", float("nan")) / 1e6
    if not sys.platform.startswith("linux"):
        return None
    time.sleep(SETTLED)
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept would be used again, and nothing would rise
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from now on (proc(5))
    before = _status("VmRSS")
    way()
    return (_status("VmHWM") - before) / 1e6


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measure(ways: Mapping[str, Way], base: str, products: "Products", devices: Devices, repeats: int) -> str:
    """Times the ways and the products in turns; the rates of both as text, ratios of `base` to each."""
    seconds = interleaved({name: way.run for name, way in ways.items()} | products.ways, repeats)
    rate = lambda name: ways[name].pairs / seconds[name].wall
    rows = []
    for name, way in ways.items():
        wall = seconds[name].wall
        memory = peak_memory(way.run, devices, torch_side=way.torch)
        rows.append(
            (
                name,
                f"{rate(name):,.2f}",
                f"{rate(base) / rate(name):.2f}x",
                f"{1e3 * seconds[name].cpu / way.pairs:,.1f}",
                f"{way.asked.tokens / wall:,.0f}",
                f"{way.asked.flops / way.pairs / 1e9:#,.4g}",
                f"{way.asked.flops / wall / 1e9:,.0f}",
                f"{way.asked.flops / wall / products.best(seconds):.0%}",
                "" if memory is None else f"{memory:,.0f} MB",
            )
        )
    shares = ("GFLOP a pair", "GFLOP/s", "of the products", "memory")
    headers = ("", "pairs/s", f"{base} / it", "CPU ms a pair", "tokens/s", *shares)
    return f"{products.line(seconds)}\n{table(headers, rows)}"
