"""How far every family is from transformers, whole model, pictures and texts to states and gradients, in float32.

  python -m benchmarks.parity [--output=docs/parity.md]

Tiny models with random weights that keep activations O(1); transformers scores one pair a forward with its own image
processor, chat template and torch model, ours packs the pairs. The same comparison runs in the tests, with the bounds
that stand in the table. Needs the extra `test` (torch).
"""

import argparse
import importlib.util
import platform
import tempfile
from pathlib import Path

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mllama", "llava", "llava_onevision")

HEAD = """# Parity with transformers

Written by `python -m benchmarks.parity`; the tests hold every family to the same bounds. Whole model in float32 on a
CPU, from pictures and texts to the judged token's final hidden state: transformers scores one pair a forward with its
own image processor, chat template and torch model, ours packs the pairs (shared prefixes, several pictures a vision
row). Tiny models, random weights with O(1) activations, gates open. No published weights were at hand: depth and width
of real models are not covered by this table. Llama-3.2-Vision is compared with its intermediate states `after` their
layers, as this transformers has them; `before`, the default and what published weights were trained with, is held to an
explicit NumPy reference within the same bounds (tests/families/test_mllama.py).

*state*: largest absolute difference of a hidden state (states reach about 3; bound {states:g}). *gradient*: of every
parameter, the largest difference relative to the largest entry of that parameter's gradient (bound {gradients:g}).

{versions}

| family | case | pairs | state | gradient |
|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if importlib.util.find_spec("torch") is None:
        raise SystemExit("the comparison needs torch; pip install -e '.[test]'")
    parser.add_argument("--output", type=Path, help="Markdown file to write; nothing is written without it.")
    args = parser.parse_args()
    import jax
    import torch
    import transformers
    from transformers.utils import logging

    from tests.families import common

    logging.disable_progress_bar()
    lines = []
    for family in FAMILIES:
        for case in importlib.import_module(f"tests.families.{family}").cases():
            with tempfile.TemporaryDirectory() as folder:
                model = case.oracle.write(Path(folder))
                found = common.check_parity(case.oracle, model, Path(folder), case.pairs, gradient=True, **case.chosen)
            line = f"| {family} | {case.label} | {len(case.pairs)} | {found.states:.1e} | {found.gradients:.1e} |"
            print(line, flush=True)
            lines.append(line)
    if args.output is None:
        return
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (jax, transformers, torch))
    head = HEAD.format(
        states=common.TOLERANCE,
        gradients=common.GRADIENT_TOLERANCE,
        versions=f"{versions}, Python {platform.python_version()}.",
    )
    args.output.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
