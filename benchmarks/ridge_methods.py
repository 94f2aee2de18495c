"""What ridge.py compares: the data, the methods, and one measurement of one method in a process of its own."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ALPHAS = np.logspace(0, 7, 20)


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
    # himalaya's kernel form has no intercept; centred in float64, or its float32 loses the outlier dimensions
    center, label_center = x.mean(0, dtype=np.float64), y.mean(0)
    left, right = (x - center).astype(np.float32), y - label_center
    if "Kernel" in method:
        model = kernel_ridge.KernelRidgeCV(ALPHAS, cv=5)
    else:
        model = ridge.RidgeCV(ALPHAS, cv=5)
    model.fit(left, right)
    return lambda new: np.asarray(model.predict((new - center).astype(np.float32))) + label_center, np.asarray(
        model.best_alphas_
    )


def measure(fit: Callable[[], object], repeats: int, budget: float = 120) -> tuple[object, dict[str, float]]:
    """(what the last call gave, figures): "first" and best "wall" seconds, "cpu" seconds, megabytes of rise.

    The first call compiles and starts thread pools; "wall", "cpu" and "memory" are of the later calls, if there are
    any: calls stop after `repeats`, or when they have taken `budget` seconds.
    """
    calls: list[tuple[float, float, float]] = []
    result = None
    while not calls or (len(calls) < repeats and sum(call[0] for call in calls) < budget):
        result = None  # what the call before held is not part of this one's memory
        with Memory() as memory:
            wall, cpu = time.perf_counter(), time.process_time()
            result = fit()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        calls.append((wall, cpu, memory.rise))
    later = calls[1:] or calls
    found = {"first": calls[0][0], "first memory": calls[0][2]}
    found |= {"wall": min(c[0] for c in later), "cpu": min(c[1] for c in later), "memory": max(c[2] for c in later)}
    return result, found


def child(method: str, folder: Path, repeats: int) -> None:
    """Fits one method and prints what was measured as JSON."""
    x = np.load(folder / "x.npy", mmap_mode="r" if method.startswith("ours") else None)
    y, new = np.load(folder / "y.npy"), np.load(folder / "new.npy")
    if method.startswith("ours"):
        import multitap_jax.stage2  # noqa: F401
    (predict, alphas), found = measure(lambda: fitted(method, x, y), repeats)
    np.save(folder / "predicted.npy", np.asarray(predict(new), np.float64))
    print(json.dumps(found | {"alphas": alphas.tolist()}))


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
