"""The operators `torch.ops.cute_sparse.attention` and `.decode`: what torch.compile and torch.export keep of a call.

A traced call becomes one opaque operator, which runs the call as it would run untraced; so does one of tensors that
have no memory of their own, as a FakeTensor. Another eager call does not go through them: PyTorch's dispatcher costs
more time than all of ours.

Both write to `out`, given or made by the traced code, and return the log-sum-exp, empty where it was not asked for.
Tile counts and skip maps are not in them: their shapes follow the kernel's tiles. A call with
`return_stats` breaks the graph and runs untraced; so does one that wants a gradient, to raise what it raises untraced.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from cute_sparse import calls, inputs

OPTIONS = (
    "float? softmax_scale, bool causal, SymInt[] window_size, float softcap, Tensor? learnable_sink, "
    "Tensor? threshold, float? threshold_number, bool return_lse"
)
_TRACER = torch._C._TorchDispatchModeKey.PROXY  # make_fx
UNPACKED = dict(cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None)


def are_asked_for(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether a call is traced, or of tensors whose class answers for what is done to them."""
    if torch.compiler.is_compiling() or torch._C._get_dispatch_mode(_TRACER) is not None:
        return True
    if type(q) is type(k) is type(v) is torch.Tensor:
        return False
    return any(inputs.has_dispatch_of_its_own(tensor) and not tensor.is_nested for tensor in (q, k, v))


def traced(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict):
    """`cute_sparse.<name>(q, k, v, **options)`, in code that is being traced."""
    given = (q, k, v, options["threshold"], options["learnable_sink"])
    trains = torch.is_grad_enabled() and any(isinstance(value, torch.Tensor) and value.requires_grad for value in given)
    if options["return_stats"] or trains:
        from cute_sparse import untraced

        return untraced.call(name, q, k, v, options)
    options = dict(options)
    out, threshold = options.pop("out"), options.pop("threshold")
    del options["return_stats"]
    if out is None:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    is_tensor = isinstance(threshold, torch.Tensor)
    options["window_size"] = [-1 if side is None else side for side in options["window_size"]]
    options["threshold"] = threshold if is_tensor else None
    options["threshold_number"] = None if is_tensor or threshold is None else float(threshold)
    if name == "decode":
        lse = torch.ops.cute_sparse.decode(q, k, v, out, **options)
    else:
        lse = torch.ops.cute_sparse.attention(q, k, v, out, **UNPACKED | options)
    return calls.AttentionOutput(out, lse, None) if options["return_lse"] else out


@torch.library.custom_op(
    "cute_sparse::attention",
    mutates_args={"out"},
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor(a!) out, {OPTIONS}, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k) -> Tensor",
)
def attention(q, k, v, out, *options):
    """`calls.attention`, or `attention_varlen` where cu_seqlens are given."""
    *options, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = options
    if cu_seqlens_q is None:
        return _run(calls.attention, q, k, v, out, options)
    packed = dict(
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k
    )
    return _run(calls.attention_varlen, q, k, v, out, options, **packed)


@torch.library.custom_op(
    "cute_sparse::decode",
    mutates_args={"out"},
    schema=f"(Tensor q, Tensor k_cache, Tensor v_cache, Tensor(a!) out, {OPTIONS}, Tensor seqused_k, "
    "Tensor? page_table, SymInt? num_splits, bool share_max) -> Tensor",
)
def decode(q, k_cache, v_cache, out, *options):
    """`calls.decode`."""
    *options, seqused_k, page_table, num_splits, share_max = options
    splits = dict(seqused_k=seqused_k, page_table=page_table, num_splits=num_splits, share_max=share_max)
    return _run(calls.decode, q, k_cache, v_cache, out, options, **splits)


def _run(call: Callable, q, k, v, out, options, **others) -> torch.Tensor:
    """The eager call of an operator's arguments; `options` are the values of OPTIONS."""
    softmax_scale, causal, window_size, softcap, learnable_sink, threshold, threshold_number, return_lse = options
    result = call(q, k, v, others | dict(
        softmax_scale=softmax_scale, causal=causal, window_size=tuple(window_size), softcap=softcap,
        learnable_sink=learnable_sink, threshold=threshold_number if threshold is None else threshold,
        out=out, return_lse=return_lse, return_stats=False,
    ))  # fmt: skip
    return result.lse if return_lse else _no_lse(q)


def _no_lse(q: torch.Tensor) -> torch.Tensor:
    return q.new_empty(0, dtype=torch.float32)


@attention.register_fake
@decode.register_fake
def _lse_shape(q, k, v, out, *options, **others) -> torch.Tensor:
    return_lse = others["return_lse"] if "return_lse" in others else options[OPTIONS.count(",")]
    if not return_lse:
        return _no_lse(q)
    *tokens, heads_q, _ = q.shape
    shape = (heads_q, *tokens) if q.dim() == 3 else (tokens[0], heads_q, tokens[1])
    return q.new_empty(shape, dtype=torch.float32)
