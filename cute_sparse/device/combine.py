"""Where the results of a decode kernel's splits go.

An item (a block of packed query rows of one KV head of one sequence) is attended by one or more splits. A split knows,
per row, O = sum(p v), the row sum l = sum(p), and in base-2 units the reference m of p = 2^(score - m). The only split
of an item writes out = O / l and lse = ln 2 (m + log2 l). Of several, each leaves O, l and m in its slot of the
partials and counts its arrival; the CTA that arrives last adds them up, always in the order of the splits:

    m = max(m_s),   l = sum(2^(m_s - m) l_s),   out = sum(2^(m_s - m) O_s) / l

so that the result does not depend on which CTA was the last. It also leaves the counter zero for the next launch.

Of many splits nobody adds up all: every `fan_in` neighbours are a group, whose last CTA leaves what they come to in the
slot of the first, and then the groups are what the splits were, until one group is left. So of 35 splits of 16 rows and
128 columns the last CTA reads 13 results at most, not 35 (of 8 KB each), and the others' groups are ready by then.

Tried, where six parts of 16 rows are combined, for the clocks that the bytes do not take: 32 vectors at once instead of
16, 2% less; addresses by adding instead of by slots, 3% less, but with every option Blackwell's kernel then spills (21
local-memory instructions in its loops).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32, const_expr

from cute_sparse.device.bundles import DecodeOperands, Partials
from cute_sparse.device.softmax import normaliser
from cute_sparse.device.split import Segment, divided

SIGN = 1 << 31
VECTOR = 4  # columns that a thread combines at a time: 16 bytes of fp32
VECTORS_AT_ONCE = 16  # that a thread asks for before it waits: of so many results, or two of each of half as many
# By how many vectors a result has: how many results are one group. A trip to L2 and back and the vectors themselves
# take longer for more results, another level of groups takes two trips more and what its CTA leaves.
FAN_INS = ((128, 32), (256, 16), (None, 8))


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
        return divided(self.first + row, self.group)

    def head(self, row):
        return (self.kv_head - self.query(row)) * self.group + self.first + row


class Group(NamedTuple):
    """The results that become one at a level: those of the splits first, first + step, .., of which there are `count`.

    level   0: of single splits; 1: of the groups of level 0; and so on
    fan_in  `count` of all groups but the last of a level
    splits  of the item
    """

    level: Any
    fan_in: Any
    step: Any
    first: Any
    count: Any
    splits: Any

    @staticmethod
    def of(split, splits, fan_in, level, step) -> "Group":
        """The group that a split belongs to at a level, whose results stand for `step` splits each."""
        width = fan_in * step
        first = divided(split, width) * width
        count = divided(cutlass.min(splits - first, width) + (step - 1), step)
        return Group(level, fan_in, step, first, count, splits)

    @property
    def is_all(self) -> Boolean:
        """Whether it is all that there is at its level."""
        return self.splits <= self.fan_in * self.step

    def next(self) -> "Group":
        """The group of the next level that this one is part of."""
        return Group.of(self.first, self.splits, self.fan_in, self.level + 1, self.fan_in * self.step)

    @property
    def counter(self):
        """The split in whose slot its arrivals are counted. That of a group of another level has another remainder by
        fan_in. For more than one result, since it may not exist otherwise."""
        return self.first + self.level


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
    def leave_sum(self, slot, rows: PackedRows, row, row_max, row_sum, level=0):
        """By one thread of a row; row_max is the reference in base-2 units, -inf if it has seen no key."""
        if row < rows.count:
            state = cute.make_rmem_tensor(2, Float32)
            state[0], state[1] = row_max, row_sum
            cute.autovec_copy(state, self._row_state(slot, row, level))

    def group(self, segment: Segment, rows: PackedRows) -> Group:
        """The group of level 0 that a split belongs to."""
        vectors = rows.count * (self.head_dim_v // VECTOR)
        fan_in = Int32(FAN_INS[-1][1])
        for most, fan in reversed(FAN_INS[:-1]):
            fan_in = cutlass.select_(vectors <= most, Int32(fan), fan_in)
        return Group.of(segment.split, segment.splits, fan_in, Int32(0), Int32(1))

    @cute.jit
    def arrive(self, segment: Segment, group: Group):
        """By one thread, behind a barrier of all that wrote: whether this result is the group's last to arrive.

        If so, all results of the group may be read, behind another barrier.
        """
        is_last = Boolean(True)
        if group.count > 1:
            counter = self.partials.arrivals.iterator + segment.slot(group.counter)
            arrived = cute.arch.atomic_add(counter, Int32(1), sem="acq_rel", scope="gpu")
            is_last = arrived == group.count - 1
            if is_last:
                self.partials.arrivals[segment.slot(group.counter)] = Int32(0)
        return is_last

    @cute.jit
    def combine(self, segment: Segment, rows: PackedRows, group: Group, thread, threads: cutlass.Constexpr[int]):
        """Of all results of a group: write out and lse if it is all there is, else leave what they come to. By
        `threads` threads, of which this is number `thread`."""
        if group.count <= VECTORS_AT_ONCE // 2:
            self._combine(segment, rows, group, thread, threads, 2)
        else:
            self._combine(segment, rows, group, thread, threads, 1)
        if const_expr(self.shared_max is not None):
            if group.is_all:
                for row in cutlass.range(thread, rows.count, threads, unroll=1):
                    self.shared_max.clear(segment.item, row)

    @cute.jit
    def _combine(
        self,
        segment: Segment,
        rows: PackedRows,
        group: Group,
        thread,
        threads: cutlass.Constexpr[int],
        at_once: cutlass.Constexpr[int],
    ):
        """A thread has `at_once` vectors of a row each; the loads of VECTORS_AT_ONCE are all under way before one is
        waited for."""
        results_at_once = VECTORS_AT_ONCE // at_once
        vectors = self.head_dim_v // VECTOR
        for i in cutlass.range(thread, rows.count * vectors, threads * at_once, unroll=1):
            at = [(i + k * threads) // vectors for k in range(at_once)]
            columns = [VECTOR * (i + k * threads - at[k] * vectors) for k in range(at_once)]
            sums = cute.make_rmem_tensor((2, at_once), Float32)  # as in `_row_state`
            acc = cute.make_rmem_tensor((VECTOR, at_once), Float32)
            acc.fill(0.0)
            sums.fill(0.0)
            for k in cutlass.range_constexpr(at_once):
                sums[0, k] = -Float32.inf
            for first in cutlass.range(0, group.count, results_at_once, unroll=1):
                loaded = [
                    self._read(segment, rows, group, at[k], columns[k], first, results_at_once) for k in range(at_once)
                ]
                for k in cutlass.range_constexpr(at_once):
                    parts, states = loaded[k]
                    _add(acc[None, k], sums[None, k], parts, states)
            for k in cutlass.range_constexpr(at_once):
                if at[k] < rows.count:
                    self._write_combined(segment, rows, group, at[k], columns[k], acc, sums, k)

    @cute.jit
    def _write_combined(
        self, segment: Segment, rows: PackedRows, group: Group, row, column, acc, sums, k: cutlass.Constexpr[int]
    ):
        values = cute.make_rmem_tensor((VECTOR, 1), Float32)
        values.store(acc[None, k].load().reshape((VECTOR, 1)))
        if group.is_all:
            inverse, lse = self.normaliser(rows, row, sums[0, k], sums[1, k])
            self.write_row(rows, row, column, VECTOR, values, inverse)
            if column == 0:
                self.write_lse(rows, row, lse)
        else:
            slot = segment.slot(group.first)
            self.leave_row(slot, rows, row, column, VECTOR, values)
            if column == 0:
                self.leave_sum(slot, rows, row, sums[0, k], sums[1, k], group.level + 1)

    @cute.jit
    def _read(
        self, segment: Segment, rows: PackedRows, group: Group, row, column, first, count: cutlass.Constexpr[int]
    ):
        """Of the results from the group's number `first` on, some columns of a row: (VECTOR, count), and the row's
        maximum and sum: (2, count). Of what does not exist, what adds nothing."""
        parts = cute.make_rmem_tensor((VECTOR, count), Float32)
        states = cute.make_rmem_tensor((2, count), Float32)
        parts.fill(0.0)
        states.fill(0.0)
        for i in cutlass.range_constexpr(count):
            states[0, i] = -Float32.inf
        for i in cutlass.range_constexpr(count):
            if (first + i < group.count) & (row < rows.count):
                slot = segment.slot(group.first + (first + i) * group.step)
                cute.autovec_copy(self._row_state(slot, row, group.level), states[None, i])
                start = self.partials.acc.iterator + cute.crd2idx((column, row, slot), self.partials.acc.layout)
                cute.autovec_copy(neighbours(start, VECTOR), parts[None, i])
        return parts, states

    def _row_state(self, slot, row, level) -> cute.Tensor:
        """A row's maximum and sum in a slot, as one vector: of a group of results, apart from where theirs are, which
        other threads may still read."""
        rows = self.partials.rows
        return neighbours(rows.iterator + cute.crd2idx((0, row, slot, level % 2), rows.layout), 2)


def _add(acc: cute.Tensor, sums: cute.Tensor, parts: cute.Tensor, states: cute.Tensor) -> None:
    """Add results to what has been added up so far: acc (VECTOR,) with the row's maximum and sum in `sums`."""
    count = cute.size(states, mode=[1])
    new_max = sums[0]
    for i in range(count):
        new_max = cute.arch.fmax(new_max, states[0, i], nan=True)
    reference = cutlass.select_(new_max == -Float32.inf, Float32(0.0), new_max)
    before = cute.math.exp2(sums[0] - reference, fastmath=True)
    row_sum = sums[1] * before
    for j in range(VECTOR):
        acc[j] = acc[j] * before
    for i in range(count):
        factor = cute.math.exp2(states[0, i] - reference, fastmath=True)
        row_sum += factor * states[1, i]
        for j in range(VECTOR):
            acc[j] = acc[j] + factor * parts[j, i]
    sums[0], sums[1] = new_max, row_sum


def neighbours(start: cute.Pointer, count: int) -> cute.Tensor:
    """`count` elements of global memory, which are aligned to their common size (but at most to 16 bytes)."""
    align_bytes = min(16, count * start.dtype.width // 8)
    aligned = cute.make_ptr(start.dtype, start.toint(), cute.AddressSpace.gmem, assumed_align=align_bytes)
    return cute.make_tensor(aligned, cute.make_layout(count))
