"""Scores a file of records of any length: each input line appears in the output exactly once, also after kill -9.

The output is its own journal. Lines are appended in input order, a window at a time, and each window is pushed to the
disk before the next is written, while later ones are already being computed; a restart cuts off what is torn, checks
the ids of the lines that are whole against the input, and goes on after them. `OUTPUT.job.json` beside it says what is
being scored with what, so that another input or another model can never continue a file; `OUTPUT.seen.safetensors`,
which records the model has seen in training.
`OUTPUT.rejected.jsonl` repeats the lines that have no score, with the reason.

Of several processes each scores its share of the windows, and the first writes all of these files (`parts.py`); what it
has not yet come to waits in `OUTPUT.parts/`. Any number of processes may go on with the job of any other.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import numpy as np

from multitap_jax.data.records import Record, Rejected, iter_records
from multitap_jax.data.seen import Seen, to_bytes
from multitap_jax.data.stream import Pair
from multitap_jax.data.tables import find_records_file
from multitap_jax.files import canonical_hash, write_atomic
from multitap_jax.parallel.distributed import from_main, is_main_process
from multitap_jax.scoring.journal import JobError, Journal, input_fingerprint, seen_file_of, sidecar_of
from multitap_jax.scoring.occupancy import Occupancy
from multitap_jax.scoring.parts import Block, Parts, Work
from multitap_jax.scoring.progress import progress_bar
from multitap_jax.scoring.readahead import with_results

if TYPE_CHECKING:
    from multitap_jax.scoring.results import Scores

NOTES = ("checkpoint", "trained_on", "conditions")  # what a scorer has to say for people, beside the scores
ENOUGH_TO_JUDGE = 1000  # lines seen before a share of rejected ones can stop a running job


class SupportsScore(Protocol):
    """What a job needs of a scorer."""

    @property
    def fingerprint(self) -> str:
        """sha256 of the model; changes whenever a score could."""

    @property
    def settings(self) -> dict[str, Any]:
        """JSON of what else decides a score or an error: computation type, longest pair."""

    @property
    def checkpoint(self) -> str:
        """Where the model is, for people: a folder, or hub:OWNER/NAME@COMMIT."""

    @property
    def trained_on(self) -> dict[str, Any]:
        """JSON of the human score that the overall score stands for: `target` and `target_range`."""

    @property
    def seen(self) -> dict[str, Seen]:
        """The records that the model has seen, as far as it is known (`data/seen.py`)."""

    @property
    def conditions(self) -> dict[str, str]:
        """JSON of what a report has to say: prompt variant, position mode, image policy, pooling, alpha rule."""

    def score_stream(
        self, lists: Iterable[Sequence[Pair]], *, truncate: bool, occupancy: Occupancy
    ) -> Iterator["Scores"]:
        """The scores of each list, in order; a pair that fails has an error instead of a score."""


class TooManyRejected(JobError):
    """More records than `max_rejected` allows have no score."""


@dataclasses.dataclass(frozen=True)
class JobSummary:
    """What became of a job.

    Attributes:
      lines: lines of the output, one a record.
      rejected: lines without a score (bad record, bad image, too long a text).
      resumed: lines that an earlier run had finished.
      truncated: lines whose text was cut.
      seconds: wall time of this run, scoring and replay.
      idle: share of the time in which this process's device waited for batches; None where that was not seen.
      output, rejected_file: where they are.
      already_complete: the file was finished before and nothing was done.
    """

    lines: int
    rejected: int
    resumed: int
    truncated: int
    seconds: float
    idle: float | None
    output: Path
    rejected_file: Path
    already_complete: bool = False

    def __str__(self) -> str:
        if self.already_complete:
            return f"{self.output}: already complete, {self.lines} lines, {self.rejected} rejected; nothing was done"
        new = self.lines - self.resumed
        rate = new / self.seconds if self.seconds > 0 else 0.0
        parts = [f"{self.output}: {self.lines} lines, {self.rejected} rejected, {self.truncated} truncated"]
        if self.resumed:
            parts.append(f"{self.resumed} lines were there from an earlier run")
        parts.append(f"{new} new lines in {self.seconds:.1f} s ({rate:.1f} pairs/s)")
        if self.idle is not None:
            parts.append(f"the device waited {self.idle:.0%} of the time for the host")
        return "; ".join(parts)


@dataclasses.dataclass
class _Tally:
    lines: int = 0
    rejected: int = 0
    truncated: int = 0
    reasons: list[str] = dataclasses.field(default_factory=list)

    def add(self, line: dict[str, Any]) -> None:
        self.lines += 1
        self.truncated += bool(line["truncated"])
        if line["error"] is not None:
            self.rejected += 1
            if len(self.reasons) < 3:
                self.reasons.append(f"{line['id']}: {line['error']}")


def score_file(
    scorer: SupportsScore,
    input: str | Path,
    output: str | Path,
    *,
    truncate: bool = False,
    max_rejected: float = 0.01,
    allow_outside_root: bool = False,
    window: int = 1024,
    show_progress: bool = False,
) -> JobSummary:
    """Scores every record of `input` into the JSON lines `output`, in input order; run it again to continue or check.

    A line holds `id, score, scores{objective: number}, n_tokens, truncated, error`; score is null where error is not.

    Args:
      scorer: a `Scorer`, or anything that scores alike.
      input: records (JSONL, CSV, Parquet, or a folder holding one); memory does not grow with its length.
      output: file to write, or to continue.
      truncate: cut texts that are too long instead of rejecting them.
      max_rejected: share of records without a score above which the job stops.
      allow_outside_root: let image paths leave the folder of the records file.
      window: records scored between two writes; after a kill up to a few times as many are scored again.
      show_progress: draw a bar on standard error.

    Raises:
      TooManyRejected: above `max_rejected`, judged from 1,000 lines on and at the end. The lines written stay.
      JobError: another input or model than the file was begun with, a file in the way, no space; says the remedy.
    """
    if window < 1:
        raise ValueError(f"window = {window}: at least 1 record")
    source, output = find_records_file(input), Path(output)
    rejected_file = output.with_name(output.name + ".rejected.jsonl")
    written = (output, sidecar_of(output), seen_file_of(output), rejected_file)
    if source.resolve() in [path.resolve() for path in written]:
        raise JobError(f"{source}: the job would write over its input; choose another output")
    settings = {**scorer.settings, "truncate": truncate, "allow_outside_root": allow_outside_root}
    identity = {"input": input_fingerprint(source), "model": scorer.fingerprint, "settings": settings}
    beside = output.with_name(output.name + ".parts")
    parts: Parts[Record | Rejected] = Parts(beside, canonical_hash([identity, window]), window)
    items = iter_records(source, allow_outside_root=allow_outside_root)
    tally, resumed, occupancy, began = _Tally(), None, Occupancy(), time.monotonic()
    work = functools.partial(_score_blocks, scorer, truncate, occupancy)
    if is_main_process():
        with Journal(output, identity, {name: getattr(scorer, name) for name in NOTES}) as journal:
            with journal.disk_errors():
                _leave_seen(scorer, seen_file_of(output))
            total = _count_lines(source) if show_progress else None
            bar = functools.partial(progress_bar, total, enabled=show_progress)
            resumed = _write(journal, rejected_file, items, parts, work, tally, max_rejected, bar)
    elif (start := parts.begin()) is not None:
        parts.follow(islice(items, start, None), start, work)
    found, resumed = from_main([dataclasses.asdict(tally), resumed])
    tally = _Tally(**found)
    _judge(tally, max_rejected, rejected_file, final=True)
    return JobSummary(
        lines=tally.lines,
        rejected=tally.rejected,
        resumed=tally.lines if resumed is None else resumed,
        truncated=tally.truncated,
        seconds=time.monotonic() - began,
        idle=occupancy.close().idle_share,
        output=output,
        rejected_file=rejected_file,
        already_complete=resumed is None,
    )


def _leave_seen(scorer: SupportsScore, path: Path) -> None:
    """Writes down beside the scores which records the model has seen, for whoever judges them."""
    if known := scorer.seen:
        write_atomic(path, to_bytes(known))
    else:
        path.unlink(missing_ok=True)


def _write(
    journal: Journal,
    rejected_file: Path,
    items: Iterator[Record | Rejected],
    parts: Parts[Record | Rejected],
    work: Work[Record | Rejected],
    tally: _Tally,
    max_rejected: float,
    bar: Callable[[int], AbstractContextManager[Callable[[int], None]]],
) -> int | None:
    """What the first process does; returns how many lines were there, None where nothing was left to do."""
    if (finished := journal.finished()) is not None:
        vars(tally).update(finished)
        parts.begin()
        return None
    with journal.disk_errors():
        rejects = rejected_file.open("w", encoding="utf-8")
    with rejects:
        _record(tally, journal.replay(items), rejects, journal)
        resumed = tally.lines
        _judge(tally, max_rejected, rejected_file, final=False)
        parts.begin(resumed)
        with bar(resumed) as advance:
            for block, lines in parts.in_order(items, resumed, work):
                journal.append(lines)
                _record(tally, zip(block.items, lines, strict=True), rejects, journal)
                advance(len(lines))
                _judge(tally, max_rejected, rejected_file, final=False)
    journal.finish(dataclasses.asdict(tally))
    return resumed


def _score_blocks(
    scorer: SupportsScore, truncate: bool, occupancy: Occupancy, blocks: Iterable[Block[Record | Rejected]]
) -> Iterator[list[dict[str, Any]]]:
    """The output lines of each block, one per item; what the reader rejected is not shown to the scorer."""
    pairs = lambda block: [Pair.of(item) for item in block.items if isinstance(item, Record)]
    score = lambda asked: scorer.score_stream(map(pairs, asked), truncate=truncate, occupancy=occupancy)
    for (_, items), scores in with_results(blocks, score):
        records = [item for item in items if isinstance(item, Record)]
        scored = (_scored_line(record.id, scores, index) for index, record in enumerate(records))
        yield [next(scored) if isinstance(item, Record) else _rejected_line(item) for item in items]


def _scored_line(identifier: str, scores: "Scores", index: int) -> dict[str, Any]:
    error = scores.errors[index]
    good = error is None
    return {
        "id": identifier,
        "score": _number(scores.overall[index]) if good else None,
        "scores": {
            name: _number(value) if good else None
            for name, value in zip(scores.names, scores.objectives[index], strict=True)
        },
        "n_tokens": int(scores.n_tokens[index]) if good else None,
        "truncated": bool(scores.truncated[index]),
        "error": error,
    }


def _rejected_line(item: Rejected) -> dict[str, Any]:
    return {
        "id": item.id,
        "score": None,
        "scores": {},
        "n_tokens": None,
        "truncated": False,
        "error": item.reason if item.id is not None else f"line {item.line}: {item.reason}",
    }


def _number(value: np.floating) -> float:
    """The float64 whose decimal spelling is the shortest that names this float32."""
    return float(str(np.float32(value)))


def _record(
    tally: _Tally,
    done: Iterable[tuple[Record | Rejected, dict[str, Any]]],
    rejects: TextIO,
    journal: Journal,
) -> None:
    for item, line in done:
        tally.add(line)
        if line["error"] is not None:
            entry = {"line": item.line, "id": line["id"], "reason": line["error"]}
            with journal.disk_errors():
                rejects.write(json.dumps(entry) + "\n")
    with journal.disk_errors():
        rejects.flush()


def _judge(tally: _Tally, max_rejected: float, rejected_file: Path, *, final: bool) -> None:
    if tally.lines == 0 or not (final or tally.lines >= ENOUGH_TO_JUDGE):
        return
    share = tally.rejected / tally.lines
    if share > max_rejected:
        raise TooManyRejected(
            f"{tally.rejected} of {tally.lines} records have no score ({share:.1%}, --max_rejected is "
            f"{max_rejected:.1%}). First reasons: {'; '.join(tally.reasons)}. All of them: {rejected_file}. Raise "
            "--max_rejected to accept this and go on; or mend the input, remove the output and start again"
        )


def _count_lines(path: Path) -> int | None:
    """Lines of a JSONL file, for the bar; None for other formats."""
    if path.suffix != ".jsonl":
        return None
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
