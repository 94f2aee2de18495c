"""The weight table of Qwen2-VL."""

from multitap_jax.backbones.qwen2_vl import Qwen2VLConfig
from multitap_jax.weights.mapping import Rule, Table
from multitap_jax.weights.rules import decoder_rules, layer_norm, linear

# Hub files: `model.*`, `visual.*`. State of a transformers-5 model: `model.language_model.*`, `model.visual.*`. Base
# model saved alone: `language_model.*`, `visual.*`.
SPELLINGS = (("model.language_model.", "model."), ("model.visual.", "visual."), ("language_model.", "model."))


def table(config: Qwen2VLConfig) -> Table:
    """Rules of a model with this configuration."""
    block = "visual.blocks.{layer}"
    rules = decoder_rules(config.text)
    rules.append(Rule("visual.patch_embed.proj.weight", "vision.patch_embed.kernel", "conv3d"))
    for name in ("norm1", "norm2"):
        rules += layer_norm(f"{block}.{name}", f"vision.layers.{name}")
    for name in ("qkv", "proj"):
        rules += linear(f"{block}.attn.{name}", f"vision.layers.attention.{name}")
    for name in ("fc1", "fc2"):
        rules += linear(f"{block}.mlp.{name}", f"vision.layers.mlp.{name}")
    rules += layer_norm("visual.merger.ln_q", "vision.merger.norm")
    rules += linear("visual.merger.mlp.0", "vision.merger.fc1")
    rules += linear("visual.merger.mlp.2", "vision.merger.fc2")
    return Table(tuple(rules), SPELLINGS, unused={"lm_head.weight": "model.embed_tokens.weight"})
