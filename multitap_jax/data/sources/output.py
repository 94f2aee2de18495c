"""The folder that a conversion writes: its records are whole or absent, and what failed leaves nothing behind.

Only the rows that gave no record stay then, with the reasons, in rejected.jsonl. What is interrupted (Ctrl-C, kill)
keeps the pictures it has written: the same command finds them.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from multitap_jax.data.sources.base import Dataset, SourceError
from multitap_jax.data.sources.pictures import FOLDER as PICTURES
from multitap_jax.data.tables import REJECTED_NAME
from multitap_jax.files import json_bytes, sole_writer, write_atomic

RECORDS_NAME = "records.jsonl"
DATASET_NAME = "dataset.json"


class Output:
    """The folder while it is being written, held by this process alone.

    Attributes:
      folder: of records, pictures, rejected rows and dataset.json.
      partial: where the records are written until they are whole.
    """

    def __init__(self, folder: Path, dataset: Dataset, split: str):
        self.folder, self.partial = folder, folder / f"{RECORDS_NAME}.partial"
        self._unfinished = json_bytes({"dataset": dataset.name, "split": split, "complete": False})

    @classmethod
    @contextlib.contextmanager
    def opened(cls, folder: Path, dataset: Dataset, split: str) -> Iterator["Output"]:
        """Raises SourceError for a folder of something else, FolderInUseError for one that is being written."""
        new = not folder.exists()
        try:
            with sole_writer(folder):
                note = _note_of(folder, dataset, split)
                output = cls(folder, dataset, split)
                if note is None:
                    write_atomic(folder / DATASET_NAME, output._unfinished)
                try:
                    yield output
                except Exception:
                    if note is None or not note["complete"]:
                        _clear(folder)
                    raise
                finally:
                    output.partial.unlink(missing_ok=True)
        except Exception:
            if new:
                with contextlib.suppress(OSError):  # something is left in it
                    folder.rmdir()
            raise

    def finish(self, note: dict[str, Any]) -> None:
        """Puts the records into their place; what was there before, made by the same command, is whole until here."""
        write_atomic(self.folder / DATASET_NAME, self._unfinished)
        os.replace(self.partial, self.folder / RECORDS_NAME)
        write_atomic(self.folder / DATASET_NAME, json_bytes(note))


def _note_of(folder: Path, dataset: Dataset, split: str) -> dict[str, Any] | None:
    """dataset.json of an earlier conversion of the same; None in a folder without. Raises SourceError for another's."""
    inside = {path.name for path in folder.iterdir()} - {".lock", REJECTED_NAME}
    try:
        note = json.loads((folder / DATASET_NAME).read_bytes())
        if (note["dataset"], note["split"], note["complete"] in (True, False)) == (dataset.name, split, True):
            return note
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if inside:
        raise SourceError(f"{folder}: holds something else than {dataset.title} ({split}); choose another --output")
    return None


def _clear(folder: Path) -> None:
    for name in (RECORDS_NAME, DATASET_NAME):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / PICTURES, ignore_errors=True)
    rejected = folder / REJECTED_NAME
    if rejected.is_file() and not rejected.stat().st_size:
        rejected.unlink()
