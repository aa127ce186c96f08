"""The threshold lambda: the forms it can take, where it comes from, and its conversion to log2.

lambda is final: a KV tile is skipped where every row's tile maximum lies more than -ln(lambda) below its running
maximum, so every skipped key has a softmax weight below lambda. It lies in (0, 1]; above 1, tiles that hold a
new maximum would be dropped (BLASST, arXiv 2512.12087).
"""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple

import torch

EXPONENT_MAX = 300.0  # of a threshold model's b: exp(b) is a finite double
FORMS = "None, a number, or an fp32 tensor of shape (batch,), (heads_q,), (batch, heads_q), (batch, 1) or (1, heads_q)"


class Threshold(NamedTuple):
    """A threshold as the kernels take it: a scalar in log2, or a tensor of lambdas with its strides in elements."""

    log2: float
    tensor: torch.Tensor | None = None
    stride_batch: int = 0
    stride_head: int = 0


def resolve(
    threshold: float | torch.Tensor | None, batch: int, heads_q: int, device: torch.device
) -> Threshold | None:
    """Check a threshold given by a user and bring it into the kernels' form; None stays None, the dense kernel.

    A 1-D tensor whose length is both the batch and the number of heads could mean either and is refused: pass
    (batch, 1) or (1, heads_q). The values of a CUDA tensor are not read, because that would wait for the device;
    there the kernels take a lambda above 1 as 1, and never skip for one that is NaN or not positive.
    Raises TypeError for another kind of object, ValueError for a wrong value, shape, dtype or device.
    """
    if threshold is None:
        return None
    if isinstance(threshold, torch.Tensor):
        return _resolve_tensor(threshold, batch, heads_q, device)
    if isinstance(threshold, bool) or not isinstance(threshold, numbers.Real):
        raise TypeError(f"threshold is a {type(threshold).__name__}; it must be {FORMS}")
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"{threshold=} must be in (0, 1]")
    return Threshold(math.log2(threshold))


def _resolve_tensor(threshold: torch.Tensor, batch: int, heads_q: int, device: torch.device) -> Threshold:
    if threshold.dtype != torch.float32:
        raise ValueError(f"threshold tensor has dtype {threshold.dtype}; it must be torch.float32")
    if threshold.device != device:
        raise ValueError(f"threshold tensor is on {threshold.device}, q on {device}; they must share one device")
    if threshold.requires_grad:
        raise NotImplementedError("threshold requires grad; gradients with respect to the threshold do not exist")
    strides = _strides(threshold, batch, heads_q)
    check_values(threshold)
    return Threshold(0.0, threshold, *strides)


def check_values(threshold: torch.Tensor) -> None:
    """Raise ValueError for a tensor in CPU memory with an element outside (0, 1]; on another device, do nothing."""
    if threshold.device.type == "cpu" and not bool(((threshold > 0) & (threshold <= 1)).all()):
        raise ValueError(f"the threshold tensor holds {_offender(threshold)}; every element must be in (0, 1]")


def _strides(threshold: torch.Tensor, batch: int, heads_q: int) -> tuple[int, int]:
    """(stride per batch entry, stride per head) in elements, 0 along a broadcast axis."""
    shape, strides = tuple(threshold.shape), threshold.stride()
    if len(shape) == 1 and shape[0] in (batch, heads_q):
        if batch == heads_q != 1:
            raise ValueError(
                f"a threshold of shape {shape} is ambiguous where batch and heads_q are both {batch}; "
                f"pass shape ({batch}, 1) for one lambda per sequence or (1, {heads_q}) for one per head"
            )
        return (strides[0], 0) if shape[0] == batch else (0, strides[0])
    if len(shape) == 2 and shape[0] in (1, batch) and shape[1] in (1, heads_q):
        return (strides[0] if shape[0] > 1 else 0, strides[1] if shape[1] > 1 else 0)
    raise ValueError(f"threshold tensor has shape {shape} for {batch=}, {heads_q=}; it must be {FORMS}")


def _offender(threshold: torch.Tensor) -> float:
    return threshold[~((threshold > 0) & (threshold <= 1))][0].item()


def threshold_from_scale_factor(
    scale_factor: float | torch.Tensor, seqlen_k: int | torch.Tensor
) -> float | torch.Tensor:
    """lambda = min(scale_factor / seqlen_k, 1): a factor that holds over context lengths.

    scale_factor  positive; a number, or a tensor that broadcasts with seqlen_k
    seqlen_k      keys per sequence, never the batch's maximum; an int, or an integer tensor (batch,), for instance
                  cu_seqlens_k.diff(). For lambdas per sequence and head pass seqlen_k as (batch, 1).
    Returns a float where both are numbers, else an fp32 tensor on their device (computed there, without a wait).
    The clamp matters: a factor tuned for long contexts exceeds 1 on short prompts, where it would drop
    the very tiles that hold the maximum.
    """
    if not isinstance(scale_factor, torch.Tensor) and not (scale_factor > 0 and math.isfinite(scale_factor)):
        raise ValueError(f"{scale_factor=} must be positive and finite")
    if not isinstance(seqlen_k, torch.Tensor) and seqlen_k < 0:
        raise ValueError(f"{seqlen_k=} must not be negative")
    if isinstance(scale_factor, torch.Tensor) or isinstance(seqlen_k, torch.Tensor):
        return (scale_factor / seqlen_k).to(torch.float32).clamp(max=1.0)
    return min(scale_factor / seqlen_k, 1.0) if seqlen_k else 1.0


def threshold_from_model(
    a: float, b: float, target_sparsity: float, seqlen_k: int | torch.Tensor
) -> float | torch.Tensor:
    """lambda = min(a * exp(b * target_sparsity) / seqlen_k, 1), the calibrated model of BLASST and Model Optimizer.

    a, b             fitted on one model, apart for prefill and decode (Qwen3-30B-A3B-2507: prefill 7.93 and 8.61)
    target_sparsity  fraction of visited tiles to skip, in [0, 1]
    seqlen_k         keys per sequence, as in `threshold_from_scale_factor`
    """
    if not 0.0 <= target_sparsity <= 1.0:
        raise ValueError(f"{target_sparsity=} must be in [0, 1]")
    if not (a > 0 and math.isfinite(a) and abs(b) <= EXPONENT_MAX):
        raise ValueError(f"{a=} must be positive and finite, {b=} must lie within +-{EXPONENT_MAX:g}")
    return threshold_from_scale_factor(a * math.exp(b * target_sparsity), seqlen_k)
