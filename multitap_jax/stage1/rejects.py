"""The records that a run could not use: judged per records file, and kept in `rejected.jsonl` whatever happens."""

import json
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from multitap_jax.data.records import Rejected, check_rejected_share, read_rejected, write_rejected
from multitap_jax.parallel.distributed import any_has, from_each_process

FLAGS = "--config.data."  # what `train` calls the settings that other verbs have as --max_rejected, ...


class Rejects:
    """Collects rejected records; safe to call from the loader's threads.

    Each one is on disk before `add` returns, in the file as it stands there: what an earlier part of the run has found
    stays, for its steps were made without those records.

    Args:
      file: `rejected.jsonl`.
      max_rejected: share of the records of a file above which the run stops.
      resumed: whether the file is of an earlier part of this run; otherwise it begins empty.
      process: which one this is, of several. What all of them know from the start, the first writes; what one finds
        later while it reads its pictures, it writes itself: those after the first to `rejected-PROCESS.jsonl`.
    """

    def __init__(self, file: Path, max_rejected: float, *, resumed: bool, process: int = 0):
        self._main = process == 0
        self._file = file if self._main else file.with_name(f"{file.stem}-{process}{file.suffix}")
        self._max_rejected = max_rejected
        self._kept = dict.fromkeys(read_rejected(self._file) if resumed else [])
        self._sources: dict[Path, tuple[int, dict[Rejected, None]]] = {}
        self._news: list[tuple[Path, Rejected]] = []  # found by this process alone, of which no other knows
        self._lock = threading.Lock()
        if self._main:
            write_rejected(file, self._kept)

    def open(self, source: Path, total: int) -> None:
        """Announces a records file with `total` records, good or not."""
        self._sources[source] = (total, {})

    def add(self, source: Path, rejected: Iterable[Rejected], *, by_all: bool = True) -> None:
        """Takes what was found wrong in `source`, which was announced before, by all processes or by this one alone."""
        with self._lock:
            found = [item for item in rejected if item not in self._sources[source][1]]
            self._sources[source][1].update(dict.fromkeys(found))
            new = [item for item in found if item not in self._kept]
            self._kept.update(dict.fromkeys(new))
            if not by_all:
                self._news += [(source, item) for item in found]
            if new and (self._main or not by_all):
                with self._file.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(asdict(item)) + "\n" for item in new)

    def add_from(self, origin: Mapping[str, Path], rejected: Iterable[Rejected], *, by_all: bool = True) -> None:
        """`add` for records of several files; `origin` has the file of each id."""
        by_file: dict[Path, list[Rejected]] = {}
        for item in rejected:
            by_file.setdefault(origin[item.id or ""], []).append(item)
        for source, items in by_file.items():
            self.add(source, items, by_all=by_all)

    def exchange(self) -> None:
        """Learns what other processes have found in their pictures. Collective.

        Each sees but its share: of many processes none would notice that all pictures are gone.
        """
        with self._lock:
            news, self._news = self._news, []
        if not any_has(bool(news)):
            return
        told = json.dumps([[str(source), asdict(item)] for source, item in news]).encode()
        with self._lock:
            for source, item in (entry for part in from_each_process(told) for entry in json.loads(part)):
                self._sources[Path(source)][1][Rejected(**item)] = None
                self._kept[Rejected(**item)] = None

    def judge(self) -> None:
        """Raises RecordsError where a source has lost more than `max_rejected` of its records, or all."""
        with self._lock:
            sources = {source: (total, list(found)) for source, (total, found) in self._sources.items()}
        for source, (total, found) in sources.items():
            check_rejected_share(source, total - len(found), found, self._max_rejected, flags=FLAGS)

    def __len__(self) -> int:
        return len(self._kept)
