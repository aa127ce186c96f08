"""Which KV tiles a CTA of a decode kernel computes: `cute_sparse.splits` on the device, from the lengths there.

No host needs to know the lengths: one warp of each CTA adds up the positions of all sequences, finds where the CTA's
part of the line begins, and leaves that in shared memory (`SplitPlan.locate`). Every role then walks the same segments:

    walk = plan.first(words)
    while plan.more(walk):
        segment = plan.segment(walk)
        ..
        walk = plan.next(walk)
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Uint32

from cute_sparse.device.mask import Band

WALK_WORDS = 8  # int32 words of a walk in shared memory, padded to a multiple of 16 bytes
WARP = 32


class Cuts(NamedTuple):
    """A line cut into parts of `base` positions (at least one), of which the first `longer` have one more."""

    base: Any
    longer: Any

    @staticmethod
    def even(positions, parts) -> "Cuts":
        base = _divided(positions, parts)
        return Cuts(base, positions - base * parts)

    def begin(self, part):
        """Where a part begins."""
        return part * self.base + cutlass.min(part, self.longer)

    def part(self, position):
        """The part that has a position."""
        among_longer = position < self.longer * (self.base + 1)
        passed = cutlass.select_(among_longer, Int32(0), self.longer)
        return _divided(position - passed, cutlass.select_(among_longer, self.base + 1, self.base))


class Walk(NamedTuple):
    """Where a CTA stands.

    batch_idx, item  a sequence, and one of its items
    number           stream-K: the item's first position in the line of all; else the part's number
    start, stop      the CTA's part of the line; else, `stop` alone, the number of parts
    base, longer     how the line is cut, as in `Cuts`; only for stream-K
    """

    batch_idx: Any
    item: Any
    number: Any
    start: Any
    stop: Any
    base: Any
    longer: Any

    @property
    def cuts(self) -> "Cuts":
        return Cuts(self.base, self.longer)


class Segment(NamedTuple):
    """What a CTA does at a stretch: the positions [begin, end) of one item.

    item            its number among all items
    tile            the KV tile of position 0; position p is tile `tile - p`
    split, splits   which part of the item, and of how many
    visible         false for the phantom position of a sequence that visits no tile
    first_slot, slots_from, slot_step  the slot of part 0, and of part s > 0: slots_from + s * slot_step
    """

    batch_idx: Any
    kv_head: Any
    row_block: Any
    item: Any
    begin: Any
    end: Any
    tile: Any
    visible: Any
    split: Any
    splits: Any
    first_slot: Any
    slots_from: Any
    slot_step: Any

    def slot(self, split):
        """Where part `split` of this item leaves its partial result."""
        return cutlass.select_(split == 0, self.first_slot, self.slots_from + split * self.slot_step)


@dataclass(frozen=True)
class SplitPlan:
    """The plan of one launch.

    mask, tile_n  as in `Band`
    min_tiles     the fewest positions of a CTA, if there is more than one CTA's worth
    num_splits    0: stream-K; else parts per item
    """

    mask: cutlass.Constexpr[str]
    tile_n: cutlass.Constexpr[int]
    min_tiles: cutlass.Constexpr[int]
    seqused_k: Any
    capacity: Any
    seqlen_q: Any
    window_left: Any
    window_right: Any
    batch: Any
    heads_kv: Any
    row_blocks: Any
    num_splits: Any
    ctas: Any

    def band(self, batch_idx) -> Band:
        """The mask of one sequence."""
        length = cutlass.max(cutlass.min(self.seqused_k[batch_idx], self.capacity), 0)
        return Band(self.mask, self.tile_n, self.seqlen_q, length, self.window_left, self.window_right)

    def visited(self, batch_idx):
        """The KV tiles that any query of a sequence visits."""
        band = self.band(batch_idx)
        first, last = band.keys(0).begin, band.keys(self.seqlen_q - 1).end
        return first // self.tile_n, (cutlass.max(last, 0) + (self.tile_n - 1)) // self.tile_n

    def positions(self, batch_idx):
        begin, end = self.visited(batch_idx)
        return cutlass.max(end - begin, 1)

    @property
    def items_per_sequence(self):
        return self.heads_kv * self.row_blocks

    @cute.jit
    def locate(self, words: cute.Tensor):
        """By one whole warp, before a barrier of the CTA: find where this CTA begins; `words` (WALK_WORDS,) shared."""
        cta, _, _ = cute.arch.block_idx()
        if self.num_splits > 0:
            _store(words, self._first_part(cta))
        else:
            _store(words, self._first_of_line(cta))

    def _first_part(self, cta) -> Walk:
        parts = self.batch * self.items_per_sequence * self.num_splits
        return Walk(Int32(0), Int32(0), cta, Int32(0), parts, Int32(0), Int32(0))

    @cute.jit
    def _first_of_line(self, cta: Int32):
        lane = cute.arch.lane_idx()
        total = Int32(0)
        batch_idx = lane
        while batch_idx - lane < self.batch:
            total += self._weight(batch_idx)
            batch_idx += WARP
        total = cute.arch.warp_reduction_sum(total)
        busy = cutlass.max(cutlass.min(self.ctas, total // self.min_tiles), 1)
        cuts = Cuts.even(total, busy)
        start, stop = cuts.begin(cutlass.min(cta, busy)), cuts.begin(cutlass.min(cta + 1, busy))

        # The sequence in which the CTA begins: as many lie wholly before `start`.
        passed, before, first = Int32(0), Int32(0), Int32(0)
        batch_idx = lane
        while batch_idx - lane < self.batch:
            after = before + _inclusive_scan(self._weight(batch_idx), lane)
            is_passed = (batch_idx < self.batch) & (after <= start)
            passed += Int32(is_passed)
            first = cutlass.max(first, cutlass.select_(is_passed, after, Int32(0)))
            before = cute.arch.shuffle_sync(after, WARP - 1)
            batch_idx += WARP
        passed = cute.arch.warp_reduction_sum(passed)
        first = cute.arch.warp_reduction_max(first)
        positions = self.positions(cutlass.min(passed, self.batch - 1))
        item = _divided(start - first, positions)
        return Walk(passed, item, first + item * positions, start, stop, cuts.base, cuts.longer)

    @cute.jit
    def _weight(self, batch_idx: Int32):
        """The positions of all items of a sequence; 0 past the last sequence."""
        weight = Int32(0)
        if batch_idx < self.batch:
            weight = self.positions(batch_idx) * self.items_per_sequence
        return weight

    def first(self, words: cute.Tensor) -> Walk:
        """What `locate` found."""
        return Walk(*[words[i] for i in range(len(Walk._fields))])

    def more(self, walk: Walk) -> Boolean:
        return walk.number < walk.stop

    @cute.jit
    def segment(self, walk: Walk):
        """The segment where the CTA stands; of a fixed plan it may be empty (end <= begin), and is then nobody's."""
        batch_idx, item = walk.batch_idx, walk.item
        per_sequence = self.items_per_sequence
        begin, end, split, splits = Int32(0), Int32(0), Int32(0), Int32(1)
        first_slot, slots_from, slot_step = Int32(0), Int32(0), Int32(1)
        if self.num_splits > 0:
            number = _divided(walk.number, self.num_splits)
            batch_idx = _divided(number, per_sequence)
            item = number - batch_idx * per_sequence
        positions = self.positions(batch_idx)
        if self.num_splits > 0:
            first_slot = (batch_idx * per_sequence + item) * self.num_splits
            slots_from = first_slot
            split = walk.number - first_slot
            splits = cutlass.min(self.num_splits, positions)
            if split < splits:
                cuts = Cuts.even(positions, splits)
                begin, end = cuts.begin(split), cuts.begin(split + 1)
        else:
            begin = cutlass.max(walk.start - walk.number, 0)
            end = cutlass.min(walk.stop - walk.number, positions)
            owner = walk.cuts.part(walk.number)
            splits = walk.cuts.part(walk.number + positions - 1) - owner + 1
            cta, _, _ = cute.arch.block_idx()
            split = cta - owner
            begins_inside = walk.number > walk.cuts.begin(owner)
            first_slot, slots_from, slot_step = 2 * owner + Int32(begins_inside), 2 * owner, Int32(2)
        first_tile, end_tile = self.visited(batch_idx)
        kv_head = _divided(item, self.row_blocks)
        return Segment(
            batch_idx, kv_head, item - kv_head * self.row_blocks, batch_idx * per_sequence + item, begin, end,
            end_tile - 1, end_tile > first_tile, split, splits, first_slot, slots_from, slot_step,
        )  # fmt: skip

    @cute.jit
    def next(self, walk: Walk):
        batch_idx, item, number, start, stop, base, longer = walk
        if self.num_splits > 0:
            number += self.ctas
        else:
            number += self.positions(batch_idx)
            item += 1
            if item == self.items_per_sequence:
                item = Int32(0)
                batch_idx += 1
        return Walk(batch_idx, item, number, start, stop, base, longer)


def _divided(numerator, denominator) -> Int32:
    """Quotient of two int32 that are not negative; unsigned division takes fewer instructions."""
    return Int32(Uint32(numerator) // Uint32(denominator))


def _inclusive_scan(value, lane):
    """The sum of the values of this lane and of those before it."""
    for step in (1, 2, 4, 8, 16):
        other = cute.arch.shuffle_sync_up(value, step, mask_and_clamp=0)
        value += cutlass.select_(lane >= step, other, Int32(0))
    return value


def _store(words: cute.Tensor, walk: Walk) -> None:
    """By a whole warp."""
    with cute.arch.elect_one():
        for i, value in enumerate((*walk, Int32(0))):  # the padding too: a 16-byte read fetches it
            words[i] = value
