"""Branches, divergence, votes, shuffles, elections, and memory instructions of single threads."""

from __future__ import annotations

import pytest
import torch

from cute_sparse import emulator
from tests.emulator.lanes import apply

I32, I64 = torch.int32, torch.int64
LANE = torch.arange(32, dtype=I32)


def test_lanes_that_branch_apart_meet_again(run):
    out = apply(
        run,
        """setp.lt.s32 %p1, {0}, 16; mov.b32 {d}, 0; @%p1 bra LOW;
        add.s32 {d}, {d}, 100; bra JOIN;
        LOW: add.s32 {d}, {d}, 1;
        JOIN: bar.warp.sync -1; vote.sync.ballot.b32 %r9, %p1, -1; add.s32 {d}, {d}, %r9;""",
        LANE,
        result=I32,
    )
    assert out.tolist() == [0xFFFF + 1] * 16 + [0xFFFF + 100] * 16


def test_a_loop_runs_each_lane_its_own_number_of_times(run):
    body = "mov.b32 {d}, 0; mov.b32 %r8, 0; LOOP: add.s32 {d}, {d}, %r8; add.s32 %r8, %r8, 1; setp.le.s32 %p1, %r8, {0}; @%p1 bra LOOP;"
    assert apply(run, body, LANE, result=I32).tolist() == [n * (n + 1) // 2 for n in range(32)]


@pytest.mark.parametrize(
    "mode, b, c, expected",
    [  # PTX ISA 9.7.9.6
        ("bfly", 1, 0x1F, lambda l: l ^ 1),
        ("idx", 5, 0x1F, lambda l: 5),
        ("idx", 2, 0x181F, lambda l: (l & 0x18) | 2),  # segments of 8 lanes
        ("up", 1, 0x0, lambda l: max(l - 1, 0)),
        ("down", 3, 0x1F, lambda l: l + 3 if l + 3 < 32 else l),
        ("down", 3, 0x1807, lambda l: l + 3 if (l & 7) + 3 < 8 else l),
    ],
)
def test_shuffle(run, mode, b, c, expected):
    out = apply(run, f"shfl.sync.{mode}.b32 {{d}}, {{0}}, {b}, {c}, -1;", LANE, result=I32)
    assert out.tolist() == [expected(lane) for lane in range(32)]


def test_shuffle_predicate_tells_who_was_in_range(run):
    body = "shfl.sync.up.b32 %r9|%p1, {0}, 4, 0, -1; selp.b32 {d}, 1, 0, %p1;"
    assert apply(run, body, LANE, result=I32).tolist() == [0] * 4 + [1] * 28


def test_one_lane_is_elected(run):
    out = apply(run, "elect.sync %r9|%p1, -1; selp.b32 {d}, 1, 0, %p1;", LANE, result=I32)
    assert out.tolist() == [1] + [0] * 31


@pytest.mark.parametrize("mode, expected", [("all", 0), ("any", 1), ("uni", 0)])
def test_vote(run, mode, expected):
    body = f"setp.lt.s32 %p1, {{0}}, 3; vote.sync.{mode}.pred %p2, %p1, -1; selp.b32 {{d}}, 1, 0, %p2;"
    assert apply(run, body, LANE, result=I32).tolist() == [expected] * 32


@pytest.mark.parametrize("op, expected", [("add.u32", 496), ("max.s32", 31), ("min.u32", 0), ("or.b32", 31)])
def test_redux(run, op, expected):
    assert apply(run, f"redux.sync.{op} {{d}}, {{0}}, -1;", LANE, result=I32).tolist() == [expected] * 32


def test_lanes_that_can_never_meet_are_reported(run):
    body = "mov.u32 %r1, %laneid; setp.lt.u32 %p1, %r1, 4; @%p1 bra SKIP; bar.warp.sync 0xffffffff; SKIP: bar.warp.sync 0xffffffff;"
    with pytest.raises(emulator.errors.EmulatorError):
        run(body, registers=".reg .b32 %r<4>; .reg .pred %p<2>;")


def test_trap_is_reported_with_its_place(run):
    with pytest.raises(emulator.errors.EmulatorError, match="trap") as caught:
        run("mov.u32 %r1, %tid.x; setp.eq.u32 %p1, %r1, 37; @%p1 trap;", block=64, registers=".reg .b32 %r<4>; .reg .pred %p<2>;")
    assert caught.value.warp == 1


def test_vectors_and_narrow_types_load_and_store(run):
    out, source = torch.zeros(8, dtype=torch.uint8), torch.arange(250, 258, dtype=I64).to(torch.uint8)
    body = """ld.param.b64 %d1, [p0]; ld.param.b64 %d2, [p1];
    mov.u32 %r1, %laneid; setp.ne.u32 %p1, %r1, 0; @%p1 ret;
    ld.global.v2.u8 {%h1, %h2}, [%d1]; ld.global.s8 %r3, [%d1+3]; ld.global.b16 %h3, [%d1+6];
    st.global.v2.b8 [%d2], {%h2, %h1}; st.global.b16 [%d2+2], %h3; st.global.b32 [%d2+4], %r3;"""
    run(body, [source, out], parameters=".param .u64 p0, .param .u64 p1",
        registers=".reg .b64 %d<3>; .reg .b32 %r<4>; .reg .b16 %h<4>; .reg .pred %p<2>;")  # fmt: skip
    assert out.tolist() == [251, 250, 0, 1, 253, 255, 255, 255]


@pytest.mark.parametrize(
    "instruction, start, expected",
    [
        ("red.global.add.u32 [%d1], 2;", 5, 5 + 64),
        ("atom.global.max.s32 %r9, [%d1], %r1;", -3, 31),
        ("atom.global.cas.b32 %r9, [%d1], 7, 9;", 7, 9),
        ("atom.global.exch.b32 %r9, [%d1], 4;", 1, 4),
        ("atom.global.inc.u32 %r9, [%d1], 9;", 0, 2),  # wraps to 0 above 9: 32 increments from 0 in steps of 10
    ],
)
def test_atomics_apply_to_every_lane(run, instruction, start, expected):
    cell = torch.tensor([start], dtype=I32)
    run(f"ld.param.b64 %d1, [p0]; mov.u32 %r1, %laneid; {instruction}", [cell], parameters=".param .u64 p0",
        registers=".reg .b64 %d<3>; .reg .b32 %r<10>;")  # fmt: skip
    assert cell.item() == expected


def test_access_outside_a_tensor_names_it(run, device):
    x = torch.zeros(4, dtype=I32)
    device.register(x, name="scores")
    with pytest.raises(emulator.errors.OutOfBounds, match="scores"):
        run("ld.param.b64 %d1, [p0]; ld.global.b32 %r1, [%d1+16];", [x], parameters=".param .u64 p0",
            registers=".reg .b64 %d<3>; .reg .b32 %r<10>;")  # fmt: skip


def test_a_misaligned_access_is_an_error(run):
    x = torch.zeros(4, dtype=I32)
    with pytest.raises(emulator.errors.Misaligned):
        run("ld.param.b64 %d1, [p0]; ld.global.b32 %r1, [%d1+2];", [x], parameters=".param .u64 p0",
            registers=".reg .b64 %d<3>; .reg .b32 %r<10>;")  # fmt: skip


def test_instructions_are_counted_by_opcode(run, device):
    launch = run("mov.b32 %r1, 1; setp.eq.s32 %p1, %r1, 2; @%p1 add.s32 %r1, %r1, 1; add.s32 %r1, %r1, 1;", block=64, grid=3,
                 registers=".reg .b32 %r<4>; .reg .pred %p<2>;")  # fmt: skip
    assert launch.counts.warp_instructions == 5 * 2 * 3


def test_parameters_are_read_at_their_offsets(run):
    out = torch.zeros(3, dtype=I32)
    body = """ld.param.b64 %d1, [p0]; ld.param.v2.b32 {%r1, %r2}, [s+4]; ld.param.b8 %h1, [s+13]; cvt.u32.u16 %r3, %h1;
    st.global.b32 [%d1], %r1; st.global.b32 [%d1+4], %r2; st.global.b32 [%d1+8], %r3;"""
    run(body, [out, bytes(range(16))], parameters=".param .u64 p0, .param .align 8 .b8 s[16]", block=1,
        registers=".reg .b64 %d<3>; .reg .b32 %r<4>; .reg .b16 %h<2>;")  # fmt: skip
    assert out.tolist() == [0x07060504, 0x0B0A0908, 13]
