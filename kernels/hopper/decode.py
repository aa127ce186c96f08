"""Attention of a few queries over a KV cache for sm_90a, in which V of a negligible KV tile is never read.

    out = softmax(softmax_scale * Q K^T + mask) V,   lse = ln(sum(exp(softmax_scale * Q K^T + mask)))

Q (batch, seqlen_q <= 16, heads_q, head_dim), K (batch, capacity, heads_kv, head_dim) or (pages, page_size, heads_kv,
head_dim), V (.., head_dim_v), out like Q with head_dim_v; lengths and page table are read on the device. The rows of
all query heads of a KV head are packed, row r = query * group + head, into blocks of 64, and a block walks its KV
tiles from the last visible one to the first. Work is split over the CTAs by tiles (`device/split.py`: stream-K, arXiv
2301.03598, or a given number of splits), and the splits' results are combined in the same launch
(`device/combine.py`). BLASST's rule (arXiv 2512.12087), within each split: a tile is skipped if in each of the block's
rows tile_max < row_max + ln(lambda).
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
    SHARED_ALIGN_BYTES,
    SHARED_BYTES,
    WARPGROUP_ROWS,
    WARPGROUP_THREADS,
    WARPGROUP_WARPS,
    padded,
)
from cute_sparse.kernels.hopper.decode_config import (
    Config,
    choose,
    k_bytes,
    shared_bytes,
    v_bytes,
)
from cute_sparse.kernels.hopper.prefill import DTYPES, tanh
from cutlass import Boolean, Float32, Int32, Int64, Uint32, const_expr
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.cute.runtime import make_ptr
from cutlass.memory import SmemAllocator

from cute_sparse.device.bundles import TMA_ALIGN_BYTES, Cache, Scale, decode_operands, log2_threshold
from cute_sparse.device.combine import PackedRows, Results, neighbours
from cute_sparse.device.events import span
from cute_sparse.device.mask import Band, KeyRange
from cute_sparse.device.pipes import Cursor, Ring, consumer_cursor, producer_cursor
from cute_sparse.device.softmax import OnlineSoftmax
from cute_sparse.device.split import WALK_WORDS, Segment, SplitPlan, Walk
from cute_sparse.operands import DECODE
from cute_sparse.problem import HEAD_DIM_MAX, HEAD_DIM_MULTIPLE, Problem, head_dim_feature

PAGE_SIZES = (16, 32, 64, 128, 256)
SUPPORTS = frozenset(
    {"dtype:bfloat16", "dtype:float16", "mask:full", "mask:causal", "mask:band"}
    | {"softcap", "sink", "sparsity:threshold", "share_max", "lse", "stats"}
    | {f"page_size:{size}" for size in PAGE_SIZES}
    | {head_dim_feature(d, d) for d in range(HEAD_DIM_MULTIPLE, HEAD_DIM_MAX + 1, HEAD_DIM_MULTIPLE)}
    | {head_dim_feature(192, 128)}
)

LOAD_K_WARP, LOAD_V_WARP, LOAD_Q_WARPS = 0, 1, (2, 3)  # of the first warpgroup
LOAD_Q_THREADS = 32 * len(LOAD_Q_WARPS)
WARP_ROWS = WARPGROUP_ROWS // WARPGROUP_WARPS
VECTOR = 8  # 16-bit elements that a thread moves at a time
SKIP_MAP_KEPT, SKIP_MAP_SKIPPED = 1, 2
END = -1  # in place of a tile: the scores of this segment are complete


class NamedBarrier(IntEnum):
    """Hardware barriers of the CTA."""

    START = 0  # shared memory is initialised, and `walk` says where the CTA begins
    VOTE = 1  # the score warpgroup's threads vote on a tile
    VALUE = 2  # the value warpgroup's threads have written to shared or global memory
    COMBINE = 3  # one of them tells all whether they are the last to arrive


@dataclass(frozen=True)
class TmaCache:
    """A TMA atom that loads a box of rows, and the coordinate view of K or V."""

    atom: cute.CopyAtom
    cache: Cache


@dataclass(frozen=True)
class KernelOperands:
    """The kernel's one argument."""

    q: Any  # (seqlen_q, head_dim, heads_q, batch)
    k: TmaCache
    v: TmaCache
    plan: SplitPlan
    results: Results
    seqlen_q: Any
    group: Any  # query heads per KV head
    scale: Scale
    threshold: Any
    stats: Any


class Shared(NamedTuple):
    """Shared memory: tiles, rings, and what travels with them."""

    sQ: cute.Tensor  # (64, head_dim, q_stages)
    sK: cute.Tensor  # (tile_n, head_dim, k_stages)
    sV: cute.Tensor  # (tile_n, head_dim_v, v_stages)
    sP: cute.Tensor  # (64, tile_n, p_stages)
    q_ring: Ring
    k_ring: Ring
    v_ring: Ring
    p_ring: Ring
    decision_ring: Ring
    walk: cute.Tensor  # (WALK_WORDS,): where the CTA begins
    decisions: cute.Tensor  # (k_stages,) int32: whether the tile is kept
    tiles: cute.Tensor  # (warps, p_stages) int32: 2 * KV tile + whether the warp's rows of O are to be rescaled; or END
    row_factor: cute.Tensor  # (64, p_stages): what to rescale O with; with END, the sum of p
    row_max: cute.Tensor  # (64, p_stages): with END, the reference of p in base-2 units


class Scorer(NamedTuple):
    """A thread of the score warpgroup at one segment."""

    operands: KernelOperands
    shared: Shared
    thread: Any
    segment: Segment
    rows: PackedRows
    band: Band
    softmax: OnlineSoftmax
    threshold_raw: Any  # per row; None in a dense kernel
    codes: Any  # (rows,) uint32, of the maxima that others have published; None unless they do
    has_rows: Any  # whether some row of the warp exists


class Values(NamedTuple):
    """The MMA of the value warpgroup."""

    pv: cute.TiledMma
    tOrP: cute.Tensor  # (MMA, M, K, stages): descriptors
    tOrV: cute.Tensor  # (MMA, N, K, stages): descriptors
    acc_O: cute.Tensor  # (MMA, M, N) fp32


class HopperDecode:
    """The kernel of one (problem, config).

    Roles
      load_k  warp 0: where the CTA begins; K tiles by TMA, as far ahead as the ring goes
      load_v  warp 1: V tiles by TMA; with a threshold, each once its tile is known to be kept, and else never
      load_q  warps 2, 3: the packed rows of Q, by 16-byte copies
      score   warpgroup 1: S = Q K^T, the decision, P. It never waits for V
      value   warpgroup 2: O += P V; at a segment's end the result, or the partial result and perhaps the combination

    Pipelines  (producer -> consumer: slots; what fills; what drains)
      q          load_q -> score: `q_stages`; one arrival of each loading warp; one of each score warp
      k          TMA -> score: `k_stages`; bytes of the tile; one arrival of each score warp
      decisions  score -> load_v: `k_stages`, at K's cursor; one arrival; one arrival (only with a threshold)
      p          score -> value: `p_stages`, kept tiles and the end of each segment; one arrival of each score warp;
                 one of each value warp
      v          TMA -> value: `v_stages`, kept tiles only; bytes of the tile; one arrival of each value warp

    Timeline, steady state, for KV tile j (j falls)
      load_k  K[j - k_stages + 1]
      score   wait for S[j]; issue S = Q K[j-1]^T; maxima; vote; p = 2^(..); P[j] to shared memory
      load_v  wait for the decision on j; load V[j] if it is kept
      value   wait for P[j] and V[j]; rescale O if a reference moved; O += P[j] V[j]

    A segment is the part of an item's tiles that a CTA computes at a stretch; loads run ahead across segments. Warps
    all of whose 16 rows are padding issue their part of each MMA and vote, and do no arithmetic.

    Memory that is not part of a sequence may hold anything. Scores of such keys are hidden; V's rows of such keys are
    set to zero in shared memory, since 0 * NaN is NaN, in the one or two tiles of a sequence that have any. Entries of
    the page table for pages without a visible key are not read: TMA is given a page that does not exist, and fills
    the box with zeros.

    Cost.  Instructions as PTX counts them, per tile of 64 keys and warp; head dim 128, up to 16 rows. Clocks as the
    emulator's time model has them for an H200; none was measured. A tile's 32 KB take 1781 of an SM's share of memory.

                   load_k  load_v  score (warp without rows)  value   clocks if memory were free, and not
      dense            36      37                  281 (113)     83                       741        1781
      nothing skipped  43      64                  325 (132)     83                       773        1781
      pages of 16     102     125                  317 (126)     83                       818        1781

    At nothing skipped a CTA takes 400 clocks more than the dense kernel, with pages 680, however many tiles it has: the
    seeds' scores, whose K other CTAs have brought to L2. Were it from memory, the seeds' K would take 1725 more.
    A skipped tile costs the scores about 270 clocks, and the memory 890 for its K. The first K is asked for some 1450
    clocks after a CTA's start, with pages 1900: a trip to global memory for the lengths, and one for the page table.

    Tried
      Decisions in a ring of their own, eight deep, with a cursor of its own: 13 instructions more per tile.
      Q through registers: a trip to global memory for each 16 bytes of a thread. load_q's part of a first segment of
      64 rows took 13700 clocks, with copies that are all under way at once 4500.
    """

    def __init__(self, problem: Problem, config: Config):
        self.problem = problem
        self.config = config
        self.dtype = DTYPES[problem.dtype]
        self.head_dim = padded(problem.head_dim)
        self.head_dim_v = padded(problem.head_dim_v)
        self.tile_n = config.tile_n
        self.sparse = problem.sparsity is not None
        self.box_rows = min(self.tile_n, problem.page_size or self.tile_n)  # rows that one TMA load moves
        self.boxes = self.tile_n // self.box_rows
        self.k_bytes = k_bytes(problem, self.tile_n)
        self.v_bytes = v_bytes(problem, self.tile_n)

    # ---- host side

    @cute.jit
    def __call__(self, *values):
        """Launch; `values` are the operands of `operands.DECODE` in order, then the stream."""
        *values, stream = values
        operands = decode_operands(self.problem, values)
        plan = SplitPlan(
            self.problem.mask,
            self.tile_n,
            self.config.min_tiles,
            self.sparse,
            operands.seqused_k,
            operands.capacity,
            operands.seqlen_q,
            operands.window_left,
            operands.window_right,
            operands.batch,
            operands.heads_kv,
            operands.row_blocks,
            operands.num_splits,
            operands.ctas,
        )
        bundle = KernelOperands(
            q=operands.q,
            k=self._load_atom(operands.k, self._k_layout()),
            v=self._load_atom(operands.v, self._v_layout()),
            plan=plan,
            results=Results.of(operands, self.problem.head_dim_v),
            seqlen_q=operands.seqlen_q,
            group=operands.heads_q // operands.heads_kv,
            scale=operands.scale,
            threshold=operands.threshold,
            stats=operands.stats,
        )
        self.kernel(bundle).launch(
            grid=(operands.ctas, 1, 1),
            block=(self.config.threads, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
        )

    def _load_atom(self, cache: Cache, smem_layout) -> TmaCache:
        """A copy of one box of (box_rows, columns), the shape of a part of a slot."""
        rows, columns, _ = (cute.size(smem_layout, mode=[mode]) for mode in range(3))
        box = cute.composition(smem_layout, cute.make_layout((self.box_rows, columns), stride=(1, rows)))
        op = cpasync.CopyBulkTensorTileG2SOp()
        atom, coordinates = cpasync.make_tiled_tma_atom(op, cache.tensor, box, (self.box_rows, columns))
        return TmaCache(atom, cache.viewed_as(coordinates))

    # ---- shared-memory layouts

    def _q_layout(self):
        return wgmma.row_major_smem(self.dtype, (WARPGROUP_ROWS, self.head_dim, self.config.q_stages))

    def _k_layout(self):
        return wgmma.row_major_smem(self.dtype, (self.tile_n, self.head_dim, self.config.k_stages))

    def _v_layout(self):
        return wgmma.row_major_smem(self.dtype, (self.tile_n, self.head_dim_v, self.config.v_stages))

    def _p_layout(self):
        return wgmma.row_major_smem(self.dtype, (WARPGROUP_ROWS, self.tile_n, self.config.p_stages))

    # ---- the kernel

    @cute.kernel
    def kernel(self, operands: KernelOperands):
        shared = self._allocate()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp < WARPGROUP_WARPS:
            cute.arch.setmaxregister_decrease(self.config.loader_registers)
            if warp == LOAD_K_WARP:
                self.load_k(operands, shared)
            elif warp == LOAD_V_WARP:
                self.load_v(operands, shared)
            else:
                self._await_start()
                self.load_q(operands, shared)
        else:
            cute.arch.setmaxregister_increase(self.config.worker_registers)
            self._clear(shared)
            self._await_start()
            if warp < 2 * WARPGROUP_WARPS:
                self.score(operands, shared)
            else:
                self.value(operands, shared)

    def _allocate(self) -> Shared:
        """Carve up shared memory."""
        config = self.config
        smem = SmemAllocator()

        def ring(stages: int, drains: int, fills: int = 1) -> Ring:
            return Ring(smem.allocate_array(Int64, 2 * stages), stages, drains, fills)

        def words(dtype, *shape: int) -> cute.Tensor:
            return smem.allocate_tensor(dtype, cute.make_layout(shape), byte_alignment=16)

        def tiles(layout) -> cute.Tensor:
            pointer = smem.allocate(cute.cosize(layout) * ELEMENT_BYTES, SHARED_ALIGN_BYTES)
            pointer = cute.recast_ptr(cute.recast_ptr(pointer, dtype=self.dtype), layout.inner, self.dtype)
            return cute.make_tensor(pointer, layout.outer)

        q_ring = ring(config.q_stages, drains=WARPGROUP_WARPS, fills=len(LOAD_Q_WARPS))
        k_ring = ring(config.k_stages, drains=WARPGROUP_WARPS)
        v_ring = ring(config.v_stages, drains=WARPGROUP_WARPS)
        p_ring = ring(config.p_stages, drains=WARPGROUP_WARPS, fills=WARPGROUP_WARPS)
        decision_ring = ring(config.k_stages, drains=1)
        return Shared(
            tiles(self._q_layout()),
            tiles(self._k_layout()),
            tiles(self._v_layout()),
            tiles(self._p_layout()),
            q_ring,
            k_ring,
            v_ring,
            p_ring,
            decision_ring,
            walk=words(Int32, WALK_WORDS),
            decisions=words(Int32, config.k_stages),
            tiles=words(Int32, WARPGROUP_WARPS, config.p_stages),
            row_factor=words(Float32, WARPGROUP_ROWS, config.p_stages),
            row_max=words(Float32, WARPGROUP_ROWS, config.p_stages),
        )

    # ---- the start: K is asked for as soon as it is known which, and the others wait for that

    @cute.jit
    def _begin(self, operands: KernelOperands, shared: Shared):
        """By load_k: find where the CTA begins, tell the others, and wait for none of them."""
        self._initialise(operands.k, (shared.k_ring,))
        walk = operands.plan.locate(shared.walk)
        cute.arch.barrier_arrive(barrier_id=int(NamedBarrier.START), number_of_threads=self.config.threads)
        return self._uniform(walk)

    def _initialise(self, tma: TmaCache, rings: tuple) -> None:
        """By one warp."""
        cpasync.prefetch_descriptor(tma.atom)
        with cute.arch.elect_one():
            for ring in rings:
                ring.initialise()
        cute.arch.mbarrier_init_fence()

    def _await_start(self) -> None:
        cute.arch.barrier(barrier_id=int(NamedBarrier.START), number_of_threads=self.config.threads)

    @cute.jit
    def _clear(self, shared: Shared):
        """By both workers: rows of Q and P that nobody ever writes are multiplied, too, and their sums read.

        No MMA follows but behind the fence.proxy.async of load_q, or of a score warp that has written P: either comes
        behind the barrier of all threads that comes behind these writes, and so covers them.
        """
        thread, _, _ = cute.arch.thread_idx()
        thread, threads = thread - WARPGROUP_THREADS, 2 * WARPGROUP_THREADS
        self._clear_tiles(shared.sQ, thread, threads)
        self._clear_tiles(shared.sP, thread, threads)
        if thread < WARPGROUP_ROWS:
            for stage in cutlass.range_constexpr(self.config.p_stages):
                shared.row_factor[thread, stage] = Float32(0.0)
                shared.row_max[thread, stage] = Float32(0.0)

    def _clear_tiles(self, tiles: cute.Tensor, thread, threads: int) -> None:
        """All of it, in whatever order: zeros look alike."""
        flat = cute.make_tensor(tiles.iterator, cute.make_layout(cute.size(tiles)))
        zeros = cute.make_rmem_tensor(VECTOR, self.dtype)
        zeros.fill(0.0)
        for first in range(0, cute.size(tiles) // VECTOR, threads):
            cute.autovec_copy(zeros, cute.local_tile(flat, (VECTOR,), (first + thread,)))

    def _first(self, operands: KernelOperands, shared: Shared) -> Walk:
        return self._uniform(operands.plan.first(shared.walk))

    def _uniform(self, walk: Walk) -> Walk:
        return Walk(*(cute.arch.make_warp_uniform(word) for word in walk))

    def _keys(self, band: Band) -> KeyRange:
        """The keys that some query of the sequence sees."""
        return KeyRange(band.keys(0).begin, band.keys(band.seqlen_q - 1).end)

    # ---- load

    def load_k(self, operands: KernelOperands, shared: Shared) -> None:
        walk = self._begin(operands, shared)
        self._load(operands, shared, walk, operands.k, shared.sK, shared.k_ring, self.k_bytes, "load K", False)

    def load_v(self, operands: KernelOperands, shared: Shared) -> None:
        self._initialise(operands.v, (shared.q_ring, shared.v_ring, shared.p_ring, shared.decision_ring))
        self._await_start()
        walk = self._first(operands, shared)
        self._load(operands, shared, walk, operands.v, shared.sV, shared.v_ring, self.v_bytes, "load V", self.sparse)

    @cute.jit
    def _load(
        self,
        operands: KernelOperands,
        shared: Shared,
        walk: Walk,
        tma: TmaCache,
        tiles: cute.Tensor,
        ring: Ring,
        tile_bytes: cutlass.Constexpr[int],
        name: cutlass.Constexpr[str],
        awaits_decision: cutlass.Constexpr[bool],
    ):
        """K or V of every tile that is looked at; or, once it is decided, of those that are kept."""
        plan = operands.plan
        slot, decision = producer_cursor(), consumer_cursor()
        target = self._in_boxes(tiles)
        while plan.more(walk):
            segment = plan.segment(walk)
            keys = self._keys(plan.band(segment.seqlen_k))
            blocks = self._blocks(tma.cache, segment, keys, plan.n_block(segment, Int32(0)))
            for look in cutlass.range(plan.looks(segment), unroll=1):
                following = self._blocks(tma.cache, segment, keys, plan.n_block(segment, look + 1))
                wanted = Boolean(True)
                if const_expr(awaits_decision):
                    with span("await decision"):
                        wanted = self._is_kept(shared, decision)
                    decision = shared.decision_ring.advanced(decision)
                if wanted:
                    with span(name):
                        ring.acquire(slot)
                        ring.expect(slot, tile_bytes)
                        n_block = plan.n_block(segment, look)
                        self._load_tile(tma, target, ring, slot, segment, n_block, blocks)
                    slot = ring.advanced(slot)
                blocks = following
            walk = plan.next(walk)

    @cute.jit
    def _is_kept(self, shared: Shared, decision: Cursor):
        shared.decision_ring.wait(decision)
        kept = cute.arch.make_warp_uniform(shared.decisions[decision.index])
        cute.arch.sync_warp()
        shared.decision_ring.release(decision)
        return kept != 0

    @cute.jit
    def load_q(self, operands: KernelOperands, shared: Shared):
        plan = operands.plan
        q = producer_cursor()
        thread, _, _ = cute.arch.thread_idx()
        thread = thread - LOAD_Q_WARPS[0] * cute.arch.WARP_SIZE
        walk = self._first(operands, shared)
        while plan.more(walk):
            segment = plan.segment(walk)
            if plan.tiles(segment) > 0:
                rows = self._rows(operands, segment)
                shared.q_ring.acquire(q)
                self._load_rows(operands, shared.sQ[None, None, q.index], rows, thread)
                cute.arch.fence_view_async_shared()
                cute.arch.sync_warp()
                if cute.arch.lane_idx() == 0:
                    shared.q_ring.publish(q)
                q = shared.q_ring.advanced(q)
            walk = plan.next(walk)

    @cute.jit
    def _load_rows(self, operands: KernelOperands, sQ: cute.Tensor, rows: PackedRows, thread):
        """One block of packed rows, all at once, and zeros in the other rows of the last warp that has some.

        Columns that do not exist are still as `_clear` left them.
        """
        atom = cute.make_copy_atom(cpasync.CopyG2SOp(), self.dtype, num_bits_per_copy=VECTOR * self.dtype.width)
        zeros = cute.make_rmem_tensor(VECTOR, self.dtype)
        zeros.fill(0.0)
        per_row = self.problem.head_dim // VECTOR
        warps = (rows.count + (WARP_ROWS - 1)) // WARP_ROWS
        for i in cutlass.range(thread, warps * (WARP_ROWS * per_row), LOAD_Q_THREADS, unroll=1):
            row, column = i // per_row, i % per_row
            target = _vector(sQ, row, column)
            if row < rows.count:
                coordinate = (rows.query(row), VECTOR * column, rows.head(row), rows.batch_idx)
                source = operands.q.iterator + cute.crd2idx(coordinate, operands.q.layout)
                cute.copy(atom, neighbours(source, VECTOR), target)
            else:
                cute.autovec_copy(zeros, target)
        cute.arch.cp_async_commit_group()
        cute.arch.cp_async_wait_group(0)

    def _in_boxes(self, tiles: cute.Tensor) -> cute.Tensor:
        """View (rows, columns, stages) as (box_rows, columns, boxes, stages)."""
        rows, columns, stages = tiles.shape
        rows, columns, stages = cute.size(rows), cute.size(columns), cute.size(stages)
        shape = (self.box_rows, columns, self.boxes, stages)
        return cute.composition(tiles, cute.make_layout(shape, stride=(1, rows, self.box_rows, rows * columns)))

    @cute.jit
    def _blocks(self, cache: Cache, segment: Segment, keys: KeyRange, n_block):
        """In lane i, the block that holds box i of a KV tile; one that does not exist where no key is visible."""
        block = segment.batch_idx
        if const_expr(self.problem.page_size > 0):
            page_size = self.problem.page_size
            box = cute.arch.lane_idx() % self.boxes
            page = (n_block * self.tile_n + box * self.box_rows) // page_size
            block = cache.blocks
            if n_block >= 0 and page * page_size < keys.end and (page + 1) * page_size > keys.begin:
                block = cache.page_table[page, segment.batch_idx]
        return block

    @cute.jit
    def _load_tile(self, tma: TmaCache, target, ring: Ring, slot: Cursor, segment: Segment, n_block, blocks):
        """Issue the loads of one KV tile, box by box."""
        for box in cutlass.range_constexpr(self.boxes):
            block, row = blocks, n_block
            if const_expr(self.problem.page_size > 0):
                block = cute.arch.shuffle_sync(blocks, box)
                row = n_block % max(self.problem.page_size // self.box_rows, 1)
            tokens = tma.cache.tensor[None, None, segment.kv_head, block]
            tokens = cute.local_tile(tokens, (self.box_rows, cute.size(target, mode=[1])), (row, 0))
            smem_box, gmem_box = cpasync.tma_partition(
                tma.atom,
                0,
                cute.make_layout(1),
                cute.group_modes(target[None, None, box, slot.index], 0, 2),
                cute.group_modes(tokens, 0, 2),
            )
            cute.copy(tma.atom, gmem_box, smem_box, tma_bar_ptr=ring.full(slot))

    # ---- score

    @cute.jit
    def score(self, operands: KernelOperands, shared: Shared):
        """S, the decision and P, for every tile of every segment."""
        plan = operands.plan
        thread, _, _ = cute.arch.thread_idx()
        thread = thread % WARPGROUP_THREADS
        qk = wgmma.qk_mma(self.dtype, self.tile_n)
        tSrQ = qk.make_fragment_A(qk.get_slice(0).partition_A(shared.sQ))  # (MMA, M, K, stages)
        tSrK = qk.make_fragment_B(qk.get_slice(0).partition_B(shared.sK))  # (MMA, N, K, stages)
        q, k, p = consumer_cursor(), consumer_cursor(), producer_cursor()
        walk = self._first(operands, shared)
        while plan.more(walk):
            segment = plan.segment(walk)
            if segment.end > segment.begin:
                scorer = self._scorer(operands, shared, thread, segment)
                kept = Int32(0)
                if plan.tiles(segment) > 0:
                    shared.q_ring.wait(q)
                    k, p, kept = self._walk(scorer, qk, tSrQ[None, None, None, q.index], tSrK, k, p)
                    shared.q_ring.release(q)
                    q = shared.q_ring.advanced(q)
                p = self._end(scorer, p)
                if const_expr(operands.stats is not None):
                    self._count(scorer, kept)
            walk = plan.next(walk)

    def _scorer(self, operands: KernelOperands, shared: Shared, thread, segment: Segment) -> Scorer:
        rows = self._rows(operands, segment)
        in_block = self._rows_of(thread)
        softmax = OnlineSoftmax.create(
            operands.scale.scale_log2, wgmma.ROWS_PER_THREAD, wgmma.THREADS_PER_ROW, self.sparse
        )
        threshold_raw = None
        if self.sparse:
            per_log2 = cute.arch.rcp_approx(operands.scale.scale_log2)
            heads = [rows.head(cutlass.min(row, rows.count - 1)) for row in in_block]
            threshold_raw = [log2_threshold(operands.threshold, rows.batch_idx, head) * per_log2 for head in heads]
        softmax.begin(threshold_raw, [row < rows.count for row in in_block])
        band = operands.plan.band(segment.seqlen_k)
        has_rows = self._first_row_of_warp(thread) < rows.count
        codes = cute.make_rmem_tensor(wgmma.ROWS_PER_THREAD, Uint32) if self.problem.share_max else None
        return Scorer(operands, shared, thread, segment, rows, band, softmax, threshold_raw, codes, has_rows)

    def _rows(self, operands: KernelOperands, segment: Segment) -> PackedRows:
        return PackedRows.of(segment, operands.seqlen_q, operands.group, WARPGROUP_ROWS)

    def _rows_of(self, thread) -> list:
        """A thread's rows, in the block."""
        first = wgmma.first_row(thread)
        return [first + wgmma.ROW_STEP * row for row in range(wgmma.ROWS_PER_THREAD)]

    def _first_row_of_warp(self, thread):
        return self._warp(thread) * WARP_ROWS

    @cute.jit
    def _walk(self, scorer: Scorer, qk: cute.TiledMma, tSrQ, tSrK, k: Cursor, p: Cursor):
        """Every tile of a segment; S of the next one is issued before this one's softmax."""
        shared, segment, plan = scorer.shared, scorer.segment, scorer.operands.plan
        scores = self._accumulator(qk)
        if const_expr(self.sparse):
            k = self._seed(scorer, qk, scores, tSrQ, tSrK, k)
        last = plan.looks(segment) - 1
        kept = Int32(0)
        self._read_published(scorer)
        shared.k_ring.wait(k)
        wgmma.issue(qk, scores, tSrQ, tSrK[None, None, None, k.index], False)
        warpgroup.wait_group(0)
        for look in cutlass.range(segment.seeds, last, unroll=1):
            shared.k_ring.release(k)
            decided = k
            k = shared.k_ring.advanced(k)
            shared.k_ring.wait(k)
            following = self._accumulator(qk)
            wgmma.issue(qk, following, tSrQ, tSrK[None, None, None, k.index], False)
            with span("softmax"):
                keeps, p = self._tile(scorer, scores, plan.n_block(segment, look), look == 0, decided, p)
            kept += Int32(keeps)
            with span("await S"):
                self._read_published(scorer)
                warpgroup.wait_group(0)
            # A copy, because a loop cannot carry registers that an MMA is still writing.
            scores.store(following.load())
        shared.k_ring.release(k)
        keeps, p = self._tile(scorer, scores, plan.n_block(segment, last), last == 0, k, p)
        return shared.k_ring.advanced(k), p, kept + Int32(keeps)

    @cute.jit
    def _seed(self, scorer: Scorer, qk: cute.TiledMma, scores: cute.Tensor, tSrQ, tSrK, k: Cursor):
        """Begin with the maxima of the segment's seeds; for the V loader they are tiles that are not kept."""
        shared, segment, softmax = scorer.shared, scorer.segment, scorer.softmax
        for look in cutlass.range(segment.seeds, unroll=1):
            shared.k_ring.wait(k)
            wgmma.issue(qk, scores, tSrQ, tSrK[None, None, None, k.index], False)
            warpgroup.wait_group(0)
            shared.k_ring.release(k)
            if scorer.has_rows:
                self._cap_and_hide(scorer, scores, scorer.operands.plan.n_block(segment, look))
                softmax.seed(softmax.thread_max(wgmma.by_rows(scores)), scorer.threshold_raw)
            self._publish_decision(scorer, k, Boolean(False))
            k = shared.k_ring.advanced(k)
        return k

    def _accumulator(self, qk: cute.TiledMma) -> cute.Tensor:
        return cute.make_rmem_tensor(qk.partition_shape_C((WARPGROUP_ROWS, self.tile_n)), Float32)

    @cute.jit
    def _tile(self, scorer: Scorer, acc_S: cute.Tensor, n_block, is_first, k: Cursor, p: Cursor):
        """From S to the decision, and for a kept tile to P. `k` is the tile's slot. Returns whether it is kept."""
        operands, shared, softmax = scorer.operands, scorer.shared, scorer.softmax
        scores = wgmma.by_rows(acc_S)
        maxima = cute.make_rmem_tensor(wgmma.ROWS_PER_THREAD, Float32)
        maxima.fill(-Float32.inf)
        wants = Boolean(False)
        if scorer.has_rows:
            self._cap_and_hide(scorer, acc_S, n_block)
            for row, value in enumerate(softmax.thread_max(scores)):
                maxima[row] = value
            if const_expr(self.sparse):
                wants = self._wants(scorer, maxima, n_block, is_first)
        keeps = Boolean(True)
        if const_expr(self.sparse):
            keeps = wgmma.any_of_warpgroup(wants, int(NamedBarrier.VOTE))
            self._publish_decision(scorer, k, keeps)
        if const_expr(operands.stats is not None):
            self._record(scorer, n_block, keeps)
        if keeps:
            shared.p_ring.acquire(p)
            moved = Boolean(False)
            if scorer.has_rows:
                moved = self._probabilities(scorer, acc_S, maxima, p)
            self._publish_tile(scorer, p, 2 * n_block + Int32(moved))
            p = shared.p_ring.advanced(p)
        return keeps, p

    @cute.jit
    def _probabilities(self, scorer: Scorer, acc_S: cute.Tensor, maxima: cute.Tensor, p: Cursor):
        """P of a warp's rows to shared memory, and the factors for O if a reference moved; returns whether one did."""
        shared, softmax = scorer.shared, scorer.softmax
        thread_max = [maxima[row] for row in range(wgmma.ROWS_PER_THREAD)]
        moved, factors = softmax.advance(wgmma.by_rows(acc_S), thread_max, scorer.threshold_raw)
        if moved:
            self._to_rows(scorer, shared.row_factor, p, [factors[row] for row in range(wgmma.ROWS_PER_THREAD)])
        rounded = cute.make_rmem_tensor_like(acc_S, self.dtype)
        wgmma.round_to(self.dtype, acc_S, rounded)
        wgmma.store_accumulator(self.dtype, rounded, shared.sP[None, None, p.index], scorer.thread)
        cute.arch.fence_view_async_shared()
        if const_expr(scorer.operands.results.shared_max is not None):
            self._publish_max(scorer)
        return moved

    @cute.jit
    def _publish_tile(self, scorer: Scorer, p: Cursor, tile):
        """One warp's part of a P slot is complete."""
        shared = scorer.shared
        cute.arch.sync_warp()
        if cute.arch.lane_idx() == 0:
            shared.tiles[self._warp(scorer.thread), p.index] = tile
            shared.p_ring.publish(p)

    @cute.jit
    def _publish_decision(self, scorer: Scorer, k: Cursor, keeps):
        """Decisions have as many slots as K, and K's cursor; a consumer's wait for K is a producer's for them."""
        shared = scorer.shared
        if scorer.thread == 0:
            shared.decision_ring.acquire(Cursor(k.index, k.phase ^ 1))
            shared.decisions[k.index] = Int32(keeps)
            shared.decision_ring.publish(k)

    @cute.jit
    def _end(self, scorer: Scorer, p: Cursor):
        """The message that ends a segment: what its rows add up to."""
        shared = scorer.shared
        shared.p_ring.acquire(p)
        if scorer.has_rows:
            references, sums = scorer.softmax.totals()
            self._to_rows(scorer, shared.row_factor, p, sums)
            self._to_rows(scorer, shared.row_max, p, references)
        self._publish_tile(scorer, p, Int32(END))
        return shared.p_ring.advanced(p)

    @cute.jit
    def _to_rows(self, scorer: Scorer, words: cute.Tensor, p: Cursor, values: list):
        """One thread of the four that share a row writes its value."""
        if scorer.thread % wgmma.THREADS_PER_ROW == 0:
            rows = self._rows_of(scorer.thread)
            for i in cutlass.range_constexpr(wgmma.ROWS_PER_THREAD):
                words[rows[i], p.index] = values[i]

    def _warp(self, thread):
        return cute.arch.make_warp_uniform(thread // cute.arch.WARP_SIZE)

    # ---- one tile's scores

    @cute.jit
    def _cap_and_hide(self, scorer: Scorer, acc_S: cute.Tensor, n_block):
        """Softcap, and the mask where the warp's rows do not see the whole tile."""
        tanh_scale = scorer.operands.scale.tanh_scale
        if const_expr(tanh_scale is not None):
            for i in cutlass.range(cute.size(acc_S), unroll_full=True):
                acc_S[i] = tanh(acc_S[i] * tanh_scale)
        rows, band = scorer.rows, scorer.band
        first = rows.query(0)
        whole = band.whole(first, rows.query(rows.count - 1) + 1 - first)
        if n_block < whole.begin or n_block >= whole.end:
            self._hide(scorer, acc_S, n_block)

    def _hide(self, scorer: Scorer, acc_S: cute.Tensor, n_block) -> None:
        scores = wgmma.by_rows(acc_S)
        columns = wgmma.columns_of(self.tile_n)
        first_column = n_block * self.tile_n + wgmma.first_column(scorer.thread)
        for i, row in enumerate(self._rows_of(scorer.thread)):
            scorer.band.hide(scores[i, None], columns, scorer.rows.query(row), first_column)

    @cute.jit
    def _wants(self, scorer: Scorer, maxima: cute.Tensor, n_block, is_first):
        """Whether this thread keeps the tile; the first of a split is kept unless others have published a maximum."""
        softmax = scorer.softmax
        force = is_first
        if const_expr(scorer.operands.results.shared_max is not None):
            force = self._see_published(scorer, is_first)
        thread_max = [maxima[row] for row in range(wgmma.ROWS_PER_THREAD)]
        return force | softmax.wants(thread_max, self._sees_key(scorer, n_block))

    def _sees_key(self, scorer: Scorer, n_block):
        """Per row, whether it sees a key of the tile; None where each does, or says so by -inf."""
        if const_expr(self.problem.mask != "band"):
            return None
        seen = [scorer.band.keys(scorer.rows.query(row)) for row in self._rows_of(scorer.thread)]
        first_key = n_block * self.tile_n
        return [(keys.begin < first_key + self.tile_n) & (keys.end > first_key) for keys in seen]

    # ---- maxima that splits share

    @cute.jit
    def _read_published(self, scorer: Scorer):
        """What the splits of this item have published for the thread's rows, so far or a little earlier."""
        shared_max, segment, codes = scorer.operands.results.shared_max, scorer.segment, scorer.codes
        if const_expr(shared_max is not None):
            rows = self._rows_of(scorer.thread)
            for i in cutlass.range_constexpr(wgmma.ROWS_PER_THREAD):
                codes[i] = Uint32(0)
                if rows[i] < scorer.rows.count and segment.splits > 1:
                    codes[i] = shared_max.code(segment.item, rows[i])

    @cute.jit
    def _see_published(self, scorer: Scorer, is_first):
        """Test against published maxima, too. Returns whether a split's first tile is to be kept: without any."""
        softmax, shared_max, codes = scorer.softmax, scorer.operands.results.shared_max, scorer.codes
        rows = self._rows_of(scorer.thread)
        force = Boolean(False)
        for i in cutlass.range_constexpr(wgmma.ROWS_PER_THREAD):
            force = force | (is_first & (codes[i] == 0) & (rows[i] < scorer.rows.count))
            if codes[i] != 0:
                softmax.see(i, shared_max.value(codes[i]), scorer.threshold_raw)
        return force

    @cute.jit
    def _publish_max(self, scorer: Scorer):
        """One thread of the four that share a row publishes its maximum, if that is larger than what was."""
        softmax, shared_max = scorer.softmax, scorer.operands.results.shared_max
        segment, codes, rows = scorer.segment, scorer.codes, self._rows_of(scorer.thread)
        if segment.splits > 1 and scorer.thread % wgmma.THREADS_PER_ROW == 0:
            for i in cutlass.range_constexpr(wgmma.ROWS_PER_THREAD):
                news = (codes[i] == 0) | ~(softmax.row_max[i] <= shared_max.value(codes[i]))
                if rows[i] < scorer.rows.count and news and softmax.has_seen_key(i):
                    shared_max.publish(segment.item, rows[i], softmax.row_max[i])

    # ---- value

    @cute.jit
    def value(self, operands: KernelOperands, shared: Shared):
        """O += P V for every kept tile, and what becomes of O at the end of a segment."""
        plan = operands.plan
        thread, _, _ = cute.arch.thread_idx()
        thread = thread % WARPGROUP_THREADS
        values = self._values(shared)
        p, v = consumer_cursor(), consumer_cursor()
        walk = self._first(operands, shared)
        while plan.more(walk):
            segment = plan.segment(walk)
            if segment.end > segment.begin:
                keys = self._keys(plan.band(segment.seqlen_k))
                values.acc_O.fill(0.0)
                tile = self._message(shared, thread, p)
                while tile != END:
                    with span("P V"):
                        v = self._accumulate(shared, values, thread, keys, tile, p, v)
                    p = shared.p_ring.advanced(p)
                    tile = self._message(shared, thread, p)
                with span("store"):
                    self._finish(operands, shared, values.acc_O, thread, segment, p)
                p = shared.p_ring.advanced(p)
            walk = plan.next(walk)

    def _values(self, shared: Shared) -> Values:
        pv = wgmma.pv_mma_of_shared(self.dtype, self.head_dim_v)
        pv_slice = pv.get_slice(0)
        sVt = wgmma.transposed(shared.sV)  # (head_dim_v, tile_n, stages)
        return Values(
            pv,
            tOrP=pv.make_fragment_A(pv_slice.partition_A(shared.sP)),
            tOrV=pv.make_fragment_B(pv_slice.partition_B(sVt)),
            acc_O=cute.make_rmem_tensor(pv.partition_shape_C((WARPGROUP_ROWS, self.head_dim_v)), Float32),
        )

    @cute.jit
    def _message(self, shared: Shared, thread, p: Cursor):
        shared.p_ring.wait(p)
        return cute.arch.make_warp_uniform(shared.tiles[self._warp(thread), p.index])

    @cute.jit
    def _accumulate(self, shared: Shared, values: Values, thread, keys: KeyRange, tile, p: Cursor, v: Cursor):
        """One kept tile. `tile` is 2 * KV tile + whether this warp's rows are to be rescaled."""
        acc_O = values.acc_O
        if tile % 2 == 1:
            self._rescale(acc_O, [shared.row_factor[row, p.index] for row in self._rows_of(thread)])
        shared.v_ring.wait(v)
        self._clear_unseen(shared, thread, keys, tile // 2, v)
        tOrP, tOrV = values.tOrP[None, None, None, p.index], values.tOrV[None, None, None, v.index]
        wgmma.issue(values.pv, acc_O, tOrP, tOrV, True)
        warpgroup.wait_group(0)
        cute.arch.sync_warp()
        shared.v_ring.release(v)
        shared.p_ring.release(p)
        return shared.v_ring.advanced(v)

    def _rescale(self, acc_O: cute.Tensor, factors: list) -> None:
        rows = wgmma.by_rows(acc_O)
        for row in range(wgmma.ROWS_PER_THREAD):
            for i in range(cute.size(rows, mode=[1])):
                rows[row, i] = rows[row, i] * factors[row]

    @cute.jit
    def _clear_unseen(self, shared: Shared, thread, keys: KeyRange, n_block, v: Cursor):
        """V's rows of keys that no query sees become zero: they may hold NaN."""
        first_key = n_block * self.tile_n
        if first_key < keys.begin or first_key + self.tile_n > keys.end:
            per_row = self.head_dim_v // VECTOR
            zeros = cute.make_rmem_tensor(VECTOR, self.dtype)
            zeros.fill(0.0)
            for i in cutlass.range(thread, self.tile_n * per_row, WARPGROUP_THREADS, unroll=1):
                key = first_key + i // per_row
                if key < keys.begin or key >= keys.end:
                    cute.autovec_copy(zeros, _vector(shared.sV[None, None, v.index], i // per_row, i % per_row))
            cute.arch.fence_view_async_shared()
            self._value_barrier()

    def _value_barrier(self) -> None:
        cute.arch.barrier(barrier_id=int(NamedBarrier.VALUE), number_of_threads=WARPGROUP_THREADS)

    @cute.jit
    def _finish(
        self, operands: KernelOperands, shared: Shared, acc_O: cute.Tensor, thread, segment: Segment, p: Cursor
    ):
        """Write the result of an item's only split, or leave a partial one; the last of a group combines it."""
        results = operands.results
        block = self._rows(operands, segment)
        row_sums = [shared.row_factor[row, p.index] for row in self._rows_of(thread)]
        row_maxima = [shared.row_max[row, p.index] for row in self._rows_of(thread)]
        cute.arch.sync_warp()
        shared.p_ring.release(p)
        if segment.splits == 1:
            self._write(results, block, acc_O, thread, row_sums, row_maxima)
        else:
            self._leave(results, block, acc_O, thread, segment, row_sums, row_maxima)
            group, is_done = results.group(segment, block), Boolean(False)
            while not is_done:
                self._value_barrier()
                is_last = Boolean(False)
                if thread == 0:
                    is_last = results.arrive(segment, group)
                is_last = wgmma.any_of_warpgroup(is_last, int(NamedBarrier.COMBINE))
                if is_last:
                    results.combine(segment, block, group, thread, WARPGROUP_THREADS)
                is_done = group.is_all | ~is_last
                group = group.next()

    @cute.jit
    def _write(self, results: Results, block: PackedRows, acc_O: cute.Tensor, thread, row_sums: list, row_maxima: list):
        rows = self._rows_of(thread)
        for i in cutlass.range_constexpr(wgmma.ROWS_PER_THREAD):
            inverse, lse = results.normaliser(block, rows[i], row_maxima[i], row_sums[i])
            results.write_row(block, rows[i], wgmma.first_column(thread), 8, _pairs(acc_O, i), inverse)
            if thread % wgmma.THREADS_PER_ROW == 0:
                results.write_lse(block, rows[i], lse)

    @cute.jit
    def _leave(
        self, results: Results, block: PackedRows, acc_O: cute.Tensor, thread, segment, row_sums: list, row_maxima: list
    ):
        rows = self._rows_of(thread)
        slot = segment.slot(segment.split)
        for i in cutlass.range_constexpr(wgmma.ROWS_PER_THREAD):
            results.leave_row(slot, block, rows[i], wgmma.first_column(thread), 8, _pairs(acc_O, i))
            if thread % wgmma.THREADS_PER_ROW == 0:
                results.leave_sum(slot, block, rows[i], row_maxima[i], row_sums[i])

    # ---- counting

    @cute.jit
    def _record(self, scorer: Scorer, n_block, keeps):
        """One byte of the skip map per block of rows and tile."""
        segment = scorer.segment
        if scorer.thread == 0:
            decision = cutlass.select_(keeps, Int32(SKIP_MAP_KEPT), Int32(SKIP_MAP_SKIPPED))
            skip_map = scorer.operands.stats.skip_map
            skip_map[segment.batch_idx, segment.kv_head, segment.row_block, n_block] = cutlass.Uint8(decision)

    @cute.jit
    def _count(self, scorer: Scorer, kept):
        """Add this segment's kept and visited tiles to its KV head's."""
        segment = scorer.segment
        if scorer.thread == 0:
            counts = scorer.operands.stats.tile_counts
            for which, count in enumerate((kept, scorer.operands.plan.tiles(segment))):
                offset = cute.crd2idx((which, segment.batch_idx, segment.kv_head), counts.layout)
                cute.arch.red(counts.iterator + offset, count, op="add", dtype="s32", sem="relaxed", scope="gpu")


def _vector(tile: cute.Tensor, row, vector) -> cute.Tensor:
    """`VECTOR` neighbouring elements of a row of a tile in shared memory."""
    return cute.local_tile(tile, (1, VECTOR), (row, vector))[0, None]


def _pairs(acc: cute.Tensor, row: int) -> cute.Tensor:
    """A thread's columns of one of its rows as (2, N / 8): neighbours, of each eight."""
    columns = wgmma.by_rows(acc)[row, None]
    return cute.make_tensor(columns.iterator, cute.make_layout(columns.shape[0], stride=columns.stride[0]))


def compile(problem: Problem, config: Config | None = None):
    """Compile the host function of `HopperDecode` for sm_90a: callable with the operands of DECODE, then a stream.

    Raises ValueError for a config that needs more shared memory than an SM has.
    """
    config = config or choose(problem)
    needed = shared_bytes(problem, config)
    if needed > SHARED_BYTES:
        raise ValueError(f"{config} needs {needed} bytes of shared memory for {problem}; a CTA has {SHARED_BYTES}")
    kernel = HopperDecode(problem, config)
    element_types = {name: DTYPES[problem.dtype] for name in ("q", "k", "v", "out")}
    element_types |= {name: Float32 for name in ("lse", "threshold", "learnable_sink", "partials")}
    element_types |= {"skip_map": cutlass.Uint8, "shared_max": cutlass.Uint32}
    placeholders = {"int32": Int32(1), "int64": Int64(1), "float32": Float32(1.0)}
    arguments = []
    for operand in DECODE:
        if operand.type == "pointer":
            dtype = element_types.get(operand.name, Int32)
            align = TMA_ALIGN_BYTES if operand.name in ("q", "k", "v", "out", "partials") else dtype.width // 8
            arguments.append(make_ptr(dtype, 0, cute.AddressSpace.gmem, assumed_align=align))
        else:
            arguments.append(placeholders[operand.type])
    return cute.compile(kernel, *arguments, cuda.CUstream(0))
