"""What the user asked for: `Problem`, frozen and hashable.

`Problem` says *what* is computed, a kernel's `Config` says *how*; together with the architecture they
are the whole compile key, so nothing that changes the generated code can be left out of it. Lengths,
strides, head counts and the window's width are run-time values and never part of the key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["prefill", "decode"]
Dtype = Literal["bfloat16", "float16"]
Mask = Literal["full", "causal", "band"]
Sparsity = Literal["threshold"] | None

HEAD_DIM_MULTIPLE = 8  # 16 bytes of a 16-bit type: the unit of a TMA row
HEAD_DIM_MAX = 256


@dataclass(frozen=True)
class Problem:
    """One kind of attention problem, independent of its sizes.

    kind        "prefill": many query rows per sequence; "decode": a few, bound by the bytes of K and V
    dtype       element type of Q, K, V and the output
    head_dim    of Q and K, a multiple of 8 up to 256
    head_dim_v  of V and the output, a multiple of 8 up to 256
    mask        "full"; "causal": kv_idx <= q_idx + seqlen_k - seqlen_q (bottom-right);
                "band": -left <= kv_idx - (q_idx + seqlen_k - seqlen_q) <= right, both run-time values
    varlen      sequences packed along one token axis, delimited by cu_seqlens
    softcap     scores pass through cap * tanh(score / cap); cap is a run-time value
    sparsity    None: the dense kernel, no skip code in it; "threshold": the running-max skip
    return_lse  write the log-sum-exp
    return_stats  count kept and visited tiles and write the skip map
    """

    kind: Kind
    dtype: Dtype
    head_dim: int
    head_dim_v: int
    mask: Mask = "full"
    varlen: bool = False
    softcap: bool = False
    sparsity: Sparsity = None
    return_lse: bool = False
    return_stats: bool = False

    def __post_init__(self) -> None:
        for name in ("head_dim", "head_dim_v"):
            value = getattr(self, name)
            if value % HEAD_DIM_MULTIPLE or not 0 < value <= HEAD_DIM_MAX:
                raise ValueError(f"{name}={value} must be a multiple of {HEAD_DIM_MULTIPLE} up to {HEAD_DIM_MAX}")
