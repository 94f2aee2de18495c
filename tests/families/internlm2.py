"""InternLM-XComposer2.5, tiny: the folder as it is published, and what its modelling code gave (goldens).

transformers has no class for this family, and the published code is never run here. What it gives was computed apart,
on the weights of `random_weight` and the pictures and texts below, and is kept as numbers (`GOLDENS`).
"""

import dataclasses
import json
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

from multitap_jax.data.prompts import load_tokenizer
from multitap_jax.data.stream import Pair
from multitap_jax.weights.xcomposer import LAYER, LINEAR, OTHER_ADDITIONS
from tests.families.common import Case, Oracle, picture, random_weight
from tests.tiny_tokenizer import CORPUS

GOLDENS = Path(__file__).parents[1] / "goldens" / "xcomposer.json"
SIDE = 56  # pixels of a view: 4 x 4 patches, 2 x 2 cells
HD = "hd:6"
RAW = {"multitap_partial_lora": "off", "multitap_pixels": "raw"}  # the official code's reading
# One tile, two beside each other, three above each other, two by two, and one that shrinks.
SMALL, WIDE, TALL, LARGE = picture(40, 30), picture(100, 50), picture(40, 120), picture(110, 100)
HUGE = picture(333, 200)
PAIRS = [
    Pair((WIDE,), "a red ball"),
    Pair((TALL,), "the blue box is far away on the right"),
    Pair((WIDE,), 'a "red" ball is near on your left '),
    Pair((LARGE, SMALL), "a ball", "Which way is safe?"),
    Pair((SMALL,), "the box —— ünïcödé 漢字 🙂"),
    Pair((HUGE,), "a ball"),
    Pair((), "no picture at all"),
]
# What nobody may run; a folder that is imported anywhere fails loudly.
CODE = 'raise AssertionError("remote code was run")\n'
CODE_FILES = (
    "modeling_internlm_xcomposer2",
    "configuration_internlm_xcomposer2",
    "tokenization_internlm2",
    "build_mlp",
)


@lru_cache(maxsize=1)
def sentencepiece_model() -> bytes:
    """A tokenizer.model like InternLM2's: bytes, pieces by score, text symbols and reserved names at the end."""
    from transformers.convert_slow_tokenizer import import_protobuf

    corpus = " ".join([*CORPUS, "Describe this image.", "Which way is safe?", "user\n", "assistant\n", ";a;the;no"])
    words = [f"▁{word}" for word in corpus.split(" ")]
    # Signs, then what words begin with, which merge sign by sign, and some pieces that compete with them.
    learned = list(dict.fromkeys(sign for word in words for sign in word))
    learned += [word[:end] for word in words for end in range(2, len(word) + 1)]
    learned += [word[at : at + 2] for word in words for at in range(1, len(word) - 1)]
    learned = list(dict.fromkeys(learned))
    proto = import_protobuf()
    model, kinds = proto.ModelProto(), proto.ModelProto.SentencePiece
    pieces = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    pieces += [(f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256)]
    pieces += [(piece, kinds.NORMAL) for piece in learned]
    reserved = [f"[UNUSED_TOKEN_{number}]" for number in range(143, 147)]
    pieces += [(piece, kinds.USER_DEFINED) for piece in ("Ｅ", "——", "……", *reserved)]
    for number, (piece, kind) in enumerate(pieces):
        model.pieces.add(piece=piece, score=-float(number) if kind == kinds.NORMAL else 0.0, type=kind)
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.remove_extra_whitespaces = False
    return bytes(model.SerializeToString(deterministic=True))


def write_tokenizer(folder: Path) -> Path:
    """The tokenizer's files as published, with the code that goes with them; returns the folder."""
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    auto = {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    settings = {"auto_map": auto, "tokenizer_class": "InternLM2Tokenizer", "padding_side": "right", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    added = {"<|im_start|>": vocabulary(), "<|im_end|>": vocabulary() + 1}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    for name in CODE_FILES:
        (folder / f"{name}.py").write_text(CODE)
    return folder


@lru_cache(maxsize=1)
def vocabulary() -> int:
    """Pieces of the tiny tokenizer."""
    from transformers.convert_slow_tokenizer import import_protobuf

    return len(import_protobuf().ModelProto.FromString(sentencepiece_model()).pieces)


@dataclasses.dataclass(frozen=True)
class XComposerOracle(Oracle):
    """The family as it is published; what it gives is in the goldens."""

    def torch_model(self, seed: int = 0) -> Any:
        raise NotImplementedError("the published code is not run here; see the goldens")

    def write_without_weights(self, folder: Path) -> Path:
        (folder / "config.json").write_text(json.dumps(self.config))
        return write_tokenizer(folder)

    def write_published(self, folder: Path) -> Path:
        """The whole layout: two shards with an index, and the tensors that no score needs."""
        self.write_without_torch(folder)
        tensors = load_file(folder / "model.safetensors") | other_tensors(self.config)
        (folder / "model.safetensors").unlink()
        where = {}
        for number in range(2):
            name = f"model-{number + 1:05d}-of-00002.safetensors"
            part = {key: tensors[key] for key in sorted(tensors)[number::2]}
            save_file(part, folder / name)
            where |= dict.fromkeys(part, name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        return folder


def other_tensors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """What a published checkpoint holds besides: the output head, a last norm, additions for other uses."""
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["vision_config"]["hidden_size"]
    fused = hidden + 2 * config["num_key_value_heads"] * hidden // config["num_attention_heads"]
    ends = {"wqkv": (hidden, fused), "wo": (hidden, hidden), "w2": (inner, hidden)}
    shapes = {"output.weight": (config["vocab_size"], hidden)}
    shapes |= {f"vit.vision_tower.vision_model.post_layernorm.{kind}": (size,) for kind in ("weight", "bias")}
    for layer in range(config["num_hidden_layers"]):
        for name in LINEAR:
            key = f"{LAYER.replace('{layer}', str(layer))}.{name}"
            into, out = ends.get(name.rpartition(".")[2], (hidden, inner))
            for other in OTHER_ADDITIONS:
                shapes |= {f"{key}.{other}_A.weight": (4, into), f"{key}.{other}_B.weight": (out, 4)}
    return {key: random_weight(key, shape, 1) for key, shape in shapes.items()}


def no_inputs(tokenizer: Any, rendered: str, images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
    raise NotImplementedError("the published code is not run here; see the goldens")


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """The tiny tokenizer."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return load_tokenizer(write_tokenizer(Path(folder)))


def oracle(**changes: Any) -> XComposerOracle:
    """`changes` are entries of config.json; those of `vision_config` are merged into the section."""
    vision = changes.pop("vision_config", {})
    code = "modeling_internlm_xcomposer2.InternLMXComposer2ForCausalLM"
    config = {
        "architectures": ["InternLMXComposer2ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_internlm_xcomposer2.C", "AutoModelForCausalLM": code},
        "model_type": "internlm2",
        "bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "max_length": 16384,
        "max_position_embeddings": 4096,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "vocab_size": vocabulary(),
        "multitap_plora_rank": 8,
        "multitap_plora_alpha": 4,
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": 14,
            **vision,
        },
        **changes,
    }
    names = ("InternLMXComposer2ForCausalLM", "InternLMXcomposer2Config")
    return XComposerOracle(config, names, tokenizer(), {}, no_inputs)


# name -> what is chosen of config.json and of the contract; the names are those of the goldens.
READINGS = {
    "tiles": ({}, {"image_policy": HD}),
    "one view": ({}, {}),
    "evaluation prompt": ({}, {"prompt": "official-eval", "image_policy": HD}),
    "official": (RAW, {"prompt": "official-stage2"}),
}


def cases() -> list[Case]:
    return [Case(name, oracle(**entries), PAIRS, chosen) for name, (entries, chosen) in READINGS.items()]


def golden_parity() -> list[tuple[str, int, float, float | None]]:
    """(case, pairs, largest difference of a state, of a gradient) to what is kept of the published code.

    States are absolute. Gradients, kept of the first case, are `gradient_errors`.
    """
    from tempfile import TemporaryDirectory

    from multitap_jax.weights.hub import load_backbone
    from tests.families.common import contract_of, gradients, states

    kept, out = json.loads(GOLDENS.read_text(encoding="utf-8")), []
    for name, (entries, chosen) in READINGS.items():
        with TemporaryDirectory() as scratch:
            folder = oracle(**entries).write_without_torch(Path(scratch))
            backbone, contract = load_backbone(folder), contract_of(folder, **chosen)
            found = states(backbone, folder, PAIRS, contract)[:, ::4] - np.asarray(kept["states"][name])
            errors = None
            if not out:
                errors = max(gradient_errors(gradients(backbone, folder, PAIRS, contract), kept["gradients"]).values())
        out.append((name, len(PAIRS), float(np.abs(found).max()), errors))
    return out


def gradient_errors(got: dict[str, np.ndarray], kept: dict[str, list[float]]) -> dict[str, float]:
    """Of each parameter the difference of the largest entry and of two random sums of all entries from those kept,
    relative to the largest entry."""
    out = {}
    for key, (*sums, largest) in kept.items():
        gradient = got[key].reshape(-1).astype(np.float64)
        draw = np.random.default_rng(zlib.crc32(key.encode())).standard_normal((2, gradient.size))
        found = np.asarray([*(draw @ gradient / gradient.size**0.5), np.abs(gradient).max()])
        out[key] = float(np.abs(found - [*sums, largest]).max() / max(largest, 1e-4))
    return out
