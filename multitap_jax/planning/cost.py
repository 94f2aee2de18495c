"""What a compiled program costs one device: floating-point operations, bytes of main memory, bytes to other devices.

Read from the program's text (`hlo.py`), every loop body as often as it runs. Operations are those of matrix products
and convolutions, recomputation and padding included.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from multitap_jax.planning.hlo import Array, Computation, Instruction, Module
from multitap_jax.planning.traffic import memory_bytes

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclass(frozen=True)
class Collective:
    """Communication of one kind at one place of the program.

    Attributes:
      kind: a name of `COLLECTIVES`.
      arrays: what one run of it gives each device.
      runs: how often it runs.
      devices: numbers of the devices of one group, as the mesh counts them.
      source: where in the model it comes from, as JAX names it.
    """

    kind: str
    arrays: tuple[Array, ...]
    runs: float
    devices: tuple[int, ...]
    source: str

    @property
    def payload(self) -> int:
        """Bytes of what one run gives each device."""
        return sum(array.bytes for array in self.arrays)

    @property
    def sent(self) -> float:
        """Bytes that each device sends in all runs, on a ring: an all-reduce passes everything on twice."""
        others = len(self.devices) - 1
        share = others / max(len(self.devices), 1)
        factor = {"all-reduce": 2 * share, "reduce-scatter": float(others), "collective-permute": 1.0}
        return self.runs * self.payload * factor.get(self.kind, share)


@dataclass(frozen=True)
class Cost:
    """Of one run of a program on one device."""

    flops: float
    memory_bytes: float
    collectives: tuple[Collective, ...]


def cost(module: Module, devices: int) -> Cost:
    """Adds up what all computations cost, as often as they run.

    Args:
      module: the program of one of `devices` devices.
      devices: how many run it.
    """
    flops = memory = 0.0
    found: dict[tuple[str, str], Collective] = {}
    for name, computation in module.computations.items():
        runs = module.runs.get(name, 0.0)
        if not runs:
            continue
        for instruction in computation.instructions.values():
            flops += runs * operations(instruction, computation)
            if name not in module.fused:
                memory += runs * memory_bytes(instruction, computation, module)
            if (kind := instruction.opcode.removesuffix("-start")) in COLLECTIVES:
                item = _collective(kind, instruction, computation, runs, devices)
                # An asynchronous one may be written several times, in the parts of what it is hidden behind.
                key = instruction.attribute("channel_id") or f"{name}/{instruction.name}"
                found.setdefault((kind, key), item)
    largest = sorted(found.values(), key=lambda item: -item.sent)
    return Cost(flops, memory, tuple(item for item in largest if len(item.devices) > 1))


def operations(instruction: Instruction, computation: Computation) -> float:
    """2 n for n multiplications and additions of a product or a convolution; 0 for all else."""
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    out = instruction.arrays[0].dims
    left, right = (computation.instructions[name].arrays[0].dims for name in instruction.operands[:2])
    if instruction.opcode == "dot":
        summed = [left[int(axis)] for axis in _numbers(instruction.attribute("lhs_contracting_dims"))]
        return 2.0 * math.prod(out) * math.prod(summed)
    return _convolution(out, left, right, instruction)


def _convolution(out: Sequence[int], left: Sequence[int], right: Sequence[int], instruction: Instruction) -> float:
    """Pairs of an input and a window element that meet; those that meet padding or dilation are no work."""
    labels = instruction.attribute("dim_labels") or ""
    inputs, kernel, result = (list(part) for part in re.split(r"_|->", labels))
    window = _window(instruction.attribute("window") or "")
    spatial = sum(letter.isdigit() for letter in result)
    meetings, outside = 1.0, float(math.prod(out))
    for axis in range(spatial):
        size, places = left[inputs.index(str(axis))], out[result.index(str(axis))]
        option = lambda name, default, axis=axis: window[name][axis] if name in window else default
        low, dilated = int(str(option("pad", "0_0")).split("_")[0]), int(option("lhs_dilate", 1))
        start = np.arange(places)[:, None] * int(option("stride", 1)) - low
        at = start + np.arange(int(option("size", 1)))[None] * int(option("rhs_dilate", 1))
        meetings *= int(((at >= 0) & (at <= (size - 1) * dilated) & (at % dilated == 0)).sum())
        outside /= places
    return 2.0 * outside * meetings * right[kernel.index("i")]


def _window(text: str) -> dict[str, list[str]]:
    return {name: value.split("x") for name, _, value in (part.partition("=") for part in text.split())}


def _collective(kind: str, instruction: Instruction, computation: Computation, runs: float, devices: int) -> Collective:
    arrays = instruction.arrays
    if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):  # as the TPU's compiler writes it
        kind, arrays = "reduce-scatter", computation.root.arrays
    if instruction.opcode.endswith("-start") and kind != "all-reduce":  # (what goes in, what comes out, ...)
        inputs = sum(len(computation.instructions[name].arrays) for name in instruction.operands)
        arrays = arrays[inputs : 2 * inputs] or arrays
    source = re.search(r'op_name="([^"]*)"', instruction.attributes)
    group = first_group(instruction, devices)
    return Collective(kind, arrays, runs, group, source[1] if source else "")


def first_group(instruction: Instruction, devices: int) -> tuple[int, ...]:
    """Numbers of the devices that communicate with device 0, in any of the ways that HLO writes groups.

    `{{0,1},{2,3}}` lists them; `[4,2]<=[2,4]T(1,0)` reshapes and transposes 0, 1, 2, ...; `mesh['a'=2,'b'=4] {'b'}`
    names axes of a mesh, whose devices may be transposed, too (`, device_ids=([2,4]T(1,0))`). A permutation lists pairs
    of source and target instead. No groups means all devices.

    Raises:
      ValueError: groups are written in another way.
    """
    text = instruction.attributes
    if found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        return tuple(dict.fromkeys((int(found[1]), int(found[2]))))
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return tuple(_numbers(found[1]))
    if found := re.search(rf"replica_groups=\[([\d,]+)\]<={_IOTA}", text):
        return tuple(_iota(found[2], found[3]).reshape(_numbers(found[1]))[0].tolist())
    if found := re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))? \{{([^}}]*)\}}", text):
        axes = re.findall(r"'(\w+)'=(\d+)", found[1])
        named = set(re.findall(r"'(\w+)'", found[4]))
        ids = _iota(found[2], found[3]) if found[2] else np.arange(devices)
        ids = ids.reshape([int(size) for _, size in axes])
        return tuple(ids[tuple(slice(None) if name in named else 0 for name, _ in axes)].ravel().tolist())
    if (groups := instruction.attribute("replica_groups") or "").strip("{} "):
        raise ValueError(f"{instruction.name}: replica_groups={groups} is written in a way that is not known here")
    return tuple(range(devices))


_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


def _iota(shape: str, order: str | None) -> np.ndarray:
    """0, 1, 2, ... in a shape, transposed."""
    sizes = _numbers(shape)
    ids = np.arange(np.prod(sizes)).reshape(sizes)
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str | None) -> list[int]:
    return [int(number) for number in (text or "").split(",") if number.strip()]
