"""Removing a synchronisation statement is noticed: in our kernels, and in FlashAttention-4's."""

from __future__ import annotations

import pytest
import torch

import cute_sparse
from cute_sparse import emulator
from cute_sparse.emulator import mutate
from cute_sparse.emulator.text import module, run_ptx
from cute_sparse.workloads import structured_qkv
from tests.emulator.mutation_exceptions import unexplained

HANDOVER = """
ld.param.b64 %d1, [p0];
mov.u32 %r1, %tid.x; setp.ne.u32 %p1, %r1, 0; mov.b32 %r2, flag; mov.b32 %r3, word;
@%p1 bra INITIALISED; mbarrier.init.shared.b64 [%r2], 1; INITIALISED: bar.sync 0;
setp.lt.u32 %p2, %r1, 32; @!%p2 bra CONSUMER;
@%p1 bra END; st.shared.b32 [%r3], 7; mbarrier.arrive.shared.b64 %d2, [%r2]; bra END;
CONSUMER:
WAIT: mbarrier.try_wait.parity.shared.b64 %p3, [%r2], 0;
@%p3 bra READY; bra WAIT; READY:
ld.shared.b32 %r4, [%r3]; st.global.b32 [%d1], %r4;
END:
""".replace("; ", ";\n").replace(": ", ":\n")


def test_every_removal_in_a_handover_is_noticed():
    out = torch.zeros(1, dtype=torch.int32)
    text = module(
        "sm_90a", HANDOVER, parameters=".param .u64 p0",
        registers=".reg .pred %p<4>; .reg .b32 %r<5>; .reg .b64 %d<3>;",
        shared=".shared .align 8 .b64 flag; .shared .align 4 .b32 word;",
    )  # fmt: skip
    with emulator.device("sm_90a", threads=1) as device:
        device.core.record(True)
        try:
            run_ptx(device, text, [out], block=64)
            result = mutate.survey(device)
        finally:
            device.core.record(False)
    assert out.item() == 7
    assert not result.survived and not result.idle
    assert {m.text.split()[0].split(".")[0] for m in result.noticed} == {"bar", "mbarrier"}
    assert result.total == 3


def test_a_kernel_whose_result_depends_on_the_order_is_not_surveyed():
    body = """ld.param.b64 %d1, [p0]; mov.u32 %r1, %tid.x; shr.u32 %r2, %r1, 5;
    atom.global.exch.b32 %r3, [%d1], %r2; mul.wide.u32 %d2, %r2, 4; add.s64 %d2, %d1, %d2; st.global.b32 [%d2+4], %r3;"""
    out = torch.full((9,), -1, dtype=torch.int32)
    text = module("sm_90a", body, parameters=".param .u64 p0", registers=".reg .b32 %r<4>; .reg .b64 %d<3>;")
    with emulator.device("sm_90a", threads=1) as device:
        device.core.record(True)
        try:
            run_ptx(device, text, [out], block=256)
            with pytest.raises(emulator.EmulatorError, match="unmodified"):
                mutate.survey(device, [("eager", 0), *(("random", seed) for seed in range(8))])
        finally:
            device.core.record(False)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("threshold", [None, 1e-2], ids=["dense", "threshold"])
def test_removals_in_our_prefill_are_noticed_or_explained(arch, threshold):
    q, k, v = structured_qkv(1, 512, 2, 1, 64)
    with cute_sparse.emulated(arch, sms=2) as device:
        device.core.record(True)
        try:
            out = cute_sparse.attention(q, k, v, causal=True, threshold=threshold)
            result = mutate.survey(device)
        finally:
            device.core.record(False)
    assert not unexplained(arch, result), result
    assert result.total > 30 and out.isfinite().all()


def test_a_freed_result_is_not_written_to():
    q, k, v = structured_qkv(1, 128, 1, 1, 64)
    with cute_sparse.emulated("sm_90a") as device:
        device.core.record(True)
        try:
            cute_sparse.attention(q, k, v)  # the result is freed at once
            with pytest.raises(emulator.errors.EmulatorError, match="freed"):
                mutate.survey(device)
        finally:
            device.core.record(False)
