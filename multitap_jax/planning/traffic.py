"""Bytes of main memory that an instruction of a compiled program reads and writes: an estimate from its text.

What each fusion, and each operation outside of one, takes and gives counts once; a slice counts as the slice, an update
in place as the update, and what a fusion keeps inside, or what stays in a memory on the chip, not at all.
"""

import re
from collections.abc import Sequence

from multitap_jax.planning.hlo import Array, Computation, Instruction, Module

# They move nothing themselves: names for parts of memory, control flow, ends of what was counted at its start.
_FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id"),
    *("while", "conditional", "call", "opt-barrier", "add-dependency", "async-start", "async-update", "async-done"),
    *("copy-done", "slice-done", "dynamic-slice-done", "all-gather-done", "all-reduce-done", "collective-permute-done"),
}
_SLICES = ("dynamic-slice", "slice", "gather")


def memory_bytes(instruction: Instruction, computation: Computation, module: Module) -> float:
    """Bytes of main memory that the instruction moves when it runs once."""
    opcode = instruction.opcode
    if opcode in _FREE:
        return 0.0
    operands = [computation.instructions[name].arrays for name in instruction.operands]
    if opcode == "copy-start":  # (to, from, context)
        return float(_outside(instruction.arrays[:1]) + _outside(operands[0]))
    if opcode in ("slice-start", "dynamic-slice-start"):  # ((from), to, context)
        to = instruction.arrays[len(operands)]
        return float(_outside([to]) + (to.bytes if _outside(operands[0]) else 0))
    if opcode == "fusion":
        return _fusion(instruction, operands, module.computations[instruction.calls[0]])
    if opcode in _SLICES:
        return 2.0 * _outside(instruction.arrays)
    if opcode == "dynamic-update-slice":
        return 2.0 * _outside(operands[1])
    return float(sum(map(_outside, operands)) + _outside(instruction.arrays))


def _fusion(fusion: Instruction, operands: Sequence[Sequence[Array]], inner: Computation) -> float:
    """Outputs that lie where an operand lies were made before, unless the fusion updates a part of them."""
    pairs = re.findall(r"\{(\d*)\}: \((\d+),", fusion.attributes.partition("output_to_operand_aliasing=")[2])
    outputs, inputs = {int(output or 0) for output, _ in pairs}, {int(operand) for _, operand in pairs}
    root = inner.root
    parts = [inner.instructions[name] for name in root.operands]
    results = parts if root.opcode == "tuple" else [root] * len(fusion.arrays)
    total = 0.0
    for number, (result, array) in enumerate(zip(results, fusion.arrays, strict=False)):
        if array.space:
            continue
        if result.opcode == "dynamic-update-slice":
            total += inner.instructions[result.operands[1]].bytes
        elif number not in outputs:
            total += array.bytes
    for number, parameter in _parameters(inner):
        if number not in inputs and _outside(operands[number]):
            total += _read(parameter, inner)
    return total


def _read(parameter: Instruction, inner: Computation) -> int:
    """Bytes that a fusion reads of an operand: all, or the parts that it takes out."""
    users = [i for i in inner.instructions.values() if parameter.name in i.operands]
    if users and all(user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name for user in users):
        return 0
    if users and all(user.opcode in _SLICES and user.operands[0] == parameter.name for user in users):
        return min(sum(user.bytes for user in users), parameter.bytes)
    return parameter.bytes


def _parameters(inner: Computation) -> list[tuple[int, Instruction]]:
    return [(int(i.literal), i) for i in inner.instructions.values() if i.opcode == "parameter"]


def _outside(arrays: Sequence[Array]) -> int:
    """Bytes of those that lie in main memory."""
    return sum(array.bytes for array in arrays if not array.space)
