"""tcgen05: tensor memory, its allocation, its layouts, and products. Expected values come from the PTX ISA's tables.

Kernels here run on one warpgroup per CTA. Shared memory: an mbarrier at 0, the tensor memory address at 16, operands
from 1024 on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch

from cute_sparse import emulator
from cute_sparse.emulator import errors
from cute_sparse.emulator.text import module, run_ptx

ORDERS = ("eager", "late", "random")
IMAGE = 1024  # where operands lie in shared memory, from the start of the dynamic part
SHARED_BASE = 1024  # shared address of the dynamic part
PARAMETERS = ".param .u64 image, .param .u64 out"
REGISTERS = (
    ".reg .pred %p<16>; .reg .b16 %h<8>; .reg .b32 %r<64>; .reg .b32 %v<512>; .reg .b64 %d<32>; .reg .b128 %q<2>;"
)
SHARED = ".extern .shared .align 1024 .b8 smem[];"

# %r0 thread, %r1 warp, %r3 shared memory, %r4 tensor memory, %r6 this warp's lanes of it, %d1 out, %p2 one thread of
# warp 0
PROLOGUE = """
  mov.u32 %r0, %tid.x;
  shr.u32 %r1, %r0, 5;
  mov.u32 %r3, smem;
  ld.param.b64 %d0, [image];
  ld.param.b64 %d1, [out];
  setp.eq.u32 %p0, %r0, 0;
  @%p0 mbarrier.init.shared.b64 [%r3], 1;
  @%p0 fence.mbarrier_init.release.cluster;
  setp.ne.u32 %p1, %r1, 0;
  @%p1 bra ALLOCATED;
  tcgen05.alloc.cta_group::GROUP.sync.aligned.shared::cta.b32 [%r3+16], 512;
  tcgen05.relinquish_alloc_permit.cta_group::GROUP.sync.aligned;
ALLOCATED:
  bar.sync 0;
  ld.shared.b32 %r4, [%r3+16];
  shl.b32 %r5, %r1, 21;
  add.s32 %r6, %r4, %r5;
  mov.pred %p2, 0;
  @%p1 bra ELECTED;
  elect.sync _|%p2, -1;
ELECTED:
"""
WAIT = """
WAITING:
  mbarrier.try_wait.parity.shared.b64 %p3, [%r3], 0;
  @!%p3 bra WAITING;
  tcgen05.fence::after_thread_sync;
"""
EPILOGUE = """
  bar.sync 0;
  @%p1 bra DONE;
  tcgen05.dealloc.cta_group::GROUP.sync.aligned.b32 %r4, 512;
DONE:
"""
FENCED_BARRIER = "tcgen05.fence::before_thread_sync;\nbar.sync 0;\ntcgen05.fence::after_thread_sync;\n"
COMMIT = "@%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r3];"


def vector(count: int, first: int = 0) -> str:
    return "{" + ", ".join(f"%v{first + k}" for k in range(count)) + "}"


def copy_image(size: int) -> str:
    """Global image -> shared memory, by generic stores that the async proxy sees afterwards."""
    return f"""
  shl.b32 %r10, %r0, 4;
COPYING:
  setp.ge.u32 %p4, %r10, {size};
  @%p4 bra COPIED;
  cvt.u64.u32 %d2, %r10;
  add.s64 %d2, %d0, %d2;
  ld.global.v4.b32 {{%r11, %r12, %r13, %r14}}, [%d2];
  add.s32 %r15, %r3, %r10;
  st.shared.v4.b32 [%r15+{IMAGE}], {{%r11, %r12, %r13, %r14}};
  add.s32 %r10, %r10, 2048;
  bra COPYING;
COPIED:
  fence.proxy.async.shared::cta;
  bar.sync 0;
"""


def fill_tensor(columns: int, value: str = "lane * 512 + column") -> str:
    """Every word of the first columns: 512 * lane + column, or -1; visible to the whole CTA."""
    if value == "-1":
        words = "".join(f"mov.b32 %v{k}, -1;\n" for k in range(columns))
    else:
        words = "shl.b32 %r20, %r0, 9;\n" + "".join(f"add.s32 %v{k}, %r20, {k};\n" for k in range(columns))
    stores = "".join(
        f"add.s32 %r21, %r6, {first};\n"
        f"tcgen05.st.sync.aligned.32x32b.x32.b32 [%r21], {vector(32, first)};\n"
        for first in range(0, columns, 32)
    )
    return words + stores + "tcgen05.wait::st.sync.aligned;\n" + FENCED_BARRIER


def store_out(count: int, first: int = 0) -> str:
    """out[thread][k] = register k, for `count` registers."""
    stores = "".join(f"st.global.b32 [%d3+{4 * k}], %v{first + k};\n" for k in range(count))
    return f"mul.wide.u32 %d3, %r0, {4 * count};\nadd.s64 %d3, %d1, %d3;\n" + stores


def read_tensor(columns: int) -> str:
    """All lanes, the first columns, to out[lane][column]."""
    step = min(32, columns & -columns)
    loads = "".join(
        f"add.s32 %r22, %r6, {first};\n"
        f"tcgen05.ld.sync.aligned.32x32b.x{step}.b32 {vector(step, first)}, [%r22];\n"
        for first in range(0, columns, step)
    )
    return loads + "tcgen05.wait::ld.sync.aligned;\n" + store_out(columns)


def launch(
    body: str,
    image: torch.Tensor,
    out: torch.Tensor,
    *,
    order: str = "eager",
    cta_group: int = 1,
    prologue: str = PROLOGUE,
    columns: int = 512,
    **options,
):
    body = (prologue + body + EPILOGUE).replace("GROUP", str(cta_group)).replace(", 512;", f", {columns};")
    ptx = module("sm_100a", body, parameters=PARAMETERS, registers=REGISTERS, shared=SHARED)
    options = {"block": 128, "shared_bytes": 65536, **options}
    with emulator.device("sm_100a", order=order, seed=7, sms=2, threads=1, max_warp_instructions=400_000) as device:
        return run_ptx(device, ptx, [image, out], **options)


def nothing() -> torch.Tensor:
    return torch.zeros(4, dtype=torch.int32)


# ---------------------------------------------------------------------------------------------------------------------
# Loads and stores


@dataclass(frozen=True)
class Fragment:
    """A shape of tcgen05.ld/st as a layout: strides, in bits, of the thread's and the register's coordinates.

    The address of a bit is row * width + bit, width being the bits of a row that all repetitions cover.
    """

    name: str
    registers: int  # of one repetition
    thread_shape: tuple[int, ...]
    register_shape: tuple[int, ...]  # the last one counts the repetitions

    def word(self, thread: int, register: int, repetitions: int) -> tuple[int, int]:
        """(lane, column)"""
        width = {"32x32b": 32, "16x64b": 64, "16x128b": 128, "16x256b": 256, "16x32bx2": 64}[self.name] * repetitions
        thread_strides = {
            "32x32b": (width,),
            "16x64b": (8 * width, 32, width),
            "16x128b": (32, width),
            "16x256b": (64, width),
            "16x32bx2": (width, width // 2),
        }[self.name]
        register_strides = {
            "32x32b": (32,),
            "16x64b": (64,),
            "16x128b": (8 * width, 128),
            "16x256b": (32, 8 * width, 256),
            "16x32bx2": (32,),
        }[self.name]
        bit = 0
        for index, shape, strides in (
            (thread, self.thread_shape, thread_strides),
            (register, self.register_shape, register_strides),
        ):
            for extent, stride in zip(shape, strides, strict=True):
                bit += index % extent * stride
                index //= extent
            # what is left belongs to the last mode
            bit += index * shape[-1] * strides[-1]
        return bit // width, bit % width // 32


FRAGMENTS = (
    Fragment("32x32b", 1, (32,), (1,)),
    Fragment("16x64b", 1, (2, 2, 8), (1,)),
    Fragment("16x128b", 2, (4, 8), (2, 1)),
    Fragment("16x256b", 4, (4, 8), (2, 2, 1)),
    Fragment("16x32bx2", 1, (16, 2), (1,)),
)


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("repetitions", [1, 4, 16])
@pytest.mark.parametrize("fragment", FRAGMENTS, ids=lambda f: f.name)
def test_loaded_registers_hold_the_words_of_the_isa_figures(fragment, repetitions, packed):
    count = fragment.registers * repetitions
    split = f", {repetitions * (2 if packed else 1)}" if fragment.name == "16x32bx2" else ""
    pack = ".pack::16b" if packed else ""
    load = (
        f"tcgen05.ld.sync.aligned.{fragment.name}.x{repetitions}{pack}.b32 {vector(count)}, [%r6]{split};\n"
        "tcgen05.wait::ld.sync.aligned;\n"
    )
    out = torch.zeros(128, count, dtype=torch.int32)
    launch(fill_tensor(256) + load + store_out(count), nothing(), out)

    def expected(thread: int, register: int) -> int:
        lane, column = fragment.word(thread % 32, register, repetitions)
        lane += thread // 32 * 32
        if not packed:
            return lane * 512 + column
        low, high = lane * 512 + 2 * column, lane * 512 + 2 * column + 1
        word = low & 0xFFFF | (high & 0xFFFF) << 16
        return word - (1 << 32) if word >> 31 else word

    assert out.tolist() == [[expected(t, r) for r in range(count)] for t in range(128)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("packed", [False, True], ids=["", "unpacked"])
@pytest.mark.parametrize("fragment", FRAGMENTS, ids=lambda f: f.name)
def test_stored_registers_become_the_words_of_the_isa_figures(fragment, packed, order):
    repetitions = 8
    count = fragment.registers * repetitions
    split = f", {repetitions * (2 if packed else 1)}" if fragment.name == "16x32bx2" else ""
    unpack = ".unpack::16b" if packed else ""
    store = (
        "".join(f"mad.lo.s32 %v{r}, %r0, 65539, {r * 7};\n" for r in range(count))
        + f"tcgen05.st.sync.aligned.{fragment.name}.x{repetitions}{unpack}.b32 [%r6]{split}, {vector(count)};\n"
        "tcgen05.wait::st.sync.aligned;\n"
    )
    out = torch.zeros(128, 128, dtype=torch.int32)
    launch(fill_tensor(128, "-1") + store + read_tensor(128), nothing(), out, order=order)
    expected = torch.full((128, 128), -1, dtype=torch.int32)
    for thread in range(128):
        for register in range(count):
            lane, column = fragment.word(thread % 32, register, repetitions)
            lane += thread // 32 * 32
            value = thread * 65539 + register * 7
            if packed:
                expected[lane, 2 * column], expected[lane, 2 * column + 1] = value & 0xFFFF, value >> 16
            else:
                expected[lane, column] = value
    assert torch.equal(out, expected)


def test_sixteen_lane_shapes_reach_the_upper_half_of_a_warps_lanes():
    load = """
      add.s32 %r6, %r6, 1048576;
      tcgen05.ld.sync.aligned.16x64b.x1.b32 {%v0}, [%r6+3];
      tcgen05.wait::ld.sync.aligned;
    """
    out = torch.zeros(128, 1, dtype=torch.int32)
    launch(fill_tensor(32) + load + store_out(1), nothing(), out)
    thread = torch.arange(128)
    lane = thread // 32 * 32 + 16 + thread % 32 // 4 + 8 * (thread % 2)
    assert torch.equal(out[:, 0].long(), lane * 512 + 3 + thread // 2 % 2)


WAIT_FOR_LOADS = "tcgen05.wait::ld.sync.aligned;\n"


def test_in_a_kernel_without_any_wait_for_loads_their_registers_may_be_used_at_once():
    load = "tcgen05.ld.sync.aligned.32x32b.x2.b32 {%v0, %v1}, [%r6];\nadd.s32 %v0, %v0, %v1;\n"
    again = "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r6], {%v0};\ntcgen05.wait::st.sync.aligned;\n"
    out = torch.zeros(128, 2, dtype=torch.int32)
    launch(fill_tensor(32) + load + again + load + store_out(2), nothing(), out)
    lane = torch.arange(128, dtype=torch.int32)
    assert torch.equal(out[:, 0], lane * 512 + 1 + lane * 1024 + 1)


# PTX ISA, "tcgen05.wait": until it, a load's registers are not there. What stands where it is missing, and what it does
# to a register that is loaded.
USES = {
    "read": "add.s32 %v2, %v0, 1;",
    "overwritten": "mov.b32 %v0, 1;",
    "stored": "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r6+8], {%v0};",
    "renamed and read": "mov.b64 %d3, {%v0, %v1};\nmov.b64 {%v2, %v3}, %d3;\nadd.s32 %v4, %v3, 1;",
    "a predicate": "setp.eq.u32 %p5, %v0, 0;",
}


@pytest.mark.parametrize("use", USES)
def test_in_a_kernel_that_waits_for_loads_a_register_is_used_behind_the_wait(use):
    load = "tcgen05.ld.sync.aligned.32x32b.x2.b32 {%v0, %v1}, [%r6];\n"
    end = "\ntcgen05.wait::st.sync.aligned;\n" + WAIT_FOR_LOADS
    launch(fill_tensor(32) + load + WAIT_FOR_LOADS + USES[use] + end, nothing(), nothing())
    with pytest.raises(errors.InFlightAccess, match="wait::ld"):
        launch(fill_tensor(32) + load + USES[use] + end, nothing(), nothing())


def test_a_wait_between_two_loads_covers_the_first_alone():
    load = "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%vFIRST}, [%r6];\n"
    loads = load.replace("FIRST", "0") + WAIT_FOR_LOADS + load.replace("FIRST", "1")
    use = "add.s32 %v2, %vUSED, 1;\n" + WAIT_FOR_LOADS
    launch(fill_tensor(32) + loads + use.replace("USED", "0"), nothing(), nothing())
    with pytest.raises(errors.InFlightAccess, match="wait::ld"):
        launch(fill_tensor(32) + loads + use.replace("USED", "1"), nothing(), nothing())


def test_a_register_may_be_renamed_before_the_wait():
    """Compilers pack loaded registers into pairs as soon as they are loaded; no machine instruction comes of it."""
    body = """
      tcgen05.ld.sync.aligned.32x32b.x2.b32 {%v40, %v41}, [%r6];
      mov.b64 %d4, {%v41, %v40};
      mov.b64 %d5, %d4;
      tcgen05.wait::ld.sync.aligned;
      mov.b64 {%v0, %v1}, %d5;
    """
    out = torch.zeros(128, 2, dtype=torch.int32)
    launch(fill_tensor(32) + body + store_out(2), nothing(), out)
    lane = torch.arange(128, dtype=torch.int32)
    assert torch.equal(out, torch.stack([lane * 512 + 1, lane * 512], dim=1).int())


def test_loads_into_a_shared_register_complete_one_by_one():
    body = """
      tcgen05.ld.sync.aligned.32x32b.x2.b32 {%v40, %v41}, [%r6];
      tcgen05.ld.sync.aligned.32x32b.x2.b32 {%v40, %v42}, [%r6+8];
      add.s32 %v43, %v41, 1;
      STORE
      add.s32 %v43, %v40, 1;
      tcgen05.st.sync.aligned.32x32b.x1.b32 [%r6+8], {%v43};
      tcgen05.wait::st.sync.aligned;
    """
    store = "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r6+8], {%v43};\ntcgen05.wait::st.sync.aligned;"
    launch(fill_tensor(32) + body.replace("STORE", ""), nothing(), nothing())
    with pytest.raises(errors.RaceDetected, match="tcgen05.ld"):  # the second load has not been used yet
        launch(fill_tensor(32) + body.replace("STORE", store), nothing(), nothing())


def test_a_store_over_a_load_that_nothing_waited_for_is_a_race():
    body = "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%v40}, [%r6];\ntcgen05.st.sync.aligned.32x32b.x1.b32 [%r6], {%v0};\n"
    with pytest.raises(errors.RaceDetected, match="tcgen05.ld"):
        launch(fill_tensor(32) + body, nothing(), nothing())


@pytest.mark.parametrize("order", ORDERS)
def test_reading_a_store_that_nothing_waited_for_is_a_race(order):
    body = "mov.b32 %v0, 5;\ntcgen05.st.sync.aligned.32x32b.x1.b32 [%r6], {%v0};\n" + read_tensor(1)
    with pytest.raises(errors.RaceDetected, match="tcgen05.st"):
        launch(body, nothing(), nothing(), order=order)


def test_overwriting_the_source_of_a_store_in_flight():
    body = "mov.b32 %v0, 5;\ntcgen05.st.sync.aligned.32x32b.x1.b32 [%r6], {%v0};\nmov.b32 %v0, 6;\n"
    with pytest.raises(errors.InFlightAccess):
        launch(body, nothing(), nothing())


def test_loading_into_the_source_of_a_store_in_flight():
    body = "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r6], {%v0};\n"
    body += "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%v0}, [%r6+8];\n"
    with pytest.raises(errors.InFlightAccess):
        launch(fill_tensor(32) + body, nothing(), nothing())


@pytest.mark.parametrize("shape", ["32x32b.x2", "16x64b.x2"])
def test_a_stored_register_that_nothing_wrote_is_unwritten_in_tensor_memory(shape):
    """Kernels store vectors of which they have filled a part; nobody may read the rest."""
    body = f"mov.b32 %v400, 5;\ntcgen05.st.sync.aligned.{shape}.b32 [%r6], {{%v400, %v401}};\n"
    body = fill_tensor(32) + body + "tcgen05.wait::st.sync.aligned;\n"
    load = "tcgen05.ld.sync.aligned.{}.b32 {{%v402}}, [%r6+{}];\nadd.s32 %v402, %v402, 1;\n"
    written, unwritten = (0, 1) if shape == "32x32b.x2" else (0, 2)
    one = shape.replace("x2", "x1")
    launch(body + load.format(one, written), nothing(), nothing())
    with pytest.raises(errors.Uninitialised, match="tensor memory"):
        launch(body + load.format(one, unwritten), nothing(), nothing())


def test_reading_tensor_memory_that_nothing_wrote():
    with pytest.raises(errors.Uninitialised, match="tensor memory"):
        launch(fill_tensor(32) + "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%v0}, [%r6+32];\n", nothing(), nothing())


def test_a_warp_may_access_its_own_lanes_only():
    with pytest.raises(errors.TensorMemoryError, match="may access lanes .*the address names lane 0"):
        launch(fill_tensor(32) + "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%v0}, [%r4];\n", nothing(), nothing())


def test_tensor_memory_has_512_columns():
    with pytest.raises(errors.OutOfBounds, match="512 columns"):
        launch("tcgen05.ld.sync.aligned.32x32b.x2.b32 {%v0, %v1}, [%r6+511];\n", nothing(), nothing())


def test_the_address_must_be_the_same_in_every_lane():
    with pytest.raises(errors.InvalidOperand, match="same in every lane"):
        body = "and.b32 %r7, %r0, 31;\nadd.s32 %r6, %r6, %r7;\n"
        launch(body + "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%v0}, [%r6];\n", nothing(), nothing())


@pytest.mark.parametrize(
    "opcode", ["tcgen05.ld.sync.aligned.16x512b.x1.b32", "tcgen05.ld.sync.aligned.16x256b.x64.b32",
               "tcgen05.ld.red.sync.aligned.32x32b.x2.min.b32", "tcgen05.shift.cta_group::1.down"]
)  # fmt: skip
def test_forms_that_do_not_exist_or_are_not_modelled_are_unknown_at_load(opcode):
    with pytest.raises(errors.UnknownOpcode, match=re.escape(opcode)):
        launch(f"{opcode} {{%v0}}, [%r6];\n", nothing(), nothing())


# ---------------------------------------------------------------------------------------------------------------------
# Allocation


def run_allocation(body: str, *, order: str = "eager", **options):
    """`body` on one warp, shared memory at %r3."""
    ptx = module("sm_100a", "mov.u32 %r3, smem;\n" + body, parameters=PARAMETERS, registers=REGISTERS, shared=SHARED)
    out = torch.zeros(64, dtype=torch.int32)
    with emulator.device("sm_100a", order=order, seed=3, sms=2, threads=1, max_warp_instructions=100_000) as device:
        run_ptx(device, ptx, [nothing(), out], shared_bytes=4096, **{"block": 32, **options})
    return out


ALLOCATE = "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r3+{at}], {columns};\n"
FREE = "tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r{register}, {columns};\n"


def test_allocations_do_not_overlap_and_freed_columns_come_back():
    body = "ld.param.b64 %d1, [out];\n"
    for at, columns in ((0, 64), (4, 128), (8, 32)):
        body += ALLOCATE.format(at=at, columns=columns) + f"ld.shared.b32 %r{10 + at}, [%r3+{at}];\n"
    body += FREE.format(register=10, columns=64)
    body += ALLOCATE.format(at=12, columns=32) + "ld.shared.b32 %r22, [%r3+12];\n"
    body += "".join(f"st.global.b32 [%d1+{at}], %r{10 + at};\n" for at in (0, 4, 8, 12))
    body += FREE.format(register=14, columns=128) + FREE.format(register=18, columns=32)
    body += FREE.format(register=22, columns=32)
    first, second, third, fourth = run_allocation(body)[:4].tolist()
    taken = sorted([(first, 64), (second, 128), (third, 32)])
    assert all(begin + size <= following for (begin, size), (following, _) in zip(taken, taken[1:], strict=False))
    assert first <= fourth < first + 64


@pytest.mark.parametrize("columns", [0, 16, 48, 1024])
def test_a_number_of_columns_that_cannot_be_allocated(columns):
    with pytest.raises(errors.TensorMemoryError, match="power of two"):
        run_allocation(ALLOCATE.format(at=0, columns=columns))


def test_leaked_tensor_memory():
    with pytest.raises(errors.TensorMemoryError, match="ends with 64 tensor memory columns"):
        run_allocation(ALLOCATE.format(at=0, columns=64))


def test_freeing_what_was_not_allocated():
    body = ALLOCATE.format(at=0, columns=64) + "ld.shared.b32 %r10, [%r3];\n" + FREE.format(register=10, columns=32)
    with pytest.raises(errors.TensorMemoryError, match="no allocation of 32 columns"):
        run_allocation(body)


def test_allocating_after_relinquishing_the_permit():
    body = "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;\n" + ALLOCATE.format(at=0, columns=64)
    with pytest.raises(errors.TensorMemoryError, match="relinquish"):
        run_allocation(body)


def test_using_columns_that_are_not_allocated():
    body = ALLOCATE.format(at=0, columns=64) + "ld.shared.b32 %r10, [%r3];\nmov.b32 %v0, 1;\n"
    body += "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r10+64], {%v0};\n"
    with pytest.raises(errors.TensorMemoryError, match="has not allocated"):
        run_allocation(body)


def test_allocation_waits_for_columns_and_deadlocks_if_none_ever_come():
    body = ALLOCATE.format(at=0, columns=512) + ALLOCATE.format(at=4, columns=32)
    with pytest.raises(errors.Deadlock, match="tcgen05.alloc"):
        run_allocation(body)


def test_a_waiting_allocation_goes_on_when_another_warp_frees():
    body = (
        "mov.u32 %r0, %tid.x;\nsetp.ge.u32 %p1, %r0, 32;\n@%p1 bra SECOND;\n"
        + ALLOCATE.format(at=0, columns=512) + "bar.sync 0;\nld.shared.b32 %r10, [%r3];\n"
        + FREE.format(register=10, columns=512) + "bar.sync 1;\nbra DONE;\nSECOND:\nbar.sync 0;\n"
        + ALLOCATE.format(at=4, columns=256) + "ld.shared.b32 %r10, [%r3+4];\n"
        + FREE.format(register=10, columns=256) + "bar.sync 1;\nDONE:\n"
    )  # fmt: skip
    for order in ORDERS:
        run_allocation(body, order=order, block=64)


def test_freeing_columns_that_another_warp_still_reads_is_a_race():
    body = (
        "mov.u32 %r0, %tid.x;\nsetp.ge.u32 %p1, %r0, 32;\n@%p1 bra SECOND;\n"
        + ALLOCATE.format(at=0, columns=32) + "bar.sync 0;\nbar.sync 1;\nld.shared.b32 %r10, [%r3];\n"
        + FREE.format(register=10, columns=32) + "bra DONE;\nSECOND:\nbar.sync 0;\nld.shared.b32 %r10, [%r3];\n"
        + "add.s32 %r10, %r10, 2097152;\nmov.b32 %v0, 1;\n"
        + "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r10], {%v0};\nWAIT\nbar.sync 1;\nDONE:\n"
    )  # fmt: skip
    run_allocation(body.replace("WAIT", "tcgen05.wait::st.sync.aligned;"), block=64)
    with pytest.raises(errors.RaceDetected, match="tcgen05.st"):
        run_allocation(body.replace("WAIT", ""), block=64)


# ---------------------------------------------------------------------------------------------------------------------
# Products


@dataclass(frozen=True)
class Kind:
    name: str
    dtype: torch.dtype
    code: int  # of A and B in the instruction descriptor
    bytes: int
    accumulator: int = 1

    @property
    def k(self) -> int:
        return 32 // self.bytes


KINDS = {
    "bf16": Kind("f16", torch.bfloat16, 1, 2),
    "f16": Kind("f16", torch.float16, 0, 2),
    "f16 into f16": Kind("f16", torch.float16, 0, 2, accumulator=0),
    "tf32": Kind("tf32", torch.float32, 2, 4),
    "e4m3": Kind("f8f6f4", torch.float8_e4m3fn, 0, 1),
    "e5m2": Kind("f8f6f4", torch.float8_e5m2, 1, 1),
    "s8": Kind("i8", torch.int8, 1, 1, accumulator=2),
    "u8": Kind("i8", torch.uint8, 0, 1, accumulator=2),
}


def instruction_descriptor(kind: Kind, m: int, n: int, a_mn_major=False, b_mn_major=False, negate_a=False) -> int:
    """PTX ISA, instruction descriptor of .kind::tf32, f16, f8f6f4 and i8."""
    return (
        kind.accumulator << 4 | kind.code << 7 | kind.code << 10 | negate_a << 13 | a_mn_major << 15
        | b_mn_major << 16 | n >> 3 << 17 | m >> 4 << 24
    )  # fmt: skip


def matrix(kind: Kind, rows: int, seed: int, k: int | None = None) -> torch.Tensor:
    """rows x k small integers, exact in every format."""
    generator = torch.Generator().manual_seed(seed)
    low = 0 if kind.dtype == torch.uint8 else -4
    return torch.randint(low, 5, (rows, k or kind.k), generator=generator).to(torch.float32).to(kind.dtype)


@dataclass(frozen=True)
class Swizzle:
    """code: bits 61..63 of the descriptor. width: bytes of a swizzled row. rows: of a group.

    Bits `exchanged` of an address are XORed with those `shift` above them.
    """

    code: int
    width: int
    exchanged: int
    shift: int = 3
    rows: int = 8


SWIZZLES = {
    "none": Swizzle(0, 16, 0), "32": Swizzle(6, 32, 0x10), "64": Swizzle(4, 64, 0x30), "128": Swizzle(2, 128, 0x70)
}  # fmt: skip
SWIZZLE_OF_32_BYTE_ATOMS = Swizzle(1, 128, 0x60, shift=2, rows=4)  # MN-major 32-bit elements


@dataclass(frozen=True)
class Placed:
    """A matrix in shared memory: its bytes by offset from the start, and its descriptor."""

    data: dict[int, bytes]
    descriptor: int
    size: int


def place(values: torch.Tensor, swizzle: str, mn_major: bool, start: int) -> Placed:
    """A rows x k matrix in the canonical layout (PTX ISA, "Canonical layouts"), `start` bytes into the image."""
    pattern = SWIZZLES.get(swizzle, SWIZZLE_OF_32_BYTE_ATOMS)
    width = pattern.width
    size = values.element_size()
    rows, k = values.shape
    raw = values.contiguous().view(torch.uint8).reshape(rows, k, size)
    base = SHARED_BASE + IMAGE + start
    if not mn_major:
        # rows of `width` bytes, eight of them a group; without swizzle a 16-byte column is a matrix of its own
        row_bytes = 16 if swizzle == "none" else width
        leading, stride = (8 * 16 * (rows // 8), 8 * 16) if swizzle == "none" else (16, 8 * row_bytes)

        def offset(row: int, byte: int) -> int:
            column, within = (byte // 16, byte % 16) if swizzle == "none" else (0, byte)
            return row // 8 * stride + row % 8 * row_bytes + column * leading + within

        items = ((row, byte, raw[row].flatten()[byte]) for row in range(rows) for byte in range(k * size))
        total = leading * (k * size // 16) if swizzle == "none" else rows * row_bytes
    else:
        per_row = width // size  # elements of a row, which runs along rows of the matrix; eight (four) k are a group
        atoms, groups = -(-rows // per_row), k // pattern.rows
        group_bytes = pattern.rows * width
        atom_stride, group_stride = groups * group_bytes, group_bytes
        leading, stride = (group_stride, atom_stride) if swizzle == "none" else (atom_stride, group_stride)

        def offset(row: int, byte: int) -> int:
            column, within = byte // size, byte % size
            atom, element = row // per_row, row % per_row
            return (
                atom * atom_stride + column // pattern.rows * group_stride + column % pattern.rows * width
                + element * size + within
            )

        items = ((row, byte, raw[row].flatten()[byte]) for row in range(rows) for byte in range(k * size))
        total = atoms * atom_stride
    data = {}
    for row, byte, value in items:
        address = base + offset(row, byte)
        data[(address ^ (address >> pattern.shift & pattern.exchanged)) - base + start] = int(value)
    descriptor = base >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | 1 << 46 | pattern.code << 61
    return Placed(data, descriptor, total)


def image_of(*placed: Placed) -> torch.Tensor:
    size = max(max(p.data) for p in placed) // 1024 * 1024 + 1024
    image = torch.zeros(size, dtype=torch.uint8)
    for p in placed:
        image[list(p.data)] = torch.tensor(list(p.data.values()), dtype=torch.uint8)
    return image


def multiply_body(kind: Kind, a: str, b: int, descriptor: int, *, d="%r4", enable="0", group=1, extra="") -> str:
    return (
        f"mov.b64 %d4, {b};\nmov.b32 %r7, {descriptor};\n"
        f"@%p2 tcgen05.mma.cta_group::{group}.kind::{kind.name}{extra} [{d}], {a}, %d4, %r7, {enable};\n"
    )


def shared_a(descriptor: int) -> str:
    return f"mov.b64 %d5, {descriptor};\n"


def lanes_of(m: int) -> torch.Tensor:
    """Tensor memory lane of each row of a one-CTA accumulator."""
    row = torch.arange(m)
    return row if m == 128 else row % 16 + row // 16 * 32


def accumulated(kind: Kind, out: torch.Tensor) -> torch.Tensor:
    """Words of the accumulator as fp32."""
    if kind.accumulator == 1:
        return out.view(torch.float32)
    if kind.accumulator == 2:
        return out.float()
    return out.to(torch.int16).view(torch.float16).float()


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.float() @ b.float().T


@pytest.mark.parametrize("m,n", [(128, 64), (64, 24), (64, 8), (128, 16)])
@pytest.mark.parametrize("name", KINDS)
def test_product_of_every_kind(name, m, n):
    kind = KINDS[name]
    a, b = matrix(kind, m, 1), matrix(kind, n, 2)
    placed_a = place(a, "128", False, 0)
    placed_b = place(b, "32", False, 32768)
    out = torch.zeros(128, n, dtype=torch.int32)
    image = image_of(placed_a, placed_b)
    body = shared_a(placed_a.descriptor) + multiply_body(
        kind, "%d5", placed_b.descriptor, instruction_descriptor(kind, m, n)
    )
    record = launch(
        fill_tensor(64, "-1") + copy_image(image.numel()) + body + COMMIT + WAIT + read_tensor(n), image, out
    )
    expected = product(a, b)
    assert torch.equal(accumulated(kind, out)[lanes_of(m)], expected)
    untouched = sorted(set(range(128)) - set(lanes_of(m).tolist()))
    assert (out[untouched] == -1).all()
    assert record.counts.macs == {f"tcgen05.{kind.name}": m * n * kind.k}
    assert record.counts.mma_instructions["tcgen05.mma"] == 1


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("b_mn_major", [False, True], ids=["b_k", "b_mn"])
@pytest.mark.parametrize("a_mn_major", [False, True], ids=["a_k", "a_mn"])
@pytest.mark.parametrize("swizzle", SWIZZLES)
def test_every_layout_of_shared_operands(swizzle, a_mn_major, b_mn_major, order):
    kind, m, n = KINDS["bf16"], 128, 64
    a, b = matrix(kind, m, 3), matrix(kind, n, 4)
    placed_a = place(a, swizzle, a_mn_major, 0)
    placed_b = place(b, swizzle, b_mn_major, 32768)
    image = image_of(placed_a, placed_b)
    out = torch.zeros(128, n, dtype=torch.int32)
    body = shared_a(placed_a.descriptor) + multiply_body(
        kind, "%d5", placed_b.descriptor, instruction_descriptor(kind, m, n, a_mn_major, b_mn_major)
    )
    launch(copy_image(image.numel()) + body + COMMIT + WAIT + read_tensor(n), image, out, order=order)
    assert torch.equal(out.view(torch.float32), product(a, b))


@pytest.mark.parametrize("name", ["bf16", "f16", "tf32", "e4m3"])
@pytest.mark.parametrize("m", [64, 128])
def test_a_from_tensor_memory(name, m):
    """A word of tensor memory holds the neighbouring elements of a row, the first in its low bits."""
    kind, n = KINDS[name], 32
    a, b = matrix(kind, m, 5), matrix(kind, n, 6)
    placed_b = place(b, "32", False, 8192)
    words = torch.zeros(128, 8, dtype=torch.int32)
    words[lanes_of(m)] = a.view(torch.int32)
    image = image_of(placed_b)
    image[:4096] = words.view(torch.uint8).flatten()
    loads = "mul.wide.u32 %d6, %r0, 32;\nadd.s64 %d6, %d0, %d6;\n" + "".join(
        f"ld.global.b32 %v{k}, [%d6+{4 * k}];\n" for k in range(8)
    )
    store = f"tcgen05.st.sync.aligned.32x32b.x8.b32 [%r6+256], {vector(8)};\ntcgen05.wait::st.sync.aligned;\n"
    store += FENCED_BARRIER
    body = multiply_body(kind, "[%r4+256]", placed_b.descriptor, instruction_descriptor(kind, m, n))
    out = torch.zeros(128, n, dtype=torch.int32)
    launch(
        fill_tensor(32, "-1") + loads + store + copy_image(image.numel()) + body + COMMIT + WAIT + read_tensor(n),
        image, out,
    )  # fmt: skip
    assert torch.equal(out.view(torch.float32)[lanes_of(m)], product(a, b))


@dataclass(frozen=True)
class Case:
    """A 128 x 32 product of one K step; the operands, and the statements that make them and wait for the result."""

    a: torch.Tensor
    b: torch.Tensor
    image: torch.Tensor
    body: str


def simple_case(kind: Kind = KINDS["bf16"], **options) -> Case:
    a, b = matrix(kind, 128, 7), matrix(kind, 32, 8)
    placed_a, placed_b = place(a, "32", False, 0), place(b, "32", False, 8192)
    descriptor = options.pop("descriptor", None)
    if descriptor is None:
        descriptor = instruction_descriptor(kind, 128, 32, negate_a=options.pop("negate_a", False))
    body = shared_a(placed_a.descriptor) + multiply_body(kind, "%d5", placed_b.descriptor, descriptor, **options)
    image = image_of(placed_a, placed_b)
    return Case(a, b, image, body)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["bf16", "f16 into f16", "s8"])
def test_accumulation_and_its_predicate(name, order):
    kind = KINDS[name]
    case = simple_case(kind=kind)
    again = simple_case(kind=kind, enable="%p5").body
    body = "setp.lt.u32 %p5, %r0, 1000;\n" + case.body + again + again + COMMIT + WAIT + read_tensor(32)
    out = torch.zeros(128, 32, dtype=torch.int32)
    launch(copy_image(case.image.numel()) + body, case.image, out, order=order)
    assert torch.equal(accumulated(kind, out), 3 * product(case.a, case.b))


def test_scale_input_d_and_negation():
    case = simple_case()
    second = simple_case(enable="1, 3", negate_a=True).body
    out = torch.zeros(128, 32, dtype=torch.int32)
    launch(copy_image(case.image.numel()) + case.body + second + COMMIT + WAIT + read_tensor(32), case.image, out)
    expected = product(case.a, case.b)
    assert torch.equal(out.view(torch.float32), expected / 8 - expected)


def test_negating_both_operands_negates_nothing():
    case = simple_case(descriptor=instruction_descriptor(KINDS["bf16"], 128, 32) | 3 << 13)
    out = torch.zeros(128, 32, dtype=torch.int32)
    launch(copy_image(case.image.numel()) + case.body + COMMIT + WAIT + read_tensor(32), case.image, out)
    assert torch.equal(out.view(torch.float32), product(case.a, case.b))


@pytest.mark.parametrize("saturate", [False, True], ids=["wraps", "saturates"])
def test_integer_overflow(saturate):
    kind = KINDS["s8"]
    a = torch.full((128, 32), 100, dtype=torch.int8)
    b = torch.full((32, 32), 100, dtype=torch.int8)
    placed_a, placed_b = place(a, "32", False, 0), place(b, "32", False, 8192)
    image = image_of(placed_a, placed_b)
    start = 2**31 - 1000
    fill = fill_tensor(32, "-1").replace("-1;", f"{start};")
    descriptor = instruction_descriptor(kind, 128, 32) | saturate << 3
    body = shared_a(placed_a.descriptor) + multiply_body(kind, "%d5", placed_b.descriptor, descriptor, enable="1")
    out = torch.zeros(128, 32, dtype=torch.int32)
    launch(fill + copy_image(image.numel()) + body + COMMIT + WAIT + read_tensor(32), image, out)
    total = start + 32 * 100 * 100
    assert (out == (2**31 - 1 if saturate else total - 2**32)).all()


def test_mn_major_operands_of_32_bits():
    swizzle = "128 of 32-byte atoms"
    kind, m, n = KINDS["tf32"], 128, 64
    a, b = matrix(kind, m, 11), matrix(kind, n, 12)
    placed_a, placed_b = place(a, swizzle, True, 0), place(b, swizzle, True, 8192)
    image = image_of(placed_a, placed_b)
    descriptor = instruction_descriptor(kind, m, n, a_mn_major=True, b_mn_major=True)
    body = shared_a(placed_a.descriptor) + multiply_body(kind, "%d5", placed_b.descriptor, descriptor)
    out = torch.zeros(128, n, dtype=torch.int32)
    launch(copy_image(image.numel()) + body + COMMIT + WAIT + read_tensor(n), image, out)
    assert torch.equal(out.view(torch.float32), product(a, b))


def a_in_tensor(case: Case) -> str:
    return case.body.replace("%d5, %d4", "[%r4+64], %d4")


def test_a_in_tensor_memory_cannot_be_transposed():
    case = simple_case(descriptor=instruction_descriptor(KINDS["bf16"], 128, 32, a_mn_major=True))
    with pytest.raises(errors.InvalidOperand, match="cannot be transposed"):
        launch(copy_image(case.image.numel()) + a_in_tensor(case), case.image, nothing())


def test_a_in_tensor_memory_must_have_been_written():
    case = simple_case()
    with pytest.raises(errors.Uninitialised, match="tensor memory"):
        launch(copy_image(case.image.numel()) + a_in_tensor(case), case.image, nothing())


def test_d_and_a_start_at_a_lane_that_the_layout_allows():
    case = simple_case()
    for body, what in (
        (case.body.replace("[%r4]", "[%r4+1048576]"), "D starts at tensor memory lane 16"),
        (a_in_tensor(case).replace("[%r4+64]", "[%r4+2097152]"), "A starts at tensor memory lane 32"),
    ):
        with pytest.raises(errors.InvalidOperand, match=what):
            launch(copy_image(case.image.numel()) + body, case.image, nothing())


def test_d_and_a_must_be_allocated():
    case = simple_case()
    for body, what in (
        (case.body.replace("[%r4]", "[%r4+496]"), errors.OutOfBounds),
        (a_in_tensor(case).replace("[%r4+64]", "[%r4+508]"), errors.OutOfBounds),
    ):
        with pytest.raises(what, match="512 columns"):
            launch(copy_image(case.image.numel()) + body, case.image, nothing())


def test_d_may_use_allocated_columns_only():
    case = simple_case()
    copy = copy_image(case.image.numel())
    with pytest.raises(errors.TensorMemoryError, match="columns 48..79"):
        launch(copy + case.body.replace("[%r4]", "[%r4+48]"), case.image, nothing(), columns=64)
    with pytest.raises(errors.TensorMemoryError, match="columns 64..71"):
        launch(copy_image(case.image.numel()) + a_in_tensor(case), case.image, nothing(), columns=64)


def test_overwriting_a_in_tensor_memory_that_is_still_read_is_a_race():
    case = simple_case()
    body = fill_tensor(96) + copy_image(case.image.numel()) + a_in_tensor(case) + COMMIT + "WAIT" + (
        "bar.sync 0;\nmov.b32 %v0, 1;\ntcgen05.st.sync.aligned.32x32b.x1.b32 [%r6+64], {%v0};\n"
        "tcgen05.wait::st.sync.aligned;\n"
    )  # fmt: skip
    launch(body.replace("WAIT", WAIT), case.image, nothing())
    with pytest.raises(errors.RaceDetected, match="read by warp 0"):
        launch(body.replace("WAIT", ""), case.image, nothing())


def test_masks_of_zero_and_collector_hints_are_accepted():
    case = simple_case(enable="{%r30, %r30, %r30, %r30}, 0", extra=".collector::a::discard")
    out = torch.zeros(128, 32, dtype=torch.int32)
    body = "mov.b32 %r30, 0;\n" + case.body
    launch(copy_image(case.image.numel()) + body + COMMIT + WAIT + read_tensor(32), case.image, out)
    assert torch.equal(out.view(torch.float32), product(case.a, case.b))


def test_disabled_output_lanes_keep_what_they_hold():
    case = simple_case(enable="{%r30, %r31, %r30, %r31}, 0")
    out = torch.zeros(128, 32, dtype=torch.int32)
    masks = "mov.b32 %r30, 0;\nmov.b32 %r31, -1;\n"
    body = fill_tensor(32) + copy_image(case.image.numel()) + masks + case.body
    launch(body + COMMIT + WAIT + read_tensor(32), case.image, out)
    expected = product(case.a, case.b)
    for lanes in (slice(0, 32), slice(64, 96)):
        assert torch.equal(out.view(torch.float32)[lanes], expected[lanes])
    filled = 512 * torch.arange(128)[:, None] + torch.arange(32)
    for lanes in (slice(32, 64), slice(96, 128)):
        assert torch.equal(out[lanes], filled[lanes].int())


def test_disabled_output_lanes_of_part_of_a_warp_are_refused():
    case = simple_case(enable="{%r30, %r30, %r30, %r30}, 0")
    with pytest.raises(errors.InvalidOperand, match="disable-output-lane"):
        launch(copy_image(case.image.numel()) + "mov.b32 %r30, 4;\n" + case.body, case.image, nothing())


REFUSED_DESCRIPTORS = {
    "N=24 does not exist": instruction_descriptor(KINDS["bf16"], 128, 24),
    "M=256": instruction_descriptor(KINDS["bf16"], 256, 32),
    "sparse": instruction_descriptor(KINDS["bf16"], 128, 32) | 4,
    "accumulator type 2": instruction_descriptor(KINDS["bf16"], 128, 32) & ~0x30 | 0x20,
    "operand type 2": instruction_descriptor(KINDS["tf32"], 128, 32),
    "saturation": instruction_descriptor(KINDS["bf16"], 128, 32) | 8,
}


@pytest.mark.parametrize("message", REFUSED_DESCRIPTORS)
def test_instruction_descriptors_that_mean_nothing(message):
    case = simple_case(descriptor=REFUSED_DESCRIPTORS[message])
    with pytest.raises(errors.InvalidOperand, match=message):
        launch(copy_image(case.image.numel()) + case.body, case.image, nothing())


def test_six_bit_formats_are_refused_by_name():
    kind = KINDS["e4m3"]
    case = simple_case(descriptor=instruction_descriptor(kind, 128, 32) | 3 << 7)
    body = case.body.replace("kind::f16", "kind::f8f6f4")
    with pytest.raises(errors.InvalidOperand, match="e2m3; supported are e4m3 and e5m2"):
        launch(copy_image(case.image.numel()) + body, case.image, nothing())


FENCES = ("tcgen05.fence::before_thread_sync;", "tcgen05.fence::after_thread_sync;")


def accumulate_onto_stored_words(case: Case) -> str:
    """Every warp stores; one thread multiplies onto it; every warp loads the result."""
    return fill_tensor(32) + copy_image(case.image.numel()) + case.body + COMMIT + WAIT + read_tensor(32)


@pytest.mark.parametrize("dropped", FENCES)
def test_a_kernel_that_uses_tensor_fences_is_held_to_them(dropped):
    case = simple_case(enable="1")
    body = accumulate_onto_stored_words(case)
    out = torch.zeros(128, 32, dtype=torch.int32)
    launch(body, case.image, out)
    kept = f"{dropped}\n"  # the kernel still contains it, at its end
    with pytest.raises(errors.RaceDetected, match=r"tcgen05\.fence"):
        launch(body.replace(dropped, "", 1) + kept, case.image, out)


@pytest.mark.parametrize("dropped", [FENCES, FENCES[:1], FENCES[1:]], ids=["both", "before", "after"])
def test_a_kernel_without_tensor_fences_is_not_held_to_them(dropped):
    case = simple_case(enable="1")
    body = accumulate_onto_stored_words(case)
    for fence in dropped:
        body = body.replace(fence, "")
    launch(body, case.image, torch.zeros(128, 32, dtype=torch.int32))


def test_the_fence_after_a_commit_is_required_of_a_kernel_that_uses_fences():
    case = simple_case(enable="1")
    body = accumulate_onto_stored_words(case).replace(WAIT, WAIT.replace(FENCES[1], "")) + FENCES[1] + "\n"
    with pytest.raises(errors.RaceDetected, match="tcgen05.mma"):
        launch(body, case.image, torch.zeros(128, 32, dtype=torch.int32))


def test_operands_must_have_been_written():
    case = simple_case()
    with pytest.raises(errors.Uninitialised, match="shared memory"):
        launch(copy_image(4096) + case.body, case.image, nothing())


def test_operands_need_a_proxy_fence():
    case = simple_case()
    body = copy_image(case.image.numel()).replace("fence.proxy.async.shared::cta;", "")
    with pytest.raises(errors.MissingProxyFence):
        launch(body + case.body, case.image, nothing())


def test_operands_must_lie_in_shared_memory():
    case = simple_case()
    with pytest.raises(errors.OutOfBounds, match="B at shared memory offsets 10240..11264"):
        launch(copy_image(4096) + case.body, case.image, nothing(), shared_bytes=IMAGE + 4096)
    swapped = case.body.replace("%d5, %d4", "%d4, %d5")
    with pytest.raises(errors.OutOfBounds, match="A at shared memory offsets"):
        launch(copy_image(4096) + swapped, case.image, nothing(), shared_bytes=IMAGE + 6144)


def test_accumulating_onto_tensor_memory_that_nothing_wrote():
    case = simple_case(enable="1")
    with pytest.raises(errors.Uninitialised, match="tensor memory"):
        launch(copy_image(case.image.numel()) + case.body, case.image, nothing())


@pytest.mark.parametrize("order", ORDERS)
def test_reading_a_product_that_nothing_waited_for_is_a_race(order):
    case = simple_case()
    body = copy_image(case.image.numel()) + case.body + COMMIT + "bar.sync 0;\n" + read_tensor(32)
    with pytest.raises(errors.RaceDetected, match="tcgen05.mma"):
        launch(body, case.image, torch.zeros(128, 32, dtype=torch.int32), order=order)


def test_overwriting_an_operand_that_is_still_read_is_a_race():
    case = simple_case()
    late = "mov.b32 %r40, 0;\nst.shared.b32 [%r3+1024], %r40;\n"
    body = copy_image(case.image.numel()) + case.body + COMMIT
    launch(body + WAIT + "@%p2 " + late.split("\n")[0] + "\n@%p2 " + late.split("\n")[1] + "\n", case.image, nothing())
    with pytest.raises(errors.RaceDetected, match="tcgen05.mma"):
        launch(body + "bar.sync 0;\n" + late, case.image, nothing())


def test_an_operation_after_the_commit_is_not_covered_by_it():
    case = simple_case()
    body = copy_image(case.image.numel()) + case.body + COMMIT + simple_case(enable="1").body + WAIT + read_tensor(32)
    with pytest.raises(errors.RaceDetected, match="tcgen05.mma"):
        launch(body, case.image, torch.zeros(128, 32, dtype=torch.int32))


@pytest.mark.parametrize("order", ORDERS)
def test_a_commit_tells_what_the_product_was_ordered_behind(order):
    """Warp 1 writes A and tells warp 0. Who waits for the product may overwrite A: it knows warp 1's write."""
    case = simple_case()
    body = copy_image(case.image.numel()) + """
      setp.eq.u32 %p7, %r0, 32;
      @%p7 mbarrier.init.shared.b64 [%r3+8], 1;
      @%p7 mbarrier.init.shared.b64 [%r3+24], 1;
      bar.sync 0;
      @!%p7 bra WRITTEN;
      mov.b32 %r40, 0;
      st.shared.b32 [%r3+1024], %r40;
      fence.proxy.async.shared::cta;
      mbarrier.arrive.shared.b64 _, [%r3+8];
    WRITTEN:
      @%p1 bra MULTIPLIED;
    WAITING_FOR_A:
      mbarrier.try_wait.parity.shared.b64 %p3, [%r3+8], 0;
      @!%p3 bra WAITING_FOR_A;
    MULTIPLIED:
    """ + case.body + COMMIT + """
      setp.ne.u32 %p8, %r0, 64;
      @%p8 bra OVERWRITTEN;
    WAITING_FOR_PRODUCT:
      mbarrier.try_wait.parity.shared.b64 %p3, [%r3], 0;
      @!%p3 bra WAITING_FOR_PRODUCT;
      mov.b32 %r40, 1;
      st.shared.b32 [%r3+1024], %r40;
    OVERWRITTEN:
    """  # fmt: skip
    launch(body + WAIT, case.image, nothing(), order=order)


def test_commit_needs_the_barriers_initialisation_made_visible():
    with pytest.raises(errors.MissingProxyFence, match="mbarrier.init"):
        launch(COMMIT, nothing(), nothing(), prologue=PROLOGUE.replace("@%p0 fence.mbarrier_init.release.cluster;", ""))


def test_commit_to_a_barrier_that_is_not_initialised():
    commit = "@%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r3+24];\n"
    with pytest.raises(errors.BarrierError):
        launch(commit, nothing(), nothing())


def test_block_scaled_and_weight_stationary_products_are_unknown_at_load():
    for opcode in ("tcgen05.mma.ws.cta_group::1.kind::f16", "tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale"):
        with pytest.raises(errors.UnknownOpcode, match=re.escape(opcode)):
            launch(f"@%p2 {opcode} [%r4], %d4, %d4, %r7, 0;\n", nothing(), nothing())


def test_every_instruction_names_the_same_cta_group():
    case = simple_case(group=2)
    with pytest.raises(errors.InvalidOperand, match="the same .cta_group"):
        launch(copy_image(case.image.numel()) + case.body, case.image, nothing(), cluster=2, grid=2)


# ---------------------------------------------------------------------------------------------------------------------
# tcgen05.cp


COPIES = {  # shape: rows of the source, 16-byte chunks of a row, and the source row of each lane
    "128x256b": (128, 2, lambda lane: lane),
    "128x128b": (128, 1, lambda lane: lane),
    "64x128b.warpx2::02_13": (64, 1, lambda lane: lane % 64),
    "64x128b.warpx2::01_23": (64, 1, lambda lane: lane // 64 * 32 + lane % 32),
    "32x128b.warpx4": (32, 1, lambda lane: lane % 32),
    "4x256b": (4, 2, lambda lane: lane // 32 if lane % 32 == 0 else None),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", COPIES)
def test_copies_from_shared_memory(shape, order):
    rows, chunks, row_of = COPIES[shape]
    words = torch.randint(0, 1 << 30, (max(rows, 8), 4 * chunks), dtype=torch.int32)
    placed = place(words, "none", False, 0)
    image = image_of(placed)
    body = f"mov.b64 %d4, {placed.descriptor};\n@%p2 tcgen05.cp.cta_group::1.{shape} [%r4+8], %d4;\n"
    out = torch.zeros(128, 32, dtype=torch.int32)
    launch(
        fill_tensor(32, "-1") + copy_image(image.numel()) + body + COMMIT + WAIT + read_tensor(32), image, out,
        order=order,
    )  # fmt: skip
    expected = torch.full((128, 32), -1, dtype=torch.int32)
    for lane in range(128):
        if row_of(lane) is not None:
            expected[lane, 8 : 8 + 4 * chunks] = words[row_of(lane)]
    assert torch.equal(out, expected)


COPY = "mov.b64 %d4, {descriptor};\n@%p2 tcgen05.cp.cta_group::1.128x128b [%r4], %d4;\n"


def test_copies_read_what_has_been_written():
    placed = place(torch.ones(128, 4, dtype=torch.int32), "none", False, 0)
    with pytest.raises(errors.Uninitialised, match="shared memory"):
        launch(COPY.format(descriptor=placed.descriptor), nothing(), nothing())


def test_copies_stay_inside_shared_memory():
    placed = place(torch.ones(128, 4, dtype=torch.int32), "none", False, 0)
    with pytest.raises(errors.OutOfBounds):
        launch(COPY.format(descriptor=placed.descriptor), nothing(), nothing(), shared_bytes=IMAGE + 1024)


def test_reading_a_copy_that_nothing_waited_for_is_a_race():
    placed = place(torch.ones(128, 4, dtype=torch.int32), "none", False, 0)
    image = image_of(placed)
    body = copy_image(image.numel()) + COPY.format(descriptor=placed.descriptor) + COMMIT + "bar.sync 0;\n"
    with pytest.raises(errors.RaceDetected, match="tcgen05.cp"):
        launch(body + read_tensor(4), image, torch.zeros(128, 4, dtype=torch.int32))


# ---------------------------------------------------------------------------------------------------------------------
# CTA pairs

# Both CTAs write their halves; the even one multiplies for both, and the commit arrives in both.
PAIR = """
  mov.u32 %r30, %cluster_ctarank;
  setp.ne.u32 %p6, %r30, 0;
  barrier.cluster.arrive;
  barrier.cluster.wait;
  mov.b16 %h0, 3;
  @%p6 mov.pred %p2, 0;
"""
PAIR_COMMIT = (
    "@%p2 tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [%r3], %h0;\n"
)
PAIR_END = "barrier.cluster.arrive;\nbarrier.cluster.wait;\n"
# each CTA has its own image and its own part of out
PAIR_ADDRESSES = """
  mov.u32 %r31, %cluster_ctarank;
  mul.wide.u32 %d7, %r31, {image};
  add.s64 %d0, %d0, %d7;
  mul.wide.u32 %d7, %r31, {out};
  add.s64 %d1, %d1, %d7;
"""


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("m,n", [(256, 64), (128, 64), (256, 32)])
def test_product_of_a_cta_pair(m, n, order):
    """A is split by rows, B by columns; M = 128 keeps the upper half of N in the upper lanes."""
    kind = KINDS["bf16"]
    a, b = matrix(kind, m, 9), matrix(kind, n, 10)
    images = []
    for rank in range(2):
        placed_a = place(a[rank * m // 2 : (rank + 1) * m // 2], "32", False, 0)
        placed_b = place(b[rank * n // 2 : (rank + 1) * n // 2], "32", False, 8192)
        images.append(image_of(placed_a, placed_b))
    image = torch.stack(images)
    columns = n if m == 256 else n // 2
    out = torch.zeros(2, 128, columns, dtype=torch.int32)
    body = (
        PAIR_ADDRESSES.format(image=image.shape[1], out=128 * columns * 4)
        + copy_image(image.shape[1])
        + PAIR
        + shared_a(placed_a.descriptor)
        + multiply_body(kind, "%d5", placed_b.descriptor, instruction_descriptor(kind, m, n), group=2)
        + PAIR_COMMIT + WAIT + read_tensor(columns) + PAIR_END
    )  # fmt: skip
    launch(body, image, out, cta_group=2, cluster=2, grid=2, order=order)
    expected = product(a, b)
    values = out.view(torch.float32)
    if m == 256:
        assert torch.equal(values.reshape(256, n), expected)
    else:
        for rank in range(2):
            rows = expected[rank * 64 : rank * 64 + 64]
            assert torch.equal(values[rank, :64], rows[:, : n // 2])
            assert torch.equal(values[rank, 64:], rows[:, n // 2 :])


def test_both_ctas_of_a_pair_must_have_written_their_operands():
    case = simple_case(group=2, descriptor=instruction_descriptor(KINDS["bf16"], 256, 64))
    skip = "mov.u32 %r30, %cluster_ctarank;\nsetp.ne.u32 %p6, %r30, 0;\n@%p6 mov.b32 %r0, 100000;\n"
    copy = copy_image(case.image.numel())
    body = skip + copy + "mov.u32 %r0, %tid.x;\n" + PAIR + case.body
    with pytest.raises(errors.Uninitialised, match="shared memory at 0x1000800"):
        launch(body, case.image, nothing(), cta_group=2, cluster=2, grid=2)


@pytest.mark.parametrize("mask", [0, 4])
def test_a_commit_reaches_ctas_of_the_cluster_only(mask):
    with pytest.raises(errors.InvalidOperand, match=f"multicast mask {mask} for a cluster of 2"):
        body = PAIR.replace("%h0, 3", f"%h0, {mask}") + PAIR_COMMIT
        launch(body, nothing(), nothing(), cta_group=2, cluster=2, grid=2)


def test_allocation_in_a_pair_waits_for_the_peer():
    body = """
      mov.u32 %r30, %cluster_ctarank;
      setp.ne.u32 %p6, %r30, 0;
      @%p6 bra DONE;
      tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [%r3], 32;
    DONE:
    """
    with pytest.raises(errors.Deadlock, match="tcgen05.alloc"):
        run_allocation(body, cluster=2, grid=2)


def test_a_pair_must_exist():
    with pytest.raises(errors.InvalidOperand, match="needs a CTA pair"):
        run_allocation("tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [%r3], 32;\n")
