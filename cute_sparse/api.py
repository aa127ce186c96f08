"""The public functions: `attention`, `attention_varlen` and `decode`.

Each call is an NVTX range of its name in the domain "cute_sparse", for Nsight Systems. Without a tool that listens,
nvtx leaves the functions as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import nvtx
import torch

from cute_sparse import dispatch, operators
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


class AttentionOutput(NamedTuple):
    """What attention returns where more than the output was asked for; what was not asked for is None.

    out    like q, with v's head dim
    lse    fp32 (batch, heads_q, seqlen_q), or (heads_q, total_q): natural log of the sum of the kept exponentials
    stats  `Stats`, or of a decode call `DecodeStats`
    """

    out: torch.Tensor
    lse: torch.Tensor | None
    stats: Stats | DecodeStats | None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
    threshold: float | torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
) -> torch.Tensor | AttentionOutput:
    """softmax(softmax_scale * q k^T) v, without the KV tiles whose weight the threshold proves negligible.

    q          (batch, seqlen_q, heads_q, head_dim), bfloat16 or float16
    k, v       (batch, seqlen_k, heads_kv, head_dim) and (.., head_dim_v); heads_kv divides heads_q (GQA, MQA).
               Head dims are multiples of 8 up to 256. Any strides that are multiples of 16 bytes, the last 1.
    softmax_scale  None: 1 / sqrt(head_dim)
    causal     key j is visible to query i where j <= i + seqlen_k - seqlen_q (aligned bottom-right)
    window_size  (left, right) keys around that diagonal, None or -1 unbounded; causal sets right to 0
    softcap    scores become softcap * tanh(score / softcap); 0: not
    threshold  lambda in (0, 1]: a tile of keys is skipped where, for every query row of a group, its largest score
               lies more than -ln(lambda) below the row's running maximum (BLASST, arXiv 2512.12087). None: dense. A
               number, or an fp32 tensor (batch,), (heads_q,), (batch, heads_q), (batch, 1) or (1, heads_q); see
               `threshold_from_scale_factor` and `threshold_from_model`. A tensor may be updated between CUDA-graph
               replays; on a GPU its values are not checked: above 1 counts as 1, NaN or not positive skips nothing.
    out        memory for the result, (batch, seqlen_q, heads_q, head_dim_v), not overlapping q, k, v
    return_lse, return_stats  return an `AttentionOutput` with the log-sum-exp, or with counts and the skip map

    A row that sees no key gives 0 and lse -inf. NaN and infinities propagate as in PyTorch's attention.
    CUDA tensors run on Hopper (9.0) and Blackwell (10.0, 10.3); CPU tensors run the reference, or the kernels in the
    emulator within `cute_sparse.emulated`.

    Raises TypeError or ValueError for malformed input, NotImplementedError for what is not supported, with what is,
    and RuntimeError for a device that no kernel runs on.
    """
    options = dict(
        softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap, threshold=threshold,
        out=out, return_lse=return_lse, return_stats=return_stats,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        return operators.traced("attention", q, k, v, options)
    return _attention(q, k, v, options)


@nvtx.annotate("attention", domain="cute_sparse")
def _attention(q, k, v, options: dict) -> torch.Tensor | AttentionOutput:
    plan = dispatch.plan_attention(q, k, v, options)
    return _answer(plan.run(q, k, v, options["out"], options["threshold"], None, None), plan.geometry, options)


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
    threshold: float | torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
) -> torch.Tensor | AttentionOutput:
    """`attention` over sequences of different lengths, packed along one token axis.

    q, k, v        (total_q, heads_q, head_dim), (total_k, heads_kv, head_dim), (total_k, heads_kv, head_dim_v)
    cu_seqlens_q, cu_seqlens_k  int32 (batch + 1,): sequence i is the tokens [cu_seqlens[i], cu_seqlens[i + 1]); from 0,
                   never decreasing, at most the total. On a GPU the values are not checked.
    max_seqlen_q, max_seqlen_k  at least the longest sequence's lengths
    The other arguments are `attention`'s. Rows of `out` and `lse` after the last sequence are undefined.
    """
    if cu_seqlens_q is None or cu_seqlens_k is None:
        raise TypeError("attention_varlen needs cu_seqlens_q and cu_seqlens_k; attention takes unpacked tensors")
    options = dict(
        softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap, threshold=threshold,
        out=out, return_lse=return_lse, return_stats=return_stats, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        return operators.traced("attention_varlen", q, k, v, options)
    return _attention_varlen(q, k, v, options)


@nvtx.annotate("attention_varlen", domain="cute_sparse")
def _attention_varlen(q, k, v, options: dict) -> torch.Tensor | AttentionOutput:
    plan = dispatch.plan_attention(q, k, v, options)
    sequences = options["cu_seqlens_q"], options["cu_seqlens_k"]
    return _answer(plan.run(q, k, v, options["out"], options["threshold"], *sequences), plan.geometry, options)


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


def decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    seqused_k: torch.Tensor,
    page_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
    threshold: float | torch.Tensor | None = None,
    num_splits: int | None = None,
    share_max: bool = False,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
) -> torch.Tensor | AttentionOutput:
    """Attention of a few new queries over cached keys; where a threshold skips a tile, its V is not read.

    q          (batch, seqlen_q, heads_q, head_dim), seqlen_q from 1 to 16, the last tokens of each sequence
    k_cache, v_cache  (batch, capacity, heads_kv, head_dim[_v]), or where there is a page_table, (pages, page_size,
               heads_kv, head_dim[_v]) with pages of 16, 32, 64, 128 or 256 tokens
    seqused_k  int32 (batch,): keys of each sequence, those of q included
    page_table int32 (batch, max pages): where each sequence's tokens lie. Sequences may share pages; entries behind a
               sequence's length, or before its window, are not used and may hold anything.
    causal     query i sees the keys up to i + seqused_k - seqlen_q
    threshold  as for `attention`, one decision for all queries and query heads of a KV head together (in blocks of
               rows, see `DecodeStats`), for each split apart
    num_splits parts into which the tiles of each KV head are cut, to be computed side by side; at most as many as there
               are tiles. None: the tiles of the whole batch are spread evenly over the device. Each part has a running
               maximum of its own, and keeps its first tile.
    share_max  parts tell each other their running maxima, and so skip more. Who hears of what depends on timing:
               results then vary from run to run, within what the threshold allows. Otherwise they do not.
    return_stats  `AttentionOutput.stats` is a `DecodeStats`
    The other arguments are `attention`'s. lse is (batch, heads_q, seqlen_q).

    NaN and infinities propagate as in `attention`. What the caches hold where no query looks does not matter: behind a
    length, before a window, in a page of no sequence.
    Lengths, page table and a threshold tensor may be updated between CUDA-graph replays. On a GPU their values are not
    checked, because that would wait for the device: a length counts as at least 0 and at most the capacity, and a page
    that does not exist reads as zeros. On a CPU they are a ValueError.
    """
    options = dict(
        seqused_k=seqused_k, page_table=page_table, softmax_scale=softmax_scale, causal=causal,
        window_size=window_size, softcap=softcap, threshold=threshold, num_splits=num_splits, share_max=share_max,
        out=out, return_lse=return_lse, return_stats=return_stats,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        return operators.traced("decode", q, k_cache, v_cache, options)
    return _decode(q, k_cache, v_cache, options)


@nvtx.annotate("decode", domain="cute_sparse")
def _decode(q, k_cache, v_cache, options: dict) -> torch.Tensor | AttentionOutput:
    plan = dispatch.plan_decode(q, k_cache, v_cache, options)
    sequences = options["seqused_k"], options["page_table"]
    result = plan.run(q, k_cache, v_cache, options["out"], options["threshold"], *sequences)
    return _answer(result, plan.geometry, options, v_cache)


def _answer(result: dispatch.Result, geometry: TileGeometry, options: dict, v_cache: torch.Tensor | None = None):
    """What the caller gets; v_cache of a decode call."""
    out, lse, tile_counts, skip_map = result
    if not options["return_stats"]:
        return AttentionOutput(out, lse, None) if options["return_lse"] else out
    stats = Stats(tile_counts, skip_map, geometry)
    if v_cache is not None:
        stats = DecodeStats(*stats, geometry.tile_n * v_cache.shape[-1] * v_cache.element_size())
    return AttentionOutput(out, lse, stats)
