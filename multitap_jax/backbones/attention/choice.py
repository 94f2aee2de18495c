"""The backends there are, and which one "auto" takes."""

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

from multitap_jax.backbones.attention.rule import Keys, Queries, Setup, UnsupportedAttentionError, Visibility

AUTO = "auto"
# One module each, imported when it is first used: kernels for accelerators are slow to import.
BACKENDS = ("dense", "chunked", "blockwise", "cudnn", "splash", "ring")
# Queries from which "auto" leaves dense attention: below, a loop costs more than the cache saves (measured on a CPU).
LOOP_FROM = 512
# Pairs of a row up to which "auto" takes what keeps a whole mask, or scores of a chunk against all keys, in memory; and
# up to which it takes what keeps all scores, on accelerators in single precision, which their kernels do not take.
MASKED_UP_TO = 8192**2
DENSE_UP_TO = 2048**2


class Backend(Protocol):
    """A module of this package; `prepared` is any tree of arrays with leading rows."""

    prepare: Callable[[Queries, Keys], Any]
    attend: Callable[[jax.Array, jax.Array, jax.Array, Visibility], jax.Array]


def backend(name: str) -> Backend:
    """The module of this name."""
    return importlib.import_module(f"{__package__}.{name}")


def check_backend(name: str) -> None:
    """Raises UnsupportedAttentionError unless the name is known."""
    if name not in (AUTO, *BACKENDS):
        known = ", ".join((AUTO, *BACKENDS))
        raise UnsupportedAttentionError(f"attention = {name!r} is no backend; known: {known}")


def choose(setup: Setup, queries: int, keys: int, *, spread_keys: bool, causal: bool) -> str:
    """The name of the backend for rows of so many queries and keys.

    What a backend for accelerators cannot compute, it says itself, when it sees types and sizes of heads. `ring` and
    backends for one device are asked for by rows: where a row does not lie along `context`, or its keys do not, "ring"
    means "auto"; where both do, nothing but "ring" and "dense", which the compiler shares out, can honour the rule.

    Raises:
      UnsupportedAttentionError: there is no such backend, or it cannot compute rows that are spread over devices.
    """
    check_backend(setup.backend)
    spread = setup.along_context and spread_keys
    if setup.backend == AUTO or (setup.backend == "ring" and not spread):
        name = "ring" if spread else _fastest(setup, queries, keys, causal)
        if setup.backend == AUTO:
            _log(name, setup.platform, setup.dtype, queries, keys, spread)
        return name
    if spread and setup.backend not in ("ring", "dense"):
        raise UnsupportedAttentionError(
            f"attention = {setup.backend!r} cannot compute rows that are spread over config.mesh.context = "
            f"{setup.mesh.shape['context'] if setup.mesh else 1} devices; use 'ring', or 'auto'"
        )
    return setup.backend


def _fastest(setup: Setup, queries: int, keys: int, causal: bool) -> str:
    if queries < LOOP_FROM:
        return "dense"
    pairs = queries * keys
    if setup.platform == "cpu":
        return "chunked" if pairs <= MASKED_UP_TO and not causal else "blockwise"
    if setup.dtype == "float32":
        return "dense" if pairs <= DENSE_UP_TO else "blockwise"
    if pairs > MASKED_UP_TO:
        return "blockwise"
    return "splash" if setup.platform == "tpu" else "cudnn"


@functools.cache
def _log(name: str, platform: str, dtype: str, queries: int, keys: int, spread: bool) -> None:
    """Once for each choice that differs."""
    logging.getLogger(__name__).info(
        "attention=auto: %s for %d queries and %d keys a row, %s on %s%s",
        *(name, queries, keys, dtype, platform, ", spread over devices" if spread else ""),
    )


def backend_elsewhere(name: str, platforms: Sequence[str]) -> str:
    """The backend to trace with for other platforms than the one at hand, on whose name "auto" depends.

    Dense attention runs everywhere.
    """
    return "dense" if name == AUTO and tuple(platforms) != (jax.default_backend(),) else name
