"""Other people's attention on the same tensors: cuDNN and flash through PyTorch, FlashAttention-4, FlexAttention.

Each is optional. A maker takes (shape, q, k, v, kept) and returns the call, or raises `Missing` with the reason, as the
call may.
Tensors are (batch, seqlen, heads, head_dim), as is the result. `kept` is None but for "flex", whose block mask can say
it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

Call = Callable[[], torch.Tensor]


class Missing(Exception):
    """A peer that cannot take part, and why."""


class Shape(NamedTuple):
    """What the peers compute. window_left: keys to the left of a query's own that it sees; causal without a window:
    None."""

    batch: int
    seqlen: int
    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    causal: bool
    window_left: int | None = None


class KeptTiles(NamedTuple):
    """keep  bool (batch, heads_q, ceil(seqlen / rows), ceil(seqlen / keys)): tiles that are not skipped"""

    keep: torch.Tensor
    rows: int
    keys: int


# What PyTorch, or cuDNN through it, says of a shape that a backend does not take.
REFUSALS = ("No available kernel", "No viable backend", "execution plan")


def _sdpa(
    backend: str, shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: KeptTiles | None
) -> Call:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    if shape.window_left is not None:
        raise Missing("PyTorch's scaled_dot_product_attention has no window")
    if kept is not None:
        raise Missing("PyTorch's scaled_dot_product_attention has no block mask")
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    which, gqa = getattr(SDPBackend, backend), shape.heads_q != shape.heads_kv

    def call() -> torch.Tensor:
        try:
            with sdpa_kernel(which):
                out = scaled_dot_product_attention(*heads, is_causal=shape.causal, enable_gqa=gqa)
        except RuntimeError as error:
            if any(text in str(error) for text in REFUSALS):
                raise Missing(f"PyTorch {torch.__version__} has no {backend} for this shape") from None
            raise
        return out.transpose(1, 2)

    return call


def _flash_attention_4(
    pack_gqa: bool | None, shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: KeptTiles | None
) -> Call:
    """pack_gqa: whether the query heads of a KV head share a tile; None: as FlashAttention-4 chooses, which is yes."""
    if kept is not None:
        raise Missing("FlashAttention-4 is compared dense")
    if pack_gqa is False and shape.heads_q == shape.heads_kv:
        raise Missing("there are no query heads to pack")
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError as error:
        raise Missing(f"pip install flash-attn-4: {error}") from None
    window = (None, None) if shape.window_left is None else (shape.window_left, 0)

    def call() -> torch.Tensor:
        causal = shape.causal and shape.window_left is None
        out = flash_attn_func(q, k, v, causal=causal, window_size=window, pack_gqa=pack_gqa)
        return out[0] if isinstance(out, tuple) else out

    return call


FLEX_BLOCK = 128
PART_ROWS, PART_KEYS = 64, 16  # what our tiles and those blocks are made of


def _flex(shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: KeptTiles | None) -> Call:
    try:
        import triton  # noqa: F401
        from torch.nn.attention.flex_attention import BlockMask
    except ImportError as error:
        raise Missing(f"FlexAttention needs triton: {error}") from None
    if shape.seqlen % FLEX_BLOCK:
        raise Missing(f"FlexAttention is compared at multiples of {FLEX_BLOCK} tokens, not {shape.seqlen}")
    visible, whole = visible_blocks(shape, q.device)
    if kept is not None:
        visible, whole = visible & kept.keep, whole & kept.keep
    mask = BlockMask.from_kv_blocks(
        *block_list(visible & ~whole), *block_list(whole), BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask_of(shape)
    )
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    attend = _compiled_flex()
    return lambda: attend(*heads, block_mask=mask, enable_gqa=shape.heads_q != shape.heads_kv).transpose(1, 2)


@functools.cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def forget_compiled() -> None:
    """So that each case compiles its own: behind a few recompilations, PyTorch runs FlexAttention uncompiled."""
    if _compiled_flex.cache_info().currsize:
        _compiled_flex.cache_clear()
        torch.compiler.reset()


def mask_of(shape: Shape) -> Callable:
    """FlexAttention's mask_mod."""
    if not shape.causal:
        return lambda b, h, q_idx, kv_idx: q_idx >= 0
    if shape.window_left is None:
        return lambda b, h, q_idx, kv_idx: kv_idx <= q_idx
    left = shape.window_left
    return lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (kv_idx >= q_idx - left)


def visible_blocks(shape: Shape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """bool (1, 1, blocks, blocks) of FLEX_BLOCK: those in which some score is visible, and those in which all are."""
    first = torch.arange(0, shape.seqlen, FLEX_BLOCK, device=device)
    last = first + FLEX_BLOCK - 1
    some = torch.ones(len(first), len(first), dtype=torch.bool, device=device)
    whole = some.clone()
    if shape.causal:
        some &= first[None] <= last[:, None]
        whole &= last[None] <= first[:, None]
    if shape.window_left is not None:
        some &= last[None] >= first[:, None] - shape.window_left
        whole &= first[None] >= last[:, None] - shape.window_left
    return some[None, None], whole[None, None]


def block_list(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bool (batch, heads, q blocks, kv blocks) -> int32 counts (.., q blocks) and indices, those that count first."""
    indices = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True)
    return blocks.sum(-1).to(torch.int32), indices.to(torch.int32)


def in_flex_blocks(kept: KeptTiles, seqlen: int) -> KeptTiles:
    """The kept tiles in FlexAttention's blocks: those of which at least half is kept, so that about as much is
    computed, and in each row of blocks the one of which most is."""
    if seqlen % FLEX_BLOCK or kept.rows % PART_ROWS or kept.keys % PART_KEYS:
        raise Missing(
            f"tiles of {kept.rows} rows and {kept.keys} keys of {seqlen} tokens do not become FlexAttention's blocks "
            f"of {FLEX_BLOCK}"
        )
    parts = kept.keep.repeat_interleave(kept.keys // PART_KEYS, dim=3)[..., : seqlen // PART_KEYS]
    parts = parts.unflatten(3, (-1, FLEX_BLOCK // PART_KEYS)).sum(4)
    parts = parts.repeat_interleave(kept.rows // PART_ROWS, dim=2)[:, :, : seqlen // PART_ROWS]
    parts = parts.unflatten(2, (-1, FLEX_BLOCK // PART_ROWS)).sum(3)
    half = FLEX_BLOCK // PART_ROWS * (FLEX_BLOCK // PART_KEYS) // 2
    return KeptTiles((parts >= half) | (parts == parts.amax(3, keepdim=True)), FLEX_BLOCK, FLEX_BLOCK)


PEERS: dict[str, Callable[[Shape, torch.Tensor, torch.Tensor, torch.Tensor, KeptTiles | None], Call]] = {
    "cudnn": functools.partial(_sdpa, "CUDNN_ATTENTION"),
    "flash": functools.partial(_sdpa, "FLASH_ATTENTION"),
    "fa4": functools.partial(_flash_attention_4, None),
    "fa4-unpacked": functools.partial(_flash_attention_4, False),
    "flex": _flex,
}
