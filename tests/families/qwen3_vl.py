"""Qwen3-VL as transformers has it, tiny: heads of 24 where hidden / heads is 16, a 6 x 6 table of positions."""

import functools
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerFast

from multitap_jax.demo.checkpoint import CHAT_TEMPLATE, train_tokenizer
from tests.families.common import Case, Oracle
from tests.families.qwen2_vl import inputs, token_ids
from tests.families.qwen_checks import PAIRS
from tests.tiny_tokenizer import CORPUS

POLICY = "native:4096:36864"
HALF = [0.5, 0.5, 0.5]
SYSTEM = (
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
)
TEXT = {
    "model_type": "qwen3_vl_text",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "hidden_act": "silu",
    "attention_bias": False,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5000000,
    "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [4, 4, 4]},
}
VISION = {
    "model_type": "qwen3_vl",
    "depth": 4,
    "hidden_size": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 40,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 2],
    "out_hidden_size": 64,
}


@lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerFast:
    """With a chat template that adds no system message, as the published one."""
    found = train_tokenizer(CORPUS)
    assert SYSTEM in CHAT_TEMPLATE
    found.chat_template = CHAT_TEMPLATE.replace(SYSTEM, "")
    return found


def config(**changes: Any) -> dict[str, Any]:
    """A `config.json` as the hub has it; entries of sections may be changed by `text_NAME=` and `vision_NAME=`."""
    ids = token_ids(tokenizer())
    text, vision = {**TEXT, "vocab_size": ids.pop("vocab_size")}, dict(VISION)
    found = {"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", **ids}
    found |= {"tie_word_embeddings": False, "text_config": text, "vision_config": vision}
    for name, value in changes.items():
        section, _, key = name.partition("_")
        place = {"text": text, "vision": vision}.get(section)
        if place is not None and key in place:
            place[key] = value
        else:
            found[name] = value
    text["tie_word_embeddings"] = found["tie_word_embeddings"]
    return found


def oracle(**changes: Any) -> Oracle:
    """Its preprocessor names no statistics: one half each is what the family means by that."""
    processor = functools.partial(inputs, policy=POLICY, patch_size=16, image_mean=HALF, image_std=HALF)
    names = ("Qwen3VLForConditionalGeneration", "Qwen3VLConfig")
    written = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 16}
    return Oracle(config(**changes), names, tokenizer(), written, processor)


def cases() -> list[Case]:
    evaluation = {"prompt": "official-eval", "image_policy": POLICY}
    return [
        Case("native sizes, two pictures, none; M-RoPE", oracle(), PAIRS, {"image_policy": POLICY}),
        Case("tied embeddings, evaluation prompt", oracle(tie_word_embeddings=True), PAIRS, evaluation),
    ]
