"""How a decode call is cut: the cuts cover every tile once and evenly, and the device takes the host's."""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import pytest
import torch
from cutlass import Int32
from cutlass.cute.runtime import from_dlpack
from cutlass.memory import SmemAllocator

from cute_sparse import emulator, splits
from cute_sparse.device.combine import Group
from cute_sparse.device.split import WALK_WORDS, SplitPlan

TILE_N = 64
LENGTHS = {
    "one long among short": [40, 3000, 1, 0, 64, 65],
    "one": [900],
    "all empty": [0, 0],
    "more than a lane": [64 * (index % 5) for index in range(70)],
    "more than are read at once": [64 * (index % 3) for index in range(200)],
}
MAX_SEGMENTS = 512  # that a CTA of these cases has


def positions_of(lengths: list[int], items_per_sequence: int) -> list[int]:
    return [max(-(-length // TILE_N), 1) for length in lengths for _ in range(items_per_sequence)]


@pytest.mark.parametrize("num_splits", [0, 1, 3, 100])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_every_position_is_in_one_split(lengths, num_splits):
    items = positions_of(lengths, 2)
    cuts = splits.item_cuts(items, 5, num_splits, min_tiles=2)
    for item, positions in zip(cuts, items, strict=True):
        assert item[0] == 0 and item[-1] == positions
        assert all(begin < end for begin, end in zip(item, item[1:], strict=False))
        assert not num_splits or len(item) - 1 == min(num_splits, positions)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_stream_k_gives_each_cta_as_much(lengths):
    items = positions_of(lengths, 2)
    plan = splits.stream_k(items, 5, min_tiles=2)
    loads = [sum(segment.end - segment.begin for segment in segments) for segments in plan]
    assert sum(loads) == sum(items) and max(loads) - min(loads) <= 1
    assert len(plan) == 1 or min(loads) >= 2


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("num_splits", [0, 3])
def test_no_two_partial_results_share_a_slot(lengths, num_splits):
    items = positions_of(lengths, 3)
    plan = splits.fixed(items, 7, num_splits) if num_splits else splits.stream_k(items, 7, 1)
    slots = [segment.slot for segments in plan for segment in segments if segment.splits > 1]
    assert len(set(slots)) == len(slots)
    assert max(slots, default=0) < splits.partial_slots(len(items), 7, num_splits)


def test_the_last_and_the_first_tile_are_visited_first():
    assert splits.visiting_order(3, 8) == [7, 3, 6, 5, 4]
    assert [splits.visiting_order(3, end) for end in (6, 5, 4, 3)] == [[5, 3, 4], [4, 3], [3], []]


LOOKS = 4  # that are written down of a segment: the first, and the last


class Dump:
    """A kernel that writes down the segments it walks: ints (ctas, MAX_SEGMENTS, 7 + LOOKS), 0 beyond."""

    def __init__(self, seeded: bool):
        self.seeded = seeded

    @cute.jit
    def __call__(self, seqused_k, out, batch: Int32, row_blocks: Int32, num_splits: Int32, ctas: Int32, stream):
        plan = SplitPlan("full", TILE_N, 2, self.seeded, seqused_k, Int32(1 << 20), Int32(1), None, None,
                         batch, Int32(2), row_blocks, num_splits, ctas)  # fmt: skip
        self.kernel(plan, out).launch(grid=(ctas, 1, 1), block=(64, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, plan: SplitPlan, out: cute.Tensor):
        words = SmemAllocator().allocate_tensor(Int32, cute.make_layout(WALK_WORDS), byte_alignment=16)
        if cute.arch.warp_idx() == 0:
            plan.locate(words)
        cute.arch.sync_threads()
        cta, _, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        walk = plan.first(words)
        count = Int32(0)
        while plan.more(walk):
            segment = plan.segment(walk)
            if segment.begin < segment.end:
                if thread == 33:
                    out[cta, count, 0] = segment.item
                    out[cta, count, 1] = segment.begin
                    out[cta, count, 2] = segment.end
                    out[cta, count, 3] = segment.split
                    out[cta, count, 4] = segment.splits
                    out[cta, count, 5] = segment.slot(segment.split)
                    looks = plan.looks(segment)
                    out[cta, count, 6] = looks
                    for i in cutlass.range_constexpr(LOOKS):
                        look = cutlass.min(Int32(i), looks - 1) if i < LOOKS - 1 else looks - 1
                        out[cta, count, 7 + i] = plan.n_block(segment, look)
                count += 1
            walk = plan.next(walk)


@pytest.mark.parametrize("num_splits", [0, 1, 3])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_the_device_cuts_as_the_host_does(lengths, num_splits):
    for seeded in (False, True):
        check_the_device(lengths, num_splits, seeded)


def check_the_device(lengths, num_splits, seeded):
    row_blocks, ctas = 2, 6
    seqused_k = torch.tensor(lengths, dtype=torch.int32)
    out = torch.zeros((ctas, MAX_SEGMENTS, 7 + LOOKS), dtype=torch.int32)
    with emulator.device("sm_90a"):
        arguments = (from_dlpack(seqused_k), from_dlpack(out), len(lengths), row_blocks, num_splits, ctas)
        cute.compile(Dump(seeded), *arguments, cuda.CUstream(0))(*arguments, cuda.CUstream(0))
    items = positions_of(lengths, 2 * row_blocks)
    plan = splits.fixed(items, ctas, num_splits) if num_splits else splits.stream_k(items, ctas, 2)
    for cta, segments in enumerate(plan):
        for number, segment in enumerate(segments):
            tiles = -(-lengths[segment.item // (2 * row_blocks)] // TILE_N)
            order = splits.visiting_order(0, tiles) if seeded else list(reversed(range(tiles)))
            seeds = splits.seeds(segment.begin) if seeded else 0
            looks = order[:seeds] + order[segment.begin : segment.end]
            found = out[cta, number].tolist()
            assert found[:7] == [*segment, len(looks)], (cta, number)
            if looks:
                assert found[7:] == [looks[min(i, len(looks) - 1)] for i in (0, 1, 2, -1)], (cta, number)
        assert not out[cta, len(segments) :].any()
    assert not out[len(plan) :].any()


LEVELS = 4


class Groups:
    """A kernel that writes down the groups that each split of an item is part of: ints (splits, LEVELS, 3)."""

    @cute.jit
    def __call__(self, out, count: Int32, fan_in: Int32, stream):
        self.kernel(out, count, fan_in).launch(grid=(count, 1, 1), block=(1, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, out: cute.Tensor, count: Int32, fan_in: Int32):
        split, _, _ = cute.arch.block_idx()
        group = Group.of(split, count, fan_in, Int32(0), Int32(1))
        for level in cutlass.range_constexpr(LEVELS):
            for i, value in enumerate((group.first, group.count, group.counter)):
                out[split, level, i] = value
            group = group.next()


@pytest.mark.parametrize("count, fan_in", [(2, 8), (8, 8), (71, 8), (65, 4), (27, 3)])
def test_no_two_groups_of_results_count_their_arrivals_in_one_place(count, fan_in):
    """Nor do groups of different levels, of which there are fewer than fan_in: one may be incomplete when another's
    result comes to the next level."""
    out = torch.zeros((count, LEVELS, 3), dtype=torch.int32)
    with emulator.device("sm_90a"):
        arguments = (from_dlpack(out), count, fan_in)
        cute.compile(Groups(), *arguments, cuda.CUstream(0))(*arguments, cuda.CUstream(0))
    found = set()
    for split, levels in enumerate(out.tolist()):
        for level, (first, results, counter) in enumerate(levels):
            step, width = fan_in**level, fan_in ** (level + 1)
            assert first == split // width * width
            assert results == -(-min(count - first, width) // step)
            if results > 1:  # else nothing is counted
                assert counter < count
                found.add((level, first, counter))
    assert len({counter for _, _, counter in found}) == len(found)
