"""Warpgroup MMA: operand layouts in shared memory, accumulator views, and the issue of one product.

A warpgroup multiplies 64 rows. Lane l of warp w holds, of an accumulator of 64 x N, the rows 16 w + l / 4 and
8 more, and of each 8 columns two neighbours: register 4 j + r is row 8 * (r / 2), column 8 j + 2 (l % 4) + r % 2
(PTX ISA, "Matrix fragments for wgmma.mma_async.m64nNk16"). The A operand in registers has the same form.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.cutlass_dsl import T
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import hopper_helpers as sm90

WARPGROUP_THREADS = 128
WARPGROUP_ROWS = 64
ROWS_PER_THREAD = 2
ROW_STEP = 8  # between a thread's rows
THREADS_PER_ROW = 4
MMA_K = 16  # elements of a 16-bit type


def row_major_smem(dtype, shape: tuple[int, ...]):
    """Shared-memory layout of (rows, columns[, stages]), columns contiguous, in the widest swizzle that fits."""
    kind = sm90.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, dtype, shape[1])
    atom = warpgroup.make_smem_layout_atom(kind, dtype)
    return cute.tile_to_shape(atom, shape, order=tuple(range(len(shape))))


def transposed(tensor: cute.Tensor) -> cute.Tensor:
    """The view (columns, rows, ...) of (rows, columns, ...)."""
    shape = (tensor.shape[1], tensor.shape[0], *tensor.shape[2:])
    order = (1, 0, *range(2, cute.rank(tensor)))
    return cute.composition(tensor, cute.make_ordered_layout(shape, order=order))


def qk_mma(dtype, tile_n: int) -> cute.TiledMma:
    """S = Q K^T of one warpgroup: both operands in shared memory, head dim contiguous."""
    return _tiled_mma(dtype, tile_n, OperandMajorMode.K, warpgroup.OperandSource.SMEM)


def pv_mma(dtype, head_dim_v: int) -> cute.TiledMma:
    """O += P V of one warpgroup: P in registers, V in shared memory with the head dim contiguous, which is its N."""
    return _tiled_mma(dtype, head_dim_v, OperandMajorMode.MN, warpgroup.OperandSource.RMEM)


def pv_mma_of_shared(dtype, head_dim_v: int) -> cute.TiledMma:
    """`pv_mma` with P in shared memory, keys contiguous."""
    return _tiled_mma(dtype, head_dim_v, OperandMajorMode.MN, warpgroup.OperandSource.SMEM)


def _tiled_mma(dtype, n: int, b_major, a_source) -> cute.TiledMma:
    return sm90.make_trivial_tiled_mma(
        dtype,
        dtype,
        OperandMajorMode.K,
        b_major,
        Float32,
        atom_layout_mnk=(1, 1, 1),
        tiler_mn=(WARPGROUP_ROWS, n),
        a_source=a_source,
    )


@cute.jit
def issue(tiled_mma: cute.TiledMma, acc: cute.Tensor, a: cute.Tensor, b: cute.Tensor, accumulate):
    """Start acc (+)= a b over all of K, as one commit group; wait with `wait_group` before reading acc or reusing a."""
    warpgroup.fence()
    mma = cute.make_mma_atom(tiled_mma.op)
    mma.set(warpgroup.Field.ACCUMULATE, accumulate)
    for k in cutlass.range_constexpr(cute.size(a, mode=[2])):
        cute.gemm(mma, acc, a[None, None, k], b[None, None, k], acc)
        mma.set(warpgroup.Field.ACCUMULATE, True)
    warpgroup.commit_group()


def by_rows(acc: cute.Tensor) -> cute.Tensor:
    """View one warpgroup's accumulator fragment as (rows, columns) of this thread: (2, N / 4)."""
    (pair, rows, octets), _, _ = acc.layout.shape
    (pair_stride, row_stride, octet_stride), _, _ = acc.layout.stride
    layout = cute.make_layout((rows, (pair, octets)), stride=(row_stride, (pair_stride, octet_stride)))
    return cute.make_tensor(acc.iterator, layout)


def columns_of(n: int) -> list[int]:
    """The columns of `by_rows`, as offsets from the thread's first column."""
    return [8 * octet + pair for octet in range(n // 8) for pair in range(2)]


def first_column(lane):
    return 2 * (lane % THREADS_PER_ROW)


def first_row(thread):
    """The first of a thread's rows in its warpgroup; the second is ROW_STEP further on."""
    return 16 * (thread // 32) + (thread % 32) // THREADS_PER_ROW


def round_to(dtype, source: cute.Tensor, target: cute.Tensor) -> None:
    """target = source rounded to a 16-bit type, two elements per instruction."""
    mnemonic = {cutlass.BFloat16: "cvt.rn.bf16x2.f32", cutlass.Float16: "cvt.rn.f16x2.f32"}[dtype]
    words = cute.recast_tensor(target, Uint32)
    for i in range(cute.size(words)):
        high, low = source[2 * i + 1].ir_value(), source[2 * i].ir_value()
        # not inline_ptx, which would first move both operands
        words[i] = Uint32(llvm.inline_asm(T.i32(), [high, low], mnemonic + " $0, $1, $2;", "=r,f,f"))


def any_of_warpgroup(predicate, barrier_id) -> Boolean:
    """Whether the predicate holds in any of the warpgroup's 128 threads, by one barrier instruction.

    The vote of the warp after it changes nothing but what ptxas knows: without it, it takes the result for one that
    may differ within the warp, and computes all that follows, descriptors included, outside the uniform registers
    (R2UR before every wgmma, 86 instructions more in the loop for head dim 128).
    """
    voted = llvm.inline_asm(
        T.bool(),
        [Boolean(predicate).ir_value(), Int32(barrier_id).ir_value()],
        f"barrier.cta.red.or.aligned.pred $0, $2, {WARPGROUP_THREADS}, $1;",
        "=b,b,r",
        has_side_effects=True,
    )
    return cute.arch.vote_any_sync(Boolean(voted))


def store_accumulator(dtype, rounded: cute.Tensor, smem_tile: cute.Tensor, thread) -> None:
    """Store one warpgroup's accumulator, rounded to 16 bits, to (64, N) shared memory by stmatrix."""
    atom = cute.make_copy_atom(cute.nvgpu.warp.StMatrix8x8x16bOp(False, 4), dtype)
    mma = pv_mma(dtype, cute.size(smem_tile, mode=[1]))
    thread_copy = cute.make_tiled_copy_C(atom, mma).get_slice(thread)
    cute.copy(atom, thread_copy.retile(rounded), thread_copy.partition_D(smem_tile))
