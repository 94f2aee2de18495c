"""A benchmark's report: the statistic with its interval, and everything a reader needs to compare it with another."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from multitap_jax.display import TextTable
from multitap_jax.evaluation.correlation import Interval, Statistic, kendall_tau, pearson, spearman, undefined_reason
from multitap_jax.evaluation.protocols import TIES, Benchmark, Protocol
from multitap_jax.evaluation.report import plain, shown
from multitap_jax.evaluation.scores import computed_in, noted_seen, read_note, read_scores, seen_before

LEVEL = 0.95
UNKNOWN = "not noted beside the scores"
CONDITIONS = ("references", "prompt", "position_mode", "image_policy", "alpha_rule")


@dataclasses.dataclass(frozen=True)
class BenchmarkReport:
    """A benchmark's statistic for one file of scores.

    Attributes:
      benchmark: name of the protocol. protocol: what was compared with what, in words.
      statistic: name of the first number. value: that number with its interval.
      categories: the same by category, where the protocol has them, and their mean as "mean".
      others: further statistics of the same rows, without intervals; for accuracies the number under each tie rule.
      n: judgements or comparisons. n_records, n_groups: records; groups that are resampled together.
      ties: judgements whose records score alike: tied comparisons of an accuracy, tied pairs of rows of a correlation.
      subset: whether the records are not the published number, or not of the published split.
      conditions: variant, tie_rule, references, prompt, position_mode, image_policy, alpha_rule, dtype; and in
        seen_records, whose records are noted, so that they can be known again.
      warnings: what makes the number mean less than it seems.
      counted, scores: the records, and the scores float64[N] of them.
    """

    benchmark: str
    protocol: str
    statistic: str
    value: Statistic
    categories: dict[str, Statistic]
    others: dict[str, float]
    n: int
    n_records: int
    n_groups: int
    ties: int
    subset: bool
    conditions: dict[str, str]
    warnings: tuple[str, ...]
    counted: Benchmark = dataclasses.field(repr=False)
    scores: np.ndarray = dataclasses.field(repr=False)

    def table(self) -> TextTable:
        """The numbers times 100, as such tables have them; `words` says what they mean."""
        table = TextTable(title=self.benchmark)
        for name in ("", "x 100", f"{LEVEL:.0%} interval"):
            table.add_column(name, justify="left" if name == "" else "right", no_wrap=True)
        for name, found in ((self.statistic, self.value), *self.categories.items()):
            table.add_row(
                Text(name), _cell(found.value), f"{_cell(found.interval.low)} to {_cell(found.interval.high)}"
            )
        for name, value in self.others.items():
            table.add_row(Text(name), _cell(value), "")
        return table

    def to_json(self) -> str:
        """The whole report; numbers that do not exist are null, with their reason."""
        return json.dumps(plain(shown(self)), indent=2, allow_nan=False)

    def save(self, folder: str | Path) -> Path:
        """Writes FOLDER/BENCHMARK.json."""
        path = Path(folder) / f"{self.benchmark}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json() + "\n", encoding="utf-8")
        return path

    def words(self) -> str:
        """Protocol, counts, conditions and warnings, in sentences."""
        known = [f"{name.replace('_', ' ')}: {value}" for name, value in self.conditions.items() if value != UNKNOWN]
        unknown = [name.replace("_", " ") for name, value in self.conditions.items() if value == UNKNOWN]
        tied = "comparisons" if self.statistic == "accuracy" else "pairs of them"
        lines = [
            self.protocol,
            f"n = {self.n:,} from {self.n_records:,} records; {self.ties:,} {tied} with equal scores. Interval: "
            f"{self.value.interval.samples:,} bootstrap samples of {self.n_groups:,} whole groups.",
            "; ".join(known + [f"not noted beside the scores: {', '.join(unknown)}"] * bool(unknown)) + ".",
        ]
        if self.value.reason:
            lines.append(f"{self.statistic} is undefined: {self.value.reason}.")
        if self.subset:
            lines.append("NOT the published number of records or split: not comparable with published figures.")
        return "\n".join([*lines, *(f"WARNING: {warning}." for warning in self.warnings)])


def evaluate_benchmark(
    protocol: Protocol,
    records_path: str | Path,
    scores_path: str | Path,
    *,
    score_field: str = "score",
    bootstrap_samples: int = 1000,
    seed: int = 0,
    allow_subset: bool = False,
    allow_outside_root: bool = False,
) -> BenchmarkReport:
    """Counts one file of scores by a benchmark's protocol.

    Args:
      protocol: of `protocols.PROTOCOLS`.
      records_path: what `multitap convert` wrote, or records of the same form.
      scores_path, score_field: see `scores.read_scores`.
      bootstrap_samples, seed: of the interval, over whole groups.
      allow_subset: count records that are not the published number; the report says so.
      allow_outside_root: as in `load_records`.

    Raises:
      ProtocolError, ScoresError: see `Benchmark.open` and `read_scores`.
    """
    benchmark = Benchmark.open(protocol, records_path, allow_subset=allow_subset, allow_outside_root=allow_outside_root)
    scores = read_scores(scores_path, benchmark.records, score_field)
    drawn = benchmark.resampled([scores], bootstrap_samples, seed)[0]
    value = benchmark.statistic(scores)
    reason = undefined_reason(scores[benchmark.rows], benchmark.human) if protocol.statistic != "accuracy" else None
    return BenchmarkReport(
        benchmark=protocol.name,
        protocol=protocol.describe(),
        statistic=protocol.statistic,
        value=Statistic(value, interval(drawn[:, 0]), reason),
        categories=_categories(benchmark, scores, drawn),
        others=_others(benchmark, scores),
        n=len(benchmark.rows),
        n_records=len(benchmark.records),
        n_groups=len(np.unique(benchmark.groups)),
        ties=benchmark.ties(scores),
        subset=benchmark.subset,
        conditions=_conditions(protocol, read_note(scores_path), scores_path),
        warnings=seen_before(scores_path, benchmark.records),
        counted=benchmark,
        scores=scores,
    )


def _categories(benchmark: Benchmark, scores: np.ndarray, drawn: np.ndarray) -> dict[str, Statistic]:
    """The accuracy of each category, and their mean; nothing for correlations. `drawn` are resamples of all of them."""
    if benchmark.protocol.statistic != "accuracy" or not (parts := benchmark.by_category()):
        return {}
    hits = benchmark.hits(scores)
    values = [float(hits[part].mean()) for part in parts.values()]
    found = {
        name: Statistic(value, interval(drawn[:, column]))
        for column, (name, value) in enumerate(zip(parts, values, strict=True), 1)
    }
    return found | {"mean": Statistic(float(np.mean(values)), interval(drawn[:, 1:].mean(axis=1)))}


def _others(benchmark: Benchmark, scores: np.ndarray) -> dict[str, float]:
    """Further statistics of the same rows; of an accuracy the number under each other rule for equal scores."""
    protocol, human = benchmark.protocol, benchmark.human
    if protocol.statistic == "accuracy":
        return {f"ties {rule}": float(benchmark.hits(scores, rule).mean()) for rule in TIES if rule != protocol.ties}
    pred = scores[benchmark.rows]
    taus = {f"tau_{v}": kendall_tau(pred, human, v) for v in ("b", "c") if f"tau_{v}" != protocol.statistic}
    return {**taus, "Pearson": pearson(pred, human), "Spearman": spearman(pred, human)}


def _conditions(protocol: Protocol, note: dict[str, Any], scores_path: str | Path) -> dict[str, str]:
    noted = note.get("conditions")
    noted = noted if isinstance(noted, dict) else {}
    found = {"variant": protocol.statistic} | ({"tie_rule": protocol.ties} if protocol.statistic == "accuracy" else {})
    return (
        found
        | {name: str(noted.get(name, UNKNOWN)) for name in CONDITIONS}
        | {
            "dtype": computed_in(note) or UNKNOWN,
            "seen_records": noted_seen(scores_path) or UNKNOWN,
        }
    )


def interval(drawn: np.ndarray) -> Interval:
    """The 95% percentile interval of resampled values; NaN where none is defined."""
    defined = drawn[np.isfinite(drawn)]
    if not len(defined):
        return Interval(float("nan"), float("nan"), len(drawn), len(drawn))
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high), len(drawn), len(drawn) - len(defined))


def _cell(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.3f}"
