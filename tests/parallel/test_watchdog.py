"""The watchdog: when it bites, when it does not, and what it says."""

import threading

import pytest

from multitap_jax.parallel import watchdog
from multitap_jax.parallel.watchdog import EXIT_CODE, Watchdog, watched


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def dog(tmp_path):
    clock, codes = Clock(), []
    with (tmp_path / "log").open("w+") as out:
        made = Watchdog(80, who="process 1 of 4", clock=clock, end=codes.append, out=out)
        yield made, clock, codes, tmp_path / "log"


def pass_time(dog, clock, seconds):
    for _ in range(round(seconds / dog.nap)):
        clock.now += dog.nap
        dog.look()


def test_it_bites_after_so_many_seconds_without_progress(dog):
    dog, clock, codes, log = dog
    pass_time(dog, clock, 75)
    dog.beat("step 7")
    pass_time(dog, clock, 75)
    assert codes == []
    pass_time(dog, clock, 5)
    assert codes == [EXIT_CODE] == [75]
    said = log.read_text()
    assert "process 1 of 4 has made no progress for 80 s, since step 7; either it hangs" in said
    assert "--watchdog (now 80 s) allows more" in said
    assert "test_it_bites_after_so_many_seconds_without_progress" in said  # the stacks


def test_a_process_that_was_itself_stopped_has_not_been_idle(dog):
    dog, clock, codes, _ = dog
    pass_time(dog, clock, 40)
    clock.now += 100_000
    dog.look()
    pass_time(dog, clock, 25)
    assert codes == []
    pass_time(dog, clock, 5)  # the stop itself has counted as two looks, 10 s each
    assert codes == [EXIT_CODE]


def test_its_thread_looks_and_ends_with_the_context():
    looked = threading.Event()
    dog = Watchdog(0.01, end=lambda code: looked.set())
    with dog.running():
        assert looked.wait(30)
        assert any(thread.name == "watchdog" for thread in threading.enumerate())
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())


def test_the_process_has_one_and_everything_may_beat():
    watchdog.beat("nobody listens")
    with watched(0):
        assert watchdog._current is None
    with watched(1000):
        watchdog.beat("somewhere")
        assert watchdog._current._doing == "somewhere"
    assert watchdog._current is None
