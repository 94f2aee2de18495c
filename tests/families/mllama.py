"""Llama-3.2-Vision as transformers has it, tiny: tiles of 28 pixels, two groups of three decoder layers."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import MllamaProcessor, PreTrainedTokenizerFast
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from multitap_jax.backbones.vision import CLIP_MEAN, CLIP_STD
from multitap_jax.batch import PackedBatch
from multitap_jax.data.processing import Processing
from multitap_jax.data.stream import Pair, StreamPacker
from multitap_jax.families import from_config
from multitap_jax.reward import RewardHead, RewardModel
from tests.families.common import Case, Oracle, contract_of, picture, random_weight
from tests.tiny_tokenizer import CORPUS

TILE = 28
POLICY = "tiles:4"
PREPROCESSOR = {
    "image_processor_type": "MllamaImageProcessor",
    "size": {"height": TILE, "width": TILE},
    "max_image_tiles": 4,
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
    "resample": 2,
}
# What the published template says of conversations without tools, with the date it falls back to. transformers lends
# every template the clock; the published one would ask it.
TEMPLATE = (
    "{{ bos_token }}{% set ns = namespace(images=false) %}{% for m in messages %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{% set ns.images = true %}{% endif %}{% endfor %}{% endfor %}"
    "{% if not ns.images %}<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: {{ date_string | default('26 Jul 2024') }}\n\n<|eot_id|>{% endif %}"
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|eot_id|>{% endfor %}"
)
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The image token comes last: its id is the first beyond the vocabulary, as in the published models.
_SPECIAL = ("begin_of_text", "end_of_text", "finetune_right_pad_id", "start_header_id", "end_header_id", "eot_id")

# One tile, two beside each other, three above each other, two by two.
SMALL, WIDE, TALL, LARGE = picture(20, 24), picture(56, 20), picture(40, 84), picture(70, 64)
PAIRS = [
    Pair((WIDE,), "a red ball"),
    Pair((LARGE,), "the blue box is far away on the right"),
    Pair((WIDE,), 'a "red" ball is near on your left'),
    Pair((TALL, SMALL), "a ball", "Which way is safe?"),
    Pair((SMALL,), "the box"),
    Pair((), "no picture at all"),
    Pair((SMALL,), "a box is near"),
]


@functools.lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with Llama 3's pattern, special tokens and first token, trained once a test process."""
    core = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=301, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([*CORPUS, "Describe this image.", "user\n\nassistant\n\n"], trainer)
    special = [f"<|{name}|>" for name in (*_SPECIAL, "python_tag", "image")]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    first = "<|begin_of_text|>"
    core.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, core.token_to_id(first))]
    )
    found = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=first,
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        padding_side="left",
    )
    found.chat_template = TEMPLATE
    return found


def inputs(
    tokenizer: Any, rendered: str, images: Sequence[Image.Image], *, side: int | None = None, **padding: Any
) -> dict[str, np.ndarray]:
    """What MllamaProcessor gives when it is called as the official code calls it: the first token comes twice.

    With `side` pictures are stretched first, as the official evaluation does; `padding` is for the processor.
    """
    if side is not None:
        images = [image.resize((side, side), Image.Resampling.BICUBIC) for image in images]
    options = {key: value for key, value in PREPROCESSOR.items() if key != "image_processor_type"}
    processor = MllamaProcessor(MllamaImageProcessorPil(**options), tokenizer)
    pictures = [list(images)] if images else None
    return dict(processor(images=pictures, text=[rendered], return_tensors="np", **padding))


def oracle(*, side: int | None = None, **changes: Any) -> Oracle:
    """`side` stretches pictures; `vision_config` and `text_config` among the changes are merged into the sections."""
    vision, text = (changes.pop(section, {}) for section in ("vision_config", "text_config"))
    vocabulary = len(tokenizer()) - 1
    config = {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": vocabulary,
        "multitap_intermediate_states": "after",  # transformers' reading since 4.56
        "text_config": {
            "model_type": "mllama_text_model",
            "vocab_size": vocabulary,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "cross_attention_layers": [1, 4],
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            "bos_token_id": tokenizer().bos_token_id,
            "eos_token_id": tokenizer().eos_token_id,
            "pad_token_id": tokenizer().pad_token_id,
            "tie_word_embeddings": False,
            **text,
        },
        "vision_config": {
            "model_type": "mllama_vision_model",
            "hidden_size": 32,
            "hidden_act": "gelu",
            "num_hidden_layers": 4,
            "num_global_layers": 2,
            "attention_heads": 2,
            "intermediate_size": 48,
            "image_size": TILE,
            "patch_size": 7,
            "max_num_tiles": 4,
            "intermediate_layers_indices": [0, 2],
            "vision_output_dim": 96,
            "norm_eps": 1e-5,
            **vision,
        },
        **changes,
    }
    found = functools.partial(inputs, side=side)
    return Oracle(config, ("MllamaForConditionalGeneration", "MllamaConfig"), tokenizer(), PREPROCESSOR, found)


def reward_model(seed: int = 0) -> RewardModel:
    """Weights that do not depend on torch."""
    backbone = nnx.eval_shape(lambda: from_config(oracle().config, rngs=nnx.Rngs(0), preprocessor=PREPROCESSOR))
    names = iter(range(1000))
    draw = lambda leaf: jnp.asarray(random_weight(f"{next(names)}.position", leaf.shape, seed))
    return RewardModel(jax.tree.map(draw, backbone), RewardHead(64, rngs=nnx.Rngs(seed)))


def packed_cells(folder: Path, cells: int) -> PackedBatch:
    """Pairs of several pictures in as many cells, with targets."""
    processing = Processing.from_folder(folder, contract_of(folder, image_policy=POLICY))
    options = {"hidden": 64, "cells": cells}
    packer = StreamPacker(processing.prompter, processing.reader, processing.vision, **options)
    images = [Image.fromarray(np.roll(np.asarray(image), turn)) for image in (SMALL, WIDE, LARGE) for turn in range(5)]
    pairs = [Pair((image,), text) for image in images for text in ("a red ball", "the box is far")]
    pairs += [PAIRS[3], PAIRS[5]]
    (batch,) = packer.window(pairs).batches
    here = batch.record >= 0
    target = np.random.default_rng(0).random(batch.record.shape).astype(np.float32)
    return batch._replace(target=np.where(here, target, 0).astype(np.float32), weight=here.astype(np.float32))


def cases() -> list[Case]:
    square = {"prompt": "official-eval", "image_policy": f"square:{TILE}"}
    return [
        Case("1 to 4 tiles, two pictures, none; official-train", oracle(), PAIRS, {"image_policy": POLICY}),
        Case("one tile a picture; official-eval", oracle(side=TILE), PAIRS, square),
    ]
