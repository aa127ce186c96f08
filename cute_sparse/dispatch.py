"""From a call to the code that computes it: which device, which kernel, whether it can, compiled once.

A call is checked once per combination of shapes, strides, types and options; the resulting plan is kept, so that a
warm call costs a dictionary look-up, the allocation of its results and one launch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch.autograd import forward_ad

from cute_sparse import compiled, inputs
from cute_sparse.operands import DECODE, PREFILL
from cute_sparse.plans import DecodeKernelPlan, DecodeReferencePlan, Kernel, PrefillKernelPlan, ReferencePlan
from cute_sparse.problem import Problem, UnsupportedProblem, check_supported
from cute_sparse.targets import EmulatedTarget, Target, capabilities, gpu_target

DEVICE_VARIABLE = "CUTE_SPARSE_DEVICE"
# Architecture -> the room with its kernels.
ROOM_OF_ARCH = {
    "sm_90a": "cute_sparse.kernels.hopper",
    "sm_100a": "cute_sparse.kernels.blackwell",
    "sm_103a": "cute_sparse.kernels.blackwell",
}
CHOOSE_OPTIONS = {"sm_103a": {"arch": "sm_103a"}}  # for the room that serves two architectures
OPERANDS = {"prefill": PREFILL, "decode": DECODE}
PLANS_MAX = 4096  # then all are forgotten; a server's shapes repeat


# ---- Plans -------------------------------------------------------------------------------------------------------

_plans: dict[tuple, object] = {}


def plan_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict
) -> ReferencePlan | PrefillKernelPlan:
    """The plan for a prefill call; `options` are those of `inputs.check_attention`. Raises what that raises."""
    return _planned("prefill", q, k, v, options)


def plan_decode(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, options: dict
) -> DecodeReferencePlan | DecodeKernelPlan:
    """The plan for a decode call; `options` are those of `inputs.check_decode`. Raises what that raises."""
    return _planned("decode", q, k_cache, v_cache, options)


def _planned(kind: str, q, k, v, options: dict):
    """The plan kept for such tensors and options, or a new one."""
    out = options["out"]
    try:
        key = (
            kind, _identity(q), _identity(k), _identity(v), torch.is_grad_enabled(), _emulation, *options,
            type(q), type(k), type(v), forward_ad._current_level,
            *map(type, options.values()),  # True == 1 == 1.0
            *[_identity(value) if isinstance(value, torch.Tensor) else value for value in options.values()],
        )  # fmt: skip
        plan = _plans.get(key)
    # Not tensors, not dense ones, or not hashable: the check says what is wrong, if anything.
    except (TypeError, AttributeError, RuntimeError):
        key = plan = None
    if plan is None:
        plan = _make_plan(kind, q, k, v, options)
        plan.spans = () if out is None else tuple(inputs.span_bytes(tensor) for tensor in (out, q, k, v))
        if key is not None:
            if len(_plans) >= PLANS_MAX:
                _plans.clear()
            _plans[key] = plan
    if out is not None:
        inputs.check_out_apart(out, (q, k, v), plan.spans)
    return plan


def _identity(tensor: torch.Tensor) -> tuple:
    """All that a check reads of a tensor, except the values of CPU tensors, which a plan checks at each run."""
    return (
        tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % 16, tensor.requires_grad,
    )  # fmt: skip


def _make_plan(kind: str, q, k, v, options: dict):
    check, on_reference, on_kernel = {
        "prefill": (inputs.check_attention, ReferencePlan, PrefillKernelPlan),
        "decode": (inputs.check_decode, DecodeReferencePlan, DecodeKernelPlan),
    }[kind]
    for name, value in options.items():
        if isinstance(value, torch.Tensor):
            inputs.check_in_memory(name, value)
    request = check(q, k, v, **options)
    target = _target(request.device)
    if request.threshold is not None:
        # A plan lives long and may serve other tensors: it keeps the threshold's form, not the tensor.
        request = replace(request, threshold=request.threshold._replace(tensor=None))
    if target is None:
        return on_reference(request)
    return on_kernel(request, target, compiled_kernel(request.problem, target))


# ---- Where it runs -----------------------------------------------------------------------------------------------


def _target(device: torch.device) -> Target | None:
    """Where tensors of `device` are computed; None for the reference."""
    if device.type == "cuda":
        return gpu_target(torch.cuda.current_device() if device.index is None else device.index)
    if device.type != "cpu":
        raise RuntimeError(f"no kernel runs on device {device}; supported are cuda ({capabilities()}) and cpu")
    if _emulation is None:
        _emulate_as_the_environment_says()
    return _emulation


_emulation: EmulatedTarget | None = None
_environment_devices = contextlib.ExitStack()  # left when the process ends


@contextlib.contextmanager
def emulated(arch: str, **options) -> Iterator:
    """Within it, CPU tensors run through the kernels of `arch`, in the emulator; yields the emulated device.

    arch     "sm_90a", "sm_100a" or "sm_103a"
    options  of `cute_sparse.emulator.device`: order, seed, sms and so on
    """
    global _emulation
    emulator = importlib.import_module("cute_sparse.emulator")
    before = _emulation
    with emulator.device(arch, **options) as device:
        _emulation = EmulatedTarget(arch, device)
        try:
            yield device
        finally:
            _emulation = before
            _plans.clear()  # some were made for this device


@functools.cache
def _emulate_as_the_environment_says() -> None:
    wanted = os.environ.get(DEVICE_VARIABLE)
    if not wanted:
        return
    kind, _, arch = wanted.partition(":")
    if kind != "emulated" or arch not in ROOM_OF_ARCH:
        choices = ", ".join(f"emulated:{arch}" for arch in ROOM_OF_ARCH)
        raise ValueError(f"{DEVICE_VARIABLE}={wanted!r} must be one of {choices}")
    _environment_devices.enter_context(emulated(arch))


# ---- Kernels -----------------------------------------------------------------------------------------------------


def compiled_kernel(problem: Problem, target: Target) -> Kernel:
    """The kernel of the target's architecture for `problem`: from memory, from disk, or compiled now."""
    config, compile = chosen_kernel(problem, target.arch)
    operands = OPERANDS[problem.kind]
    return Kernel(config, compiled.launcher(problem, config, target.arch, compile, operands, target.emulated))


def chosen_kernel(problem: Problem, arch: str) -> tuple[object, Callable]:
    """(config, compile function) for `problem`, or UnsupportedProblem."""
    kernel = _kernel_module(problem.kind, arch)
    if kernel is None:
        others = ", ".join(name for name in ROOM_OF_ARCH if _kernel_module(problem.kind, name)) or "no architecture"
        raise UnsupportedProblem(f"there is no {problem.kind} kernel for {arch}; there is one for {others}")
    check_supported(problem, kernel.SUPPORTS, arch)
    config = "config" if problem.kind == "prefill" else f"{problem.kind}_config"
    chosen = importlib.import_module(f"{ROOM_OF_ARCH[arch]}.{config}").choose(problem, **CHOOSE_OPTIONS.get(arch, {}))
    return chosen, kernel.compile


def _kernel_module(kind: str, arch: str):
    """The module of an architecture's kernel of this kind, None where there is none."""
    name = f"{ROOM_OF_ARCH[arch]}.{kind}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def warmup(
    *,
    kind: str = "prefill",
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    head_dim_v: int | None = None,
    causal: bool | None = None,
    window: bool = False,
    varlen: bool = False,
    softcap: bool = False,
    sink: bool = False,
    threshold: bool = False,
    return_lse: bool = False,
    return_stats: bool = False,
    page_size: int = 0,
    share_max: bool = False,
    device: torch.device | str | None = None,
    arch: str | None = None,
) -> None:
    """Compile, ahead of the first call, the kernel of calls of this kind; sizes do not matter.

    kind            "prefill" for `attention` and `attention_varlen`, "decode" for `decode`
    head_dim_v      None: head_dim
    causal          None: the default of such a call, true only for decode
    page_size       of decode over a paged cache; 0: a cache for each sequence
    share_max       of decode
    window, softcap, sink, threshold, varlen  whether calls will have one, or be packed; causal together with window
                    is a window that ends at the diagonal
    device          compile for this CUDA device, and load (before a CUDA graph is captured, this must have been
                    done); None: the current one
    arch            compile for "sm_90a", "sm_100a" or "sm_103a" into the disk cache alone, on a machine with any GPU
                    or none (but with the same CPU: the host part is native code)
    """
    inputs.check_flags(
        window=window, varlen=varlen, softcap=softcap, sink=sink, threshold=threshold, return_lse=return_lse,
        return_stats=return_stats, share_max=share_max, **{} if causal is None else {"causal": causal},
    )  # fmt: skip
    if dtype not in inputs.DTYPE_NAMES:
        raise NotImplementedError(f"{dtype=} is not supported; supported are {', '.join(map(str, inputs.DTYPE_NAMES))}")
    if device is not None and arch is not None:
        raise ValueError(f"give {device=} or {arch=}, not both")
    if kind not in OPERANDS:
        raise ValueError(f"{kind=} must be one of {', '.join(OPERANDS)}")
    if kind == "decode" and varlen:
        raise ValueError("varlen is for attention_varlen; decode takes lengths of its own for every sequence")
    causal = kind == "decode" if causal is None else causal
    problem = Problem(
        kind=kind,
        dtype=inputs.DTYPE_NAMES[dtype],
        head_dim=head_dim,
        head_dim_v=head_dim if head_dim_v is None else head_dim_v,
        mask="band" if window else "causal" if causal else "full",
        varlen=varlen,
        softcap=softcap,
        sink=sink,
        sparsity="threshold" if threshold else None,
        return_lse=return_lse,
        return_stats=return_stats,
        page_size=page_size,
        share_max=share_max,
    )
    if arch is not None:
        if arch not in ROOM_OF_ARCH:
            raise ValueError(f"{arch=} must be one of {', '.join(ROOM_OF_ARCH)}")
        config, compile = chosen_kernel(problem, arch)
        compiled.compile_to_disk(problem, config, arch, compile)
        return
    if device is None and not torch.cuda.is_available():
        raise RuntimeError(f"there is no CUDA device; to compile ahead for one, give arch= ({', '.join(ROOM_OF_ARCH)})")
    target = _target(torch.device("cuda" if device is None else device))
    if target is None:
        raise ValueError(f"{device=} runs the reference, which is not compiled; give a CUDA device or arch=")
    compiled_kernel(problem, target)


def has_kernel(kind: str, arch: str) -> bool:
    """Whether the architecture has a kernel of this kind, "prefill" or "decode"."""
    return _kernel_module(kind, arch) is not None


def support_matrix(kind: str = "prefill") -> dict[str, frozenset[str]]:
    """What each architecture's kernel of this kind declares to support, as `problem.required` names features."""
    modules = {arch: _kernel_module(kind, arch) for arch in ROOM_OF_ARCH}
    return {arch: module.SUPPORTS if module else frozenset() for arch, module in modules.items()}
