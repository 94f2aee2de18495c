"""Where a checkpoint is: a local folder, or, only where its name begins with "hub:", on the Hugging Face hub.

    runs/official/artefact              a folder; a bare name is never looked for anywhere else
    hub:Qwen/Qwen2-VL-2B-Instruct       fetched once into the hub's cache, then read from there
    hub:Qwen/Qwen2-VL-2B-Instruct@main  a branch, tag or commit

The hub's own settings count: HF_HUB_OFFLINE=1 reads the cache alone, HF_HOME and HF_HUB_CACHE say where it is.
"""

import dataclasses
import re
from pathlib import Path

HUB = "hub:"
# What a model is made of here: no pickles, no code, and nothing from folders inside the repository.
WANTED = ("*.json", "model*.safetensors", "heads.safetensors", "*.jinja", "merges.txt", "tokenizer.model")
UNWANTED = ("*/*",)
_COMMIT = re.compile(r"[0-9a-f]{40}")


class SourceError(ValueError):
    """A checkpoint that is not where its name says, or cannot be fetched from there."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint on this machine.

    Attributes:
      folder: where its files are.
      name: the repository's name, or the folder's.
      revision: the commit, "" for a folder that is no snapshot of a repository.
    """

    folder: Path
    name: str
    revision: str = ""

    @property
    def address(self) -> str:
        """What names exactly this: hub:OWNER/NAME@COMMIT, which a moved branch leaves alone, or the folder."""
        return f"{HUB}{self.name}@{self.revision}" if self.revision else str(self.folder)


def locate(checkpoint: str | Path) -> Source:
    """Finds a checkpoint, and fetches it where the hub is asked for by name.

    Raises:
      SourceError: there is no such folder; the name is none; the hub cannot be reached and its cache lacks the files.
    """
    name = str(checkpoint)
    if name.startswith(HUB):
        return _fetch(name)
    folder = Path(checkpoint)
    if not folder.is_dir():
        asked = name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else "OWNER/NAME"
        raise SourceError(
            f"{folder}: no such folder. Nothing is fetched unasked: {HUB}{asked} names a repository of the hub; "
            "`multitap demo` leaves a tiny model in demo_run/base"
        )
    return _of_folder(folder)


def local_folder(checkpoint: str | Path) -> Path:
    """The folder of a checkpoint, which need not exist unless it is on the hub."""
    return locate(checkpoint).folder if str(checkpoint).startswith(HUB) else Path(checkpoint)


def _fetch(name: str) -> Source:
    match = re.fullmatch(HUB + r"([\w.-]+/[\w.-]+)(?:@(\S+))?", name)
    if match is None:
        raise SourceError(f"{name}: expected {HUB}OWNER/NAME or {HUB}OWNER/NAME@REVISION")
    from huggingface_hub import constants, snapshot_download

    repository, revision = match.groups()
    try:
        folder = snapshot_download(repository, revision=revision, allow_patterns=[*WANTED], ignore_patterns=[*UNWANTED])
    except (OSError, ValueError, RuntimeError) as error:
        offline = (
            f"only the cache ({constants.HF_HUB_CACHE}) was looked in, since HF_HUB_OFFLINE is set; fetch it once "
            "without, or give a local folder"
        )
        online = f"{error}\nGive a local folder where the hub cannot be reached (gated models need HF_TOKEN)"
        raise SourceError(f"{name}: not available; {offline if constants.HF_HUB_OFFLINE else online}") from error
    return dataclasses.replace(_of_folder(Path(folder)), name=repository)


def _of_folder(folder: Path) -> Source:
    """A folder of the hub's cache, models--OWNER--NAME/snapshots/COMMIT, says itself what it is."""
    parts = folder.resolve().parts[-3:]
    if len(parts) == 3 and parts[0].startswith("models--") and parts[1] == "snapshots" and _COMMIT.fullmatch(parts[2]):
        return Source(folder, parts[0].removeprefix("models--").replace("--", "/", 1), parts[2])
    return Source(folder, folder.resolve().name)
