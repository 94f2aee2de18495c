"""The weight table of LLaVA-1.5, and what it shares with its kin: the tower's rules and the spellings of keys."""

from multitap_jax.backbones.llava import LlavaConfig
from multitap_jax.backbones.llava_onevision import LlavaOnevisionConfig
from multitap_jax.backbones.vit import ViTConfig
from multitap_jax.weights.mapping import Rule, Table
from multitap_jax.weights.rules import decoder_rules, layer_norm, linear

# Hub files: `language_model.model.*`, `language_model.lm_head.*`, `vision_tower.vision_model.*`. transformers 5 writes
# `vision_tower.*`; its modules are `model.language_model.*`, `lm_head.*`, `model.vision_tower.*`, and those of its base
# model alone `language_model.*`. The longest prefix comes first; some only keep a shorter one from being replaced.
SPELLINGS = (
    ("model.language_model.", "language_model.model."),
    ("language_model.model.", "language_model.model."),
    ("language_model.lm_head.", "language_model.lm_head."),
    ("language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("vision_tower.vision_model.", "vision_tower.vision_model."),
    ("vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
)
TOWER = "vision_tower.vision_model"


def table(config: LlavaConfig | LlavaOnevisionConfig) -> Table:
    """Rules of a model with this configuration."""
    rules = decoder_rules(config.text, "language_model.model") + tower_rules(config.vision) + projector_rules(config)
    return Table(tuple(rules), SPELLINGS, unused_keys(config.vision))


def tower_rules(config: ViTConfig, key: str = TOWER) -> list[Rule]:
    """`backbones.vit.ViT` under the names of transformers' CLIP and SigLIP, after `key`."""
    path = "vision.tower"
    rules = [
        Rule(f"{key}.embeddings.patch_embedding.weight", f"{path}.patch_embed.kernel", "conv2d"),
        Rule(f"{key}.embeddings.position_embedding.weight", f"{path}.positions"),
    ]
    if config.class_token:
        rules.append(Rule(f"{key}.embeddings.class_embedding", f"{path}.class_token"))
        rules += layer_norm(f"{key}.pre_layrnorm", f"{path}.pre_norm")
    else:
        rules.append(Rule(f"{key}.embeddings.patch_embedding.bias", f"{path}.patch_embed.bias"))
    return rules + _layer_rules(key, f"{path}.layers")


def projector_rules(config: LlavaConfig | LlavaOnevisionConfig) -> list[Rule]:
    """`backbones.llava.Projector`."""
    rules = linear("multi_modal_projector.linear_1", "vision.projector.fc1", bias=config.projector_bias)
    return rules + linear("multi_modal_projector.linear_2", "vision.projector.fc2", bias=config.projector_bias)


def unused_keys(config: ViTConfig) -> dict[str, str | None]:
    """What a checkpoint holds behind the states that are looked at: later layers, the last norm, heads."""
    keys: dict[str, str | None] = {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}
    layers = [rule.key for rule in _layer_rules(TOWER, "")]
    behind = range(config.num_layers, config.stored_layers)
    names = [key.replace("{layer}", str(number)) for number in behind for key in layers]
    names += [f"{TOWER}.post_layernorm.{kind}" for kind in ("weight", "bias")]
    if config.pooler:
        names += [f"{TOWER}.head.{name}" for name in ("probe", "attention.in_proj_weight", "attention.in_proj_bias")]
        modules = ("attention.out_proj", "layernorm", "mlp.fc1", "mlp.fc2")
        names += [f"{TOWER}.head.{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    return keys | dict.fromkeys(names)


def _layer_rules(tower: str, path: str) -> list[Rule]:
    key = f"{tower}.encoder.layers.{{layer}}"
    rules = layer_norm(f"{key}.layer_norm1", f"{path}.norm1") + layer_norm(f"{key}.layer_norm2", f"{path}.norm2")
    for name in ("q_proj", "k_proj", "v_proj"):
        rules += linear(f"{key}.self_attn.{name}", f"{path}.attention.{name}")
    rules += linear(f"{key}.self_attn.out_proj", f"{path}.attention.o_proj")
    for name in ("fc1", "fc2"):
        rules += linear(f"{key}.mlp.{name}", f"{path}.mlp.{name}")
    return rules
