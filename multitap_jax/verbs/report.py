"""One HTML page of how scores agree with people: numbers, charts, pictures, the protocol. It needs no other file.

  multitap report --scores=scores.jsonl --input=heldout.jsonl --output=report.html
  multitap report --scores=scores.jsonl --input=pascal --benchmark=pascal-50s --output=report.html

Takes what `evaluate` takes. Pictures come from the records: those scored too high, too low, and as people score them;
where they are not there the page says so and shows the rest. It reads well on a phone and on paper.
"""

from pathlib import Path

from absl import flags

from multitap_jax.verbs import evaluate


def define_flags(values: flags.FlagValues) -> None:
    evaluate.comparison_flags(values)
    flags.DEFINE_string("output", "report.html", "The page.", flag_values=values)
    flags.DEFINE_string("title", "How well do the scores agree with people?", "Of the page.", flag_values=values)


def run(values: flags.FlagValues) -> int:
    path = _benchmark(values) if values.benchmark else _records(values)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


def _records(values: flags.FlagValues) -> Path:
    from multitap_jax.evaluation.page import write_evaluation

    report = evaluate.compare(values)
    options = {"title": values.title, "allow_outside_root": values.allow_outside_root}
    return write_evaluation(values.output, report, values.scores, values.input, **options)


def _benchmark(values: flags.FlagValues) -> Path:
    from multitap_jax.evaluation.page import write_benchmark

    return write_benchmark(values.output, evaluate.count(values), values.scores, values.input, title=values.title)
