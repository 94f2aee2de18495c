"""What is checked of several families besides `common.check_parity`: eight devices, weights, the score verb."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from multitap_jax import cli
from multitap_jax.backbones import Backbone, Execution
from multitap_jax.batch import PackedBatch
from multitap_jax.config import MeshConfig
from multitap_jax.data.stream import Pair
from multitap_jax.naming import by_name
from multitap_jax.parallel.mesh import batch_shards, make_mesh, param_shardings, shard_batch
from multitap_jax.reward import RewardHead, RewardModel
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.stage1.step import forward as sharded_forward
from multitap_jax.stage1.step import join_cells, split_cells
from multitap_jax.weights.hub import export_tensors, load_backbone
from tests.families.common import (
    FLOAT32,
    QUICK,
    TOLERANCE,
    Oracle,
    batches,
    contract_of,
    direction,
    torch_states,
)

SAME_GRADIENT = 1e-4  # relative to the largest entry of a parameter's gradient, ours against ours
MIXED = MeshConfig(data=2, fsdp=2, tensor=2)
Run = Callable[[Backbone, PackedBatch], jax.Array]


def assert_near(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), atol=TOLERANCE, rtol=0)


def total_and_states(run: Run, model: Backbone, batch: PackedBatch) -> tuple[jax.Array, jax.Array]:
    """The sum over pairs of tanh(h . direction / 10), as `common.gradients` has it, and the states h."""
    states = run(model, batch)
    score = jnp.tanh(jnp.einsum("bkh,h->bk", states, direction(states.shape[-1])) * 0.1)
    return jnp.sum(jnp.where(jnp.asarray(batch.record) >= 0, score, 0.0)), states


def assert_same_gradients(got: Any, expected: Any, floor: float = 0.0) -> None:
    """`floor` stands for the largest entry where that is smaller: of gradients that are zero but for rounding."""
    wanted = by_name(expected)
    for path, gradient in by_name(got).items():
        largest = float(np.abs(wanted[path]).max())
        assert largest > 0, path
        atol = SAME_GRADIENT * max(largest, floor)
        np.testing.assert_allclose(gradient, wanted[path], atol=atol, rtol=0, err_msg=path)


def check_mesh(
    folder: Path, pairs: Sequence[Pair], *, gradient: bool = False, config: MeshConfig = MIXED, **chosen: str
) -> None:
    """Two micro-batches on eight devices, parameters sharded by their rules: states (and gradients) of one device."""
    mesh = make_mesh(config)
    (batch,) = batches(folder, pairs, contract_of(folder, **chosen), cells=2 * batch_shards(mesh))
    here = batch.record >= 0
    sharded = load_backbone(folder, shardings=lambda model: param_shardings(model, mesh))
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(sharded)} == {8}

    def on_mesh(model: Backbone, batch: PackedBatch) -> jax.Array:
        cells = split_cells(batch, batch_shards(mesh), 2, model.config.block)
        return join_cells(jax.lax.map(lambda cell: sharded_forward(model, cell, Execution(mesh=mesh)), cells))

    def computed(run: Run, model: Backbone, batch: PackedBatch) -> tuple[np.ndarray, Any]:
        if not gradient:
            return np.asarray(jax.jit(run, compiler_options=QUICK)(model, batch))[here], None
        step = jax.value_and_grad(lambda *x: total_and_states(run, *x), has_aux=True)
        (_, states), found = jax.jit(step, compiler_options=QUICK)(model, batch)
        return np.asarray(states)[here], found

    expected = computed(lambda model, batch: model(batch, FLOAT32), load_backbone(folder), batch)
    found = computed(on_mesh, sharded, shard_batch(batch, mesh))
    assert_near(found[0], expected[0])
    if gradient:
        assert_same_gradients(found[1], expected[1], floor=1e-3)


def check_weights(
    oracle: Oracle,
    model: Any,
    folder: Path,
    scratch: Path,
    *,
    hub: tuple[str, str] | None = None,
    unused: Sequence[str] = ("lm_head.",),
) -> None:
    """Import and export are inverse to the byte, under hub names, from every spelling.

    Args:
      oracle, model, folder: the family, its torch model, and what `Oracle.write` left.
      scratch: an empty place.
      hub: what names begin with where transformers wrote them, and what they do on the hub; None is no difference.
      unused: parts of the names of tensors that no score needs.
    """
    written = load_file(folder / "model.safetensors")
    tensors = {key.replace(*hub, 1) if hub and key.startswith(hub[0]) else key: x for key, x in written.items()}
    expected = {key: value for key, value in tensors.items() if not any(part in key for part in unused)}
    assert len(expected) > 20
    (scratch / "hub").mkdir()
    save_file(tensors, scratch / "hub" / "model.safetensors")
    model.save_pretrained(scratch / "written")
    model.save_pretrained(scratch / "memory", save_original_format=False)
    model.model.save_pretrained(scratch / "base")
    spellings = set()
    for place in ("hub", "written", "memory", "base"):
        (scratch / place / "config.json").write_text(json.dumps(oracle.config))
        spellings.add(frozenset(load_file(scratch / place / "model.safetensors")))
        exported = dict(export_tensors(load_backbone(scratch / place)))
        assert exported.keys() == expected.keys()
        for key, value in exported.items():
            assert value.tobytes() == np.ascontiguousarray(expected[key]).tobytes(), (place, key)
    assert len(spellings) >= (4 if hub else 2)


def score_verb(artefact: Path, pairs: Sequence[Pair], scratch: Path) -> np.ndarray:
    """float[N]: what `multitap score` writes for these pairs, their pictures in files."""
    lines = []
    for index, pair in enumerate(pairs):
        names = [f"{index}_{number}.png" for number in range(len(pair.images))]
        for name, image in zip(names, pair.images, strict=True):
            image.save(scratch / name)
        record = {"id": f"r{index}", "image": names if len(names) != 1 else names[0], "text": pair.text}
        lines.append(json.dumps(record | ({"request": pair.request} if pair.request else {})))
    (scratch / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    command = ["score", f"--checkpoint={artefact}", f"--input={scratch / 'pairs.jsonl'}"]
    assert cli.main([*command, f"--output={scratch / 'scores.jsonl'}", "--dtype=float32"]) == 0
    found = [json.loads(line) for line in (scratch / "scores.jsonl").read_text().splitlines()]
    assert [line["id"] for line in found] == [f"r{index}" for index in range(len(pairs))]
    assert [line["error"] for line in found] == [None] * len(pairs)
    return np.asarray([line["score"] for line in found])


def check_score(oracle: Oracle, model: Any, folder: Path, scratch: Path, pairs: Sequence[Pair], **chosen: str) -> Path:
    """`multitap score` from an artefact gives what transformers gives with the same head; returns the artefact."""
    contract, backbone = contract_of(folder, **chosen), load_backbone(folder)
    weight, states = direction(backbone.config.text.hidden_size), torch_states(oracle, model, pairs, contract)
    bias = np.float32(-np.median(states @ weight))  # so that no score is near 0 or 1
    head = RewardHead.from_arrays(weight, bias)
    Artefact.save(scratch / "artefact", RewardModel(backbone, head), base=folder, contract=contract)
    expected = 1 / (1 + np.exp(-(states @ weight + bias)))
    assert expected.std() > 0.1
    assert_near(score_verb(scratch / "artefact", pairs, scratch), expected)
    return scratch / "artefact"
