"""Work ahead of its consumer: a thread that does, and results that find the items they are of."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
PATIENCE = 1.0  # seconds that an abandoned thread is waited for


def read_ahead(items: Iterator[Item], depth: int = 4) -> Iterator[Item]:
    """The same items, made by a thread up to `depth` ahead of their use; its exceptions are raised here."""
    ready: queue.Queue[Any] = queue.Queue(depth)
    stopped = threading.Event()

    def put(entry: tuple[bool, Any]) -> bool:
        while not stopped.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((True, item)):
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=work, name="pack", daemon=True)
    thread.start()
    try:
        while True:
            more, item = ready.get()
            if not more:
                if item is not None:
                    raise item
                return
            yield item
    finally:
        stopped.set()
        thread.join(PATIENCE)  # not for ever: it may be waiting for an item that never comes


def with_results(
    items: Iterable[Item], work: Callable[[Iterator[Item]], Iterable[Result]]
) -> Iterator[tuple[Item, Result]]:
    """Each item with its result; `work` gives one for each, in order, and may ask for items before it does."""
    asked: deque[Item] = deque()

    def ask() -> Iterator[Item]:
        for item in items:
            asked.append(item)
            yield item

    for result in work(ask()):
        yield asked.popleft(), result
