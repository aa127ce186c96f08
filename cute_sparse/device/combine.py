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
from cutlass import Float32, Int32, Uint32, const_expr

from cute_sparse.device.bundles import DecodeOperands, Partials
from cute_sparse.device.softmax import normaliser
from cute_sparse.device.split import Segment

SIGN = 1 << 31
VECTOR = 4  # columns that a thread combines at a time: 16 bytes of fp32
SPLITS_AT_ONCE = 16  # whose partials a thread asks for before it waits: eight take 1.2 times as long for 33 splits


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
        # unsigned division takes fewer instructions
        return Int32(Uint32(self.first + row) // Uint32(self.group))

    def head(self, row):
        return (self.kv_head - self.query(row)) * self.group + self.first + row


@dataclass(frozen=True)
class SharedMax:
    """Per row of each item, the largest true maximum that one of its splits has published, in units of raw scores.

    codes  (slot_rows, items) uint32: fp32 bits so changed that they order as the numbers do; 0 where there is none

    What is read may be stale, and is then too small: a split that tests against it skips less than it could.
    """

    codes: Any

    @staticmethod
    def of(operands: DecodeOperands):
        return None if operands.shared_max is None else SharedMax(operands.shared_max)

    def code(self, item, row) -> Uint32:
        return cute.arch.load(self._word(item, row), Uint32, sem="relaxed", scope="gpu")

    def value(self, code: Uint32) -> Float32:
        """The maximum of a code that is not 0."""
        return (code ^ (((code >> 31) - Uint32(1)) | Uint32(SIGN))).bitcast(Float32)

    def publish(self, item, row, row_max) -> None:
        bits = row_max.bitcast(Int32)
        code = bits.bitcast(Uint32) ^ ((bits >> 31).bitcast(Uint32) | Uint32(SIGN))
        cute.arch.red(self._word(item, row), code, op="max", dtype="u32", sem="relaxed", scope="gpu")

    def clear(self, item, row) -> None:
        self.codes[row, item] = Uint32(0)

    def _word(self, item, row) -> cute.Pointer:
        return self.codes.iterator + cute.crd2idx((row, item), self.codes.layout)


@dataclass(frozen=True)
class Results:
    """What the splits of one launch write.

    out         (seqlen_q, head_dim_v, heads_q, batch)
    lse         (seqlen_q, heads_q, batch); None if not wanted
    sink        (heads_q,) logits; None if there are none
    shared_max  None unless the splits share their maxima
    head_dim_v  columns that exist; a multiple of 8
    """

    out: Any
    lse: Any
    sink: Any
    partials: Partials
    shared_max: Any
    head_dim_v: cutlass.Constexpr[int]

    @staticmethod
    def of(operands: DecodeOperands, head_dim_v: int) -> "Results":
        shared_max = SharedMax.of(operands)
        return Results(operands.out, operands.lse, operands.sink, operands.partials, shared_max, head_dim_v)

    @cute.jit
    def normaliser(self, rows: PackedRows, row, reference, row_sum):
        """`softmax.normaliser` of one row, with its head's sink."""
        sink = None
        if const_expr(self.sink is not None):
            sink = -Float32.inf
            if row < rows.count:
                sink = self.sink[rows.head(row)]
        return normaliser(reference, row_sum, sink)

    # ---- the only split of an item

    @cute.jit
    def write_row(
        self, rows: PackedRows, row, first_column, step: cutlass.Constexpr[int], values: cute.Tensor, inverse
    ):
        """out = values * inverse for some columns of one row, those of them that exist.

        values  fp32 (width, pieces): piece i is for the `width` columns from first_column + i * step on; first_column
                and step are multiples of width, which is 2, 4 or 8
        """
        if row < rows.count:
            width, pieces = values.shape
            coordinate = (rows.query(row), 0, rows.head(row), rows.batch_idx)
            start = self.out.iterator + cute.crd2idx(coordinate, self.out.layout)
            for i in cutlass.range_constexpr(pieces):
                rounded = cute.make_rmem_tensor(width, self.out.element_type)
                rounded.store((values[None, i].load() * inverse).to(self.out.element_type))
                column = first_column + i * step
                if column < self.head_dim_v:
                    cute.autovec_copy(rounded, neighbours(start + column, width))

    @cute.jit
    def write_lse(self, rows: PackedRows, row, lse):
        """By one thread of a row."""
        if const_expr(self.lse is not None):
            if row < rows.count:
                self.lse[rows.query(row), rows.head(row), rows.batch_idx] = lse

    # ---- one of several splits

    @cute.jit
    def leave_row(self, slot, rows: PackedRows, row, first_column, step: cutlass.Constexpr[int], values: cute.Tensor):
        """Like `write_row`, to the split's slot."""
        if row < rows.count:
            width, pieces = values.shape
            acc = self.partials.acc
            start = acc.iterator + cute.crd2idx((0, row, slot), acc.layout)
            for i in cutlass.range_constexpr(pieces):
                piece = cute.make_rmem_tensor(width, Float32)
                piece.store(values[None, i].load())
                column = first_column + i * step
                if column < self.head_dim_v:
                    cute.autovec_copy(piece, neighbours(start + column, width))

    @cute.jit
    def leave_sum(self, slot, rows: PackedRows, row, row_max, row_sum):
        """By one thread of a row; row_max is the reference in base-2 units, -inf if it has seen no key."""
        if row < rows.count:
            state = cute.make_rmem_tensor(2, Float32)
            state[0], state[1] = row_max, row_sum
            cute.autovec_copy(state, self._row_state(slot, row))

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
                self.shared_max.clear(segment.item, row)

    @cute.jit
    def _combine_columns(self, segment: Segment, rows: PackedRows, row, column):
        """VECTOR columns of one row; the loads of SPLITS_AT_ONCE splits are all under way before one is waited for."""
        row_max, row_sum = -Float32.inf, Float32(0.0)
        acc = cute.make_rmem_tensor((VECTOR, 1), Float32)
        acc.fill(0.0)
        for first in cutlass.range(0, segment.splits, SPLITS_AT_ONCE, unroll=1):
            parts, states = self._read_partials(segment, row, column, first)
            new_max = row_max
            for i in cutlass.range_constexpr(SPLITS_AT_ONCE):
                new_max = cute.arch.fmax(new_max, states[0, i], nan=True)
            reference = cutlass.select_(new_max == -Float32.inf, Float32(0.0), new_max)
            before = cute.math.exp2(row_max - reference, fastmath=True)
            row_sum = row_sum * before
            for j in cutlass.range_constexpr(VECTOR):
                acc[j] = acc[j] * before
            for i in cutlass.range_constexpr(SPLITS_AT_ONCE):
                factor = cute.math.exp2(states[0, i] - reference, fastmath=True)
                row_sum += factor * states[1, i]
                for j in cutlass.range_constexpr(VECTOR):
                    acc[j] = acc[j] + factor * parts[j, i]
            row_max = new_max
        inverse, lse = self.normaliser(rows, row, row_max, row_sum)
        self.write_row(rows, row, column, VECTOR, acc, inverse)
        if column == 0:
            self.write_lse(rows, row, lse)

    @cute.jit
    def _read_partials(self, segment: Segment, row, column, first):
        """What the splits from `first` on left of some columns: (VECTOR, SPLITS_AT_ONCE), and of the row's maximum and
        sum: (2, SPLITS_AT_ONCE). Of splits that do not exist, what adds nothing."""
        parts = cute.make_rmem_tensor((VECTOR, SPLITS_AT_ONCE), Float32)
        states = cute.make_rmem_tensor((2, SPLITS_AT_ONCE), Float32)
        parts.fill(0.0)
        states.fill(0.0)
        for i in cutlass.range_constexpr(SPLITS_AT_ONCE):
            states[0, i] = -Float32.inf
        for i in cutlass.range_constexpr(SPLITS_AT_ONCE):
            if first + i < segment.splits:
                slot = segment.slot(first + i)
                cute.autovec_copy(self._row_state(slot, row), states[None, i])
                start = self.partials.acc.iterator + cute.crd2idx((column, row, slot), self.partials.acc.layout)
                cute.autovec_copy(neighbours(start, VECTOR), parts[None, i])
        return parts, states

    def _row_state(self, slot, row) -> cute.Tensor:
        """A row's maximum and sum in a slot, as one vector."""
        rows = self.partials.rows
        return neighbours(rows.iterator + cute.crd2idx((0, row, slot), rows.layout), 2)


def neighbours(start: cute.Pointer, count: int) -> cute.Tensor:
    """`count` elements of global memory, which are aligned to their common size (but at most to 16 bytes)."""
    align_bytes = min(16, count * start.dtype.width // 8)
    aligned = cute.make_ptr(start.dtype, start.toint(), cute.AddressSpace.gmem, assumed_align=align_bytes)
    return cute.make_tensor(aligned, cute.make_layout(count))
