"""The happens-before detector: sound kernels are silent in every order; each dropped statement is noticed in the first."""

from __future__ import annotations

import contextlib

import pytest
import torch

from cute_sparse import emulator

I32 = torch.int32
IN_EVERY_ORDER = pytest.mark.parametrize(
    "device", [{"order": order} for order in ("eager", "late", "random")], indirect=True, ids=lambda s: s["order"]
)
IN_RANDOM_ORDERS = pytest.mark.parametrize(
    "device", [{"order": "random", "seed": seed} for seed in range(5)], indirect=True, ids=lambda s: str(s["seed"])
)
REGISTERS = ".reg .pred %p<8>; .reg .b16 %h<4>; .reg .b32 %r<40>; .reg .b64 %d<16>;"
SHARED = ".shared .align 128 .b8 bars[128]; .shared .align 128 .b8 stages[256]; .shared .align 128 .b8 staging[128];"
TILES = 6

# Warp 0 copies tiles of 128 bytes into two stages; warp 1 adds 1 to each word and stores them from `staging`.
# Full barriers at 0 and 8, empty ones at 16 and 24. Statements in < > are dropped one at a time.
PIPELINE = f"""
    ld.param.b64 %d0, [source]; ld.param.b64 %d1, [out]; mov.u32 %r0, %tid.x; mov.u32 %r1, %laneid;
    mov.u32 %r2, bars; mov.u32 %r3, stages; mov.u32 %r4, staging; mov.u32 %r10, 0;
    setp.eq.u32 %p0, %r1, 0; setp.eq.u32 %p1, %r0, 0; setp.ge.u32 %p2, %r0, 32;
    @!%p1 bra READY;
    <init: mbarrier.init.shared.b64 [%r2], 1;> mbarrier.init.shared.b64 [%r2+8], 1;
    mbarrier.init.shared.b64 [%r2+16], 1; mbarrier.init.shared.b64 [%r2+24], 1;
    READY:
    <init fence: fence.mbarrier_init.release.cluster;>
    <cta barrier: bar.sync 0;>
    LOOP:
    and.b32 %r11, %r10, 1; shr.u32 %r12, %r10, 1; and.b32 %r12, %r12, 1; xor.b32 %r13, %r12, 1;
    shl.b32 %r14, %r11, 3; add.u32 %r14, %r14, %r2; shl.b32 %r15, %r11, 7; add.u32 %r15, %r15, %r3;
    @%p2 bra CONSUMER;
    EMPTY: <empty wait: mbarrier.try_wait.parity.shared.b64 %p3, [%r14+16], %r13; @!%p3 bra EMPTY;>
    <expect: @%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%r14], 128;>
    @%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r15], [%d0], 128, [%r14];
    bra NEXT;
    CONSUMER:
    FULL: <full wait: mbarrier.try_wait.parity.shared.b64 %p3, [%r14], %r12; @!%p3 bra FULL;>
    shl.b32 %r16, %r1, 2; add.u32 %r17, %r15, %r16; ld.shared.b32 %r18, [%r17]; add.u32 %r18, %r18, 1;
    <warp sync before the arrival: bar.warp.sync -1;>
    <arrival: @%p0 mbarrier.arrive.shared.b64 _, [%r14+16];>
    <staging wait: @%p0 cp.async.bulk.wait_group.read 0;>
    bar.warp.sync -1;
    add.u32 %r19, %r4, %r16; st.shared.b32 [%r19], %r18;
    <proxy fence: fence.proxy.async.shared::cta;>
    <warp sync before the store: bar.warp.sync -1;>
    @%p0 cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r4], 128;
    <commit: @%p0 cp.async.bulk.commit_group;>
    NEXT:
    add.s64 %d0, %d0, 128; add.s64 %d1, %d1, 128; add.u32 %r10, %r10, 1;
    setp.lt.u32 %p4, %r10, {TILES}; @%p4 bra LOOP;
    @%p0 cp.async.bulk.wait_group 0;
"""


def without(statement: str | None) -> str:
    """The pipeline, with all statements in < > but the named one."""
    head, *marked = PIPELINE.split("<")
    found, text = False, head
    for part in marked:
        inside, behind = part.split(">", 1)
        name, statements = inside.split(":", 1)
        found |= name == statement
        text += ("" if name == statement else statements) + behind
    assert found or statement is None, f"no statement {statement!r}"
    return text


def run_pipeline(run, body: str) -> tuple[list[int], list[int]]:
    source, out = torch.arange(32 * TILES, dtype=I32), torch.zeros(32 * TILES, dtype=I32)
    run(body, [source, out], parameters=".param .u64 source, .param .u64 out", registers=REGISTERS, shared=SHARED, block=64)
    return out.tolist(), (source + 1).tolist()


@IN_EVERY_ORDER
def test_a_sound_pipeline_runs_without_alarm(run):
    out, expected = run_pipeline(run, without(None))
    assert out == expected


@IN_RANDOM_ORDERS
def test_a_sound_pipeline_runs_without_alarm_in_random_orders(run):
    out, expected = run_pipeline(run, without(None))
    assert out == expected


@IN_EVERY_ORDER
@pytest.mark.parametrize(
    "statement, errors",
    [
        ("init", ["BarrierError"]),
        ("init fence", ["MissingProxyFence"]),
        ("cta barrier", ["RaceDetected", "BarrierError"]),
        ("empty wait", ["RaceDetected", "BarrierError"]),
        ("expect", ["Deadlock"]),
        ("full wait", ["RaceDetected", "Uninitialised"]),
        ("warp sync before the arrival", ["RaceDetected"]),
        ("arrival", ["Deadlock"]),
        ("staging wait", ["RaceDetected"]),
        ("proxy fence", ["MissingProxyFence"]),
        ("warp sync before the store", ["RaceDetected", "MissingProxyFence"]),
        ("commit", ["RaceDetected", "InFlightAccess"]),
    ],
)
def test_each_dropped_statement_is_noticed_in_the_first_run(run, statement, errors):
    with pytest.raises(tuple(getattr(emulator.errors, name) for name in errors)):
        run_pipeline(run, without(statement))


# ---------------------------------------------------------------------------------------------------------
# Single conflicts

PROLOGUE = """
    ld.param.b64 %d0, [out]; mov.u32 %r0, %tid.x; mov.u32 %r1, %laneid; shr.u32 %r2, %r0, 5; mov.u32 %r3, stages;
    setp.eq.u32 %p0, %r1, 0; setp.eq.u32 %p1, %r2, 0; setp.eq.u32 %p2, %r2, 1; shl.b32 %r4, %r1, 2; add.u32 %r5, %r3, %r4;
    mul.wide.u32 %d2, %r0, 4; add.s64 %d2, %d2, %d0; mov.u32 %r9, 1; mov.b16 %h1, 1;
"""


def start(run, body: str, *, block: int = 64, **launch) -> list[int]:
    """%p0: lane 0; %p1, %p2: warp 0, 1; %r5: the lane's word of `stages`; %d0: global; %d2: the thread's global word."""
    out = torch.zeros(256, dtype=I32)
    run(PROLOGUE + body, [out], parameters=".param .u64 out", registers=REGISTERS, shared=SHARED, block=block, **launch)
    return out.tolist()


RACE = emulator.errors.RaceDetected


@IN_EVERY_ORDER
@pytest.mark.parametrize(
    "body",
    [
        pytest.param("@%p1 st.shared.b32 [%r5], %r0; @%p2 st.shared.b32 [%r5], %r0;", id="write and write"),
        pytest.param("@%p1 st.shared.b32 [%r5], %r0; bar.sync 0; ld.shared.b32 %r6, [%r5]; @%p2 st.shared.b32 [%r5], %r0;", id="read and write"),
        pytest.param("@%p1 st.shared.b32 [%r5], %r0; bar.sync 0; @%p1 st.shared.b32 [%r5], %r0; @%p2 ld.shared.b32 %r6, [%r5];", id="write and read"),
        pytest.param("@%p1 st.shared.b32 [%r5], %r0; bar.sync 0; @%p1 red.shared.add.u32 [%r5], 1; @%p2 st.shared.b32 [%r5], %r0;", id="atomic and write"),
        pytest.param("@%p1 st.global.b32 [%d0], %r9; @%p2 ld.global.b32 %r6, [%d0];", id="global memory"),
        pytest.param("@%p1 st.shared.b8 [%r3+2], %h1; @%p2 st.shared.b16 [%r3+2], %h1;", id="bytes"),
    ],
)  # fmt: skip
def test_unordered_conflicts_are_races(run, body):
    with pytest.raises(RACE, match=r"not ordered after the .*PTX line"):
        start(run, body)


@IN_RANDOM_ORDERS
@pytest.mark.parametrize(
    "body",
    [
        pytest.param("bar.sync 0; @%p1 st.shared.b32 [%r5], %r0; bar.sync 0; @%p2 st.shared.b32 [%r5], %r0; bar.sync 0; ld.shared.b32 %r6, [%r5]; bar.sync 0; @%p1 st.shared.b32 [%r5], %r0;", id="barriers between"),
        pytest.param("@%p1 st.shared.b32 [%r5], %r0; bar.sync 0; red.shared.add.u32 [%r5], 1; atom.shared.max.u32 %r6, [%r5], 1;", id="atomics"),
        pytest.param("add.u32 %r6, %r3, %r2; st.shared.b8 [%r6], %h1; ld.shared.u8 %h2, [%r6]; st.shared.b8 [%r6], %h2; bar.sync 0; ld.shared.u16 %h3, [%r3];", id="a byte for each warp"),
        pytest.param("shl.b32 %r6, %r0, 1; add.u32 %r6, %r6, %r3; st.shared.b16 [%r6], %h1; bar.sync 0; add.u32 %r7, %r3, %r4; ld.shared.b32 %r8, [%r7];", id="half words"),
        pytest.param("st.global.b32 [%d2], %r0; ld.global.b32 %r6, [%d2]; bar.sync 0; ld.global.b32 %r6, [%d0];", id="own words of global memory"),
    ],
)  # fmt: skip
def test_ordered_or_disjoint_accesses_are_silent(run, body):
    start(run, body)


# Threads have written or read, and a bulk copy overwrites it.
OVERWRITTEN = """
    mov.u32 %r2, bars; setp.eq.u32 %p3, %r0, 0; @%p3 mbarrier.init.shared.b64 [%r2], 1; fence.mbarrier_init.release.cluster;
    {before} bar.sync 0; {behind}
    @!%p3 bra WAIT; mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 128;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%d0], 128, [%r2];
    WAIT: mbarrier.try_wait.parity.shared.b64 %p4, [%r2], 0; @!%p4 bra WAIT;
    ld.shared.b32 %r6, [%r5];
"""
WRITE, READ = "@%p2 st.shared.b32 [%r5], %r0;", "ld.shared.b32 %r6, [%r5];"
PROXY_FENCE = "fence.proxy.async.shared::cta;"


@IN_EVERY_ORDER
@pytest.mark.parametrize(
    "before, behind",
    [(WRITE + PROXY_FENCE, ""), (WRITE, PROXY_FENCE), (WRITE + PROXY_FENCE + "bar.sync 0;" + READ, "")],
    ids=["writer's fence", "overwriter's fence", "read since"],
)
def test_the_async_proxy_may_overwrite_ordinary_writes_behind_a_fence(run, before, behind):
    start(run, OVERWRITTEN.format(before=before, behind=behind))


@IN_EVERY_ORDER
def test_the_async_proxy_must_not_overwrite_ordinary_writes_without_a_fence(run):
    with pytest.raises(emulator.errors.MissingProxyFence, match="async proxy after the write by warp 1"):
        start(run, OVERWRITTEN.format(before=WRITE, behind=""))


FLAG = "@%p1 st.global.b32 [%d2+64], %r0; {sync} @!%p1 bra WAIT; @%p0 {release}; bra END; WAIT: {acquire}; setp.eq.u32 %p3, %r6, 0; @%p3 bra WAIT; {after} ld.global.b32 %r7, [%d0+68]; END:"


@pytest.mark.parametrize(
    "sync, release, acquire, after",
    [
        ("bar.warp.sync -1;", "st.release.gpu.global.b32 [%d0], %r9", "ld.acquire.gpu.global.b32 %r6, [%d0]", ""),
        ("bar.warp.sync -1;", "red.release.gpu.global.add.u32 [%d0], 1", "ld.acquire.gpu.global.b32 %r6, [%d0]", ""),
        ("fence.acq_rel.gpu;", "st.relaxed.gpu.global.b32 [%d0], %r9", "ld.relaxed.gpu.global.b32 %r6, [%d0]", "fence.acq_rel.gpu;"),
        ("membar.gl;", "atom.global.add.u32 %r8, [%d0], 1", "ld.volatile.global.b32 %r6, [%d0]", "membar.gl;"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("clusters", [1, 2])
def test_a_flag_in_global_memory_orders(run, sync, release, acquire, after, clusters):
    body = FLAG.format(sync=sync, release=release, acquire=acquire, after=after)
    if clusters == 2:  # writer and reader are CTAs
        body = "mov.u32 %r2, %ctaid.x; setp.eq.u32 %p1, %r2, 0;" + body
    start(run, body, grid=clusters, block=64 // clusters)


@pytest.mark.parametrize(
    "sync, release, acquire, after",
    [
        ("", "st.relaxed.gpu.global.b32 [%d0], %r9", "ld.acquire.gpu.global.b32 %r6, [%d0]", ""),
        ("bar.warp.sync -1;", "st.release.gpu.global.b32 [%d0], %r9", "ld.relaxed.gpu.global.b32 %r6, [%d0]", ""),
        ("fence.acq_rel.gpu;", "st.relaxed.gpu.global.b32 [%d0], %r9", "ld.relaxed.gpu.global.b32 %r6, [%d0]", ""),
    ],
)
@pytest.mark.parametrize("clusters", [1, 2])
def test_a_flag_without_release_or_acquire_is_a_race(run, sync, release, acquire, after, clusters):
    body = FLAG.format(sync=sync, release=release, acquire=acquire, after=after)
    if clusters == 2:
        body = "mov.u32 %r2, %ctaid.x; setp.eq.u32 %p1, %r2, 0;" + body
    with pytest.raises(RACE):
        start(run, body, grid=clusters, block=64 // clusters)


@pytest.mark.parametrize(
    "sync, release, acquire, after",
    [
        ("bar.warp.sync -1;", "st.release.cta.global.b32 [%d0], %r9", "ld.acquire.gpu.global.b32 %r6, [%d0]", ""),
        ("bar.warp.sync -1;", "atom.global.acq_rel.cta.add.u32 %r8, [%d0], 1", "ld.acquire.gpu.global.b32 %r6, [%d0]", ""),
        ("bar.warp.sync -1;", "st.release.gpu.global.b32 [%d0], %r9", "ld.acquire.cluster.global.b32 %r6, [%d0]", ""),
        ("fence.acq_rel.cta;", "st.relaxed.gpu.global.b32 [%d0], %r9", "ld.relaxed.gpu.global.b32 %r6, [%d0]", "membar.gl;"),
        ("membar.gl;", "st.relaxed.gpu.global.b32 [%d0], %r9", "ld.volatile.global.b32 %r6, [%d0]", "membar.cta;"),
    ],
)  # fmt: skip
def test_a_scope_that_does_not_reach_another_cluster_orders_within_one_alone(run, sync, release, acquire, after):
    body = FLAG.format(sync=sync, release=release, acquire=acquire, after=after)
    start(run, body, grid=1, block=64)
    with pytest.raises(RACE):
        start(run, "mov.u32 %r2, %ctaid.x; setp.eq.u32 %p1, %r2, 0;" + body, grid=2, block=32)


@pytest.mark.parametrize("clusters", [1, 2])
def test_a_fence_releases_only_what_came_before_it(run, clusters):
    flag = ("st.relaxed.gpu.global.b32 [%d0], %r9", "ld.acquire.gpu.global.b32 %r6, [%d0]")
    body = "fence.acq_rel.gpu;" + FLAG.format(sync="", release=flag[0], acquire=flag[1], after="")
    if clusters == 2:
        body = "mov.u32 %r2, %ctaid.x; setp.eq.u32 %p1, %r2, 0;" + body
    with pytest.raises(RACE):
        start(run, body, grid=clusters, block=64 // clusters)


def test_two_clusters_that_write_the_same_word_race(run):
    with pytest.raises(RACE, match="of cluster [01]"):
        start(run, "st.global.b32 [%d2], %r0;", grid=2, block=32)


def test_clusters_may_write_neighbouring_words_and_add_atomically(run):
    body = "mov.u32 %r6, %ctaid.x; mul.wide.u32 %d3, %r6, 128; add.s64 %d3, %d3, %d2; st.global.b32 [%d3], %r0; red.global.add.u32 [%d0+1020], 1;"
    out = start(run, body, grid=4, block=32)
    assert out[:128] == [*range(32)] * 4 and out[255] == 128


# CTA 0 (%p1) reads words that CTA 1 (%p2) overwrites once a flag behind them says so.
READ_FLAG = """
    mov.u32 %r2, %ctaid.x; setp.eq.u32 %p1, %r2, 0; setp.eq.u32 %p2, %r2, 1; mul.wide.u32 %d3, %r1, 4; add.s64 %d3, %d3, %d0;
    @%p2 bra WAIT; {who} ld.global.b32 %r7, [%d3]; {sync} @%p0 red{release}.gpu.global.add.u32 [%d0+256], 1; bra END;
    WAIT: ld{acquire}.gpu.global.b32 %r6, [%d0+256]; setp.eq.u32 %p3, %r6, 0; @%p3 bra WAIT; {who} st.global.b32 [%d3], %r9; END:
"""


@pytest.mark.parametrize("who, sync", [("", "bar.warp.sync -1;"), ("@%p0", "")], ids=["a warp", "a lane"])
def test_a_cluster_may_overwrite_what_another_has_told_it_to_have_read(run, who, sync):
    start(run, READ_FLAG.format(who=who, sync=sync, release=".release", acquire=".acquire"), grid=2, block=32)


@pytest.mark.parametrize(
    "sync, release, acquire",
    [("", ".release", ".acquire"), ("bar.warp.sync -1;", ".relaxed", ".acquire"), ("bar.warp.sync -1;", ".release", ".relaxed")],
    ids=["other lanes", "no release", "no acquire"],
)  # fmt: skip
def test_a_cluster_that_overwrites_what_another_may_still_read_races(run, sync, release, acquire):
    with pytest.raises(RACE, match="after the read by warp 0 .*of cluster 0"):
        start(run, READ_FLAG.format(who="", sync=sync, release=release, acquire=acquire), grid=2, block=32)


@pytest.mark.parametrize("teller", [0, 1])
def test_of_two_clusters_that_read_none_is_forgotten(run, teller):
    body = f"""mov.u32 %r2, %ctaid.x; setp.eq.u32 %p1, %r2, 2; setp.eq.u32 %p2, %r2, {teller};
    @%p1 bra WAIT; ld.global.b32 %r7, [%d0]; @!%p2 bra END; bar.warp.sync -1; @%p0 st.release.gpu.global.b32 [%d0+256], %r9; bra END;
    WAIT: ld.acquire.gpu.global.b32 %r6, [%d0+256]; setp.eq.u32 %p3, %r6, 0; @%p3 bra WAIT; @%p0 st.global.b32 [%d0], %r9; END:"""
    with pytest.raises(RACE, match=f"after the read by warp 0 .*of cluster {1 - teller}"):
        start(run, body, grid=3, block=32)


@pytest.mark.parametrize("sync, races", [("bar.warp.sync -1;", False), ("", True)], ids=["converged", "alone"])
def test_a_lane_does_not_tell_other_clusters_of_other_lanes_writes(run, sync, races):
    body = """mov.u32 %r2, %ctaid.x; setp.eq.u32 %p1, %r2, 0; mul.wide.u32 %d3, %r1, 4; add.s64 %d3, %d3, %d0;
    @!%p1 bra WAIT; st.global.b32 [%d3], %r9; SYNC @%p0 st.release.gpu.global.b32 [%d0+256], %r9; bra END;
    WAIT: ld.acquire.gpu.global.b32 %r6, [%d0+256]; setp.eq.u32 %p3, %r6, 0; @%p3 bra WAIT; ld.global.b32 %r7, [%d3]; END:"""
    with pytest.raises(RACE) if races else contextlib.nullcontext():
        start(run, body.replace("SYNC", sync), grid=2, block=32)


def test_a_lane_publishes_only_what_it_did_itself(run):
    body = "@%p1 st.shared.b32 [%r5], %r0; setp.eq.and.u32 %p3, %r1, 0, %p1; {sync} @%p3 st.release.cta.shared.b32 [%r3+252], %r9; bar.arrive 1, 64; WAIT: @%p1 bra END; ld.acquire.cta.shared.b32 %r6, [%r3+252]; setp.eq.u32 %p4, %r6, 0; @%p4 bra WAIT; ld.shared.b32 %r7, [%r5]; END:"
    body = "@%p1 st.shared.b32 [%r3+252], 0; bar.sync 2;" + body.replace("bar.arrive 1, 64;", "")
    start(run, body.format(sync="bar.warp.sync -1;"))
    with pytest.raises(RACE, match="by warp 0 lane 1"):
        start(run, body.format(sync=""))


@pytest.mark.parametrize("device", [{"checks": False}], indirect=True)
def test_checks_can_be_switched_off(run):
    start(run, "@%p1 st.shared.b32 [%r5], %r0; @%p2 st.shared.b32 [%r5], %r0;")


def test_a_long_kernel_does_not_fill_the_detector(run):
    """100,000 distinct accesses, of which the detector keeps what memory still remembers; warp 2 is ordered with none."""
    body = """setp.eq.u32 %p3, %r2, 2; mov.u32 %r10, 0; @%p3 bra SPIN; @%p1 st.shared.b32 [%r5+128], %r0;
    LOOP: @%p1 st.shared.b32 [%r5], %r0; bar.sync 1, 64; @%p2 ld.shared.b32 %r6, [%r5]; bar.sync 1, 64;
    add.u32 %r10, %r10, 1; setp.lt.u32 %p4, %r10, 50000; @%p4 bra LOOP; ld.shared.b32 %r6, [%r5+128]; bra END;
    SPIN: add.u32 %r10, %r10, 1; setp.lt.u32 %p4, %r10, 200000; @%p4 bra SPIN; {end} END:"""
    start(run, body.format(end=""), block=96)
    with pytest.raises(RACE, match="write by warp 0 lane 0 .PTX line .*@%p1 st.shared.b32 ..r5., "):
        start(run, body.format(end="st.shared.b32 [%r5], %r0;"), block=96)
    with pytest.raises(RACE, match="write by warp 0 lane 0 .PTX line .*@%p1 st.shared.b32 ..r5.128"):
        start(run, body.format(end="ld.shared.b32 %r6, [%r5+128];"), block=96)


@pytest.mark.parametrize("arch", ["sm_100a"], indirect=True)
def test_a_lane_does_not_publish_other_lanes_stores_to_tensor_memory(run):
    """tcgen05.wait::st waits for the executing thread's own stores: an elected arrival needs bar.warp.sync before it."""
    body = """
    @%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r3], 32;
    setp.eq.u32 %p3, %r0, 0; mov.u32 %r10, bars; @%p3 mbarrier.init.shared.b64 [%r10], 1; bar.sync 0; ld.shared.b32 %r11, [%r3];
    @!%p1 bra OTHERS;
    tcgen05.st.sync.aligned.32x32b.x1.b32 [%r11], {{%r1}}; tcgen05.wait::st.sync.aligned;
    {sync} @%p3 mbarrier.arrive.shared.b64 _, [%r10]; bra END;
    OTHERS: setp.ne.u32 %p4, %r2, 4; @%p4 bra END;
    WAIT: mbarrier.try_wait.parity.shared.b64 %p5, [%r10], 0; @!%p5 bra WAIT;
    tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%r12}}, [%r11]; tcgen05.wait::ld.sync.aligned;
    END: bar.sync 0; @%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r11, 32;
    """
    start(run, body.format(sync="bar.warp.sync -1;"), block=160)
    with pytest.raises(RACE, match="tensor memory"):
        start(run, body.format(sync=""), block=160)


@pytest.mark.parametrize("arch", ["sm_100a"], indirect=True)
def test_tensor_memory_is_handed_on_behind_the_wait_for_its_load(run):
    """Warp 0 loads, warp 4 (of the same tensor memory lanes) then writes. The PTX ISA's wait is tcgen05.wait::ld."""
    body = """
    @%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r3], 32;
    bar.sync 0; ld.shared.b32 %r11, [%r3]; setp.eq.u32 %p4, %r2, 4;
    @%p1 tcgen05.st.sync.aligned.32x32b.x1.b32 [%r11], {{%r1}}; tcgen05.wait::st.sync.aligned;
    @%p1 tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%r12}}, [%r11];
    {before} bar.sync 0; {after}
    @%p4 tcgen05.st.sync.aligned.32x32b.x1.b32 [%r11], {{%r1}}; tcgen05.wait::st.sync.aligned;
    bar.sync 0; @%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r11, 32;
    """
    wait = "tcgen05.wait::ld.sync.aligned;"
    start(run, body.format(before=wait, after=""), block=160)
    with pytest.raises(RACE, match="tcgen05.ld"):
        start(run, body.format(before="", after=wait), block=160)


READ_THEN_OVERWRITTEN = """
    mov.u32 %r10, bars; setp.eq.u32 %p3, %r0, 0; @%p3 mbarrier.init.shared.b64 [%r10], {arrivals}; @%p3 st.shared.b32 [%r3], 1;
    setp.lt.u32 %p5, %r1, {readers}; bar.sync 0; @!%p1 bra WRITER;
    @%p5 ld.shared.b32 %r6, [%r3]; {sync} @{arriving} mbarrier.arrive.shared.b64 _, [%r10]; bra END;
    WRITER: mbarrier.try_wait.parity.shared.b64 %p6, [%r10], 0; @!%p6 bra WRITER; @%p0 st.shared.b32 [%r3], 2; END:
"""


@pytest.mark.parametrize("readers, arrivals, arriving, sync", [
    (32, 1, "%p0", "bar.warp.sync -1;"), (32, 32, "%p1", ""), (8, 8, "%p5", ""), (1, 1, "%p0", ""),
])  # fmt: skip
def test_lanes_that_have_read_one_word_may_let_it_be_overwritten(run, readers, arrivals, arriving, sync):
    start(run, READ_THEN_OVERWRITTEN.format(readers=readers, arrivals=arrivals, arriving=arriving, sync=sync))


@pytest.mark.parametrize("touch", ["st.shared.b32 [%r12], %r1", "ld.shared.b32 %r6, [%r12]"], ids=["written", "read"])
def test_lanes_that_are_no_neighbours_speak_for_their_own_words(run, touch):
    """Every eighth lane touches a word next to the last one's, and tells of it in one of two halves."""
    start(run, f"""
    and.b32 %r10, %r1, 7; setp.eq.u32 %p3, %r10, 0; shr.u32 %r11, %r1, 1; add.u32 %r12, %r3, %r11; mov.u32 %r13, bars;
    setp.eq.u32 %p4, %r0, 0; @%p4 mbarrier.init.shared.b64 [%r13], 4; @%p4 st.shared.v4.b32 [%r3], {{%r1, %r1, %r1, %r1}};
    bar.sync 0; @%p2 bra WAIT; @!%p3 bra END; {touch}; setp.lt.u32 %p5, %r1, 16;
    @%p5 mbarrier.arrive.shared.b64 _, [%r13]; @!%p5 mbarrier.arrive.shared.b64 _, [%r13]; bra END;
    WAIT: mbarrier.try_wait.parity.shared.b64 %p6, [%r13], 0; @!%p6 bra WAIT; @%p0 st.shared.v4.b32 [%r3], {{%r1, %r1, %r1, %r1}}; END:
    """)


@pytest.mark.parametrize("readers, arrivals, arriving", [(32, 1, "%p0"), (2, 1, "%p0"), (32, 8, "%p5")])
def test_a_lane_does_not_speak_for_others_that_read_the_same_word(run, readers, arrivals, arriving):
    """mbarrier.arrive has release semantics for the executing thread alone (PTX ISA, "mbarrier.arrive")."""
    body = READ_THEN_OVERWRITTEN.format(readers=readers, arrivals=arrivals, arriving=arriving, sync="SYNC")
    body = body.replace("SYNC", "setp.lt.u32 %p5, %r1, 8;")
    with pytest.raises(RACE, match="read by warp 0"):
        start(run, body)


def test_a_byte_of_one_lane_is_published_by_that_lane(run):
    """Of a word whose bytes have different histories."""
    body = """
    mov.u32 %r10, bars; setp.eq.u32 %p3, %r0, 0; @%p3 mbarrier.init.shared.b64 [%r10], 1; bar.sync 0; @!%p1 bra READER;
    @%p0 st.shared.b8 [%r3+1], %h1; setp.eq.u32 %p4, %r1, {arriving}; @%p4 mbarrier.arrive.shared.b64 _, [%r10]; bra END;
    READER: mbarrier.try_wait.parity.shared.b64 %p6, [%r10], 0; @!%p6 bra READER; ld.shared.u8 %h2, [%r3+1]; END:
    """
    start(run, body.format(arriving=0))
    with pytest.raises(RACE, match="write by warp 0"):
        start(run, body.format(arriving=1))
