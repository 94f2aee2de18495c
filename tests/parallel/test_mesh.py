"""Mesh sizes, the rules table, and where parameters and batches lie."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from multitap_jax.config import ConfigError, MeshConfig
from multitap_jax.families import from_config
from multitap_jax.parallel.mesh import (
    AXES,
    abstract_mesh,
    arrange,
    batch_shards,
    make_mesh,
    own_shards,
    param_shardings,
    param_spec,
    shard_batch,
)
from multitap_jax.reward import RewardHead, RewardModel
from tests.stage1.toy import toy_batch
from tests.tiny_qwen2_vl import tiny_config

MIXED = MeshConfig(data=2, fsdp=2, tensor=2)


def test_one_size_may_be_what_is_left():
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}
    assert mesh.axis_names == AXES
    assert batch_shards(mesh) == 4
    assert own_shards(mesh) == [0, 1, 2, 3]
    assert dict(make_mesh(MeshConfig(), jax.devices()[:1]).shape) == dict.fromkeys(AXES, 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=2, fsdp=2), r"fsdp=2.*product of the sizes, 4, must equal the number of devices, 8"),
        (MeshConfig(data=-1, tensor=3), r"tensor=3.*3, must divide the number of devices, 8"),
        (MeshConfig(data=-1, fsdp=-1), r"data=-1, fsdp=-1.*one of them may be -1"),
        (MeshConfig(data=0), r"data=0.*sizes are 1 or more"),
    ],
)
def test_sizes_that_do_not_fit_are_named(config, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(config)


@dataclasses.dataclass(frozen=True)
class Device:
    """What the layout of a mesh looks at."""

    id: int
    process_index: int
    slice_index: int
    platform: str
    coords: tuple[int, int, int]
    device_kind: str
    core_on_chip: int = 0


def devices(platform, *, processes, slices, count=8):
    place = lambda i: (i % (count // slices) % 2, i % (count // slices) // 2, 0)
    kind = "TPU v5 lite" if platform == "tpu" else "made up"
    made = [Device(i, i * processes // count, i * slices // count, platform, place(i), kind) for i in range(count)]
    return made[1::2] + made[::2]  # not in their order


@pytest.mark.parametrize(
    ("platform", "processes", "slices", "island"),
    [("tpu", 4, 2, "slice_index"), ("gpu", 2, 1, "process_index"), ("gpu", 4, 2, "slice_index")],
)
@pytest.mark.parametrize("shape", [(2, 4, 1, 1), (4, 1, 2, 1), (2, 2, 2, 1)])
def test_only_data_spans_islands(platform, processes, slices, island, shape):
    arranged = arrange(shape, devices(platform, processes=processes, slices=slices))
    assert arranged.shape == shape
    assert sorted(device.id for device in arranged.flat) == list(range(8))
    for share in arranged:
        assert len({getattr(device, island) for device in share.flat}) == 1
    halves = arranged.reshape(2, -1)
    assert {getattr(device, island) for device in halves[0]} != {getattr(device, island) for device in halves[1]}


def test_one_slice_is_one_island_however_many_processes_serve_it():
    made = devices("tpu", processes=4, slices=1)
    assert sorted(device.id for device in arrange((1, 8, 1, 1), made).flat) == list(range(8))


def test_parameters_may_span_processes_but_not_slices():
    made = sorted(devices("gpu", processes=2, slices=1), key=lambda device: device.id)
    assert [device.id for device in arrange((1, 4, 2, 1), made).flat] == list(range(8))
    with pytest.raises(ConfigError, match=r"data = 1 must be a multiple of the number of slices, 2: only gradients"):
        arrange((1, 8, 1, 1), devices("tpu", processes=4, slices=2))


def test_an_abstract_mesh_has_the_sizes_of_a_real_one():
    assert dict(abstract_mesh(MIXED, 8).shape) == dict(make_mesh(MIXED).shape)
    assert dict(abstract_mesh(MeshConfig(data=-1, fsdp=64), 512).shape)["data"] == 8
    with pytest.raises(ConfigError, match="must equal the number of devices, 9"):
        abstract_mesh(MIXED, 9)


def test_every_parameter_of_the_backbone_has_a_place():
    model = nnx.eval_shape(
        lambda: RewardModel(from_config(tiny_config(), rngs=nnx.Rngs(0)), RewardHead(64, rngs=nnx.Rngs(1)))
    )
    placed = param_shardings(model, make_mesh(MIXED))
    spec = lambda variable: tuple(variable.get_value().spec)
    assert spec(placed.backbone.text.layers.mlp.up_proj.kernel) == (None, "fsdp", "tensor")
    assert spec(placed.backbone.text.layers.mlp.down_proj.kernel) == (None, "tensor", "fsdp")
    assert spec(placed.backbone.text.layers.attention.k_proj.bias) == (None, "tensor")
    assert spec(placed.backbone.text.embed.embedding) == ("tensor", "fsdp")
    assert spec(placed.backbone.vision.layers.attention.qkv.kernel) == (None, "fsdp", "tensor")
    assert spec(placed.head.weight) == ("fsdp",)
    assert spec(placed.head.bias) == ()
    pairs = list(zip(jax.tree.leaves(model), jax.tree.leaves(placed), strict=True))
    held = sum(math.prod(sharding.shard_shape(x.shape)) for x, sharding in pairs)
    assert held < 0.35 * sum(x.size for x, _ in pairs)  # matrices a quarter, vectors a half


def test_heads_that_would_be_cut_are_named():
    backbone = nnx.eval_shape(lambda: from_config(tiny_config(), rngs=nnx.Rngs(0)))
    with pytest.raises(ConfigError, match=r"tensor = 8 does not divide text.num_heads = 4"):
        param_shardings(backbone, make_mesh(MeshConfig(data=1, tensor=8)))


def test_bad_axes_are_named_with_parameter_and_sizes():
    mesh = make_mesh(MIXED)
    with pytest.raises(ConfigError, match=r"w: dimension 1 \('mlp'\) has size 7.*tensor = 2 does not divide"):
        param_spec("w", ("embed", "mlp"), (4, 7), mesh)
    with pytest.raises(ConfigError, match=r"w: .* two dimensions on one mesh axis: \('fsdp', 'fsdp'\)"):
        param_spec("w", ("embed", "vision"), (4, 4), mesh)
    with pytest.raises(ConfigError, match=r"unknown logical axis 'depth'"):
        param_spec("w", ("depth",), (4,), mesh)
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    assert tuple(param_spec("w", ("embed", "mlp"), (5, 7), one)) == ("fsdp", "tensor")


def test_all_problems_come_at_once():
    class Two(nnx.Module):
        def __init__(self):
            self.a = nnx.Param(jnp.zeros(3), axes=("embed",))
            self.b = nnx.Param(jnp.zeros(3))

    with pytest.raises(ConfigError, match=r"(?s)a: dimension 0.*b: carries no logical axes"):
        param_shardings(Two(), make_mesh(MIXED))


def test_a_batch_is_split_by_rows():
    mesh, batch = make_mesh(MIXED), toy_batch(0)
    placed = shard_batch(batch, mesh)
    for host, device in zip(batch, placed, strict=True):
        np.testing.assert_array_equal(host, device)
        assert device.addressable_shards[0].data.shape[0] == 2
    with pytest.raises(ConfigError, match=r"a batch of 6 rows cannot be split over data x fsdp = 4 devices"):
        shard_batch(toy_batch(0, 6, cells=6), mesh)
