"""How fast a step can be at best.

  time >= max( FLOPs of the program / peak FLOP/s,  bytes of main memory / its bandwidth,
               bytes sent inside of a slice / bandwidth of its links,  bytes sent between slices / their bandwidth )

  MFU  <= useful FLOPs / (time * chips * peak FLOP/s)

Everything overlaps perfectly, all links of a chip work at once, products run at the peak: no run reaches it. The FLOPs
of the program contain recomputation and padding, the useful ones (`flops.py`) do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from multitap_jax.planning.chips import Chip
from multitap_jax.planning.cost import Cost


@dataclass(frozen=True)
class Roofline:
    """Seconds that each resource is busy for one step, and the useful FLOPs of all chips."""

    compute: float
    memory: float
    links: float
    outer: float
    useful: float
    peak: float
    chips: int

    @property
    def seconds(self) -> float:
        """The least time of a step."""
        return max(self.compute, self.memory, self.links, self.outer)

    @property
    def bound(self) -> str:
        """What that is."""
        times = {"products": self.compute, "main memory": self.memory, "links": self.links, "slices": self.outer}
        return max(times, key=lambda name: times[name])

    @property
    def mfu(self) -> float:
        """The highest model FLOPs utilisation."""
        return self.useful / (self.seconds * self.chips * self.peak)


def roofline(cost: Cost, chip: Chip, useful: float, slice_of: Sequence[int]) -> Roofline:
    """The bounds of a step.

    Args:
      cost: of the step's program, on one device.
      chip: that it runs on.
      useful: FLOPs of all devices that are no recomputation and no padding.
      slice_of: the slice of each device, in the order of the mesh.
    """
    inside = outside = 0.0
    for collective in cost.collectives:
        if len({slice_of[device] for device in collective.devices}) > 1:
            outside += collective.sent
        else:
            inside += collective.sent
    return Roofline(
        compute=cost.flops / chip.flops,
        memory=cost.memory_bytes / chip.memory_bandwidth,
        links=inside / chip.link_bandwidth,
        outer=outside / chip.outer_bandwidth,
        useful=useful,
        peak=chip.flops,
        chips=len(slice_of),
    )
