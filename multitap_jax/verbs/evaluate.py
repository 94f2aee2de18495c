"""Compare scores with human judgements.

  multitap evaluate --scores=scores.jsonl --input=ratings.jsonl --output=evaluation

Scores (of `multitap score`, or anyone's JSONL with id and score) are joined with the records by id. The overall score
is compared with --target; every objective that has a head and ratings is compared with its own ratings. Ratings from 1
to 5 under the name realism, for instance, need --target=ratings.realism --target_range=1,5. The table has the
correlations; --output gets plots and metrics.json with everything (Kendall tau_b and tau_c, Pearson, Spearman, accuracy
|prediction - target| <= 0.5, mean squared error, each with a bootstrap interval, ties, left-out records).

With --benchmark=NAME the records are those that `multitap convert` wrote, and are counted by the protocol of that name.
"""

import re
from pathlib import Path
from typing import Any

from absl import flags

from multitap_jax.verbs.common import benchmark_flags, input_flags, process_flags, whole_number


def define_flags(values: flags.FlagValues) -> None:
    comparison_flags(values)
    process_flags(values)
    flags.DEFINE_string("output", None, "Folder for metrics.json and plots.", flag_values=values)


def comparison_flags(values: flags.FlagValues) -> None:
    """What is compared with what; `report` takes the same."""
    input_flags(values)
    benchmark_flags(values)
    flags.DEFINE_string("scores", None, "Scores (JSONL). Required.", flag_values=values)
    flags.DEFINE_string(
        "target",
        None,
        '"score", "ratings.NAME" or "none": what overall is compared with. By default what the model was trained on, '
        "where `score` noted it, else score.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "target_range",
        None,
        "LOW,HIGH: values of the target that mean 0 and 1 (default: noted, or 0,1).",
        flag_values=values,
    )
    whole_number(values, "bootstrap", 1000, "Bootstrap samples; 0 for no intervals.", low=0)
    flags.mark_flag_as_required("scores", flag_values=values)


def more_help() -> str:
    """The table of protocols."""
    from multitap_jax.evaluation.protocols import describe

    return describe()


def run(values: flags.FlagValues) -> int:
    from multitap_jax.parallel.distributed import is_main_process

    if not is_main_process():  # it is the work of a moment, and done once
        return 0
    return _run_benchmark(values) if values.benchmark else _run_records(values)


def _run_benchmark(values: flags.FlagValues) -> int:
    from rich.console import Console

    report = count(values)
    Console().print(report.table())
    print(report.words())
    if values.output:
        print(f"wrote {report.save(values.output)}")
    return 0


def count(values: flags.FlagValues) -> Any:
    """The report of the benchmark that the flags name. Raises ValueError for flags of records of one's own."""
    from multitap_jax.evaluation.benchmark import evaluate_benchmark
    from multitap_jax.evaluation.protocols import protocol_named

    if values.target or values.target_range:
        raise ValueError("--target and --target_range are for records of your own; a benchmark says what is compared")
    return evaluate_benchmark(
        protocol_named(values.benchmark, ties=values.ties),
        values.input,
        values.scores,
        score_field=values.score_field,
        bootstrap_samples=values.bootstrap,
        allow_subset=values.allow_subset,
        allow_outside_root=values.allow_outside_root,
    )


def _run_records(values: flags.FlagValues) -> int:
    from rich.console import Console

    report = compare(values)
    Console().print(report.table())
    if values.output:
        report.save(values.output)
        print(f"wrote {values.output}")
    return 0


def compare(values: flags.FlagValues) -> Any:
    """The report of what the flags name.

    Raises:
      ValueError: nothing, or too little, could be compared, or a flag is of benchmarks alone.
    """
    from multitap_jax.data.records import check_rejected_share
    from multitap_jax.evaluation.report import evaluate_files

    given = [name for name in ("score_field", "ties", "allow_subset") if values[name].present]
    if given:
        raise ValueError(f"--{given[0]} is for a --benchmark; without one, overall scores and objectives are compared")
    report = evaluate_files(
        values.scores,
        values.input,
        target=values.target,
        target_range=_range(values.target_range),
        bootstrap_samples=values.bootstrap,
        allow_outside_root=values.allow_outside_root,
    )
    check_rejected_share(Path(values.input), report.n_records, report.rejected, values.max_rejected)
    compared = any(metrics.n for metrics in report.objectives.values())
    if not (compared if report.target == "none" else report.overall.n):
        if report.problems and all(problem.reason == "no id" for problem in report.problems):
            raise ValueError(
                f"{values.scores}: no line has an id, by which scores and records are joined; lines without ids "
                "are taken with --benchmark alone, in the order of the records"
            )
        what = "ratings of its objectives" if report.target == "none" else report.target
        raise ValueError(
            f"nothing to compare: no record of {values.input} has {what} and a usable line in {values.scores}; "
            "check --target and the ids"
        )
    return report


def _range(text: str | None) -> tuple[float, float] | None:
    """1,5 as well as (1, 5) or [1, 5]."""
    if text is None:
        return None
    try:
        low, high = (float(part) for part in re.sub(r"[()\[\]]", "", text).split(","))
    except ValueError:
        raise ValueError(
            f"--target_range={text}: expected two numbers, the lowest and the highest, such as --target_range=1,5"
        ) from None
    return low, high
