"""Modelled clocks of small kernels, which follow from the chip's table: two sizes of each, so that what surrounds the
instructions in question cancels. No clock of the host is read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cute_sparse import emulator
from cute_sparse.emulator import chips, timing
from cute_sparse.emulator.errors import EmulatorError
from cute_sparse.emulator.text import module, run_ptx

HOPPER, BLACKWELL = chips.CHIPS["H200"], chips.CHIPS["B200"]
REGISTERS = ".reg .pred %p<8>; .reg .b32 %r<32>; .reg .f32 %f<300>; .reg .f32 %c<160>; .reg .b64 %d<16>; .reg .b64 %s;"
SHARED = ".extern .shared .align 1024 .b8 smem[];"
PROLOGUE = """
    mov.u32 %r0, %tid.x; shr.u32 %r1, %r0, 5; mov.u32 %r2, smem; setp.eq.u32 %p0, %r0, 0; setp.eq.u32 %p1, %r1, 0;
    ld.param.b64 %d0, [data];
    @%p0 mbarrier.init.shared.b64 [%r2], 1;
    fence.mbarrier_init.release.cluster;
    bar.sync 0;
"""
DATA = torch.ones(16384, dtype=torch.float32)


def clocks(body: str, *, chip: chips.Chip = HOPPER, threads: int = 32, prologue: str = PROLOGUE) -> float:
    return timed(body, chip=chip, threads=threads, prologue=prologue).cycles


def timed(
    body: str, *, chip: chips.Chip = HOPPER, threads: int = 32, prologue: str = PROLOGUE, ctas: int = 1
) -> timing.Estimate:
    """Of one cluster of `ctas` CTAs."""
    arch = chip.arch
    ptx = module(arch, prologue + body, parameters=".param .u64 data", registers=REGISTERS, shared=SHARED)
    with emulator.device(arch, sms=ctas, threads=1) as device, timing.traced(device):
        run_ptx(device, ptx, [DATA], grid=ctas, block=(threads, 1, 1), cluster=ctas, shared_bytes=98304)
        return timing.estimate(device, chip)


def exponentials(count: int, *, chained: bool, first: int = 0) -> str:
    source = [0 if not chained or k == 0 else first + k for k in range(count)]
    return "mov.f32 %f0, 0f3F800000;" + "".join(
        f"ex2.approx.ftz.f32 %f{first + k + 1}, %f{source[k]};" for k in range(count)
    )


def test_dependent_exponentials_take_their_latency_each():
    more = clocks(exponentials(40, chained=True)) - clocks(exponentials(10, chained=True))
    assert more == 30 * HOPPER.mufu_latency


def test_independent_exponentials_share_a_sub_partition():
    for warps in (1, 4, 8):  # warp w in sub-partition w % 4
        sizes = [clocks(exponentials(n, chained=False), threads=32 * warps) for n in (20, 60)]
        per_sub_partition = 40 * max(1, warps // 4)
        assert sizes[1] - sizes[0] == pytest.approx(per_sub_partition * 32 / HOPPER.mufu_lanes, abs=8)


def test_b300_has_twice_the_exponentials():
    faster = replace(BLACKWELL, mufu_lanes=chips.CHIPS["B300"].mufu_lanes)
    slow, fast = (
        [clocks(exponentials(n, chained=False), chip=chip) for n in (20, 100)] for chip in (BLACKWELL, faster)
    )
    assert slow[1] - slow[0] == 2 * (fast[1] - fast[0])


def test_independent_instructions_fill_the_gaps_of_a_chain():
    chain = exponentials(10, chained=True)
    other = "".join(f"fma.rn.f32 %f{100 + k}, %f0, %f0, %f0;" for k in range(20))
    assert clocks(chain + other) == clocks(chain)
    far = chain + "bra NEXT; NEXT:" + other  # but not across a branch
    assert clocks(far) >= clocks(chain) + 20


def test_a_multiplication_that_only_an_addition_uses_is_free():
    def chain(step: str, count: int) -> str:
        return "mov.f32 %f0, 0f3F800000; mov.f32 %f2, %f0;" + step * count

    fused, alone, kept = (
        clocks(chain(step, 30)) - clocks(chain(step, 10))
        for step in (
            "fma.rn.f32 %f0, %f0, %f2, %f2;",
            "mul.f32 %f1, %f0, %f2; add.f32 %f0, %f1, %f2;",
            "mul.rn.f32 %f1, %f0, %f2; add.f32 %f0, %f1, %f2;",
        )
    )
    assert fused == 20 * HOPPER.alu_latency
    assert kept == 2 * fused
    assert alone == kept  # %f1 is written many times: the assembler's rule is for a value used once
    once = clocks(chain("", 0) + "mul.f32 %f1, %f0, %f2; add.f32 %f3, %f1, %f2; ex2.approx.ftz.f32 %f4, %f3;")
    twice = clocks(chain("", 0) + "mul.rn.f32 %f1, %f0, %f2; add.f32 %f3, %f1, %f2; ex2.approx.ftz.f32 %f4, %f3;")
    assert twice - once == HOPPER.alu_latency


# 128 threads write 24 KiB of zeroes at offset 1024, %s is where they are in a matrix descriptor.
FILL = """
    setp.ge.u32 %p2, %r0, 128; @%p2 bra FILLED;
    shl.b32 %r3, %r0, 4; add.u32 %r3, %r3, %r2; mov.u32 %r4, 0; mov.u32 %r5, 0;
    FILL: st.shared.v4.b32 [%r3+1024], {%r4, %r4, %r4, %r4}; add.u32 %r3, %r3, 2048; add.u32 %r5, %r5, 1;
    setp.lt.u32 %p2, %r5, 12; @%p2 bra FILL; fence.proxy.async.shared::cta;
    FILLED: bar.sync 0; add.u32 %r6, %r2, 1024; shr.u32 %r6, %r6, 4; cvt.u64.u32 %s, %r6;
"""
# A is 64 x 16 and B n x 16 bf16 at offset 1024, no swizzle; both read the same zeroes.
DESCRIPTOR = 1 << 62 | 16 << 32 | 8 << 16


def products(count: int, n: int) -> str:
    """Of every warpgroup, one group each."""
    sums = "{" + ", ".join(f"%c{k}" for k in range(n // 2)) + "}"
    mma = (
        f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {sums}, %s, %s, 1, 1, 1, 0, 0;"
        "wgmma.commit_group.sync.aligned;"
    )
    zeroes = "".join(f"mov.f32 %c{k}, 0f00000000;" for k in range(n // 2))
    return (
        f"{FILL} or.b64 %s, %s, {DESCRIPTOR}; {zeroes} wgmma.fence.sync.aligned; {mma * count}"
        "wgmma.wait_group.sync.aligned 0;"
    )


@pytest.mark.parametrize(
    ("n", "each"),
    [
        (128, 64 * 128 * 16 / HOPPER.mma_macs),  # the tensor core's rate
        (32, (64 + 32) * 32 / HOPPER.shared_bytes),  # the operands come slower than they are multiplied
    ],
)
def test_a_chain_of_wgmma_runs_at_the_slower_of_its_rates(n, each):
    assert clocks(products(30, n), threads=128) - clocks(products(10, n), threads=128) == 20 * each


def test_two_warpgroups_share_the_tensor_core():
    one, two = (timed(products(20, 128), threads=threads).ctas[0].tensor for threads in (128, 256))
    assert two == 2 * one == 2 * 20 * 64 * 128 * 16 / HOPPER.mma_macs
    assert clocks(products(40, 128), threads=256) - clocks(products(20, 128), threads=256) == 2 * 20 * 64


WAIT = "WAIT{0}: mbarrier.try_wait.parity.shared.b64 %p3, [%r2], {1}; @!%p3 bra WAIT{0};"


def round_trips(count: int, nbytes: int) -> str:
    """One thread loads `nbytes` and waits for them, `count` times."""
    trips = "".join(
        f"mbarrier.arrive.expect_tx.shared.b64 _, [%r2], {nbytes};"
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
        f" [%r2+1024], [%d0], {nbytes}, [%r2];" + WAIT.format(k, k % 2)
        for k in range(count)
    )
    return f"@!%p0 bra END; {trips} END:"


def test_a_round_trip_to_global_memory_takes_the_latency_and_the_bytes():
    def trip(nbytes: int, chip: chips.Chip = HOPPER) -> float:
        return (clocks(round_trips(8, nbytes), chip=chip) - clocks(round_trips(4, nbytes), chip=chip)) / 4

    assert trip(16384) - trip(1024) == pytest.approx(15360 / HOPPER.l2_bytes, abs=1)
    assert trip(1024) >= HOPPER.tma_latency
    farther = replace(HOPPER, tma_latency=HOPPER.tma_latency + 1000)
    assert trip(1024, farther) - trip(1024) == 1000


def test_what_is_loaded_first_comes_from_memory_and_what_is_loaded_again_from_l2():
    streaming = HOPPER.streaming(HOPPER.sms)
    assert streaming.hbm_bytes * streaming.sms * streaming.clock_ghz * 1e9 == pytest.approx(0.9 * 4.8e12)

    def more(body: str) -> float:
        return clocks(body, chip=streaming) - clocks(body)

    slower = 8192 / streaming.hbm_bytes - 8192 / HOPPER.l2_bytes + HOPPER.hbm_latency
    assert more(round_trips(1, 8192)) == more(round_trips(5, 8192)) == pytest.approx(slower, abs=2)
    apart = round_trips(5, 8192).split("cp.async")
    apart = "cp.async".join(part.replace("[%d0]", f"[%d0+{8192 * (k - 1)}]") for k, part in enumerate(apart))
    assert more(apart) == pytest.approx(5 * slower, abs=10)
    assert timed(apart).ctas[0].fresh_bytes == 5 * 8192 and timed(round_trips(5, 8192)).ctas[0].fresh_bytes == 8192


def multicasts(count: int, nbytes: int) -> str:
    """Each of two CTAs sends `count` times `nbytes` to both, and waits for all."""
    meet = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    copies = "".join(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        f" [%r3+{1024 + 2 * k * nbytes}], [%d0], {nbytes}, [%r2], %h0;"
        for k in range(count)
    )
    return (
        f".reg .b16 %h0; mov.b16 %h0, 3; mov.u32 %r3, %cluster_ctarank; mad.lo.u32 %r3, %r3, {nbytes}, %r2;"
        f"@%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], {2 * count * nbytes}; {meet}"
        f"@!%p0 bra END; {copies} {WAIT.format(0, 0)} END: bar.warp.sync -1; {meet}"
    )


@pytest.mark.parametrize(("port_bytes", "each"), [(64, 2 * 8192 / 64), (1e9, 8192 / BLACKWELL.l2_bytes)])
def test_a_multicast_enters_every_cta_that_it_reaches(port_bytes, each):
    chip = replace(BLACKWELL, port_bytes=port_bytes)
    few, many = (timed(multicasts(count, 8192), chip=chip, ctas=2).cycles for count in (2, 5))
    assert many - few == pytest.approx(3 * each, abs=8)


def test_copies_by_groups_are_waited_for():
    copy = "cp.async.cg.shared.global [%r2+1024], [%d0], 16; cp.async.commit_group; cp.async.wait_group 0;"
    waited, unwaited = (
        clocks(f"@!%p0 bra END; {copies} END:")
        for copies in (copy * 3, copy.replace("cp.async.wait_group 0;", "") * 2 + copy)
    )
    assert waited - unwaited == pytest.approx(2 * HOPPER.tma_latency, rel=0.05)


@pytest.mark.parametrize("barrier", ["mbarrier", "bar.sync"])
def test_a_wait_that_is_removed_changes_the_estimate(barrier):
    """Warp 0 computes and signals; warp 1 waits (or not) and computes as much."""
    work = {warp: exponentials(30, chained=True) for warp in (0, 1)}
    signal, wait = {
        "mbarrier": ("@%p0 mbarrier.arrive.shared.b64 _, [%r2];", WAIT.format(0, 0)),
        "bar.sync": ("bar.arrive 1, 64;", "bar.sync 1, 64;"),
    }[barrier]

    def kernel(waits: bool) -> timing.Estimate:
        last = "" if barrier == "mbarrier" or waits else signal  # nobody may stay behind
        other = wait if waits else last
        # The signal follows the exponentials: their result decides whether it is given (it always is).
        body = (
            f"@!%p1 bra OTHER; {work[0]} setp.gt.f32 %p4, %f30, 0f00000000; @!%p4 bra END; {signal} bra END;"
            f"OTHER: {other} {work[1]} END:"
        )
        return timed(body, threads=64)

    together, after = kernel(waits=False), kernel(waits=True)
    chain = 30 * HOPPER.mufu_latency
    assert after.cycles - together.cycles == pytest.approx(chain, rel=0.15)
    kind = "mbarrier" if barrier == "mbarrier" else "bar.sync"
    waited = after.ctas[0].warps[1].waits[kind]
    assert waited == pytest.approx(chain, rel=0.15)
    assert waited >= sum(together.ctas[0].warps[1].waits.values()) + 0.8 * chain


# ---- Blackwell: products of the tensor queue, tensor memory --------------------------------------------------------

TENSOR = f"""{FILL}
    @!%p1 bra ALLOCATED;
    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r2+16], 512;
    tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
    ALLOCATED: bar.sync 0; ld.shared.b32 %r7, [%r2+16];
"""
TENSOR_END = """
    bar.sync 0; @!%p1 bra END; tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r7, 512; END:
"""


def tensor_products(count: int, n: int) -> str:
    """M = 128, K = 16, bf16 into fp32; the barrier that the commit signals is waited for."""
    shape = 1 << 4 | 1 << 7 | 1 << 10 | (n // 8) << 17 | 8 << 24
    descriptor = 1 << 46 | 16 << 32 | 8 << 16
    mma = f"tcgen05.mma.cta_group::1.kind::f16 [%r7], %s, %s, {shape}, 0;"
    return (
        f"{TENSOR} or.b64 %s, %s, {descriptor}; @!%p0 bra WAIT0; {mma * count}"
        "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r2];"
        f"{WAIT.format(0, 0)} {TENSOR_END}"
    )


@pytest.mark.parametrize(
    ("n", "each"),
    [
        (256, 128 * 256 * 16 / BLACKWELL.mma_macs),
        (64, (128 + 64) * 32 / BLACKWELL.shared_bytes),
    ],
)
def test_the_tensor_queue_runs_at_the_slower_of_its_rates(n, each):
    sizes = [clocks(tensor_products(count, n), chip=BLACKWELL, threads=128) for count in (10, 40)]
    assert sizes[1] - sizes[0] == 30 * each


def test_loads_from_tensor_memory_take_a_column_a_clock():
    def loads(count: int) -> str:
        stored = "tcgen05.st.sync.aligned.32x32b.x16.b32 [%r8], {"
        stored += ", ".join("%r4" for _ in range(16)) + "}; tcgen05.wait::st.sync.aligned;"
        load = "tcgen05.ld.sync.aligned.32x32b.x16.b32 {" + ", ".join(f"%c{k}" for k in range(16)) + "}, [%r8];"
        address = "shl.b32 %r8, %r1, 21; add.u32 %r8, %r8, %r7;"
        return f"{TENSOR} {address} {stored} {load * count} tcgen05.wait::ld.sync.aligned; {TENSOR_END}"

    sizes = [clocks(loads(count), chip=BLACKWELL, threads=128) for count in (10, 40)]
    assert sizes[1] - sizes[0] == 30 * 16 / BLACKWELL.tensor_load_columns


# ---- What it refuses -----------------------------------------------------------------------------------------------


def test_only_the_eager_order_is_traced():
    with emulator.device("sm_90a", order="late") as device, pytest.raises(EmulatorError, match="eager"):
        with timing.traced(device):
            pass


def test_nothing_traced_is_an_error():
    with emulator.device("sm_90a") as device:
        with pytest.raises(EmulatorError, match="no launch has been traced"):
            timing.estimate(device, HOPPER)
        with timing.traced(device, cluster=0):
            ptx = module("sm_90a", PROLOGUE, parameters=".param .u64 data", registers=REGISTERS, shared=SHARED)
            run_ptx(device, ptx, [DATA], grid=(3, 1, 1), shared_bytes=1024)
            assert timing.traced_clusters(device) == 1
            with pytest.raises(IndexError, match="1 clusters"):
                timing.estimate(device, HOPPER, cluster=1)
            with pytest.raises(IndexError, match="1 launches"):
                timing.estimate(device, HOPPER, launch=1)
        with pytest.raises(EmulatorError, match="no launch has been traced"):  # forgotten
            timing.estimate(device, HOPPER)


def test_an_arch_without_a_chip_is_refused():
    with pytest.raises(ValueError, match="sm_80.*sm_90a"):
        chips.chip_of("sm_80")
    assert {chip.arch for chip in chips.CHIPS.values()} >= set(emulator.ARCHES)
