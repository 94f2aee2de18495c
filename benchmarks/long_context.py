"""Memory and time of one long row through whole decoders, each length in a process of its own; a table and a plot.

  python -m benchmarks.long_context [--lengths=8192,16384,32768,65536,131072] [--dense=8192] [--plot=long_context.png]

A row is one prefix (Qwen2-VL: with a picture in it) and four short texts that are scored: what a long document and four
claims about it are. Models are tiny (two layers, width 64), in the shapes of Llama-3.2 (text layers and cross-attention
that is passed by, Llama 3 scaling of rotary positions, 131,072 positions) and of Qwen2-VL (M-RoPE, 32,768 positions; it
is measured up to its limit). Forward pass alone, and with the gradient of all parameters, attention as "auto" takes it;
up to `--dense` also dense attention, for comparison. Memory is the peak of the process above what it held before the
first run (weights, batch, compiled program).
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from multitap_jax.backbones import Execution
from multitap_jax.batch import PackedBatch
from multitap_jax.families import from_config

TEXTS, TEXT_TOKENS, SIDE = 4, 32, 56  # texts of a row, their tokens, pixels of the picture
_TEXT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama-3.2": {
        "model_type": "mllama",
        "image_token_index": 320,
        "text_config": {
            **_TEXT,
            "num_hidden_layers": 3,
            "cross_attention_layers": [1],
            "rope_theta": 500000.0,
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "intermediate_size": 48,
            "image_size": 28,
            "patch_size": 7,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
        },
    },
    "qwen2-vl": {
        "model_type": "qwen2_vl",
        **_TEXT,
        "num_hidden_layers": 2,
        "max_position_embeddings": 32768,
        "image_token_id": 319,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "vision_config": {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64},
    },
}


def make_model(name: str) -> Any:
    """A backbone of `MODELS` with random weights that keep activations O(1)."""
    model = from_config(MODELS[name], rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape) * (x.shape[-2] ** -0.5 if x.ndim > 2 else 0.5), x.dtype)
    return jax.tree.map(draw, model)


def long_row(name: str, length: int) -> PackedBatch:
    """One row of `length` tokens: a prefix and `TEXTS` texts."""
    rng = np.random.default_rng(1)
    prefix = length - TEXTS * TEXT_TOKENS
    run = np.repeat(np.arange(1, TEXTS + 2), [prefix, *[TEXT_TOKENS] * TEXTS]).astype(np.int32)
    place = np.concatenate([np.arange(prefix), *[np.arange(prefix, prefix + TEXT_TOKENS)] * TEXTS])
    cells = (SIDE // 28) ** 2 if name == "qwen2-vl" else 0
    patches, features = 4 * cells, 3 * 14**2 if cells else 0
    row, column = (x.ravel() for x in np.mgrid[: SIDE // 14, : SIDE // 14])
    block_major = np.lexsort((column % 2, row % 2, column // 2, row // 2))
    batch = PackedBatch(
        tokens=rng.integers(0, 300, length).astype(np.int32),
        positions=np.repeat(place[:, None], 3, axis=1).astype(np.int32),
        segment=run,
        prefix=np.ones(length, np.int32),
        image_cell=np.full(length, -1, np.int32),
        pool=(prefix - 1 + TEXT_TOKENS * np.arange(1, TEXTS + 1)).astype(np.int32),
        record=np.arange(TEXTS, dtype=np.int32),
        target=np.zeros(TEXTS, np.float32),
        weight=np.ones(TEXTS, np.float32),
        image_token=np.zeros(0, np.int32),
        patches=rng.integers(0, 256, (patches, features)).astype(np.uint8),
        patch_position=np.stack([row, column], axis=1)[block_major[:patches]].astype(np.int32),
        patch_segment=np.ones(patches, np.int32),
    )
    if cells:
        batch.image_cell[4 : 4 + cells] = np.arange(cells)
    whole = PackedBatch(*(x[None] for x in batch))
    empty = {"patches": np.zeros((0, 4, 1), np.uint8), "patch_segment": np.zeros((0, 4), np.int32)}
    return whole if cells else whole._replace(**empty, patch_position=np.zeros((0, 4, 2), np.int32))


def loss(model: Any, batch: PackedBatch, execution: Execution) -> tuple[jax.Array, jax.Array]:
    """A sum over texts of something that is not linear in the state; the states."""
    states = model(batch, execution)
    toward = jnp.cos(jnp.arange(states.shape[-1], dtype=jnp.float32))
    return jnp.sum(jnp.tanh(jnp.einsum("bkh,h->bk", states, toward) * 0.1)), states


def measure(name: str, length: int, attention: str, gradient: bool) -> dict[str, float]:
    """Peak memory in MB above what is held before, and seconds, of a run in this process."""
    model, batch = make_model(name), jax.device_put(long_row(name, length))
    execution = Execution(attention=attention, remat="full" if gradient else "none")
    run = jax.value_and_grad(loss, has_aux=True) if gradient else loss
    compiled = jax.jit(run, static_argnums=2).lower(model, batch, execution).compile()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, spent = time.perf_counter(), time.process_time()
    jax.block_until_ready(compiled(model, batch))
    seconds, cpu = time.perf_counter() - start, time.process_time() - spent
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory": (peak - before) / 1024, "seconds": seconds, "cpu": cpu}


def measured_apart(*case: Any) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.long_context", "--one", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return json.loads(done.stdout.splitlines()[-1])


def plot(found: dict[tuple[str, str, bool], dict[int, float]], path: Path) -> None:
    """Memory against length on two logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, attention, gradient), curve in found.items():
        label, style = f"{name}, {attention}{', gradient' if gradient else ''}", ":" if attention == "dense" else "-"
        axes.plot(list(curve), list(curve.values()), marker="o", linestyle=style, label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens of the row", ylabel="peak memory, MB")
    axes.set_xticks(sorted({n for curve in found.values() for n in curve}), minor=False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:.0f}k")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu",), default="cpu", help="memory is told on a CPU only")
    parser.add_argument("--lengths", default="8192,16384,32768,65536,131072", help="tokens of a row")
    parser.add_argument("--dense", type=int, default=8192, help="up to which length dense attention is measured, too")
    parser.add_argument("--plot", type=Path, default=Path("long_context.png"), help="where the plot goes")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(measure(*args.one)))
        return
    found: dict[tuple[str, str, bool], dict[int, float]] = {}
    print(f"{'model':10} {'attention':9} {'pass':8} {'tokens':>7} {'MB':>8} {'KB/token':>8} {'wall s':>7} {'CPU s':>7}")
    for name in MODELS:
        limit = make_model(name).config.text.max_positions
        for attention in ("auto", "dense"):
            for gradient in (False, True):
                for length in map(int, args.lengths.split(",")):
                    if length > (limit if attention == "auto" else min(args.dense, limit)):
                        continue
                    one = measured_apart(name, length, attention, gradient)
                    found.setdefault((name, attention, gradient), {})[length] = one["memory"]
                    row = f"{name:10} {attention:9} {'gradient' if gradient else 'forward':8} {length:7}"
                    row += f" {one['memory']:8.0f} {one['memory'] * 1024 / length:8.2f}"
                    print(f"{row} {one['seconds']:7.1f} {one['cpu']:7.1f}", flush=True)
    plot(found, args.plot)
    print(f"\nplot: {args.plot}")


if __name__ == "__main__":
    main()
