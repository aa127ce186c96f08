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
    page_size   tokens per page of a paged KV cache, 0 where each sequence's cache is contiguous; only for decode
    share_max   the splits of a sequence tell each other their running maxima, and skip more; only for decode
    sink        each head has a logit without a value, in the softmax's denominator alone
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
    page_size: int = 0
    share_max: bool = False
    sink: bool = False

    def __post_init__(self) -> None:
        check_head_dims(self.head_dim, self.head_dim_v)
        if self.kind != "decode" and (self.page_size or self.share_max):
            raise ValueError(f"{self.page_size=} and {self.share_max=} are for decode, not for {self.kind}")
        if self.share_max and self.sparsity is None:
            raise ValueError("share_max needs a threshold: the splits share their maxima to skip more")


def check_head_dims(head_dim: int, head_dim_v: int) -> None:
    for name, value in {"head_dim": head_dim, "head_dim_v": head_dim_v}.items():
        if value % HEAD_DIM_MULTIPLE or not 0 < value <= HEAD_DIM_MAX:
            raise ValueError(f"{name}={value} must be a multiple of {HEAD_DIM_MULTIPLE} up to {HEAD_DIM_MAX}")


@dataclass(frozen=True)
class TileGeometry:
    """Which rows decide together, over which KV tiles, in which order: what a kernel and the oracle must share.

    tile_m     query rows whose CTA (or cluster) walks one common range of KV tiles: every KV tile in which
               any of these rows may see a key is visited by all of them
    tile_rows  query rows that must agree before a tile is skipped (a warpgroup's 64 on Hopper, a query
               tile's 128 on Blackwell); divides tile_m. One such group is one row of the skip map
    tile_n     keys per KV tile; tile i covers keys [i * tile_n, (i + 1) * tile_n)
    order      "descending": from the last KV tile of the range to the first. "first_early": the tiles that not all rows
               of the CTA see whole (those from the end of what its first row sees on), from the last down; then the
               range's first tile; then the rest from the last down. The first tile holds the attention sinks, whose
               scores raise the running maxima at once, so that more of the rest is skipped: of 8192 structured keys
               (`workloads.structured_qkv`) at lambda = 1e-3, in tiles of 64 x 128, 83% instead of 69%
    cta_m      query rows of a CTA, a multiple of tile_m: those whose edge "first_early" means; None: tile_m

    The skip rule, for one group of tile_rows and one KV tile. The first tile of the range is kept. Any other
    tile is skipped if every row of the group inside the sequence votes for it. A row votes for the skip if
    its tile maximum is -inf (it sees no key there), or if tile_max - row_max < ln(lambda), strictly, where
    row_max is the true maximum over the row's kept tiles before this one (a row that has seen no key yet
    has row_max = -inf and votes to keep what it sees). Maxima propagate NaN: from its first NaN score on,
    a row votes to keep every tile in which it sees a key.
    A group wholly outside the sequence is neither decided, nor counted, nor in the skip map.

    In decode a group is `tile_rows` packed rows of a KV head (row i * group + g is query i of its g-th query head), and
    all groups of a sequence visit the tiles in which any of its queries may see a key: the last, the first, and then
    from the last but one down. That order is cut into splits (`splits.py`), each with maxima of its own, which begin
    with those of the order's first two tiles (`splits.seeds`).
    """

    tile_m: int
    tile_rows: int
    tile_n: int
    order: Literal["descending", "first_early"] = "descending"
    cta_m: int | None = None

    def __post_init__(self) -> None:
        if self.tile_rows <= 0 or self.tile_n <= 0 or self.tile_m <= 0 or self.tile_m % self.tile_rows:
            raise ValueError(f"{self}: sizes must be positive and tile_m a multiple of tile_rows")
        if self.order not in ("descending", "first_early"):
            raise ValueError(f'order={self.order!r} must be "descending" or "first_early"')
        if self.cta_m is not None and (self.cta_m <= 0 or self.cta_m % self.tile_m):
            raise ValueError(f"{self}: cta_m must be a multiple of tile_m")


def head_dim_feature(head_dim: int, head_dim_v: int) -> str:
    """The feature name of a pair of head dims: "head_dim:128", or "head_dim:192/128" where they differ."""
    return f"head_dim:{head_dim}" if head_dim == head_dim_v else f"head_dim:{head_dim}/{head_dim_v}"


def required(problem: Problem) -> frozenset[str]:
    """The features a kernel must have in its `SUPPORTS` (a frozenset of these names) to compute `problem`.

    dtype:bfloat16 dtype:float16; head_dim:<d> or head_dim:<d>/<dv> (`head_dim_feature`); mask:full
    mask:causal mask:band; varlen; softcap; sink; sparsity:threshold; lse; stats; page_size:<tokens>; share_max. GQA,
    ragged lengths, rows without keys and empty batches are not features: every kernel has them.
    """
    features = {f"dtype:{problem.dtype}", head_dim_feature(problem.head_dim, problem.head_dim_v)}
    features.add(f"mask:{problem.mask}")
    if problem.sparsity is not None:
        features.add(f"sparsity:{problem.sparsity}")
    optional = {"varlen": problem.varlen, "softcap": problem.softcap, "sink": problem.sink}
    optional |= {"lse": problem.return_lse, "stats": problem.return_stats, "share_max": problem.share_max}
    optional |= {f"page_size:{problem.page_size}": problem.page_size != 0}
    return frozenset(features | {name for name, wanted in optional.items() if wanted})


class UnsupportedProblem(NotImplementedError):
    """A kernel was asked for features it does not have; the message names them and what there is instead."""


def check_supported(problem: Problem, supports: frozenset[str], kernel: str) -> None:
    """Raise `UnsupportedProblem` naming each feature of `problem` that is not in `supports`."""
    missing = required(problem) - supports
    if not missing:
        return
    kinds = {name.split(":")[0] for name in missing}
    alternatives = sorted((name for name in supports if name.split(":")[0] in kinds), key=_feature_order)
    raise UnsupportedProblem(
        f"{kernel} {problem.kind} does not support {', '.join(sorted(missing, key=_feature_order))}; "
        f"it supports {', '.join(alternatives) or 'nothing of that kind'}"
    )


def _feature_order(name: str) -> tuple[str, list[int], str]:
    kind, _, value = name.partition(":")
    return kind, [int(number) for number in value.split("/") if number.isdigit()], value
