"""Settings of the host process."""

import ctypes
import glob
import os
import sys

LAST_WORDS = "MULTITAP_LAST_WORDS"


def say_last(text: str) -> None:
    """Tells the user why this process ends.

    A launcher of several processes, which all end for the same reason as a rule, names a file for each in
    MULTITAP_LAST_WORDS, and says once what several say.
    """
    if path := os.environ.get(LAST_WORDS):
        with open(path, "a", encoding="utf-8") as file:
            file.write(text + "\n")
    else:
        print(text, file=sys.stderr, flush=True)


# Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> None:
    """Lets the allocator keep freed blocks instead of giving them back to the system; does nothing without glibc.

    On a CPU, XLA frees its temporary arrays after each program and asks for the same ones in the next step; by default
    each round goes through the system and faults every page in again. On the machine this was written on that took a
    fifth of the CPU time of a training step.

    To be called before any library starts a thread: where some already have pools of their own, those that XLA starts
    share them in turn, and large blocks outside of the first pool are given back all the same.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    # -1: never trimmed. With a threshold, of 2 GB at most, a step that needs more faulted its pages in again.
    for parameter, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 << 20), (_ARENA_MAX, 1)):
        mallopt(parameter, value)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# What libtpu would otherwise ask the network and the machine for, at length and in vain where there is no TPU.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_LOG_DIR": "disabled",
}


def has_tpu() -> bool:
    """Whether this machine has the devices that TPUs are reached by."""
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def hush_absent_tpu() -> None:
    """To be called before jax is used: libtpu is installed to plan with, also where no TPU is; then it keeps still."""
    if not has_tpu():
        for name, value in _NO_TPU.items():
            os.environ.setdefault(name, value)


def hush_transformers() -> None:
    """To be called before transformers is imported: it is here for its tokenizers, and advises to install torch."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def keep_compiled_programs(folder: str) -> None:
    """Lets this process find programs that an earlier one compiled, and leave its own, in `folder`; "" changes nothing.

    JAX_COMPILATION_CACHE_DIR does the same for every verb.
    """
    if folder:
        import jax  # here, so that the program's help does not wait for it

        jax.config.update("jax_compilation_cache_dir", folder)
