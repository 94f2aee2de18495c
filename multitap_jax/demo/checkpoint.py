"""Builds the demo's checkpoint: a very small Qwen2-VL with random weights, in real Hugging Face format.

The folder holds what a published Qwen2-VL folder holds, with the same names, so everything downstream (loading,
tokenising, image processing, exporting) runs the code that a 7B model runs: config.json in the published flat layout,
tokenizer.json and tokenizer_config.json (byte-level BPE, Qwen2's pattern and special tokens, chat template),
preprocessor_config.json and model.safetensors under published tensor names.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from multitap_jax.families import from_config
from multitap_jax.parallel.host import hush_transformers
from multitap_jax.weights.hub import save_backbone

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IMAGE_SIZE = 84
"""Edge in pixels to which the image processor brings pictures: 6 x 6 patches of 14 pixels, 9 image tokens."""

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""In the order, hence with the relative ids, of the published vocabulary."""

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_PROMPT_WORDS = ("system\nYou are a helpful assistant.", "user\nDescribe this image.", "assistant\n")
_VOCABULARY_SIZE = 640
_FRESH_DEVIATION = 0.02
_EMBEDDING_DEVIATION = 0.1


def build_checkpoint(folder: str | Path, corpus: Iterable[str], *, seed: int) -> Path:
    """Writes the checkpoint folder.

    Args:
      folder: where to write; made if absent, files of the same names are replaced.
      corpus: texts whose words the tokenizer should know as whole tokens.
      seed: seed of the random weights.

    Returns:
      The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(corpus)
    tokenizer.save_pretrained(str(folder))
    config = model_config(tokenizer)
    model = from_config(config, rngs=nnx.Rngs(seed))
    spread_weights(model)
    _write_json(folder / "config.json", config)
    _write_json(folder / "preprocessor_config.json", processor_config())
    save_backbone(model, folder)
    return folder


def train_tokenizer(corpus: Iterable[str], size: int = _VOCABULARY_SIZE) -> "PreTrainedTokenizerFast":
    """A Qwen2-style byte-level BPE tokenizer of `size` tokens, merged from `corpus` and the words of the prompts."""
    hush_transformers()
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    room = size - len(SPECIAL_TOKENS)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=room, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([*_PROMPT_WORDS, *corpus], trainer)
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def model_config(tokenizer: "PreTrainedTokenizerFast") -> dict[str, Any]:
    """config.json in the flat layout of the published Qwen2-VL folders."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": 64,
        "image_token_id": ids["<|image_pad|>"],
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "max_position_embeddings": 4096,
        "model_type": "qwen2_vl",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": {
            "depth": 1,
            "embed_dim": 64,
            "hidden_act": "quick_gelu",
            "hidden_size": 64,
            "in_chans": 3,
            "in_channels": 3,
            "mlp_ratio": 4,
            "model_type": "qwen2_vl",
            "num_heads": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "vocab_size": -(-len(tokenizer) // 64) * 64,  # published models, too, have spare rows: a mesh divides them
    }


def spread_weights(model: nnx.Module) -> None:
    """Rescales fresh weights in place for a model this narrow.

    The usual deviation of 0.02 suits a width near 2,500. At a width of 64 it leaves attention flat and what the
    picture says too faint to be found in a few minutes: kernels get 1 / sqrt(inputs), token embeddings 0.1.
    """
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = param[...]
        if path[-1] == "kernel":
            # A patch kernel has several input dimensions; a stacked kernel has its layers in front.
            inputs = np.prod(value.shape[:-1]) if "patch_embed" in path else value.shape[-2]
            param[...] = value * jnp.asarray(inputs**-0.5 / _FRESH_DEVIATION, value.dtype)
        elif path[-1] == "embedding":
            param[...] = value * jnp.asarray(_EMBEDDING_DEVIATION / _FRESH_DEVIATION, value.dtype)


def processor_config() -> dict[str, Any]:
    """preprocessor_config.json: every picture is brought to IMAGE_SIZE x IMAGE_SIZE pixels (where it is square)."""
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "max_pixels": IMAGE_SIZE * IMAGE_SIZE,
        "merge_size": 2,
        "min_pixels": IMAGE_SIZE * IMAGE_SIZE,
        "patch_size": 14,
        "processor_class": "Qwen2VLProcessor",
        "temporal_patch_size": 2,
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
