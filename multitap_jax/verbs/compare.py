"""Test whether one set of scores agrees with people better than another.

  multitap compare --input=expert --benchmark=flickr8k-expert --scores=ours.jsonl --against=theirs.jsonl
  multitap compare --input=ratings.jsonl --target=ratings.realism --scores=a.jsonl --against=b.jsonl

A paired bootstrap: both sets are counted on the same resamples of whole groups, by the benchmark's protocol or, without
one, by Kendall's tau_c with --target. Both need a score for every record (`multitap evaluate --help`).
"""

from pathlib import Path

from absl import flags

from multitap_jax.verbs.common import benchmark_flags, input_flags, whole_number
from multitap_jax.verbs.evaluate import more_help as more_help  # the same table of protocols


def define_flags(values: flags.FlagValues) -> None:
    input_flags(values)
    benchmark_flags(values)
    flags.DEFINE_string("scores", None, "Scores (JSONL). Required.", flag_values=values)
    flags.DEFINE_string("against", None, "Other scores of the same records (JSONL). Required.", flag_values=values)
    flags.DEFINE_string(
        "against_field", None, "As --score_field, of --against (default: the same).", flag_values=values
    )
    flags.DEFINE_string("target", "score", "Without --benchmark: score or ratings.NAME.", flag_values=values)
    flags.DEFINE_string("output", None, "File for the comparison as JSON.", flag_values=values)
    whole_number(values, "bootstrap", 1000, "Bootstrap samples.", low=100)
    flags.mark_flags_as_required(["scores", "against"], flag_values=values)


def run(values: flags.FlagValues) -> int:
    from rich.console import Console

    from multitap_jax.evaluation.compare import compare_files
    from multitap_jax.evaluation.protocols import Protocol, protocol_named

    if values.ties and not values.benchmark:
        raise ValueError("--ties is for a --benchmark that counts accuracy; without one, tau_c is compared")
    if values.benchmark:
        protocol = protocol_named(values.benchmark, ties=values.ties)
    else:
        protocol = Protocol(values.target, "", "tau_c", (values.target,))
    found = compare_files(
        protocol,
        values.input,
        values.scores,
        values.against,
        score_field=values.score_field,
        against_field=values.against_field,
        bootstrap_samples=values.bootstrap,
        allow_subset=values.allow_subset,
        allow_outside_root=values.allow_outside_root,
    )
    Console().print(found.table())
    print(found.words())
    if values.output:
        Path(values.output).write_text(found.to_json() + "\n", encoding="utf-8")
        print(f"wrote {values.output}")
    return 0
