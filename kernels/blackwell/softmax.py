"""Online softmax where one thread owns one row: no reductions across threads, packed fp32 arithmetic.

The rule is that of `cute_sparse.device.softmax`: with c = scale_log2, p = 2^(s c - r c), the reference r moves
only when the row's maximum exceeds it by RESCALE_LOG2 exponents, and the skip test uses the true maximum.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cute_sparse.kernels.blackwell.exp2 import exp2_pair
from cutlass import Boolean, Float32, Int32, const_expr
from cutlass._mlir.dialects import llvm, nvvm
from cutlass.cutlass_dsl import T, dsl_user_op

from cute_sparse.device.softmax import FLOOR, RESCALE_LOG2, normaliser

LOWEST = -3.4028234663852886e38  # the most negative fp32: above -inf, below every score
PAIRS_PER_PERIOD = 16  # the unit in which `Config.exp2_emulated` of config.py counts
SUM_CHAINS = 2  # packed additions that do not wait for each other
_PACKED_TYPE = {cutlass.BFloat16: "bf16x2", cutlass.Float16: "f16x2"}


@dataclass(frozen=True)
class RowSoftmax:
    """The state of this thread's row; each field but the first two a register, (1,).

    scale_log2      raw score to base-2 exponent
    inverse_scale   1 / scale_log2
    threshold_raw   ln(lambda) in raw score units; None in a dense kernel
    minus_ref       -r c
    limit           raw score above which r moves: r + RESCALE_LOG2 / c
    row_sum         sum of p over the kept tiles
    row_max         the true maximum over the kept tiles, raw; +inf for a row outside the sequence. None if dense
    skip_bound      row_max + threshold_raw: a tile maximum below it is negligible. None if dense
    """

    scale_log2: Any
    inverse_scale: Any
    threshold_raw: Any
    minus_ref: cute.Tensor
    limit: cute.Tensor
    row_sum: cute.Tensor
    row_max: Any
    skip_bound: Any

    @staticmethod
    def create(scale_log2, threshold_log2) -> "RowSoftmax":
        sparse = threshold_log2 is not None
        inverse_scale = 1.0 / scale_log2
        threshold_raw = threshold_log2 * inverse_scale if sparse else None
        registers = [cute.make_rmem_tensor(1, Float32) for _ in range(5 if sparse else 3)]
        return RowSoftmax(scale_log2, inverse_scale, threshold_raw, *registers, *([] if sparse else [None, None]))

    def wants(self, tile_max: Float32) -> Boolean:
        """Whether this row keeps the tile: its maximum is not below the bound. NaN is not below."""
        return ~(tile_max < self.skip_bound[0])

    def start(self, tile_max: Float32, in_sequence: Boolean) -> None:
        """The row's first tile: its maximum is the reference."""
        row_max = maximum(tile_max, FLOOR)
        self._refer_to(_nan_if_infinite(row_max) * self.scale_log2)
        if const_expr(self.row_max is not None):
            self._remember(cutlass.select_(in_sequence, row_max, Float32(Float32.inf)))

    def keep_next(self, condition: Boolean) -> None:
        """Under a condition, the row keeps the next tile, whatever it sees of it."""
        self.skip_bound[0] = cutlass.select_(condition, -Float32.inf, self.skip_bound[0])

    def seed(self, tile_max: Float32) -> None:
        """Begin with the maximum of a tile that is visited elsewhere; before any tile that is visited here."""
        self._remember(maximum(self.row_max[0], tile_max))
        self._refer_to(maximum(-self.minus_ref[0], _nan_if_infinite(maximum(tile_max, FLOOR)) * self.scale_log2))

    @cute.jit
    def advance(self, tile_max: Float32, factor: cute.Tensor) -> Boolean:
        """A later kept tile. Returns whether this warp moved a reference; `factor` (1,) is then what O is to be
        multiplied with, and the row sum has been."""
        if const_expr(self.row_max is not None):
            self._remember(maximum(self.row_max[0], tile_max))
        moved = cute.arch.vote_any_sync(~(tile_max <= self.limit[0]))
        if moved:
            # A row that sees no key of the tile, beside one whose reference moves, stays where it is.
            tile_ref = _nan_if_infinite(maximum(tile_max, FLOOR)) * self.scale_log2
            new_ref = maximum(tile_ref, -self.minus_ref[0])
            factor[0] = cute.math.exp2(-self.minus_ref[0] - new_ref, fastmath=True)
            self.row_sum[0] = self.row_sum[0] * factor[0]
            self._refer_to(new_ref)
        return moved

    def exponents(self, scores: list) -> list:
        """s c - r c of an even number of scores, two at a time."""
        scale, bias = (self.scale_log2, self.scale_log2), (self.minus_ref[0], self.minus_ref[0])
        values = []
        for i in range(0, len(scores), 2):
            values += cute.arch.fma_packed_f32x2((scores[i], scores[i + 1]), scale, bias)
        return values

    def add(self, sums: list, first: bool) -> None:
        """Add the tile's partial sums, of `accumulated`, to the row sum."""
        while len(sums) > 1:
            sums = [cute.arch.add_packed_f32x2(a, b) for a, b in zip(sums[0::2], sums[1::2], strict=True)]
        tile_sum = sums[0][0] + sums[0][1]
        self.row_sum[0] = tile_sum if first else self.row_sum[0] + tile_sum

    def finish(self, sink=None):
        """What O is to be multiplied with, and the natural-log LSE; `sink` as in `normaliser`."""
        return normaliser(-self.minus_ref[0], self.row_sum[0], sink)

    def _refer_to(self, ref_log2: Float32) -> None:
        self.minus_ref[0] = -ref_log2
        self.limit[0] = (ref_log2 + RESCALE_LOG2) * self.inverse_scale

    def _remember(self, row_max: Float32) -> None:
        self.row_max[0] = row_max
        # Where row_max is NaN every tile in which the row sees a key is kept, and one in which it sees none is not.
        self.skip_bound[0] = cute.arch.fmax(row_max + self.threshold_raw, LOWEST)


def tile_maximum(scores: list) -> Float32:
    """The maximum of a row's scores, NaN if one is NaN: four chains of three-operand maxima."""
    chains = scores[:4]
    rest = scores[4:]
    for i in range(0, len(rest), 2):
        chain = i // 2 % 4
        chains[chain] = maximum(chains[chain], rest[i], rest[i + 1])
    return maximum(maximum(chains[0], chains[1], chains[2]), chains[3])


def exponentials(exponents: list, emulated_pairs: int) -> list:
    """2^x of each, `emulated_pairs` of every 16 pairs without the exponential unit, spread evenly."""
    values = []
    for pair in range(len(exponents) // 2):
        x, y = exponents[2 * pair], exponents[2 * pair + 1]
        place = pair % PAIRS_PER_PERIOD
        if (place + 1) * emulated_pairs // PAIRS_PER_PERIOD > place * emulated_pairs // PAIRS_PER_PERIOD:
            values += exp2_pair(x, y)
        else:
            values += (cute.math.exp2(x, fastmath=True), cute.math.exp2(y, fastmath=True))
    return values


def accumulated(sums: list, values: list) -> list:
    """SUM_CHAINS packed partial sums with a fragment's values added; an empty list stands for zeros."""
    pairs = [(values[i], values[i + 1]) for i in range(0, len(values), 2)]
    sums, pairs = (sums, pairs) if sums else (pairs[:SUM_CHAINS], pairs[SUM_CHAINS:])
    for i, pair in enumerate(pairs):
        chain = i % SUM_CHAINS
        sums[chain] = cute.arch.add_packed_f32x2(sums[chain], pair)
    return sums


def multiply_row(values: list, factor: Float32) -> list:
    """Each of an even number of values times `factor`."""
    products = []
    for i in range(0, len(values), 2):
        products += cute.arch.mul_packed_f32x2((values[i], values[i + 1]), (factor, factor))
    return products


def _nan_if_infinite(value: Float32) -> Float32:
    """A row with a score of +inf is NaN in softmax (inf - inf), whichever way its other exponentials are made."""
    return value + (value - value)


@dsl_user_op
def maximum(a: Float32, b: Float32, c: Float32 | None = None, *, loc=None, ip=None) -> Float32:
    """The maximum of two or three, NaN if one is NaN, in one instruction."""
    operands = [Float32(value).ir_value(loc=loc, ip=ip) for value in (a, b)]
    third = None if c is None else Float32(c).ir_value(loc=loc, ip=ip)
    return Float32(nvvm.fmax(*operands, c=third, nan=True, loc=loc, ip=ip))


@dsl_user_op
def pack(values: list, dtype: type, *, loc=None, ip=None) -> list:
    """Round fp32 values to 16 bits, two to a word, the first in the low half."""
    return [_pack_pair(values[i], values[i + 1], dtype, loc=loc, ip=ip) for i in range(0, len(values), 2)]


def _pack_pair(low: Float32, high: Float32, dtype: type, *, loc, ip) -> Int32:
    return Int32(
        llvm.inline_asm(
            T.i32(),
            [Float32(high).ir_value(loc=loc, ip=ip), Float32(low).ir_value(loc=loc, ip=ip)],
            f"cvt.rn.{_PACKED_TYPE[dtype]}.f32 $0, $1, $2;",
            "=r,f,f",
            has_side_effects=False,
            is_align_stack=False,
            asm_dialect=llvm.AsmDialect.AD_ATT,
            loc=loc,
            ip=ip,
        )
    )


@dsl_user_op
def any_of_group(value: Boolean, barrier_id: Int32, threads: int, *, loc=None, ip=None) -> Boolean:
    """Whether `value` holds in any of the `threads` threads that meet at this barrier: one instruction."""
    return Boolean(
        nvvm.barrier_cta_red(
            Boolean(value).ir_value(loc=loc, ip=ip),
            Int32(barrier_id).ir_value(loc=loc, ip=ip),
            nvvm.BarrierReduxKind.OR,
            thread_count=Int32(threads).ir_value(loc=loc, ip=ip),
            aligned=False,
            loc=loc,
            ip=ip,
        )
    )
