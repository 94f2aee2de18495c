"""Chips to plan for, and the devices of a topology that need not be there."""

import contextlib
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import jax

from multitap_jax.config import ConfigError
from multitap_jax.flops import PEAK_FLOPS
from multitap_jax.parallel.host import hush_absent_tpu
from multitap_jax.planning.overheard import overheard

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """What a chip can do.

    Attributes:
      kind: name of the device, a key of `flops.PEAK_FLOPS`.
      memory: bytes of main memory (HBM).
      memory_bandwidth: bytes a second of it.
      link_bandwidth: bytes a second that a chip sends to its neighbours, all links together.
      outer_bandwidth: bytes a second and chip between slices.
      dimensions: of the torus that chips form.
    """

    kind: str
    memory: int
    memory_bandwidth: float
    link_bandwidth: float
    outer_bandwidth: float
    dimensions: int

    @property
    def flops(self) -> float:
        """Peak FLOP/s in bfloat16."""
        return PEAK_FLOPS[self.kind]


# Google's pages on system architecture (docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e; read in November 2026). They
# give links as "bidirectional inter-chip interconnect bandwidth per chip" (400, 1200, 800 GBps), of which half is sent;
# the data-centre network as 6.4 Tbps (v5e) and 25.6 Tbps (v6e) per pod of 256 chips, and 50 Gbps per chip (v5p).
CHIPS: dict[str, Chip] = {
    "v5e": Chip("TPU v5e", 16 * GIB, 819e9, 200e9, 3.125e9, 2),
    "v5p": Chip("TPU v5p", 95 * GIB, 2765e9, 600e9, 6.25e9, 3),
    "v6e": Chip("TPU v6e", 32 * GIB, 1638e9, 400e9, 12.5e9, 2),
}


@dataclass(frozen=True)
class Topology:
    """Chips of one kind: `slices` of them, each a torus of `sides`; without a chip, CPU devices of this machine."""

    name: str
    chip: Chip | None
    sides: tuple[int, ...]
    slices: int = 1

    @classmethod
    def parse(cls, text: str, slices: int = 1) -> "Topology":
        """Reads "v5e:8x8", "v5p:4x4x4" or "cpu:8".

        Raises:
          ConfigError: names the text, the forms and the chips there are.
        """
        found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
        examples = [f"{name}:{_example(chip)}" for name, chip in CHIPS.items()]
        known = f"known are {', '.join(examples)} and cpu:8 (and other sizes)"
        if found is None or (found[1] not in CHIPS and found[1] != "cpu"):
            raise ConfigError(f"topology {text!r}: {known}")
        sides = tuple(int(side) for side in found[2].split("x"))
        chip = CHIPS.get(found[1])
        dimensions = 1 if chip is None else chip.dimensions
        if len(sides) != dimensions or 0 in sides:
            form = {1: "a number", 2: "two sides", 3: "three sides"}[dimensions]
            raise ConfigError(f"topology {text!r}: {found[1]} takes {form} of 1 or more; {known}")
        if chip is None and slices > 1:
            raise ConfigError(f"topology {text!r}: simulated devices of a CPU form no slices; leave --slices out")
        return cls(text, chip, sides, slices)

    @property
    def platform(self) -> str:
        """As JAX names it."""
        return "cpu" if self.chip is None else "tpu"

    @property
    def size(self) -> int:
        """Chips of all slices."""
        return self.slices * math.prod(self.sides)

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} slices of {self.name}"

    def devices(self) -> list[jax.Device]:
        """The devices to compile for; those of a TPU need libtpu, and no TPU.

        Raises:
          ConfigError: libtpu is missing, or does not know the topology; or JAX runs with fewer CPU devices.
        """
        if self.chip is None:
            return _simulated(self.size)
        return _described(self)


def _example(chip: Chip) -> str:
    return "8x8" if chip.dimensions == 2 else "4x4x4"


def _simulated(count: int) -> list[jax.Device]:
    with contextlib.suppress(RuntimeError):  # JAX has been used before: there are as many as there are
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ConfigError(f"topology cpu:{count}: JAX was started with {len(devices)} CPU devices; use a new process")
    return devices[:count]


def _described(topology: Topology) -> list[jax.Device]:
    # libtpu looks for the machine it is on, complains, and locks itself; here it only compiles.
    hush_absent_tpu()
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "1")  # warnings of the partitioner are read from there
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"topology {topology.name}: compiling for a TPU needs libtpu: pip install -e '.[tpu-plan]' "
            "(no TPU is needed; --topology=cpu:8 needs neither)"
        ) from None
    try:
        with overheard([]):  # that there is no TPU
            return list(topologies.get_topology_desc(topology.name, "tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        said = str(error).partition(": ")[2].strip().splitlines()[0]
        raise ConfigError(
            f"topology {topology.name} is not one that libtpu knows ({said}); sides are even, such as 2x2, 4x4, 8x8, "
            "16x16 (v5e, v6e) and 2x2x1, 2x2x2, 4x4x4 (v5p)"
        ) from error
