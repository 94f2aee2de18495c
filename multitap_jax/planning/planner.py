"""The plan of a run: its steps compiled for a topology, what they need of a chip, and whether the chip has it."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from multitap_jax.config import ConfigError, TrainConfig
from multitap_jax.families import Family, num_params
from multitap_jax.flops import forward_flops, train_flops
from multitap_jax.parallel.listing import listing, placements
from multitap_jax.parallel.mesh import abstract_mesh, make_mesh
from multitap_jax.planning.chips import Topology
from multitap_jax.planning.compiled import Compiled, compile_step
from multitap_jax.planning.programs import abstract_model, held, lower_scoring, lower_training
from multitap_jax.planning.published import read_model
from multitap_jax.planning.remedies import Remedy, candidates, changes
from multitap_jax.planning.roofline import Roofline, roofline
from multitap_jax.planning.workload import Assumptions, Workload, scoring_workload, training_workload

RESERVED = 256 * 2**20  # of a TPU's memory, by its runtime
TOKENS_PER_SHARD = 16384  # of a scoring batch, as `multitap score --batch-tokens` has by default


@dataclass(frozen=True)
class Step:
    """A compiled step.

    Attributes:
      name: "training" or "scoring".
      workload: what it computes.
      compiled: what came of compiling it.
      roofline: None without a chip or a program.
    """

    name: str
    workload: Workload
    compiled: Compiled
    roofline: Roofline | None


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
      model, params: its name, and how many parameters it has.
      config, topology, mesh, assumed: what was planned.
      held: bytes that each device holds between two training steps: parameters, optimizer state, frozen weights.
      steps: compiled steps.
      remedies: changes that would make room, where training does not fit.
    """

    model: str
    params: int
    config: TrainConfig
    topology: Topology
    mesh: dict[str, int]
    assumed: Assumptions
    held: int
    steps: tuple[Step, ...]
    remedies: tuple[Remedy, ...] = ()

    @property
    def limit(self) -> int | None:
        """Bytes of a chip's memory that a program may use; None on a CPU."""
        return None if self.topology.chip is None else self.topology.chip.memory - RESERVED

    @property
    def fits(self) -> bool:
        """Whether every step does."""
        return all(fits(step.compiled, self.limit) for step in self.steps)


def fits(compiled: Compiled, limit: int | None) -> bool:
    """Whether a program fits into `limit` bytes; everything fits where there is no limit."""
    if compiled.memory is None:
        return False
    return limit is None or compiled.memory.peak <= limit


def make_plan(
    config: TrainConfig,
    model: str,
    topology: Topology,
    assumed: Assumptions = Assumptions(),  # noqa: B008
    *,
    steps: tuple[str, ...] = ("training", "scoring"),
    quick: bool = False,
    verify: int = 0,
    report: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Compiles the steps of a run for a topology.

    Args:
      config: of the run; `config.model.checkpoint` and the names of files are not read.
      model: a folder with a `config.json`, or a name of `published.PUBLISHED`.
      topology: to compile for.
      assumed: about the data.
      steps: which.
      quick: whether to compile with little effort, see `compile_step`.
      verify: how many remedies to compile at most, where training does not fit; the first that fits ends it.
      report: is told what is being done.

    Raises:
      ConfigError, FolderError: names what does not fit: the model, the topology, the mesh, sizes that do not divide.
    """
    family, numbers = read_model(model)
    mesh = make_mesh(config.mesh, topology.devices())
    whole = abstract_model(family, numbers, config)
    between = _bytes_held(config, whole, mesh)
    done = []
    for name in steps:
        report(f"compiling the {name} step for {topology}")
        done.append(_step(name, config, family, numbers, topology, mesh, assumed, quick))
    plan = Plan(
        model=model,
        params=num_params(whole),
        config=config,
        topology=topology,
        mesh=dict(mesh.shape),
        assumed=assumed,
        held=between,
        steps=tuple(done),
    )
    broken = any(step.name == "training" and not fits(step.compiled, plan.limit) for step in done)
    if not broken:
        return plan
    return dataclasses.replace(plan, remedies=tuple(_remedies(plan, family, numbers, verify, report)))


def _step(
    name: str,
    config: TrainConfig,
    family: Family,
    numbers: Any,
    topology: Topology,
    mesh: Mesh,
    assumed: Assumptions,
    quick: bool,
) -> Step:
    if name == "training":
        workload = training_workload(config, family, numbers, mesh, assumed)
        lowered = lower_training(abstract_model(family, numbers, config), config, mesh, workload.batch)
        useful = train_flops(numbers, workload.work, config.trainable.parts)
    else:
        tokens = TOKENS_PER_SHARD * mesh.shape["data"] * mesh.shape["fsdp"]
        workload = scoring_workload(config, family, numbers, mesh, assumed, tokens)
        lowered = lower_scoring(family, numbers, config, mesh, workload.batch)
        useful = forward_flops(numbers, workload.work).total
    compiled = compile_step(lowered, mesh.size, topology.platform, quick=quick)
    bounds = None
    if topology.chip is not None and compiled.cost is not None:
        slices = [getattr(device, "slice_index", 0) or 0 for device in mesh.devices.flat]
        bounds = roofline(compiled.cost, topology.chip, useful, slices)
    return Step(name, workload, compiled, bounds)


def sharding_listing(config: TrainConfig, model: str, devices: int, assumed: Assumptions = Assumptions()) -> str:  # noqa: B008
    """Where every array of a training run lies on so many devices that need not be there (`parallel/listing.py`).

    Raises:
      ConfigError, FolderError: see `make_plan`.
    """
    family, numbers = read_model(model)
    mesh = abstract_mesh(config.mesh, devices)
    state, frozen = held(abstract_model(family, numbers, config), config, mesh)
    batch = training_workload(config, family, numbers, mesh, assumed).batch
    parts = {"learns": state.trainable, "optimizer": state.opt_state, "step": {"step": state.step}, "frozen": frozen}
    return f"{model}, {config.trainable.parts}\n" + listing(mesh, {**parts, "batch": batch})


def _bytes_held(config: TrainConfig, model: Any, mesh: Any) -> int:
    return sum(array.bytes_per_device for tree in held(model, config, mesh) for array in placements(tree))


def _remedies(plan: Plan, family: Family, numbers: Any, verify: int, report: Callable[[str], None]) -> Iterator[Remedy]:
    """Changes in the order in which they cost least; those that do not fit the model are left out."""
    mesh = None
    for why, config in candidates(plan.config, plan.mesh, plan.steps[0].workload):
        settings = changes(plan.config, config)
        try:
            mesh = make_mesh(config.mesh, plan.topology.devices())
            between = _bytes_held(config, abstract_model(family, numbers, config), mesh)
            compiled = None
            if verify > 0:
                report(f"compiling with {' '.join(settings)}")
                verify -= 1
                compiled = _step("training", config, family, numbers, plan.topology, mesh, plan.assumed, True).compiled
        except ConfigError:
            continue
        yield Remedy(settings, why, between, compiled)
        if compiled is not None and fits(compiled, plan.limit):
            return
