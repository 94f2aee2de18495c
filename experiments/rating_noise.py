"""Squared error, Huber or Bradley-Terry: which objective stands noisy ratings best?

  python -m experiments.rating_noise [--demo=demo_run] [--states=STORE] [--seeds=5]

The reward head is learned on frozen states with each objective of stage 1: same pairs, same start, same schedule,
several seeds. Noise is added to the ratings that are learned from; agreement is measured with the ratings as they are,
on held-out scenes: over all pairs (tau_c), and among the texts of one picture (accuracy, which is all that
Bradley-Terry is taught). States of the demo's checkpoint come from a backbone that squared error has shaped; those of
its base, which no rating has, are made by

  multitap embed --checkpoint=demo_run/untrained --input=demo_run/world/train.jsonl --output=demo_run/embeddings_base
"""

import argparse
import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from experiments.common import demo_of, keep, parser
from multitap_jax.data.records import load_records
from multitap_jax.display import TextTable
from multitap_jax.evaluation.correlation import kendall_tau
from multitap_jax.stage1.objective import bradley_terry, huber, squared_error
from multitap_jax.stage2 import EmbeddingStore

NOISES = (0.0, 0.1, 0.2, 0.4, 0.8)  # standard deviation, in units of a score from 0 to 1
STEPS, SCENES, RATE = 400, 48, 3e-2
Loss = Callable[[jax.Array, jax.Array], jax.Array]


class Data(NamedTuple):
    """States [G, K, H] and scores [G, K] of the texts of G scenes."""

    states: np.ndarray
    scores: np.ndarray


def scenes_of(options: argparse.Namespace) -> Data:
    """The demo's training pairs, scene by scene; scenes of another number of texts are left out."""
    demo = demo_of(options)
    store = EmbeddingStore(options.states or demo.embeddings)
    states, _, groups = store.load()
    score = {record.id: record.score for record in load_records(demo.train, need_images=False).records}
    members: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    size = statistics.mode(map(len, members.values()))
    rows = np.array([rows for rows in members.values() if len(rows) == size])
    scores = np.array([score[name] for name in store.ids], np.float32)
    states = (states - states.mean(0)) / states.std(0)
    return Data(states[rows], scores[rows])


def losses() -> Mapping[str, Loss]:
    """Mean loss of logits [G, K] against scores [G, K], by the sums of stage 1."""
    ones = lambda logits: jnp.ones(logits.shape, jnp.float32)
    mean = lambda sums: sums[0] / jnp.maximum(sums[1], 1.0)

    def compared(logits: jax.Array, scores: jax.Array) -> jax.Array:
        record = jnp.arange(logits.size).reshape(logits.shape)
        group = jnp.repeat(jnp.arange(logits.shape[0]), logits.shape[1])
        return mean(bradley_terry(logits, scores, ones(logits), record, group))

    return {
        "squared error": lambda logits, scores: mean(squared_error(logits, scores, ones(logits))),
        "Huber": lambda logits, scores: mean(huber(logits, scores, ones(logits), 0.1)),
        "Bradley-Terry": compared,
    }


def learner(loss: Loss) -> Callable[[np.ndarray, np.ndarray, int], np.ndarray]:
    """(states [G, K, H], scores [G, K], seed) -> weights [H] of a reward head; AdamW, batches of whole scenes."""
    optimizer = optax.adamw(optax.cosine_decay_schedule(RATE, STEPS), weight_decay=1e-4)

    @jax.jit
    def learn(states: jax.Array, scores: jax.Array, seed: int) -> jax.Array:
        def step(carry, key):  # type: ignore[no-untyped-def]
            params, state = carry
            batch = jax.random.choice(key, len(states), (min(SCENES, len(states)),), replace=False)
            objective = lambda p: loss(states[batch] @ p[0] + p[1], scores[batch])
            gradient = jax.grad(objective)(params)
            with jax.numpy_dtype_promotion("standard"):  # optax multiplies numbers of two kinds
                updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = (jnp.zeros(states.shape[-1]), jnp.zeros(()))
        keys = jax.random.split(jax.random.key(seed), STEPS)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0][0]

    return lambda states, scores, seed: np.asarray(learn(states, scores, seed))


def agreement(data: Data, weights: np.ndarray) -> tuple[float, float]:
    """tau_c over all pairs, and the share of a picture's untied pairs of texts that are ordered right."""
    found = data.states @ weights
    first, second = np.triu_indices(found.shape[1], 1)
    people, ours = (x[:, first] - x[:, second] for x in (data.scores, found))
    return kendall_tau(found.ravel(), data.scores.ravel(), "c"), float((people * ours > 0)[people != 0].mean())


class Row(NamedTuple):
    """One objective at one noise: mean and deviation over seeds."""

    objective: str
    noise: float
    tau: float
    tau_deviation: float
    accuracy: float
    accuracy_deviation: float


def measure(options: argparse.Namespace) -> list[Row]:
    """All objectives, noises and seeds; four scenes of five are learned from."""
    data = scenes_of(options)
    held = np.arange(len(data.scores)) % 5 == 0
    kept, rest = (Data(data.states[part], data.scores[part]) for part in (held, ~held))
    rows = []
    for name, loss in losses().items():
        learn = learner(loss)
        for noise in NOISES:
            found = []
            for seed in range(options.seed, options.seed + options.seeds):
                drawn = np.random.default_rng(seed).normal(0, noise, rest.scores.shape)
                noisy = np.clip(rest.scores + drawn, 0, 1).astype(np.float32)
                found.append(agreement(kept, learn(rest.states, noisy, seed)))
            (tau, accuracy), (tau_off, accuracy_off) = np.mean(found, 0), np.std(found, 0)
            rows.append(Row(name, noise, float(tau), float(tau_off), float(accuracy), float(accuracy_off)))
    return rows


def table_of(rows: list[Row], seeds: int) -> TextTable:
    """A row an objective and noise."""
    table = TextTable(title=f"Held-out agreement, mean and deviation of {seeds} seeds")
    for name in ("objective", "noise", "tau_c, all pairs", "right in a picture"):
        table.add_column(name, justify="left" if name == "objective" else "right")
    for row in rows:
        if row.noise == NOISES[0]:
            table.add_section()
        tau = f"{row.tau:.3f} ±{row.tau_deviation:.3f}"
        table.add_row(row.objective, f"{row.noise:g}", tau, f"{row.accuracy:.1%} ±{row.accuracy_deviation:.1%}")
    return table


def figure_of(rows: list[Row]) -> Figure:
    """Agreement over noise."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in dict.fromkeys(row.objective for row in rows):
        here = [row for row in rows if row.objective == name]
        noise = [row.noise for row in here]
        left.errorbar(noise, [r.tau for r in here], [r.tau_deviation for r in here], marker="o", label=name, capsize=2)
        accuracies = [r.accuracy for r in here], [r.accuracy_deviation for r in here]
        right.errorbar(noise, *accuracies, marker="o", label=name, capsize=2)
    left.set(xlabel="noise of the ratings learned from", ylabel="tau_c, all pairs")
    right.set(xlabel="noise of the ratings learned from", ylabel="pairs of one picture ordered right")
    left.legend(fontsize=8)
    return figure


def main() -> None:
    """Runs the experiment."""
    flags = parser(__doc__)
    flags.add_argument("--seeds", type=int, default=5)
    flags.add_argument("--states", help="embeddings of the demo's training pairs (default: of its checkpoint)")
    options = flags.parse_args()
    rows = measure(options)
    numbers = {"rows": [row._asdict() for row in rows]}
    keep(
        "rating_noise_states" if options.states else "rating_noise",
        options,
        table_of(rows, options.seeds),
        figure_of(rows),
        numbers,
    )


if __name__ == "__main__":
    main()
