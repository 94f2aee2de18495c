"""What the exports share: the files that go along, and which folders they may replace."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from multitap_jax.data.prompts import render_official
from multitap_jax.families import read_config
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.scoring.saving import CONFIG, companion_files

AS_IT_IS = "it goes into the prompt as it is"


def copy_carried(folder: Path, new: Path) -> None:
    """Copies config.json, tokenizer, processor and generation files."""
    for path in [folder / CONFIG, *companion_files(folder)]:
        shutil.copyfile(path, new / path.name)


def rendered_prompts(artefact: Artefact) -> dict[str, str]:
    """A pair of one image as text, as the artefact's contract has it, for programs that know no chat format."""
    chat, variant = read_config(artefact.folder)[0].chat, artefact.manifest.contract.prompt
    return {
        "prompt": render_official(chat, variant, None, 1, "{text}"),
        "prompt_with_request": render_official(chat, variant, "{request}", 1, "{text}"),
        "placeholder": chat.placeholder,
        "text": AS_IT_IS
        if chat.queries
        else "strip it and replace double quotes by blanks before it goes into the prompt",
    }


def replaceable(overwrite: bool, mark: str) -> Callable[[Path], bool]:
    """Only a folder that an export of this kind wrote is ever replaced: one that holds the file `mark`."""
    return lambda old: overwrite and (old / mark).is_file()


def write_tensors(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """A small safetensors file that everybody may read, as files are by default; the writer of safetensors keeps it
    for its owner."""
    save_file(arrays, path)
    path.chmod(0o644)
