"""Which tiles a launch skips, as real attention would have it: for the model of launches with tiles skipped (model.py).

Skip maps of long contexts are not at hand, so maps are drawn from a `Law`. The tiles at a query's own position are
always kept, and the first tile with the attention sinks. Of the rest, a tile at a distance of d tokens is kept with the
probability 1 - exp(-r * (1 + near_tokens / d)). In "structured" maps
* near tiles are kept more often than far ones, so that long rows skip more than short ones: with the r that skips 75%
  of a causal launch of 64K tokens, one of 4K skips 40% (a fixed threshold in the BLASST paper: 75% and 23%);
* heads differ: their r spread by a factor of e^head_spread (one standard deviation), one for each query head;
* neighbours agree: a tile's fate is drawn once for SHARED_ROWS rows; a group of rows that decides together draws its
  own instead with the probability 1 - agreement.
Along the keys, tiles are kept independently, clustered only near the query. All of it is assumed; what hangs on it is
how often a kept tile comes after a skipped one, how many tiles of V are fetched though one group of a CTA skips them,
and how unequal work tiles are. "random" maps have none of the three, as random tensors do, on which others measured.

A share of skipped tiles is met exactly: each tile has the r from which on it is kept (`critical_rates`), and the share
is a quantile of these. And any map can be made to happen (`tensors`): a dimension of the head for each KV tile, in
which its keys are 1, and the queries of a group have the logit that the tile shall get.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from cute_sparse.problem import TileGeometry
from cute_sparse.reference import tile_walks

SHARED_ROWS = 256
SEED = 0


@dataclass(frozen=True)
class Law:
    near_tokens: int
    head_spread: float
    agreement: float


LAWS = {"structured": Law(4096, 1.0, 0.75), "random": Law(0, 0.0, 0.0)}

# Logits of tiles; other dimensions add noise with a standard deviation of at most 1.
SINK, KEPT, SKIPPED = 4.0, 0.0, -30.0
THRESHOLD = 1e-6  # its logarithm is -14, between that of the kept and that of the skipped

Window = tuple[int | None, int | None]  # keys seen to the left and right of the diagonal; None: all
FEATURES = ("keys", "skips", "skipped", "not fetched", "starts", "fetched starts")


class Unreachable(ValueError):
    """So many tiles cannot be skipped."""


def critical_rates(
    law: Law, geometry: TileGeometry, seqlen_q: int, seqlen_k: int, window: Window, heads: int
) -> torch.Tensor:
    """(heads, groups of rows, KV tiles) fp32: the r from which on a tile is kept; -inf if it always is, inf if it is
    not visited. The queries are the last of the sequence."""
    generator = torch.Generator().manual_seed(SEED)
    visited, always = _visited(geometry, seqlen_q, seqlen_k, window)
    groups, tiles = visited.shape
    rows = torch.arange(groups) * geometry.tile_rows
    distance = rows[:, None] + geometry.tile_rows / 2 + seqlen_k - seqlen_q
    distance = (distance - torch.arange(tiles) * geometry.tile_n - geometry.tile_n / 2).abs()
    weights = 1 + law.near_tokens / distance.clamp(min=geometry.tile_n / 2)
    block = rows // SHARED_ROWS
    found = torch.empty(heads, groups, tiles)
    for head in range(heads):
        scale = math.exp(law.head_spread * torch.randn((), generator=generator).item())
        own = torch.empty(groups, tiles).exponential_(generator=generator)
        shared = torch.empty(int(block[-1]) + 1, tiles).exponential_(generator=generator)[block]
        alone = torch.rand(groups, tiles, generator=generator) >= law.agreement
        found[head] = torch.where(alone, own, shared) / (weights * scale)
    found[:, always] = -math.inf
    found[:, ~visited] = math.inf
    return found


def _visited(geometry: TileGeometry, seqlen_q: int, seqlen_k: int, window: Window) -> tuple[torch.Tensor, torch.Tensor]:
    """(groups, tiles) bool twice: what is visited; of that, what is always kept."""
    left, right = window
    left, right = seqlen_k if left is None else left, seqlen_q if right is None else right
    groups, tiles = -(-seqlen_q // geometry.tile_rows), -(-seqlen_k // geometry.tile_n)
    visited, always = torch.zeros(2, groups, tiles, dtype=torch.bool)
    per_walk = geometry.tile_m // geometry.tile_rows
    for block, walk in enumerate(tile_walks(geometry, seqlen_q, seqlen_k, left, right)):
        order = [tile for part in walk for tile in part]
        of_block = slice(block * per_walk, (block + 1) * per_walk)
        visited[of_block, order] = True
        always[of_block, order[:1]] = True
    first_key = (torch.arange(groups) * geometry.tile_rows + seqlen_k - seqlen_q)[:, None]
    tile = torch.arange(tiles)
    last = torch.div(first_key + geometry.tile_rows - 1, geometry.tile_n, rounding_mode="floor")
    always |= (tile >= torch.div(first_key, geometry.tile_n, rounding_mode="floor")) & (tile <= last)
    always[:, 0] = True
    return visited, always & visited


def kept_tiles(critical: torch.Tensor, skipped: float, *, most: bool = False) -> torch.Tensor:
    """Bool like `critical`: the tiles kept where this share of the visited ones is skipped, or with `most` at most this
    share. Raises Unreachable."""
    visited = (critical < math.inf).sum().item()
    always = (critical == -math.inf).sum().item()
    keep = visited - round(skipped * visited)
    if keep < always and not most:
        raise Unreachable(f"{skipped:.0%} of the tiles cannot be skipped, {1 - always / visited:.0%} at most")
    return critical <= critical.flatten().kthvalue(max(keep, always)).values


def skipped_share(critical: torch.Tensor, kept: torch.Tensor) -> float:
    return 1 - kept.sum().item() / (critical < math.inf).sum().item()


def features(geometry: TileGeometry, critical: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """(heads, work tiles of a head, len(FEATURES)) fp64, what a work tile's time depends on: the keys that its groups
    visit (on average, as all that is of groups); whether they skip any, and how many; keys that none of them keeps,
    whose V need not be fetched; how often a kept tile comes after a skipped one, and a fetched one after another."""
    heads, groups, tiles = critical.shape
    per_cta = (geometry.cta_m or geometry.tile_m) // geometry.tile_rows
    missing = -groups % per_cta
    visited, kept = (
        torch.nn.functional.pad(of_groups, (0, 0, 0, missing)).unflatten(1, (-1, per_cta))
        for of_groups in (critical < math.inf, kept)
    )  # (heads, work tiles, groups of one, tiles)
    fetched, seen = kept.any(2), visited.any(2)
    # Tiles are visited downwards; the first one, if it comes early, between tiles that are kept.
    begin = 1 if geometry.order == "first_early" else 0
    starts = kept[..., begin:-1] & visited[..., begin + 1 :] & ~kept[..., begin + 1 :]
    fetched_starts = fetched[..., begin:-1] & seen[..., begin + 1 :] & ~fetched[..., begin + 1 :]
    skipped = geometry.tile_n * (visited & ~kept).sum(-1, dtype=torch.int32).double().mean(-1)
    found = [
        geometry.tile_n * visited.sum(-1, dtype=torch.int32).double().mean(-1),
        (skipped > 0).double(),
        skipped,
        geometry.tile_n * (seen & ~fetched).sum(-1, dtype=torch.int32).double(),
        starts.sum(-1, dtype=torch.int32).double().mean(-1),
        fetched_starts.sum(-1, dtype=torch.int32).double(),
    ]
    return torch.stack(found, -1)


def tensors(
    geometry: TileGeometry, kept: torch.Tensor, seqlen_q: int, seqlen_k: int, heads_kv: int, head_dims: tuple[int, int]
) -> list[torch.Tensor]:
    """q (1, seqlen_q, heads, head_dim), k and v (1, seqlen_k, heads_kv, head_dim, head_dim_v) in bf16, of which a
    kernel of this geometry keeps `kept` (heads, groups, tiles) with THRESHOLD."""
    head_dim, head_dim_v = head_dims
    heads, _, tiles = kept.shape
    if tiles > head_dim:
        raise ValueError(f"{tiles} KV tiles need as many dimensions, not {head_dim}")
    generator = torch.Generator().manual_seed(SEED)
    q = torch.randn(1, seqlen_q, heads, head_dim, generator=generator)
    k = torch.randn(1, seqlen_k, heads_kv, head_dim, generator=generator)
    v = torch.randn(1, seqlen_k, heads_kv, head_dim_v, generator=generator)
    levels = torch.where(kept, KEPT, SKIPPED)
    levels[..., 0] = torch.where(kept[..., 0], SINK, SKIPPED)
    of_rows = levels.repeat_interleave(geometry.tile_rows, dim=1)[:, :seqlen_q]  # (heads, seqlen_q, tiles)
    q[0, :, :, :tiles] = of_rows.transpose(0, 1) * math.sqrt(head_dim)
    k[0, :, :, :tiles] = torch.nn.functional.one_hot(torch.arange(seqlen_k) // geometry.tile_n, tiles)[:, None, :]
    return [x.to(torch.bfloat16) for x in (q, k, v)]
