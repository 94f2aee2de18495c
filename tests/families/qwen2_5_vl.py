"""Qwen2.5-VL as transformers has it, tiny: windows of 2 x 2 cells, of which one layer in three sees beyond."""

from typing import Any

from tests.families.common import Case, Oracle
from tests.families.qwen2_vl import POLICY, qwen_oracle, token_ids
from tests.families.qwen_checks import PAIRS
from tests.tiny_qwen2_vl import tiny_config
from tests.tiny_tokenizer import tiny_tokenizer

VISION = {
    "model_type": "qwen2_5_vl",
    "depth": 3,
    "hidden_size": 32,
    "hidden_act": "silu",
    "intermediate_size": 40,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": 2,
    "window_size": 56,
    "fullatt_block_indexes": [1],
    "out_hidden_size": 64,
}


def config(**changes: Any) -> dict[str, Any]:
    """A `config.json` in the flat layout of the hub; entries of `vision_config` may be changed by `vision_NAME=`."""
    inner = {name for name in changes if name.startswith("vision_") and name.removeprefix("vision_") in VISION}
    vision = {name.removeprefix("vision_"): changes[name] for name in inner}
    rest = {name: value for name, value in changes.items() if name not in inner}
    found = tiny_config(**(token_ids(tiny_tokenizer()) | rest))
    names = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
    return found | names | {"vision_config": VISION | vision} | rest


def oracle(**changes: Any) -> Oracle:
    return qwen_oracle(config(**changes), "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", tiny_tokenizer())


def cases() -> list[Case]:
    evaluation = {"prompt": "official-eval", "image_policy": POLICY}
    return [
        Case("native sizes, two pictures, none; M-RoPE", oracle(), PAIRS, {"image_policy": POLICY}),
        Case("tied embeddings, evaluation prompt", oracle(tie_word_embeddings=True), PAIRS, evaluation),
    ]
