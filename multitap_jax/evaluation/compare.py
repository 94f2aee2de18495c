"""Whether one set of scores agrees with people better than another: a paired bootstrap over the same resamples."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from rich.text import Text

from multitap_jax.display import TextTable
from multitap_jax.evaluation.benchmark import interval
from multitap_jax.evaluation.correlation import Interval
from multitap_jax.evaluation.protocols import Benchmark, Protocol, ProtocolError
from multitap_jax.evaluation.report import plain
from multitap_jax.evaluation.scores import read_scores, seen_before


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two sets of scores of the same records.

    Attributes:
      benchmark, protocol, statistic: what was counted, as in `BenchmarkReport`.
      first, second: the statistic of each. names: their files.
      difference: first minus second, with its interval.
      p_value: two-sided, of no difference: twice the smaller share of resamples on either side of 0 (one added to both
        counts, so it is never 0); NaN without resamples.
      n, n_groups, samples: rows; groups that are resampled together; resamples where both are defined.
      warnings: of records that a model has seen, by its file.
    """

    benchmark: str
    protocol: str
    statistic: str
    names: tuple[str, str]
    first: float
    second: float
    difference: float
    interval: Interval
    p_value: float
    n: int
    n_groups: int
    samples: int
    warnings: tuple[str, ...] = ()

    def table(self) -> TextTable:
        """The three numbers times 100."""
        table = TextTable(title=Text(f"{self.benchmark}: {self.statistic}"))
        for name in ("", "x 100", "95% interval"):
            table.add_column(name, justify="left" if name == "" else "right", no_wrap=True)
        table.add_row(Text(self.names[0]), f"{100 * self.first:.3f}", "")
        table.add_row(Text(self.names[1]), f"{100 * self.second:.3f}", "")
        low, high = self.interval
        table.add_row("difference", f"{100 * self.difference:.3f}", f"{100 * low:.3f} to {100 * high:.3f}")
        return table

    def words(self) -> str:
        """The protocol, and what the test says."""
        least = self.p_value <= 2 / (self.samples + 1)  # no sample fell on the other side: p is not known below this
        p = f"p < {2 / self.samples:.3g}" if least and self.samples else f"p = {self.p_value:.3g}"
        said = (
            f"{self.protocol}\nPaired bootstrap: {p} (two-sided), {self.samples:,} samples of {self.n_groups:,} whole "
            f"groups, the same for both; n = {self.n:,}." + " More samples could tell of a smaller p." * least
        )
        return "\n".join([said, *(f"WARNING: {warning}." for warning in self.warnings)])

    def to_json(self) -> str:
        """The whole comparison; numbers that do not exist are null."""
        return json.dumps(plain(self), indent=2, allow_nan=False)


def compare_scores(
    benchmark: Benchmark,
    first: np.ndarray,
    second: np.ndarray,
    *,
    names: tuple[str, str] = ("first", "second"),
    bootstrap_samples: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Compares scores float64[N] of a benchmark's records by a paired bootstrap over whole groups.

    Raises:
      ProtocolError: a statistic is undefined (all scores, or all ratings, are equal).
    """
    values = [benchmark.statistic(scores) for scores in (first, second)]
    for name, value in zip(names, values, strict=True):
        if np.isnan(value):
            flat = np.ptp(benchmark.human) == 0
            whose = "people rated all records alike" if flat else "all its scores are equal"
            raise ProtocolError(f"{name}: {benchmark.protocol.statistic} is undefined: {whose}")
    drawn = benchmark.resampled([first, second], bootstrap_samples, seed)[:, :, 0]
    differences = drawn[0] - drawn[1]
    defined = differences[np.isfinite(differences)]
    sides = min((defined <= 0).sum(), (defined >= 0).sum()) + 1
    return Comparison(
        benchmark=benchmark.protocol.name,
        protocol=benchmark.protocol.describe(),
        statistic=benchmark.protocol.statistic,
        names=names,
        first=values[0],
        second=values[1],
        difference=values[0] - values[1],
        interval=interval(differences),
        p_value=float(min(1.0, 2 * sides / (len(defined) + 1))) if len(defined) else float("nan"),
        n=len(benchmark.rows),
        n_groups=len(np.unique(benchmark.groups)),
        samples=len(defined),
    )


def compare_files(
    protocol: Protocol,
    records_path: str | Path,
    scores_path: str | Path,
    against_path: str | Path,
    *,
    score_field: str = "score",
    against_field: str | None = None,
    bootstrap_samples: int = 1000,
    seed: int = 0,
    allow_subset: bool = False,
    allow_outside_root: bool = False,
) -> Comparison:
    """`compare_scores` of two files; arguments as `evaluate_benchmark`, `against_field` as `score_field` by default."""
    benchmark = Benchmark.open(protocol, records_path, allow_subset=allow_subset, allow_outside_root=allow_outside_root)
    fields = (score_field, against_field or score_field)
    paths = (scores_path, against_path)
    first, second = (read_scores(path, benchmark.records, field) for path, field in zip(paths, fields, strict=True))
    names = [Path(path).name for path in paths]
    if Path(scores_path) == Path(against_path):
        names = [f"{name}: {field}" for name, field in zip(names, fields, strict=True)]
    elif names[0] == names[1]:
        names = [str(path) for path in paths]
    found = compare_scores(
        benchmark, first, second, names=(names[0], names[1]), bootstrap_samples=bootstrap_samples, seed=seed
    )
    warnings = (
        f"{name}: {warning}"
        for name, path in zip(names, paths, strict=True)
        for warning in seen_before(path, benchmark.records)
    )
    return dataclasses.replace(found, warnings=tuple(warnings))
