"""What the configurations of all families share: reading a decoder's numbers, and saying what is wrong."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from multitap_jax.backbones.decoder import DecoderConfig
from multitap_jax.backbones.rope import Rope
from multitap_jax.config import ConfigError

Config = TypeVar("Config")


def optional(section: Mapping[str, Any], name: str, default: Any) -> Any:
    """The entry, or `default` where it is absent or null."""
    value = section.get(name)
    return default if value is None else value


def expect(section: Mapping[str, Any], name: str, *values: Any) -> None:
    """Raises ConfigError where the section says something else than the implemented `values`; absent is the first."""
    found = section.get(name, values[0])
    if found not in values:
        known = " or ".join(map(repr, values))
        hint = f"expected {known}" if name == "model_type" else f"is not implemented; this family has {known}"
        joint = ": " if name == "model_type" else " "
        raise ConfigError(f"{name} = {found!r}{joint}{hint}")


def decoder_config(
    text: Mapping[str, Any],
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int | None,
    rope_theta: float,
    rms_norm_eps: float,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    head_dim: int | None = None,
) -> DecoderConfig:
    """A decoder's numbers from the text section of `config.json`; the arguments are what an absent entry means.

    Raises:
      ConfigError: an activation or a rotary scaling that is not implemented.
    """
    expect(text, "hidden_act", "silu")
    heads = optional(text, "num_attention_heads", num_attention_heads)
    groups = text.get("num_key_value_heads", num_key_value_heads)  # null means as many as there are query heads
    hidden = optional(text, "hidden_size", hidden_size)
    return DecoderConfig(
        vocab_size=optional(text, "vocab_size", vocab_size),
        hidden_size=hidden,
        intermediate_size=optional(text, "intermediate_size", intermediate_size),
        num_layers=optional(text, "num_hidden_layers", num_hidden_layers),
        num_heads=heads,
        num_kv_heads=heads if groups is None else groups,
        head_dim=optional(text, "head_dim", head_dim or _share(hidden, heads)),
        rope=Rope.from_hf(text, theta=rope_theta),
        rms_norm_eps=float(optional(text, "rms_norm_eps", rms_norm_eps)),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
    )


def _share(hidden: int, heads: int) -> int:
    if heads <= 0 or hidden % heads:
        raise ConfigError(f"hidden_size = {hidden} must be divisible by num_attention_heads = {heads}")
    return hidden // heads


def check(config: Config, what: str) -> Config:
    """The configuration itself, once every number of its parts is possible, and they fit each other.

    A configuration may say with `inconsistencies()`, as its parts do, what does not fit between them.

    Raises:
      ConfigError: lists what is not.
    """
    problems = [problem for part in _parts(config) for problem in _problems(part)]
    if hasattr(config, "inconsistencies"):
        problems += list(config.inconsistencies())
    if problems:
        raise ConfigError(f"config.json does not describe {what}:\n" + "\n".join(problems))
    return config


def _parts(config: Any) -> Iterator[Any]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if hasattr(value, "inconsistencies") and dataclasses.is_dataclass(value):
            yield value


def _problems(part: Any) -> list[str]:
    sizes = ((field.name, getattr(part, field.name)) for field in dataclasses.fields(part))
    wrong = [
        f"{name} = {size} must be positive"
        for name, size in sizes
        if isinstance(size, int) and not isinstance(size, bool) and size <= 0
    ]
    return wrong or list(part.inconsistencies())
