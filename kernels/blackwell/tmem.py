"""Tensor memory: the plan of its columns, and moving rows of it between registers and columns.

Tensor memory has 128 lanes of 512 columns of 32 bits; an address is (lane << 16) | column (PTX ISA, "Tensor
Memory Addressing"). With tiles of 128 rows, lane r holds row r of S, P and O. Warp w of a warpgroup reaches
lanes 32 w .. 32 w + 31, so that a thread owns one row.
"""

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm, nvvm, vector
from cutlass.cutlass_dsl import T, dsl_user_op

COLUMNS = 512
BASE = 0  # where an allocation of all columns begins
LANES_PER_WARP = 32
LANE_SHIFT = 16  # bits: the lane's place in an address
TENSOR_MEMORY_SPACE = 6  # LLVM's address space number


@dataclass(frozen=True)
class TmemPlan:
    """First columns of every tensor; `scores[b]` holds S of buffer b in fp32, `probabilities[b]` its P.

    S is read whole into registers before P is written, so P (16 bits an element, half the columns of S) lies
    in the upper half of its S; or apart, behind O, where there is room. Buffer b and output b belong to query
    tile b, or, with one query tile, the two buffers alternate over the KV tiles and there is one output.
    """

    scores: tuple[int, ...]
    probabilities: tuple[int, ...]
    outputs: tuple[int, ...]

    @staticmethod
    def make(tile_n: int, head_dim_v: int, score_buffers: int, query_tiles: int, p_apart: bool = False) -> "TmemPlan":
        """The plan for S of `tile_n` columns and O of `head_dim_v` columns."""
        scores = tuple(tile_n * buffer for buffer in range(score_buffers))
        probabilities = tuple(first + tile_n // 2 for first in scores)
        first_output = tile_n * score_buffers
        outputs = tuple(first_output + head_dim_v * tile for tile in range(query_tiles))
        used = first_output + head_dim_v * query_tiles
        if p_apart:
            probabilities = tuple(used + tile_n // 2 * buffer for buffer in range(score_buffers))
            used += tile_n // 2 * score_buffers
        assert used <= COLUMNS, f"{used} columns of tensor memory needed, there are {COLUMNS}"
        return TmemPlan(scores, probabilities, outputs)

    @property
    def buffer_stride(self) -> int:
        """Columns from one buffer of S to the next."""
        return self.scores[1] - self.scores[0]

    @property
    def probabilities_stride(self) -> int:
        """Columns from one buffer of P to the next."""
        return self.probabilities[1] - self.probabilities[0]

    @property
    def output_stride(self) -> int:
        """Columns from one query tile's O to the next's."""
        return self.outputs[1] - self.outputs[0] if len(self.outputs) > 1 else 0


def allocate(written_to: cute.Pointer, pair: bool = False) -> None:
    """Take all of tensor memory; its address goes to a word of shared memory. One whole warp of each CTA calls this."""
    cute.arch.alloc_tmem(COLUMNS, written_to, is_two_cta=pair)
    cute.arch.relinquish_tmem_alloc_permit(is_two_cta=pair)


@dsl_user_op
def deallocate(base: Int32, pair: bool = False, *, loc=None, ip=None) -> None:
    """Give it back. The warp that took it calls this, after everybody's last access (of both CTAs of a pair)."""
    nvvm.tcgen05_dealloc(
        pointer(base, loc=loc, ip=ip),
        Int32(COLUMNS).ir_value(loc=loc, ip=ip),
        group=nvvm.CTAGroupKind.CTA_2 if pair else nvvm.CTAGroupKind.CTA_1,
        loc=loc,
        ip=ip,
    )


def lane_offset(warp_in_group):
    """The address of the first lane that a warp of a warpgroup reaches, column 0."""
    return warp_in_group * (LANES_PER_WARP << LANE_SHIFT)


@dsl_user_op
def pointer(address: Int32, *, loc=None, ip=None) -> ir.Value:
    """An LLVM pointer into tensor memory."""
    space = llvm.PointerType.get(TENSOR_MEMORY_SPACE)
    return llvm.inttoptr(space, Int32(address).ir_value(loc=loc, ip=ip), loc=loc, ip=ip)


@dsl_user_op
def load(address: Int32, columns: int, *, loc=None, ip=None) -> list[Float32]:
    """`columns` (a power of two) fp32 values of this thread's lane; call `wait_loads` before they are used."""
    words_type = ir.VectorType.get([columns], T.i32(), loc=loc)
    words = nvvm.tcgen05_ld(
        words_type, nvvm.Tcgen05LdStShape.SHAPE_32X32B, pointer(address, loc=loc, ip=ip), loc=loc, ip=ip
    )
    values_type = ir.VectorType.get([columns], T.f32(), loc=loc)
    values = llvm.bitcast(values_type, words, loc=loc, ip=ip)
    return [
        Float32(vector.extract(values, dynamic_position=[], static_position=[i], loc=loc, ip=ip))
        for i in range(columns)
    ]


def load_row(address: Int32, columns: int, fragment: int) -> list[Float32]:
    """`columns` fp32 values of this thread's lane, `fragment` of them an instruction, ready to be used."""
    row = []
    for first_column in range(0, columns, fragment):
        row += load(address + first_column, fragment)
    wait_loads()
    return row


@dsl_user_op
def store(address: Int32, words: list, *, loc=None, ip=None) -> None:
    """Write 32-bit words (Float32 or Int32, a power of two of them) to this thread's lane."""
    words_type = ir.VectorType.get([len(words)], T.i32(), loc=loc)
    bits = [
        llvm.bitcast(T.i32(), word.ir_value(loc=loc, ip=ip), loc=loc, ip=ip)
        if word.dtype is Float32
        else word.ir_value(loc=loc, ip=ip)
        for word in words
    ]
    packed = vector.from_elements(words_type, bits, loc=loc, ip=ip)
    nvvm.tcgen05_st(nvvm.Tcgen05LdStShape.SHAPE_32X32B, pointer(address, loc=loc, ip=ip), packed, loc=loc, ip=ip)


@dsl_user_op
def wait_loads(*, loc=None, ip=None) -> None:
    """This thread's loads are complete: their registers may be read, and their columns written by others."""
    nvvm.tcgen05_wait(nvvm.Tcgen05WaitKind.LOAD, loc=loc, ip=ip)


@dsl_user_op
def wait_stores(*, loc=None, ip=None) -> None:
    """This thread's stores are complete."""
    nvvm.tcgen05_wait(nvvm.Tcgen05WaitKind.STORE, loc=loc, ip=ip)


@dsl_user_op
def fence_before_sync(*, loc=None, ip=None) -> None:
    """Order this thread's tensor-memory accesses before the arrive that follows."""
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.BEFORE_THREAD_SYNC, loc=loc, ip=ip)


@dsl_user_op
def fence_after_sync(*, loc=None, ip=None) -> None:
    """Order this thread's tensor-memory accesses after the wait that came before."""
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.AFTER_THREAD_SYNC, loc=loc, ip=ip)
