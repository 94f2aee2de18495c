"""The weight table of Llama-3.2-Vision."""

from multitap_jax.backbones.mllama import EXTRA_TOKENS, MllamaConfig
from multitap_jax.weights.mapping import Rule, Table
from multitap_jax.weights.rules import decoder_rules, layer_norm, linear, rms_norm, rule

# Hub files: `language_model.model.*`, `vision_model.*`, `multi_modal_projector.*`. State of a transformers-5 model: the
# same under `model.`, without the inner `model`. Base model saved alone: without the outer one.
SPELLINGS = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_model.", "vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
    ("language_model.model.", "language_model.model."),
    ("language_model.lm_head.", "language_model.lm_head."),
    ("language_model.", "language_model.model."),
)


def table(config: MllamaConfig) -> Table:
    """Rules of a model with this configuration."""
    rules = decoder_rules(config.text, "language_model.model", layers=config.cross.self_layers)
    rules += _cross_rules(config.cross.layers)
    rules += _vision_rules()
    rules += linear("multi_modal_projector", "vision.projector")
    head, text = "language_model.lm_head.weight", config.text
    return Table(tuple(rules), SPELLINGS, {head: None}, {head: (text.vocab_size - EXTRA_TOKENS, text.hidden_size)})


def _cross_rules(layers: tuple[int, ...]) -> list[Rule]:
    key, path = "language_model.model.layers.{layer}", "text.cross_layers"
    rules = rms_norm(f"{key}.input_layernorm", f"{path}.attention_norm", layers)
    rules += rms_norm(f"{key}.post_attention_layernorm", f"{path}.mlp_norm", layers)
    rules.append(rule(f"{key}.cross_attn_attn_gate", f"{path}.attention_gate", layers=layers))
    rules.append(rule(f"{key}.cross_attn_mlp_gate", f"{path}.mlp_gate", layers=layers))
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        rules += linear(f"{key}.cross_attn.{name}", f"{path}.attention.{name}", bias=False, layers=layers)
    for name in ("q_norm", "k_norm"):
        rules += rms_norm(f"{key}.cross_attn.{name}", f"{path}.attention.{name}", layers)
    for name in ("gate_proj", "up_proj", "down_proj"):
        rules += linear(f"{key}.mlp.{name}", f"{path}.mlp.{name}", bias=False, layers=layers)
    return rules


def _vision_rules() -> list[Rule]:
    position = "vision_model.gated_positional_embedding"
    rules = [
        rule("vision_model.patch_embedding.weight", "vision.patch_embed.kernel", "conv2d"),
        rule("vision_model.class_embedding", "vision.class_embedding"),
        rule(f"{position}.embedding", "vision.position.embedding"),
        rule(f"{position}.tile_embedding.weight", "vision.position.tile_embedding"),
        rule(f"{position}.gate", "vision.position.gate"),
    ]
    for theirs, ours in (("pre", "before"), ("post", "after")):
        tile = f"vision_model.{theirs}_tile_positional_embedding"
        rules.append(rule(f"{tile}.embedding.weight", f"vision.tile_{ours}.embedding"))
        rules.append(rule(f"{tile}.gate", f"vision.tile_{ours}.gate"))
        rules += layer_norm(f"vision_model.layernorm_{theirs}", f"vision.norm_{ours}")
    for theirs, ours in (("transformer", "layers"), ("global_transformer", "global_layers")):
        key, path = f"vision_model.{theirs}.layers.{{layer}}", f"vision.{ours}"
        rules += layer_norm(f"{key}.input_layernorm", f"{path}.norm1")
        rules += layer_norm(f"{key}.post_attention_layernorm", f"{path}.norm2")
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            rules += linear(f"{key}.self_attn.{name}", f"{path}.attention.{name}", bias=False)
        for name in ("fc1", "fc2"):
            rules += linear(f"{key}.mlp.{name}", f"{path}.mlp.{name}")
    gates = "vision_model.global_transformer.layers.{layer}"
    rules.append(rule(f"{gates}.gate_attn", "vision.global_layers.attention_gate"))
    rules.append(rule(f"{gates}.gate_ffn", "vision.global_layers.mlp_gate"))
    return rules
