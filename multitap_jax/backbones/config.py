"""Reading a `config.json`: entries of the right type, and everything that is wrong with it said at once.

A family reads its sections through `Section`, whose readers note a problem and go on with the default, and ends with
`Section.settle`, which raises what was noted together with what does not fit between the numbers.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from multitap_jax.config import ConfigError

Config = TypeVar("Config")


@dataclasses.dataclass
class _Found:
    """What is wrong so far, in all sections of a file.

    Attributes:
      problems: one sentence each.
      readable: whether every number could be read; where not, defaults stand in for some, and what these do not fit
        says nothing about the file.
    """

    problems: list[str] = dataclasses.field(default_factory=list)
    readable: bool = True


class Section:
    """A section of a `config.json`, or of the image processor's file beside it.

    An absent entry and one that is null are the same to every reader: they mean the default.

    Attributes:
      entries: its contents.
    """

    def __init__(self, entries: Mapping[str, Any], prefix: str = "", found: _Found | None = None):
        self.entries = entries
        self._prefix = prefix
        self._found = found or _Found()

    def get(self, name: str, default: Any = None) -> Any:
        """The entry as it stands."""
        value = self.entries.get(name)
        return default if value is None else value

    def section(self, name: str, default: Mapping[str, Any] | None = None) -> "Section":
        """The section of that name; `default` where there is none."""
        value = self.get(name, default or {})
        if not isinstance(value, Mapping):
            self._unreadable(name, "must be a section of entries")
            value = default or {}
        return Section(value, f"{self._prefix}{name}.", self._found)

    def merged(self, *names: str) -> "Section":
        """One section of several; an entry counts where it is named last."""
        parts = [self.section(name) for name in names]
        entries = {key: value for part in parts for key, value in part.entries.items()}
        return Section(entries, next((part._prefix for part in reversed(parts) if part.entries), ""), self._found)

    def beside(self, entries: Mapping[str, Any] | None) -> "Section":
        """The image processor's file, whose problems are told with these."""
        return Section(entries or {}, "preprocessor_config.", self._found)

    def size(self, name: str, default: int) -> int:
        """A positive whole number."""
        return self._read(name, default, lambda value: _whole(value) and value > 0, "a positive whole number")

    def whole(self, name: str, default: int) -> int:
        """A whole number of either sign."""
        return self._read(name, default, _whole, "a whole number")

    def number(self, name: str, default: float) -> float:
        """A positive number."""
        return float(self._read(name, default, lambda value: _finite(value) and value > 0, "a positive number"))

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        return self._read(name, default, lambda value: isinstance(value, bool), "true or false")

    def wholes(self, name: str, default: Sequence[int], length: int | None = None) -> tuple[int, ...]:
        """A list of whole numbers, of any length or of one."""
        allows = lambda value: _all(value, _whole) and length in (None, len(value))
        return tuple(self._read(name, default, allows, f"a list of {f'{length} ' if length else ''}whole numbers"))

    def numbers(self, name: str, default: Sequence[float]) -> tuple[float, ...]:
        """A list of numbers."""
        return tuple(self._read(name, default, lambda value: _all(value, _finite), "a list of numbers"))

    def pairs(self, name: str, default: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
        """A list of pairs of whole numbers."""
        pair = lambda value: _all(value, _whole) and len(value) == 2
        found = self._read(name, default, lambda value: _all(value, pair), "a list of pairs of whole numbers")
        return tuple((first, second) for first, second in found)

    def expect(self, name: str, *values: Any) -> Any:
        """The entry, one of the implemented `values`; the first of them where the file says nothing or another."""
        found = self.get(name, values[0])
        if found in values:
            return found
        known = " or ".join(map(repr, dict.fromkeys(values)))
        hint = f": expected {known}" if name == "model_type" else f" is not implemented; this family has {known}"
        self.wrong(f"{self._prefix}{name} = {found!r}{hint}")
        return values[0]

    def wrong(self, problem: str) -> None:
        """Notes what is wrong."""
        if problem not in self._found.problems:  # a section may be read by several
            self._found.problems.append(problem)

    def settle(self, config: Config, what: str) -> Config:
        """The configuration itself, if nothing was noted and its parts fit each other.

        A configuration, and every part of it, may say with `inconsistencies()` what does not fit.

        Args:
          config: made of what was read.
          what: it describes, for the message.

        Raises:
          ConfigError: lists everything that is wrong.
        """
        problems = list(self._found.problems)
        if self._found.readable:
            problems += [problem for part in _parts(config) for problem in part.inconsistencies()]
        if problems:
            raise ConfigError(f"config.json does not describe {what}:\n" + "\n".join(problems))
        return config

    def _read(self, name: str, default: Any, allows: Any, kind: str) -> Any:
        value = self.get(name, default)
        if allows(value):
            return value
        self._unreadable(name, f"must be {kind}")
        return default

    def _unreadable(self, name: str, problem: str) -> None:
        self.wrong(f"{self._prefix}{name} = {self.entries[name]!r} {problem}")
        self._found.readable = False


def tied(config: Section, text: Section) -> bool:
    """Whether a `config.json` ties the output head to the token table; before transformers 5 the text section said."""
    return config.flag("tie_word_embeddings", False) or text.flag("tie_word_embeddings", False)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _all(value: Any, allows: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(allows, value))


def _parts(config: Any) -> Iterator[Any]:
    """The parts that may say what is wrong with them, then the whole."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and hasattr(value, "inconsistencies"):
            yield value
    if hasattr(config, "inconsistencies"):
        yield config
