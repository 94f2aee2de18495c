"""Blocks of a long input: cut by place alone, done once by whoever's turn it is, and put in order."""

import threading
from itertools import islice

import pytest

from multitap_jax.scoring.parts import Block, Parts, blocks

RECORDS = list(range(103))


def parts_of(folder, index, count, identity="job"):
    made = Parts(folder, identity, 10)
    made._index, made._count = index, count
    return made


class Worker:
    """Doubles every record and remembers which blocks it was given."""

    def __init__(self):
        self.seen = []

    def __call__(self, blocks):
        for block in blocks:
            self.seen.append(block.first)
            yield [2 * item for item in block.items]


def test_blocks_end_at_the_same_places_wherever_they_begin():
    assert [(b.first, len(b.items)) for b in blocks(iter(range(25)), 10)] == [(0, 10), (10, 10), (20, 5)]
    assert next(blocks(iter(range(7, 25)), 10, 7)) == Block(7, [7, 8, 9])
    assert list(blocks(iter([]), 10, 7)) == []


@pytest.mark.parametrize("start", [0, 34])
@pytest.mark.parametrize("count", [1, 3])
def test_every_block_is_done_once_and_comes_in_order(tmp_path, count, start):
    workers = [Worker() for _ in range(count)]
    every = [parts_of(tmp_path / "parts", index, count) for index in range(count)]
    every[0].begin(start)
    followers = [
        threading.Thread(target=lambda p=p, w=w: p.follow(iter(RECORDS[start:]), start, w))
        for p, w in zip(every[1:], workers[1:], strict=True)
    ]
    for thread in followers:
        thread.start()
    found = list(every[0].in_order(iter(RECORDS[start:]), start, workers[0]))
    for thread in followers:
        thread.join(30)
        assert not thread.is_alive()
    assert [item for block, _ in found for item in block.items] == RECORDS[start:]
    assert [item for _, result in found for item in result] == [2 * item for item in RECORDS[start:]]
    assert sorted(first for worker in workers for first in worker.seen) == [block.first for block, _ in found]
    assert all(len(worker.seen) >= 2 for worker in workers)
    assert not (tmp_path / "parts").exists()


def test_another_number_of_processes_takes_up_what_was_finished_for_the_same_job(tmp_path):
    folder, worker = tmp_path / "parts", Worker()
    folder.mkdir()
    list(parts_of(folder, 1, 3)._do(iter(RECORDS), 0, worker, lambda block: True))
    assert worker.seen == [10, 40, 70, 100]
    for identity, left in (("another", 11), ("job", 7)):
        worker, folder_of = Worker(), parts_of(folder, 0, 1, identity)
        found = [folder_of._has(block, lambda block: True) for block in blocks(iter(RECORDS), 10)]
        assert found.count(False) == left
    results = [result for _, result in parts_of(folder, 0, 1).in_order(iter(RECORDS), 0, worker)]
    assert [item for result in results for item in result] == [2 * item for item in RECORDS]
    assert worker.seen == [0, 20, 30, 50, 60, 80, 90]


def test_a_block_without_its_other_file_is_done_again(tmp_path):
    folder, worker = tmp_path / "parts", Worker()
    folder.mkdir()
    one = parts_of(folder, 0, 2)
    for whole in (True, False):
        list(one._do(iter(RECORDS[:10]), 0, worker, lambda block, whole=whole: whole))
    assert worker.seen == [0, 0]


@pytest.mark.parametrize("ahead", [1, 3, 1000])
def test_work_may_ask_for_blocks_before_it_gives_results(tmp_path, ahead, monkeypatch):
    """Also for more of them than process 0 may be ahead of the others: it never waits for a block of its own."""
    monkeypatch.setattr("multitap_jax.scoring.parts.AHEAD", 2)

    def eager(blocks):
        asked = iter(blocks)
        taken = list(islice(asked, ahead))
        while taken:
            yield [2 * item for item in taken.pop(0).items]
            taken += islice(asked, 1)

    follower, leader = parts_of(tmp_path / "parts", 1, 2), parts_of(tmp_path / "parts", 0, 2)
    leader.begin(0)
    (tmp_path / "parts").mkdir(exist_ok=True)
    thread = threading.Thread(target=lambda: follower.follow(iter(RECORDS), 0, eager), daemon=True)
    thread.start()
    found = list(leader.in_order(iter(RECORDS), 0, eager))
    thread.join(30)
    assert not thread.is_alive()
    assert [item for _, result in found for item in result] == [2 * item for item in RECORDS]
