"""What a scorer gives back, and how results of batches find the pairs they belong to."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from multitap_jax.data.stream import Window


@dataclass(frozen=True)
class Scores:
    """Scores of N pairs, in the order they were given.

    Attributes:
      overall: float32[N], sigmoid of the logit, 0 to 1, higher is better; NaN where `errors` says why.
      logits: float32[N], the reward head's output.
      objectives: float32[N, T], the ridge heads' outputs in the units of the ratings.
      names: names of the T objectives.
      n_tokens: int64[N], tokens of each pair scored alone, image tokens included; 0 where there is an error.
      truncated: bool[N], whether the tail of the text was cut.
      errors: None, or why the pair has no score.
    """

    overall: np.ndarray
    logits: np.ndarray
    objectives: np.ndarray
    names: tuple[str, ...]
    n_tokens: np.ndarray
    truncated: np.ndarray
    errors: list[str | None]

    def raise_errors(self) -> "Scores":
        """Itself, where every pair has a score. Raises ScoringError, naming the pairs, where one has none."""
        raise_errors(self.errors)
        return self


@dataclass(frozen=True)
class Embeddings:
    """Hidden states of N pairs, what stage 2 is fitted on; `errors`, `n_tokens`, `truncated` as in `Scores`.

    Attributes:
      values: float32[N, H], last token's final hidden state; NaN where there is an error.
      logits: float32[N], the reward head's output.
      pictures: sha256 of the pixels of each pair's first picture as the model sees it, equal for copies under any name;
        None without a picture or with an error.
    """

    values: np.ndarray
    logits: np.ndarray
    n_tokens: np.ndarray
    truncated: np.ndarray
    errors: list[str | None]
    pictures: list[str | None]

    def raise_errors(self) -> "Embeddings":
        """Itself, where every pair has a hidden state. Raises ScoringError, naming the pairs, where one has none."""
        raise_errors(self.errors)
        return self


@dataclass(frozen=True)
class Ranking:
    """Images ordered by how well a text fits them: `order` int64[N], best first, those without a score last."""

    order: np.ndarray
    scores: Scores


class ScoringError(ValueError):
    """Pairs that have no score; the message names them."""


def raise_errors(errors: Sequence[str | None]) -> None:
    wrong = [f"pair {index}: {error}" for index, error in enumerate(errors) if error is not None]
    if wrong:
        more = [f"and {len(wrong) - 5} more"] if len(wrong) > 5 else []
        raise ScoringError(f"{len(wrong)} of {len(errors)} pairs have no score:\n" + "\n".join(wrong[:5] + more))


@dataclass
class Results:
    """Arrays of N pairs that batches fill in any order."""

    logits: np.ndarray
    objectives: np.ndarray
    embeddings: np.ndarray
    n_tokens: np.ndarray
    truncated: np.ndarray
    errors: list[str | None]
    pictures: list[str | None]

    @classmethod
    def empty(cls, pairs: int, objectives: int, hidden: int) -> "Results":
        return cls(
            logits=np.full(pairs, np.nan, np.float32),
            objectives=np.full((pairs, objectives), np.nan, np.float32),
            embeddings=np.full((pairs, hidden), np.nan, np.float32),
            n_tokens=np.zeros(pairs, np.int64),
            truncated=np.zeros(pairs, bool),
            errors=[None] * pairs,
            pictures=[None] * pairs,
        )

    def note(self, start: int, window: Window) -> None:
        stop = start + len(window.errors)
        self.n_tokens[start:stop] = window.n_tokens
        self.truncated[start:stop] = window.truncated
        self.errors[start:stop] = window.errors
        self.pictures[start:stop] = window.pictures

    def collect(self, index: np.ndarray, computed: tuple[jax.Array, jax.Array, jax.Array | None]) -> int:
        """Waits for a batch and puts its texts in their places; returns how many."""
        held = index >= 0
        places = index[held]
        for into, array in zip((self.logits, self.objectives, self.embeddings), computed, strict=True):
            if array is not None:
                into[places] = np.asarray(array)[held]
        return len(places)

    def refuse_non_finite(self, dtype: str) -> None:
        """Gives an error to every pair whose numbers are not finite, so that no NaN passes for a score."""
        finite = np.isfinite(self.logits)
        for array in (self.objectives, self.embeddings):
            finite &= np.isfinite(array).all(axis=1)
        for place in np.flatnonzero(~finite):
            if self.errors[place] is None:
                advice = "; try dtype float32" if dtype != "float32" else "; the weights may be damaged by training"
                self.errors[place] = f"the model gave NaN or infinity for this pair (computed in {dtype}{advice})"
                self.n_tokens[place], self.truncated[place] = 0, False
            for array in (self.logits, self.objectives, self.embeddings):
                array[place] = np.nan
