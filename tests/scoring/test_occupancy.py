"""How busy a device was, with a clock that is told the time."""

import pytest

from multitap_jax.scoring.occupancy import Occupancy


class Batch:
    """Arrays that are ready at a time of their own."""

    def __init__(self, now, ready):
        self.now, self.ready = now, ready

    def block_until_ready(self):
        self.now[0] = max(self.now[0], self.ready)
        return self


def follow(batches):
    """Busy, idle and their share for batches of (asked, given, ready, shape), each of which is watched to its end."""
    now = [0.0]
    occupancy = Occupancy(lambda: now[0])

    for asked, given, ready, shape in batches:
        now[0] = asked

        def start(given=given, ready=ready):
            now[0] = given
            return Batch(now, ready)

        occupancy.watch(start, shape)
        occupancy._waiting.submit(lambda: None).result()
    return occupancy.close()


def test_a_device_that_waits_for_batches_is_idle():
    found = follow([(0, 10, 14, "a"), (16, 16, 20, "a"), (20, 20, 22, "a")])
    assert (found.busy, found.idle) == (4 + 4 + 2, 2)
    assert found.idle_share == pytest.approx(2 / 12)


def test_compiling_is_neither_work_nor_waiting():
    found = follow([(0, 10, 14, "a"), (15, 30, 34, "b"), (34, 35, 36, "a")])
    assert (found.busy, found.idle) == (4 + 4 + 1, 1 + 1)


def test_a_batch_given_while_another_is_computed_waits_for_it():
    found = follow([(0, 1, 10, "a"), (2, 2, 15, "a")])
    assert (found.busy, found.idle, found.idle_share) == (9 + 5, 0, 0)


@pytest.mark.parametrize("batches", [[], [(0, 1, 2, "a")]])
def test_nothing_is_said_of_fewer_than_two_batches(batches):
    assert follow(batches).idle_share is None
