"""Decode attention on Blackwell: out = softmax(mask(scale * Q K^T)) V for 1 to 16 queries a sequence and a long cache.

q (batch, seqlen_q, heads_q, head_dim), caches (batch, capacity, heads_kv, head_dim[_v]) or pages of them, lengths in
seqused_k. All queries of all heads of one KV head are packed into the rows of one tile (`PackedRows`), K streams past
it from the last key to the first, and of V only those tiles are fetched whose keys some row wants: a KV tile whose
scores all lie ln(lambda) below the rows' running maxima is skipped. The tiles of all sequences are cut evenly among
the CTAs (`SplitPlan`), whose partial results are combined in the same launch (`Results`).
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.utils.blackwell_helpers as sm100
from cute_sparse.kernels.blackwell import tmem, umma
from cute_sparse.kernels.blackwell.config import (
    ELEMENT_BYTES,
    THREADS_PER_WARP,
    TILE_M,
    WARPS_PER_GROUP,
)
from cute_sparse.kernels.blackwell.decode_config import ROW_WORDS, SUM_COLUMNS, Config, choose
from cute_sparse.kernels.blackwell.softmax import (
    RowSoftmax,
    accumulated,
    any_of_group,
    exponentials,
    maximum,
    multiply_row,
    pack,
    tile_maximum,
)
from cutlass import Boolean, Float32, Int32, Int64, Uint8, Uint32, const_expr
from cutlass._mlir import ir
from cutlass._mlir.dialects import nvvm, vector
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05
from cutlass.cutlass_dsl import T, dsl_user_op
from cutlass.memory import SmemAllocator

from cute_sparse.device.bundles import Cache, DecodeOperands, decode_operands, log2_threshold
from cute_sparse.device.combine import PackedRows, Results
from cute_sparse.device.events import span
from cute_sparse.device.pipes import Cursor, Ring, consumer_cursor, producer_cursor
from cute_sparse.device.softmax import FLOOR
from cute_sparse.device.split import WALK_WORDS, Segment, SplitPlan
from cute_sparse.operands import DECODE
from cute_sparse.problem import HEAD_DIM_MAX, HEAD_DIM_MULTIPLE, Problem, check_supported, head_dim_feature

DTYPES = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16}
HEAD_DIMS = range(HEAD_DIM_MULTIPLE, HEAD_DIM_MAX + 1, HEAD_DIM_MULTIPLE)
PAGE_SIZES = (16, 32, 64, 128, 256)  # tokens
SUPPORTS = frozenset(
    {f"dtype:{name}" for name in DTYPES}
    | {head_dim_feature(head_dim, head_dim) for head_dim in HEAD_DIMS}
    | {head_dim_feature(192, 128)}
    | {f"page_size:{tokens}" for tokens in PAGE_SIZES}
    | {"mask:full", "mask:causal", "mask:band", "softcap", "sink", "sparsity:threshold", "share_max", "lse", "stats"}
)

GROUP_THREADS = WARPS_PER_GROUP * THREADS_PER_WARP
FRAGMENT = 32  # columns of S that are exponentiated, rounded and stored together
OUTPUT_FRAGMENT = 16  # columns of O in registers at a time
VECTOR_BYTES = 16
VECTOR_WORDS = VECTOR_BYTES // 4
VECTOR = VECTOR_BYTES // ELEMENT_BYTES  # elements of one vector load
Q_BATCH = 4  # vectors of Q that a lane has under way
KEPT, SKIPPED = 1, 2  # in the skip map
END, END_EMPTY = -1, -2  # instead of a KV tile in a message: the segment is over; no tile of it was kept
RESCALE, HIDE, FINISH = 1, 2, 4  # flags of an event
EVENT_WORDS = 8
TILE_ALIGN_BYTES = 1024  # shared-memory tiles: one repetition of the widest swizzle


class NamedBarrier(IntEnum):
    """Hardware barriers."""

    CTA = 0  # nobody touches tensor memory any more
    VOTE = 1  # the 128 softmax threads that decide on a skip
    FINISH = 2  # the 128 correction threads, at a segment's end
    START = 3  # shared memory is initialised, and sWalk says where the CTA begins


class Pipes(NamedTuple):
    """The mbarriers; who arrives is in the class docstring. Rings have slots."""

    q: Ring
    k: Ring
    v: Ring
    s: Ring
    p: Ring
    wanted: Any  # one a slot of P
    event: Any
    event_done: Any


class Tiles(NamedTuple):
    """The shared-memory tiles and words."""

    sQ: Any  # (MMA, MMA_M, MMA_K, 1)
    sK: Any  # (MMA, MMA_N, MMA_K, slot)
    sV: Any  # (MMA, MMA_N, MMA_K, slot)
    sK_strips: Any  # (box rows, strip, boxes of a strip, strips, slot): the same, as TMA fills it
    sV_strips: Any
    sTile: Any  # (p_stages,) int32: the KV tile whose P is in a slot, or END, or END_EMPTY
    sMoved: Any  # (warps, p_stages) int32: whether the warp moved a reference of its rows
    sEvent: Any  # (EVENT_WORDS,) int32
    sMax: Any  # (TILE_M * 2,) fp32: maxima of the parts of a tile's keys; two tiles'
    sSum: Any  # (SUM_COLUMNS * TILE_M,) fp32: columns of O of the parts
    sWalk: Any  # (WALK_WORDS,) int32


@dataclass(frozen=True)
class Operands:
    """Everything the kernel is given; `k` and `v` hold the coordinates that the TMA atoms take."""

    decode: DecodeOperands
    plan: SplitPlan
    results: Results
    k_atom: cute.CopyAtom
    v_atom: cute.CopyAtom
    k: Cache
    v: Cache
    mma_s: cute.TiledMma
    mma_o: cute.TiledMma
    sQ_layout: cute.ComposedLayout
    sK_layout: cute.ComposedLayout
    sV_layout: cute.ComposedLayout
    group: Int32  # query heads per KV head
    parts: Int32  # 4, 2 or 1: into how many a tile's keys are divided among the softmax warps


class Keys(NamedTuple):
    """The keys [begin, end) that any query of a sequence sees."""

    begin: Any
    end: Any


class Window(NamedTuple):
    """32 neighbouring entries of a sequence's page table, one a lane; `number` is -1 before the first."""

    number: Any
    block: Any


class Place(NamedTuple):
    """What a softmax thread knows of its place in a segment.

    row      in the row block
    part     of a tile's keys
    columns  of a tile that it takes (known while tracing), from `first_column` on
    active   its warp has a row that exists
    """

    row: Any
    part: Any
    columns: Any
    first_column: Any
    lane: Any  # tensor-memory address of the warp's first lane, column 0
    q_idx: Any
    exists: Any
    active: Any


class Event(NamedTuple):
    """What the value MMA warp asks of the correction warps, as words of sEvent."""

    flags: Any
    p_slot: Any
    v_slot: Any
    first_key: Any  # in the tile: the keys before it, and from `end_key` on, are to be hidden
    end_key: Any


class Decode:
    """The kernel of one (problem, config).

    Roles (16 warps, three of them idle; registers after setmaxnreg in `Config`)
      load_q      a warp: the rows of Q by vector loads, into the swizzled tile that the MMA reads
      load_k      a warp: where the CTA begins; K by TMA, as far ahead as the ring goes
      load_v      a warp: V by TMA; with a threshold, of kept tiles, as soon as they are known
      score_mma   a warp, one elected thread: S = Q K^T, as far ahead as there are buffers of S
      softmax     a warpgroup: S -> maximum, vote, P, row sum. It never waits for V
      value_mma   a warp, one elected thread: O += P V of kept tiles
      correction  a warpgroup: what seldom happens to O and V, and the results of a segment

    Few rows. With more than 64 packed rows a softmax thread owns a row, its tensor-memory lane. With at most 32 (a
    query group of 8 with up to 4 queries) the rows of Q are laid down four times, once for the lanes of each warp: each
    warp takes a quarter of a tile's keys, the 16 of one instruction of P V, and that instruction updates O in the
    warp's lanes alone (so that V of other keys, be it inf, does not meet the zeros of P there). With at most 64 there
    are two copies, and halves of the keys. At a segment's end the parts of O are added up, like splits.

    Pipelines (producer -> consumer: slots; what completes it: arrivals)
      q        load_q -> score_mma: 1; full: 1; empty: 1 commit of the segment's last Q K^T
      k        load_k -> score_mma: ring of pieces of tiles; full: 1 + TMA bytes; empty: 1 commit of their Q K^T
      s        score_mma -> softmax: buffers of S; full: 1 commit of Q K^T; empty: 4 warps have S in registers
      wanted   softmax -> load_v, with a threshold: slots of P; 1: sTile names a kept tile, or the segment's end.
               Its slot is empty again with that of P
      v        load_v -> value_mma: ring, in step with the kept tiles; full: 1 + TMA bytes; empty: 1 commit of P V
      p        softmax -> value_mma: slots of P; full: 4 warps: P and the rows' factor are written, or at the end the
               rows' sum and maximum; empty: 1 commit of P V (at the end: 1 arrival), and with a threshold 1 of load_v
      event    value_mma -> correction: 1; 1 commit of all P V so far and 1 arrival: sEvent says what is to be done
      event_done  correction -> value_mma: 4 warps: it is done, of a segment's end as much as touches tensor memory

    Timeline (steady state; the KV tile in brackets)
      load_k     K(i+8)          K(i+9)
      score_mma  Q K(i+3)        Q K(i+4)
      softmax    S(i): max, vote, exp, P, sum      S(i+1)
      load_v     V(i)            V(i+1)
      value_mma  P V(i-3)        P V(i-2)

    Events are rare: a reference that moved by more than 2^8 (O is multiplied with the rows' factors), a tile in which
    some keys are beyond the sequence (its rows of V may hold anything and are set to zero, because 0 * NaN is NaN), and
    the segment's end.

    Cost, by the emulator's timing model for one SM of a B200 (nothing was measured), in clocks per tile of 64 keys;
    head dim 128, whose K and V take 1130 at 29 bytes a clock, and K alone 565:
      4 parts  1130 kept, with or without a threshold, and 565 skipped: the bytes. Were memory infinitely fast: 640 (all
               of them the tensor core's: 384 Q K^T, bound by shared memory, and 256 P V) and 384. A softmax warp is
               busy for 370 to 440, 128 of them with exponentials, the other roles for less than 250
      2 parts  1130; were memory infinitely fast, 630
      1 part   1130 to 1145; 947 to 1002, the softmax's, of which 512 are exponentials
    Head dim 64 (565 for K and V): 4 parts 565, 2 parts 628, 1 part 947, more than their bytes.
    At nothing skipped a CTA takes up to 750 clocks more than the dense kernel, however many tiles it has, and 3200 at
    head dim 256, whose ring of K is full of the seeds at first. The first K is asked for some 1500 clocks after a CTA's
    start, with pages 2100: a trip to global memory for the lengths, and one for the page table.
    Warp instructions per tile with 4 parts: at most 170 of a softmax warp (with a threshold 195), 64 of score_mma, 80
    of value_mma, 40 of each load warp (42 of load_k and 56 of load_v with a threshold).
    """

    def __init__(self, problem: Problem, config: Config) -> None:
        self.problem = problem
        self.config = config
        self.dtype = DTYPES[problem.dtype]
        self.sparse = problem.sparsity is not None
        self.paged = problem.page_size > 0
        self.box_rows = min(problem.page_size or config.tile_n, config.tile_n)  # tokens of one TMA box
        self.boxes = config.tile_n // self.box_rows  # of a tile, per strip
        self.steps_k = config.head_dim // umma.INSTRUCTION_K
        self.steps_v = config.tile_n // umma.INSTRUCTION_K
        assert self.steps_v == WARPS_PER_GROUP, "a quarter of a tile's keys is one instruction of P V"
        self.s_instruction = umma.instruction_descriptor(self.dtype, TILE_M, config.tile_n, b_major_mn=False)
        self.o_instruction = umma.instruction_descriptor(self.dtype, TILE_M, config.head_dim_v, b_major_mn=True)

    @cute.jit
    def __call__(self, *values, stream):
        config, problem, dtype = self.config, self.problem, self.dtype
        decode = decode_operands(problem, values)
        one = tcgen05.CtaGroup.ONE
        k_major, mn_major = OperandMajorMode.K, OperandMajorMode.MN
        mma_s = sm100.make_trivial_tiled_mma(dtype, dtype, k_major, k_major, Float32, one, (TILE_M, config.tile_n))
        mma_o = sm100.make_trivial_tiled_mma(
            dtype, dtype, k_major, mn_major, Float32, one, (TILE_M, config.head_dim_v), tcgen05.OperandSource.TMEM
        )
        q_tile = (TILE_M, config.tile_n, config.head_dim)
        k_tile = (TILE_M, config.tile_n, config.head_dim // config.k_pieces)
        v_tile = (TILE_M, config.head_dim_v, config.tile_n)
        sQ_layout = sm100.make_smem_layout_a(mma_s, q_tile, dtype, 1)
        sK_layout = sm100.make_smem_layout_b(mma_s, k_tile, dtype, config.k_stages)
        sV_layout = sm100.make_smem_layout_b(mma_o, v_tile, dtype, config.v_stages)
        k_atom, k = self._tma_atom(decode.k, sK_layout, config.k_strip)
        v_atom, v = self._tma_atom(decode.v, sV_layout, config.v_strip)
        group = decode.heads_q // cutlass.max(decode.heads_kv, 1)
        plan = SplitPlan(
            problem.mask,
            config.tile_n,
            config.min_tiles,
            self.sparse,
            decode.seqused_k,
            decode.capacity,
            decode.seqlen_q,
            decode.window_left,
            decode.window_right,
            decode.batch,
            decode.heads_kv,
            decode.row_blocks,
            decode.num_splits,
            decode.ctas,
        )
        self.storage = shared_storage(config, dtype, sQ_layout, sK_layout, sV_layout)
        operands = Operands(
            decode,
            plan,
            Results.of(decode, problem.head_dim_v),
            k_atom,
            v_atom,
            k,
            v,
            mma_s,
            mma_o,
            sQ_layout,
            sK_layout,
            sV_layout,
            group,
            key_parts(decode.seqlen_q * group),
        )
        grid = (decode.ctas, 1, 1)
        self.kernel(operands).launch(grid=grid, block=(config.threads, 1, 1), stream=stream, min_blocks_per_mp=1)

    def _tma_atom(self, cache: Cache, layout, strip: int):
        """The atom that loads a box of `box_rows` tokens and one strip of columns, and the cache's coordinates."""
        box = cute.make_layout((self.box_rows, strip), stride=(strip, 1))
        box = cute.make_composed_layout(layout.inner, 0, box)
        load = cpasync.CopyBulkTensorTileG2SOp(tcgen05.CtaGroup.ONE)
        atom, coordinates = cpasync.make_tiled_tma_atom(load, cache.tensor, box, (self.box_rows, strip))
        return atom, cache.viewed_as(coordinates)

    @cute.kernel
    def kernel(self, op: Operands):
        config = self.config
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        storage = SmemAllocator().allocate(self.storage)
        pipes = self._pipes(storage)
        tiles = self._tiles(op, storage)
        base = tmem.BASE
        if warp < config.correction_warp:
            cute.arch.setmaxregister_increase(config.registers_softmax)
            self._clear(tiles)
            self._await_start()
            if op.parts == 4:
                self.softmax(op, pipes, tiles, base, 4)
            elif op.parts == 2:
                self.softmax(op, pipes, tiles, base, 2)
            else:
                self.softmax(op, pipes, tiles, base, 1)
        elif warp < config.score_mma_warp:
            cute.arch.setmaxregister_decrease(config.registers_correction)
            self._clear(tiles)
            self._await_start()
            self.correct(op, pipes, tiles, base)
        else:
            cute.arch.setmaxregister_decrease(config.registers_other)
            if warp == config.load_k_warp:
                self.load_k(op, pipes, tiles)
            else:
                if warp == config.score_mma_warp:
                    tmem.allocate(storage.tmem_base.ptr)
                if warp == config.load_v_warp:
                    self._initialise(op.v_atom, pipes)
                self._await_start()
                if warp == config.score_mma_warp:
                    self.multiply_scores(op, pipes, tiles, base)
                elif warp == config.value_mma_warp:
                    self.multiply_values(op, pipes, tiles, base)
                elif warp == config.load_v_warp:
                    self.load_v(op, pipes, tiles)
                elif warp == config.load_q_warp:
                    self.load_q(op, pipes, tiles)

        cute.arch.sync_threads()
        if warp == config.score_mma_warp:
            tmem.deallocate(base)

    # ---- the start: K is asked for as soon as it is known which, and the others wait for that

    @cute.jit
    def _begin(self, op: Operands, pipes: Pipes, tiles: Tiles):
        """By load_k: find where the CTA begins, tell the others, and wait for none of them."""
        cpasync.prefetch_descriptor(op.k_atom)
        with cute.arch.elect_one():
            pipes.k.initialise()
        cute.arch.mbarrier_init_fence()
        walk = op.plan.locate(tiles.sWalk)
        cute.arch.barrier_arrive(barrier_id=int(NamedBarrier.START), number_of_threads=self.config.threads)
        return walk

    @cute.jit
    def _initialise(self, v_atom, pipes: Pipes):
        """By one warp: all but the ring of K."""
        cpasync.prefetch_descriptor(v_atom)
        with cute.arch.elect_one():
            for ring in (pipes.q, pipes.v, pipes.s, pipes.p):
                ring.initialise()
            if const_expr(self.sparse):
                for slot in cutlass.range_constexpr(self.config.p_stages):
                    cute.arch.mbarrier_init(pipes.wanted + slot, 1)
            cute.arch.mbarrier_init(pipes.event, 2)
            cute.arch.mbarrier_init(pipes.event_done, WARPS_PER_GROUP)
        cute.arch.mbarrier_init_fence()

    def _clear(self, tiles: Tiles) -> None:
        """By softmax and correction: the tile of Q, behind whose writes come the start and then load_q's fence."""
        thread, _, _ = cute.arch.thread_idx()
        zeros = cute.make_rmem_tensor(VECTOR_WORDS, Int32)
        zeros.fill(0)
        threads = self.config.score_mma_warp * THREADS_PER_WARP
        for first in range(0, self.config.q_bytes, VECTOR_BYTES * threads):
            cute.autovec_copy(zeros, _shared_words(tiles.sQ.iterator.toint() + first + thread * VECTOR_BYTES))

    def _await_start(self) -> None:
        cute.arch.barrier(barrier_id=int(NamedBarrier.START), number_of_threads=self.config.threads)

    # ------------------------------------------------------------------------------------------------ load

    @cute.jit
    def load_q(self, op: Operands, pipes: Pipes, tiles: Tiles):
        """One segment after the other: the packed rows of Q, once for each part of the keys. Rows that do not exist
        are zero at first and then those of some segment before; nobody looks at what comes of them."""
        config, q = self.config, op.decode.q
        lane = cute.arch.lane_idx()
        vectors_per_row = config.head_dim // VECTOR
        sQ_address = tiles.sQ.iterator.toint()
        rows_per_part = TILE_M // op.parts
        cursor = producer_cursor()
        walk = op.plan.first(tiles.sWalk)
        while op.plan.more(walk):
            segment = op.plan.segment(walk)
            if op.plan.tiles(segment) > 0:
                rows = self._rows(op, segment)
                count = rows.count * vectors_per_row
                for first in cutlass.range(lane, count, THREADS_PER_WARP * Q_BATCH, unroll=1):
                    batch = cute.make_rmem_tensor((VECTOR_WORDS, Q_BATCH), Int32)
                    batch.fill(0)
                    for i in cutlass.range_constexpr(Q_BATCH):
                        number = first + i * THREADS_PER_WARP
                        row, column = number // vectors_per_row, VECTOR * (number % vectors_per_row)
                        if number < count and column < self.problem.head_dim:
                            coordinate = (rows.query(row), column, rows.head(row), rows.batch_idx)
                            source = (q.iterator + cute.crd2idx(coordinate, q.layout)).toint()
                            cute.autovec_copy(_global_words(source), batch[None, i])
                    if first == lane:
                        pipes.q.acquire(cursor)
                    for i in cutlass.range_constexpr(Q_BATCH):
                        number = first + i * THREADS_PER_WARP
                        row, column = number // vectors_per_row, VECTOR * (number % vectors_per_row)
                        if number < count:
                            for part in cutlass.range(op.parts, unroll=1):
                                offset = self._q_offset(row + part * rows_per_part, column)
                                cute.autovec_copy(batch[None, i], _shared_words(sQ_address + offset))
                cute.arch.fence_view_async_shared()
                cute.arch.sync_warp()
                with cute.arch.elect_one():
                    pipes.q.publish(cursor)
                cursor = pipes.q.advanced(cursor)
            walk = op.plan.next(walk)

    def _q_offset(self, row, column):
        """Bytes from the beginning of the tile of Q to 16 bytes of a row: strip after strip, swizzled."""
        strip = self.config.k_strip
        strip_bytes = strip * ELEMENT_BYTES
        offset = (column // strip * TILE_M + row) * strip_bytes + column % strip * ELEMENT_BYTES
        return offset ^ ((offset >> 3) & (strip_bytes - VECTOR_BYTES))

    @cute.jit
    def load_k(self, op: Operands, pipes: Pipes, tiles: Tiles):
        cursor = producer_cursor()
        walk = self._begin(op, pipes, tiles)
        while op.plan.more(walk):
            segment = op.plan.segment(walk)
            if op.plan.tiles(segment) > 0:
                keys, none = self._keys(op, segment), Window(Int32(-1), Int32(0))
                window = self._page_window(op.k, segment, keys, op.plan.n_block(segment, Int32(0)), none)
                # The second look is at the first tile, the third at the last one's neighbour.
                first_window = self._page_window(op.k, segment, keys, segment.oldest, none) if self.sparse else none
                for look in cutlass.range(op.plan.looks(segment), unroll=1):
                    n_block = op.plan.n_block(segment, look)
                    pages = first_window
                    if not self.sparse or look != 1:
                        window = self._page_window(op.k, segment, keys, n_block, window)
                        pages = window
                    for piece in cutlass.range_constexpr(self.config.k_pieces):
                        with span("load K"):
                            pipes.k.acquire(cursor)
                            pipes.k.expect(cursor, self.config.k_slot_bytes)
                            self._load_tile(
                                op.k_atom, op.k, tiles.sK_strips, pipes.k, cursor, segment, n_block, pages, piece
                            )
                        cursor = pipes.k.advanced(cursor)
            walk = op.plan.next(walk)

    @cute.jit
    def load_v(self, op: Operands, pipes: Pipes, tiles: Tiles):
        cursor, p_cursor = producer_cursor(), consumer_cursor()
        walk = op.plan.first(tiles.sWalk)
        while op.plan.more(walk):
            segment = op.plan.segment(walk)
            keys, window = self._keys(op, segment), Window(Int32(-1), Int32(0))
            if const_expr(self.sparse):
                if segment.begin < segment.end:
                    n_block = self._wanted(pipes, tiles, p_cursor)
                    p_cursor = pipes.p.advanced(p_cursor)
                    while n_block >= 0:
                        window = self._page_window(op.v, segment, keys, n_block, window)
                        cursor = self._load_v(op, pipes, tiles, segment, n_block, window, cursor)
                        n_block = self._wanted(pipes, tiles, p_cursor)
                        p_cursor = pipes.p.advanced(p_cursor)
            else:
                for i in cutlass.range(op.plan.tiles(segment), unroll=1):
                    n_block = op.plan.n_block(segment, i)
                    window = self._page_window(op.v, segment, keys, n_block, window)
                    cursor = self._load_v(op, pipes, tiles, segment, n_block, window, cursor)
            walk = op.plan.next(walk)

    @cute.jit
    def _load_v(self, op: Operands, pipes: Pipes, tiles: Tiles, segment, n_block: Int32, window, cursor: Cursor):
        with span("load V"):
            pipes.v.acquire(cursor)
            pipes.v.expect(cursor, self.config.v_slot_bytes)
            self._load_tile(op.v_atom, op.v, tiles.sV_strips, pipes.v, cursor, segment, n_block, window)
        return pipes.v.advanced(cursor)

    @cute.jit
    def _wanted(self, pipes: Pipes, tiles: Tiles, cursor: Cursor) -> Int32:
        """The next kept tile, or END or END_EMPTY."""
        with span("await decision"):
            cute.arch.mbarrier_wait(pipes.wanted + cursor.index, cursor.phase)
        n_block = tiles.sTile[cursor.index]
        cute.arch.sync_warp()
        pipes.p.release(cursor)
        return n_block

    @cute.jit
    def _page_window(self, cache: Cache, segment: Segment, keys: Keys, n_block: Int32, window: Window):
        """The window with a tile's pages. Entries of pages without a visible key are not read: their block is `blocks`,
        which does not exist and loads as zeros."""
        number, block = window
        if const_expr(self.paged):
            page_size = self.problem.page_size
            wanted = n_block * self.config.tile_n // page_size // THREADS_PER_WARP
            if wanted != number:
                number = wanted
                page = number * THREADS_PER_WARP + cute.arch.lane_idx()
                block = cache.blocks
                if page >= keys.begin // page_size and page * page_size < keys.end:
                    block = cache.page_table[page, segment.batch_idx]
        return Window(number, block)

    @cute.jit
    def _load_tile(
        self,
        atom,
        cache: Cache,
        shared,
        ring: Ring,
        cursor: Cursor,
        segment,
        n_block: Int32,
        window,
        piece: cutlass.Constexpr[int] = 0,
    ):
        """One tile, or one piece of its columns, into a slot."""
        barrier = ring.full(cursor)
        _, strip, boxes, strips, _ = shared.shape
        for box in cutlass.range_constexpr(boxes):
            number = n_block * boxes + box  # of the sequence's boxes
            block = segment.batch_idx
            if const_expr(self.paged):
                boxes_per_page = self.problem.page_size // self.box_rows
                page = number // boxes_per_page
                number = number % boxes_per_page
                block = cute.arch.shuffle_sync(window.block, page % THREADS_PER_WARP)
            head = cache.tensor[None, None, segment.kv_head, block]
            gBoxes = cute.local_tile(head, (self.box_rows, strip), (None, None))  # (.., .., boxes, strips)
            tSsS, tSgS = _tma_partition(atom, shared, gBoxes)
            for i in cutlass.range_constexpr(strips):
                column = piece * strips + i
                cute.copy(atom, tSgS[None, number, column], tSsS[None, box, i, cursor.index], tma_bar_ptr=barrier)

    # ------------------------------------------------------------------------------------------------ mma

    @cute.jit
    def multiply_scores(self, op: Operands, pipes: Pipes, tiles: Tiles, base: cutlass.Constexpr[int]):
        """S = Q K^T of every tile."""
        plan, pieces = self.config.tmem, self.config.k_pieces
        steps_of_piece = self.steps_k // pieces
        q, k = umma.operand(op.mma_s.make_fragment_A(tiles.sQ)), umma.operand(op.mma_s.make_fragment_B(tiles.sK))
        q_cursor, k_cursor, s_cursor = consumer_cursor(), consumer_cursor(), producer_cursor()
        walk = op.plan.first(tiles.sWalk)
        while op.plan.more(walk):
            steps = op.plan.looks(op.plan.segment(walk))
            if steps > 0:
                pipes.q.wait(q_cursor)
            for i in cutlass.range(steps, unroll=1):
                with span("Q K^T"):
                    pipes.s.acquire(s_cursor)
                    for piece in cutlass.range_constexpr(pieces):
                        pipes.k.wait(k_cursor)
                        tmem.fence_after_sync()
                        with cute.arch.elect_one():
                            scores = base + plan.scores + s_cursor.index * plan.scores_stride
                            k_first = k.of_slot(k_cursor.index)
                            q_first = umma.opaque(q.first)
                            for step in cutlass.range_constexpr(steps_of_piece):
                                of_q = piece * steps_of_piece + step
                                q_step, k_step = q_first + q.steps[of_q], k_first + k.steps[step]
                                umma.issue_from_shared(scores, q_step, k_step, self.s_instruction, of_q > 0)
                            if const_expr(piece == pieces - 1):
                                umma.commit(pipes.s.full(s_cursor))
                            umma.commit(pipes.k.empty(k_cursor))
                        k_cursor = pipes.k.advanced(k_cursor)
                    if i == steps - 1:
                        with cute.arch.elect_one():
                            umma.commit(pipes.q.empty(q_cursor))
                s_cursor = pipes.s.advanced(s_cursor)
            if steps > 0:
                q_cursor = pipes.q.advanced(q_cursor)
            walk = op.plan.next(walk)

    @cute.jit
    def multiply_values(self, op: Operands, pipes: Pipes, tiles: Tiles, base: cutlass.Constexpr[int]):
        """O += P V of kept tiles."""
        config, plan = self.config, self.config.tmem
        v = umma.operand(op.mma_o.make_fragment_B(tiles.sV))
        p_cursor, v_cursor, event_parity = consumer_cursor(), consumer_cursor(), Int32(0)
        # Lanes of other quarters of the keys, and of the other half, are not updated.
        other_quarters = cutlass.select_(op.parts == 4, Int32(-1), Int32(0))
        other_half = cutlass.select_(op.parts > 1, Int32(-1), Int32(0))
        walk = op.plan.first(tiles.sWalk)
        while op.plan.more(walk):
            segment = op.plan.segment(walk)
            if segment.begin < segment.end:
                keys = self._keys(op, segment)
                started = Boolean(False)
                n_block, moved = self._message(pipes, tiles, p_cursor)
                while n_block >= 0:
                    with span("await V"):
                        pipes.v.wait(v_cursor)
                    first_key, end_key = keys.begin - n_block * config.tile_n, keys.end - n_block * config.tile_n
                    flags = cutlass.select_(moved & started, Int32(RESCALE), Int32(0))
                    flags = flags | cutlass.select_((first_key > 0) | (end_key < config.tile_n), Int32(HIDE), Int32(0))
                    if flags != 0:
                        event = Event(flags, p_cursor.index, v_cursor.index, first_key, end_key)
                        self._raise(pipes, tiles, event, event_parity)
                        tmem.fence_after_sync()
                        event_parity = event_parity ^ 1
                    with cute.arch.elect_one():
                        probabilities = base + plan.probabilities + p_cursor.index * plan.probabilities_stride
                        v_first = v.of_slot(v_cursor.index)
                        for step in cutlass.range_constexpr(self.steps_v):
                            p_step = probabilities + step * umma.INSTRUCTION_K // 2  # two elements of P a column
                            # A step that is the first of its own lanes does not accumulate at a segment's beginning.
                            accumulate = started if step == 0 else started | (op.parts < (2 if step == 2 else 4))
                            disabled = [
                                Int32(0) if warp == step else other_quarters if warp // 2 == step // 2 else other_half
                                for warp in range(WARPS_PER_GROUP)
                            ]
                            v_step = v_first + v.steps[step]
                            _issue_in_lanes(
                                base + plan.output, p_step, v_step, self.o_instruction, accumulate, disabled
                            )
                        umma.commit(pipes.v.empty(v_cursor))
                        umma.commit(pipes.p.empty(p_cursor))
                    started = Boolean(True)
                    v_cursor, p_cursor = pipes.v.advanced(v_cursor), pipes.p.advanced(p_cursor)
                    n_block, moved = self._message(pipes, tiles, p_cursor)
                nothing = Int32(0)
                flags = Int32(FINISH)
                event = Event(flags, p_cursor.index, nothing, nothing, nothing)
                self._raise(pipes, tiles, event, event_parity)
                event_parity = event_parity ^ 1
                pipes.p.release(p_cursor)
                p_cursor = pipes.p.advanced(p_cursor)
            walk = op.plan.next(walk)

    @cute.jit
    def _message(self, pipes: Pipes, tiles: Tiles, cursor: Cursor):
        """The KV tile whose P is ready (or END or END_EMPTY), and whether a row's reference moved."""
        pipes.p.wait(cursor)
        tmem.fence_after_sync()
        n_block = tiles.sTile[cursor.index]
        moved = tiles.sMoved[cute.arch.lane_idx() % WARPS_PER_GROUP, cursor.index] != 0
        cute.arch.sync_warp()  # all lanes have read before one of them lets the slot be written again
        return n_block, cute.arch.vote_any_sync(moved)

    @cute.jit
    def _raise(self, pipes: Pipes, tiles: Tiles, event: Event, parity: Int32):
        """Have the correction warps handle an event, after all P V so far, and wait until they have. Who then uses
        tensor memory fences before: behind a segment's end, the next segment's first message does."""
        with cute.arch.elect_one():
            for i in cutlass.range_constexpr(len(event)):
                tiles.sEvent[i] = event[i]
            cute.arch.mbarrier_arrive(pipes.event)
            umma.commit(pipes.event)
        cute.arch.mbarrier_wait(pipes.event_done, parity)

    # ------------------------------------------------------------------------------------------------ softmax

    @cute.jit
    def softmax(
        self, op: Operands, pipes: Pipes, tiles: Tiles, base: cutlass.Constexpr[int], parts: cutlass.Constexpr[int]
    ):
        """With more than one part, thread t has row t mod (128 / parts) and part t / (128 / parts) of the keys."""
        config, plan = self.config, self.config.tmem
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        lane = base + tmem.lane_offset(warp)
        columns, rows_per_part = config.tile_n // parts, TILE_M // parts
        row = cute.arch.thread_idx()[0] % rows_per_part
        part = warp // (WARPS_PER_GROUP // parts)
        first_row = (warp * THREADS_PER_WARP) % rows_per_part
        self._clear_probabilities(lane)
        s_cursor, p_cursor, parity = consumer_cursor(), producer_cursor(), Int32(0)
        walk = op.plan.first(tiles.sWalk)
        while op.plan.more(walk):
            segment = op.plan.segment(walk)
            if segment.begin < segment.end:
                rows = self._rows(op, segment)
                exists = row < rows.count
                active = first_row < rows.count
                band = op.plan.band(segment.seqlen_k)
                place = Place(row, part, columns, part * columns, lane, rows.query(row), exists, active)
                state = RowSoftmax.create(op.decode.scale.scale_log2, self._threshold_log2(op, rows, row))
                state.start(-Float32.inf, exists)
                state.row_sum[0] = Float32(0.0)
                if const_expr(self.sparse):
                    state.keep_next(exists & (segment.begin == 0))
                if const_expr(self.sparse):
                    s_cursor, parity = self._seed(
                        op, pipes, tiles, segment, state, place, band, s_cursor, parity, parts
                    )
                published = self._published(op, segment, place)
                kept = Int32(0)
                for look in cutlass.range(segment.seeds, op.plan.looks(segment), unroll=1):
                    n_block = op.plan.n_block(segment, look)
                    scores = cute.make_rmem_tensor(columns, Float32)
                    tile_max = cute.make_rmem_tensor(1, Float32)
                    s_cursor = self._scores(op, pipes, s_cursor, place, band, n_block, scores, tile_max)
                    # -- the decision
                    wanted = Boolean(True)
                    if const_expr(self.sparse):
                        wanted = self._decide(op, tiles, state, place, tile_max, parity, published, parts)
                        parity = parity ^ 1
                    if const_expr(self.problem.return_stats):
                        self._map(op, segment, n_block, wanted)
                    with span("P"):
                        # -- P
                        if wanted:
                            pipes.p.acquire(p_cursor)
                            tmem.fence_after_sync()
                            self._announce(pipes, tiles, p_cursor, n_block)
                            moved = Boolean(False)
                            if active:
                                moved = self._probabilities(plan, p_cursor, place, state, scores, tile_max)
                            self._deliver(pipes, tiles, p_cursor, warp, moved)
                            p_cursor = pipes.p.advanced(p_cursor)
                            kept += 1
                            self._publish(op, segment, place, state, tile_max)
                    published = self._published(op, segment, place)
                # -- the end
                pipes.p.acquire(p_cursor)
                tmem.fence_after_sync()
                self._announce(pipes, tiles, p_cursor, cutlass.select_(kept > 0, Int32(END), Int32(END_EMPTY)))
                words = lane + plan.row_words + p_cursor.index * ROW_WORDS
                if active:
                    tmem.store(words, [state.row_sum[0], -state.minus_ref[0]])
                self._deliver(pipes, tiles, p_cursor, warp, Boolean(False))
                p_cursor = pipes.p.advanced(p_cursor)
                if const_expr(self.problem.return_stats):
                    self._count_tiles(op, segment, kept)
            walk = op.plan.next(walk)

    @cute.jit
    def _clear_probabilities(self, lane: Int32):
        """P of rows that nobody computes, and of other warps' keys, is zero and stays so; and so are their factors."""
        plan = self.config.tmem
        for slot in cutlass.range_constexpr(self.config.p_stages):
            tmem.store(
                lane + plan.probabilities + slot * plan.probabilities_stride,
                [Int32(0)] * plan.probabilities_stride,
            )
            tmem.store(lane + plan.row_words + slot * ROW_WORDS, [Float32(0.0)] * ROW_WORDS)
        tmem.wait_stores()  # of a CTA without a segment: nothing else waits before tensor memory is given back

    @cute.jit
    def _seed(
        self,
        op: Operands,
        pipes: Pipes,
        tiles: Tiles,
        segment: Segment,
        state,
        place,
        band,
        s_cursor: Cursor,
        parity: Int32,
        parts: cutlass.Constexpr[int],
    ):
        """Begin with the maxima of the segment's seeds."""
        for look in cutlass.range(segment.seeds, unroll=1):
            scores = cute.make_rmem_tensor(place.columns, Float32)
            tile_max = cute.make_rmem_tensor(1, Float32)
            n_block = op.plan.n_block(segment, look)
            s_cursor = self._scores(op, pipes, s_cursor, place, band, n_block, scores, tile_max)
            if const_expr(parts > 1):
                sMax = self._maxima(tiles, parts)
                sMax[place.part, place.row, parity] = tile_max[0]
                cute.arch.barrier(barrier_id=int(NamedBarrier.VOTE), number_of_threads=GROUP_THREADS)
                tile_max[0] = _maximum_of([sMax[part, place.row, parity] for part in range(parts)])
            parity = parity ^ 1
            state.seed(tile_max[0])
        return s_cursor, parity

    @cute.jit
    def _scores(self, op: Operands, pipes: Pipes, cursor: Cursor, place, band, n_block: Int32, scores, tile_max):
        """This thread's part of the next tile into `scores`, capped and masked, and their maximum."""
        whole = band.whole(0, op.decode.seqlen_q)
        masked = (n_block < whole.begin) | (n_block >= whole.end)
        with span("await S"):
            pipes.s.wait(cursor)
        tmem.fence_after_sync()
        tile_max[0] = -Float32.inf
        if place.active:
            self._load_scores(op, cursor, place, band, n_block, masked, scores, tile_max)
        tmem.fence_before_sync()
        cute.arch.sync_warp()
        pipes.s.release(cursor)
        return pipes.s.advanced(cursor)

    @cute.jit
    def _load_scores(self, op: Operands, cursor: Cursor, place, band, n_block: Int32, masked, scores, tile_max):
        plan, columns = self.config.tmem, place.columns
        address = place.lane + plan.scores + cursor.index * plan.scores_stride + place.first_column
        values = tmem.load_row(address, columns, min(columns, FRAGMENT))
        if const_expr(self.problem.softcap):
            values = [cute.math.tanh(s * op.decode.scale.tanh_scale, fastmath=True) for s in values]
        _fill(scores, values)
        if masked:
            band.hide(scores, range(columns), place.q_idx, n_block * self.config.tile_n + place.first_column)
        tile_max[0] = tile_maximum([scores[i] for i in range(columns)])

    @cute.jit
    def _decide(
        self,
        op: Operands,
        tiles: Tiles,
        state,
        place,
        tile_max,
        parity: Int32,
        published,
        parts: cutlass.Constexpr[int],
    ) -> Boolean:
        """Whether the tile is kept. `tile_max` becomes the maximum over all parts of the keys."""
        wants = state.wants(tile_max[0])
        if const_expr(published is not None):
            if published != 0:
                bound = op.results.shared_max.value(published) + state.threshold_raw
                wants = wants & ~(tile_max[0] < bound)
        sMax = self._maxima(tiles, parts)
        if const_expr(parts > 1):
            sMax[place.part, place.row, parity] = tile_max[0]
        wanted = any_of_group(wants, int(NamedBarrier.VOTE), GROUP_THREADS)
        if const_expr(parts > 1):
            tile_max[0] = _maximum_of([sMax[part, place.row, parity] for part in range(parts)])
        return wanted

    def _maxima(self, tiles: Tiles, parts: int) -> cute.Tensor:
        """(part, row, parity of the tile): the maxima of the parts of a tile's keys."""
        return cute.make_tensor(tiles.sMax.iterator, cute.make_layout((parts, TILE_M // parts, 2)))

    @cute.jit
    def _probabilities(self, plan, cursor: Cursor, place, state, scores, tile_max) -> Boolean:
        """P and the rows' factor into tensor memory; returns whether this warp moved a reference."""
        factor = cute.make_rmem_tensor(1, Float32)
        factor[0] = Float32(1.0)
        moved = state.advance(maximum(tile_max[0], FLOOR), factor)
        address = place.lane + plan.probabilities + cursor.index * plan.probabilities_stride + place.first_column // 2
        sums = []
        width = min(place.columns, FRAGMENT)
        for first in cutlass.range_constexpr(0, place.columns, width):
            p = exponentials(state.exponents([scores[first + i] for i in range(width)]), 0)
            tmem.store(address + first // 2, pack(p, self.dtype))
            sums = accumulated(sums, p)
        tmem.store(place.lane + plan.row_words + cursor.index * ROW_WORDS, [factor[0]] * ROW_WORDS)
        state.add(sums, False)
        return moved

    @cute.jit
    def _announce(self, pipes: Pipes, tiles: Tiles, cursor: Cursor, n_block: Int32):
        """Tell the V loader, and by P's arrival the value MMA warp, of a kept tile or the end."""
        if cute.arch.thread_idx()[0] == 0:
            tiles.sTile[cursor.index] = n_block
            if const_expr(self.sparse):
                cute.arch.mbarrier_arrive(pipes.wanted + cursor.index)

    @cute.jit
    def _deliver(self, pipes: Pipes, tiles: Tiles, cursor: Cursor, warp: Int32, moved: Boolean):
        """This warp's part of a slot of P is written."""
        tmem.wait_stores()
        tmem.fence_before_sync()
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            tiles.sMoved[warp, cursor.index] = Int32(moved)
            pipes.p.publish(cursor)

    # ---- shared maxima

    @cute.jit
    def _published(self, op: Operands, segment: Segment, place):
        """The code of the largest maximum that a split of the item has published; None where none is shared."""
        code = None
        if const_expr(self.problem.share_max):
            code = Uint32(0)
            if place.exists and segment.splits > 1:
                code = op.results.shared_max.code(segment.item, place.row)
        return code

    @cute.jit
    def _publish(self, op: Operands, segment: Segment, place, state, tile_max):
        """Where a kept tile has a row's new maximum; the threads of the first part do it."""
        if const_expr(self.problem.share_max):
            is_new = tile_max[0] >= state.row_max[0]
            if place.exists and segment.splits > 1 and place.part == 0 and is_new:
                op.results.shared_max.publish(segment.item, place.row, state.row_max[0])

    # ---- statistics

    @cute.jit
    def _map(self, op: Operands, segment: Segment, n_block: Int32, wanted: Boolean):
        if cute.arch.thread_idx()[0] == 0:
            skip_map = op.decode.stats.skip_map
            decision = cutlass.select_(wanted, Int32(KEPT), Int32(SKIPPED))
            skip_map[segment.batch_idx, segment.kv_head, segment.row_block, n_block] = Uint8(decision)

    @cute.jit
    def _count_tiles(self, op: Operands, segment: Segment, kept: Int32):
        if cute.arch.thread_idx()[0] == 0:
            counts = op.decode.stats.tile_counts
            for i, count in enumerate((kept, op.plan.tiles(segment))):
                offset = cute.crd2idx((i, segment.batch_idx, segment.kv_head), counts.layout)
                cute.arch.atomic_add(counts.iterator + offset, count, sem="relaxed", scope="gpu")

    # ------------------------------------------------------------------------------------------------ correction

    @cute.jit
    def correct(self, op: Operands, pipes: Pipes, tiles: Tiles, base: cutlass.Constexpr[int]):
        plan = self.config.tmem
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx()) % WARPS_PER_GROUP
        thread = cute.arch.thread_idx()[0] % GROUP_THREADS
        lane = base + tmem.lane_offset(warp)
        parity = Int32(0)
        walk = op.plan.first(tiles.sWalk)
        while op.plan.more(walk):
            segment = op.plan.segment(walk)
            if segment.begin < segment.end:
                event = self._next_event(pipes, tiles, parity)
                while event.flags != FINISH:
                    if event.flags & RESCALE != 0:
                        self._rescale(lane, event)
                    if event.flags & HIDE != 0:
                        self._hide(tiles, event, thread)
                    self._done(pipes)
                    parity = parity ^ 1
                    event = self._next_event(pipes, tiles, parity)
                kept = tiles.sTile[event.p_slot] == END
                row_words = lane + plan.row_words + event.p_slot * ROW_WORDS
                row_sum, row_max = tmem.load_row(row_words, ROW_WORDS, ROW_WORDS)
                with span("store"):
                    self._finish(op, pipes, tiles, segment, lane, thread, kept, row_max, row_sum)
                parity = parity ^ 1
            walk = op.plan.next(walk)

    @cute.jit
    def _next_event(self, pipes: Pipes, tiles: Tiles, parity: Int32):
        cute.arch.mbarrier_wait(pipes.event, parity)
        tmem.fence_after_sync()
        return Event(*[tiles.sEvent[i] for i in range(len(Event._fields))])

    @cute.jit
    def _done(self, pipes: Pipes):
        """An event is handled, as far as others must wait for that."""
        tmem.fence_before_sync()
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(pipes.event_done)

    @cute.jit
    def _rescale(self, lane: Int32, event: Event):
        """Multiply O with the rows' factors."""
        plan = self.config.tmem
        factor, _ = tmem.load(lane + plan.row_words + event.p_slot * ROW_WORDS, ROW_WORDS)
        for first in cutlass.range_constexpr(0, self.config.head_dim_v, OUTPUT_FRAGMENT):
            # The wait of the first columns is the factor's, too.
            columns = tmem.load_row(lane + plan.output + first, OUTPUT_FRAGMENT, OUTPUT_FRAGMENT)
            tmem.store(lane + plan.output + first, multiply_row(columns, factor))
        tmem.wait_stores()

    @cute.jit
    def _hide(self, tiles: Tiles, event: Event, thread: Int32):
        """Set the rows of V of keys that nobody sees to zero. The swizzle moves 16 bytes only within a key's row of a
        strip, so rows are set to zero as if there were none."""
        config = self.config
        zeros = cute.make_rmem_tensor(VECTOR_WORDS, Int32)
        zeros.fill(0)
        row_bytes = config.v_strip * ELEMENT_BYTES
        vectors = row_bytes // VECTOR_BYTES
        slot = tiles.sV.iterator.toint() + event.v_slot * config.v_slot_bytes
        for i in cutlass.range(thread, config.v_slot_bytes // VECTOR_BYTES, GROUP_THREADS, unroll=1):
            key = i // vectors % config.tile_n
            if key < event.first_key or key >= event.end_key:
                cute.autovec_copy(zeros, _shared_words(slot + i * VECTOR_BYTES))
        cute.arch.fence_view_async_shared()

    @cute.jit
    def _finish(
        self,
        op: Operands,
        pipes: Pipes,
        tiles: Tiles,
        segment: Segment,
        lane: Int32,
        thread: Int32,
        kept,
        row_max,
        row_sum,
    ):
        """A segment's results: to the output, or to the split's slot; the last of a group combines it."""
        rows = self._rows(op, segment)
        if op.parts == 4:
            self._finish_parts(op, pipes, tiles, segment, rows, lane, thread, kept, row_max, row_sum, 4)
        elif op.parts == 2:
            self._finish_parts(op, pipes, tiles, segment, rows, lane, thread, kept, row_max, row_sum, 2)
        else:
            self._finish_rows(op, pipes, segment, rows, lane, thread, kept, row_max, row_sum)
        if segment.splits > 1:
            group, is_done = op.results.group(segment, rows), Boolean(False)
            while not is_done:
                self._meet()
                is_last = Boolean(False)
                if thread == 0:
                    is_last = op.results.arrive(segment, group)
                is_last = any_of_group(is_last, int(NamedBarrier.FINISH), GROUP_THREADS)
                if is_last:
                    op.results.combine(segment, rows, group, thread, GROUP_THREADS)
                is_done = group.is_all | ~is_last
                group = group.next()

    @cute.jit
    def _finish_rows(
        self, op: Operands, pipes: Pipes, segment: Segment, rows, lane: Int32, row: Int32, kept, row_max, row_sum
    ):
        """A thread has a row."""
        config, results = self.config, op.results
        slot = segment.slot(segment.split)
        unseen = row_sum == 0.0
        row_max = cutlass.select_(unseen, -Float32.inf, row_max)
        inverse, lse = results.normaliser(rows, row, row_max, row_sum)
        for first in cutlass.range_constexpr(0, config.head_dim_v, OUTPUT_FRAGMENT):
            values = cute.make_rmem_tensor((VECTOR, OUTPUT_FRAGMENT // VECTOR), Float32)
            values.fill(0.0)
            if kept:
                columns = tmem.load_row(lane + config.tmem.output + first, OUTPUT_FRAGMENT, OUTPUT_FRAGMENT)
                for i in cutlass.range_constexpr(OUTPUT_FRAGMENT):
                    values[i] = cutlass.select_(unseen, Float32(0.0), columns[i])
            if const_expr(first + OUTPUT_FRAGMENT == config.head_dim_v):
                self._done(pipes)
            if segment.splits == 1:
                results.write_row(rows, row, first, VECTOR, values, inverse)
            else:
                results.leave_row(slot, rows, row, first, VECTOR, values)
        if segment.splits == 1:
            results.write_lse(rows, row, lse)
        else:
            results.leave_sum(slot, rows, row, row_max, row_sum)

    @cute.jit
    def _finish_parts(
        self,
        op: Operands,
        pipes: Pipes,
        tiles: Tiles,
        segment: Segment,
        rows,
        lane: Int32,
        thread: Int32,
        kept,
        row_max,
        row_sum,
        parts: cutlass.Constexpr[int],
    ):
        """A thread has one part of the keys of a row, as in `softmax`. The parts of a row are added up, some columns at
        a time, through shared memory, where each of `parts` neighbouring threads takes as many columns of a row."""
        config, results, width = self.config, op.results, SUM_COLUMNS // parts
        sSum = cute.make_tensor(tiles.sSum.iterator, cute.make_layout((SUM_COLUMNS, TILE_M // parts, parts)))
        own_row, own_part = thread % (TILE_M // parts), thread // (TILE_M // parts)
        row, first_column = thread // parts, thread % parts * width
        slot = segment.slot(segment.split)
        sSum[0, own_row, own_part] = row_sum
        sSum[1, own_row, own_part] = row_max
        self._meet()
        own_max, _ = _merged(sSum, own_row)
        weight = cute.math.exp2(row_max - own_max, fastmath=True)
        row_max, row_sum = _merged(sSum, row)
        unseen = row_sum == 0.0
        row_max = cutlass.select_(unseen, -Float32.inf, row_max)
        inverse, lse = results.normaliser(rows, row, row_max, row_sum)
        self._meet()
        for first in cutlass.range_constexpr(0, config.head_dim_v, SUM_COLUMNS):
            part = cute.make_rmem_tensor(SUM_COLUMNS, Float32)
            part.fill(0.0)
            if kept:
                columns = tmem.load_row(lane + config.tmem.output + first, SUM_COLUMNS, SUM_COLUMNS)
                _fill(part, multiply_row(columns, weight))
            cute.autovec_copy(part, sSum[None, own_row, own_part])
            if const_expr(first + SUM_COLUMNS == config.head_dim_v):
                self._done(pipes)
            self._meet()
            values = cute.make_rmem_tensor((width, 1), Float32)
            for i in cutlass.range_constexpr(width):
                total = _sum_of([sSum[first_column + i, row, part] for part in range(parts)])
                values[i] = cutlass.select_(unseen, Float32(0.0), total)
            if segment.splits == 1:
                results.write_row(rows, row, first + first_column, width, values, inverse)
            else:
                results.leave_row(slot, rows, row, first + first_column, width, values)
            self._meet()
        if first_column == 0:
            if segment.splits == 1:
                results.write_lse(rows, row, lse)
            else:
                results.leave_sum(slot, rows, row, row_max, row_sum)

    def _meet(self) -> None:
        """All correction threads."""
        cute.arch.barrier(barrier_id=int(NamedBarrier.FINISH), number_of_threads=GROUP_THREADS)

    # ------------------------------------------------------------------------------------------------ all roles

    def _rows(self, op: Operands, segment: Segment) -> PackedRows:
        return PackedRows.of(segment, op.decode.seqlen_q, op.group, TILE_M)

    def _keys(self, op: Operands, segment: Segment) -> Keys:
        band = op.plan.band(segment.seqlen_k)
        return Keys(band.keys(0).begin, band.keys(op.decode.seqlen_q - 1).end)

    def _threshold_log2(self, op: Operands, rows: PackedRows, row):
        if not self.sparse:
            return None
        head = rows.head(cutlass.min(row, rows.count - 1))
        return log2_threshold(op.decode.threshold, rows.batch_idx, head)

    def _pipes(self, storage) -> Pipes:
        config = self.config
        return Pipes(
            Ring(storage.q_ring.data_ptr(), 1, 1),
            Ring(storage.k_ring.data_ptr(), config.k_stages, 1),
            Ring(storage.v_ring.data_ptr(), config.v_stages, 1),
            Ring(storage.s_ring.data_ptr(), config.s_stages, WARPS_PER_GROUP),
            Ring(storage.p_ring.data_ptr(), config.p_stages, 2 if self.sparse else 1, WARPS_PER_GROUP),
            storage.wanted.data_ptr(),
            storage.event.data_ptr(),
            storage.event.data_ptr() + 1,
        )

    def _tiles(self, op: Operands, storage) -> Tiles:
        config = self.config

        def strips(tile, layout, strip: int, head_dim: int, stages: int):
            shape = (self.box_rows, strip, self.boxes, head_dim // strip, stages)
            stride = (strip, 1, self.box_rows * strip, config.tile_n * strip, config.tile_n * head_dim)
            return tile.get_tensor(cute.make_layout(shape, stride=stride), swizzle=layout.inner)

        return Tiles(
            storage.sQ.get_tensor(op.sQ_layout.outer, swizzle=op.sQ_layout.inner),
            storage.sK.get_tensor(op.sK_layout.outer, swizzle=op.sK_layout.inner),
            storage.sV.get_tensor(op.sV_layout.outer, swizzle=op.sV_layout.inner),
            strips(storage.sK, op.sK_layout, config.k_strip, config.head_dim // config.k_pieces, config.k_stages),
            strips(storage.sV, op.sV_layout, config.v_strip, config.head_dim_v, config.v_stages),
            storage.sTile.get_tensor(cute.make_layout(config.p_stages)),
            storage.sMoved.get_tensor(cute.make_layout((WARPS_PER_GROUP, config.p_stages))),
            storage.sEvent.get_tensor(cute.make_layout(EVENT_WORDS)),
            storage.sMax.get_tensor(cute.make_layout(TILE_M * 2)),
            storage.sSum.get_tensor(cute.make_layout(SUM_COLUMNS * TILE_M)),
            storage.sWalk.get_tensor(cute.make_layout(WALK_WORDS)),
        )


def shared_storage(config: Config, dtype: type, sQ_layout, sK_layout, sV_layout):
    """The plan of shared memory: barriers and words first, then the tiles, each aligned to its swizzle."""

    def tile(layout):
        return cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(layout)], TILE_ALIGN_BYTES]

    def words(dtype: type, count: int):
        return cute.struct.Align[cute.struct.MemRange[dtype, count], VECTOR_BYTES]

    @cute.struct
    class SharedStorage:
        q_ring: cute.struct.MemRange[Int64, 2]
        k_ring: cute.struct.MemRange[Int64, 2 * config.k_stages]
        v_ring: cute.struct.MemRange[Int64, 2 * config.v_stages]
        s_ring: cute.struct.MemRange[Int64, 2 * config.s_stages]
        p_ring: cute.struct.MemRange[Int64, 2 * config.p_stages]
        wanted: cute.struct.MemRange[Int64, config.p_stages]
        event: cute.struct.MemRange[Int64, 2]
        tmem_base: Int32
        sTile: cute.struct.MemRange[Int32, config.p_stages]
        sMoved: words(Int32, WARPS_PER_GROUP * config.p_stages)
        sEvent: words(Int32, EVENT_WORDS)
        sWalk: words(Int32, WALK_WORDS)
        sMax: words(Float32, TILE_M * 2)
        sSum: words(Float32, SUM_COLUMNS * TILE_M)
        sQ: tile(sQ_layout)
        sK: tile(sK_layout)
        sV: tile(sV_layout)

    assert SharedStorage.size_in_bytes() <= config.shared_bytes, "RESERVED_SHARED_BYTES is too small"
    return SharedStorage


def key_parts(rows):
    """Into how many parts a tile's keys are divided, so that as many times the rows fill the 128 lanes."""
    return cutlass.select_(rows <= TILE_M // 4, Int32(4), cutlass.select_(rows <= TILE_M // 2, Int32(2), Int32(1)))


def _fill(registers: cute.Tensor, values: list) -> None:
    for i, value in enumerate(values):
        registers[i] = value


def _merged(sSum: cute.Tensor, row):
    """(reference, sum) of a row over its parts, whose sums and references are in columns 0 and 1."""
    sums, maxima = ([sSum[column, row, part] for part in range(sSum.shape[2])] for column in (0, 1))
    row_max = _maximum_of(maxima)
    factors = [cute.math.exp2(reference - row_max, fastmath=True) for reference in maxima]
    return row_max, _sum_of([part * factor for part, factor in zip(sums, factors, strict=True)])


def _maximum_of(values: list):
    """Of two or four, NaN if one is NaN."""
    return maximum(*values) if len(values) == 2 else maximum(maximum(*values[:3]), values[3])


def _sum_of(values: list):
    while len(values) > 1:
        values = [a + b for a, b in zip(values[0::2], values[1::2], strict=True)]
    return values[0]


def _tma_partition(atom: cute.CopyAtom, shared: cute.Tensor, coordinates: cute.Tensor):
    """((TMA box), ..) of shared memory and of coordinates, whose first two modes are a box; without multicast."""
    return cpasync.tma_partition(
        atom, 0, cute.make_layout(1), cute.group_modes(shared, 0, 2), cute.group_modes(coordinates, 0, 2)
    )


def _words(address, space) -> cute.Tensor:
    pointer = cute.make_ptr(Int32, address, space, assumed_align=VECTOR_BYTES)
    return cute.make_tensor(pointer, cute.make_layout(VECTOR_WORDS))


def _shared_words(address) -> cute.Tensor:
    """16 bytes of shared memory."""
    return _words(address, cute.AddressSpace.smem)


def _global_words(address) -> cute.Tensor:
    """16 bytes of global memory."""
    return _words(address, cute.AddressSpace.gmem)


@dsl_user_op
def _issue_in_lanes(
    accumulator: Int32,
    a: Int32,
    b: Int64,
    instruction: int,
    accumulate: Boolean,
    disabled: list,
    *,
    loc=None,
    ip=None,
) -> None:
    """`umma.issue_from_tensor`, but lanes of D keep what they hold where their bit in `disabled`, one word for each
    warp's lanes, is set."""
    words_type = ir.VectorType.get([len(disabled)], T.i32(), loc=loc)
    masks = [Int32(word).ir_value(loc=loc, ip=ip) for word in disabled]
    nvvm.tcgen05_mma(
        nvvm.Tcgen05MMAKind.F16,
        nvvm.CTAGroupKind.CTA_1,
        tmem.pointer(accumulator, loc=loc, ip=ip),
        tmem.pointer(a, loc=loc, ip=ip),
        b.ir_value(loc=loc, ip=ip),
        Int32(instruction).ir_value(loc=loc, ip=ip),
        Boolean(accumulate).ir_value(loc=loc, ip=ip),
        disable_output_lane=vector.from_elements(words_type, masks, loc=loc, ip=ip),
        loc=loc,
        ip=ip,
    )


_SCALARS = {"int32": Int32, "int64": Int64, "float32": Float32}
_POINTEES = {
    "lse": Float32,
    "threshold": Float32,
    "learnable_sink": Float32,
    "seqused_k": Int32,
    "page_table": Int32,
    "tile_counts": Int32,
    "skip_map": Uint8,
    "partials": Float32,
    "arrivals": Int32,
    "shared_max": Uint32,
}
TENSOR_ALIGN_BYTES = 16


def _placeholder(operand, dtype: type):
    """A value of an operand's type to compile with."""
    if operand.type != "pointer":
        return _SCALARS[operand.type](1)
    pointee = _POINTEES.get(operand.name, dtype)
    align = pointee.width // 8 if operand.name in _POINTEES else TENSOR_ALIGN_BYTES
    return cute.runtime.make_ptr(pointee, TENSOR_ALIGN_BYTES, cute.AddressSpace.gmem, assumed_align=align)


def compile(problem: Problem, config: Config | None = None):
    """Compile the host function of `operands.DECODE` and a stream, for the DSL's current architecture."""
    check_supported(problem, SUPPORTS, "kernels.blackwell")
    kernel = Decode(problem, config or choose(problem))
    values = [_placeholder(operand, DTYPES[problem.dtype]) for operand in DECODE]
    return cute.compile(kernel, *values, stream=cuda.CUstream(0))
