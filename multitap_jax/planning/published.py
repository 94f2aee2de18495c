"""The sizes of published models, by name: what their `config.json` says and planning needs."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multitap_jax.config import ConfigError
from multitap_jax.families import Family, read_config, settle

_MROPE = {"type": "mrope", "mrope_section": [16, 24, 24]}


def _qwen2(kind: str, sizes: tuple[int, ...], tied: bool, vision: Mapping[str, Any]) -> dict[str, Any]:
    hidden, layers, heads, groups, inner, vocabulary = sizes
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "rope_theta": 1e6,
        "rope_scaling": _MROPE,
        "vision_config": {"depth": 32, "num_heads": 16, "patch_size": 14, **vision},
    }


def _qwen2_vl(*sizes: int, tied: bool = False) -> dict[str, Any]:
    return _qwen2("qwen2_vl", sizes, tied, {"embed_dim": 1280, "hidden_size": sizes[0]})


def _qwen2_5_vl(*sizes: int, inner: int, tied: bool = False) -> dict[str, Any]:
    tower = {"hidden_size": 1280, "intermediate_size": inner, "out_hidden_size": sizes[0], "window_size": 112}
    return _qwen2("qwen2_5_vl", sizes, tied, {**tower, "fullatt_block_indexes": [7, 15, 23, 31]})


def _qwen3_vl(sizes: tuple[int, ...], tower: tuple[int, ...], deepstack: list[int], tied: bool) -> dict[str, Any]:
    hidden, layers, heads, groups, inner = sizes
    depth, size, tower_inner = tower
    text = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": inner,
        "head_dim": 128,
        "vocab_size": 151936,
        "rope_theta": 5e6,
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
    }
    vision = {
        "depth": depth,
        "hidden_size": size,
        "intermediate_size": tower_inner,
        "num_heads": 16,
        "patch_size": 16,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": deepstack,
        "out_hidden_size": hidden,
    }
    return {"model_type": "qwen3_vl", "tie_word_embeddings": tied, "text_config": text, "vision_config": vision}


def _llama_vision(hidden: int, layers: int, heads: int, inner: int) -> dict[str, Any]:
    text = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "intermediate_size": inner,
        "cross_attention_layers": list(range(3, layers, 5)),
    }
    return {"model_type": "mllama", "text_config": text, "vision_config": {"image_size": 560}}


def _xcomposer() -> dict[str, Any]:
    return {
        "model_type": "internlm2",
        "architectures": ["InternLMXComposer2ForCausalLM"],
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 92544,
        "bias": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "max_position_embeddings": 24576,
    }


PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen2-vl-2b": _qwen2_vl(1536, 28, 12, 2, 8960, 151936, tied=True),
    "qwen2-vl-7b": _qwen2_vl(3584, 28, 28, 4, 18944, 152064),
    "qwen2-vl-72b": _qwen2_vl(8192, 80, 64, 8, 29568, 152064),
    "qwen2.5-vl-3b": _qwen2_5_vl(2048, 36, 16, 2, 11008, 151936, inner=3420, tied=True),
    "qwen2.5-vl-7b": _qwen2_5_vl(3584, 28, 28, 4, 18944, 152064, inner=3420),
    "qwen2.5-vl-72b": _qwen2_5_vl(8192, 80, 64, 8, 29568, 152064, inner=3456),
    "qwen3-vl-4b": _qwen3_vl((2560, 36, 32, 8, 9728), (24, 1024, 4096), [5, 11, 17], True),
    "qwen3-vl-8b": _qwen3_vl((4096, 36, 32, 8, 12288), (27, 1152, 4304), [8, 16, 24], False),
    "llama-3.2-vision-11b": _llama_vision(4096, 40, 32, 14336),
    "llama-3.2-vision-90b": _llama_vision(8192, 100, 64, 28672),
    "internlm-xcomposer2d5-7b": _xcomposer(),
}


def read_model(name: str) -> tuple[Family, Any]:
    """The family and configuration of a published name, or of a folder that holds a `config.json`.

    Raises:
      ConfigError, FolderError: neither of the two, or a file that describes something that is not implemented.
    """
    if name in PUBLISHED:
        return settle(PUBLISHED[name])
    if Path(name).is_dir():
        return read_config(name)
    near = difflib.get_close_matches(name.lower(), PUBLISHED, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"model {name!r} is no folder with a config.json and no published name; {hint}the names: {', '.join(PUBLISHED)}"
    )
