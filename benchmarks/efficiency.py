"""What one forward saves against the rivals that generate: time and memory a pair, same backbone and machine, one run.

  python benchmarks/efficiency.py [--models=3M,17M,47M] [--vary=texts,words,single,many] [--pairs=4] [--repeats=3]

A score is one forward (`Scorer.score`). The rivals are those of `multitap_jax.evaluation.baselines`, on the same random
weights, in float32, from decoded pictures of 560 x 560 (400 image tokens):

  verdict    64 tokens after LLaVA-Critic's prompt, written with a cache, all pairs at once; never ended early
  checklist  the 30 yes-no questions of the package, packed: a picture and its text are looked at once
  question   one of them alone; 30 of these are what VisionReward does, which asks each in a pass of its own
  P(yes)     VQAScore's question, one forward          number     G-VEval's expectation over number tokens, one forward

Both sides share prefixes, pack rows and take the same attention; all programs are compiled before the clock starts, and
ways take turns. Printed for each: CPU and wall milliseconds a pair (medians), how many times the forward's that is, and
the memory of its largest program besides weights and batch (XLA's count). Varied one at a time: texts a picture, words
a text, pairs at a time, and the size of the model.
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from measuring import Seconds, interleaved  # beside this file
from workload import SIDE, WORDS, make_model, make_pairs, qwen2_vl, write_base

import multitap_jax.evaluation.baselines.judge as judge_module
import multitap_jax.scoring.scorer as scorer_module
from multitap_jax import Scorer
from multitap_jax.data.processing import Contract
from multitap_jax.data.stream import Pair
from multitap_jax.evaluation.baselines import Checklist, Judge, Question
from multitap_jax.evaluation.baselines.prompts import CHECK, NUMBER, VERDICT, YES_NO
from multitap_jax.families import num_params
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.weights.hub import save_backbone

VOCABULARY = 32000
# hidden size, layers, heads of the decoder; size, layers of the tower
MODELS = {"3M": (80, 4, 2, 64, 2), "17M": (288, 6, 4, 160, 4), "47M": (512, 8, 8, 256, 6)}


@dataclass(frozen=True)
class Case:
    """What is varied: texts a picture, words a text, pairs at a time."""

    texts: int = 1
    words: int = 30
    pairs: int = 4

    def __str__(self) -> str:
        return f"{self.texts} text(s) a picture, {self.words} words a text, {self.pairs} pair(s) at a time"


def build(folder: Path, size: str) -> tuple[Scorer, Judge, int]:
    """A random model of this size as an artefact, opened as a score and as a judge; and its parameters."""
    hidden, layers, heads, vision, blocks = MODELS[size]
    questions = [question.text for question in Checklist.default().questions]
    corpus = [*WORDS, VERDICT, YES_NO, NUMBER, CHECK, *questions, *["Yes", "No", "yes", "no", *"0123456789"] * 9]
    entries = qwen2_vl(hidden, layers, heads, 3 * hidden, vision, blocks, VOCABULARY) | {"tie_word_embeddings": True}
    base = folder / "base"
    # A vocabulary of whole words, about as published tokenizers have them.
    model = make_model(write_base(base, entries, corpus, 2048), "float32")
    save_backbone(model.backbone, base)
    Artefact.save(folder / "artefact", model, base=base, contract=Contract(image_policy=f"square:{SIDE}"))
    judge = Judge.from_pretrained(folder / "artefact")
    judge.stop = ()  # random weights may end anywhere
    return Scorer.from_pretrained(folder / "artefact"), judge, num_params(model.backbone)


def ways(scorer: Scorer, judge: Judge, pairs: list[Pair], new_tokens: int) -> dict[str, Callable[[], Any]]:
    """Every way to judge these pairs, by name."""
    given: dict[str, Any] = {"images": [p.images[0] for p in pairs], "texts": [p.text for p in pairs]}
    checklist = Checklist.default()
    single = Checklist((Question("alone", checklist.questions[0].text),))
    return {
        "forward": lambda: scorer.score(**given).raise_errors(),
        "verdict": lambda: judge.verdicts(**given, max_new_tokens=new_tokens),
        "checklist": lambda: judge.checklist(**given, checklist=checklist),
        "question": lambda: judge.checklist(**given, checklist=single),
        "P(yes)": lambda: judge.p_yes(**given),
        "number": lambda: judge.expected_score(**given),
    }


Call = tuple[Any, tuple[Any, ...], dict[str, Any]]  # a compiled function and what it was called with
PROGRAMS = ((scorer_module, "forward"), (judge_module, "greedy"), (judge_module, "first_tokens"))


def spied(program: Any, calls: list[Call]) -> Callable[..., Any]:
    """The same function, which writes down how it is called."""

    def call(*args: Any, **options: Any) -> Any:
        calls.append((program, args, options))
        return program(*args, **options)

    return call


def temporaries(found: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Megabytes that the largest program of each way holds besides weights and batch, by XLA's own count."""
    out = {}
    for name, way in found.items():
        calls: list[Call] = []
        with contextlib.ExitStack() as stack:
            for module, program in PROGRAMS:
                stack.enter_context(mock.patch.object(module, program, spied(getattr(module, program), calls)))
            way()
        compiled = [program.lower(*args, **options).compile() for program, args, options in calls]
        out[name] = max(program.memory_analysis().temp_size_in_bytes for program in compiled) / 1e6
    return out


def report(size: str, case: Case, seconds: dict[str, Seconds], memory: dict[str, float]) -> None:
    print(f"\n{size}, {case}")
    base = seconds["forward"]
    for name, (wall, cpu) in seconds.items():
        ratio = "" if name == "forward" else f"{cpu / base.cpu:7.1f}x CPU {wall / base.wall:7.1f}x wall"
        rise = f"{memory[name]:6.0f} MB" if name in memory else ""
        print(f"  {name:10} {1e3 * cpu / case.pairs:9.1f} ms CPU {1e3 * wall / case.pairs:9.1f} ms {rise:9} {ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4, help="pairs at a time, but where they are varied")
    parser.add_argument("--repeats", type=int, default=3, help="timed turns; the median counts")
    parser.add_argument("--models", default=",".join(MODELS), help="sizes, the last one is varied")
    parser.add_argument("--vary", default="texts,words,single,many", help="of the last size; empty: nothing")
    parser.add_argument("--new-tokens", type=int, default=64, help="length of a verdict")
    args = parser.parse_args()
    sizes, largest = args.models.split(","), args.models.split(",")[-1]
    plain = Case(pairs=args.pairs)
    varied = {
        "texts": Case(texts=6, pairs=6),
        "words": Case(words=90, pairs=args.pairs),
        "single": Case(pairs=1),
        "many": Case(pairs=4 * args.pairs),
    }
    growth = {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            scorer, judge, parameters = build(Path(folder), size)
            print(f"\n{size}: {parameters / 1e6:.1f} M parameters")
            names = args.vary.split(",") if size == largest and args.vary else []
            cases = [plain, *(varied[name] for name in names)]
            found = []
            for case in cases:
                pairs = make_pairs(case.pairs // case.texts, case.texts, np.random.default_rng(0), case.words)
                found.append(ways(scorer, judge, pairs, args.new_tokens))
            memory = [temporaries(found[0])] if size == largest else []
            for case, ways_of, rise in zip(cases, found, memory + [{}] * len(cases), strict=False):
                for way in ways_of.values():
                    way()  # compiles
                seconds = interleaved(ways_of, args.repeats)
                report(size, case, seconds, rise)
                sys.stdout.flush()
                growth.setdefault(size, seconds)
    print("\ntimes the CPU time of a forward, as the model grows")
    for label, name, times in (
        ("verdict", "verdict", 1),
        ("checklist", "checklist", 1),
        ("30 questions", "question", 30),
    ):
        ratios = {size: times * seconds[name].cpu / seconds["forward"].cpu for size, seconds in growth.items()}
        print(f"  {label:12} " + "  ".join(f"{size} {ratio:6.1f}x" for size, ratio in ratios.items()))


if __name__ == "__main__":
    main()
