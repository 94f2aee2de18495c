"""Compare scores with human judgements.

  multitap evaluate --scores=scores.jsonl --input=ratings.jsonl --output=evaluation

Scores (of `multitap score`, or anyone's JSONL with id and score) are joined with the records by id. The overall score
is compared with --target; every objective that has a head and ratings is compared with its own ratings. Each number
(Kendall tau_b and tau_c, Pearson, Spearman, accuracy |prediction - target| <= 0.5, mean squared error) comes with a
bootstrap interval; ties and left-out records are counted. --output gets metrics.json and plots.
"""

import sys
from pathlib import Path

from absl import flags

from multitap_jax.verbs.common import input_flags


def define_flags(values: flags.FlagValues) -> None:
    input_flags(values)
    flags.DEFINE_string("scores", None, "Scores (JSONL). Required.", flag_values=values)
    flags.DEFINE_string("output", None, "Folder for metrics.json and plots.", flag_values=values)
    flags.DEFINE_string(
        "target", "score", '"score" or "ratings.NAME": what overall is compared with.', flag_values=values
    )
    flags.DEFINE_list("target_range", ["0", "1"], "Values of the target that mean 0 and 1.", flag_values=values)
    flags.DEFINE_integer("bootstrap", 1000, "Bootstrap samples.", flag_values=values)
    flags.mark_flag_as_required("scores", flag_values=values)


def run(values: flags.FlagValues) -> int:
    from rich.console import Console

    from multitap_jax.data.records import check_rejected_share
    from multitap_jax.evaluation.report import evaluate_files

    if len(values.target_range) != 2:
        raise ValueError(f"--target_range={','.join(values.target_range)}: expected two numbers, LOW,HIGH")
    low, high = (float(v) for v in values.target_range)
    if values.bootstrap < 0:
        raise ValueError(f"--bootstrap={values.bootstrap}: a number of samples, or 0 for no intervals")
    report = evaluate_files(
        values.scores,
        values.input,
        target=values.target,
        target_range=(low, high),
        bootstrap_samples=values.bootstrap,
        allow_outside_root=values.allow_outside_root,
    )
    check_rejected_share(Path(values.input), report.n_records, report.rejected, values.max_rejected)
    if not report.overall.n and not any(metrics.n for metrics in report.objectives.values()):
        raise ValueError(
            f"nothing to compare: no record of {values.input} has {values.target} and a line in {values.scores}; "
            "check --target and the ids"
        )
    # Tables are unreadable when folded, so a pipe gets them at full width.
    Console(width=None if sys.stdout.isatty() else 240).print(report.table())
    if values.output:
        report.save(values.output)
        print(f"wrote {values.output}")
    return 0
