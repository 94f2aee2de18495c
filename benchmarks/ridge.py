"""Ridge heads here against scikit-learn and himalaya: same data, same 20 alphas, same threads, one run.

  python benchmarks/ridge.py                      # everything; at most 25 minutes
  python benchmarks/ridge.py --cases=gram,20k --threads=2 --timeout=200 --minutes=25 --folder=/tmp/ridge

Every method runs in a process of its own, on as many cores as --threads says. Printed for each: wall time, CPU time
(what remains comparable on a machine that is not idle) and rise of anonymous memory of the best of the later fits, the
same of the first fit, which also compiles and starts thread pools, and the largest error of predictions of 2,000 unseen
rows against float64 at the same alphas, in standard deviations of the predictions. Rivals hold X in memory before the
clock starts, converted and centred as they need it; ours reads it from a memory map. Slow rivals are fitted once. A
rival that is not installed, or takes longer than --timeout, or is not done after --minutes in all, is reported as such.

  gram      the update of the moments against plain products of the same rows, taken in turns
  eye4all   1,580 x 3,584, 7 objectives        20k   20,000 x 1,536, 8       100k   100,000 x 1,536, 8
  wide      5,000 x 4,096, 64                  million   1,000,000 x 1,536, 8, bfloat16, streamed from disk
  armo      24,000 x 1,024, 19 objectives of 7 sources, no intercept: ArmoRM's stage 1

himalaya is no dependency of this project: pip install --no-deps --target=FOLDER himalaya packaging, and FOLDER on
PYTHONPATH. OpenBLAS takes AVX2 kernels on some CPUs that know AVX-512; --coretype=auto names the better ones, for all.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import ridge_streams  # noqa: E402
from benchmarks.ridge_methods import Reference, child, make  # noqa: E402

CASES = {"eye4all": (1580, 3584, 7), "20k": (20_000, 1536, 8), "100k": (100_000, 1536, 8), "wide": (5000, 4096, 64)}
STREAMS = ("gram", "million", "armo")
TEST_ROWS = 2000
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


class Clock:
    """What is left of the time for the whole run."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._end = time.monotonic() + 60 * arguments.minutes
        self._limit = arguments.timeout

    @property
    def left(self) -> float:
        """Seconds that are left of all."""
        return self._end - time.monotonic()

    @property
    def limit(self) -> float:
        """Seconds that the next method may take."""
        return min(self._limit, self.left)


def attempt(method: str, command: list[str], environment: dict[str, str], clock: Clock) -> str | None:
    """The last line that a method's process printed; None, and a line that says why, if there is none."""
    limit = clock.limit
    if limit < 5:
        print(f"{method:40} not run: the time is up", flush=True)
        return None
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit, cwd=ROOT)
    except subprocess.TimeoutExpired:
        print(f"{method:40} more than {limit:.0f} s", flush=True)
        return None
    if done.returncode:
        print(f"{method:40} failed: {done.stderr.strip().splitlines()[-1][:150]}", flush=True)
        return None
    return done.stdout.splitlines()[-1]


def run_case(name: str, folder: Path, environment: dict[str, str], clock: Clock) -> None:
    """All methods of one size, and the ratios."""
    n, d, t = CASES[name]
    folder.mkdir(parents=True, exist_ok=True)
    x, y = make(n + TEST_ROWS, d, t)
    for key, value in (("x", x[:n]), ("y", y[:n]), ("new", x[n:])):
        np.save(folder / f"{key}.npy", value)
    reference = Reference(x[:n], y[:n], x[n:])
    del x
    print(f"\n{name}: n={n:,} d={d:,} T={t}", flush=True)
    print(f"{'':40}{'wall s':>9}{'CPU s':>9}{'MB':>7}{'first s':>9}{'MB':>7}{'error':>10}", flush=True)
    found = {}
    for method in [m for m, cases in METHODS.items() if name in cases]:
        repeats = "4" if method.startswith("ours") or n < 2000 or "Ridge f32" in method else "1"
        command = [sys.executable, __file__, "--child", method, "--folder", str(folder), "--repeats", repeats]
        line = attempt(method, command, environment, clock)
        if line is None:
            continue
        result = found[method] = json.loads(line)
        predicted = np.load(folder / "predicted.npy")
        exact = reference(np.array(result["alphas"]))
        error = float((np.abs(predicted - exact).max(0) / exact.std(0)).max())
        row = f"{result['wall']:9.2f}{result['cpu']:9.2f}{result['memory']:7.0f}"
        row += f"{result['first']:9.2f}{result['first memory']:7.0f}"
        print(f"{method:40}{row}{error:10.1e}", flush=True)
    for own, rivals in RATIOS.items():
        for rival in rivals:
            if own in found and rival in found:
                wall, cpu = (found[rival][key] / found[own][key] for key in ("wall", "cpu"))
                print(f"  {rival} / {own}: {wall:.2f}x wall, {cpu:.2f}x CPU", flush=True)


def kernels(coretype: str) -> dict[str, str]:
    """The variable that makes OpenBLAS use AVX-512 kernels wherever the CPU knows it."""
    if coretype != "auto":
        return {"OPENBLAS_CORETYPE": coretype} if coretype else {}
    return {"OPENBLAS_CORETYPE": "SKYLAKEX"} if "avx512f" in Path("/proc/cpuinfo").read_text() else {}


def main() -> None:
    """Runs the cases."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", default="gram,eye4all,20k,armo,million,wide,100k")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=200)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--coretype", default="auto")
    parser.add_argument("--folder", default="/tmp/ridge")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--child")
    arguments = parser.parse_args()
    if arguments.child in STREAMS:
        options = (Path(arguments.folder),) if arguments.child == "million" else ()
        getattr(ridge_streams, arguments.child)(*options)
        return
    if arguments.child:
        child(arguments.child, Path(arguments.folder), arguments.repeats)
        return
    clock = Clock(arguments)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])  # children inherit it
    threads = {name: str(arguments.threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **threads, **kernels(arguments.coretype), "PYTHONPATH": path}
    print(f"load of the machine at the start: {os.getloadavg()[0]:.1f}; {kernels(arguments.coretype)}", flush=True)
    for name in arguments.cases.split(","):
        folder = Path(arguments.folder) / name
        if name in CASES:
            run_case(name, folder, environment, clock)
            continue
        print(f"\n{name}", flush=True)
        command = [sys.executable, __file__, "--child", name, "--folder", str(folder)]
        try:
            subprocess.run(command, env=environment, cwd=ROOT, check=False, timeout=max(clock.left, 1))
        except subprocess.TimeoutExpired:
            print(f"{name:40} not finished: the time is up", flush=True)
    print(f"\nload of the machine at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
