"""Work tiles: in which order, and who computes which.

A work tile is one block of query rows of one head of one sequence. `TileOrder` numbers them. A schedule hands
the numbers out: `OneTile` gives each CTA its own, so the hardware's block scheduler balances the load;
`DynamicTiles` starts a few CTAs that claim tiles from a counter, so that one tile's loads overlap the last
tile's stores and no tile's cost has to be known beforehand; `StaticTiles` deals them out, where their costs follow
from the mask, without a word between the roles. Where `ctas_per_tile` CTAs, a cluster, share a tile, read cluster for
CTA. All have the same five methods.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32, const_expr

from cute_sparse.device.pipes import Cursor, Ring, consumer_cursor, producer_cursor

NO_TILE = -1  # as m_block: there is no more work
SLOT_WORDS = 4  # int32 words of a work tile in shared memory, padded to a 16-byte access


class WorkTile(NamedTuple):
    """Block `m_block` of query rows, head `head_idx` (of the query heads), sequence `batch_idx`."""

    m_block: Any
    head_idx: Any
    batch_idx: Any


class Position(NamedTuple):
    """A sequence of a packed batch, and the number of its first work tile."""

    batch_idx: Any
    first_number: Any


@dataclass(frozen=True)
class TileOrder:
    """A numbering of the work tiles of a batch, from 0 on.

    Heads (of all sequences, one after the other) go in groups of `heads_per_group`, whose K and V should fit
    the L2 cache together; within a group, each block of rows visits all its heads before the next block.
    `longest_first` takes the last rows first: under a causal mask they have the most keys, and short tiles at
    the end leave the least idle. `turning` lets every second group, counted from the last, go the other way, so that
    the tiles of a round of `StaticTiles` are about equally long where one group ends and the next begins.

    A packed batch may be numbered as if every sequence had `m_blocks` blocks; then those past a sequence's end
    have no rows. Given `cu_seqlens_q` and the rows of a block, one that claims rising numbers can instead number
    only the blocks that exist, one sequence after the other (`seek`).
    """

    m_blocks: Any
    heads: Any
    batch: Any
    heads_per_group: Any
    longest_first: cutlass.Constexpr[bool]
    turning: cutlass.Constexpr[bool] = False
    cu_seqlens_q: Any = None
    block_rows: cutlass.Constexpr[int] = 0

    @property
    def total(self):
        """The number of work tiles; of a packed batch, no fewer than exist."""
        return self.m_blocks * self.heads * self.batch

    def tile(self, number) -> WorkTile:
        """The work tile of a number in [0, total)."""
        m_block, head = self._in_groups(number, self.m_blocks, self.heads * self.batch)
        batch_idx = _divided(head, self.heads)
        return WorkTile(m_block, head - batch_idx * self.heads, batch_idx)

    def start(self) -> Position:
        return Position(Int32(0), Int32(0))

    @cute.jit
    def seek(self, number: Int32, position: Position):
        """The sequence that holds the work tile `number`, at `position` or behind it; `batch` if there is none."""
        batch_idx, first_number = position
        searching = batch_idx < self.batch
        while searching:
            after = first_number + self._blocks(batch_idx) * self.heads
            searching = after <= number
            if searching:
                first_number = after
                batch_idx += 1
                searching = batch_idx < self.batch
        return Position(batch_idx, first_number)

    def found(self, number, position: Position):
        """The work tile of a number, and whether there is one; in a packed batch `position` is what `seek` gave."""
        if const_expr(self.cu_seqlens_q is None):
            return self.tile(number), number < self.total
        batch_idx = cutlass.min(position.batch_idx, self.batch - 1)
        blocks = cutlass.max(self._blocks(batch_idx), 1)
        m_block, head = self._in_groups(number - position.first_number, blocks, self.heads)
        return WorkTile(m_block, head, batch_idx), position.batch_idx < self.batch

    def _blocks(self, batch_idx):
        rows = self.cu_seqlens_q[batch_idx + 1] - self.cu_seqlens_q[batch_idx]
        return (rows + (self.block_rows - 1)) // self.block_rows

    def _in_groups(self, number, m_blocks, all_heads):
        """(m_block, head) of a number among m_blocks * all_heads."""
        group_tiles = self.heads_per_group * m_blocks
        group = _divided(number, group_tiles)
        in_group = number - group * group_tiles
        first_head = group * self.heads_per_group
        heads = cutlass.min(self.heads_per_group, all_heads - first_head)
        block = _divided(in_group, heads)
        m_block = m_blocks - 1 - block if const_expr(self.longest_first) else block
        if const_expr(self.turning):
            groups_behind = _divided(all_heads - 1, self.heads_per_group) - group
            m_block = _every_second_mirrored(groups_behind, m_block, m_blocks)
        return m_block, first_head + (in_group - block * heads)


def _divided(numerator, denominator) -> Int32:
    """Quotient of two non-negative int32; unsigned division takes fewer instructions."""
    return Int32(Uint32(numerator) // Uint32(denominator))


def _every_second_mirrored(turn, index, size):
    """An index below `size`, counted from the other end if `turn` is odd."""
    return index + (turn & 1) * (size - 1 - 2 * index)


def heads_in_cache(cache_bytes: int, kv_bytes_per_token: int, seqlen_k, group, all_heads):
    """How many query heads share `cache_bytes` with the K and V they read; `group` query heads read the same.

    At most all of them: times the blocks of rows, the heads of a few keys would exceed int32.
    """
    kv_bytes = Int64(cutlass.max(seqlen_k, 1)) * kv_bytes_per_token
    heads = cutlass.max(Int64(cache_bytes) // kv_bytes, Int64(1)) * group
    return Int32(cutlass.min(heads, Int64(all_heads)))


class Claim(NamedTuple):
    """What a role of `DynamicTiles` remembers: its slot, and (the producer) what it claimed ahead.

    number    of the next work tile, in lane 0: of those that are claimed, without the first one of each CTA
    position  where the last work tile's sequence lies in a packed batch
    """

    cursor: Cursor
    number: Any
    position: Position


@dataclass(frozen=True)
class OneTile:
    """One work tile per CTA, or per cluster: the grid is `order.total` of them (at least one)."""

    order: TileOrder
    ctas_per_tile: cutlass.Constexpr[int] = 1

    @staticmethod
    def grid(order: TileOrder, ctas_per_tile: int = 1):
        return (cutlass.max(order.total, 1) * ctas_per_tile, 1, 1)

    @cute.jit
    def first(self):
        number = _cluster_number(self.ctas_per_tile)
        tile = self.order.tile(number)
        m_block = cutlass.select_(number < self.order.total, tile.m_block, Int32(NO_TILE))
        return WorkTile(m_block, tile.head_idx, tile.batch_idx), Claim(consumer_cursor(), Int32(0), self.order.start())

    def first_for_producer(self):
        return self.first()

    def next(self, tile: WorkTile, claim: Claim):
        return WorkTile(Int32(NO_TILE), tile.head_idx, tile.batch_idx), claim

    def next_for_producer(self, tile: WorkTile, claim: Claim):
        return self.next(tile, claim)


def _cluster_number(ctas_per_tile: int) -> Int32:
    """The number of this CTA's cluster of `ctas_per_tile` CTAs in a one-dimensional grid."""
    number, _, _ = cute.arch.block_idx()
    return number if const_expr(ctas_per_tile == 1) else _divided(number, ctas_per_tile)


@dataclass(frozen=True)
class StaticTiles:
    """A few CTAs to which the tiles are dealt in rounds, every second one backwards, so that nobody always gets the
    largest of a round. `Claim.number` is the round."""

    order: TileOrder
    ctas_per_tile: cutlass.Constexpr[int]

    @staticmethod
    def grid(order: TileOrder, ctas: int, ctas_per_tile: int):
        return (cutlass.min(cutlass.max(order.total, 1), ctas // ctas_per_tile) * ctas_per_tile, 1, 1)

    @cute.jit
    def first(self):
        return self._dealt(Int32(0))

    def first_for_producer(self):
        return self.first()

    @cute.jit
    def next(self, tile: WorkTile, claim: Claim):
        return self._dealt(claim.number + 1)

    def next_for_producer(self, tile: WorkTile, claim: Claim):
        return self.next(tile, claim)

    def _dealt(self, round_: Int32):
        ctas, _, _ = cute.arch.grid_dim()
        hands, hand = _divided(ctas, self.ctas_per_tile), _cluster_number(self.ctas_per_tile)
        number = dealt(round_, hand, hands)
        tile = self.order.tile(number)
        m_block = cutlass.select_(number < self.order.total, tile.m_block, Int32(NO_TILE))
        return WorkTile(m_block, tile.head_idx, tile.batch_idx), Claim(consumer_cursor(), round_, self.order.start())


def dealt(round_, hand, hands):
    """The number that `hand` of `hands` gets in a round."""
    return round_ * hands + _every_second_mirrored(round_, hand, hands)


@dataclass(frozen=True)
class DynamicTiles:
    """CTAs that claim tiles until none is left; the producer warp claims, the other warps read what it publishes.

    counter  int32 (2,) in global memory, zero before the launch and after it: numbers claimed beyond each
             CTA's first, and CTAs that found no more work
    slots    int32 (SLOT_WORDS, ring.stages) in shared memory
    ring     filled by the producer's lane 0, drained by every consumer warp
    """

    order: TileOrder
    counter: Any
    slots: Any
    ring: Ring

    @staticmethod
    def grid(order: TileOrder, ctas: int):
        return (cutlass.min(cutlass.max(order.total, 1), ctas), 1, 1)

    @cute.jit
    def first_for_producer(self):
        number, _, _ = cute.arch.block_idx()
        return self._publish(Claim(producer_cursor(), number - self._ctas(), self.order.start()))

    @cute.jit
    def next_for_producer(self, tile: WorkTile, claim: Claim):
        return self._publish(claim)

    @cute.jit
    def _publish(self, claim: Claim):
        """Publish the tile claimed before, and claim the next: its number arrives while this tile is loaded, as long as
        nothing is done with it."""
        number = cute.arch.shuffle_sync(claim.number, 0) + self._ctas()
        position = claim.position
        if const_expr(self.order.cu_seqlens_q is not None):
            position = self.order.seek(number, position)
        tile, has_tile = self.order.found(number, position)
        m_block = cutlass.select_(has_tile, tile.m_block, Int32(NO_TILE))
        tile = WorkTile(m_block, tile.head_idx, tile.batch_idx)
        self.ring.acquire(claim.cursor)
        claimed = Int32(0)
        if cute.arch.lane_idx() == 0:
            for word, value in enumerate((*tile, Int32(0))):  # the padding too: a 16-byte read fetches it
                self.slots[word, claim.cursor.index] = value
            self.ring.publish(claim.cursor)
            if has_tile:
                claimed = cute.arch.atomic_add(self.counter.iterator, Int32(1), sem="relaxed", scope="gpu")
            else:
                self._retire()
        return tile, Claim(self.ring.advanced(claim.cursor), claimed, position)

    @cute.jit
    def _retire(self):
        """The last CTA to run out of work clears the counter for the next launch."""
        retired = cute.arch.atomic_add(self.counter.iterator + 1, Int32(1), sem="acq_rel", scope="gpu")
        if retired == self._ctas() - 1:
            self.counter[0] = Int32(0)
            self.counter[1] = Int32(0)

    def _ctas(self):
        ctas, _, _ = cute.arch.grid_dim()
        return ctas

    @cute.jit
    def first(self):
        return self._read(Claim(consumer_cursor(), Int32(0), self.order.start()))

    @cute.jit
    def next(self, tile: WorkTile, claim: Claim):
        return self._read(claim)

    @cute.jit
    def _read(self, claim: Claim):
        self.ring.wait(claim.cursor)
        words = [self.slots[word, claim.cursor.index] for word in range(3)]
        tile = WorkTile(*(cute.arch.make_warp_uniform(word) for word in words))
        cute.arch.sync_warp()
        self.ring.release(claim.cursor)
        return tile, Claim(self.ring.advanced(claim.cursor), claim.number, claim.position)
