"""The weight table of LLaVA-OneVision: LLaVA's, and the newline."""

import dataclasses

from multitap_jax.backbones.llava_onevision import LlavaOnevisionConfig
from multitap_jax.weights import llava
from multitap_jax.weights.mapping import Rule, Table


def table(config: LlavaOnevisionConfig) -> Table:
    """Rules of a model with this configuration."""
    same = llava.table(config)
    return dataclasses.replace(same, rules=(*same.rules, Rule("image_newline", "vision.newline")))
