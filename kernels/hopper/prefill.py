"""Attention forward for sm_90a, in which a warpgroup skips the KV tiles that softmax proves negligible.

    out = softmax(softmax_scale * Q K^T + mask) V,   lse = ln(sum(exp(softmax_scale * Q K^T + mask)))

Q (batch, seqlen_q, heads_q, head_dim), K (batch, seqlen_k, heads_kv, head_dim), V (.., head_dim_v), or packed
(tokens, heads, head_dim); out like Q with head_dim_v. Online softmax over KV tiles, from the last visible one down,
in FlashAttention-3's pipeline (arXiv 2407.08608: P V of a tile is issued beside Q K^T of the next) with BLASST's
rule (arXiv 2512.12087): a tile is skipped if in each of a warpgroup's 64 rows tile_max < row_max + ln(lambda).
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cute_sparse.kernels.hopper import wgmma
from cute_sparse.kernels.hopper.config import (
    ELEMENT_BYTES,
    L2_BYTES,
    SHARED_ALIGN_BYTES,
    SHARED_BYTES,
    WARPGROUP_ROWS,
    WARPGROUP_THREADS,
    WARPGROUP_WARPS,
    Config,
    choose,
    padded,
    shared_bytes,
)
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.cute.runtime import make_ptr
from cutlass.memory import SmemAllocator

from cute_sparse.device.bundles import (
    LOG2_E,
    TMA_ALIGN_BYTES,
    Lengths,
    Scale,
    Span,
    TokenTensor,
    load_threshold,
    log2_loaded,
    prefill_operands,
)
from cute_sparse.device.events import span
from cute_sparse.device.mask import Band, TileRange, first_early
from cute_sparse.device.pipes import Cursor, Ring, consumer_cursor, producer_cursor
from cute_sparse.device.schedule import SLOT_WORDS, DynamicTiles, OneTile, TileOrder, WorkTile, heads_in_cache
from cute_sparse.device.softmax import OnlineSoftmax
from cute_sparse.operands import PREFILL
from cute_sparse.problem import HEAD_DIM_MAX, HEAD_DIM_MULTIPLE, Problem, head_dim_feature

SUPPORTS = frozenset(
    {"dtype:bfloat16", "dtype:float16", "mask:full", "mask:causal", "mask:band"}
    | {"varlen", "softcap", "sink", "sparsity:threshold", "lse", "stats"}
    | {head_dim_feature(d, d) for d in range(HEAD_DIM_MULTIPLE, HEAD_DIM_MAX + 1, HEAD_DIM_MULTIPLE)}
    | {head_dim_feature(192, 128)}
)

DTYPES = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16}
TILE_SLOTS = 2  # work tiles in flight between the producer and the consumers
SKIP_MAP_KEPT, SKIP_MAP_SKIPPED = 1, 2


class NamedBarrier(IntEnum):
    """Hardware barriers of the CTA; 0 is the whole CTA's. Each name is the first of one per warpgroup."""

    TURN = 1  # ping-pong: it is this warpgroup's turn to issue MMAs (its threads, and those of the one before)
    VOTE = 4  # the warpgroup's threads vote on a tile
    OUT = 7  # the warpgroup's threads have written out to shared memory, or may now write it


@dataclass(frozen=True)
class TmaTokens:
    """A TMA atom and the coordinate view of the tensor it moves."""

    atom: cute.CopyAtom
    tokens: TokenTensor


@dataclass(frozen=True)
class KernelOperands:
    """The kernel's one argument."""

    q: TmaTokens
    k: TmaTokens
    v: TmaTokens
    out: TmaTokens
    lse: Any
    lengths: Lengths
    group: Any  # query heads per KV head
    window_left: Any
    window_right: Any
    scale: Scale
    threshold: Any
    sink: Any
    stats: Any
    order: TileOrder
    work_counter: Any


class Shared(NamedTuple):
    """Shared memory: tiles and rings."""

    sQ: cute.Tensor  # (64, head_dim, warpgroups)
    sK: cute.Tensor  # (tile_n, head_dim, k_stages)
    sV: cute.Tensor  # (tile_n, head_dim_v, v_stages)
    sO: cute.Tensor  # (64, head_dim_v, warpgroups)
    q_ring: Ring
    k_ring: Ring
    v_ring: Ring
    tile_ring: Ring
    tile_slots: cute.Tensor  # (SLOT_WORDS, TILE_SLOTS)
    vote_ring: Ring
    votes: cute.Tensor  # (warpgroups, k_stages) int32: whether the warpgroup keeps the tile


class Work(NamedTuple):
    """What a work tile means: whose rows, which keys."""

    tile: WorkTile
    span_q: Span
    span_k: Span
    band: Band
    begin: Any  # KV tiles [begin, end) are loaded, from the last
    end: Any


class Source(NamedTuple):
    """A work tile's K and V, as TMA sees them in shared and global memory, and how many KV tiles are loaded."""

    work: Work
    tiles: Any
    tKsK: cute.Tensor
    tKgK: cute.Tensor
    tVsV: cute.Tensor
    tVgV: cute.Tensor


class Loaded(NamedTuple):
    """How far the producer is: the next slots, and the tiles in a row that every warpgroup skipped."""

    k: Cursor
    v: Cursor
    vote: Cursor
    skipped_in_a_row: Any


class Thread(NamedTuple):
    """A consumer thread's place: its warpgroup (of the consumers), and its index there, 0..127."""

    warpgroup: Any
    index: Any


class Fragments(NamedTuple):
    """A consumer's MMA operands and accumulators."""

    qk: cute.TiledMma
    pv: cute.TiledMma
    tSrQ: cute.Tensor  # (MMA, M, K): descriptors
    tSrK: cute.Tensor  # (MMA, N, K, stages)
    tOrP: cute.Tensor  # (MMA, M, K): registers
    tOrV: cute.Tensor  # (MMA, N, K, stages)
    acc_O: cute.Tensor  # (MMA, M, N) fp32


class Consumer(NamedTuple):
    """A consumer thread at one work tile."""

    operands: KernelOperands
    shared: Shared
    thread: Thread
    fragments: Fragments
    work: Work
    visited: TileRange  # by this warpgroup, of those that are loaded; begin == end where its rows see no key
    softmax: OnlineSoftmax


class HopperPrefill:
    """The kernel of one (problem, config).

    Roles
      warpgroup 0        its warp 0 is the producer: TMA loads, work tiles; the other three warps leave at once
      warpgroups 1..n    consumers of 64 query rows each: MMA, softmax, store
      setmaxnreg moves the producer's registers to the consumers (`config.consumer_registers`).

    Pipelines  (producer -> consumer: slots; what fills; what drains)
      q      TMA -> MMA: one per warpgroup; bytes of its Q; where out is staged in Q's memory, one arrival once the
             store has read it, elsewhere nothing: when the last K of a work tile is drained, its Q is no longer read
      k, v   TMA -> MMA: `k_stages`, `v_stages`; bytes of the tile; one arrival per consumer warp
      votes  consumers -> producer: `k_stages`; one arrival per warpgroup; nothing drains them, the order of the K and
             V rings protects them (only where V may be held back)
      tiles  producer -> consumers: 2; one arrival of lane 0; one arrival per consumer warp (dynamic schedule only)

    Timeline, steady state, for KV tile j (j falls)
      producer   K[j], V[j + lead], K[j - 1], V[j + lead - 1], ..    where lead = 1, or 2 if V may be held back; but
                 the first V behind the second K; between two work tiles .. V[1], K'[n], V[0], Q', K'[n - 1], V'[n] ..,
                 so that nobody waits for them, or where out is staged in Q's memory .. V[1], K'[n], V[0], K'[n - 1],
                 Q', V'[n] ..
      consumer   wait for the turn; issue S = Q K[j]^T; issue O += P V[j+1]; pass the turn; wait for S; mask;
                 maxima; vote; p = 2^(..); wait for O; P = round(p); rescale O if a reference moved; release V[j+1]

    Ranges of their own.  Where the edges of a mask give the warpgroups of a CTA different KV tiles, each passes by
    those that only the others see (`_pass_by`): it takes and passes its turn, votes against the tile, releases it, and
    multiplies nothing. The CTA loads what any of them sees.

    Order.  Dense kernels visit the KV tiles from the last one to the first. Where `first_early`, the first one comes
    before all others that every row of the CTA sees whole. Consumers count down either way: only tiles that they would
    mask tell them apart, and those keep their places. So only what is loaded, and recorded, follows the order.

    Skipping.  The vote is one `barrier.cta.red` over the warpgroup's 128 threads, right after the thread-local maxima
    and before any exponential. A skipped tile leaves P, the sums and O as they were and clears `p_pending`, which
    travels with P: the next step then issues Q K^T alone and waits for it alone. With no threshold none of this is
    compiled.

    V of a tile that every warpgroup skips.  To wait for the vote before every V load would put the load's latency,
    about one step, between the vote and P V of every kept tile. So the producer waits only where it expects a skip:
    after `hold_v_after` tiles in a row that every warpgroup skipped, it loads V when, and only if, somebody has voted
    to keep the tile, and else hands the slot over empty. It learns those earlier votes at no cost, because a V slot
    that is free implies them. Needs a third K slot (`config.candidates` says where there is room): K has to run
    ahead of a V that waits. Tried, and no better: a warp of its own for V, with and without the votes cast outside the
    producer's sub-partition of the SM; three slots for K and for V, none held (d128, modelled: as fast, and reads all
    of V). To release V of a skipped tile before it has arrived would be worth 2 to 3% at 75 to 90% skipped, modelled,
    but needs more barriers than slots: a later wait of that warpgroup could pass by the parity of an earlier V.
    """

    def __init__(self, problem: Problem, config: Config):
        self.problem = problem
        self.config = config
        self.dtype = DTYPES[problem.dtype]
        self.head_dim = padded(problem.head_dim)
        self.head_dim_v = padded(problem.head_dim_v)
        self.tile_m, self.tile_n = config.tile_m, config.tile_n
        self.k_stages, self.v_stages = config.k_stages, config.v_stages
        # Tiles by which the K loads run ahead of the V loads: one more where V may wait for its votes. With three, V of
        # a kept tile came late behind skipped ones: 64K causal d128, modelled, 1% of the time at 50 to 90% skipped.
        self.k_lead = 2 if config.hold_v_after else 1
        # K tiles that go before Q, whose memory is free late where out is staged in it
        self.first_k = 2 if config.out_aliases_q else 1
        self.early_v = int(self.k_lead > 1 or self.first_k > 1)  # of the first KV tiles, those with V at once
        self.sparse = problem.sparsity is not None
        # V of a tile that a warpgroup passed by may be released unseen: in its turn all have released V of two tiles
        # before, and with it the slot's last content. Whoever does see the tile waits for it.
        self.turns_order_releases = config.ping_pong and config.v_stages >= 2
        self.consumer_warps = config.warpgroups * WARPGROUP_WARPS
        self.q_bytes = WARPGROUP_ROWS * self.head_dim * ELEMENT_BYTES
        self.k_bytes = self.tile_n * self.head_dim * ELEMENT_BYTES
        self.v_bytes = self.tile_n * self.head_dim_v * ELEMENT_BYTES

    # ---- host side

    @cute.jit
    def __call__(self, *values):
        """Launch; `values` are the operands of `operands.PREFILL` in order, then the stream."""
        *values, stream = values
        operands = prefill_operands(self.problem, values)
        order = self._tile_order(operands)
        bundle = KernelOperands(
            q=self._load_atom(operands.q, self._q_layout()),
            k=self._load_atom(operands.k, self._k_layout()),
            v=self._load_atom(operands.v, self._v_layout()),
            out=self._store_atom(operands.out, self._out_layout()),
            lse=operands.lse,
            lengths=operands.lengths,
            group=operands.heads_q // operands.heads_kv,
            window_left=operands.window_left,
            window_right=operands.window_right,
            scale=operands.scale,
            threshold=operands.threshold,
            sink=operands.sink,
            stats=operands.stats,
            order=order,
            work_counter=operands.work_counter,
        )
        dynamic = self.config.ctas > 0
        self.kernel(bundle).launch(
            grid=DynamicTiles.grid(order, self.config.ctas) if const_expr(dynamic) else OneTile.grid(order),
            block=(self.config.threads, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
        )

    def _tile_order(self, operands) -> TileOrder:
        """Blocks of rows of one head after the other, or under a mask the longest first, among heads that share L2."""
        group = operands.heads_q // operands.heads_kv
        longest_first = self.problem.mask != "full"
        bytes_per_token = (self.problem.head_dim + self.problem.head_dim_v) * ELEMENT_BYTES
        all_heads = operands.heads_q * operands.batch
        heads = heads_in_cache(L2_BYTES, bytes_per_token, operands.lengths.seqlen_k, group, all_heads)
        return TileOrder(
            m_blocks=(operands.lengths.seqlen_q + (self.tile_m - 1)) // self.tile_m,
            heads=operands.heads_q,
            batch=operands.batch,
            heads_per_group=heads if const_expr(longest_first) else Int32(1),
            longest_first=longest_first,
            cu_seqlens_q=operands.lengths.cu_seqlens_q,
            block_rows=self.tile_m,
        )

    def _load_atom(self, tokens: TokenTensor, smem_layout) -> TmaTokens:
        return self._tma_atom(cpasync.CopyBulkTensorTileG2SOp(), tokens, smem_layout)

    def _store_atom(self, tokens: TokenTensor, smem_layout) -> TmaTokens:
        return self._tma_atom(cpasync.CopyBulkTensorTileS2GOp(), tokens, smem_layout)

    def _tma_atom(self, op, tokens: TokenTensor, smem_layout) -> TmaTokens:
        """A copy of one (rows, columns) tile; the third mode of the layout counts tiles."""
        smem_layout = cute.select(smem_layout, mode=[0, 1])
        atom, coordinates = cpasync.make_tiled_tma_atom(
            op, tokens.tensor, smem_layout, cute.product_each(cute.shape(smem_layout))
        )
        return TmaTokens(atom, tokens.viewed_as(coordinates))

    # ---- shared-memory layouts

    def _q_layout(self):
        return self._rows_layout(self.head_dim)

    def _out_layout(self):
        return self._rows_layout(self.head_dim_v)

    def _rows_layout(self, head_dim: int):
        """(64, head_dim, warpgroups); where out shares Q's memory, each warpgroup's lies in its own Q."""
        layout = wgmma.row_major_smem(self.dtype, (WARPGROUP_ROWS, head_dim))
        widest = max(self.head_dim, self.head_dim_v) if self.config.out_aliases_q else head_dim
        warpgroups = cute.make_layout(self.config.warpgroups, stride=WARPGROUP_ROWS * widest)
        return cute.make_composed_layout(layout.inner, 0, cute.append(layout.outer, warpgroups))

    def _k_layout(self):
        return wgmma.row_major_smem(self.dtype, (self.tile_n, self.head_dim, self.k_stages))

    def _v_layout(self):
        return wgmma.row_major_smem(self.dtype, (self.tile_n, self.head_dim_v, self.v_stages))

    # ---- the kernel

    @cute.kernel
    def kernel(self, operands: KernelOperands):
        shared = self._allocate(operands)
        schedule = self._schedule(operands, shared)
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp < WARPGROUP_WARPS:
            cute.arch.setmaxregister_decrease(self.config.producer_registers)
            if warp == 0:
                self.load(operands, shared, schedule)
        else:
            cute.arch.setmaxregister_increase(self.config.consumer_registers)
            self.attend(operands, shared, schedule)

    def _allocate(self, operands: KernelOperands) -> Shared:
        """Carve up shared memory, initialise the barriers, and wait until every thread sees them."""
        q_layout, out_layout = self._q_layout(), self._out_layout()

        smem = SmemAllocator()
        warpgroups = self.config.warpgroups
        tile_slots = smem.allocate_tensor(Int32, cute.make_layout((SLOT_WORDS, TILE_SLOTS)), byte_alignment=16)
        votes = smem.allocate_tensor(Int32, cute.make_layout((warpgroups, self.k_stages)), byte_alignment=16)

        def ring(stages: int, drains: int, fills: int = 1) -> Ring:
            return Ring(smem.allocate_array(Int64, 2 * stages), stages, drains, fills)

        q_ring = ring(warpgroups, drains=1)  # drained where out is staged in Q's memory
        k_ring = ring(self.k_stages, drains=self.consumer_warps)
        v_ring = ring(self.v_stages, drains=self.consumer_warps)
        tile_ring = ring(TILE_SLOTS, drains=self.consumer_warps)
        vote_ring = ring(self.k_stages, drains=1, fills=warpgroups)  # never drained: see `_v_is_wanted`

        def allocate(elements: int):
            return cute.recast_ptr(smem.allocate(elements * ELEMENT_BYTES, SHARED_ALIGN_BYTES), dtype=self.dtype)

        def tiles(pointer, layout):
            return cute.make_tensor(cute.recast_ptr(pointer, layout.inner, self.dtype), layout.outer)

        k_layout, v_layout = self._k_layout(), self._v_layout()
        q_elements, out_elements = cute.cosize(q_layout), cute.cosize(out_layout)
        if self.config.out_aliases_q:
            q_pointer = out_pointer = allocate(max(q_elements, out_elements))
        else:
            q_pointer, out_pointer = allocate(q_elements), allocate(out_elements)
        sQ, sO = tiles(q_pointer, q_layout), tiles(out_pointer, out_layout)
        sK, sV = tiles(allocate(cute.cosize(k_layout)), k_layout), tiles(allocate(cute.cosize(v_layout)), v_layout)
        self._initialise([q_ring, k_ring, v_ring, tile_ring, vote_ring], operands)
        return Shared(sQ, sK, sV, sO, q_ring, k_ring, v_ring, tile_ring, tile_slots, vote_ring, votes)

    @cute.jit
    def _initialise(self, rings: list, operands: KernelOperands):
        if cute.arch.warp_idx() == 0:
            for tma in (operands.q, operands.k, operands.v, operands.out):
                cpasync.prefetch_descriptor(tma.atom)
            with cute.arch.elect_one():
                for ring in rings:
                    ring.initialise()
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

    def _schedule(self, operands: KernelOperands, shared: Shared):
        if self.config.ctas:
            return DynamicTiles(operands.order, operands.work_counter, shared.tile_slots, shared.tile_ring)
        return OneTile(operands.order)

    def _work(self, operands: KernelOperands, tile: WorkTile) -> Work:
        """The same for every role: which keys the CTA loads. None where the block lies past its sequence."""
        span_q = operands.lengths.span_q(tile.batch_idx)
        span_k = operands.lengths.span_k(tile.batch_idx)
        band = Band(
            self.problem.mask, self.tile_n, span_q.length, span_k.length, operands.window_left, operands.window_right
        )
        begin, end = band.visited(tile.m_block * self.tile_m, self.tile_m)
        return Work(tile, span_q, span_k, band, begin, end)

    def _in_order(self, work: Work, n_block):
        """The tile that is loaded in the place of `n_block`, counted down from the last one."""
        if not self.config.first_early:
            return n_block
        return first_early(n_block, work.band.whole(work.tile.m_block * self.tile_m, self.tile_m).end)

    # ---- producer

    @cute.jit
    def load(self, operands: KernelOperands, shared: Shared, schedule):
        """Q, then K and, `k_lead` tiles behind, V, for every work tile. The next one's first K come before this one's
        last V, and its Q as soon as this one's is no longer read."""
        q, loaded = producer_cursor(), Loaded(producer_cursor(), producer_cursor(), consumer_cursor(), Int32(0))
        tile, claim = schedule.first_for_producer()
        q = self._load_q(operands, shared, tile, q, loaded.k)
        for nth in cutlass.range_constexpr(self.first_k):
            loaded = self._load_first_k(operands, shared, tile, nth, loaded)
        while tile.m_block >= 0:
            source = self._source(operands, shared, self._work(operands, tile))
            loaded = self._load_tile(operands, shared, source, loaded)
            tile, claim = schedule.next_for_producer(tile, claim)
            last_k = loaded.k  # all slots but one further: the last K's, when it is empty
            for _ in cutlass.range_constexpr(self.k_stages - 1):
                last_k = shared.k_ring.advanced(last_k)
            for nth in cutlass.range_constexpr(self.first_k):
                loaded = self._load_first_k(operands, shared, tile, nth, loaded)
                if const_expr(nth == 0):
                    if source.tiles > self.early_v:
                        loaded = self._load_v(operands, shared, source, source.tiles - 1, loaded)
            q = self._load_q(operands, shared, tile, q, last_k)

    def _has_rows(self, work: Work):
        """False for blocks of a packed batch past the end of a shorter sequence, which `OneTile` gives out, too."""
        return work.tile.m_block * self.tile_m < work.span_q.length

    def _tiles(self, work: Work):
        """How many KV tiles the CTA loads."""
        return cutlass.select_(self._has_rows(work), cutlass.max(work.end - work.begin, 0), Int32(0))

    def _source(self, operands: KernelOperands, shared: Shared, work: Work) -> Source:
        head_kv = work.tile.head_idx // operands.group
        gK = operands.k.tokens.sequence(head_kv, work.tile.batch_idx, work.span_k)
        gV = operands.v.tokens.sequence(head_kv, work.tile.batch_idx, work.span_k)
        gK = cute.local_tile(gK, (self.tile_n, self.head_dim), (None, 0))  # (tile_n, head_dim, KV tiles)
        gV = cute.local_tile(gV, (self.tile_n, self.head_dim_v), (None, 0))
        tKsK, tKgK = _tma_partition(operands.k.atom, shared.sK, gK)
        tVsV, tVgV = _tma_partition(operands.v.atom, shared.sV, gV)
        return Source(work, self._tiles(work), tKsK, tKgK, tVsV, tVgV)

    @cute.jit
    def _load_q(self, operands: KernelOperands, shared: Shared, tile: WorkTile, q: Cursor, last_k: Cursor):
        """Q of a work tile, once the last one's is no longer read: its last product is done with the slot `last_k` of
        the K ring, or, where out is staged in Q's memory, the store says so."""
        if tile.m_block >= 0:
            work = self._work(operands, tile)
            if self._needs_q(work):
                if const_expr(not self.config.out_aliases_q):
                    shared.k_ring.acquire(last_k)
                gQ = operands.q.tokens.sequence(work.tile.head_idx, work.tile.batch_idx, work.span_q)
                gQ = cute.local_tile(gQ, (WARPGROUP_ROWS, self.head_dim), (None, 0))  # (64, head_dim, row blocks)
                tQsQ, tQgQ = _tma_partition(operands.q.atom, shared.sQ, gQ)
                for i in cutlass.range_constexpr(self.config.warpgroups):
                    slot = self._q_slot(q, i)
                    if const_expr(self.config.out_aliases_q):
                        shared.q_ring.acquire(slot)
                    shared.q_ring.expect(slot, self.q_bytes)
                    row_block = work.tile.m_block * self.config.warpgroups + i
                    barrier = shared.q_ring.full(slot)
                    cute.copy(operands.q.atom, tQgQ[None, row_block], tQsQ[None, i], tma_bar_ptr=barrier)
                q = self._next_q(q)
        return q

    def _q_slot(self, q: Cursor, warpgroup_idx) -> Cursor:
        """Of a work tile's Q, the slot of one warpgroup's rows."""
        return Cursor(Int32(warpgroup_idx), q.phase)

    def _next_q(self, q: Cursor) -> Cursor:
        return Cursor(q.index, q.phase ^ 1)

    def _needs_q(self, work: Work):
        """Not without keys; but where out is staged in Q's memory, that must change hands."""
        return self._has_rows(work) if self.config.out_aliases_q else self._tiles(work) > 0

    @cute.jit
    def _load_first_k(self, operands: KernelOperands, shared: Shared, tile: WorkTile, nth: int, loaded: Loaded):
        """K of a work tile's nth KV tile, if there are both."""
        if tile.m_block >= 0:
            source = self._source(operands, shared, self._work(operands, tile))
            if nth < source.tiles:
                loaded = self._load_k(operands, shared, source, Int32(nth), loaded)
        return loaded

    @cute.jit
    def _load_tile(self, operands: KernelOperands, shared: Shared, source: Source, loaded: Loaded):
        """What a work tile has between its first K and its last V."""
        loaded = loaded._replace(skipped_in_a_row=Int32(0))
        if source.tiles > 0:
            if const_expr(self.first_k > 1):
                loaded = self._load_v(operands, shared, source, Int32(0), loaded)
            for i in cutlass.range(self.first_k, source.tiles + self.k_lead - 1, unroll=1):
                if i < source.tiles:
                    loaded = self._load_k(operands, shared, source, i, loaded)
                if (i == 1) | (i > self.k_lead):  # the second tile's products need its K and the first one's V at once
                    nth = cutlass.max(i - self.k_lead, 0)
                    loaded = self._load_v(operands, shared, source, nth, loaded)
        return loaded

    @cute.jit
    def _load_k(self, operands: KernelOperands, shared: Shared, source: Source, nth, loaded: Loaded):
        """K of the nth KV tile, once a slot is empty."""
        with span("load K"):
            work, ring, k = source.work, shared.k_ring, loaded.k
            ring.acquire(k)
            n_block = self._in_order(work, work.end - 1 - nth)
            _load(ring, k, self.k_bytes, operands.k.atom, source.tKgK, source.tKsK, n_block)
        return loaded._replace(k=ring.advanced(k))

    @cute.jit
    def _load_v(self, operands: KernelOperands, shared: Shared, source: Source, nth, loaded: Loaded):
        """V of the nth KV tile, once a slot is empty, or nothing if every warpgroup skips the tile."""
        with span("load V"):
            work, ring, v = source.work, shared.v_ring, loaded.v
            vote, skipped_in_a_row = loaded.vote, loaded.skipped_in_a_row
            ring.acquire(v)
            wanted = Boolean(True)
            if const_expr(self.config.hold_v_after > 0):
                wanted, skipped_in_a_row = self._v_is_wanted(shared, nth, vote, skipped_in_a_row)
                vote = shared.vote_ring.advanced(vote)
            if wanted:
                n_block = self._in_order(work, work.end - 1 - nth)
                _load(ring, v, self.v_bytes, operands.v.atom, source.tVgV, source.tVsV, n_block)
            else:
                ring.expect(v, 0)
        return Loaded(loaded.k, ring.advanced(v), vote, skipped_in_a_row)

    @cute.jit
    def _v_is_wanted(self, shared: Shared, nth, vote: Cursor, skipped_in_a_row):
        """Whether to load V of the nth tile of a work tile (`vote` is its slot), and the run of skipped ones so far.

        The slot for V is empty, so, with two V slots, every warpgroup is done with V of the tile two before, which it
        released after its vote on the tile before: that vote can be read without waiting. Its slot is written next for
        the tile two after this one, which no warpgroup reaches before this V's slot is full.
        """
        wanted = Boolean(True)
        if nth >= self.v_stages:
            index = cutlass.select_(vote.index == 0, Int32(self.k_stages - 1), vote.index - 1)
            skipped_in_a_row = cutlass.select_(self._any_vote(shared, index), Int32(0), skipped_in_a_row + 1)
            if skipped_in_a_row >= self.config.hold_v_after:
                shared.vote_ring.wait(vote)
                wanted = self._any_vote(shared, vote.index)
        return wanted, skipped_in_a_row

    def _any_vote(self, shared: Shared, index) -> Boolean:
        """The whole warp reads whether some warpgroup keeps the tile whose votes lie in slot `index`."""
        kept = shared.votes[0, index]
        for warpgroup_idx in range(1, self.config.warpgroups):
            kept = kept | shared.votes[warpgroup_idx, index]
        cute.arch.sync_warp()  # all lanes have read before one of them lets the slot be written again
        return kept != 0

    # ---- consumers

    @cute.jit
    def attend(self, operands: KernelOperands, shared: Shared, schedule):
        """Softmax and both products for this warpgroup's rows of every work tile."""
        thread = self._thread()
        fragments = self._fragments(shared, thread)
        self._first_turn(thread)
        q, k, v = consumer_cursor(), consumer_cursor(), consumer_cursor()
        tile, claim = schedule.first()
        while tile.m_block >= 0:
            work = self._work(operands, tile)
            if self._has_rows(work):
                softmax = OnlineSoftmax.create(
                    operands.scale.scale_log2, wgmma.ROWS_PER_THREAD, wgmma.THREADS_PER_ROW, self.sparse
                )
                visited = self._visited(work, thread)
                consumer = Consumer(operands, shared, thread, fragments, work, visited, softmax)
                kept = Int32(0)
                # Not left to the first product: with a P V under a branch, ptxas would serialise every wgmma.
                fragments.acc_O.fill(0.0)
                threshold = None
                if const_expr(self.sparse):  # used behind the first product, under which it arrives
                    threshold = load_threshold(operands.threshold, tile.batch_idx, tile.head_idx)
                if self._needs_q(work):
                    shared.q_ring.wait(self._q_slot(q, thread.warpgroup))
                if work.end > work.begin:
                    k, v, kept = self._walk(consumer, k, v, threshold)
                else:
                    softmax.clear()
                with span("store"):
                    self.store(consumer, q)
                if const_expr(operands.stats is not None):
                    self._count(consumer, kept)
                if self._needs_q(work):
                    q = self._next_q(q)
            tile, claim = schedule.next(tile, claim)
        self._finish_stores(thread)

    def _thread(self) -> Thread:
        index, _, _ = cute.arch.thread_idx()
        warpgroup_idx = cute.arch.make_warp_uniform(index // WARPGROUP_THREADS - 1)
        return Thread(warpgroup_idx, index % WARPGROUP_THREADS)

    def _fragments(self, shared: Shared, thread: Thread) -> Fragments:
        """Each warpgroup multiplies its own 64 rows: nothing here spans warpgroups."""
        qk = wgmma.qk_mma(self.dtype, self.tile_n)
        pv = wgmma.pv_mma(self.dtype, self.head_dim_v)
        qk_slice, pv_slice = qk.get_slice(0), pv.get_slice(0)
        sQ = shared.sQ[None, None, thread.warpgroup]
        sVt = wgmma.transposed(shared.sV)  # (head_dim_v, tile_n, stages)
        return Fragments(
            qk,
            pv,
            tSrQ=qk.make_fragment_A(qk_slice.partition_A(sQ)),
            tSrK=qk.make_fragment_B(qk_slice.partition_B(shared.sK)),
            tOrP=pv.make_fragment_A(pv.partition_shape_A((WARPGROUP_ROWS, self.tile_n))),
            tOrV=pv.make_fragment_B(pv_slice.partition_B(sVt)),
            acc_O=cute.make_rmem_tensor(pv.partition_shape_C((WARPGROUP_ROWS, self.head_dim_v)), Float32),
        )

    def _visited(self, work: Work, thread: Thread) -> TileRange:
        """Of the tiles that the CTA loads, those in which some of the warpgroup's rows may see a key."""
        if not self.config.own_ranges:
            return TileRange(work.begin, work.end)
        first_row = work.tile.m_block * self.tile_m + thread.warpgroup * WARPGROUP_ROWS
        begin, end = work.band.visited(first_row, WARPGROUP_ROWS)
        empty = (first_row >= work.span_q.length) | (end <= begin)
        return TileRange(*(cutlass.select_(empty, Int32(work.begin), Int32(bound)) for bound in (begin, end)))

    @cute.jit
    def _walk(self, consumer: Consumer, k: Cursor, v: Cursor, threshold):
        """Every KV tile from the last to the first. Returns the cursors and how many tiles were kept."""
        _, shared, _, _, work, visited, softmax = consumer
        threshold_raw = Float32(0.0)
        p_pending, kept = Boolean(True), visited.end - visited.begin
        if const_expr(not self.config.own_ranges):
            k, v, threshold_raw = self._first_step(consumer, Int32(0), k, v, threshold)
        else:
            before = work.end - visited.end
            for i in cutlass.range(before, unroll=1):
                k, v = self._pass_by(consumer, i, k, v, False)
            p_pending = visited.end > visited.begin
            if p_pending:
                k, v, threshold_raw = self._first_step(consumer, before, k, v, threshold)
            else:
                softmax.clear()
        for i in cutlass.range(visited.end - 1 - visited.begin, unroll=1):
            keeps = self._step(consumer, visited.end - 2 - i, k, v, p_pending, threshold_raw)
            k, v = shared.k_ring.advanced(k), shared.v_ring.advanced(v)
            if const_expr(self.sparse):
                p_pending = keeps
                kept -= 1 - Int32(keeps)
        if const_expr(self.config.own_ranges):
            for _ in cutlass.range(visited.begin - work.begin, unroll=1):
                k, v = self._pass_by(consumer, Int32(1), k, v, p_pending)
                p_pending = Boolean(False)
        self._last_product(consumer, v, p_pending)
        return k, shared.v_ring.advanced(v), kept

    @cute.jit
    def _pass_by(self, consumer: Consumer, nth, k: Cursor, v: Cursor, p_pending):
        """A tile, the CTA's nth, in which none of the warpgroup's rows sees a key; P V of the last kept one."""
        _, shared, thread, _, _, _, _ = consumer
        shared.k_ring.wait(k)
        self._await_turn(thread)
        self._pass_turn(thread)
        shared.k_ring.release(k)
        self._cast_vote(consumer, k, Boolean(False))
        if nth > 0:
            self._last_product(consumer, v, p_pending)
            v = shared.v_ring.advanced(v)
        return shared.k_ring.advanced(k), v

    @cute.jit
    def _first_step(self, consumer: Consumer, nth, k: Cursor, v: Cursor, threshold):
        """The warpgroup's first tile, the CTA's nth, is always kept. Nothing overlaps it within the warpgroup; its turn
        puts the next warpgroup's first product under this one's softmax. Also returns ln(lambda) in raw units."""
        operands, shared, thread, fragments, work, visited, softmax = consumer
        n_block = visited.end - 1
        acc_S = self._accumulator(fragments)
        shared.k_ring.wait(k)
        self._await_turn(thread)
        wgmma.issue(fragments.qk, acc_S, fragments.tSrQ, fragments.tSrK[None, None, None, k.index], False)
        self._pass_turn(thread)
        warpgroup.wait_group(0)
        shared.k_ring.release(k)
        self._score(consumer, acc_S, n_block, may_hide=True)
        scores = wgmma.by_rows(acc_S)
        threshold_raw = Float32(0.0)
        if const_expr(self.sparse):
            log2_lambda = log2_loaded(operands.threshold, threshold)
            threshold_raw = log2_lambda * cute.arch.rcp_approx(operands.scale.scale_log2)
        in_sequence = [row < work.span_q.length for row in self._rows(consumer)]
        softmax.start(scores, softmax.thread_max(scores), threshold_raw, in_sequence)
        wgmma.round_to(self.dtype, acc_S, fragments.tOrP)
        self._cast_vote(consumer, k, Boolean(True))
        self._record(consumer, n_block, Boolean(True))
        if const_expr(self.config.own_ranges):
            if nth > 0:
                if const_expr(not self.turns_order_releases):
                    shared.v_ring.wait(v)
                shared.v_ring.release(v)
                v = shared.v_ring.advanced(v)
        return shared.k_ring.advanced(k), v, threshold_raw

    @cute.jit
    def _step(self, consumer: Consumer, n_block, k: Cursor, v: Cursor, p_pending, threshold_raw):
        """One further tile; P V of the last kept tile runs beside this one's Q K^T. Returns whether it is kept."""
        _, shared, thread, fragments, _, _, softmax = consumer
        acc_S = self._accumulator(fragments)
        with span("products"):
            shared.k_ring.wait(k)
            self._await_turn(thread)
            wgmma.issue(fragments.qk, acc_S, fragments.tSrQ, fragments.tSrK[None, None, None, k.index], False)
            if p_pending:
                shared.v_ring.wait(v)
                tOrV = fragments.tOrV[None, None, None, v.index]
                wgmma.issue(fragments.pv, fragments.acc_O, fragments.tOrP, tOrV, True)
                self._pass_turn(thread)
                warpgroup.wait_group(1)
            else:
                self._pass_turn(thread)
                warpgroup.wait_group(0)
        shared.k_ring.release(k)
        with span("softmax"):
            self._score(consumer, acc_S, n_block, may_hide=self.problem.mask != "full")
            scores = wgmma.by_rows(acc_S)
            thread_max = softmax.thread_max(scores)
            keeps = Boolean(True)
            if const_expr(self.sparse):
                wants = softmax.wants(thread_max, self._sees_key(thread_max))
                keeps = wgmma.any_of_warpgroup(wants, NamedBarrier.VOTE + thread.warpgroup)
            self._cast_vote(consumer, k, keeps)
            self._record(consumer, n_block, keeps)
            if keeps:
                moved, factors = softmax.advance(scores, thread_max, threshold_raw)
                warpgroup.wait_group(0)
                wgmma.round_to(self.dtype, acc_S, fragments.tOrP)
                if moved:
                    self._rescale(fragments.acc_O, factors)
            else:
                warpgroup.wait_group(0)
        if not p_pending:
            shared.v_ring.wait(v)
        shared.v_ring.release(v)
        return keeps

    @cute.jit
    def _last_product(self, consumer: Consumer, v: Cursor, p_pending):
        """O += P V of the last kept tile, if it was the last visited."""
        _, shared, _, fragments, _, _, _ = consumer
        shared.v_ring.wait(v)
        if p_pending:
            tOrV = fragments.tOrV[None, None, None, v.index]
            wgmma.issue(fragments.pv, fragments.acc_O, fragments.tOrP, tOrV, True)
            warpgroup.wait_group(0)
        shared.v_ring.release(v)

    @cute.jit
    def store(self, consumer: Consumer, q: Cursor):
        """Normalise O and store it through shared memory by TMA, which drops rows and columns that do not exist."""
        operands, shared, thread, fragments, work, _, softmax = consumer
        sink = None if const_expr(operands.sink is None) else operands.sink[work.tile.head_idx]
        inverses, lse = softmax.finish(sink)
        self._rescale(fragments.acc_O, inverses)
        if const_expr(operands.lse is not None):
            self._store_lse(consumer, lse)
        self._await_out_room(thread)
        rounded = cute.make_rmem_tensor_like(fragments.acc_O, self.dtype)
        wgmma.round_to(self.dtype, fragments.acc_O, rounded)
        sO = shared.sO[None, None, thread.warpgroup]
        wgmma.store_accumulator(self.dtype, rounded, sO, thread.index)
        cute.arch.fence_view_async_shared()
        self._warpgroup_barrier(NamedBarrier.OUT, thread)
        if self._warp_in_warpgroup(thread) == 0:
            gO = operands.out.tokens.sequence(work.tile.head_idx, work.tile.batch_idx, work.span_q)
            row_block = work.tile.m_block * self.config.warpgroups + thread.warpgroup
            gO = cute.local_tile(gO, (WARPGROUP_ROWS, self.head_dim_v), (row_block, 0))
            tOsO, tOgO = _tma_partition(operands.out.atom, sO, gO)
            cute.copy(operands.out.atom, tOsO, tOgO)
            cute.arch.cp_async_bulk_commit_group()
            if const_expr(self.config.out_aliases_q):
                cute.arch.cp_async_bulk_wait_group(0, read=True)
                shared.q_ring.release(self._q_slot(q, thread.warpgroup))

    @cute.jit
    def _await_out_room(self, thread: Thread):
        """Wait until the last tile's store has read this warpgroup's staging memory, and its MMAs their Q."""
        self._finish_stores(thread)
        self._warpgroup_barrier(NamedBarrier.OUT, thread)

    @cute.jit
    def _finish_stores(self, thread: Thread):
        """Wait until the TMA stores have read shared memory; where they were not waited for at once."""
        if const_expr(not self.config.out_aliases_q):
            if self._warp_in_warpgroup(thread) == 0:
                cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def _store_lse(self, consumer: Consumer, lse: list):
        """One thread of the four that share a row writes it."""
        operands, _, thread, _, work, _, _ = consumer
        if thread.index % wgmma.THREADS_PER_ROW == 0:
            first, head, batch = work.span_q.first, work.tile.head_idx, work.tile.batch_idx
            if const_expr(self.problem.varlen):
                batch = 0
            q_idx = self._rows(consumer)
            for row in cutlass.range_constexpr(wgmma.ROWS_PER_THREAD):
                if q_idx[row] < work.span_q.length:
                    operands.lse[first + q_idx[row], head, batch] = lse[row]

    # ---- one tile's scores

    @cute.jit
    def _cast_vote(self, consumer: Consumer, k: Cursor, keeps):
        """Tell the producer whether this warpgroup keeps the tile; votes have as many slots as K, and K's cursor."""
        _, shared, thread, _, _, _, _ = consumer
        if const_expr(self.config.hold_v_after > 0):
            if thread.index == 0:
                shared.votes[thread.warpgroup, k.index] = Int32(keeps)
                shared.vote_ring.publish(k)

    def _accumulator(self, fragments: Fragments) -> cute.Tensor:
        return cute.make_rmem_tensor(fragments.qk.partition_shape_C((WARPGROUP_ROWS, self.tile_n)), Float32)

    def _first_row(self, consumer: Consumer):
        """The first query row of the warpgroup."""
        return consumer.work.tile.m_block * self.tile_m + consumer.thread.warpgroup * WARPGROUP_ROWS

    def _rows(self, consumer: Consumer) -> list:
        """This thread's query rows."""
        first = self._first_row(consumer) + wgmma.first_row(consumer.thread.index)
        return [first + wgmma.ROW_STEP * row for row in range(wgmma.ROWS_PER_THREAD)]

    @cute.jit
    def _score(self, consumer: Consumer, acc_S: cute.Tensor, n_block, may_hide: cutlass.Constexpr[bool]):
        """Softcap, and the mask where the warpgroup's rows do not see the whole tile.

        may_hide  False where no row can see a part of the tile only: without bounds, in all tiles but the last
        """
        tanh_scale = consumer.operands.scale.tanh_scale
        if const_expr(tanh_scale is not None):
            for i in cutlass.range(cute.size(acc_S), unroll_full=True):
                acc_S[i] = tanh(acc_S[i] * tanh_scale)
        if const_expr(may_hide):
            band = consumer.work.band
            whole = band.whole(self._first_row(consumer), WARPGROUP_ROWS)
            if n_block >= whole.end:
                self._hide(consumer, acc_S, n_block, "right")
            if const_expr(band.has_left):
                if n_block < whole.begin:
                    self._hide(consumer, acc_S, n_block, "left")

    def _hide(self, consumer: Consumer, acc_S: cute.Tensor, n_block, edge: str) -> None:
        scores = wgmma.by_rows(acc_S)
        columns = wgmma.columns_of(self.tile_n)
        first_column = n_block * self.tile_n + wgmma.first_column(consumer.thread.index)
        for row, q_idx in enumerate(self._rows(consumer)):
            consumer.work.band.hide(scores[row, None], columns, q_idx, first_column, edges=(edge,))

    def _sees_key(self, thread_max: list):
        """Per row, whether this thread sees a key; None where a row sees one in every tile behind its first."""
        return [~(value == -Float32.inf) for value in thread_max] if self.problem.mask == "band" else None

    def _rescale(self, acc_O: cute.Tensor, factors) -> None:
        rows = wgmma.by_rows(acc_O)
        for row in range(wgmma.ROWS_PER_THREAD):
            for i in range(cute.size(rows, mode=[1])):
                rows[row, i] = rows[row, i] * factors[row]

    # ---- counting

    @cute.jit
    def _record(self, consumer: Consumer, n_block, keeps):
        """One byte of the skip map per warpgroup and tile."""
        operands, _, thread, _, work, _, _ = consumer
        if const_expr(operands.stats is not None):
            first_row = self._first_row(consumer)
            if thread.index == 0 and first_row < work.span_q.length:
                decision = cutlass.select_(keeps, Int32(SKIP_MAP_KEPT), Int32(SKIP_MAP_SKIPPED))
                tile, group = work.tile, first_row // WARPGROUP_ROWS
                tile_of_keys = self._in_order(work, n_block)
                operands.stats.skip_map[tile.batch_idx, tile.head_idx, group, tile_of_keys] = cutlass.Uint8(decision)

    @cute.jit
    def _count(self, consumer: Consumer, kept):
        """Add this warpgroup's kept and visited tiles to its head's."""
        operands, _, thread, _, work, visited, _ = consumer
        tiles = cutlass.max(visited.end - visited.begin, 0)
        if thread.index == 0 and self._first_row(consumer) < work.span_q.length:
            counts = operands.stats.tile_counts
            for which, count in enumerate((kept, tiles)):
                offset = cute.crd2idx((which, work.tile.batch_idx, work.tile.head_idx), counts.layout)
                cute.arch.red(counts.iterator + offset, count, op="add", dtype="s32", sem="relaxed", scope="gpu")

    # ---- barriers

    def _warp_in_warpgroup(self, thread: Thread):
        return cute.arch.make_warp_uniform(thread.index // cute.arch.WARP_SIZE)

    def _warpgroup_barrier(self, name: NamedBarrier, thread: Thread) -> None:
        cute.arch.barrier(barrier_id=int(name) + thread.warpgroup, number_of_threads=WARPGROUP_THREADS)

    @cute.jit
    def _first_turn(self, thread: Thread):
        """Warpgroup 0 begins: it hands itself the turn."""
        if const_expr(self.config.ping_pong):
            if thread.warpgroup == 0:
                self._arrive_turn(thread.warpgroup)

    def _await_turn(self, thread: Thread) -> None:
        if self.config.ping_pong:
            barrier = int(NamedBarrier.TURN) + thread.warpgroup
            cute.arch.barrier(barrier_id=barrier, number_of_threads=2 * WARPGROUP_THREADS)

    def _pass_turn(self, thread: Thread) -> None:
        if self.config.ping_pong:
            following = thread.warpgroup + 1
            self._arrive_turn(cutlass.select_(following == self.config.warpgroups, Int32(0), following))

    def _arrive_turn(self, warpgroup_idx) -> None:
        barrier = int(NamedBarrier.TURN) + warpgroup_idx
        cute.arch.barrier_arrive(barrier_id=barrier, number_of_threads=2 * WARPGROUP_THREADS)


def tanh(x) -> Float32:
    """tanh(x) = 1 - 2 / (2^(2 x log2(e)) + 1), to about 1e-7; the hardware's own is good to 2^-11 only."""
    power = cute.math.exp2(x * (2.0 * LOG2_E), fastmath=True)
    return 1.0 - 2.0 * cute.arch.rcp_approx(power + 1.0)


def _tma_partition(atom: cute.CopyAtom, smem_tile: cute.Tensor, gmem_tile: cute.Tensor):
    """Shared and global memory as one TMA copy sees them: (copy[, stages]) and (copy[, tiles])."""
    whole = cute.make_layout(1)
    return cpasync.tma_partition(
        atom, 0, whole, cute.group_modes(smem_tile, 0, 2), cute.group_modes(gmem_tile, 0, 2)
    )


def _load(ring: Ring, slot: Cursor, tx_bytes: int, atom: cute.CopyAtom, source, target, n_block) -> None:
    ring.expect(slot, tx_bytes)
    cute.copy(atom, source[None, n_block], target[None, slot.index], tma_bar_ptr=ring.full(slot))


def compile(problem: Problem, config: Config | None = None):
    """Compile the host function of `HopperPrefill` for sm_90a: callable with the operands of PREFILL, then a stream.

    Raises ValueError for a config that needs more shared memory than an SM has, or visits the first tile early of a
    band, which has tiles at its left that not all rows see whole.
    """
    config = config or choose(problem)
    if config.first_early and problem.mask == "band":
        raise ValueError(f"{config.first_early=} is for the masks full and causal, not for {problem.mask=}")
    needed = shared_bytes(problem, config)
    if needed > SHARED_BYTES:
        raise ValueError(f"{config} needs {needed} bytes of shared memory for {problem}; a CTA has {SHARED_BYTES}")
    kernel = HopperPrefill(problem, config)
    element_types = {"q": DTYPES[problem.dtype], "k": DTYPES[problem.dtype], "v": DTYPES[problem.dtype]}
    element_types |= {"out": DTYPES[problem.dtype], "skip_map": cutlass.Uint8}
    element_types |= {name: Float32 for name in ("lse", "threshold", "learnable_sink")}
    placeholders = {"int32": Int32(1), "int64": Int64(1), "float32": Float32(1.0)}
    arguments = []
    for operand in PREFILL:
        if operand.type == "pointer":
            dtype = element_types.get(operand.name, Int32)
            align = TMA_ALIGN_BYTES if operand.name in ("q", "k", "v", "out") else dtype.width // 8
            arguments.append(make_ptr(dtype, 0, cute.AddressSpace.gmem, assumed_align=align))
        else:
            arguments.append(placeholders[operand.type])
    return cute.compile(kernel, *arguments, cuda.CUstream(0))
