"""Reading: every byte once, nothing mapped, slices alone where slices are asked for; and broken files."""

import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from multitap_jax.files import tensor_hash
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.weights import fill
from multitap_jax.weights.fill import needed_rows, permuted
from multitap_jax.weights.hashing import ReadAlong, folder_hash
from multitap_jax.weights.hub import export_tensors, load_backbone
from multitap_jax.weights.stored import FolderError, Stored, aligned_empty, read_header
from tests.tiny_qwen2_vl import tiny_config, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tied checkpoint, all of whose tensors are the backbone's."""
    return write_folder(tmp_path_factory.mktemp("tied"), tiny_config(tie_word_embeddings=True))


@pytest.fixture
def asked_for(monkeypatch):
    """Bytes that are read from tensors, added up as they are."""
    sizes, real = [], os.preadv

    def counted(descriptor, buffers, offset):
        sizes.append(real(descriptor, buffers, offset))
        return sizes[-1]

    monkeypatch.setattr("os.preadv", counted)
    return sizes


def tensor_bytes(folder) -> int:
    return sum(value.nbytes for value in load_file(folder / "model.safetensors").values())


def test_an_import_reads_every_byte_once(folder, asked_for):
    load_backbone(folder, param_dtype=jnp.bfloat16)
    assert sum(asked_for) == tensor_bytes(folder)


def test_an_artefact_is_verified_while_it_is_read(saved_artefact, asked_for):
    _, model, _ = Artefact.load(saved_artefact)
    heads = sum(value.nbytes for value in load_file(saved_artefact / "heads.safetensors").values())
    assert sum(asked_for) - tensor_bytes(saved_artefact) <= 2 * heads  # the heads, small, are hashed first
    path = saved_artefact / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="are not those that were saved"):
        Artefact.load(saved_artefact)
    assert jax.tree.leaves(model)


@pytest.fixture
def saved_artefact(tmp_path):
    from tests.scoring.model_fixtures import base_folder, save_artefact

    return save_artefact(tmp_path / "artefact", base_folder(tmp_path / "base")).folder


def test_a_hash_read_along_is_the_hash_of_the_folder(folder):
    along = ReadAlong(folder)
    header = read_header(folder / "model.safetensors")
    for name in list(header)[::2]:  # nobody reads the others
        along(header[name], header[name].read())
    assert along.result() == folder_hash(folder) == tensor_hash(load_file(folder / "model.safetensors"))


def test_rows_are_read_alone(tmp_path, asked_for):
    value = np.arange(60, dtype=np.float32).reshape(12, 5)
    save_file({"a": value, "s": np.full((), 3, np.float32)}, tmp_path / "f.safetensors")
    stored = read_header(tmp_path / "f.safetensors")
    np.testing.assert_array_equal(stored["a"].read(slice(3, 5)), value[3:5])
    assert asked_for == [40]
    np.testing.assert_array_equal(stored["a"].read(), value)
    assert stored["s"].read() == 3
    assert b"".join(part.tobytes() for part in stored["a"].parts()) == value.tobytes()


def test_a_process_needs_the_rows_of_its_devices():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    assert needed_rows((8, 6), NamedSharding(mesh, PartitionSpec("x", "y"))) == slice(0, 8)
    half = jax.sharding.Mesh(mesh.devices[:2], ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(half, PartitionSpec("x"))

    class Second:  # as a process with the second half of these devices has it
        def addressable_devices_indices_map(self, shape):
            found = sharding.devices_indices_map(shape)
            return {device: found[device] for device in half.devices[1]}

    assert needed_rows((8, 6), Second()) == slice(4, 8)
    assert needed_rows((), None) == slice(0, None)


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("sharded", [False, True])
def test_permuting_on_host_or_device_gives_the_same(folder, monkeypatch, on_host, sharded):
    monkeypatch.setattr(fill, "_on_host", lambda sharding: on_host)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rules = {"embed": "data", "mlp": "model", "heads": "model", "vision": "data"}
    of = lambda axes: NamedSharding(mesh, PartitionSpec(*(rules.get(name) for name in axes)))
    shardings = lambda model: jax.tree.map(lambda p: of(p.axes), model, is_leaf=lambda leaf: hasattr(leaf, "axes"))
    found = dict(export_tensors(load_backbone(folder, shardings=shardings if sharded else None)))
    for name, value in load_file(folder / "model.safetensors").items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("shape, axes", [((70, 33), (1, 0)), ((5, 3, 2, 4, 4), (2, 1, 3, 4, 0)), ((7,), (0,))])
def test_permuted_is_a_transposition(shape, axes):
    value = np.random.default_rng(0).standard_normal(shape).astype(ml_dtypes.bfloat16)
    out = permuted(value, axes)
    assert out.flags.c_contiguous
    np.testing.assert_array_equal(out, value.transpose(axes))


def test_memory_that_jax_takes_over():
    value = aligned_empty((3, 5), np.dtype(np.float32))
    value[...] = 1
    assert value.ctypes.data % 64 == 0
    assert jax.device_put(value).unsafe_buffer_pointer() == value.ctypes.data


HEADER = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def file_of(path, header, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    "header, data, message",
    [
        (HEADER, bytes(7), r"truncated: it has \d+ bytes, and its header describes"),
        (HEADER, bytes(9), "too long"),
        ({"a": {**HEADER["a"], "dtype": "F4"}}, bytes(8), "a: its type is F4"),
        ({"a": {**HEADER["a"], "shape": [3]}}, bytes(8), r"a: F32 \[3\] takes 12 bytes, and it has 8"),
        ({"a": {**HEADER["a"], "shape": [-2]}}, bytes(8), "is impossible"),
        ({"a": HEADER["a"], "b": HEADER["a"]}, bytes(8), "b begins at byte"),
        ({"a": {"dtype": "F32"}}, b"", "a: 'shape'"),
        ([1], b"", "its header is no JSON object"),
    ],
)
def test_headers_that_contradict_themselves(tmp_path, header, data, message):
    file_of(tmp_path / "f.safetensors", header, data)
    with pytest.raises(FolderError, match=message):
        read_header(tmp_path / "f.safetensors")


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    file_of(tmp_path / "f.safetensors", HEADER, bytes(8))
    stored = read_header(tmp_path / "f.safetensors")["a"]
    assert isinstance(stored, Stored)
    with (tmp_path / "f.safetensors").open("r+b") as file:
        file.truncate(stored.begin + 4)
    with pytest.raises(FolderError, match="ended while a was read"):
        stored.read()
    (tmp_path / "f.safetensors").unlink()
    with pytest.raises(FolderError, match="cannot be read"):
        stored.read()
