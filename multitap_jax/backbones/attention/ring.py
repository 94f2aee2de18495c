"""Attention of rows that are spread over the mesh axis `context`: keys and values travel round the ring of devices.

Each device holds a stretch of every row. In turn it attends to its own stretch of keys and values and to those that its
neighbours hand on, and joins the parts (Liu et al., arXiv 2310.01889); in the backward pass the gradients of keys and
values travel with them, and come home after a whole turn. Within a stretch memory is linear (`blockwise`), and blocks
that nobody sees are left out, so a stretch that lies behind all queries costs its journey alone. Must run under
`jax.shard_map` (`placement.py`).
"""

import functools
from typing import Any

import jax

from multitap_jax.backbones.attention import blockwise
from multitap_jax.backbones.attention.blockwise import Prepared
from multitap_jax.backbones.attention.partial import Part, join, nothing
from multitap_jax.backbones.attention.rule import Keys, Queries, Visibility

AXIS = "context"


def prepare(queries: Queries, keys: Keys) -> Prepared:
    """Nothing besides what the rule asks: columns count over the whole row, wherever a stretch lies."""
    return blockwise.prepare(queries, keys)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility) -> jax.Array:
    """[B, Sq, G, Q, D] from this device's queries [B, Sq, G, Q, D], keys and values [B, Sk, G, D]."""
    setup = visibility.setup
    assert setup.mesh is not None
    return _attend(setup.platform == "cpu", setup.mesh.shape[AXIS], q, k, v, visibility.prepared)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(serial: bool, size: int, q: jax.Array, k: jax.Array, v: jax.Array, prepared: Prepared) -> jax.Array:
    return _attend_fwd(serial, size, q, k, v, prepared)[0]


def _attend_fwd(
    serial: bool, size: int, q: jax.Array, k: jax.Array, v: jax.Array, prepared: Prepared
) -> tuple[jax.Array, Any]:
    queries, keys = prepared
    part = functools.partial(blockwise.forward, serial, q)

    def turn(state: tuple[Part, Any], _: None) -> tuple[tuple[Part, Any], None]:
        found, (k, v, keys) = state
        coming = _hand_on((k, v, keys), size)  # before the products, so that it may travel behind them
        return (join(found, part(k, v, Prepared(queries, keys))), coming), None

    (found, (k_last, v_last, keys_last)), _ = jax.lax.scan(turn, (nothing(q), (k, v, keys)), length=size - 1)
    found = join(found, part(k_last, v_last, Prepared(queries, keys_last)))
    out = found.out.astype(q.dtype)
    return out, (q, k, v, prepared, out, found.lse)


def _attend_bwd(serial: bool, size: int, kept: Any, given: jax.Array) -> tuple[Any, ...]:
    q, k, v, (queries, keys), out, lse = kept
    lowered = blockwise.correction(out, given)

    def turn(state: Any, _: None) -> tuple[Any, None]:
        dq, travelling = state
        k, v, keys, dk, dv = travelling
        found = blockwise.backward(serial, q, k, v, Prepared(queries, keys), lse, given, lowered)
        return (dq + found[0], _hand_on((k, v, keys, dk + found[1], dv + found[2]), size)), None

    zeros = lambda x: nothing(x).out
    (dq, (_, _, _, dk, dv)), _ = jax.lax.scan(turn, (zeros(q), (k, v, keys, zeros(k), zeros(v))), length=size)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _hand_on(tree: Any, size: int) -> Any:
    """What the device before this one on the ring holds."""
    pairs = [(device, (device + 1) % size) for device in range(size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, pairs), tree)
