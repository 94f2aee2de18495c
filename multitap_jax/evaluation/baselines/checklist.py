"""A checklist of yes-no questions, and the linear weights that make one score of the answers (VisionReward's way)."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
import scipy.special

from multitap_jax.data.tables import some
from multitap_jax.files import json_bytes, write_atomic

_LINE = re.compile(r"(?P<mask>\?\s*)?(?P<name>\w+)(?:\s*\[(?P<when>\w+)\])?\s*:\s*(?P<text>\S.*)")


class ChecklistError(ValueError):
    """A checklist, or answers to it, that cannot be used; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
      name: of its column.
      text: what is asked, ending in a question mark.
      mask: it does not count itself, but decides whether others do.
      when: the mask that must be answered with yes for it to count, or None.
    """

    name: str
    text: str
    mask: bool = False
    when: str | None = None


@dataclasses.dataclass(frozen=True)
class Checklist:
    """Questions in the order in which they are asked.

    Raises:
      ChecklistError: no question counts, a name comes twice, or a question waits for a mask that there is not.
    """

    questions: tuple[Question, ...]

    def __post_init__(self) -> None:
        names = [question.name for question in self.questions]
        masks = {question.name for question in self.questions if question.mask}
        wrong = [f"the name {name!r} comes twice" for name in sorted({n for n in names if names.count(n) > 1})]
        wrong += [
            f"{q.name!r} waits for {q.when!r}, which is no mask" for q in self.questions if q.when not in (None, *masks)
        ]
        wrong += [f"{q.name!r} is a mask and waits for another" for q in self.questions if q.mask and q.when]
        if not self.features:
            wrong.append("no question counts")
        if wrong:
            raise ChecklistError("; ".join(wrong))

    @classmethod
    def read(cls, path: str | Path, masks: Mapping[str, Sequence[str]] | None = None) -> "Checklist":
        """Reads a text file of questions, one a line.

        Lines are those of `checklist.txt` beside this file, or questions alone, which are named q1, q2, ... by their
        line, as in VisionReward's public lists.

        Args:
          path: of the file.
          masks: where the file cannot say it: name of a mask -> names of the questions that count only with it.
        """
        given, masks = {name: mask for mask, names in (masks or {}).items() for name in names}, masks or {}
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if line and not line.startswith("#")]
        questions = []
        for number, line in enumerate(lines, start=1):
            found = _LINE.fullmatch(line)
            if found is None and line.startswith("?"):
                raise ChecklistError(f"{path}: {line!r} is neither a question nor `? NAME: QUESTION`")
            name = found["name"] if found else f"q{number}"
            questions.append(
                Question(
                    name=name,
                    text=found["text"] if found else line,
                    mask=bool(found and found["mask"]) or name in masks,
                    when=(found["when"] if found else None) or given.get(name),
                )
            )
        try:
            if lost := sorted((given.keys() | masks.keys()) - {question.name for question in questions}):
                raise ChecklistError(f"masks name {', '.join(lost)}, which no line is called")
            return cls(tuple(questions))
        except ChecklistError as error:
            raise ChecklistError(f"{path}: {error}") from None

    @classmethod
    def default(cls) -> "Checklist":
        """The list of this package."""
        with resources.as_file(resources.files(__package__) / "checklist.txt") as path:
            return cls.read(path)

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the questions that count, in order."""
        return tuple(question.name for question in self.questions if not question.mask)

    def encode(self, answer: np.ndarray) -> np.ndarray:
        """float32[N, M], what weights see of answers int8[N, Q]: 1 for yes, -1 for anything else, 0 where masked."""
        column = {question.name: index for index, question in enumerate(self.questions)}
        yes = np.asarray(answer) > 0
        out = []
        for question in self.questions:
            if question.mask:
                continue
            value = np.where(yes[:, column[question.name]], 1.0, -1.0)
            out.append(value if question.when is None else np.where(yes[:, column[question.when]], value, 0.0))
        return np.stack(out, axis=1).astype(np.float32)


def preferences(scores: Sequence[float], groups: Sequence[Any]) -> np.ndarray:
    """int64[P, 2], (better, worse) of all two pairs of a group whose scores differ; what has no score is in none."""
    members: dict[Any, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    found = [
        (better, worse)
        for indexes in members.values()
        for better in indexes
        for worse in indexes
        if scores[better] > scores[worse]
    ]
    return np.asarray(found, np.int64).reshape(-1, 2)


@dataclasses.dataclass(frozen=True)
class ChecklistWeights:
    """score = coef . features.

    Attributes:
      names: of the features.
      coef: float64[M], none below zero, zero for those left out.
    """

    names: tuple[str, ...]
    coef: np.ndarray

    @classmethod
    def fit(
        cls, names: Sequence[str], features: np.ndarray, preferred: np.ndarray, *, penalty: float = 1.0
    ) -> "ChecklistWeights":
        """Logistic regression on preferences, without an intercept; weights below zero are left out, again and again.

        Args:
          names: of the features.
          features: float[N, M], from `Checklist.encode`.
          preferred: int[P, 2], from `preferences`.
          penalty: half of it times the squared weights is added to the sum of losses (scikit-learn's 1 / C).

        Raises:
          ChecklistError: no preferences, or a penalty that is not above zero.
        """
        if len(preferred) == 0 or not penalty > 0:
            raise ChecklistError(
                f"{len(preferred)} preferences and penalty = {penalty}: weights need pairs of one group whose scores "
                "differ, and a penalty above zero"
            )
        values = np.asarray(features, np.float64)
        difference = values[preferred[:, 0]] - values[preferred[:, 1]]
        kept = np.ones(values.shape[1], bool)
        coef = np.zeros(values.shape[1])
        while kept.any():
            coef[:] = 0
            coef[kept] = _logistic(difference[:, kept], penalty)
            if (coef >= 0).all():
                break
            kept &= coef >= 0
            coef[~kept] = 0
        return cls(tuple(names), coef)

    def score(self, features: np.ndarray) -> np.ndarray:
        """float64[N]: higher is better, zero means nothing."""
        return np.asarray(features, np.float64) @ self.coef

    def save(self, path: str | Path) -> None:
        """Writes names and weights as JSON."""
        write_atomic(Path(path), json_bytes(dict(zip(self.names, map(float, self.coef), strict=True))))

    @classmethod
    def load(cls, path: str | Path, names: Sequence[str]) -> "ChecklistWeights":
        """Reads what `save` wrote.

        Args:
          path: the file.
          names: of the features that the weights are for, `Checklist.features`; weights come in their order.

        Raises:
          ChecklistError: no such weights, or weights of other questions.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            found = {name: float(value) for name, value in values.items()}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ChecklistError(
                f"{path}: not the weights of a checklist ({error}); fit and save them again"
            ) from error
        if wrong := [f"{name} is {value}" for name, value in found.items() if not (value >= 0 and np.isfinite(value))]:
            raise ChecklistError(f"{path}: weights are finite and not below zero, but {some(wrong)}; fit them again")
        lacking, others = [n for n in names if n not in found], [n for n in found if n not in names]
        if lacking or others:
            wrong = [f"no weight for {some(lacking)}"] * bool(lacking) + [f"weights for {some(others)}"] * bool(others)
            raise ChecklistError(
                f"{path}: of another checklist: {' and '.join(wrong)}. Give the checklist that they were fitted with, "
                "or fit weights for this one"
            )
        return cls(tuple(names), np.asarray([found[name] for name in names], np.float64))


def _logistic(difference: np.ndarray, penalty: float) -> np.ndarray:
    """float64[M], the minimum of sum log(1 + exp(-difference . w)) + penalty / 2 w . w; float64[P, M] differences."""

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = difference @ w
        value = np.logaddexp(0.0, -margin).sum() + 0.5 * penalty * w @ w
        return float(value), penalty * w - difference.T @ scipy.special.expit(-margin)

    start = np.zeros(difference.shape[1])
    found = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"gtol": 1e-9, "ftol": 1e-15})
    return np.asarray(found.x)
