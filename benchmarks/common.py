"""What the benchmarks share: flags, the device of both sides, the machine's name, agreement, tables."""

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from multitap_jax.parallel.host import keep_freed_memory

keep_freed_memory()  # as the program does; here, since what is imported next (flax) starts threads. torch profits alike


class Devices(NamedTuple):
    """Where both sides compute: what the user asked for, jax's device, and torch's, None where torch cannot go."""

    kind: str
    jax: jax.Device
    torch: str | None


def add_flags(parser: argparse.ArgumentParser, *, repeats: int) -> None:
    """The flags that all benchmarks of models share."""
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="what computes, on both sides")
    sizes = "small, 2b, 7b"
    parser.add_argument("--size", default="small", metavar="SIZE", help=f"of the model: {sizes} (default small)")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"timed turns; the median counts ({repeats})")
    parser.add_argument("--alone", action="store_true", help="ours alone, without torch (memory for one side)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (jax takes the cores it may use)")


def start(args: argparse.Namespace) -> Devices:
    """Prepares this process: device, torch's threads; says what is measured on what.

    Raises:
      SystemExit: there is no such device.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch has a share of the device, too
    jax.config.update("jax_platforms", "cpu" if args.device == "cpu" else "cuda,cpu")
    device = jax.devices()[0]
    if device.platform != args.device:
        raise SystemExit(f"--device={args.device}, but jax sees a {device.platform}: pip install -e '.[cuda]'")
    found = Devices(args.device, device, None if args.alone else _torch_device(args.device, args.threads))
    print(machine(found), flush=True)
    return found


def _torch_device(kind: str, threads: int) -> str | None:
    try:
        import torch
    except ModuleNotFoundError:
        return None
    torch.set_num_threads(threads)
    if kind == "cpu":
        return "cpu"
    return "cuda" if torch.cuda.is_available() else None


def machine(devices: Devices) -> str:
    """Hardware, versions, command, and how busy the machine is: figures of a busy one mean little."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    about = [f"{len(os.sched_getaffinity(0))} cores of {name}"]
    if devices.kind == "gpu":
        about.append(devices.jax.device_kind)
    about += [f"jax {jax.__version__}", f"Python {platform.python_version()}"]
    if devices.torch is not None:
        about.insert(-1, f"torch {sys.modules['torch'].__version__} on {devices.torch}")
    command = " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return f"{command}\n{time.strftime('%Y-%m-%d')}, {', '.join(about)}; load {os.getloadavg()[0]:.1f} at the start"


def check_agreement(what: str, found: Any, expected: Any, tolerance: float) -> float:
    """The largest difference of two arrays or numbers, relative to the largest of what is expected.

    Raises:
      SystemExit: it is above `tolerance`, or NaN: then both sides do not compute the same, and no ratio means anything.
    """
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    worst = float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))
    if not worst <= tolerance:
        raise SystemExit(f"{what}: both sides differ by {worst:.1e} of the largest value, more than {tolerance:.0e}")
    return worst


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    grid = Table(*headers, box=MARKDOWN)
    for row in rows:
        grid.add_row(*row)
    console = Console(width=400, color_system=None, force_terminal=False, force_jupyter=False)
    with console.capture() as captured:
        console.print(grid)
    return "\n".join(line.rstrip() for line in captured.get().splitlines() if line.strip())
