"""Everything that turns a record into tokens and patches for one model folder, and the contract it follows."""

import json
from dataclasses import dataclass
from pathlib import Path

from multitap_jax.data.images import ImagePolicy, ImageReader
from multitap_jax.data.packing import Vision
from multitap_jax.data.positions import MODES
from multitap_jax.data.prompts import Prompter, load_tokenizer

DEFAULT_POLICY = "square:560"
DEFAULT_POSITIONS = "mrope"


@dataclass(frozen=True)
class Contract:
    """What has to be the same for a score to mean the same: prompt variant, positions, image policy, pooling."""

    prompt: str = "official-train"
    position_mode: str = DEFAULT_POSITIONS
    image_policy: str = DEFAULT_POLICY
    pooling: str = "last"


@dataclass(frozen=True)
class Processing:
    """Prompter, image reader and vision facts that belong together."""

    contract: Contract
    prompter: Prompter
    reader: ImageReader
    vision: Vision

    @classmethod
    def from_folder(cls, folder: str | Path, contract: Contract, *, cache_bytes: int = 1 << 28) -> "Processing":
        """Reads config.json and the tokenizer of `folder`.

        Raises:
          FileNotFoundError: if config.json or the tokenizer is missing.
          ValueError: for an unknown prompt, policy or position mode, or if tokenizer and config disagree.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder}: no config.json here; this is not a model folder")
        config = json.loads((folder / "config.json").read_text())
        if contract.position_mode not in MODES:
            raise ValueError(f"position_mode {contract.position_mode!r}; the modes are {', '.join(MODES)}")
        if contract.pooling != "last":
            raise ValueError(f"pooling {contract.pooling!r}; only the last token is pooled")
        tower = config["vision_config"]
        patch, merge = int(tower.get("patch_size", 14)), int(tower.get("spatial_merge_size", 2))
        prompter = Prompter(load_tokenizer(folder), contract.prompt, config["model_type"])
        if prompter.placeholder_id != config["image_token_id"]:
            raise ValueError(
                f"{folder}: the tokenizer's image token has id {prompter.placeholder_id}, config.json says "
                f"{config['image_token_id']}; the two files belong to different models"
            )
        reader = ImageReader(
            ImagePolicy.parse(contract.image_policy), patch_size=patch, merge_size=merge, cache_bytes=cache_bytes
        )
        vision = Vision(
            features=3 * patch * patch,
            merge=merge,
            placeholder=prompter.placeholder_id,
            position_mode=contract.position_mode,
        )
        return cls(contract, prompter, reader, vision)
