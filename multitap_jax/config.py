"""Run configurations: an ml_collections ConfigDict in, frozen dataclasses out.

A config file (`configs/*.py`) has `get_config()`; flags override single values (`--config.batch_size=8`). Whatever the
file and the flags say is checked here once: an unknown key is an error that names the nearest known one, a wrong type
is an error that names the key, the value and the type that was expected.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

C = TypeVar("C")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and the remedy."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which backbone and how it is computed.

    Attributes:
      checkpoint: folder of a Hugging Face model or of a multitap artefact.
      dtype: computation type, "bfloat16" or "float32"; master weights are always float32.
      remat: what the backward pass recomputes: "none", "dots" (keep matrix products), "full" (keep layer inputs only).
      attention: attention backend, see `backbones/attention.py`.
      position_mode: "mrope" (the architecture's own), "flat" (one running position on all three axes, as the official
        checkpoints were trained), or "auto" (what the checkpoint says, else "mrope").
    """

    checkpoint: str = ""
    dtype: str = "bfloat16"
    remat: str = "none"
    attention: str = "auto"
    position_mode: str = "auto"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which records, and how a record becomes tokens and patches.

    Attributes:
      train: records file (JSONL, CSV, Parquet) or folder holding one.
      evaluation: held-out records, or "" to hold out `holdout` of the groups of `train`.
      holdout: share of groups held out when `evaluation` is empty; 0 disables evaluation.
      target: "score" or "ratings.NAME": the number to learn.
      target_range: the values of the target that map to 0 and 1.
      prompt: prompt variant (`data/prompts.py`).
      image_policy: "square:N", "native:MIN:MAX" pixels, "tiles:N", or "auto" (the artefact's, else "square:560").
      shuffle: "pairs" (as the official recipe) or "groups" (texts of one image stay together: far fewer tokens).
      row_length: tokens a packed row; 0 picks the smallest of the standard lengths that suits the data.
      max_length: longest pair in tokens, image tokens included; longer ones are rejected.
      max_rejected: share of unusable records above which the run stops.
      allow_outside_root: let image paths leave the folder of their records file.
    """

    train: str = ""
    evaluation: str = ""
    holdout: float = 0.1
    target: str = "score"
    target_range: tuple[float, float] = (0.0, 1.0)
    prompt: str = "official-train"
    image_policy: str = "auto"
    shuffle: str = "groups"
    row_length: int = 0
    max_length: int = 2048
    max_rejected: float = 0.01
    allow_outside_root: bool = False

    def __post_init__(self) -> None:
        low, high = self.target_range
        if not low < high:
            raise ConfigError(f"config.data.target_range = {self.target_range}: expected (lowest, highest)")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; schedule is "constant" or "cosine" (to zero, after a linear warm-up over `warmup_ratio` of the steps)."""

    learning_rate: float = 2e-7
    schedule: str = "constant"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class TrainableConfig:
    """Which parameters learn: "full", "head", "text" (all but the vision tower) or "lora" (adapters and head)."""

    parts: str = "full"
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; one of them may be -1 and takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep; 0 disables a trigger."""

    every_steps: int = 500
    every_minutes: float = 15.0
    keep: int = 3


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A stage-1 run. `batch_size` counts pairs per optimizer step; `accumulation` splits it into micro-batches."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    trainable: TrainableConfig = TrainableConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    batch_size: int = 32
    accumulation: int = 1
    epochs: int = 1
    seed: int = 42
    evaluate_every: int = 200
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"config.{name} = {getattr(self, name)}: expected 1 or more")


def from_config_dict(cls: type[C], values: Mapping[str, Any], path: str = "config") -> C:
    """Builds the frozen dataclass `cls` from a (nested) mapping; absent keys keep their defaults.

    Raises:
      ConfigError: for an unknown key (names the nearest one) or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    unknown = [key for key in values if key not in known]
    if unknown:
        lines = []
        for key in unknown:
            near = difflib.get_close_matches(key, known, n=1)
            lines.append(f"{path}.{key} is not a setting" + (f"; did you mean {path}.{near[0]}?" if near else ""))
        raise ConfigError("\n".join(lines) + f"\nsettings of {path}: {', '.join(known)}")
    return cls(**{key: _convert(hints[key], value, f"{path}.{key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} is a section of settings, but was given {value!r}")
        return from_config_dict(typing.cast(type, hint), dict(value), path)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (tuple, list)):
            raise ConfigError(f"{path} = {value!r}: expected a list of values")
        if Ellipsis not in args and len(value) != len(args):
            raise ConfigError(f"{path} = {value!r}: expected {len(args)} values, got {len(value)}")
        each = [args[0]] * len(value) if Ellipsis in args else args
        return tuple(_convert(arg, item, f"{path}[{i}]") for i, (arg, item) in enumerate(zip(each, value, strict=True)))
    if origin is types.UnionType:
        hint = args
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is int):
        expected = getattr(hint, "__name__", str(hint))
        raise ConfigError(f"{path} = {value!r} ({type(value).__name__}): expected {expected}")
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain values, for logs and provenance."""
    return dataclasses.asdict(config)
