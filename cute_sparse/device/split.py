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
from cute_sparse.splits import SEEDS

WALK_WORDS = 8  # int32 words of a walk in shared memory
WARP = 32
PER_LANE = 4  # sequences whose lengths a lane reads at once
CHUNK = PER_LANE * WARP


class Cuts(NamedTuple):
    """A line cut into parts of `base` positions (at least one), of which the first `longer` have one more."""

    base: Any
    longer: Any

    @staticmethod
    def even(positions, parts) -> "Cuts":
        base = divided(positions, parts)
        return Cuts(base, positions - base * parts)

    def begin(self, part):
        """Where a part begins."""
        return part * self.base + cutlass.min(part, self.longer)

    def part(self, position):
        """The part that has a position."""
        among_longer = position < self.longer * (self.base + 1)
        passed = cutlass.select_(among_longer, Int32(0), self.longer)
        return divided(position - passed, cutlass.select_(among_longer, self.base + 1, self.base))


class Walk(NamedTuple):
    """Where a CTA stands.

    batch_idx, item  a sequence, and one of its items
    number           stream-K: the item's first position in the line of all; else the part's number
    seqlen_k         the sequence's keys
    start, stop      the CTA's part of the line; else, `stop` alone, the number of parts
    base, longer     how the line is cut, as in `Cuts`; only for stream-K
    """

    batch_idx: Any
    item: Any
    number: Any
    seqlen_k: Any
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
    seqlen_k        the sequence's keys
    tile, oldest    the last and the first KV tile that the item visits
    seeds           how many tiles it looks at for their maxima before it visits its own; 0 in a dense kernel
    split, splits   which part of the item, and of how many
    visible         false for the phantom position of a sequence that visits no tile
    first_slot, slots_from, slot_step  the slot of part 0, and of part s > 0: slots_from + s * slot_step
    """

    batch_idx: Any
    kv_head: Any
    row_block: Any
    item: Any
    seqlen_k: Any
    begin: Any
    end: Any
    tile: Any
    oldest: Any
    seeds: Any
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
    seeded        whether tiles are skipped: they are then visited in `splits.visiting_order`, and parts have seeds. If
                  not, position p is the p-th tile from the last
    num_splits    0: stream-K; else parts per item
    """

    mask: cutlass.Constexpr[str]
    tile_n: cutlass.Constexpr[int]
    min_tiles: cutlass.Constexpr[int]
    seeded: cutlass.Constexpr[bool]
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

    def band(self, seqlen_k) -> Band:
        """The mask of a sequence of as many keys."""
        return Band(self.mask, self.tile_n, self.seqlen_q, seqlen_k, self.window_left, self.window_right)

    def visited(self, seqlen_k):
        """The KV tiles [first, end) that any query of a sequence visits."""
        band = self.band(seqlen_k)
        first, last = band.keys(0).begin, band.keys(self.seqlen_q - 1).end
        return divided(first, self.tile_n), divided(cutlass.max(last, 0) + (self.tile_n - 1), self.tile_n)

    def positions(self, seqlen_k):
        first, end = self.visited(seqlen_k)
        return cutlass.max(end - first, 1)

    def seqlen_k(self, batch_idx):
        """The keys of a sequence, or of the last one instead of those behind it."""
        length = self.seqused_k[cutlass.min(batch_idx, self.batch - 1)]
        return cutlass.max(cutlass.min(length, self.capacity), 0)

    @property
    def items_per_sequence(self):
        return self.heads_kv * self.row_blocks

    @cute.jit
    def locate(self, words: cute.Tensor):
        """By one whole warp: find where this CTA begins. The others see it in `words`, (WALK_WORDS,) shared, behind a
        barrier."""
        cta, _, _ = cute.arch.block_idx()
        walk = Walk(*[Int32(0)] * len(Walk._fields))
        if self.num_splits > 0:
            walk = self._part(cta)
        else:
            walk = self._first_of_line(cta)
        with cute.arch.elect_one():
            for i, value in enumerate(walk):
                words[i] = value
        return walk

    def _part(self, number) -> Walk:
        """At a part of a fixed plan."""
        parts = self.batch * self.items_per_sequence * self.num_splits
        of_all = divided(number, self.num_splits)
        batch_idx = divided(of_all, self.items_per_sequence)
        item = of_all - batch_idx * self.items_per_sequence
        return Walk(batch_idx, item, number, self.seqlen_k(batch_idx), Int32(0), parts, Int32(0), Int32(0))

    @cute.jit
    def _first_of_line(self, cta: Int32):
        """A lane has some neighbouring sequences, and their lengths are read all at once: global memory is far away.
        Only of a batch larger than CHUNK are they read again, to look for the chunk in which the CTA begins."""
        lane = cute.arch.lane_idx()
        lengths, ends = cute.make_rmem_tensor(PER_LANE, Int32), cute.make_rmem_tensor(PER_LANE, Int32)
        own = self._read(lengths, ends, lane * PER_LANE)
        after = _inclusive_scan(own, lane)
        end = cute.arch.shuffle_sync(after, WARP - 1)
        total = end
        for first in cutlass.range(CHUNK, self.batch, CHUNK, unroll=1):
            others, others_ends = cute.make_rmem_tensor(PER_LANE, Int32), cute.make_rmem_tensor(PER_LANE, Int32)
            total += cute.arch.warp_reduction_sum(self._read(others, others_ends, first + lane * PER_LANE))
        busy = cutlass.max(cutlass.min(self.ctas, divided(total, self.min_tiles)), 1)
        cuts = Cuts.even(total, busy)
        start, stop = cuts.begin(cutlass.min(cta, busy)), cuts.begin(cutlass.min(cta + 1, busy))

        first = Int32(0)
        while end <= start and first + CHUNK < self.batch:
            first += CHUNK
            own = self._read(lengths, ends, first + lane * PER_LANE)
            after = end + _inclusive_scan(own, lane)
            end = cute.arch.shuffle_sync(after, WARP - 1)

        # Each lane looks where among its sequences the CTA would begin; it does in the first whose end is beyond.
        before = after - own
        number, batch_idx, seqlen_k = before, first + lane * PER_LANE, lengths[0]
        for i in cutlass.range_constexpr(PER_LANE - 1):
            passes = before + ends[i] <= start
            number = cutlass.select_(passes, before + ends[i], number)
            batch_idx += Int32(passes)
            seqlen_k = cutlass.select_(passes, lengths[i + 1], seqlen_k)
        positions = self.positions(seqlen_k)
        item = divided(start - number, positions)
        number += item * positions
        holder = cute.arch.popc(cute.arch.vote_ballot_sync(after <= start))
        found = [cute.arch.shuffle_sync(value, holder) for value in (batch_idx, item, number, seqlen_k)]
        batch_idx, item, number, seqlen_k = found
        number = cutlass.select_(start < stop, number, stop)  # of a CTA without work, the end
        return Walk(batch_idx, item, number, seqlen_k, start, stop, cuts.base, cuts.longer)

    def _read(self, lengths: cute.Tensor, ends: cute.Tensor, batch_idx):
        """A lane's sequences from `batch_idx` on: their lengths, and the positions of all items up to the end of each.
        Returns those of all."""
        positions = Int32(0)
        for i in range(PER_LANE):
            lengths[i] = self.seqlen_k(batch_idx + i)
        for i in range(PER_LANE):
            of_item = cutlass.select_(batch_idx + i < self.batch, self.positions(lengths[i]), Int32(0))
            positions += of_item * self.items_per_sequence
            ends[i] = positions
        return positions

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
        positions = self.positions(walk.seqlen_k)
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
        first_tile, end_tile = self.visited(walk.seqlen_k)
        kv_head, row_block = item, Int32(0)
        if self.row_blocks > 1:
            kv_head = divided(item, self.row_blocks)
            row_block = item - kv_head * self.row_blocks
        seeds = cutlass.min(begin, SEEDS) if self.seeded else Int32(0)
        return Segment(
            batch_idx, kv_head, row_block, batch_idx * per_sequence + item, walk.seqlen_k,
            begin, end, end_tile - 1, first_tile, seeds, end_tile > first_tile, split, splits, first_slot, slots_from,
            slot_step,
        )  # fmt: skip

    def tiles(self, segment: Segment):
        """How many KV tiles a segment visits: none at a phantom position, or in nobody's segment."""
        return cutlass.select_(segment.visible, cutlass.max(segment.end - segment.begin, 0), Int32(0))

    def looks(self, segment: Segment):
        """How many KV tiles a segment looks at: its seeds, and those that it visits."""
        tiles = self.tiles(segment)
        return cutlass.select_(tiles > 0, tiles + segment.seeds, Int32(0))

    def n_block(self, segment: Segment, look):
        """The KV tile of a segment's look number `look`; of a look beyond the last, any tile that is visited or -1."""
        if not self.seeded:
            return segment.tile - segment.begin - look
        passed = segment.begin - segment.seeds  # positions between the seeds and its own
        descending = segment.tile + 1 - passed - look
        return cutlass.select_(
            look == 0, segment.tile, cutlass.select_(look == 1, segment.oldest, descending)
        )

    @cute.jit
    def next(self, walk: Walk):
        batch_idx, item, number, seqlen_k, start, stop, base, longer = walk
        if self.num_splits > 0:
            batch_idx, item, number, seqlen_k, _, _, _, _ = self._part(number + self.ctas)
        else:
            number += self.positions(seqlen_k)
            item += 1
            if item == self.items_per_sequence and number < stop:
                item = Int32(0)
                batch_idx += 1
                seqlen_k = self.seqlen_k(batch_idx)
        return Walk(batch_idx, item, number, seqlen_k, start, stop, base, longer)


def divided(numerator, denominator) -> Int32:
    """Quotient of two int32 that are not negative; unsigned division takes fewer instructions."""
    return Int32(Uint32(numerator) // Uint32(denominator))


def _inclusive_scan(value, lane):
    """The sum of the values of this lane and of those before it."""
    for step in (1, 2, 4, 8, 16):
        other = cute.arch.shuffle_sync_up(value, step, mask_and_clamp=0)
        value += cutlass.select_(lane >= step, other, Int32(0))
    return value
