"""Processes of one run: how they find each other, what they tell each other, and how they end."""

import hashlib
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from multitap_jax.parallel import watchdog
from multitap_jax.parallel.clusters import Place, find_place
from multitap_jax.parallel.host import say_last

Item = TypeVar("Item")
Result = TypeVar("Result")
TIMEOUT = 300  # seconds in which all processes of a run have to come
HEARTBEAT = 100  # seconds without a sign of life after which a process counts as dead, and the run as over
LOST = 76  # exit code (EX_PROTOCOL of sysexits.h) of a process that had to end because another did
_OF_ANOTHER = re.compile(r"Gloo|NCCL|RCCL|(closed|reset) by peer|coordination ?service|heartbeat", re.IGNORECASE)
_STATUS = re.compile(r"[A-Z_]+: ")  # with which XLA's errors begin (absl/status): UNKNOWN, INTERNAL, UNAVAILABLE, ...
_MARGIN = 60  # by which JAX waits longer than we do: it aborts without a word on what to check


class RendezvousError(RuntimeError):
    """The processes of a run did not find each other; the message says who waited for whom, and what to check."""

    exit_code = watchdog.EXIT_CODE  # a machine may have come late, or an earlier run may still be ending


class OtherProcessError(RuntimeError):
    """Another process of the run failed in what all must succeed at; the message says which, and of what."""


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = TIMEOUT,
    heartbeat: float = HEARTBEAT,
    saves_on_sigterm: bool = False,
) -> Place | None:
    """Joins the processes of a run; does nothing unless a coordinator is named (`clusters.find_place`).

    Must be called before anything else of JAX.

    Args:
      coordinator, num_processes, process_id: see `find_place`.
      timeout: seconds in which all processes have to come.
      heartbeat: seconds without a sign of life after which a process counts as dead; all others then end.
      saves_on_sigterm: whether the caller asks `multihost_utils.reached_preemption_sync_point` at every step; otherwise
        SIGTERM ends a process as it always does.

    Raises:
      ValueError: see `find_place`.
      RendezvousError: process 0 cannot be reached within `timeout`, its port is taken, or the cluster does not answer.
        A process whose others do not come says so and exits with 75: JAX's wait for them cannot be interrupted.
    """
    place = find_place(coordinator, num_processes, process_id, os.environ)
    if place is None:
        return None
    print(f"multitap: {place}", file=sys.stderr, flush=True)
    deadline = time.monotonic() + timeout
    if place.coordinator:
        if place.process == 0:
            _check_port(place)
        else:
            _reach(place, deadline, timeout)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # not read on other devices
    jax.config.update("jax_enable_preemption_service", saves_on_sigterm)  # it takes SIGTERM for itself
    alarm = threading.Timer(max(deadline - time.monotonic(), 0), _give_up, (place, timeout))
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            place.coordinator or None,
            place.processes or None,
            place.process if place.coordinator else None,
            local_device_ids=place.local_devices,
            cluster_detection_method=place.method,
            initialization_timeout=int(timeout + _MARGIN),
            heartbeat_timeout_seconds=int(heartbeat),
        )
    except (OSError, RuntimeError, ValueError) as error:
        if place.coordinator:
            raise
        raise RendezvousError(
            f"{place.how} was asked which processes there are, in vain ({type(error).__name__}: {error}); give "
            "--coordinator=HOST:PORT --num_processes=N --process_id=I instead of auto"
        ) from error
    finally:
        alarm.cancel()
    return place


def _check_port(place: Place) -> None:
    port = int(place.coordinator.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise RendezvousError(
                f"process 0 cannot listen on port {port} ({error.strerror}); an earlier run may still hold it: end "
                "that, or give all processes another port"
            ) from error


def _reach(place: Place, deadline: float, timeout: float) -> None:
    """Waits until somebody listens where process 0 should be."""
    host, _, port = place.coordinator.rpartition(":")
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
                return
        except OSError as error:
            why = error.strerror or str(error)
        if time.monotonic() >= deadline:
            raise RendezvousError(
                f"process {place.process} of {place.processes} waited {timeout:g} s for process 0 at "
                f"{place.coordinator} in vain ({why}). Check that process 0 runs, that this is its address as this "
                "machine can reach it (no firewall between, the port the same for all), and that it has process_id 0"
            )
        time.sleep(min(1.0, max(deadline - time.monotonic(), 0.05)))


def _give_up(place: Place, timeout: float) -> None:
    if not place.coordinator:
        said = f"waited {timeout:g} s, and not all of the processes that {place.how} knows of have come"
    elif place.process == 0:
        others = ", ".join(map(str, range(1, min(place.processes, 4)))) + (", ..." if place.processes > 4 else "")
        said = f"process 0 waited {timeout:g} s at {place.coordinator} for process {others}, and not all have come"
    else:
        said = f"process {place.process} reached {place.coordinator}, but others have not come within {timeout:g} s"
    count = f" ({place.processes})" if place.processes else ""
    say_last(
        f"multitap: {said}. Check that NUM_PROCESSES{count} is what was really started, that no two have one "
        "PROCESS_ID, that all were given one coordinator and reach its address and port, and the logs of the others"
    )
    os._exit(RendezvousError.exit_code)


def leave(code: int, error: BaseException | None = None, explained: bool = True) -> int:
    """The exit code of a process that failed; one of several ends here, at once, and the others with it.

    They may wait for it in a collective, so it must not wait for them, as JAX would at a regular exit.

    Args:
      code: of the exit; `LOST` is put in its place where the error is but the echo of another process's end.
      error: what went wrong.
      explained: whether the user was told; otherwise its traceback is printed, since nobody will be there to do it.
    """
    if not jax.distributed.is_initialized():
        return code
    name = f"process {jax.process_index()} of {jax.process_count()}"
    if (echo := _echo_of_another(error)) is not None:
        first = str(echo).partition("\n")[0]
        code, why = LOST, f"{name} lost another process, whose log says why that one ended ({first})"
    else:
        why = f"{name} failed, and the run with it" + (", of what is said above; mend it first" if explained else "")
        if error is not None and not explained:
            traceback.print_exception(error)
    say_last(f"multitap: {why}. The same command, given to all, goes on where the run was saved")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _echo_of_another(error: BaseException | None) -> BaseException | None:
    """The error, or one that it arose from, by which JAX or we tell that another process ended; None without one.

    What ends a process may be the second error: saving what it has fails too when the others are gone. Where a program
    failed already while it was being started, jaxlib gives XLA's status as a ValueError.
    """
    while error is not None:
        of_jax = isinstance(error, jax.errors.JaxRuntimeError) or (
            isinstance(error, ValueError) and _STATUS.match(str(error))
        )
        if isinstance(error, OtherProcessError) or (of_jax and _OF_ANOTHER.search(str(error))):
            return error
        error = error.__cause__ or error.__context__
    return None


def is_main_process() -> bool:
    """Whether this process writes files and prints."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def from_main(value: Any) -> Any:
    """What process 0 gives, on every process; anything JSON. Collective."""
    if jax.process_count() == 1:
        return value
    return json.loads(_broadcast(json.dumps(value).encode(), source=0))


def from_each_process(content: bytes) -> list[bytes]:
    """What each process gives, on every process, in the order of the processes. Collective; one at a time travels."""
    return [_broadcast(content, source=process) for process in range(jax.process_count())]


def agree(values: Mapping[str, Any]) -> None:
    """Refuses to go on where processes were given different things, or see different files. Collective.

    Args:
      values: what must be the same in all processes, as JSON by name.

    Raises:
      ValueError: in all processes; names what differs, and who has what.
    """
    if jax.process_count() == 1:
        return
    content = json.dumps(values, sort_keys=True).encode()
    digests = multihost_utils.process_allgather(np.frombuffer(hashlib.sha256(content).digest(), np.uint8))
    if (digests == digests[0]).all():
        return
    said = [json.loads(part) for part in from_each_process(content)]
    lines = []
    for name in sorted({name for one in said for name in one}):
        found = [one.get(name) for one in said]
        other = next((index for index, value in enumerate(found) if value != found[0]), None)
        if other is not None:
            lines.append(f"{name}: process 0 has {found[0]!r}, process {other} has {found[other]!r}")
    raise ValueError(
        "the processes of this run do not agree on\n  "
        + "\n  ".join(lines)
        + "\ngive all of them the same command, and let all of them see the same files"
    )


def any_has(news: bool) -> bool:
    """Whether any process has something to tell. Collective, and cheap."""
    if jax.process_count() == 1:
        return news
    return bool(multihost_utils.process_allgather(np.array([news], np.int32)).any())


def divided(items: Sequence[Item], work: Callable[[Sequence[Item]], list[Any]]) -> list[Any]:
    """work(items), of which each process does a share; one JSON result an item. Collective."""
    index, count = jax.process_index(), jax.process_count()
    if count == 1:
        return work(items)
    parts = [json.loads(part) for part in from_each_process(json.dumps(work(items[index::count])).encode())]
    return [parts[place % count][place // count] for place in range(len(items))]


def all_or_none(work: Callable[[], Result]) -> Result:
    """work(), which each process does on its own, at about the pace of the others. Collective.

    An error in one would leave the others waiting for it in their next collective; here it ends all of them.

    Raises:
      OtherProcessError: work failed elsewhere. Where it failed here, its own error.
    """
    if jax.process_count() == 1:
        return work()
    failure, result = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    told = json.dumps(None if failure is None else f"{type(failure).__name__}: {failure}").encode()
    said = [json.loads(part) for part in from_each_process(told)]
    if failure is not None:
        raise failure
    for process, what in enumerate(said):
        if what is not None:
            raise OtherProcessError(f"process {process} of {len(said)} failed ({what}), and the run with it")
    return cast(Result, result)


def _broadcast(content: bytes, source: int) -> bytes:
    if jax.process_count() == 1:
        return content
    mine = jax.process_index() == source
    size = int(multihost_utils.broadcast_one_to_all(np.array([len(content)], np.int32), is_source=mine)[0])
    own = np.frombuffer(content, np.uint8) if mine else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(own, is_source=mine)).astype(np.uint8).tobytes()


def sum_over_processes(value: np.ndarray, shared: bool) -> np.ndarray:
    """The float64 sum of an array over all processes, the same bits on each. Collective where `shared`."""
    if not shared:
        return value
    parts = multihost_utils.process_allgather(np.ascontiguousarray(value, np.float64).view(np.uint32))
    return np.asarray(parts).view(np.float64).sum(0).reshape(value.shape)


def whole(x: jax.Array) -> np.ndarray:
    """An array on the host of every process, wherever its parts are. Collective where they are elsewhere."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def wait_until(done: Callable[[], bool], progress: Callable[[], Any] = lambda: None, pause: float = 0.1) -> None:
    """Looks again and again until what other processes do is done; each change of `progress` is one.

    For waits that may be long: a collective would hold the devices, and give up after its own time.
    """
    before = progress()
    while not done():
        time.sleep(pause)
        if (now := progress()) != before:
            before = now
            watchdog.beat("waiting for the other processes")
