"""Pairs per second of packed scoring here against transformers + torch, same random weights, same machine, one run.

  python benchmarks/scoring.py [--images=8] [--repeats=5] [--threads=2]

Both sides score the same pairs with the same 60M-parameter Qwen2-VL in float32 from decoded, resized pictures
(560 x 560, so 400 image tokens) and texts; tokenising, patching and packing count on both sides, decoding on neither.
Three ways:

  official  one pair a forward, padded to 2,048 tokens, all hidden states and logits (kaist-cvml/MULTI-TAP, behaviour)
  batched   torch by hand: sdpa attention, batches padded to their longest, no logits, last token's hidden state
  ours      `Scorer.score` of this package: shared prefixes, packed rows, no logits

for one text an image and for six. Printed: pairs/s of each, the ratio of ours to each, and the largest difference of a
score, which shows that all three compute the same thing. Needs the extra `test` (torch).
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flax import nnx
from PIL import Image

from multitap_jax import Scorer
from multitap_jax.data.processing import Contract
from multitap_jax.data.prompts import Prompter
from multitap_jax.data.stream import Pair
from multitap_jax.demo.checkpoint import train_tokenizer
from multitap_jax.parallel.host import keep_freed_memory
from multitap_jax.reward import RewardHead, RewardModel
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.weights.hub import load_backbone

SIDE = 560
WORDS = "a red ball near the blue box on your left and two green cones far away to the right of it".split()  # noqa: SIM905
TEXT_WORDS = 30


def make_pairs(images: int, texts: int, rng: np.random.Generator, text_words: int = TEXT_WORDS) -> list[Pair]:
    """`images` pictures with `texts` texts each; `text_words` words a text, give or take 5."""
    out = []
    for _ in range(images):
        picture = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
        for _ in range(texts):
            words = rng.choice(WORDS, int(rng.integers(text_words - 5, text_words + 6)))
            out.append(Pair((picture,), " ".join(words)))
    return out


def make_scorer(base: Path, folder: Path, tokenizer, head: RewardHead) -> Scorer:
    """An artefact of the torch model saved in `base`, opened as a user would."""
    tokenizer.save_pretrained(base)
    contract = Contract(image_policy=f"square:{SIDE}")
    Artefact.save(folder, RewardModel(load_backbone(base), head), base=base, contract=contract)
    return Scorer.from_pretrained(folder)


def ours(scorer: Scorer, pairs: list[Pair]) -> np.ndarray:
    """This side."""
    return scorer.score(images=[p.images[0] for p in pairs], texts=[p.text for p in pairs]).overall


def interleaved(ways: dict[str, Callable[[], np.ndarray]], repeats: int) -> dict[str, float]:
    """Median seconds of each way; the ways take turns, so that noise of the machine meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8, help="pictures in a run")
    parser.add_argument("--official-pairs", type=int, default=4, help="pairs timed for the official procedure")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns; the median counts")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (jax takes the cores it may use)")
    args = parser.parse_args()
    try:
        import torch
        from torch_side import Torch, make_config  # beside this file
        from transformers import Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error}: the comparison needs torch; pip install -e '.[test]'") from None
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as the program does; torch's arrays profit alike
    rng = np.random.default_rng(0)
    tokenizer = train_tokenizer(WORDS)
    prompter = Prompter(tokenizer, "official-train")
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration._from_config(make_config(tokenizer), attn_implementation="sdpa").eval()
    head = RewardHead(512, rngs=nnx.Rngs(0))
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        model.save_pretrained(base)
        Qwen2VLImageProcessorPil().save_pretrained(base)
        scorer = make_scorer(base, Path(folder) / "artefact", tokenizer, head)
    theirs = Torch(model, np.asarray(head.weight[...]), float(head.bias[...]), prompter)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, float32, {args.threads} threads")
    for texts in (1, 6):
        pairs = make_pairs(args.images, texts, rng)
        few = pairs[: args.official_pairs]
        found = ours(scorer, pairs)  # compiles
        reference = theirs.batched(pairs)
        worst = max(np.abs(found - reference).max(), np.abs(found[: len(few)] - theirs.official(few)).max())
        ways = {
            "official": lambda few=few: theirs.official(few),
            "batched": lambda pairs=pairs: theirs.batched(pairs),
            "ours": lambda pairs=pairs: ours(scorer, pairs),
        }
        seconds = interleaved(ways, args.repeats)
        rate = {name: (len(few) if name == "official" else len(pairs)) / s for name, s in seconds.items()}
        print(f"\n{texts} text(s) an image, {len(pairs)} pairs; largest score difference {worst:.1e}")
        for name, value in rate.items():
            ratio = "" if name == "ours" else f"   ours / {name}: {rate['ours'] / value:6.2f}x"
            print(f"  {name:9s} {value:8.2f} pairs/s{ratio}")
    print(f"\nshapes compiled: {scorer.num_shapes}")


if __name__ == "__main__":
    main()
