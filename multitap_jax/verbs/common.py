"""Flags that several verbs share, their bounds, and the words for flags that are wrong."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from absl import flags


def whole_number(
    values: flags.FlagValues, name: str, default: int, text: str, *, low: int = 1, high: int | None = None
) -> None:
    """Defines an integer flag with bounds."""
    flags.DEFINE_integer(name, default, text, flag_values=values)
    _bound(values, name, "a whole number", low, high)


def share(values: flags.FlagValues, name: str, default: float, text: str) -> None:
    """Defines a flag between 0 and 1."""
    flags.DEFINE_float(name, default, text, flag_values=values)
    _bound(values, name, "a share", 0, 1)


def _bound(values: flags.FlagValues, name: str, kind: str, low: float, high: float | None) -> None:
    allowed = f"{low} or more" if high is None else f"from {low} to {high}"
    # absl's own bounds let NaN pass.
    flags.register_validator(
        name,
        lambda value: low <= value and (high is None or value <= high),
        message=f"expected {kind}, {allowed}",
        flag_values=values,
    )


def input_flags(values: flags.FlagValues, *, required: bool = True) -> None:
    """--input and what is allowed in it."""
    text = "Records: JSONL, CSV or Parquet, or a folder holding one." + (" Required." if required else "")
    flags.DEFINE_string("input", None, text, flag_values=values)
    share(values, "max_rejected", 0.01, "Stop when a larger share of records is unusable.")
    flags.DEFINE_bool(
        "allow_outside_root", False, "Let image paths leave the folder of the records file.", flag_values=values
    )
    if required:
        flags.mark_flag_as_required("input", flag_values=values)


def benchmark_flags(values: flags.FlagValues) -> None:
    """--benchmark and how its scores are read."""
    flags.DEFINE_string("benchmark", None, "Protocol to count by; the table below has them.", flag_values=values)
    flags.DEFINE_string("score_field", "score", "The number of a line of scores; scores.NAME too.", flag_values=values)
    flags.DEFINE_string("ties", None, "Rule for equal scores: loss, half, second (of accuracies).", flag_values=values)
    flags.DEFINE_bool("allow_subset", False, "Count another number of records than published.", flag_values=values)


def model_flags(values: flags.FlagValues) -> None:
    """--checkpoint and how it is computed."""
    flags.DEFINE_string("checkpoint", None, "Artefact folder (what `train` writes). Required.", flag_values=values)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Computation type.", flag_values=values)
    flags.DEFINE_enum(
        "weights",
        "full",
        ["full", "int8"],
        "int8: rounded weights, about half the memory of bfloat16.",
        flag_values=values,
    )
    flags.DEFINE_string("attention", "auto", "Backend, of those in docs/performance.md.", flag_values=values)
    whole_number(values, "batch_tokens", 16384, "About how many tokens a batch holds.")
    whole_number(values, "max_length", 2048, "Longest pair in tokens, image tokens included.")
    flags.DEFINE_bool("truncate", False, "Cut the tail of longer texts and say so.", flag_values=values)
    whole_number(values, "devices", 0, "Devices of this process that share the batches; 0: all (a CPU is one).", low=0)
    whole_number(values, "fsdp", 1, "How many of them share one copy of the parameters, where one is too small.")
    flags.mark_flag_as_required("checkpoint", flag_values=values)


def process_flags(values: flags.FlagValues) -> None:
    """Which process of how many this is, and how long one waits for the others."""
    flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT of process 0 of a run of several processes, or auto: ask Slurm, JobSet or Cloud TPU. Also "
        "MULTITAP_COORDINATOR; without either, this process is alone.",
        flag_values=values,
    )
    flags.DEFINE_integer("num_processes", None, "Processes of the run (MULTITAP_NUM_PROCESSES).", flag_values=values)
    flags.DEFINE_integer("process_id", None, "This process, from 0 (MULTITAP_PROCESS_ID).", flag_values=values)
    whole_number(values, "join_timeout", 300, "Seconds in which all processes have to come.")
    whole_number(
        values, "heartbeat_timeout", 100, "Seconds without a sign of life after which a process counts as dead."
    )
    whole_number(
        values, "watchdog", 1800, "Seconds without progress after which a process ends; 0 for no limit.", low=0
    )


@contextlib.contextmanager
def joined(verb: str, values: flags.FlagValues) -> Iterator[None]:
    """A verb with `process_flags` joins the processes of its run, and is watched; all of them end together."""
    if "coordinator" not in values:
        yield
        return
    from multitap_jax.parallel import distributed, watchdog

    place = distributed.initialize(
        values.coordinator,
        values.num_processes,
        values.process_id,
        timeout=values.join_timeout,
        heartbeat=values.heartbeat_timeout,
        saves_on_sigterm=verb == "train",
    )
    with watchdog.watched(values.watchdog, "this process" if place is None else place.name):
        yield
        if place is not None:
            distributed.barrier("end")


def left(values: flags.FlagValues, code: int, error: Exception | None = None, explained: bool = True) -> int:
    """The exit code of a verb that failed; see `parallel.distributed.leave`."""
    if "coordinator" not in values:
        return code
    from multitap_jax.parallel.distributed import leave

    return leave(code, error, explained)


def load_scorer(values: flags.FlagValues) -> Any:
    """The scorer that the model flags describe."""
    from multitap_jax.scoring.scorer import Scorer

    return Scorer.from_pretrained(
        values.checkpoint,
        mesh=_own_mesh(values.devices, values.fsdp),
        dtype=values.dtype,
        batch_tokens=values.batch_tokens,
        max_length=values.max_length,
        truncate=values.truncate,
        weights=values.weights,
        attention=values.attention,
    )


def _own_mesh(count: int, fsdp: int) -> Any:
    """A mesh of `count` devices of this process, whatever others there are; None for a single one."""
    import jax

    from multitap_jax.config import MeshConfig
    from multitap_jax.parallel.mesh import make_mesh

    devices = jax.local_devices()
    count = count or (1 if devices[0].platform == "cpu" else len(devices))  # more than one CPU is a simulation
    if count > len(devices) or count % fsdp:
        raise ValueError(f"--devices={count} --fsdp={fsdp}: this process has {len(devices)}, and fsdp divides devices")
    return None if count == 1 else make_mesh(MeshConfig(data=-1, fsdp=fsdp), devices[:count])


# What absl says, and what is said instead; the first that matches a line counts.
_WORDS = (
    (r"flag --(\S+?)=None: Flag .* must have a value.*", r"--\1 is missing: give it as --\1=VALUE"),
    (r"Unknown command line flag '(.+?)'\. Did you mean: (\S+).*", r"there is no flag --\1; did you mean --\2?"),
    (r"Unknown command line flag '(.+?)'.*", r"there is no flag --\1"),
    (r"Missing value for flag --(\S+)", r"--\1 has no value: give it as --\1=VALUE"),
    (r"flag (--\S+?=.*): could not convert string to float.*", r"\1: expected a number"),
    (r"flag (--\S+?=.*): invalid literal for int.*", r"\1: expected a whole number"),
    (r"flag (--\S+?=.*): \('Non-boolean argument.*", r"\1: expected true or false"),
    (r"flag (--\S+?=.*): value should be one of <(.*)>", r"\1: expected one of \2"),
    (r"flag (--\S+?=.*)", r"\1"),
)


def explain(error: Exception) -> str:
    """An error of absl's flags as sentences, a line each."""
    text = str(error)
    if "Error whilst parsing config file" in text:  # the last line of a traceback says what was wrong
        return text.strip().splitlines()[-1].partition(": ")[2]
    return "\n".join(_explained(line) for line in text.splitlines())


def _explained(line: str) -> str:
    for pattern, words in _WORDS:
        if found := re.fullmatch(pattern, line):
            said = found.expand(words)
            return said.replace("|", ", ") if "expected one of" in said else said
    return line
