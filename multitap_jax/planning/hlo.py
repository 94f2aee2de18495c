"""Reading the text of a compiled program (HLO): its computations, and how often each of them runs.

The compiler's own cost analysis counts the body of a loop once; a model that is a scan over layers would come out as
one layer. Here every computation knows its number of runs.
"""

import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")


@dataclass(frozen=True)
class Array:
    """An array of a program; `space` is 0 for a device's main memory, and another number for memories on the chip."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> int:
        """Without what a tiled layout adds."""
        bits = _BITS.get(self.dtype) or int("".join(filter(str.isdigit, self.dtype.split("e")[0])) or 0)
        return -(-math.prod(self.dims) * bits // 8)


@dataclass(frozen=True)
class Instruction:
    """`name = arrays opcode(operands), attributes`; a tuple has several arrays, nested ones are flattened.

    `literal` is what stands in the place of operands: the value of a constant, the number of a parameter.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool = False
    literal: str = ""

    def attribute(self, name: str) -> str | None:
        """The text of an attribute up to the next one, without its braces; None where it is absent."""
        if (found := re.search(rf"(?:^|[ ,{{]){re.escape(name)}=", self.attributes)) is None:
            return None
        text = self.attributes[found.end() :]
        return _until(text, ",").strip("{}")

    @property
    def calls(self) -> list[str]:
        """Names of computations that it runs."""
        return [
            name
            for key in ("calls", "body", "condition", "branch_computations", "true_computation", "false_computation")
            if (text := self.attribute(key)) is not None
            for name in _NAME.findall(text)
        ]

    @property
    def bytes(self) -> int:
        """Of all its arrays."""
        return sum(array.bytes for array in self.arrays)


@dataclass
class Computation:
    """Instructions by name, in their order; the last one, or the one marked so, is the result."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        """What it gives."""
        return next((i for i in self.instructions.values() if i.root), list(self.instructions.values())[-1])


@dataclass
class Module:
    """A program: computations by name, and the name of the one that runs first."""

    computations: dict[str, Computation]
    entry: str

    @functools.cached_property
    def runs(self) -> dict[str, float]:
        """How often each computation runs; one that is called from several places counts all of them.

        Of the branches of a conditional the one that writes most counts as taken, whenever there is a choice: at most
        what is spent. A loop whose number of rounds cannot be read counts once.
        """
        counts: dict[str, float] = defaultdict(float)
        for name in self._in_order():
            times = counts[name] if name != self.entry else 1.0
            counts[name] = times
            for instruction in self.computations[name].instructions.values():
                rounds = self.rounds(instruction) if instruction.opcode == "while" else 1
                calls = instruction.calls
                for called in [max(calls, key=self._written)] if instruction.opcode == "conditional" else calls:
                    counts[called] += times * rounds
        return dict(counts)

    def _written(self, name: str) -> int:
        """Bytes of all results of a computation, and of those that it calls, each once."""
        instructions = self.computations[name].instructions.values()
        return sum(i.bytes + sum(map(self._written, i.calls)) for i in instructions)

    @functools.cached_property
    def fused(self) -> set[str]:
        """Computations that are the inside of a fusion: what they pass on stays on the chip."""
        found: set[str] = set()
        for computation in self.computations.values():
            for instruction in computation.instructions.values():
                if instruction.opcode == "fusion":
                    found.update(instruction.calls)
        return found

    def rounds(self, loop: Instruction) -> int:
        """Rounds of a `while`: what the compiler noted, else the bound that its condition compares a counter with."""
        if found := re.search(r"known_trip_count\W+n\W+(\d+)", loop.attributes):
            return int(found[1])
        condition = self.computations[(loop.attribute("condition") or "").lstrip("%")]
        values = self._values(condition)
        bounds = [int(i.literal) for i in values.values() if i.opcode == "constant" and i.literal.isdigit()]
        if len(bounds) != 1:
            return 1
        counter = next((i for i in condition.instructions.values() if i.opcode == "get-tuple-element"), None)
        body = self.computations[(loop.attribute("body") or "").lstrip("%")]
        step = self._step(body, int(counter.attribute("index") or 0) if counter else 0)
        return -(-bounds[0] // step)

    def _step(self, body: Computation, index: int) -> int:
        """What a round adds to the counter: a loop may have been unrolled, and then adds several times."""
        name, added = body.root.operands[index], 0
        while (at := body.instructions[name]).opcode == "add":
            parts = [body.instructions[operand] for operand in at.operands]
            constants = [int(part.literal) for part in parts if part.opcode == "constant"]
            if len(constants) != 1:
                break
            added += constants[0]
            name = next(part.name for part in parts if part.opcode != "constant")
        return max(added, 1)

    def _values(self, computation: Computation) -> dict[str, Instruction]:
        """Its instructions and those of the fusions in it."""
        found = dict(computation.instructions)
        for instruction in computation.instructions.values():
            for name in instruction.calls:
                found |= {f"{name}/{key}": value for key, value in self.computations[name].instructions.items()}
        return found

    def _in_order(self) -> list[str]:
        """Callers before what they call."""
        order: list[str] = []
        seen: set[str] = set()

        def visit(name: str) -> None:
            seen.add(name)
            for instruction in self.computations[name].instructions.values():
                for called in instruction.calls:
                    if called not in seen:
                        visit(called)
            order.append(name)

        visit(self.entry)
        return order[::-1]


def parse(text: str) -> Module:
    """Reads the text of `jax.stages.Compiled.as_text()`.

    Raises:
      ValueError: there is no entry computation.
    """
    computations: dict[str, Computation] = {}
    current, entry = None, None
    for line in text.splitlines():
        if current is None:
            if head := _HEAD.match(line):
                current = computations[head[2]] = Computation(head[2])
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif (instruction := _instruction(line.strip())) is not None:
            current.instructions[instruction.name] = instruction
    if entry is None:
        raise ValueError("the text of the program has no ENTRY computation")
    return Module(computations, entry)


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a type, such as `(f32[2,3]{1,0:T(8,128)S(1)}, s32[])`."""
    text = re.sub(r"/\*.*?\*/", "", text)
    return tuple(_arrays(text))


def _arrays(text: str) -> Iterator[Array]:
    for dtype, dims, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size.lstrip("<=")) for size in dims.replace(" ", "").split(",") if size)
        yield Array(dtype, sizes, int(space[1]) if space else 0)


def _instruction(line: str) -> Instruction | None:
    root = line.startswith("ROOT ")
    name, equals, rest = line.removeprefix("ROOT ").partition(" = ")
    if not equals:
        return None
    kind = _until(rest, " ")
    opcode, _, rest = rest[len(kind) + 1 :].partition("(")
    inside = _until(rest, ")")
    operands = tuple(_NAME.findall(inside))
    literal = inside if opcode in ("constant", "parameter") else ""
    return Instruction(name.lstrip("%"), opcode, arrays(kind), operands, rest[len(inside) + 1 :], root, literal)


def _until(text: str, stop: str) -> str:
    """The text before the first `stop` that stands outside of all brackets."""
    depth = 0
    for index, letter in enumerate(text):
        if depth == 0 and letter == stop:
            return text[:index]
        depth += (letter in "([{") - (letter in ")]}")
    return text
