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
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from cute_sparse import compiled, inputs, reference, splits, threshold
from cute_sparse.inputs import DecodeRequest, Request
from cute_sparse.launch import Launcher
from cute_sparse.operands import DECODE, PREFILL, Operand
from cute_sparse.problem import Problem, UnsupportedProblem, check_supported

DEVICE_VARIABLE = "CUTE_SPARSE_DEVICE"
# Capability -> architecture to compile for; architecture -> the room with its kernels.
ARCH_OF_CAPABILITY = {(9, 0): "sm_90a", (10, 0): "sm_100a", (10, 3): "sm_103a"}
ROOM_OF_ARCH = {
    "sm_90a": "cute_sparse.kernels.hopper",
    "sm_100a": "cute_sparse.kernels.blackwell",
    "sm_103a": "cute_sparse.kernels.blackwell",
}
CHOOSE_OPTIONS = {"sm_103a": {"arch": "sm_103a"}}  # for the room that serves two architectures
PLANS_MAX = 4096  # then all are forgotten; a server's shapes repeat



def _pointers(operands: tuple[Operand, ...]) -> tuple[str, ...]:
    names = tuple(operand.name for operand in operands if operand.type == "pointer")
    assert names == tuple(operand.name for operand in operands[: len(names)])
    return names


OPERANDS = {"prefill": PREFILL, "decode": DECODE}
PREFILL_POINTERS, DECODE_POINTERS = _pointers(PREFILL), _pointers(DECODE)


class Result(NamedTuple):
    """lse, tile_counts and skip_map are None where the problem does not ask for them."""

    out: torch.Tensor
    lse: torch.Tensor | None
    tile_counts: torch.Tensor | None
    skip_map: torch.Tensor | None


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
    request = check(q, k, v, **options)
    target = _target(request.device)
    if request.threshold is not None:
        # A plan lives long and may serve other tensors: it keeps the threshold's form, not the tensor.
        request = replace(request, threshold=request.threshold._replace(tensor=None))
    return on_reference(request) if target is None else on_kernel(request, target)


_in_the_types_asked_for = torch.autocast("cpu", enabled=False)  # kernels do not heed a caller's autocast either


class ReferencePlan:
    """The oracle on the CPU, in float32, with Hopper's tiles for head dim 128."""

    geometry = reference.DEFAULT_GEOMETRY

    def __init__(self, request: Request) -> None:
        self.request = request

    @_in_the_types_asked_for
    def run(self, q, k, v, out, given_threshold, sink, cu_seqlens_q, cu_seqlens_k) -> Result:
        request, problem = self.request, self.request.problem
        options = _reference_options(request, q, given_threshold, sink, self.geometry)
        if problem.varlen:
            _check_varlen_values(request, cu_seqlens_q, cu_seqlens_k)
            options |= dict(cu_seqlens_q=cu_seqlens_q.tolist(), cu_seqlens_k=cu_seqlens_k.tolist())
            options |= dict(max_seqlen_q=request.seqlen_q, max_seqlen_k=request.seqlen_k)
            computed = reference.attention_varlen(q, k, v, **options)
        else:
            computed = reference.attention(q, k, v, **options)
        return _reference_result(computed, problem, q, out)


def _reference_options(request: Request | DecodeRequest, q, given_threshold, sink, geometry) -> dict:
    """What `reference.attention` and `reference.decode` are given alike."""
    problem = request.problem
    lambdas = None
    if isinstance(given_threshold, torch.Tensor):
        threshold.check_values(given_threshold)
        form = request.threshold
        lambdas = given_threshold.as_strided((request.batch, request.heads_q), (form.stride_batch, form.stride_head))
    elif given_threshold is not None:
        lambdas = q.new_full((request.batch, request.heads_q), float(given_threshold), dtype=torch.float64)
    return dict(
        softmax_scale=request.softmax_scale,
        window_left=request.window_left if problem.mask == "band" else None,
        window_right=None if problem.mask == "full" else request.window_right,
        softcap=request.softcap,
        threshold=lambdas,
        sink=sink,
        geometry=geometry,
        dtype=torch.float32,
    )


def _reference_result(computed, problem: Problem, q: torch.Tensor, out: torch.Tensor | None) -> Result:
    out = computed.out.to(q.dtype) if out is None else out.copy_(computed.out)
    lse = computed.lse.float() if problem.return_lse else None
    if not problem.return_stats:
        return Result(out, lse, None, None)
    return Result(out, lse, computed.tile_counts, computed.skip_map)


class DecodeReferencePlan:
    """The oracle on the CPU, in float32, with Hopper's tiles for head dim 128; not split unless `num_splits` says so.

    With share_max, the splits of an item run one after the other.
    """

    geometry = reference.DECODE_GEOMETRY

    def __init__(self, request: DecodeRequest) -> None:
        self.request = request
        self.splitting = dict(num_splits=request.num_splits, ctas=1, min_tiles=1)

    @_in_the_types_asked_for
    def run(self, q, k_cache, v_cache, out, given_threshold, sink, seqused_k, page_table) -> Result:
        request = self.request
        inputs.check_decode_values(request, seqused_k, page_table)
        computed = reference.decode(
            q, k_cache, v_cache,
            seqused_k=seqused_k.tolist(), page_table=page_table, share_max=request.problem.share_max,
            **self.splitting, **_reference_options(request, q, given_threshold, sink, self.geometry),
        )  # fmt: skip
        return _reference_result(computed, request.problem, q, out)


def _check_varlen_values(request: Request, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor) -> None:
    inputs.check_cu_seqlens_values(
        cu_seqlens_q, cu_seqlens_k, request.total_q, request.total_k, request.seqlen_q, request.seqlen_k
    )


class KernelPlan:
    """A compiled kernel with every operand but the addresses filled in; one of the two kinds below."""

    pointers: tuple[str, ...]  # the kernel's operands that are addresses, by name
    operands: tuple[Operand, ...]  # all of them

    def __init__(self, request: Request | DecodeRequest, target: Target, heads: int, map_shape: Callable) -> None:
        """heads: those that decide apart; map_shape: from the geometry, of the skip map behind (batch, heads)."""
        self.request = request
        self.target = target
        self.config, self.launcher = compiled_kernel(request.problem, target)
        self.geometry = self.config.geometry
        self.counts_shape = (2, request.batch, heads)
        self.map_shape = (request.batch, heads, *map_shape(self.geometry))
        self.out_shape, self.lse_shape = request.out_shape, request.lse_shape
        self.return_lse, self.return_stats = request.problem.return_lse, request.problem.return_stats
        self.values_are_near = request.device.type == "cpu"  # in the emulator
        self._constants: tuple[int | float, ...] | None = None

    def run(self, q, k, v, out, given_threshold, sink, *sequences) -> Result:
        """`sequences` are the tensors that tell each sequence's place, as the kind of call has them, or None."""
        threshold_tensor = given_threshold if isinstance(given_threshold, torch.Tensor) else None
        if self.values_are_near:
            self._check_values(*sequences)
            if threshold_tensor is not None:
                threshold.check_values(threshold_tensor)
        if out is None:
            out = q.new_empty(self.out_shape)
        else:
            increment_version(out)  # as PyTorch's own operators do, for autograd to notice the change
        lse = q.new_empty(self.lse_shape, dtype=torch.float32) if self.return_lse else None
        tile_counts = skip_map = None
        if self.return_stats:
            tile_counts = q.new_zeros(self.counts_shape, dtype=torch.int32)
            skip_map = q.new_zeros(self.map_shape, dtype=torch.uint8)
        if self.nothing_to_write:
            pass
        elif self.nothing_to_read:
            out.zero_()
            if lse is not None:
                lse.copy_(sink[:, None]) if self.request.problem.sink else lse.fill_(-torch.inf)
        else:
            self._launch((q, k, v, out, lse, threshold_tensor, sink, *sequences, tile_counts, skip_map))
        return Result(out, lse, tile_counts, skip_map)

    def _launch(self, tensors: tuple[torch.Tensor | None, ...]) -> None:
        """Launch with the tensors that the caller sees; the plan adds those for the kernel alone."""
        if self._constants is None:  # the same at every run: strides are part of what a plan is made for
            values = self._common_values(*tensors[:4]) | self._values(tensors)
            self._constants = tuple(values[operand.name] for operand in self.operands[len(self.pointers) :])
        tensors += self._scratch(tensors[0])
        target = self.target
        with target.ready(self.pointers, tensors):
            stream = target.stream()
            counters = self._counters(target.zeroed(stream, self.zeroed_bytes).data_ptr())
            addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
            self.launcher((*addresses, *counters, *self._constants), stream)

    def _common_values(self, q, k, v, out) -> dict[str, int | float]:
        """The operands that both kinds of kernel have, by name; only the strides need the tensors."""
        request, form = self.request, self.request.threshold
        names = "batch heads_q heads_kv seqlen_q window_left window_right softmax_scale softcap"
        values = {name: getattr(request, name) for name in names.split()}
        for name, tensor in {"q": q, "k": k, "v": v, "out": out}.items():
            values[f"{name}_stride_seq"], values[f"{name}_stride_head"] = _stride(tensor, -3), _stride(tensor, -2)
        return values | {
            "threshold_stride_batch": form.stride_batch if form else 0,
            "threshold_stride_head": form.stride_head if form else 0,
            "threshold_log2": form.log2 if form else 0.0,
            "map_rows": self.map_shape[2],
            "map_cols": self.map_shape[3],
        }


class PrefillKernelPlan(KernelPlan):
    pointers, operands = PREFILL_POINTERS, PREFILL
    zeroed_bytes = 8  # the scheduler's counter of work tiles, and of CTAs that are done

    def __init__(self, request: Request, target: Target) -> None:
        def map_shape(geometry):
            return -(-request.seqlen_q // geometry.tile_rows), -(-request.seqlen_k // geometry.tile_n)

        super().__init__(request, target, request.heads_q, map_shape)
        self.nothing_to_read = request.batch == 0 or request.total_k == 0 or request.seqlen_k == 0
        self.nothing_to_write = 0 in self.out_shape or request.seqlen_q == 0

    def _check_values(self, cu_seqlens_q, cu_seqlens_k) -> None:
        if cu_seqlens_q is not None:
            _check_varlen_values(self.request, cu_seqlens_q, cu_seqlens_k)

    def _scratch(self, q: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ()

    def _counters(self, address: int) -> tuple[int, ...]:
        return (address,)

    def _values(self, tensors: tuple[torch.Tensor | None, ...]) -> dict[str, int]:
        values = {name: getattr(self.request, name) for name in ("seqlen_k", "total_q", "total_k")}
        for name, tensor in zip("q k v out".split(), tensors, strict=False):
            values[f"{name}_stride_batch"] = 0 if self.request.problem.varlen else _stride(tensor, 0)
        return values


class DecodeKernelPlan(KernelPlan):
    """Nothing here depends on lengths.

    splitting  how the tiles of a call are cut, as `splits.item_cuts` takes it
    """

    pointers, operands = DECODE_POINTERS, DECODE
    SHARED_MAX_ALIGN_BYTES = 128  # of shared_max behind arrivals: a cache line of its own

    def __init__(self, request: DecodeRequest, target: Target) -> None:
        def map_shape(geometry):
            return -(-request.rows // geometry.tile_rows), -(-request.capacity // geometry.tile_n)

        super().__init__(request, target, request.heads_kv, map_shape)
        problem = request.problem
        row_blocks, map_cols = self.map_shape[2:]
        self.nothing_to_write = 0 in self.out_shape
        self.nothing_to_read = request.capacity == 0 or request.blocks == 0
        items = request.batch * request.heads_kv * row_blocks
        # An item has at most map_cols tiles, and so at most as many parts.
        self.num_splits = min(request.num_splits, max(map_cols, 1))
        self.splitting = dict(num_splits=self.num_splits, ctas=target.sms, min_tiles=self.config.min_tiles)
        self.slot_rows = min(request.rows, self.geometry.tile_rows)
        self.partial_slots = splits.partial_slots(items, target.sms, self.num_splits)
        self.partials_shape = (self.partial_slots * self.slot_rows * (problem.head_dim_v + 2),)
        partial_bytes = 4 * self.partials_shape[0]
        if partial_bytes > splits.PARTIAL_BYTES_MAX:
            raise ValueError(
                f"num_splits={request.num_splits} of {items} blocks of rows takes {partial_bytes} bytes of partial "
                f"results, more than the {splits.PARTIAL_BYTES_MAX} allowed; num_splits=None takes no more of them "
                "than two for each SM"
            )
        arrivals_bytes = 4 * items
        self.shared_max_offset = -(-arrivals_bytes // self.SHARED_MAX_ALIGN_BYTES) * self.SHARED_MAX_ALIGN_BYTES
        self.zeroed_bytes = arrivals_bytes
        if problem.share_max:
            self.zeroed_bytes = self.shared_max_offset + 4 * items * self.slot_rows

    def _check_values(self, seqused_k, page_table) -> None:
        inputs.check_decode_values(self.request, seqused_k, page_table)

    def _scratch(self, q: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (q.new_empty(self.partials_shape, dtype=torch.float32),)

    def _counters(self, address: int) -> tuple[int, ...]:
        """arrivals, shared_max"""
        return address, address + self.shared_max_offset if self.request.problem.share_max else 0

    def _values(self, tensors: tuple[torch.Tensor | None, ...]) -> dict[str, int]:
        q, k, v, out = tensors[:4]
        page_table = tensors[self.pointers.index("page_table")]
        return {
            "capacity": self.request.capacity,
            "blocks": self.request.blocks,
            "page_table_stride": 0 if page_table is None else page_table.stride(0),
            "partial_slots": self.partial_slots,
            "slot_rows": self.slot_rows,
            "num_splits": self.num_splits,
            "ctas": self.target.sms,
            "q_stride_batch": _stride(q, 0),
            "k_stride_block": _stride(k, 0),
            "v_stride_block": _stride(v, 0),
            "out_stride_batch": _stride(out, 0),
        }


def _stride(tensor: torch.Tensor, dim: int) -> int:
    """In elements. That of a dimension of size 1 means nothing and may be anything: TMA wants a multiple of 16 bytes,
    as every row's length is one."""
    return tensor.stride(dim) if tensor.shape[dim] > 1 else tensor.shape[-1]


# ---- Where it runs -----------------------------------------------------------------------------------------------


class GpuTarget:
    """One CUDA device; launches go to PyTorch's current stream of it."""

    def __init__(self, index: int, arch: str) -> None:
        self.index, self.arch = index, arch
        self.emulated = _emulator_plays_cuda()
        self.sms = torch.cuda.get_device_properties(index).multi_processor_count
        self._memory = ZeroedMemory(torch.device("cuda", index))

    @contextlib.contextmanager
    def _switched(self) -> Iterator[None]:
        with torch.cuda.device(self.index):
            yield

    def ready(self, names, tensors) -> contextlib.AbstractContextManager:
        return _NOTHING if torch.cuda.current_device() == self.index else self._switched()

    def stream(self) -> int:
        return torch._C._cuda_getCurrentRawStream(self.index)

    def zeroed(self, stream: int, size_bytes: int) -> torch.Tensor:
        return self._memory.of(stream, size_bytes, torch.cuda.is_current_stream_capturing())


class EmulatedTarget:
    """The emulated device; one stream, CPU tensors."""

    emulated = True

    def __init__(self, arch: str, device) -> None:
        self.arch, self.device = arch, device
        self.sms = device.sms
        self._memory = ZeroedMemory(torch.device("cpu"))

    @contextlib.contextmanager
    def ready(self, names, tensors) -> Iterator[None]:
        for name, tensor in zip(names, tensors, strict=False):
            if tensor is not None:
                self.device.register(tensor, name)
        try:
            try:
                yield
            finally:
                self.device.raise_pending()  # what the emulator found wrong, rather than its error code
        except BaseException:
            self._memory.of_stream.clear()  # a launch that was stopped half way has not left its counters zero
            raise

    def stream(self) -> int:
        return 0

    def zeroed(self, stream: int, size_bytes: int) -> torch.Tensor:
        memory = self._memory.of(stream, size_bytes, capturing=False)
        self.device.register(memory, "counters between CTAs")
        return memory


Target = GpuTarget | EmulatedTarget
_NOTHING = contextlib.nullcontext()


class ZeroedMemory:
    """Memory through which the CTAs of a launch coordinate: zero before a launch, which leaves it zero.

    Launches on one stream run one after the other and share it; other streams have their own. A launch that is being
    captured gets memory of its own from the graph's pool, zeroed by the graph: graphs that were captured on one stream
    may replay at once, and also beside launches on that stream.
    """

    STREAMS_MAX = 1024
    LEAST_BYTES = 4096

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.of_stream: dict[int, torch.Tensor] = {}

    def of(self, stream: int, size_bytes: int, capturing: bool) -> torch.Tensor:
        """At least as many bytes, for a launch on this stream, which must be the current one."""
        if capturing:
            return self._zeros(size_bytes)
        memory = self.of_stream.get(stream)
        if memory is None or memory.numel() * 4 < size_bytes:
            if memory is None and len(self.of_stream) >= self.STREAMS_MAX:
                raise RuntimeError(f"kernels were launched on more than {self.STREAMS_MAX} CUDA streams of one device")
            # The smaller one goes back to the allocator, which gives it to later work of this stream.
            memory = self.of_stream[stream] = self._zeros(max(self.LEAST_BYTES, 1 << (size_bytes - 1).bit_length()))
        return memory

    def _zeros(self, size_bytes: int) -> torch.Tensor:
        return torch.zeros(-(-size_bytes // 4), dtype=torch.int32, device=self.device)


def _target(device: torch.device) -> Target | None:
    """Where tensors of `device` are computed; None for the reference."""
    if device.type == "cuda":
        return _gpu_target(torch.cuda.current_device() if device.index is None else device.index)
    if device.type != "cpu":
        raise RuntimeError(f"no kernel runs on device {device}; supported are cuda ({_capabilities()}) and cpu")
    if _emulation is None:
        _emulate_as_the_environment_says()
    return _emulation


@functools.cache
def _gpu_target(index: int) -> GpuTarget:
    capability = torch.cuda.get_device_capability(index)
    if capability not in ARCH_OF_CAPABILITY:
        raise RuntimeError(
            f"cuda:{index} ({torch.cuda.get_device_name(index)}) has compute capability {capability[0]}."
            f"{capability[1]}; there are kernels for {_capabilities()}"
        )
    return GpuTarget(index, ARCH_OF_CAPABILITY[capability])


def _emulator_plays_cuda() -> bool:
    """Whether torch's "cuda" device is the emulated one: python -m cute_sparse.emulator script.py."""
    emulator = sys.modules.get("cute_sparse.emulator")
    device = emulator.entered() if emulator is not None else None
    return device is not None and device.torch_cuda


def _capabilities() -> str:
    return ", ".join(f"{major}.{minor} ({arch})" for (major, minor), arch in ARCH_OF_CAPABILITY.items())


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


class Kernel(NamedTuple):
    config: object
    launcher: Launcher


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
