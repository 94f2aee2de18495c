"""Checkpoints: when, what, and from which one a run goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from multitap_jax.checkpoint import CheckpointError, Checkpoints, SavePolicy
from multitap_jax.checksum import checksum
from multitap_jax.config import CheckpointConfig, MeshConfig
from multitap_jax.parallel.mesh import make_mesh

IDENTITY = {"data": "abc", "config.seed": 1}
# 2026-11: reads that orbax gives up on end after its event loop is closed, and say so from their threads.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_saves_are_due_by_step_and_by_time():
    clock = Clock()
    policy = SavePolicy(CheckpointConfig(every_steps=10, every_minutes=2.0), clock)
    assert [step for step in range(31) if policy.due_by_step(step)] == [10, 20, 30]
    assert not policy.due_by_time()
    clock.now += 119
    assert not policy.due_by_time()
    clock.now += 1
    assert policy.due_by_time()
    policy.saved()
    assert not policy.due_by_time()


def test_zero_disables_a_trigger():
    clock = Clock()
    policy = SavePolicy(CheckpointConfig(every_steps=0, every_minutes=0.0), clock)
    clock.now += 1e9
    assert not policy.due_by_time()
    assert not any(policy.due_by_step(step) for step in range(100))


def state(seed: int, config: MeshConfig = MeshConfig(data=1, fsdp=8)):  # noqa: B008
    rng = np.random.default_rng(seed)
    mesh = make_mesh(config)
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    return {
        "step": put(np.int32(seed), P()),
        "weight": put(rng.standard_normal((64, 32)).astype(np.float32), P("fsdp", "tensor")),
        "half": put(jnp.asarray(rng.standard_normal(16), jnp.bfloat16), P("fsdp")),
    }


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_same(one, two):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        assert a.dtype == b.dtype


@pytest.fixture
def folder(tmp_path):
    """Steps 1, 2, 3 and 4 saved, the last 3 kept."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3, identity=IDENTITY)
    assert checkpoints.restore(abstract(state(0))) is None
    for step in range(1, 5):
        assert checkpoints.save(step, state(step))
    assert not checkpoints.save(4, state(4))
    checkpoints.close()
    return tmp_path / "checkpoints"


def reopened(folder, said=None, identity=IDENTITY):
    return Checkpoints(folder, keep=3, identity=identity, report=(said if said is not None else []).append)


def test_the_newest_is_restored_onto_any_mesh(folder):
    checkpoints = reopened(folder)
    assert checkpoints.steps() == [2, 3, 4]
    for config in (MeshConfig(data=1, fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2)):
        target = abstract(state(0, config))
        step, found = checkpoints.restore(target)
        assert step == 4
        assert_same(found, state(4))
        assert found["weight"].sharding == target["weight"].sharding
    checkpoints.close()


def data_files(folder, step):
    return sorted(p for p in (folder / str(step)).rglob("*") if p.is_file() and p.parent.name == "d")


def truncate(folder, step):
    for path in data_files(folder, step):
        path.write_bytes(path.read_bytes()[:-20])


def flip(folder, step):
    path = max(data_files(folder, step), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))


def forget_metadata(folder, step):
    (folder / str(step) / "_CHECKPOINT_METADATA").unlink()


def remove_arrays(folder, step):
    for path in data_files(folder, step):
        path.unlink()


@pytest.mark.parametrize("damage", [truncate, flip, forget_metadata, remove_arrays])
def test_damage_is_skipped_said_and_set_aside(folder, damage):
    damage(folder, 4)
    damage(folder, 3)
    said = []
    checkpoints = reopened(folder, said)
    step, found = checkpoints.restore(abstract(state(0)))
    assert step == 2
    assert_same(found, state(2))
    assert [line.split(" is damaged")[0].rsplit("/", 1)[1] for line in said] == ["4", "3"]
    assert sorted(p.name for p in (folder.parent / "corrupt").iterdir()) == ["3", "4"]
    assert checkpoints.save(3, state(3))
    checkpoints.wait()
    assert checkpoints.restore(abstract(state(0)))[0] == 3
    checkpoints.close()


def test_a_state_that_is_not_the_saved_one_is_noticed(folder, monkeypatch):
    """Were the storage to hand out other bits without an error, the checksum would tell."""
    said = []
    checkpoints = reopened(folder, said)
    read = checkpoints._read

    def wrong(step, *rest):
        arrays = read(step, *rest)
        return arrays if step < 4 else {**arrays, "half": arrays["half"].at[3].multiply(jnp.bfloat16(-1))}

    monkeypatch.setattr(checkpoints, "_read", wrong)
    assert checkpoints.restore(abstract(state(0)))[0] == 3
    assert "checksum of half" in said[0]
    checkpoints.close()


def test_nothing_good_is_an_error(folder):
    for step in (2, 3, 4):
        truncate(folder, step)
    checkpoints = reopened(folder)
    with pytest.raises(CheckpointError, match=r"all checkpoints are damaged \(steps 2, 3, 4\)"):
        checkpoints.restore(abstract(state(0)))
    checkpoints.close()


def test_another_run_is_refused(folder):
    checkpoints = reopened(folder, identity={"data": "xyz", "config.seed": 1})
    with pytest.raises(CheckpointError, match=r"(?s)data: the checkpoint has 'abc', this run has 'xyz'.*--workdir"):
        checkpoints.restore(abstract(state(0)))
    checkpoints.close()
    checkpoints = reopened(folder)
    other = {**abstract(state(0)), "more": jax.ShapeDtypeStruct((1,), jnp.float32)}
    with pytest.raises(CheckpointError, match=r"holds other parameters than this run has: more"):
        checkpoints.restore(other)
    checkpoints.close()


def test_a_changed_shape_is_refused(folder):
    checkpoints = reopened(folder)
    target = abstract(state(0))
    wide = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=target["weight"].sharding)
    with pytest.raises(CheckpointError):
        checkpoints.restore({**target, "weight": wide})
    assert checkpoints.steps() == [2, 3, 4]
    checkpoints.close()


def test_the_checksum_knows_bits_and_names_but_not_the_mesh():
    one = state(1)
    assert checksum(one) == checksum(state(1, MeshConfig(data=2, fsdp=2, tensor=2)))
    assert checksum(one) != checksum({**one, "step": one["step"] + 1})
    assert checksum(one) != checksum({("other" if k == "half" else k): v for k, v in one.items()})
    assert checksum({}) == 0


@pytest.mark.parametrize(
    "error", [PermissionError(13, "denied"), OSError(24, "too many files"), ValueError("RESOURCE_EXHAUSTED: no memory")]
)
def test_an_error_of_the_moment_condemns_no_checkpoint(folder, monkeypatch, error):
    checkpoints = Checkpoints(folder, keep=3, identity=IDENTITY)

    def fail(*arguments):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "_read", fail)
        with pytest.raises(CheckpointError, match="need not mean damage"):
            checkpoints.restore(abstract(state(0)))
    step, found = checkpoints.restore(abstract(state(0)))
    assert step == 4
    assert_same(found, state(4))
    checkpoints.close()


def test_a_saved_step_that_is_judged_later_is_saved_with_its_goodness(tmp_path):
    """SIGTERM stops a run before the evaluation that is due; the run that goes on evaluates the same state."""
    options = {"keep": 1, "keep_best": 1, "identity": IDENTITY}
    checkpoints = Checkpoints(tmp_path, best_by="loss of a", **options)
    assert checkpoints.save(1, state(1))
    checkpoints.wait()
    assert checkpoints.best() is None
    assert checkpoints.save(1, state(1), -0.5)
    assert not checkpoints.save(1, state(1), -0.5)
    assert checkpoints.save(2, state(2), -0.7)
    assert checkpoints.save(3, state(3))
    checkpoints.close()
    again = Checkpoints(tmp_path, best_by="loss of a", **options)
    assert (again.steps(), again.best()) == ([1, 3], 1)
    assert_same(again.load(1, abstract(state(1))), state(1))
    again.close()


def test_what_was_judged_by_something_else_counts_as_not_judged(tmp_path):
    options = {"keep": 4, "keep_best": 1, "identity": IDENTITY}
    checkpoints = Checkpoints(tmp_path, best_by="loss of a", **options)
    checkpoints.save(1, state(1), -0.1)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, best_by="tau_b of a", **options)
    assert checkpoints.best() is None
    checkpoints.save(2, state(2), -0.3)
    checkpoints.wait()
    assert checkpoints.best() == 2
    checkpoints.close()
