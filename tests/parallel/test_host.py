"""Settings of the host process."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KEEP = """
import ctypes
from multitap_jax.parallel.host import keep_freed_memory

c = ctypes.CDLL(None)
c.malloc.restype = c.sbrk.restype = ctypes.c_void_p
c.malloc.argtypes, c.free.argtypes, c.sbrk.argtypes = [ctypes.c_size_t], [ctypes.c_void_p], [ctypes.c_ssize_t]
keep_freed_memory()
for size in (1 << 20, 256 << 20, 3 << 30):  # never touched, so none of it is memory yet
    block = c.malloc(size)
    end = c.sbrk(0)
    c.free(block)
    print(block is not None and c.sbrk(0) == end)
"""


POOLS = """
import sys
from multitap_jax import cli

asked = []
cli.keep_freed_memory = lambda: asked.append(not {"jax", "numpy", "flax"} & set(sys.modules))
try:
    cli.main(["train", "--config=no/such.py"])
except SystemExit:
    pass
print(*asked)
"""


def printed(script: str) -> list[str]:
    """The words that a fresh process prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_stays_with_the_process_however_large():
    assert printed(KEEP) == ["True"] * 3


def test_the_program_prepares_memory_before_libraries_start_threads():
    assert printed(POOLS) == ["True"]
