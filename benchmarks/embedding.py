"""Embeddings per second for stage 2, here against transformers + torch, same weights and files, one run.

  python benchmarks/embedding.py [--device=cpu|gpu] [--size=small|2b|7b] [--images=8] [--repeats=3]

From files to hidden states of the judged token in NumPy: decoding, tokenising and packing count on all sides, and every
turn reads every picture anew. Three ways:

  torch   by hand: sdpa attention, batches padded to their longest, no logits
  embed   `Scorer.embed` of this package
  verb    as `multitap embed`: records checked, pictures hashed for the groups, rows written and synced as a store

for one text a picture and for six. Sizes: see scoring.py. Printed: how far the states of torch and of the store are
from those of `Scorer.embed` (the run ends where they are not the same), pairs a second, ratios, useful FLOPs against
the device's rate of matrix products, which takes turns with the ways, and memory.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import numpy as np
from common import Devices, add_flags, check_agreement, start  # beside this file
from measuring import Products, Way, measure
from workload import Workload, make_pairs, make_workload, size_of, touch, write_records

from multitap_jax import EmbeddingStore, Scorer
from multitap_jax.stage2.embed import embed_records

IMAGES = {"cpu": 8, "gpu": 64}
# Of the largest state: float32 in another order of sums; bfloat16 was seen to move states by 4e-2 in 56 layers.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1}


def compare(workload: Workload, texts: int, args: argparse.Namespace, devices: Devices, scorer: Scorer, theirs) -> None:
    """Times all ways on the same files and prints what came out."""
    rng = np.random.default_rng(texts)
    images = args.images or IMAGES[args.device]
    folder = workload.folder / f"texts-{texts}"
    file, pairs = write_records(folder, make_pairs(images, texts, rng, side=workload.size.side), rng)
    given = {"images": [pair.images[0] for pair in pairs], "texts": [pair.text for pair in pairs]}
    numbers = itertools.count()

    def embed() -> np.ndarray:
        touch(pairs)
        return scorer.embed(**given).raise_errors().values

    def verb() -> np.ndarray:
        touch(pairs)
        store = folder / f"store-{next(numbers)}"
        embed_records(scorer, file, store)
        return EmbeddingStore(store).load()[0]

    states, tolerance = embed(), TOLERANCE[workload.size.dtype]
    own = len(pairs), workload.asked(pairs, shared=True)
    ways = {"embed": Way(embed, *own), "verb": Way(verb, *own)}
    apart = [f"store {check_agreement('states of store and scorer', verb(), states, 1e-6):.1e}"]
    if theirs is not None:
        alone = len(pairs), workload.asked(pairs, shared=False), True
        ways = {"torch": Way(lambda: theirs.embed(pairs), *alone)} | ways
        worst = check_agreement("states of torch and scorer", ways["torch"].run(), states, tolerance)
        apart.append(f"torch {worst:.1e}")
    print(f"\n{texts} text(s) an image, {len(pairs)} pairs; states differ by {', '.join(apart)} of the largest at most")
    products = Products(devices, workload.size.dtype, workload.size.products)
    print(measure(ways, "embed", products, devices, args.repeats), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, repeats=3)
    parser.add_argument("--images", type=int, help="pictures in a run (8 on a CPU, 64 on a GPU)")
    parser.add_argument("--texts", type=int, nargs="+", default=(1, 6), help="texts an image")
    parser.add_argument("--batch-tokens", type=int, default=16384, help="tokens a batch of ours holds, about")
    args = parser.parse_args()
    size, devices = size_of(args.size), start(args)
    with tempfile.TemporaryDirectory() as folder:
        workload = make_workload(Path(folder), size)
        scorer, theirs = workload.scorer(batch_tokens=args.batch_tokens), None
        if devices.torch is not None:
            from torch_side import Torch  # beside this file

            theirs = Torch(workload, devices.torch)
        for texts in args.texts:
            compare(workload, texts, args, devices, scorer, theirs)


if __name__ == "__main__":
    main()
