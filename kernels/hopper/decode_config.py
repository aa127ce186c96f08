"""How the Hopper decode kernel computes a problem: tile size and stages; and which is chosen.

Decode is bound by the bytes of K and V: an SM's share of an H200's memory bandwidth is about 19 bytes a clock (4.8 TB/s
over 132 SMs at 1.9 GHz). What counts is that enough bytes are always under way, and that no role takes longer for a
tile than the tile's bytes do.
"""

from __future__ import annotations

from dataclasses import dataclass

from cute_sparse.kernels.hopper.config import (
    ARCH,
    ELEMENT_BYTES,
    MMA_FLOP_PER_CYCLE,
    PRODUCER_REGISTERS,
    SHARED_BYTES,
    WARPGROUP_ROWS,
    WARPGROUP_THREADS,
    consumer_registers,
    padded,
)

from cute_sparse.device.choice import cheapest
from cute_sparse.problem import Problem, TileGeometry

WARPGROUPS = 3  # load, score, value
BARRIER_BYTES = 2048  # kept for mbarriers, decisions, the walk and alignment
ROW_STATE_BYTES = 2 * 4  # per row and P slot: a factor and a maximum, fp32

TILE_NS = (64, 128)
P_STAGES = 3  # kept tiles by which the scores may be ahead of P V: V's latency, at one tile per 1700 clocks
P_STAGES_MAX = 8  # the same for tiles of less bytes
STAGES_MAX = 24  # beyond which more bytes under way gain nothing
MIN_KEYS = 256  # of a CTA's part of the line of all tiles: a guess at what outweighs combining its result

BYTES_PER_CYCLE = 19.0
BYTES_IN_FLIGHT = 80 << 10  # an SM's share of the bandwidth for 2 us, twice the latency under load (an estimate)
# Of the score role, for a tile and for each of its keys: what the emulator's time model makes of the kernel with tiles
# of 64 and 128 keys, head dims 64 and 128 (`HopperDecode`); not measured. A skipped tile takes less than the former.
TILE_CYCLES = 300
KEY_CYCLES = 7.0
NOT_HIDDEN = 0.1  # of the shorter of two things that run side by side: a guess


@dataclass(frozen=True)
class Config:
    """tile_n    keys per KV tile
    k_stages, v_stages  slots of the K ring and of the V ring
    p_stages  slots of the ring of P tiles
    q_stages  slots for Q: with two, the next item's is loaded ahead
    min_tiles  the fewest KV tiles of a CTA in a stream-K plan
    """

    tile_n: int
    k_stages: int
    v_stages: int
    p_stages: int = P_STAGES
    q_stages: int = 2
    min_tiles: int = 4

    def __post_init__(self) -> None:
        if self.tile_n not in TILE_NS:
            raise ValueError(f"{self.tile_n=} must be one of {TILE_NS}")
        if min(self.k_stages, self.v_stages, self.q_stages, self.min_tiles) < 1 or self.p_stages < 2:
            raise ValueError(f"{self}: needs slots of every kind, and two for P")

    @property
    def tile_rows(self) -> int:
        return WARPGROUP_ROWS

    @property
    def geometry(self) -> TileGeometry:
        return TileGeometry(WARPGROUP_ROWS, WARPGROUP_ROWS, self.tile_n, order="descending")

    @property
    def threads(self) -> int:
        return WARPGROUPS * WARPGROUP_THREADS

    @property
    def worker_registers(self) -> int:
        return consumer_registers(2, self.loader_registers)

    @property
    def loader_registers(self) -> int:
        return PRODUCER_REGISTERS[2][0]


def k_bytes(problem: Problem, tile_n: int) -> int:
    return tile_n * padded(problem.head_dim) * ELEMENT_BYTES


def v_bytes(problem: Problem, tile_n: int) -> int:
    return tile_n * padded(problem.head_dim_v) * ELEMENT_BYTES


def shared_bytes(problem: Problem, config: Config) -> int:
    """Shared memory of a CTA, barriers included."""
    q = config.q_stages * WARPGROUP_ROWS * padded(problem.head_dim) * ELEMENT_BYTES
    p = config.p_stages * WARPGROUP_ROWS * (config.tile_n * ELEMENT_BYTES + ROW_STATE_BYTES)
    kv = config.k_stages * k_bytes(problem, config.tile_n) + config.v_stages * v_bytes(problem, config.tile_n)
    return q + p + kv + BARRIER_BYTES


def fits(problem: Problem, config: Config) -> bool:
    return shared_bytes(problem, config) <= SHARED_BYTES


def candidates(problem: Problem) -> list[Config]:
    """For every tile size, the deepest rings of K and V that fit, as even as K's being no shallower than V's allows.

    With a threshold V is loaded after its tile's decision, and the scores are at most P's slots ahead: more slots than
    those and the one that is being read would never fill. Nor has K more than the latency asks for, since the first V
    would wait behind all of it: of head dim 64 with 18 slots of K and three of P, 64 tiles that are all kept take 8%
    longer than in the dense kernel, with 11 and six 1.1% (modelled for an H200, with the seeds' K from L2).
    """

    def ties(config: Config) -> int:
        return config.k_stages if problem.sparsity else config.v_stages

    found = []
    for tile_n in TILE_NS:
        k, v = k_bytes(problem, tile_n), v_bytes(problem, tile_n)
        k_stages_max, p_stages_max = STAGES_MAX, P_STAGES
        if problem.sparsity:
            k_stages_max, p_stages_max = min(STAGES_MAX, -(-BYTES_IN_FLIGHT // k) + 1), P_STAGES_MAX
        for q_stages in (2, 1):
            rings = [
                Config(tile_n, k_stages, v_stages, p_stages, q_stages, MIN_KEYS // tile_n)
                for p_stages in range(P_STAGES, p_stages_max + 1)
                for v_stages in range(2, (p_stages + 1 if problem.sparsity else STAGES_MAX) + 1)
                for k_stages in range(v_stages, k_stages_max + 1)
            ]
            fitting = [config for config in rings if fits(problem, config)]
            if fitting:
                found.append(max(fitting, key=lambda c: (c.k_stages * k + c.v_stages * v, ties(c), -c.p_stages)))
    return found


def cost(problem: Problem, config: Config) -> float:
    """Estimated SM cycles per key and KV head; lower is better.

    A tile takes as long as its bytes or its scores, whichever is more, and a little of the other. With fewer bytes
    under way than the latency asks for, the bytes take longer in proportion; with a threshold this is the mean of
    tiles that are kept and tiles that are skipped, whose K is all there is. Loading Q late costs a little for every
    item.
    """
    k, v = k_bytes(problem, config.tile_n), v_bytes(problem, config.tile_n)
    # A slot of each ring is being read.
    k_in_flight, v_in_flight = (config.k_stages - 1) * k, (config.v_stages - 1) * v
    mma = 2 * WARPGROUP_ROWS * config.tile_n * padded(problem.head_dim) / MMA_FLOP_PER_CYCLE
    tiles = [(k + v, k_in_flight + v_in_flight, TILE_CYCLES + max(mma, config.tile_n * KEY_CYCLES))]
    if problem.sparsity:
        tiles.append((k, k_in_flight, TILE_CYCLES))
    cycles = 0.0
    for tile_bytes, in_flight, score in tiles:
        moving = tile_bytes / BYTES_PER_CYCLE * max(1.0, BYTES_IN_FLIGHT / in_flight)
        cycles += (max(moving, score) + NOT_HIDDEN * min(moving, score)) / len(tiles)
    late_q = 0.02 if config.q_stages == 1 else 0.0
    wide_tile = 0.05 if problem.sparsity and config.tile_n > TILE_NS[0] else 0.0  # is skipped less often
    return cycles / config.tile_n * (1.0 + late_q + wide_tile)


def choose(problem: Problem) -> Config:
    """The candidate of lowest cost."""
    return cheapest(problem, ARCH, candidates(problem), cost)
