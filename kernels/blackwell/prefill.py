"""Prefill attention on Blackwell: out = softmax(mask(scale * Q K^T)) V, tile by tile, with the tile skip.

q (batch, seqlen_q, heads_q, head_dim), k (batch, seqlen_k, heads_kv, head_dim), v and out with head_dim_v, or
packed tokens with cu_seqlens. Each query tile of 128 rows walks its KV tiles from the last to the first (the first
one early where tiles are skipped, `TileGeometry`) with the online softmax in base 2; a KV tile whose scores all lie
ln(lambda) below the rows' running maxima is skipped: no exponential, no P V.

Where the skip is: `Prefill._softmax_tile` decides (`_vote`); `_multiply_work` asks before each P V (`_kept`), `load`
before V (`_wanted`); both read what the softmax warps have voted (`_say`).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.utils.blackwell_helpers as sm100
from cute_sparse.kernels.blackwell import tmem, umma
from cute_sparse.kernels.blackwell.config import (
    ELEMENT_BYTES,
    L2_BYTES,
    THREADS_PER_WARP,
    TILE_M,
    WARPS_PER_GROUP,
    Config,
    choose,
    may_stay,
)
from cute_sparse.kernels.blackwell.softmax import (
    SUM_CHAINS,
    RowSoftmax,
    accumulated,
    exponentials,
    maximum,
    multiply_row,
    pack,
    tile_maximum,
)
from cutlass import Boolean, Float32, Int32, Int64, Uint8, Uint32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05
from cutlass.memory import SmemAllocator

from cute_sparse.device.bundles import TMA_ALIGN_BYTES, PrefillOperands, TokenTensor, log2_threshold, prefill_operands
from cute_sparse.device.events import span
from cute_sparse.device.mask import EDGES, Band, KeyRange, TileRange, first_early
from cute_sparse.device.pipes import Cursor, Ring, consumer_cursor, producer_cursor
from cute_sparse.device.schedule import (
    NO_TILE,
    SLOT_WORDS,
    DynamicTiles,
    OneTile,
    StaticTiles,
    TileOrder,
    WorkTile,
    heads_in_cache,
)
from cute_sparse.operands import PREFILL
from cute_sparse.problem import HEAD_DIM_MAX, HEAD_DIM_MULTIPLE, Problem, check_supported, head_dim_feature

DTYPES = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16}
HEAD_DIMS = range(HEAD_DIM_MULTIPLE, HEAD_DIM_MAX + 1, HEAD_DIM_MULTIPLE)
SUPPORTS = frozenset(
    {f"dtype:{name}" for name in DTYPES}
    | {head_dim_feature(head_dim, head_dim) for head_dim in HEAD_DIMS}
    | {head_dim_feature(192, 128)}
    | {"mask:full", "mask:causal", "mask:band", "varlen", "softcap", "sink", "sparsity:threshold", "lse", "stats"}
)

GROUP_THREADS = WARPS_PER_GROUP * THREADS_PER_WARP
FRAGMENT = 32  # columns of S that are exponentiated, rounded and stored together
STORE_FRAGMENT = 16  # columns of O in registers at a time at the end
RESCALE_FRAGMENT = 16  # columns of O in registers at a time, beside a whole row of S
STORE_ELEMENTS = 8  # 16 bytes: one store
KEPT, SKIPPED = 1, 2  # in the skip map
BARRIERS_PER_PIPE = 2  # query tiles or score buffers, whichever are more
TILE_SLOTS = 2  # work tiles announced ahead
DECISIONS_LOG2 = 3
DECISIONS = 1 << DECISIONS_LOG2  # remembered per query tile: more than the load warp may lag behind the vote
TILE_ALIGN_BYTES = 1024  # shared-memory tiles: one repetition of the widest swizzle


class Pipes(NamedTuple):
    """The mbarriers: who arrives is in the class docstring. Rings have slots, the rest one per query tile or buffer."""

    k: Ring
    v: Ring
    q_full: Any
    q_empty: Any
    s_full: Any
    s_read: Any
    p_ready: Any
    p_rest: Any
    o_step: Any
    o_done: Any
    row_done: Any
    factor_free: Any
    o_free: Any
    decided: Any  # (query tile, slot of DECISIONS)


class Tiles(NamedTuple):
    """The shared-memory tiles and words."""

    sQ: Any  # (MMA, MMA_M, MMA_K, query tile)
    sK: Any  # (MMA, MMA_N, MMA_K, slot)
    sV: Any  # (MMA, MMA_N, MMA_K, slot)
    sFactor: Any  # (TILE_M, query tile) fp32: what the rows of O are multiplied with at the end
    sVotes: Any  # (DECISIONS of a query tile, of the next ..) int32: a byte a warp, 1 if it wants the KV tile


@dataclass(frozen=True)
class Operands:
    """Everything the kernel is given; `q`, `k`, `v` hold the coordinates that the TMA atoms take."""

    prefill: PrefillOperands
    q_atom: cute.CopyAtom
    k_atom: cute.CopyAtom
    v_atom: cute.CopyAtom
    q: TokenTensor
    k: TokenTensor
    v: TokenTensor
    mma_s: cute.TiledMma
    mma_o: cute.TiledMma
    sQ_layout: cute.ComposedLayout
    sK_layout: cute.ComposedLayout
    sV_layout: cute.ComposedLayout
    group: Int32  # query heads per KV head
    order: TileOrder
    pairing: Any  # None without pairs


@dataclass(frozen=True)
class Pairing:
    """What the two CTAs of a pair have in common besides a KV head: two query heads' rows, or one head's.

    heads   query heads of a work tile, 2 or 1
    rows    rows of a head from one query tile of a CTA to the next: TILE_M or 2 * TILE_M
    """

    heads: Int32
    rows: Int32

    @staticmethod
    def of(group) -> "Pairing":
        """Two heads, which see the same keys, if `group` query heads per KV head are an even number."""
        two_heads = group % 2 == 0
        return Pairing(
            cutlass.select_(two_heads, Int32(2), Int32(1)), cutlass.select_(two_heads, Int32(TILE_M), Int32(2 * TILE_M))
        )


class Work(NamedTuple):
    """One work tile, decoded: where its tokens lie, and the KV tiles of each of its query tiles."""

    span_q: Any
    span_k: Any
    head_idx: Any  # this CTA's
    head_kv_idx: Any
    ranges: Any  # per query tile, the TileRange of its products; begin == end == 0 where there are none
    union: Any
    whole_end: Any  # of the KV tiles that all rows of the CTA see whole, if their order is `first_early`


class Thread(NamedTuple):
    """What a softmax thread knows of its place."""

    query_tile: Any
    row: Any  # in the query tile
    q_idx: Any
    in_sequence: Any
    lane: Any  # tensor-memory address of the warp's first lane, column 0


class Seen(NamedTuple):
    """What a thread's row sees of a KV tile, its warp's first row and its last: columns, or keys."""

    row: KeyRange
    first: KeyRange
    last: KeyRange
    first_key: Any  # of the tile; None if these are columns

    def by_some(self, column: int) -> Boolean:
        """Whether a row of the warp may see one of the FRAGMENT columns from this one on."""
        begin = self._place(column)
        end = begin + FRAGMENT
        return _both(self.first.begin, lambda bound: bound < end, self.last.end, lambda bound: bound > begin)

    def by_all(self, column: int) -> Boolean:
        """Whether all of them see all these columns."""
        begin = self._place(column)
        end = begin + FRAGMENT
        return _both(self.last.begin, lambda bound: bound <= begin, self.first.end, lambda bound: bound >= end)

    def hidden(self, scores: list, column: int) -> list:
        """The scores of the columns from this one on, -inf where the row does not see them."""
        row = self.row
        if self.first_key is not None:
            row, column = row.counted_from(self._place(column)), 0
        return [row.applied(score, column + i) for i, score in enumerate(scores)]

    def _place(self, column: int):
        return column if self.first_key is None else self.first_key + column


class Step(NamedTuple):
    """What stays the same while a softmax thread walks its KV tiles."""

    op: Any
    pipes: Any
    tiles: Any
    head_idx: Any
    batch_idx: Any
    band: Any
    thread: Any
    state: Any
    kept: Any  # (1,) int32 register: KV tiles kept so far


class Fragments(NamedTuple):
    """The operands of both products that are in shared memory."""

    q: umma.Operand
    k: umma.Operand
    v: umma.Operand


class Products(NamedTuple):
    """What stays the same while the MMA thread walks the KV tiles of a work tile; lists have one entry a query tile."""

    fragments: Fragments
    pipes: Pipes
    tiles: Tiles
    work: Work
    sizes: list  # KV tiles
    counts: list  # KV tiles in the work tiles before
    work_parity: Any  # one bit a query tile: of work tiles in which it has KV tiles


class Prefill:
    """The kernel of one (problem, config).

    Roles (16 warps with two query tiles a CTA, 12 with one; registers after setmaxnreg in `Config`)
      softmax     a warpgroup per query tile, a thread per row: S -> maximum, skip vote, P, row sum; it also
                  rescales O in tensor memory, in the rare tile that moves a reference by more than 2^8
      correction  a warpgroup: O / row sum -> global memory
      mma         one warp, of which one elected thread does all of a work tile: S = Q K^T and O += P V. Electing
                  one for each product took 122 warp instructions a tile of 128 x 128 instead of 107 (d64, causal)
      load        one warp: Q, K, V by TMA
      Elsewhere a correction warpgroup rescales O and so takes part in every tile; here the softmax warps, which
      know that nothing is to be done, do it: no message a tile, and P alone tells the MMA warp to go on. There
      is no store warp: a thread holds a row of O and writes whole sectors of it, which serves ragged and packed
      rows alike and leaves to the K and V rings what O would take of shared memory.

    Pipelines (producer -> consumer: slots; what completes it: arrivals)
      k, v      load -> mma: ring; full: 1 + TMA bytes; empty: 1 commit of the last product that reads the slot
      q         load -> mma: query tiles; full: 1 + TMA bytes; empty: 1 commit of the last Q K^T
      s_full    mma -> softmax: score buffers; 1 commit of Q K^T. With two query tiles and P inside S it implies that
                every product issued before is complete, so that O may be rescaled
      s_read    softmax -> mma, with P apart from S, in dense problems: query tiles; 128 threads: S was read
      p_ready   softmax -> mma: score buffers; 128 threads: S was read, the first columns of P written, O rescaled.
                Only for kept tiles, as
      p_rest    softmax -> mma: score buffers; 128 threads: the rest of P, if p_early_columns is not all of it. Of each
                buffer, because with one query tile a warp may be done with the next tile before another is with this
      o_step    mma -> softmax, with one query tile or P apart from S: 1 commit of a P V. O may be rescaled, and P apart
                from S written
      o_done    mma -> correction: query tiles; 1 commit of the last P V
      row_done  softmax -> correction: query tiles; 128 threads: sFactor is written
      factor_free  correction -> softmax: query tiles; 128 threads: sFactor was read. Only if persistent
      o_free    correction -> mma: query tiles; 128 threads: O was read. Only if persistent
      decided   softmax -> softmax, mma, load, in sparse problems: DECISIONS slots a query tile; 4 warps: S was read,
                and the warp's byte of sVotes written

    Timeline (steady state, two query tiles; the KV tile in brackets)
      mma        P0 V(i)  Q0 K(i+1)  P1 V(i)  Q1 K(i+1)  P0 V(i+1) ..
      softmax 0            .. wait .. S0(i+1): max, exp, P0, sum
      softmax 1  S1(i): exp, P1, sum          .. wait .. S1(i+1): max
      load       K(i+2)  V(i+2) ..
    with P apart from S (`Config.p_apart`), where S of the next KV tile is there when the exponentials of this one end
      mma        Q0 K(i+1)  P0 V(i)  Q1 K(i+1)  P1 V(i)  Q0 K(i+2) ..
      softmax 0  S0(i): max, exp, P0, sum  S0(i+1): max, exp ..
    and with one query tile, whose S alternates between two buffers
      mma        Q K(i+1)  P V(i)  Q K(i+2)  P V(i+1) ..
      softmax    S(i+1): max, exp, P, sum    S(i+2) ..

    P apart from S. At 64 columns of O both query tiles' P find room behind O. With P inside S, S of the next KV tile
    waited for P V, and the exponential units with it: modelled, d64 and 64K causal, a work tile's 128 rows took 617961
    clocks (FlashAttention-4's 553284), apart 564525, with more emulated exponentials (`config._emulated_share`) and P
    released as a whole 446051. Tried: the two softmax warps of a scheduler take turns at their exponentials: under a
    full mask 1621 clocks for 128 keys (6 of 16 emulated) instead of 1897. Left out, because the model's schedulers
    decide so much here (7, 8 and 9 of 16 without turns: 1968, 1897, 1815); a GPU is to tell.

    Pairs of CTAs (`Config.cta_pair`). The MMA warp of one CTA, the leader, multiplies 256 rows: 128 of each CTA,
    whose S, P and O lie in its own tensor memory. Each CTA fetches half of K's rows and half of V's columns, so
    that TMA and the products move half of K and V through shared memory, and the rings are twice as deep: at
    192/128 a CTA alone has room for two K and one V, and its MMA warp waits for V most of the time. Per 128 x 128
    tile (1024 x 1024, 2 query heads on 1 KV head, full mask, the emulator's count) TMA fetches, alone -> in pairs: d128
    36 -> 20 KB, 192/128 46 -> 26, d256 136 -> 72. What the MMA warp waits for arrives on the leader's barriers,
    there once a warp (8) instead of once a thread (128); its commits arrive in both CTAs.
      The CTAs of a pair compute the same rows of two query heads, which see the same keys; or, where heads_q / heads_kv
    is odd, neighbouring rows of one, of which under a causal mask the upper see one KV tile less: they answer it with
    P = 0 (`_blank_tile`).
      Tried in the timing model (clocks for 128 keys of two query tiles, d128, full mask): 2240 with 4 of 16
    exponentials emulated, 2107 with 6; P released after 64 columns instead of 96 changes nothing (2242).
      A sparse problem's CTAs stay alone: a product of 256 rows takes place unless both query tiles skip it, so that
    pairs would multiply more, a CTA that skips would still have to write P = 0 wherever the other keeps, and the
    halves of V would be fetched on the word of four query tiles in two CTAs. So do those of packed batches,
    whose work tiles are claimed one by one, which a pair would have to do together.

    The skip. After the maximum each warp of a query tile puts its vote into sVotes, all at one barrier (`decided`). A
    warp that wants the tile goes on at once, for the tile is kept whatever the others say; one that does not waits
    for them. The MMA warp reads the votes while the exponentials run, and waits for P only if there will be one; of
    a skipped tile it knows from the votes that S was read. A dense problem compiles none of it. In the timing model
    (d128, full mask, clocks for 128 keys of two query tiles, everything kept) this takes 2100 and the dense kernel
    without pairs 2075; a vote that held all four warps, read beside P, took 31 more than this one.
      Where the query tiles disagree, the way from S to P V and back to S takes longest: of tiles that only one of them
    keeps, 2034, of which its two products are 1024, and 1010 what lies between them: 100 until S is known to be there,
    130 to load it, 190 for maximum and vote, 485 for 96 columns of P, 60 to hand them over. Tried: an MMA thread for
    each query tile, so that neither waits for the other's P: 2546, because Q K^T of the one gets into the way of the
    other (both keep every other tile: 1986 and 1982, in turn: 2104 and 1993); query tile 1's next Q K^T first where
    only query tile 0 has a P to wait for: 2500, and 2901 instead of 2131 with all kept. P released in three or four
    parts: 2018 and 2113, but 2186 and 2368 instead of 2100 with all kept, because the products then wait within P V;
    exponentials of the last 32 columns emulated, too: 2070 and 2154; votes by all lanes, none elected: 2020 and 2115.
      V of a tile that both query tiles skip is not fetched behind a run of such tiles: the load warp fetches ahead
    until it has seen `hold_v_after` tiles in a row that nobody wanted, then waits for each vote (`decided`) before it
    fetches, until a tile is wanted again, whose load then takes longer than its exponentials. What it sees are votes of
    tiles that used the slot before, so v_lag tiles more are fetched in vain. An unwanted slot is passed on unfilled,
    and the MMA warp, which with two query tiles waits for V of wanted tiles only, takes it after the next Q K^T; K of
    one tile more is fetched before a vote is waited for.
      K by multicast to two CTAs, each with decisions of its own, was built and does not pay: L2 reads a quarter (all
    kept) to 44 % (hardly any) less, but all of K still enters either SM, and a slot of K waits for both. Clocks for
    128 keys at d256 with all, one of 2, of 4 and hardly any tiles kept, and half, at random for each CTA: alone 2048,
    2048, 1771, 1377, 1949; with it 2048, 2048, 1771, 1378, 2035; 2.5 to 7 % more on structured input. Were an SM's
    port twice as wide: 2048, 1920, 1602, 1246, 1918; with 48 bytes a clock from L2 instead of 64 (its port's width):
    alone 2731, 2731, 2148, 1544, 2499, with it 2180, 2076, 1814, 1378, 2096. At d128 and 192/128 it gains nothing.
    """

    def __init__(self, problem: Problem, config: Config) -> None:
        self.problem = problem
        self.config = config
        self.dtype = DTYPES[problem.dtype]
        self.sparse = problem.sparsity is not None
        self._check_supported()
        self.one_tile = config.query_tiles == 1
        self.pair = config.cta_pair
        self.persistent = config.ctas > 0
        self.says_s_read = config.p_apart and not self.sparse  # a sparse problem's votes imply it
        # The work tiles of a pair are dealt out in turn: a claim would have to reach both CTAs.
        self.dynamic = self.persistent and not self.pair
        self.steps_k = config.k_chunk // umma.INSTRUCTION_K
        self.steps_v = config.tile_n // umma.INSTRUCTION_K
        self.steps_early = config.p_early_columns // umma.INSTRUCTION_K
        rows = config.product_rows
        self.s_instruction = umma.instruction_descriptor(self.dtype, rows, config.tile_n, b_major_mn=False)
        # Whether K can be fetched for two KV tiles ahead of V, where the load warp waits for a vote before V.
        self.k_two_ahead = config.hold_v_after > 0 and config.k_stages > 2 * config.k_chunks
        # Of the next tile's K, the chunks that find room before this one's is read go before V, which is needed first.
        early = config.k_stages - config.k_chunks if config.query_tiles == 2 else config.k_chunks
        before_v = min(early, config.k_chunks) or config.k_chunks
        self.k_before_v, self.k_after_v = range(before_v), range(before_v, config.k_chunks)
        self.k_whole = range(config.k_chunks)
        self.v_lag = -(-config.v_stages // config.v_chunks)  # KV tiles after which a slot of V is used again
        assert max(self.v_lag, config.k_stages) + 2 < DECISIONS
        self.o_instruction = umma.instruction_descriptor(self.dtype, rows, config.v_chunk, b_major_mn=True)

    def _check_supported(self) -> None:
        """Raise `NotImplementedError` for a config that can not run the problem; `config.candidates` has none."""
        problem, config = self.problem, self.config
        if config.ctas > 0 and not may_stay(problem):
            raise NotImplementedError(
                f"{config.ctas=} with {problem.sparsity=}, {problem.varlen=}: registers suffice for one work tile per "
                "CTA, ctas=0"
            )
        if config.cta_pair and (self.sparse or problem.varlen or problem.mask == "band"):
            raise NotImplementedError(
                f"{config.cta_pair=} with {problem.sparsity=}, {problem.varlen=}, {problem.mask=}: "
                "pairs of CTAs compute dense problems, not packed, with a full or causal mask"
            )
        if config.cta_pair and (config.p_apart or config.p_early_columns == config.tile_n):
            raise NotImplementedError(
                f"{config.cta_pair=} with {config.p_apart=}, {config.p_early_columns=}: a pair of CTAs has P inside S, "
                "released in two parts"
            )
        if config.first_early and (config.cta_pair or problem.mask == "band"):
            raise NotImplementedError(
                f"{config.first_early=} with {config.cta_pair=}, {problem.mask=}: the first KV tile is visited "
                "early by CTAs that stay alone, with a full or causal mask"
            )

    @cute.jit
    def __call__(self, *values, stream):
        config, problem, dtype = self.config, self.problem, self.dtype
        prefill = prefill_operands(problem, values)
        ctas = tcgen05.CtaGroup.TWO if self.pair else tcgen05.CtaGroup.ONE
        rows = config.product_rows
        k_major, mn_major = OperandMajorMode.K, OperandMajorMode.MN
        mma_s = sm100.make_trivial_tiled_mma(dtype, dtype, k_major, k_major, Float32, ctas, (rows, config.tile_n))
        mma_o = sm100.make_trivial_tiled_mma(
            dtype, dtype, k_major, mn_major, Float32, ctas, (rows, config.v_chunk), tcgen05.OperandSource.TMEM
        )
        q_tile = (rows, config.tile_n, config.head_dim)
        k_tile = (rows, config.tile_n, config.k_chunk)
        v_tile = (rows, config.v_chunk, config.tile_n)
        sQ_layout = sm100.make_smem_layout_a(mma_s, q_tile, dtype, config.query_tiles)
        sK_layout = sm100.make_smem_layout_b(mma_s, k_tile, dtype, config.k_stages)
        sV_layout = sm100.make_smem_layout_b(mma_o, v_tile, dtype, config.v_stages)
        load = cpasync.CopyBulkTensorTileG2SOp(ctas)
        cluster = (config.ctas_per_tile, 1, 1)
        cluster_vmnk = cute.tiled_divide(cute.make_layout(cluster), (mma_s.thr_id.shape,)).shape
        modes = [0, 1, 2]
        q_atom, q = cute.nvgpu.make_tiled_tma_atom_A(
            load, prefill.q.tensor, cute.select(sQ_layout, mode=modes), q_tile, mma_s, cluster_vmnk
        )
        k_atom, k = cute.nvgpu.make_tiled_tma_atom_B(
            load, prefill.k.tensor, cute.select(sK_layout, mode=modes), k_tile, mma_s, cluster_vmnk
        )
        v_atom, v = cute.nvgpu.make_tiled_tma_atom_B(
            load, transposed(prefill.v.tensor), cute.select(sV_layout, mode=modes), v_tile, mma_o, cluster_vmnk
        )
        group = prefill.heads_q // cutlass.max(prefill.heads_kv, 1)
        pairing = Pairing.of(group) if self.pair else None
        kv_bytes_per_token = (problem.head_dim + problem.head_dim_v) * ELEMENT_BYTES
        heads, rows = (pairing.heads, pairing.rows) if self.pair else (1, TILE_M)
        all_heads = prefill.heads_q * prefill.batch
        in_cache = heads_in_cache(L2_BYTES, kv_bytes_per_token, prefill.lengths.seqlen_k, group, all_heads)
        order = TileOrder(
            m_blocks=cute.ceil_div(prefill.lengths.seqlen_q, rows * config.query_tiles),
            heads=prefill.heads_q // heads,
            batch=prefill.batch,
            heads_per_group=in_cache // heads,
            longest_first=problem.mask != "full",
            turning=problem.mask != "full" and self.persistent and not self.dynamic,
        )
        self.storage = shared_storage(config, dtype, sQ_layout, sK_layout, sV_layout)
        operands = Operands(
            prefill,
            q_atom,
            k_atom,
            v_atom,
            prefill.q.viewed_as(q),
            prefill.k.viewed_as(k),
            prefill.v.viewed_as(transposed(v)),
            mma_s,
            mma_o,
            sQ_layout,
            sK_layout,
            sV_layout,
            group,
            order,
            pairing,
        )
        self.kernel(operands).launch(
            grid=self._grid(order),
            block=(config.threads, 1, 1),
            cluster=cluster if self.pair else None,
            stream=stream,
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(self, op: Operands):
        config = self.config
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        storage = SmemAllocator().allocate(self.storage)
        pipes = self._pipes(storage)
        tiles = self._tiles(op, storage)
        if warp == 0:
            with cute.arch.elect_one():
                self._initialise(pipes)
                if const_expr(self.dynamic):
                    self._tile_ring(storage).initialise()
        if warp == config.load_warp:
            for atom in (op.q_atom, op.k_atom, op.v_atom):
                cpasync.prefetch_descriptor(atom)
        if warp == config.mma_warp:
            tmem.allocate(storage.tmem_base.ptr, self.pair)
        cute.arch.mbarrier_init_fence()
        self._sync_ctas()
        schedule = self._schedule(op, storage)

        if warp < config.softmax_warps:
            cute.arch.setmaxregister_increase(config.registers_softmax)
            self.softmax(op, pipes, tiles, schedule)
        elif warp < config.mma_warp:
            cute.arch.setmaxregister_decrease(config.registers_correction)
            pipes, tiles, schedule = self._own_views(op, storage)
            self.correct(op, pipes, tiles, schedule)
        else:
            cute.arch.setmaxregister_decrease(config.registers_other)
            pipes, tiles, schedule = self._own_views(op, storage)
            if warp == config.mma_warp:
                if self._leads():
                    if const_expr(self.one_tile):
                        self.multiply_one_tile(op, pipes, tiles, schedule)
                    else:
                        self.multiply(op, pipes, tiles, schedule)
            elif warp == config.load_warp:
                self.load(op, pipes, tiles, schedule)

        self._sync_ctas()
        if warp == config.mma_warp:
            tmem.deallocate(tmem.BASE, self.pair)

    # ------------------------------------------------------------------------------------------------ load

    @cute.jit
    def load(self, op: Operands, pipes: Pipes, tiles: Tiles, schedule):
        config = self.config
        rank = self._rank()
        k_cursor, v_cursor = producer_cursor(), producer_cursor()
        q_parity = Int32(0b11)  # one bit a query tile
        counts = [Int32(0)] * config.query_tiles  # KV tiles of each query tile in the work tiles before
        tile, claim = schedule.first_for_producer()
        while tile.m_block != NO_TILE:
            work = self._work(op, tile)
            mQ = op.q.sequence(work.head_idx, tile.batch_idx, work.span_q)
            mK = op.k.sequence(work.head_kv_idx, tile.batch_idx, work.span_k)
            mV = transposed(op.v.sequence(work.head_kv_idx, tile.batch_idx, work.span_k))
            gK = cute.local_tile(mK, (config.tile_n, config.k_chunk), (None, None))  # (.., .., KV tiles, chunks)
            gV = cute.local_tile(mV, (config.v_chunk, config.tile_n), (None, None))  # (.., .., chunks, KV tiles)
            tKsK, tKgK = tma_partition(op.k_atom, tiles.sK, op.mma_s.get_slice(rank).partition_B(gK))
            tVsV, tVgV = tma_partition(op.v_atom, tiles.sV, op.mma_o.get_slice(rank).partition_B(gV))
            steps = work.union.end - work.union.begin
            unwanted = Int32(0)  # KV tiles in a row, as far as is known
            if steps > 0:
                k_cursor = self._load_k(op, pipes, tKsK, tKgK, self._visited_tile(work, 0), k_cursor, self.k_whole)
                for s in self._query_tiles_as_multiplied():
                    if work.ranges[s].begin < work.ranges[s].end:
                        cute.arch.mbarrier_wait(pipes.q_empty + s, q_parity >> s & 1)
                        q_parity = q_parity ^ (1 << s)
                        self._load_q(op, pipes, tiles, mQ, self._first_row(op, tile, s), s)
            k_loaded = Int32(1)
            for i in cutlass.range(steps, unroll=1):
                next_k = i + 1 < steps
                if const_expr(self.k_two_ahead):
                    next_k = next_k and k_loaded <= i + 1
                if next_k:
                    next_tile = self._visited_tile(work, i + 1)
                    k_cursor = self._load_k(op, pipes, tKsK, tKgK, next_tile, k_cursor, self.k_before_v)
                    k_loaded = i + 2
                with span("load V"):
                    pipes.v.acquire(v_cursor)
                    fetch = Boolean(True)
                    if const_expr(config.hold_v_after > 0):
                        if unwanted < config.hold_v_after and i >= self.v_lag:
                            # The slot's last reader, P V of that tile, was issued after everybody's decision on it.
                            wanted = self._wanted(pipes, tiles, work, counts, i - self.v_lag, False)
                            unwanted = cutlass.select_(wanted, Int32(0), unwanted + 1)
                        if unwanted >= config.hold_v_after:
                            # If the vote is to skip, Q K^T of the next tile follows at once, and then needs this K.
                            if const_expr(len(self.k_after_v) > 0):
                                if next_k:
                                    next_tile = self._visited_tile(work, i + 1)
                                    k_cursor = self._load_k(op, pipes, tKsK, tKgK, next_tile, k_cursor, self.k_after_v)
                                next_k = Boolean(False)
                            if const_expr(self.k_two_ahead):
                                if k_loaded <= i + 2 and i + 2 < steps:
                                    next_tile = self._visited_tile(work, i + 2)
                                    k_cursor = self._load_k(op, pipes, tKsK, tKgK, next_tile, k_cursor, self.k_whole)
                                    k_loaded = i + 3
                            fetch = self._wanted(pipes, tiles, work, counts, i, True)
                            if fetch:
                                unwanted = Int32(0)
                    v_cursor = self._load_v(op, pipes, tVsV, tVgV, self._visited_tile(work, i), v_cursor, fetch)
                if const_expr(len(self.k_after_v) > 0):
                    if next_k:
                        next_tile = self._visited_tile(work, i + 1)
                        k_cursor = self._load_k(op, pipes, tKsK, tKgK, next_tile, k_cursor, self.k_after_v)
            counts = added(counts, [r.end - r.begin for r in work.ranges])
            tile, claim = schedule.next_for_producer(tile, claim)

    def _query_tiles_as_multiplied(self) -> list[int]:
        """The last rows first, if they see a KV tile that the others do not."""
        numbers = range(self.config.query_tiles)
        return list(numbers if self.problem.mask == "full" else reversed(numbers))

    @cute.jit
    def _load_q(
        self, op: Operands, pipes: Pipes, tiles: Tiles, mQ, first_row: Int32, query_tile: cutlass.Constexpr[int]
    ):
        """The rows from `first_row` on; the rest of a product's rows are the other CTA's."""
        config = self.config
        barrier = pipes.q_full + query_tile
        gQ = cute.local_tile(
            cute.domain_offset((first_row, 0), mQ), (config.product_rows, config.head_dim), (0, 0)
        )  # (product_rows, head_dim)
        tQsQ, tQgQ = tma_partition(op.q_atom, tiles.sQ, op.mma_s.get_slice(umma.LEADER).partition_A(gQ))
        self._expect(barrier, config.q_bytes // config.query_tiles)
        cute.copy(op.q_atom, tQgQ, tQsQ[None, query_tile], tma_bar_ptr=barrier)

    @cute.jit
    def _load_k(
        self,
        op: Operands,
        pipes: Pipes,
        tKsK,
        tKgK,
        n_block: Int32,
        cursor: Cursor,
        chunks: cutlass.Constexpr[range],
    ):
        with span("load K"):
            for chunk in chunks:
                pipes.k.acquire(cursor)
                barrier = pipes.k.full(cursor)
                self._expect(barrier, self.config.k_slot_bytes)
                cute.copy(op.k_atom, tKgK[None, n_block, chunk], tKsK[None, cursor.index], tma_bar_ptr=barrier)
                cursor = pipes.k.advanced(cursor)
        return cursor

    @cute.jit
    def _load_v(self, op: Operands, pipes: Pipes, tVsV, tVgV, n_block: Int32, cursor: Cursor, fetch: Boolean):
        """V of a tile whose first slot is empty; if nobody wants it, the slots count as full as they are."""
        for chunk in cutlass.range_constexpr(self.config.v_chunks):
            if const_expr(chunk > 0):
                pipes.v.acquire(cursor)
            barrier = pipes.v.full(cursor)
            if fetch:
                self._expect(barrier, self.config.v_slot_bytes)
                cute.copy(op.v_atom, tVgV[None, chunk, n_block], tVsV[None, cursor.index], tma_bar_ptr=barrier)
            else:
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(barrier)
            cursor = pipes.v.advanced(cursor)
        return cursor

    @cute.jit
    def _expect(self, barrier, tx_bytes: cutlass.Constexpr[int]):
        """The whole warp: announce what each CTA loads. In a pair all of it arrives on the leader's barrier."""
        if self._leads():
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(barrier, tx_bytes * self.config.ctas_per_tile)

    @cute.jit
    def _wanted(
        self, pipes: Pipes, tiles: Tiles, work: Work, counts, i: Int32, wait: cutlass.Constexpr[bool]
    ) -> Boolean:
        """Whether any query tile keeps the i-th KV tile, once one has or all have decided, for which to `wait`."""
        wanted = Boolean(False)
        for s in cutlass.range_constexpr(self.config.query_tiles):
            before = i - (work.union.end - work.ranges[s].end)  # KV tiles of the query tile before this one
            if not wanted and is_within(before, 0, work.ranges[s].end - work.ranges[s].begin):
                number = counts[s] + before
                if const_expr(wait):
                    kept = self._decided(pipes, tiles, s, number)
                else:
                    kept = self._decision(tiles, s, number)
                wanted = kept
        return wanted

    # ------------------------------------------------------------------------------------------------ mma

    @cute.jit
    def multiply(self, op: Operands, pipes: Pipes, tiles: Tiles, schedule):
        """Two query tiles. Of each work tile one thread does everything: it waits, issues and commits."""
        fragments = self._fragments(op, tiles)
        k_cursor, v_cursor = consumer_cursor(), consumer_cursor()
        p_parity = Int32(0)  # one bit a query tile: of kept tiles
        work_parity = Int32(0)  # one bit a query tile: of work tiles in which it has KV tiles
        counts = [Int32(0), Int32(0)]  # KV tiles of each query tile in the work tiles before
        tile, claim = schedule.first()
        while tile.m_block != NO_TILE:
            work = self._work(op, tile)
            sizes = [r.end - r.begin for r in work.ranges]
            if umma.elected():
                products = Products(fragments, pipes, tiles, work, sizes, counts, work_parity)
                k_cursor, v_cursor, p_parity = self._multiply_work(products, k_cursor, v_cursor, p_parity)
            cute.arch.sync_warp()
            for s in cutlass.range_constexpr(2):
                work_parity = work_parity ^ (Int32(sizes[s] > 0) << s)
            counts = added(counts, sizes)
            tile, claim = schedule.next(tile, claim)

    @cute.jit
    def _multiply_work(self, products: Products, k_cursor: Cursor, v_cursor: Cursor, p_parity: Int32):
        """One thread, a work tile. Step i multiplies P of the i-th KV tile with its V, and Q with K of the next."""
        config, plan = self.config, self.config.tmem
        _, pipes, tiles, work, sizes, counts, work_parity = products
        steps = work.union.end - work.union.begin
        # The step of a query tile's first KV tile; opaque, because the compiler would otherwise subtract in every step.
        firsts = [umma.opaque(work.union.end - r.end) for r in work.ranges]
        if steps > 0:
            for s in cutlass.range_constexpr(2):
                next_k = self._next_scores(products, k_cursor, s, Int32(1), -firsts[s])
            k_cursor = next_k
        for i in cutlass.range(steps, unroll=1):
            with span("products"):
                wanted = Boolean(not self.sparse)  # V is read
                next_k, next_v = k_cursor, v_cursor
                for s in cutlass.range_constexpr(2):
                    before = i - firsts[s]  # KV tiles of the query tile before this one
                    keep = is_within(before, 0, sizes[s])
                    number = counts[s] + before
                    parity = number & 1
                    if const_expr(self.sparse):
                        if keep:
                            keep = self._kept(pipes, tiles, s, number)
                        parity = p_parity >> s & 1
                        wanted = wanted | keep
                    if const_expr(config.p_apart):
                        next_k = self._next_scores(products, k_cursor, s, i + 2, before + 1, number)
                    if const_expr(s == 0 and not self.sparse):
                        pipes.v.wait(v_cursor)  # before P, for which the product then waits alone
                    if keep:
                        if const_expr(self.sparse):
                            pipes.v.wait(v_cursor)
                        cute.arch.mbarrier_wait(pipes.p_ready + s, parity)
                        tmem.fence_after_sync()
                        if const_expr(self.sparse):
                            p_parity = p_parity ^ (1 << s)
                        if const_expr(self.persistent):
                            if before == 0:  # which is always kept
                                cute.arch.mbarrier_wait(pipes.o_free + s, (work_parity >> s & 1) ^ 1)
                                tmem.fence_after_sync()
                    next_v = v_cursor
                    for chunk in cutlass.range_constexpr(config.v_chunks):
                        if const_expr(s == 0 and chunk > 0 and not self.sparse):
                            pipes.v.wait(next_v)
                        if keep:
                            if const_expr(chunk > 0 and self.sparse):
                                pipes.v.wait(next_v)
                            self._values(
                                products.fragments.v,
                                plan.outputs[s] + chunk * config.v_chunk,
                                plan.probabilities[s],
                                products.fragments.v.of_slot(next_v.index),
                                chunk,
                                before != 0,
                                pipes.p_rest + s,
                                parity,
                            )
                        if const_expr(chunk + 1 == config.v_chunks and config.p_apart):
                            if keep:
                                umma.commit(pipes.o_step + s, self.pair)
                        if const_expr(s == 1):
                            if wanted:
                                umma.commit(pipes.v.empty(next_v), self.pair)
                        if const_expr(s == 1 or chunk + 1 < config.v_chunks):
                            next_v = pipes.v.advanced(next_v)
                    if const_expr(not config.p_apart):
                        next_k = self._next_scores(products, k_cursor, s, i + 2, before + 1)
                if const_expr(self.sparse):
                    if not wanted:
                        for _ in cutlass.range_constexpr(config.v_chunks):
                            pipes.v.wait(v_cursor)
                            cute.arch.mbarrier_arrive(pipes.v.empty(v_cursor))
                            v_cursor = pipes.v.advanced(v_cursor)
                k_cursor, v_cursor = next_k, next_v
        self._commit_active(pipes.o_done, sizes)
        return k_cursor, v_cursor, p_parity

    @cute.jit
    def _next_scores(
        self,
        products: Products,
        k_cursor: Cursor,
        query_tile: cutlass.Constexpr[int],
        nth: Int32,
        before: Int32,
        last: Any = None,
    ):
        """One thread: S of the KV tile after the first `before` of a query tile, which is the `nth` of the
        work tile, counted from 1, if there is one. Query tile 0 waits for its K, query tile 1 hands it back, and after
        the last one Q. Returns what follows in K's ring. `last` is the number of the query tile's last KV tile,
        whose S must have been read; P of the one before a work tile has been waited for, which tells as much."""
        config = self.config
        fragments, pipes, _, work, sizes, _, work_parity = products
        steps = work.union.end - work.union.begin
        exists = nth <= steps
        active = is_within(before, 0, sizes[query_tile])
        for chunk in cutlass.range_constexpr(config.k_chunks):
            if const_expr(query_tile == 0):
                if exists:
                    pipes.k.wait(k_cursor)
            if active:
                if const_expr(chunk == 0):
                    if const_expr(self.says_s_read and last is not None):
                        cute.arch.mbarrier_wait(pipes.s_read + query_tile, last & 1)
                        tmem.fence_after_sync()
                    if before == 0:
                        cute.arch.mbarrier_wait(pipes.q_full + query_tile, work_parity >> query_tile & 1)
                scores = config.tmem.scores[query_tile]
                self._scores(fragments, scores, query_tile, chunk, k_cursor.index)
                if const_expr(chunk + 1 == config.k_chunks):
                    umma.commit(pipes.s_full + query_tile, self.pair)
            if const_expr(query_tile == 0):
                if const_expr(chunk + 1 < config.k_chunks):
                    k_cursor = pipes.k.advanced(k_cursor)
            elif exists:
                umma.commit(pipes.k.empty(k_cursor), self.pair)
                if const_expr(chunk + 1 == config.k_chunks):
                    if nth == steps:
                        self._commit_active(pipes.q_empty, sizes)
                k_cursor = pipes.k.advanced(k_cursor)
        return k_cursor

    @cute.jit
    def multiply_one_tile(self, op: Operands, pipes: Pipes, tiles: Tiles, schedule):
        """One query tile. Of each work tile one thread does everything, as in `multiply`."""
        fragments = self._fragments(op, tiles)
        k_cursor, v_cursor = consumer_cursor(), consumer_cursor()
        first = Int32(0)  # KV tiles before this work tile
        p_parity = Int32(0)  # one bit a buffer of S: of kept tiles
        work_parity = Int32(0)  # of work tiles that have KV tiles
        tile, claim = schedule.first()
        while tile.m_block != NO_TILE:
            work = self._work(op, tile)
            steps = work.union.end - work.union.begin
            if umma.elected():
                products = Products(fragments, pipes, tiles, work, [steps], [first], work_parity)
                k_cursor, v_cursor, p_parity = self._multiply_work_of_one_tile(products, k_cursor, v_cursor, p_parity)
            cute.arch.sync_warp()
            work_parity = work_parity ^ Int32(steps > 0)
            first += steps
            tile, claim = schedule.next(tile, claim)

    @cute.jit
    def _multiply_work_of_one_tile(self, products: Products, k_cursor: Cursor, v_cursor: Cursor, p_parity: Int32):
        """One thread, a work tile. Step i multiplies Q with K of the i-th KV tile, then P of the last with its V."""
        config, plan = self.config, self.config.tmem
        _, pipes, tiles, _, (steps,), (first,), work_parity = products
        for i in cutlass.range(steps + cutlass.min(steps, 1), unroll=1):
            with span("Q K^T"):
                if i < steps:
                    if i == 0:
                        cute.arch.mbarrier_wait(pipes.q_full, work_parity)
                    buffer = (first + i) & 1
                    for chunk in cutlass.range_constexpr(config.k_chunks):
                        pipes.k.wait(k_cursor)
                        scores = plan.scores[0] + buffer * plan.buffer_stride
                        self._scores(products.fragments, scores, 0, chunk, k_cursor.index)
                        if const_expr(chunk == config.k_chunks - 1):
                            umma.commit(pipes.s_full + buffer, self.pair)
                        umma.commit(pipes.k.empty(k_cursor), self.pair)
                        k_cursor = pipes.k.advanced(k_cursor)
                    if i == steps - 1:
                        umma.commit(pipes.q_empty, self.pair)
            with span("P V"):
                if i > 0:
                    last = first + i - 1
                    buffer = last & 1
                    keep = self._kept(pipes, tiles, 0, last)
                    if keep:
                        cute.arch.mbarrier_wait(pipes.p_ready + buffer, p_parity >> buffer & 1)
                        tmem.fence_after_sync()
                        if const_expr(self.persistent):
                            if i == 1:  # the first KV tile, which is always kept
                                cute.arch.mbarrier_wait(pipes.o_free, work_parity ^ 1)
                                tmem.fence_after_sync()
                    for chunk in cutlass.range_constexpr(config.v_chunks):
                        pipes.v.wait(v_cursor)
                        if keep:
                            self._values(
                                products.fragments.v,
                                plan.outputs[0] + chunk * config.v_chunk,
                                plan.probabilities[0] + buffer * plan.probabilities_stride,
                                products.fragments.v.of_slot(v_cursor.index),
                                chunk,
                                i != 1,
                                pipes.p_rest + buffer,
                                p_parity >> buffer & 1,
                            )
                        umma.commit(pipes.v.empty(v_cursor), self.pair)
                        v_cursor = pipes.v.advanced(v_cursor)
                    if keep:
                        umma.commit(pipes.o_step, self.pair)
                        p_parity = p_parity ^ (1 << buffer)
                    if i == steps:
                        umma.commit(pipes.o_done, self.pair)
        return k_cursor, v_cursor, p_parity

    def _kept(self, pipes: Pipes, tiles: Tiles, query_tile: int, number: Int32):
        """One thread: whether there will be a P of a query tile's `number`-th KV tile: always, in a dense problem. If
        not, S is read. Known long before P is ready, and so not waited for beside it."""
        if not self.sparse:
            return True
        self._await_decision(pipes, query_tile, number)
        tmem.fence_after_sync()
        return self._is_wanted(tiles, query_tile, number)

    def _decided(self, pipes: Pipes, tiles: Tiles, query_tile, number: Int32) -> Boolean:
        """The whole warp: whether a query tile's `number`-th KV tile is kept, once its four warps have voted."""
        self._await_decision(pipes, query_tile, number)
        return self._decision(tiles, query_tile, number)

    def _await_decision(self, pipes: Pipes, query_tile, number: Int32) -> None:
        barrier = pipes.decided + self._decision_slot(query_tile, number)
        cute.arch.mbarrier_wait(barrier, number >> DECISIONS_LOG2 & 1)

    def _decision(self, tiles: Tiles, query_tile, number: Int32) -> Boolean:
        """The whole warp reads whether any of the four voted for a KV tile."""
        wanted = self._is_wanted(tiles, query_tile, number)
        cute.arch.sync_warp()  # all lanes have read before one of them lets the slot be written again
        return wanted

    def _is_wanted(self, tiles: Tiles, query_tile, number: Int32) -> Boolean:
        return tiles.sVotes[self._decision_slot(query_tile, number)] != 0

    def _decision_slot(self, query_tile, number: Int32) -> Int32:
        return query_tile * DECISIONS + (number & (DECISIONS - 1))

    def _fragments(self, op: Operands, tiles: Tiles) -> Fragments:
        return Fragments(
            umma.operand(op.mma_s.make_fragment_A(tiles.sQ)),
            umma.operand(op.mma_s.make_fragment_B(tiles.sK)),
            umma.operand(op.mma_o.make_fragment_B(tiles.sV)),
        )

    @cute.jit
    def _commit_active(self, barriers, sizes):
        """One thread: arrive on the barrier of each query tile that has KV tiles, after all products so far."""
        for s in cutlass.range_constexpr(2):
            if sizes[s] > 0:
                umma.commit(barriers + s, self.pair)

    @cute.jit
    def _scores(
        self,
        fragments: Fragments,
        accumulator: Int32,
        query_tile: cutlass.Constexpr[int],
        chunk: cutlass.Constexpr[int],
        k_slot: Int32,
    ):
        """One thread: S = Q K^T, or for a later chunk of head_dim, S += Q K^T."""
        q, k = fragments.q, fragments.k
        k_first = k.of_slot(k_slot)
        # Recomputed here, because the compiler would otherwise hold one register pair an instruction.
        q_first = umma.opaque(q.first) + query_tile * q.slot_stride
        for step in cutlass.range_constexpr(self.steps_k):
            q_step = q_first + q.steps[chunk * self.steps_k + step]
            accumulate = chunk > 0 or step > 0
            k_step = k_first + k.steps[step]
            umma.issue_from_shared(accumulator, q_step, k_step, self.s_instruction, accumulate, self.pair)

    @cute.jit
    def _values(
        self,
        v: umma.Operand,
        accumulator: Int32,
        probabilities: Int32,
        v_first: Int64,
        chunk: cutlass.Constexpr[int],
        accumulate,
        rest_barrier,
        rest_parity,
    ):
        """One thread: O (+)= P V for the columns of one chunk of V, whose slot v_first describes; the first chunk waits
        for the rest of P."""
        for step in cutlass.range_constexpr(self.steps_v):
            if const_expr(chunk == 0 and step == self.steps_early):
                cute.arch.mbarrier_wait(rest_barrier, rest_parity)
                tmem.fence_after_sync()
            self._value_step(accumulator, probabilities, v_first, v, step, accumulate if step == 0 else True)

    def _value_step(self, accumulator, probabilities, v_first, v, step, accumulate) -> None:
        p_step = probabilities + step * umma.INSTRUCTION_K // 2  # two elements of P a column
        v_step = v_first + v.steps[step]
        umma.issue_from_tensor(accumulator, p_step, v_step, self.o_instruction, accumulate, self.pair)

    # ------------------------------------------------------------------------------------------------ softmax

    @cute.jit
    def softmax(self, op: Operands, pipes: Pipes, tiles: Tiles, schedule):
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        query_tile = warp // WARPS_PER_GROUP
        row = cute.arch.thread_idx()[0] % GROUP_THREADS
        lane = tmem.lane_offset(warp % WARPS_PER_GROUP)
        count = Int32(0)  # KV tiles seen by this warpgroup
        kept = cute.make_rmem_tensor(1, Int32)
        kept[0] = Int32(0)
        free_parity = Int32(1)
        tile, claim = schedule.first()
        while tile.m_block != NO_TILE:
            span_q, span_k = self._spans(op, tile)
            band = self._band(op, span_q, span_k)
            head_idx = self._head_idx(op, tile)
            first_row = self._first_row(op, tile, query_tile)
            visited = tile_range(band, first_row, TILE_M)
            q_idx = first_row + row
            own_row = row
            if const_expr(self.problem.mask == "band"):
                # The compiler would otherwise hold the row and terms of both edges from work tile to work tile.
                q_idx = umma.opaque(q_idx)
                own_row = q_idx & (TILE_M - 1)
            thread = Thread(query_tile, own_row, q_idx, q_idx < span_q.length, lane)
            kept_before = kept[0]
            state = RowSoftmax.create(op.prefill.scale.scale_log2, self._threshold_log2(op, head_idx, tile.batch_idx))
            step = Step(op, pipes, tiles, head_idx, tile.batch_idx, band, thread, state, kept)
            factor, lse = Float32(0.0), Float32(-Float32.inf)
            if const_expr(op.prefill.sink is not None):
                lse = op.prefill.sink[head_idx]
            products = visited.end > 0
            if const_expr(self.pair):
                walked = self._products(op, band, tile, query_tile)
                products = walked.end > 0
                for _ in cutlass.range(walked.end - visited.end, unroll=1):
                    self._blank_tile(step, count)
                    count += 1
            if visited.end > 0:
                whole = band.whole(first_row, TILE_M)
                whole_end = cutlass.max(cutlass.min(whole.end, visited.end - 1), visited.begin)
                whole_begin = cutlass.min(cutlass.max(whole.begin, visited.begin), whole_end)
                cta_whole_end = self._whole_end(op, band, tile)
                self._softmax_tile(step, self._in_order(visited.end - 1, cta_whole_end), count, True, EDGES)
                count += 1
                if const_expr(band.has_right):
                    for i in cutlass.range(visited.end - 1 - whole_end, unroll=1):
                        self._softmax_tile(step, visited.end - 2 - i, count, False, EDGES)
                        count += 1
                for i in cutlass.range(whole_end - whole_begin, unroll=1):
                    n_block = self._in_order(whole_end - 1 - i, cta_whole_end)
                    self._softmax_tile(step, n_block, count, False, ())
                    count += 1
                if const_expr(band.has_left):
                    for i in cutlass.range(whole_begin - visited.begin, unroll=1):
                        self._softmax_tile(step, whole_begin - 1 - i, count, False, ("left",))
                        count += 1
                factor, lse = state.finish(None if const_expr(op.prefill.sink is None) else op.prefill.sink[head_idx])
            if products:
                if const_expr(self.persistent):
                    cute.arch.mbarrier_wait(pipes.factor_free + query_tile, free_parity)
                    free_parity = free_parity ^ 1
                tiles.sFactor[thread.row, query_tile] = factor
                cute.arch.mbarrier_arrive(pipes.row_done + query_tile)
            if const_expr(self.problem.return_lse):
                if thread.in_sequence:
                    self._store_lse(op, head_idx, tile.batch_idx, span_q.first + q_idx, lse)
            if const_expr(self.problem.return_stats):
                if thread.row == 0:
                    self._count_tiles(step, kept[0] - kept_before, visited.end - visited.begin)
            tile, claim = schedule.next(tile, claim)

    @cute.jit
    def _softmax_tile(
        self, step, n_block: Int32, count: Int32, first: cutlass.Constexpr[bool], edges: cutlass.Constexpr[tuple]
    ):
        """One KV tile: the `count`-th of this warpgroup."""
        config = self.config
        thread, state = step.thread, step.state
        with span("await S"):
            buffer, address = self._await_scores(step, count)
        with span("softmax"):
            scores = tmem.load_row(address, config.tile_n, FRAGMENT)
            if const_expr(self.says_s_read):
                tmem.fence_before_sync()
                cute.arch.mbarrier_arrive(step.pipes.s_read + buffer)
            if const_expr(self.problem.softcap):
                scores = [cute.math.tanh(s * step.op.prefill.scale.tanh_scale, fastmath=True) for s in scores]
            seen = None
            if const_expr(len(edges) > 0):
                seen = self._seen(step, n_block, edges)
                scores, tile_max = self._masked(scores, seen)
            else:
                tile_max = tile_maximum(scores)
            if const_expr(first):
                state.start(tile_max, thread.in_sequence)
                if const_expr(self.sparse):
                    if const_expr(config.p_apart):
                        tmem.fence_before_sync()
                        cute.arch.sync_warp()  # one lane tells for all of them that S is read
                    self._say(step, count, Boolean(True))
                self._keep(step, n_block, buffer, address, scores, None, seen)
            elif const_expr(not self.sparse):
                self._keep(step, n_block, buffer, address, scores, tile_max, seen)
            else:
                if self._vote(step, count, state.wants(tile_max)):
                    self._keep(step, n_block, buffer, address, scores, tile_max, seen)
                else:
                    self._record(step, n_block, SKIPPED)

    @cute.jit
    def _vote(self, step, count: Int32, row_wants: Boolean) -> Boolean:
        """Whether any row of the query tile wants a KV tile. A warp that does need not ask the others."""
        wanted = cute.arch.vote_any_sync(row_wants)
        tmem.fence_before_sync()
        cute.arch.sync_warp()  # one lane tells for all of them that S is read
        self._say(step, count, wanted)
        if not wanted:
            wanted = self._decided(step.pipes, step.tiles, step.thread.query_tile, count)
        return wanted

    @cute.jit
    def _say(self, step, count: Int32, wanted: Boolean):
        """The whole warp: its vote on a KV tile, for the other warps of its query tile, the MMA and the load warp."""
        slot = self._decision_slot(step.thread.query_tile, count)
        votes = cute.recast_tensor(step.tiles.sVotes, Uint8)
        with cute.arch.elect_one():
            votes[slot * WARPS_PER_GROUP + step.thread.row // THREADS_PER_WARP] = Uint8(wanted)
            cute.arch.mbarrier_arrive(step.pipes.decided + slot)

    def _seen(self, step, n_block: Int32, edges: tuple) -> Seen:
        """What this thread's row and its warp's see of a KV tile with these `edges` of the band.

        In columns, which takes the fewest instructions; but under a full mask, where all last tiles end alike, ptxas
        would then compare all columns with that end ahead of all work tiles, and spill the results.
        """
        first_key = n_block * self.config.tile_n
        warp_row = cute.arch.make_warp_uniform(step.thread.q_idx)
        rows = step.thread.q_idx, warp_row, warp_row + (THREADS_PER_WARP - 1)
        if self.problem.mask == "full":
            return Seen(*(step.band.columns(row, 0, edges) for row in rows), first_key)
        return Seen(*(step.band.columns(row, first_key, edges) for row in rows), None)

    @cute.jit
    def _masked(self, scores: list, seen):
        """A row's scores with -inf for hidden keys, but for fragments of which this warp's rows see nothing, and the
        row's maximum. The mask's edge crosses few fragments: of 128 keys at the diagonal a warp sees a quarter to all,
        and compares one fragment's keys with its rows' ends. Which fragments it sees is found anew for the
        exponentials: kept from here until then, it would spill beside a vote."""
        tile_max = Float32(-Float32.inf)
        fragments = []
        for first_column in cutlass.range_constexpr(0, self.config.tile_n, FRAGMENT):
            fragment = scores[first_column : first_column + FRAGMENT]
            if seen.by_some(first_column):
                if not seen.by_all(first_column):
                    fragment = seen.hidden(fragment, first_column)
                tile_max = maximum(tile_max, tile_maximum(fragment))
            fragments += fragment
        return fragments, tile_max

    @cute.jit
    def _await_scores(self, step, count: Int32):
        """The buffer of S, and the address of this thread's row in it, once it is full."""
        plan = self.config.tmem
        buffer, parity = step.thread.query_tile, count & 1
        if const_expr(self.one_tile):
            buffer, parity = count & 1, count >> 1 & 1
        cute.arch.mbarrier_wait(step.pipes.s_full + buffer, parity)
        tmem.fence_after_sync()
        return buffer, step.thread.lane + plan.scores[0] + buffer * plan.buffer_stride

    @cute.jit
    def _blank_tile(self, step, count: Int32):
        """A KV tile that only the other CTA's rows of the products see: P is 0."""
        config, pipes = self.config, step.pipes
        buffer, _ = self._await_scores(step, count)
        p_address = self._p_address(step, buffer, False)
        for first_column in cutlass.range_constexpr(0, config.tile_n // 2, FRAGMENT):
            tmem.store(p_address + first_column, [Int32(0)] * FRAGMENT)
        tmem.wait_stores()
        tmem.fence_before_sync()
        self._tell_leader(pipes.p_ready + buffer)
        self._tell_leader(pipes.p_rest + buffer)
        step.kept[0] = step.kept[0] + 1

    @cute.jit
    def _p_address(self, step, buffer, first: cutlass.Constexpr[bool]):
        """Of this thread's row in a buffer of P, once it may be written: P apart from S, when the last P V is done, as
        S of a row's first KV tile implies."""
        plan = self.config.tmem
        if const_expr(self.config.p_apart and not first):
            cute.arch.mbarrier_wait(step.pipes.o_step + buffer, (step.kept[0] - 1) & 1)
            tmem.fence_after_sync()
        return step.thread.lane + plan.probabilities[0] + buffer * plan.probabilities_stride

    @cute.jit
    def _keep(
        self,
        step,
        n_block: Int32,
        buffer,
        address: Int32,
        scores,
        tile_max,
        seen,
    ):
        """P, O's rescaling if need be, and the row sum, of a kept tile; tile_max is None for a row's first."""
        config, pipes, state = self.config, step.pipes, step.state
        first, masked = tile_max is None, seen is not None
        p_address = self._p_address(step, buffer, first)
        if const_expr(not first):
            self._rescale(step, tile_max)
        sums = [(Float32(0.0), Float32(0.0))] * SUM_CHAINS if masked else []
        for first_column in cutlass.range_constexpr(0, config.tile_n, FRAGMENT):
            last = first_column + FRAGMENT == config.tile_n
            # The end of P is waited for: it is made the fastest way. Masked tiles are few, and short of registers.
            emulated = 0 if last or masked else config.exp2_emulated
            fragment = scores[first_column : first_column + FRAGMENT]
            if const_expr(not masked):
                p = exponentials(state.exponents(fragment), emulated)
                tmem.store(p_address + first_column // 2, pack(p, self.dtype))
                # The sums run beside the exponential unit, which takes eight clocks for a warp's instruction.
                sums = accumulated(sums, p)
            else:
                if seen.by_some(first_column):
                    p = exponentials(state.exponents(fragment), emulated)
                    tmem.store(p_address + first_column // 2, pack(p, self.dtype))
                    sums = accumulated(list(sums), p)
                else:
                    tmem.store(p_address + first_column // 2, [Int32(0)] * (FRAGMENT // 2))
            if const_expr(first_column + FRAGMENT == config.p_early_columns):
                self._record(step, n_block, KEPT)  # beside the exponentials, which it would hold up before
                tmem.wait_stores()
                tmem.fence_before_sync()
                self._tell_leader(pipes.p_ready + buffer)
        if const_expr(config.p_early_columns < config.tile_n):
            tmem.wait_stores()
            tmem.fence_before_sync()
            self._tell_leader(pipes.p_rest + buffer)
        state.add(sums, first)
        step.kept[0] = step.kept[0] + 1

    @cute.jit
    def _rescale(self, step, tile_max: Float32):
        """Move the reference where the maximum outgrew it, and O with it."""
        config = self.config
        factor = cute.make_rmem_tensor(1, Float32)
        moved = step.state.advance(tile_max, factor)
        if moved:
            if const_expr(self.one_tile):
                cute.arch.mbarrier_wait(step.pipes.o_step, (step.kept[0] - 1) & 1)
                tmem.fence_after_sync()
            output = step.thread.lane + config.tmem.outputs[0] + step.thread.query_tile * config.tmem.output_stride
            for first_column in cutlass.range_constexpr(0, config.head_dim_v, RESCALE_FRAGMENT):
                columns = tmem.load_row(output + first_column, RESCALE_FRAGMENT, RESCALE_FRAGMENT)
                tmem.store(output + first_column, multiply_row(columns, factor[0]))

    @cute.jit
    def _record(self, step, n_block: Int32, decision: cutlass.Constexpr[int]):
        """Tell the skip map what became of a tile."""
        if const_expr(self.problem.return_stats):
            if step.thread.row == 0:
                map_row = step.thread.q_idx // TILE_M
                skip_map = step.op.prefill.stats.skip_map
                skip_map[step.batch_idx, step.head_idx, map_row, n_block] = Uint8(decision)

    @cute.jit
    def _count_tiles(self, step, kept: Int32, visited: Int32):
        counts = step.op.prefill.stats.tile_counts
        kept = kept if const_expr(self.sparse) else visited
        for i, count in enumerate((kept, visited)):
            offset = cute.crd2idx((i, step.batch_idx, step.head_idx), counts.layout)
            cute.arch.atomic_add(counts.iterator + offset, count, sem="relaxed", scope="gpu")

    @cute.jit
    def _store_lse(self, op: Operands, head_idx: Int32, batch_idx: Int32, token: Int32, lse: Float32):
        batch_idx = 0 if const_expr(self.problem.varlen) else batch_idx
        op.prefill.lse[token, head_idx, batch_idx] = lse

    # ------------------------------------------------------------------------------------------------ correction

    @cute.jit
    def correct(self, op: Operands, pipes: Pipes, tiles: Tiles, schedule):
        config, plan = self.config, self.config.tmem
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        row = cute.arch.thread_idx()[0] % GROUP_THREADS
        lane = tmem.lane_offset(warp % WARPS_PER_GROUP)
        parity = Int32(0)  # one bit a query tile
        tile, claim = schedule.first()
        while tile.m_block != NO_TILE:
            work = self._work(op, tile)
            mO = op.prefill.out.sequence(work.head_idx, tile.batch_idx, work.span_q)
            with span("store"):
                for s in cutlass.range_constexpr(config.query_tiles):
                    q_idx = self._first_row(op, tile, s) + row
                    gO = mO[q_idx, None]
                    exists = q_idx < work.span_q.length
                    if work.ranges[s].begin < work.ranges[s].end:
                        cute.arch.mbarrier_wait(pipes.row_done + s, parity >> s & 1)
                        factor = tiles.sFactor[row, s]
                        if const_expr(self.persistent):
                            cute.arch.mbarrier_arrive(pipes.factor_free + s)
                        cute.arch.mbarrier_wait(pipes.o_done + s, parity >> s & 1)
                        tmem.fence_after_sync()
                        parity = parity ^ (1 << s)
                        output = lane + plan.outputs[s]
                        for first_column in cutlass.range_constexpr(0, config.head_dim_v, STORE_FRAGMENT):
                            columns = tmem.load_row(output + first_column, STORE_FRAGMENT, STORE_FRAGMENT)
                            if const_expr(self.persistent and first_column + STORE_FRAGMENT == config.head_dim_v):
                                tmem.fence_before_sync()
                                self._tell_leader(pipes.o_free + s)
                            words = self._output_words(columns, factor)
                            if exists:
                                self._store_columns(gO, first_column, words)
                    elif exists:  # nothing was multiplied
                        zeros = [Int32(0)] * (STORE_FRAGMENT // 2)
                        for first_column in cutlass.range_constexpr(0, config.head_dim_v, STORE_FRAGMENT):
                            self._store_columns(gO, first_column, zeros)
            tile, claim = schedule.next(tile, claim)

    def _output_words(self, columns: list, factor: Float32) -> list:
        """Columns of O, scaled and rounded, two to a word; a row without keys is 0, whatever V holds."""
        words = pack(multiply_row(columns, factor), self.dtype)
        if self.problem.mask == "full":  # every row has keys, or the tile is not multiplied
            return words
        return [cutlass.select_(factor == 0.0, Int32(0), word) for word in words]

    @cute.jit
    def _store_columns(self, gO: cute.Tensor, first_column: cutlass.Constexpr[int], words):
        """Store STORE_FRAGMENT columns of a row of O, two to a word, as far as they exist."""
        for i in cutlass.range_constexpr(0, STORE_FRAGMENT, STORE_ELEMENTS):
            if const_expr(first_column + i < self.problem.head_dim_v):
                vector = cute.make_rmem_tensor(STORE_ELEMENTS // 2, Int32)
                for j in cutlass.range_constexpr(STORE_ELEMENTS // 2):
                    vector[j] = words[i // 2 + j]
                target = cute.local_tile(gO, (STORE_ELEMENTS,), ((first_column + i) // STORE_ELEMENTS,))
                cute.autovec_copy(cute.recast_tensor(vector, self.dtype), target)

    # ------------------------------------------------------------------------------------------------ all roles

    def _rank(self):
        """Which CTA of the pair this is."""
        return cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster()) if self.pair else umma.LEADER

    def _leads(self):
        """Whether this CTA issues the products."""
        return self._rank() == umma.LEADER

    @cute.jit
    def _tell_leader(self, barrier):
        """The whole warp arrives on a barrier of the CTA that issues the products: in a pair once, else each thread."""
        if const_expr(self.pair):
            cute.arch.sync_warp()
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(barrier, umma.LEADER)
        else:
            cute.arch.mbarrier_arrive(barrier)

    @cute.jit
    def _sync_ctas(self):
        """Every thread of the CTA, or of the pair."""
        if const_expr(self.pair):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

    def _spans(self, op: Operands, tile: WorkTile):
        lengths = op.prefill.lengths
        return lengths.span_q(tile.batch_idx), lengths.span_k(tile.batch_idx)

    def _band(self, op: Operands, span_q, span_k) -> Band:
        prefill = op.prefill
        return Band(
            self.problem.mask,
            self.config.tile_n,
            span_q.length,
            span_k.length,
            prefill.window_left,
            prefill.window_right,
        )

    def _work(self, op: Operands, tile: WorkTile) -> Work:
        span_q, span_k = self._spans(op, tile)
        band = self._band(op, span_q, span_k)
        ranges = [self._products(op, band, tile, s) for s in range(self.config.query_tiles)]
        head_idx = self._head_idx(op, tile)
        whole_end = self._whole_end(op, band, tile)
        return Work(span_q, span_k, head_idx, head_idx // op.group, ranges, union(ranges), whole_end)

    def _head_idx(self, op: Operands, tile: WorkTile):
        """The query head of this CTA; a pair's work tile numbers its heads together."""
        if not self.pair:
            return tile.head_idx
        return tile.head_idx * op.pairing.heads + self._rank() * (op.pairing.heads - 1)

    def _first_row(self, op: Operands, tile: WorkTile, query_tile):
        """Of a query tile of this CTA."""
        number = tile.m_block * self.config.query_tiles + query_tile
        if not self.pair:
            return number * TILE_M
        return number * op.pairing.rows + self._rank() * (op.pairing.rows - TILE_M)

    def _products(self, op: Operands, band: Band, tile: WorkTile, query_tile) -> TileRange:
        """The KV tiles that a query tile is multiplied with: all that its rows see, or the other CTA's."""
        rows = op.pairing.rows if self.pair else TILE_M
        return tile_range(band, (tile.m_block * self.config.query_tiles + query_tile) * rows, rows)

    def _whole_end(self, op: Operands, band: Band, tile: WorkTile):
        """The end of the KV tiles that all rows of the CTA see whole; None where the order does not depend on it."""
        if not self.config.first_early:
            return None
        return band.whole(self._first_row(op, tile, 0), self.config.query_tiles * TILE_M).end

    def _in_order(self, n_block, whole_end):
        """The KV tile in the place of `n_block`, counted down."""
        return first_early(n_block, whole_end) if self.config.first_early else n_block

    def _visited_tile(self, work: Work, i):
        """The i-th KV tile of a work tile."""
        return self._in_order(work.union.end - 1 - i, work.whole_end)

    def _threshold_log2(self, op: Operands, head_idx, batch_idx):
        if not self.sparse:
            return None
        return log2_threshold(op.prefill.threshold, batch_idx, head_idx)

    def _schedule(self, op: Operands, storage):
        if not self.persistent:
            return OneTile(op.order, self.config.ctas_per_tile)
        if not self.dynamic:
            return StaticTiles(op.order, self.config.ctas_per_tile)
        slots = storage.sTile.get_tensor(cute.make_layout((SLOT_WORDS, TILE_SLOTS)))
        return DynamicTiles(op.order, op.prefill.work_counter, slots, self._tile_ring(storage))

    def _grid(self, order: TileOrder):
        if not self.persistent:
            return OneTile.grid(order, self.config.ctas_per_tile)
        if not self.dynamic:
            return StaticTiles.grid(order, self.config.ctas, self.config.ctas_per_tile)
        return DynamicTiles.grid(order, self.config.ctas)

    def _tile_ring(self, storage) -> Ring:
        """Work tiles go from the load warp to every softmax, correction and MMA warp."""
        return Ring(storage.tile_ring.data_ptr(), TILE_SLOTS, self.config.mma_warp + 1)

    def _own_views(self, op: Operands, storage):
        """What a role uses of shared memory, from a base of its own. Addresses from a common one would be held in
        uniform registers from the kernel's first instruction on, of which ptxas would spill some in pairs of CTAs."""
        storage = self.storage(umma.recomputed(storage.base))
        return self._pipes(storage), self._tiles(op, storage), self._schedule(op, storage)

    def _pipes(self, storage) -> Pipes:
        config = self.config
        return Pipes(
            Ring(storage.k_ring.data_ptr(), config.k_stages, 1),
            Ring(storage.v_ring.data_ptr(), config.v_stages, 1),
            *(getattr(storage, name).data_ptr() for name in Pipes._fields[2:]),
        )

    def _initialise(self, pipes: Pipes) -> None:
        pipes.k.initialise()
        pipes.v.initialise()
        arrivals = dict.fromkeys(("s_read", "row_done", "factor_free"), GROUP_THREADS)
        to_leader = self.config.ctas_per_tile * WARPS_PER_GROUP if self.pair else GROUP_THREADS
        arrivals |= dict.fromkeys(("p_ready", "p_rest", "o_free"), to_leader)
        for name in Pipes._fields[2:-1]:
            for i in range(BARRIERS_PER_PIPE):
                cute.arch.mbarrier_init(getattr(pipes, name) + i, arrivals.get(name, 1))
        if self.sparse:
            for i in range(self.config.query_tiles * DECISIONS):
                cute.arch.mbarrier_init(pipes.decided + i, WARPS_PER_GROUP)

    def _tiles(self, op: Operands, storage) -> Tiles:
        return Tiles(
            storage.sQ.get_tensor(op.sQ_layout.outer, swizzle=op.sQ_layout.inner),
            storage.sK.get_tensor(op.sK_layout.outer, swizzle=op.sK_layout.inner),
            storage.sV.get_tensor(op.sV_layout.outer, swizzle=op.sV_layout.inner),
            storage.sFactor.get_tensor(cute.make_layout((TILE_M, self.config.query_tiles))),
            storage.sVotes.get_tensor(cute.make_layout(DECISIONS * self.config.query_tiles)),
        )


def shared_storage(config: Config, dtype: type, sQ_layout, sK_layout, sV_layout):
    """The plan of shared memory: barriers and words first, then the tiles, each aligned to its swizzle."""

    def tile(layout):
        return cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(layout)], TILE_ALIGN_BYTES]

    pipe = cute.struct.MemRange[Int64, BARRIERS_PER_PIPE]

    @cute.struct
    class SharedStorage:
        k_ring: cute.struct.MemRange[Int64, 2 * config.k_stages]
        v_ring: cute.struct.MemRange[Int64, 2 * config.v_stages]
        tile_ring: cute.struct.MemRange[Int64, 2 * TILE_SLOTS]
        q_full: pipe
        q_empty: pipe
        s_full: pipe
        s_read: pipe
        p_ready: pipe
        p_rest: pipe
        o_step: pipe
        o_done: pipe
        row_done: pipe
        factor_free: pipe
        o_free: pipe
        decided: cute.struct.MemRange[Int64, DECISIONS * config.query_tiles]
        sTile: cute.struct.Align[cute.struct.MemRange[Int32, SLOT_WORDS * TILE_SLOTS], TMA_ALIGN_BYTES]
        tmem_base: Int32
        sVotes: cute.struct.MemRange[Int32, DECISIONS * config.query_tiles]
        sFactor: cute.struct.MemRange[Float32, TILE_M * config.query_tiles]
        sQ: tile(sQ_layout)
        sK: tile(sK_layout)
        sV: tile(sV_layout)

    assert SharedStorage.size_in_bytes() <= config.shared_bytes, "RESERVED_SHARED_BYTES is too small"
    return SharedStorage


def transposed(tensor: cute.Tensor) -> cute.Tensor:
    """The tensor with its first two modes exchanged."""
    modes = [1, 0, *range(2, cute.rank(tensor.layout))]
    return cute.make_tensor(tensor.iterator, cute.select(tensor.layout, mode=modes))


def tma_partition(atom: cute.CopyAtom, shared: cute.Tensor, coordinates: cute.Tensor):
    """((TMA box), slots) of shared memory and ((TMA box), tiles..) of coordinates, without multicast."""
    return cpasync.tma_partition(
        atom, 0, cute.make_layout(1), cute.group_modes(shared, 0, 3), cute.group_modes(coordinates, 0, 3)
    )


def tile_range(band: Band, first_row, rows) -> TileRange:
    """The KV tiles of the `rows` rows from `first_row`; begin == end == 0 where they see no key or do not exist."""
    visited = band.visited(first_row, rows)
    empty = (first_row >= band.seqlen_q) | (visited.end <= visited.begin)
    return TileRange(*(cutlass.select_(empty, Int32(0), Int32(bound)) for bound in visited))


def union(ranges: list) -> TileRange:
    """The tiles from the first of any range to the last of any; empty ranges do not count."""
    if len(ranges) == 1:
        return ranges[0]
    a, b = ranges
    begin = cutlass.min(a.begin, b.begin)
    begin = cutlass.select_(a.end == 0, b.begin, cutlass.select_(b.end == 0, a.begin, begin))
    return TileRange(begin, cutlass.max(a.end, b.end))


def _both(begin, of_begin, end, of_end) -> Boolean:
    """What holds of both ends of a range, of those that there are."""
    conditions = [of_begin(begin)] if begin is not None else []
    conditions += [of_end(end)] if end is not None else []
    return conditions[0] if len(conditions) == 1 else conditions[0] & conditions[1]


def is_within(n_block, begin, size):
    """begin <= n_block < begin + size, for size >= 0, in one comparison."""
    return Uint32(n_block - begin) < Uint32(size)


def added(counts: list, more: list) -> list:
    """Element by element."""
    return [count + value for count, value in zip(counts, more, strict=True)]


_SCALARS = {"int32": Int32, "int64": Int64, "float32": Float32}
_POINTEES = {
    "lse": Float32,
    "threshold": Float32,
    "learnable_sink": Float32,
    "cu_seqlens_q": Int32,
    "cu_seqlens_k": Int32,
    "tile_counts": Int32,
    "skip_map": Uint8,
    "work_counter": Int32,
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
    """Compile the host function of `operands.PREFILL` and a stream, for the DSL's current architecture."""
    check_supported(problem, SUPPORTS, "kernels.blackwell")
    kernel = Prefill(problem, config or choose(problem))
    values = [_placeholder(operand, DTYPES[problem.dtype]) for operand in PREFILL]
    return cute.compile(kernel, *values, stream=cuda.CUstream(0))
