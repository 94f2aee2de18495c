"""An output file that is its own journal: append-only JSON lines, a sidecar that says what they are lines of."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from multitap_jax.files import json_bytes, sync_folder, try_lock, write_atomic


class HasId(Protocol):
    """An item of the input."""

    @property
    def id(self) -> str | None: ...


Item = TypeVar("Item", bound=HasId)
FORMAT_VERSION = 1
SAMPLE = 1 << 20


class JobError(ValueError):
    """A job that cannot start or go on; the message names the file and the remedy."""


def input_fingerprint(path: Path) -> dict[str, Any]:
    """Size and sha256 of the first and the last MiB: enough to notice another file, cheap for any length."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(SAMPLE))
        file.seek(max(0, size - SAMPLE))
        digest.update(file.read(SAMPLE))
    return {"name": path.name, "folder": str(path.resolve().parent), "bytes": size, "sha256_ends": digest.hexdigest()}


def sidecar_of(output: Path) -> Path:
    """The file beside `output` that says what it holds lines of."""
    return output.with_name(output.name + ".job.json")


def seen_file_of(output: Path) -> Path:
    """The file beside `output` with the hashes of records that the model has seen (`data/seen.py`), if any."""
    return output.with_name(output.name + ".seen.safetensors")


class Journal:
    """The output file of a job, held by this process alone while the context is open.

    Args:
      path: the output; `PATH.job.json` beside it is the sidecar.
      identity: JSON of what decides the lines: input, model, settings. A file begun with another identity is refused.
      notes: JSON of what else a reader of the lines, or of a refusal, may want to know.
    """

    def __init__(self, path: Path, identity: dict[str, Any], notes: dict[str, Any] | None = None):
        self.path = path
        self.sidecar = sidecar_of(path)
        self.identity, self.notes = identity, notes or {}
        self._lines = 0
        self._end = 0
        self._file = -1
        self._state: dict[str, Any] = {}

    def __enter__(self) -> "Journal":
        if self.path.is_dir():
            raise JobError(f"{self.path}: is a folder; give the file for the scores, such as {self.path}/scores.jsonl")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        try:
            if not try_lock(self._file):
                raise JobError(f"{self.path}: another process is writing it; wait for it or choose another output")
            state = self._check()
            self._state = state or {"format_version": FORMAT_VERSION, **self.identity, **self.notes, "complete": None}
            if state is None:
                self._write_sidecar()
        except BaseException:
            os.close(self._file)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def finished(self) -> dict[str, Any] | None:
        """What `finish` was given, if the file was finished and still has the length it had then."""
        complete = self._state["complete"]
        if complete is None or complete["bytes"] != os.fstat(self._file).st_size:
            return None
        return complete["tally"]

    def replay(self, items: Iterator[Item]) -> Iterator[tuple[Item, dict[str, Any]]]:
        """Yields the whole lines, each with its item of the input, and cuts off what follows them.

        When all are taken, `items` stands at the next one to score and the file ends where its line belongs.

        Args:
          items: the input, in order; as many are taken as there are whole lines.

        Raises:
          JobError: for a line whose id is not the input's at that place.
        """
        with open(self.path, "rb") as file:
            for raw in file:
                line = _parse(raw)
                if line is None:
                    break
                item = next(items, None)
                if item is None or line["id"] != item.id:
                    what = "has no more records" if item is None else f"has id {item.id!r} there"
                    raise JobError(
                        f"{self.path} line {self._lines + 1}: id {line['id']!r}, but the input {what}; one "
                        f"of the two was changed after the job began. Restore it, or remove {self.path} to start again"
                    )
                self._lines += 1
                self._end += len(raw)
                yield item, line
        os.ftruncate(self._file, self._end)

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Adds lines and returns when they are on the disk.

        Raises:
          JobError: the disk refuses; the file holds the lines of earlier calls and nothing else.
        """
        text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        data = text.encode("utf-8", "backslashreplace")  # half a surrogate pair becomes its JSON escape
        with self.disk_errors():
            try:
                os.lseek(self._file, self._end, os.SEEK_SET)
                written = 0
                while written < len(data):
                    written += os.write(self._file, memoryview(data)[written:])
                os.fsync(self._file)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, self._end)
                raise
        self._end += len(data)
        self._lines += len(lines)

    def finish(self, tally: dict[str, Any]) -> None:
        """Notes that every record has its line; `tally` is what `finished` will give."""
        self._state["complete"] = {"bytes": self._end, "tally": tally}
        with self.disk_errors():
            self._write_sidecar()

    @contextlib.contextmanager
    def disk_errors(self) -> Iterator[None]:
        """Turns what the disk says into a JobError that tells what is safe and how to go on."""
        try:
            yield
        except OSError as error:
            raise JobError(
                f"{self.path}: cannot be written ({error.strerror or error}); {self._lines} finished lines are safe. "
                "Make room, then run the same command again: it goes on after them"
            ) from error

    def _write_sidecar(self) -> None:
        write_atomic(self.sidecar, json_bytes(self._state))
        sync_folder(self.path.parent)

    def _check(self) -> dict[str, Any] | None:
        """The sidecar's content where it belongs to this job, None for a file that is still to begin."""
        if os.fstat(self._file).st_size == 0:
            return None
        if not self.sidecar.exists():
            raise JobError(
                f"{self.path}: exists, but {self.sidecar.name} beside it does not, so it is unknown what it was scored "
                "with; choose another output, or remove the file"
            )
        try:
            state = json.loads(self.sidecar.read_bytes())
            version, _ = state["format_version"], state["complete"]
        except (ValueError, KeyError, TypeError) as error:
            raise JobError(
                f"{self.sidecar}: cannot be read ({error}); remove it and {self.path.name} to start again"
            ) from error
        if version != FORMAT_VERSION:
            raise JobError(
                f"{self.sidecar}: format_version {version}, this multitap_jax writes {FORMAT_VERSION}; go on with "
                "the version that began the job, or choose another output"
            )
        notes = [
            f"; {name}: {json.dumps(state[name])} then, {json.dumps(value)} now"
            for name, value in self.notes.items()
            if name in state and state[name] != value
        ]
        for name, value in self.identity.items():
            if state.get(name) != value:
                raise JobError(
                    f"{self.path}: was begun with another {name} ({json.dumps(state.get(name))}), now given "
                    f"{json.dumps(value)}{''.join(notes)}; give the same {name} as before, or choose another output"
                )
        return state


def _parse(raw: bytes) -> dict[str, Any] | None:
    """The line, or None where it is torn: no line end, or not the JSON that was written."""
    if not raw.endswith(b"\n"):
        return None
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) and {"id", "error", "truncated"} <= line.keys() else None
