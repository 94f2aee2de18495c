"""The embedding store: what is written is what is read, and nothing damaged passes."""

import contextlib
import hashlib
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save

from multitap_jax.stage2 import (
    DataError,
    EmbeddingStore,
    EmbeddingWriter,
    RidgeHead,
    StoreError,
    persist,
    store_format,
    store_writer,
)
from tests.stage2.data import embeddings, with_missing

ROWS, HIDDEN = 115, 6
SETTINGS = {
    "hidden_size": HIDDEN,
    "objectives": ("safety", "clarity"),
    "model_hash": "abc",
    "total": ROWS,
    "shard_rows": 10,
    "fingerprint": "records-1",
}


def rows():
    x, y = embeddings(ROWS, HIDDEN, 2)
    return [f"id-{i}" for i in range(ROWS)], x, with_missing(y, 0.2), [f"img-{i // 3}" for i in range(ROWS)]


def write(writer, start=0, stop=ROWS, batch=7):
    ids, x, y, groups = rows()
    for i in range(start, stop, batch):
        part = slice(i, min(i + batch, stop))
        writer.append(ids[part], x[part], y[part], groups[part])


def check(folder):
    ids, x, y, groups = rows()
    found = EmbeddingStore(folder)
    np.testing.assert_array_equal(found.load()[0], x)
    np.testing.assert_array_equal(found.load()[1], y)
    assert found.load()[2] == groups
    assert found.ids == ids
    assert (found.num_rows, found.hidden_size, found.objectives) == (ROWS, HIDDEN, ("safety", "clarity"))
    assert (found.model_hash, found.fingerprint) == ("abc", "records-1")


def test_round_trip_in_integer_order(tmp_path):
    with EmbeddingWriter(tmp_path, **SETTINGS) as writer:
        write(writer)
    assert len(list(tmp_path.glob("*.safetensors"))) == 12  # more than ten: sorting names as text could go wrong
    check(tmp_path)
    sizes = [len(x) for x, _, _ in EmbeddingStore(tmp_path).batches(4)]
    assert (max(sizes), sum(sizes)) == (4, ROWS)


def test_order_does_not_come_from_names(tmp_path, monkeypatch):
    for module in (store_format, store_writer):
        monkeypatch.setattr(module, "shard_name", lambda index: f"embeddings-{index}.safetensors")  # sorts 0, 1, 10, 2
    with EmbeddingWriter(tmp_path, **SETTINGS) as writer:
        write(writer)
    check(tmp_path)


def test_a_shard_is_readable_without_this_package(tmp_path):
    with EmbeddingWriter(tmp_path, **SETTINGS) as writer:
        write(writer)
    shard = load_file(tmp_path / "embeddings-00003.safetensors")
    np.testing.assert_array_equal(shard["embeddings"], rows()[1][30:40])
    np.testing.assert_array_equal(shard["labels"], rows()[2][30:40])


def test_bfloat16_halves_the_size(tmp_path):
    with EmbeddingWriter(tmp_path, dtype="bfloat16", **SETTINGS) as writer:
        write(writer)
    x = EmbeddingStore(tmp_path).load()[0]
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, rows()[1], rtol=2**-8)


@pytest.mark.parametrize("count", [60, 1400])
@pytest.mark.parametrize("cv", [3, "loo", "gcv"])
def test_bfloat16_is_summed_as_it_is_stored(tmp_path, count, cv):
    """Without a copy in float32 on the host, to the same heads bit for bit."""
    x, y = embeddings(count, 24)
    groups = [str(i // 2) for i in range(count)]
    settings = {"hidden_size": 24, "objectives": ("a", "b", "c"), "model_hash": "m", "dtype": "bfloat16"}
    with EmbeddingWriter(tmp_path, **settings) as writer:
        writer.append([str(i) for i in range(count)], x, y, groups)
    store = EmbeddingStore(tmp_path)
    assert next(store.batches(as_stored=True))[0].dtype == jnp.bfloat16
    stored, direct = RidgeHead(cv=cv).fit_store(store), RidgeHead(cv=cv).fit(store.load()[0], y, groups=groups)
    np.testing.assert_array_equal(stored.coef_, direct.coef_)
    np.testing.assert_array_equal(stored.cv_results_["mse"], direct.cv_results_["mse"])
    collected = RidgeHead(cv=3).collect(store)
    again = persist.from_bytes(persist.to_bytes(collected))
    np.testing.assert_array_equal(
        RidgeHead(cv=3).fit_moments(again).coef_, RidgeHead(cv=3).fit_moments(collected).coef_
    )


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32, np.float64])
def test_a_row_that_is_not_finite_is_named_in_every_type(value, dtype):
    x, y = embeddings(300, 24)
    for sign in (1, -1):
        RidgeHead(cv=3).collect([(sign * x.astype(dtype), y)])
    x[170, 5] = value
    with pytest.raises(DataError, match=r"X\[170, 5\] is NaN, infinite"):
        RidgeHead(cv=3).fit(x.astype(dtype), y)


def test_unknown_total_and_no_group(tmp_path):
    ids, x, y, _ = rows()
    with EmbeddingWriter(tmp_path, **{**SETTINGS, "total": None}) as writer:
        writer.append(ids[:5], x[:5], y[:5], [""] * 5)
        with pytest.raises(StoreError, match="unfinished"):
            EmbeddingStore(tmp_path)
    assert EmbeddingStore(tmp_path).load()[2] == [f"id:{name}" for name in ids[:5]]


class Killed(BaseException):
    """Stands for a kill: nothing in the package may catch it."""


@pytest.mark.parametrize("call", [*range(1, 30, 2), 30])
@pytest.mark.parametrize("torn", [False, True])
def test_resume_after_a_kill_at_any_point(tmp_path, monkeypatch, call, torn):
    """The disk dies at the n-th replacement of a file, before it or having left half of it (no atomic rename)."""
    replace, calls = os.replace, iter(range(1, 1000))

    def dying(source, target):
        if next(calls) == call:
            if torn and str(target).endswith(".safetensors"):
                with open(source, "rb") as file, open(target, "wb") as out:
                    out.write(file.read()[:100])
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    try:
        with EmbeddingWriter(tmp_path, **SETTINGS) as writer:
            write(writer)
    except Killed:
        pass
    monkeypatch.setattr(os, "replace", replace)
    writer = EmbeddingWriter.open_or_resume(tmp_path, **SETTINGS)
    assert writer.rows_done % 10 == 0 or writer.rows_done == ROWS
    with writer:
        write(writer, writer.rows_done)
    check(tmp_path)


def test_resume_after_an_orderly_stop_in_the_middle(tmp_path):
    with EmbeddingWriter.open_or_resume(tmp_path, **SETTINGS) as writer:
        write(writer, 0, 33)
    with pytest.raises(StoreError, match=r"unfinished, 33 of 115"):
        EmbeddingStore(tmp_path)
    assert EmbeddingStore(tmp_path, allow_partial=True).num_rows == 33
    with EmbeddingWriter.open_or_resume(tmp_path, **SETTINGS) as writer:
        assert writer.rows_done == 33
        write(writer, 33)
    check(tmp_path)
    done = EmbeddingWriter.open_or_resume(tmp_path, **SETTINGS)
    assert done.rows_done == ROWS
    with pytest.raises(StoreError, match="complete"):
        write(done, 0, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"model_hash": "other"},
        {"objectives": ("safety",)},
        {"fingerprint": "records-2"},
        {"total": 9},
        {"dtype": "bfloat16"},
    ],
)
def test_resume_refuses_another_run(tmp_path, change):
    with EmbeddingWriter(tmp_path, **SETTINGS) as writer:
        write(writer, 0, 20)
    with pytest.raises(StoreError, match=next(iter(change))):
        EmbeddingWriter.open_or_resume(tmp_path, **{**SETTINGS, **change})
    with pytest.raises(StoreError, match="open_or_resume"):
        EmbeddingWriter(tmp_path, **SETTINGS)


def test_an_exception_commits_nothing_further(tmp_path):
    with contextlib.suppress(KeyError), EmbeddingWriter(tmp_path, **SETTINGS) as writer:
        write(writer, 0, 27)
        raise KeyError
    assert EmbeddingStore(tmp_path, allow_partial=True).num_rows == 20


def test_damage_is_found(tmp_path):
    with EmbeddingWriter(tmp_path, **SETTINGS) as writer:
        write(writer)
    path = tmp_path / "embeddings-00004.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-3] + b"???")
    with pytest.raises(StoreError, match=r"00004.*damaged"):
        EmbeddingStore(tmp_path).load()
    with pytest.raises(StoreError, match=r"00004.*damaged"):
        RidgeHead().fit_store(EmbeddingStore(tmp_path))
    assert EmbeddingStore(tmp_path, verify=False).load()[0].shape == (ROWS, HIDDEN)
    path.write_bytes(good[:50])
    with pytest.raises(StoreError, match="not a readable shard"):
        EmbeddingStore(tmp_path, verify=False).load()
    path.unlink()
    with pytest.raises(StoreError, match="missing"):
        EmbeddingStore(tmp_path).load()
    with pytest.raises(StoreError, match="missing"):
        _ = EmbeddingStore(tmp_path).ids


@pytest.mark.parametrize(
    ("name", "shape"), [("embeddings", (10, HIDDEN - 1)), ("embeddings", (9, HIDDEN)), ("labels", (10, 3))]
)
def test_a_shard_of_another_width_is_named(tmp_path, name, shape):
    """Even if the manifest vouches for its bytes."""
    with EmbeddingWriter(tmp_path, **SETTINGS) as writer:
        write(writer)
    path = tmp_path / "embeddings-00004.safetensors"
    with safe_open(path, "numpy") as shard:
        about, tensors = shard.metadata(), {key: shard.get_tensor(key) for key in ("embeddings", "labels")}
    content = save(tensors | {name: np.zeros(shape, np.float32)}, about)
    path.write_bytes(content)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"][4]["sha256"] = hashlib.sha256(content).hexdigest()
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=r"00004.*manifest\.json says \(10, 6\), \(10, 2\)"):
        RidgeHead().fit_store(EmbeddingStore(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "x", "version": 1}'])
def test_a_foreign_manifest_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match=r"manifest\.json"):
        EmbeddingStore(tmp_path)


def test_a_disk_that_fails_once_loses_no_row_and_doubles_none(tmp_path, monkeypatch):
    """At every replacement of a file in turn; the writer is used on."""
    for call in range(1, 25):
        replace, calls, failed = os.replace, iter(range(1, 1000)), []

        def failing(source, target, replace=replace, calls=calls, failed=failed, call=call):
            if next(calls) == call + 1:  # the first is the manifest of the empty store
                failed.append(target)
                raise OSError(28, "No space left on device")
            replace(source, target)

        monkeypatch.setattr(os, "replace", failing)
        folder = tmp_path / str(call)
        writer, (ids, x, y, groups) = EmbeddingWriter(folder, **SETTINGS), rows()
        for i in range(0, ROWS, 7):
            part = slice(i, i + 7)
            with contextlib.suppress(OSError):
                writer.append(ids[part], x[part], y[part], groups[part])
            if failed:  # what is in memory and on disk is the same
                found = EmbeddingStore(folder, allow_partial=True)
                assert (found.num_rows, len(found.ids)) == (writer.rows_done, writer.rows_done)
        writer.close()
        monkeypatch.setattr(os, "replace", replace)
        assert failed
        check(folder)


def test_a_manifest_that_lacks_something_or_contradicts_itself_is_refused_in_one_error(tmp_path):
    with EmbeddingWriter(tmp_path, **SETTINGS) as writer:
        write(writer)
    path = tmp_path / "manifest.json"
    good = json.loads(path.read_text())
    names = ("shards", "rows", "hidden_size", "objectives", "complete", "model_hash", "total", "dtype", "fingerprint")

    def refused(change):
        path.write_text(json.dumps({key: value for key, value in {**good, **change}.items() if value is not Ellipsis}))
        with pytest.raises(StoreError, match=r"manifest\.json: cannot be right") as error:
            EmbeddingStore(tmp_path)
        with pytest.raises(StoreError, match=r"manifest\.json: cannot be right"):
            EmbeddingWriter.open_or_resume(tmp_path, **SETTINGS)
        return str(error.value)

    for name in names:
        assert f"{name} is missing" in refused({name: ...})
    everything = refused(dict.fromkeys(names, ...))
    assert all(f"{name} is missing" in everything for name in names)
    assert "rows is 120, but its shards have 115" in refused({"rows": 120})
    assert "complete is True, with 115 rows of 200" in refused({"total": 200})
    assert "not distinct" in refused({"objectives": ["a", "a"]})
    said = refused({"hidden_size": True, "dtype": "float16", "complete": "yes", "shards": [{"rows": -1}]})
    for wrong in ("hidden_size is True", "dtype is 'float16'", "complete is 'yes'", "shard 0 is {'rows': -1}"):
        assert wrong in said


def test_a_manifest_cannot_point_elsewhere(tmp_path):
    with EmbeddingWriter(tmp_path, **SETTINGS) as writer:
        write(writer)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][1]["file"] = "../secret.safetensors"
    path.write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="secret"):
        EmbeddingStore(tmp_path)
    with pytest.raises(StoreError, match="no such file"):
        EmbeddingStore(tmp_path / "nowhere")


def test_bad_rows_are_refused(tmp_path):
    ids, x, y, groups = rows()
    writer = EmbeddingWriter(tmp_path, **SETTINGS)
    bad = x.copy()
    bad[3, 2] = np.inf
    with pytest.raises(StoreError, match="'id-3'"):
        writer.append(ids, bad, y, groups)
    with pytest.raises(StoreError, match="expected"):
        writer.append(ids, x[:, :3], y, groups)
    with pytest.raises(StoreError, match="complete"):
        writer.append(ids * 2, np.concatenate([x, x]), np.concatenate([y, y]), groups * 2)
    with pytest.raises(StoreError, match="float16"):
        EmbeddingWriter(tmp_path / "b", dtype="float16", **SETTINGS)
    with pytest.raises(StoreError, match="unique"):
        EmbeddingWriter(tmp_path / "c", **{**SETTINGS, "objectives": ("a", "a")})


def test_heads_from_a_store_equal_heads_from_arrays(tmp_path):
    with EmbeddingWriter(tmp_path, **SETTINGS) as writer:
        write(writer)
    _, x, y, groups = rows()
    stored = RidgeHead().fit_store(EmbeddingStore(tmp_path))
    direct = RidgeHead().fit(x, y, groups=groups)
    assert stored.objective_names_ == ("safety", "clarity")
    np.testing.assert_array_equal(stored.coef_, direct.coef_)
    np.testing.assert_array_equal(stored.cv_predictions_, direct.cv_predictions_)


def test_a_url_holds_the_same_store():
    import fsspec

    url = "memory://embeddings/run"
    with EmbeddingWriter.open_or_resume(url, **SETTINGS) as writer:
        write(writer, 0, 33)
    with EmbeddingWriter.open_or_resume(url, **SETTINGS) as writer:
        assert writer.rows_done == 33
        write(writer, 33)
    check(url)
    files = fsspec.filesystem("memory")
    files.pipe_file("/embeddings/run/embeddings-00002.safetensors", b"x" * 50)
    with pytest.raises(StoreError, match=r"memory://embeddings/run/embeddings-00002\.safetensors: damaged"):
        EmbeddingStore(url).load()
    files.rm("/embeddings", recursive=True)


@pytest.mark.parametrize("ahead", [0, 1, 2, 50])
def test_reading_ahead_keeps_the_order(tmp_path, ahead):
    with EmbeddingWriter(tmp_path, **SETTINGS) as writer:
        write(writer)
    found = EmbeddingStore(tmp_path)
    parts = list(found.batches(4, read_ahead=ahead))
    np.testing.assert_array_equal(np.concatenate([x for x, _, _ in parts]), rows()[1])
    shares = [np.concatenate([x for x, _, _ in found.batches(read_ahead=ahead, share=(p, 5))]) for p in range(5)]
    assert sorted(map(len, shares)) == [20, 20, 20, 25, 30]
    np.testing.assert_array_equal(shares[1][:10], rows()[1][10:20])
    path = tmp_path / "embeddings-00006.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match="00006"):
        list(EmbeddingStore(tmp_path).batches(read_ahead=ahead))


def test_embeddings_of_another_model_are_refused(tmp_path):
    with EmbeddingWriter(tmp_path, **SETTINGS) as writer:
        write(writer)
    assert EmbeddingStore(tmp_path, model_hash="abc").num_rows == ROWS
    with pytest.raises(StoreError, match="made by the model abc, but embeddings of xyz"):
        EmbeddingStore(tmp_path, model_hash="xyz")
