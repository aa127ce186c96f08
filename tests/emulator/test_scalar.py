"""Integer, logic, comparison, floating-point and conversion instructions against values from the PTX ISA."""

from __future__ import annotations

import math
import struct

import pytest
import torch

from cute_sparse import emulator
from tests.emulator.lanes import apply

I16, I32, I64 = torch.int16, torch.int32, torch.int64


def lanes(values: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Bit patterns, repeated to 32 lanes."""
    bits = 8 * torch.empty(0, dtype=dtype).element_size()
    signed = [v - (1 << bits) if v >= 1 << (bits - 1) else v for v in (v & (1 << bits) - 1 for v in values)]
    return torch.tensor((signed * 32)[:32], dtype=dtype)


def pattern(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


def check(run, instruction, sources, expected, result):
    """sources: [(values, dtype), ...]; expected: bit patterns of the lanes."""
    got = apply(run, instruction, *(lanes(values, dtype) for values, dtype in sources), result=result)
    want = lanes(expected, result)
    assert torch.equal(got, want), [(hex(int(g)), hex(int(w))) for g, w in zip(got, want, strict=True) if g != w]


M = 0xFFFFFFFF
INTEGER = [  # instruction, sources, expected, result type
    ("add.s32 {d}, {0}, {1};", [([M, 0x7FFFFFFF], I32), ([1, 1], I32)], [0, 0x80000000], I32),
    ("add.s64 {d}, {0}, {1};", [([M], I64), ([1], I64)], [1 << 32], I64),
    ("add.s16 {d}, {0}, {1};", [([0xFFFF], I16), ([2], I16)], [1], I16),
    ("sub.s32 {d}, {0}, {1};", [([3], I32), ([5], I32)], [M - 1], I32),
    ("mul.lo.s32 {d}, {0}, {1};", [([0x10001], I32), ([0x10001], I32)], [0x20001], I32),
    ("mul.hi.u32 {d}, {0}, {1};", [([M], I32), ([M], I32)], [0xFFFFFFFE], I32),
    ("mul.hi.s32 {d}, {0}, {1};", [([M], I32), ([5], I32)], [M], I32),
    ("mul.wide.s32 {d}, {0}, {1};", [([M], I32), ([7], I32)], [-7], I64),
    ("mul.wide.u16 {d}, {0}, {1};", [([0xFFFF], I16), ([0xFFFF], I16)], [0xFFFE0001], I32),
    ("mul.wide.s16 {d}, {0}, {1};", [([0xFFFF], I16), ([3], I16)], [-3], I32),
    ("mad.lo.s32 {d}, {0}, {1}, {2};", [([3], I32), ([M], I32), ([10], I32)], [7], I32),
    ("mad.wide.u32 {d}, {0}, {1}, {2};", [([M], I32), ([M], I32), ([M], I64)], [0xFFFFFFFF00000000], I64),
    ("div.s32 {d}, {0}, {1};", [([-7, 7], I32), ([2, -2], I32)], [-3, -3], I32),
    ("rem.s32 {d}, {0}, {1};", [([-7, 7], I32), ([2, -2], I32)], [-1, 1], I32),
    ("div.u32 {d}, {0}, {1};", [([M], I32), ([2], I32)], [0x7FFFFFFF], I32),
    ("min.s32 {d}, {0}, {1};", [([M], I32), ([1], I32)], [M], I32),
    ("min.u32 {d}, {0}, {1};", [([M], I32), ([1], I32)], [1], I32),
    ("max.relu.s32 {d}, {0}, {1};", [([-5, -5], I32), ([-3, 4], I32)], [0, 4], I32),
    ("abs.s32 {d}, {0};", [([-5, 5], I32)], [5, 5], I32),
    ("neg.s32 {d}, {0};", [([5], I32)], [-5], I32),
    ("and.b32 {d}, {0}, {1};", [([0xF0F0], I32), ([0xFF00], I32)], [0xF000], I32),
    ("xor.b32 {d}, {0}, {1};", [([0xF0F0], I32), ([0xFF00], I32)], [0x0FF0], I32),
    ("or.b64 {d}, {0}, {1};", [([1 << 40], I64), ([1], I64)], [1 << 40 | 1], I64),
    ("not.b32 {d}, {0};", [([0], I32)], [M], I32),
    ("lop3.b32 {d}, {0}, {1}, {2}, 0xE8;", [([0xF0], I32), ([0xCC], I32), ([0xAA], I32)], [0xE8], I32),  # majority
    ("shl.b32 {d}, {0}, {1};", [([1, 1, 1], I32), ([31, 32, 99], I32)], [1 << 31, 0, 0], I32),
    ("shr.s32 {d}, {0}, {1};", [([-8, -8], I32), ([1, 40], I32)], [-4, -1], I32),
    ("shr.u32 {d}, {0}, {1};", [([M, M], I32), ([4, 40], I32)], [0x0FFFFFFF, 0], I32),
    ("shr.s16 {d}, {0}, 3;", [([0x8000], I16)], [0xF000], I16),
    ("shf.l.wrap.b32 {d}, {0}, {1}, {2};", [([0x80000000], I32), ([1], I32), ([1], I32)], [3], I32),
    ("shf.r.clamp.b32 {d}, {0}, {1}, {2};", [([0], I32), ([5], I32), ([40], I32)], [5], I32),
    ("popc.b32 {d}, {0};", [([0xF00F], I32)], [8], I32),
    ("clz.b32 {d}, {0};", [([0, 1, M], I32)], [32, 31, 0], I32),
    ("bfind.u32 {d}, {0};", [([0, 1, 0x80], I32)], [M, 0, 7], I32),
    ("brev.b32 {d}, {0};", [([1], I32)], [1 << 31], I32),
    ("bfe.u32 {d}, {0}, 4, 8;", [([0xABCD], I32)], [0xBC], I32),
    ("bfe.s32 {d}, {0}, 4, 4;", [([0xF0], I32)], [-1], I32),
    ("bfi.b32 {d}, {0}, {1}, 8, 4;", [([0xA], I32), ([M], I32)], [0xFFFFFAFF], I32),
    ("prmt.b32 {d}, {0}, {1}, {2};", [([0x33221100], I32), ([0x77665544], I32), ([0x7531], I32)], [0x77553311], I32),
    ("prmt.b32 {d}, {0}, {1}, {2};", [([0x00000080], I32), ([0], I32), ([0x8888], I32)], [M], I32),  # sign copies
    ("dp4a.s32.s32 {d}, {0}, {1}, {2};", [([0x01FF0203], I32), ([0x01010101], I32), ([10], I32)], [15], I32),
    ("dp2a.lo.u32.s32 {d}, {0}, {1}, {2};", [([0x00030002], I32), ([0xFF05], I32), ([1], I32)], [2 * 5 - 3 + 1], I32),
    ("setp.lt.s32 %p1, {0}, {1}; selp.b32 {d}, 1, 0, %p1;", [([M, 1], I32), ([0, 0], I32)], [1, 0], I32),
    ("setp.lt.u32 %p1, {0}, {1}; selp.b32 {d}, 1, 0, %p1;", [([M, 0], I32), ([0, 1], I32)], [0, 1], I32),
    ("setp.eq.b16 %p1, {0}, 5; selp.b32 {d}, 7, 9, %p1;", [([5, 6], I16)], [7, 9], I32),
    (
        "setp.ne.s32 %p2, {0}, {0}; setp.eq.and.s32 %p1|%p3, {0}, {1}, !%p2; selp.b32 {d}, 1, 2, %p1;",
        [([1, 2], I32), ([1, 1], I32)], [1, 2], I32,
    ),
    ("mov.b64 %d9, {{{0}, {1}}}; mov.b64 {d}, %d9;", [([0x11111111], I32), ([0x22222222], I32)], [0x2222222211111111], I64),
    ("mov.b32 {{%h8, %h9}}, {0}; mov.b32 {d}, {{%h9, %h8}};", [([0x11112222], I32)], [0x22221111], I32),
    ("cvt.s64.s32 {d}, {0};", [([M], I32)], [-1], I64),
    ("cvt.u64.u32 {d}, {0};", [([M], I32)], [M], I64),
    # a source register wider than the type: its low bits (ISA 9.4.1)
    ("cvt.s64.s32 {d}, {0};", [([5 << 32 | M, 6 << 32 | 7, 8], I64)], [-1, 7, 8], I64),
    ("cvt.s32.s8 {d}, {0};", [([5 << 32 | 0x180, 7], I64)], [-128, 7], I32),
    ("cvt.u32.u64 {d}, {0};", [([0x123456789], I64)], [0x23456789], I32),
    ("cvt.s32.s8 {d}, {0};", [([0x80], I16)], [-128], I32),
    ("cvt.s32.s16 {d}, {0};", [([0x8000], I16)], [-32768], I32),
    ("cvt.sat.s8.s32 {d}, {0};", [([1000, -1000], I32)], [127, 0x80], I16),
]  # fmt: skip

INF, NAN = math.inf, 0x7FFFFFFF
MIN_NORMAL, DENORMAL = 0x00800000, 0x00000001
ONE, TWO, HALF = pattern(1.0), pattern(2.0), pattern(0.5)
ULP = pattern(1.0) + 1  # 1 + 2^-23
FLOAT = [
    ("add.f32 {d}, {0}, {1};", [([ONE], I32), ([TWO], I32)], [pattern(3.0)], I32),
    ("add.f32 {d}, {0}, {1};", [([DENORMAL], I32), ([0], I32)], [DENORMAL], I32),
    ("add.ftz.f32 {d}, {0}, {1};", [([DENORMAL], I32), ([0], I32)], [0], I32),
    ("add.f32 {d}, {0}, {1};", [([pattern(INF)], I32), ([pattern(-INF)], I32)], [NAN], I32),
    ("add.rn.f32 {d}, {0}, {1};", [([ONE], I32), ([pattern(2.0**-24)], I32)], [ONE], I32),  # tie to even
    ("add.rp.f32 {d}, {0}, {1};", [([ONE], I32), ([pattern(2.0**-24)], I32)], [ULP], I32),
    ("add.rm.f32 {d}, {0}, {1};", [([ONE], I32), ([pattern(-(2.0**-30))], I32)], [ONE - 1], I32),
    ("add.rz.f32 {d}, {0}, {1};", [([ONE], I32), ([pattern(2.0**-23 * 0.99)], I32)], [ONE], I32),
    ("sub.f32 {d}, {0}, {1};", [([ONE], I32), ([TWO], I32)], [pattern(-1.0)], I32),
    ("mul.f32 {d}, {0}, {1};", [([MIN_NORMAL], I32), ([HALF], I32)], [0x00400000], I32),
    ("mul.ftz.f32 {d}, {0}, {1};", [([MIN_NORMAL], I32), ([HALF], I32)], [0], I32),
    ("fma.rn.f32 {d}, {0}, {0}, {1};", [([ULP], I32), ([pattern(-1.0 - 2.0**-22)], I32)], [pattern(2.0**-46)], I32),
    ("max.f32 {d}, {0}, {1};", [([0x7FC00000, 0x80000000], I32), ([ONE, 0], I32)], [ONE, 0], I32),
    ("max.NaN.f32 {d}, {0}, {1};", [([0x7FC00000], I32), ([ONE], I32)], [NAN], I32),
    ("min.f32 {d}, {0}, {1};", [([0, ONE], I32), ([0x80000000, 0xFF800000], I32)], [0x80000000, 0xFF800000], I32),
    ("max.f32 {d}, {0}, {1}, {2};", [([ONE], I32), ([TWO], I32), ([HALF], I32)], [TWO], I32),
    ("ex2.approx.ftz.f32 {d}, {0};", [([pattern(3.0), pattern(-INF), 0x80000000], I32)], [pattern(8.0), 0, ONE], I32),
    ("ex2.approx.ftz.f32 {d}, {0};", [([pattern(-127.0)], I32)], [0], I32),  # result denormal, flushed
    ("ex2.approx.f32 {d}, {0};", [([pattern(-127.0)], I32)], [0x00400000], I32),
    ("lg2.approx.ftz.f32 {d}, {0};", [([pattern(8.0), 0, pattern(-1.0)], I32)], [pattern(3.0), 0xFF800000, NAN], I32),
    ("rcp.approx.ftz.f32 {d}, {0};", [([pattern(4.0), 0], I32)], [pattern(0.25), pattern(INF)], I32),
    ("rcp.rn.f32 {d}, {0};", [([pattern(3.0)], I32)], [0x3EAAAAAB], I32),
    ("sqrt.rn.f32 {d}, {0};", [([pattern(9.0)], I32)], [pattern(3.0)], I32),
    ("div.rn.f32 {d}, {0}, {1};", [([ONE], I32), ([pattern(3.0)], I32)], [0x3EAAAAAB], I32),
    ("neg.f32 {d}, {0};", [([ONE], I32)], [pattern(-1.0)], I32),
    ("add.rn.f32x2 {d}, {0}, {1};", [([TWO << 32 | ONE], I64), ([ONE << 32 | ONE], I64)], [pattern(3.0) << 32 | TWO], I64),
    ("add.rm.f32x2 {d}, {0}, {1};", [([ONE << 32 | ONE], I64), ([pattern(-(2.0**-30)) << 32 | pattern(2.0**-30)], I64)],
     [(ONE - 1) << 32 | ONE], I64),
    ("fma.rn.f32x2 {d}, {0}, {0}, {1};", [([TWO << 32 | ONE], I64), ([ONE << 32 | ONE], I64)], [pattern(5.0) << 32 | TWO], I64),
    ("mul.f16x2 {d}, {0}, {1};", [([0x40003C00], I32), ([0x40004000], I32)], [0x44004000], I32),
    ("add.rn.f32.f16 {d}, {0}, {1};", [([0x3C00], I16), ([TWO], I32)], [pattern(3.0)], I32),
    ("fma.rn.f32.bf16 {d}, {0}, {1}, {2};", [([0x4000], I16), ([0x4040], I16), ([ONE], I32)], [pattern(7.0)], I32),
    ("setp.gtu.f32 %p1, {0}, {1}; selp.b32 {d}, 1, 0, %p1;", [([0x7FC00000, ONE], I32), ([ONE, TWO], I32)], [1, 0], I32),
    ("setp.gt.f32 %p1, {0}, {1}; selp.b32 {d}, 1, 0, %p1;", [([0x7FC00000, TWO], I32), ([ONE, ONE], I32)], [0, 1], I32),
    ("setp.nan.f32 %p1, {0}, {0}; selp.b32 {d}, 1, 0, %p1;", [([0x7FC00000, TWO], I32)], [1, 0], I32),
    ("selp.f32 {d}, 0f3F800000, 0f40000000, %p1;".replace("%p1", "%p1"), [([0], I32)], [TWO], I32),
    ("cvt.rn.bf16x2.f32 {d}, {0}, {1};", [([TWO], I32), ([0x3F808000], I32)], [0x40003F80], I32),  # tie to even
    ("cvt.rn.bf16x2.f32 {d}, {0}, {1};", [([NAN], I32), ([0x7F7FFFFF], I32)], [0x7FFF7F80], I32),
    ("cvt.rn.f16x2.f32 {d}, {0}, {1};", [([ONE], I32), ([pattern(65520.0)], I32)], [0x3C007C00], I32),
    ("cvt.rn.satfinite.e4m3x2.f32 {d}, {0}, {1};", [([pattern(1000.0)], I32), ([ONE], I32)], [0x7E38], I16),
    ("cvt.rn.f16x2.e4m3x2 {d}, {0};", [([0x3840], I16)], [0x3C004000], I32),
    ("cvt.f32.bf16 {d}, {0};", [([0x4049], I16)], [0x40490000], I32),
    ("cvt.f32.f16 {d}, {0};", [([0x3C01], I16)], [0x3F802000], I32),
    ("cvt.rn.bf16.f32 {d}, {0};", [([0x3F80C000], I32)], [0x3F81], I16),
    ("cvt.rna.tf32.f32 {d}, {0};", [([0x3F801000], I32)], [0x3F802000], I32),
    ("cvt.rn.f32.s32 {d}, {0};", [([-3, 0x01000001], I32)], [pattern(-3.0), pattern(16777216.0)], I32),
    ("cvt.rzi.s32.f32 {d}, {0};", [([pattern(-2.7), pattern(3e10), 0x7FC00000], I32)], [-2, 0x7FFFFFFF, 0], I32),
    ("cvt.rmi.s32.f32 {d}, {0};", [([pattern(-2.1)], I32)], [-3], I32),
    ("cvt.rni.s32.f32 {d}, {0};", [([pattern(2.5), pattern(3.5)], I32)], [2, 4], I32),
]  # fmt: skip


@pytest.mark.parametrize("instruction, sources, expected, result", INTEGER, ids=[row[0] for row in INTEGER])
def test_integer_instruction(run, instruction, sources, expected, result):
    check(run, instruction, sources, expected, result)


@pytest.mark.parametrize("instruction, sources, expected, result", FLOAT, ids=[row[0] for row in FLOAT])
def test_float_instruction(run, instruction, sources, expected, result):
    if "selp.f32" in instruction:
        instruction = "setp.ne.b32 %p1, {0}, {0}; " + instruction
    check(run, instruction, sources, expected, result)


def test_exponential_lies_within_the_isa_bound(run):
    x = torch.linspace(-20, 20, 32)
    got = apply(run, "ex2.approx.ftz.f32 {d}, {0};", x.view(I32), result=I32).view(torch.float32)
    assert ((got.double() / torch.exp2(x.double()) - 1).abs() <= 2.0**-22).all()


def test_a_guard_keeps_the_other_lanes(run):
    out = apply(
        run, "mov.b32 {d}, 7; setp.lt.s32 %p1, {0}, 3; @%p1 mov.b32 {d}, 1; @!%p1 add.s32 {d}, {d}, 1;",
        torch.arange(32, dtype=I32), result=I32,
    )  # fmt: skip
    assert out.tolist() == [1] * 3 + [8] * 29


def test_unknown_opcodes_are_all_listed(run):
    with pytest.raises(emulator.errors.UnknownOpcode) as caught:
        run("frobnicate.b32 %r1, %r2;\nmov.b32 %r1, 0;\nquux.sync;", registers=".reg .b32 %r<4>;")
    assert "frobnicate.b32" in str(caught.value) and "quux.sync" in str(caught.value)
    assert "mov.b32" not in str(caught.value)


def test_reading_an_unwritten_register_is_an_error(run):
    with pytest.raises(emulator.errors.Uninitialised, match="register"):
        run("add.s32 %r1, %r2, 1;", registers=".reg .b32 %r<4>;")


def test_copying_an_unwritten_register_is_not(run):
    run("mov.b32 %r1, %r2;", registers=".reg .b32 %r<4>;")
