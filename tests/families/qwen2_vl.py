"""Qwen2-VL as transformers has it, tiny; and what its successors' oracles share."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil

from tests.families.common import Case, Oracle
from tests.families.qwen_checks import PAIRS
from tests.tiny_qwen2_vl import tiny_config
from tests.tiny_tokenizer import tiny_tokenizer

POLICY = "native:3136:28224"  # pixels of a picture, at least and at most


def inputs(
    tokenizer: Any, rendered: str, images: Sequence[Image.Image], *, policy: str = POLICY, **options: Any
) -> dict[str, np.ndarray]:
    """What the Qwen processors give: placeholders repeated for each merged cell of their picture."""
    found: dict[str, np.ndarray] = {}
    if images:
        least, most = map(int, policy.split(":")[1:])
        processor = Qwen2VLImageProcessorPil(size={"shortest_edge": least, "longest_edge": most}, **options)
        found = dict(processor(images=list(images), return_tensors="np"))
        for cells in found["image_grid_thw"].prod(-1) // 4:
            rendered = rendered.replace("<|image_pad|>", "<|cell|>" * int(cells), 1)
    ids = np.asarray([tokenizer(rendered.replace("<|cell|>", "<|image_pad|>"), add_special_tokens=False)["input_ids"]])
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    found |= {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return found | ({"mm_token_type_ids": (ids == image).astype(np.int64)} if images else {})


def token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The entries of `config.json` that name tokens, and their number."""
    token = tokenizer.convert_tokens_to_ids
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    names |= {"bos": "endoftext", "eos": "im_end"}
    return {"vocab_size": len(tokenizer)} | {f"{key}_token_id": token(f"<|{name}|>") for key, name in names.items()}


def qwen_oracle(
    config: dict[str, Any],
    model: str,
    config_class: str,
    tokenizer: PreTrainedTokenizerFast,
    **preprocessor: Any,
) -> Oracle:
    """An oracle whose pictures go through `Qwen2VLImageProcessor` with these options."""
    named = {"image_processor_type": "Qwen2VLImageProcessor", **preprocessor}
    return Oracle(config, (model, config_class), tokenizer, named, functools.partial(inputs, **preprocessor))


def oracle(**changes: Any) -> Oracle:
    tokenizer = tiny_tokenizer()
    config = tiny_config(**token_ids(tokenizer), **changes)
    return qwen_oracle(config, "Qwen2VLForConditionalGeneration", "Qwen2VLConfig", tokenizer)


def cases() -> list[Case]:
    tied, evaluation = oracle(tie_word_embeddings=True), {"prompt": "official-eval", "image_policy": POLICY}
    return [
        Case("native sizes, two pictures, none; M-RoPE", oracle(), PAIRS, {"image_policy": POLICY}),
        Case("tied embeddings, evaluation prompt", tied, PAIRS, evaluation),
    ]
