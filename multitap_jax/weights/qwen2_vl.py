"""The weight table of Qwen2-VL."""

from multitap_jax.weights.mapping import Rule, Table


def _linear(key: str, path: str, *, bias: bool = True) -> list[Rule]:
    rules = [Rule(f"{key}.weight", f"{path}.kernel", "transpose")]
    return [*rules, Rule(f"{key}.bias", f"{path}.bias")] if bias else rules


def _layer_norm(key: str, path: str) -> list[Rule]:
    return [Rule(f"{key}.weight", f"{path}.scale"), Rule(f"{key}.bias", f"{path}.bias")]


def _rules() -> list[Rule]:
    text, block = "model.layers.{layer}", "visual.blocks.{layer}"
    rules = [
        Rule("model.embed_tokens.weight", "text.embed.embedding"),
        Rule("model.norm.weight", "text.norm.scale"),
        Rule(f"{text}.input_layernorm.weight", "text.layers.attention_norm.scale"),
        Rule(f"{text}.post_attention_layernorm.weight", "text.layers.mlp_norm.scale"),
        Rule("visual.patch_embed.proj.weight", "vision.patch_embed.kernel", "patch_conv"),
    ]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        rules += _linear(f"{text}.self_attn.{name}", f"text.layers.attention.{name}", bias=name != "o_proj")
    for name in ("gate_proj", "up_proj", "down_proj"):
        rules += _linear(f"{text}.mlp.{name}", f"text.layers.mlp.{name}", bias=False)
    for name in ("norm1", "norm2"):
        rules += _layer_norm(f"{block}.{name}", f"vision.layers.{name}")
    for name in ("qkv", "proj"):
        rules += _linear(f"{block}.attn.{name}", f"vision.layers.attention.{name}")
    for name in ("fc1", "fc2"):
        rules += _linear(f"{block}.mlp.{name}", f"vision.layers.mlp.{name}")
    rules += _layer_norm("visual.merger.ln_q", "vision.merger.norm")
    rules += _linear("visual.merger.mlp.0", "vision.merger.fc1")
    return rules + _linear("visual.merger.mlp.2", "vision.merger.fc2")


def canonical(key: str) -> str:
    """Hub spelling of a key in any of the three that exist.

    Hub files: `model.*`, `visual.*`. State of a transformers-5 model: `model.language_model.*`, `model.visual.*`. Its
    base model saved alone: `language_model.*`, `visual.*`.
    """
    for other, hub in (
        ("model.language_model.", "model."),
        ("model.visual.", "visual."),
        ("language_model.", "model."),
    ):
        if key.startswith(other):
            return hub + key.removeprefix(other)
    return key


TABLE = Table(tuple(_rules()), canonical, unused={"lm_head.weight": "model.embed_tokens.weight"})
