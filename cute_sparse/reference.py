"""The oracle: attention in PyTorch, tile by tile in a kernel's order, taking a kernel's decisions.

For each KV tile j of a query row's range, in the order of the geometry,

    S_j = softcap(softmax_scale * Q K_j^T), masked entries -inf
    skip the tile (for the whole group of rows) by the rule of `TileGeometry`, else
    m' = max(m, rowmax(S_j)); l = l e^(m - m') + rowsum(e^(S_j - m')); O = O e^(m - m') + e^(S_j - m') V_j; m = m'

and at the end out = O / l, lse = m + ln(l), over the kept tiles only (BLASST, arXiv 2512.12087, algorithm 1). A
learnable sink s adds e^(s - m) to l then, and so takes no part in the decisions.
It is written for clarity and for tests: float64 by default, on any device that PyTorch has.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from cute_sparse import splits
from cute_sparse.problem import TileGeometry

NOT_VISITED, KEPT, SKIPPED = 0, 1, 2
# Hopper's for head dim 128, causal, with a threshold.
DEFAULT_GEOMETRY = TileGeometry(tile_m=64, tile_rows=64, tile_n=80, order="first_early", cta_m=192)


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


def tile_walks(
    geometry: TileGeometry, seqlen_q: int, seqlen_k: int, window_left: int, window_right: int
) -> list[tuple[range, ...]]:
    """For each block of tile_m query rows, the KV tiles it visits, in its order, as ranges one after the other.

    Row i sees the keys of [i + seqlen_k - seqlen_q - window_left, i + seqlen_k - seqlen_q + window_right]. The n-th
    ranges of two blocks go in the same direction, and blocks whose n-th range holds a tile are neighbours.
    """
    cta_m = geometry.cta_m or geometry.tile_m
    walks = []
    for first_row in range(0, seqlen_q, geometry.tile_m):
        last_row = min(first_row + geometry.tile_m, seqlen_q) - 1
        first_key = max(first_row + seqlen_k - seqlen_q - window_left, 0)
        last_key = min(last_row + seqlen_k - seqlen_q + window_right, seqlen_k - 1)
        first, end = first_key // geometry.tile_n, last_key // geometry.tile_n + 1
        if last_key < first_key:
            first = end = 0
        if geometry.order == "descending":
            walks.append((_downwards(first, end),))
        else:
            cta_row = first_row // cta_m * cta_m
            whole_end = min(cta_row + seqlen_k - seqlen_q + window_right + 1, seqlen_k) // geometry.tile_n
            whole_end = min(max(whole_end, first), end)
            after_first = min(first + 1, whole_end)
            walks.append((_downwards(whole_end, end), range(first, after_first), _downwards(after_first, whole_end)))
    return walks


def _downwards(begin: int, end: int) -> range:
    """[begin, end) from the last to the first."""
    return range(end - 1, begin - 1, -1)


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
    sink: torch.Tensor | None = None,
    geometry: TileGeometry = DEFAULT_GEOMETRY,
    skip_map: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Oracle:
    """Attention of q (batch, seqlen_q, heads_q, head_dim) over k, v (batch, seqlen_k, heads_kv, head_dim[_v]).

    window_left, window_right  half-widths of the band in keys, None for unbounded; causal is window_right=0
    threshold  lambda, broadcastable to (batch, heads_q); None keeps every tile
    sink       (heads_q,) logits without a value; None: there are none
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

    walks = tile_walks(geometry, seqlen_q, seqlen_k, left, right)
    firsts = [next(itertools.chain(*walk), None) for walk in walks]
    for nth, tile in itertools.product(range(max(map(len, walks), default=0)), reversed(range(tiles))):
        blocks = [block for block, walk in enumerate(walks) if tile in walk[nth]]
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
            if firsts[block] == tile:
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
    out, lse = _with_sink(out.transpose(1, 2).contiguous(), row_max + torch.log(row_sum), sink)
    tile_counts = torch.stack([(decisions == KEPT).sum(dim=(2, 3)), (decisions != NOT_VISITED).sum(dim=(2, 3))])
    return Oracle(out, lse, decisions, tile_counts.to(torch.int32), margins)


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


def _with_sink(out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """out (batch, seqlen_q, heads_q, n) and lse (batch, heads_q, seqlen_q) with one more logit per head, of value 0."""
    if sink is None:
        return out, lse
    total = torch.logaddexp(lse, sink.to(lse)[:, None].expand_as(lse))
    share = torch.where(lse == -math.inf, 0.0, torch.exp(lse - total))  # the keys' share of the softmax
    return out * share.transpose(1, 2)[..., None], total


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


# ---- Decode --------------------------------------------------------------------------------------------------------

DECODE_GEOMETRY = TileGeometry(tile_m=64, tile_rows=64, tile_n=64)  # Hopper's for head dim 128


class DecodeOracle(NamedTuple):
    """What `decode` computed; floating tensors are in the compute dtype.

    out          (batch, seqlen_q, heads_q, head_dim_v)
    lse          (batch, heads_q, seqlen_q): natural log, -inf for a row with no key
    skip_map     uint8 (batch, heads_kv, row blocks, KV tiles of the capacity): 0 not visited, 1 kept, 2 skipped
    tile_counts  int32 (2, batch, heads_kv): kept, visited
    margin       like skip_map, as `Oracle.margin`, against what a split knows of itself: +inf for an item's first tile
    least_margin like margin, against the largest maximum that any split of the item ever has: where it is negative a
                 split that was told of it may skip the tile, too, also as its first
    """

    out: torch.Tensor
    lse: torch.Tensor
    skip_map: torch.Tensor
    tile_counts: torch.Tensor
    margin: torch.Tensor
    least_margin: torch.Tensor


def decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    seqused_k: Sequence[int],
    page_table: torch.Tensor | None = None,
    softmax_scale: float,
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float = 0.0,
    threshold: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    num_splits: int = 0,
    ctas: int = 1,
    min_tiles: int = 1,
    share_max: bool = False,
    geometry: TileGeometry = DECODE_GEOMETRY,
    skip_map: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> DecodeOracle:
    """Attention of q (batch, seqlen_q, heads_q, head_dim) over the first seqused_k[i] keys of each sequence's cache.

    k_cache, v_cache  (batch, capacity, heads_kv, head_dim[_v]), or pages (pages, page_size, heads_kv, head_dim[_v])
    page_table   integers (batch, max pages); those without a key that some query sees are not looked at
    num_splits, ctas, min_tiles  how a launch cuts the work (`splits.item_cuts`): each split has a running maximum of
                 its own, which begins with those of `splits.seeds`. By default it is not cut.
    share_max    the splits of an item run one after the other, and know the maxima of those before them
    geometry     `tile_rows` packed rows (`packed_rows`) of a KV head decide together
    threshold, sink, window_*, skip_map  as in `attention`; the skip map is that of `DecodeOracle`
    """
    batch, seqlen_q, heads_q, _ = q.shape
    heads_kv, head_dim_v = v_cache.shape[2:]
    page_size = None if page_table is None else k_cache.shape[1]
    capacity = k_cache.shape[1] if page_table is None else page_table.shape[1] * page_size
    left = capacity if window_left is None else window_left
    right = seqlen_q if window_right is None else window_right
    row_blocks, tiles = -(-seqlen_q * (heads_q // heads_kv) // geometry.tile_rows), -(-capacity // geometry.tile_n)

    q_rows = packed_rows(q.to(dtype), heads_kv)
    log_lambda = None
    if threshold is not None:
        lambdas = _log_threshold(threshold, batch, heads_q, dtype, q.device)  # (batch, heads_q, 1)
        log_lambda = packed_rows(lambdas.transpose(1, 2).expand(batch, seqlen_q, heads_q)[..., None], heads_kv)[..., 0]
    out_rows = q_rows.new_zeros((*q_rows.shape[:3], head_dim_v))
    lse_rows = q_rows.new_full(q_rows.shape[:3], -math.inf)
    decisions = torch.zeros((batch, heads_kv, row_blocks, tiles), dtype=torch.uint8, device=q.device)
    margins = q_rows.new_full(decisions.shape, math.nan)
    least_margins = margins.clone()

    key_ranges = [visible_keys(seqlen_q, length, left, right) for length in seqused_k]
    visited = [tiles_of(keys, geometry.tile_n) for keys in key_ranges]
    positions = [max(len(order), 1) for order in visited for _ in range(heads_kv * row_blocks)]
    cuts = iter(splits.item_cuts(positions, ctas, num_splits, min_tiles))
    for index, (length, keys, order) in enumerate(zip(seqused_k, key_ranges, visited, strict=True)):
        item_cuts = [next(cuts) for _ in range(heads_kv * row_blocks)]
        if not order:
            continue
        k_rows, v_rows = (
            cached_tokens(cache, None if page_table is None else page_table[index], index, keys).to(dtype)
            for cache in (k_cache, v_cache)
        )  # (heads_kv, keys, head_dim[_v])
        scores = q_rows[index] @ k_rows.transpose(1, 2) * softmax_scale  # (heads_kv, rows, keys)
        scores = softcap * torch.tanh(scores / softcap) if softcap > 0 else scores
        visible = _visible(slice(0, seqlen_q), keys, length - seqlen_q, left, right, q.device)
        scores = scores.masked_fill(~visible.repeat_interleave(heads_q // heads_kv, dim=0), -math.inf)
        columns = [_columns(tile, keys, geometry.tile_n) for tile in order]
        tile_max = torch.stack([scores[..., column].amax(dim=-1) for column in columns], dim=-1)
        for item, item_cut in enumerate(item_cuts):
            kv_head, block = divmod(item, row_blocks)
            rows = slice(block * geometry.tile_rows, (block + 1) * geometry.tile_rows)
            given = None if skip_map is None else (skip_map[index, kv_head, block, order] == SKIPPED).tolist()
            decided = _decide(
                tile_max[kv_head, rows],
                None if log_lambda is None else log_lambda[index, kv_head, rows],
                item_cut, given, share_max,
            )  # fmt: skip
            where = (index, kv_head, block, order)
            decisions[where] = torch.where(decided.skip, SKIPPED, KEPT).to(torch.uint8)
            margins[where], least_margins[where] = decided.margin, decided.least_margin
            kept = _kept_keys(columns, decided.skip)
            out_rows[index, kv_head, rows], lse_rows[index, kv_head, rows] = _softmax_times(
                scores[kv_head, rows][:, kept], v_rows[kv_head, kept]
            )
    tile_counts = torch.stack([(decisions == KEPT).sum(dim=(2, 3)), (decisions != NOT_VISITED).sum(dim=(2, 3))])
    out, lse = unpacked_rows(out_rows, seqlen_q), unpacked_rows(lse_rows[..., None], seqlen_q)[..., 0]
    out, lse = _with_sink(out, lse.transpose(1, 2).contiguous(), sink)
    return DecodeOracle(out, lse, decisions, tile_counts.to(torch.int32), margins, least_margins)


def packed_rows(tensor: torch.Tensor, heads_kv: int) -> torch.Tensor:
    """(batch, seqlen_q, heads_q, n) -> (batch, heads_kv, rows, n): row i * group + g of a KV head is query i of the
    KV head's g-th query head, group = heads_q / heads_kv."""
    return tensor.unflatten(2, (heads_kv, -1)).transpose(1, 2).flatten(2, 3)


def unpacked_rows(rows: torch.Tensor, seqlen_q: int) -> torch.Tensor:
    """The inverse of `packed_rows`."""
    return rows.unflatten(2, (seqlen_q, -1)).transpose(1, 2).flatten(2, 3).contiguous()


def visible_keys(seqlen_q: int, seqlen_k: int, window_left: int, window_right: int) -> slice:
    """The keys from the first to the last that any query of a sequence sees; empty where it has no key."""
    first = max(seqlen_k - seqlen_q - window_left, 0)
    return slice(first, max(min(seqlen_k + window_right, seqlen_k), first))


def tiles_of(keys: slice, tile_n: int) -> list[int]:
    """The KV tiles that hold these keys, in the order in which they are visited."""
    return splits.visiting_order(keys.start // tile_n, -(-keys.stop // tile_n)) if keys.stop > keys.start else []


def cached_tokens(cache: torch.Tensor, pages: torch.Tensor | None, batch_idx: int, keys: slice) -> torch.Tensor:
    """(heads_kv, keys, n): the tokens of one sequence, gathered from the pages that hold one of these keys."""
    if pages is None:
        return cache[batch_idx, keys].transpose(0, 1)
    page_size = cache.shape[1]
    first_page = keys.start // page_size
    used = pages[first_page : -(-keys.stop // page_size)].tolist()
    tokens = torch.cat([cache[page] for page in used])
    return tokens[keys.start - first_page * page_size : keys.stop - first_page * page_size].transpose(0, 1)


def _columns(tile: int, keys: slice, tile_n: int) -> slice:
    """Where a tile's keys lie in a tensor of these keys alone."""
    return slice(max(tile * tile_n, keys.start) - keys.start, min((tile + 1) * tile_n, keys.stop) - keys.start)


def _kept_keys(columns: list[slice], skip: torch.Tensor) -> torch.Tensor:
    """The indices of the keys of tiles that are not skipped."""
    kept = [range(column.start, column.stop) for column, gone in zip(columns, skip.tolist(), strict=True) if not gone]
    return torch.tensor(list(itertools.chain.from_iterable(kept)), dtype=torch.int64, device=skip.device)


class _Decided(NamedTuple):
    skip: torch.Tensor  # bool (positions,)
    margin: torch.Tensor  # (positions,)
    least_margin: torch.Tensor


def _decide(
    tile_max: torch.Tensor, log_lambda: torch.Tensor | None, cuts: list[int], given: list[bool] | None, share_max: bool
) -> _Decided:
    """Walk the positions of one item, split by split; tile_max (rows, positions), log_lambda (rows,)."""
    rows, positions = tile_max.shape

    def margin_against(position: int, row_max: torch.Tensor) -> float:
        return _margin(tile_max[None, None, :, position], row_max[None, None], log_lambda[None, None], rows).item()

    skip = [False] * positions if given is None else given
    margin = [math.inf] * positions
    nothing = tile_max.new_full((rows,), -math.inf)
    published = nothing
    for begin, end in zip(cuts, cuts[1:], strict=False):
        row_max = torch.cat([nothing[:, None], tile_max[:, : splits.seeds(begin)]], dim=1).amax(dim=1)
        for position in range(begin, end):
            if log_lambda is not None and position > 0:
                margin[position] = margin_against(position, row_max)
            if log_lambda is not None and given is None:
                told = share_max and bool((published > -math.inf).any())
                known = torch.maximum(row_max, published)
                skip[position] = (margin_against(position, known) if told else margin[position]) < 0
            if not skip[position]:
                row_max = torch.maximum(row_max, tile_max[:, position])
        published = torch.maximum(published, row_max)
    least = margin
    if log_lambda is not None:
        least = [margin_against(position, published) for position in range(positions)]
    return _Decided(torch.tensor(skip, device=tile_max.device), tile_max.new_tensor(margin), tile_max.new_tensor(least))


def _softmax_times(scores: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of scores (rows, keys) and values (keys, n); 0 and -inf for a row that sees no key."""
    if scores.shape[1] == 0:
        return values.new_zeros((scores.shape[0], values.shape[1])), scores.new_full(scores.shape[:1], -math.inf)
    row_max = scores.amax(dim=-1)
    weights = torch.exp(scores - torch.where(row_max == -math.inf, 0.0, row_max)[:, None])
    row_sum = weights.sum(dim=-1)
    out = weights @ values / torch.where(row_sum == 0, 1.0, row_sum)[:, None]
    return out, row_max + torch.log(row_sum)
