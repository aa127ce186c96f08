"""How the Blackwell decode kernel does it: ring depths, warps, columns of tensor memory; and the choice among them.

Decode is bound by the bytes of K and V: an SM's share of a B200's memory bandwidth is about 29 bytes a clock (8 TB/s
over 148 SMs at 1.85 GHz). What counts is that enough bytes are always under way, and that no role takes longer for a
tile than the tile's bytes do.
"""

from __future__ import annotations

from dataclasses import dataclass

from cute_sparse.kernels.blackwell.config import (
    ELEMENT_BYTES,
    SM_REGISTERS,
    SM_SHARED_BYTES,
    THREADS_PER_WARP,
    TILE_M,
    WARPS_PER_GROUP,
    round_up,
)
from cute_sparse.kernels.blackwell.tmem import COLUMNS

from cute_sparse.device.choice import cheapest
from cute_sparse.problem import HEAD_DIM_MAX, Problem, TileGeometry

TILE_N = 64  # keys per KV tile, whose K and V are in flight for about 1100 clocks at head dim 128
STRIPS = (64, 32, 16)  # elements that one row of a swizzled shared tile may have: 128, 64 or 32 bytes
P_STAGES_MAX = {None: 4, "threshold": 8}  # kept tiles by which the scores may be ahead of P V, and so V be fetched
ROW_WORDS = 2  # columns beside each P slot: the rows' factor, or at the end their sum and their maximum
SUM_COLUMNS = 16  # columns of O that are added up at a time where the keys of a tile are divided
STAGES_MAX = 16  # of K and of V
MIN_KEYS = 256  # of a CTA's part of the line of all tiles: a guess at what outweighs combining its result
RESERVED_SHARED_BYTES = 3072  # barriers, messages, maxima, and the alignment of the tiles

BYTES_PER_CLOCK = 29.0
BYTES_IN_FLIGHT = 56 << 10  # an SM's share of the bandwidth times 1 us, about the latency under load (an estimate)


@dataclass(frozen=True)
class DecodeTmem:
    """First columns in tensor memory: O, then buffers of S (fp32), slots of P (16 bits an element), and two row words
    for each slot of P."""

    head_dim_v: int
    tile_n: int
    s_stages: int
    p_stages: int

    def __post_init__(self) -> None:
        assert self.used <= COLUMNS, f"{self.used} columns of tensor memory needed, there are {COLUMNS}"

    @property
    def output(self) -> int:
        return 0

    @property
    def scores(self) -> int:
        return self.head_dim_v

    @property
    def probabilities(self) -> int:
        return self.scores + self.s_stages * self.scores_stride

    @property
    def row_words(self) -> int:
        return self.probabilities + self.p_stages * self.probabilities_stride

    @property
    def used(self) -> int:
        return self.row_words + self.p_stages * ROW_WORDS

    @property
    def scores_stride(self) -> int:
        return self.tile_n

    @property
    def probabilities_stride(self) -> int:
        return self.tile_n // 2


@dataclass(frozen=True)
class Config:
    """One way to run the decode kernel.

    head_dim, head_dim_v   padded to what the instructions take
    tile_n          keys per KV tile
    k_pieces        into how many pieces along head_dim a tile of K is cut, each with a slot of its own
    k_stages, v_stages   slots of the K ring and of the V ring
    s_stages        buffers of S: tiles by which Q K^T may be ahead of the softmax
    p_stages        slots of P: kept tiles by which the softmax may be ahead of P V
    min_tiles       the fewest KV tiles of a CTA in a stream-K plan
    registers_*     per thread after setmaxnreg
    """

    head_dim: int
    head_dim_v: int
    tile_n: int
    k_stages: int
    v_stages: int
    s_stages: int
    p_stages: int
    min_tiles: int
    k_pieces: int = 1
    registers_softmax: int = 192
    registers_correction: int = 128
    registers_other: int = 96

    def __post_init__(self) -> None:
        assert self.registers_total <= SM_REGISTERS, f"{self.registers_total} registers planned of {SM_REGISTERS}"
        assert self.shared_bytes <= SM_SHARED_BYTES, f"{self.shared_bytes} bytes of shared memory planned"
        assert min(self.k_stages, self.v_stages, self.s_stages, self.p_stages, self.min_tiles) >= 1, self
        assert self.tile_n % (2 * WARPS_PER_GROUP) == 0, "a warp's share of a tile must be whole words of P"
        assert strip(self.head_dim // self.k_pieces) == self.k_strip, "a piece of K has the swizzle of Q"
        self.tmem  # asserts that it fits  # noqa: B018

    @property
    def tmem(self) -> DecodeTmem:
        return DecodeTmem(self.head_dim_v, self.tile_n, self.s_stages, self.p_stages)

    @property
    def k_strip(self) -> int:
        return strip(self.head_dim)

    @property
    def v_strip(self) -> int:
        return strip(self.head_dim_v)

    # ---- warps: softmax 0..3, correction 4..7, then one each; whole warpgroups, because of setmaxnreg

    @property
    def correction_warp(self) -> int:
        return WARPS_PER_GROUP

    @property
    def score_mma_warp(self) -> int:
        return 2 * WARPS_PER_GROUP

    @property
    def value_mma_warp(self) -> int:
        return self.score_mma_warp + 1

    @property
    def load_k_warp(self) -> int:
        return self.score_mma_warp + 2

    @property
    def load_v_warp(self) -> int:
        return self.score_mma_warp + 3

    @property
    def load_q_warp(self) -> int:
        return self.score_mma_warp + 4

    @property
    def warps(self) -> int:
        return 4 * WARPS_PER_GROUP

    @property
    def threads(self) -> int:
        return self.warps * THREADS_PER_WARP

    @property
    def registers_total(self) -> int:
        per_thread = self.registers_softmax + self.registers_correction + 2 * self.registers_other
        return per_thread * WARPS_PER_GROUP * THREADS_PER_WARP

    # ---- bytes

    @property
    def q_bytes(self) -> int:
        return TILE_M * self.head_dim * ELEMENT_BYTES

    @property
    def k_slot_bytes(self) -> int:
        return self.tile_n * self.head_dim // self.k_pieces * ELEMENT_BYTES

    @property
    def v_slot_bytes(self) -> int:
        return self.tile_n * self.head_dim_v * ELEMENT_BYTES

    @property
    def sum_bytes(self) -> int:
        return TILE_M * SUM_COLUMNS * 4

    @property
    def shared_bytes(self) -> int:
        rings = self.k_stages * self.k_slot_bytes + self.v_stages * self.v_slot_bytes
        return self.q_bytes + rings + self.sum_bytes + RESERVED_SHARED_BYTES

    @property
    def tile_rows(self) -> int:
        """Packed query rows of one item."""
        return TILE_M

    @property
    def geometry(self) -> TileGeometry:
        return TileGeometry(tile_m=TILE_M, tile_rows=TILE_M, tile_n=self.tile_n)


def strip(columns: int) -> int:
    """Columns that a row of the swizzled shared tile has before the next row follows."""
    return next(width for width in STRIPS if columns % width == 0)


def candidates(problem: Problem, arch: str = "sm_100a") -> list[Config]:
    """Every configuration that can run `problem`, the same for "sm_100a" and "sm_103a": with the deepest rings of K
    and V, and with K's one slot shorter in favour of V's.

    With a threshold V is loaded after its tile's decision, no further ahead than there are slots of P; and K has no
    more slots than the latency asks for, since the first V would wait behind all of it: of head dim 64 with 12 slots of
    K and four of P, 64 tiles that are all kept take 5.6% longer than in the dense kernel, with 8 and seven 0.3%
    (modelled for a B200, with the seeds' K from L2).

    Of head dim 256 only four tiles of K and V fit beside Q, so K's are cut in two: with slots for two whole tiles of K
    a skipped tile takes 1343 clocks, 1643 at a latency of 1200, and with five halves what its bytes ask for, 1191.
    """
    head_dim, head_dim_v = round_up(problem.head_dim, 16), round_up(problem.head_dim_v, 16)
    k_pieces = 2 if head_dim == HEAD_DIM_MAX else 1
    k_bytes, v_bytes = TILE_N * head_dim // k_pieces * ELEMENT_BYTES, TILE_N * head_dim_v * ELEMENT_BYTES
    fixed = TILE_M * head_dim * ELEMENT_BYTES + TILE_M * SUM_COLUMNS * 4 + RESERVED_SHARED_BYTES
    k_stages_max = -(-BYTES_IN_FLIGHT // k_bytes) + 1 if problem.sparsity else STAGES_MAX
    s_stages, p_stages = _tensor_stages(head_dim_v, P_STAGES_MAX[problem.sparsity])
    v_stages_max = p_stages + 1 if problem.sparsity else STAGES_MAX
    found = []
    for k_stages in range(2, min(k_stages_max, STAGES_MAX) + 1):
        v_stages = min((SM_SHARED_BYTES - fixed - k_stages * k_bytes) // v_bytes, v_stages_max)
        if v_stages >= 2:
            found.append(
                Config(
                    head_dim=head_dim,
                    head_dim_v=head_dim_v,
                    tile_n=TILE_N,
                    k_stages=k_stages,
                    v_stages=v_stages,
                    s_stages=s_stages,
                    p_stages=min(p_stages, v_stages),
                    min_tiles=MIN_KEYS // TILE_N,
                    k_pieces=k_pieces,
                )
            )
    return found


def _tensor_stages(head_dim_v: int, p_stages_max: int) -> tuple[int, int]:
    """(buffers of S, slots of P): three of S or, where O is wide, two."""
    left = COLUMNS - head_dim_v
    p_columns = TILE_N // 2 + ROW_WORDS
    s_stages = 3 if left >= 3 * TILE_N + 2 * p_columns else 2
    return s_stages, min(p_stages_max, (left - s_stages * TILE_N) // p_columns)


def cost(problem: Problem, config: Config) -> float:
    """Modelled clocks per KV tile: its bytes, which take longer in proportion where fewer than the latency asks for are
    under way, of K and V together and of each, since each ring must hide its own latency."""
    k, v = config.k_slot_bytes * config.k_pieces, config.v_slot_bytes
    # A slot of each ring is being read.
    k_flight, v_flight = (config.k_stages - 1) * config.k_slot_bytes, (min(config.v_stages, config.p_stages) - 1) * v
    k_share, v_share = k / (k + v), v / (k + v)
    shortage = max(1.0, BYTES_IN_FLIGHT * k_share / k_flight, BYTES_IN_FLIGHT * v_share / v_flight)
    if problem.sparsity:
        shortage = max(shortage, BYTES_IN_FLIGHT / k_flight)  # of a skipped tile K is all there is
    # Beyond that, bytes in flight only smooth: the more even the two rings, the better.
    return (k + v) / BYTES_PER_CLOCK * (shortage + 0.01 * abs(config.k_stages / config.k_pieces - config.v_stages))


def choose(problem: Problem, arch: str = "sm_100a") -> Config:
    """The candidate of lowest cost."""
    return cheapest(problem, arch, candidates(problem, arch), cost)
