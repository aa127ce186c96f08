"""bar, barrier, barrier.cluster, bar.warp.sync, fence and setmaxnreg, from the PTX ISA's sections on them."""

from __future__ import annotations

import pytest
import torch

from cute_sparse import emulator

I32 = torch.int32
REGISTERS = ".reg .pred %p<8>; .reg .b32 %r<32>; .reg .b64 %d<16>;"
SHARED = ".shared .align 16 .b8 data[4096];"
PROLOGUE = """
    mov.u32 %r0, %tid.x; mov.u32 %r1, data; ld.param.b64 %d0, [out]; shr.u32 %r2, %r0, 5;
    setp.eq.u32 %p0, %r0, 0; mul.wide.u32 %d1, %r0, 4; add.s64 %d1, %d0, %d1; shl.b32 %r3, %r0, 2; add.u32 %r3, %r1, %r3;
    mov.u32 %r4, %laneid;
"""
IN_EVERY_ORDER = pytest.mark.parametrize(
    "device", [{"order": order} for order in ("eager", "late", "random")], indirect=True, ids=lambda s: s["order"]
)


def start(run, body: str, words: int = 256, block: int = 32, **launch) -> list[int]:
    """Runs `body` behind the prologue; returns `words` 32-bit results.

    %r0: thread; %r2: warp; %r4: lane; %d1: the thread's result; %r3: the thread's word of shared memory; %p0: thread 0.
    """
    out = torch.zeros(words, dtype=I32)
    run(PROLOGUE + body, [out], parameters=".param .u64 out", registers=REGISTERS, shared=SHARED, block=block, **launch)
    return out.tolist()


SWAP_WARPS = "st.shared.b32 [%r3], %r0; {sync} xor.b32 %r5, %r0, 32; shl.b32 %r5, %r5, 2; add.u32 %r5, %r5, %r1; ld.shared.b32 %r6, [%r5]; st.global.b32 [%d1], %r6;"


@IN_EVERY_ORDER
@pytest.mark.parametrize(
    "sync",
    ["bar.sync 0;", "bar.cta.sync 3, 64;", "barrier.sync 15;", "barrier.cta.sync.aligned 1, 64;", "mov.u32 %r9, 7; bar.sync %r9, 64;",
     "bar.red.popc.u32 %r9, 2, %p0;"],
)  # fmt: skip
def test_a_barrier_orders_the_memory_of_its_threads(run, sync):
    assert start(run, SWAP_WARPS.format(sync=sync), words=64, block=64) == [t ^ 32 for t in range(64)]


@IN_EVERY_ORDER
def test_producers_arrive_and_consumers_wait(run):
    body = """
    setp.ge.u32 %p1, %r2, 2; @%p1 bra CONSUMER;
    st.shared.b32 [%r3], %r0; bar.arrive 1, 96; bra END;
    CONSUMER: bar.sync 1, 96; ld.shared.b32 %r5, [%r3+-256]; ld.shared.b32 %r6, [%r3+-128]; add.u32 %r6, %r6, %r5; st.global.b32 [%d1], %r6;
    END:
    """
    assert start(run, body, words=96, block=96)[64:] == [t + t + 32 for t in range(32)]


def test_a_barrier_counts_whole_warps(run):
    assert start(run, "bar.sync 0, 64; @%p0 st.global.b32 [%d1], 5;", block=40)[0] == 5


def test_a_barrier_of_the_whole_cta_does_not_wait_for_warps_that_ended(run):
    assert start(run, "setp.eq.u32 %p1, %r2, 1; @%p1 ret; bar.sync 0; @%p0 st.global.b32 [%d1], 5;", block=64)[0] == 5


@pytest.mark.parametrize("operation, expected", [("popc.u32 %r5", 35), ("and.pred %p2", 0), ("or.pred %p2", 1)])
def test_reductions(run, operation, expected):
    body = f"setp.lt.u32 %p1, %r0, 35; bar.red.{operation}, 0, 64, %p1;"
    if "pred" in operation:
        body += "selp.b32 %r5, 1, 0, %p2;"
    assert start(run, body + "st.global.b32 [%d1], %r5;", words=64, block=64) == [expected] * 64


def test_a_reduction_may_negate_its_predicate(run):
    body = "setp.lt.u32 %p1, %r0, 35; bar.red.popc.u32 %r5, 0, !%p1; st.global.b32 [%d1], %r5;"
    assert start(run, body, words=64, block=64) == [29] * 64


def test_successive_generations_keep_their_results_apart(run):
    body = "mov.u32 %r7, 0; mov.u32 %r6, 0; LOOP: setp.le.u32 %p1, %r0, %r7; bar.red.popc.u32 %r5, 0, %p1; mad.lo.u32 %r6, %r6, 10, %r5; add.u32 %r7, %r7, 1; setp.lt.u32 %p2, %r7, 5; @%p2 bra LOOP; st.global.b32 [%d1], %r6;"
    assert start(run, body, words=64, block=64) == [12345] * 64


def test_diverged_lanes_arrive_singly_at_a_barrier_that_is_not_aligned(run):
    body = "setp.lt.u32 %p1, %r4, 7; @%p1 bra LOW; barrier.sync 1, 64; bra JOIN; LOW: barrier.sync 1, 64; JOIN: st.global.b32 [%d1], 3;"
    assert start(run, body, words=64, block=64) == [3] * 64


@pytest.mark.parametrize(
    "body, error, message",
    [
        ("bar.sync 16;", "BarrierError", "barrier 16"),
        ("bar.sync 0, 48;", "BarrierError", "multiple of 32"),
        ("bar.sync 0, 0;", "BarrierError", "multiple of 32"),
        ("bar.sync 0, 128;", "BarrierError", "128 in a CTA of 64"),
        ("bar.sync %r4, 64;", "BarrierError", "different barriers"),
        ("setp.eq.u32 %p1, %r2, 0; @%p1 bar.sync 1, 64; @!%p1 bar.sync 1, 32;", "BarrierError", "with 32 threads while"),
        ("@%p0 bar.sync 0;", "ConvergenceError", "not all threads"),
    ],
)
def test_misuse_is_reported(run, body, error, message):
    with pytest.raises(getattr(emulator.errors, error), match=message):
        start(run, body, block=64)


def test_more_arrivals_than_a_barrier_expects_are_an_error(run):
    body = "setp.lt.u32 %p1, %r4, 16; @%p1 bra LOW; barrier.arrive 1, 32; bra END; LOW: barrier.arrive 1, 32; END: setp.lt.u32 %p1, %r4, 31; @%p1 barrier.arrive 1, 32; barrier.arrive 1, 32;"
    with pytest.raises(emulator.errors.BarrierError, match="over-arrival"):
        start(run, body)


def test_deadlock_tells_who_has_arrived(run):
    with pytest.raises(emulator.errors.Deadlock, match="barrier 5: 64 of 96 threads have arrived"):
        start(run, "setp.lt.u32 %p1, %r2, 2; @%p1 bar.sync 5, 96;", block=96)


# ---------------------------------------------------------------------------------------------------------
# bar.warp.sync


def test_lanes_of_a_mask_meet_at_a_warp_barrier(run):
    body = """mov.u32 %r5, 0; setp.lt.u32 %p1, %r4, 8; @!%p1 bra END; setp.lt.u32 %p2, %r4, 4; @%p2 bra LOW;
    add.u32 %r5, %r5, 10; LOW: add.u32 %r5, %r5, 1; bar.warp.sync 0xff; vote.sync.ballot.b32 %r6, %p2, 0xff; st.global.b32 [%d1], %r6; END:"""
    assert start(run, body, words=8) == [0xF] * 8


def test_a_lane_outside_the_mask_of_its_warp_barrier_is_an_error(run):
    with pytest.raises(emulator.errors.ConvergenceError, match="not in its mask"):
        start(run, "mov.u32 %r5, 0xff; bar.warp.sync %r5;")


# ---------------------------------------------------------------------------------------------------------
# barrier.cluster

REMOTE_READ = """
    mov.u32 %r5, %cluster_ctarank; add.u32 %r6, %r5, 100; @%p0 st.shared.b32 [%r1], %r6; {sync}
    xor.b32 %r7, %r5, 1; mapa.shared::cluster.u32 %r8, %r1, %r7; ld.shared::cluster.b32 %r9, [%r8];
    mul.wide.u32 %d2, %r5, 4; add.s64 %d2, %d0, %d2; @%p0 st.global.b32 [%d2], %r9;
    barrier.cluster.arrive; barrier.cluster.wait;
"""


@pytest.mark.parametrize(
    "sync",
    ["barrier.cluster.arrive; barrier.cluster.wait;", "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;",
     "fence.acq_rel.cluster; barrier.cluster.arrive.relaxed; barrier.cluster.wait;"],
)  # fmt: skip
def test_a_cluster_barrier_orders_distributed_shared_memory(run, sync):
    assert start(run, REMOTE_READ.format(sync=sync), grid=2, cluster=2, block=64)[:2] == [101, 100]


@pytest.mark.parametrize("sync", ["barrier.cluster.arrive.relaxed; barrier.cluster.wait;", "bar.sync 0;",
                                  "fence.mbarrier_init.release.cluster; barrier.cluster.arrive.relaxed; barrier.cluster.wait;"])  # fmt: skip
def test_what_a_cluster_barrier_does_not_release_is_a_race(run, sync):
    with pytest.raises((emulator.errors.RaceDetected, emulator.errors.Uninitialised)):
        start(run, REMOTE_READ.format(sync=sync), grid=2, cluster=2, block=64)


def test_a_cluster_barrier_does_not_wait_for_threads_that_ended(run):
    body = "setp.eq.u32 %p1, %r2, 1; @%p1 ret; barrier.cluster.arrive; barrier.cluster.wait; mov.u32 %r5, %ctaid.x; setp.eq.and.u32 %p0, %r5, 0, %p0; @%p0 st.global.b32 [%d1], 5;"
    assert start(run, body, grid=2, cluster=2, block=64)[0] == 5


@pytest.mark.parametrize(
    "body, message",
    [
        ("barrier.cluster.arrive; barrier.cluster.arrive;", "arrives at the cluster barrier again"),
        ("barrier.cluster.wait;", "without having arrived"),
    ],
)
def test_misuse_of_the_cluster_barrier_is_reported(run, body, message):
    with pytest.raises(emulator.errors.BarrierError, match=message):
        start(run, body, grid=2, cluster=2)


def test_deadlock_at_the_cluster_barrier_names_the_missing_warps(run):
    body = "mov.u32 %r5, %cluster_ctarank; setp.eq.u32 %p1, %r5, 1; setp.eq.and.u32 %p1, %r2, 0, %p1; @%p1 bar.sync 3, 64; barrier.cluster.arrive; barrier.cluster.wait;"
    with pytest.raises(emulator.errors.Deadlock, match="not arrived: CTA rank 1 warp 0"):
        start(run, body, grid=2, cluster=2, block=64)


# ---------------------------------------------------------------------------------------------------------
# fence, membar


@pytest.mark.parametrize(
    "fence",
    ["fence.sc.gpu", "fence.acq_rel.cta", "fence.acquire.cluster", "fence.release.sys", "fence.cta", "membar.cta", "membar.gl",
     "membar.sys", "fence.proxy.async", "fence.proxy.async.global", "fence.proxy.async.shared::cta", "fence.proxy.async.shared::cluster",
     "fence.proxy.alias", "fence.proxy.tensormap::generic.release.gpu", "fence.mbarrier_init.release.cluster"],
)  # fmt: skip
def test_every_spelling_of_a_fence_runs(run, fence):
    assert start(run, f"{fence}; @%p0 st.global.b32 [%d1], 1;")[0] == 1


def test_an_unknown_fence_is_an_unknown_opcode(run):
    with pytest.raises(emulator.errors.UnknownOpcode, match="fence.proxy.wrong"):
        start(run, "fence.proxy.wrong;")


# ---------------------------------------------------------------------------------------------------------
# setmaxnreg


def test_registers_given_back_by_one_warpgroup_serve_another(run):
    # 384 threads start with at most 168 registers each: 65536 / 384, rounded down to a multiple of 8.
    body = "setp.lt.u32 %p1, %r2, 4; @%p1 bra GIVE; setmaxnreg.inc.sync.aligned.u32 240; bra END; GIVE: setmaxnreg.dec.sync.aligned.u32 24; END:"
    start(run, body, block=384)


def test_more_registers_than_the_cta_has_is_a_deadlock(run):
    body = "setp.lt.u32 %p1, %r2, 4; @%p1 bra GIVE; setmaxnreg.inc.sync.aligned.u32 248; bra END; GIVE: setmaxnreg.dec.sync.aligned.u32 24; END:"
    with pytest.raises(emulator.errors.Deadlock, match="setmaxnreg.inc to 248"):
        start(run, body, block=384)


@pytest.mark.parametrize(
    "body, error, message",
    [
        ("setmaxnreg.inc.sync.aligned.u32 100;", "InvalidOperand", "multiple of 8"),
        ("setmaxnreg.dec.sync.aligned.u32 16;", "InvalidOperand", "from 24 to 256"),
        ("setmaxnreg.dec.sync.aligned.u32 256;", "InvalidOperand", "at most 128"),
        ("setp.eq.u32 %p1, %r2, 1; @%p1 bra B; setmaxnreg.dec.sync.aligned.u32 64; bra END; B: setmaxnreg.dec.sync.aligned.u32 56; END:",
         "ConvergenceError", "same warpgroup"),
    ],
)  # fmt: skip
def test_misuse_of_setmaxnreg_is_reported(run, body, error, message):
    with pytest.raises(getattr(emulator.errors, error), match=message):
        start(run, body, words=512, block=512)


TWICE = """
    setp.eq.u32 %p1, %r2, 0; @!%p1 bra OTHER;
    {arrive} {known} {arrive} bra END;
    OTHER: bar.sync 1, 64; {tells} bar.sync 1, 64; END:
"""


@IN_EVERY_ORDER
@pytest.mark.parametrize("known, tells", [("bar.sync 2, 64;", "bar.arrive 2, 64;"), ("bar.sync 2, 64;", "bar.sync 2, 64;")])
def test_a_warp_arrives_again_once_it_knows_that_the_others_have_come(run, known, tells):
    start(run, TWICE.format(arrive="bar.arrive 1, 64;", known=known, tells=tells), block=64)


@IN_EVERY_ORDER
def test_a_warp_that_arrives_again_must_know_that_the_others_have_come(run):
    """bar.arrive does not wait (PTX ISA, "bar, barrier"): both arrivals might count in one use of the barrier."""
    with pytest.raises(emulator.errors.BarrierError, match="arrives at barrier 1 again"):
        start(run, TWICE.format(arrive="bar.arrive 1, 64;", known="", tells=""), block=64)


@IN_EVERY_ORDER
def test_a_warp_may_meet_its_own_arrival(run):
    """How warps that take turns begin: the first hands itself the turn."""
    start(run, "bar.arrive 1, 64; bar.sync 1, 64; bar.arrive 1, 64; bar.sync 1, 64;", block=32 * 2, words=64)
