"""What a call must satisfy: turns tensors and options into a checked `Request`, or raises by name."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from cute_sparse import threshold as thresholds
from cute_sparse.problem import Mask, Problem, check_head_dims

DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
ALIGNMENT_BYTES = 16  # of a TMA transfer: every row starts on a multiple of it
ELEMENTS_MAX = 2**31 - 1  # reached by 32-bit element offsets


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
    _check_tensors(q, k, v, rank=3 if varlen else 4)
    if varlen:
        _check_cu_seqlens(q, k, cu_seqlens_q, cu_seqlens_k)
        batch = cu_seqlens_q.shape[0] - 1
        seqlen_q, seqlen_k = _length(max_seqlen_q, "max_seqlen_q"), _length(max_seqlen_k, "max_seqlen_k")
        total_q, total_k = q.shape[0], k.shape[0]
    else:
        batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
        total_q, total_k = batch * seqlen_q, batch * seqlen_k
    heads_q, head_dim = q.shape[-2:]
    heads_kv, head_dim_v = v.shape[-2:]
    mask, left, right = band(causal, window_size, seqlen_q, seqlen_k)
    softmax_scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    if not (softmax_scale > 0 and math.isfinite(softmax_scale)):
        raise ValueError(f"{softmax_scale=} must be positive and finite")
    if not (softcap >= 0 and math.isfinite(softcap)):
        raise ValueError(f"{softcap=} must be finite and not negative; 0 means none")
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
        sparsity=None if lambdas is None else "threshold",
        return_lse=bool(return_lse),
        return_stats=bool(return_stats),
    )
    request = Request(
        problem, q.device, batch, heads_q, heads_kv, seqlen_q, seqlen_k, total_q, total_k,
        left, right, float(softmax_scale), float(softcap), lambdas,
    )  # fmt: skip
    if out is not None:
        _check_out(out, request, q.dtype, (q, k, v))
    return request


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
    if value is None or value == -1:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{window_size=} must hold integers from 0, or None or -1 for unbounded")
    return value


def _length(value: int | None, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}={value!r} must be an integer that is not negative")
    return value


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rank: int) -> None:
    layout = "(batch, seqlen, heads, head_dim)" if rank == 4 else "(total tokens, heads, head_dim)"
    named = {"q": q, "k": k, "v": v}
    for name, tensor in named.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a torch.Tensor")
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
            f"k has shape {tuple(k.shape)}, v has {tuple(v.shape)}; all but the last dimension must be the same"
        )
    if rank == 4 and q.shape[0] != k.shape[0]:
        raise ValueError(f"q has batch {q.shape[0]}, k and v have {k.shape[0]}; they must be the same")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q has head_dim {q.shape[-1]}, k has {k.shape[-1]}; they must be the same")
    heads_q, heads_kv = q.shape[-2], k.shape[-2]
    if heads_kv == 0 or heads_q % heads_kv:
        raise ValueError(f"{heads_q=} must be a multiple of {heads_kv=}, which must be positive")
    check_head_dims(q.shape[-1], v.shape[-1])
    for name, tensor in named.items():
        _check_memory(name, tensor)


def _check_memory(name: str, tensor: torch.Tensor) -> None:
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
    if max(span, tensor.numel()) > ELEMENTS_MAX:
        raise NotImplementedError(
            f"{name} of shape {tuple(tensor.shape)} reaches over {max(span, tensor.numel())} elements; "
            f"tensors of at most 2**31 - 1 elements are supported"
        )


def _check_cu_seqlens(
    q: torch.Tensor, k: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor | None
) -> None:
    for name, cu_seqlens in {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}.items():
        if not isinstance(cu_seqlens, torch.Tensor):
            raise TypeError(f"{name} is a {type(cu_seqlens).__name__}; it must be a torch.Tensor")
        if cu_seqlens.dtype != torch.int32:
            raise ValueError(f"{name} has dtype {cu_seqlens.dtype}; it must be torch.int32")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or not cu_seqlens.is_contiguous():
            raise ValueError(
                f"{name} has shape {tuple(cu_seqlens.shape)}, strides {cu_seqlens.stride()}; it must be (batch + 1,), "
                "contiguous"
            )
        if cu_seqlens.device != q.device:
            raise ValueError(f"{name} is on {cu_seqlens.device}, q on {q.device}; they must share one device")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_q has {cu_seqlens_q.shape[0]} entries, cu_seqlens_k {cu_seqlens_k.shape[0]}; "
            "they must have batch + 1 each"
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


def _check_out(out: torch.Tensor, request: Request, dtype: torch.dtype, inputs: tuple[torch.Tensor, ...]) -> None:
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
    if any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(f"out has strides {out.stride()}; elements of it share memory")
    if out.numel() and any(out.data_ptr() == tensor.data_ptr() for tensor in inputs):
        raise ValueError("out starts at the address of q, k or v; it must have memory of its own")
