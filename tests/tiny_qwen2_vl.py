"""A tiny Qwen2-VL for tests: its configuration, a random torch oracle, and a slow obvious packer.

Weights are drawn so that activations are O(1): the default initialisation (deviation 0.02) hides most mistakes.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from multitap_jax.backbones.vision import CLIP_MEAN, CLIP_STD
from multitap_jax.batch import PackedBatch
from multitap_jax.families import from_config, weight_table
from multitap_jax.naming import by_name
from multitap_jax.weights.mapping import plan
from tests.families.common import random_torch_model, random_weight

IMAGE = 151
PATCH_FEATURES = 3 * 14 * 14


def tiny_config(**changes) -> dict:
    """A `config.json` in the flat layout of the hub; `vision_config` entries may be changed by `vision_NAME=`."""
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "mlp_ratio": 2,
        "num_heads": 2,
        "in_chans": 3,
        "hidden_size": 64,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "bos_token_id": 152,
        "eos_token_id": 153,
        "image_token_id": IMAGE,
        "video_token_id": 150,
        "vision_start_token_id": 148,
        "vision_end_token_id": 149,
    }
    for name, value in changes.items():
        if name.startswith("vision_") and name.removeprefix("vision_") in vision:
            vision[name.removeprefix("vision_")] = value
        else:
            config[name] = value
    return {**config, "vision_config": vision}


def torch_model(config: dict, seed: int = 0):
    """transformers' Qwen2VLForConditionalGeneration with the weights of `random_weight`, float32, in eval mode."""
    return random_torch_model("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", config, seed)


def write_folder(folder: Path, config: dict, seed: int = 0) -> Path:
    """A checkpoint with the weights of `torch_model(config, seed)` under published names, written without torch."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    model = nnx.eval_shape(lambda: from_config(config, rngs=nnx.Rngs(0)))
    shapes = {slot.key: slot.shape for slot in plan(weight_table(model), by_name(model))}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], config["hidden_size"])
    save_file({name: random_weight(name, shape, seed) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder


@dataclasses.dataclass(frozen=True)
class Image:
    """uint8[rows * cols, 588] patches in block-major order; rows and cols count patches."""

    patches: np.ndarray
    rows: int
    cols: int

    @property
    def cells(self) -> int:
        return self.rows * self.cols // 4


@dataclasses.dataclass(frozen=True)
class Group:
    """A prefix (image placeholders included), its images in order, and the texts that follow it."""

    prefix: list[int]
    images: list[Image]
    texts: list[list[int]]

    def alone(self, index: int) -> "Group":
        """The group with only the text `index`."""
        return Group(self.prefix, self.images, [self.texts[index]])


def random_image(rng: np.random.Generator, rows: int, cols: int) -> Image:
    return Image(rng.integers(0, 256, (rows * cols, PATCH_FEATURES), dtype=np.uint8), rows, cols)


def random_group(rng: np.random.Generator, grids: list[tuple[int, int]], text_lengths: list[int]) -> Group:
    """`[some tokens] ([start] [cells] [end])* [some tokens]` and texts of the given lengths."""
    words = lambda count: rng.integers(0, 140, count).tolist()
    images = [random_image(rng, *grid) for grid in grids]
    prefix = words(3)
    for image in images:
        prefix += [148] + [IMAGE] * image.cells + [149]
    return Group(prefix + words(2), images, [words(length) for length in text_lengths])


def block_major(rows: int, cols: int) -> np.ndarray:
    """int32[rows * cols, 2], (row, column) of the patches in the processor's order: 2 x 2 blocks, then inside."""
    cells = [(r, c) for r in range(0, rows, 2) for c in range(0, cols, 2)]
    return np.array([(r + i, c + j) for r, c in cells for i in (0, 1) for j in (0, 1)], np.int32).reshape(-1, 2)


def prefix_positions(group: Group, mode: str) -> tuple[np.ndarray, int]:
    """int32[len(prefix), 3] and the position at which a text starts."""
    if mode == "flat":
        return np.tile(np.arange(len(group.prefix), dtype=np.int32)[:, None], (1, 3)), len(group.prefix)
    out, images, at, index = [], iter(group.images), 0, 0
    while index < len(group.prefix):
        if group.prefix[index] != IMAGE:
            out.append((at, at, at))
            at, index = at + 1, index + 1
            continue
        image = next(images)
        rows, cols = image.rows // 2, image.cols // 2
        out += [(at, at + r, at + c) for r in range(rows) for c in range(cols)]
        at, index = at + max(rows, cols), index + rows * cols
    return np.array(out, np.int32).reshape(-1, 3), at


def pack(
    rows: list[list[Group]], *, mode: str = "mrope", row_length: int = 0, vision_length: int = 0, spare: int = 0
) -> PackedBatch:
    """Lays the groups of each row out once; the images of a row form one vision row.

    Args:
      rows: groups of each row.
      mode: "mrope" or "flat".
      row_length, vision_length: tokens and patches a row; 0 takes what is needed.
      spare: unused pools a row.
    """
    row_length = row_length or max(sum(len(g.prefix) + sum(map(len, g.texts)) for g in row) for row in rows)
    images = [[image for group in row for image in group.images] for row in rows]
    vision_length = vision_length or max(sum(len(image.patches) for image in row) for row in images)
    vision_rows = len(rows) if any(images) else 0
    pools = max(sum(len(group.texts) for group in row) for row in rows) + spare
    shape = (len(rows), row_length)
    batch = PackedBatch(
        tokens=np.zeros(shape, np.int32),
        positions=np.zeros((*shape, 3), np.int32),
        segment=np.zeros(shape, np.int32),
        prefix=np.zeros(shape, np.int32),
        image_cell=np.full(shape, -1, np.int32),
        pool=np.zeros((len(rows), pools), np.int32),
        record=np.full((len(rows), pools), -1, np.int32),
        target=np.zeros((len(rows), pools), np.float32),
        weight=np.zeros((len(rows), pools), np.float32),
        image_token=np.full((len(rows), 0), -1, np.int32),
        patches=np.zeros((vision_rows, vision_length, PATCH_FEATURES), np.uint8),
        patch_position=np.zeros((vision_rows, vision_length, 2), np.int32),
        patch_segment=np.zeros((vision_rows, vision_length), np.int32),
    )
    record = 0
    for b, row in enumerate(rows):
        at = run = pool = patch = 0
        for group in row:
            positions, start = prefix_positions(group, mode)
            run += 1
            prefix_run, here = run, slice(at, at + len(group.prefix))
            batch.tokens[b, here], batch.positions[b, here] = group.prefix, positions
            batch.segment[b, here] = batch.prefix[b, here] = run
            first = (b * vision_length + patch) // 4
            patch += sum(len(image.patches) for image in group.images)
            is_image = np.array(group.prefix) == IMAGE
            batch.image_cell[b, here][is_image] = first + np.arange(is_image.sum())
            at += len(group.prefix)
            for text in group.texts:
                run += 1
                here = slice(at, at + len(text))
                batch.tokens[b, here] = text
                batch.positions[b, here] = start + np.arange(len(text))[:, None]
                batch.segment[b, here], batch.prefix[b, here] = run, prefix_run
                at += len(text)
                batch.pool[b, pool], batch.record[b, pool], batch.weight[b, pool] = at - 1, record, 1
                pool, record = pool + 1, record + 1
        patch = 0
        for number, image in enumerate(images[b], start=1):
            here = slice(patch, patch + len(image.patches))
            batch.patches[b, here], batch.patch_segment[b, here] = image.patches, number
            batch.patch_position[b, here] = block_major(image.rows, image.cols)
            patch += len(image.patches)
    return batch


def pack_one(group: Group, **options) -> PackedBatch:
    """One group in one row."""
    return pack([[group]], **options)


def pixel_values(images: list[Image]) -> np.ndarray:
    """float32[patches, 3 * 2 * 14 * 14] as transformers' processor makes them: normalised, doubled along time."""
    raw = np.concatenate([image.patches for image in images]).reshape(-1, 3, 1, 196).astype(np.float32)
    mean, std = (np.array(value, np.float32).reshape(1, 3, 1, 1) for value in (CLIP_MEAN, CLIP_STD))
    return np.repeat((raw / np.float32(255) - mean) / std, 2, axis=2).reshape(len(raw), -1)


def torch_inputs(groups: list[Group], *, mode: str = "mrope", padding: str = "right") -> dict:
    """Inputs of `Qwen2VLModel` for groups of one text each, one pair a row, padded on the given side."""
    torch = pytest.importorskip("torch")

    sequences = [group.prefix + group.texts[0] for group in groups]
    length = max(map(len, sequences))
    ids, mask = np.zeros((len(groups), length), np.int64), np.zeros((len(groups), length), np.int64)
    for row, sequence in enumerate(sequences):
        here = slice(0, len(sequence)) if padding == "right" else slice(length - len(sequence), length)
        ids[row, here], mask[row, here] = sequence, 1
    images = [image for group in groups for image in group.images]
    inputs = {"input_ids": ids, "attention_mask": mask}
    if images:
        inputs["pixel_values"] = pixel_values(images)
        inputs["image_grid_thw"] = np.array([(1, image.rows, image.cols) for image in images])
        inputs["mm_token_type_ids"] = (ids == IMAGE).astype(np.int64)
    if mode == "flat":
        flat = np.maximum(mask.cumsum(1) - 1, 0)
        inputs["position_ids"] = np.tile(flat[None], (3, 1, 1))
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}


def torch_pooled(model, groups: list[Group], **options) -> np.ndarray:
    """float32[len(groups), H]: transformers' final hidden state at the last valid token of each pair."""
    import torch

    inputs = torch_inputs(groups, **options)
    with torch.no_grad():
        hidden = model.model(**inputs, use_cache=False).last_hidden_state.numpy()
    length = inputs["attention_mask"].shape[1]
    last = length - 1 - np.argmax(inputs["attention_mask"].numpy()[:, ::-1], axis=1)
    return hidden[np.arange(len(groups)), last]
