"""The table of docs/planning.md: every config planned for published models and TPU topologies that are not there.

  python benchmarks/plan_table.py [--effort=full] [--folder=/tmp/plans] [--only=qwen2-vl-7b] [--keep]

Runs `multitap plan` once a row, each in a process of its own, and writes the rows between the marks in
docs/planning.md. Needs libtpu (pip install -e '.[tpu-plan]') and no TPU. Plans that --folder holds from an
earlier run of the same commit are used again with --keep. Time and memory are those of the planning process.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "planning.md"
MARKS = ("<!-- written by benchmarks/plan_table.py -->\n", "<!-- end -->\n")
GIB = 2**30
HEAD = (
    *("config", "model", "chips", "pairs a step", "training, GiB", "at best, MFU", "scoring, GiB", "at best, MFU"),
    *("fits", "planned in"),
)


class Row(NamedTuple):
    """A plan: config, model, topology, and settings besides."""

    config: str
    model: str
    topology: str
    settings: str = ""


ROWS = (
    Row("official", "qwen2-vl-2b", "v5e:2x4", "batch_size=32 accumulation=1"),
    Row("official", "qwen2-vl-2b", "v6e:2x2", "batch_size=32 accumulation=1"),
    Row("official", "qwen2-vl-7b", "v5e:8x8", "batch_size=256 accumulation=1"),
    Row("official", "qwen2-vl-7b", "v5e:4x4", "batch_size=64 accumulation=1"),
    Row("official", "qwen2-vl-7b", "v5p:2x2x2", "batch_size=64 accumulation=1"),
    Row("official", "qwen2-vl-72b", "v5p:4x4x4", "batch_size=128 accumulation=1"),
    Row("official", "qwen2-vl-72b", "v6e:8x8", "batch_size=128 accumulation=1"),
    Row("official", "llama-3.2-vision-11b", "v5e:8x8", "batch_size=64 accumulation=1"),
    Row("official", "llama-3.2-vision-90b", "v5p:4x4x4", "batch_size=64 accumulation=1"),
    Row("lora", "qwen2-vl-7b", "v5e:2x4", "batch_size=32"),
    Row("lora", "qwen2-vl-72b", "v5e:8x8", "batch_size=128"),
    Row("head_only", "llama-3.2-vision-11b", "v6e:2x4", "batch_size=64"),
)


def run(row: Row, folder: Path, effort: str, keep: bool) -> dict[str, Any]:
    """The JSON of a plan, with the seconds, the CPU seconds and the bytes that making it took."""
    file = folder / f"{row.config}_{row.model}_{row.topology.replace(':', '_')}_{effort}.json"
    if keep and file.is_file():
        return json.loads(file.read_text())
    command = [sys.executable, "-m", "multitap_jax.cli", "plan", f"--config={ROOT / 'configs' / row.config}.py"]
    command += [f"--model={row.model}", f"--topology={row.topology}", f"--effort={effort}", f"--json={file}"]
    command += [f"--config.{setting}" for setting in row.settings.split()]
    start = time.monotonic()
    with open(file.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env={**os.environ, "PYTHONPATH": _path()})
        _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) > 1 or not file.is_file():
        sys.exit(f"{' '.join(command)} failed:\n{file.with_suffix('.log').read_text()}")
    found = json.loads(file.read_text())
    found["made"] = {
        "effort": effort,
        "seconds": time.monotonic() - start,
        "cpu": usage.ru_utime,
        "bytes": 1024 * usage.ru_maxrss,
    }
    file.write_text(json.dumps(found, indent=2) + "\n")
    return found


def _path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def line(row: Row, plan: dict[str, Any]) -> str:
    """A row of the table."""
    training, scoring = plan["steps"]["training"], plan["steps"]["scoring"]
    mesh = " ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
    made, full = plan["made"], plan["made"]["effort"] == "full"  # quick programs move more memory: their bounds mislead
    cells = [
        f"`{row.config}`",
        row.model,
        f"{row.topology}, {mesh}",
        str(training["pairs"]),
        _peak(training),
        _best(training, full),
        _peak(scoring),
        _best(scoring, full),
        "yes" if plan["fits"] else "**no**",
        f"{made['cpu']:.0f} s, {made['bytes'] / GIB:.1f} GiB",
    ]
    return f"| {' | '.join(cells)} |"


def _peak(step: dict[str, Any]) -> str:
    return f"{step['memory']['peak'] / GIB:.1f}" if step["memory"] else f"over ({step['needed'] / GIB:.0f})"


def _best(step: dict[str, Any], bounds: bool) -> str:
    if "roofline" not in step or not bounds:
        return "-"
    found = step["roofline"]
    return f"{found['seconds']:.2f} s, {found['mfu']:.0%} ({found['bound']})"


def main() -> None:
    """Makes the plans and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--effort", choices=("full", "quick"), default="full")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/plans"))
    parser.add_argument("--only", default="", help="models or topologies with this in their name; the page stays")
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for row in ROWS:
        if options.only in f"{row.config} {row.model} {row.topology}":
            lines.append(line(row, run(row, options.folder, options.effort, options.keep)))
            print(lines[-1], flush=True)
    if not options.only:
        before, _, rest = PAGE.read_text().partition(MARKS[0])
        _, _, after = rest.partition(MARKS[1])
        PAGE.write_text(before + MARKS[0] + "\n" + "\n".join(lines) + "\n\n" + MARKS[1] + after)


if __name__ == "__main__":
    main()
