"""cp.async.bulk and cp.reduce.async.bulk: copies between global and shared memory and between CTAs, reductions."""

from __future__ import annotations

import re

import pytest
import torch

from cute_sparse import emulator
from cute_sparse.emulator import errors
from cute_sparse.emulator.text import module, run_ptx

ORDERS = ("eager", "late", "random")
TILE = 1024
REGISTERS = ".reg .pred %p<8>; .reg .b16 %h<4>; .reg .b32 %r<40>; .reg .b64 %d<20>;"
SHARED = ".extern .shared .align 1024 .b8 smem[];"
PARAMETERS = ".param .u64 from, .param .u64 to"
COMPLETE = "mbarrier::complete_tx::bytes"

PROLOGUE = f"""
    mov.u32 %r0, smem;
    add.u32 %r1, %r0, {TILE};
    mov.u32 %r2, %laneid;
    mov.u32 %r4, %cluster_ctarank;
    mov.u32 %r3, %tid.x;
    setp.eq.u32 %p0, %r2, 0;
    setp.eq.u32 %p7, %r3, 0;
    ld.param.b64 %d0, [from];
    ld.param.b64 %d1, [to];
    @%p7 mbarrier.init.shared.b64 [%r0], 1;
    fence.mbarrier_init.release.cluster;
"""
WAIT = """
    WAIT:
    mbarrier.try_wait.parity.shared.b64 %p1, [%r0], 0;
    @!%p1 bra WAIT;
"""
COMMIT_AND_WAIT = "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;\n"
CLUSTER_BARRIER = "barrier.cluster.arrive;\nbarrier.cluster.wait;\n"


def each_word(nbytes: int, what: str, name: str) -> str:
    """Every lane of one warp does `what` for its words: byte offset in %r10 and %d10."""
    return f"""
    mul.lo.u32 %r10, %r2, 4;
    {name}:
    setp.ge.u32 %p2, %r10, {nbytes};
    @%p2 bra {name}_END;
    add.u32 %r11, %r1, %r10;
    cvt.u64.u32 %d10, %r10;
    {what}
    add.u32 %r10, %r10, 128;
    bra {name};
    {name}_END:
    """


def dump(nbytes: int) -> str:
    return each_word(nbytes, "ld.shared.b32 %r12, [%r11]; add.s64 %d11, %d1, %d10; st.global.b32 [%d11], %r12;", "DUMP")


def fill(nbytes: int) -> str:
    words = "add.s64 %d11, %d0, %d10; ld.global.b32 %r12, [%d11]; st.shared.b32 [%r11], %r12;"
    return each_word(nbytes, words, "FILL") + "fence.proxy.async.shared::cta;\nbar.warp.sync -1;\n"


class Kernel:
    def __init__(self, device, arch):
        self.device, self.arch = device, arch

    def __call__(self, body, arguments, **launch):
        ptx = module(self.arch, PROLOGUE + body, parameters=PARAMETERS, registers=REGISTERS, shared=SHARED)
        return run_ptx(self.device, ptx, arguments, **{"shared_bytes": 16384, **launch})


@pytest.fixture(params=ORDERS)
def kernel(request):
    with emulator.device("sm_90a", order=request.param, seed=3, sms=2, threads=1, max_warp_instructions=10**6) as d:
        yield Kernel(d, "sm_90a")


@pytest.fixture
def eager():
    with emulator.device("sm_90a", sms=2, threads=1, max_warp_instructions=10**6) as d:
        yield Kernel(d, "sm_90a")


def random_bytes(n, seed=0):
    return torch.randint(0, 256, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).reshape(-1).clone()


# ---------------------------------------------------------------------------------------------------------
# Global to shared


def load(nbytes, *, space="shared::cluster", source="[%d0]", destination="[%r1]", expect=None) -> str:
    return f"""
    @%p0 mbarrier.arrive.expect_tx.shared.b64 %d9, [%r0], {nbytes if expect is None else expect};
    @%p0 cp.async.bulk.{space}.global.{COMPLETE} {destination}, {source}, {nbytes}, [%r0];
    """


@pytest.mark.parametrize("space", ["shared::cluster", "shared::cta"])
def test_load(kernel, space):
    x, out = random_bytes(512), torch.zeros(512, dtype=torch.uint8)
    launch = kernel(load(512, space=space) + WAIT + dump(512), [x, out])
    assert torch.equal(out, x) and launch.counts.tma_bytes_loaded == 512


def test_lanes_with_different_operands_issue_one_copy_each(kernel):
    """Four lanes load 64 bytes each; the other lanes' operands are equal to none of theirs but predicated off."""
    x, out = random_bytes(256), torch.zeros(256, dtype=torch.uint8)
    body = f"""
    @%p0 mbarrier.arrive.expect_tx.shared.b64 %d9, [%r0], 256;
    setp.lt.u32 %p3, %r2, 4;
    mul.lo.u32 %r5, %r2, 64;
    mul.wide.u32 %d5, %r2, 64;
    add.u32 %r5, %r1, %r5;
    add.s64 %d5, %d0, %d5;
    bar.warp.sync -1;
    @%p3 cp.async.bulk.shared::cluster.global.{COMPLETE} [%r5], [%d5], 64, [%r0];
    """
    launch = kernel(body + WAIT + dump(256), [x, out])
    assert torch.equal(out, x) and launch.counts.tma_bytes_loaded == 256


def test_multicast(kernel):
    x, out = random_bytes(256), torch.zeros(2, 256, dtype=torch.uint8)
    body = f"""
    {CLUSTER_BARRIER}
    @%p0 mbarrier.arrive.expect_tx.shared.b64 %d9, [%r0], 256;
    setp.eq.u32 %p3, %r4, 1;
    and.pred %p3, %p3, %p0;
    mov.b16 %h0, 3;
    mov.b64 %d6, 0;
    @%p3 cp.async.bulk.shared::cluster.global.{COMPLETE}.multicast::cluster.L2::cache_hint
        [%r1], [%d0], 256, [%r0], %h0, %d6;
    {WAIT}
    mul.wide.u32 %d3, %r4, 256;
    add.s64 %d1, %d1, %d3;
    {dump(256)}
    {CLUSTER_BARRIER}
    """
    launch = kernel(body, [x, out], grid=2, cluster=2)
    assert torch.equal(out[0], x) and torch.equal(out[1], x) and launch.counts.tma_bytes_loaded == 256


def test_prefetch_checks_its_operands(eager):
    x = random_bytes(256)
    prefetch = "cp.async.bulk.prefetch.L2.global [%d0], {};"
    eager(prefetch.format(256), [x, 0])
    with pytest.raises(errors.OutOfBounds):
        eager(prefetch.format(272), [x, 0])


def test_shared_cta_destination_must_be_ones_own(eager):
    body = f"""
    {CLUSTER_BARRIER}
    mapa.shared::cluster.u32 %r20, %r1, 1;
    mapa.shared::cluster.u32 %r21, %r0, 1;
    @%p0 cp.async.bulk.shared::cta.global.{COMPLETE} [%r20], [%d0], 64, [%r21];
    """
    with pytest.raises(errors.InvalidOperand, match="CTA 1"):
        eager(body, [random_bytes(64), 0], grid=2, cluster=2)


# ---------------------------------------------------------------------------------------------------------
# Between CTAs


def between_ctas(opcode: str, before: str = "") -> str:
    """CTA 0 fills 512 bytes and sends them to CTA 1's tile and barrier; CTA 1 waits and dumps."""
    return f"""
    setp.eq.u32 %p3, %r4, 0;
    {CLUSTER_BARRIER}
    @!%p3 bra RECEIVE;
    {fill(512)}
    {CLUSTER_BARRIER}
    mapa.shared::cluster.u32 %r20, %r1, 1;
    mapa.shared::cluster.u32 %r21, %r0, 1;
    @%p0 {opcode} [%r20], [%r1], 512, [%r21];
    bra LEAVE;
    RECEIVE:
    {before}
    @%p0 mbarrier.arrive.expect_tx.shared.b64 %d9, [%r0], 512;
    {CLUSTER_BARRIER}
    {WAIT}
    {dump(512)}
    LEAVE:
    {CLUSTER_BARRIER}
    """


SEND = f"cp.async.bulk.shared::cluster.shared::cta.{COMPLETE}"


def test_copy_to_another_cta(kernel):
    x, out = random_bytes(512), torch.zeros(512, dtype=torch.uint8)
    kernel(between_ctas(SEND), [x, out], grid=2, cluster=2)
    assert torch.equal(out, x)


def test_copy_to_another_cta_must_be_waited_for(kernel):
    x, out = random_bytes(512), torch.zeros(512, dtype=torch.uint8)
    with pytest.raises(errors.EmulatorError) as found:
        kernel(between_ctas(SEND).replace(WAIT, ""), [x, out], grid=2, cluster=2)
    assert isinstance(found.value, (errors.RaceDetected, errors.Uninitialised))


def test_the_source_of_a_copy_to_another_cta(kernel):
    """It is read through the async proxy, and until the receiver's barrier says so."""
    arguments = [random_bytes(512), torch.zeros(512, dtype=torch.uint8)]
    with pytest.raises(errors.MissingProxyFence):
        kernel(between_ctas(SEND).replace("fence.proxy.async.shared::cta;", ""), arguments, grid=2, cluster=2)
    overwritten = between_ctas(SEND).replace("bra LEAVE;", "@%p0 st.shared.b32 [%r1], 1;\nbra LEAVE;")
    with pytest.raises(errors.RaceDetected, match="st.shared"):
        kernel(overwritten, arguments, grid=2, cluster=2)


def test_reduction_into_another_cta(kernel):
    x = torch.randint(0, 1000, (128,), dtype=torch.int32)
    out = torch.zeros(128, dtype=torch.int32)
    ones = each_word(512, "st.shared.b32 [%r11], 7;", "ONES") + "fence.proxy.async.shared::cta;\nbar.warp.sync -1;\n"
    opcode = f"cp.reduce.async.bulk.shared::cluster.shared::cta.{COMPLETE}.add.s32"
    launch = kernel(between_ctas(opcode, ones), [x, out], grid=2, cluster=2)
    assert torch.equal(out, x + 7) and launch.counts.tma_bytes_reduced == 512


def test_copy_to_another_cta_needs_another_cta(eager):
    body = between_ctas(SEND).replace("%r1, 1;", "%r1, 0;").replace("%r0, 1;", "%r0, 0;")
    with pytest.raises(errors.InvalidOperand, match="another CTA"):
        eager(body, [random_bytes(512), torch.zeros(512, dtype=torch.uint8)], grid=2, cluster=2)


# ---------------------------------------------------------------------------------------------------------
# Shared to global


STORE = "@%p0 cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r1], {};\n"


def test_store(kernel):
    x, out = random_bytes(384), torch.zeros(384, dtype=torch.uint8)
    launch = kernel(fill(384) + STORE.format(384) + COMMIT_AND_WAIT, [x, out])
    assert torch.equal(out, x) and launch.counts.tma_bytes_stored == 384


def test_store_with_a_byte_mask():
    x, out = random_bytes(64), torch.zeros(64, dtype=torch.uint8)
    body = f"""
    {fill(64)}
    mov.b16 %h0, 0x8005;
    @%p0 cp.async.bulk.global.shared::cta.bulk_group.cp_mask [%d1], [%r1], 64, %h0;
    """
    with emulator.device("sm_100a", threads=1) as device:
        Kernel(device, "sm_100a")(body + COMMIT_AND_WAIT, [x, out])
    kept = torch.tensor([(0x8005 >> (i % 16)) & 1 for i in range(64)], dtype=torch.uint8)
    assert torch.equal(out, x * kept)


@pytest.mark.parametrize(
    "type_, dtype",
    [
        ("add.f32", torch.float32), ("add.f64", torch.float64), ("add.noftz.f16", torch.float16),
        ("add.noftz.bf16", torch.bfloat16), ("add.s32", torch.int32), ("add.u64", torch.int64),
        ("min.s32", torch.int32), ("max.s64", torch.int64), ("xor.b64", torch.int64), ("and.b32", torch.int32),
        ("max.f16", torch.float16),
    ],
    ids=lambda v: str(v),
)  # fmt: skip
def test_reductions(kernel, type_, dtype):
    generator = torch.Generator().manual_seed(1)
    x, out = ((torch.randn(64, generator=generator, dtype=torch.float64) * 50).to(dtype) for _ in range(2))
    operation = type_.split(".")[0]
    if operation == "add":
        expected = (x.double() + out.double()).to(dtype) if dtype.is_floating_point else x + out
    else:
        functions = {"min": torch.minimum, "max": torch.maximum, "xor": torch.bitwise_xor, "and": torch.bitwise_and}
        expected = functions[operation](x, out)
    nbytes = 64 * x.element_size()
    opcode = f"@%p0 cp.reduce.async.bulk.global.shared::cta.bulk_group.{type_} [%d1], [%r1], {nbytes};\n"
    launch = kernel(fill(nbytes) + opcode + COMMIT_AND_WAIT, [bytes_of(x), out])
    assert torch.equal(out, expected) and launch.counts.tma_bytes_reduced == nbytes


def test_reductions_of_many_ctas_into_one_place():
    """Two host threads, eight CTAs that reduce into the same words for about a second: no update is lost."""
    times = 100_000
    x, out = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    body = f"""
    {fill(256)}
    mov.u32 %r20, 0;
    AGAIN:
    @%p0 cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%d1], [%r1], 256;
    add.u32 %r20, %r20, 1;
    setp.lt.u32 %p5, %r20, {times};
    @%p5 bra AGAIN;
    {COMMIT_AND_WAIT}
    """
    with emulator.device("sm_90a", sms=8, threads=2, checks=False) as device:
        Kernel(device, "sm_90a")(body, [bytes_of(x), out], grid=8)
    assert torch.equal(out, 8 * times * x)


@pytest.mark.parametrize(
    "type_", ["min.f32", "add.s64", "add.f16", "inc.s32", "add.noftz.f32", "and.f32", "add.b32", "inc.u64"]
)
def test_reductions_that_the_isa_does_not_define_are_unknown_opcodes(eager, type_):
    with pytest.raises(errors.UnknownOpcode, match=re.escape(type_)):
        eager(f"cp.reduce.async.bulk.global.shared::cta.bulk_group.{type_} [%d1], [%r1], 256;", [0, 0])


@pytest.mark.parametrize("type_", ["add.s64", "min.u64", "add.f32", "and.b64"])
def test_reductions_into_shared_memory_have_fewer_types(eager, type_):
    with pytest.raises(errors.UnknownOpcode, match=re.escape(type_)):
        eager(f"cp.reduce.async.bulk.shared::cluster.shared::cta.{COMPLETE}.{type_} [%r1], [%r1], 256, [%r0];", [0, 0])


# ---------------------------------------------------------------------------------------------------------
# What goes wrong


def test_sizes_are_multiples_of_16(eager):
    with pytest.raises(errors.InvalidOperand, match="40 bytes"):
        eager(load(40) + WAIT, [random_bytes(64), 0])


@pytest.mark.parametrize("operands", [{"source": "[%d0+8]"}, {"destination": "[%r1+8]"}], ids=str)
def test_addresses_are_multiples_of_16(eager, operands):
    with pytest.raises(errors.Misaligned, match="16"):
        eager(load(32, **operands) + WAIT, [random_bytes(64), 0])


def test_load_beyond_the_tensor(eager):
    x = random_bytes(64)
    eager.device.register(x, "queries")
    with pytest.raises(errors.OutOfBounds, match="queries"):
        eager(load(80) + WAIT, [x, 0])


def test_load_without_a_wait(kernel):
    with pytest.raises(errors.RaceDetected, match="cp.async.bulk"):
        kernel(load(64) + dump(64), [random_bytes(64), torch.zeros(64, dtype=torch.uint8)])


def test_overwriting_the_source_of_a_load_in_flight(kernel):
    body = load(64) + "@%p0 st.global.b32 [%d0], %r2;\n" + WAIT
    with pytest.raises(errors.RaceDetected, match="st.global"):
        kernel(body, [random_bytes(64), 0])


def test_wrong_expected_bytes(kernel):
    with pytest.raises(errors.Deadlock):
        kernel(load(64, expect=128) + WAIT + dump(64), [random_bytes(64), torch.zeros(64, dtype=torch.uint8)])


def test_store_without_a_proxy_fence(kernel):
    body = (fill(64) + STORE.format(64) + COMMIT_AND_WAIT).replace("fence.proxy.async.shared::cta;", "")
    with pytest.raises(errors.MissingProxyFence):
        kernel(body, [random_bytes(64), torch.zeros(64, dtype=torch.uint8)])


def test_store_of_another_warps_data_needs_a_barrier(kernel):
    """Warp 1 writes (and fences); warp 0 stores."""
    body = f"""
    setp.lt.u32 %p4, %r3, 32;
    @%p4 bra STORE;
    {fill(64)}
    bar.sync 1, 64;
    bra END;
    STORE:
    bar.sync 1, 64;
    {STORE.format(64)}
    {COMMIT_AND_WAIT}
    END:
    """
    x, out = random_bytes(64), torch.zeros(64, dtype=torch.uint8)
    kernel(body, [x, out], block=64)
    assert torch.equal(out, x)
    with pytest.raises((errors.RaceDetected, errors.Uninitialised)):
        kernel(body.replace("bar.sync 1, 64;", ""), [x, out], block=64)


def test_store_beyond_the_tensor(eager):
    with pytest.raises(errors.OutOfBounds):
        eager(fill(128) + STORE.format(128) + COMMIT_AND_WAIT, [random_bytes(128), torch.zeros(64, dtype=torch.uint8)])


def test_reading_what_was_stored_needs_the_full_wait(kernel):
    x, out = random_bytes(64), torch.zeros(64, dtype=torch.uint8)
    body = fill(64) + STORE.format(64) + COMMIT_AND_WAIT + "ld.global.b32 %r20, [%d1];\n"
    kernel(body, [x, out])
    with pytest.raises(errors.RaceDetected, match="cp.async.bulk.global"):
        kernel(body.replace("wait_group 0", "wait_group.read 0"), [x, out])


def test_exit_without_waiting(kernel):
    x, out = random_bytes(64), torch.zeros(64, dtype=torch.uint8)
    with pytest.raises(errors.InFlightAccess, match="wait_group"):
        kernel(fill(64) + STORE.format(64) + "cp.async.bulk.commit_group;\n", [x, out])


def test_a_lane_waits_for_its_own_copies_only(eager):
    """Groups are per thread: lane 1's wait does not cover lane 0's store."""
    body = (
        fill(64)
        + STORE.format(64)
        + """
    cp.async.bulk.commit_group;
    setp.eq.u32 %p5, %r2, 1;
    @%p5 cp.async.bulk.wait_group 0;
    """
    )
    with pytest.raises(errors.InFlightAccess):
        eager(body, [random_bytes(64), torch.zeros(64, dtype=torch.uint8)])
