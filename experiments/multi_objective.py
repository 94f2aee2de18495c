"""Many objectives: a ridge head for each against a checklist of yes-no questions with learned weights.

  python -m experiments.multi_objective [--demo=demo_run] [--pairs=120] [--learned=240]

Both learn from the same rated pairs, and are judged on the same held-out ones, objective by objective. The checklist
(VisionReward's method; the package's questions) is asked of the base model, one prompt a question; its weights are
fitted to the preferences inside a picture. The heads read the state of one forward.
"""

import argparse
import time
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments.common import demo_of, keep, parser
from experiments.single_objective import asked
from multitap_jax.data.records import load_records
from multitap_jax.demo.texts import OBJECTIVES
from multitap_jax.display import TextTable
from multitap_jax.evaluation.baselines import Checklist, ChecklistWeights, Judge, preferences
from multitap_jax.evaluation.correlation import kendall_tau
from multitap_jax.scoring.scorer import Scorer
from multitap_jax.stage2 import RidgeHead


class Row(NamedTuple):
    """tau_c of an objective, by each method."""

    objective: str
    ridge: float
    checklist: float


class Costs(NamedTuple):
    """Seconds a pair, compilation left out, and the share of answers that were neither yes nor no."""

    ridge: float
    checklist: float
    unparsable: float


def measure(options: argparse.Namespace) -> tuple[list[Row], Costs]:
    """All objectives."""
    demo = demo_of(options)
    learned = load_records(demo.train).records[: options.learned]
    heldout = load_records(demo.heldout).records[: options.pairs]
    rated = [np.array([[r.ratings[name] for name in OBJECTIVES] for r in part], float) for part in (learned, heldout)]
    groups = [str(record.group) for record in learned]
    scorer, judge = Scorer.from_pretrained(demo.artefact), Judge.from_pretrained(demo.base, image_policy="square:84")
    checklist = Checklist.default()
    states, answers = scorer.embed(**asked(learned)).values, judge.checklist(**asked(learned))
    scorer.embed(**asked(heldout)), judge.checklist(**asked(heldout))  # compiles what the timed calls run
    start = time.perf_counter()
    seen = scorer.embed(**asked(heldout)).values
    middle = time.perf_counter()
    said = judge.checklist(**asked(heldout))
    end = time.perf_counter()
    predicted = RidgeHead().fit(states, rated[0], groups=groups).predict(seen)
    features, new = checklist.encode(answers.answer), checklist.encode(said.answer)
    rows = []
    for column, name in enumerate(OBJECTIVES):
        human = rated[1][:, column]
        wanted = preferences(rated[0][:, column].tolist(), groups)
        guess = ChecklistWeights.fit(checklist.features, features, wanted).score(new)
        rows.append(Row(name, kendall_tau(predicted[:, column], human, "c"), kendall_tau(guess, human, "c")))
    count = len(heldout)
    return rows, Costs((middle - start) / count, (end - middle) / count, said.unparsable / said.answer.size)


def table_of(rows: list[Row], costs: Costs) -> TextTable:
    """A row an objective, and the cost."""
    table = TextTable(title="tau_c with the ratings of held-out pairs")
    for name in ("", "ridge heads", "checklist"):
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        table.add_row(row.objective.replace("_", " "), _cell(row.ridge), _cell(row.checklist))
    table.add_section()
    table.add_row("ms a pair", f"{1e3 * costs.ridge:.1f}", f"{1e3 * costs.checklist:.1f}")
    table.add_row("answers neither yes nor no", "", f"{costs.unparsable:.0%}")
    return table


def _cell(tau: float) -> str:
    return "all equal" if np.isnan(tau) else f"{tau:.2f}"


def figure_of(rows: list[Row]) -> Figure:
    """Two bars an objective."""
    figure = Figure(figsize=(8, 1 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(rows))
    axes.barh(places - 0.2, np.nan_to_num([row.ridge for row in rows]), 0.38, label="ridge heads")
    axes.barh(places + 0.2, np.nan_to_num([row.checklist for row in rows]), 0.38, label="checklist")
    axes.set_yticks(places, [row.objective.replace("_", " ") for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="Kendall tau_c with the ratings")
    axes.legend(fontsize=8)
    return figure


def main() -> None:
    """Runs the experiment."""
    flags = parser(__doc__)
    flags.add_argument("--pairs", type=int, default=120, help="held-out pairs")
    flags.add_argument("--learned", type=int, default=240, help="training pairs of both methods")
    options = flags.parse_args()
    rows, costs = measure(options)
    numbers = {"rows": [row._asdict() for row in rows], "costs": costs._asdict()}
    keep("multi_objective", options, table_of(rows, costs), figure_of(rows), numbers)


if __name__ == "__main__":
    main()
