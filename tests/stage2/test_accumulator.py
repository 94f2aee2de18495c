"""From rows to buckets: every fold and objective gets exactly its rows, however they come in and are merged."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from multitap_jax.stage2 import RidgeHead, persist, systems
from multitap_jax.stage2 import statistics as st
from multitap_jax.stage2.accumulator import Accumulator
from multitap_jax.stage2.rows import DataError, RawBatch, checked_rows, fold_of, group_hash
from tests.stage2.data import embeddings, relative_error, with_missing


def relative(found, expected):
    scale = np.sqrt(np.diagonal(expected))
    return np.max(np.abs(found - expected) / np.outer(scale, scale))


def collect(x, y, groups, *, folds=3, chunk=128, batch=200, keep=100, sources=None):
    collector = Accumulator(folds, keep_rows=keep, chunk_rows=chunk)
    parts = [slice(i, i + batch) for i in range(0, len(x), batch)]
    raw = [RawBatch(x[p], y[p], groups[p], None, None if sources is None else sources[p]) for p in parts]
    for rows in checked_rows(raw, folds, 0):
        collector.add(rows)
    return collector


def build(collector, targets, **options):
    return systems.build(
        collector,
        fit_intercept=True,
        standardize=False,
        eigenvectors=True,
        smallest_alpha=1.0,
        targets=np.arange(targets),
        source_weights=options.get("weights", {}),
        names=[str(i) for i in range(targets)],
    )


@pytest.mark.parametrize(("share", "buckets"), [(0.0, 1), (0.02, None), (0.4, 3)])
@pytest.mark.parametrize(("chunk", "batch"), [(64, 77), (256, 1500)])
def test_every_fold_and_objective_has_exactly_its_rows(share, buckets, chunk, batch):
    x, y = embeddings(1500)
    y = with_missing(y, share)
    y[:600, 1] = np.nan  # the patterns change on the way
    groups = [str(i // 4) for i in range(1500)]
    collector = collect(x, y, groups, chunk=chunk, batch=batch)
    assert len(collector._buckets.sums) <= 9  # 3 folds of 3: memory stays bounded, however many patterns there are
    fold = fold_of(group_hash(groups, x), 3, 0)
    found = 0
    every = build(collector, 3)
    for system in every:
        for number, stats in enumerate(system.folds):
            for column, target in enumerate(system.targets):
                seen = (fold == number) & ~np.isnan(y[:, target])
                wide = x[seen].astype(np.float64) - stats.shift, y[seen][:, [target]] - stats.label_shift[[column]]
                expected = st.from_rows(*wide, np.ones(seen.sum()))
                own = st.select(stats, np.array([column]))
                assert own.num_rows == seen.sum()
                assert relative(own.gram, expected.gram) < 1e-6
                found += 1
    assert found == 9
    if buckets == 3:
        assert [len(system.targets) for system in every] == [1, 1, 1]


def test_folds_depend_on_the_group_and_seed_alone():
    names, x = [f"image-{i}" for i in range(3000)], np.zeros((3000, 2), np.float32)
    folds = fold_of(group_hash(names, x), 5, 0)
    np.testing.assert_allclose(np.bincount(folds) / 3000, 0.2, atol=0.03)
    np.testing.assert_array_equal(fold_of(group_hash(names[:6], x[:6]), 5, 0), folds[:6])
    assert np.any(folds != fold_of(group_hash(names, x), 5, 1))


def test_without_groups_equal_rows_share_a_fold_in_any_order():
    x = embeddings(500)[0]
    doubled = np.concatenate([x, x[::-1]])
    folds = fold_of(group_hash(None, doubled), 5, 0)
    np.testing.assert_array_equal(folds[:500], folds[500:][::-1])
    assert np.bincount(folds).min() > 150


@given(
    cuts=some.lists(some.integers(1, 1299), max_size=4, unique=True),
    batch=some.sampled_from([97, 400, 1300]),
    order=some.randoms(use_true_random=False),
    saved=some.booleans(),
    mesh=some.booleans(),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_split_into_parts_batches_devices_and_merges_gives_the_same_head(cuts, batch, order, saved, mesh):
    """Parts are fitted apart, in any order, some on 8 devices, some by way of bytes, and merged."""
    import jax

    x, y = embeddings(1300, 12)
    y = with_missing(y, 0.2)
    groups = np.array([f"image-{i // 3}" for i in range(1300)])
    head = RidgeHead(np.logspace(1, 4, 4), cv=3)
    whole = RidgeHead(np.logspace(1, 4, 4), cv=3).fit(x, y, groups=groups)
    edges = [0, *sorted(cuts), 1300]
    parts = [np.arange(a, b) for a, b in itertools.pairwise(edges)]
    order.shuffle(parts)
    total = Accumulator(3, keep_rows=200, chunk_rows=64)
    for number, index in enumerate(parts):
        devices = jax.make_mesh((8,), ("data",)) if mesh and number % 2 else None
        part = Accumulator(3, keep_rows=100, chunk_rows=64, mesh=devices)
        raw = [RawBatch(x[i], y[i], groups[i]) for i in np.split(index, range(batch, len(index), batch))]
        for rows in checked_rows(raw, 3, 0):
            part.add(rows)
        total.merge(persist.from_bytes(persist.to_bytes(part)) if saved else part)
    head.fit_moments(total)
    np.testing.assert_array_equal(head.alpha_, whole.alpha_)
    np.testing.assert_array_equal(head.n_observed_, whole.n_observed_)
    assert relative_error(head.predict(x), whole.predict(x)) < 2e-5
    np.testing.assert_allclose(head.cv_results_["mse"], whole.cv_results_["mse"], rtol=1e-4)


@pytest.mark.parametrize("rows", [150, 3000])
def test_solving_again_equals_fitting_the_chosen_rows(rows, tmp_path):
    """Other alphas, fewer objectives, sources weighted or left out: without the rows."""
    x, y = embeddings(rows)
    y[: rows // 3, 0] = np.nan
    source = np.array(["a", "b", "c"])[np.arange(rows) % 3]
    collected = RidgeHead(cv=3).collect([RawBatch(x, y, None, None, source)])
    persist.save(collected, tmp_path / "moments")
    data = persist.load(tmp_path / "moments")
    alphas = [1e3, 1e4, 1e5]
    again = RidgeHead(alphas, cv=3).fit_moments(data, objectives=[2, 0], source_weights={"b": 2.5}, leave_out=["c"])
    use = source != "c"
    weight = np.where(source == "b", 2.5, 1.0)[use]
    fresh = RidgeHead(alphas, cv=3).fit(x[use], y[use][:, [2, 0]], sample_weight=weight)
    np.testing.assert_array_equal(again.alpha_, fresh.alpha_)
    np.testing.assert_array_equal(again.n_observed_, fresh.n_observed_)
    assert relative_error(again.predict(x), fresh.predict(x)) < 2e-5
    np.testing.assert_allclose(again.cv_results_["mse"], fresh.cv_results_["mse"], rtol=1e-4)
    assert again.objective_names_ == ("objective_2", "objective_0")


@pytest.mark.parametrize("rows", [90, 1500])
def test_a_source_that_no_row_comes_from_is_named(rows):
    x, y = embeddings(rows, 12)
    data = RidgeHead([1e3], cv=3).collect([RawBatch(x, y, None, None, np.array(["a", "b"])[np.arange(rows) % 2])])
    head = RidgeHead([1e3], cv=3)
    for weights in ({"leave_out": ["typo"]}, {"source_weights": {"typo": 3.0, "a": 1.0}}):
        with pytest.raises(DataError, match=rf"name \['typo'\], .* {rows} rows come from \['a', 'b'\]"):
            head.fit_moments(data, **weights)
    assert head.fit_moments(data, leave_out=["a"]).n_observed_[0] == rows // 2


def test_moments_that_do_not_fit_are_refused(tmp_path):
    x, y = embeddings(50)
    data = RidgeHead(cv=3).collect([(x, y)])
    with pytest.raises(DataError, match="3 folds, this head has 4"):
        RidgeHead(cv=4).fit_moments(data)
    with pytest.raises(DataError, match="folds=4"):
        data.merge(RidgeHead(cv=4).collect([(x, y)]))
    with pytest.raises(DataError, match="merged into"):
        data.merge(RidgeHead(cv=3).collect([(x[:, :5], y)]))
    with pytest.raises(DataError, match="objectives="):
        RidgeHead(cv=3).fit_moments(data, objectives=[7])
    with pytest.raises(DataError, match="source_weights"):
        RidgeHead(cv=3).fit_moments(data, source_weights={"": -1.0})
    with pytest.raises(DataError, match="sources left out"):
        RidgeHead(cv=3).fit_moments(data, leave_out=[""])
    persist.save(data, tmp_path / "moments")
    content = (tmp_path / "moments").read_bytes()
    for broken in (content[:-40], b"", content[:20]):
        (tmp_path / "moments").write_bytes(broken)
        with pytest.raises(DataError, match="collect them again"):
            persist.load(tmp_path / "moments")
