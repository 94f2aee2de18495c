"""The weight table of Qwen2.5-VL; names as Qwen2-VL has them but for norms without bias and a gated MLP."""

from multitap_jax.backbones.qwen2_5_vl import Qwen25VLConfig
from multitap_jax.weights.mapping import Rule, Table
from multitap_jax.weights.qwen2_vl import SPELLINGS
from multitap_jax.weights.rules import decoder_rules, linear, rms_norm


def table(config: Qwen25VLConfig) -> Table:
    """Rules of a model with this configuration."""
    block = "visual.blocks.{layer}"
    rules = decoder_rules(config.text)
    rules.append(Rule("visual.patch_embed.proj.weight", "vision.patch_embed.kernel", "conv3d"))
    for name in ("norm1", "norm2"):
        rules += rms_norm(f"{block}.{name}", f"vision.layers.{name}")
    for name in ("qkv", "proj"):
        rules += linear(f"{block}.attn.{name}", f"vision.layers.attention.{name}")
    for name in ("gate_proj", "up_proj", "down_proj"):
        rules += linear(f"{block}.mlp.{name}", f"vision.layers.mlp.{name}")
    rules += rms_norm("visual.merger.ln_q", "vision.merger.norm")
    rules += linear("visual.merger.mlp.0", "vision.merger.fc1")
    rules += linear("visual.merger.mlp.2", "vision.merger.fc2")
    return Table(tuple(rules), SPELLINGS, unused={"lm_head.weight": "model.embed_tokens.weight"})
