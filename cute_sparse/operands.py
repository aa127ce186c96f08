"""The door between dispatch and the kernels: the run-time operands of each kind of kernel, in order.

Both arch rooms compile a host function of exactly these operands (`device/bundles.py` turns them into
CuTe values), and `plans.py` fills them from tensors. Pointers are device addresses, 0 where absent;
strides are in elements, innermost stride is 1 and not passed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OperandType = Literal["pointer", "int32", "int64", "float32"]


@dataclass(frozen=True)
class Operand:
    name: str
    type: OperandType


def _operands(type: OperandType, names: str) -> tuple[Operand, ...]:
    return tuple(Operand(name, type) for name in names.split())


PREFILL = (
    # q (batch, seqlen_q, heads_q, head_dim) or (total_q, heads_q, head_dim); k, v, out likewise;
    # lse fp32 (batch, heads_q, seqlen_q) or (heads_q, total_q), contiguous;
    # threshold fp32 lambda, 0 where the scalar threshold_log2 holds; its values are unchecked on a GPU: above 1
    # counts as 1, NaN or not positive never skips; learnable_sink fp32 (heads_q,); cu_seqlens int32 (batch + 1,);
    # tile_counts int32 (2, batch, heads_q): kept, visited, zeroed by the caller;
    # skip_map uint8 (batch, heads_q, map_rows, map_cols): 0 not visited, 1 kept, 2 skipped; zeroed by the caller;
    # work_counter int32 (2,): the dynamic scheduler's, zero before a launch and left zero by it.
    _operands("pointer", "q k v out lse threshold learnable_sink cu_seqlens_q cu_seqlens_k tile_counts skip_map")
    + _operands("pointer", "work_counter")
    # seqlen_q and seqlen_k are max_seqlen_q and max_seqlen_k for varlen; total_* are the packed token counts,
    # batch * seqlen otherwise. window_left and window_right (mask "band") lie in [0, seqlen_k] and
    # [0, seqlen_q]; those bounds are exact for an unbounded side, and q_idx + seqlen_k + window_right fits int32.
    # map_rows = ceil(seqlen_q / geometry.tile_rows), map_cols = ceil(seqlen_k / geometry.tile_n).
    + _operands("int32", "batch heads_q heads_kv seqlen_q seqlen_k total_q total_k window_left window_right")
    + _operands("int32", "threshold_stride_batch threshold_stride_head map_rows map_cols")
    # *_stride_batch is 0 for varlen
    + _operands("int64", "q_stride_batch q_stride_seq q_stride_head k_stride_batch k_stride_seq k_stride_head")
    + _operands("int64", "v_stride_batch v_stride_seq v_stride_head out_stride_batch out_stride_seq out_stride_head")
    # threshold_log2 = log2(lambda)
    + _operands("float32", "softmax_scale softcap threshold_log2")
)

DECODE = (
    # q (batch, seqlen_q, heads_q, head_dim); out likewise with head_dim_v; k, v (blocks, block tokens, heads_kv,
    # head_dim[_v]), where a block is a sequence's whole cache, or a page; lse fp32 (batch, heads_q, seqlen_q),
    # contiguous; threshold and learnable_sink as in PREFILL; seqused_k int32 (batch,), counted as at most `capacity`;
    # page_table int32 (batch, max pages), 0 where the caches are contiguous;
    # tile_counts int32 (2, batch, heads_kv): kept, visited, zeroed by the caller;
    # skip_map uint8 (batch, heads_kv, map_rows, map_cols) as in PREFILL, zeroed by the caller.
    # An item is a block of packed rows of one KV head of one sequence, (batch, heads_kv, map_rows) in that order.
    # partials fp32: (partial_slots, slot_rows, head_dim_v) accumulators, then (2, partial_slots, slot_rows, 2): the
    # row maximum, in base-2 units, and the row sum; slot_rows = min(seqlen_q * heads_q / heads_kv, tile_rows);
    # arrivals int32 (partial_slots,): results that are there, zero before a launch and left zero by it;
    # shared_max uint32 (items, slot_rows): the largest maximum that a split has published, in an order-preserving
    # code in which 0 means none; zero before a launch and left zero by it.
    _operands("pointer", "q k v out lse threshold learnable_sink seqused_k page_table tile_counts skip_map")
    + _operands("pointer", "partials arrivals shared_max")
    # capacity: keys a sequence can have, the contiguous cache's tokens or max pages * page_size; blocks: pages, or
    # batch; window_* as in PREFILL, with capacity for seqlen_k; map_rows = ceil(seqlen_q * group / tile_rows),
    # map_cols = ceil(capacity / tile_n); num_splits 0: as `splits.stream_k` cuts; ctas: CTAs of the launch
    + _operands("int32", "batch heads_q heads_kv seqlen_q capacity blocks page_table_stride window_left window_right")
    + _operands("int32", "threshold_stride_batch threshold_stride_head map_rows map_cols partial_slots slot_rows")
    + _operands("int32", "num_splits ctas")
    + _operands("int64", "q_stride_batch q_stride_seq q_stride_head k_stride_block k_stride_seq k_stride_head")
    + _operands("int64", "v_stride_block v_stride_seq v_stride_head out_stride_batch out_stride_seq out_stride_head")
    + _operands("float32", "softmax_scale softcap threshold_log2")
)
