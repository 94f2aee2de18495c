"""How far can anything agree with people? Rater agreement bounds the reachable Kendall tau.

  python -m experiments.noise_ceiling                                       # the demo's world, whose truth is known
  python -m experiments.noise_ceiling --input=FOLDER --ratings=expert_1,expert_2,expert_3 [--scores=scores.jsonl]

The second form takes records with the ratings of several people, such as those that `multitap convert
--dataset=flickr8k-expert` writes, and, with --scores, says how much of the reachable a scorer reaches.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments.common import demo_of, keep, parser
from multitap_jax.data.records import load_records
from multitap_jax.demo.scenes import draw_scene, scene_rng
from multitap_jax.demo.texts import ANNOTATOR_NOISE, rule_ratings, write_texts
from multitap_jax.demo.world import scene_index
from multitap_jax.display import TextTable
from multitap_jax.evaluation.ceiling import Ceiling, noise_ceiling
from multitap_jax.evaluation.correlation import kendall_tau, pearson
from multitap_jax.evaluation.scores import read_scores

RATERS = (2, 3, 5, 10)
NOISES = (ANNOTATOR_NOISE, 1.0, 2.0)


class Case(NamedTuple):
    """A set of ratings, its ceiling, and how a scorer (the truth, where it is known) stands below it."""

    name: str
    ceiling: Ceiling
    judged: str
    tau_single: float | None
    pearson_mean: float | None


def judged(name: str, ratings: np.ndarray, by: str, scores: np.ndarray | None) -> Case:
    """Compares scores[N] with ratings[N, R], singly (tau) and by their mean (Pearson); None compares nothing."""
    if scores is None:
        return Case(name, noise_ceiling(ratings), by, None, None)
    tau = kendall_tau(np.repeat(scores, ratings.shape[1]), ratings.ravel(), "c")
    return Case(name, noise_ceiling(ratings), by, tau, pearson(scores, ratings.mean(1)))


def drawn_raters(options: argparse.Namespace) -> list[Case]:
    """Raters of the held-out texts, more or fewer and more or less noisy; the truth is the rule they start from."""
    records = load_records(demo_of(options).heldout).records
    truth = []
    for index in dict.fromkeys(map(scene_index, records)):
        scene, rng = draw_scene(scene_rng(0, index, 0)), scene_rng(0, index, 2)
        truth += [rule_ratings(scene, guidance)["overall"] for guidance in write_texts(scene, rng)]
    overall, rng = np.array(truth), np.random.default_rng(options.seed)
    cases = []
    for noise in NOISES:
        for raters in RATERS:
            said = overall[:, None] + rng.normal(0, noise, (len(overall), raters))
            ratings = np.clip(np.rint(said), 1, 5)
            cases.append(judged(f"{raters} raters, noise {noise:g}", ratings, "the truth", overall))
    return cases


def real_raters(options: argparse.Namespace) -> list[Case]:
    """Ratings that people gave, and the scorer of --scores, if there is one."""
    records = load_records(options.input, need_images=False).records
    names = options.ratings.split(",")
    rated = [r for r in records if all(r.ratings.get(name) is not None for name in names)]
    if len(rated) < 2:
        raise SystemExit(f"{options.input}: {len(rated)} of {len(records)} records have all of {', '.join(names)}")
    ratings = np.array([[r.ratings[name] for name in names] for r in rated], np.float64)
    if not options.scores:
        return [judged(Path(options.input).name, ratings, "no scorer", None)]
    scores = dict(zip((r.id for r in records), read_scores(options.scores, records), strict=True))
    return [
        judged(Path(options.input).name, ratings, Path(options.scores).name, np.array([scores[r.id] for r in rated]))
    ]


def table_of(cases: list[Case]) -> TextTable:
    """A row a case."""
    table = TextTable(title="What rater agreement allows (tau_c; Pearson of the mean rating)")
    scorer = cases[0].judged
    heads = ("", "pairs", "one rater", "mean of raters", f"{scorer}, tau_c", "Pearson bound", f"{scorer}, Pearson")
    for name in heads:
        table.add_column(name, justify="left" if not name else "right", no_wrap=not name)
    for case in cases:
        found = case.ceiling
        cells = (found.one_rater, found.mean_of_raters, case.tau_single, found.pearson, case.pearson_mean)
        table.add_row(case.name, f"{found.n:,}", *("-" if cell is None else f"{cell:.3f}" for cell in cells))
    return table


def figure_of(cases: list[Case]) -> Figure:
    """Ceilings and what is reached, side by side."""
    figure = Figure(figsize=(8, 1.5 + 0.45 * len(cases)), layout="constrained")
    axes = figure.subplots()
    marks: Mapping[str, tuple[str, list[float]]] = {
        "one rater with the others": ("o", [case.ceiling.one_rater for case in cases]),
        "mean of all raters": ("|", [case.ceiling.mean_of_raters for case in cases]),
        cases[0].judged: ("D", [np.nan if case.tau_single is None else case.tau_single for case in cases]),
    }
    for row, case in enumerate(cases):
        axes.barh(row, case.ceiling.mean_of_raters, color="tab:blue", alpha=0.15)
    for name, (mark, values) in marks.items():
        axes.plot(values, range(len(cases)), mark, label=name, markersize=9, linestyle="none")
    axes.set_yticks(range(len(cases)), [case.name for case in cases])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="Kendall tau_c with the single ratings")
    figure.legend(loc="outside lower center", ncols=len(marks), fontsize=8)
    return figure


def main() -> None:
    """Runs the experiment."""
    flags = parser(__doc__)
    flags.add_argument("--input", help="records with the ratings of several people")
    flags.add_argument("--ratings", default="expert_1,expert_2,expert_3", help="their names, one a rater")
    flags.add_argument("--scores", help="a scorer's scores of these records")
    options = flags.parse_args()
    cases = real_raters(options) if options.input else drawn_raters(options)
    numbers = [{**case._asdict(), "ceiling": dataclasses.asdict(case.ceiling)} for case in cases]
    name = "noise_ceiling_real" if options.input else "noise_ceiling"
    keep(name, options, table_of(cases), figure_of(cases), {"cases": numbers})


if __name__ == "__main__":
    main()
