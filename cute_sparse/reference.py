"""The oracle: attention in PyTorch, tile by tile in a kernel's order, taking a kernel's decisions.

For each KV tile j of a query row's range, in the order of the geometry,

    S_j = softcap(softmax_scale * Q K_j^T), masked entries -inf
    skip the tile (for the whole group of rows) by the rule of `TileGeometry`, else
    m' = max(m, rowmax(S_j)); l = l e^(m - m') + rowsum(e^(S_j - m')); O = O e^(m - m') + e^(S_j - m') V_j; m = m'

and at the end out = O / l, lse = m + ln(l), over the kept tiles only (BLASST, arXiv 2512.12087, algorithm 1).
It is written for clarity and for tests: float64 by default, on any device that PyTorch has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from cute_sparse.problem import TileGeometry

NOT_VISITED, KEPT, SKIPPED = 0, 1, 2
DEFAULT_GEOMETRY = TileGeometry(tile_m=128, tile_rows=64, tile_n=128)  # Hopper's for head dim 128


class Oracle(NamedTuple):
    """What the oracle computed; floating tensors are in the compute dtype.

    out          (batch, seqlen_q, heads_q, head_dim_v), or (total_q, heads_q, head_dim_v)
    lse          (batch, heads_q, seqlen_q), or (heads_q, total_q): natural log, -inf for a row with no key
    skip_map     uint8 (batch, heads_q, groups of rows, KV tiles): 0 not visited, 1 kept, 2 skipped
    tile_counts  int32 (2, batch, heads_q): kept, visited
    margin       like skip_map: the largest tile_max - row_max - ln(lambda) of the group's rows, in natural-log
                 units; the tile is skipped where it is negative. +inf for a tile that is kept whatever the
                 threshold (the first of its range, or a row that sees its first key or a NaN), NaN where not
                 visited. With a given skip map it says how far each given decision is from the threshold.
    """

    out: torch.Tensor
    lse: torch.Tensor
    skip_map: torch.Tensor
    tile_counts: torch.Tensor
    margin: torch.Tensor


def tile_ranges(
    geometry: TileGeometry, seqlen_q: int, seqlen_k: int, window_left: int, window_right: int
) -> list[range]:
    """For each block of tile_m query rows, the KV tiles it visits, in its order; an empty range where it sees no key.

    Row i sees the keys of [i + seqlen_k - seqlen_q - window_left, i + seqlen_k - seqlen_q + window_right].
    """
    ranges = []
    for first_row in range(0, seqlen_q, geometry.tile_m):
        last_row = min(first_row + geometry.tile_m, seqlen_q) - 1
        first_key = max(first_row + seqlen_k - seqlen_q - window_left, 0)
        last_key = min(last_row + seqlen_k - seqlen_q + window_right, seqlen_k - 1)
        first, last = first_key // geometry.tile_n, last_key // geometry.tile_n
        if last_key < first_key:
            ranges.append(range(0))
        elif geometry.order == "ascending":
            ranges.append(range(first, last + 1))
        else:
            ranges.append(range(last, first - 1, -1))
    return ranges


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float,
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float = 0.0,
    threshold: torch.Tensor | None = None,
    geometry: TileGeometry = DEFAULT_GEOMETRY,
    skip_map: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Oracle:
    """Attention of q (batch, seqlen_q, heads_q, head_dim) over k, v (batch, seqlen_k, heads_kv, head_dim[_v]).

    window_left, window_right  half-widths of the band in keys, None for unbounded; causal is window_right=0
    threshold  lambda, broadcastable to (batch, heads_q); None keeps every tile
    skip_map   uint8 (batch, heads_q, groups, KV tiles): take these decisions (2 = skip) in place of the rule's
    """
    batch, seqlen_q, heads_q, _ = q.shape
    seqlen_k, heads_v = k.shape[1], v.shape[3]
    left = seqlen_k if window_left is None else window_left
    right = seqlen_q if window_right is None else window_right
    groups, tiles = -(-seqlen_q // geometry.tile_rows), -(-seqlen_k // geometry.tile_n)
    q_rows = q.to(dtype).transpose(1, 2)  # (batch, heads_q, seqlen_q, head_dim)
    k_rows, v_rows = k.to(dtype).transpose(1, 2), v.to(dtype).transpose(1, 2)
    log_threshold = _log_threshold(threshold, batch, heads_q, dtype, q.device)

    row_max = q_rows.new_full((batch, heads_q, seqlen_q), -math.inf)
    row_sum = q_rows.new_zeros((batch, heads_q, seqlen_q))
    acc = q_rows.new_zeros((batch, heads_q, seqlen_q, heads_v))
    decisions = torch.zeros((batch, heads_q, groups, tiles), dtype=torch.uint8, device=q.device)
    margins = q_rows.new_full((batch, heads_q, groups, tiles), math.nan)

    ranges = tile_ranges(geometry, seqlen_q, seqlen_k, left, right)
    for tile in range(tiles) if geometry.order == "ascending" else reversed(range(tiles)):
        blocks = [block for block, visited in enumerate(ranges) if tile in visited]
        if not blocks:
            continue
        # The band moves one key to the right with each row, so the blocks that visit a tile are neighbours.
        rows = slice(blocks[0] * geometry.tile_m, min((blocks[-1] + 1) * geometry.tile_m, seqlen_q))
        row_groups = slice(rows.start // geometry.tile_rows, -(-rows.stop // geometry.tile_rows))
        keys = slice(tile * geometry.tile_n, min((tile + 1) * geometry.tile_n, seqlen_k))

        scores = _scores(q_rows[:, :, rows], k_rows[:, :, keys], softmax_scale, softcap)
        visible = _visible(rows, keys, seqlen_k - seqlen_q, left, right, q.device)
        scores = scores.masked_fill(~visible, -math.inf)
        tile_max = scores.amax(dim=-1)  # (batch, heads_q, rows)

        margin = _margin(tile_max, row_max[:, :, rows], log_threshold, geometry.tile_rows)
        for block in blocks:
            if ranges[block][0] == tile:
                margin[:, :, _groups_of(block, geometry, row_groups)] = math.inf
        skip = margin < 0 if skip_map is None else skip_map[:, :, row_groups, tile] == SKIPPED
        margins[:, :, row_groups, tile] = margin
        decisions[:, :, row_groups, tile] = torch.where(skip, SKIPPED, KEPT).to(torch.uint8)

        row_skip = skip.repeat_interleave(geometry.tile_rows, dim=2)[:, :, : rows.stop - rows.start]
        new_max = torch.where(row_skip, row_max[:, :, rows], torch.maximum(row_max[:, :, rows], tile_max))
        reference = torch.where(new_max == -math.inf, 0.0, new_max)  # a row with no key yet: e^(-inf - 0) = 0
        rescale = torch.exp(row_max[:, :, rows] - reference)
        weights = torch.exp(scores - reference.unsqueeze(-1))
        row_sum[:, :, rows] = torch.where(
            row_skip, row_sum[:, :, rows], row_sum[:, :, rows] * rescale + weights.sum(dim=-1)
        )
        acc[:, :, rows] = torch.where(
            row_skip.unsqueeze(-1),
            acc[:, :, rows],
            acc[:, :, rows] * rescale.unsqueeze(-1) + _per_kv_head(weights, v_rows[:, :, keys]),
        )
        row_max[:, :, rows] = new_max

    out = acc / torch.where(row_sum == 0, 1.0, row_sum).unsqueeze(-1)
    lse = row_max + torch.log(row_sum)
    tile_counts = torch.stack([(decisions == KEPT).sum(dim=(2, 3)), (decisions != NOT_VISITED).sum(dim=(2, 3))])
    return Oracle(out.transpose(1, 2).contiguous(), lse, decisions, tile_counts.to(torch.int32), margins)


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: Sequence[int],
    cu_seqlens_k: Sequence[int],
    max_seqlen_q: int,
    max_seqlen_k: int,
    threshold: torch.Tensor | None = None,
    geometry: TileGeometry = DEFAULT_GEOMETRY,
    skip_map: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    **options,
) -> Oracle:
    """`attention`, one packed sequence after the other; q, k, v are (total tokens, heads, head dim).

    Rows of q before the first and after the last sequence have no key: output 0, lse -inf. Skip map and margin are
    (batch, heads_q, groups of max_seqlen_q, KV tiles of max_seqlen_k), each sequence's tiles counted from its start.
    """
    batch, (total_q, heads_q, _) = len(cu_seqlens_q) - 1, q.shape
    groups, tiles = -(-max_seqlen_q // geometry.tile_rows), -(-max_seqlen_k // geometry.tile_n)
    out = torch.zeros((total_q, heads_q, v.shape[2]), dtype=dtype, device=q.device)
    lse = torch.full((heads_q, total_q), -math.inf, dtype=dtype, device=q.device)
    decisions = torch.zeros((batch, heads_q, groups, tiles), dtype=torch.uint8, device=q.device)
    margins = torch.full((batch, heads_q, groups, tiles), math.nan, dtype=dtype, device=q.device)
    tile_counts = torch.zeros((2, batch, heads_q), dtype=torch.int32, device=q.device)
    if threshold is not None:
        threshold = threshold.expand(batch, heads_q)
    for index in range(batch):
        queries = slice(cu_seqlens_q[index], cu_seqlens_q[index + 1])
        keys = slice(cu_seqlens_k[index], cu_seqlens_k[index + 1])
        one = attention(
            q[None, queries],
            k[None, keys],
            v[None, keys],
            threshold=None if threshold is None else threshold[index : index + 1],
            geometry=geometry,
            skip_map=None if skip_map is None else skip_map[index : index + 1],
            dtype=dtype,
            **options,
        )
        out[queries], lse[:, queries] = one.out[0], one.lse[0]
        own = (index, slice(None), slice(one.skip_map.shape[2]), slice(one.skip_map.shape[3]))
        decisions[own], margins[own] = one.skip_map[0], one.margin[0]
        tile_counts[:, index] = one.tile_counts[:, 0]
    return Oracle(out, lse, decisions, tile_counts, margins)


def _log_threshold(
    threshold: torch.Tensor | None, batch: int, heads_q: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    if threshold is None:
        return None
    return torch.log(threshold.to(device=device, dtype=dtype)).expand(batch, heads_q).unsqueeze(-1)


def _per_kv_head(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left (batch, heads_q, rows, n) @ right (batch, heads_kv, n, m), each KV head serving heads_q / heads_kv heads."""
    batch, heads_q, rows, inner = left.shape
    heads_kv = right.shape[1]
    grouped = left.reshape(batch, heads_kv, (heads_q // heads_kv) * rows, inner)
    return (grouped @ right).reshape(batch, heads_q, rows, right.shape[3])


def _scores(q_rows: torch.Tensor, k_rows: torch.Tensor, softmax_scale: float, softcap: float) -> torch.Tensor:
    scores = _per_kv_head(q_rows, k_rows.transpose(2, 3)) * softmax_scale
    return softcap * torch.tanh(scores / softcap) if softcap > 0 else scores


def _visible(rows: slice, keys: slice, offset: int, left: int, right: int, device: torch.device) -> torch.Tensor:
    """(rows, keys) bool: -left <= kv_idx - (q_idx + offset) <= right."""
    q_idx = torch.arange(rows.start, rows.stop, device=device).unsqueeze(1)
    distance = torch.arange(keys.start, keys.stop, device=device) - q_idx - offset
    return (distance >= -left) & (distance <= right)


def _margin(
    tile_max: torch.Tensor, row_max: torch.Tensor, log_threshold: torch.Tensor | None, tile_rows: int
) -> torch.Tensor:
    """(batch, heads_q, groups): the largest of the group's rows; rows outside the sequence have no say."""
    if log_threshold is None:
        margin = torch.full_like(tile_max, math.inf)
    else:
        margin = tile_max - row_max - log_threshold
        margin = torch.where(tile_max == -math.inf, -math.inf, margin)  # sees no key here: skip
        margin = torch.where(margin.isnan(), math.inf, margin)  # a NaN score never skips
    padding = -tile_max.shape[2] % tile_rows
    margin = torch.nn.functional.pad(margin, (0, padding), value=-math.inf)
    return margin.unflatten(2, (-1, tile_rows)).amax(dim=-1)


def _groups_of(block: int, geometry: TileGeometry, row_groups: slice) -> slice:
    """The row groups of a block of tile_m rows, counted from the first group of `row_groups`."""
    per_block = geometry.tile_m // geometry.tile_rows
    return slice(block * per_block - row_groups.start, (block + 1) * per_block - row_groups.start)
