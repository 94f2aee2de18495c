"""The device mesh and the one table from logical axis names to mesh axes.

Axes, outermost first: `data` (copies of the parameters), `fsdp` (shards of the parameters and of the batch), `tensor`
(heads and inner dimensions), `context` (reserved for sharing one sequence). Axis types are Auto: parameters, optimizer
state and batch are placed as this file says, and the compiler (GSPMD) derives the rest.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from multitap_jax.batch import PackedBatch
from multitap_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "tensor", "context")

# Logical axis of a parameter -> mesh axis; None keeps the whole dimension on every device.
RULES: dict[str, str | None] = {
    "layers": None,  # scanned: each step of the scan needs one layer from everybody
    "embed": "fsdp",
    "vision": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}
# Every array of a batch is split over these by its leading dimension.
BATCH_AXES = ("data", "fsdp")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all `devices` (default: `jax.devices()`) with the axes `AXES`.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or more than one is -1.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(config, axis) for axis in AXES]
    given = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise ConfigError(f"config.mesh: {given}: sizes are 1 or more, and one of them may be -1 (what is left)")
    fixed = math.prod(size for size in sizes if size != -1)
    if len(devices) % fixed or (-1 not in sizes and fixed != len(devices)):
        remedy = "must divide" if -1 in sizes else "must equal"
        raise ConfigError(
            f"config.mesh: {given}: the product of the sizes, {fixed}, {remedy} the number of devices, {len(devices)}; "
            "change a size, or set one to -1 to take what is left"
        )
    shape = tuple(len(devices) // fixed if size == -1 else size for size in sizes)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def own_shards(mesh: Mesh) -> list[int]:
    """Which of the `batch_shards` parts lie on devices of this process; along `tensor` several processes hold one."""
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_shards(mesh),))
    return sorted({place[0].start or 0 for place in places.values()})  # type: ignore[index]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Placement of every array of a batch: its leading dimension over `BATCH_AXES`."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Placement of what every device holds whole."""
    return NamedSharding(mesh, P())


def shard_batch(batch: PackedBatch, mesh: Mesh) -> PackedBatch:
    """Puts a batch on the mesh; every process gives the same whole batch and uploads only its devices' rows.

    `patches` may be the vision rows of `own_shards` alone: nobody else reads these pictures.

    Raises:
      ConfigError: rows or vision rows are not a multiple of `batch_shards(mesh)`.
    """
    shards, sharding = batch_shards(mesh), batch_sharding(mesh)
    for name, size in (("rows", len(batch.tokens)), ("vision rows", len(batch.patch_segment))):
        if size % shards:
            raise ConfigError(
                f"a batch of {size} {name} cannot be split over data x fsdp = {shards} devices; build the dataset with "
                f"a multiple of {shards} cells, or change config.mesh"
            )

    def put(x: Any, rows: int) -> jax.Array:
        host = np.asarray(x)
        if jax.process_count() > 1:
            return jax.make_array_from_process_local_data(sharding, host, (rows, *host.shape[1:]))
        return jax.device_put(host, sharding)

    whole = batch._replace(patches=batch.patch_segment)
    return PackedBatch(*(put(x, len(y)) for x, y in zip(batch, whole, strict=True)))


def param_spec(name: str, axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> P:
    """The partition of one parameter.

    Mesh axes of size 1 are always usable; a larger one must divide its dimension.

    Raises:
      ConfigError: an unknown logical name, two dimensions on one mesh axis, or a dimension that does not divide; the
        message names the parameter and the sizes.
    """
    if len(axes) != len(shape):
        raise ConfigError(f"{name}: axes {tuple(axes)} do not match shape {tuple(shape)}")
    unknown = [axis for axis in axes if axis is not None and axis not in RULES]
    if unknown:
        raise ConfigError(f"{name}: unknown logical axis {unknown[0]!r}; known: {', '.join(RULES)}")
    spec = [None if axis is None else RULES[axis] for axis in axes]
    used = [axis for axis in spec if axis is not None]
    if len(set(used)) != len(used):
        raise ConfigError(f"{name}: axes {tuple(axes)} put two dimensions on one mesh axis: {tuple(spec)}")
    for dimension, (axis, size) in enumerate(zip(spec, shape, strict=True)):
        if axis is not None and size % mesh.shape[axis]:
            raise ConfigError(
                f"{name}: dimension {dimension} ({axes[dimension]!r}) has size {size}, which config.mesh.{axis} = "
                f"{mesh.shape[axis]} does not divide; choose a divisor of {size}"
            )
    return P(*spec)


def param_shardings(tree: Any, mesh: Mesh) -> Any:
    """Placement of a module or state: the same pytree with a `NamedSharding` in place of each array.

    Every parameter names its logical axes in its metadata (`nnx.Param(value, axes=...)`).

    Raises:
      ConfigError: see `param_spec`; or heads that the tensor axis would cut; all problems of all parameters at once.
    """
    variables, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
    problems, shardings = list(_cut_heads(tree, mesh)), []
    for path, variable in variables:
        name = path_name(path)
        metadata = variable.get_metadata() if isinstance(variable, nnx.Variable) else {}
        if "axes" not in metadata:
            problems.append(f"{name}: carries no logical axes; build it as nnx.Param(value, axes=(...))")
            continue
        try:
            shardings.append(NamedSharding(mesh, param_spec(name, metadata["axes"], variable.shape, mesh)))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("the model does not fit the mesh:\n  " + "\n  ".join(problems))
    return jax.tree.unflatten(jax.tree.structure(tree), shardings)


def path_name(path: Sequence[Any]) -> str:
    """Dotted name of a pytree path such as "backbone.text.norm.scale"; the `value` inside of a variable is left out."""
    parts = [str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path]
    return ".".join(part for part in parts if part != "value")


def _cut_heads(tree: Any, mesh: Mesh) -> Iterator[str]:
    """A flattened head dimension may divide where the heads do not; each layer would then move its heads about."""
    config, tensor = getattr(getattr(tree, "backbone", tree), "config", None), mesh.shape["tensor"]
    for part, name in (("text", "num_heads"), ("text", "num_kv_heads"), ("vision", "num_heads")):
        count = getattr(getattr(config, part, None), name, None)
        if isinstance(count, int) and count % tensor:
            yield f"config.mesh.tensor = {tensor} does not divide {part}.{name} = {count}; choose a divisor of {count}"
