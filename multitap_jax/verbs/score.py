"""Score pairs, each exactly once.

  multitap score --checkpoint=run/artefact --input=pairs.jsonl --output=scores.jsonl

One output line a record, in input order: id, score (the overall score, 0 to 1), scores (one number per objective),
n_tokens, truncated, error. A record that cannot be scored gets a line with its error and no score. Interrupted in any
way, also by kill -9, the same command goes on after the last complete line.
"""

from absl import flags

from multitap_jax.verbs.common import input_flags, load_scorer, model_flags, process_flags, whole_number


def define_flags(values: flags.FlagValues) -> None:
    input_flags(values)
    model_flags(values)
    process_flags(values)
    flags.DEFINE_string("output", None, "Where the scores go (JSONL). Required.", flag_values=values)
    whole_number(values, "window", 1024, "Records that are written at once.")
    flags.mark_flag_as_required("output", flag_values=values)


def run(values: flags.FlagValues) -> int:
    from multitap_jax.parallel.distributed import is_main_process
    from multitap_jax.scoring.job import score_file

    summary = score_file(
        load_scorer(values),
        values.input,
        values.output,
        truncate=values.truncate,
        max_rejected=values.max_rejected,
        allow_outside_root=values.allow_outside_root,
        window=values.window,
        show_progress=True,
    )
    if is_main_process():
        print(summary)
    return 0
