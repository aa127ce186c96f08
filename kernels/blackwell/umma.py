"""tcgen05.mma: instruction descriptors, and issuing the two products of attention from one thread.

S = Q K^T takes both operands from shared memory, O += P V takes P from tensor memory. One instruction
multiplies 128 x 16 by 16 x N; its operands in shared memory are 64-bit descriptors, whose low bits are the
address in units of 16 bytes, so that an offset in a tile is added to a descriptor as it stands.

In a CTA pair one thread of the leader (rank 0) issues 256 x 16 by 16 x N for both: each CTA has 128 rows of A and D,
at the same addresses, and half of B's N, and the descriptors name places in both.
"""

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cute_sparse.kernels.blackwell import tmem
from cutlass import Boolean, Int32, Int64, const_expr
from cutlass._mlir.dialects import llvm, nvvm
from cutlass.cute.nvgpu import tcgen05
from cutlass.cute.nvgpu.tcgen05.helpers import smem_descriptor_to_int
from cutlass.cutlass_dsl import T, dsl_user_op

INSTRUCTION_K = 16  # elements of a 16-bit type: 32 bytes
BOTH_CTAS = 0b11  # of a pair: one bit a CTA
LEADER = 0  # the CTA of a pair that issues the products, and whose barriers tell it what is ready
_FORMAT_BITS = {cutlass.Float16: 0, cutlass.BFloat16: 1}


def instruction_descriptor(dtype: type, m: int, n: int, b_major_mn: bool) -> int:
    """The 32-bit descriptor of a kind::f16 instruction with fp32 accumulation (PTX ISA, "Instruction descriptor").

    Bits: D format 4 (1 = fp32), A format 7, B format 10, B major 16 (1 = MN), N / 8 at 17, M / 16 at 24.
    """
    assert m in (128, 256) and n % (m // 8) == 0 and m // 8 <= n <= 256, f"no instruction of {m} x {n}"
    operand_format = _FORMAT_BITS[dtype]
    return 1 << 4 | operand_format << 7 | operand_format << 10 | int(b_major_mn) << 16 | n // 8 << 17 | m // 16 << 24


def descriptor(fragment: cute.Tensor) -> Int64:
    """The descriptor of the first instruction of a fragment (`make_fragment_A` or `_B` of a shared tile)."""
    return smem_descriptor_to_int(fragment.iterator)


class Operand(NamedTuple):
    """Descriptors of one operand in shared memory."""

    first: Any  # of the first instruction, slot 0
    steps: Any  # per instruction, what to add
    slot_stride: Any

    def of_slot(self, index: Int32) -> Int64:
        """The descriptor of the first instruction of a ring's slot."""
        return self.first + Int64(index * self.slot_stride)


def operand(fragment: cute.Tensor) -> Operand:
    """Of a fragment (MMA, MMA_MN, MMA_K, slot) with one instruction along MN."""
    layout = fragment.layout
    steps = [cute.crd2idx((0, 0, step, 0), layout) for step in range(cute.size(layout, mode=[2]))]
    return Operand(descriptor(fragment), steps, cute.crd2idx((0, 0, 0, 1), layout))


@dsl_user_op
def elected(*, loc=None, ip=None) -> Boolean:
    """Whether this is the one thread of its warp, always the same, that issues products. The whole warp calls this."""
    return Boolean(nvvm.elect_sync(loc=loc, ip=ip))


def recomputed(pointer: cute.Pointer) -> cute.Pointer:
    """The same pointer into shared memory, `opaque`."""
    address = opaque(Int32(pointer.toint()))
    return cute.make_ptr(pointer.value_type, address, pointer.memspace, assumed_align=pointer.alignment)


@dsl_user_op
def opaque(value: Int32 | Int64, *, loc=None, ip=None) -> Int32 | Int64:
    """The same value; the compiler does not see that it is, and so cannot move what is computed from it."""
    wide = value.dtype is Int64
    return value.dtype(
        llvm.inline_asm(
            T.i64() if wide else T.i32(),
            [value.ir_value(loc=loc, ip=ip)],
            "mov.b64 $0, $1;" if wide else "mov.b32 $0, $1;",
            "=l,l" if wide else "=r,r",
            has_side_effects=True,
            is_align_stack=False,
            asm_dialect=llvm.AsmDialect.AD_ATT,
            loc=loc,
            ip=ip,
        )
    )


@dsl_user_op
def issue_from_shared(
    accumulator: Int32, a: Int64, b: Int64, instruction: int, accumulate: Boolean, pair=False, *, loc=None, ip=None
) -> None:
    """D (tensor memory) = A B, or D + A B; A and B are descriptors. One thread (of the leader) calls this."""
    _mma(accumulator, a.ir_value(loc=loc, ip=ip), b, instruction, accumulate, pair, loc=loc, ip=ip)


@dsl_user_op
def issue_from_tensor(
    accumulator: Int32, a: Int32, b: Int64, instruction: int, accumulate: Boolean, pair=False, *, loc=None, ip=None
) -> None:
    """D (tensor memory) = A B, or D + A B; A is an address in tensor memory, B a descriptor. One thread calls this."""
    _mma(accumulator, tmem.pointer(a, loc=loc, ip=ip), b, instruction, accumulate, pair, loc=loc, ip=ip)


def _mma(accumulator, a, b, instruction, accumulate, pair, *, loc, ip) -> None:
    nvvm.tcgen05_mma(
        nvvm.Tcgen05MMAKind.F16,
        nvvm.CTAGroupKind.CTA_2 if pair else nvvm.CTAGroupKind.CTA_1,
        tmem.pointer(accumulator, loc=loc, ip=ip),
        a,
        b.ir_value(loc=loc, ip=ip),
        Int32(instruction).ir_value(loc=loc, ip=ip),
        Boolean(accumulate).ir_value(loc=loc, ip=ip),
        loc=loc,
        ip=ip,
    )


@cute.jit
def commit(barrier: cute.Pointer, pair: cutlass.Constexpr[bool] = False):
    """Arrive once on `barrier`, in a pair on that of both CTAs, when every product issued so far by this thread is
    complete."""
    if const_expr(pair):
        tcgen05.commit(barrier, BOTH_CTAS, tcgen05.CtaGroup.TWO)
    else:
        tcgen05.commit(barrier)
