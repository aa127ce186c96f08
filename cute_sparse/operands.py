"""The door between dispatch and the kernels: the run-time operands of each kind of kernel, in order.

Both arch rooms compile a host function of exactly these operands (`device/bundles.py` turns them into
CuTe values), and `dispatch.py` fills them from tensors. Pointers are device addresses, 0 where absent;
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
    # counts as 1, NaN or not positive never skips; cu_seqlens int32 (batch + 1,);
    # tile_counts int32 (2, batch, heads_q): kept, visited, zeroed by the caller;
    # skip_map uint8 (batch, heads_q, map_rows, map_cols): 0 not visited, 1 kept, 2 skipped; zeroed by the caller;
    # work_counter int32 (2,): the dynamic scheduler's, zero before a launch and left zero by it.
    _operands("pointer", "q k v out lse threshold cu_seqlens_q cu_seqlens_k tile_counts skip_map work_counter")
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
