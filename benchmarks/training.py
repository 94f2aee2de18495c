"""One fine-tuning step here against torch eager with sdpa: same random weights, same batch, same machine, one run.

  python benchmarks/training.py [--device=cpu|gpu] [--size=small|2b|7b] [--parts full lora] [--pairs=12] [--repeats=3]

A step is forward, backward, clipping and AdamW of `--pairs` pairs: of as many pictures (one text an image, nothing is
shared), and of a sixth of them (six texts an image). torch lays the batch out pair by pair, padded to the longest; here
the step is that of `multitap train`, on the packed batch that its dataset builds from records. Host work is timed on
neither side: a run does it ahead. Sizes: see scoring.py; real ones compute in bfloat16 on float32 weights, of which
each side has its own on the device. `--parts lora` trains adapters of the decoder's attention and the head alone.

Printed: how far loss and gradient norm of the first step, and the loss of the last, lie apart, which shows that both
compute the same (the run ends where they do not); pairs and real tokens a second (what is shared counts once), the
ratio, useful FLOPs (`flops.train_flops`: three forward passes where everything learns, no recomputation, no optimizer)
against the device's rate of matrix products, which takes turns with the steps; and memory.
"""

import argparse
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import Devices, add_flags, check_agreement, start  # beside this file
from flax import nnx
from measuring import Products, Way, measure
from workload import Workload, asked, make_pairs, make_workload, size_of, write_records

from multitap_jax.backbones import Execution
from multitap_jax.backbones.layers import Linear
from multitap_jax.batch import PackedBatch
from multitap_jax.config import MeshConfig, OptimizerConfig, TrainableConfig
from multitap_jax.data.pipeline import PackedDataset
from multitap_jax.data.prepare import prepare
from multitap_jax.data.records import load_records
from multitap_jax.data.stream import Pair
from multitap_jax.parallel.mesh import make_mesh, shard_batch
from multitap_jax.stage1.optimizer import make_optimizer, make_schedule
from multitap_jax.stage1.step import init_state, make_train_step
from multitap_jax.stage1.trainable import add_lora, partition

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
OPTIMIZER = OptimizerConfig(learning_rate=1e-5)
STEPS = 1000  # of the schedule, which is constant
# Loss, and norm of the gradient, of one step. A norm in float32 is a sum over millions of squares in another order.
TOLERANCES = {"float32": (1e-5, 1e-4), "bfloat16": (3e-2, 1e-1)}


class Batch(NamedTuple):
    """The same step for both sides.

    Attributes:
      packed: as the dataset of `multitap train` lays it out.
      alone: every pair as a batch of its own, for counting what torch is asked for.
      pairs, targets: by path, and float32[N].
    """

    packed: PackedBatch
    alone: list[PackedBatch]
    pairs: list[Pair]
    targets: np.ndarray


def make_batch(workload: Workload, folder: Path, images: int, texts: int) -> Batch:
    """Writes records and reads them as a run does."""
    rng = np.random.default_rng(texts)
    file, pairs = write_records(folder, make_pairs(images, texts, rng, side=workload.size.side), rng)
    records = load_records(file).records
    parts = workload.processing
    hidden = workload.model.backbone.config.text.hidden_size

    def packed(chosen: list[Any]) -> PackedBatch:
        prepared = prepare(chosen, parts.prompter, parts.reader, parts.vision)
        return PackedDataset(prepared, parts.reader, parts.vision, hidden=hidden, batch_size=len(chosen))[0]

    targets = np.asarray([record.score for record in records], np.float32)
    return Batch(packed(records), [packed([record]) for record in records], pairs, targets)


class Ours:
    """The step of this package on one batch."""

    def __init__(self, workload: Workload, batch: PackedBatch, parts: str, remat: str, device: jax.Device):
        mesh = make_mesh(MeshConfig(), [device])
        split = partition(workload.model, parts)
        optimizer, schedule = make_optimizer(OPTIMIZER, STEPS), make_schedule(OPTIMIZER, STEPS)
        execution = Execution(dtype=workload.size.dtype, remat=remat)
        self._state, self._frozen = init_state(split, optimizer, mesh), split.frozen
        jax.block_until_ready(self._state)
        for leaf in jax.tree.leaves(split.trainable):  # the state has its own copy; two would not fit on a device
            leaf.delete()
        self._batch = shard_batch(batch, mesh)
        self._step = make_train_step(split, optimizer, schedule, execution, mesh)

    def step(self) -> tuple[float, float]:
        """Loss before the step, and the norm of its gradient before clipping."""
        self._state, metrics = self._step(self._state, self._frozen, self._batch)
        return float(metrics["loss"]), float(metrics["grad_norm"])


def add_adapters(workload: Workload) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """Adds adapters to the model, with both halves random, so that both have gradients; by name, for the other side."""
    add_lora(workload.model, TrainableConfig(parts="lora", lora_targets=TARGETS), nnx.Rngs(2))
    out, key = {}, jax.random.key(3)
    for path, module in nnx.iter_modules(workload.model):
        if isinstance(module, Linear) and module.lora_a is not None and module.lora_b is not None:
            values = jax.random.normal(jax.random.fold_in(key, len(out)), module.lora_b.shape, jnp.float32) / 100
            module.lora_b[...] = values
            out[str(path[-1])] = (np.asarray(module.lora_a[...]), np.asarray(values), float(module.lora_scale or 0))
    assert len(out) == len(TARGETS), out.keys()
    return out


def make_steps(
    workload: Workload, batch: Batch, parts: str, remat: str, devices: Devices
) -> dict[str, Callable[[], tuple[float, float]]]:
    """The steps of both sides by name; they learn on copies, and the model is used up."""
    sides: dict[str, Any] = {}
    if devices.torch is not None:
        from torch_side import Torch, Trainer  # beside this file

        # Before there are adapters, which a checkpoint has no place for.
        theirs = Torch(workload, devices.torch, "float32")
    adapters = add_adapters(workload) if parts == "lora" else {}
    if devices.torch is not None:
        half = workload.size.dtype == "bfloat16"
        sides["torch"] = Trainer(theirs, batch.pairs, batch.targets, OPTIMIZER, adapters, bfloat16=half)
    sides["ours"] = Ours(workload, batch.packed, parts, remat, devices.jax)
    return {name: side.step for name, side in sides.items()}


def compare(parts: str, texts: int, args: argparse.Namespace, devices: Devices, folder: Path) -> None:
    """Times a step of both sides and prints what came out."""
    size = size_of(args.size)
    workload = make_workload(folder / "base", size, dtype="float32")
    batch = make_batch(workload, folder / "records", args.pairs // texts, texts)
    laid_out = {"torch": batch.alone, "ours": [batch.packed]}
    asks = {name: asked(b, workload.model.backbone.config, parts) for name, b in laid_out.items()}
    steps = make_steps(workload, batch, parts, args.remat, devices)
    history: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    run = lambda name: lambda: history[name].append(steps[name]())
    ways = {name: Way(run(name), args.pairs, asks[name], name == "torch") for name in steps}
    for way in ways.values():
        way.run()  # compiles
    figures = measure(ways, "ours", Products(devices, size.dtype, size.products), devices, args.repeats)
    filled = f"our rows are {asks['ours'].filled:.0%} tokens"
    print(
        f"\n{texts} text(s) an image, a step of {args.pairs} pairs, {parts}; {filled}; {agreement(history, size.dtype)}"
    )
    print(figures, flush=True)


def agreement(history: dict[str, list[tuple[float, float]]], dtype: str) -> str:
    """How far the first steps and the losses after all steps lie apart; ends the run where they are not the same."""
    (loss, norm), last = history["ours"][0], history["ours"][-1][0]
    own = f"loss {loss:.7f} (after {len(history['ours']) - 1} steps {last:.7f}), gradient norm {norm:.6f}"
    if "torch" not in history:
        return f"{own}; no comparison"
    first, (tolerance, of_norm) = history["torch"][0], TOLERANCES[dtype]
    apart = [check_agreement("loss", loss, first[0], tolerance), check_agreement("norm", norm, first[1], of_norm)]
    later = check_agreement("loss after all steps", last, history["torch"][-1][0], 10 * tolerance)
    return f"{own}; apart by {apart[0]:.1e} ({later:.1e}) and {apart[1]:.1e} of it"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, repeats=3)
    parser.add_argument("--parts", choices=("full", "lora"), nargs="+", default=["full"], help="what learns")
    parser.add_argument("--pairs", type=int, default=12, help="of a step; a multiple of the texts an image")
    parser.add_argument("--texts", type=int, nargs="+", default=(1, 6), help="texts an image")
    parser.add_argument("--remat", default="none", help="what ours computes again in the backward pass (config.py)")
    args = parser.parse_args()
    if wrong := [texts for texts in args.texts if args.pairs % texts]:
        parser.error(f"--pairs={args.pairs} is no multiple of {wrong[0]} texts an image")
    devices = start(args)
    for parts, texts in itertools.product(args.parts, args.texts):
        with tempfile.TemporaryDirectory() as folder:
            compare(parts, texts, args, devices, Path(folder))


if __name__ == "__main__":
    main()
