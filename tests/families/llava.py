"""LLaVA-1.5 as transformers has it, tiny, with a tokenizer like Llama's."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from multitap_jax.data.stream import Pair
from tests.families.common import Case, Oracle, picture
from tests.tiny_tokenizer import CORPUS

SIDE = 56  # pixels of a view, 4 x 4 patches
WIDE, TALL, SMALL = picture(150, 90), picture(60, 200), picture(30, 30)
PAIRS = [
    Pair((WIDE,), "a red ball"),
    Pair((TALL,), "the blue box is far away on the right"),
    Pair((WIDE,), 'a "red" ball is near on your left'),
    Pair((SMALL, WIDE), "a ball", "Which way is safe?"),
    Pair((), "no picture at all"),
]
CHAT_TEMPLATE = (  # of the published folders
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@lru_cache
def llama_tokenizer(scheme: str = "legacy") -> PreTrainedTokenizerFast:
    """Byte-fallback BPE over blanks written as "▁", with <s> in front of each sequence.

    A blank is put before every piece of text between control tokens ("legacy"), or only before the first ("first").
    """
    core = Tokenizer(models.BPE())
    blank = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    core.normalizer = normalizers.Sequence(blank)
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=160, show_progress=False)
    core.train_from_iterator([*CORPUS, "USER: Describe this image. ASSISTANT: "], trainer)
    learned = json.loads(core.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    merges = [tuple(merge) for merge in learned["merges"]]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    core = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if scheme == "legacy":
        core.normalizer = normalizers.Sequence(blank)
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    control = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def processor(tokenizer: Any) -> LlavaProcessor:
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def inputs(tokenizer: Any, rendered: str, images: Sequence[Image.Image], **padding: Any) -> dict[str, np.ndarray]:
    """What LlavaProcessor gives; `padding` is for it."""
    return dict(processor(tokenizer)(images=list(images) or None, text=[rendered], return_tensors="np", **padding))


def stretched(tokenizer: Any, rendered: str, images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
    """As `inputs`, of pictures brought to the model's size first, so that nothing is left to crop."""
    return inputs(tokenizer, rendered, [i.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for i in images])


def vision_section(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 14,
        "projection_dim": 8,
        **changes,
    }


def text_section(vocab: int, **changes: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        **changes,
    }


def oracle(*, square: bool = False, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None) -> Oracle:
    tokenizer = llama_tokenizer()
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": text_section(len(tokenizer), **(text or {})),
        "vision_config": vision_section(**(vision or {})),
    }
    return Oracle(
        config,
        ("LlavaForConditionalGeneration", "LlavaConfig"),
        tokenizer,
        {"image_processor_type": "CLIPImageProcessor", "crop_size": {"height": SIDE, "width": SIDE}},
        stretched if square else inputs,
    )


def cases() -> list[Case]:
    mistral = {"model_type": "mistral", "sliding_window": None, "tie_word_embeddings": True}
    return [
        Case("cropped, two pictures, none", oracle(), PAIRS, {"image_policy": f"crop:{SIDE}"}),
        Case(
            "stretched, Mistral decoder, tied embeddings, evaluation prompt",
            oracle(square=True, text=mistral),
            PAIRS,
            {"prompt": "official-eval"},
        ),
    ]
