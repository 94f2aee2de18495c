"""The same head on one device, on eight, with the Gram split, and from two processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from multitap_jax.stage2 import EmbeddingStore, EmbeddingWriter, RidgeHead
from multitap_jax.stage2.sharded import OneDevice, OnMesh
from tests.stage2.data import embeddings, relative_error, with_missing

ROOT = Path(__file__).parents[2]


def write(folder, rows, shard_rows):
    x, y = embeddings(rows, 24)
    y = with_missing(y, 0.1)
    groups = [f"image-{i // 3}" for i in range(rows)]
    settings = {"hidden_size": 24, "objectives": ("a", "b", "c"), "model_hash": "m", "shard_rows": shard_rows}
    with EmbeddingWriter(folder, total=rows, **settings) as writer:
        writer.append([str(i) for i in range(rows)], x, y, groups)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Many shards; one, of many rows and of few: then the second of two processes has no rows; a damaged one."""
    folder = tmp_path_factory.mktemp("stores")
    write(folder / "many", 1500, 256)
    write(folder / "one", 1500, 4096)
    write(folder / "few", 90, 4096)
    write(folder / "damaged", 90, 45)
    second = folder / "damaged" / "embeddings-00001.safetensors"
    second.write_bytes(second.read_bytes()[:-1] + b"?")
    return folder


@pytest.fixture(scope="module")
def store(stores):
    return stores / "many"


@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_slabs_on_a_mesh_hold_the_sums_of_one_device(shape):
    x, y = embeddings(1024, 24)
    weight = np.random.default_rng(0).uniform(0.5, 2, 1024).astype(np.float32)
    weight[::9] = 0
    shifts = x[:100].mean(0), y[:100].mean(0)
    found = []
    for device in (OneDevice(), OnMesh(jax.make_mesh(shape, ("data", "tensor")))):
        moments = device.init(24, 3, *shifts)
        for part in np.split(np.arange(1024), 2):
            moments = device.update(moments, x[part], y[part], weight[part])
        found.append(device.finalize(moments))
    scale = np.sqrt(np.diagonal(found[0].gram))
    assert np.max(np.abs(found[0].gram - found[1].gram) / np.outer(scale, scale)) < 1e-6
    assert found[0].num_rows == found[1].num_rows == (weight > 0).sum()
    if shape == (4, 2):
        assert moments.hi.sharding.shard_shape(moments.hi.shape)[:2] == (1, 4)  # 8 slabs, 4 a device


@pytest.mark.parametrize("axes", [("data",), ("data", "fsdp", "tensor", "context")])
@pytest.mark.parametrize("cv", [3, "gcv", "loo"])
def test_a_mesh_gives_the_same_head(store, axes, cv):
    shape = (8,) if len(axes) == 1 else (2, 2, 2, 1)
    mesh = jax.make_mesh(shape, axes)
    one = RidgeHead(np.logspace(2, 5, 4), cv=cv, refine=True).fit_store(EmbeddingStore(store))
    many = RidgeHead(np.logspace(2, 5, 4), cv=cv, refine=True).fit_store(EmbeddingStore(store), mesh=mesh)
    x = embeddings(1500, 24)[0]
    np.testing.assert_array_equal(many.alpha_, one.alpha_)
    assert relative_error(many.predict(x.astype(np.float64)), one.predict(x.astype(np.float64))) < 1e-6
    np.testing.assert_allclose(many.cv_results_["mse"], one.cv_results_["mse"], rtol=1e-5)


def run(stores, out, processes, devices, fits):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = [sys.executable, str(Path(__file__).with_name("process_script.py")), str(stores), str(out), str(port)]
    started = [
        subprocess.Popen(
            [*script, str(i), str(processes), str(devices), *fits],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in started:  # one that failed leaves the others waiting
            process.kill()
    return {fit: [np.load(f"{out}.{fit}.{i}.npz") for i in range(processes)] for fit in fits}


SAME = ("many:3", "many:loo", "one:3", "one:loo", "few:3", "few:loo")


@pytest.fixture(scope="module")
def two_processes(stores, tmp_path_factory):
    """What two processes of two devices each found, fit after fit in one pair of them."""
    return run(stores, tmp_path_factory.mktemp("two") / "out", 2, 2, (*SAME, "many:logo", "damaged:3"))


def test_two_processes_say_that_they_cannot_hold_groups_out(two_processes):
    for found in two_processes["many:logo"]:
        assert "cv='logo' needs all rows of a group in one process; use folds, or one process" in str(found["error"])


def test_a_shard_that_one_process_cannot_read_ends_both(two_processes):
    first, second = (str(found["error"]) for found in two_processes["damaged:3"])
    assert "embeddings-00001.safetensors: damaged" in second
    assert first.startswith("process 1 of 2 failed (StoreError: ")
    assert second in first


@pytest.mark.parametrize("fit", SAME)
def test_two_processes_give_the_same_head(stores, two_processes, fit):
    name, cv = fit.split(":")
    store = EmbeddingStore(stores / name)
    one = RidgeHead(np.logspace(2, 5, 4), cv=int(cv) if cv.isdigit() else cv, refine=True).fit_store(store)
    first, second = two_processes[fit]
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    np.testing.assert_array_equal(first["alpha"], one.alpha_)
    x = store.load()[0].astype(np.float64)
    predicted = x @ first["coef"].T.astype(np.float64) + first["intercept"]
    assert relative_error(predicted, one.predict(x)) < 1e-6
    np.testing.assert_allclose(first["mse"], one.cv_results_["mse"], rtol=1e-5)
    np.testing.assert_allclose(first["tau"], one.tau_, atol=1e-4)
