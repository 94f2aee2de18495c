"""Backbones from and to folders with the hub's tensor names, one tensor in memory at a time."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from multitap_jax.backbones import Backbone
from multitap_jax.families import abstract_backbone, read_config, weight_table
from multitap_jax.naming import by_name
from multitap_jax.parallel import watchdog
from multitap_jax.parallel.distributed import whole
from multitap_jax.weights.files import read_json, stored_tensors
from multitap_jax.weights.fill import fill
from multitap_jax.weights.finite import FiniteCheck
from multitap_jax.weights.mapping import Slot, Table, WeightError, match, plan
from multitap_jax.weights.misfit import size_entries
from multitap_jax.weights.stored import Stored
from multitap_jax.weights.writer import write_folder


def load_backbone(
    folder: str | Path,
    *,
    param_dtype: Any = jnp.float32,
    shardings: Any = None,
    prefix: str = "",
    on_read: Callable[[Stored, np.ndarray], None] | None = None,
) -> Backbone:
    """Builds the backbone of a checkpoint folder; every parameter comes from the files, none from a random source.

    Each tensor is read once, straight into its place: beside the parameters there is one tensor in memory.

    Args:
      folder: holds `config.json` and `model*.safetensors` in any of the three spellings of keys.
      param_dtype: type of the parameters.
      shardings: one `jax.sharding.Sharding` for all parameters, a pytree of them shaped like the module, or a function
        from the abstract module to such a pytree; None puts everything on the default device. Each process reads only
        the rows of tensors that its devices hold.
      prefix: what the backbone's names start with in the files, such as "backbone_model."; names that do not start so
        are left alone (`files.stored_tensors` gives them).
      on_read: is given every tensor of the backbone as it is read, whole, whatever the shardings; must not change it.

    Raises:
      FolderError: a file is missing or broken, or the architecture is not implemented.
      WeightError: lists every unknown, doubled, missing or mis-shaped tensor; or those that hold NaN or infinity; or a
        tied output head that differs from the token table.
    """
    model: Any = abstract_backbone(folder, param_dtype=param_dtype)
    params, tensors = by_name(model), backbone_tensors(folder, prefix=prefix)
    targets = dict(zip(params, _sharding_leaves(model, shardings), strict=True))
    by_path: dict[str, list[Slot]] = {}
    for slot in plan(weight_table(model), params):
        by_path.setdefault(slot.path, []).append(slot)
    finite, arrays = FiniteCheck(), []

    def read(source: Stored, rows: slice) -> np.ndarray:
        value = source.read(slice(None) if on_read else rows)
        watchdog.beat("reading the weights")
        finite(source, value)
        if on_read is None:
            return value
        on_read(source, value)
        return value[rows] if source.shape else value

    for path, leaf in params.items():
        sources = [tensors[slot.key] for slot in by_path[path]]
        arrays.append(fill(leaf, by_path[path], sources, targets[path], read))
    finite.judge(Path(folder))
    return jax.tree.unflatten(jax.tree.structure(model), arrays)


def backbone_tensors(
    folder: str | Path, *, config_folder: str | Path | None = None, prefix: str = ""
) -> dict[str, Stored]:
    """Hub key -> tensor of the backbone in a folder, checked against the configuration; only headers are read.

    An output embedding of its own is among them, one that is tied to the token table is not.

    Args:
      folder: holds `model*.safetensors` in any of the spellings of keys.
      config_folder: holds `config.json`; None is `folder` itself.
      prefix: see `load_backbone`.

    Raises:
      FolderError, WeightError: see `load_backbone`.
    """
    config_folder = folder if config_folder is None else config_folder
    model = abstract_backbone(config_folder)
    table, tensors = weight_table(model), stored_tensors(folder)
    slots, tied = plan(table, by_name(model)), model.config.tie_word_embeddings
    hf_config = read_json(Path(config_folder) / "config.json")
    try:
        if "quantization_config" in hf_config:
            raise WeightError("config.json has a quantization_config; quantised weights are not read, take the others")
        names = match(table, slots, tensors, tied=tied, prefix=prefix, entries=size_entries(hf_config))
        if tied:
            _compare_tied(table, names, tensors)
    except WeightError as error:
        raise WeightError(f"{folder}: {error}") from None
    twins = [key for key, other in table.unused.items() if tied and other is not None]
    return {key: tensors[name] for key, name in names.items() if key not in twins}


def export_tensors(model: Any, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Hub name (after `prefix`) and host array of every tensor of the model, in a fixed order.

    All processes must go through them together where the model is spread over several.

    Raises:
      WeightError: the model has adapters; merge them first.
    """
    params = by_name(model)
    for slot in plan(weight_table(model), params):
        leaf = params[slot.path]
        value = whole(leaf if slot.layer is None else leaf[slot.layer])
        watchdog.beat(f"{slot.key} on the host")
        yield prefix + slot.key, np.ascontiguousarray(value.transpose(slot.inverse))


def save_backbone(
    model: Any,
    folder: str | Path,
    *,
    dtype: Any = None,
    prefix: str = "",
    extra: Mapping[str, np.ndarray | Stored] | None = None,
    max_shard_bytes: int = 5 << 30,
) -> None:
    """Writes the weights under hub names, as one safetensors file or as shards with an index; each file is atomic.

    Args:
      model: a backbone without adapters.
      folder: is made if need be; `config.json` is not written here.
      dtype: type on disk; None keeps that of the parameters.
      prefix: put before every name of the backbone.
      extra: further tensors, written under their own names and in their own type.
      max_shard_bytes: the largest file, but for a single tensor that is larger.

    Raises:
      WeightError: the model has adapters, or a name of `extra` is already taken.
    """
    params, extra = by_name(model), dict(extra or {})
    headers = {}
    for slot in plan(weight_table(model), params):
        headers[prefix + slot.key] = (slot.shape, np.dtype(dtype or params[slot.path].dtype))
    taken = sorted(headers.keys() & extra.keys())
    if taken:
        raise WeightError(f"extra tensors have names of the backbone: {', '.join(taken)}")

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, tensor in export_tensors(model, prefix):
            yield name, tensor.astype(headers[name][1], copy=False)
        for name, value in extra.items():
            yield name, value.read() if isinstance(value, Stored) else value

    write_folder(
        Path(folder), headers | {name: (t.shape, t.dtype) for name, t in extra.items()}, tensors(), max_shard_bytes
    )


def unused_tensors(folder: str | Path) -> dict[str, Stored]:
    """Tensors of a folder that no score needs but other programs load, such as an output embedding of its own.

    Returns:
      hub key -> tensor.

    Raises:
      FolderError: see `families.read_config` and `files.stored_tensors`.
    """
    family, config = read_config(folder)
    table = family.table(config)
    own = {key for key, other in table.unused.items() if other is None or not config.tie_word_embeddings}
    tensors = {table.canonical(name): tensor for name, tensor in stored_tensors(folder).items()}
    return {key: tensor for key, tensor in tensors.items() if key in own}


def _compare_tied(table: Table, names: Mapping[str, str], tensors: Mapping[str, Stored]) -> None:
    """Compares what must be one tensor, a part at a time; files that hold it twice are the exception."""
    for key, other in table.unused.items():
        if other is None or key not in names or names[key] == names[other]:
            continue
        one, two = tensors[names[key]], tensors[names[other]]
        same = one.shape == two.shape and one.dtype == two.dtype
        if not same or any(not np.array_equal(a, b) for a, b in zip(one.parts(), two.parts(), strict=True)):
            raise WeightError(
                f"{names[key]} differs from {names[other]}, but tie_word_embeddings is true: they must be one tensor. "
                "If the model has an output embedding of its own, config.json must say tie_word_embeddings: false"
            )


def _sharding_leaves(model: nnx.Module, shardings: Any) -> list[Sharding | None]:
    count = len(jax.tree.leaves(model))
    if shardings is None or isinstance(shardings, Sharding):
        return [shardings] * count
    leaves = jax.tree.leaves(shardings)
    if not all(isinstance(leaf, Sharding) for leaf in leaves) and isinstance(shardings, Callable):  # type: ignore[arg-type]
        leaves = jax.tree.leaves(shardings(model))
    if len(leaves) != count:
        raise ValueError(f"shardings has {len(leaves)} leaves, the model has {count} parameters")
    return leaves
