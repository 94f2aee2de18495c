"""Qwen2-VL as transformers has it, tiny."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from multitap_jax.data.stream import Pair
from tests.families.common import Case, Oracle, picture
from tests.tiny_qwen2_vl import tiny_config
from tests.tiny_tokenizer import tiny_tokenizer

PIXELS = (3136, 28224)  # of a picture, at least and at most
POLICY = "native:3136:28224"
WIDE, TALL, SMALL = picture(150, 90), picture(60, 200), picture(30, 30)
PAIRS = [
    Pair((WIDE,), "a red ball"),
    Pair((TALL,), "the blue box is far away on the right"),
    Pair((WIDE,), 'a "red" ball is near on your left'),
    Pair((SMALL, WIDE), "a ball", "Which way is safe?"),
    Pair((), "no picture at all"),
]


def inputs(tokenizer: Any, rendered: str, images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
    """What Qwen2VLProcessor gives: placeholders repeated for each merged cell of their picture."""
    found: dict[str, np.ndarray] = {}
    if images:
        processor = Qwen2VLImageProcessorPil(size={"shortest_edge": PIXELS[0], "longest_edge": PIXELS[1]})
        found = dict(processor(images=list(images), return_tensors="np"))
        for cells in found["image_grid_thw"].prod(-1) // 4:
            rendered = rendered.replace("<|image_pad|>", "<|cell|>" * int(cells), 1)
    ids = np.asarray([tokenizer(rendered.replace("<|cell|>", "<|image_pad|>"), add_special_tokens=False)["input_ids"]])
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    found |= {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return found | ({"mm_token_type_ids": (ids == image).astype(np.int64)} if images else {})


def oracle(**changes: Any) -> Oracle:
    tokenizer = tiny_tokenizer()
    token = tokenizer.convert_tokens_to_ids
    ids = {f"{name}_token_id": token(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    config = tiny_config(
        **ids,
        vocab_size=len(tokenizer),
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        bos_token_id=token("<|endoftext|>"),
        eos_token_id=token("<|im_end|>"),
        **changes,
    )
    return Oracle(
        config,
        ("Qwen2VLForConditionalGeneration", "Qwen2VLConfig"),
        tokenizer,
        {"image_processor_type": "Qwen2VLImageProcessor"},
        inputs,
    )


def cases() -> list[Case]:
    tied, evaluation = oracle(tie_word_embeddings=True), {"prompt": "official-eval", "image_policy": POLICY}
    return [
        Case("native sizes, two pictures, none; M-RoPE", oracle(), PAIRS, {"image_policy": POLICY}),
        Case("tied embeddings, evaluation prompt", tied, PAIRS, evaluation),
    ]
