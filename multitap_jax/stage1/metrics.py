"""Numbers of a run: what a step reports, how fast it went, agreement on held-out pairs, and their file."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from multitap_jax.flops import Work, mfu
from multitap_jax.parallel.distributed import from_main, is_main_process
from multitap_jax.stage1.spikes import RECENT, LossSpikeError, Spike, SpikeWatch

NAMED = 64  # records that a complaint names at most


class NonFiniteError(RuntimeError):
    """Loss or gradient became NaN or infinite; the message names the records of the step."""


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, each with the `step` after which it was taken.

    On a resume the lines beyond the restored step are dropped (they will come again), a torn last line too.

    Args:
      path: the file.
      step: finished steps of the state that the run starts from.
      write: False in all processes but the first, which know of the evaluations alone.
    """

    def __init__(self, path: Path, step: int, *, write: bool = True):
        self._path, self._write = path, write
        self.lines = [line for line in _read(path) if line["step"] <= step]
        # All processes must know of the same evaluations, whatever their file systems show them at this moment.
        judged = from_main([line for line in self.lines if "evaluation" in line])
        if not is_main_process():
            self.lines = judged
        if write:
            part = path.with_suffix(".part")
            part.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
            part.replace(path)

    def add(self, step: int, **values: Any) -> None:
        """Appends a line; a number that is not finite is written as null, so that the file stays JSON."""
        line = {"step": step, **{key: _plain(value) for key, value in values.items()}}
        self.lines.append(line)
        if self._write:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def evaluations(self) -> dict[int, dict[str, Any]]:
        """Held-out numbers by step."""
        return {line["step"]: line["evaluation"] for line in self.lines if "evaluation" in line}


def _read(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:  # torn by a kill; everything after it is newer still
            break
    return lines


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Pending(NamedTuple):
    step: int
    metrics: dict[str, jax.Array]
    record: np.ndarray
    work: Work


class Recorder:
    """Takes the metrics of each step, looks at them one step later, and averages them between two log lines.

    Looking at once would make the device wait for the host in every step.

    Args:
      record_ids: step -> ids of its records, for the error.
      flops: work of a batch -> FLOPs of its training step; None where no formula is known.
      devices, peak: see `flops.mfu`.
      clock: seconds.
      spikes: judges the losses.
    """

    def __init__(
        self,
        record_ids: Callable[[int], list[str]],
        flops: Callable[[Work], float] | None,
        devices: int,
        peak: float | None,
        clock: Callable[[], float],
        spikes: SpikeWatch | None = None,
    ):
        self._spikes = spikes or SpikeWatch(0)
        self._record_ids, self._flops = record_ids, flops
        self._devices, self._peak, self._clock = devices, peak, clock
        self._pending: _Pending | None = None
        self._restart()

    def _restart(self) -> None:
        self._steps: list[dict[str, float]] = []
        self._work: list[Work] = []
        self._start, self._waited = self._clock(), 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time the rates leave out: compilation, evaluation."""
        begin, waited = self._clock(), self._waited
        yield
        self._start += self._clock() - begin
        self._waited = waited

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A context in which the loop waits for its next batch; while a step is computed, that costs nothing yet."""
        begin = self._clock()
        yield
        self._waited += self._clock() - begin

    def add(self, index: int, metrics: dict[str, jax.Array], record: np.ndarray, work: Work) -> None:
        """Takes step `index` (from 0) and settles the one before."""
        self.settle()
        self._pending = _Pending(index, metrics, record, work)

    def settle(self) -> None:
        """Waits for the last step.

        Raises:
          NonFiniteError: its loss or gradient is not finite.
          LossSpikeError: its loss completes a spike.
        """
        if self._pending is None:
            return
        (index, metrics, record, work), self._pending = self._pending, None
        host = jax.device_get(metrics)
        if not host["finite"]:
            raise NonFiniteError(self._complaint(index, host, record))
        self._steps.append(
            {name: float(host[name]) for name in ("loss", "grad_norm", "lr", "mean_score", "pairs", "terms")}
        )
        self._work.append(work)
        if host["terms"] and (spike := self._spikes.see(index, float(host["loss"]))):
            raise LossSpikeError(self._spike_complaint(index, spike))

    def _complaint(self, index: int, host: dict[str, np.ndarray], record: np.ndarray) -> str:
        ids = self._record_ids(index)
        bad = [ids[i] for i in record[host["bad"]]]
        if bad:
            who = f"the logits of these records are not finite: {_some(bad)}"
        else:
            who = f"every logit is finite, so it is a target or the gradient; the step's records: {_some(ids)}"
        return (
            f"step {index + 1}: loss = {host['loss']}, gradient norm = {host['grad_norm']}; {who}. "
            "The step was not applied. Look at these records; if they are sound, use model.dtype=float32 or a lower "
            "optimizer.learning_rate"
        )

    def _spike_complaint(self, index: int, spike: Spike) -> str:
        times = spike.recent / max(spike.before, 1e-30)
        return (
            f"step {index + 1}: the median loss of the last {RECENT} steps, {spike.recent:.3g}, is {times:.0f} times "
            f"that of the steps before, {spike.before:.3g}; the highest was step {spike.worst + 1}, of the records "
            f"{_some(self._record_ids(spike.worst))}. Look at these records and use a lower "
            "--config.optimizer.learning_rate; if the rise is right for this data, --config.spike_factor=0 lets it pass"
        )

    def line(self) -> dict[str, Any]:
        """Averages over the steps since the last line (settled first), rates, and a fresh start.

        `data_wait` is the share of the time in which the loop waited for a batch: an upper bound of the share in which
        the device had no work, since it may still have been at the step before.
        Loss and mean score are None where nothing of these steps counted.
        """
        self.settle()
        seconds = max(self._clock() - self._start, 1e-9)
        steps, works = self._steps, self._work
        pairs, terms = (sum(step[name] for step in steps) for name in ("pairs", "terms"))
        tokens, padded = sum(w.tokens for w in works), sum(w.padded_tokens for w in works)
        flops = None if self._flops is None else sum(map(self._flops, works))
        line = {
            "loss": sum(step["loss"] * step["terms"] for step in steps) / terms if terms else None,
            "grad_norm": steps[-1]["grad_norm"],
            "lr": steps[-1]["lr"],
            "mean_score": sum(step["mean_score"] * step["pairs"] for step in steps) / pairs if pairs else None,
            "seconds_per_step": seconds / len(steps),
            "pairs_per_second": pairs / seconds,
            "tokens_per_second": tokens / seconds,
            "packing_efficiency": tokens / max(padded, 1),
            "data_wait": min(self._waited / seconds, 1.0),
            "mfu": None if flops is None else mfu(flops, seconds, self._devices, self._peak),
        }
        self._restart()
        return line


def _some(ids: list[str]) -> str:
    return ", ".join(ids[:NAMED]) + (f" and {len(ids) - NAMED:,} more" if len(ids) > NAMED else "")


def agreement(scores: np.ndarray, targets: np.ndarray) -> dict[str, float | int]:
    """Loss (mean squared error) and correlations of held-out scores [N] with human scores [N]; NaN where undefined."""
    from multitap_jax.evaluation import correlation

    return {
        "pairs": len(scores),
        "loss": correlation.mse(scores, targets),
        "tau_b": correlation.kendall_tau(scores, targets, "b"),
        "tau_c": correlation.kendall_tau(scores, targets, "c"),
        "pearson": correlation.pearson(scores, targets),
        "spearman": correlation.spearman(scores, targets),
    }
