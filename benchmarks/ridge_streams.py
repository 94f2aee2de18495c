"""What ridge.py measures within one process: the update alone, a stream from disk, and a stage 1 as ArmoRM's."""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ridge_methods import ALPHAS, Memory, make, measure

STREAMED = (1_000_000, 1536, 8)
BLOCK = 8192
ARMO = (24_000, 1024)
ARMO_SOURCES = ((5, 0.07), (5, 0.45), (1, 0.20), (1, 0.08), (1, 0.05), (1, 0.03), (5, 0.12))  # (targets, share of rows)
ARMO_ALPHAS = np.logspace(-4, 4, 9)


def best_of(calls: Mapping[str, Callable[[], Any]], rounds: int = 15) -> dict[str, float]:
    """Best seconds of each call, taken in turns so that all of them meet the same machine."""
    best = dict.fromkeys(calls, np.inf)
    for _ in range(rounds + 1):  # the first round compiles
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def update_calls(rows: int, d: int, t: int) -> dict[str, Callable[[], Any]]:
    """The whole update of the moments, its products alone, a plain x.T @ x by JAX, and NumPy's (a half product)."""
    import jax

    from multitap_jax.stage2 import moments as mm

    x, y = make(rows, d, t)
    weight, on_device = np.ones(rows, np.float32), jax.numpy.asarray(x)
    state = [mm.init(d, t, x.mean(0), y.mean(0))]
    slabs, size, _ = state[0].hi.shape
    columns = jax.jit(mm.augmented, static_argnums=(4, 5))(state[0], x, y, weight, slabs, size)
    product = jax.jit(lambda a: jax.numpy.dot(a.T, a, precision="highest"))
    halves = jax.jit(mm.slab_products, static_argnums=(1, 2))

    def update() -> None:
        state[0] = jax.block_until_ready(mm.update(state[0], x, y, weight))

    return {
        "update": update,
        "its products alone": lambda: halves(columns, 0, slabs).block_until_ready(),
        "plain x.T @ x": lambda: product(on_device).block_until_ready(),
        "numpy x.T @ x": lambda: x.T @ x,
    }


def gram() -> None:
    """The update of the moments against plain products of the same rows."""
    for d, t in ((1536, 8), (3584, 7)):
        best = best_of(update_calls(2048, d, t))
        rates = ", ".join(f"{name} {2 * 2048 * d**2 / seconds / 1e9:.0f}" for name, seconds in best.items())
        print(f"2,048 x {d}: 2 n d^2 / time in GFLOP/s: {rates}")
        ratios = [best[name] / best["update"] for name in ("plain x.T @ x", "numpy x.T @ x")]
        print(f"  update: {ratios[0]:.2f}x the plain product, {ratios[1]:.2f}x NumPy's", flush=True)


def million(folder: Path) -> None:
    """A million rows from disk: rows a second, memory at a quarter and at the end, and the floor of the products."""
    from multitap_jax.stage2 import EmbeddingStore, EmbeddingWriter, RidgeHead

    n, d, t = STREAMED
    x, y = make(2 * BLOCK, d, t)
    settings = {"hidden_size": d, "objectives": [f"o{i}" for i in range(t)], "model_hash": "m", "total": n}
    with EmbeddingWriter.open_or_resume(folder, **settings, dtype="bfloat16", shard_rows=BLOCK) as writer:
        rng = np.random.default_rng(0)
        while writer.rows_done < n:
            order = rng.permutation(len(x))[: min(BLOCK, n - writer.rows_done)]
            names = [str(writer.rows_done + i) for i in range(len(order))]
            writer.append(names, x[order], y[order], names)
    del x
    marks: list[float] = []

    class Watched(EmbeddingStore):
        """Notes the memory on the way."""

        def batches(self, *arguments: Any, **options: Any) -> Iterator[Any]:
            for number, batch in enumerate(super().batches(*arguments, **options)):
                if number in (n // 8192, n // 2048 - 2):
                    marks.append(Memory.now() / 1024)
                yield batch

    store, wall = Watched(folder), 0.0
    for label in ("with", "without"):
        head, found = measure(lambda: RidgeHead(ALPHAS, cv="gcv", refine=False).fit_store(store), 1)
        wall = found["wall"]
        print(
            f"{wall:.1f} s wall, {found['cpu']:.1f} s CPU, {n / wall:,.0f} rows/s, {label} checksums; rise "
            f"{found['memory']:.0f} MB; anonymous memory at a quarter and at the end {marks[-2]:.0f} and "
            f"{marks[-1]:.0f} MB; R2 {head.r2_.mean():.3f}",
            flush=True,
        )
    calls = update_calls(2048, d, t)
    del calls["numpy x.T @ x"]
    for name, seconds in best_of(calls).items():
        print(f"  {name}, as many rows: {seconds * n / 2048:.1f} s; the stream takes {wall / seconds / n * 2048:.2f}x")


def armo() -> None:
    """19 objectives of 7 sources, each rated in its own source only, no intercept: one Ridge an alpha and objective
    on 80 % of the rows, chosen on the rest, as ArmoRM does it, against one fit of all of them on all rows."""
    from sklearn.linear_model import Ridge

    from multitap_jax.stage2 import RidgeHead

    n, d = ARMO
    counts = [count for count, _ in ARMO_SOURCES]
    x, y = make(n, d, sum(counts))
    rng = np.random.default_rng(0)
    source = rng.choice(len(counts), n, p=[share for _, share in ARMO_SOURCES])
    y[np.repeat(np.arange(len(counts)), counts)[None, :] != source[:, None]] = np.nan
    held_out = rng.random(n) < 0.2

    def theirs() -> np.ndarray:
        chosen = []
        for column in y.T:
            train, test = ~np.isnan(column) & ~held_out, ~np.isnan(column) & held_out
            inside, labels, outside = x[train], column[train], x[test]
            losses = []
            for alpha in ARMO_ALPHAS:
                model = Ridge(alpha=alpha, fit_intercept=False).fit(inside, labels)
                losses.append(np.mean((model.predict(outside) - column[test]) ** 2))
            chosen.append(ARMO_ALPHAS[int(np.argmin(losses))])
            Ridge(alpha=chosen[-1], fit_intercept=False).fit(inside, labels)
        return np.array(chosen)

    with warnings.catch_warnings(action="ignore"):  # nearly singular systems at the smallest alphas: theirs by design
        alphas, rival = measure(theirs, 1)
    print(f"one fit an alpha and objective: {rival['wall']:.2f} s wall, {rival['cpu']:.2f} s CPU", flush=True)
    for cv in ("gcv", 5):
        settings = {"cv": cv, "fit_intercept": False, "store_cv_predictions": False}
        head, own = measure(lambda: RidgeHead(ARMO_ALPHAS, **settings).fit(x, y), 3)  # noqa: B023
        print(
            f"ours, {cv if cv == 'gcv' else '5-fold'}: {own['wall']:.2f} s wall (first {own['first']:.2f}), "
            f"{own['cpu']:.2f} s CPU, rise {own['memory']:.0f} MB; {rival['wall'] / own['wall']:.1f}x wall, "
            f"{rival['cpu'] / own['cpu']:.1f}x CPU; same alpha for {np.sum(head.alpha_ == alphas)} of {len(alphas)}",
            flush=True,
        )
