"""Bytes read, peak memory and seconds of loading a checkpoint of real size, against what is on the disk.

  python benchmarks/import_weights.py [--folder=DIR] [--dtype=bfloat16] [--torch]

Writes a folder with the sizes of Qwen2-VL-2B and random bfloat16 weights (4.4 GB in shards, written tensor by tensor)
into a temporary place, or into --folder, which is kept and used again. Then a fresh process loads it with
`load_backbone`: once with the files put out of the page cache (cold), once from it (warm). Printed for each: bytes on
disk, bytes that the process asked the system for while loading (`rchar` of /proc/self/io), its peak resident memory
(VmHWM) against parameters + largest tensor + 1 GB, seconds, GB/s. --torch loads the same folder with transformers'
`from_pretrained` beside it (needs the extra `test`). Linux only, since /proc is what counts.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np

GB = 10**9
# Sizes as published (Qwen2-VL-2B-Instruct).
CONFIG = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": 1536,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}


def write_checkpoint(folder: Path) -> None:
    """Random numbers under hub names in shards of at most 2 GB; one tensor is in memory at a time."""
    from multitap_jax.families import abstract_backbone, weight_table
    from multitap_jax.weights.mapping import by_name, plan
    from multitap_jax.weights.writer import write_folder

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    model = abstract_backbone(folder)
    shapes = {slot.key: slot.shape for slot in plan(weight_table(model), by_name(model))}
    rng = np.random.default_rng(0)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, shape in shapes.items():
            bits = rng.integers(0, 1 << 16, shape, np.uint16) & np.uint16(0xBFFF)  # below 2, never NaN
            yield name, bits.view(ml_dtypes.bfloat16)

    headers = {name: (shape, np.dtype(ml_dtypes.bfloat16)) for name, shape in shapes.items()}
    write_folder(folder, headers, tensors(), 2 * GB)


def load(folder: Path, dtype: str) -> dict[str, float]:
    """Loads the folder in this process; sizes in bytes."""
    import jax

    from multitap_jax.weights.hub import load_backbone

    jax.devices()
    start, before, read = time.perf_counter(), status("VmHWM"), bytes_asked_for()
    model = load_backbone(folder, param_dtype=jnp.dtype(dtype))
    jax.block_until_ready(jax.tree.leaves(model))
    seconds, read = time.perf_counter() - start, bytes_asked_for() - read
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    return {"parameters": parameters, "read": read, "before": before, "peak": status("VmHWM"), "seconds": seconds}


def load_torch(folder: Path, dtype: str) -> dict[str, float]:
    """The same by transformers."""
    import torch
    from transformers import Qwen2VLModel

    start, before, read = time.perf_counter(), status("VmHWM"), bytes_asked_for()
    model = Qwen2VLModel.from_pretrained(folder, dtype=getattr(torch, dtype))
    for weight in model.parameters():  # files are mapped there, and read when they are looked at
        weight.detach().view(torch.uint8).max()
    seconds, read = time.perf_counter() - start, bytes_asked_for() - read
    parameters = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return {"parameters": parameters, "read": read, "before": before, "peak": status("VmHWM"), "seconds": seconds}


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def bytes_asked_for() -> int:
    """Bytes that this process has read so far, from the disk or the page cache; mapped files do not count."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar:"))


def forget(folder: Path) -> None:
    """Puts the folder's files out of the page cache."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def report(name: str, folder: Path, found: dict[str, float]) -> None:
    from multitap_jax.weights.stored import read_header

    paths = sorted(folder.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in paths)
    largest = max(tensor.nbytes for path in paths for tensor in read_header(path).values())
    bound = found["parameters"] + largest + GB
    print(
        f"{name:12} disk {size:,} B, read {found['read']:,.0f} B ({found['read'] / size:.4f}x); peak "
        f"{found['peak'] / GB:.2f} GB (imports {found['before'] / GB:.2f}) against {found['parameters'] / GB:.2f} + "
        f"{largest / GB:.2f} + 1 = {bound / GB:.2f} GB; {found['seconds']:.1f} s, "
        f"{size / found['seconds'] / GB:.2f} GB/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is kept; default: a temporary place")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the parameters")
    parser.add_argument("--torch", action="store_true", help="load with transformers too")
    parser.add_argument("--child", choices=("load", "load_torch"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(globals()[options.child](options.folder, options.dtype)))
        return
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not (folder / "config.json").is_file():
            write_checkpoint(folder)
        for child in ("load", "load_torch") if options.torch else ("load",):
            for state in ("cold", "warm"):
                if state == "cold":
                    forget(folder)
                command = [
                    sys.executable,
                    __file__,
                    f"--child={child}",
                    f"--folder={folder}",
                    f"--dtype={options.dtype}",
                ]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                name = f"{'ours' if child == 'load' else 'torch'} {state}"
                report(name, folder, json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
