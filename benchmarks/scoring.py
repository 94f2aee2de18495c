"""Pairs per second of packed scoring here against transformers + torch, same random weights, same machine, one run.

  python benchmarks/scoring.py [--device=cpu|gpu] [--size=small|2b|7b] [--images=8] [--repeats=5] [--threads=2]

Both sides score the same pairs with the same Qwen2-VL from decoded, resized pictures (560 x 560, so 400 image tokens)
and texts; tokenising, patching and packing count on both sides, decoding on neither. Three ways:

  official  one pair a forward, padded to 2,048 tokens, all hidden states and logits (kaist-cvml/MULTI-TAP, behaviour)
  batched   torch by hand: sdpa attention, batches padded to their longest, no logits, last token's hidden state
  ours      `Scorer.score` of this package: shared prefixes, packed rows, no logits

for one text an image and for six. `small` has 63.5 million parameters in float32 (16.4 of them the output embedding,
which only the official way uses); `2b` and `7b` have the sizes of Qwen2-VL-2B and 7B in bfloat16. Weights are random
and made on the device.

Printed: the largest difference of a score, which shows that all ways compute the same (the run ends where they do not);
pairs/s of each and the ratio of ours to it; the FLOPs that a pair asks for, by formula and without padding, logits or
anything else that no score needs, once alone and once with what pairs share counted once; what part of the device's own
rate of matrix products that makes, which takes turns with the ways; and memory: on a CPU what the process grows by, on
a GPU the peak of the side's allocator, weights included. Without torch, with --alone, or where torch does not see the
GPU, ours stands alone. The comparison needs the extra `test` (torch).
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from common import Devices, add_flags, check_agreement, start  # beside this file
from measuring import Products, Way, measure
from workload import Workload, make_pairs, make_workload, size_of

from multitap_jax import Scorer
from multitap_jax.data.stream import Pair
from multitap_jax.families import num_params

IMAGES = {"cpu": 8, "gpu": 64}
# float32 rounds a score by 6e-8, in another order of sums. bfloat16 has 8 bits: 28 and 56 layers of a tower and a
# decoder were seen to move scores by 3e-2 of the largest.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-1}


def ours(scorer: Scorer, pairs: list[Pair]) -> np.ndarray:
    """This side."""
    return scorer.score(images=[p.images[0] for p in pairs], texts=[p.text for p in pairs]).overall


def compare(workload: Workload, texts: int, args: argparse.Namespace, devices: Devices, scorer: Scorer, theirs) -> None:
    """Times all ways on one set of pairs and prints what came out."""
    rng = np.random.default_rng(texts)
    pairs = make_pairs(args.images or IMAGES[args.device], texts, rng, side=workload.size.side)
    few = pairs[: args.official_pairs]
    ways = {"ours": Way(lambda: ours(scorer, pairs), len(pairs), workload.asked(pairs, shared=True))}
    if theirs is not None:
        alone = lambda some: (len(some), workload.asked(some, shared=False), True)
        official = Way(lambda: theirs.official(few), *alone(few))
        ways = {"official": official, "batched": Way(lambda: theirs.batched(pairs), *alone(pairs))} | ways
    found = {name: way.run() for name, way in ways.items()}
    agreement = lambda name: check_agreement(
        f"scores of ours and {name}", found["ours"][: len(found[name])], found[name], TOLERANCE[workload.size.dtype]
    )
    print(
        f"\n{texts} text(s) an image, {len(pairs)} pairs; scores of {len(found)} way(s) differ by "
        f"{max(map(agreement, found)):.1e} of the largest at most; our rows are {ways['ours'].asked.filled:.0%} tokens"
    )
    products = Products(devices, workload.size.dtype, workload.size.products)
    print(measure(ways, "ours", products, devices, args.repeats), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, repeats=5)
    parser.add_argument("--images", type=int, help="pictures in a run (8 on a CPU, 64 on a GPU)")
    parser.add_argument("--official-pairs", type=int, default=4, help="pairs timed for the official procedure")
    parser.add_argument("--texts", type=int, nargs="+", default=(1, 6), help="texts an image")
    parser.add_argument("--batch-tokens", type=int, default=16384, help="tokens a batch of ours holds, about")
    args = parser.parse_args()
    size, devices = size_of(args.size), start(args)
    with tempfile.TemporaryDirectory() as folder:
        workload = make_workload(Path(folder), size)
        scorer, theirs = workload.scorer(batch_tokens=args.batch_tokens), None
        print(f"{num_params(workload.model.backbone) / 1e6:,.1f} M parameters, {size.dtype}")
        if devices.torch is not None:
            from torch_side import Torch  # beside this file

            theirs = Torch(workload, devices.torch)
        for texts in args.texts:
            compare(workload, texts, args, devices, scorer, theirs)
        print(f"\nshapes compiled: {scorer.num_shapes}")


if __name__ == "__main__":
    main()
