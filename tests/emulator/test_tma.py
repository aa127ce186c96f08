"""TMA: tensor maps, swizzles, bounds, multicast, reductions, bulk groups and what goes wrong with them.

Expected images come from tensor_maps.py, which is written from the documents.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from cute_sparse import emulator
from cute_sparse.emulator import errors
from cute_sparse.emulator.text import module, run_ptx
from tests.emulator.tensor_maps import boxed, raw, swizzled, tensor_map

BASE = 1024  # first shared address
TILE = 1024  # offset of the box in dynamic shared memory; barriers lie in front
ORDERS = ("eager", "late", "random")
REGISTERS = ".reg .pred %p<8>; .reg .b16 %h<4>; .reg .b32 %r<40>; .reg .b64 %d<20>; .reg .b32 %c<6>;"
SHARED = ".extern .shared .align 1024 .b8 smem[];"
PARAMETERS = ".param .align 128 .b8 map[128], .param .u64 out"

PROLOGUE = f"""
    mov.u32 %r0, smem;
    add.u32 %r1, %r0, {TILE};
    mov.u32 %r2, %laneid;
    mov.u32 %r3, %tid.x;
    setp.eq.u32 %p0, %r3, 0;
    mov.b64 %d0, map;
    cvta.param.u64 %d0, %d0;
    ld.param.b64 %d1, [out];
"""
INIT_BARRIER = """
    @%p0 mbarrier.init.shared.b64 [%r0], 1;
    fence.mbarrier_init.release.cluster;
"""
WAIT = """
    WAIT:
    mbarrier.try_wait.parity.shared.b64 %p1, [%r0], 0;
    @!%p1 bra WAIT;
"""


def dump(nbytes: int) -> str:
    """Every lane of one warp copies words of the tile to `out`."""
    return f"""
    mul.lo.u32 %r10, %r2, 4;
    DUMP:
    setp.ge.u32 %p2, %r10, {nbytes};
    @%p2 bra DUMPED;
    add.u32 %r11, %r1, %r10;
    ld.shared.b32 %r12, [%r11];
    cvt.u64.u32 %d10, %r10;
    add.s64 %d11, %d1, %d10;
    st.global.b32 [%d11], %r12;
    add.u32 %r10, %r10, 128;
    bra DUMP;
    DUMPED:
    """


def fill(nbytes: int) -> str:
    """Every lane of one warp copies words of `source` (parameter 3) to the tile, for the async proxy to read."""
    return f"""
    ld.param.b64 %d2, [source];
    mul.lo.u32 %r10, %r2, 4;
    FILL:
    setp.ge.u32 %p2, %r10, {nbytes};
    @%p2 bra FILLED;
    add.u32 %r11, %r1, %r10;
    cvt.u64.u32 %d10, %r10;
    add.s64 %d11, %d2, %d10;
    ld.global.b32 %r12, [%d11];
    st.shared.b32 [%r11], %r12;
    add.u32 %r10, %r10, 128;
    bra FILL;
    FILLED:
    fence.proxy.async.shared::cta;
    bar.warp.sync -1;
    """


def coordinates(start) -> str:
    return "{" + ", ".join(str(c) for c in start) + "}"


def load(start, nbytes, *, destination="[%r1]", opcode="shared::cta.global.tile.mbarrier::complete_tx::bytes") -> str:
    return f"""
    @%p0 mbarrier.arrive.expect_tx.shared.b64 %d9, [%r0], {nbytes};
    @%p0 cp.async.bulk.tensor.{len(start)}d.{opcode} {destination}, [%d0, {coordinates(start)}], [%r0];
    """


def store(start, opcode="cp.async.bulk.tensor.{n}d.global.shared::cta.tile.bulk_group") -> str:
    return f"@%p0 {opcode.format(n=len(start))} [%d0, {coordinates(start)}], [%r1];\n"


COMMIT_AND_WAIT = "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;\n"


class Kernel:
    """Runs bodies on an entered device of a given order."""

    def __init__(self, device, arch):
        self.device, self.arch = device, arch

    def __call__(self, body, arguments, *, parameters=PARAMETERS, **launch):
        ptx = module(self.arch, PROLOGUE + body, parameters=parameters, registers=REGISTERS, shared=SHARED)
        return run_ptx(self.device, ptx, arguments, **{"shared_bytes": 40960, **launch})

    def load(self, descriptor, start, nbytes, **options) -> np.ndarray:
        """The bytes that a load left in shared memory."""
        out = torch.zeros(nbytes, dtype=torch.uint8)
        launch = self(INIT_BARRIER + load(start, nbytes, **options) + WAIT + dump(nbytes), [descriptor, out])
        assert launch.counts.tma_bytes_loaded == nbytes
        return out.numpy()

    def store(self, descriptor, source, start, **options):
        """Stores a tile (its image in shared memory is `source`), returns the launch."""
        body = fill(source.numel()) + store(start, **options) + COMMIT_AND_WAIT
        return self(body, [descriptor, 0, source], parameters=PARAMETERS + ", .param .u64 source")


@pytest.fixture(params=ORDERS)
def kernel(request):
    with emulator.device("sm_90a", order=request.param, seed=7, sms=2, threads=1, max_warp_instructions=10**6) as d:
        yield Kernel(d, "sm_90a")


@pytest.fixture
def eager():
    with emulator.device("sm_90a", sms=2, threads=1, max_warp_instructions=10**6) as d:
        yield Kernel(d, "sm_90a")


@pytest.fixture
def blackwell():
    with emulator.device("sm_100a", sms=2, threads=1, max_warp_instructions=10**6) as d:
        yield Kernel(d, "sm_100a")


def numbers(*shape, dtype=torch.bfloat16, seed=0) -> torch.Tensor:
    """Random bits."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    flat = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8, generator=generator)
    return flat.view(dtype)


def floats(*shape, dtype, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).reshape(-1).clone()


# ---------------------------------------------------------------------------------------------------------
# Loads


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_load_of_a_swizzled_box(kernel, swizzle):
    x = numbers(40, 128)
    box = [(swizzle or 64) // 2, 24]
    image = kernel.load(tensor_map(x, box, swizzle=swizzle), [32, 5], 2 * box[0] * box[1])
    assert np.array_equal(image, swizzled(boxed(x, box, [32, 5]), swizzle, BASE + TILE))


@pytest.mark.parametrize("swizzle", [32, 64, 128])
@pytest.mark.parametrize("offset", [128, 384, 896])
def test_swizzles_use_the_absolute_address(eager, swizzle, offset):
    x = numbers(32, 64)
    box = [swizzle // 2, 16]
    nbytes = swizzle * 16
    body = INIT_BARRIER + f"add.u32 %r1, %r1, {offset};\n" + load([0, 3], nbytes) + WAIT + dump(nbytes)
    out = torch.zeros(nbytes, dtype=torch.uint8)
    eager(body, [tensor_map(x, box, swizzle=swizzle), out])
    assert np.array_equal(out.numpy(), swizzled(boxed(x, box, [0, 3]), swizzle, BASE + TILE + offset))


def test_swizzle_with_32_byte_atoms(eager):
    x = numbers(32, 32, dtype=torch.float32)
    image = eager.load(tensor_map(x, [32, 16], swizzle=128, atomicity=1), [0, 2], 2048)
    assert np.array_equal(image, swizzled(boxed(x, [32, 16], [0, 2]), 128, BASE + TILE, atom=32))


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_every_rank(kernel, rank):
    shape = [5, 3, 4, 6, 32][-rank:]
    x = numbers(*shape, seed=rank)
    box = [16, 4, 3, 2, 2][:rank]
    start = [8, 1, 1, 1, 2][:rank]
    nbytes = 2 * int(np.prod(box))
    assert np.array_equal(kernel.load(tensor_map(x, box), start, nbytes), swizzled(boxed(x, box, start), 0, 0))


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.uint16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64],
    ids=str,
)
def test_every_element_size(eager, dtype):
    x = numbers(20, 64, dtype=dtype)
    image = eager.load(tensor_map(x, [32, 8]), [16, 9], 256 * x.element_size())
    assert np.array_equal(image, swizzled(boxed(x, [32, 8], [16, 9]), 0, 0))


def test_strides_beyond_32_bits_and_permuted_dimensions(eager):
    x = numbers(6, 10, 64).permute(1, 0, 2)  # [10, 6, 64], not contiguous
    image = eager.load(tensor_map(x, [64, 3, 4], swizzle=128), [0, 2, 5], 64 * 2 * 12)
    assert np.array_equal(image, swizzled(boxed(x, [64, 3, 4], [0, 2, 5]), 128, BASE + TILE))
    # With a stride of 2^36 + 64 bytes the second row is far away; without the high bits it would lie inside.
    far = tensor_map(x.contiguous()[0], [16, 2], dims=[64, 2], strides=[2, (1 << 36) + 64])
    with pytest.raises(errors.OutOfBounds):
        eager.load(far, [0, 0], 64)


@pytest.mark.parametrize("swizzle", [0, 128])
@pytest.mark.parametrize("start", [(-24, -3), (40, 20), (0, -100), (64, 0), (-64, 0)])
def test_elements_outside_the_tensor_are_zero(kernel, start, swizzle):
    x = numbers(30, 64)
    image = kernel.load(tensor_map(x, [64, 16], swizzle=swizzle), start, 2048)
    assert np.array_equal(image, swizzled(boxed(x, [64, 16], start), swizzle, BASE + TILE))


@pytest.mark.parametrize(
    "dtype, nan",
    [(torch.bfloat16, 0x7FFF), (torch.float16, 0x7FFF), (torch.float32, 0x7FFFFFFF)],
    ids=["bf16", "f16", "f32"],
)
def test_elements_outside_the_tensor_are_nan_if_the_map_says_so(eager, dtype, nan):
    x = floats(30, 32, dtype=dtype)
    image = eager.load(tensor_map(x, [32, 8], nan_fill=True), [8, 26], 256 * x.element_size())
    assert np.array_equal(image, swizzled(boxed(x, [32, 8], [8, 26], fill=nan), 0, 0))


def test_middle_dimension_outside(eager):
    x = numbers(4, 3, 32)
    image = eager.load(tensor_map(x, [32, 4, 2]), [0, 1, 3], 512)
    assert np.array_equal(image, swizzled(boxed(x, [32, 4, 2], [0, 1, 3]), 0, 0))


def test_element_strides(eager):
    x = numbers(40, 32)
    image = eager.load(tensor_map(x, [32, 7], steps=[1, 3]), [0, -2], 32 * 2 * 3)
    assert np.array_equal(image, swizzled(boxed(x, [32, 7], [0, -2], steps=[1, 3]), 0, 0))


def test_tf32_maps_round_and_ftz_maps_flush(eager):
    x = torch.tensor([1.0, 1 + 2**-11, 1 + 3 * 2**-11, 1e-40, -1e-40, float("inf"), -2.5, 3e38], dtype=torch.float32)
    x = x.repeat(2).view(1, 16)
    rounded = eager.load(tensor_map(x, [16, 1], tf32=True), [0, 0], 64).view(np.float32)
    assert rounded[1] == 1.0 and rounded[2] == 1 + 2**-9 and np.isinf(rounded[5]) and rounded[6] == -2.5
    assert not (rounded.view(np.uint32) & 0x1FFF).any()
    flushed = eager.load(tensor_map(x, [16, 1], element_type=8), [0, 0], 64).view(np.float32)
    assert flushed[3] == 0 and flushed[4] == 0 and np.signbit(flushed[4]) and flushed[1] == x[0, 1].item()


def test_cache_hint_and_the_cluster_spelling(eager):
    x = numbers(16, 64)
    body = INIT_BARRIER + """
    mov.b64 %d5, 0;
    @%p0 mbarrier.arrive.expect_tx.shared.b64 %d9, [%r0], 2048;
    @%p0 cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%d0, {0, 0}];
    prefetch.tensormap [%d0];
    @%p0 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint
        [%r1], [%d0, {0, 0}], [%r0], %d5;
    """ + WAIT + dump(2048)  # fmt: skip
    out = torch.zeros(2048, dtype=torch.uint8)
    eager(body, [tensor_map(x, [64, 16]), out])
    assert np.array_equal(out.numpy(), swizzled(boxed(x, [64, 16], [0, 0]), 0, 0))


def test_lanes_with_equal_operands_issue_once(eager):
    x = numbers(16, 64)
    body = INIT_BARRIER + load([0, 0], 2048).replace("@%p0 cp.async", "cp.async") + WAIT + dump(2048)
    out = torch.zeros(2048, dtype=torch.uint8)
    launch = eager(body, [tensor_map(x, [64, 16]), out])
    assert launch.counts.tma_bytes_loaded == 2048
    assert np.array_equal(out.numpy(), swizzled(boxed(x, [64, 16], [0, 0]), 0, 0))


# ---------------------------------------------------------------------------------------------------------
# Clusters


def cluster_body(issue: str) -> str:
    """Both CTAs prepare a barrier; CTA 0 runs `issue`; both wait and dump 1024 bytes each."""
    return (
        f"""
    @%p0 mbarrier.init.shared.b64 [%r0], 1;
    fence.mbarrier_init.release.cluster;
    barrier.cluster.arrive;
    barrier.cluster.wait;
    mov.u32 %r5, %cluster_ctarank;
    mul.wide.u32 %d3, %r5, 1024;
    add.s64 %d1, %d1, %d3;
    setp.eq.u32 %p3, %r5, 0;
    and.pred %p4, %p3, %p0;
    {issue}
    """
        + WAIT
        + dump(1024)
        + "barrier.cluster.arrive;\nbarrier.cluster.wait;\n"
    )


@pytest.mark.parametrize("mask", [0b11, 0b10])
def test_multicast(kernel, mask):
    x = numbers(16, 32)
    expects = "@%p0 mbarrier.arrive.expect_tx.shared.b64 %d9, [%r0], 1024;"
    if mask == 0b10:  # CTA 0 gets nothing
        expects = """
        @%p4 mbarrier.arrive.shared.b64 %d9, [%r0];
        not.pred %p5, %p3;
        and.pred %p5, %p5, %p0;
        @%p5 mbarrier.arrive.expect_tx.shared.b64 %d9, [%r0], 1024;
        """
    issue = f"""
    {expects}
    mov.b16 %h0, {mask};
    @%p4 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster
        [%r1], [%d0, {{0, 0}}], [%r0], %h0;
    """
    out = torch.zeros(2, 1024, dtype=torch.uint8)
    body = cluster_body(issue)
    if mask == 0b10:
        body = body.replace("DUMP:", "@%p3 bra DUMPED;\nDUMP:", 1)
    launch = kernel(body, [tensor_map(x, [32, 16], swizzle=64), out], grid=2, cluster=2)
    expected = swizzled(boxed(x, [32, 16], [0, 0]), 64, BASE + TILE)
    assert np.array_equal(out[1].numpy(), expected)
    assert np.array_equal(out[0].numpy(), expected) == (mask == 0b11)
    assert launch.counts.tma_bytes_loaded == 1024


PAIR = "shared::cluster.global.tile.mbarrier::complete_tx::bytes.cta_group::2"


def test_cta_group_2_signals_the_leaders_barrier(blackwell):
    """Each CTA loads its own half; both signal CTA 0's barrier, reached by clearing bit 24."""
    x = numbers(32, 32)
    body = f"""
    @%p0 mbarrier.init.shared.b64 [%r0], 1;
    fence.mbarrier_init.release.cluster;
    barrier.cluster.arrive;
    barrier.cluster.wait;
    mov.u32 %r5, %cluster_ctarank;
    setp.eq.u32 %p3, %r5, 0;
    and.pred %p4, %p3, %p0;
    mul.lo.u32 %r6, %r5, 16;
    and.b32 %r7, %r0, 0xFEFFFFFF;
    @%p4 mbarrier.arrive.expect_tx.shared.b64 %d9, [%r0], 2048;
    @%p0 cp.async.bulk.tensor.2d.{PAIR} [%r1], [%d0, {{0, %r6}}], [%r7];
    @!%p3 bra SKIP;
    {WAIT}
    SKIP:
    barrier.cluster.arrive;
    barrier.cluster.wait;
    mul.wide.u32 %d3, %r5, 1024;
    add.s64 %d1, %d1, %d3;
    """ + dump(1024)
    out = torch.zeros(2, 1024, dtype=torch.uint8)
    blackwell(body, [tensor_map(x, [32, 16], swizzle=64), out], grid=2, cluster=2)
    for rank in range(2):
        assert np.array_equal(out[rank].numpy(), swizzled(boxed(x, [32, 16], [0, 16 * rank]), 64, BASE + TILE))
    without = body.replace(".cta_group::2", "")
    with pytest.raises(errors.InvalidOperand, match="cta_group::2"):
        blackwell(without, [tensor_map(x, [32, 16], swizzle=64), out], grid=2, cluster=2)


# ---------------------------------------------------------------------------------------------------------
# Stores and reductions


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("start", [(0, 0), (16, 25), (-8, -4)])
def test_store_writes_what_lies_inside(kernel, swizzle, start):
    box = [(swizzle or 64) // 2, 16]
    x, tile = numbers(30, 32), numbers(16, box[0], seed=1)
    before = raw(x).copy()
    image = torch.from_numpy(swizzled(raw(tile), swizzle, BASE + TILE))
    launch = kernel.store(tensor_map(x, box, swizzle=swizzle), image, start)
    written = 0
    for r in range(16):
        for c in range(box[0]):
            row, column = start[1] + r, start[0] + c
            if 0 <= row < 30 and 0 <= column < 32:
                before[row, column] = raw(tile)[r, c]
                written += 2
    assert np.array_equal(raw(x), before)
    assert launch.counts.tma_bytes_stored == written


# The PTX ISA's operations on unsigned integers; .inc and .dec wrap at the operand.
INTEGER_OPERATIONS = {
    "add": lambda memory, operand: memory + operand,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "inc": lambda memory, operand: np.where(memory >= operand, 0, memory + 1),
    "dec": lambda memory, operand: np.where((memory == 0) | (memory > operand), operand, memory - 1),
}
REDUCE = "cp.reduce.async.bulk.tensor.{n}d.global.shared::cta.%s.tile.bulk_group"


@pytest.mark.parametrize("op", list(INTEGER_OPERATIONS))
def test_integer_reductions(eager, op):
    x, tile = (torch.randint(0, 9, (8, 32), dtype=torch.int32).view(torch.uint32) for _ in range(2))
    expected = INTEGER_OPERATIONS[op](raw(x), raw(tile)).astype(np.uint32)
    launch = eager.store(
        tensor_map(x, [32, 8], swizzle=128),
        torch.from_numpy(swizzled(raw(tile), 128, BASE + TILE)),
        [0, 0],
        opcode=REDUCE % op,
    )
    assert np.array_equal(raw(x), expected)
    assert launch.counts.tma_bytes_reduced == 1024 and launch.counts.tma_bytes_stored == 0


def test_signed_min_is_signed(eager):
    x, tile = (torch.randint(-9, 9, (8, 32), dtype=torch.int32) for _ in range(2))
    expected = torch.minimum(x, tile)
    eager.store(tensor_map(x, [32, 8]), bytes_of(tile), [0, 0], opcode=REDUCE % "min")
    assert torch.equal(x, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_floating_point_add_rounds_once(kernel, dtype):
    x, tile = floats(8, 32, dtype=dtype), floats(8, 32, dtype=dtype, seed=1)
    expected = (x.double() + tile.double()).to(dtype)
    kernel.store(tensor_map(x, [32, 8]), bytes_of(tile), [0, 0], opcode=REDUCE % "add")
    assert torch.equal(x, expected)


def test_add_of_f32_flushes_subnormals(eager):
    x = torch.zeros(1, 32)
    tile = torch.full((1, 32), -1e-40)
    tile[0, 0] = 1e-3
    eager.store(tensor_map(x, [32, 1]), bytes_of(tile), [0, 0], opcode=REDUCE % "add")
    assert x[0, 0] == tile[0, 0] and (x[0, 1:] == 0).all()


@pytest.mark.parametrize("op", ["min", "max"])
def test_half_extremes_prefer_numbers_to_nan(eager, op):
    x = torch.tensor([1.0, float("nan"), -0.0, 0.0, float("nan"), 5.0, -3.0, 2.0], dtype=torch.float16).view(1, 8)
    tile = torch.tensor([float("nan"), 2.0, 0.0, -0.0, float("nan"), 6.0, -4.0, 1.0], dtype=torch.float16).view(1, 8)
    eager.store(tensor_map(x, [8, 1]), bytes_of(tile), [0, 0], opcode=REDUCE % op)
    low = op == "min"
    expected = [0x3C00, 0x4000, 0x8000 if low else 0, 0x8000 if low else 0, 0x7FFF,
                0x4500 if low else 0x4600, 0xC400 if low else 0xC200, 0x3C00 if low else 0x4000]  # fmt: skip
    assert raw(x)[0].tolist() == expected


# ---------------------------------------------------------------------------------------------------------
# What is refused or found


def failing_load(kernel, descriptor, start=(0, 0), nbytes=2048, edit=lambda body: body, **launch):
    body = INIT_BARRIER + load(start, nbytes) + WAIT + dump(nbytes)
    kernel(edit(body), [descriptor, torch.zeros(nbytes, dtype=torch.uint8)], **launch)


def test_load_outside_every_tensor_names_the_tensor(eager):
    x = numbers(16, 64)
    eager.device.register(x, "keys")
    too_long = tensor_map(x, [64, 16], dims=[64, 40])
    with pytest.raises(errors.OutOfBounds, match=r"box at \{0, 8\}.*keys"):
        failing_load(eager, too_long, [0, 8])
    failing_load(eager, too_long, [0, 0])  # what the box does not touch does not matter


def test_misaligned_destination(eager):
    x = numbers(16, 64)
    with pytest.raises(errors.Misaligned, match="128"):
        failing_load(eager, tensor_map(x, [64, 16]), edit=lambda b: "add.u32 %r1, %r1, 64;\n" + b)


def test_box_beyond_shared_memory(eager):
    x = numbers(16, 64)
    with pytest.raises(errors.OutOfBounds):
        failing_load(eager, tensor_map(x, [64, 16]), shared_bytes=2048)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"interleave": 1}, "interleave"),
        ({"element_type": 11}, "element type 11"),
        ({"atomicity": 2, "swizzle": 128}, "atomicity"),
        ({"atomicity": 1, "swizzle": 64}, "atomicity"),
        ({"always": 0}, "tiled"),
        ({"always": 1 << 1 | 1 << 18 | 1 << 3}, "tiled"),
        ({"swizzle": 64}, "64-byte swizzle"),
        ({"element_type": 1, "nan_fill": True}, "NaN"),
        ({"tf32": True}, "tf32"),
    ],
    ids=str,
)
def test_tensor_maps_that_are_refused(eager, change, message):
    with pytest.raises(errors.InvalidOperand, match=message):
        failing_load(eager, tensor_map(numbers(16, 64), [64, 16], **change))


def test_rows_that_are_not_multiples_of_16_bytes(eager):
    with pytest.raises(errors.InvalidOperand, match="multiple of 16"):
        failing_load(eager, tensor_map(numbers(16, 64), [4, 16]), nbytes=128)


def test_tensor_address_must_be_aligned(eager):
    x = numbers(16, 64)
    with pytest.raises(errors.Misaligned, match="tensor's address"):
        failing_load(eager, tensor_map(x, [64, 16], address=x.data_ptr() + 8))


def test_rank_of_map_and_instruction_must_agree(eager):
    with pytest.raises(errors.InvalidOperand, match="rank 3.*2"):
        failing_load(eager, tensor_map(numbers(2, 16, 64), [64, 16, 1]))


def test_barrier_must_be_initialised_and_fenced(eager):
    x = numbers(16, 64)
    with pytest.raises(errors.BarrierError, match="before mbarrier.init"):
        failing_load(eager, tensor_map(x, [64, 16]), edit=lambda b: re.sub("@%p0 mbarrier.init.*", "", b))
    with pytest.raises(errors.MissingProxyFence):
        failing_load(eager, tensor_map(x, [64, 16]), edit=lambda b: re.sub("fence.mbarrier_init.*", "", b))


@pytest.mark.parametrize("nbytes", [1024, 4096])
def test_wrong_expected_bytes_deadlock(eager, nbytes):
    with pytest.raises(errors.Deadlock, match="mbarrier"):
        failing_load(eager, tensor_map(numbers(16, 64), [64, 16]), nbytes=nbytes)


def test_reading_a_tile_without_waiting_is_a_race_in_every_order(kernel):
    with pytest.raises(errors.RaceDetected, match="cp.async.bulk.tensor"):
        failing_load(kernel, tensor_map(numbers(16, 64), [64, 16]), edit=lambda b: b.replace(WAIT, ""))


def test_overwriting_the_tensor_while_it_is_loaded(kernel):
    x = numbers(16, 64)
    body = INIT_BARRIER + load([0, 0], 2048) + f"mov.b64 %d4, {x.data_ptr() + 256};\n@%p0 st.global.b32 [%d4], %r2;\n"
    with pytest.raises(errors.RaceDetected, match="st.global"):
        kernel(body + WAIT, [tensor_map(x, [64, 16]), 0])


def test_a_phase_that_does_not_await_the_bytes(kernel):
    """An arrival without expect_tx: the copy comes first and its bytes stay unaccounted for, or the wait is vain."""
    without = {"edit": lambda b: b.replace("mbarrier.arrive.expect_tx.shared.b64 %d9, [%r0], 2048;",
                                           "mbarrier.arrive.shared.b64 %d9, [%r0];")}  # fmt: skip
    with pytest.raises((errors.Deadlock, errors.RaceDetected)):
        failing_load(kernel, tensor_map(numbers(16, 64), [64, 16]), **without)


def test_loading_over_a_tile_that_is_still_read_is_a_race(kernel):
    """A second load into the same tile, ordered behind the first but not behind another warp's reads."""
    body = (
        INIT_BARRIER
        + "@%p0 mbarrier.init.shared.b64 [%r0+8], 1;\n"
        + """
    fence.mbarrier_init.release.cluster;
    bar.sync 0;
    """
        + load([0, 0], 2048)
        + WAIT
        + f"""
    setp.lt.u32 %p3, %r3, 32;
    @%p3 bra SECOND;
    {dump(2048)}
    bra END;
    SECOND:
    {load([0, 16], 2048).replace("[%r0]", "[%r0+8]")}
    WAIT_SECOND:
    mbarrier.try_wait.parity.shared.b64 %p1, [%r0+8], 0;
    @!%p1 bra WAIT_SECOND;
    END:
    """
    )
    arguments = [tensor_map(numbers(32, 64), [64, 16]), torch.zeros(2048, dtype=torch.uint8)]
    with pytest.raises(errors.RaceDetected):
        kernel(body, arguments, block=64)
    ordered = body.replace("bra END;", "bar.sync 0;\nbra END;", 1).replace("SECOND:", "SECOND:\nbar.sync 0;", 1)
    kernel(ordered, arguments, block=64)


def storing_body(edit=lambda body: body) -> str:
    return edit(fill(1024) + store([0, 0]) + COMMIT_AND_WAIT)


def run_store(kernel, body, x=None):
    x = numbers(8, 64) if x is None else x
    arguments = [tensor_map(x, [64, 8]), 0, bytes_of(numbers(8, 64, seed=1))]
    return kernel(body, arguments, parameters=PARAMETERS + ", .param .u64 source")


def test_store_needs_a_proxy_fence(kernel):
    with pytest.raises(errors.MissingProxyFence):
        run_store(kernel, storing_body(lambda b: b.replace("fence.proxy.async.shared::cta;", "")))


def test_store_of_unwritten_shared_memory(kernel):
    with pytest.raises(errors.Uninitialised):
        run_store(kernel, store([0, 0]) + COMMIT_AND_WAIT)


@pytest.mark.parametrize("missing", ["cp.async.bulk.commit_group;", "cp.async.bulk.wait_group 0;"])
def test_a_thread_must_wait_for_its_stores_before_it_exits(kernel, missing):
    with pytest.raises(errors.InFlightAccess, match="wait_group"):
        run_store(kernel, storing_body(lambda b: b.replace(missing, "")))


OVERWRITE = "st.shared.b32 [%r1], %r2;\n"


def test_overwriting_the_source_needs_wait_group_read(kernel):
    for wait in ("", "cp.async.bulk.wait_group.read 1;\n"):
        body = storing_body().replace("cp.async.bulk.wait_group 0;", wait + "@%p0 " + OVERWRITE)
        with pytest.raises(errors.RaceDetected, match="st.shared|cp.async.bulk.tensor"):
            run_store(kernel, body)
    x = numbers(8, 64)
    run_store(kernel, storing_body().replace("wait_group 0;", "wait_group.read 0;\n@%p0 " + OVERWRITE), x)
    assert np.array_equal(raw(x), raw(numbers(8, 64, seed=1)))


READ_BACK = """
    ld.global.b16 %h1, [%d4];
    bar.warp.sync -1;
    @%p0 st.global.b16 [%d4+2], %h1;
"""


def test_reading_what_was_stored_needs_the_full_wait(kernel):
    x = numbers(8, 64)
    body = f"mov.b64 %d4, {x.data_ptr()};\n" + storing_body() + READ_BACK
    run_store(kernel, body, x)
    assert raw(x)[0, 1] == raw(x)[0, 0]
    with pytest.raises(errors.RaceDetected):
        run_store(kernel, body.replace("wait_group 0", "wait_group.read 0"), x)


def test_older_groups_are_waited_for(kernel):
    """wait_group.read 1 covers the first of two stores, not the second."""
    two = f"""
    {fill(1024)}
    {store([0, 0])}
    cp.async.bulk.commit_group;
    add.u32 %r15, %r1, 512;
    @%p0 cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%d0, {{0, 4}}], [%r15];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 1;
    @%p0 st.shared.b32 [%r1+OFFSET], %r2;
    cp.async.bulk.wait_group 0;
    """
    x = numbers(8, 64)
    arguments = [tensor_map(x, [64, 4]), 0, bytes_of(numbers(8, 64, seed=1))]
    parameters = PARAMETERS + ", .param .u64 source"
    kernel(two.replace("OFFSET", "0"), arguments, parameters=parameters)
    with pytest.raises(errors.RaceDetected):
        kernel(two.replace("OFFSET", "512"), arguments, parameters=parameters)


def test_reductions_that_the_isa_does_not_define(eager):
    x = floats(8, 32, dtype=torch.float32)
    with pytest.raises(errors.InvalidOperand, match="f32"):
        eager.store(tensor_map(x, [32, 8]), bytes_of(x), [0, 0], opcode=REDUCE % "min")


def test_stores_through_element_strides(eager):
    x = numbers(16, 64)
    with pytest.raises(errors.InvalidOperand, match="element strides"):
        run_descriptor = tensor_map(x, [64, 8], steps=[1, 2])
        eager.store(run_descriptor, bytes_of(numbers(4, 64)), [0, 0])


def test_multicast_to_a_cta_that_does_not_exist(eager):
    body = (
        INIT_BARRIER
        + """
    mov.b16 %h0, 3;
    @%p0 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster
        [%r1], [%d0, {0, 0}], [%r0], %h0;
    """
    )
    with pytest.raises(errors.InvalidOperand, match="mask 3"):
        eager(body, [tensor_map(numbers(16, 64), [64, 16]), torch.zeros(1)])


def test_shared_cta_destination_must_be_ones_own(eager):
    body = cluster_body("""
    mapa.shared::cluster.u32 %r8, %r1, 1;
    mapa.shared::cluster.u32 %r9, %r0, 1;
    @%p4 cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r8], [%d0, {0, 0}], [%r9];
    """)
    with pytest.raises(errors.InvalidOperand, match="CTA 1"):
        eager(body, [tensor_map(numbers(16, 32), [32, 16]), torch.zeros(2048, dtype=torch.uint8)], grid=2, cluster=2)


@pytest.mark.parametrize(
    "opcode",
    [
        "cp.async.bulk.tensor.3d.shared::cta.global.im2col.mbarrier::complete_tx::bytes "
        "[%r1], [%d0, {0, 0, 0}], [%r0];",
        "cp.async.bulk.tensor.2d.shared::cta.global.tile::gather4.mbarrier::complete_tx::bytes "
        "[%r1], [%d0, {0, 0, 0, 0, 0}], [%r0];",
        "cp.async.bulk.tensor.2d.global.shared::cta.tile::scatter4.bulk_group [%d0, {0, 0, 0, 0, 0}], [%r1];",
    ],
)
def test_modes_that_are_not_modelled_are_unknown_opcodes(eager, opcode):
    with pytest.raises(errors.UnknownOpcode, match="im2col|gather4|scatter4"):
        eager(opcode, [bytes(128), 0])


def test_a_changed_map_is_decoded_again(eager):
    """The descriptor lies in global memory, and the kernel moves the tensor's address by one row."""
    x = numbers(17, 64)
    descriptor = torch.zeros(256, dtype=torch.uint8)
    offset = -descriptor.data_ptr() % 64
    descriptor[offset : offset + 128] = torch.frombuffer(bytearray(tensor_map(x, [64, 8])), dtype=torch.uint8)
    eager.device.register(x), eager.device.register(descriptor)
    body = INIT_BARRIER + f"mov.b64 %d0, {descriptor.data_ptr() + offset};\n" + load([0, 0], 1024) + WAIT + """
    ld.global.b64 %d5, [%d0];
    add.s64 %d5, %d5, 128;
    bar.warp.sync -1;
    @%p0 st.global.b64 [%d0], %d5;
    bar.warp.sync -1;
    """ + load([0, 0], 1024) + """
    WAIT_AGAIN:
    mbarrier.try_wait.parity.shared.b64 %p1, [%r0], 1;
    @!%p1 bra WAIT_AGAIN;
    """ + dump(1024)  # fmt: skip
    out = torch.zeros(1024, dtype=torch.uint8)
    eager(body, [bytes(128), out])
    assert np.array_equal(out.numpy(), swizzled(boxed(x, [64, 8], [0, 1]), 0, 0))
