"""The device mesh and the one table from logical axis names to mesh axes.

Axes, outermost first: `data` (copies of the parameters), `fsdp` (shards of the parameters and of the batch), `tensor`
(heads and inner dimensions), `context` (stretches of a decoder's rows). Axis types are Auto: parameters, optimizer
state and batch are placed as this file says, and the compiler (GSPMD) derives the rest, but for attention
(`backbones/attention/placement.py`). The batch's arrays lie whole along `context`; activations are spread.

Devices come in *islands* (slices of a TPU pod, elsewhere the devices of a process) with a fast network inside and a
slow one between them. Only `data` spans islands, where its size allows it: what crosses the slow network is then the
sum of gradients, once a step, and never parameters or activations.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from multitap_jax.batch import PackedBatch
from multitap_jax.config import ConfigError, MeshConfig
from multitap_jax.naming import path_name

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
HOST_MEMORY = "pinned_host"  # what JAX calls the memory of the host that devices copy from and to
# Every array of a batch is split over these by its leading dimension.
BATCH_AXES = ("data", "fsdp")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all `devices` (default: `jax.devices()`) with the axes `AXES`, laid out as the network is.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or more than one is -1; or there are several
        slices and their number does not divide `data`.
    """
    devices = list(jax.devices() if devices is None else devices)
    arranged = arrange(mesh_shape(config, len(devices)), devices)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(config: MeshConfig, count: int) -> AbstractMesh:
    """The mesh of `count` devices that are not there: enough to say where everything would lie.

    Raises:
      ConfigError: see `make_mesh`.
    """
    return AbstractMesh(mesh_shape(config, count), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_shape(config: MeshConfig, count: int) -> tuple[int, ...]:
    """Sizes of `AXES` for `count` devices; -1 is settled.

    Raises:
      ConfigError: the sizes do not multiply to `count`, or more than one is -1.
    """
    sizes = [getattr(config, axis) for axis in AXES]
    given = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise ConfigError(f"config.mesh: {given}: sizes are 1 or more, and one of them may be -1 (what is left)")
    fixed = math.prod(size for size in sizes if size != -1)
    if count % fixed or (-1 not in sizes and fixed != count):
        remedy = "must divide" if -1 in sizes else "must equal"
        raise ConfigError(
            f"config.mesh: {given}: the product of the sizes, {fixed}, {remedy} the number of devices, {count}; "
            "change a size, or set one to -1 to take what is left"
        )
    return tuple(count // fixed if size == -1 else size for size in sizes)


def arrange(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices as an array of `shape`, neighbours of the network next to each other, `data` across islands.

    Where the islands are processes whose number does not divide `data`, the order of the devices decides: inner axes
    stay inside of a process as far as they fit.

    Raises:
      ConfigError: the islands are slices, and their number does not divide `data`.
    """
    kind, islands = _islands(devices)
    data, *inner = shape
    if islands > 1 and data % islands == 0:
        return mesh_utils.create_hybrid_device_mesh(
            (data // islands, *inner),
            (islands, *[1] * len(inner)),
            devices,
            process_is_granule=kind == "process_index",
            allow_split_physical_axes=True,
        )
    if islands > 1 and kind == "slice_index":
        raise ConfigError(
            f"config.mesh.data = {data} must be a multiple of the number of slices, {islands}: only gradients may "
            f"cross the network between slices; set data to {islands} and divide fsdp or tensor by as much"
        )
    return mesh_utils.create_device_mesh(tuple(shape), devices, allow_split_physical_axes=True)


def _islands(devices: Sequence[jax.Device]) -> tuple[str, int]:
    """What tells islands apart, and how many there are; a TPU slice is one, however many processes serve it."""
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if slices > 1 or devices[0].platform == "tpu":
        return "slice_index", slices
    return "process_index", len({device.process_index for device in devices})


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def own_shards(mesh: Mesh) -> list[int]:
    """Which of the `batch_shards` parts lie on devices of this process; along `tensor` several processes hold one."""
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_shards(mesh),))
    return sorted({place[0].start or 0 for place in places.values()})  # type: ignore[index]


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Placement of every array of a batch: its leading dimension over `BATCH_AXES`."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
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


def param_spec(name: str, axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
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


def param_shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
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


def _cut_heads(tree: Any, mesh: Mesh | AbstractMesh) -> Iterator[str]:
    """A flattened head dimension may divide where the heads do not; each layer would then move its heads about."""
    config, tensor = getattr(getattr(tree, "backbone", tree), "config", None), mesh.shape["tensor"]
    for part, name in (("text", "num_heads"), ("text", "num_kv_heads"), ("vision", "num_heads")):
        count = getattr(getattr(config, part, None), name, None)
        if isinstance(count, int) and count % tensor:
            yield f"config.mesh.tensor = {tensor} does not divide {part}.{name} = {count}; choose a divisor of {count}"
