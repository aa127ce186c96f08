"""Where the results of a decode kernel's splits go.

An item (a block of packed query rows of one KV head of one sequence) is attended by one or more splits. A split knows,
per row, O = sum(p v), the row sum l = sum(p), and in base-2 units the reference m of p = 2^(score - m). The only split
of an item writes out = O / l and lse = ln 2 (m + log2 l). Of several, each leaves O, l and m in its slot of the
partials and counts its arrival; the CTA that arrives last adds them up, always in the order of the splits:

    m = max(m_s),   l = sum(2^(m_s - m) l_s),   out = sum(2^(m_s - m) O_s) / l

so that the result does not depend on which CTA was the last. It also leaves the counter zero for the next launch.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from cute_sparse.device.bundles import LN_2, DecodeOperands, Partials
from cute_sparse.device.split import Segment

VECTOR = 4  # columns that a thread combines at a time: 16 bytes of fp32


class PackedRows(NamedTuple):
    """The rows of one item. Row r of the block is query `query(r)` of query head `head(r)`.

    first  the block's first row among all rows of its KV head
    count  how many rows the block has
    group  query heads per KV head
    """

    batch_idx: Any
    kv_head: Any
    first: Any
    count: Any
    group: Any

    @staticmethod
    def of(segment: Segment, seqlen_q, group, tile_rows: int) -> "PackedRows":
        first = segment.row_block * tile_rows
        count = cutlass.min(seqlen_q * group - first, tile_rows)
        return PackedRows(segment.batch_idx, segment.kv_head, first, count, group)

    def query(self, row):
        return (self.first + row) // self.group

    def head(self, row):
        return self.kv_head * self.group + (self.first + row) % self.group


def normaliser(row_max, row_sum):
    """(what O is to be multiplied with, natural-log LSE) of a row; 0 and -inf if it has seen no key.

    row_max  the reference of p in base-2 units, -inf if the row has seen no key
    """
    inverse = cutlass.select_(row_sum == 0.0, Float32(0.0), cute.arch.rcp_approx(row_sum))
    return inverse, (cute.math.log2(row_sum, fastmath=True) + row_max) * LN_2


@dataclass(frozen=True)
class Results:
    """What the splits of one launch write.

    out         (seqlen_q, head_dim_v, heads_q, batch)
    lse         (seqlen_q, heads_q, batch); None if not wanted
    shared_max  (slot_rows, items) uint32, cleared with the arrivals; None unless the splits share their maxima
    head_dim_v  columns that exist; a multiple of 8
    """

    out: Any
    lse: Any
    partials: Partials
    shared_max: Any
    head_dim_v: cutlass.Constexpr[int]

    @staticmethod
    def of(operands: DecodeOperands, head_dim_v: int) -> "Results":
        return Results(operands.out, operands.lse, operands.partials, operands.shared_max, head_dim_v)

    # ---- the only split of an item

    @cute.jit
    def write_columns(self, rows: PackedRows, row, column, values: cute.Tensor, inverse):
        """out = values * inverse for neighbouring columns of one row, if row and columns exist.

        column  the first; it and the number of values are multiples of 2, 4 or 8
        """
        if row < rows.count and column < self.head_dim_v:
            rounded = cute.make_rmem_tensor_like(values, self.out.element_type)
            rounded.store((values.load() * inverse).to(self.out.element_type))
            coordinate = (rows.query(row), column, rows.head(row), rows.batch_idx)
            cute.autovec_copy(rounded, _neighbours(self.out, coordinate, cute.size(values)))

    @cute.jit
    def write_lse(self, rows: PackedRows, row, lse):
        """By one thread of a row."""
        if const_expr(self.lse is not None):
            if row < rows.count:
                self.lse[rows.query(row), rows.head(row), rows.batch_idx] = lse

    # ---- one of several splits

    @cute.jit
    def leave_columns(self, slot, rows: PackedRows, row, column, values: cute.Tensor):
        """Like `write_columns`, to the split's slot."""
        if row < rows.count and column < self.head_dim_v:
            cute.autovec_copy(values, _neighbours(self.partials.acc, (column, row, slot), cute.size(values)))

    @cute.jit
    def leave_row(self, slot, rows: PackedRows, row, row_max, row_sum):
        """By one thread of a row; `row_max` as in `normaliser`."""
        if row < rows.count:
            self.partials.row_max[row, slot] = row_max
            self.partials.row_sum[row, slot] = row_sum

    @cute.jit
    def arrive(self, segment: Segment):
        """By one thread, behind a barrier of all that wrote: whether this split is the item's last to arrive.

        If so, all partials of the item may be read, behind another barrier.
        """
        counter = self.partials.arrivals.iterator + segment.item
        arrived = cute.arch.atomic_add(counter, Int32(1), sem="acq_rel", scope="gpu")
        is_last = arrived == segment.splits - 1
        if is_last:
            self.partials.arrivals[segment.item] = Int32(0)
        return is_last

    @cute.jit
    def combine(self, segment: Segment, rows: PackedRows, thread, threads: cutlass.Constexpr[int]):
        """Write out and lse from all splits of an item; by `threads` threads, of which this is number `thread`."""
        vectors = self.head_dim_v // VECTOR
        for i in cutlass.range(thread, rows.count * vectors, threads, unroll=1):
            row = i // vectors
            column = VECTOR * (i - row * vectors)
            self._combine_columns(segment, rows, row, column)
        if const_expr(self.shared_max is not None):
            for row in cutlass.range(thread, rows.count, threads, unroll=1):
                self.shared_max[row, segment.item] = cutlass.Uint32(0)

    @cute.jit
    def _combine_columns(self, segment: Segment, rows: PackedRows, row, column):
        row_max = -Float32.inf
        for split in cutlass.range(segment.splits, unroll=4):
            row_max = cute.arch.fmax(row_max, self.partials.row_max[row, segment.slot(split)], nan=True)
        reference = cutlass.select_(row_max == -Float32.inf, Float32(0.0), row_max)
        row_sum = Float32(0.0)
        acc = cute.make_rmem_tensor(VECTOR, Float32)
        acc.fill(0.0)
        for split in cutlass.range(segment.splits, unroll=4):
            slot = segment.slot(split)
            factor = cute.math.exp2(self.partials.row_max[row, slot] - reference, fastmath=True)
            row_sum += factor * self.partials.row_sum[row, slot]
            part = cute.make_rmem_tensor(VECTOR, Float32)
            cute.autovec_copy(_neighbours(self.partials.acc, (column, row, slot), VECTOR), part)
            for j in cutlass.range_constexpr(VECTOR):
                acc[j] = acc[j] + factor * part[j]
        inverse, lse = normaliser(row_max, row_sum)
        self.write_columns(rows, row, column, acc, inverse)
        if column == 0:
            self.write_lse(rows, row, lse)


def _neighbours(tensor: cute.Tensor, coordinate, count: int) -> cute.Tensor:
    """`count` elements of a tensor in global memory, next to each other and aligned to their common size (or 16)."""
    pointer = tensor.iterator + cute.crd2idx(coordinate, tensor.layout)
    align_bytes = min(16, count * tensor.element_type.width // 8)
    aligned = cute.make_ptr(tensor.element_type, pointer.toint(), cute.AddressSpace.gmem, assumed_align=align_bytes)
    return cute.make_tensor(aligned, cute.make_layout(count))
