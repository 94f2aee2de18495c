"""Run configurations: an ml_collections ConfigDict in, frozen dataclasses out.

A config file (`configs/*.py`) has `get_config()`; flags override single values (`--config.batch_size=8`). Whatever the
file and the flags say is checked here once, before anything is loaded: an unknown key is an error that names the
nearest known one, a wrong type or value an error that names the key, the value and what was expected.
"""

import dataclasses
import difflib
import inspect
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

C = TypeVar("C")
COMPARING = "bradley-terry"  # the objective that needs groups


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and the remedy."""


def _problems(path: str, config: Any, rules: Mapping[str, Any]) -> list[str]:
    """What is wrong with the fields that `rules` names: allowed values, or "LOW" to "HIGH" as (lowest, highest)."""
    wrong = []
    for name, rule in rules.items():
        value = getattr(config, name)
        if isinstance(rule[0], str):
            if value not in rule:
                wrong.append(f"{path}.{name} = {value!r}: expected one of {', '.join(rule)}")
            continue
        low, high = rule
        # NaN is in no range, and infinity is no setting.
        if not (low <= value <= high and math.isfinite(value)):
            bounds = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
            wrong.append(f"{path}.{name} = {value!r}: expected {bounds}")
    return wrong


def _refuse(wrong: list[str]) -> None:
    if wrong:
        raise ConfigError("\n".join(wrong))


def _is_target(name: str) -> bool:
    return name == "score" or (name.startswith("ratings.") and len(name) > len("ratings."))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which backbone and how it is computed.

    Attributes:
      checkpoint: folder of a Hugging Face model or of a multitap artefact; hub:OWNER/NAME[@REVISION] fetches one.
      dtype: computation type, "bfloat16" or "float32"; master weights are always float32.
      remat: what the backward pass recomputes: "none", "dots" (keep matrix products), "offload" (keep them in the
        host's memory), "full" (keep layer inputs only).
      attention: attention backend: "auto" (by platform, type, length and mesh), "dense", "chunked", "blockwise",
        "cudnn" (NVIDIA), "splash" (TPU) or "ring" (rows spread over `mesh.context`); docs/performance.md.
      position_mode: "mrope" (the architecture's own), "flat" (one running position on all three axes, as the official
        checkpoints were trained), or "auto" (what the checkpoint says, else "mrope").
    """

    checkpoint: str = ""
    dtype: str = "bfloat16"
    remat: str = "none"
    attention: str = "auto"
    position_mode: str = "auto"

    def __post_init__(self) -> None:
        rules = {"dtype": ("bfloat16", "float32"), "remat": ("none", "dots", "offload", "full")}
        wrong = _problems("config.model", self, rules)
        if self.attention != "auto":
            from multitap_jax.backbones.attention import UnsupportedAttentionError, check_backend

            try:
                check_backend(self.attention)
            except UnsupportedAttentionError as error:
                wrong.append(f"config.model.{error}")
        _refuse(wrong)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which records, and how a record becomes tokens and patches.

    Attributes:
      train: records file (JSONL, CSV, Parquet) or folder holding one; several with commas between.
      balanced: further ones, cut so that every value of the target occurs as often as its rarest (the official rule for
        ImageReward).
      evaluation: held-out records, or "" to hold out `holdout` of the groups of `train`.
      holdout: share of groups held out when `evaluation` is empty; 0 disables evaluation.
      target: "score" or "ratings.NAME": the number to learn.
      target_range: the values of the target that map to 0 and 1.
      prompt: "official-train", "official-eval" or "official-stage2" (`data/prompts.py`).
      image_policy: "square:N", "native:MIN:MAX" pixels, "crop:N", "tiles:N", "anyres:N" (see `ImagePolicy`), as
        far as the family knows it, or "auto" (the artefact's, else the family's).
      shuffle: "pairs" (as the official recipe), "groups" (texts of one image stay together: far fewer tokens), "none".
      row_length: tokens a packed row; 0 picks the smallest of the standard lengths that suits the data.
      max_length: longest pair in tokens, image tokens included; longer ones are rejected.
      max_rejected: share of unusable records above which the run stops.
      allow_outside_root: let image paths leave the folder of their records file.
    """

    train: str = ""
    balanced: str = ""
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
        rules = {
            "holdout": (0, 1),
            "shuffle": ("pairs", "groups", "none"),
            "row_length": (0, math.inf),
            "max_length": (1, math.inf),
            "max_rejected": (0, 1),
        }
        wrong = _problems("config.data", self, rules)
        low, high = self.target_range
        if not (low < high and math.isfinite(low) and math.isfinite(high)):
            wrong.append(f"config.data.target_range = {self.target_range}: expected (lowest, highest)")
        if not _is_target(self.target):
            wrong.append(f"config.data.target = {self.target!r}: expected score or ratings.NAME")
        _refuse(wrong)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate.

    Attributes:
      learning_rate: of AdamW, once the warm-up is over.
      schedule: "constant", or "cosine" (falls to zero at the last step).
      warmup_ratio: share of the steps in which the rate rises linearly from zero.
      weight_decay: decoupled, on every parameter.
      b1: decay of the mean of the gradients.
      b2: decay of the mean of their squares.
      eps: added to the root of that mean.
      clip_norm: largest norm of the gradient; 0 does not clip.
      mean_dtype: type of the running mean of the gradients, "float32" or "bfloat16" (2 bytes a parameter less). That of
        their squares stays float32: in bfloat16 its steps of 1 - b2 would round to nothing.
      offload: keep both in the host's memory between the steps, where the backend can.
    """

    learning_rate: float = 2e-7
    schedule: str = "constant"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0
    mean_dtype: str = "float32"
    offload: bool = False

    def __post_init__(self) -> None:
        wrong = _problems(
            "config.optimizer",
            self,
            {
                "learning_rate": (0, math.inf),
                "schedule": ("constant", "cosine"),
                "weight_decay": (0, math.inf),
                "eps": (0, math.inf),
                "clip_norm": (0, math.inf),
                "mean_dtype": ("float32", "bfloat16"),
            },
        )
        for name in ("warmup_ratio", "b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                wrong.append(f"config.optimizer.{name} = {getattr(self, name)}: expected a number in [0, 1)")
        _refuse(wrong)


@dataclasses.dataclass(frozen=True)
class TrainableConfig:
    """Which parameters learn.

    Attributes:
      parts: "full", "head", "text" (all but the vision tower) or "lora" (adapters and head).
      lora_rank: columns of an adapter.
      lora_alpha: an adapter is scaled by lora_alpha / lora_rank.
      lora_targets: names of the linear modules that get adapters.
    """

    parts: str = "full"
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        rules = {"parts": ("full", "head", "text", "lora"), "lora_rank": (1, math.inf), "lora_alpha": (0, math.inf)}
        _refuse(_problems("config.trainable", self, rules))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; they multiply to the number of devices. One may be -1, which takes what is left.

    Attributes:
      data: shares of the batch, each with whole parameters.
      fsdp: shares of the batch that also share the parameters.
      tensor: shares of heads and of inner widths.
      context: stretches of each row of the decoder, for rows too long for one device (`attention/ring.py`); towers
        are computed whole on each.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep; 0 disables a trigger.

    Attributes:
      every_steps: save after so many steps.
      every_minutes: save when the last one is so long ago.
      keep: how many of the newest stay.
      keep_best: how many of the best by held-out numbers stay besides; if any, every evaluated state is saved.
      best_by: the number that judges: "loss", "tau_b", "tau_c", "pearson" or "spearman".
      final: which state becomes the artefact, the "last" or the "best" (needs keep_best).
    """

    every_steps: int = 500
    every_minutes: float = 15.0
    keep: int = 3
    keep_best: int = 0
    best_by: str = "loss"
    final: str = "last"

    def __post_init__(self) -> None:
        rules: dict[str, Any] = dict.fromkeys(("every_steps", "every_minutes", "keep_best"), (0, math.inf))
        rules |= {
            "keep": (1, math.inf),
            "best_by": ("loss", "tau_b", "tau_c", "pearson", "spearman"),
            "final": ("last", "best"),
        }
        wrong = _problems("config.checkpoint", self, rules)
        if self.final == "best" and self.keep_best == 0:
            wrong.append("config.checkpoint.final = 'best' needs config.checkpoint.keep_best = 1 or more")
        _refuse(wrong)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A stage-1 run.

    Attributes:
      batch_size: pairs an optimizer step.
      accumulation: micro-batches a step is cut into.
      objective: "mse" (squared error of the score, the official one), "huber", or "bradley-terry" (which of two records
        of a group is better: the same `group`, or else the same pictures and request; only the order of scores then
        means something). Groups are kept whole; steps hold as many as `batch_size` allows.
      huber_delta: error of a score, 0 to 1, from which on "huber" is linear.
      epochs: passes over the pairs.
      seed: of the order, of the held-out groups, and of new weights.
      evaluate_every: steps between two evaluations of held-out pairs; 0 evaluates only at the end.
      log_every: steps between two lines of metrics.jsonl.
      spike_factor: stop when the median loss of the last 9 steps is so many times that of up to 128 before; 0 never
        does (`stage1/spikes.py`).
      profile: (first step, number of steps) to trace with jax.profiler into the folder profile/; 0 steps trace none.
      compilation_cache: folder in which compiled programs are kept for the next start; "" keeps none.
    """

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    trainable: TrainableConfig = TrainableConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    batch_size: int = 32
    accumulation: int = 1
    objective: str = "mse"
    huber_delta: float = 0.1
    epochs: int = 1
    seed: int = 42
    evaluate_every: int = 200
    log_every: int = 10
    spike_factor: float = 10.0
    profile: tuple[int, int] = (1, 0)
    compilation_cache: str = ""

    def __post_init__(self) -> None:
        rules: dict[str, Any] = dict.fromkeys(("batch_size", "accumulation", "epochs", "log_every"), (1, math.inf))
        rules |= {"evaluate_every": (0, math.inf), "seed": (0, math.inf), "spike_factor": (0, math.inf)}
        rules |= {"objective": ("mse", "huber", COMPARING), "huber_delta": (0, math.inf)}
        wrong = _problems("config", self, rules)
        if self.huber_delta == 0:
            wrong.append("config.huber_delta = 0: expected more than 0")
        if self.objective == COMPARING:
            wrong += self._against_comparing()
        if 0 < self.spike_factor <= 1:
            wrong.append(f"config.spike_factor = {self.spike_factor}: expected more than 1, or 0 for no watch")
        if min(self.profile) < 0:
            wrong.append(f"config.profile = {self.profile}: expected (first step, number of steps), 0 or more each")
        _refuse(wrong)

    def _against_comparing(self) -> list[str]:
        """What does not go with comparisons inside groups."""
        wrong = []
        if self.data.shuffle == "pairs":
            wrong.append(f"config.data.shuffle = 'pairs' tears groups apart, which {COMPARING} compares: take 'groups'")
        if self.checkpoint.keep_best and self.checkpoint.best_by == "loss":
            wrong.append(
                f"config.checkpoint.best_by = 'loss' is an error of scores, which {COMPARING} only orders: take 'tau_b'"
            )
        return wrong


def describe(cls: Any, path: str = "config") -> list[tuple[str, Any, str]]:
    """(dotted name, default, meaning) of every setting of a configuration, sections last; out of the docstrings."""
    meanings = _attribute_docs(cls.__doc__ or "")
    settings, sections = [], []
    for field in dataclasses.fields(cls):
        name = f"{path}.{field.name}"
        if dataclasses.is_dataclass(field.default):
            sections += describe(type(field.default), name)
        else:
            settings.append((name, field.default, meanings.get(field.name, "")))
    return settings + sections


def _attribute_docs(text: str) -> dict[str, str]:
    """The `name: meaning` lines under "Attributes:", continuation lines joined."""
    out: dict[str, str] = {}
    last = ""
    for line in inspect.cleandoc(text).partition("Attributes:\n")[2].splitlines():
        if line.startswith("    "):
            out[last] += " " + line.strip()
        elif ":" in line:
            last, _, meaning = line.strip().partition(": ")
            out[last] = meaning
    return out


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


def dotted(config: Any, path: str = "config") -> dict[str, Any]:
    """The resolved configuration by dotted names, such as "config.model.dtype", as plain JSON: tuples are lists."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{path}.{field.name}"
        if dataclasses.is_dataclass(value):
            out |= dotted(value, name)
        else:
            out[name] = list(value) if isinstance(value, tuple) else value
    return out


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain values, for logs and provenance."""
    return dataclasses.asdict(config)
