"""How well scores agree with people: Kendall, Pearson, Spearman, error, accuracy, with bootstrap intervals.

Scores tie (a sigmoid in bfloat16 has three digits), and ties move Kendall's tau: so both variants are reported, with
the number of ties. All statistics are float64 on the host.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

Variant = Literal["b", "c"]
Measure = Callable[[np.ndarray, np.ndarray], float]

# Resampled pairs a bootstrap may cost: 2e7 (1,000 samples of 20,000) take about 20 s of one core.
MAX_RESAMPLED = 20_000_000
MIN_SAMPLES = 100


def kendall_tau(pred: ArrayLike, human: ArrayLike, variant: Variant = "b") -> float:
    """Kendall's tau in O(N log N): "b" corrects for ties in both, "c" (Stuart) for tables that are not square.

    NaN where one side is constant or there are fewer than two pairs; `undefined_reason` says which. Raises ValueError
    for NaN, infinity, or sides of different lengths.
    """
    if variant not in ("b", "c"):
        raise ValueError(f"Kendall variant {variant!r}: expected 'b' or 'c'")
    return _measured(_tau_b if variant == "b" else _tau_c, pred, human)


def pearson(pred: ArrayLike, human: ArrayLike) -> float:
    """Pearson's correlation; NaN and errors as `kendall_tau`."""
    return _measured(_pearson, pred, human)


def spearman(pred: ArrayLike, human: ArrayLike) -> float:
    """Spearman's correlation: Pearson's of the ranks, ties at their mean rank; NaN and errors as `kendall_tau`."""
    return _measured(_spearman, pred, human)


def mse(pred: ArrayLike, target: ArrayLike) -> float:
    """Mean squared error; NaN without pairs."""
    pred, target = _pairs(pred, target)
    return _mse(pred, target)


def accuracy_within(pred: ArrayLike, target: ArrayLike, tolerance: float = 0.5) -> float:
    """Share of pairs with abs(pred - target) <= tolerance, the official accuracy; NaN without pairs."""
    pred, target = _pairs(pred, target)
    return _accuracy(pred, target, tolerance)


def undefined_reason(pred: ArrayLike, human: ArrayLike) -> str | None:
    """Why a correlation of these is NaN; None where it is defined."""
    pred, human = _pairs(pred, human)
    if len(pred) < 2:
        return f"{len(pred)} pairs: a correlation needs two"
    constant = [name for name, side in (("predictions", pred), ("human scores", human)) if _constant(side)]
    return f"all {' and all '.join(constant)} are equal" if constant else None


@dataclasses.dataclass(frozen=True, slots=True)
class Interval:
    """A percentile bootstrap interval; unpacks to (low, high).

    `samples` were drawn and `undefined` of them had no value (one side constant); NaN where it cannot be estimated.
    """

    low: float
    high: float
    samples: int
    undefined: int = 0

    def __iter__(self) -> Iterator[float]:
        yield self.low
        yield self.high


def sample_count(n: int, samples: int) -> int:
    """How many bootstrap samples are drawn for n pairs when `samples` are asked for.

    All of them up to 20,000 pairs at 1,000 samples; then fewer, so that samples * n stays below 2e7, but at least 100.
    """
    return min(samples, max(MIN_SAMPLES, MAX_RESAMPLED // max(n, 1)))


def bootstrap(
    statistic: Measure,
    pred: ArrayLike,
    human: ArrayLike,
    *,
    groups: Sequence[str] | np.ndarray | None = None,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of `statistic(pred, human)`.

    Args:
      statistic: a function of two float64 arrays; NaN counts as undefined.
      pred, human: [N] numbers.
      groups: [N] labels; whole groups are resampled (texts of one image are not independent). None resamples pairs.
      samples: resamples asked for; `sample_count` says how many are drawn, and so does the result.
      seed: of the resampling.
      level: coverage, between 0 and 1.
    """
    pred, human = _pairs(pred, human)
    _check_level(level)
    drawn = [statistic(pred[i], human[i]) for i in _resamples(len(pred), groups, samples, seed)]
    return _interval(np.asarray(drawn, np.float64), level)


@dataclasses.dataclass(frozen=True, slots=True)
class Statistic:
    """One number with its interval; `reason` says why `value` is NaN."""

    value: float
    interval: Interval
    reason: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Metrics:
    """Agreement of N pairs.

    Attributes:
      tau_b, tau_c, pearson, spearman, mse, accuracy: statistics with intervals; accuracy within `tolerance`.
      n: pairs. n_groups: groups that were resampled together; n where every pair stands alone.
      ties_pred, ties_human, ties_both: pairs of pairs (of n(n-1)/2) that are equal in the predictions, in the human
        scores, in both.
      samples, level: of the bootstrap.
    """

    tau_b: Statistic
    tau_c: Statistic
    pearson: Statistic
    spearman: Statistic
    mse: Statistic
    accuracy: Statistic
    n: int
    n_groups: int
    ties_pred: int
    ties_human: int
    ties_both: int
    samples: int
    level: float
    tolerance: float

    def statistics(self) -> dict[str, Statistic]:
        """The six statistics by name."""
        return {name: getattr(self, name) for name in STATISTICS}


STATISTICS = ("tau_b", "tau_c", "pearson", "spearman", "mse", "accuracy")


def evaluate_pairs(
    pred: ArrayLike,
    human: ArrayLike,
    *,
    groups: Sequence[str] | np.ndarray | None = None,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    tolerance: float = 0.5,
) -> Metrics:
    """All statistics of `Metrics` with bootstrap intervals from the same resamples; arguments as `bootstrap`.

    `mse` and `accuracy` compare the numbers as they are: bring both sides to one scale first.
    """
    pred, human = _pairs(pred, human)
    _check_level(level)
    measures: tuple[Measure, ...] = (_tau_b, _tau_c, _pearson, _spearman, _mse, lambda p, h: _accuracy(p, h, tolerance))
    drawn = [[f(pred[i], human[i]) for f in measures] for i in _resamples(len(pred), groups, samples, seed)]
    table = np.asarray(drawn, np.float64).reshape(-1, len(measures))
    undefined = undefined_reason(pred, human)
    found = {}
    for name, measure, column in zip(STATISTICS, measures, table.T, strict=True):
        reason = undefined if name not in ("mse", "accuracy") else None if len(pred) else "no pairs"
        found[name] = Statistic(measure(pred, human), _interval(column, level), reason)
    return Metrics(
        **found,
        n=len(pred),
        n_groups=len(pred) if groups is None else len(np.unique(np.asarray(groups))),
        ties_pred=_tied(pred),
        ties_human=_tied(human),
        ties_both=_tied(np.stack([pred, human], axis=1)),
        samples=len(table),
        level=level,
        tolerance=tolerance,
    )


def _pairs(pred: ArrayLike, human: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    sides = {"predictions": np.asarray(pred, np.float64), "human scores": np.asarray(human, np.float64)}
    for name, side in sides.items():
        if side.ndim != 1:
            raise ValueError(f"{name} have shape {side.shape}: expected one number a pair")
        bad = np.flatnonzero(~np.isfinite(side))
        if len(bad):
            raise ValueError(
                f"{len(bad)} of {len(side)} {name} are NaN or infinite, the first at index {bad[0]}: drop these pairs"
            )
    left, right = sides.values()
    if len(left) != len(right):
        raise ValueError(f"{len(left)} predictions but {len(right)} human scores: they must be the same pairs")
    return left, right


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level {level!r} of an interval: expected a number between 0 and 1, such as 0.95")


def _measured(measure: Measure, pred: ArrayLike, human: ArrayLike) -> float:
    return measure(*_pairs(pred, human))


def _constant(side: np.ndarray) -> bool:
    return bool((side == side[0]).all())


def _undefined(pred: np.ndarray, human: np.ndarray) -> bool:
    return len(pred) < 2 or _constant(pred) or _constant(human)


def _tau_b(pred: np.ndarray, human: np.ndarray) -> float:
    # "asymptotic" concerns the p-value only, and spares the exact one
    return _kendall(pred, human, "b")


def _tau_c(pred: np.ndarray, human: np.ndarray) -> float:
    return _kendall(pred, human, "c")


def _kendall(pred: np.ndarray, human: np.ndarray, variant: Variant) -> float:
    if _undefined(pred, human):
        return float("nan")
    return float(stats.kendalltau(pred, human, variant=variant, method="asymptotic").statistic)


def _pearson(pred: np.ndarray, human: np.ndarray) -> float:
    if _undefined(pred, human):
        return float("nan")
    left, right = pred - pred.mean(), human - human.mean()
    left, right = left / np.abs(left).max(), right / np.abs(right).max()  # squares neither overflow nor vanish
    # sums, not dot products: pairwise summation is more exact, and no BLAS threads start for a few thousand numbers
    spread = np.sqrt((left * left).sum() * (right * right).sum())
    return float(np.clip((left * right).sum() / spread, -1, 1))


def _spearman(pred: np.ndarray, human: np.ndarray) -> float:
    return _pearson(stats.rankdata(pred), stats.rankdata(human))


def _mse(pred: np.ndarray, target: np.ndarray) -> float:
    return float(np.mean((pred - target) ** 2)) if len(pred) else float("nan")


def _accuracy(pred: np.ndarray, target: np.ndarray, tolerance: float) -> float:
    return float(np.mean(np.abs(pred - target) <= tolerance)) if len(pred) else float("nan")


def _tied(values: np.ndarray) -> int:
    """Pairs of equal entries (of equal rows in two dimensions)."""
    _, counts = np.unique(values, axis=0, return_counts=True)
    return sum(int(count) * (int(count) - 1) // 2 for count in counts)


def group_draws(
    n: int, groups: Sequence[str] | np.ndarray | None, samples: int, seed: int
) -> tuple[np.ndarray, int, Iterator[np.ndarray]]:
    """What a bootstrap of n pairs draws from, and the draws.

    Returns:
      member: int[n], the group of each pair. number: of groups. draws: for each resample the groups drawn, int[number];
      none where there are fewer than two.
    """
    _, member = np.unique(np.arange(n) if groups is None else np.asarray(groups), return_inverse=True)
    if len(member) != n:
        raise ValueError(f"{len(member)} group labels for {n} pairs: expected one label a pair")
    number = int(member.max()) + 1 if n else 0
    rng = np.random.default_rng(seed)
    return member, number, (rng.integers(number, size=number) for _ in range(samples if number > 1 else 0))


def _resamples(n: int, groups: Sequence[str] | np.ndarray | None, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Index arrays of the resamples; none where there are fewer than two things to draw from."""
    member, _, draws = group_draws(n, groups, sample_count(n, samples), seed)
    order = np.argsort(member, kind="stable")
    sizes = np.bincount(member)
    starts = np.cumsum(sizes) - sizes
    for chosen in draws:
        lengths = sizes[chosen]
        inside = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        yield order[np.repeat(starts[chosen], lengths) + inside]


def _interval(drawn: np.ndarray, level: float) -> Interval:
    defined = drawn[np.isfinite(drawn)]
    if len(defined) == 0:
        return Interval(float("nan"), float("nan"), len(drawn), len(drawn))
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), len(drawn), len(drawn) - len(defined))
