"""mbarrier instructions, from the PTX ISA's section "Parallel Synchronization and Communication Instructions"."""

from __future__ import annotations

import pytest
import torch

from cute_sparse import emulator

I32, I64 = torch.int32, torch.int64
REGISTERS = ".reg .pred %p<8>; .reg .b32 %r<32>; .reg .b64 %d<16>;"
SHARED = ".shared .align 8 .b8 bars[64]; .shared .align 16 .b8 data[1024];"
PROLOGUE = """
    mov.u32 %r0, %tid.x; mov.u32 %r1, bars; mov.u32 %r2, data; ld.param.b64 %d0, [out];
    setp.eq.u32 %p0, %r0, 0;
"""
IN_EVERY_ORDER = pytest.mark.parametrize(
    "device", [{"order": order} for order in ("eager", "late", "random")], indirect=True, ids=lambda s: s["order"]
)


def start(run, body: str, words: int = 8, block: int = 32, **launch) -> list[int]:
    """Runs `body` behind the prologue; returns `words` 32-bit results. %p0: thread 0; %r1: bars; %r2: data."""
    out = torch.zeros(words, dtype=I32)
    run(PROLOGUE + body, [out], parameters=".param .u64 out", registers=REGISTERS, shared=SHARED, block=block, **launch)
    return out.tolist()


def init(count: int | str, offset: int = 0) -> str:
    return f"@%p0 mbarrier.init.shared.b64 [%r1+{offset}], {count}; fence.mbarrier_init.release.cluster; bar.sync 0;"


def probe(parity: int, word: int) -> str:
    """Thread 0 stores whether the phase of that parity has completed."""
    return f"""mbarrier.test_wait.parity.shared.b64 %p1, [%r1], {parity}; selp.b32 %r3, 1, 0, %p1;
    @%p0 st.global.b32 [%d0+{4 * word}], %r3;"""


def test_a_fresh_barrier_has_completed_the_phase_before_its_first(run):
    assert start(run, init(1) + probe(0, 0) + probe(1, 1))[:2] == [0, 1]


def test_a_phase_completes_with_its_last_arrival(run):
    arrive = "@%p0 mbarrier.arrive.shared.b64 %d1, [%r1];"
    body = init(2) + arrive + probe(0, 0) + arrive + probe(0, 1) + probe(1, 2) + arrive + arrive + probe(0, 3) + probe(1, 4)
    assert start(run, body)[:5] == [0, 1, 0, 0, 1]


def test_an_arrival_may_count_more_than_one(run):
    body = init(5) + "@%p0 mbarrier.arrive.shared.b64 %d1, [%r1], 3;" + probe(0, 0)
    assert start(run, body + "@%p0 mbarrier.arrive.release.cta.shared::cta.b64 %d1, [%r1], 2;" + probe(0, 1))[:2] == [0, 1]


def test_every_lane_arrives(run):
    assert start(run, init(32) + "mbarrier.arrive.shared.b64 _, [%r1];" + probe(0, 0))[0] == 1


def test_transactions_keep_a_phase_open(run):
    body = init(1) + "@%p0 mbarrier.arrive.expect_tx.shared.b64 %d1, [%r1], 96;" + probe(0, 0)
    body += "@%p0 mbarrier.complete_tx.relaxed.cta.shared.b64 [%r1], 64;" + probe(0, 1)
    assert start(run, body + "@%p0 mbarrier.complete_tx.shared::cta.b64 [%r1], 32;" + probe(0, 2))[:3] == [0, 0, 1]


def test_transactions_may_complete_before_they_are_expected(run):
    body = init(1) + "@%p0 mbarrier.complete_tx.shared.b64 [%r1], 64;" + probe(0, 0)
    body += "@%p0 mbarrier.expect_tx.relaxed.cta.shared.b64 [%r1], 64;" + probe(0, 1)
    assert start(run, body + "@%p0 mbarrier.arrive.shared.b64 _, [%r1];" + probe(0, 2))[:3] == [0, 0, 1]


def test_arrive_drop_lowers_the_count_of_later_phases(run):
    body = init(2) + "@%p0 mbarrier.arrive_drop.shared.b64 %d1, [%r1]; @%p0 mbarrier.arrive.shared.b64 %d1, [%r1];"
    body += probe(0, 0) + "@%p0 mbarrier.arrive.shared.b64 %d1, [%r1];" + probe(1, 1)
    assert start(run, body)[:2] == [1, 1]


def test_the_state_names_its_phase_and_its_pending_count(run):
    body = init(3) + """
    @!%p0 bra END;
    mbarrier.arrive.shared.b64 %d1, [%r1]; mbarrier.pending_count.b64 %r3, %d1; st.global.b32 [%d0], %r3;
    mbarrier.arrive.noComplete.release.cta.shared::cta.b64 %d2, [%r1], 1;
    mbarrier.pending_count.b64 %r3, %d2; st.global.b32 [%d0+4], %r3;
    mbarrier.test_wait.shared.b64 %p1, [%r1], %d1; selp.b32 %r3, 1, 0, %p1; st.global.b32 [%d0+8], %r3;
    mbarrier.arrive.shared.b64 %d3, [%r1];
    mbarrier.try_wait.shared.b64 %p1, [%r1], %d1; selp.b32 %r3, 1, 0, %p1; st.global.b32 [%d0+12], %r3;
    mbarrier.arrive.shared.b64 %d3, [%r1];
    mbarrier.test_wait.shared.b64 %p1, [%r1], %d3; selp.b32 %r3, 1, 0, %p1; st.global.b32 [%d0+16], %r3;
    END:
    """
    assert start(run, body)[:5] == [3, 2, 0, 1, 0]


def test_lanes_may_wait_on_different_barriers_and_parities(run):
    body = init(1) + init(1, 8) + """
    @%p0 mbarrier.arrive.shared.b64 _, [%r1];
    and.b32 %r4, %r0, 1; shl.b32 %r4, %r4, 3; add.u32 %r4, %r4, %r1;
    mbarrier.test_wait.parity.shared.b64 %p1, [%r4], 0;
    vote.sync.ballot.b32 %r5, %p1, -1; @%p0 st.global.b32 [%d0], %r5;
    """
    assert start(run, body)[0] == 0x55555555


@IN_EVERY_ORDER
def test_a_waiting_warp_sees_what_was_written_before_the_arrival(run):
    body = init(32) + """
    mul.lo.u32 %r3, %r0, 4; add.u32 %r3, %r3, %r2;
    setp.ge.u32 %p2, %r0, 32; @%p2 bra CONSUMER;
    st.shared.b32 [%r3], %r0; mbarrier.arrive.shared.b64 _, [%r1]; bra END;
    CONSUMER: mbarrier.try_wait.parity.shared.b64 %p1, [%r1], 0; @!%p1 bra CONSUMER;
    ld.shared.b32 %r4, [%r3+-128]; mul.wide.u32 %d1, %r0, 4; add.s64 %d1, %d1, %d0; st.global.b32 [%d1+-128], %r4;
    END:
    """
    assert start(run, body, words=32, block=64) == list(range(32))


# Warp 0 arrives twice, with time between; warp 1 waits for the first phase.
TWO_PHASES = """
    setp.ge.u32 %p2, %r0, 32; @%p2 bra CONSUMER;
    @%p0 mbarrier.arrive.shared.b64 _, [%r1];
    mov.u32 %r3, 2000; SPIN: sub.u32 %r3, %r3, 1; setp.ne.u32 %p3, %r3, 0; @%p3 bra SPIN;
    {between}
    @%p0 mbarrier.arrive.shared.b64 _, [%r1]; bra END;
    CONSUMER: mbarrier.try_wait.parity.shared.b64 %p1, [%r1], 0; @!%p1 bra CONSUMER;
    {behind}
    END:
"""


@IN_EVERY_ORDER
def test_a_phase_that_may_be_over_before_a_warp_waits_for_it_is_refused(run):
    with pytest.raises(emulator.errors.BarrierError, match="not ordered after the wait by warp 1 .* for the phase before"):
        start(run, init(1) + TWO_PHASES.format(between="", behind=""), block=64)


@IN_EVERY_ORDER
def test_a_phase_that_a_waiting_warp_lets_complete_is_not(run):
    wait = "BACK: mbarrier.try_wait.parity.shared.b64 %p1, [%r1+8], 0; @!%p1 bra BACK;"
    body = TWO_PHASES.format(between=wait, behind="mbarrier.arrive.shared.b64 _, [%r1+8];")
    start(run, init(1) + init(32, 8) + body, block=64)


@IN_EVERY_ORDER
def test_a_loop_that_polls_sees_an_asynchronous_copy_complete(run):
    body = init(1) + """
    add.u32 %r3, %r2, 128; @%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 32;
    @%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%d0], 32, [%r1];
    POLL: mbarrier.test_wait.parity.shared.b64 %p1, [%r1], 0; @!%p1 bra POLL;
    ld.shared.b32 %r4, [%r3]; add.u32 %r4, %r4, 6; @%p0 st.global.b32 [%d0+4], %r4;
    """
    assert start(run, body)[1] == 6


def test_a_try_wait_that_nothing_can_satisfy_returns_false(run):
    body = init(1) + "mbarrier.try_wait.parity.shared.b64 %p1, [%r1], 0; selp.b32 %r3, 7, 9, %p1; @%p0 st.global.b32 [%d0], %r3;"
    assert start(run, body)[0] == 9


def test_a_generic_address_reaches_the_same_barrier(run):
    body = init(1) + "cvt.u64.u32 %d1, %r1; cvta.shared.u64 %d2, %d1; @%p0 mbarrier.arrive.b64 _, [%d2];" + probe(0, 0)
    assert start(run, body)[0] == 1


REMOTE = """
    mov.u32 %r5, %cluster_ctarank; mov.u32 %r6, 0;
    mapa.shared::cluster.u32 %r7, %r1, %r6;
"""
CLUSTER_SYNC = "barrier.cluster.arrive.relaxed; barrier.cluster.wait;"


def test_a_cta_arrives_on_a_barrier_of_another(run):
    body = "@%p0 mbarrier.init.shared.b64 [%r1], 2; fence.mbarrier_init.release.cluster;" + CLUSTER_SYNC + REMOTE + """
    @%p0 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r7];
    setp.ne.u32 %p2, %r5, 0; @%p2 bra END;
    WAIT: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p1, [%r1], 0; @!%p1 bra WAIT;
    @%p0 st.global.b32 [%d0], 5;
    END: barrier.cluster.arrive; barrier.cluster.wait;
    """
    assert start(run, body, grid=2, cluster=2)[0] == 5


def test_deadlock_tells_what_the_barrier_waits_for(run):
    body = init(3) + "@%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 4096; W: mbarrier.try_wait.parity.shared.b64 %p1, [%r1], 0; @!%p1 bra W;"
    with pytest.raises(emulator.errors.Deadlock, match="2 of 3 arrivals pending, 4096 transaction bytes due"):
        start(run, body)


ARRIVE = "@%p0 mbarrier.arrive.shared.b64 _, [%r1];"


@pytest.mark.parametrize(
    "body, error, message",
    [
        (ARRIVE, "BarrierError", "before mbarrier.init"),
        (init(1) + "mbarrier.arrive.shared.b64 _, [%r1];", "BarrierError", "over-arrival"),
        (init(1) + "@%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 16;" + ARRIVE, "BarrierError", "over-arrival"),
        (init(1) + "@%p0 mbarrier.arrive.shared.b64 _, [%r1], 0;", "BarrierError", "arrival count of 0"),
        (init(0), "BarrierError", "arrival count of 0"),
        (init(1 << 20), "BarrierError", "arrival count of 1048576"),
        (init(1) + init(1), "BarrierError", "initialised again"),
        (init(1) + "@%p0 mbarrier.inval.shared.b64 [%r1];" + ARRIVE, "BarrierError", "before mbarrier.init"),
        (init(1) + "@%p0 mbarrier.arrive.noComplete.shared.b64 _, [%r1], 1;", "BarrierError", "noComplete"),
        (init(1) + "@%p0 mbarrier.expect_tx.shared.b64 [%r1], 1048576;", "BarrierError", "transaction count"),
        (init(1, 4), "Misaligned", "8"),
        (init(1, 2048), "OutOfBounds", "shared address"),
        (init(1) + "mbarrier.test_wait.parity.shared.b64 %p1, [%r1], 2;", "InvalidOperand", "parity of 2"),
        (init(1) + "@%p0 mbarrier.arrive.b64 _, [%d0];", "OutOfBounds", "not in shared memory"),
    ],
)
def test_misuse_is_reported(run, body, error, message):
    with pytest.raises(getattr(emulator.errors, error), match=message):
        start(run, body)


def test_inval_allows_another_initialisation(run):
    body = init(1) + "@%p0 mbarrier.inval.shared.b64 [%r1];" + init(2) + ARRIVE + probe(0, 0)
    assert start(run, body)[0] == 0


def test_a_remote_address_needs_shared_cluster(run):
    body = "@%p0 mbarrier.init.shared.b64 [%r1], 1; fence.mbarrier_init.release.cluster;" + CLUSTER_SYNC + REMOTE
    with pytest.raises(emulator.errors.OutOfBounds, match=r"\.shared::cluster"):
        start(run, body + "setp.eq.u32 %p2, %r5, 1; @%p2 mbarrier.arrive.shared.b64 _, [%r7];", grid=2, cluster=2)


def test_arriving_at_a_cta_that_has_ended_is_an_error(run):
    body = "@%p0 mbarrier.init.shared.b64 [%r1], 1; fence.mbarrier_init.release.cluster;" + CLUSTER_SYNC + REMOTE + """
    setp.eq.u32 %p2, %r5, 0; @%p2 ret; mov.u32 %r9, 0;
    SPIN: add.u32 %r9, %r9, 1; setp.lt.u32 %p3, %r9, 2000; @%p3 bra SPIN;
    @%p0 mbarrier.arrive.shared::cluster.b64 _, [%r7];
    """
    with pytest.raises(emulator.errors.OutOfBounds, match="has ended"):
        start(run, body, grid=2, cluster=2)


def test_a_use_that_nothing_orders_behind_the_initialisation_is_a_race(run):
    body = "@%p0 mbarrier.init.shared.b64 [%r1], 2; setp.eq.u32 %p2, %r0, 32; @%p2 mbarrier.arrive.shared.b64 _, [%r1];"
    with pytest.raises(emulator.errors.RaceDetected, match="initialisation by warp 0"):
        start(run, body, block=64)


def test_a_cluster_needs_the_mbarrier_init_fence(run):
    body = "@%p0 mbarrier.init.shared.b64 [%r1], 2;" + CLUSTER_SYNC + REMOTE
    with pytest.raises(emulator.errors.RaceDetected, match="initialisation"):
        start(run, body + "@%p0 mbarrier.arrive.shared::cluster.b64 _, [%r7];", grid=2, cluster=2)
