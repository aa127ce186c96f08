"""What a call does that nothing traces: plan it, run the plan, answer. `api` says what the arguments are.

Each is an NVTX range of its name in the domain "cute_sparse", for Nsight Systems. Without a tool that listens, nvtx
leaves the functions as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import nvtx
import torch

from cute_sparse import dispatch
from cute_sparse.problem import TileGeometry


class Stats(NamedTuple):
    """What a threshold did.

    tile_counts  int32 (2, batch, heads_q): tiles kept, tiles visited (kept or skipped)
    skip_map     uint8 (batch, heads_q, ceil(seqlen_q / geometry.tile_rows), ceil(seqlen_k / geometry.tile_n)):
                 0 not visited (outside the mask), 1 kept, 2 skipped; seqlen is max_seqlen for varlen
    geometry     which rows decide together over which tiles, in which order
    """

    tile_counts: torch.Tensor
    skip_map: torch.Tensor
    geometry: TileGeometry


class DecodeStats(NamedTuple):
    """What a threshold did in a decode call.

    tile_counts  int32 (2, batch, heads_kv): tiles kept, tiles visited (kept or skipped)
    skip_map     uint8 (batch, heads_kv, row blocks, ceil(capacity / geometry.tile_n)): 0 not visited, 1 kept, 2 skipped
    geometry     how many packed rows decide together over which tiles. Row i * group + g of a KV head is query i of the
                 g-th of its query heads; there are ceil(seqlen_q * group / geometry.tile_rows) row blocks
    v_tile_bytes bytes of V in a tile
    """

    tile_counts: torch.Tensor
    skip_map: torch.Tensor
    geometry: TileGeometry
    v_tile_bytes: int

    @property
    def v_bytes_not_read(self) -> torch.Tensor:
        """int64 (batch, heads_kv): of the tiles that were skipped."""
        kept, visited = self.tile_counts.long()
        return (visited - kept) * self.v_tile_bytes


class AttentionOutput(NamedTuple):
    """What attention returns where more than the output was asked for; what was not asked for is None.

    out    like q, with v's head dim
    lse    fp32 (batch, heads_q, seqlen_q), or (heads_q, total_q): natural log of the sum of the kept exponentials,
           a learnable sink's among them
    stats  `Stats`, or of a decode call `DecodeStats`
    """

    out: torch.Tensor
    lse: torch.Tensor | None
    stats: Stats | DecodeStats | None


@nvtx.annotate("attention", domain="cute_sparse")
def attention(q, k, v, options: dict) -> torch.Tensor | AttentionOutput:
    return _answer(dispatch.plan_attention(q, k, v, options), q, k, v, options, None, None)


@nvtx.annotate("attention_varlen", domain="cute_sparse")
def attention_varlen(q, k, v, options: dict) -> torch.Tensor | AttentionOutput:
    sequences = options["cu_seqlens_q"], options["cu_seqlens_k"]
    return _answer(dispatch.plan_attention(q, k, v, options), q, k, v, options, *sequences)


@nvtx.annotate("decode", domain="cute_sparse")
def decode(q, k_cache, v_cache, options: dict) -> torch.Tensor | AttentionOutput:
    sequences = options["seqused_k"], options["page_table"]
    return _answer(dispatch.plan_decode(q, k_cache, v_cache, options), q, k_cache, v_cache, options, *sequences)


def _answer(plan, q, k, v, options: dict, *sequences: torch.Tensor | None) -> torch.Tensor | AttentionOutput:
    """What the caller gets of the plan's run."""
    given = options["out"], options["threshold"], options["learnable_sink"]
    out, lse, tile_counts, skip_map = plan.run(q, k, v, *given, *sequences)
    if not options["return_stats"]:
        return AttentionOutput(out, lse, None) if options["return_lse"] else out
    stats = Stats(tile_counts, skip_map, plan.geometry)
    if "seqused_k" in options:
        stats = DecodeStats(*stats, plan.geometry.tile_n * v.shape[-1] * v.element_size())
    return AttentionOutput(out, lse, stats)
