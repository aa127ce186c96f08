"""Bounds, alignment and initialisation of shared and global memory, and what the messages name."""

from __future__ import annotations

import pytest
import torch

from cute_sparse import emulator

I32 = torch.int32
errors = emulator.errors
REGISTERS = ".reg .pred %p<8>; .reg .b16 %h<4>; .reg .b32 %r<40>; .reg .b64 %d<16>;"
SHARED = ".shared .align 128 .b8 data[256];"


def start(run, body: str, tensor: torch.Tensor | None = None, **launch) -> None:
    """%d0: the tensor; %r0: the lane; %r1: `data`, 256 bytes of shared memory."""
    prologue = "ld.param.b64 %d0, [x]; mov.u32 %r0, %laneid; mov.u32 %r1, data; mov.b32 %r2, 7;"
    tensor = torch.zeros(64, dtype=I32) if tensor is None else tensor
    run(prologue + body, [tensor], parameters=".param .u64 x", registers=REGISTERS, shared=SHARED, **launch)


@pytest.mark.parametrize(
    "body, error, message",
    [
        ("st.shared.b32 [%r1+256], %r2;", "OutOfBounds", "the CTA has 256 bytes"),
        ("st.shared.b32 [%r1+-4], %r2;", "OutOfBounds", "the system's"),
        ("st.shared.v4.b32 [%r1+248], {%r2, %r2, %r2, %r2};", "OutOfBounds", "16 bytes at shared address"),
        ("st.shared.b32 [%r1+2], %r2;", "Misaligned", "multiple of 4"),
        ("st.shared.v2.b32 [%r1+4], {%r2, %r2};", "Misaligned", "multiple of 8"),
        ("ld.shared.b32 %r3, [%r1];", "Uninitialised", "shared memory at 0x400"),
        ("st.shared.b8 [%r1], %r2; ld.shared.b16 %h1, [%r1];", "Uninitialised", "shared memory at 0x401"),
        ("ld.global.b32 %r3, [%d0+256];", "OutOfBounds", "0 bytes past the end of 'x' .256 bytes"),
        ("ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%d0+252];", "OutOfBounds", "12 of them past the end"),
        ("ld.global.b32 %r3, [%d0+-4];", "OutOfBounds", "4 bytes before the begin of 'x'"),
        ("ld.global.b64 %d1, [%d0+4];", "Misaligned", "multiple of 8"),
        ("mov.u64 %d1, 64; ld.global.b32 %r3, [%d1];", "OutOfBounds", "global memory: 4 bytes at 0x40"),
        ("add.u32 %r3, %r1, 0x1000000; ld.shared::cluster.b32 %r4, [%r3];", "OutOfBounds", "CTA rank 1 of a cluster of 1"),
    ],
)  # fmt: skip
def test_a_bad_access_is_reported(run, device, body, error, message):
    x = torch.zeros(64, dtype=I32)
    device.register(x, name="x")
    with pytest.raises(getattr(errors, error), match=message):
        start(run, body, x)


def test_the_report_names_the_first_bad_lane_and_the_line(run):
    with pytest.raises(errors.OutOfBounds) as caught:
        start(run, "mad.lo.u32 %r3, %r0, 16, %r1;\nst.shared.b32 [%r3], %r2;")
    assert caught.value.lane == 16
    assert "st.shared.b32" in str(caught.value)


def test_writing_a_parameter_is_an_error(run):
    with pytest.raises(errors.OutOfBounds, match="read-only"):
        start(run, "mov.b64 %d1, x; cvta.param.u64 %d1, %d1; st.global.b32 [%d1], %r2;")


def test_a_write_of_each_byte_initialises_a_word(run):
    start(run, "mov.b16 %h1, 1; st.shared.b8 [%r1], %h1; st.shared.b8 [%r1+1], %h1; st.shared.b16 [%r1+2], %h1; ld.shared.b32 %r3, [%r1];", block=1)


def test_shared_memory_of_a_cta_that_has_ended_is_out_of_bounds(run):
    body = """mov.u32 %r3, %cluster_ctarank; setp.eq.u32 %p1, %r3, 0; @%p1 ret; mov.u32 %r5, 0;
    SPIN: add.u32 %r5, %r5, 1; setp.lt.u32 %p2, %r5, 2000; @%p2 bra SPIN;
    mov.u32 %r6, 0; mapa.shared::cluster.u32 %r4, %r1, %r6; st.shared::cluster.b32 [%r4], %r2;"""
    with pytest.raises(errors.OutOfBounds, match="has ended"):
        start(run, body, grid=2, cluster=2)


def test_memory_behind_a_range_within_a_range_is_found(run, device):
    x = torch.zeros(64, dtype=I32)
    device.register(x, name="x")
    device.core.add_memory(x.data_ptr() + 64, 16, "a part of x")
    try:
        start(run, "st.global.b32 [%d0+128], %r2;", x)
        assert x[32].item() == 7
        with pytest.raises(errors.OutOfBounds, match="4 bytes past the end of 'x'"):
            start(run, "st.global.b32 [%d0+260], %r2;", x)
    finally:
        device.core.remove_memory(x.data_ptr() + 64)


def test_the_next_launch_works_after_an_error(run):
    with pytest.raises(errors.OutOfBounds):
        start(run, "st.shared.b32 [%r1+256], %r2;")
    x = torch.zeros(64, dtype=I32)
    start(run, "st.global.b32 [%d0], %r2;", x)
    assert x[0].item() == 7
