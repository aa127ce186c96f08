"""Modelled time of decode calls: for comparisons on one chip only. Nothing here was measured on a GPU.

    python -m profiling.model decode --arch sm_90a [--case b8-32k-32q8kv] [--sparsity 0,0.73,0.9]

prints, per case of profiling/decode.py, our dense kernel's modelled time, the bytes of K and V over it as a share of
what a copy reaches, and for each sparsity (that share of the tiles is skipped) the dense kernel's time over the
threshold kernel's.

How a time comes about
* The kernel runs in the emulator with as many SMs as the chip has, as dispatch would launch it. If a CTA has more KV
  tiles than TILES[-1], all lengths are cut in proportion until it has about TILES: the plan of such a call has the same
  CTAs, items and splits, and only the runs of tiles in between are shorter. Of one long sequence among short ones, it
  and the number of the others are cut instead.
* CTAs are traced and replayed (cute_sparse/emulator/timing.py) on a chip whose memory, at a copy's speed, is shared by
  all CTAs that have work, for what nobody in the launch has loaded before; the rest (the seeds' K, pages of several
  sequences) comes at L2's speed. So a CTA's clocks are those of its bytes and an excess: starting, what the bytes do
  not hide, and at the end its results and perhaps the combination of an item.
* CTAs that have more bytes than others get more of the memory when the others are done. So a launch takes the clocks of
  the mean CTA's bytes, and the excess of the worst; what the mean excess grows by from the fewer of TILES to the more,
  if it does, it goes on to grow by up to the tiles of the case.
* Where tiles are skipped, each (sequence, KV head) keeps its first and last tile and others at random. K's first
  column makes a tile negligible or not, so that as many are skipped as asked for; how many is read from the V loaded.

What it cannot know: how memory behaves under many streams (banks, channels, refresh, TLB misses of scattered pages),
its latency under load, which CTA is an item's last to arrive (here the one with the highest number), how far a chip's
CTAs start apart, and what else a launch costs. A copy is taken to need its bytes' time and one trip to memory and back
before the first and behind the last (COPY_TRIPS); both would have the launch's own overhead on top.
"""

from __future__ import annotations

import random
from functools import cache
from typing import NamedTuple

import torch

from cute_sparse import dispatch, splits
from cute_sparse.emulator import chips, timing
from cute_sparse.problem import Problem
from profiling import decode
from profiling.decode import DecodeShape

TILES = (16, 32)  # KV tiles of a CTA in what is emulated
ITEM_TILES_LEAST = 8  # of the longest sequences: a ring's worth
CTAS_TIMED, COMBINING_TIMED = 12, 4  # evenly spread; those that combine the most splits
COPY_TRIPS = 2
LEVEL = 1024.0  # by which scores of a tile that is to be skipped are lower, before softmax's scale
THRESHOLD = 1e-3


class Split(NamedTuple):
    """How a case's tiles are cut. tile_n: keys of one. tiles: of the whole call; seeds: what its parts look at besides.
    combining: of the CTAs that finish items of several parts, those of the most parts first. parts: the most of an
    item."""

    tile_n: int
    tiles: int
    seeds: int
    busy: int
    combining: tuple[int, ...]
    parts: int

    @property
    def tiles_per_cta(self) -> float:
        return self.tiles / self.busy


def problem_of(shape: DecodeShape, sparse: bool) -> Problem:
    return Problem(
        kind="decode", dtype="bfloat16", head_dim=shape.head_dim, head_dim_v=shape.head_dim_v, mask="causal",
        sparsity="threshold" if sparse else None, page_size=shape.page_size,
    )  # fmt: skip


def split_of(arch: str, shape: DecodeShape, sparse: bool) -> Split:
    """What the kernel's plan comes to: of one block of rows per KV head."""
    config, _ = dispatch.chosen_kernel(problem_of(shape, sparse), arch)
    items = [-(-length // config.tile_n) for length in shape.lengths for _ in range(shape.heads_kv)]
    plan = splits.stream_k(items, chips.chip_of(arch).sms, config.min_tiles)
    last = {s.item: (s.splits, cta) for cta, segments in enumerate(plan) for s in segments if s.splits > 1}
    combining = tuple(cta for _, cta in sorted(last.values(), key=lambda parts: -parts[0]))
    seeds = sum(splits.seeds(s.begin) for segments in plan for s in segments) if sparse else 0
    parts = max((parts for parts, _ in last.values()), default=1)
    return Split(config.tile_n, sum(items), seeds, len(plan), combining, parts)


def reduced(arch: str, shape: DecodeShape, sparse: bool, tiles: int) -> DecodeShape:
    """The same with about as many tiles per CTA, if it has more."""
    split = split_of(arch, shape, sparse)
    longest = max(shape.lengths)
    factor = tiles / split.tiles_per_cta
    if shape.is_ragged and factor < 1:
        others = shape.lengths[1 : 1 + max(1, round((shape.batch - 1) * factor))]
        return shape._replace(lengths=(round(shape.lengths[0] * factor), *others))
    factor = max(factor, ITEM_TILES_LEAST * tiles / TILES[0] * split.tile_n / longest)
    if factor >= 1:
        return shape
    lengths = tuple(max(1, round(length * factor / split.tile_n)) * split.tile_n for length in shape.lengths)
    return shape._replace(lengths=lengths)


# ---- What is emulated ----------------------------------------------------------------------------------------------


def inputs(shape: DecodeShape, tile_n: int, skipped: float | None) -> decode.DecodeInputs:
    """Zeros, but for what makes a share of the tiles negligible, and pages in a random order."""
    generator = random.Random(0)
    used = [-(-length // shape.page_size) for length in shape.lengths] if shape.page_size else []
    tokens = shape.page_size or max(shape.lengths)
    size = (sum(used) if used else shape.batch, tokens, shape.heads_kv)
    k, v = (torch.zeros(*size, dim, dtype=torch.bfloat16) for dim in (shape.head_dim, shape.head_dim_v))
    q = torch.zeros(shape.batch, shape.seqlen_q, shape.heads_q, shape.head_dim, dtype=torch.bfloat16)
    q[..., 0] = LEVEL
    page_table = None
    if used:
        order = list(range(sum(used)))
        generator.shuffle(order)
        page_table = torch.zeros((shape.batch, max(used)), dtype=torch.int32)
        first = 0
        for index, pages in enumerate(used):
            page_table[index, :pages] = torch.tensor(order[first : first + pages], dtype=torch.int32)
            first += pages
    if skipped:
        for index, length in enumerate(shape.lengths):
            low = _levels(length, shape.heads_kv, tile_n, skipped, generator)
            if page_table is None:
                k[index, :length, :, 0] = low
            else:
                pages = page_table[index, : used[index]].long()
                padded = torch.zeros(used[index] * tokens, shape.heads_kv, dtype=torch.bfloat16)
                padded[:length] = low
                k[pages, :, :, 0] = padded.unflatten(0, (used[index], tokens))
    return decode.DecodeInputs(q, k, v, torch.tensor(shape.lengths, dtype=torch.int32), page_table)


def _levels(length: int, heads: int, tile_n: int, skipped: float, generator: random.Random) -> torch.Tensor:
    """(length, heads): what K's first column holds. Of the tiles but the first and the last, such a number is low that
    on average `skipped` of all are."""
    tiles = -(-length // tile_n)
    wanted = skipped * tiles / max(1, tiles - 2)
    low = [[-1.0 * (0 < t < tiles - 1 and generator.random() < wanted) for _ in range(heads)] for t in range(tiles)]
    return torch.tensor(low, dtype=torch.bfloat16).repeat_interleave(tile_n, 0)[:length]


class Traced(NamedTuple):
    """A problem that was emulated. excess: of the CTAs that were timed, the clocks that their own bytes from memory do
    not take. skipped: the share of the tiles whose V was not loaded."""

    tiles_per_cta: float
    excess: tuple[float, ...]
    skipped: float

    @property
    def mean(self) -> float:
        return sum(self.excess) / len(self.excess)


@cache
def traced(arch: str, shape: DecodeShape, skipped: float | None) -> Traced:
    """skipped: None of the dense kernel."""
    import cute_sparse

    split = split_of(arch, shape, skipped is not None)
    chip = chips.chip_of(arch).streaming(split.busy)
    q, k, v, seqused_k, page_table = inputs(shape, split.tile_n, skipped)
    more = {} if skipped is None else {"threshold": THRESHOLD}
    with dispatch.emulated(arch, sms=chip.sms, threads=1, checks=False) as device, timing.traced(device):
        cute_sparse.decode(q, k, v, seqused_k=seqused_k, page_table=page_table, **more)
        if len(device.launches) != 1:
            raise RuntimeError(f"a decode call took {len(device.launches)} launches; the model knows one")
        ctas = {*range(0, split.busy, max(1, split.busy // CTAS_TIMED)), split.busy - 1}
        excess = []
        for cta in sorted(ctas.union(split.combining[:COMBINING_TIMED])):
            estimate = timing.estimate(device, chip, cluster=cta)
            excess.append(estimate.cycles - estimate.ctas[0].fresh_bytes / chip.hbm_bytes)
        loaded = device.launches[-1].counts.tma_bytes_loaded
    k_bytes, v_bytes = tile_bytes(shape, split)
    kept = (loaded - (split.tiles + split.seeds) * k_bytes) / (split.tiles * v_bytes)
    return Traced(split.tiles_per_cta, tuple(excess), 1 - kept)


def tile_bytes(shape: DecodeShape, split: Split) -> tuple[int, int]:
    """Of K and of V."""
    return tuple(split.tile_n * decode.ELEMENT_BYTES * dim for dim in (shape.head_dim, shape.head_dim_v))


# ---- From there to launches ----------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """clocks: of the worst CTA; bytes_clocks: what K and V of the kept tiles take at a copy's speed."""

    clocks: float
    bytes_clocks: float
    skipped: float


def launch(arch: str, shape: DecodeShape, skipped: float | None) -> Launch:
    sparse = skipped is not None
    split = split_of(arch, shape, sparse)
    short, long = (traced(arch, reduced(arch, shape, sparse, tiles), skipped) for tiles in TILES)
    excess = max(long.excess)
    if long.tiles_per_cta > short.tiles_per_cta:
        per_tile = (long.mean - short.mean) / (long.tiles_per_cta - short.tiles_per_cta)
        excess += max(0.0, per_tile) * (split.tiles_per_cta - long.tiles_per_cta)
    k_bytes, v_bytes = tile_bytes(shape, split)
    moved = split.tiles_per_cta * (k_bytes + (1 - long.skipped) * v_bytes)
    bytes_clocks = moved / chips.chip_of(arch).streaming(split.busy).hbm_bytes
    return Launch(bytes_clocks + excess, bytes_clocks, long.skipped)


def copy_seconds(chip: chips.Chip, moved: int) -> float:
    trips = COPY_TRIPS * (chip.tma_latency + chip.hbm_latency) / (chip.clock_ghz * 1e9)
    return moved / chip.copied_bytes_per_s + trips


WARNING = "MODELLED, for comparisons on one chip only: nothing below was measured on a GPU."


def report(arch: str, cases: dict[str, DecodeShape], sparsities: list[float]) -> None:
    chip = chips.chip_of(arch)
    print(f"{WARNING} Chip: {chip.name} ({arch}).")
    print(
        f"of rate: of the {chip.copied_bytes_per_s * 1e-9:.0f} GB/s of a long copy; of copy: of a copy of as many "
        "bytes; excess: clocks that the bytes do not take"
    )
    header = f"{'':28} {'CTAs':>4} {'tiles':>6} {'parts':>5} {'us':>8} {'GB/s':>5} {'of rate':>7} {'of copy':>7}"
    print(f"{header} {'excess':>7}" + "".join(f" | {share:4.0%} skipped: speed-up" for share in sparsities))
    for name, shape in cases.items():
        split, dense = split_of(arch, shape, False), launch(arch, shape, None)
        seconds = dense.clocks / (chip.clock_ghz * 1e9)
        rate = shape.kv_bytes / seconds
        of_rate, of_copy = rate / chip.copied_bytes_per_s, copy_seconds(chip, shape.kv_bytes) / seconds
        text = f"{name:28} {split.busy:4} {split.tiles_per_cta:6.1f} {split.parts:5} {seconds * 1e6:8.1f}"
        text += f" {rate * 1e-9:5.0f} {of_rate:7.1%} {of_copy:7.1%} {dense.clocks - dense.bytes_clocks:7.0f}"
        for sparsity in sparsities:
            sparse = launch(arch, shape, sparsity)
            text += f" | {sparse.skipped:12.1%} {dense.clocks / sparse.clocks:9.3f}"
        print(text, flush=True)
