"""Ridge heads here against scikit-learn and himalaya: same data, same 20 alphas, same two threads, one run.

  python benchmarks/ridge.py [--cases=eye4all,20k,100k,wide,million] [--threads=2] [--timeout=600] [--folder=/tmp/ridge]

Every method runs in a process of its own. Printed for each: wall time (best of the repeats; the first call of ours
also compiles), CPU time (what remains comparable on a machine that is not idle), rise of anonymous memory while it
fits, and the largest error of predictions of 2,000 unseen rows against float64 at the same alphas, in standard
deviations of the predictions. scikit-learn and himalaya hold X in memory before the clock starts; ours reads it from a
memory map. OpenBLAS may choose a kernel that is too old for the CPU; --coretype names a better one, for all.

  eye4all   1,580 x 3,584, 7 objectives        20k   20,000 x 1,536, 8       100k   100,000 x 1,536, 8
  wide      5,000 x 4,096, 64                   million   1,000,000 x 1,536, 8, bfloat16, streamed from disk

himalaya is no dependency of this project: pip install himalaya packaging. A rival that is not installed, or takes
longer than --timeout, is reported as such.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

CASES = {"eye4all": (1580, 3584, 7), "20k": (20_000, 1536, 8), "100k": (100_000, 1536, 8), "wide": (5000, 4096, 64)}
ALPHAS = np.logspace(0, 7, 20)
TEST_ROWS = 2000
STREAMED = (1_000_000, 1536, 8)
METHODS = {
    "ours gcv": ("eye4all", "20k", "100k", "wide"),
    "ours loo": ("eye4all", "20k", "100k", "wide"),
    "ours 5-fold": ("eye4all", "20k", "100k", "wide"),
    "sklearn Ridge f32, one alpha": ("eye4all", "20k", "100k", "wide"),
    "sklearn RidgeCV loo f64": ("eye4all", "20k", "100k", "wide"),
    "sklearn RidgeCV 5-fold f32, one alpha": ("eye4all", "20k"),
    "himalaya KernelRidgeCV 5-fold torch f32": ("eye4all", "wide"),
    "himalaya RidgeCV 5-fold torch f32": ("20k",),
}
RATIOS = {
    "ours gcv": ("sklearn Ridge f32, one alpha",),
    "ours loo": ("sklearn RidgeCV loo f64",),
    "ours 5-fold": (
        "sklearn RidgeCV 5-fold f32, one alpha",
        "himalaya KernelRidgeCV 5-fold torch f32",
        "himalaya RidgeCV 5-fold torch f32",
    ),
}


def make(n: int, d: int, t: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Embedding-like rows float32[n, d] and labels [n, t]: power-law spectrum, means, six dimensions of mean 300."""
    rng, rows = np.random.default_rng(0), np.random.default_rng(seed + 1)
    spread = np.arange(1, d + 1) ** -0.6
    turn = np.linalg.qr(rng.standard_normal((d, d), dtype=np.float32))[0]
    loading = (spread[:, None] * turn).astype(np.float32) * np.exp(0.5 * rng.standard_normal(d)).astype(np.float32)
    mean = 0.1 * rng.standard_normal(d).astype(np.float32)
    outliers = rng.choice(d, 6, replace=False)
    loading[:, outliers] *= 10 / np.linalg.norm(loading[:, outliers], axis=0)
    mean[outliers] = 300
    truth = rng.standard_normal((d, t)).astype(np.float32) * spread[:, None].astype(np.float32)
    truth /= np.linalg.norm(truth, axis=0)
    x, y = np.empty((n, d), np.float32), np.empty((n, t), np.float32)
    for start in range(0, n, 8192):
        latent = rows.standard_normal((min(8192, n - start), d), dtype=np.float32)
        x[start : start + 8192] = latent @ loading + mean
        noise = rows.standard_normal((len(latent), t), dtype=np.float32)
        y[start : start + 8192] = 0.7 * latent @ truth + 0.7 * noise + 3
    return x, y


class Memory:
    """Rise of this process's anonymous memory, sampled every 5 ms by a thread."""

    def __enter__(self) -> "Memory":
        self.start, self.peak, self._going = self.now(), 0, True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    @staticmethod
    def now() -> int:
        """Kilobytes."""
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))

    def _watch(self) -> None:
        while self._going:
            self.peak = max(self.peak, self.now())
            time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        self._going = False
        self._thread.join()

    @property
    def rise(self) -> float:
        """Megabytes."""
        return (self.peak - self.start) / 1024


def fitted(method: str, x: np.ndarray, y: np.ndarray) -> tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]:
    """(predict, the alphas chosen) of one method."""
    if method.startswith("ours"):
        from multitap_jax.stage2 import RidgeHead

        cv = {"gcv": "gcv", "loo": "loo", "5-fold": 5}[method.split()[1]]
        head = RidgeHead(ALPHAS, cv=cv, store_cv_predictions=False).fit(x, y)
        return head.predict, head.alpha_
    if method.startswith("sklearn"):
        from sklearn.linear_model import Ridge, RidgeCV

        if "RidgeCV loo" in method:
            model = RidgeCV(ALPHAS, alpha_per_target=True).fit(x.astype(np.float64), y.astype(np.float64))
        elif "5-fold" in method:
            model = RidgeCV(ALPHAS, cv=5).fit(x, y)
        else:
            model = Ridge(1e3, solver="cholesky").fit(x, y)
        alpha = getattr(model, "alpha_", 1e3)
        return model.predict, np.broadcast_to(alpha, y.shape[1]).astype(float)
    from himalaya import backend, kernel_ridge, ridge

    backend.set_backend("torch")
    center, label_center = (
        x.mean(0, dtype=float).astype(np.float32),
        y.mean(0),
    )  # himalaya's kernel form has no intercept
    if "Kernel" in method:
        model = kernel_ridge.KernelRidgeCV(ALPHAS, cv=5)
    else:
        model = ridge.RidgeCV(ALPHAS, cv=5)
    model.fit(x - center, y - label_center)
    return lambda new: np.asarray(model.predict(new - center)) + label_center, np.asarray(model.best_alphas_)


def child(method: str, folder: Path, repeats: int) -> None:
    """Fits one method and prints what was measured as JSON."""
    x = np.load(folder / "x.npy", mmap_mode="r" if method.startswith("ours") else None)
    y, new = np.load(folder / "y.npy"), np.load(folder / "new.npy")
    if method.startswith("ours"):
        import multitap_jax.stage2  # noqa: F401
    walls, cpus, rises = [], [], []
    for _ in range(repeats):
        with Memory() as memory:
            wall, cpu = time.perf_counter(), time.process_time()
            predict, alphas = fitted(method, x, y)
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
        rises.append(memory.rise)
        if sum(walls) > 120:
            break
    np.save(folder / "predicted.npy", np.asarray(predict(new), np.float64))
    found = {"wall": min(walls), "first": walls[0], "cpu": min(cpus), "memory": max(rises), "alphas": alphas.tolist()}
    print(json.dumps(found))


class Reference:
    """Float64 predictions at any alphas, by one eigendecomposition of the smaller side."""

    def __init__(self, x: np.ndarray, y: np.ndarray, new: np.ndarray) -> None:
        n, d = x.shape
        self.label_mean = y.mean(0, dtype=np.float64)
        labels, mean = y - self.label_mean, x.mean(0, dtype=np.float64)
        rows = new - mean
        if n < d:
            wide = x - mean
            values, vectors = np.linalg.eigh(wide @ wide.T)
            self._left, self._right = (rows @ wide.T) @ vectors, vectors.T @ labels
        else:
            gram, cross = np.zeros((d, d)), np.zeros((d, y.shape[1]))
            for start in range(0, n, 8192):
                wide = x[start : start + 8192] - mean
                gram += wide.T @ wide
                cross += wide.T @ labels[start : start + 8192]
            values, vectors = np.linalg.eigh(gram)
            self._left, self._right = rows @ vectors, vectors.T @ cross
        self._values = np.maximum(values, 0)

    def __call__(self, alphas: np.ndarray) -> np.ndarray:
        return self._left @ (self._right / (self._values[:, None] + alphas[None, :])) + self.label_mean


def run_case(name: str, arguments: argparse.Namespace, environment: dict[str, str]) -> None:
    """All methods of one size, and the ratios."""
    n, d, t = CASES[name]
    folder = Path(arguments.folder) / name
    folder.mkdir(parents=True, exist_ok=True)
    x, y = make(n + TEST_ROWS, d, t)
    for key, value in (("x", x[:n]), ("y", y[:n]), ("new", x[n:])):
        np.save(folder / f"{key}.npy", value)
    reference = Reference(x[:n], y[:n], x[n:])
    del x
    print(f"\n{name}: n={n:,} d={d:,} T={t}", flush=True)
    print(f"{'':40}{'wall s':>9}{'first':>9}{'CPU s':>9}{'MB':>8}{'error':>10}", flush=True)
    found = {}
    for method in [m for m, cases in METHODS.items() if name in cases]:
        command = [sys.executable, __file__, "--child", method, "--folder", str(folder)]
        repeats = "3" if method.startswith("ours") or n < 2000 or "Ridge f32" in method else "1"
        try:
            done = subprocess.run(
                [*command, "--repeats", repeats],
                env=environment, capture_output=True, text=True, timeout=arguments.timeout,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            print(f"{method:40} more than {arguments.timeout} s", flush=True)
            continue
        if done.returncode:
            print(f"{method:40} failed: {done.stderr.strip().splitlines()[-1][:150]}", flush=True)
            continue
        result = found[method] = json.loads(done.stdout.splitlines()[-1])
        predicted = np.load(folder / "predicted.npy")
        exact = reference(np.array(result["alphas"]))
        result["error"] = float((np.abs(predicted - exact).max(0) / exact.std(0)).max())
        row = f"{result['wall']:9.2f}{result['first']:9.2f}{result['cpu']:9.2f}{result['memory']:8.0f}"
        print(f"{method:40}{row}{result['error']:10.1e}", flush=True)
    for own, rivals in RATIOS.items():
        for rival in rivals:
            if own in found and rival in found:
                wall, cpu = (found[rival][key] / found[own][key] for key in ("wall", "cpu"))
                print(f"  {rival} / {own}: {wall:.2f}x wall, {cpu:.2f}x CPU", flush=True)


def stream(folder: Path) -> None:
    """A million rows from disk: rows a second, and memory at a quarter and at the end."""
    import jax

    from multitap_jax.stage2 import EmbeddingStore, EmbeddingWriter, RidgeHead

    n, d, t = STREAMED
    block = 8192
    x, y = make(2 * block, d, t)
    settings = {"hidden_size": d, "objectives": [f"o{i}" for i in range(t)], "model_hash": "m", "total": n}
    with EmbeddingWriter.open_or_resume(folder, **settings, dtype="bfloat16", shard_rows=block) as writer:
        rng = np.random.default_rng(0)
        while writer.rows_done < n:
            order = rng.permutation(len(x))[: min(block, n - writer.rows_done)]
            names = [str(writer.rows_done + i) for i in range(len(order))]
            writer.append(names, x[order], y[order], names)
    del x
    chunk = jax.numpy.ones((2048, d))
    product = jax.jit(lambda a: jax.numpy.dot(a.T, a, precision="highest"))
    product(chunk).block_until_ready()
    best = np.inf
    for _ in range(10):
        start = time.perf_counter()
        product(chunk).block_until_ready()
        best = min(best, time.perf_counter() - start)
    store, marks = EmbeddingStore(folder), []

    class Watched:
        """The store's batches; notes the memory on the way."""

        def __iter__(self):
            for number, batch in enumerate(store.batches()):
                if number in (n // 8192, n // 2048 - 2):
                    marks.append(Memory.now() / 1024)
                yield batch

    for label in ("first", "again"):
        with Memory() as memory:
            wall, cpu = time.perf_counter(), time.process_time()
            head = RidgeHead(ALPHAS, cv="gcv", refine=False).fit_stream(iter(Watched()))
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        checked = "with" if label == "first" else "without"
        print(
            f"{label}: {wall:.1f} s wall, {cpu:.1f} s CPU, {n / wall:,.0f} rows/s, {checked} checksums; rise "
            f"{memory.rise:.0f} MB; anonymous memory at a quarter and at the end {marks[-2]:.0f} and {marks[-1]:.0f} MB"
        )
    print(f"a plain jitted x.T @ x over as many rows: {best * n / 2048:.1f} s; R2 {head.r2_.mean():.3f}", flush=True)


def main() -> None:
    """Runs the cases."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", default="eye4all,20k,100k,wide,million")
    parser.add_argument("--threads", default="2")
    parser.add_argument("--timeout", type=float, default=600)
    parser.add_argument("--coretype", default="")
    parser.add_argument("--folder", default="/tmp/ridge")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--child")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, Path(arguments.folder), arguments.repeats)
        return
    environment = {**os.environ, "OMP_NUM_THREADS": arguments.threads, "OPENBLAS_NUM_THREADS": arguments.threads}
    if arguments.coretype:
        environment["OPENBLAS_CORETYPE"] = arguments.coretype
    print(f"load of the machine at the start: {os.getloadavg()[0]:.1f}", flush=True)
    for name in arguments.cases.split(","):
        if name in CASES:
            run_case(name, arguments, environment)
            continue
        print(f"\nmillion: {STREAMED}", flush=True)
        code = f"import pathlib, benchmarks.ridge as r; r.stream(pathlib.Path({arguments.folder!r}) / 'million')"
        subprocess.run([sys.executable, "-c", code], env=environment, cwd=Path(__file__).parents[1], check=True)
    print(f"\nload of the machine at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
