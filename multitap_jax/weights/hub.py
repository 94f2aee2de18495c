"""Backbones from and to folders with the hub's tensor names, one tensor in memory at a time."""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from multitap_jax.backbones import Backbone
from multitap_jax.families import abstract_backbone, read_config, weight_table
from multitap_jax.weights.files import read_tensors, write_folder
from multitap_jax.weights.mapping import Slot, Table, WeightError, match, named_params, plan


def load_backbone(
    folder: str | Path, *, param_dtype: Any = jnp.float32, shardings: Any = None, prefix: str = ""
) -> Backbone:
    """Builds the backbone of a checkpoint folder; every parameter comes from the files, none from a random source.

    Args:
      folder: holds `config.json` and `model*.safetensors` in any of the three spellings of keys.
      param_dtype: type of the parameters.
      shardings: one `jax.sharding.Sharding` for all parameters, a pytree of them shaped like the module, or a function
        from the abstract module to such a pytree; None puts everything on the default device. Each process reads only
        the slices that its devices hold.
      prefix: what the backbone's names start with in the files, such as "backbone_model."; names that do not start so
        are left alone (`read_tensors` gives them).

    Raises:
      FolderError: a file is missing or broken, or the architecture is not implemented.
      WeightError: lists every unknown, doubled, missing or mis-shaped tensor; or a tied output head that differs from
        the token table.
    """
    model: Any = abstract_backbone(folder, param_dtype=param_dtype)
    table, params = weight_table(model), named_params(model)
    tensors = read_tensors(folder)
    slots = plan(table, params)
    try:
        names = match(table, slots, tensors, tied=model.config.tie_word_embeddings, prefix=prefix)
        _compare_tied(table, names, tensors)
    except WeightError as error:
        raise WeightError(f"{folder}: {error}") from None
    targets = dict(zip(params, _sharding_leaves(model, shardings), strict=True))
    by_path: dict[str, list[Slot]] = {}
    for slot in slots:
        by_path.setdefault(slot.path, []).append(slot)
    arrays = []
    for path, leaf in params.items():
        sources = [tensors[names[slot.key]] for slot in by_path[path]]
        arrays.append(_fill(leaf, by_path[path], sources, targets[path]))
    return jax.tree.unflatten(jax.tree.structure(model), arrays)


def export_tensors(model: Any, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Hub name (after `prefix`) and host array of every tensor of the model, in a fixed order.

    Raises:
      WeightError: the model has adapters; merge them first.
    """
    params = named_params(model)
    for slot in plan(weight_table(model), params):
        leaf = params[slot.path]
        value = np.asarray(leaf if slot.layer is None else leaf[slot.layer])
        yield prefix + slot.key, np.ascontiguousarray(value.transpose(slot.inverse))


def save_backbone(
    model: Any,
    folder: str | Path,
    *,
    dtype: Any = None,
    prefix: str = "",
    extra: Mapping[str, np.ndarray] | None = None,
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
    params, extra = named_params(model), dict(extra or {})
    headers = {}
    for slot in plan(weight_table(model), params):
        headers[prefix + slot.key] = (slot.shape, np.dtype(dtype or params[slot.path].dtype))
    taken = sorted(headers.keys() & extra.keys())
    if taken:
        raise WeightError(f"extra tensors have names of the backbone: {', '.join(taken)}")

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, tensor in export_tensors(model, prefix):
            yield name, tensor.astype(headers[name][1], copy=False)
        yield from extra.items()

    write_folder(
        Path(folder), headers | {name: (t.shape, t.dtype) for name, t in extra.items()}, tensors(), max_shard_bytes
    )


def unused_tensors(folder: str | Path) -> dict[str, np.ndarray]:
    """Tensors of a folder that no score needs but other programs load, such as an output embedding of its own.

    Returns:
      hub key -> tensor.

    Raises:
      FolderError: see `families.read_config` and `read_tensors`.
    """
    family, config = read_config(folder)
    table = family.table(config)
    own = {key for key, other in table.unused.items() if other is None or not config.tie_word_embeddings}
    found = {table.canonical(name): tensor for name, tensor in read_tensors(folder).items()}
    return {key: tensor for key, tensor in found.items() if key in own}


def _compare_tied(table: Table, names: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> None:
    for key, other in table.unused.items():
        if key in names and other is not None and not np.array_equal(tensors[names[key]], tensors[names[other]]):
            raise WeightError(
                f"{names[key]} differs from {names[other]}, but tie_word_embeddings is true: they must be one tensor"
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


def _fill(leaf: Any, slots: list[Slot], sources: list[np.ndarray], sharding: Sharding | None) -> jax.Array:
    """The parameter made of `sources`; only one source at a time is on its way to the devices."""
    if slots[0].layer is None:
        raw = _place(sources[0], slots[0], sharding)
        return _permute(raw, axes=slots[0].axes, dtype=leaf.dtype, sharding=sharding)
    stack = _zeros(shape=leaf.shape, dtype=leaf.dtype, sharding=sharding)
    for slot, source in zip(slots, sources, strict=True):
        raw = _place(source, slot, sharding)
        stack = _set_layer(stack, raw, np.asarray(slot.layer, np.int32), axes=slot.axes, sharding=sharding)
        stack.block_until_ready()
    return stack


def _place(source: np.ndarray, slot: Slot, sharding: Sharding | None) -> jax.Array:
    """Puts a checkpoint tensor, still in its own layout and type, where its slice of the parameter will be."""
    if not isinstance(sharding, NamedSharding):
        return jax.device_put(source, sharding)
    spec = list(sharding.spec) + [None] * (len(slot.shape) + 1)
    spec = spec[1:] if slot.layer is not None else spec
    local = NamedSharding(sharding.mesh, PartitionSpec(*(spec[axis] for axis in slot.inverse)))
    return jax.make_array_from_callback(source.shape, local, lambda index: source[index])


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "sharding"))
def _zeros(shape: tuple[int, ...], dtype: Any, sharding: Sharding | None) -> jax.Array:
    return _constrain(jnp.zeros(shape, dtype), sharding)


@functools.partial(jax.jit, static_argnames=("axes", "dtype", "sharding"))
def _permute(raw: jax.Array, axes: tuple[int, ...], dtype: Any, sharding: Sharding | None) -> jax.Array:
    return _constrain(raw.transpose(axes).astype(dtype), sharding)


@functools.partial(jax.jit, static_argnames=("axes", "sharding"), donate_argnames=("stack",))
def _set_layer(
    stack: jax.Array, raw: jax.Array, layer: np.ndarray, axes: tuple[int, ...], sharding: Sharding | None
) -> jax.Array:
    value = raw.transpose(axes).astype(stack.dtype)
    return _constrain(jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0), sharding)


def _constrain(value: jax.Array, sharding: Sharding | None) -> jax.Array:
    return value if sharding is None else jax.lax.with_sharding_constraint(value, sharding)
