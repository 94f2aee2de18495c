"""How far every family is from its oracle, whole model, pictures and texts to states and gradients, in float32.

  python -m benchmarks.parity [--output=docs/parity.md]

Tiny models with random weights that keep activations O(1); transformers scores one pair a forward with its own image
processor, chat template and torch model, ours packs the pairs. InternLM-XComposer2.5 is compared with what was kept of
its published code. The same comparison runs in the tests, with the bounds that stand in the table. Needs the extra
`test` (torch).
"""

import argparse
import importlib.util
import json
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

XCOMPOSER = """
## InternLM-XComposer2.5

transformers has no class for this family. Its published modelling code (`InternLMXComposer2ForCausalLM`, with `hd_num`
and `plora_glb_GN`) was run apart from this repository, once, on a CPU in float32 with torch 2.13.0: on the tiny weights
(additions of image tokens among them, none zero), pictures and texts of `tests/families/internlm2.py`, one pair a
forward. The code is that of two public repositories (DripNowhy/ETA has the model, kapilparab/GeoPixel its parts); two
lines that they had changed were put back: the number of tiles is the smaller of what a picture needs and what it may
have, and without a mask no token is an image token. Changed in it: sizes that it holds as constants became tiny ones
(tiles of 56 pixels in place of 560, rank 8, alpha 4), attention is its own `eager` one, torchvision's resizing and
padding of PIL pictures are the PIL calls that they make, texts go to sentencepiece without the tokenizer class around
it, and what loads fonts, videos and the tower from the hub is left out. The cases are its `chat` way
(`interleav_wrap_chat`, mask of image tokens, normalised pixels) and, as "official", the way in which
kaist-cvml/MULTI-TAP calls it: pixels from 0 to 1 as they are, and no mask, so that the additions are never applied.

What it gave is kept as numbers (`tests/goldens/xcomposer.json`), with which the tests and this table compare: every
fourth entry of each state; of every parameter's gradient the largest entry and two random sums of all entries. Kept
too, and within 2e-5 in the tests: samples of the pixels of all views, of each layer of the tower, of the projected
tokens, of each layer of the decoder, of a fused projection with its additions, of attention, MLP and rotary positions;
the tiles of {sizes} sizes of pictures, checksums of {pixels} transformed ones; the prompts' token ids.

| case | pairs | state | gradient |
|---|---|---|---|
{rows}

Whole states and all entries of all gradients were compared while the numbers were made: 2e-06 and 2e-06 at most, but
for the tower's key biases, whose gradients are zero but for rounding. With tiles of the real 560 pixels, 1 to 4 of them
a picture, on the same tiny layers: 1.3e-06.

A reference in NumPy and float64 (`tests/families/xcomposer_reference.py`), written without a look at packing, gives the
same states within 2e-5: all pairs in all cases, and each decoder layer of a pair with two pictures.

The tokenizer made of a `tokenizer.model` was compared with sentencepiece 0.2.3 on InternLM2's own file (92,544 pieces,
which is not in this repository): 42,582 lines of this repository's files and 99,996 made-up texts (random pieces, runs
of few signs, random signs of many scripts), not one difference; and with the published tokenizer class on 3,363 of such
texts, with and without first token. Texts with a zero byte are left out: they are refused here.
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

    from tests.families import common, internlm2

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
    apart = []
    for label, pairs, states, gradients in internlm2.golden_parity():
        shown = "" if gradients is None else f"{gradients:.1e}"
        apart.append(f"| {label} | {pairs} | {states:.1e} | {shown} |")
        print(f"| internlm2 {apart[-1]}", flush=True)
    if args.output is None:
        return
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (jax, transformers, torch))
    head = HEAD.format(
        states=common.TOLERANCE,
        gradients=common.GRADIENT_TOLERANCE,
        versions=f"{versions}, Python {platform.python_version()}.",
    )
    kept = json.loads(internlm2.GOLDENS.read_text(encoding="utf-8"))
    counts = {"sizes": len(kept["sizes"]), "pixels": len(kept["pixels"])}
    tail = XCOMPOSER.format(rows="\n".join(apart), **counts)
    args.output.write_text(head + "\n".join(lines) + "\n" + tail, encoding="utf-8")


if __name__ == "__main__":
    main()
