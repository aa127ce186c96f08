"""How the Blackwell kernels do it: tile sizes, ring depths, warps, register budgets; and the choice among them."""

from dataclasses import dataclass

from cute_sparse.kernels.blackwell import tmem

from cute_sparse.device.choice import cheapest
from cute_sparse.problem import Problem, TileGeometry

TILE_M = 128  # rows of a query tile: one tensor-memory lane, and one softmax thread, each
WARPS_PER_GROUP = 4  # a warpgroup: what setmaxnreg acts on, and what reaches all 128 lanes of tensor memory
THREADS_PER_WARP = 32
ELEMENT_BYTES = 2
SM_REGISTERS = 65536
SM_SHARED_BYTES = 232448  # 227 KiB, the most one CTA may have (cudaDevAttrMaxSharedMemoryPerBlockOptin)
RESERVED_SHARED_BYTES = 3072  # barriers, flags, one float a row and query tile, and the alignment of the tiles
SMS = 148  # of B200 and B300; fewer or more only make the last wave less even
L2_BYTES = 96 << 20  # of B200's 126 MB: what K and V of the heads in flight may take


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Config:
    """One way to run the prefill kernel.

    head_dim, head_dim_v   padded to what the instructions take
    query_tiles     2: two query tiles of 128 rows, each with its S and O in tensor memory; 1: one query tile
                    with two buffers of S, for a head_dim_v whose O leaves no room for a second
    tile_n          keys per KV tile
    k_chunks, v_chunks   ring slots per KV tile: K is cut along head_dim, V along head_dim_v
    k_stages, v_stages   ring slots
    p_early_columns  columns of P released to the MMA warp before the rest is computed
    exp2_emulated    pairs out of 16 that `exp2.py` computes, in all but the last 32 columns of a tile
    registers_*      per thread after setmaxnreg
    ctas             CTAs that stay and take work tile after work tile; 0 gives every CTA one work tile
    cta_pair         two CTAs share every product: 256 rows, 128 of each CTA; each holds half of K's rows and half of
                     V's columns. A work tile is then a pair's: two query heads of one KV head, or twice the rows
    p_apart          P lies beside S in tensor memory, not in it, so that S of the next KV tile need not wait for P V
    hold_v_after     after so many KV tiles in a row that nobody keeps, V waits for the votes; 0: V is always fetched
    first_early      the first KV tile is visited right after those at the mask's edge (`TileGeometry`)
    """

    head_dim: int
    head_dim_v: int
    query_tiles: int
    tile_n: int
    k_chunks: int
    v_chunks: int
    k_stages: int
    v_stages: int
    p_early_columns: int
    exp2_emulated: int
    registers_softmax: int
    registers_correction: int
    registers_other: int
    ctas: int = SMS
    cta_pair: bool = False
    p_apart: bool = False
    hold_v_after: int = 0
    first_early: bool = False

    def __post_init__(self) -> None:
        assert self.ctas % self.ctas_per_tile == 0, f"{self.ctas} CTAs are not pairs"
        assert self.registers_total <= SM_REGISTERS, f"{self.registers_total} registers planned of {SM_REGISTERS}"
        assert self.shared_bytes <= SM_SHARED_BYTES, f"{self.shared_bytes} bytes of shared memory planned"
        assert self.k_stages >= self.k_chunks and self.v_stages >= self.v_chunks, "a KV tile must fit its ring"
        assert self.p_early_columns % 32 == 0 and 0 < self.p_early_columns <= self.tile_n
        self.tmem  # asserts that it fits  # noqa: B018

    @property
    def ctas_per_tile(self) -> int:
        """CTAs that share a work tile and every product of it."""
        return 2 if self.cta_pair else 1

    @property
    def product_rows(self) -> int:
        """Rows of S and O that one instruction makes."""
        return TILE_M * self.ctas_per_tile

    @property
    def score_buffers(self) -> int:
        return 2

    @property
    def tmem(self) -> "tmem.TmemPlan":
        return tmem.TmemPlan.make(self.tile_n, self.head_dim_v, self.score_buffers, self.query_tiles, self.p_apart)

    @property
    def k_chunk(self) -> int:
        return self.head_dim // self.k_chunks

    @property
    def v_chunk(self) -> int:
        return self.head_dim_v // self.v_chunks

    @property
    def softmax_warps(self) -> int:
        return WARPS_PER_GROUP * self.query_tiles

    @property
    def correction_warp(self) -> int:
        """The first of the correction warpgroup's four warps."""
        return self.softmax_warps

    @property
    def mma_warp(self) -> int:
        return self.correction_warp + WARPS_PER_GROUP

    @property
    def load_warp(self) -> int:
        return self.mma_warp + 1

    @property
    def warps(self) -> int:
        """All warps: the MMA and load warps share a warpgroup with two idle ones, because of setmaxnreg."""
        return self.mma_warp + WARPS_PER_GROUP

    @property
    def threads(self) -> int:
        return self.warps * THREADS_PER_WARP

    @property
    def registers_total(self) -> int:
        per_thread = self.registers_softmax * self.query_tiles + self.registers_correction + self.registers_other
        return per_thread * WARPS_PER_GROUP * THREADS_PER_WARP

    @property
    def q_bytes(self) -> int:
        """Of one CTA, as is the rest of shared memory below."""
        return self.query_tiles * TILE_M * self.head_dim * ELEMENT_BYTES

    @property
    def k_slot_bytes(self) -> int:
        return self.tile_n * self.k_chunk * ELEMENT_BYTES // self.ctas_per_tile

    @property
    def v_slot_bytes(self) -> int:
        return self.tile_n * self.v_chunk * ELEMENT_BYTES // self.ctas_per_tile

    @property
    def shared_bytes(self) -> int:
        rings = self.k_stages * self.k_slot_bytes + self.v_stages * self.v_slot_bytes
        return self.q_bytes + rings + RESERVED_SHARED_BYTES

    @property
    def geometry(self) -> TileGeometry:
        """Each query tile walks its own range of KV tiles and decides alone."""
        tiles = dict(tile_m=TILE_M, tile_rows=TILE_M, tile_n=self.tile_n)
        if not self.first_early:
            return TileGeometry(**tiles)
        return TileGeometry(**tiles, order="first_early", cta_m=TILE_M * self.query_tiles)


# By query tiles. With two, L2 feeds K and V of a skipped tile in the time that its Q K^T takes, and a vote that V waits
# for costs a kept tile behind skipped ones up to 1400 clocks. In the timing model (clocks for 128 keys of two query
# tiles, d128, full mask) with one of 2 tiles kept by both, two of 4, four of 8, one of 4, one of 8: after 1 2290 2157
# 1861 1654 1341, after 8 1986 1798 1686 1516 1294, never held back 1964 1770 1668 1501 1265; hardly any kept: 1028 with
# each. It still spares memory what long runs of skipped tiles would move in vain. With one query tile (d256) it is
# loads that take longest: kept 2048, one of 8 kept 1572 after 1, 1840 after 4, 2048 if never.
HOLD_V_AFTER = {1: 1, 2: 8}


def candidates(problem: Problem, arch: str = "sm_100a") -> list[Config]:
    """Every configuration that can run `problem` on `arch` ("sm_100a" or "sm_103a")."""
    # sm_103's exponential unit is twice as fast and needs no help.
    shares = (0,) if arch.startswith("sm_103") else (0, _emulated_share(problem))
    if problem.head_dim_v > 128:
        configs = [_one_query_tile(problem, share, pair) for share in shares for pair in _pairs(problem)]
    else:
        configs = [
            _two_query_tiles(problem, tile_n, share, pair)
            for tile_n in (128, 96)
            for share in shares
            for pair in _pairs(problem)
        ]
    return [config for config in configs if config is not None]


# What ptxas 13.0 compiles without spilling in a loop over KV tiles: 200, 64, 48 spilled 24 bytes of the causal sparse
# kernel with LSE and counts at d128; 192, 64, 64 up to 36 bytes of packed ones; 200, 56, 56 up to 56 of dense pairs
# with LSE. Packed sparse kernels with LSE spill 8 bytes outside their loops.
_TWO_TILES = dict(registers_softmax=200, registers_correction=64, registers_other=48)
_TWO_TILES_SPARSE = dict(registers_softmax=192, registers_correction=64, registers_other=64)
_ONE_TILE = dict(registers_softmax=248, registers_correction=112, registers_other=128)


def may_stay(problem: Problem) -> bool:
    """Whether CTAs may take work tile after work tile. Not where packed sequences are sparse: the state of the vote, of
    the masks and of the next work tile do not fit beside a row of scores (up to 128 bytes spilled)."""
    return not (problem.sparsity and problem.varlen)


def _first_early(problem: Problem) -> bool:
    """A window's first tiles hold no sinks; a dense kernel gains nothing."""
    return problem.sparsity is not None and problem.mask != "band"


def _pairs(problem: Problem) -> tuple[bool, ...]:
    """Whether two CTAs may share their products (`Prefill` says why not a sparse problem's, nor a packed batch's).

    Below 128 columns of O the exponentials take longer than the products: modelled, a pair gains nothing at 64. Nor do
    d128 and a causal mask: modelled over CTAs alone, which claim their work tiles, pairs take 3.1, 2.0 and 1.6% longer
    at 2k, 8k and 32k tokens. Alone, products and TMA ask for 125 of the 128 bytes a clock of shared memory, which the
    model does not share among them; FlashAttention-4 asks for as many under this mask, and what is published of it on
    B200 is no slower than the model. At 192/128 it would be 131, and 160 at d256.
    """
    pays = round_up(problem.head_dim_v, 16) >= 128 and (problem.mask != "causal" or problem.head_dim > 128)
    return (False, True) if pays and problem.mask != "band" and not (problem.sparsity or problem.varlen) else (False,)


def _emulated_share(problem: Problem) -> int:
    """Pairs of 16, by the timing model: clocks for 128 keys of two query tiles at d128, full: 2240 with 4, 2107 with 6,
    2122 with 8; at d96, causal: 2322 and 2269 with 4 and 6; at d64 and 64K keys, for 128 rows of a work tile, causal:
    503991 with 7, 446051 with 8, 472647 with 9, 475033 with 10, full: 485399, 495862 and 466907 with 7, 8, 9. With one
    query tile the products take longest whatever the share, and 6 would spill."""
    if _p_apart(128, round_up(problem.head_dim_v, 16)):
        return 8
    two_query_tiles = problem.head_dim_v <= 128
    return 6 if two_query_tiles and problem.head_dim + problem.head_dim_v > 160 else 4


def _p_apart(tile_n: int, head_dim_v: int) -> bool:
    """Whether two query tiles' S, P and O fit beside one another."""
    return 2 * (tile_n + tile_n // 2 + head_dim_v) <= tmem.COLUMNS


def _two_query_tiles(problem: Problem, tile_n: int, exp2_emulated: int, pair: bool) -> Config | None:
    head_dim, head_dim_v = round_up(problem.head_dim, 16), round_up(problem.head_dim_v, 16)
    ctas = 2 if pair else 1
    k_bytes, v_bytes = tile_n * head_dim * ELEMENT_BYTES // ctas, tile_n * head_dim_v * ELEMENT_BYTES // ctas
    left = SM_SHARED_BYTES - RESERVED_SHARED_BYTES - 2 * TILE_M * head_dim * ELEMENT_BYTES
    k_chunks = v_chunks = 1
    stages = _ring_stages(left, k_bytes, v_bytes)
    if head_dim == 192 and tile_n == 128 and not pair:
        # Beside 96 KB of Q, whole tiles would leave V a single slot. 64 columns of K or V take 16 KB, and eight such
        # fit: all of one tile's K and two thirds of the next, and three halves of V.
        k_chunks, v_chunks, stages = 3, 2, (5, 3)
    if stages is None:
        return None
    sparse = problem.sparsity is not None and problem.mask != "band" and not problem.varlen
    return Config(
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        query_tiles=2,
        tile_n=tile_n,
        k_chunks=k_chunks,
        v_chunks=v_chunks,
        k_stages=stages[0],
        v_stages=stages[1],
        p_early_columns=tile_n if _p_apart(tile_n, head_dim_v) else tile_n - 32,
        exp2_emulated=exp2_emulated,
        cta_pair=pair,
        p_apart=_p_apart(tile_n, head_dim_v),
        hold_v_after=HOLD_V_AFTER[2] if problem.sparsity else 0,
        first_early=_first_early(problem),
        ctas=SMS if may_stay(problem) else 0,
        **(_TWO_TILES_SPARSE if sparse else _TWO_TILES),
    )


def _one_query_tile(problem: Problem, exp2_emulated: int, pair: bool) -> Config | None:
    # A multiple of 32, so that half of it is a whole number of instructions.
    head_dim, head_dim_v = round_up(problem.head_dim, 32), round_up(problem.head_dim_v, 32)
    # In pairs a slot of a whole KV tile is as large as one of half a tile without.
    tile_n, chunks = 128, 1 if pair else 2
    k_bytes, v_bytes = tile_n * head_dim // 2 * ELEMENT_BYTES, tile_n * head_dim_v // 2 * ELEMENT_BYTES
    left = SM_SHARED_BYTES - RESERVED_SHARED_BYTES - TILE_M * head_dim * ELEMENT_BYTES
    stages = _ring_stages(left, k_bytes, v_bytes, at_least=chunks)
    if stages is None:
        return None
    return Config(
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        query_tiles=1,
        tile_n=tile_n,
        k_chunks=chunks,
        v_chunks=chunks,
        k_stages=stages[0],
        v_stages=stages[1],
        p_early_columns=96,
        exp2_emulated=exp2_emulated,
        ctas=SMS if may_stay(problem) else 0,
        cta_pair=pair,
        hold_v_after=HOLD_V_AFTER[1] if problem.sparsity else 0,
        first_early=_first_early(problem),
        **_ONE_TILE,
    )


def _ring_stages(left_bytes: int, k_bytes: int, v_bytes: int, at_least: int = 1) -> tuple[int, int] | None:
    """How many K and V slots fit, K first in turn; at most four of each: a load takes less time than four tiles."""
    k_stages = v_stages = at_least
    if k_stages * k_bytes + v_stages * v_bytes > left_bytes:
        return None
    grown = True
    while grown:
        grown = False
        if k_stages < 4 and (k_stages + 1) * k_bytes + v_stages * v_bytes <= left_bytes:
            k_stages, grown = k_stages + 1, True
        if v_stages < 4 and k_stages * k_bytes + (v_stages + 1) * v_bytes <= left_bytes:
            v_stages, grown = v_stages + 1, True
    return k_stages, v_stages


# Clocks that the timing model (profiling/model.py) finds on top of the units' work, of one query tile and KV tile: the
# way from S to P and back, and what a single slot of V keeps the products waiting (192/128, alone, sparse: 3422 clocks
# for 128 keys of two query tiles; with KV tiles of 96 keys, of which two fit, 2904; in chunks of 64 columns of K and V
# 2560, which is what the products alone take).
HANDOVER_CLOCKS = 150
REFILL_CLOCKS = 430


def cost(problem: Problem, config: Config) -> float:
    """Modelled clocks for 128 keys of one query tile: the slowest unit, and a part of what it does not hide.

    Rates per SM and clock: 8192 FLOP of 16-bit MMA, 16 exponentials and 128 bytes of shared memory; an emulated
    exponential takes about 6 of the 128 issue slots a clock has for fp32 lanes (twelve instructions for a pair).
    """
    matrix = 2 * TILE_M * config.tile_n * (config.head_dim + config.head_dim_v) / 8192
    share = config.exp2_emulated / 16 * (config.tile_n - 32) / config.tile_n
    elements = TILE_M * config.tile_n
    exponential = elements * (1 - share) / 16
    # Scaling, maximum, sum, conversion: about 3 lane slots an element beside the exponentials.
    lanes = elements * (3 + 6 * share) / 128
    # Each product reads its operands once a tile, but for P; TMA writes K and V once for all query tiles of the CTA.
    kv_bytes = config.tile_n * (config.head_dim + config.head_dim_v) * ELEMENT_BYTES / config.ctas_per_tile
    shared = (TILE_M * config.head_dim * ELEMENT_BYTES + kv_bytes + kv_bytes / config.query_tiles) / 128
    waiting = HANDOVER_CLOCKS + (REFILL_CLOCKS if config.v_stages == config.v_chunks else 0)
    clocks = max(matrix, exponential, lanes, shared) + 0.25 * (exponential + lanes + shared) + waiting
    return clocks * 128 / config.tile_n


def choose(problem: Problem, arch: str = "sm_100a") -> Config:
    """The candidate of lowest cost."""
    return cheapest(problem, arch, candidates(problem, arch), cost)
