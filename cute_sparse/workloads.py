"""Q, K, V whose attention is structured as in trained models, for the demo and the benchmarks.

Real attention is neither uniform nor random: most of a row's weight lies on a few sink tokens at the start
(Xiao et al., arXiv 2309.17453), on a local window (a consequence of rotary positions, Su et al., arXiv 2104.09864),
and sometimes on a single far token that matters. Heads differ in how concentrated they are.
"""

from __future__ import annotations

import torch

SINK_TOKENS = 4
ROTARY_BASE = 10000.0


def structured_qkv(
    batch: int,
    seqlen: int,
    heads_q: int,
    heads_kv: int,
    head_dim: int,
    *,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    sink: float = 14.0,
    local: float = 20.0,
    noise: float = 1.0,
    needle: float = 18.0,
    seed: int = 0,
    seqlen_q: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (batch, seqlen_q, heads_q, head_dim), k and v (batch, seqlen, heads_kv, head_dim or head_dim_v).

    seqlen_q             only the last queries, as decode has them; None: as many as keys
    sink, local, needle  logits (after the 1 / sqrt(head_dim) scale) that a query adds for the first SINK_TOKENS keys,
                         for a key at its own position (falling with distance), and, in the last eighth of the
                         queries, for one planted key. Query heads spread over 0.5 to 1.5 of `local`.
    noise                standard deviation of the rest of the logits
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    rotary = head_dim // 4 * 2  # half of the head carries positions, the other content
    content = head_dim - rotary
    positions = _rotary_features(seqlen, rotary)  # unit vectors whose product falls with distance
    sharpness = torch.linspace(0.5, 1.5, heads_q)[None, None, :, None]
    root = head_dim**0.25  # on both sides: undoes the softmax scale
    seqlen_q = seqlen if seqlen_q is None else seqlen_q
    q_positions = positions[None, seqlen - seqlen_q :, None, :]
    q_position = (q_positions * sharpness * local**0.5).expand(batch, seqlen_q, heads_q, rotary)
    k_position = (positions[None, :, None, :] * local**0.5).expand(batch, seqlen, heads_kv, rotary)
    q_content = normal(batch, seqlen_q, heads_q, content) * (noise / content**0.5) ** 0.5
    k_content = normal(batch, seqlen, heads_kv, content) * (noise / content**0.5) ** 0.5
    q_content[..., 0] = sink**0.5
    k_content[..., 0] = 0
    k_content[:, :SINK_TOKENS, :, 0] = sink**0.5
    at = seqlen // 3
    q_content[..., 1], k_content[..., 1] = 0, 0
    q_content[:, -max(1, seqlen // 8) :, :, 1] = needle**0.5
    k_content[:, at, :, 1] = needle**0.5
    q = torch.cat([q_position, q_content], -1) * root
    k = torch.cat([k_position, k_content], -1) * root
    v = normal(batch, seqlen, heads_kv, head_dim if head_dim_v is None else head_dim_v)
    return tuple(x.to(dtype).to(device) for x in (q, k, v))


def in_shuffled_pages(
    k: torch.Tensor, v: torch.Tensor, page_size: int, *, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(k_cache, v_cache, page_table): tokens (batch, seqlen, ..) in pages (pages, page_size, ..) in a random order.

    The table is int32 (batch, ceil(seqlen / page_size)). What is left of a last page holds zeros.
    """
    batch, seqlen = k.shape[:2]
    columns = -(-seqlen // page_size)
    order = torch.randperm(batch * columns, generator=torch.Generator().manual_seed(seed)).to(k.device)
    caches = []
    for tokens in (k, v):
        rest = tokens.new_zeros((batch, columns * page_size - seqlen, *tokens.shape[2:]))
        pages = torch.cat([tokens, rest], dim=1).unflatten(1, (columns, page_size)).flatten(0, 1)
        caches.append(torch.empty_like(pages).index_copy_(0, order, pages))
    return *caches, order.reshape(batch, columns).to(torch.int32)


def _rotary_features(seqlen: int, width: int) -> torch.Tensor:
    """(seqlen, width), rows of length 1: cos and sin of each position at the rotary frequencies."""
    frequencies = ROTARY_BASE ** (-torch.arange(width // 2) / (width / 2))
    angles = torch.arange(seqlen)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1) / (width / 2) ** 0.5
