"""How a decode call's KV tiles are cut into splits: the same arithmetic as `device/split.py`, in plain Python.

An item is a block of packed query rows of one KV head of one sequence. It visits the KV tiles of its sequence in the
order of `visiting_order`: position p is the p-th tile visited. A sequence that visits no tile counts as one position in
which nothing is visible, so that somebody writes its output. Items are numbered by sequence, KV head, block of rows.

Where tiles are skipped, the maxima of a row's scores are mostly near its last key and at the sinks, its first keys. So
these two tiles are visited first, and a part of an item that does not have them looks at their scores before its own
tiles (`seeds`): its running maximum then begins with theirs. That costs it the loads of two tiles of K, which parts of
an item that run side by side find in L2, and lets it skip about what the whole item would. For example, tiles of
`workloads.structured_qkv` with 8192 keys that are skipped without seeds, and with the last, the first, or both:

    lambda  1 part                    4 parts                   16 parts
    1e-3    68.4% 68.4% 96.5% 96.5%   18.8% 60.9% 91.4% 96.5%   3.9% 57.8% 85.5% 96.5%
    1e-2    90.6% 90.6% 98.0% 98.0%   27.7% 90.2% 97.3% 98.0%   5.1% 90.2% 94.5% 98.0%

Either every item is cut into `num_splits` even parts, or (stream-K, arXiv 2301.03598, which LeanAttention, arXiv
2405.10480, brought to attention) the positions of all items form one line, and the line is cut evenly among the CTAs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

PARTIAL_BYTES_MAX = 4 << 30  # of one call
SEEDS = 2  # the first positions of an item, whose scores every part of it looks at


class Segment(NamedTuple):
    """What one CTA does of one item at a stretch: the positions [begin, end).

    split, splits  which part of the item this is, and of how many
    slot           where it leaves its partial result, if it is not the only part
    """

    item: int
    begin: int
    end: int
    split: int
    splits: int
    slot: int


def visiting_order(first_tile: int, end_tile: int) -> list[int]:
    """The tiles [first_tile, end_tile) in the order of positions: the last, the first, and from there back to it."""
    order = list(range(end_tile - 1, first_tile - 1, -1))
    return order[:1] + order[1:][-1:] + order[1:-1]


def seeds(begin: int) -> int:
    """How many positions, from 0 on, a part that begins at `begin` looks at for their maxima alone."""
    return min(begin, SEEDS)


def even_cuts(positions: int, parts: int) -> list[int]:
    """The cuts 0 = c[0] <= .. <= c[parts] = positions of a line into parts that differ by at most one, longer first."""
    base, longer = divmod(positions, parts)
    return [part * base + min(part, longer) for part in range(parts + 1)]


def busy_ctas(total: int, ctas: int, min_tiles: int) -> int:
    """How many CTAs share `total` positions, so that none has fewer than `min_tiles`."""
    return max(1, min(ctas, total // min_tiles))


def stream_k(items: Sequence[int], ctas: int, min_tiles: int) -> list[list[Segment]]:
    """For each busy CTA its segments; `items` has each item's positions.

    A CTA has at most two parts of items: the first it does goes to slot 2 * cta, unless the item begins with it, and
    then to the slot after.
    """
    total = sum(items)
    cuts = even_cuts(total, busy_ctas(total, ctas, min_tiles))
    plan: list[list[Segment]] = [[] for _ in cuts[1:]]
    for item, (begin, end) in enumerate(_spans(items)):
        owners = [cta for cta in range(len(plan)) if cuts[cta] < end and cuts[cta + 1] > begin]
        for split, cta in enumerate(owners):
            first, last = max(cuts[cta], begin), min(cuts[cta + 1], end)
            slot = 2 * cta + (split == 0 and begin > cuts[cta])
            plan[cta].append(Segment(item, first - begin, last - begin, split, len(owners), slot))
    return plan


def fixed(items: Sequence[int], ctas: int, num_splits: int) -> list[list[Segment]]:
    """For each CTA its segments, every item in min(num_splits, its positions) parts, handed out in turn."""
    plan: list[list[Segment]] = [[] for _ in range(ctas)]
    for item, positions in enumerate(items):
        parts = min(num_splits, positions)
        cuts = even_cuts(positions, parts)
        for split in range(parts):
            unit = item * num_splits + split
            plan[unit % ctas].append(Segment(item, cuts[split], cuts[split + 1], split, parts, unit))
    return plan


def item_cuts(items: Sequence[int], ctas: int, num_splits: int, min_tiles: int) -> list[list[int]]:
    """For each item the positions at which its splits begin, and its end; num_splits 0 means stream-K."""
    plan = fixed(items, ctas, num_splits) if num_splits else stream_k(items, ctas, min_tiles)
    begins: list[list[int]] = [[] for _ in items]
    for segments in plan:
        for segment in segments:
            begins[segment.item].append(segment.begin)
    return [sorted(cuts) + [positions] for cuts, positions in zip(begins, items, strict=True)]


def partial_slots(items: int, ctas: int, num_splits: int) -> int:
    """How many slots for partial results a launch needs at most."""
    return items * num_splits if num_splits else 2 * ctas


def _spans(items: Sequence[int]) -> list[tuple[int, int]]:
    spans, begin = [], 0
    for positions in items:
        spans.append((begin, begin + positions))
        begin += positions
    return spans
