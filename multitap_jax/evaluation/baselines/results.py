"""What the rivals give back. What cannot be read as an answer is counted: it is a property of a rival, not an error."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Verdicts:
    """Written verdicts of N pairs.

    Attributes:
      scores: float32[N], 0 to 100; NaN where none could be read, or where `errors` says why there is no verdict.
      texts: what was written; None with an error.
      n_tokens: int64[N], tokens of each prompt asked alone, image tokens included; 0 where there is an error.
      n_written: int64[N], tokens written.
      stopped: bool[N], whether the verdict ended before the room was used up.
      errors: None, or why the pair has no verdict.
    """

    scores: np.ndarray
    texts: list[str | None]
    n_tokens: np.ndarray
    n_written: np.ndarray
    stopped: np.ndarray
    errors: list[str | None]

    @property
    def unparsable(self) -> int:
        """Verdicts in which no score could be read."""
        return _unanswered(self.errors, np.isnan(self.scores))


@dataclass(frozen=True)
class YesNo:
    """Probabilities of yes of N pairs.

    Attributes:
      p_yes, p_no: float32[N], of the whole vocabulary, so that what is neither is left out of both; NaN with an error.
      answer: int8[N], 1 where the most likely token is a yes, -1 where it is a no, 0 where it is neither.
      n_tokens, errors: see `Verdicts`.
    """

    p_yes: np.ndarray
    p_no: np.ndarray
    answer: np.ndarray
    n_tokens: np.ndarray
    errors: list[str | None]

    @property
    def unparsable(self) -> int:
        """Pairs whose most likely answer is neither yes nor no."""
        return _unanswered(self.errors, self.answer == 0)


@dataclass(frozen=True)
class Checked:
    """Answers to Q questions about N pairs.

    Attributes:
      names: of the questions.
      answer: int8[N, Q], see `YesNo`; 0 with an error.
      p_yes: float32[N, Q]; NaN with an error.
      n_tokens: int64[N], tokens of all questions about the pair, each asked alone.
      errors: None, or why the pair has no answers.
    """

    names: tuple[str, ...]
    answer: np.ndarray
    p_yes: np.ndarray
    n_tokens: np.ndarray
    errors: list[str | None]

    @property
    def unparsable(self) -> int:
        """Answers that are neither yes nor no."""
        return _unanswered(self.errors, self.answer == 0)


@dataclass(frozen=True)
class Expected:
    """Expected scores of N pairs.

    Attributes:
      scores: float32[N], in the units of the numbers; NaN where no number is likely enough, or with an error.
      mass: float32[N], probability of the numbers that were counted.
      n_tokens, errors: see `Verdicts`.
    """

    scores: np.ndarray
    mass: np.ndarray
    n_tokens: np.ndarray
    errors: list[str | None]

    @property
    def unparsable(self) -> int:
        """Pairs without a number among the likeliest tokens."""
        return _unanswered(self.errors, np.isnan(self.scores))


def _unanswered(errors: list[str | None], missing: np.ndarray) -> int:
    """How many of bool[N, ...] are true where there is no error."""
    return int(missing[np.asarray([error is None for error in errors], bool)].sum())
