"""LLaVA-OneVision as transformers has it, tiny."""

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image
from transformers import LlavaOnevisionImageProcessorPil, LlavaOnevisionProcessor, PreTrainedTokenizerFast

from multitap_jax.data.stream import Pair
from tests.families.common import Case, Oracle, picture
from tests.families.llava import text_section, vision_section
from tests.tiny_tokenizer import tiny_tokenizer

SIDE, VIEW = 59, 16  # pixels of a view, 4 x 4 patches of 14; three pixels are seen by none
PINPOINTS = [[SIDE * tall, SIDE * wide] for tall in range(1, 5) for wide in range(1, 5)]
MEAN = STD = [0.5, 0.5, 0.5]
PROCESSING = {"image_mean": MEAN, "image_std": STD, "image_grid_pinpoints": PINPOINTS}
PROCESSING["size"] = {"height": SIDE, "width": SIDE}
RATIO = "anyres_max_3"
# Tiles that are resized (LARGE, LONG) and that are not, black at the sides and above and below.
WIDE, TALL, SMALL = picture(112, 50), picture(60, 130), picture(30, 30)
LARGE, LONG = picture(215, 180), picture(70, 220)
PAIRS = [
    Pair((WIDE,), "a red ball"),
    Pair((TALL,), "the blue box is far away on the right"),
    Pair((WIDE,), 'a "red" ball is near on your left'),
    Pair((LARGE,), "a ball"),
    Pair((LONG, SMALL), "a ball", "Which way is safe?"),
    Pair((), "no picture at all"),
]
CHAT_TEMPLATE = (  # of the published folders
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\\n' + content['text'] }}"
    "{% endfor %}{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@lru_cache
def qwen_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def image_processor() -> LlavaOnevisionImageProcessorPil:
    return LlavaOnevisionImageProcessorPil(**PROCESSING)


def tokens_of(images: dict[str, Any], number: int) -> int:
    """How many placeholders transformers' processor writes for a picture; as a whole it needs torchvision."""
    processor = object.__new__(LlavaOnevisionProcessor)
    processor.image_processor, processor.image_token = image_processor(), "I"
    processor.num_image_tokens, processor.vision_aspect_ratio = VIEW, RATIO
    processor.vision_feature_select_strategy = "full"
    return len(processor.replace_image_token(images, number))


def inputs(tokenizer: Any, rendered: str, images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
    """Every picture in tiles, as transformers does where each stands in a prompt of its own."""
    found = dict(image_processor()(images=list(images), return_tensors="np")) if images else {}
    for number in range(len(images)):
        rendered = rendered.replace("<image>", "<|cell|>" * tokens_of(found, number), 1)
    return found | _ids(tokenizer, rendered)


def single(tokenizer: Any, rendered: str, images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
    """Only the view of the whole, as transformers does for several pictures of a prompt (two are claimed to it)."""
    found = dict(image_processor()(images=list(images), return_tensors="np")) if images else {}
    if images:
        found["batch_num_images"] = np.asarray([max(2, len(images))])
    return found | _ids(tokenizer, rendered.replace("<image>", "<|cell|>" * (VIEW + 1)))


def _ids(tokenizer: Any, rendered: str) -> dict[str, np.ndarray]:
    ids = np.asarray([tokenizer(rendered.replace("<|cell|>", "<image>"), add_special_tokens=False)["input_ids"]])
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def oracle(*, tiles: bool = True, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None) -> Oracle:
    tokenizer = qwen_tokenizer()
    siglip = {"model_type": "siglip_vision_model", "image_size": SIDE, "num_hidden_layers": 2, "vision_use_head": False}
    config = {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "video_token_index": tokenizer.convert_tokens_to_ids("<video>"),
        "image_grid_pinpoints": PINPOINTS,
        "vision_aspect_ratio": RATIO,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "text_config": text_section(len(tokenizer), **{"model_type": "qwen2", **(text or {})}),
        "vision_config": vision_section(**{**siglip, **(vision or {})}),
    }
    names = ("LlavaOnevisionForConditionalGeneration", "LlavaOnevisionConfig")
    preprocessor = {"image_processor_type": "LlavaOnevisionImageProcessor", **PROCESSING}
    return Oracle(config, names, tokenizer, preprocessor, inputs if tiles else single)


def cases() -> list[Case]:
    tied = {"tie_word_embeddings": True}
    return [
        Case("tiles, some resized; two pictures, none", oracle(), PAIRS, {"image_policy": "anyres:16"}),
        Case(
            "one view; tied embeddings, evaluation prompt",
            oracle(tiles=False, text=tied),
            PAIRS,
            {"prompt": "official-eval"},
        ),
    ]
