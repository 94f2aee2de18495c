"""A tiny Qwen2-VL with O(1) activations, its base folder and artefacts made of it."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from multitap_jax.data.processing import Contract
from multitap_jax.families import from_config
from multitap_jax.reward import RewardHead, RewardModel
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.scoring.manifest import Objective, Overall
from multitap_jax.stage2.head import RidgeHead
from multitap_jax.weights.files import weight_files
from multitap_jax.weights.hub import save_backbone
from tests.tiny_tokenizer import tiny_tokenizer

HIDDEN = 32
CONTRACT = Contract(prompt="official-train", position_mode="mrope", image_policy="square:16")
OBJECTIVES = (
    Objective("safety", (0.0, 2.0), cv_score=0.5),
    Objective("detail", (-1.0, 1.0), higher_is_better=False),
)


def tiny_config(**text: object) -> dict:
    tokenizer = tiny_tokenizer()
    token = tokenizer.convert_tokens_to_ids
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": HIDDEN,
            "num_heads": 2,
            "mlp_ratio": 2,
            "in_channels": 3,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "hidden_act": "quick_gelu",
        },
        **text,
    }


def tiny_backbone(seed: int = 0, **text: object) -> nnx.Module:
    """Weights drawn so that every part of the model matters to its output."""
    abstract = nnx.eval_shape(lambda: from_config(tiny_config(**text), rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        name = next(key.name for key in reversed(path) if key.name != "value")
        fan_in = {"kernel": leaf.shape[-2] if leaf.ndim > 1 else 1, "embedding": 1}.get(name, 100)
        return jnp.asarray(noise * np.float32(fan_in**-0.5) + np.float32(name == "scale"))

    return jax.tree_util.tree_map_with_path(draw, abstract)


def tiny_model(seed: int = 0, **text: object) -> RewardModel:
    rng = np.random.default_rng(seed + 1)
    head = RewardHead.from_arrays(rng.standard_normal(HIDDEN).astype(np.float32) * np.float32(0.3), np.float32(0.1))
    return RewardModel(tiny_backbone(seed, **text), head)


def tiny_ridge(seed: int = 0) -> RidgeHead:
    """A ridge head of two objectives, fitted to random numbers."""
    rng = np.random.default_rng(seed + 2)
    features = rng.standard_normal((64, HIDDEN)).astype(np.float32)
    targets = (features @ rng.standard_normal((HIDDEN, 2))).astype(np.float32)
    return RidgeHead(alphas=[0.1, 10.0]).fit(features, targets, objective_names=[o.name for o in OBJECTIVES])


def base_folder(folder: Path, seed: int = 0, **text: object) -> Path:
    """What a backbone's folder on the hub holds."""
    folder.mkdir(parents=True)
    save_backbone(tiny_backbone(seed, **text), folder)
    (folder / "config.json").write_text(json.dumps(tiny_config(**text)))
    tiny_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Qwen2VLImageProcessor"}))
    return folder


def save_artefact(folder: Path, base: Path, *, ridge: bool = True, seed: int = 0, **options: object) -> Artefact:
    return Artefact.save(
        folder,
        tiny_model(seed),
        base=base,
        contract=options.pop("contract", CONTRACT),
        overall=Overall(target="score", target_range=(1.0, 5.0)),
        ridge=tiny_ridge(seed) if ridge else None,
        objectives=OBJECTIVES if ridge else (),
        source="tiny/qwen2-vl",
        revision="abc",
        provenance={"steps": 7},
        **options,
    )


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)) for _ in range(count)]


def weight_paths(folder: Path) -> list[Path]:
    """The backbone's files."""
    return [folder / name for name in weight_files(folder)]
