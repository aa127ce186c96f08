"""The oracle against PyTorch's dense attention in float64, and its decisions against a loop over single scores."""

from __future__ import annotations

import math

import pytest
import torch

from cute_sparse import reference
from cute_sparse.problem import TileGeometry

SMALL = TileGeometry(tile_m=32, tile_rows=16, tile_n=24)
GEOMETRIES = [
    SMALL,
    TileGeometry(tile_m=32, tile_rows=16, tile_n=24, order="ascending"),
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
    order = list(range(tiles)) if geometry.order == "ascending" else list(range(tiles))[::-1]
    for b in range(batch):
        for h in range(heads):
            for block in range(0, seqlen_q, geometry.tile_m):
                block_rows = range(block, min(block + geometry.tile_m, seqlen_q))
                keys_of = {t: range(t * geometry.tile_n, min((t + 1) * geometry.tile_n, seqlen_k)) for t in order}
                visited = [t for t in order if any(visible[i][j] for i in block_rows for j in keys_of[t])]
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


def test_varlen_equals_each_sequence_alone():
    lengths_q, lengths_k = [5, 0, 33, 16], [40, 7, 0, 60]
    cu_q, cu_k = [0, 5, 5, 38, 54], [0, 40, 47, 47, 107]
    q, k, v = (x[0] for x in make(54, 107, batch=1))
    lam = torch.rand(4, 4, generator=torch.Generator().manual_seed(1)) * 0.9 + 0.1
    got = reference.attention_varlen(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=40, max_seqlen_k=64,
        softmax_scale=0.25, window_right=0, threshold=lam, geometry=SMALL,
    )  # fmt: skip
    assert got.skip_map.shape == (4, 4, 3, 3) and got.lse.shape == (4, 54)
    for index, (length_q, length_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        queries, keys = slice(cu_q[index], cu_q[index + 1]), slice(cu_k[index], cu_k[index + 1])
        alone = reference.attention(
            q[None, queries], k[None, keys], v[None, keys],
            softmax_scale=0.25, window_right=0, threshold=lam[index : index + 1], geometry=SMALL,
        )  # fmt: skip
        assert torch.equal(got.out[queries], alone.out[0]) and torch.equal(got.lse[:, queries], alone.lse[0])
        assert torch.equal(got.tile_counts[:, index], alone.tile_counts[:, 0])
        groups, tiles = -(-length_q // 16), -(-length_k // 24)
        assert torch.equal(got.skip_map[index, :, :groups, :tiles], alone.skip_map[0])
        assert got.skip_map[index].sum() == alone.skip_map.sum()
