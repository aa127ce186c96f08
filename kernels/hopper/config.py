"""How the Hopper prefill kernel computes a problem: tile sizes, stages, registers, schedule; and which is chosen.

Sources: CUDA C++ Programming Guide (registers and shared memory of compute capability 9.0); the roofs per SM and
clock are datasheet rates: 4096 BF16 MMA FLOP, 16 exponentials.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cute_sparse.device.choice import cheapest
from cute_sparse.problem import Problem, TileGeometry

ARCH = "sm_90a"

WARPGROUP_ROWS = 64
WARPGROUP_WARPS = 4
WARPGROUP_THREADS = 32 * WARPGROUP_WARPS
REGISTER_FILE = 65536  # 32-bit registers of an SM
SHARED_BYTES = 232448  # that one CTA may have
BARRIER_BYTES = 1024  # kept for mbarriers, work-tile slots and alignment
SHARED_ALIGN_BYTES = 1024  # of a 128-byte swizzle atom of 8 rows
HEAD_DIM_STEP = 32  # head dims are padded to it: 64 bytes, a swizzle that wgmma reads without bank conflicts
ELEMENT_BYTES = 2

SLICE_REGISTERS = REGISTER_FILE // WARPGROUP_THREADS  # one thread of every warpgroup: what setmaxnreg deals out
REGISTERS_STEP = 8
# Registers of a producer thread by consumer warpgroups. With 24, it would spill (ptxas 13.0), with 32 and packed
# sequences it may; three warpgroups leave it more where their accumulators let them. Of 144 kernels with softcap (d32
# to d128, 192/128, every mask, packed or not, dense or not, with sinks, LSE and counts or without) none spills.
PRODUCER_REGISTERS = {2: (40,), 3: (56, 32)}
# Registers beside the accumulators, by the producer's: descriptors, softmax and loop state (as ptxas 13.0 needs them).
OTHER_REGISTERS = {40: 32, 56: 28, 32: 32}
BAND_REGISTERS = 12  # for both bounds of a band

MMA_FLOP_PER_CYCLE = 4096
EXP_PER_CYCLE = 16
ISSUE_PER_CYCLE = 4
ISSUES_PER_SCORE = 5.0  # max, multiply-add, exponential, sum, half a conversion: instructions per 32 scores
STEP_CYCLES = 120  # per KV tile: barriers, first latency of a wgmma (an estimate, not yet measured)
SHARED_Q_CYCLES = 1000  # per work tile: out in Q's memory delays the next Q by the store (an estimate, likewise)
EDGES = {"full": 0, "causal": 1, "band": 2}
TYPICAL_KEYS = {"full": 8192, "causal": 4096, "band": 512}  # that a query sees; windows of 128 to 4096 are in use

L2_BYTES = 32 << 20  # of 50 (H100) or 60 MB (H200), what the K and V of a group of heads may take
DYNAMIC_CTAS = 132  # SMs of an H100 SXM or H200; with fewer SMs the later CTAs find the work done
L2_BYTES_PER_CYCLE = 38.8  # that one SM gets when all ask (emulator/chips.py says whence)
# By consumer warpgroups: a wrong guess costs a kept tile V's latency, a right one saves V's bytes, which L2 cannot feed
# to 128 rows as fast as they are skipped, but to 192 nearly.
HOLD_V_AFTER = {2: 2, 3: 8}
HOLD_V_K_STAGES = (4, 3)  # how many K slots a V that waits for votes may have, best first
# The votes for narrower tiles of V cost more than its bytes: at 64, modelled (profiling.model), 5% of the time where
# nothing is skipped, 4% where most is.
HOLD_V_MIN_HEAD_DIM = 96

MIN_TILE_N = {2: 64, 3: 96}  # by consumer warpgroups
SPARSE_MIN_TILE_N = {2: 64, 3: 80}  # where V of skipped tiles is loaded, what 192 rows spare of L2 is worth it
BAND_MIN_TILE_N = 64
TILE_N_MAX = 176
BOUNDED_TILE_N_MAX = 128  # of a wider tile, a mask hides more, and a threshold skips it less often
# By columns of O, for three warpgroups with softcap, whose tanh takes registers: ptxas 13.0 spills with 128 at d64 and
# with 96 at d96 (dense and causal, or a threshold and a full mask).
SOFTCAP_TILE_N_MAX = ((64, 112), (None, 80))
WIDE_HEAD_TILE_N_MAX = 80  # head_dim_v above 192: at 96, ptxas 13.0 spills


@dataclass(frozen=True)
class Config:
    """warpgroups  consumer warpgroups, each of 64 query rows
    tile_n      keys per KV tile
    k_stages, v_stages  slots of the K ring and of the V ring
    ping_pong   the warpgroups take turns: one's softmax runs under the other's MMA
    out_aliases_q  out is staged in Q's shared memory, for want of room: the next Q waits for the store
    ctas        CTAs that claim work tiles dynamically; 0 gives every CTA one work tile
    hold_v_after  after so many KV tiles in a row that every warpgroup skipped, V is loaded only once a warpgroup has
                voted to keep its tile; 0: V is always loaded. Needs three K slots and two V slots
                (see `prefill.HopperPrefill`)
    own_ranges  each warpgroup visits the KV tiles that its own rows see, not all that the CTA's do
    first_early  the first KV tile is visited before all others that the CTA's rows see whole (`mask.first_early`)
    producer_registers  of each thread after setmaxnreg; the consumers share the rest
    """

    warpgroups: int
    tile_n: int
    k_stages: int = 2
    v_stages: int = 2
    ping_pong: bool = True
    out_aliases_q: bool = False
    ctas: int = DYNAMIC_CTAS
    hold_v_after: int = 0
    own_ranges: bool = False
    first_early: bool = False
    producer_registers: int = 40

    def __post_init__(self) -> None:
        if self.hold_v_after and (self.k_stages < 3 or self.v_stages != 2):
            slots = f"{self.k_stages=} {self.v_stages=}"
            raise ValueError(f"{self.hold_v_after=} needs three K slots and two V slots, not {slots}")

    @property
    def tile_m(self) -> int:
        return self.warpgroups * WARPGROUP_ROWS

    @property
    def geometry(self) -> TileGeometry:
        rows = WARPGROUP_ROWS if self.own_ranges else self.tile_m
        order = "first_early" if self.first_early else "descending"
        return TileGeometry(rows, WARPGROUP_ROWS, self.tile_n, order, cta_m=self.tile_m)

    @property
    def threads(self) -> int:
        return (self.warpgroups + 1) * WARPGROUP_THREADS

    @property
    def consumer_registers(self) -> int:
        return consumer_registers(self.warpgroups, self.producer_registers)


def consumer_registers(warpgroups: int, producer_registers: int) -> int:
    """Of each thread of so many warpgroups, beside a producer warpgroup."""
    return (SLICE_REGISTERS - producer_registers) // warpgroups // REGISTERS_STEP * REGISTERS_STEP


def padded(head_dim: int) -> int:
    return -(-head_dim // HEAD_DIM_STEP) * HEAD_DIM_STEP


def shared_bytes(problem: Problem, config: Config) -> int:
    """Shared memory of a CTA, barriers included."""
    head_dim, head_dim_v = padded(problem.head_dim), padded(problem.head_dim_v)
    q, out = config.tile_m * head_dim, config.tile_m * head_dim_v
    kv = config.tile_n * (config.k_stages * head_dim + config.v_stages * head_dim_v)
    q_and_out = max(q, out) if config.out_aliases_q else q + out
    return (q_and_out + kv) * ELEMENT_BYTES + BARRIER_BYTES


def accumulator_registers(problem: Problem, config: Config) -> int:
    """Registers per thread for O (fp32), S (fp32) and P (16 bit) of 64 rows on 128 threads."""
    return padded(problem.head_dim_v) // 2 + config.tile_n // 2 + config.tile_n // 4


def candidates(problem: Problem) -> list[Config]:
    """For every tile size that fits an SM, the config with the most room: V held back, out beside Q, if possible."""
    widest = TILE_N_MAX if problem.mask == "full" and not problem.sparsity else BOUNDED_TILE_N_MAX
    if padded(problem.head_dim_v) > 192:
        widest = WIDE_HEAD_TILE_N_MAX
    first_early = problem.sparsity is not None and problem.mask != "band"
    found = []
    for warpgroups in PRODUCER_REGISTERS:
        narrowest = (SPARSE_MIN_TILE_N if problem.sparsity else MIN_TILE_N)[warpgroups]
        if problem.mask == "band":
            narrowest = BAND_MIN_TILE_N
        for tile_n in range(min(widest, _widest_capped(problem, warpgroups)), narrowest - 1, -16):
            tiles = Config(warpgroups, tile_n, first_early=first_early)
            tiles = replace(tiles, own_ranges=_ranges_differ(problem, tiles))
            rooms = [replace(tiles, out_aliases_q=shares) for shares in (False, True)]
            if problem.sparsity and padded(problem.head_dim_v) >= HOLD_V_MIN_HEAD_DIM:
                holding = dict(hold_v_after=HOLD_V_AFTER[warpgroups])
                rooms = [replace(room, k_stages=k, **holding) for room in rooms for k in HOLD_V_K_STAGES] + rooms
            rooms = [
                replace(room, producer_registers=registers)
                for registers in PRODUCER_REGISTERS[warpgroups]
                for room in rooms
            ]
            fitting = [room for room in rooms if fits(problem, room)]
            found += fitting[:1]
    return found


def _widest_capped(problem: Problem, warpgroups: int) -> int:
    if not problem.softcap or warpgroups < 3:
        return TILE_N_MAX
    return next(tile_n for most, tile_n in SOFTCAP_TILE_N_MAX if most is None or padded(problem.head_dim_v) <= most)


def _ranges_differ(problem: Problem, config: Config) -> bool:
    """Whether the warpgroups of a CTA see different KV tiles. At the edge of a causal mask they usually do not if a KV
    tile is as wide as the CTA's rows are many; then what it takes to tell them apart is saved."""
    return problem.mask == "band" or problem.mask == "causal" and config.tile_n % config.tile_m > 0


def fits(problem: Problem, config: Config) -> bool:
    """Whether an SM has the shared memory, and a consumer thread the registers."""
    registers = accumulator_registers(problem, config) + OTHER_REGISTERS[config.producer_registers]
    if problem.mask == "band":
        registers += BAND_REGISTERS
    return registers <= config.consumer_registers and shared_bytes(problem, config) <= SHARED_BYTES


def cost(problem: Problem, config: Config) -> float:
    """Estimated SM cycles per visible score of a typical sequence; lower is better.

    A KV tile takes as long as the busiest of the MMA, the exponential units and the issue slots, and a fixed
    step; a skipped one, which half of them are taken to be where there is a threshold and no window, as long as Q K^T
    or its loads from L2, of which V's fall away half of the time where it may be held back; each edge of a mask adds
    the part of its tiles that nobody sees, half the rows and what the edge lies away from a tile's end (where lengths
    and window are multiples of 64); a work tile may wait for its Q.
    """
    scores = config.tile_m * config.tile_n
    mma = 2 * scores * (padded(problem.head_dim) + padded(problem.head_dim_v)) / MMA_FLOP_PER_CYCLE
    issue = scores / 32 * ISSUES_PER_SCORE / ISSUE_PER_CYCLE
    cycles = max(mma, scores / EXP_PER_CYCLE, issue) + STEP_CYCLES
    if problem.sparsity and problem.mask != "band":
        cycles = (cycles + _skipped_cycles(problem, config)) / 2
    rows = WARPGROUP_ROWS if config.own_ranges else config.tile_m
    wasted_keys = EDGES[problem.mask] * (rows + config.tile_n - math.gcd(WARPGROUP_ROWS, config.tile_n)) / 2
    visible_keys = TYPICAL_KEYS[problem.mask]
    waiting = SHARED_Q_CYCLES if config.out_aliases_q else 0
    return cycles / scores * (visible_keys + wasted_keys) / visible_keys + waiting / (config.tile_m * visible_keys)


def _skipped_cycles(problem: Problem, config: Config) -> float:
    """Of a KV tile that every warpgroup skips."""
    head_dim, head_dim_v = padded(problem.head_dim), padded(problem.head_dim_v)
    product = 2 * config.tile_m * config.tile_n * head_dim / MMA_FLOP_PER_CYCLE
    column_cycles = config.tile_n * ELEMENT_BYTES / L2_BYTES_PER_CYCLE
    with_v = max(product, column_cycles * (head_dim + head_dim_v))
    return (with_v + max(product, column_cycles * head_dim)) / 2 if config.hold_v_after else with_v


def choose(problem: Problem) -> Config:
    """The candidate of lowest cost."""
    return cheapest(problem, ARCH, candidates(problem), cost)
