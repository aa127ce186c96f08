"""The public functions: `attention`, `attention_varlen` and `decode`."""

from __future__ import annotations

import torch

from cute_sparse import calls, operators
from cute_sparse.calls import AttentionOutput


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
    learnable_sink: torch.Tensor | None = None,
    threshold: float | torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
) -> torch.Tensor | AttentionOutput:
    """softmax(softmax_scale * q k^T) v, without the KV tiles whose weight the threshold proves negligible.

    q          (batch, seqlen_q, heads_q, head_dim), bfloat16 or float16
    k, v       (batch, seqlen_k, heads_kv, head_dim) and (.., head_dim_v); heads_kv divides heads_q (GQA, MQA).
               Head dims are multiples of 8 up to 256. Any strides that are multiples of 16 bytes, the last 1.
    softmax_scale  a positive number, at most 1e8; None: 1 / sqrt(head_dim)
    causal     key j is visible to query i where j <= i + seqlen_k - seqlen_q (aligned bottom-right)
    window_size  (left, right) keys around that diagonal, None or -1 unbounded; causal sets right to 0
    softcap    scores become softcap * tanh(score / softcap); at most 1e4; 0: not
    learnable_sink  fp32 (heads_q,): a logit of each head that takes its share of the softmax and has no value; it is
               part of lse, and not of the running maximum that a threshold compares with. None: there is none
    threshold  lambda in (0, 1]: a tile of keys is skipped where, for every query row of a group, its largest score
               lies more than -ln(lambda) below the row's running maximum (BLASST, arXiv 2512.12087). None: dense. A
               number, or an fp32 tensor (batch,), (heads_q,), (batch, heads_q), (batch, 1) or (1, heads_q); see
               `threshold_from_scale_factor` and `threshold_from_model`. A tensor may be updated between CUDA-graph
               replays; on a GPU its values are not checked: above 1 counts as 1, NaN or not positive skips nothing.
    out        memory for the result, (batch, seqlen_q, heads_q, head_dim_v), not overlapping q, k, v
    return_lse, return_stats  return an `AttentionOutput` with the log-sum-exp, or with counts and the skip map

    A row that sees no key gives 0, and lse -inf or its head's sink. NaN and infinities propagate as in PyTorch's
    attention.
    CUDA tensors run on Hopper (9.0) and Blackwell (10.0, 10.3); CPU tensors run the reference, or the kernels in the
    emulator within `cute_sparse.emulated`.

    Raises TypeError or ValueError for malformed input, NotImplementedError for what is not supported, with what is,
    and RuntimeError for a device that no kernel runs on.
    """
    options = dict(
        softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
        learnable_sink=learnable_sink, threshold=threshold, out=out, return_lse=return_lse, return_stats=return_stats,
    )  # fmt: skip
    if operators.are_asked_for(q, k, v):
        return operators.traced("attention", q, k, v, options)
    return calls.attention(q, k, v, options)


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
    learnable_sink: torch.Tensor | None = None,
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
        softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
        learnable_sink=learnable_sink, threshold=threshold, out=out, return_lse=return_lse,
        return_stats=return_stats, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
    )  # fmt: skip
    if operators.are_asked_for(q, k, v):
        return operators.traced("attention_varlen", q, k, v, options)
    return calls.attention_varlen(q, k, v, options)


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
    learnable_sink: torch.Tensor | None = None,
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
               maximum of its own, which begins with those of the sequence's last and first tile. Each part's result is
               kept in fp32 until all are there: a number of parts for which that takes more than 4 GiB is a ValueError
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
        window_size=window_size, softcap=softcap, learnable_sink=learnable_sink, threshold=threshold,
        num_splits=num_splits, share_max=share_max, out=out, return_lse=return_lse, return_stats=return_stats,
    )  # fmt: skip
    if operators.are_asked_for(q, k_cache, v_cache):
        return operators.traced("decode", q, k_cache, v_cache, options)
    return calls.decode(q, k_cache, v_cache, options)
