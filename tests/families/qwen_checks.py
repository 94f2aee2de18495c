"""What is checked of every Qwen family besides `common.check_parity`: packing, execution, meshes, weights, use."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from multitap_jax import cli
from multitap_jax.backbones import Backbone, Execution
from multitap_jax.batch import PackedBatch
from multitap_jax.config import MeshConfig
from multitap_jax.data.stream import Pair
from multitap_jax.families import abstract_backbone
from multitap_jax.parallel.mesh import make_mesh, param_shardings, shard_batch
from multitap_jax.reward import RewardHead, RewardModel
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.scoring.manifest import Overall
from multitap_jax.stage1.step import forward as sharded_forward
from multitap_jax.stage1.step import join_cells, split_cells
from multitap_jax.weights.hub import export_tensors, load_backbone
from multitap_jax.weights.mapping import named_params
from tests.families.common import (
    FLOAT32,
    QUICK,
    TOLERANCE,
    Oracle,
    batches,
    contract_of,
    direction,
    forward,
    picture,
    torch_inputs,
    torch_states,
)

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


def assert_near(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), atol=TOLERANCE, rtol=0)


layer_states = jax.jit(
    lambda model, batch: (
        model.vision.hidden_states(batch, FLOAT32),
        model.vision(batch, FLOAT32),
        model.hidden_states(batch, FLOAT32),
    ),
    compiler_options=QUICK,
)


def loss(model: Backbone, batch: PackedBatch, execution: Execution) -> tuple[jax.Array, jax.Array]:
    states = model(batch, execution)
    score = jnp.tanh(jnp.einsum("bkh,h->bk", states, direction(states.shape[-1])) * 0.1)
    return jnp.sum(jnp.where(jnp.asarray(batch.record) >= 0, score, 0.0)), states


value_and_gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2, compiler_options=QUICK)


def assert_same_gradients(got: Any, expected: Any) -> None:
    wanted = named_params(expected)
    for path, gradient in named_params(got).items():
        largest = float(np.abs(wanted[path]).max())
        assert largest > 0, path
        np.testing.assert_allclose(gradient, wanted[path], atol=1e-4 * largest, rtol=0, err_msg=path)


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


def check_mesh(folder: Path, pairs: Sequence[Pair], **chosen: str) -> None:
    """On 8 devices, parameters sharded by their rules and rows over data and fsdp: the states of one device."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    (batch,) = batches(folder, pairs, contract_of(folder, **chosen), cells=4)
    expected = forward(load_backbone(folder), batch, FLOAT32)
    backbone = load_backbone(folder, shardings=param_shardings(abstract_backbone(folder), mesh))
    assert len({len(x.sharding.device_set) for x in jax.tree.leaves(backbone)}) == 1

    def run(model: Backbone, batch: PackedBatch) -> jax.Array:
        cells = split_cells(batch, 4, 1, model.config.block)
        execution = Execution(mesh=mesh)
        return join_cells(sharded_forward(model, jax.tree.map(lambda x: x[0], cells), execution)[None])

    got = jax.jit(run, compiler_options=QUICK)(backbone, shard_batch(batch, mesh))
    assert_near(got, expected)


def check_weights(oracle: Oracle, model: Any, folder: Path, scratch: Path) -> None:
    """Import and export are inverse to the byte, and every spelling that transformers writes loads."""
    expected = {key: value for key, value in load_file(folder / "model.safetensors").items() if key != "lm_head.weight"}
    assert len(expected) > 20
    model.save_pretrained(scratch / "memory", save_original_format=False)
    model.model.save_pretrained(scratch / "base")
    for place in (folder, scratch / "memory", scratch / "base"):
        if place != folder:
            (place / "config.json").write_text(json.dumps(oracle.config))
        exported = dict(export_tensors(load_backbone(place)))
        assert exported.keys() == expected.keys()
        for key, value in exported.items():
            assert value.tobytes() == expected[key].tobytes(), key


def check_score(oracle: Oracle, model: Any, folder: Path, scratch: Path, pairs: Sequence[Pair], **chosen: str) -> None:
    """`multitap score` from an artefact gives what transformers gives with the same head."""
    contract, hidden = contract_of(folder, **chosen), load_backbone(folder).config.text.hidden_size
    weight, states = direction(hidden), torch_states(oracle, model, pairs, contract)
    bias = np.float32(-np.median(states @ weight))  # so that no score is near 0 or 1
    head = RewardHead.from_arrays(weight, bias)
    artefact = scratch / "artefact"
    overall = Overall(target="score", target_range=(0.0, 1.0))
    Artefact.save(artefact, RewardModel(load_backbone(folder), head), base=folder, contract=contract, overall=overall)
    lines = []
    for index, pair in enumerate(pairs):
        names = [f"{index}_{number}.png" for number in range(len(pair.images))]
        for name, image in zip(names, pair.images, strict=True):
            image.save(scratch / name)
        record = {"id": f"r{index}", "image": names, "text": pair.text}
        lines.append(json.dumps(record | ({"request": pair.request} if pair.request else {})))
    (scratch / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    command = ["score", f"--checkpoint={artefact}", f"--input={scratch / 'pairs.jsonl'}"]
    assert cli.main([*command, f"--output={scratch / 'scores.jsonl'}", "--dtype=float32"]) == 0
    found = [json.loads(line) for line in (scratch / "scores.jsonl").read_text().splitlines()]
    expected = 1 / (1 + np.exp(-(states @ weight + bias)))
    assert [line["id"] for line in found] == [f"r{index}" for index in range(len(pairs))]
    assert expected.std() > 0.1
    np.testing.assert_allclose([line["score"] for line in found], expected, atol=TOLERANCE, rtol=0)
