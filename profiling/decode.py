"""Decode for the benchmark: its cases, inputs and peers, the bytes that it must read, and whether a result is right.

What counts is the bytes of K and V of all sequences, each read once: the rate of a call is those bytes over its time,
also where tiles are skipped. The roof is the provider "copy": PyTorch copies half as many bytes on the device, so that
reads and writes together are as many.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

import cute_sparse
from cute_sparse.reference import cached_tokens
from cute_sparse.workloads import in_shuffled_pages, structured_qkv
from profiling.peers import REFUSALS, Call, Missing

ELEMENT_BYTES = 2
PAGE_SIZE = 64


class DecodeShape(NamedTuple):
    """lengths: keys of each sequence; page_size: 0 where the caches are contiguous."""

    lengths: tuple[int, ...]
    heads_q: int
    heads_kv: int
    head_dim: int = 128
    head_dim_v: int = 128
    page_size: int = 0
    seqlen_q: int = 1

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def is_ragged(self) -> bool:
        return len(set(self.lengths)) > 1

    @property
    def kv_bytes(self) -> int:
        return sum(self.lengths) * self.heads_kv * (self.head_dim + self.head_dim_v) * ELEMENT_BYTES


HEADS = {"32q8kv": (32, 8), "64q4kv": (64, 4)}
# (sequences, K tokens of each): up to what fits a GPU of 80 GB
SIZES = ((1, 4), (1, 32), (1, 128), (1, 512), (8, 4), (8, 32), (8, 128), (32, 4), (32, 32), (128, 4), (128, 16))


def _tables() -> dict[str, DecodeShape]:
    found = {}
    for batch, thousands in SIZES:
        for heads, (heads_q, heads_kv) in HEADS.items():
            shape = DecodeShape((thousands * 1024,) * batch, heads_q, heads_kv)
            found[f"b{batch}-{thousands}k-{heads}"] = shape
            found[f"b{batch}-{thousands}k-{heads}-pages"] = shape._replace(page_size=PAGE_SIZE)
    for heads, (heads_q, heads_kv) in HEADS.items():
        lengths = (256 * 1024, *[1024] * 127)
        found[f"one-256k-127-1k-{heads}-pages"] = DecodeShape(lengths, heads_q, heads_kv, page_size=PAGE_SIZE)
    return found


TABLES = _tables()
LONG = {name: TABLES[name] for name in ("b8-32k-32q8kv-pages", "b1-128k-64q4kv-pages")}  # with tiles skipped
SMALL = {
    f"decode-small-d{d}": DecodeShape((3001,) * 3, 4, 1, d, dv, PAGE_SIZE)
    for d, dv in ((64, 64), (128, 128), (192, 128), (256, 256))
}  # for checkers of memory, not to be timed
CASES = TABLES | SMALL


class DecodeInputs(NamedTuple):
    """As `cute_sparse.decode` takes them; page_table is None where the caches are contiguous."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    seqused_k: torch.Tensor
    page_table: torch.Tensor | None


def random_inputs(shape: DecodeShape, dtype: torch.dtype, device: str) -> DecodeInputs:
    """Standard normal; the pages of all sequences in a random order."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    q = normal(shape.batch, shape.seqlen_q, shape.heads_q, shape.head_dim)
    blocks, tokens, page_table = shape.batch, max(shape.lengths), None
    if shape.page_size:
        used = [-(-length // shape.page_size) for length in shape.lengths]
        blocks, tokens = sum(used), shape.page_size
        order = torch.randperm(blocks, generator=generator, device=device).to(torch.int32)
        page_table = torch.zeros((shape.batch, max(used)), dtype=torch.int32, device=device)
        for index, pages in enumerate(order.split(used)):
            page_table[index, : len(pages)] = pages
    k, v = (normal(blocks, tokens, shape.heads_kv, dim) for dim in (shape.head_dim, shape.head_dim_v))
    return DecodeInputs(q, k, v, _lengths(shape, device), page_table)


def structured_inputs(shape: DecodeShape, dtype: torch.dtype, device: str) -> DecodeInputs:
    """Sinks, rotary locality and far needles; of sequences of one length."""
    if shape.is_ragged:
        raise ValueError("structured input has sequences of one length")
    q, k, v = structured_qkv(
        shape.batch, shape.lengths[0], shape.heads_q, shape.heads_kv, shape.head_dim,
        head_dim_v=shape.head_dim_v, dtype=dtype, device=device, seqlen_q=shape.seqlen_q,
    )  # fmt: skip
    page_table = None
    if shape.page_size:
        k, v, page_table = in_shuffled_pages(k, v, shape.page_size)
    return DecodeInputs(q, k, v, _lengths(shape, device), page_table)


def _lengths(shape: DecodeShape, device: str) -> torch.Tensor:
    return torch.tensor(shape.lengths, dtype=torch.int32, device=device)


def ours(inputs: DecodeInputs) -> Call:
    q, k_cache, v_cache, seqused_k, page_table = inputs
    return lambda **more: cute_sparse.decode(q, k_cache, v_cache, seqused_k=seqused_k, page_table=page_table, **more)


# ---- Whether a result is right -------------------------------------------------------------------------------------


class KeptDecodeTiles(NamedTuple):
    """keep  bool (batch, heads_kv, row blocks, KV tiles); rows, keys of a tile"""

    keep: torch.Tensor
    rows: int
    keys: int


SAMPLE_HEADS = 4


def sampled_error(
    shape: DecodeShape, inputs: DecodeInputs, out: torch.Tensor, kept: KeptDecodeTiles | None
) -> tuple[float, float]:
    """Relative L2 error of `out` against float32, and that of PyTorch rounding weights and result to out's dtype.

    Of the first, the longest and the last sequence, SAMPLE_HEADS query heads spread over all.
    """
    heads = sorted({round(i * (shape.heads_q - 1) / (SAMPLE_HEADS - 1)) for i in range(SAMPLE_HEADS)})
    longest = max(range(shape.batch), key=lambda index: shape.lengths[index])
    wrong = rounded_wrong = size = 0.0
    for index in sorted({0, longest, shape.batch - 1}):
        length = shape.lengths[index]
        pages = None if inputs.page_table is None else inputs.page_table[index]
        keys, values = (
            cached_tokens(cache, pages, index, slice(0, length)) for cache in (inputs.k_cache, inputs.v_cache)
        )
        for head in heads:
            kv_head = head * shape.heads_kv // shape.heads_q
            scores = inputs.q[index, :, head].float() @ keys[kv_head].float().T / math.sqrt(shape.head_dim)
            scores.masked_fill_(~_visible(shape, length, kept, index, head, scores.device), -math.inf)
            weights = torch.exp(scores - scores.amax(-1, keepdim=True))
            total, head_values = weights.sum(-1, keepdim=True), values[kv_head].float()
            exact = weights @ head_values / total
            rounded = (weights.to(out.dtype).float() @ head_values / total).to(out.dtype).float()
            wrong += (out[index, :, head].float() - exact).square().sum().item()
            rounded_wrong += (rounded - exact).square().sum().item()
            size += exact.square().sum().item()
    return math.sqrt(wrong / size), math.sqrt(rounded_wrong / size)


def _visible(
    shape: DecodeShape, length: int, kept: KeptDecodeTiles | None, index: int, head: int, device: torch.device
) -> torch.Tensor:
    """(seqlen_q, length) bool: causal, and in a kept tile."""
    kv_idx, q_idx = torch.arange(length, device=device), torch.arange(shape.seqlen_q, device=device)
    visible = kv_idx <= q_idx[:, None] + length - shape.seqlen_q
    if kept is not None:
        group = shape.heads_q // shape.heads_kv
        blocks = (q_idx * group + head % group) // kept.rows
        visible = visible & kept.keep[index, head // group][blocks][:, kv_idx // kept.keys]
    return visible


# ---- Peers ---------------------------------------------------------------------------------------------------------


def _copy(shape: DecodeShape, inputs: DecodeInputs) -> Call:
    source = torch.empty(shape.kv_bytes // 2, dtype=torch.uint8, device=inputs.q.device).random_(0, 256)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _flash(shape: DecodeShape, inputs: DecodeInputs) -> Call:
    """PyTorch's scaled_dot_product_attention, FlashAttention-2's kernel."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    if shape.page_size or shape.is_ragged:
        raise Missing("PyTorch's scaled_dot_product_attention has neither pages nor sequences of different lengths")
    if shape.seqlen_q > 1:
        raise Missing("PyTorch's causal mask is aligned top-left")
    heads = [x.transpose(1, 2) for x in (inputs.q, inputs.k_cache, inputs.v_cache)]

    def call() -> torch.Tensor:
        try:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                out = scaled_dot_product_attention(*heads, enable_gqa=shape.heads_q != shape.heads_kv)
        except RuntimeError as error:
            if any(text in str(error) for text in REFUSALS):
                raise Missing(f"PyTorch {torch.__version__} has no FLASH_ATTENTION for this shape") from None
            raise
        return out.transpose(1, 2)

    return call


def _flash_attention_4(shape: DecodeShape, inputs: DecodeInputs) -> Call:
    """With as many splits as its heuristic chooses; on Hopper, where it refuses more than one, with one."""
    try:
        from flash_attn.cute import flash_attn_varlen_func
    except ImportError as error:
        raise Missing(f"pip install flash-attn-4: {error}") from None
    q, k_cache, v_cache, seqused_k, page_table = inputs
    num_splits = 1 if torch.cuda.get_device_capability(q.device)[0] == 9 else 0

    def call() -> torch.Tensor:
        out = flash_attn_varlen_func(
            q, k_cache, v_cache, seqused_k=seqused_k, page_table=page_table, causal=True, num_splits=num_splits
        )
        return out[0] if isinstance(out, tuple) else out

    return call


FLASHINFER_WORKSPACE_BYTES = 256 << 20


def _flashinfer(shape: DecodeShape, inputs: DecodeInputs) -> Call:
    """FlashInfer's paged decode on tensor cores; its plan, made on the host from the lengths, is not timed."""
    try:
        import flashinfer
    except ImportError as error:
        raise Missing(f"pip install flashinfer-python: {error}") from None
    if not shape.page_size or shape.seqlen_q > 1 or shape.head_dim != shape.head_dim_v:
        raise Missing("FlashInfer's decode is compared with pages, one query, and one head dim")
    q, k_cache, v_cache, _, page_table = inputs
    used = [-(-length // shape.page_size) for length in shape.lengths]
    indptr = torch.tensor([0, *used]).cumsum(0).to(torch.int32)
    indices = torch.cat([page_table[index, :pages] for index, pages in enumerate(used)])
    last = torch.tensor([(length - 1) % shape.page_size + 1 for length in shape.lengths], dtype=torch.int32)
    workspace = torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    wrapper.plan(
        indptr.to(q.device), indices, last.to(q.device), shape.heads_q, shape.heads_kv, shape.head_dim,
        shape.page_size, q_data_type=q.dtype, kv_data_type=q.dtype,
    )  # fmt: skip
    return lambda: wrapper.run(q[:, 0], (k_cache, v_cache))[:, None]


COPY = "copy"
PEERS: dict[str, Callable[[DecodeShape, DecodeInputs], Call]] = {
    COPY: _copy,
    "flash": _flash,
    "fa4": _flash_attention_4,
    "flashinfer": _flashinfer,
}
