"""The oracle against PyTorch's dense attention in float64, and its decisions against a loop over single scores."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from cute_sparse import reference, splits
from cute_sparse.problem import TileGeometry

SMALL = TileGeometry(tile_m=32, tile_rows=16, tile_n=24)
GEOMETRIES = [
    SMALL,
    TileGeometry(tile_m=32, tile_rows=16, tile_n=24, order="first_early"),
    TileGeometry(tile_m=16, tile_rows=16, tile_n=8, order="first_early", cta_m=48),
    TileGeometry(tile_m=16, tile_rows=16, tile_n=8),
    TileGeometry(tile_m=48, tile_rows=16, tile_n=64),
]
# (seqlen_q, seqlen_k, window_left, window_right)
BANDS = {
    "full": (70, 90, None, None),
    "causal": (70, 70, None, 0),
    "causal, more keys": (33, 100, None, 0),
    "causal, rows without a key": (100, 33, None, 0),
    "window on both sides": (90, 80, 20, 10),
    "sliding window": (90, 90, 17, 0),
    "window of one key": (40, 40, 0, 0),
    "one row": (1, 75, None, 0),
    "one key": (75, 1, None, None),
    "no key": (20, 0, None, None),
    "no row": (0, 20, None, None),
}


def make(seqlen_q, seqlen_k, heads_q=4, heads_kv=2, head_dim=16, head_dim_v=24, batch=2, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, seqlen_q, heads_q, head_dim, generator=generator) * spread
    k = torch.randn(batch, seqlen_k, heads_kv, head_dim, generator=generator)
    v = torch.randn(batch, seqlen_k, heads_kv, head_dim_v, generator=generator)
    return q, k, v


def visible_pairs(seqlen_q, seqlen_k, left, right):
    distance = torch.arange(seqlen_k) - torch.arange(seqlen_q)[:, None] - (seqlen_k - seqlen_q)
    mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    if left is not None:
        mask &= distance >= -left
    if right is not None:
        mask &= distance <= right
    return mask


def scores_of(q, k, scale, softcap):
    group = q.shape[2] // k.shape[2]
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double().repeat_interleave(group, dim=2)) * scale
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def brute_force(q, k, v, scale, left, right, softcap, lam, geometry):
    """The rule of TileGeometry, one row and one score at a time; (out, lse, skip_map)."""
    batch, seqlen_q, heads, _ = q.shape
    seqlen_k = k.shape[1]
    scores = scores_of(q, k, scale, softcap).tolist()
    visible = visible_pairs(seqlen_q, seqlen_k, left, right).tolist()
    values = v.double().repeat_interleave(heads // k.shape[2], dim=2)
    groups, tiles = -(-seqlen_q // geometry.tile_rows), -(-seqlen_k // geometry.tile_n)
    skip_map = torch.zeros(batch, heads, groups, tiles, dtype=torch.uint8)
    kept_keys = torch.zeros(batch, heads, seqlen_q, seqlen_k, dtype=torch.bool)
    keys_of = {t: range(t * geometry.tile_n, min((t + 1) * geometry.tile_n, seqlen_k)) for t in range(tiles)}
    for b in range(batch):
        for h in range(heads):
            for block in range(0, seqlen_q, geometry.tile_m):
                block_rows = range(block, min(block + geometry.tile_m, seqlen_q))
                visited = [t for t in range(tiles) if any(visible[i][j] for i in block_rows for j in keys_of[t])][::-1]
                if geometry.order == "first_early" and visited:
                    cta_row = block - block % (geometry.cta_m or geometry.tile_m)
                    seen = [j for j in range(seqlen_k) if visible[cta_row][j]]
                    edge = [t for t in visited if not seen or max(keys_of[t].start + geometry.tile_n - 1, 0) > seen[-1]]
                    rest = [t for t in visited if t not in edge]
                    visited = edge + rest[-1:] + rest[:-1]
                for start in range(block, block_rows.stop, geometry.tile_rows):
                    rows = range(start, min(start + geometry.tile_rows, block_rows.stop))
                    row_max = {i: -math.inf for i in rows}
                    for t in visited:
                        tile_max = {
                            i: max((scores[b][h][i][j] for j in keys_of[t] if visible[i][j]), default=-math.inf)
                            for i in rows
                        }
                        votes = [
                            tile_max[i] == -math.inf
                            or (row_max[i] > -math.inf and tile_max[i] - row_max[i] < math.log(lam[b][h]))
                            for i in rows
                        ]
                        skip = t != visited[0] and all(votes)
                        skip_map[b, h, start // geometry.tile_rows, t] = 2 if skip else 1
                        for i in rows if not skip else []:
                            row_max[i] = max(row_max[i], tile_max[i])
                            for j in keys_of[t]:
                                kept_keys[b, h, i, j] = visible[i][j]
    kept_scores = torch.tensor(scores, dtype=torch.float64).reshape(kept_keys.shape)
    kept_scores = kept_scores.masked_fill(~kept_keys, -math.inf)
    lse = torch.logsumexp(kept_scores, dim=-1)
    weights = torch.exp(kept_scores - torch.where(lse == -math.inf, 0.0, lse)[..., None])
    return torch.einsum("bhqk,bkhd->bqhd", weights, values), lse, skip_map


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("band", BANDS.values(), ids=BANDS.keys())
def test_dense_equals_torch_in_float64(band, geometry):
    seqlen_q, seqlen_k, left, right = band
    q, k, v = make(seqlen_q, seqlen_k)
    ours = reference.attention(
        q, k, v, softmax_scale=0.25, window_left=left, window_right=right, geometry=geometry
    )
    mask = visible_pairs(seqlen_q, seqlen_k, left, right)
    q64, k64, v64 = (x.double().transpose(1, 2) for x in (q, k, v))
    theirs = torch.nn.functional.scaled_dot_product_attention(
        q64, k64, v64, attn_mask=mask, scale=0.25, enable_gqa=True
    ).transpose(1, 2)
    has_key = mask.any(dim=1)
    torch.testing.assert_close(ours.out[:, has_key], theirs[:, has_key], atol=1e-13, rtol=1e-12)
    scores = scores_of(q, k, 0.25, 0.0).masked_fill(~mask, -math.inf)
    torch.testing.assert_close(ours.lse, torch.logsumexp(scores, dim=-1), atol=1e-13, rtol=1e-12)
    assert (ours.out[:, ~has_key] == 0).all() and (ours.lse[:, :, ~has_key] == -math.inf).all()
    assert not (ours.skip_map == reference.SKIPPED).any()


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("band", BANDS.values(), ids=BANDS.keys())
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_decisions_and_output_equal_the_loop_over_single_scores(band, geometry, softcap):
    seqlen_q, seqlen_k, left, right = band
    q, k, v = make(seqlen_q, seqlen_k, heads_q=2, heads_kv=1, batch=2)
    lam = torch.tensor([[0.05, 0.9], [1.0, 0.3]])
    ours = reference.attention(
        q, k, v, softmax_scale=0.25, window_left=left, window_right=right,
        softcap=softcap, threshold=lam, geometry=geometry,
    )  # fmt: skip
    out, lse, skip_map = brute_force(q, k, v, 0.25, left, right, softcap, lam.double().tolist(), geometry)
    assert torch.equal(ours.skip_map, skip_map)
    torch.testing.assert_close(ours.out, out, atol=1e-12, rtol=1e-11)
    torch.testing.assert_close(ours.lse, lse, atol=1e-12, rtol=1e-11)
    assert torch.equal(ours.tile_counts[0], (skip_map == 1).sum(dim=(2, 3)).int())
    assert torch.equal(ours.tile_counts[1], (skip_map > 0).sum(dim=(2, 3)).int())


def test_the_decisions_above_skip_and_keep():
    """A guard on the inputs: the comparison with the loop would be empty if nothing, or everything, was skipped."""
    q, k, v = make(90, 90, heads_q=2, heads_kv=1)
    lam = torch.tensor([[0.05, 0.9], [1.0, 0.3]])
    geometry = TileGeometry(tile_m=16, tile_rows=16, tile_n=8)
    got = reference.attention(q, k, v, softmax_scale=0.25, window_right=0, threshold=lam, geometry=geometry)
    kept, visited = got.tile_counts
    assert (kept < visited).any() and (kept > visited // 8).all()


def test_replaying_the_skip_map_gives_the_same_output_and_other_maps_another():
    q, k, v = make(70, 90, spread=6.0)
    first = reference.attention(q, k, v, softmax_scale=0.25, threshold=torch.tensor(0.5), geometry=SMALL)
    assert (first.skip_map == reference.SKIPPED).any()
    again = reference.attention(
        q, k, v, softmax_scale=0.25, threshold=torch.tensor(0.5), geometry=SMALL, skip_map=first.skip_map
    )
    assert torch.equal(again.out, first.out) and torch.equal(again.skip_map, first.skip_map)
    other = first.skip_map.clone()
    other[other == reference.SKIPPED] = reference.KEPT
    dense = reference.attention(
        q, k, v, softmax_scale=0.25, threshold=torch.tensor(0.5), geometry=SMALL, skip_map=other
    )
    assert torch.equal(dense.skip_map, other)
    torch.testing.assert_close(dense.out, reference.attention(q, k, v, softmax_scale=0.25).out, atol=1e-13, rtol=1e-12)
    assert not torch.allclose(dense.out, first.out, atol=1e-6)


def test_the_margin_is_negative_exactly_where_a_tile_is_skipped():
    q, k, v = make(100, 130, spread=6.0)
    got = reference.attention(q, k, v, softmax_scale=0.25, window_right=0, threshold=torch.tensor(0.3), geometry=SMALL)
    assert torch.equal(got.margin < 0, got.skip_map == reference.SKIPPED)
    assert torch.equal(got.margin.isnan(), got.skip_map == reference.NOT_VISITED)
    decided = got.margin.isfinite()
    assert decided.any() and got.margin[decided].abs().max() < 100


def test_a_ragged_last_group_skips_like_a_full_one():
    """Rows outside the sequence do not vote: with one real row in the last group, its tiles are still skipped."""
    q, k, v = make(16, 96, heads_q=1, heads_kv=1, batch=1)
    k = k * 0.01
    k[:, 72:] += q[:, :1].mean(dim=2, keepdim=True)  # every row of q below is row 0: it likes the last tile
    q = q[:, :1].expand(1, 17, 1, 16)
    got = reference.attention(q, k, v, softmax_scale=1.0, threshold=torch.tensor(0.5), geometry=SMALL)
    assert got.skip_map[0, 0].tolist() == [[2, 2, 2, 1], [2, 2, 2, 1]]


def test_threshold_one_skips_only_tiles_strictly_below_the_running_maximum():
    q = torch.ones(1, 16, 1, 16)
    k = torch.ones(1, 72, 1, 16)
    got = reference.attention(q, k, k, softmax_scale=1.0, threshold=torch.tensor(1.0), geometry=SMALL)
    assert (got.skip_map == reference.KEPT).all()
    k[:, :24] *= 0.999
    got = reference.attention(q, k, k, softmax_scale=1.0, threshold=torch.tensor(1.0), geometry=SMALL)
    assert got.skip_map[0, 0, 0].tolist() == [2, 1, 1]


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_propagate_as_in_torch(where, value):
    q, k, v = make(40, 48, heads_q=1, heads_kv=1, batch=1)
    {"q": q, "k": k, "v": v}[where][0, 7, 0, 3] = value
    ours = reference.attention(q, k, v, softmax_scale=0.25, geometry=SMALL).out
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(1, 2) for x in (q, k, v)), scale=0.25
    ).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, equal_nan=True, atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("where", ["q", "k"])
def test_a_nan_score_keeps_its_tile_and_a_row_with_one_keeps_all_after_it(where):
    q, k, v = make(16, 72, heads_q=1, heads_kv=1, batch=1)
    k[:, 48:] += 4 * q[:, :1]
    q = q[:, :1].expand(1, 16, 1, 16).clone()
    clean = reference.attention(q, k, v, softmax_scale=1.0, threshold=torch.tensor(0.9), geometry=SMALL)
    assert clean.skip_map[0, 0, 0].tolist() == [2, 2, 1]
    (q if where == "q" else k)[0, 5, 0, 0] = math.nan  # row 5, or key 5 of tile 0
    got = reference.attention(q, k, v, softmax_scale=1.0, threshold=torch.tensor(0.9), geometry=SMALL)
    assert got.skip_map[0, 0, 0].tolist() == ([1, 1, 1] if where == "q" else [1, 2, 1])
    assert got.margin[0, 0, 0, 0] == math.inf


@pytest.mark.parametrize("shape", [(4, 4), (1, 4), None])
def test_varlen_equals_each_sequence_alone(shape):
    lengths_q, lengths_k = [5, 0, 33, 16], [40, 7, 0, 60]
    cu_q, cu_k = [0, 5, 5, 38, 54], [0, 40, 47, 47, 107]
    q, k, v = (x[0] for x in make(54, 107, batch=1))
    lam = None if shape is None else torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 0.9 + 0.1
    got = reference.attention_varlen(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=40, max_seqlen_k=64,
        softmax_scale=0.25, window_right=0, threshold=lam, geometry=SMALL,
    )  # fmt: skip
    assert got.skip_map.shape == (4, 4, 3, 3) and got.lse.shape == (4, 54)
    for index, (length_q, length_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        queries, keys = slice(cu_q[index], cu_q[index + 1]), slice(cu_k[index], cu_k[index + 1])
        alone = reference.attention(
            q[None, queries], k[None, keys], v[None, keys],
            softmax_scale=0.25, window_right=0, geometry=SMALL,
            threshold=None if lam is None else lam.expand(4, 4)[index : index + 1],
        )  # fmt: skip
        assert torch.equal(got.out[queries], alone.out[0]) and torch.equal(got.lse[:, queries], alone.lse[0])
        assert torch.equal(got.tile_counts[:, index], alone.tile_counts[:, 0])
        groups, tiles = -(-length_q // 16), -(-length_k // 24)
        assert torch.equal(got.skip_map[index, :, :groups, :tiles], alone.skip_map[0])
        assert got.skip_map[index].sum() == alone.skip_map.sum()


# ---- Decode ----

DECODE_SMALL = TileGeometry(tile_m=8, tile_rows=8, tile_n=8)
LENGTHS = (0, 1, 16, 17, 61, 3)
# (seqlen_q, window_left, window_right)
DECODE_BANDS = {
    "one query": (1, None, 0),
    "four queries, causal": (4, None, 0),
    "four queries, full": (4, None, None),
    "window": (3, 20, 0),
    "window on both sides": (5, 9, 2),
    "window of one key": (2, 0, 0),
}
SPLITS = {
    "whole": dict(),
    "three": dict(num_splits=3),
    "more than tiles": dict(num_splits=50),
    "stream-K": dict(ctas=7, min_tiles=2),
}


def make_decode(seqlen_q, heads_q=6, heads_kv=2, head_dim=16, head_dim_v=24, page_size=None, seed=0):
    """(q, k_cache, v_cache, page_table, k, v): caches, paged or not, and the same tokens as a list per sequence."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(len(LENGTHS), seqlen_q, heads_q, head_dim, generator=generator) * 3
    k = [torch.randn(length, heads_kv, head_dim, generator=generator) for length in LENGTHS]
    for tokens in k:
        tokens[torch.arange(len(tokens)) % 16 < 8] *= 0.1  # every other tile of 8 keys can be skipped
    v = [torch.randn(length, heads_kv, head_dim_v, generator=generator) for length in LENGTHS]
    if page_size is None:
        caches = [torch.full((len(LENGTHS), 64, heads_kv, x[0].shape[2]), math.nan) for x in (k, v)]
        for index, length in enumerate(LENGTHS):
            caches[0][index, :length], caches[1][index, :length] = k[index], v[index]
        return q, *caches, None, k, v
    pages_per_sequence = 64 // page_size
    order = torch.randperm(len(LENGTHS) * pages_per_sequence, generator=generator)
    table = torch.full((len(LENGTHS), pages_per_sequence), -(10**9), dtype=torch.int32)
    caches = [torch.full((len(order), page_size, heads_kv, x[0].shape[2]), math.nan) for x in (k, v)]
    for index, length in enumerate(LENGTHS):
        for page in range(-(-length // page_size)):
            table[index, page] = number = order[index * pages_per_sequence + page]
            for cache, tokens in zip(caches, (k[index], v[index]), strict=True):
                part = tokens[page * page_size : (page + 1) * page_size]
                cache[number, : len(part)] = part
    return q, *caches, table, k, v


@pytest.mark.parametrize("splitting", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("band", DECODE_BANDS.values(), ids=DECODE_BANDS)
def test_dense_decode_equals_torch_in_float64(band, page_size, splitting):
    seqlen_q, left, right = band
    q, k_cache, v_cache, table, k, v = make_decode(seqlen_q, page_size=page_size)
    got = reference.decode(
        q, k_cache, v_cache, seqused_k=LENGTHS, page_table=table, softmax_scale=0.25, window_left=left,
        window_right=right, geometry=DECODE_SMALL, **splitting,
    )  # fmt: skip
    for index, length in enumerate(LENGTHS):
        mask = visible_pairs(seqlen_q, length, left, right)
        has_key = mask.any(dim=1)
        theirs = torch.nn.functional.scaled_dot_product_attention(
            *(x.double().transpose(0, 1) for x in (q[index], k[index], v[index])),
            attn_mask=mask, scale=0.25, enable_gqa=True,
        ).transpose(0, 1)  # fmt: skip
        torch.testing.assert_close(got.out[index, has_key], theirs[has_key], atol=1e-13, rtol=1e-12)
        scores = scores_of(q[index, None], k[index][None], 0.25, 0.0)[0].masked_fill(~mask, -math.inf)
        torch.testing.assert_close(got.lse[index], torch.logsumexp(scores, dim=-1), atol=1e-13, rtol=1e-12)
        assert (got.out[index, ~has_key] == 0).all() and (got.lse[index, :, ~has_key] == -math.inf).all()
    assert not (got.skip_map == reference.SKIPPED).any()


def keys_of_tile(tile_n, length, tile):
    return range(tile * tile_n, min((tile + 1) * tile_n, length))


def highest_score(scores, sees, i, head, keys):
    """Of one query of a head, over the keys of these that it sees."""
    return max((scores[head][i][j] for j in keys if sees[i][j]), default=-math.inf)


def brute_force_decode(q, k, v, scale, left, right, softcap, lam, geometry, cuts_of):
    """The rule, one row and one score at a time; (out, lse, skip maps), lists over sequences.

    cuts_of(sequence, KV head, row block): the positions at which its splits begin, and the end.
    """
    outs, lses, maps = [], [], []
    for b, length in enumerate(LENGTHS):
        seqlen_q, heads_q, _ = q[b].shape
        group = heads_q // k[b].shape[1]
        scores = scores_of(q[b][None], k[b][None], scale, softcap)[0]  # (heads_q, seqlen_q, length)
        visible = visible_pairs(seqlen_q, length, left, right)
        sees = visible.tolist()
        highest_of = partial(highest_score, scores.tolist(), sees)
        keys_of = partial(keys_of_tile, geometry.tile_n, length)
        seen = visible.any(dim=0).nonzero().flatten().tolist()
        tiles = list(range(seen[-1] // geometry.tile_n, seen[0] // geometry.tile_n - 1, -1)) if seen else []
        if tiles:
            tiles.insert(1, tiles.pop())  # the first tile comes second
        kept_keys = torch.zeros(heads_q, seqlen_q, length, dtype=torch.bool)
        rows = [(i, g) for i in range(seqlen_q) for g in range(group)]
        blocks = [rows[start : start + geometry.tile_rows] for start in range(0, len(rows), geometry.tile_rows)]
        skip_map = torch.zeros(k[b].shape[1], len(blocks), -(-64 // geometry.tile_n), dtype=torch.uint8)
        for head in range(k[b].shape[1]):
            for block, members in enumerate(blocks):
                cuts = cuts_of(b, head, block) if tiles else []
                running = {}
                for position, tile in enumerate(tiles):
                    keys = keys_of(tile)
                    if position in cuts:
                        # with the maxima of the item's first two tiles, as far as they are other splits'
                        seeds = [keys_of(tile) for tile in tiles[: min(position, 2)]]
                        running = {
                            (i, g): max((highest_of(i, head * group + g, keys) for keys in seeds), default=-math.inf)
                            for i, g in members
                        }
                    votes = {}
                    for i, g in members:
                        h = head * group + g
                        highest = highest_of(i, h, keys)
                        below = highest - running[i, g] < math.log(lam[b][h]) if running[i, g] > -math.inf else False
                        votes[i, g] = highest, highest == -math.inf or below
                    skip = position > 0 and all(vote for _, vote in votes.values())
                    skip_map[head, block, tile] = 2 if skip else 1
                    for i, g in [] if skip else members:
                        running[i, g] = max(running[i, g], votes[i, g][0])
                        for j in keys:
                            kept_keys[head * group + g, i, j] = sees[i][j]
        kept_scores = scores.masked_fill(~kept_keys, -math.inf)
        lse = torch.logsumexp(kept_scores, dim=-1)
        weights = torch.exp(kept_scores - torch.where(lse == -math.inf, 0.0, lse)[..., None])
        outs.append(torch.einsum("hqk,khd->qhd", weights, v[b].double().repeat_interleave(group, dim=1)))
        lses.append(lse)
        maps.append(skip_map)
    return torch.stack(outs), torch.stack(lses), torch.stack(maps)


@pytest.mark.parametrize("splitting", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("band", DECODE_BANDS.values(), ids=DECODE_BANDS)
def test_decode_decisions_and_output_equal_the_loop_over_single_scores(band, splitting):
    seqlen_q, left, right = band
    q, k_cache, v_cache, table, k, v = make_decode(seqlen_q, page_size=16, seed=1)
    lam = torch.linspace(0.05, 1.0, len(LENGTHS) * 6).reshape(-1, 6)
    got = reference.decode(
        q, k_cache, v_cache, seqused_k=LENGTHS, page_table=table, softmax_scale=0.25, window_left=left,
        window_right=right, softcap=5.0, threshold=lam, geometry=DECODE_SMALL, **splitting,
    )  # fmt: skip
    row_blocks = got.skip_map.shape[2]
    visited = [max(int((got.skip_map[b, 0, 0] > 0).sum()), 1) for b in range(len(LENGTHS))]
    positions = [count for count in visited for _ in range(2 * row_blocks)]
    plan = dict(num_splits=0, ctas=1, min_tiles=1) | splitting
    cuts = splits.item_cuts(positions, **plan)
    out, lse, skip_map = brute_force_decode(
        q, k, v, 0.25, left, right, 5.0, lam.tolist(), DECODE_SMALL,
        lambda b, head, block: cuts[(b * 2 + head) * row_blocks + block],
    )  # fmt: skip
    assert torch.equal(got.skip_map, skip_map)
    torch.testing.assert_close(got.out, out, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(got.lse, lse, atol=1e-12, rtol=1e-12)
    assert torch.equal(got.tile_counts[0], (skip_map == 1).sum((2, 3)).int())
    assert torch.equal(got.tile_counts[1], (skip_map > 0).sum((2, 3)).int())
    if left is None:
        assert (skip_map == reference.SKIPPED).any()
    replayed = reference.decode(
        q, k_cache, v_cache, seqused_k=LENGTHS, page_table=table, softmax_scale=0.25, window_left=left,
        window_right=right, softcap=5.0, threshold=lam, geometry=DECODE_SMALL, skip_map=skip_map, **splitting,
    )  # fmt: skip
    assert torch.equal(replayed.out, got.out)
    decided = ~replayed.margin.isnan()
    assert torch.equal(decided, skip_map > 0) and torch.equal((replayed.margin < 0)[decided], (skip_map == 2)[decided])


def test_splits_that_share_their_maxima_skip_more_and_within_the_bound():
    q, k_cache, v_cache, table, _, _ = make_decode(2, page_size=16)
    options = dict(
        seqused_k=LENGTHS, page_table=table, softmax_scale=0.25, window_right=0, threshold=torch.tensor(0.5),
        geometry=TileGeometry(tile_m=8, tile_rows=8, tile_n=4), num_splits=4,
    )  # fmt: skip
    alone = reference.decode(q, k_cache, v_cache, **options)
    shared = reference.decode(q, k_cache, v_cache, **options, share_max=True)
    skipped_alone, skipped = alone.skip_map == reference.SKIPPED, shared.skip_map == reference.SKIPPED
    assert skipped_alone.sum() < skipped.sum()
    assert (shared.least_margin[skipped] < 0).all()
    kept = shared.skip_map == reference.KEPT
    assert (shared.margin[kept] >= 0).all()
    assert (skipped & (shared.margin >= 0)).any(), "a split that was told of a maximum skips what it could not alone"


def test_decode_reads_no_key_that_no_query_sees():
    """Neither behind the length, nor before the window, nor in a tile that is skipped: NaN there goes nowhere."""
    q, k_cache, v_cache, table, _, _ = make_decode(2, page_size=16)
    options = dict(
        seqused_k=LENGTHS, page_table=table, softmax_scale=0.25, window_left=30, window_right=0,
        threshold=torch.tensor(0.3), geometry=DECODE_SMALL,
    )  # fmt: skip
    before = reference.decode(q, k_cache, v_cache, **options)
    index, (head, _, tile) = 4, (before.skip_map[4] == reference.SKIPPED).nonzero()[0].tolist()
    first_key = LENGTHS[index] - 2 - 30
    for key in [*range(first_key), *range(tile * 8, tile * 8 + 8)]:
        v_cache[table[index, key // 16], key % 16, head] = math.nan
    table[index, 0] = 10**6  # keys 0 to 15 are left of the window
    assert first_key >= 16 and torch.equal(reference.decode(q, k_cache, v_cache, **options).out, before.out)


def test_a_sink_is_a_key_of_its_logit_and_of_value_zero():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 12, 3, 8, generator=generator, dtype=torch.float64) for _ in "qkv")
    sink = torch.tensor([-3.0, 0.5, 6.0], dtype=torch.float64)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.4
    scores = scores.masked_fill(torch.ones(12, 12).triu(-3).bool(), -math.inf)  # the first rows see no key
    scores = torch.cat([scores, sink[None, :, None, None].expand(1, 3, 12, 1)], dim=-1)
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1)[..., :-1], v)
    got = reference.attention(q, k, v, softmax_scale=0.4, window_right=-4, sink=sink)
    torch.testing.assert_close(got.out, expected)
    torch.testing.assert_close(got.lse, scores.logsumexp(-1))
    lengths = [9]
    masked = scores.clone()[:, :, -2:]
    masked[..., :-1] = (torch.einsum("bqhd,bkhd->bhqk", q[:, -2:], k) * 0.4)
    masked[..., 9:-1] = -math.inf
    step = reference.decode(q[:, -2:], k, v, seqused_k=lengths, softmax_scale=0.4, sink=sink)
    torch.testing.assert_close(step.out, torch.einsum("bhqk,bkhd->bqhd", masked.softmax(-1)[..., :-1], v))
    torch.testing.assert_close(step.lse, masked.logsumexp(-1))
