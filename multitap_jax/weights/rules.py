"""Rules that weight tables share: linear maps, norms, and the decoder of the Llama and Qwen families."""

from collections.abc import Sequence

from multitap_jax.backbones.decoder import DecoderConfig
from multitap_jax.weights.mapping import Rule

Layers = Sequence[int] | None


def linear(key: str, path: str, *, bias: bool = True, layers: Layers = None) -> list[Rule]:
    """A torch Linear [out, in] <-> `layers.Linear` [in, out]."""
    rules = [rule(f"{key}.weight", f"{path}.kernel", "transpose", layers)]
    return [*rules, rule(f"{key}.bias", f"{path}.bias", layers=layers)] if bias else rules


def layer_norm(key: str, path: str, layers: Layers = None) -> list[Rule]:
    """A torch LayerNorm <-> `layers.LayerNorm`."""
    return [rule(f"{key}.weight", f"{path}.scale", layers=layers), rule(f"{key}.bias", f"{path}.bias", layers=layers)]


def rms_norm(key: str, path: str, layers: Layers = None) -> list[Rule]:
    """A norm without bias <-> `layers.RMSNorm`."""
    return [rule(f"{key}.weight", f"{path}.scale", layers=layers)]


def rule(key: str, path: str, transform: str = "identity", layers: Layers = None) -> Rule:
    """One rule; `layers` are the numbers in the hub's names of the layers stacked at `path`, None for 0, 1, ..."""
    return Rule(key, path, transform, None if layers is None else tuple(layers))


def decoder_rules(config: DecoderConfig, key: str = "model", path: str = "text", layers: Layers = None) -> list[Rule]:
    """`backbones.decoder.Decoder` under the names of transformers' Llama and Qwen models."""
    return [
        Rule(f"{key}.embed_tokens.weight", f"{path}.embed.embedding"),
        *rms_norm(f"{key}.norm", f"{path}.norm"),
        *decoder_layer_rules(config, f"{key}.layers.{{layer}}", f"{path}.layers", layers),
    ]


def decoder_layer_rules(config: DecoderConfig, key: str, path: str, layers: Layers = None) -> list[Rule]:
    """A stack of `backbones.decoder.TextLayer`."""
    rules = rms_norm(f"{key}.input_layernorm", f"{path}.attention_norm", layers)
    rules += rms_norm(f"{key}.post_attention_layernorm", f"{path}.mlp_norm", layers)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        bias = config.qkv_bias and name != "o_proj"
        rules += linear(f"{key}.self_attn.{name}", f"{path}.attention.{name}", bias=bias, layers=layers)
    for name in ("q_norm", "k_norm") if config.qk_norm else ():
        rules += rms_norm(f"{key}.self_attn.{name}", f"{path}.attention.{name}", layers)
    for name in ("gate_proj", "up_proj", "down_proj"):
        rules += linear(f"{key}.mlp.{name}", f"{path}.mlp.{name}", bias=False, layers=layers)
    return rules
