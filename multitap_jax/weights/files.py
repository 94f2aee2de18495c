"""The weight files of a checkpoint folder: which they are, what is in them, and everything that is wrong with them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from multitap_jax.weights.stored import FolderError, Stored, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
UNFINISHED = (".incomplete", ".part", ".tmp", ".crdownload", ".aria2")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises FolderError if it is missing or no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FolderError(f"{path} does not exist; a checkpoint folder needs it") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FolderError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise FolderError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def stored_tensors(folder: str | Path) -> dict[str, Stored]:
    """Every tensor of a folder's `model*.safetensors`, by name; only headers are read.

    Links are followed, wherever they lead (the hub's cache is made of them); names in the index may not leave the
    folder.

    Raises:
      FolderError: no weight file, shards that are missing or broken, a tensor in two files, an index that says
        otherwise than the files. All of it is listed.
    """
    folder = Path(folder)
    tensors, problems = scan_tensors(folder)
    if problems:
        raise FolderError(_listed(folder, problems) + _unfinished(folder))
    return tensors


def scan_tensors(folder: Path) -> tuple[dict[str, Stored], list[str]]:
    """What `stored_tensors` gives, as far as it can be read, and everything that is wrong with the files.

    Raises:
      FolderError: there are no files, or it is not clear which they are.
    """
    tensors: dict[str, Stored] = {}
    names, problems = _present_files(folder)
    for name in names:
        try:
            found = read_header(folder / name)
        except FolderError as error:
            problems.append(str(error))
            continue
        problems += [f"doubled: {key} is in {tensors[key].path.name} and in {name}" for key in found if key in tensors]
        tensors |= found
    if (folder / INDEX).is_file() and not problems:
        problems = list(_index_problems(folder, tensors))
    return tensors, problems


def read_tensors(folder: str | Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, in memory; raises what `stored_tensors` raises."""
    return {name: tensor.read() for name, tensor in stored_tensors(folder).items()}


def weight_files(folder: Path) -> list[str]:
    """Names of the files that make up the weights: `model.safetensors`, else what the index names, else all shards.

    Raises:
      FolderError: there are none, some are missing, or it is not clear which they are.
    """
    names, problems = _present_files(folder)
    if problems:
        raise FolderError(_listed(folder, problems) + _unfinished(folder))
    return names


def _present_files(folder: Path) -> tuple[list[str], list[str]]:
    """Those of the weight files that are there, and what is said of those that are not."""
    single, indexed = (folder / SINGLE).is_file(), (folder / INDEX).is_file()
    named = _indexed_files(folder) if indexed else []
    if single and named not in ([], [SINGLE]):
        raise FolderError(
            f"{folder} holds {SINGLE} and an index of other files, so it is not clear which are the weights (a save "
            f"that did not end?); remove one or the other"
        )
    if single:
        return [SINGLE], []
    files = named or sorted(path.name for path in folder.glob("model*.safetensors"))
    if not files:
        raise FolderError(f"{folder} has no {SINGLE} and no shards of it.{_advice(folder)}")
    problems = [_missing(folder / name, indexed) for name in files if not (folder / name).is_file()]
    problems += [] if named else [f"{name} is missing" for name in _unnumbered(files)]
    return [name for name in files if (folder / name).is_file()], problems


def _indexed_files(folder: Path) -> list[str]:
    listed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise FolderError(f"{folder / INDEX} has no weight_map")
    names = sorted({str(name) for name in listed.values()})
    outside = [repr(name) for name in names if Path(name).name != name or "\\" in name]
    if outside:
        raise FolderError(f"{folder / INDEX} names {', '.join(outside)}: not a file of this folder, so nothing is read")
    return names


def _index_problems(folder: Path, tensors: dict[str, Stored]) -> Iterator[str]:
    listed = read_json(folder / INDEX)["weight_map"]
    for key, name in listed.items():
        if key not in tensors:
            yield f"{INDEX} names {key} (in {name}), which is not there"
        elif tensors[key].path.name != name:
            yield f"{INDEX} names {key} in {name}, but it is in {tensors[key].path.name}"
    for key in tensors.keys() - listed.keys():
        yield f"{INDEX} does not name {key}, which is in {tensors[key].path.name}"


def _missing(path: Path, indexed: bool) -> str:
    link = f" (a link to {path.readlink()}, which is not there)" if path.is_symlink() else ""
    return f"{path.name} is missing{link}{f', but {INDEX} names it' if indexed else ''}"


def _unnumbered(names: list[str]) -> list[str]:
    """Shards that the numbers in these names promise but that are not among them."""
    numbered = [match for match in (re.fullmatch(r"(.*)-(\d+)-of-(\d+)\.safetensors", name) for name in names) if match]
    lost = []
    for stem, total in sorted({(match[1], match[3]) for match in numbered}):
        numbers = (str(number).zfill(len(total)) for number in range(1, int(total) + 1))
        lost += [f"{stem}-{number}-of-{total}.safetensors" for number in numbers]
    return [name for name in lost if name not in names]


def _advice(folder: Path) -> str:
    if not folder.is_dir():
        return " There is no such folder."
    found = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", *PICKLES))
    pickles = [name for name in found if not name.endswith(".safetensors")]
    others = [name for name in found if name.endswith(".safetensors")]
    advice = _unfinished(folder)
    if others:
        advice += f" It holds {', '.join(others)}: name them model*.safetensors if these are the weights."
    if pickles:
        advice += (
            f" It holds {', '.join(pickles)}: pickles, which run code when they are opened, so they never are here. "
            "Take the safetensors version of this model; or convert it where its origin is trusted, with "
            "`state = torch.load(FILE, weights_only=True, map_location='cpu')` and "
            "`safetensors.torch.save_model` or `model.save_pretrained(FOLDER)`."
        )
    return advice


def _unfinished(folder: Path) -> str:
    left = sorted(
        path.name
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.suffix in UNFINISHED or (path.name.startswith(".model") and ".safetensors." in path.name)
    )
    return f" {', '.join(left)}: a download or save that did not end; start it again." if left else ""


def _listed(folder: Path, problems: list[str]) -> str:
    return f"{folder}: " + (problems[0] if len(problems) == 1 else "\n  " + "\n  ".join(problems))
