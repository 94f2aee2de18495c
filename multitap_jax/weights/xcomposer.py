"""The weight table of InternLM-XComposer2.5."""

from multitap_jax.backbones.xcomposer import XComposerConfig
from multitap_jax.weights.llava import tower_rules
from multitap_jax.weights.mapping import Rule, Table
from multitap_jax.weights.rules import linear, rms_norm

TOWER = "vit.vision_tower.vision_model"
# transformers 5 has no `vision_model.` in its CLIP.
SPELLINGS = ((f"{TOWER}.", f"{TOWER}."), ("vit.vision_tower.", f"{TOWER}."))
LAYER = "model.layers.{layer}"
LINEAR = {  # of a layer, in the files and here
    "attention.wqkv": "attention.qkv_proj",
    "attention.wo": "attention.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
# Additions for writing articles and web pages, which no forward pass applies that does not ask for them.
OTHER_ADDITIONS = ("lora_sft", "lora_dpo", "lora_web")


def table(config: XComposerConfig) -> Table:
    """Rules of a model with this configuration."""
    rules = [
        Rule("model.tok_embeddings.weight", "text.embed.embedding"),
        *rms_norm("model.norm", "text.norm"),
        *rms_norm(f"{LAYER}.attention_norm", "text.layers.attention_norm"),
        *rms_norm(f"{LAYER}.ffn_norm", "text.layers.mlp_norm"),
        *(rule for key, path in LINEAR.items() for rule in _partial(f"{LAYER}.{key}", f"text.layers.{path}")),
        Rule("plora_glb_GN", "vision.separator"),
        Rule("plora_sub_GN", "vision.newline"),
        *tower_rules(config.vision, TOWER),
        *linear("vision_proj.0", "vision.projector.fc1"),
        *linear("vision_proj.2", "vision.projector.fc2"),
    ]
    return Table(tuple(rules), SPELLINGS, unused_keys(config))


def unused_keys(config: XComposerConfig) -> dict[str, str | None]:
    """What a checkpoint holds that no score needs."""
    keys: dict[str, str | None] = {"output.weight": "model.tok_embeddings.weight"}
    names = [f"{TOWER}.post_layernorm.{kind}" for kind in ("weight", "bias")]
    for number in range(config.text.num_layers):
        layer = LAYER.replace("{layer}", str(number))
        names += [f"{layer}.{key}.{name}_{side}.weight" for key in LINEAR for name in OTHER_ADDITIONS for side in "AB"]
    return keys | dict.fromkeys(names)


def _partial(key: str, path: str) -> list[Rule]:
    """`backbones.internlm2.PartialLinear`."""
    additions = linear(f"{key}.Plora_A", f"{path}.partial_a", bias=False)
    additions += linear(f"{key}.Plora_B", f"{path}.partial_b", bias=False)
    return linear(key, path, bias=False) + additions
