"""What LLaVA-1.5 and LLaVA-OneVision are both asked, besides what others share (`checks.py`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from multitap_jax.backbones import Execution
from multitap_jax.config import TrainableConfig
from multitap_jax.data.layouts import Layout
from multitap_jax.data.packing import Shape, empty_batch
from multitap_jax.data.processing import Contract
from multitap_jax.data.stream import Pair
from multitap_jax.families import from_config
from multitap_jax.reward import RewardHead, RewardModel
from multitap_jax.stage1.trainable import add_lora, merge_lora
from multitap_jax.weights.files import read_tensors
from multitap_jax.weights.hub import load_backbone
from tests.families.common import QUICK, batches, forward

HUB = ("vision_tower.", "vision_tower.vision_model.")  # where transformers writes the tower, and where the hub has it
SIZES = [(56, 56), (57, 55), (100, 40), (40, 100), (31, 333), (333, 31), (20, 20), (201, 199), (3, 90), (640, 427)]


def pixels(layout: Layout, image: Image.Image) -> np.ndarray:
    """uint8[views, channels, height, width] of what `cut` gives, the patches put together again."""
    found = layout.cut(image, layout.grid(image.height, image.width))
    side, patch = int(layout.block[0] ** 0.5), layout.patch_size
    views = found.reshape(-1, side, side, 3, patch, patch).transpose(0, 3, 1, 4, 2, 5)
    return views.reshape(-1, 3, side * patch, side * patch)


def raw(values: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """float32[..., channels, height, width] before normalisation, in 0 ... 255, as far as float32 tells."""
    spread = lambda numbers: np.asarray(numbers, np.float32)[:, None, None]
    return (values * spread(std) + spread(mean)) * np.float32(255)


def check_transformers_opens(oracle_model: Any, folder: Path) -> None:
    """An artefact in transformers: nothing missing, nothing left over, every tensor the one it was made of."""
    assert all("vision_model" in name for name in read_tensors(folder) if name.startswith("vision_tower"))
    model, info = type(oracle_model).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    expected = oracle_model.state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key].numpy(), value.numpy(), err_msg=key)


def check_adapters(folder: Path, pairs: Sequence[Pair], contract: Contract, targets: Sequence[str]) -> None:
    """Adapters on these modules change the states, and folded into the kernels they give the same ones."""
    (batch,) = batches(folder, pairs, contract)
    model = RewardModel(load_backbone(folder), RewardHead(64, rngs=nnx.Rngs(0)))
    before = np.asarray(forward(model.backbone, batch, Execution()))
    add_lora(model, TrainableConfig(lora_targets=tuple(targets), lora_rank=2), nnx.Rngs(0))
    rng = np.random.default_rng(1)
    count = 0
    for _, module in nnx.iter_modules(model):
        if getattr(module, "lora_b", None) is not None:
            module.lora_b[...] = jnp.asarray(rng.standard_normal(module.lora_b.shape) * 0.05, jnp.float32)
            count += 1
    assert count == len(targets)
    adapted = np.asarray(forward(model.backbone, batch, Execution()))
    assert np.abs(adapted - before).max() > 1e-2
    merged = np.asarray(forward(merge_lora(model).backbone, batch, Execution()))
    np.testing.assert_allclose(merged, adapted, atol=2e-5, rtol=0)


def check_flops(config: Mapping[str, Any], views: int) -> None:
    """XLA's own count of tower and projector on whole views; products only are a lower bound of it."""
    backbone: Any = nnx.eval_shape(lambda: from_config(config, rngs=nnx.Rngs(0)))
    view, features = backbone.config.block[0], backbone.config.vision.pixels.features
    batch = empty_batch(
        Shape(1, 8, 4, 1, views * view), SimpleNamespace(layout=SimpleNamespace(features=features, coordinates=2))
    )
    batch = batch._replace(patch_segment=np.ones_like(batch.patch_segment))
    execution = Execution(layers="loop", attention="dense")
    run = jax.jit(lambda model, batch: model.vision(batch, execution), compiler_options=QUICK)
    counted = run.lower(backbone, batch).compile()
    ratio = counted.cost_analysis()["flops"] / backbone.config.vision_flops(views * view, -1)
    assert 1.0 <= ratio < 1.1, ratio
