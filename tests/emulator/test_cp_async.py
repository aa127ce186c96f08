"""cp.async: sizes, zero fill, groups, mbarriers."""

from __future__ import annotations

import pytest
import torch

from cute_sparse import emulator
from cute_sparse.emulator import errors
from cute_sparse.emulator.text import module, run_ptx

ORDERS = ("eager", "late", "random")
REGISTERS = ".reg .pred %p<8>; .reg .b32 %r<40>; .reg .b64 %d<20>;"
SHARED = ".extern .shared .align 1024 .b8 smem[];"
PARAMETERS = ".param .u64 from, .param .u64 to"


def prologue(size: int) -> str:
    """Lane l copies to smem + 1024 + size * l (in %r1) from `from` + size * l (in %d0); dumps to %d1 likewise."""
    return f"""
    mov.u32 %r0, smem;
    mov.u32 %r2, %laneid;
    mul.lo.u32 %r3, %r2, {size};
    add.u32 %r1, %r0, %r3;
    add.u32 %r1, %r1, 1024;
    mul.wide.u32 %d3, %r2, {size};
    ld.param.b64 %d0, [from];
    add.s64 %d0, %d0, %d3;
    ld.param.b64 %d1, [to];
    add.s64 %d1, %d1, %d3;
    setp.eq.u32 %p0, %r2, 0;
    """


def dump(size: int, offset: int = 0) -> str:
    return "".join(
        f"ld.shared.b32 %r12, [%r1+{offset + k}];\nst.global.b32 [%d1+{offset + k}], %r12;\n" for k in range(0, size, 4)
    )


COMMIT_AND_WAIT = "cp.async.commit_group;\ncp.async.wait_group 0;\n"


class Kernel:
    def __init__(self, device):
        self.device = device

    def __call__(self, body, arguments, *, size=16, **launch):
        ptx = module("sm_90a", prologue(size) + body, parameters=PARAMETERS, registers=REGISTERS, shared=SHARED)
        return run_ptx(self.device, ptx, arguments, **{"shared_bytes": 16384, **launch})


@pytest.fixture(params=ORDERS)
def kernel(request):
    with emulator.device("sm_90a", order=request.param, seed=3, sms=2, threads=1, max_warp_instructions=10**6) as d:
        yield Kernel(d)


@pytest.fixture
def eager():
    with emulator.device("sm_90a", sms=2, threads=1, max_warp_instructions=10**6) as d:
        yield Kernel(d)


def random_bytes(n, seed=0):
    return torch.randint(1, 256, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def copied(kernel, instruction: str, size: int) -> torch.Tensor:
    """32 copies of `size` bytes: [32, size] source and result."""
    x, out = random_bytes(32 * size).view(32, size), torch.zeros(32, size, dtype=torch.uint8)
    kernel(instruction + COMMIT_AND_WAIT + dump(size), [x, out], size=size)
    return x, out


@pytest.mark.parametrize(
    "opcode, size",
    [
        ("ca.shared.global", 4),
        ("ca.shared.global", 8),
        ("ca.shared::cta.global", 16),
        ("cg.shared.global.L2::128B", 16),
    ],
)
def test_copy(kernel, opcode, size):
    x, out = copied(kernel, f"cp.async.{opcode} [%r1], [%d0], {size};\n", size)
    assert torch.equal(out, x)


def test_source_size_fills_with_zeros(kernel):
    """Lane l copies l % 17 of 16 bytes."""
    x, out = copied(kernel, "rem.u32 %r5, %r2, 17;\ncp.async.cg.shared.global [%r1], [%d0], 16, %r5;\n", 16)
    kept = torch.arange(16)[None] < (torch.arange(32) % 17)[:, None]
    assert torch.equal(out, x * kept)


def test_ignored_source_is_zero_and_need_not_exist(kernel):
    body = """
    setp.ge.u32 %p3, %r2, 16;
    @%p3 mov.b64 %d0, 64;
    cp.async.cg.shared.global.L2::cache_hint [%r1], [%d0], 16, %p3, %d4;
    """
    x, out = copied(kernel, "mov.b64 %d4, 0;\n" + body, 16)
    assert torch.equal(out[:16], x[:16]) and not out[16:].any()
    x, out = copied(kernel, body.replace("%p3, %d4", "%r6").replace(".L2::cache_hint", "").replace(
        "cp.async", "selp.b32 %r6, 0, 16, %p3;\ncp.async"), 16)  # fmt: skip
    assert torch.equal(out[:16], x[:16]) and not out[16:].any()


def test_wait_all(kernel):
    x, out = random_bytes(512), torch.zeros(512, dtype=torch.uint8)
    kernel("cp.async.cg.shared.global [%r1], [%d0], 16;\ncp.async.wait_all;\n" + dump(16), [x, out])
    assert torch.equal(out, x)


TWO_GROUPS = """
    cp.async.cg.shared.global [%r1], [%d0], 16;
    cp.async.commit_group;
    cp.async.cg.shared.global [%r1+1024], [%d0+512], 16;
    cp.async.commit_group;
"""


def test_older_groups_are_waited_for(kernel):
    x, out = random_bytes(1024), torch.zeros(4096, dtype=torch.uint8)
    kernel(TWO_GROUPS + "cp.async.wait_group 1;\n" + dump(16) + "cp.async.wait_group 0;\n" + dump(16, 1024), [x, out])
    assert torch.equal(out[:512], x[:512]) and torch.equal(out[1024:1536], x[512:])
    with pytest.raises(errors.RaceDetected, match="cp.async.cg"):
        kernel(TWO_GROUPS + "cp.async.wait_group 1;\n" + dump(16, 1024), [x, out])


@pytest.mark.parametrize("missing", ["cp.async.commit_group;\n", "cp.async.wait_group 0;\n"])
def test_a_missing_commit_or_wait_is_a_race(kernel, missing):
    body = "cp.async.cg.shared.global [%r1], [%d0], 16;\n" + COMMIT_AND_WAIT.replace(missing, "") + dump(16)
    with pytest.raises(errors.RaceDetected, match="cp.async.cg"):
        kernel(body, [random_bytes(512), torch.zeros(512, dtype=torch.uint8)])


def test_overwriting_the_source_in_flight(kernel):
    body = "cp.async.cg.shared.global [%r1], [%d0], 16;\n@%p0 st.global.b32 [%d0], %r2;\n" + COMMIT_AND_WAIT
    with pytest.raises(errors.RaceDetected, match="st.global"):
        kernel(body, [random_bytes(512), 0])


def test_groups_are_per_thread(kernel):
    """The upper lanes commit an empty group besides: for them, wait_group 1 covers the copy; for the others it does
    not."""
    body = """
    setp.ge.u32 %p3, %r2, 16;
    cp.async.cg.shared.global [%r1], [%d0], 16;
    cp.async.commit_group;
    @%p3 cp.async.commit_group;
    @WHO bra END;
    cp.async.wait_group 1;
    """
    x, out = random_bytes(512), torch.zeros(512, dtype=torch.uint8)
    kernel(body.replace("WHO", "!%p3") + dump(16) + "END:\n", [x, out])
    assert torch.equal(out[256:], x[256:])
    with pytest.raises(errors.RaceDetected):
        kernel(body.replace("WHO", "%p3") + dump(16) + "END:\n", [x, out])


def by_barrier(noinc: bool) -> str:
    """All lanes copy and let an mbarrier track it; another warp waits and reads."""
    count = 32 if noinc else 1
    arrive = "" if noinc else "@%p0 mbarrier.arrive.shared.b64 %d9, [%r0];"
    return f"""
    mov.u32 %r4, %tid.x;
    setp.lt.u32 %p3, %r4, 32;
    setp.eq.u32 %p4, %r4, 0;
    @%p4 mbarrier.init.shared.b64 [%r0], {count};
    bar.sync 0;
    @!%p3 bra READ;
    cp.async.ca.shared.global [%r1], [%d0], 16;
    cp.async.mbarrier.arrive{".noinc" if noinc else ""}.shared.b64 [%r0];
    {arrive}
    bra END;
    READ:
    mbarrier.try_wait.parity.shared.b64 %p1, [%r0], 0;
    @!%p1 bra READ;
    {dump(16)}
    END:
    """


@pytest.mark.parametrize("noinc", [False, True])
def test_mbarriers_track_copies(kernel, noinc):
    x, out = random_bytes(512), torch.zeros(512, dtype=torch.uint8)
    body = by_barrier(noinc)
    kernel(body, [x, out], block=64)
    assert torch.equal(out, x)
    # Without the tracking: nobody arrives, or the reader is told too early.
    missing = body.replace(f"cp.async.mbarrier.arrive{'.noinc' if noinc else ''}.shared.b64 [%r0];", "")
    with pytest.raises(errors.Deadlock if noinc else errors.RaceDetected):
        kernel(missing, [x, out], block=64)


# A warp copies and waits, one or all of its lanes tell of it, and another warp reads.
TOLD_OF = """
    mov.u32 %r4, %tid.x;
    setp.lt.u32 %p3, %r4, 32;
    setp.eq.u32 %p4, %r4, 0;
    @%p4 mbarrier.init.shared.b64 [%r0], COUNT;
    bar.sync 0;
    @!%p3 bra READ;
    WHO cp.async.ca.shared.global [%r1], [%d0], 16;
    WHO cp.async.wait_all;
    MEET
    TELL
    bra END;
    READ:
    mbarrier.try_wait.parity.shared.b64 %p1, [%r0], 0;
    @!%p1 bra READ;
    @!WHOSE bra END;
    """ + dump(16) + "END:\n"
ONE_TELLS = "@%p0 mbarrier.arrive.shared.b64 %d9, [%r0];"
HALVES_TELL = """
    setp.lt.u32 %p5, %r4, 16;
    @%p5 mbarrier.arrive.shared.b64 %d9, [%r0];
    @!%p5 mbarrier.arrive.shared.b64 %d9, [%r0];
    """


def told_of(*, who="", whose="%p6", meet="bar.warp.sync -1;", tell=ONE_TELLS, count=1) -> str:
    every = "setp.eq.u32 %p6, 0, 0;\n" + TOLD_OF
    for word, text in (("WHOSE", whose), ("WHO", who), ("MEET", meet), ("TELL", tell), ("COUNT", str(count))):
        every = every.replace(word, text)
    return every


def test_one_lane_does_not_speak_for_what_others_have_waited_for(kernel):
    x, out = random_bytes(512), torch.zeros(512, dtype=torch.uint8)
    kernel(told_of(), [x, out], block=64)
    assert torch.equal(out, x)
    with pytest.raises(errors.RaceDetected):
        kernel(told_of(meet=""), [x, out], block=64)


def test_a_lane_speaks_for_its_own_copies(kernel):
    x, out = random_bytes(512), torch.zeros(512, dtype=torch.uint8)
    kernel(told_of(meet="", tell=HALVES_TELL, count=32), [x, out], block=64)
    assert torch.equal(out, x)
    out.zero_()
    kernel(told_of(who="@%p0", whose="%p0", meet=""), [x, out], block=64)
    assert torch.equal(out[:16], x[:16])


def test_the_async_proxy_needs_a_fence_after_cp_async(kernel):
    """A bulk store reads what cp.async wrote."""
    x, out = random_bytes(512), torch.zeros(512, dtype=torch.uint8)
    body = """
    cp.async.cg.shared.global [%r1], [%d0], 16;
    cp.async.wait_all;
    fence.proxy.async.shared::cta;
    bar.warp.sync -1;
    @%p0 cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r1], 512;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
    """
    kernel(body, [x, out])
    assert torch.equal(out, x)
    with pytest.raises(errors.MissingProxyFence):
        kernel(body.replace("fence.proxy.async.shared::cta;", ""), [x, out])
    with pytest.raises(errors.RaceDetected):
        kernel(body.replace("cp.async.wait_all;", ""), [x, out])


@pytest.mark.parametrize(
    "operands, error, message",
    [
        ("[%r1+4], [%d0], 16", errors.Misaligned, "16"),
        ("[%r1], [%d0+8], 16", errors.Misaligned, "16"),
        ("[%r1], [%d0+512], 16", errors.OutOfBounds, "512"),
        ("[%r1+16384], [%d0], 16", errors.OutOfBounds, "shared"),
        ("[%r1], [%d0], 16, 20", errors.InvalidOperand, "src-size 20"),
    ],
)
def test_bad_operands(eager, operands, error, message):
    with pytest.raises(error, match=message):
        eager(f"cp.async.cg.shared.global {operands};\n" + COMMIT_AND_WAIT, [random_bytes(512), 0])


def test_cg_copies_16_bytes(eager):
    with pytest.raises(errors.PtxSyntaxError, match="16"):
        eager("cp.async.cg.shared.global [%r1], [%d0], 8;\n", [0, 0])


def test_destination_must_be_ones_own(eager):
    body = """
    barrier.cluster.arrive;
    barrier.cluster.wait;
    mapa.shared::cluster.u32 %r7, %r1, 1;
    cp.async.cg.shared.global [%r7], [%d0], 16;
    """
    with pytest.raises(errors.InvalidOperand, match="CTA 1"):
        eager(body + COMMIT_AND_WAIT, [random_bytes(512), 0], grid=2, cluster=2)
