"""Modelled time of attention kernels: for comparisons on one chip only. Nothing here was measured on a GPU.

    python -m profiling.model prefill --arch sm_100a --peers fa4 [--case NAME] [--roles]
    python -m profiling.model prefill --arch sm_90a --peers fa4 --sparsity 0,0.5,0.75,0.9 [--case NAME] [--maps random]
    python -m profiling.model calibrate --arch sm_90a
    python -m profiling.model decode --arch sm_90a [--case NAME] [--sparsity 0,0.73,0.9]    (profiling/model_decode.py)

`prefill` prints our kernel's modelled time over each peer's, per published shape; with `--sparsity` how many times
faster than our dense kernel and than each peer it is if these shares of the launch's tiles are skipped. `calibrate`
prints FlashAttention-4's modelled TFLOP/s beside what others have published of it, and exits with 1 if they differ by
more than the bounds below.

How a time comes about
* The kernel runs in the emulator on a piece of the problem: one KV head with its query heads, one block of BLOCK query
  tokens, at a few numbers of keys. Every wait, instruction and asynchronous operation of its clusters is traced and
  replayed by cute_sparse/emulator/timing.py with one chip's rates (cute_sparse/emulator/chips.py).
* A cluster's cycles are close to a straight line in the number of keys: a prologue and an epilogue, and so many cycles
  for each key. With a causal mask the piece is the one at the diagonal that ends at that key, so its partly masked
  tiles are in the line.
* A launch is the list of all blocks' clusters, longest first, handed to SMs as they become free, which is what all
  these kernels' schedules amount to. A kernel with one work tile per CTA pays CTA_GAP_CLOCKS between two; of a
  persistent one a CTA with several work tiles is traced, too, and what it saves from the second on is subtracted.
* Memory is a floor: the time is at least that of moving each tensor once.
* Cycles become seconds by a clock under load: long launches draw full power for longer and end up slower. Its three
  numbers per chip, and a fixed time per launch, are FITTED to FlashAttention-4's published figures; they are the same
  for all shapes and all kernels. Rates and latencies are not fitted.

With tiles skipped
* The maps are drawn (profiling/skipping.py says from what), and the kernel is made to take just these decisions: its
  multiplications are counted, and anything else is an error.
* Rows differ in what they skip. A work tile's clocks are those of a straight line in its keys, through the clusters
  that skip nothing, and what the others deviate from it: a sum of what they skip, do not fetch, and how often a kept
  tile comes after a skipped one (`skipping.FEATURES`), by least squares over the clusters of pieces whose heads skip
  from nothing to SKIPPED_MOST. How far clusters are from it is printed.
* A launch is then made of its work tiles one by one, each with the map that was drawn for it, claimed in the kernel's
  own order (device/schedule.py): a CTA claims its next work tile as it begins one.
* Speed-ups are given in clocks, and in seconds, which are better, because shorter launches keep a higher clock.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import heapq
import importlib
import itertools
import math
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import torch

from cute_sparse import dispatch, emulator
from cute_sparse.emulator import chips, timing
from cute_sparse.emulator.timing import Estimate
from cute_sparse.problem import Problem
from profiling import skipping
from profiling.bench import CASES, LONG, OURS, TABLES, flops, list_of_sparsities
from profiling.peers import Missing, Shape

ARCHES = tuple(chips.DEFAULT_CHIP)
BLOCK = 512  # query tokens of a piece; a multiple of every kernel's work tile
BLOCK_192 = 768  # the same where a work tile has 192 rows
KEYS = (512, 1152, 2048)  # of the pieces: no multiples of 256, so that a tile of 128 is told from one of 256
WINDOW_KEYS = (1536,)
PERSISTENT_KEYS, MANY_TILES = 1024, 4  # work tiles, at least, of the CTA that does several
CLUSTERS_TIMED = 16  # of a piece, evenly spread
CTA_GAP_CLOCKS = 600  # from a CTA's end to the next one's first instruction: assumed
BYTES = 2

# ---- What others have published -----------------------------------------------------------------------------------

PUBLISHED = {  # TFLOP/s of FlashAttention-4 forward in BF16, NVIDIA's cuDNN-frontend CI of 2026-09-28
    "sm_90a": {
        "d128-2k-causal": 522, "d128-4k-causal": 619, "d128-8k-causal": 675, "d128-16k-causal": 702,
        "d128-32k-causal": 638, "d128-2k-full": 671, "d128-4k-full": 734, "d128-8k-full": 756, "d128-16k-full": 686,
        "d128-32k-full": 679, "d192-128-8k-causal": 714, "d192-128-8k-full": 813, "d256-16k-causal": 810,
        "dit-17k-full": 763, "dit-75k-full": 675,
    },
    # Of the full lengths, the first, one in the middle and the last are published: taken for 2k, 8k and 32k. Batch and
    # heads of the one with head dim 256 are not: taken from H200's table.
    "sm_100a": {
        "d128-2k-causal": 1048, "d128-4k-causal": 1334, "d128-8k-causal": 1576, "d128-16k-causal": 1658,
        "d128-32k-causal": 1611, "d128-2k-full": 1387, "d128-8k-full": 1695, "d128-32k-full": 1510,
        "d256-2k-causal": 786,
    },
}  # fmt: skip
# Times faster than its own dense kernel, by the share of tiles skipped: BLASST, arXiv 2512.12087, on random tensors
# of 64K tokens, with V of every tile loaded.
PUBLISHED_SKIPPING = {
    "sm_90a": {0: 1, 0.238: 1.08, 0.492: 1.27, 0.573: 1.35, 0.71: 1.52, 0.795: 1.64, 0.885: 1.78, 0.92: 1.84},
    "sm_100a": {0: 1, 0.389: 1.25, 0.492: 1.33, 0.63: 1.43, 0.719: 1.52, 0.808: 1.61, 0.889: 1.71, 0.942: 1.77},
}
MODEL_CASES = CASES | {"d256-2k-causal": Shape(1, 2048, 32, 2, 256, 256, True)}
MODEL_CASES |= {  # nothing is published of these
    f"{name}-64k-{'causal' if causal else 'full'}": Shape(1, 65536, 32, 8, *head_dims, causal)
    for name, head_dims in {"d64": (64, 64), "d128": (128, 128), "d192-128": (192, 128), "d256": (256, 256)}.items()
    for causal in (True, False)
}
SPEARMAN_LEAST = 0.8
ERROR_MOST = 0.2


@dataclass(frozen=True)
class Fitted:
    """What turns cycles into seconds: the clock is `cold_ghz` in a short launch and nears `hot_ghz` in a long one (by a
    factor e each `heating_ms`), and every launch takes `launch_us` besides. The clock includes what the tensor core
    falls short of its rate by: 790 TFLOP/s of a large matrix product on an H200 are 1.46 GHz of it."""

    cold_ghz: float
    hot_ghz: float
    heating_ms: float
    launch_us: float

    def seconds(self, cycles: float) -> float:
        cold_ms = cycles / self.cold_ghz * 1e-6
        ghz = self.hot_ghz + (self.cold_ghz - self.hot_ghz) * math.exp(-cold_ms / self.heating_ms)
        return cycles / ghz * 1e-9 + self.launch_us * 1e-6


FITTED = {"sm_90a": Fitted(1.55, 1.25, 20, 6), "sm_100a": Fitted(1.65, 1.2, 80, 20)}
FITTED["sm_103a"] = FITTED["sm_100a"]  # nothing of B300 is published: its clock is taken for B200's

# ---- Pieces: what is emulated --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What a kernel's code, and so a piece, depends on. group: query heads per KV head."""

    head_dim: int
    head_dim_v: int
    group: int
    causal: bool
    window_left: int | None

    @staticmethod
    def of(shape: Shape) -> Kind:
        group = shape.heads_q // shape.heads_kv
        return Kind(shape.head_dim, shape.head_dim_v, group, shape.causal, shape.window_left)

    @property
    def block(self) -> int:
        return BLOCK_192 if self.head_dim <= 96 else BLOCK

    @property
    def keys(self) -> tuple[int, ...]:
        return KEYS if self.window_left is None else WINDOW_KEYS

    def tensors(self, seqlen_k: int, heads_kv: int) -> list[torch.Tensor]:
        """q (1, block, heads_kv * group, head_dim), k and v (1, seqlen_k, heads_kv, head_dim), standard normal."""
        generator = torch.Generator().manual_seed(0)
        shapes = (
            (1, self.block, heads_kv * self.group, self.head_dim), (1, seqlen_k, heads_kv, self.head_dim),
            (1, seqlen_k, heads_kv, self.head_dim_v),
        )  # fmt: skip
        return [torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in shapes]


@dataclass(frozen=True)
class Piece:
    """Some of a launch's clusters, timed. clusters: how many it has. ctas: of a cluster. keys: with how many the rows
    were multiplied on average, whole tiles of them. roles: of a CTA's warps."""

    estimates: tuple[Estimate, ...]
    clusters: int
    ctas: int
    keys: float
    roles: tuple[str, ...]

    @property
    def cycles(self) -> float:
        return sum(e.cycles for e in self.estimates) / len(self.estimates)


class OurKernel:
    """The kernel that dispatch chooses."""

    name = OURS

    @contextlib.contextmanager
    def device(self, arch: str, sms: int, one_cta: bool) -> Iterator:
        with _config_of_one_cta(arch) if one_cta else contextlib.nullcontext():
            with dispatch.emulated(arch, sms=sms, threads=1, checks=False) as device:
                yield device

    def call(
        self, kind: Kind, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, threshold: float | None = None
    ) -> None:
        import cute_sparse

        window = (None, None) if kind.window_left is None else (kind.window_left, 0)
        causal = kind.causal and kind.window_left is None
        cute_sparse.attention(q, k, v, causal=causal, window_size=window, threshold=threshold)


@contextlib.contextmanager
def _config_of_one_cta(arch: str) -> Iterator[None]:
    """Within it, configs whose CTAs claim work tiles start one of them only."""
    config = importlib.import_module(f"{dispatch.ROOM_OF_ARCH[arch]}.config")
    choose = config.choose

    def chosen(*arguments, **options):
        choice = choose(*arguments, **options)
        return dataclasses.replace(choice, ctas=getattr(choice, "ctas_per_tile", 1)) if choice.ctas else choice

    config.choose = chosen
    try:
        yield
    finally:
        config.choose = choose


class FlashAttention4:
    """From its package, whose memory of the device and of compiled kernels is emptied before each run."""

    name = "fa4"

    @contextlib.contextmanager
    def device(self, arch: str, sms: int, one_cta: bool) -> Iterator:
        try:
            from flash_attn.cute import interface
        except ImportError as error:
            raise Missing(f"pip install flash-attn-4: {error}") from None
        libraries = ("flash_attn.", "quack.")
        for name, module in list(sys.modules.items()):
            for value in list(vars(module).values()) if name.startswith(libraries) else ():
                if hasattr(value, "cache_clear") and str(getattr(value, "__module__", "")).startswith(libraries):
                    value.cache_clear()
        interface._flash_attn_fwd.compile_cache.clear()
        with emulator.device(arch, sms=2 if one_cta else sms, threads=1, checks=False, torch_cuda=True) as device:
            yield device

    def call(self, kind: Kind, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        from flash_attn.cute import flash_attn_func

        window = (None, None) if kind.window_left is None else (kind.window_left, 0)
        causal = kind.causal and kind.window_left is None
        flash_attn_func(q.cuda(), k.cuda(), v.cuda(), causal=causal, window_size=window)


PROVIDERS = {provider.name: provider for provider in (OurKernel(), FlashAttention4())}


@cache
def piece(provider: str, arch: str, kind: Kind, seqlen_k: int, heads_kv: int = 1, one_cta: bool = False) -> Piece:
    """Emulates and times one piece. one_cta: a persistent kernel has but one cluster to do all of it."""
    chip = chips.chip_of(arch)
    kernel = PROVIDERS[provider]
    with warnings.catch_warnings(), kernel.device(arch, chip.sms, one_cta) as device, timing.traced(device):
        warnings.simplefilter("ignore")
        kernel.call(kind, *kind.tensors(seqlen_k, heads_kv))
        launch = device.launches[-1]
        if len(device.launches) != 1:
            raise RuntimeError(f"{provider} took {len(device.launches)} launches for {kind}; the model knows one")
        clusters = timing.traced_clusters(device)
        step = max(1, clusters // CLUSTERS_TIMED)
        estimates = tuple(timing.estimate(device, chip, cluster=c) for c in range(0, clusters, step))
        rows = kind.block * kind.group * heads_kv
        keys = sum(launch.counts.macs.values()) / (rows * (kind.head_dim + kind.head_dim_v))
        return Piece(estimates, clusters, math.prod(launch.cluster), keys, timing.roles(launch))


# ---- From pieces to launches ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A kernel's clusters: cycles = fixed + per_key * keys, where keys are rounded up to whole tiles of `tile` (0: on
    average there are `beyond` more of them than asked for). clusters: of one block of one KV head. saved: cycles that
    a CTA's second and further work tiles take less (more, if negative)."""

    fixed: float
    per_key: float
    clusters: int
    ctas: int
    saved: float
    tile: int = 0
    beyond: float = 0

    def cycles(self, keys: int) -> float:
        multiplied = -(-keys // self.tile) * self.tile if self.tile else keys + self.beyond
        return self.fixed + self.per_key * multiplied


@cache
def line(provider: str, arch: str, kind: Kind) -> Line:
    pieces = [piece(provider, arch, kind, keys) for keys in kind.keys]
    first = pieces[0]
    if any((p.clusters, p.ctas) != (first.clusters, first.ctas) for p in pieces):
        raise RuntimeError(f"{provider} changes its grid with the number of keys: {kind}")
    multiplied = [p.keys for p in pieces]
    fixed, per_key = _straight(multiplied, [p.cycles for p in pieces])
    tile = 0 if kind.causal else _tile(kind.keys, multiplied)
    beyond = sum(multiplied) / len(multiplied) - sum(kind.keys) / len(kind.keys)
    saved = _saved(provider, arch, kind, first)
    return Line(fixed, per_key, first.clusters, first.ctas, saved, tile, beyond)


def _tile(asked: tuple[int, ...], multiplied: list[float]) -> int:
    """The keys of a KV tile, by what whole tiles of them come to; 0 if no size explains it."""
    sizes = (n for n in range(256, 0, -16) if all(-(-a // n) * n == m for a, m in zip(asked, multiplied, strict=True)))
    return next(sizes, 0)


def _straight(x: list[float], y: list[float]) -> tuple[float, float]:
    """Least squares; a constant if all x are the same."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    if min(x) == max(x):
        return mean_y, 0.0
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return mean_y - slope * mean_x, slope


def _saved(provider: str, arch: str, kind: Kind, alone: Piece) -> float:
    keys = PERSISTENT_KEYS if kind.window_left is None else WINDOW_KEYS[0]
    heads_kv = max(1, MANY_TILES // alone.clusters)
    together = piece(provider, arch, kind, keys, heads_kv, one_cta=True)
    tiles = heads_kv * alone.clusters
    if together.clusters == tiles:
        return -CTA_GAP_CLOCKS
    if together.clusters != 1:
        raise Missing(f"{provider} has {together.clusters} clusters on a chip of one: {kind}")
    return (piece(provider, arch, kind, keys).cycles * tiles - together.cycles) / (tiles - 1)


@dataclass(frozen=True)
class Launch:
    """cycles: of the whole launch. row_cycles: of its longest work tiles, for each of their query rows (a token of a
    head), so that kernels with work tiles of different sizes compare; next_row_cycles: the same of a tile that is not
    an SM's first, with what its CTA saves, or with the gap between two CTAs."""

    cycles: float
    row_cycles: float
    next_row_cycles: float
    seconds: float
    tflops: float


def launch(provider: str, arch: str, shape: Shape) -> Launch:
    kind = Kind.of(shape)
    chip = chips.chip_of(arch)
    of_kind = line(provider, arch, kind)
    ends = [min(end, shape.seqlen) for end in range(kind.block, shape.seqlen + kind.block, kind.block)]
    keys = [end if kind.causal and kind.window_left is None else shape.seqlen for end in reversed(ends)]
    copies = of_kind.clusters * shape.batch * shape.heads_kv
    durations = itertools.chain.from_iterable(itertools.repeat(of_kind.cycles(n), copies) for n in keys)
    cycles = _handed_out(durations, chip.sms // of_kind.ctas, of_kind.saved)
    seconds = max(FITTED[arch].seconds(cycles), _bytes(shape) / chip.hbm_bytes_per_s)
    rows = kind.block * kind.group / (of_kind.clusters * of_kind.ctas)
    first, following = of_kind.cycles(keys[0]), of_kind.cycles(keys[0]) - of_kind.saved
    return Launch(cycles, first / rows, following / rows, seconds, flops(shape) / seconds * 1e-12)


def _handed_out(durations: Iterator[float], slots: int, saved: float) -> float:
    """When the last of `slots` is done, each taking the next duration as it becomes free."""
    free = [0.0] * slots
    for duration in durations:
        begin = heapq.heappop(free)
        heapq.heappush(free, begin + duration - (saved if begin else 0))
    return max(free)


def _claimed(durations: list[float], slots: int, saved: float) -> float:
    """The same if each takes the next duration as it begins one, to begin it when that is done."""
    begun = [(0.0, number) for number in range(min(slots, len(durations)))]
    claimed = len(begun)
    last = 0.0
    while begun:
        begin, number = heapq.heappop(begun)
        end = begin + durations[number] - (saved if begin else 0)
        last = max(last, end)
        if claimed < len(durations):
            heapq.heappush(begun, (end, claimed))
            claimed += 1
    return last


def _bytes(shape: Shape) -> int:
    queries = shape.batch * shape.seqlen * shape.heads_q * (shape.head_dim + shape.head_dim_v)
    keys = shape.batch * shape.seqlen * shape.heads_kv * (shape.head_dim + shape.head_dim_v)
    return BYTES * (queries + keys)


# ---- Launches that skip tiles --------------------------------------------------------------------------------------

SKIPPING_ROWS = 768  # of a piece; a multiple of every kernel's work tile
SKIPPING_HEADS = 6  # query heads of a piece, on one KV head
SKIPPING_KEYS = (1920, 3968, 6016)  # at most a KV tile for each dimension
SKIPPED_MOST = 0.95


@dataclass(frozen=True)
class SkippingKernel:
    """Our kernel with a threshold. fixed, clocks: of a work tile, and of each of its `skipping.FEATURES`. saved: as in
    `Line`, where nothing is skipped. mean_error, worst_error: of traced clusters, relative; the mean of squares."""

    problem: Problem
    config: object
    fixed: float
    clocks: tuple[float, ...]
    saved: float
    mean_error: float
    worst_error: float

    def cycles(self, features: torch.Tensor) -> torch.Tensor:
        """(.., FEATURES) -> (..)."""
        return self.fixed + features @ torch.tensor(self.clocks, dtype=features.dtype)


@cache
def skipping_kernel(arch: str, kind: Kind, maps: str) -> SkippingKernel:
    problem, config = _with_threshold(arch, kind)
    all_keys = SKIPPING_KEYS if kind.window_left is None else WINDOW_KEYS
    all_keys = [min(keys, kind.head_dim * config.geometry.tile_n) for keys in all_keys]
    pieces = [skipping_piece(arch, kind, maps, keys) for keys in all_keys]
    features, cycles = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    keys, skips = features[:, 0], features[:, 1] > 0
    fixed, per_key = _straight(keys[~skips].tolist(), cycles[~skips].tolist())
    beyond = cycles - fixed - per_key * keys
    relative = (features[skips, 1:] / cycles[skips, None], (beyond / cycles)[skips, None])
    others = torch.linalg.lstsq(*relative, driver="gelsd").solution[:, 0].tolist()
    kernel = SkippingKernel(problem, config, fixed, (per_key, *others), -CTA_GAP_CLOCKS, 0, 0)
    errors = kernel.cycles(features) / cycles - 1
    kernel = dataclasses.replace(
        kernel, mean_error=errors.square().mean().sqrt().item(), worst_error=errors.abs().max().item()
    )
    if not config.ctas:
        return kernel
    of_tiles, together = skipping_piece(arch, kind, maps, all_keys[0], most=0, one_cta=True)
    saved = (kernel.cycles(of_tiles).sum() - together.sum()).item() / (len(of_tiles) - 1)
    return dataclasses.replace(kernel, saved=saved)


def skipping_piece(
    arch: str, kind: Kind, maps: str, keys: int, most: float = SKIPPED_MOST, one_cta: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(features of the piece's work tiles, cycles of their clusters; with `one_cta`, of the one that does all of them).
    Its heads skip from nothing to `most` of their tiles. Raises RuntimeError if the kernel skipped others."""
    problem, config = _with_threshold(arch, kind)
    geometry, chip = config.geometry, chips.chip_of(arch)
    head_dims, window = (kind.head_dim, kind.head_dim_v), _window(problem, kind)
    critical = skipping.critical_rates(skipping.LAWS[maps], geometry, SKIPPING_ROWS, keys, window, SKIPPING_HEADS)
    shares = torch.linspace(0, most, SKIPPING_HEADS).tolist()
    heads = zip(critical.split(1), shares, strict=True)
    kept = torch.cat([skipping.kept_tiles(rates, share, most=True) for rates, share in heads])
    kernel = PROVIDERS[OURS]
    with warnings.catch_warnings(), kernel.device(arch, chip.sms, one_cta) as device, timing.traced(device):
        warnings.simplefilter("ignore")
        q, k, v = skipping.tensors(geometry, kept, SKIPPING_ROWS, keys, 1, head_dims)
        kernel.call(kind, q, k, v, threshold=skipping.THRESHOLD)
        clusters = timing.traced_clusters(device)
        cycles = [timing.estimate(device, chip, cluster=c).cycles for c in range(clusters)]
        multiplied = sum(device.launches[-1].counts.macs.values())
    visited = (critical < math.inf).sum().item()
    tile = geometry.tile_rows * geometry.tile_n
    asked = tile * (visited * kind.head_dim + kept.sum().item() * kind.head_dim_v)
    if multiplied != asked:
        raise RuntimeError(f"the kernel did not skip what it should have: {multiplied} products, not {asked}: {kind}")
    order = work_order(arch, problem, config, Shape(1, SKIPPING_ROWS, SKIPPING_HEADS, 1, *head_dims, False), keys)
    return skipping.features(geometry, critical, kept)[order], torch.tensor(cycles, dtype=torch.float64)


def _with_threshold(arch: str, kind: Kind) -> tuple[Problem, object]:
    mask = "band" if kind.window_left is not None else "causal" if kind.causal else "full"
    problem = Problem("prefill", "bfloat16", kind.head_dim, kind.head_dim_v, mask=mask, sparsity="threshold")
    return problem, dispatch.chosen_kernel(problem, arch)[0]


def _window(problem: Problem, kind: Kind) -> skipping.Window:
    return {"full": (None, None), "causal": (None, 0), "band": (kind.window_left, 0)}[problem.mask]


def work_order(arch: str, problem: Problem, config, shape: Shape, seqlen_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The heads (of all sequences) and the blocks of rows of a launch's work tiles, in the order of their numbers: what
    the kernels make a `TileOrder` of."""
    from cute_sparse.device.schedule import TileOrder, heads_in_cache

    room = importlib.import_module(f"{dispatch.ROOM_OF_ARCH[arch]}.config")
    longest_first = problem.mask != "full"
    kv_bytes_per_token = BYTES * (shape.head_dim + shape.head_dim_v)
    group, all_heads = shape.heads_q // shape.heads_kv, shape.heads_q * shape.batch
    in_cache = int(heads_in_cache(room.L2_BYTES, kv_bytes_per_token, seqlen_k, group, all_heads))
    if arch == "sm_90a" and not longest_first:
        in_cache = 1
    geometry = config.geometry
    blocks = -(-shape.seqlen // (geometry.cta_m or geometry.tile_m))
    order = TileOrder(blocks, shape.heads_q, shape.batch, in_cache, longest_first)
    tiles = [order.tile(number) for number in range(blocks * all_heads)]
    heads = [int(tile.batch_idx) * shape.heads_q + int(tile.head_idx) for tile in tiles]
    return torch.tensor(heads), torch.tensor([int(tile.m_block) for tile in tiles])


@dataclass(frozen=True)
class SkippingLaunch:
    """skipped: share of the visited tiles. fetched: of a CTA's tiles, how many some group of it keeps. idle: of the
    SMs' time, what is left when the last work tile ends."""

    cycles: float
    seconds: float
    tflops: float
    skipped: float
    fetched: float
    idle: float


def skipping_launches(arch: str, shape: Shape, maps: str, shares: Iterable[float]) -> Iterator[SkippingLaunch]:
    """Our kernel with a threshold, for each share of tiles skipped. Raises skipping.Unreachable."""
    kernel = skipping_kernel(arch, Kind.of(shape), maps)
    geometry, sms = kernel.config.geometry, chips.chip_of(arch).sms
    window = _window(kernel.problem, Kind.of(shape))
    critical = skipping.critical_rates(
        skipping.LAWS[maps], geometry, shape.seqlen, shape.seqlen, window, shape.batch * shape.heads_q
    )
    order = work_order(arch, kernel.problem, kernel.config, shape, shape.seqlen)
    for share in shares:
        kept = skipping.kept_tiles(critical, share)
        features = skipping.features(geometry, critical, kept)
        durations = kernel.cycles(features)[order].tolist()
        schedule = _claimed if kernel.config.ctas else _handed_out
        cycles = schedule(durations, sms, kernel.saved)
        seconds = max(FITTED[arch].seconds(cycles), _bytes(shape) / chips.chip_of(arch).hbm_bytes_per_s)
        keys, _, _, not_fetched, *_ = features.flatten(0, 1).sum(0).tolist()
        busy = sum(durations) - kernel.saved * max(0, len(durations) - sms)
        rate, skipped = flops(shape) / seconds * 1e-12, skipping.skipped_share(critical, kept)
        yield SkippingLaunch(cycles, seconds, rate, skipped, 1 - not_fetched / keys, 1 - busy / sms / cycles)


# ---- Commands ------------------------------------------------------------------------------------------------------

REASON_COLUMNS = 160
WARNING = "MODELLED, for comparisons on one chip only: nothing below was measured on a GPU."


def prefill(arch: str, cases: dict[str, Shape], peers: list[str], roles: bool) -> int:
    chip = chips.chip_of(arch)
    print(f"{WARNING} Chip: {chip.name} ({arch}).")
    header = f"{'':22} {'ours: TFLOP/s':>14} {'clocks':>8}"
    for peer in peers:
        header += (
            f" | {peer + ': TFLOP/s':>14} {'clocks':>8} | {'ours/' + peer + ': time':>15} {'clocks':>7} {'of next':>7}"
        )
    print(
        f"{header}\nclocks: of the longest CTA, for each 128 query rows; of next: of a tile that is not its SM's first"
    )
    failed = 0
    for name, shape in cases.items():
        try:
            ours = launch(OURS, arch, shape)
            text = f"{name:22} {ours.tflops:14.0f} {128 * ours.row_cycles:8.0f}"
            for peer in peers:
                theirs = launch(peer, arch, shape)
                time, clocks = ours.seconds / theirs.seconds, ours.row_cycles / theirs.row_cycles
                following = ours.next_row_cycles / theirs.next_row_cycles
                text += f" | {theirs.tflops:14.0f} {128 * theirs.row_cycles:8.0f}"
                text += f" | {time:15.3f} {clocks:7.3f} {following:7.3f}"
            print(text, flush=True)
        except (Missing, NotImplementedError, emulator.EmulatorError) as error:
            failed = 1
            reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
            print(f"{name:22} not modelled: {reason[:REASON_COLUMNS]}", flush=True)
    if roles:
        for provider in [OURS, *peers]:
            for kind in dict.fromkeys(Kind.of(shape) for shape in cases.values()):
                print_roles(provider, arch, kind)
    return failed


def prefill_skipping(arch: str, cases: dict[str, Shape], peers: list[str], shares: tuple[float, ...], maps: str) -> int:
    print(f"{WARNING} Chip: {chips.chip_of(arch).name} ({arch}), {maps} skip maps.")
    print("times faster in clocks (seconds); fetched: tiles of V; idle: SMs at the launch's end")
    failed = 0
    for name, shape in cases.items():
        try:
            dense = {provider: launch(provider, arch, shape) for provider in [OURS, *peers]}
            kernel = skipping_kernel(arch, Kind.of(shape), maps)
            fit = f"traced clusters within {kernel.mean_error:.1%}, the worst {kernel.worst_error:.1%}"
            print(f"{name}: {dense[OURS].tflops:.0f} TFLOP/s dense; {fit}")
            for ours in skipping_launches(arch, shape, maps, shares):
                text = f"  skipped {ours.skipped:6.1%}, fetched {ours.fetched:6.1%}, idle {ours.idle:5.1%}"
                text += f" | {ours.tflops:6.0f} TFLOP/s"
                for provider, theirs in dense.items():
                    clocks, time = theirs.cycles / ours.cycles, theirs.seconds / ours.seconds
                    text += f" | {'own dense' if provider == OURS else provider} {clocks:6.3f} ({time:.3f})"
                print(f"{text} | BLASST over its own {published_skipping(arch, ours.skipped):.2f}", flush=True)
        except (Missing, NotImplementedError, emulator.EmulatorError, skipping.Unreachable) as error:
            failed = 1
            reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
            print(f"{name:22} not modelled: {reason[:REASON_COLUMNS]}", flush=True)
    return failed


def published_skipping(arch: str, skipped: float) -> float:
    """What others measured at this share, on a straight line between two of their shares; at most their last."""
    points = list(PUBLISHED_SKIPPING.get(arch, PUBLISHED_SKIPPING["sm_100a"]).items())
    for (x, y), (next_x, next_y) in itertools.pairwise(points):
        if skipped <= next_x:
            return y + (next_y - y) * (skipped - x) / (next_x - x)
    return points[-1][1]


def print_roles(provider: str, arch: str, kind: Kind) -> None:
    """Of one cluster of the longest piece: what each role's warps did with their time."""
    longest = piece(provider, arch, kind, kind.keys[-1])
    fitted = line(provider, arch, kind)
    estimate = longest.estimates[0]
    total, cta = estimate.cycles, estimate.ctas[0]
    print(f"\n{provider} {arch} {kind}, {kind.keys[-1]} keys")
    print(f"  {total:.0f} cycles, the tensor core busy for {cta.tensor / total:.0%}")
    print(f"  {fitted.per_key * 128:.0f} cycles per 128 keys, {fitted.fixed:.0f} fixed, next tile {-fitted.saved:+.0f}")
    print(f"  {'warps':>7} {'do':34} {'issued':>7} {'exp':>5} {'fma':>5} {'alu':>5} {'waits':>6}  most, at PTX lines")
    for (role, first), last in _runs(longest.roles):
        w = cta.warps[first]
        units = [w.units.get(unit, 0) / total for unit in ("mufu", "fma", "alu")]
        waits = sorted(w.lines.items(), key=lambda item: -item[1])[:3]
        longest_waits = ", ".join(f"{clocks / total:.0%} at {number}" for number, clocks in waits)
        print(
            f"  {f'{first}-{last}':>7} {role:34} {w.issued:7} {units[0]:5.0%} {units[1]:5.0%} {units[2]:5.0%} "
            f"{sum(w.waits.values()) / total:6.0%}  {longest_waits}"
        )


def _runs(roles: tuple[str, ...]) -> Iterator[tuple[tuple[str, int], int]]:
    """((role, first warp), last warp) of neighbours that do the same."""
    at = 0
    for role, group in itertools.groupby(roles):
        n = len(list(group))
        yield (role, at), at + n - 1
        at += n


def calibrate(arch: str) -> int:
    """Prints modelled beside published figures; 1 if they are outside the bounds."""
    print(f"{WARNING} Chip: {chips.chip_of(arch).name} ({arch}), FlashAttention-4 forward, BF16.")
    print(f"{'case':22} {'published':>9} {'modelled':>9} {'error':>7}")
    published = PUBLISHED[arch]
    modelled = {}
    for name, theirs in published.items():
        modelled[name] = launch("fa4", arch, MODEL_CASES[name]).tflops
        print(f"{name:22} {theirs:9.0f} {modelled[name]:9.0f} {modelled[name] / theirs - 1:+7.1%}", flush=True)
    rank = spearman(list(published.values()), list(modelled.values()))
    worst = max(abs(modelled[name] / theirs - 1) for name, theirs in published.items())
    good = rank >= SPEARMAN_LEAST and worst <= ERROR_MOST
    verdict = "within" if good else "OUTSIDE"
    print(
        f"Spearman {rank:.2f} (at least {SPEARMAN_LEAST}), worst error {worst:.1%} (at most {ERROR_MOST:.0%}): "
        f"{verdict} the bounds. {FITTED[arch]}."
    )
    return 0 if good else 1


def _decode(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from profiling import decode, model_decode

    for name in options.case or ():
        if name not in decode.CASES:
            parser.error(f"--case {name} is unknown; these are known: {', '.join(decode.CASES)}")
    cases = {name: decode.CASES[name] for name in options.case or decode.TABLES}
    sparsities = [float(share) for share in options.sparsity.split(",") if share]
    if not all(0 <= share < 1 for share in sparsities):
        parser.error(f"--sparsity {options.sparsity}: shares are at least 0 and less than 1")
    model_decode.report(options.arch, cases, sparsities)
    return 0


def spearman(a: list[float], b: list[float]) -> float:
    """Correlation of ranks; equal values share the mean of their ranks."""
    x, y = _ranks(a), _ranks(b)
    mean = (len(a) + 1) / 2
    covariance = sum((i - mean) * (j - mean) for i, j in zip(x, y, strict=True))
    return covariance / math.sqrt(sum((i - mean) ** 2 for i in x) * sum((j - mean) ** 2 for j in y))


def _ranks(values: list[float]) -> list[float]:
    return [sum(v < value for v in values) + (1 + sum(v == value for v in values)) / 2 for value in values]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m profiling.model", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    compare = commands.add_parser("prefill", help="our modelled time over the peers'")
    compare.add_argument("--peers", default="fa4", help="comma-separated; only fa4 is modelled")
    compare.add_argument("--case", action="append", help="a published shape; all of them by default")
    compare.add_argument("--roles", action="store_true", help="what each role's warps do with their time")
    compare.add_argument("--sparsity", type=list_of_sparsities, help="shares of tiles to skip, on the long cases")
    compare.add_argument("--maps", choices=tuple(skipping.LAWS), default="structured", help="what is skipped")
    against = commands.add_parser("calibrate", help="FlashAttention-4, modelled beside published")
    decode = commands.add_parser("decode", help="our decode kernels' modelled time beside that of a copy")
    decode.add_argument("--case", action="append", help="of profiling/decode.py; all but the small ones by default")
    decode.add_argument("--sparsity", default="", help="comma-separated shares of tiles that are skipped")
    for command in (compare, against, decode):
        command.add_argument("--arch", required=True)
    options = parser.parse_args(arguments)
    if options.arch not in ARCHES:
        parser.error(f"--arch {options.arch} is not modelled; these are: {', '.join(ARCHES)}")
    if options.command == "decode":
        return _decode(parser, options)
    if options.command == "calibrate":
        if options.arch not in PUBLISHED:
            parser.error(f"nothing is published of {options.arch} to compare with; there is of: {', '.join(PUBLISHED)}")
        return calibrate(options.arch)
    peers = [name for name in options.peers.split(",") if name]
    for name in peers:
        if name not in PROVIDERS or name == OURS:
            parser.error(f"--peers {name} is not modelled; these are: {', '.join(p for p in PROVIDERS if p != OURS)}")
    published = TABLES | {name: MODEL_CASES[name] for name in PUBLISHED.get(options.arch, ())}
    for name in options.case or ():
        if name not in MODEL_CASES:
            parser.error(f"--case {name} is unknown; these are known: {', '.join(MODEL_CASES)}")
    cases = {name: MODEL_CASES[name] for name in options.case} if options.case else published
    if options.sparsity is not None:
        return prefill_skipping(options.arch, cases if options.case else LONG, peers, options.sparsity, options.maps)
    return prefill(options.arch, cases, peers, options.roles)


if __name__ == "__main__":
    sys.exit(main())
