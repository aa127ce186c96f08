"""Removing a synchronisation statement is noticed: in our kernels, and in FlashAttention-4's."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from cute_sparse.kernels.blackwell import config as blackwell_config
from cute_sparse.kernels.blackwell import decode_config as blackwell_decode_config
from cute_sparse.kernels.hopper import config as hopper_config
from cute_sparse.kernels.hopper import decode_config as hopper_decode_config

import cute_sparse
from cute_sparse import emulator
from cute_sparse.emulator import mutate
from cute_sparse.emulator.text import module, run_ptx
from cute_sparse.plans import DecodeKernelPlan
from cute_sparse.workloads import in_shuffled_pages, structured_qkv
from tests.emulator.flash_attention_4 import forget_the_gpu
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


def survey_of(text: str, out: torch.Tensor, block: int) -> mutate.Survey:
    """Statements are separated by ";" and spaces; `out` is the kernel's only parameter."""
    ptx = module(
        "sm_90a", text.replace("; ", ";\n").replace(": ", ":\n"), parameters=".param .u64 p0",
        registers=".reg .pred %p<6>; .reg .b32 %r<8>; .reg .b64 %d<6>;",
        shared=".shared .align 8 .b8 flags[16]; .shared .align 128 .b8 words[256];",
    )  # fmt: skip
    with emulator.device("sm_90a", threads=1) as device:
        device.core.record(True)
        try:
            run_ptx(device, ptx, [out], block=block)
            return mutate.survey(device)
        finally:
            device.core.record(False)


STARTS = """
ld.param.b64 %d1, [p0]; mov.u32 %r1, %tid.x; mov.b32 %r2, flags; mov.b32 %r3, words; shl.b32 %r4, %r1, 2;
setp.eq.u32 %p1, %r1, 0; setp.lt.u32 %p2, %r1, 32; add.u32 %r5, %r3, %r4;
@%p1 mbarrier.init.shared.b64 [%r2], 1; @%p1 mbarrier.init.shared.b64 [%r2+8], 32; bar.sync 0;
"""


def texts(mutations) -> list[str]:
    return [mutation.text.split(";")[0] for mutation in mutations]


def test_a_doubled_bar_warp_sync_is_idle():
    body = STARTS + """
    @!%p2 bra READER; st.shared.b32 [%r5], %r1; bar.warp.sync -1; bar.warp.sync 0xffffffff;
    @%p1 mbarrier.arrive.shared.b64 _, [%r2]; bra END;
    READER: mbarrier.try_wait.parity.shared.b64 %p3, [%r2], 0; @!%p3 bra READER;
    ld.shared.b32 %r6, [%r5+-128]; add.s64 %d2, %d1, 4; st.global.b32 [%d1], %r6;
    END: """
    result = survey_of(body, torch.zeros(64, dtype=torch.int32), block=64)
    # Either of the two would do; the one that finds nothing left to do is idle.
    assert texts(result.idle) == ["bar.warp.sync 0xffffffff"] and texts(result.survived) == ["bar.warp.sync -1"]


@pytest.mark.parametrize("between, idle", [("", 2), ("st.shared.b32 [%r3], 7;", 0)], ids=["nothing", "a store"])
def test_a_wait_for_one_bulk_group_is_idle_if_the_next_comes_before_anything_else(between, idle):
    body = STARTS + """
    @!%p1 bra END; st.shared.v4.b32 [%r3], {%r1, %r1, %r1, %r1}; st.shared.v4.b32 [%r3+16], {%r1, %r1, %r1, %r1};
    fence.proxy.async.shared::cta; add.s64 %d2, %d1, 16; add.u32 %r6, %r3, 16;
    cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r3], 16; cp.async.bulk.commit_group;
    cp.async.bulk.global.shared::cta.bulk_group [%d2], [%r6], 16; cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 1; BETWEEN cp.async.bulk.wait_group.read 0;
    END: """.replace("BETWEEN", between)
    result = survey_of(body, torch.ones(64, dtype=torch.int32), block=32)
    names = ["cp.async.bulk.commit_group", "cp.async.bulk.wait_group.read 1"]
    assert texts(result.idle) == (names if idle else []) and texts(result.survived) == ["bar.sync 0"]
    assert "cp.async.bulk.wait_group.read 0" in texts(result.noticed)


def test_a_wait_for_one_lane_is_idle_behind_a_wait_for_all_of_its_warp():
    body = STARTS + """
    @!%p2 bra READER; @%p1 st.shared.b32 [%r3], 5; @%p1 mbarrier.arrive.shared.b64 _, [%r2];
    mbarrier.arrive.shared.b64 _, [%r2+8]; bra END;
    READER: mbarrier.try_wait.parity.shared.b64 %p3, [%r2+8], 0; @!%p3 bra READER;
    AGAIN: mbarrier.try_wait.parity.shared.b64 %p4, [%r2], 0; @!%p4 bra AGAIN;
    ld.shared.b32 %r6, [%r3]; st.global.b32 [%d1], %r6;
    END: """
    result = survey_of(body, torch.zeros(64, dtype=torch.int32), block=64)
    assert texts(result.idle) == ["mbarrier.try_wait.parity.shared.b64 %p4, [%r2], 0"]


def test_surveys_of_several_launches_are_combined():
    a, b, c, d = (mutate.Mutation(line, f"bar.sync {line};", times=line) for line in range(4))
    again = replace(c, times=77)
    first = mutate.Survey("kernel", noticed={a: "Deadlock in eager"}, idle=[b, c], survived=[d])
    second = mutate.Survey("kernel", noticed={d: "RaceDetected in late"}, idle=[b], survived=[again])
    both = mutate.combined([first, second])
    assert both.noticed == {a: "Deadlock in eager", d: "RaceDetected in late"}
    assert both.idle == [b] and both.survived == [c] and both.share == 2 / 3
    with pytest.raises(ValueError, match="not of one kernel"):
        mutate.combined([first, mutate.Survey("kernel", idle=[replace(a, text="bar.sync 9;")])])
    with pytest.raises(ValueError, match="not of one kernel"):
        mutate.combined([first, mutate.Survey("another", idle=[a])])


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


# Of every kernel several launches, (queries, keys, heads), each by one CTA where it claims work tiles: full and ragged
# blocks, rows that see no key, work tiles of one KV tile, runs of skipped tiles that are longer than every ring.
LAUNCHES = {
    None: [(640, 512, 2), (128, 128, 6), (1024, 256, 2)],
    1e-2: [(640, 512, 2), (128, 128, 6), (1024, 256, 2), (1408, 1408, 1), (128, 1408, 1), (1024, 1024, 1)],
}


def surveyed(arch: str, threshold: float | None, head_dim: int, launches: list[tuple[int, int, int]]) -> mutate.Survey:
    """Our causal prefill kernel, over several launches; with at most 128 columns of V."""
    result = None
    for queries, keys, heads in launches:
        q, k, v = structured_qkv(1, max(queries, keys), heads, 1, head_dim)
        with cute_sparse.emulated(arch, sms=1) as device:
            device.core.record(True)
            try:
                operands = q[:, :queries], k[:, :keys], v[:, :keys, :, :128]
                out = cute_sparse.attention(*operands, causal=True, threshold=threshold)
                result = mutate.survey(device, after=result)
            finally:
                device.core.record(False)
        assert out.isfinite().all()
    return result


@pytest.fixture
def one_cta(monkeypatch: pytest.MonkeyPatch):
    """Kernels that claim work tiles do so with one CTA (or one pair), which therefore computes several."""
    for config in (blackwell_config, hopper_config):
        monkeypatch.setattr(config, "choose", partial(_with_one_cta, config.choose))


def _with_one_cta(choose, *arguments, **options):
    chosen = choose(*arguments, **options)
    return replace(chosen, ctas=min(chosen.ctas, getattr(chosen, "ctas_per_tile", 1)))


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("threshold", [None, 1e-2], ids=["dense", "threshold"])
def test_removals_in_our_prefill_are_noticed(arch, threshold, one_cta):
    result = surveyed(arch, threshold, 64, LAUNCHES[threshold])
    assert_noticed(f"our prefill, {arch}, {'dense' if threshold is None else 'threshold'}", result)


def test_removals_where_two_ctas_share_their_products_are_noticed(one_cta):
    assert_noticed("our prefill, sm_100a, pairs of CTAs", surveyed("sm_100a", None, 192, [(640, 512, 2)]))


# Of decode, (queries, query heads of the one KV head, how much more a query likes near keys: little, and the first tile
# exceeds the last, which is visited before it): on Blackwell, a tile's keys in 4, 2 and 1 parts. The cache has
# two whole tiles in succession and a part of one, which one CTA attends alone, and a run of tiles longer than every
# ring, in which it meets a second CTA; a third has nothing to do.
DECODE_LENGTHS, DECODE_CTAS = (64, 50, 64, 640), 3
DECODE_LAUNCHES = {"sm_90a": [(2, 20, 40.0)], "sm_100a": [(2, 12, 40.0), (2, 24, 4.0), (3, 24, 4.0)]}
FEW_SLOTS = dict(tile_n=64, k_stages=2, v_stages=2, p_stages=2, min_tiles=6)


@pytest.fixture
def decode_with_few_slots(monkeypatch: pytest.MonkeyPatch):
    """Decode kernels whose rings wrap soon; and the partial results of their splits outlive the call."""
    for config in (blackwell_decode_config, hopper_decode_config):
        monkeypatch.setattr(config, "choose", partial(_with_few_slots, config.choose))
    scratch, kept = DecodeKernelPlan._scratch, []

    def kept_scratch(plan, q):
        kept.append(scratch(plan, q))
        return kept[-1]

    monkeypatch.setattr(DecodeKernelPlan, "_scratch", kept_scratch)


def _with_few_slots(choose, *arguments, **options):
    return replace(choose(*arguments, **options), **FEW_SLOTS)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("threshold", [None, 0.03], ids=["dense", "threshold"])
def test_removals_in_our_decode_are_noticed(arch, threshold, decode_with_few_slots):
    result, lengths = None, torch.tensor(DECODE_LENGTHS, dtype=torch.int32)
    for queries, heads, local in DECODE_LAUNCHES[arch]:
        q, k, v = structured_qkv(len(lengths), max(DECODE_LENGTHS), heads, 1, 64, seqlen_q=queries, local=local)
        k_cache, v_cache, table = in_shuffled_pages(k, v, 64)
        cache = dict(seqused_k=lengths, page_table=table)
        with cute_sparse.emulated(arch, sms=DECODE_CTAS) as device:
            device.core.record(True)
            try:
                out, *_, stats = cute_sparse.decode(q, k_cache, v_cache, threshold=threshold, return_stats=True, **cache)
                result = mutate.survey(device, after=result)
            finally:
                device.core.record(False)
        assert out.isfinite().all()
        kept, visited = (int(count.sum()) for count in stats.tile_counts)
        assert visited == 13 and (kept < visited) == (threshold is not None)
    assert_noticed(f"our decode, {arch}, {'dense' if threshold is None else 'threshold'}", result)


def assert_noticed(kernel: str, result: mutate.Survey) -> None:
    assert not unexplained(kernel, result), result
    assert result.share >= 0.95 and result.total > 40, result


# (architecture, head dim, causal, SMs)
FLASH_ATTENTION_4 = {
    "FlashAttention-4, sm_90a": ("sm_90a", 64, True, 1),
    "FlashAttention-4, sm_100a": ("sm_100a", 128, True, 1),
    "FlashAttention-4, sm_100a, head dim 64, full": ("sm_100a", 64, False, 1),
    "FlashAttention-4, sm_100a, pairs of CTAs": ("sm_100a", 128, False, 2),
}


@pytest.mark.parametrize("kernel", FLASH_ATTENTION_4)
def test_removals_in_flash_attention_4_are_noticed(kernel):
    pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed")
    from flash_attn.cute import flash_attn_func

    arch, head_dim, causal, sms = FLASH_ATTENTION_4[kernel]
    forget_the_gpu()
    with emulator.device(arch, sms=sms, torch_cuda=True) as device:
        device.core.record(True)
        try:
            q, k, v = (tensor.bfloat16().cuda() for tensor in structured_qkv(1, 384, 2, 1, head_dim))
            out, *_ = flash_attn_func(q, k, v, causal=causal)
            result = mutate.survey(device)
        finally:
            device.core.record(False)
            forget_the_gpu()
    assert out.isfinite().all()
    assert_noticed(kernel, result)


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
