"""The code of docs/exporting.md, and a process in which this package cannot be imported."""

import re
import subprocess
import sys
from pathlib import Path

DOC = (Path(__file__).parents[1] / "docs" / "exporting.md").read_text()
REFUSE = """
import sys
class Refused:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in ("multitap_jax", "flax", "transformers", "torch"):
            raise ImportError(f"{name} must not be needed")
sys.meta_path.insert(0, Refused())
"""
NOTHING_CAME_IN = 'assert not any(name.startswith("multitap_jax") for name in sys.modules)\n'


def snippet(name: str) -> str:
    """The code block of the documentation that is marked with `name`."""
    found = re.findall(rf"```python {name}\n(.*?)```", DOC, re.DOTALL)
    assert len(found) == 1
    return found[0]


def python_blocks(path: Path) -> list[str]:
    """The Python of a page."""
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


def run_apart(script: str, folder: Path) -> None:
    """Runs Python in `folder`, in a process of its own that knows neither this package nor what defines models."""
    command = [sys.executable, "-c", REFUSE + script + "\n" + NOTHING_CAME_IN]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
