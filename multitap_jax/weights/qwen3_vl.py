"""The weight table of Qwen3-VL."""

from multitap_jax.backbones.qwen3_vl import Qwen3VLConfig
from multitap_jax.weights.mapping import Rule, Table
from multitap_jax.weights.rules import decoder_rules, layer_norm, linear

# Hub files have the names of a transformers model's state; its base model saved alone has no `model.`.
SPELLINGS = (("language_model.", "model.language_model."), ("visual.", "model.visual."))


def table(config: Qwen3VLConfig) -> Table:
    """Rules of a model with this configuration."""
    visual, block = "model.visual", "model.visual.blocks.{layer}"
    rules = decoder_rules(config.text, key="model.language_model")
    rules.append(Rule(f"{visual}.patch_embed.proj.weight", "vision.patch_embed.kernel", "conv3d"))
    rules.append(Rule(f"{visual}.patch_embed.proj.bias", "vision.patch_embed.bias"))
    rules.append(Rule(f"{visual}.pos_embed.weight", "vision.positions.table"))
    for name in ("norm1", "norm2"):
        rules += layer_norm(f"{block}.{name}", f"vision.layers.{name}")
    for name in ("qkv", "proj"):
        rules += linear(f"{block}.attn.{name}", f"vision.layers.attention.{name}")
    for name in ("fc1", "fc2"):
        rules += linear(f"{block}.mlp.linear_{name}", f"vision.layers.mlp.{name}")
    for key, path in (("merger", "merger"), ("deepstack_merger_list.{layer}", "deepstack")):
        rules += layer_norm(f"{visual}.{key}.norm", f"vision.{path}.norm")
        for name in ("fc1", "fc2"):
            rules += linear(f"{visual}.{key}.linear_{name}", f"vision.{path}.{name}")
    return Table(tuple(rules), SPELLINGS, unused={"lm_head.weight": "model.language_model.embed_tokens.weight"})
