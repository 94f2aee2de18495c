"""The scorer's forward pass as a `jax.export` program: jax, flatbuffers and safetensors run it, not this package.

Weights are arguments, not constants: the program stays small, and one file of weights serves several shapes. They are
in the program's own layout (stacked, transposed), so nothing is rearranged at run time.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from multitap_jax.backbones import Backbone, Execution
from multitap_jax.backbones.attention import backend_elsewhere
from multitap_jax.batch import PackedBatch
from multitap_jax.data.layouts import Layout
from multitap_jax.data.processing import Processing
from multitap_jax.data.stream import Pair, StreamPacker
from multitap_jax.families import abstract_backbone, weight_table
from multitap_jax.files import json_bytes, new_folder
from multitap_jax.naming import by_name
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.scoring.exports.common import copy_carried, rendered_prompts, replaceable, write_tensors
from multitap_jax.weights.fill import fill
from multitap_jax.weights.hub import backbone_tensors
from multitap_jax.weights.mapping import plan
from multitap_jax.weights.writer import write_file

PROGRAM, WEIGHTS, EXAMPLE, ABOUT = "program.bin", "weights.safetensors", "example.safetensors", "program.json"
PLATFORMS = ("cpu", "cuda", "tpu")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
MEANINGS = {
    "tokens": "token ids; the image placeholder at image positions, 0 at padding",
    "positions": "rotary positions (time, height, width) of each token",
    "segment": "which run (a prefix or a text) a token belongs to, from 1; 0 is padding",
    "prefix": "the run a token sees besides its own; its own inside a prefix, 0 at padding",
    "image_cell": "index of the merged vision cell that stands at an image token, -1 elsewhere",
    "pool": "column of the last token of each text, 0 where there is none",
    "record": "index of the pair, -1 where there is none; not used by the program",
    "target": "not used by the program",
    "weight": "not used by the program",
    "image_token": "columns of image tokens, -1 where there is none, for families that keep images out of the row",
    "patches": "raw uint8 pixels of each patch, in the family's patch order",
    "patch_position": "(row, column) of each patch in its image",
    "patch_segment": "which image of the vision row a patch belongs to, from 1; 0 is padding",
}
# Where a backbone keeps image features out of the row (`Layout.apart`).
MEANINGS_APART = {
    "image_cell": "at an image token the index of its image, an image being one block of patches; -1 elsewhere",
    "patch_position": "(row, column) of each patch in its image's canvas of tiles, 0 in tiles that only fill up",
    "patch_segment": "which image of the vision row a patch belongs to, from 1; 0 is padding, tiles that fill up too",
}
# Where a patch is placed by other numbers (`Layout.coordinates`).
PLACES = {
    4: "where the tile of each patch stands: row, tiles down, column, tiles across; zeros in the block of the whole, "
    "whose pixels are zeros",
    6: "what the cell of each patch is mixed from: upper left, upper right, lower left and lower right patch, counted "
    "from the image's first, and the weights of right and of lower in multiples of 2^-24",
}


def export_stablehlo(
    folder: str | Path,
    out: str | Path,
    pairs: Sequence[Pair],
    *,
    dtype: str = "float32",
    batch_tokens: int = 16384,
    max_length: int = 2048,
    platforms: Sequence[str] = ("cpu",),
    overwrite: bool = False,
) -> Path:
    """Writes `program.bin`, `weights.safetensors`, `example.safetensors`, `program.json`, and the tokenizer.

    Args:
      folder: an artefact.
      out: folder to write.
      pairs: what an example batch is packed of, as `multitap score` packs it; its shape is the program's shape.
      dtype: computation type, and that of the weights.
      batch_tokens, max_length: as of `Scorer`.
      platforms: where the program will run: cpu, cuda, tpu.
      overwrite: replace a folder that this export wrote.

    Raises:
      ArtefactError: the source is none, or was edited or damaged.
      ValueError: no pair can be scored; an unknown platform or type.
      FileExistsError: `out` is in the way.
    """
    unknown = [name for name in platforms if name not in PLATFORMS]
    if unknown or not platforms or dtype not in DTYPES:
        raise ValueError(
            f"platforms {', '.join(platforms) or 'none'}, dtype {dtype}: expected some of {', '.join(PLATFORMS)}, and "
            f"one of {', '.join(DTYPES)}"
        )
    artefact = Artefact.open(folder).verify()
    processing = Processing.from_folder(artefact.folder, artefact.manifest.contract)
    batch = _example(artefact, processing, pairs, batch_tokens, max_length)._asdict()
    model: Any = abstract_backbone(artefact.folder, param_dtype=DTYPES[dtype])
    heads = _heads(artefact)
    specs = {f"backbone.{path}": leaf for path, leaf in by_name(model).items()} | heads
    specs, batch_specs = _specs(specs), _specs(batch)
    attention = backend_elsewhere("auto", platforms)
    function = jax.jit(_program(model, Execution(dtype=dtype, attention=attention)))
    program = export.export(function, platforms=list(platforms))(specs, batch_specs)
    with new_folder(Path(out), replaceable=replaceable(overwrite, ABOUT)) as new:
        copy_carried(artefact.folder, new)
        (new / PROGRAM).write_bytes(program.serialize())
        headers = {name: (spec.shape, np.dtype(spec.dtype)) for name, spec in specs.items()}
        write_file(new / WEIGHTS, headers, _weights(artefact.folder, model, heads))
        write_tensors(new / EXAMPLE, {name: np.asarray(value) for name, value in batch.items()})
        about = _about(artefact, program, dtype, _inputs(batch_specs, processing.vision.layout), attention)
        (new / ABOUT).write_bytes(json_bytes(about))
    return Path(out)


def _program(model: Backbone, execution: Execution) -> Callable[..., dict[str, jax.Array]]:
    """(weights by name, batch by field) -> outputs; what `Scorer` computes."""
    names, structure = list(by_name(model)), jax.tree.structure(model)

    def program(weights: dict[str, jax.Array], batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        backbone = jax.tree.unflatten(structure, [weights[f"backbone.{name}"] for name in names])
        hidden = backbone(PackedBatch(**batch), execution)
        product = lambda spec, other: jnp.einsum(spec, hidden, other, precision="highest")
        logits = product("bkh,h->bk", weights["reward_head.weight"]) + weights["reward_head.bias"]
        objectives = product("bkh,th->bkt", weights["ridge.coef"]) + weights["ridge.intercept"][None, None, :]
        return {"overall": jax.nn.sigmoid(logits), "logits": logits, "objectives": objectives, "hidden": hidden}

    return program


def _example(
    artefact: Artefact, processing: Processing, pairs: Sequence[Pair], batch_tokens: int, max_length: int
) -> PackedBatch:
    packer = StreamPacker(
        processing.prompter,
        processing.reader,
        processing.vision,
        hidden=artefact.hidden_size,
        batch_tokens=batch_tokens,
        max_length=max_length,
    )
    window = packer.window(pairs)
    batch = next(iter(window.batches), None)
    if batch is None:
        reasons = "; ".join(filter(None, window.errors)) or "none was given"
        raise ValueError(f"no pair for the example can be scored: {reasons}")
    return batch


def _specs(arrays: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}


def _heads(artefact: Artefact) -> dict[str, np.ndarray]:
    """Heads as the program takes them, float32; with no objective where the artefact has none."""
    arrays = artefact.head_arrays()
    hidden = artefact.hidden_size
    return {
        "reward_head.weight": arrays["reward_head.weight"][0],
        "reward_head.bias": arrays["reward_head.bias"][0],
        "ridge.coef": arrays.get("ridge.coef", np.zeros((0, hidden), np.float32)).astype(np.float32),
        "ridge.intercept": arrays.get("ridge.intercept", np.zeros(0, np.float32)).astype(np.float32),
    }


def _weights(folder: Path, model: Any, heads: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Parameters one after another, each made as it is asked for."""
    params, tensors = by_name(model), backbone_tensors(folder)
    slots = plan(weight_table(model), params)
    for path, leaf in params.items():
        here = [slot for slot in slots if slot.path == path]
        yield f"backbone.{path}", np.asarray(fill(leaf, here, [tensors[slot.key] for slot in here], None))
    yield from heads.items()


def _inputs(batch: Mapping[str, jax.ShapeDtypeStruct], layout: Layout) -> dict[str, Any]:
    """Shape, type and meaning of each field of the batch."""
    meanings = MEANINGS | (MEANINGS_APART if layout.apart else {})
    meanings["patch_position"] = PLACES.get(layout.coordinates, meanings["patch_position"])
    return {
        name: {"shape": list(spec.shape), "dtype": np.dtype(spec.dtype).name, "meaning": meanings[name]}
        for name, spec in batch.items()
    }


def _about(
    artefact: Artefact, program: export.Exported, dtype: str, inputs: Mapping[str, Any], attention: str
) -> dict[str, Any]:
    manifest = artefact.manifest
    return {
        "format_version": 1,
        "files": {"program": PROGRAM, "weights": WEIGHTS, "example": EXAMPLE},
        "call": "outputs = jax.export.deserialize(program).call(weights, inputs), both dictionaries of arrays",
        "inputs": inputs,
        "outputs": {
            "overall": "float32[B, K], sigmoid of the logits; meaningless where record is -1",
            "logits": "float32[B, K]",
            "objectives": "float32[B, K, T], columns: objectives",
            "hidden": "float32[B, K, H], what heads fitted later need",
        },
        "objectives": [objective.name for objective in manifest.objectives],
        "contract": dataclasses.asdict(manifest.contract),
        **rendered_prompts(artefact),
        "computation": {"dtype": dtype, "attention": attention, "platforms": list(program.platforms)},
        "versions": {"jax": jax.__version__, "calling_convention": program.calling_convention_version},
        "fingerprint": artefact.fingerprint,
    }
