"""Pairs and FLOPs per second against texts an image and against the length of texts, as a table and a picture.

  python benchmarks/throughput.py [--device=cpu] [--size=small] [--plot=docs/throughput.png]

`Scorer.score` on pictures of 560 x 560 (400 image tokens): first `--texts` a picture, of 30 words each; then 6 a
picture, of `--words` words each. "of products" is the useful FLOPs of multitap_jax/flops.py a second, as a share of a
matrix product's on this device, timed in the same turns; "alone" is how many times the FLOPs of a pair grow when it is
scored by itself. "filled" is the share of packed rows that is no padding.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import numpy as np
from common import add_flags, start, table  # beside this file
from matplotlib import pyplot
from measuring import Products, Seconds, interleaved
from workload import TEXT_WORDS, Asked, Workload, make_pairs, make_workload, size_of

from multitap_jax.data.stream import Pair

TEXTS = 6  # a picture, where their length is what changes


class Point(NamedTuple):
    """One setting: its value on the axis, its pairs, what they ask for together and each alone."""

    value: int
    pairs: list[Pair]
    asked: Asked
    alone: float


def point(workload: Workload, value: int, texts: int, words: int, images: int) -> Point:
    """`images` pictures with `texts` texts of about `words` words each."""
    pairs = make_pairs(images, texts, np.random.default_rng(0), words, workload.size.side)
    return Point(value, pairs, workload.asked(pairs, shared=True), workload.asked(pairs, shared=False).flops)


def measure(points: list[Point], scorer: Any, products: Products, repeats: int) -> tuple[list[Seconds], float]:
    """Seconds of each point, and FLOP/s of products in the same turns."""

    def way(pairs: list[Pair]) -> np.ndarray:
        return scorer.score(images=[p.images[0] for p in pairs], texts=[p.text for p in pairs]).raise_errors().overall

    ways = {str(p.value): lambda pairs=p.pairs: way(pairs) for p in points}
    for run in ways.values():
        run()  # compiles
    seconds = interleaved(ways | products.ways, repeats)
    return [seconds[str(p.value)] for p in points], products.best(seconds)


def draw(axes: Any, points: list[Point], seconds: list[Seconds], roof: float, label: str) -> None:
    """Pairs a second on the left, the share of a product's rate on the right."""
    values = [p.value for p in points]
    axes.plot(values, [len(p.pairs) / s.wall for p, s in zip(points, seconds, strict=True)], "o-", label="pairs/s")
    axes.set(xscale="log", xlabel=label, ylabel="pairs/s", xticks=values, xticklabels=values)
    axes.set_ylim(bottom=0)
    axes.minorticks_off()
    right = axes.twinx()
    shares = [p.asked.flops / s.wall / roof for p, s in zip(points, seconds, strict=True)]
    right.plot(values, shares, "s--", color="tab:orange", label="of products")
    right.set(ylim=(0, 1), ylabel="FLOP/s, share of a product's")
    axes.legend(handles=axes.lines + right.lines, loc="lower center")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, repeats=3)
    parser.add_argument("--images", type=int, default=8, help="pictures a turn")
    parser.add_argument("--texts", default="1,2,4,8,16", help="texts a picture")
    parser.add_argument("--words", default="10,30,100,300", help="words a text")
    parser.add_argument("--plot", type=Path, help="file of the picture")
    args = parser.parse_args()
    devices = start(args)
    size = size_of(args.size)
    texts, words = ([int(value) for value in given.split(",")] for given in (args.texts, args.words))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    with tempfile.TemporaryDirectory() as folder:
        workload = make_workload(Path(folder), size)
        scorer, products = workload.scorer(), Products(devices, size.dtype, size.products)
        by_texts = [point(workload, count, count, TEXT_WORDS, args.images) for count in texts]
        by_words = [point(workload, count, TEXTS, count, args.images) for count in words]
        for axes, points, label in ((left, by_texts, "texts an image"), (right, by_words, "words a text")):
            seconds, roof = measure(points, scorer, products, args.repeats)
            rows = [
                [
                    str(p.value),
                    f"{len(p.pairs) / s.wall:,.2f}",
                    f"{p.asked.tokens / s.wall:,.0f}",
                    f"{p.asked.filled:.0%}",
                    f"{p.asked.flops / s.wall / roof:.0%}",
                    f"{p.alone / p.asked.flops:.2f}x",
                ]
                for p, s in zip(points, seconds, strict=True)
            ]
            print(table([label, "pairs/s", "tokens/s", "filled", "of products", "alone"], rows), flush=True)
            draw(axes, points, seconds, roof, label)
    if args.plot:
        figure.suptitle(f"{args.size}, {size.dtype}, {devices.jax.device_kind}")
        figure.savefig(args.plot, dpi=120)
        print(f"saved {args.plot}")


if __name__ == "__main__":
    main()
