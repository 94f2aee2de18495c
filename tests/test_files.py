"""Folders appear whole or not at all; hashes see content and nothing else."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from multitap_jax.files import (
    canonical_hash,
    file_hash,
    new_folder,
    sole_writer,
    tensor_hash,
    try_lock,
    write_atomic,
)
from multitap_jax.weights.files import read_tensors


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"t{i}": rng.standard_normal((i + 1, 3)).astype(np.float32) for i in range(5)}


def test_the_hash_is_the_same_however_tensors_are_cut_into_files(tmp_path):
    all_of_them = tensors()
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    save_file(all_of_them, tmp_path / "one" / "model.safetensors")
    save_file({n: all_of_them[n] for n in ("t4", "t0")}, tmp_path / "two" / "model-a.safetensors", {"format": "pt"})
    save_file({n: all_of_them[n] for n in ("t1", "t2", "t3")}, tmp_path / "two" / "model-b.safetensors")
    whole = tensor_hash(read_tensors(tmp_path / "one"))
    assert tensor_hash(read_tensors(tmp_path / "two")) == whole
    assert tensor_hash(all_of_them) == whole


def test_the_hash_of_views_scalars_and_narrow_types():
    wide = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert tensor_hash({"a": wide.T}) == tensor_hash({"a": np.ascontiguousarray(wide.T)})
    assert tensor_hash({"a": np.float32(1) * np.ones(())}) != tensor_hash({"a": np.ones(1, np.float32)})
    assert tensor_hash({"a": np.ones(3, ml_dtypes.bfloat16)}) != tensor_hash({"a": np.ones(3, np.float16)})


def changed(name: str) -> dict[str, np.ndarray]:
    values = tensors()
    if name == "one bit":
        values["t2"].view(np.uint32)[1, 1] ^= 1
    elif name == "shape":
        values["t2"] = values["t2"].reshape(1, 9)
    elif name == "name":
        values["t9"] = values.pop("t2")
    elif name == "dtype":
        values["t2"] = values["t2"].view(np.int32)
    elif name == "missing":
        del values["t2"]
    return values


@pytest.mark.parametrize("name", ["one bit", "shape", "name", "dtype", "missing"])
def test_the_hash_sees_every_change(name):
    assert tensor_hash(tensors()) != tensor_hash(changed(name))


def test_canonical_hash_ignores_order_and_refuses_nan():
    assert canonical_hash({"a": 1, "b": [1, 2]}) == canonical_hash({"b": (1, 2), "a": 1})
    with pytest.raises(ValueError):
        canonical_hash({"a": float("nan")})


def test_write_atomic_leaves_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_atomic(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_failing_block_leaves_no_trace(tmp_path):
    def fail() -> None:
        with new_folder(tmp_path / "out", replaceable=lambda _: False) as new:
            (new / "half").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_only_what_may_be_replaced_is_replaced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with new_folder(out, replaceable=lambda _: False) as new:  # an empty folder is nobody's
        (new / "a").write_text("1")
    with pytest.raises(FileExistsError, match="not empty"), new_folder(out, replaceable=lambda _: False):
        pytest.fail("must not get here")
    with new_folder(out, replaceable=lambda old: (old / "a").is_file()) as new:
        (new / "b").write_text("2")
    assert [p.name for p in out.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is not a folder"):
        new_folder(tmp_path / "file", replaceable=lambda _: True).__enter__()


def test_file_hash_is_sha256(tmp_path):
    (tmp_path / "f").write_text(json.dumps({}))
    assert file_hash(tmp_path / "f") == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    folder = tmp_path / "run"
    code = "import sys; from pathlib import Path; from multitap_jax.files import sole_writer\n"
    code += f"with sole_writer(Path({str(folder)!r})): pass"
    attempt = lambda: subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    with sole_writer(folder):
        other = attempt()
        assert other.returncode != 0
        assert f"{folder}: another process is writing into it" in other.stderr
    assert not list(folder.iterdir())
    assert attempt().returncode == 0
    (folder / ".lock").touch()  # as a kill leaves it
    assert attempt().returncode == 0
    assert not list(folder.iterdir())


def test_a_lock_that_goes_while_it_is_asked_for_is_asked_for_again(tmp_path, monkeypatch):
    """Between the opening and the locking, who held it may have let go: what is locked then is no file any more."""
    lock, asked = tmp_path / ".lock", []

    def late(descriptor):
        asked.append(descriptor)
        if len(asked) == 1:
            lock.unlink()
        return try_lock(descriptor)

    monkeypatch.setattr("multitap_jax.files.try_lock", late)
    with sole_writer(tmp_path):
        assert len(asked) == 2
        assert lock.exists()
