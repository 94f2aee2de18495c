"""What LLaVA-1.5 and LLaVA-OneVision are both asked: pixels, weights in and out, meshes, adapters, scores, FLOPs."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file, save_file

from multitap_jax import cli
from multitap_jax.backbones import Execution
from multitap_jax.batch import PackedBatch
from multitap_jax.config import MeshConfig, TrainableConfig
from multitap_jax.data.layouts import Layout
from multitap_jax.data.packing import Shape, empty_batch
from multitap_jax.data.processing import Contract
from multitap_jax.data.stream import Pair
from multitap_jax.families import from_config
from multitap_jax.parallel.mesh import batch_shards, make_mesh, param_shardings, shard_batch
from multitap_jax.reward import RewardHead, RewardModel
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.stage1.step import forward as step_forward
from multitap_jax.stage1.step import join_cells, split_cells
from multitap_jax.stage1.trainable import add_lora, merge_lora
from multitap_jax.weights.files import read_tensors
from multitap_jax.weights.hub import export_tensors, load_backbone
from multitap_jax.weights.mapping import named_params
from tests.families.common import GRADIENT_TOLERANCE, QUICK, TOLERANCE, batches, direction, forward

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


def check_round_trip(torch_model: Any, folder: Path, tmp_path: Path) -> None:
    """In the hub's spelling and in the three that transformers writes: the same bytes come back, under hub names."""
    written = load_file(folder / "model.safetensors")
    hub = {key.replace("vision_tower.", "vision_tower.vision_model.", 1): value for key, value in written.items()}
    (tmp_path / "hub").mkdir()
    save_file(hub, tmp_path / "hub" / "model.safetensors")
    torch_model.save_pretrained(tmp_path / "written")
    torch_model.save_pretrained(tmp_path / "memory", save_original_format=False)
    torch_model.model.save_pretrained(tmp_path / "base")
    names = set()
    for place in ("hub", "written", "memory", "base"):
        (tmp_path / place / "config.json").write_bytes((folder / "config.json").read_bytes())
        names.add(frozenset(load_file(tmp_path / place / "model.safetensors")))
        exported = dict(export_tensors(load_backbone(tmp_path / place)))
        assert "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight" in exported
        behind = {key for key in hub if ".layers.2." in key and key.startswith("vision_tower")}
        assert (
            exported.keys()
            == {k for k in hub if not k.endswith("lm_head.weight") and "post_layernorm" not in k} - behind
        )
        for key, value in exported.items():
            assert value.tobytes() == np.ascontiguousarray(hub[key]).tobytes(), (place, key)
    assert len(names) == 4  # they are four spellings


def save_artefact(base: Path, folder: Path, contract: Contract) -> Artefact:
    backbone = load_backbone(base)
    weight = np.random.default_rng(0).standard_normal(backbone.config.text.hidden_size).astype(np.float32)
    head = RewardHead.from_arrays(weight * np.float32(0.3), np.float32(0.1))
    return Artefact.save(folder, RewardModel(backbone, head), base=base, contract=contract)


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


def check_score(artefact: Path, pairs: Sequence[Pair], expected: np.ndarray, tmp_path: Path) -> None:
    """`multitap score` gives sigmoid(w . h + b) of transformers' states `expected`, float32[N, H]."""
    lines = []
    for number, pair in enumerate(pairs):
        paths = []
        for place, image in enumerate(pair.images):
            image.save(tmp_path / f"{number}-{place}.png")
            paths.append(f"{number}-{place}.png")
        line = {"id": str(number), "image": paths if len(paths) != 1 else paths[0], "text": pair.text}
        lines.append(line | ({"request": pair.request} if pair.request else {}))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = tmp_path / "scores.jsonl"
    arguments = [f"--checkpoint={artefact}", f"--input={tmp_path / 'pairs.jsonl'}", f"--output={output}"]
    assert cli.main(["score", *arguments, "--dtype=float32"]) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["error"] for line in found] == [None] * len(pairs)
    head, _ = Artefact.open(artefact).load_heads()
    logits = expected.astype(np.float64) @ np.asarray(head.weight[...], np.float64) + float(head.bias[...])
    np.testing.assert_allclose([line["score"] for line in found], 1 / (1 + np.exp(-logits)), atol=1e-5)


def check_meshes(folder: Path, pairs: Sequence[Pair], contract: Contract) -> None:
    """States and gradients of two micro-batches on eight devices are those of the whole batch on one."""
    mesh, execution = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), Execution()
    (batch,) = batches(folder, pairs, contract, cells=8)
    sharded = load_backbone(folder, shardings=lambda model: param_shardings(model, mesh))
    block = sharded.config.block

    def in_cells(model: Any, batch: PackedBatch) -> jax.Array:
        cells = split_cells(batch, batch_shards(mesh), 2, block)
        run = lambda cell: step_forward(model, cell, dataclasses.replace(execution, mesh=mesh))
        return join_cells(jax.lax.map(run, cells))

    found = states_and_gradients(in_cells, sharded, shard_batch(batch, mesh), batch)
    expected = states_and_gradients(lambda model, batch: model(batch, execution), load_backbone(folder), batch, batch)
    np.testing.assert_allclose(found[0], expected[0], atol=TOLERANCE, rtol=0)
    for path, gradient in expected[1].items():
        largest = max(float(np.abs(gradient).max()), 1e-4)
        np.testing.assert_allclose(found[1][path], gradient, atol=GRADIENT_TOLERANCE * largest, rtol=0, err_msg=path)


def states_and_gradients(
    run: Callable[[Any, PackedBatch], jax.Array], model: Any, placed: PackedBatch, batch: PackedBatch
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    toward, here = direction(model.config.text.hidden_size), batch.record >= 0

    def loss(model: Any, batch: PackedBatch) -> tuple[jax.Array, jax.Array]:
        states = run(model, batch)
        score = jnp.tanh(jnp.einsum("bkh,h->bk", states, toward) * 0.1)
        return jnp.sum(jnp.where(here, score, 0.0)), states

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
    (_, states), gradient = step(model, placed)
    return np.asarray(states)[here], {path: np.asarray(leaf) for path, leaf in named_params(gradient).items()}


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
