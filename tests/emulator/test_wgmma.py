"""wgmma: values in every layout, type and shape, and what it refuses. Expected values from PTX ISA 9.7.15."""

from __future__ import annotations

import pytest
import torch

from cute_sparse import emulator
from tests.emulator.operands import CHUNKS, Layout, packed

TYPES = {  # PTX name: torch type, or None for tf32 (float32 bits); k of one instruction
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "tf32": torch.float32,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
ADDRESS_SPACE = 96 * 1024
MMA = "wgmma.mma_async.sync.aligned"
COMMIT_AND_WAIT = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"

# 128 threads: shared memory from a list of 16-byte chunks; accumulators (and A) from, and to, [register][thread].
PROLOGUE = """
mov.u32 %tid, %tid.x; ld.param.b64 %rd0, [chunks]; ld.param.b64 %rd1, [places]; ld.param.b32 %count, [count];
mov.b32 %base, smem; mov.b32 %i, %tid;
COPY: setp.ge.u32 %p1, %i, %count; @%p1 bra COPIED;
mul.wide.u32 %rd2, %i, 16; add.s64 %rd2, %rd2, %rd0; ld.global.v4.b32 {%x0, %x1, %x2, %x3}, [%rd2];
mul.wide.u32 %rd3, %i, 4; add.s64 %rd3, %rd3, %rd1; ld.global.b32 %at, [%rd3]; add.u32 %at, %at, %base;
st.shared.v4.b32 [%at], {%x0, %x1, %x2, %x3}; add.u32 %i, %i, 128; bra COPY;
COPIED:
fence.proxy.async.shared::cta; bar.sync 0;
mul.wide.u32 %rd4, %tid, 4; ld.param.b64 %rd5, [sums]; add.s64 %sums, %rd5, %rd4;
ld.param.b64 %rd5, [fragments]; add.s64 %fragments, %rd5, %rd4;
shr.u32 %at, %base, 4; cvt.u64.u32 %rd6, %at;
ld.param.b64 %a, [a]; add.s64 %a, %a, %rd6; ld.param.b64 %b, [b]; add.s64 %b, %b, %rd6;
ld.param.b32 %scale, [scale]; setp.ne.b32 %p2, %scale, 0;
"""
REGISTERS = (
    ".reg .pred %p<4>; .reg .b32 %c<160>; .reg .b32 %f<4>; .reg .b32 %x<4>; .reg .b64 %rd<8>; .reg .b64 %a, %b, %sums;"
    ".reg .b64 %fragments; .reg .b32 %tid, %base, %i, %at, %count, %scale; .reg .b16 %h;"
)
PARAMETERS = ", ".join(
    f".param .u64 {name}" for name in ("chunks", "places", "count", "sums", "fragments", "a", "b", "scale")
)


def load(first: int, count: int) -> str:
    return "".join(f"ld.global.b32 %c{r}, [%sums+{512 * r}];" for r in range(first, first + count))


def store(first: int, count: int) -> str:
    return "".join(f"st.global.b32 [%sums+{512 * r}], %c{r};" for r in range(first, first + count))


LOAD_A = "".join(f"ld.global.b32 %f{r}, [%fragments+{512 * r}];" for r in range(4))


def accumulators(count: int, first: int = 0) -> str:
    return "{" + ", ".join(f"%c{r}" for r in range(first, first + count)) + "}"


class Kernel:
    """Operands in shared memory and registers, ready to be run with some statements between them."""

    def __init__(self, run):
        self.run = run
        self.image: dict[int, bytes] = {}  # 16-byte chunks by address
        self.a = self.b = 0
        self.sums = torch.zeros(128, 128, dtype=torch.int32)
        self.fragments = torch.zeros(4, 128, dtype=torch.int32)

    def put(self, layout: Layout, values: torch.Tensor) -> None:
        """values (mn, k) of the operand's element type."""
        raw = values.contiguous().view(torch.uint8).reshape(layout.mn, layout.k, layout.bytes)
        memory = torch.zeros(ADDRESS_SPACE, dtype=torch.uint8)
        addresses = layout.addresses()
        for byte in range(layout.bytes):
            memory[addresses + byte] = raw[:, :, byte]
        for chunk in torch.unique(addresses // 16).tolist():
            assert chunk * 16 not in self.image
            self.image[chunk * 16] = bytes(memory[chunk * 16 : chunk * 16 + 16].tolist())

    def __call__(self, statements: str, scale: int = 1):
        chunks = torch.frombuffer(bytearray(b"".join(self.image.values()) or bytes(16)), dtype=torch.uint8)
        places = torch.tensor(list(self.image) or [0], dtype=torch.int32)
        return self.run(
            PROLOGUE + statements,
            [chunks, places, len(self.image), self.sums, self.fragments, self.a, self.b, scale],
            parameters=PARAMETERS,
            registers=REGISTERS,
            shared=".extern .shared .align 1024 .b8 smem[];",
            block=128,
            shared_bytes=ADDRESS_SPACE,
        )


@pytest.fixture
def kernel(run) -> Kernel:
    return Kernel(run)


def integers(*shape: int, type_: str = "bf16", seed: int = 0, low: int = -3, high: int = 3) -> torch.Tensor:
    """Small integers, exact in every type."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator).to(torch.float32).to(TYPES[type_])


def elements_of(type_: str) -> int:
    return 32 // TYPES[type_].itemsize


def from_fragments(registers: torch.Tensor, n: int) -> torch.Tensor:
    """[register][thread] of f32 accumulators -> (64, n), PTX ISA 9.7.15.5.1.1."""
    d = torch.empty(64, n)
    thread, r = torch.meshgrid(torch.arange(128), torch.arange(n // 2), indexing="ij")
    lane = thread % 32
    rows = 16 * (thread // 32) + lane // 4 + 8 * (r // 2 % 2)
    columns = 8 * (r // 4) + 2 * (lane % 4) + r % 2
    d[rows, columns] = registers[: n // 2].view(torch.float32).T
    return d


def to_fragments(d: torch.Tensor) -> torch.Tensor:
    n = d.shape[1]
    index = from_fragments(torch.arange(n // 2 * 128, dtype=torch.int32).view(n // 2, 128).float().view(torch.int32), n)
    registers = torch.zeros(128, 128)
    registers.view(-1)[index.long().flatten()] = d.flatten()
    return registers.view(torch.int32)


def instruction(type_: str, n: int, d: str = "f32", a: str = "%a", first: int = 0, flags: str | None = None) -> str:
    """One wgmma; flags: the immediates behind scale-d (K-major and positive by default)."""
    count = n // 2 if d == "f32" else n // 4
    if flags is None:
        flags = "1, 1" if TYPES[type_].itemsize != 2 else "1, 1, 0, 0" if a == "%a" else "1, 1, 0"
    return (
        f"{MMA}.m64n{n}k{elements_of(type_)}.{d}.{type_}.{type_} {accumulators(count, first)}, {a}, %b, %p2, {flags};"
    )


def put_operands(kernel: Kernel, a: torch.Tensor, b: torch.Tensor, a_layout: Layout, b_layout: Layout) -> None:
    kernel.put(a_layout, a)
    kernel.put(b_layout, b)
    kernel.a, kernel.b = a_layout.descriptor_sm90(), b_layout.descriptor_sm90()


def both_in_shared(kernel: Kernel, type_: str, n: int, **b_changes) -> torch.Tensor:
    """Packed K-major operands with 128-byte swizzle; returns the product."""
    k, size = elements_of(type_), TYPES[type_].itemsize
    a, b = integers(64, k, type_=type_, seed=1), integers(n, k, type_=type_, seed=2)
    put_operands(kernel, a, b, packed(64, k, size, False, "128B"), packed(n, k, size, False, "128B", 16384))
    return a.float() @ b.float().T


# ---------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("swizzle", CHUNKS)
@pytest.mark.parametrize("a_mn_major, b_mn_major", [(False, False), (False, True), (True, False), (True, True)])
def test_both_majors_and_every_swizzle(kernel, swizzle, a_mn_major, b_mn_major):
    a, b, c = integers(64, 16, seed=1), integers(128, 16, seed=2), integers(64, 128, seed=3).float()
    put_operands(
        kernel, a, b, packed(64, 16, 2, a_mn_major, swizzle), packed(128, 16, 2, b_mn_major, swizzle, 16384)
    )
    kernel.sums[:] = to_fragments(c)
    flags = f"1, 1, {int(a_mn_major)}, {int(b_mn_major)}"
    mma = "wgmma.fence.sync.aligned;" + instruction("bf16", 128, flags=flags)
    kernel(load(0, 64) + mma + COMMIT_AND_WAIT + store(0, 64))
    assert torch.equal(from_fragments(kernel.sums, 128), c + a.float() @ b.float().T)


@pytest.mark.parametrize("n", range(8, 257, 8))
def test_every_n(kernel, n):
    expected = both_in_shared(kernel, "bf16", n)
    launch = kernel("wgmma.fence.sync.aligned;" + instruction("bf16", n) + COMMIT_AND_WAIT + store(0, n // 2), scale=0)
    assert torch.equal(from_fragments(kernel.sums, n), expected)
    assert launch.counts.macs == {"wgmma.bf16": 64 * n * 16}
    assert launch.counts.mma_instructions == {"wgmma.mma_async": 4}


@pytest.mark.parametrize("swizzle", CHUNKS)
@pytest.mark.parametrize("type_", TYPES)
def test_every_type(kernel, type_, swizzle):
    k, size = elements_of(type_), TYPES[type_].itemsize
    a, b = integers(64, k, type_=type_, seed=1), integers(40, k, type_=type_, seed=2)
    put_operands(kernel, a, b, packed(64, k, size, False, swizzle), packed(40, k, size, False, swizzle, 16384))
    launch = kernel("wgmma.fence.sync.aligned;" + instruction(type_, 40) + COMMIT_AND_WAIT + store(0, 20), scale=0)
    assert torch.equal(from_fragments(kernel.sums, 40), a.float() @ b.float().T)
    assert launch.counts.macs == {f"wgmma.{type_}": 64 * 40 * k}


def test_two_8_bit_types(kernel):
    a, b = integers(64, 32, type_="e4m3", seed=1), integers(16, 32, type_="e5m2", seed=2)
    put_operands(kernel, a, b, packed(64, 32, 1, False, "64B"), packed(16, 32, 1, False, "32B", 16384))
    mma = f"{MMA}.m64n16k32.f32.e4m3.e5m2 {accumulators(8)}, %a, %b, %p2, 1, 1;"
    launch = kernel("wgmma.fence.sync.aligned;" + mma + COMMIT_AND_WAIT + store(0, 8), scale=0)
    assert torch.equal(from_fragments(kernel.sums, 16), a.float() @ b.float().T)
    assert launch.counts.macs == {"wgmma.e4m3.e5m2": 64 * 16 * 32}


def test_tf32_ignores_the_low_13_bits(kernel):
    a, b = torch.ones(64, 8), torch.zeros(8, 8)
    b[:, 0] = (torch.tensor([0x3F801FFF] * 8, dtype=torch.int32)).view(torch.float32)  # 1 and the 13 low bits
    put_operands(kernel, a, b, packed(64, 8, 4, False, "32B"), packed(8, 8, 4, False, "32B", 4096))
    kernel("wgmma.fence.sync.aligned;" + instruction("tf32", 8) + COMMIT_AND_WAIT + store(0, 4), scale=0)
    assert torch.equal(from_fragments(kernel.sums, 8), torch.ones(64, 8))


@pytest.mark.parametrize("type_", TYPES)
def test_a_in_registers(kernel, type_):
    k, size = elements_of(type_), TYPES[type_].itemsize
    a, b = integers(64, k, type_=type_, seed=1), integers(24, k, type_=type_, seed=2)
    kernel.put(packed(24, k, size, False, "128B"), b)
    kernel.b = packed(24, k, size, False, "128B").descriptor_sm90()
    per = 4 // size  # elements of a register, along k
    words = a.view(torch.uint8).reshape(64, k // per, 4).view(torch.int32)[..., 0]  # (row, register's worth of k)
    thread, r = torch.meshgrid(torch.arange(128), torch.arange(4), indexing="ij")
    kernel.fragments[:] = words[16 * (thread // 32) + thread % 32 // 4 + 8 * (r % 2), thread % 4 + 4 * (r // 2)].T
    mma = instruction(type_, 24, a="{%f0, %f1, %f2, %f3}")
    kernel(LOAD_A + "wgmma.fence.sync.aligned;" + mma + COMMIT_AND_WAIT + store(0, 12), scale=0)
    assert torch.equal(from_fragments(kernel.sums, 24), a.float() @ b.float().T)


def test_half_precision_accumulators_round_once_an_instruction(kernel):
    a, b = torch.ones(64, 16, dtype=torch.float16), torch.ones(32, 16, dtype=torch.float16)
    a[:, 0] = 2048  # f16 has steps of 2 from there on: adding the 16 ones one by one would stay at 2048
    put_operands(kernel, a, b, packed(64, 16, 2, False, "32B"), packed(32, 16, 2, False, "32B", 4096))
    kernel.sums[:8] = 0x3C003C00  # 1 and 1
    mma = instruction("f16", 32, d="f16")
    kernel(load(0, 8) + "wgmma.fence.sync.aligned;" + mma + COMMIT_AND_WAIT + store(0, 8))
    halves = kernel.sums[:8].contiguous().view(torch.float16)
    assert torch.equal(halves.float(), torch.full((8, 256), 2064.0))  # 2048 + 15 + 1


def test_half_precision_accumulators_lie_in_pairs(kernel):
    expected = both_in_shared(kernel, "f16", 16)
    kernel("wgmma.fence.sync.aligned;" + instruction("f16", 16, d="f16") + COMMIT_AND_WAIT + store(0, 4), scale=0)
    pairs = kernel.sums[:4].contiguous().view(torch.float16).reshape(4, 128, 2)  # [register][thread][half]
    for thread in range(128):
        for r in range(4):
            row, column = 16 * (thread // 32) + thread % 32 // 4 + 8 * (r % 2), 8 * (r // 2) + 2 * (thread % 4)
            assert torch.equal(pairs[r, thread].float(), expected[row, column : column + 2])


@pytest.mark.parametrize("scale_a, scale_b, sign", [(1, -1, -1), (-1, 1, -1), (-1, -1, 1)])
def test_negated_operands(kernel, scale_a, scale_b, sign):
    expected = both_in_shared(kernel, "bf16", 8)
    mma = instruction("bf16", 8, flags=f"{scale_a}, {scale_b}, 0, 0")
    kernel("wgmma.fence.sync.aligned;" + mma + COMMIT_AND_WAIT + store(0, 4), scale=0)
    assert torch.equal(from_fragments(kernel.sums, 8), sign * expected)


def test_scale_d_may_stand_in_the_immediate_form_of_inline_assembly(kernel):
    """The form that CuTe-DSL emits: a predicate of its own in a scope."""
    expected = both_in_shared(kernel, "bf16", 8)
    scoped = "{ .reg .pred p; setp.ne.b32 p, %scale, 0; " + instruction("bf16", 8).replace("%p2", "p") + " }"
    kernel("wgmma.fence.sync.aligned;" + scoped + COMMIT_AND_WAIT + store(0, 4), scale=0)
    assert torch.equal(from_fragments(kernel.sums, 8), expected)


@pytest.mark.parametrize("order", ["eager", "late", "random"])
def test_a_chain_accumulates_along_a_swizzled_row(arch, order):
    """k steps inside a 128-byte row move the start address by 32 bytes (the swizzle is one of absolute addresses)."""
    from cute_sparse.emulator.text import module, run_ptx

    with emulator.device(arch, order=order, seed=1, threads=1) as device:

        def run(body, arguments, *, parameters, registers, shared, **launch):
            ptx = module(arch, body, parameters=parameters, registers=registers, shared=shared)
            return run_ptx(device, ptx, arguments, **launch)

        kernel = Kernel(run)
        a, b = integers(64, 64, seed=1), integers(64, 64, seed=2)
        put_operands(kernel, a, b, packed(64, 64, 2, False, "128B"), packed(64, 64, 2, False, "128B", 16384))
        step = instruction("bf16", 64) + "add.s64 %a, %a, 2; add.s64 %b, %b, 2; setp.eq.b32 %p2, %tid, %tid;"
        kernel("wgmma.fence.sync.aligned;" + step * 4 + COMMIT_AND_WAIT + store(0, 32), scale=0)
    assert torch.equal(from_fragments(kernel.sums, 64), a.float() @ b.float().T)


# ---------------------------------------------------------------------------------------------------------
# Shared memory


def test_exactly_the_operands_are_read(kernel):
    """Everything else is uninitialised; and each chunk is needed."""
    both_in_shared(kernel, "bf16", 16)
    body = "wgmma.fence.sync.aligned;" + instruction("bf16", 16) + COMMIT_AND_WAIT + store(0, 8)
    kernel(body, scale=0)
    whole = dict(kernel.image)
    rows_of_a = 64
    for row in (0, 40, 63, rows_of_a, rows_of_a + 15):  # every warp may read all of A and of B
        missing = list(whole)[2 * row]  # a row is two chunks
        kernel.image = {place: chunk for place, chunk in whole.items() if place != missing}
        with pytest.raises(emulator.errors.Uninitialised, match="shared memory") as error:
            kernel(body, scale=0)
        assert "wgmma.mma_async" in error.value.ptx_text


def test_generic_writes_need_a_proxy_fence(kernel):
    both_in_shared(kernel, "bf16", 8)
    fresh = "setp.eq.u32 %p3, %tid, 0; @%p3 st.shared.b32 [%base+16384], %tid; bar.sync 0;"
    body = fresh + "wgmma.fence.sync.aligned;" + instruction("bf16", 8) + COMMIT_AND_WAIT
    with pytest.raises(emulator.errors.MissingProxyFence):
        kernel(body, scale=0)
    kernel(body.replace("bar.sync 0;", "fence.proxy.async.shared::cta; bar.sync 0;"), scale=0)


def test_operands_may_not_be_overwritten_before_wait_group(kernel):
    """The same warp writes: only wait_group orders the write behind the asynchronous reads."""
    both_in_shared(kernel, "bf16", 8)
    mma = "wgmma.fence.sync.aligned;" + instruction("bf16", 8) + "wgmma.commit_group.sync.aligned;"
    wait = "wgmma.wait_group.sync.aligned 0; bar.sync 0;"
    write = "setp.eq.u32 %p3, %tid, 0; @%p3 st.shared.b32 [%base+16384], %tid;"
    kernel(mma + wait + write, scale=0)
    with pytest.raises(emulator.errors.RaceDetected):
        kernel(mma + "bar.sync 0;" + write + wait, scale=0)


def test_a_barrier_between_wgmma_and_its_commit_comes_too_late(kernel):
    """Warp 0 writes operand B; the other warps' wgmmas read it before they meet warp 0."""
    both_in_shared(kernel, "bf16", 8)
    write = "setp.eq.u32 %p3, %tid, 0; @%p3 st.shared.b32 [%base+16384], %tid; fence.proxy.async.shared::cta;"
    mma, meet = "wgmma.fence.sync.aligned;" + instruction("bf16", 8), "bar.sync 0;"
    kernel(write + meet + mma + COMMIT_AND_WAIT, scale=0)
    with pytest.raises(emulator.errors.RaceDetected):
        kernel(write + mma + meet + COMMIT_AND_WAIT, scale=0)


def test_a_group_may_go_on_behind_a_barrier(kernel):
    """Warp 0 writes the second wgmma's operand B while the first one may be running."""
    both_in_shared(kernel, "bf16", 8)
    kernel.put(packed(8, 16, 2, False, "128B", 24576), integers(8, 16, seed=5))
    write = "setp.eq.u32 %p3, %tid, 0; @%p3 st.shared.b32 [%base+24576], %tid; fence.proxy.async.shared::cta;"
    mma, second = "wgmma.fence.sync.aligned;" + instruction("bf16", 8), "add.s64 %b, %b, 512;" + instruction("bf16", 8)
    kernel(mma + write + "bar.sync 0;" + second + COMMIT_AND_WAIT, scale=0)
    with pytest.raises(emulator.errors.RaceDetected):
        kernel(mma + write + second + "bar.sync 0;" + COMMIT_AND_WAIT, scale=0)


def test_an_operand_must_lie_in_the_ctas_shared_memory(kernel):
    both_in_shared(kernel, "bf16", 8)
    kernel.b += ADDRESS_SPACE >> 4
    with pytest.raises(emulator.errors.OutOfBounds, match="operand B"):
        kernel("wgmma.fence.sync.aligned;" + instruction("bf16", 8) + COMMIT_AND_WAIT, scale=0)


# ---------------------------------------------------------------------------------------------------------
# Registers in flight

FENCE = "wgmma.fence.sync.aligned;"
ZERO = "".join(f"mov.b32 %c{r}, 0;" for r in range(4))


def refused(kernel: Kernel, body: str, error: type, match: str, *, scale: int = 1) -> None:
    both_in_shared(kernel, "bf16", 8)
    with pytest.raises(error, match=match):
        kernel(body, scale=scale)


def test_the_first_wgmma_needs_a_fence(kernel):
    refused(kernel, instruction("bf16", 8) + COMMIT_AND_WAIT, emulator.errors.InFlightAccess, "wgmma.fence", scale=0)


def test_accumulators_written_after_the_fence(kernel):
    body = FENCE + ZERO + instruction("bf16", 8) + COMMIT_AND_WAIT
    refused(kernel, body, emulator.errors.InFlightAccess, "accumulator registers .* wgmma.fence")


def test_accumulators_read_between_two_wgmmas_without_a_fence(kernel):
    first = ZERO + FENCE + instruction("bf16", 8) + COMMIT_AND_WAIT + store(0, 4)
    again = instruction("bf16", 8)
    refused(kernel, first + again, emulator.errors.InFlightAccess, "accumulator registers .* wgmma.fence")


def test_untouched_accumulators_of_the_same_shape_need_no_fence(kernel):
    expected = both_in_shared(kernel, "bf16", 8)
    kernel(ZERO + FENCE + (instruction("bf16", 8) + COMMIT_AND_WAIT) * 2 + store(0, 4))
    assert torch.equal(from_fragments(kernel.sums, 8), 2 * expected)


def test_accumulators_of_another_shape_need_a_fence(kernel):
    both_in_shared(kernel, "bf16", 16)
    wide, narrow = instruction("bf16", 16), instruction("bf16", 8)
    zero = "".join(f"mov.b32 %c{r}, 0;" for r in range(8))
    kernel(zero + FENCE + wide + FENCE + narrow + COMMIT_AND_WAIT)
    with pytest.raises(emulator.errors.InFlightAccess, match="another shape"):
        kernel(zero + FENCE + wide + narrow + COMMIT_AND_WAIT)


def test_accumulators_read_before_wait_group(kernel):
    body = FENCE + instruction("bf16", 8) + "wgmma.commit_group.sync.aligned;" + store(0, 1)
    refused(kernel, body, emulator.errors.InFlightAccess, "wait_group", scale=0)


def test_accumulators_overwritten_before_wait_group(kernel):
    body = FENCE + instruction("bf16", 8) + "wgmma.commit_group.sync.aligned; mov.b32 %c0, 0;"
    refused(kernel, body, emulator.errors.InFlightAccess, "overwrites", scale=0)


def test_a_dropped_commit(kernel):
    body = FENCE + instruction("bf16", 8) + "wgmma.wait_group.sync.aligned 0;" + store(0, 1)
    refused(kernel, body, emulator.errors.InFlightAccess, "wait_group", scale=0)


def test_a_wait_for_too_few_groups(kernel):
    two = (
        FENCE + instruction("bf16", 8) + "wgmma.commit_group.sync.aligned;"
        + instruction("bf16", 8, first=4) + "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1;"
    )  # fmt: skip
    expected = both_in_shared(kernel, "bf16", 8)
    kernel(two + store(0, 4) + "wgmma.wait_group.sync.aligned 0;" + store(4, 4), scale=0)
    assert torch.equal(from_fragments(kernel.sums, 8), expected)
    assert torch.equal(from_fragments(kernel.sums[4:], 8), expected)
    with pytest.raises(emulator.errors.InFlightAccess):
        kernel(two + store(4, 1), scale=0)


def test_accumulators_are_in_use_until_the_last_group_that_uses_them(kernel):
    step = instruction("bf16", 8) + "wgmma.commit_group.sync.aligned;"
    chain = ZERO + FENCE + step + step
    expected = both_in_shared(kernel, "bf16", 8)
    kernel(chain + "wgmma.wait_group.sync.aligned 0;" + store(0, 4))
    assert torch.equal(from_fragments(kernel.sums, 8), 2 * expected)
    with pytest.raises(emulator.errors.InFlightAccess, match="wait_group"):
        kernel(chain + "wgmma.wait_group.sync.aligned 1;" + store(0, 4))


def test_operand_a_is_in_use_until_wait_group(kernel):
    mma = LOAD_A + FENCE + instruction("bf16", 8, a="{%f0, %f1, %f2, %f3}") + "wgmma.commit_group.sync.aligned;"
    change, wait = "mov.b32 %f0, 0;", "wgmma.wait_group.sync.aligned 0;"
    both_in_shared(kernel, "bf16", 8)
    kernel(mma + wait + change, scale=0)
    with pytest.raises(emulator.errors.InFlightAccess, match="overwrites"):
        kernel(mma + change + wait, scale=0)


def test_operand_a_written_after_the_fence(kernel):
    body = FENCE + LOAD_A + instruction("bf16", 8, a="{%f0, %f1, %f2, %f3}") + COMMIT_AND_WAIT
    refused(kernel, body, emulator.errors.InFlightAccess, "operand A .* wgmma.fence", scale=0)


def test_accumulating_onto_registers_that_nothing_wrote(kernel):
    refused(kernel, FENCE + instruction("bf16", 8), emulator.errors.Uninitialised, "accumulates")


def test_operand_a_that_nothing_wrote(kernel):
    body = FENCE + instruction("bf16", 8, a="{%f0, %f1, %f2, %f3}")
    refused(kernel, body, emulator.errors.Uninitialised, "operand A", scale=0)


# ---------------------------------------------------------------------------------------------------------
# Operands and warpgroup


@pytest.mark.parametrize("bits, match", [(1 << 49, "base offset"), (1 << 14, "reserved bits")])
def test_descriptor_fields_that_do_not_exist(kernel, bits, match):
    both_in_shared(kernel, "bf16", 8)
    kernel.b |= bits
    with pytest.raises(emulator.errors.InvalidOperand, match=match):
        kernel(FENCE + instruction("bf16", 8) + COMMIT_AND_WAIT, scale=0)


def test_descriptors_must_agree_in_a_warp(kernel):
    body = "cvt.u64.u32 %rd6, %tid; add.s64 %b, %b, %rd6;" + FENCE + instruction("bf16", 8)
    refused(kernel, body, emulator.errors.InvalidOperand, "different matrix descriptors", scale=0)


def test_scale_d_must_agree_in_a_warp(kernel):
    body = "setp.eq.u32 %p2, %tid, 3;" + FENCE + instruction("bf16", 8)
    refused(kernel, body, emulator.errors.InvalidOperand, "scale-d")


def test_all_warps_of_a_warpgroup_execute_the_same(kernel):
    choose = "setp.lt.u32 %p3, %tid, 32; @%p3 bra OTHER;"
    branches = choose + instruction("bf16", 8) + "bra JOIN; OTHER:" + instruction("bf16", 8) + "JOIN:"
    body = FENCE + branches + COMMIT_AND_WAIT
    refused(kernel, body, emulator.errors.ConvergenceError, "another warp of the warpgroup", scale=0)


def test_a_warpgroup_needs_four_warps(run):
    registers = ".reg .b32 %c<4>; .reg .b64 %a, %b; .reg .pred %p2;"
    body = "mov.b64 %a, 0; mov.b64 %b, 0; setp.ne.b64 %p2, %a, %b;" + FENCE + instruction("bf16", 8)
    with pytest.raises(emulator.errors.ConvergenceError, match="four warps"):
        run(body, registers=registers, block=96)


@pytest.mark.parametrize(
    "statement",
    [
        f"{MMA}.m64n12k16.f32.bf16.bf16 {accumulators(6)}, %a, %b, %p2, 1, 1, 0, 0;",  # n
        f"{MMA}.m64n8k8.f32.bf16.bf16 {accumulators(4)}, %a, %b, %p2, 1, 1, 0, 0;",  # k
        f"{MMA}.m64n8k16.f16.bf16.bf16 {accumulators(2)}, %a, %b, %p2, 1, 1, 0, 0;",  # f16 sums of bf16
        f"{MMA}.m64n8k16.f32.bf16.f16 {accumulators(4)}, %a, %b, %p2, 1, 1, 0, 0;",  # mixed 16-bit types
        f"{MMA}.m64n8k32.s32.s8.s8 {accumulators(4)}, %a, %b, %p2;",  # integers: not supported
    ],
)
def test_unknown_forms_are_refused_at_load(kernel, statement):
    with pytest.raises(emulator.errors.UnknownOpcode):
        kernel(FENCE + statement)


@pytest.mark.parametrize(
    "statement, match",
    [
        (f"{MMA}.m64n8k16.f32.bf16.bf16 {accumulators(3)}, %a, %b, %p2, 1, 1, 0, 0;", "4 registers"),
        (f"{MMA}.m64n8k16.f32.bf16.bf16 {accumulators(4)}, %a, %b, %p2, 1, 1;", "8 operands"),
        (f"{MMA}.m64n8k16.f32.bf16.bf16 {accumulators(4)}, %a, %b, %p2, 2, 1, 0, 0;", "imm-scale"),
        (f"{MMA}.m64n8k16.f32.bf16.bf16 {accumulators(4)}, %a, %b, %p2, 1, 1, 0, 2;", "imm-trans"),
    ],
)
def test_malformed_statements_are_refused_at_load(kernel, statement, match):
    with pytest.raises(emulator.errors.PtxSyntaxError, match=match):
        kernel(FENCE + statement)
