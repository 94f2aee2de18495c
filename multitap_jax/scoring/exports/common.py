"""What the exports share: the files that go along, and which folders they may replace."""

import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.numpy import save_file

from multitap_jax.scoring.saving import CONFIG, companion_files


def copy_carried(folder: Path, new: Path) -> None:
    """Copies config.json, tokenizer, processor and generation files."""
    for path in [folder / CONFIG, *companion_files(folder)]:
        shutil.copyfile(path, new / path.name)


def replaceable(overwrite: bool, mark: str) -> Callable[[Path], bool]:
    """Only a folder that an export of this kind wrote is ever replaced: one that holds the file `mark`."""
    return lambda old: overwrite and (old / mark).is_file()


def write_tensors(path: Path, arrays: dict) -> None:
    """A small safetensors file that everybody may read, as files are by default; the writer of safetensors keeps it
    for its owner."""
    save_file(arrays, path)
    path.chmod(0o644)
