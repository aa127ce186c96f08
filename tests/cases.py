"""The named corner cases of attention, and inputs structured enough that some tiles are skipped and some kept.

Sizes straddle the kernels' tiles (64, 128, 192 rows; 80 to 176 keys) and stay small: the emulator runs them too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """One call. lengths_q and lengths_k hold one entry per sequence; packed calls attention_varlen.

    threshold   None, a number, or a shape: "batch", "heads", "batch x heads"
    mixed       some tiles that could be skipped must be, and some must not; checked, so that no test of skipping
                is empty
    spread      scale of the scores: how far apart they lie
    """

    lengths_q: tuple[int, ...] = (256,)
    lengths_k: tuple[int, ...] = (256,)
    heads_q: int = 2
    heads_kv: int = 1
    head_dim: int = 128
    head_dim_v: int = 128
    dtype: torch.dtype = torch.bfloat16
    packed: bool = False
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    softcap: float = 0.0
    softmax_scale: float | None = None
    sink: bool = False
    threshold: float | str | None = None
    mixed: bool = False
    spread: float = 1.0

    @property
    def batch(self) -> int:
        return len(self.lengths_q)

    @property
    def scale(self) -> float:
        return self.softmax_scale or 1.0 / math.sqrt(self.head_dim)


PEAK = 14.0

LONG = dict(lengths_q=(512,), lengths_k=(512,))
SKIPPING = dict(**LONG, threshold=0.01, mixed=True)

CASES = {
    "full": Case(),
    "causal": Case(causal=True),
    "window": Case(**LONG, window=(100, 30)),
    "sliding window": Case(**LONG, window=(127, 0)),
    "window of the query's own key": Case(lengths_q=(130,), lengths_k=(130,), window=(0, 0)),
    "window to the right only": Case(window=(0, None)),
    "softcap": Case(softcap=20.0, spread=3.0),
    "sink": Case(sink=True, heads_q=4, causal=True),
    "float16": Case(dtype=torch.float16, causal=True),
    "a given softmax scale": Case(softmax_scale=0.5),
    "many heads": Case(lengths_q=(64,), lengths_k=(96,), heads_q=12, heads_kv=4, head_dim=64, head_dim_v=64),
    "one key head for each query head": Case(heads_q=3, heads_kv=3, head_dim=64, head_dim_v=64),
    "several sequences": Case(lengths_q=(200,) * 3, lengths_k=(150,) * 3, causal=True),
    # head dims: every padding, and the pair of different ones
    "head dim 8": Case(head_dim=8, head_dim_v=8),
    "head dim 32": Case(head_dim=32, head_dim_v=32, threshold=0.05),
    "head dim 40": Case(head_dim=40, head_dim_v=40, causal=True),
    "head dim 64": Case(head_dim=64, head_dim_v=64, causal=True),
    "head dim 72": Case(head_dim=72, head_dim_v=72),
    "head dim 96": Case(head_dim=96, head_dim_v=96, causal=True),
    "head dim 192 and 128": Case(head_dim=192, head_dim_v=128, causal=True),
    "head dim 192": Case(head_dim=192, head_dim_v=192),
    "head dim 256": Case(head_dim=256, head_dim_v=256, causal=True),
    "head dim 248": Case(head_dim=248, head_dim_v=248),
    # lengths
    "one query": Case(lengths_q=(1,), lengths_k=(300,), causal=True),
    "one key": Case(lengths_q=(300,), lengths_k=(1,)),
    "one query, one key": Case(lengths_q=(1,), lengths_k=(1,), causal=True),
    "one more than the tiles": Case(lengths_q=(257,), lengths_k=(257,), causal=True),
    "one less than the tiles": Case(lengths_q=(255,), lengths_k=(255,), causal=True),
    "more keys than queries, causal": Case(lengths_q=(100,), lengths_k=(333,), causal=True),
    "rows without a key": Case(lengths_q=(333,), lengths_k=(100,), causal=True),
    "rows without a key, window": Case(lengths_q=(400,), lengths_k=(200,), window=(30, 0)),
    "no key": Case(lengths_q=(70,), lengths_k=(0,)),
    "no query": Case(lengths_q=(0,), lengths_k=(70,)),
    "no sequence": Case(lengths_q=(), lengths_k=()),
    # packed
    "packed": Case(lengths_q=(100, 37, 200), lengths_k=(100, 37, 200), packed=True, causal=True),
    "packed, empty sequences": Case(lengths_q=(0, 130, 0, 64), lengths_k=(90, 130, 0, 0), packed=True),
    "packed, other lengths of keys": Case(lengths_q=(5, 190, 1), lengths_k=(300, 20, 129), packed=True, causal=True),
    "packed, no sequence": Case(lengths_q=(), lengths_k=(), packed=True),
    "packed, window": Case(lengths_q=(150, 300), lengths_k=(200, 300), packed=True, window=(64, 16)),
    # skipping
    "skip": Case(**SKIPPING),
    "skip, causal": Case(**SKIPPING, causal=True),
    "skip, float16": Case(**SKIPPING, causal=True, dtype=torch.float16),
    "skip, head dim 64": Case(**SKIPPING, head_dim=64, head_dim_v=64),
    "skip, head dim 192 and 128": Case(**SKIPPING, head_dim=192, head_dim_v=128, causal=True),
    "skip, head dim 256": Case(**SKIPPING, head_dim=256, head_dim_v=256, causal=True),
    "skip, ragged": Case(lengths_q=(389,), lengths_k=(453,), threshold=0.01, mixed=True, causal=True),
    "skip, one query": Case(lengths_q=(1,), lengths_k=(700,), threshold=0.01),
    "skip, rows without a key": Case(lengths_q=(450,), lengths_k=(260,), threshold=0.01, causal=True),
    "skip, window": Case(**LONG, threshold=0.01, window=(300, 40)),
    "skip, softcap": Case(**SKIPPING, softcap=30.0),
    "skip, sink": Case(**SKIPPING, sink=True),
    "sink, packed, rows without a key": Case(
        lengths_q=(150, 40, 0), lengths_k=(30, 0, 9), packed=True, causal=True, sink=True
    ),
    "skip, packed": Case(
        lengths_q=(300, 0, 65, 400), lengths_k=(300, 40, 0, 512), packed=True, causal=True, threshold=0.01, mixed=True
    ),
    "skip, lambda 1": Case(**LONG, threshold=1.0, mixed=True, causal=True),
    "skip, lambda so small that nothing is": Case(**LONG, threshold=1e-30, causal=True),
    "skip, lambda per sequence": Case(lengths_q=(300, 300), lengths_k=(400, 400), heads_q=4, threshold="batch"),
    "skip, lambda per head": Case(lengths_q=(300, 300), lengths_k=(400, 400), heads_q=4, threshold="heads"),
    "skip, lambda per sequence and head": Case(
        lengths_q=(300, 300), lengths_k=(400, 400), heads_q=4, threshold="batch x heads", causal=True
    ),
    "skip, packed, lambda per sequence": Case(
        lengths_q=(300, 129, 200), lengths_k=(512, 129, 340), packed=True, causal=True, threshold="batch"
    ),
}


@dataclass(frozen=True)
class Inputs:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    threshold: float | torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    learnable_sink: torch.Tensor | None = None


def make_inputs(case: Case, seed: int = 0, device: str | torch.device = "cpu") -> Inputs:
    """Tensors of the case: (batch, seqlen, heads, head_dim), or packed (total, heads, head_dim)."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = [], [], []
    for length_q, length_k in zip(case.lengths_q, case.lengths_k, strict=True):
        positions = torch.arange(length_q) + (length_k - length_q)
        q.append(_tokens(positions, case.heads_q, case, generator, case.spread))
        k.append(_tokens(torch.arange(length_k), case.heads_kv, case, generator, 1.0))
        v.append(torch.randn(length_k, case.heads_kv, case.head_dim_v, generator=generator))
    join = torch.cat if case.packed else torch.stack
    tensors = []
    for parts, heads, head_dim in (
        (q, case.heads_q, case.head_dim), (k, case.heads_kv, case.head_dim), (v, case.heads_kv, case.head_dim_v)
    ):  # fmt: skip
        empty = torch.zeros((0, heads, head_dim) if case.packed else (0, 64, heads, head_dim))
        joined = join(parts) if parts else empty
        tensors.append(joined.to(case.dtype).to(device))
    cu_seqlens = [
        torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device) if case.packed else None
        for lengths in (case.lengths_q, case.lengths_k)
    ]
    return Inputs(*tensors, _threshold(case, generator, device), *cu_seqlens, sinks(case, device))


def sinks(case, device) -> torch.Tensor | None:
    """From far below the largest scores to far above them: one head's share of the softmax is 0, another's all."""
    return torch.linspace(-40.0, 1.6 * PEAK, case.heads_q).to(device) if case.sink else None


def _tokens(positions: torch.Tensor, heads: int, case: Case, generator: torch.Generator, scale: float) -> torch.Tensor:
    """Rotary positions and noise: scores are largest near the diagonal and fall off, more steeply in later heads."""
    pairs = case.head_dim // 2
    frequency = 0.25 ** (torch.arange(pairs) * 6.0 / pairs)  # 1 down to 1/4096 radians per position
    angles = positions[:, None] * frequency
    rotary = torch.stack([torch.cos(angles), torch.sin(angles)], dim=-1).flatten(1)[:, None, :]  # (tokens, 1, head_dim)
    weight = torch.linspace(0.6, 1.8, heads)[None, :, None] if heads > 1 else torch.ones(1, 1, 1)
    noise = torch.randn(len(positions), heads, case.head_dim, generator=generator) * 0.5
    # A key at its query's own position scores PEAK * weight, whatever the head dim and the softmax scale.
    size = (PEAK / (pairs * case.scale)) ** 0.5
    return (rotary * weight + noise) * size * scale


def _threshold(case: Case, generator: torch.Generator, device) -> float | torch.Tensor | None:
    shapes = {"batch": (case.batch,), "heads": (case.heads_q,), "batch x heads": (case.batch, case.heads_q)}
    if not isinstance(case.threshold, str):
        return case.threshold
    return torch.logspace(-3, 0, math.prod(shapes[case.threshold])).reshape(shapes[case.threshold]).to(device)
