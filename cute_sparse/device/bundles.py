"""Frozen dataclasses that cross the host/device boundary as one argument, and the views they are made from.

The host function of a kernel takes the operands of `cute_sparse.operands` one by one; `prefill_operands` and
`decode_operands` turn them into CuTe tensors and scalars. What a problem does not have is `None` and compiles away.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from cute_sparse.operands import DECODE, PREFILL
from cute_sparse.problem import Problem

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453

TMA_ALIGN_BYTES = 16  # a global address and every stride of a tensor map, PTX ISA "Tensor-Map"

# A packed tensor is seen through a window of RAGGED_ROWS rows whose end is moved to the end of one sequence,
# so that TMA itself zero-fills what it loads past the end and drops what it stores there. The address is moved
# back by an extra dimension whose step, times RAGGED_ROWS, is 0 modulo 2^64.
RAGGED_ROWS = 1 << 30
RAGGED_EXTENT = (1 << 31) - 1


@dataclass(frozen=True)
class TokenTensor:
    """A tensor of tokens x heads in global memory, or the TMA view of one.

    tensor  (seqlen, head_dim, heads, batch), or packed: (RAGGED_ROWS, head_dim, heads, wrap, tokens)
    packed  the sequences share one token axis
    """

    tensor: Any
    packed: cutlass.Constexpr[bool]

    def sequence(self, head_idx, batch_idx, span: "Span"):
        """One head of one sequence: (seqlen, head_dim); in a packed tensor, rows past its end are out of bounds."""
        if const_expr(not self.packed):
            return self.tensor[None, None, head_idx, batch_idx]
        rows = self.tensor[None, None, head_idx, RAGGED_ROWS, span.first + span.length]
        return cute.domain_offset((RAGGED_ROWS - span.length, 0), rows)

    def viewed_as(self, tensor) -> "TokenTensor":
        """The same tokens through another tensor, such as the coordinate tensor of a TMA atom."""
        return TokenTensor(tensor, self.packed)


class Span(NamedTuple):
    """Where one sequence's tokens lie: `first` token of the packed axis (0 if not packed), `length` in tokens."""

    first: Any
    length: Any


@dataclass(frozen=True)
class Lengths:
    """Sequence lengths: the batch's common ones, or (batch + 1,) offsets into packed tokens."""

    seqlen_q: Any
    seqlen_k: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any

    def span_q(self, batch_idx) -> Span:
        return _span(self.cu_seqlens_q, self.seqlen_q, batch_idx)

    def span_k(self, batch_idx) -> Span:
        return _span(self.cu_seqlens_k, self.seqlen_k, batch_idx)


def _span(cu_seqlens, seqlen, batch_idx) -> Span:
    if const_expr(cu_seqlens is None):
        return Span(Int32(0), seqlen)
    first = cu_seqlens[batch_idx]
    return Span(first, cu_seqlens[batch_idx + 1] - first)


@dataclass(frozen=True)
class Scale:
    """How raw scores q.k become base-2 exponents: exp(score) = 2^(raw * scale_log2).

    With a softcap, tanh comes between: raw = tanh(q.k * tanh_scale) and scale_log2 = softcap * log2(e).
    """

    scale_log2: Any  # > 0
    tanh_scale: Any  # None without softcap


@dataclass(frozen=True)
class Threshold:
    """lambda of the skip rule: a tensor (batch, heads_q), possibly broadcast, or where its address is 0 a scalar."""

    tensor: Any
    scalar_log2: Any


@dataclass(frozen=True)
class Stats:
    """tile_counts int32 (2, batch, heads_q): kept, visited; skip_map uint8 (batch, heads_q, map_rows, map_cols)."""

    tile_counts: Any
    skip_map: Any


@dataclass(frozen=True)
class PrefillOperands:
    """`operands.PREFILL` as CuTe values; built and used on the host side of a kernel."""

    q: TokenTensor
    k: TokenTensor
    v: TokenTensor
    out: TokenTensor
    lse: Any  # (seqlen_q, heads_q, batch), or packed (total_q, heads_q, 1); None
    lengths: Lengths
    heads_q: Any
    heads_kv: Any
    batch: Any
    window_left: Any  # None unless the mask is a band
    window_right: Any
    scale: Scale
    threshold: Any  # None without sparsity
    sink: Any  # (heads_q,) logits; None without
    stats: Any  # None unless wanted
    work_counter: Any  # (2,)


def prefill_operands(problem: Problem, values) -> PrefillOperands:
    """CuTe tensors over the raw `values` of `operands.PREFILL`, in its order.

    Sizes may be 0: the views then have one row that nothing reads, because a tensor map cannot be empty.
    """
    named = dict(zip((operand.name for operand in PREFILL), values, strict=True))

    def tokens(name: str, seqlen, head_dim: int, heads) -> TokenTensor:
        strides = [_aligned(named[f"{name}_stride_{mode}"]) for mode in ("seq", "head", "batch")]
        sizes = [cutlass.max(size, 1) for size in (seqlen, heads, named["batch"])]
        return _token_tensor(named[name], sizes, head_dim, strides, problem.varlen)

    heads_q, heads_kv, batch = named["heads_q"], named["heads_kv"], named["batch"]
    seqlen_q, seqlen_k = named["seqlen_q"], named["seqlen_k"]
    band = problem.mask == "band"
    return PrefillOperands(
        q=tokens("q", seqlen_q, problem.head_dim, heads_q),
        k=tokens("k", seqlen_k, problem.head_dim, heads_kv),
        v=tokens("v", seqlen_k, problem.head_dim_v, heads_kv),
        out=tokens("out", seqlen_q, problem.head_dim_v, heads_q),
        lse=_lse_tensor(problem, named) if problem.return_lse else None,
        lengths=Lengths(
            seqlen_q,
            seqlen_k,
            cute.make_tensor(named["cu_seqlens_q"], (batch + 1,)) if problem.varlen else None,
            cute.make_tensor(named["cu_seqlens_k"], (batch + 1,)) if problem.varlen else None,
        ),
        heads_q=heads_q,
        heads_kv=heads_kv,
        batch=batch,
        window_left=named["window_left"] if band else None,
        window_right=named["window_right"] if band else None,
        scale=_scale(problem, named),
        threshold=_threshold(named) if problem.sparsity == "threshold" else None,
        sink=_sink(problem, named),
        stats=_stats(named) if problem.return_stats else None,
        work_counter=cute.make_tensor(named["work_counter"], (2,)),
    )


def _token_tensor(pointer, sizes, head_dim: int, strides, packed: bool) -> TokenTensor:
    seqlen, heads, batch = sizes
    stride_seq, stride_head, stride_batch = strides
    if not packed:
        layout = cute.make_layout((seqlen, head_dim, heads, batch), stride=(stride_seq, 1, stride_head, stride_batch))
        return TokenTensor(cute.make_tensor(pointer, layout), packed)
    wrap = (1 << 64) // RAGGED_ROWS - stride_seq
    layout = cute.make_layout(
        (RAGGED_ROWS, head_dim, heads, RAGGED_EXTENT, RAGGED_EXTENT),
        stride=(stride_seq, 1, stride_head, _aligned(wrap), stride_seq),
    )
    return TokenTensor(cute.make_tensor(pointer, layout), packed)


def _aligned(stride):
    """Tell the compiler that a stride of 16-bit elements is a multiple of 16 bytes, as TMA demands."""
    return cute.assume(stride, divby=TMA_ALIGN_BYTES // 2)


def _lse_tensor(problem: Problem, named):
    tokens = named["total_q"] if problem.varlen else named["seqlen_q"]
    stride_batch = cutlass.Int64(tokens) * named["heads_q"]
    batch = 1 if problem.varlen else named["batch"]
    layout = cute.make_layout((tokens, named["heads_q"], batch), stride=(1, cutlass.Int64(tokens), stride_batch))
    return cute.make_tensor(named["lse"], layout)


def _scale(problem: Problem, named) -> Scale:
    if problem.softcap:
        return Scale(named["softcap"] * LOG2_E, named["softmax_scale"] / named["softcap"])
    return Scale(named["softmax_scale"] * LOG2_E, None)


def _threshold(named) -> Threshold:
    strides = (named["threshold_stride_batch"], named["threshold_stride_head"])
    layout = cute.make_layout((named["batch"], named["heads_q"]), stride=strides)
    return Threshold(cute.make_tensor(named["threshold"], layout), named["threshold_log2"])


def _sink(problem: Problem, named):
    return cute.make_tensor(named["learnable_sink"], (named["heads_q"],)) if problem.sink else None


def _stats(named) -> Stats:
    batch, heads_q = named["batch"], named["heads_q"]
    rows, cols = named["map_rows"], named["map_cols"]
    count_strides = (batch * heads_q, heads_q, 1)
    tile_counts = cute.make_tensor(named["tile_counts"], cute.make_layout((2, batch, heads_q), stride=count_strides))
    tiles = cutlass.Int64(rows) * cols
    map_layout = cute.make_layout((batch, heads_q, rows, cols), stride=(tiles * heads_q, tiles, cutlass.Int64(cols), 1))
    return Stats(tile_counts, cute.make_tensor(named["skip_map"], map_layout))


def log2_threshold(threshold: Threshold, batch_idx: Int32, head_idx: Int32) -> Float32:
    """log2(lambda) for one head of one sequence.

    A tensor's values are unchecked: lambda above 1 counts as 1; NaN or below 0 gives NaN, which no score is below.
    """
    return log2_loaded(threshold, load_threshold(threshold, batch_idx, head_idx))


@cute.jit
def load_threshold(threshold: Threshold, batch_idx: Int32, head_idx: Int32) -> Float32:
    """What `log2_loaded` needs: until then, nothing waits for the load."""
    value = threshold.scalar_log2
    if threshold.tensor.iterator.toint() != 0:
        value = threshold.tensor[batch_idx, head_idx]
    return value


@cute.jit
def log2_loaded(threshold: Threshold, loaded: Float32) -> Float32:
    """`log2_threshold` of what `load_threshold` gave."""
    value = loaded
    if threshold.tensor.iterator.toint() != 0:
        value = cute.math.log2(value, fastmath=True)
        value = cutlass.select_(value > 0.0, Float32(0.0), value)
    return value


@dataclass(frozen=True)
class Cache:
    """K or V of a decode call, and where a sequence's tokens lie in it.

    tensor      (block tokens, head_dim, heads_kv, blocks), or the TMA view of one; a block is a sequence's whole cache,
                or a page. TMA fills what lies beyond the tensor with zeros, and so also a block of index `blocks`
    page_table  int32 (max pages, batch); None where a sequence's block is its own index
    blocks      how many there are
    """

    tensor: Any
    page_table: Any
    blocks: Any

    def viewed_as(self, tensor) -> "Cache":
        """The same tokens through another tensor, such as the coordinate tensor of a TMA atom."""
        return Cache(tensor, self.page_table, self.blocks)


@dataclass(frozen=True)
class Partials:
    """Partial results of splits, fp32. A slot holds one split's.

    acc      (head_dim_v, slot_rows, partial_slots): not yet divided by the row sum
    rows     (2, slot_rows, partial_slots, 2): each row's maximum, in base-2 units, -inf where it has seen no key; its
             sum; of splits and groups of an even level, and of others
    arrivals (partial_slots,) int32: of a group of results (`combine.Group`), how many are there
    """

    acc: Any
    rows: Any
    arrivals: Any


@dataclass(frozen=True)
class DecodeOperands:
    """`operands.DECODE` as CuTe values; built and used on the host side of a kernel."""

    q: Any  # (seqlen_q, head_dim, heads_q, batch)
    k: Cache
    v: Cache
    out: Any  # (seqlen_q, head_dim_v, heads_q, batch)
    lse: Any  # (seqlen_q, heads_q, batch); None
    seqused_k: Any  # (batch,)
    seqlen_q: Any
    capacity: Any
    heads_q: Any
    heads_kv: Any
    batch: Any
    window_left: Any  # None unless the mask is a band
    window_right: Any
    scale: Scale
    threshold: Any  # None without sparsity
    sink: Any  # (heads_q,) logits; None without
    stats: Any  # None unless wanted; heads are KV heads
    row_blocks: Any
    partials: Partials
    shared_max: Any  # (slot_rows, items) uint32; None unless the splits share their maxima
    num_splits: Any
    ctas: Any


def decode_operands(problem: Problem, values) -> DecodeOperands:
    """CuTe tensors over the raw `values` of `operands.DECODE`, in its order. Sizes of 0 as in `prefill_operands`."""
    named = dict(zip((operand.name for operand in DECODE), values, strict=True))
    heads_q, heads_kv, batch = named["heads_q"], named["heads_kv"], named["batch"]
    seqlen_q, capacity, row_blocks = named["seqlen_q"], named["capacity"], named["map_rows"]
    items = batch * heads_kv * row_blocks
    band = problem.mask == "band"

    def rows(name: str, head_dim: int):
        strides = [_aligned(named[f"{name}_stride_{mode}"]) for mode in ("seq", "head", "batch")]
        return _token_tensor(named[name], (seqlen_q, heads_q, batch), head_dim, strides, packed=False).tensor

    def cache(name: str, head_dim: int) -> Cache:
        strides = [_aligned(named[f"{name}_stride_{mode}"]) for mode in ("seq", "head", "block")]
        tokens = problem.page_size or cutlass.max(capacity, 1)
        sizes = (tokens, heads_kv, cutlass.max(named["blocks"], 1))
        page_table = None
        if problem.page_size:
            layout = cute.make_layout((capacity // problem.page_size, batch), stride=(1, named["page_table_stride"]))
            page_table = cute.make_tensor(named["page_table"], layout)
        tensor = _token_tensor(named[name], sizes, head_dim, strides, packed=False).tensor
        return Cache(tensor, page_table, named["blocks"])

    lse_layout = cute.make_layout((seqlen_q, heads_q, batch), stride=(1, seqlen_q, seqlen_q * heads_q))
    return DecodeOperands(
        q=rows("q", problem.head_dim),
        k=cache("k", problem.head_dim),
        v=cache("v", problem.head_dim_v),
        out=rows("out", problem.head_dim_v),
        lse=cute.make_tensor(named["lse"], lse_layout) if problem.return_lse else None,
        seqused_k=cute.make_tensor(named["seqused_k"], (batch,)),
        seqlen_q=seqlen_q,
        capacity=capacity,
        heads_q=heads_q,
        heads_kv=heads_kv,
        batch=batch,
        window_left=named["window_left"] if band else None,
        window_right=named["window_right"] if band else None,
        scale=_scale(problem, named),
        threshold=_threshold(named) if problem.sparsity == "threshold" else None,
        sink=_sink(problem, named),
        stats=_stats(named | {"heads_q": heads_kv}) if problem.return_stats else None,
        row_blocks=row_blocks,
        partials=_partials(problem, named),
        shared_max=_shared_max(named, items) if problem.share_max else None,
        num_splits=named["num_splits"],
        ctas=named["ctas"],
    )


def _partials(problem: Problem, named) -> Partials:
    slots, slot_rows, head_dim_v = named["partial_slots"], named["slot_rows"], problem.head_dim_v
    acc_layout = cute.make_layout(
        (head_dim_v, slot_rows, slots), stride=(1, head_dim_v, cutlass.Int64(slot_rows) * head_dim_v)
    )
    rows_layout = cute.make_layout((2, slot_rows, slots, 2))
    rows = named["partials"] + cutlass.Int64(slots) * slot_rows * head_dim_v
    return Partials(
        cute.make_tensor(named["partials"], acc_layout),
        cute.make_tensor(rows, rows_layout),
        cute.make_tensor(named["arrivals"], (slots,)),
    )


def _shared_max(named, items):
    return cute.make_tensor(named["shared_max"], cute.make_layout((named["slot_rows"], items)))
