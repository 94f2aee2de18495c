"""What would make room where a training step does not fit."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from multitap_jax.config import MeshConfig, TrainConfig
from multitap_jax.parallel.mesh import AXES
from multitap_jax.planning.compiled import Compiled
from multitap_jax.planning.workload import Workload

# Remat policies that keep less than this one.
_STRONGER: dict[str, tuple[str, ...]] = {"none": ("dots", "full"), "dots": ("full",), "offload": ("full",), "full": ()}


@dataclass(frozen=True)
class Remedy:
    """A change that would make room.

    Attributes:
      settings: as they would be given on the command line.
      why: in words.
      held: bytes that each device would hold between two steps; exact.
      compiled: what came of compiling it; None where nobody has.
    """

    settings: tuple[str, ...]
    why: str
    held: int
    compiled: Compiled | None = None


def candidates(config: TrainConfig, mesh: Mapping[str, int], workload: Workload) -> Iterator[tuple[str, TrainConfig]]:
    """Ways to need less memory, each with the reason; every one starts from what the one before has changed.

    Args:
      config: what does not fit.
      mesh: its sizes, settled.
      workload: of its training step.
    """
    replace = dataclasses.replace
    data, fsdp, tensor, context = (mesh[axis] for axis in AXES)
    if data > 1:
        data, fsdp = 1, data * fsdp
        config = replace(config, mesh=MeshConfig(data, fsdp, tensor, context))
        yield "share parameters and optimizer state over all data shards", config
    for remat, why in (("dots", "keep only the products of a layer"), ("full", "keep only the input of each layer")):
        if remat not in _STRONGER[config.model.remat]:
            continue
        config = replace(config, model=replace(config.model, remat=remat))
        yield f"{why} for the backward pass, recompute the rest", config
    rows = workload.batch.tokens.shape[0] // (fsdp * config.accumulation)
    if rows > 1:
        config = replace(config, accumulation=config.accumulation * rows)
        yield f"cut the step into micro-batches of one row a device, not {rows}", config
    if fsdp % 2 == 0:
        config = replace(config, mesh=MeshConfig(data, fsdp // 2, 2 * tensor, context))
        yield "split heads and inner widths, and the activations with them", config
    if config.trainable.parts in ("full", "text") and not config.optimizer.offload:  # adapters have small moments
        config = replace(config, optimizer=replace(config.optimizer, offload=True))
        yield "keep the optimizer's moments in the memory of the host between steps", config
    if config.trainable.parts == "full":
        yield "train adapters only", replace(config, trainable=replace(config.trainable, parts="lora"))


def changes(before: TrainConfig, after: TrainConfig) -> tuple[str, ...]:
    """What differs, as flags."""

    def flags(old: Any, new: Any, path: str) -> Iterator[str]:
        for field in dataclasses.fields(new):
            a, b, name = getattr(old, field.name), getattr(new, field.name), f"{path}.{field.name}"
            if dataclasses.is_dataclass(b):
                yield from flags(a, b, name)
            elif a != b:
                yield f"--{name}={b}"

    return tuple(flags(before, after, "config"))
