"""One invertible table engine between the tensors of a checkpoint and the parameters of a model.

A family's table is a list of rules, each `checkpoint key <-> parameter path`. A key with `{layer}` names L tensors that
are the slices of one stacked parameter. A transform is a permutation of dimensions, so every rule can be run backwards
and an import followed by an export gives the same bytes.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from multitap_jax.weights.misfit import contradictions

WEIGHT_DTYPES = ("bfloat16", "float16", "float32")
DTYPES_IN_WORDS = f"{', '.join(WEIGHT_DTYPES[:-1])} or {WEIGHT_DTYPES[-1]}"
# What is done to the dimensions of a checkpoint tensor; the inverse permutation is the export.
TRANSFORMS: dict[str, Callable[[int], tuple[int, ...]]] = {
    "identity": lambda ndim: tuple(range(ndim)),
    "transpose": lambda ndim: (1, 0),  # torch Linear [out, in] -> [in, out]
    "conv2d": lambda ndim: (1, 2, 3, 0),  # torch Conv2d [E, C, h, w] -> [C, h, w, E]
    "conv3d": lambda ndim: (2, 1, 3, 4, 0),  # torch Conv3d [E, C, T, h, w] -> [T, C, h, w, E]
}


class WeightError(ValueError):
    """Tensors of a checkpoint that do not fit the model; the message lists every problem at once."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a table.

    Attributes:
      key: hub key, with `{layer}` for a stacked parameter.
      path: parameter path.
      transform: name of a transform.
      layers: the numbers that stand for `{layer}`, one for each of the stack; None for 0, 1, ...
    """

    key: str
    path: str
    transform: str = "identity"
    layers: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """A family's weights.

    Attributes:
      rules: one a parameter; keys and paths are each unique.
      spellings: (prefix, prefix of the hub) pairs; the first that a key starts with is replaced.
      unused: keys that a checkpoint may hold but an encoder has no use for -> key whose tensor it equals when the
        configuration ties the two, or None.
      unused_shapes: of those of them that are tied to nothing, where it is known.
    """

    rules: tuple[Rule, ...]
    spellings: tuple[tuple[str, str], ...]
    unused: Mapping[str, str | None]
    unused_shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def canonical(self, key: str) -> str:
        """The hub's spelling of a key in any known spelling."""
        for prefix, hub in self.spellings:
            if key.startswith(prefix):
                return hub + key.removeprefix(prefix)
        return key


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one checkpoint tensor goes.

    Attributes:
      key: hub key.
      path: parameter path, such as "text.layers.mlp.up_proj.kernel".
      layer: index along the parameter's leading axis, None if the parameter is not stacked.
      shape: shape of the checkpoint tensor.
      axes: the permutation that takes the checkpoint tensor to the parameter (slice).
    """

    key: str
    path: str
    layer: int | None
    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def inverse(self) -> tuple[int, ...]:
        """The permutation that takes the parameter (slice) back to the checkpoint tensor."""
        return tuple(int(axis) for axis in np.argsort(self.axes))


def plan(table: Table, params: Mapping[str, Any]) -> list[Slot]:
    """All checkpoint tensors that the parameters consist of, in table order, layer after layer.

    Raises:
      WeightError: adapters are still apart, or the table and the model do not name the same parameters.
    """
    adapters = [path for path in params if "lora_" in path]
    if adapters:
        raise WeightError(f"adapters must be merged into their kernels first: {', '.join(adapters)}")
    by_path = {rule.path: rule for rule in table.rules}
    odd = sorted(set(by_path) ^ set(params))
    if odd or len(by_path) != len(table.rules):
        raise WeightError(f"the weight table and the model do not name the same parameters: {', '.join(odd)}")
    return [slot for rule in table.rules for slot in _slots(rule, tuple(params[rule.path].shape))]


def match(
    table: Table,
    slots: Sequence[Slot],
    tensors: Mapping[str, Any],
    *,
    tied: bool,
    prefix: str = "",
    entries: Mapping[str, int] | None = None,
) -> dict[str, str]:
    """Finds the tensor of each slot, by headers alone.

    Args:
      table: the family's table.
      slots: what is needed, from `plan`.
      tensors: name in the checkpoint -> anything with `shape` and `dtype`.
      tied: whether unused keys must equal what they are tied to; then either of the two names will do.
      prefix: what every name of the backbone starts with; names that do not are not the backbone's.
      entries: sizes in `config.json` (`misfit.size_entries`), to say which of them the tensors contradict.

    Returns:
      hub key -> name in the checkpoint, for all slots and for the unused keys that are there.

    Raises:
      WeightError: lists all unknown, doubled, missing and mis-shaped tensors.
    """
    wanted = {slot.key: slot.shape for slot in slots}
    found: dict[str, str] = {}
    problems, unknown, sizes = [], [], []
    for name in (name for name in tensors if name.startswith(prefix)):
        key, tensor = table.canonical(name.removeprefix(prefix)), tensors[name]
        if key in found:
            problems.append(f"doubled: {name} {_describe(tensor)} and {found[key]} are the same tensor")
        elif key not in wanted and key not in table.unused:
            problems.append(f"unknown: {name} {_describe(tensor)}")
            unknown.append(key)
        else:
            found[key] = name
    for key, other in table.unused.items():  # a writer that keeps one name of a shared tensor may keep this one
        if tied and other is not None and other not in found and key in found:
            found[other] = found[key]
    expected = {**wanted, **{key: _unused_shape(table, key, wanted) for key in table.unused if key in found}}
    for key, shape in expected.items():
        if key not in found:
            problems.append(f"missing: {prefix}{key} {list(shape or ())}")
        elif problem := _misfit(tensors[found[key]], shape):
            problems.append(f"{problem[0]}: {found[key]} {_describe(tensors[found[key]])}, expected {problem[1]}")
            here = tuple(tensors[found[key]].shape)
            if shape is not None and len(here) == len(shape):
                sizes += [(key, a, b) for a, b in zip(shape, here, strict=True) if a != b]
    if problems:
        layers = _layer_counts(table, set(wanted), (found.keys() & wanted.keys()) | set(unknown))
        lines = contradictions(entries or {}, sizes, layers) + problems
        count = f"{len(problems)} tensors do not" if len(problems) > 1 else "1 tensor does not"
        raise WeightError(f"{count} fit the model:\n  " + "\n  ".join(lines) + _hint(problems, wanted, found))
    return found


def _unused_shape(table: Table, key: str, wanted: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape of a tensor that no score needs, where the table or the tensor that it may be tied to says it."""
    return table.unused_shapes.get(key) or wanted.get(table.unused[key] or "")


def _misfit(tensor: Any, shape: tuple[int, ...] | None) -> tuple[str, str] | None:
    """What is wrong with a tensor, and what was expected; a shape of None may be any."""
    if shape is not None and tuple(tensor.shape) != shape:
        return "wrong shape", str(list(shape))
    name = np.dtype(tensor.dtype).name
    if name.startswith("float8"):
        return "wrong type", f"{DTYPES_IN_WORDS} (8-bit floats mean nothing without their scales)"
    if name not in WEIGHT_DTYPES:
        return "wrong type", f"floating point: {DTYPES_IN_WORDS}"
    return None


def _layer_counts(table: Table, wanted: set[str], there: set[str]) -> dict[str, tuple[int, int]]:
    """Start of the keys of a stack of layers -> (how many are wanted, how many are there), where they differ."""
    out = {}
    for start in {rule.key.partition("{layer}")[0] for rule in table.rules if "{layer}" in rule.key}:
        number = re.compile(re.escape(start) + r"(\d+)\.")
        expected, found = ({m[1] for key in keys if (m := number.match(key))} for keys in (wanted, there))
        if found and expected != found:
            out[start + "*"] = (len(expected), len(found))
    return out


def _hint(problems: Sequence[str], wanted: Mapping[str, Any], found: Mapping[str, str]) -> str:
    if len(found) * 4 < len(wanted):
        return "\nHardly any name is known: does config.json (its model_type) belong to these weights?"
    if any("int8" in problem or "float8" in problem for problem in problems):
        return "\nQuantised weights are not read; take the model in bfloat16."
    return ""


def _slots(rule: Rule, shape: tuple[int, ...]) -> list[Slot]:
    stacked = "{layer}" in rule.key
    tail = shape[1:] if stacked else shape
    axes = TRANSFORMS[rule.transform](len(tail))
    source = tuple(tail[axis] for axis in np.argsort(axes))
    if not stacked:
        return [Slot(rule.key, rule.path, None, source, axes)]
    numbers = range(shape[0]) if rule.layers is None else rule.layers
    if len(numbers) != shape[0]:
        raise WeightError(f"{rule.path}: {len(numbers)} layers are named, but {shape[0]} are stacked")
    keys = [rule.key.replace("{layer}", str(number)) for number in numbers]
    return [Slot(key, rule.path, layer, source, axes) for layer, key in enumerate(keys)]


def _describe(tensor: Any) -> str:
    return f"{list(tensor.shape)} {np.dtype(tensor.dtype).name}"
