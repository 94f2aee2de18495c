"""A plan as a person reads it, as a program reads it, and as a row of a table."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from multitap_jax.display import TextTable
from multitap_jax.planning.cost import Collective
from multitap_jax.planning.planner import Plan, Step, fits
from multitap_jax.planning.remedies import Remedy

GIB = 2**30
_SHOWN = 5  # collectives


def print_plan(plan: Plan, console: Console) -> None:
    """Prints the plan, at most 80 columns wide."""
    say = lambda text: console.print(Text(text), soft_wrap=False)
    sizes = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    say(f"{plan.model}: {_count(plan.params)} parameters")
    say(f"{_learns(plan)} training on {plan.topology} ({plan.topology.size} chips, {sizes})")
    say(f"{_gib(plan.held)} on each chip between two steps: weights, optimizer state")
    for step in plan.steps:
        _print_step(step, plan, console)
    say("assumed of the data: " + assumptions(plan))
    for step in plan.steps:
        for note in notes(step, plan):
            say(f"note: {note}")
    if plan.remedies:
        _print_remedies(plan, console)
    console.print(Text(verdict(plan), style="bold"))


def _print_step(step: Step, plan: Plan, console: Console) -> None:
    compiled = step.compiled
    console.print()
    console.print(Text(f"{step.name} step: {step.workload.pairs} pairs as {step.workload.text}", style="bold"))
    if compiled.memory is None:
        console.print(Text(f"the compiler gave up: it would need {_gib(compiled.needed or 0)} or more on a chip"))
        return
    table = TextTable("", "each chip", "", show_edge=False)
    for row in _memory_rows(step, plan):
        table.add_row(*row)
    for row in _time_rows(step):
        table.add_row(*row)
    console.print(table)
    if compiled.cost is not None and compiled.cost.collectives:
        console.print(_collectives(compiled.cost.collectives))
    for warning in compiled.warnings:
        console.print(Text(f"the partitioner gathers an array on every chip to change its layout: {warning}"))


def _memory_rows(step: Step, plan: Plan) -> Iterator[tuple[str, str, str]]:
    memory = step.compiled.memory
    assert memory is not None
    new = memory.outputs - memory.aliased
    held = "weights, optimizer state, batch" if step.name == "training" else "weights, batch"
    yield "arguments", _gib(memory.arguments), held
    yield "outputs", _gib(new), f"besides {_gib(memory.aliased)} in the place of arguments"
    yield (
        "temporaries",
        _gib(memory.peak - memory.arguments - new - memory.code),
        "activations, gathered weights" + (", gradients" if step.name == "training" else ""),
    )
    yield "program", _gib(memory.code), ""
    limit = "" if plan.limit is None else f"of {_gib(plan.limit)}: {memory.peak / plan.limit:.0%}"
    yield "peak", _gib(memory.peak), limit


def _time_rows(step: Step) -> Iterator[tuple[str, str, str]]:
    cost, bounds = step.compiled.cost, step.roofline
    if cost is None:
        return
    time = lambda seconds: "" if bounds is None else f"{1e3 * seconds:,.1f} ms at best"
    yield "FLOPs", _flops(cost.flops), time(bounds.compute if bounds else 0)
    yield "memory moved", _gib(cost.memory_bytes), time(bounds.memory if bounds else 0)
    yield "sent", _gib(sum(c.sent for c in cost.collectives)), time(bounds.links + bounds.outer if bounds else 0)
    if bounds is not None:
        yield "step", f"{1e3 * bounds.seconds:,.1f} ms", f"at best, bound by {bounds.bound}"
        rate = step.workload.pairs / bounds.seconds
        yield "MFU", f"{bounds.mfu:.0%}", f"at best, which is {rate:,.0f} pairs/s on all chips"


def _collectives(collectives: tuple[Collective, ...]) -> TextTable:
    table = TextTable("largest collectives", "runs", "array", "chips", "sent", show_edge=False)
    for name in ("runs", "chips", "sent"):
        next(column for column in table.columns if column.header == name).justify = "right"
    for item in collectives[:_SHOWN]:
        table.add_row(*_collective_words(item))
    if rest := collectives[_SHOWN:]:
        table.add_row(f"{len(rest)} more", "", "", "", _gib(sum(item.sent for item in rest)))
    return table


def _collective_words(item: Collective) -> tuple[str, ...]:
    largest = max(item.arrays, key=lambda array: array.bytes)
    array = f"{largest.dtype}[{','.join(map(str, largest.dims))}]"
    more = f" +{len(item.arrays) - 1}" if len(item.arrays) > 1 else ""
    return item.kind, f"{item.runs:g}", array + more, str(len(item.devices)), _gib(item.sent)


def _print_remedies(plan: Plan, console: Console) -> None:
    console.print()
    table = TextTable("what would make room, one after the other", "held", "peak")
    for remedy in plan.remedies:
        table.add_row(f"{' '.join(remedy.settings)}\n  {remedy.why}", _gib(remedy.held), _remedy_peak(remedy, plan))
    console.print(table)
    if any(remedy.compiled is None for remedy in plan.remedies):
        console.print(Text("held: exact. peak not compiled: give --verify=N to compile the first N of them"))


def _remedy_peak(remedy: Remedy, plan: Plan) -> str:
    if remedy.compiled is None:
        return "does not fit" if plan.limit is not None and remedy.held > plan.limit else "?"
    memory = remedy.compiled.memory
    needed = memory.peak if memory is not None else remedy.compiled.needed or 0
    return f"{_gib(needed)} {'fits' if fits(remedy.compiled, plan.limit) else 'too much'}"


def notes(step: Step, plan: Plan) -> Iterator[str]:
    """What is odd about a step though it may fit."""
    cells = plan.mesh["data"] * plan.mesh["fsdp"] * (plan.config.accumulation if step.name == "training" else 1)
    used = step.workload.tokens_used
    if step.name == "training" and used < 0.5:
        yield (
            f"only {used:.0%} of the tokens are real: {step.workload.pairs} pairs a step for {cells} cells "
            "(data x fsdp x accumulation); raise config.batch_size, lower config.accumulation, or use fewer chips"
        )


def assumptions(plan: Plan) -> str:
    """The assumptions about the data in words."""
    a = plan.assumed
    texts = (
        "1 text an image (config.data.shuffle = pairs)"
        if plan.config.data.shuffle == "pairs"
        else f"{a.texts_per_image} texts an image"
    )
    return (
        f"{texts}, {a.text_tokens} tokens a text, {a.prompt_tokens} tokens of prompt, {a.pictures} picture(s) a pair, "
        f"{a.width}x{a.height} pixels where the image policy keeps sizes"
    )


def verdict(plan: Plan) -> str:
    """One line."""
    if plan.limit is None:
        return "compiles; a CPU has no limit to compare with"
    peaks = [step.compiled.memory.peak for step in plan.steps if step.compiled.memory is not None]
    if plan.fits:
        return f"FITS: {_gib(max(peaks))} of {_gib(plan.limit)} on each chip at the peak"
    broken = [step.name for step in plan.steps if not fits(step.compiled, plan.limit)]
    return f"DOES NOT FIT: the {' and the '.join(broken)} step needs more than {_gib(plan.limit)} on each chip"


def to_json(plan: Plan) -> dict[str, Any]:
    """Everything in plain values; bytes, seconds and FLOPs of one chip."""
    return {
        "model": plan.model,
        "parameters": plan.params,
        "topology": str(plan.topology),
        "chips": plan.topology.size,
        "mesh": plan.mesh,
        "config": dataclasses.asdict(plan.config),
        "assumed": dataclasses.asdict(plan.assumed),
        "limit": plan.limit,
        "held": plan.held,
        "fits": plan.fits,
        "steps": {step.name: _step_json(step, plan) for step in plan.steps},
        "remedies": [dataclasses.asdict(remedy) for remedy in plan.remedies],
    }


def _step_json(step: Step, plan: Plan) -> dict[str, Any]:
    compiled, bounds = step.compiled, step.roofline
    out: dict[str, Any] = {
        "pairs": step.workload.pairs,
        "shape": step.workload.text,
        "tokens_used": step.workload.tokens_used,
        "compile_seconds": compiled.seconds,
        "fits": fits(compiled, plan.limit),
        "needed": compiled.needed,
        "memory": None if compiled.memory is None else dataclasses.asdict(compiled.memory),
        "warnings": list(compiled.warnings),
    }
    if compiled.cost is not None:
        out |= {"flops": compiled.cost.flops, "memory_bytes": compiled.cost.memory_bytes}
        out["collectives"] = [
            {**dataclasses.asdict(item), "payload": item.payload, "sent": item.sent}
            for item in compiled.cost.collectives
        ]
    if bounds is not None:
        out["roofline"] = {
            **dataclasses.asdict(bounds),
            "seconds": bounds.seconds,
            "bound": bounds.bound,
            "mfu": bounds.mfu,
        }
    return out


def _learns(plan: Plan) -> str:
    return {"full": "full", "lora": "LoRA", "head": "head-only", "text": "decoder-only"}[plan.config.trainable.parts]


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e8 else f"{number:,}"


def _flops(number: float) -> str:
    unit, name = (1e12, "T") if number >= 1e10 else (1e9, "G") if number >= 1e7 else (1e6, "M")
    return f"{number / unit:,.2f} {name}"


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB"
