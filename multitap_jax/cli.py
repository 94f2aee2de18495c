"""multitap: score how well texts fit images, as people would, on many objectives at once.

usage: multitap VERB [--flag=value ...]        multitap VERB --help explains a verb

  demo       the whole chain on pictures drawn here: no data, no download, a few minutes on a laptop
  convert    turn a public dataset, as downloaded, into records
  plan       what a training run will need of chips that are not there: memory, time at best, does it fit
  train      stage 1: fine-tune a backbone and its reward head on human scores
  embed      stage 2: write the frozen model's embeddings of many pairs to disk
  fit        stage 2: fit one ridge head per objective, in closed form, and save them in the checkpoint
  score      score millions of pairs, each exactly once, resumable
  evaluate   compare scores with human judgements: Kendall, Pearson, Spearman with intervals, or a benchmark's protocol
  compare    test whether one set of scores agrees with people better than another
  report     the same as one HTML page: numbers, charts, pictures of the largest errors
  import     make a checkpoint of the official MULTI-TAP code into an artefact
  export     write an artefact in another layout (copy, heads alone, official, StableHLO program, vLLM)

The usual way:  train --config=configs/lora.py --workdir=run --config.model.checkpoint=MODEL \\
                      --config.data.train=train.jsonl
                fit   --checkpoint=run/artefact --input=train.jsonl
                score --checkpoint=run/artefact --input=heldout.jsonl --output=scores.jsonl
                evaluate --scores=scores.jsonl --input=heldout.jsonl

Exit codes: 0 done; 1 stopped with an explanation; 2 wrong usage; and, to be run again: 75 no progress, ended by
the watchdog; 76 another process of the run ended; 143 stopped by SIGTERM after saving (docs/launching.md).
MULTITAP_TRACEBACK=1 shows where in the code an explained error arose.
"""

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

from multitap_jax.parallel.host import hush_absent_tpu, keep_freed_memory, say_last
from multitap_jax.verbs.common import explain, joined, left

VERBS = (
    "demo",
    "convert",
    "plan",
    "train",
    "embed",
    "fit",
    "score",
    "evaluate",
    "compare",
    "report",
    "import",
    "export",
)


def _module(verb: str) -> Any:
    """The module of a verb; `import` is no name that Python lets a module be imported by."""
    return importlib.import_module(f"multitap_jax.verbs.{'import_checkpoint' if verb == 'import' else verb}")


def parse(verb: str, argv: Sequence[str]) -> flags.FlagValues:
    """Parses the flags of one verb.

    Raises:
      SystemExit: after printing help (0) or an explanation of what is wrong (2).
    """
    module = _module(verb)
    values = flags.FlagValues()
    module.define_flags(values)
    if any(arg in ("--help", "-h", "--helpfull", "-help") for arg in argv):
        print(f"multitap {verb}: {(module.__doc__ or '').strip()}\n\nFlags:")
        print(_flag_help(values))
        if hasattr(module, "more_help"):
            print("\n" + module.more_help())
        raise SystemExit(0)
    # Both spellings of a flag are known: --max-rejected and --max_rejected. Names end at the first "=" or ".".
    argv = [re.sub(r"^--?[a-z-]+", lambda name: "--" + name[0].lstrip("-").replace("-", "_"), arg) for arg in argv]
    problem = module.misuse(argv) if hasattr(module, "misuse") else None
    try:
        if problem is None:
            with _program_arguments([f"multitap {verb}", *argv]) as whole:
                rest = values(whole)
            if rest[1:]:
                problem = f"unexpected argument {rest[1]!r}; values are given as --flag=value"
    except (flags.Error, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        problem = explain(error)
    if problem is not None:
        say_last(f"multitap {verb}: {problem}\nmultitap {verb} --help lists the flags")
        raise SystemExit(2)
    return values


@contextlib.contextmanager
def _program_arguments(argv: list[str]) -> Iterator[list[str]]:
    """ml_collections looks for --config.NAME overrides in sys.argv, wherever the arguments came from."""
    before, sys.argv = sys.argv, argv
    try:
        yield argv
    finally:
        sys.argv = before


def _flag_help(values: flags.FlagValues) -> str:
    return "\n".join(
        f"  --{name}: {flag.help}" + ("" if flag.default in (None, "", False) else f" (default: {flag.default})")
        for name, flag in sorted((name, values[name]) for name in values)
    )


def _asks_for_hub(values: flags.FlagValues) -> bool:
    """Whether a setting, be it in a config file, names a repository of the hub (`weights/sources.py`)."""
    return any("hub:" in str(values[name].value) for name in values)


def _is_explained(error: Exception) -> bool:
    """Whether the message was written for the user; other runtime errors (a compiler's, say) keep their traceback."""
    if isinstance(error, RuntimeError):
        return type(error).__module__.startswith("multitap_jax.")
    return isinstance(error, ValueError | OSError)


def _said(error: Exception) -> str:
    """The message; one of the system's own as "FILE: what is wrong"."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}"
    return str(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("--help", "-h", "help"):
        print((__doc__ or "").strip())
        return 0 if argv else 2
    if argv[0] == "--version":
        from multitap_jax import __version__

        print(__version__)
        return 0
    if argv[0] not in VERBS:
        import difflib

        near = difflib.get_close_matches(argv[0], VERBS, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        say_last(f"multitap: there is no verb {argv[0]!r}{hint} The verbs: {', '.join(VERBS)}")
        return 2
    keep_freed_memory()
    values = parse(argv[0], argv[1:])
    # Absent settings must not reach out to a model hub; a user who wants that says so by name.
    if not _asks_for_hub(values):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return _run(argv[0], values)


def _run(verb: str, values: flags.FlagValues) -> int:
    try:
        with joined(verb, values):
            hush_absent_tpu()  # not before: a cluster is known by the same variables
            return int(_module(verb).run(values) or 0)
    except KeyboardInterrupt:
        say_last(f"\nmultitap {verb}: interrupted; the same command goes on where it stopped")
        return left(values, 130)
    except Exception as error:
        explained = _is_explained(error) and not os.environ.get("MULTITAP_TRACEBACK")
        if explained:
            say_last(f"multitap {verb}: {_said(error)}")
        code = left(values, getattr(error, "exit_code", 1), error, explained)
        if explained:
            return code
        raise


if __name__ == "__main__":
    sys.exit(main())
