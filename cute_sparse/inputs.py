"""What a call must satisfy: turns tensors and options into a checked `Request`, or raises by name."""

from __future__ import annotations

import functools
import math
import numbers
from dataclasses import dataclass

import numpy as np
import torch
from torch.autograd import forward_ad

from cute_sparse import threshold as thresholds
from cute_sparse.problem import HEAD_DIM_MULTIPLE, Mask, Problem, check_head_dims

DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
ALIGNMENT_BYTES = 16  # of a TMA transfer: every row starts on a multiple of it
ELEMENTS_MAX = 2**31 - 1  # reached by 32-bit element offsets
TOKENS_MAX = ELEMENTS_MAX // HEAD_DIM_MULTIPLE  # of a sequence: more would not fit into ELEMENTS_MAX
# The kernels' arithmetic is float32's. Above SCALE_MAX what stands for -inf there overflows; Hopper's tanh is good to
# 1e-7, so that a larger cap would cost the scores more than 1e-3. Below SCALE_MIN numbers count as 0.
SCALE_MIN, SCALE_MAX, SOFTCAP_MAX = torch.finfo(torch.float32).tiny, 1e8, 1e4
SEQLEN_Q_MAX = 16  # queries per sequence of a decode call
PAGE_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Request:
    """A checked call: the problem, its sizes, and the run-time scalars, as the kernels and the oracle take them.

    seqlen_q, seqlen_k are the longest lengths and total_q, total_k the packed token counts of a varlen problem;
    batch * seqlen otherwise. window_left and window_right are exact also where the mask is not a band.
    """

    problem: Problem
    device: torch.device
    batch: int
    heads_q: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    total_q: int
    total_k: int
    window_left: int
    window_right: int
    softmax_scale: float
    softcap: float
    threshold: thresholds.Threshold | None

    @property
    def out_shape(self) -> tuple[int, ...]:
        tokens = (self.total_q,) if self.problem.varlen else (self.batch, self.seqlen_q)
        return (*tokens, self.heads_q, self.problem.head_dim_v)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        if self.problem.varlen:
            return (self.heads_q, self.total_q)
        return (self.batch, self.heads_q, self.seqlen_q)


def check_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int | None, int | None],
    softcap: float,
    learnable_sink: torch.Tensor | None,
    threshold: float | torch.Tensor | None,
    out: torch.Tensor | None,
    return_lse: bool,
    return_stats: bool,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> Request:
    """Check q, k, v and every option of a prefill call; varlen where cu_seqlens are given."""
    varlen = cu_seqlens_q is not None
    layout = "(total tokens, heads, head_dim)" if varlen else "(batch, seqlen, heads, head_dim)"
    _check_tensors({"q": q, "k": k, "v": v}, rank=3 if varlen else 4, layout=layout)
    if not varlen:
        _check_batch({"q": q, "k": k, "v": v})
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        _check_memory(name, tensor)
    if varlen:
        _check_cu_seqlens(cu_seqlens_q, cu_seqlens_k, q.device)
        batch = cu_seqlens_q.shape[0] - 1
        seqlen_q, seqlen_k = _length(max_seqlen_q, "max_seqlen_q"), _length(max_seqlen_k, "max_seqlen_k")
        total_q, total_k = q.shape[0], k.shape[0]
    else:
        batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
        total_q, total_k = batch * seqlen_q, batch * seqlen_k
    heads_q, head_dim = q.shape[-2:]
    heads_kv, head_dim_v = v.shape[-2:]
    check_flags(causal=causal, return_lse=return_lse, return_stats=return_stats)
    mask, left, right = band(causal, window_size, seqlen_q, seqlen_k)
    softmax_scale, softcap = _checked_scale(softmax_scale, head_dim), _checked_softcap(softcap)
    if learnable_sink is not None:
        _check_sink(learnable_sink, heads_q, q.device)
    lambdas = thresholds.resolve(threshold, batch, heads_q, q.device)
    if cu_seqlens_q is not None:
        check_cu_seqlens_values(cu_seqlens_q, cu_seqlens_k, total_q, total_k, seqlen_q, seqlen_k)
    problem = Problem(
        kind="prefill",
        dtype=DTYPE_NAMES[q.dtype],
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        mask=mask,
        varlen=varlen,
        softcap=softcap > 0,
        sink=learnable_sink is not None,
        sparsity=None if lambdas is None else "threshold",
        return_lse=return_lse,
        return_stats=return_stats,
    )
    request = Request(
        problem, q.device, batch, heads_q, heads_kv, seqlen_q, seqlen_k, total_q, total_k,
        left, right, softmax_scale, softcap, lambdas,
    )  # fmt: skip
    if out is not None:
        _check_out(out, request, q.dtype)
    return request


@dataclass(frozen=True)
class DecodeRequest:
    """A checked decode call, as `Request`.

    capacity    keys that a sequence can have: tokens of its cache, or of as many pages as its table has entries
    blocks      pages, or sequences' caches
    page_size   tokens per page, 0 where the caches are contiguous
    num_splits  parts of each item; 0: as many as keep the device busy
    """

    problem: Problem
    device: torch.device
    batch: int
    heads_q: int
    heads_kv: int
    seqlen_q: int
    capacity: int
    blocks: int
    window_left: int
    window_right: int
    softmax_scale: float
    softcap: float
    threshold: thresholds.Threshold | None
    num_splits: int

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (self.batch, self.seqlen_q, self.heads_q, self.problem.head_dim_v)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        return (self.batch, self.heads_q, self.seqlen_q)

    @property
    def rows(self) -> int:
        """Packed query rows of a KV head."""
        return self.seqlen_q * (self.heads_q // self.heads_kv)


def check_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    seqused_k: torch.Tensor,
    page_table: torch.Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int | None, int | None],
    softcap: float,
    learnable_sink: torch.Tensor | None,
    threshold: float | torch.Tensor | None,
    num_splits: int | None,
    share_max: bool,
    out: torch.Tensor | None,
    return_lse: bool,
    return_stats: bool,
) -> DecodeRequest:
    """Check the tensors and every option of a decode call."""
    paged = page_table is not None
    named = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    caches = "(pages, page_size, heads_kv, head_dim)" if paged else "(batch, capacity, heads_kv, head_dim)"
    _check_tensors(named, rank=4, layout=f"(batch, seqlen_q, heads_q, head_dim), and a cache {caches}")
    batch, seqlen_q, heads_q, head_dim = q.shape
    blocks, block_tokens, heads_kv, head_dim_v = v_cache.shape
    if not 1 <= seqlen_q <= SEQLEN_Q_MAX:
        raise ValueError(
            f"{seqlen_q=} must be from 1 to {SEQLEN_Q_MAX}: decode is for a few queries, attention for many"
        )
    _check_operand("seqused_k", seqused_k, torch.int32, q.device, (batch,), f"({batch=},)")
    if paged:
        _check_operand("page_table", page_table, torch.int32, q.device, (batch, None), f"({batch=}, pages)")
        if block_tokens not in PAGE_SIZES:
            sizes = ", ".join(map(str, PAGE_SIZES))
            raise NotImplementedError(f"k_cache has pages of {block_tokens} tokens; supported are {sizes}")
    else:
        _check_batch(named)
    _check_memory("q", q)
    for name in ("k_cache", "v_cache"):
        _check_memory(name, named[name], elements_max=None)  # of any size: only TMA reaches them, by coordinates
    capacity = page_table.shape[1] * block_tokens if paged else block_tokens
    if capacity > ELEMENTS_MAX:
        raise NotImplementedError(f"a sequence can have {capacity} keys; at most 2**31 - 1 are supported")
    check_flags(causal=causal, share_max=share_max, return_lse=return_lse, return_stats=return_stats)
    mask, left, right = band(causal, window_size, seqlen_q, capacity)
    softmax_scale, softcap = _checked_scale(softmax_scale, head_dim), _checked_softcap(softcap)
    if learnable_sink is not None:
        _check_sink(learnable_sink, heads_q, q.device)
    lambdas = thresholds.resolve(threshold, batch, heads_q, q.device)
    if share_max and lambdas is None:
        raise ValueError(f"{share_max=} needs a threshold: splits share their maxima to skip more tiles")
    if num_splits is not None and not (_is_integer(num_splits) and num_splits >= 1):
        raise ValueError(f"{num_splits=} must be a positive integer, or None for as many as keep the device busy")
    problem = Problem(
        kind="decode",
        dtype=DTYPE_NAMES[q.dtype],
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        mask=mask,
        softcap=softcap > 0,
        sink=learnable_sink is not None,
        sparsity=None if lambdas is None else "threshold",
        return_lse=return_lse,
        return_stats=return_stats,
        page_size=block_tokens if paged else 0,
        share_max=share_max,
    )
    request = DecodeRequest(
        problem, q.device, batch, heads_q, heads_kv, seqlen_q, capacity, blocks, left, right,
        softmax_scale, softcap, lambdas, int(num_splits or 0),
    )  # fmt: skip
    check_decode_values(request, seqused_k, page_table)
    if out is not None:
        _check_out(out, request, q.dtype)
    return request


def _check_operand(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, device: torch.device, shape: tuple[int | None, ...], words: str
) -> None:
    """Check a tensor beside q, k, v. `shape` has None where any size will do; `words` is how to say it."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a torch.Tensor")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}; it must be {dtype}")
    if len(shape) != tensor.dim() or any(n not in (None, size) for n, size in zip(shape, tensor.shape, strict=True)):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {words}")
    if tensor.numel() and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} has strides {tensor.stride()}; the last one must be 1")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, q on {device}; they must share one device")


def check_decode_values(request: DecodeRequest, seqused_k: torch.Tensor, page_table: torch.Tensor | None) -> None:
    """Check lengths and the used entries of the page table in CPU memory; on a GPU they are not read.

    There, a length counts as at most the capacity, and a page that does not exist reads as zeros.
    """
    if seqused_k.device.type != "cpu":
        return
    page_size = request.problem.page_size
    for index, length in enumerate(seqused_k.tolist()):
        if not 0 <= length <= request.capacity:
            raise ValueError(f"seqused_k[{index}]={length} must lie in [0, {request.capacity}], the cache's capacity")
        if not page_size:
            continue
        first_key = max(length - request.seqlen_q - request.window_left, 0)
        first_page, end_page = first_key // page_size, -(-length // page_size)
        for page, number in enumerate(page_table[index, first_page:end_page].tolist(), first_page):
            if not 0 <= number < request.blocks:
                raise ValueError(f"page_table[{index}, {page}]={number}, but there are {request.blocks} pages")


def check_flags(**flags: bool) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} is a {type(value).__name__}; it must be Python's True or False")


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _number(name: str, value: float) -> float:
    """A tensor is none: a plan would keep the value it had at the first call, and on a GPU reading it would wait."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a number")
    return float(value)


def _checked_scale(softmax_scale: float | None, head_dim: int) -> float:
    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else _number("softmax_scale", softmax_scale)
    if not SCALE_MIN <= scale <= SCALE_MAX:
        raise ValueError(f"{softmax_scale=} must be positive, from {SCALE_MIN:.2g} to {SCALE_MAX:g}")
    return scale


def _checked_softcap(softcap: float) -> float:
    cap = _number("softcap", softcap)
    if not (cap == 0 or SCALE_MIN <= cap <= SOFTCAP_MAX):
        raise ValueError(f"{softcap=} must be positive, from {SCALE_MIN:.2g} to {SOFTCAP_MAX:g}, or 0 for none")
    return cap


def _check_sink(sink: torch.Tensor, heads_q: int, device: torch.device) -> None:
    _check_operand("learnable_sink", sink, torch.float32, device, (heads_q,), f"({heads_q=},)")
    if torch.is_grad_enabled() and sink.requires_grad:
        raise NotImplementedError("learnable_sink requires grad; there is no backward pass yet")


def band(
    causal: bool, window_size: tuple[int | None, int | None], seqlen_q: int, seqlen_k: int
) -> tuple[Mask, int, int]:
    """(mask, left, right): the kind of mask, and its half-widths in keys, at most seqlen_k and seqlen_q.

    Those bounds lose nothing: distances of a key from its query's diagonal lie in (-seqlen_k, seqlen_q).
    """
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise ValueError(f"{window_size=} must be a pair (left, right)") from None
    left, right = _half_width(left, window_size), _half_width(right, window_size)
    if causal:
        right = 0
    kind = "full" if left is None and right is None else "causal" if causal and left is None else "band"
    return kind, min(seqlen_k if left is None else left, seqlen_k), min(seqlen_q if right is None else right, seqlen_q)


def _half_width(value: int | None, window_size) -> int | None:
    if value is None:
        return None
    if not _is_integer(value) or value < -1:
        raise ValueError(f"{window_size=} must hold integers from 0, or None or -1 for unbounded")
    return None if value == -1 else int(value)


def _length(value: int | None, name: str) -> int:
    if not _is_integer(value) or value < 0:
        raise ValueError(f"{name}={value!r} must be an integer that is not negative")
    if value > TOKENS_MAX:
        raise NotImplementedError(f"{name}={value}; sequences of at most {TOKENS_MAX} tokens are supported")
    return int(value)


def has_dispatch_of_its_own(tensor: torch.Tensor) -> bool:
    """Whether the tensor's class, not its memory, says what it holds: a FakeTensor's memory, for instance, is none."""
    plain = torch.Tensor.__torch_dispatch__
    return getattr(type(tensor), "__torch_dispatch__", plain) is not plain


def check_in_memory(name: str, tensor: torch.Tensor) -> None:
    if torch._C._functorch.is_batchedtensor(tensor):
        raise NotImplementedError(f"{name} is one of torch.vmap's; supported are tensors with a batch dimension")
    if has_dispatch_of_its_own(tensor):
        raise NotImplementedError(f"{name} is a {type(tensor).__name__}; supported are tensors in memory")


def _check_tensors(named: dict[str, torch.Tensor], rank: int, layout: str) -> None:
    """`named` holds queries, keys and values, in this order, by the names that the caller knows."""
    (q_name, q), (k_name, k), (v_name, v) = named.items()
    for name, tensor in named.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a torch.Tensor")
        if tensor.layout != torch.strided or tensor.is_nested:
            layout = "nested" if tensor.is_nested else tensor.layout
            raise NotImplementedError(f"{name} is a {layout} tensor; supported are dense ones with strides")
        check_in_memory(name, tensor)
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"{name} has a tangent; there is no derivative of attention yet")
        if tensor.dim() != rank:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must have {rank} dimensions {layout}")
    for name, tensor in named.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise NotImplementedError(f"{name} has dtype {tensor.dtype}; supported are torch.bfloat16, torch.float16")
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}, q has {q.dtype}; they must be the same")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q on {q.device}; they must share one device")
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise NotImplementedError(
                f"{name} requires grad; there is no backward pass yet, only forward under torch.no_grad()"
            )
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"{k_name} has shape {tuple(k.shape)}, {v_name} has {tuple(v.shape)}; "
            "all but the last dimension must be the same"
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{q_name} has head_dim {q.shape[-1]}, {k_name} has {k.shape[-1]}; they must be the same")
    heads_q, heads_kv = q.shape[-2], k.shape[-2]
    if heads_kv == 0 or heads_q % heads_kv:
        raise ValueError(f"{heads_q=} must be a multiple of {heads_kv=}, which must be positive")
    check_head_dims(q.shape[-1], v.shape[-1])


def _check_batch(named: dict[str, torch.Tensor]) -> None:
    (q_name, q), (k_name, k), (v_name, _) = named.items()
    if q.shape[0] != k.shape[0]:
        raise ValueError(
            f"{q_name} has batch {q.shape[0]}, {k_name} and {v_name} have {k.shape[0]}; they must be the same"
        )


def _check_memory(name: str, tensor: torch.Tensor, elements_max: int | None = ELEMENTS_MAX) -> None:
    """Rows of a tensor must be contiguous and start on 16 bytes, and 32-bit offsets must reach them."""
    if tensor.numel() == 0:
        return
    sizes_and_strides = list(zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} has strides {tensor.stride()}; the last one must be 1")
    unit = ALIGNMENT_BYTES // tensor.element_size()
    if any(size > 1 and stride % unit for size, stride in sizes_and_strides[:-1]):
        raise ValueError(
            f"{name} has strides {tensor.stride()}; all but the last must be multiples of {unit} elements "
            f"({ALIGNMENT_BYTES} bytes)"
        )
    if tensor.data_ptr() % ALIGNMENT_BYTES:
        raise ValueError(f"{name} starts at address {tensor.data_ptr():#x}; it must be {ALIGNMENT_BYTES}-byte aligned")
    span = 1 + sum((size - 1) * stride for size, stride in sizes_and_strides)
    if elements_max is not None and max(span, tensor.numel()) > elements_max:
        raise NotImplementedError(
            f"{name} of shape {tuple(tensor.shape)} reaches over {max(span, tensor.numel())} elements; "
            f"tensors of at most 2**31 - 1 elements are supported"
        )


def _check_cu_seqlens(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, device: torch.device) -> None:
    for name, cu_seqlens in {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}.items():
        _check_operand(name, cu_seqlens, torch.int32, device, (None,), "(batch + 1,)")
    entries_q, entries_k = len(cu_seqlens_q), len(cu_seqlens_k)
    if entries_q != entries_k or not entries_q:
        raise ValueError(
            f"cu_seqlens_q has {entries_q} entries, cu_seqlens_k {entries_k}; they must have batch + 1 each"
        )


def check_cu_seqlens_values(
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, total_q: int, total_k: int, max_q: int, max_k: int
) -> None:
    """Check cu_seqlens in CPU memory; those on a GPU are not read, because that would wait for the device."""
    if cu_seqlens_q.device.type != "cpu":
        return
    for side, cu_seqlens, total, longest in (("q", cu_seqlens_q, total_q, max_q), ("k", cu_seqlens_k, total_k, max_k)):
        values = cu_seqlens.tolist()
        lengths = [after - before for before, after in zip(values, values[1:], strict=False)]
        if values[0] != 0:
            raise ValueError(f"cu_seqlens_{side} starts with {values[0]}; it must start with 0")
        if any(length < 0 for length in lengths):
            raise ValueError(f"cu_seqlens_{side}={values} decreases; it must not")
        if values[-1] > total:
            raise ValueError(f"cu_seqlens_{side} ends with {values[-1]}, but there are {total} tokens")
        if max(lengths, default=0) > longest:
            raise ValueError(f"max_seqlen_{side}={longest} is less than the longest sequence, {max(lengths)}")


def _check_out(out: torch.Tensor, request: Request | DecodeRequest, dtype: torch.dtype) -> None:
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out is a {type(out).__name__}; it must be a torch.Tensor")
    if tuple(out.shape) != request.out_shape:
        raise ValueError(f"out has shape {tuple(out.shape)}; it must be {request.out_shape}")
    if out.dtype != dtype:
        raise ValueError(f"out has dtype {out.dtype}, q has {dtype}; they must be the same")
    if out.device != request.device:
        raise ValueError(f"out is on {out.device}, q on {request.device}; they must share one device")
    if torch.is_grad_enabled() and out.requires_grad:
        raise NotImplementedError("out requires grad; there is no backward pass yet")
    _check_memory("out", out)
    reach = 1  # elements from the first to the last of the dimensions so far, the innermost first
    for stride, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size > 1 and stride < reach:
            raise ValueError(f"out has strides {out.stride()}; elements of it share memory")
        reach += (size - 1) * stride


def check_out_apart(out: torch.Tensor, inputs: tuple[torch.Tensor, ...], spans: tuple[int, ...]) -> None:
    """Refuse an `out` that shares memory with an input. Addresses are no part of a plan: at every call.

    spans  `span_bytes` of out and of the inputs
    """
    begin = out.data_ptr()
    end = begin + spans[0]
    for tensor, span in zip(inputs, spans[1:], strict=True):
        first = tensor.data_ptr()
        if begin < first + span and first < end and _overlap(begin - first, *_layout(out), *_layout(tensor)):
            raise ValueError("out shares memory with an input; it must have memory of its own")


def span_bytes(tensor: torch.Tensor) -> int:
    """From a tensor's first byte to its last, 0 where it has none."""
    if tensor.numel() == 0:
        return 0
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size()


def _layout(tensor: torch.Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return tensor.element_size(), tensor.shape, tensor.stride()


@functools.lru_cache(maxsize=1024)
def _overlap(distance: int, *layouts) -> bool:
    """Whether two tensors, the first so many bytes behind the second, share a byte; each an element size in bytes,
    a shape, and strides in elements."""
    size, shape, strides, other_size, other_shape, other_strides = layouts
    middle = 2**62  # an address that nobody looks at
    memories = _Memory(middle + distance, size, shape, strides), _Memory(middle, other_size, other_shape, other_strides)
    return np.shares_memory(*memories)


class _Memory:
    """Addresses as NumPy takes them."""

    def __init__(self, address: int, size: int, shape: torch.Size, strides: tuple[int, ...]) -> None:
        self.__array_interface__ = dict(
            version=3, typestr=f"|V{size}", data=(address, False), shape=tuple(shape),
            strides=tuple(stride * size for stride in strides),
        )  # fmt: skip
