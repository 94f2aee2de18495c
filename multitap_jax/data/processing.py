"""Everything that turns a record into tokens and patches for one model folder, and the contract it follows."""

from dataclasses import dataclass
from pathlib import Path

from multitap_jax.data.images import ImageReader
from multitap_jax.data.layouts import ImagePolicy, Vision
from multitap_jax.data.prompts import Prompter, load_tokenizer
from multitap_jax.families import Family, read_config


@dataclass(frozen=True)
class Contract:
    """What has to be the same for a score to mean the same: prompt variant, positions, image policy, pooling.

    The defaults are those of most families; `Contract.of` gives a family's own.
    """

    prompt: str = "official-train"
    position_mode: str = "mrope"
    image_policy: str = "square:560"
    pooling: str = "last"

    @classmethod
    def of(cls, family: Family, **chosen: str) -> "Contract":
        """The family's defaults where nothing is chosen."""
        defaults = {"position_mode": family.position_modes[0], "image_policy": family.image_policy}
        return cls(**{**defaults, **chosen})


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
          FolderError: config.json is missing or describes something that is not implemented.
          FileNotFoundError: the tokenizer is missing.
          ValueError: for an unknown prompt, policy or position mode, or if tokenizer and config disagree.
        """
        family, config = read_config(folder)
        if contract.position_mode not in family.position_modes:
            raise ValueError(
                f"position_mode {contract.position_mode!r}: {config.model_type} has {', '.join(family.position_modes)}"
            )
        if contract.pooling != "last":
            raise ValueError(f"pooling {contract.pooling!r}; only the last token is pooled")
        prompter = Prompter(load_tokenizer(folder), contract.prompt, family.chat)
        if prompter.placeholder_id != config.image_token_id:
            raise ValueError(
                f"{folder}: the tokenizer's image token has id {prompter.placeholder_id}, config.json says "
                f"{config.image_token_id}; the two files belong to different models"
            )
        layout = family.layout(config, ImagePolicy.parse(contract.image_policy))
        vision = Vision(layout, prompter.placeholder_id, contract.position_mode, config.text.rope.limit)
        return cls(contract, prompter, ImageReader(layout, cache_bytes=cache_bytes), vision)
