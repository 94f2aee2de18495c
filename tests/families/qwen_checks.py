"""What is checked of every Qwen family besides what others share (`checks.py`): layers, packing, execution."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from multitap_jax.backbones import Execution
from multitap_jax.batch import PackedBatch
from multitap_jax.data.stream import Pair
from multitap_jax.weights.hub import load_backbone
from tests.families.checks import assert_near, assert_same_gradients, total_and_states
from tests.families.common import FLOAT32, QUICK, Oracle, batches, contract_of, forward, picture, torch_inputs

# In windows of 56 pixels and cells of 28: cut at the right and at the bottom, smaller than one, and fitting.
WIDE, TALL, SMALL, SQUARE = picture(150, 90), picture(60, 200), picture(30, 30), picture(168, 112)
PAIRS = [
    Pair((WIDE,), "a red ball"),
    Pair((TALL,), "the blue box is far away on the right"),
    Pair((WIDE,), 'a "red" ball is near on your left'),
    Pair((SMALL, WIDE), "a ball", "Which way is safe?"),
    Pair((SQUARE,), "a box", "What is far away?"),
    Pair((SQUARE,), "the red box is on the left", "What is far away?"),
    Pair((), "no picture at all"),
]


def recorded(modules: Sequence[Any], run: Any, *, inputs: bool = False) -> list[np.ndarray]:
    """What torch modules give (or get) during `run`."""
    import torch

    found: list[np.ndarray] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        value = args[0] if inputs else output
        found.append((value[0] if isinstance(value, tuple) else value).numpy())

    hooks = [module.register_forward_hook(keep) for module in modules]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return found


def runner(oracle: Oracle, model: Any, folder: Path, pair: Pair, **chosen: str) -> tuple[Any, dict[str, Any]]:
    """Runs transformers on one pair, and what it is given."""
    given = torch_inputs(oracle, pair, contract_of(folder, **chosen))
    return partial(model.model, **given, use_cache=False), given


layer_states = jax.jit(
    lambda model, batch: (
        model.vision.hidden_states(batch, FLOAT32),
        model.vision(batch, FLOAT32),
        model.hidden_states(batch, FLOAT32),
    ),
    compiler_options=QUICK,
)


value_and_gradient = jax.jit(
    jax.value_and_grad(
        lambda model, batch, execution: total_and_states(lambda *x: x[0](x[1], execution), model, batch), has_aux=True
    ),
    static_argnums=2,
    compiler_options=QUICK,
)


def grown(batch: PackedBatch, like: PackedBatch, block: tuple[int, int]) -> PackedBatch:
    """`batch` padded to the shape of `like`, so that it needs no program of its own."""
    cells, wider = (x.patches.shape[1] // block[0] * block[1] for x in (batch, like))
    cell = batch.image_cell
    if cells:
        batch = batch._replace(image_cell=np.where(cell >= 0, cell // cells * wider + cell % cells, -1))
    empty = {"image_cell": -1, "record": -1, "image_token": -1}

    def pad(name: str, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        assert all(a <= b for a, b in zip(x.shape, shape, strict=True)), (name, x.shape, shape)
        widths = [(0, b - a) for a, b in zip(x.shape, shape, strict=True)]
        return np.pad(x, widths, constant_values=empty.get(name, 0))

    return PackedBatch(*(pad(n, x, y.shape) for n, x, y in zip(PackedBatch._fields, batch, like, strict=True)))


def check_packing(folder: Path, pairs: Sequence[Pair], **chosen: str) -> None:
    """Packed together, pairs have the states and the sum of the gradients that they have alone."""
    contract, backbone = contract_of(folder, **chosen), load_backbone(folder)
    (packed,) = batches(folder, pairs, contract)
    assert packed.segment.max() > 2
    assert packed.patch_segment.max() > 1
    (_, states), gradient = value_and_gradient(backbone, packed, FLOAT32)
    total = None
    for index, pair in enumerate(pairs):
        (alone,) = batches(folder, [pair], contract)
        (_, state), part = value_and_gradient(backbone, grown(alone, packed, backbone.config.block), FLOAT32)
        assert_near(states[packed.record == index][0], state[0, 0])
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    assert_same_gradients(gradient, total)


def check_executions(folder: Path, pairs: Sequence[Pair], **chosen: str) -> None:
    """Neither backends nor the loop change a state; nor does recomputation change a gradient."""
    contract, backbone = contract_of(folder, **chosen), load_backbone(folder)
    (packed,) = batches(folder, pairs, contract)
    (_, expected), gradient = value_and_gradient(backbone, packed, FLOAT32)
    loop = Execution(layers="loop", attention="chunked")
    assert_near(forward(backbone, packed, loop), expected)
    (_, states), again = value_and_gradient(backbone, packed, Execution(remat="dots", attention="blockwise"))
    assert_near(states, expected)
    assert_same_gradients(again, gradient)
