"""Costs read from a program's text, against programs whose costs are known."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from multitap_jax.config import MeshConfig
from multitap_jax.parallel.mesh import make_mesh
from multitap_jax.planning.cost import Cost, cost, first_group
from multitap_jax.planning.hlo import Array, arrays, parse

MESH = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def cost_of(function, *shapes, devices=1) -> Cost:
    return cost(parse(jax.jit(function).lower(*shapes).compile().as_text()), devices)


def f32(*shape, spec=None):
    sharding = None if spec is None else NamedSharding(MESH, P(*spec))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def test_a_product_counts_twice_its_multiplications():
    assert cost_of(lambda a, b: a @ b, f32(512, 384), f32(384, 640)).flops == 2 * 512 * 384 * 640
    batched = cost_of(lambda a, b: jnp.einsum("bik,bkj->bij", a, b), f32(3, 64, 32), f32(3, 32, 16))
    assert batched.flops == 2 * 3 * 64 * 32 * 16


def test_the_body_of_a_loop_counts_as_often_as_it_runs():
    def layers(x, weights):
        inner = lambda x, w: (jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=3)[0], None)
        return jax.lax.scan(inner, x, weights)[0]

    assert cost_of(layers, f32(16, 128), f32(7, 128, 128)).flops == 7 * 3 * 2 * 16 * 128 * 128


def test_of_the_branches_of_a_conditional_the_dearer_counts():
    def layers(x, weights):
        wide = lambda x, w: x @ w @ w.T
        step = lambda x, part: (jax.lax.cond(part[0], wide, lambda x, w: x * w[0, 0], x, part[1]), None)
        return jax.lax.scan(step, x, (jnp.arange(5) == 4, weights))[0]

    assert cost_of(layers, f32(16, 128), f32(5, 128, 64)).flops == 5 * 2 * 2 * 16 * 128 * 64


def test_memory_traffic_of_simple_operations():
    n = 2**16
    assert cost_of(lambda x, y: jnp.tanh(x) * y + 1, f32(n), f32(n)).memory_bytes == 3 * 4 * n
    read = cost_of(lambda x, i: jax.lax.dynamic_index_in_dim(x, i, keepdims=False) * 2, f32(100, n), jnp.int32(3))
    assert 2 * 4 * n <= read.memory_bytes < 3 * 4 * n  # one row of a hundred


@pytest.mark.parametrize(
    ("kind", "function", "sent"),
    [
        ("all-reduce", lambda x: jax.lax.psum(x, "fsdp"), 2 * (1 / 2) * 1024),
        ("all-reduce", lambda x: jax.lax.psum(x, ("data", "fsdp", "tensor")), 2 * (7 / 8) * 1024),
        ("all-gather", lambda x: jax.lax.all_gather(x, ("data", "tensor")), (3 / 4) * 4 * 1024),
        ("all-to-all", lambda x: jax.lax.all_to_all(x, "tensor", 0, 0, tiled=True), (1 / 2) * 1024),
        ("collective-permute", lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]), 1024),
        ("reduce-scatter", lambda x: jax.lax.psum_scatter(x, "tensor", tiled=True), (1 / 2) * 1024),
    ],
)
def test_bytes_that_collectives_send(kind, function, sent):
    program = jax.shard_map(function, mesh=MESH, in_specs=P(None), out_specs=P(None), check_vma=False)
    found = cost_of(program, f32(256), devices=8).collectives
    assert [item.kind for item in found] == [kind]
    assert found[0].sent == sent


def test_a_collective_in_a_loop_counts_as_often_as_it_runs():
    def layers(x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(jax.lax.psum(x, "tensor")), None), x, None, length=5)[0]

    program = jax.shard_map(layers, mesh=MESH, in_specs=P(None), out_specs=P(None), check_vma=False)
    (found,) = cost_of(program, f32(256), devices=8).collectives
    assert (found.runs, found.payload, found.sent) == (5, 1024, 5 * 1024)


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[4,2]<=[8]", (0, 1)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", (0, 4)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", (0, 1, 2, 3)),
        ("source_target_pairs={{0,3},{3,0}}", (0, 3)),
        ("replica_groups={}", tuple(range(8))),
    ],
)
def test_groups_in_every_notation(text, group):
    line = f"  ROOT %r = f32[4]{{0}} all-reduce(%p), channel_id=1, {text}, to_apply=%add"
    module = parse(f"ENTRY %main (p: f32[4]) -> f32[4] {{\n  %p = f32[4]{{0}} parameter(0)\n{line}\n}}\n")
    assert first_group(module.computations["main"].root, 8) == group


def test_groups_in_a_new_notation_are_no_guess():
    line = "  ROOT %r = f32[4]{0} all-reduce(%p), channel_id=1, replica_groups=<0..7>, to_apply=%add"
    module = parse(f"ENTRY %main (p: f32[4]) -> f32[4] {{\n  %p = f32[4]{{0}} parameter(0)\n{line}\n}}\n")
    with pytest.raises(ValueError, match=r"r: replica_groups=<0\.\.7> is written in a way"):
        first_group(module.computations["main"].root, 8)


def test_types_of_a_tpu_program():
    text = "(bf16[1,56,3584]{2,1,0:T(8,128)(2,1)S(1)}, /*index=1*/s32[2]{0:S(4)}, pred[], f8e4m3fn[8]{0}, s4[3]{0})"
    found = arrays(text)
    assert found[0] == Array("bf16", (1, 56, 3584), 1)
    assert [array.bytes for array in found] == [2 * 56 * 3584, 8, 1, 8, 2]


def test_a_sum_and_a_slice_are_a_reduce_scatter():
    module = parse("""
%all-reduce-scatter.1 (p: f32[8,64]) -> f32[1,64] {
  %p = f32[8,64]{1,0} parameter(0)
  %r = f32[8,64]{1,0} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %i = u32[] partition-id()
  %z = u32[] constant(0)
  ROOT %s = f32[1,64]{1,0} dynamic-slice(%r, %i, %z), dynamic_slice_sizes={1,64}
}
ENTRY %main (p: f32[8,64]) -> f32[1,64] {
  %p = f32[8,64]{1,0} parameter(0)
  ROOT %f = f32[1,64]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}
""")
    (found,) = cost(module, 8).collectives
    assert (found.kind, found.payload, found.sent) == ("reduce-scatter", 4 * 64, 7 * 4 * 64)


# What the compiler for TPUs writes and that for CPUs does not, cut down: batched products as convolutions with holes,
# a loop unrolled twice without a note of its rounds, a gather in two parts, arrays in the memory on the chip (S(1)).
TPU = """
%start.1 (a: bf16[8,64]) -> (bf16[8,64], bf16[64,64]) {
  %a = bf16[8,64]{1,0} parameter(0)
  %g.1 = bf16[64,64]{1,0} all-gather(%a), channel_id=7, replica_groups=mesh['x'=8] {'x'}, dimensions={0}
  ROOT %c = (bf16[8,64]{1,0}, bf16[64,64]{1,0}) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}
%hidden.1 (a: bf16[8,64], b: bf16[64,64], q: f32[16,100,80], k: f32[16,100,80]) -> (f32[16,100,100], bf16[64,64]) {
  %a = bf16[8,64]{1,0} parameter(0)
  %b = bf16[64,64]{1,0} parameter(1)
  %q = f32[16,100,80]{2,1,0} parameter(2)
  %k = f32[16,100,80]{2,1,0} parameter(3)
  %g.2 = bf16[64,64]{1,0} all-gather(%a), channel_id=7, replica_groups=mesh['x'=8] {'x'}, dimensions={0}
  %s = f32[16,100,100]{2,1,0} convolution(%q, %k), window={size=16 stride=15 lhs_dilate=16}, dim_labels=0bf_0oi->0bf
  ROOT %t = (f32[16,100,100]{2,1,0}, bf16[64,64]{1,0}) tuple(%s, %g.2)
}
%body (p: (s32[], bf16[8,64], f32[16,100,80])) -> (s32[], bf16[8,64], f32[16,100,80]) {
  %p = (s32[], bf16[8,64]{1,0}, f32[16,100,80]{2,1,0:S(1)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[8,64]{1,0} get-tuple-element(%p), index=1
  %y = f32[16,100,80]{2,1,0:S(1)} get-tuple-element(%p), index=2
  %f.1 = (bf16[8,64]{1,0}, bf16[64,64]{1,0}) fusion(%x), kind=kCustom, calls=%start.1
  %w = bf16[64,64]{1,0} get-tuple-element(%f.1), index=1
  %f.2 = (f32[16,100,100]{2,1,0:S(1)}, bf16[64,64]{1,0}) fusion(%x, %w, %y, %y), ALIASED, calls=%hidden.1
  %one = s32[] constant(1)
  %i.1 = s32[] add(%i, %one)
  %i.2 = s32[] add(%i.1, %one)
  ROOT %r = (s32[], bf16[8,64]{1,0}, f32[16,100,80]{2,1,0:S(1)}) tuple(%i.2, %x, %y)
}
%cond (p: (s32[], bf16[8,64], f32[16,100,80])) -> pred[] {
  %p = (s32[], bf16[8,64]{1,0}, f32[16,100,80]{2,1,0:S(1)}) parameter(0)
  %n = s32[] constant(28)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
ENTRY %main (p: (s32[], bf16[8,64], f32[16,100,80])) -> (s32[], bf16[8,64], f32[16,100,80]) {
  %p = (s32[], bf16[8,64]{1,0}, f32[16,100,80]{2,1,0:S(1)}) parameter(0)
  ROOT %while = (s32[], bf16[8,64]{1,0}, f32[16,100,80]{2,1,0:S(1)}) while(%p), condition=%cond, body=%body
}
""".replace("ALIASED", "kind=kOutput, output_to_operand_aliasing={{1}: (1, {})}")


def test_the_text_of_a_tpu_program():
    module = parse(TPU)
    assert module.runs["hidden.1"] == 14
    found = cost(module, 8)
    assert found.flops == 14 * 2 * 16 * 100 * 100 * 80
    (gather,) = found.collectives
    assert (gather.runs, gather.payload, len(gather.devices)) == (14, 2 * 64 * 64, 8)
    start, hidden = 2 * (2 * 8 * 64 + 64 * 64), 2 * 8 * 64  # the second part reads what it gathers from
    counting = 2 * 12 + 9  # two additions and a comparison of four bytes each
    assert found.memory_bytes == 14 * (start + hidden + counting)


def test_a_program_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("HloModule nothing")


def test_nothing_is_lost_between_mesh_and_program():
    """Each device's share of a sharded product is an eighth."""
    matmul = functools.partial(jnp.einsum, "ij,jk->ik")
    whole = cost_of(matmul, f32(512, 256), f32(256, 512)).flops
    shared = cost_of(matmul, f32(512, 256, spec=(("data", "fsdp"),)), f32(256, 512, spec=(None, "tensor")), devices=8)
    assert shared.flops == whole / 8
