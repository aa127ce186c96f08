"""torch's "cuda" device, played by the emulated one: for scripts that know nothing of the emulator.

A "cuda" tensor is a CPU tensor whose storage bears a mark. A TorchFunctionMode answers what a script asks of a tensor
(device, is_cuda, to, cpu, ...) and takes "cuda" out of factory calls; a TorchDispatchMode below it hands the mark
from operands to results. torch.cuda's public functions answer for the emulated device. Tensors without the mark stay
CPU tensors, so that a script which hands one to a kernel is told so, as on a GPU.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from cute_sparse.emulator import memory
from cute_sparse.emulator.devices import ARCHES, Device
from cute_sparse.emulator.memory import is_marked
from cute_sparse.emulator.patches import Patches

CUDA = torch.device("cuda", 0)
NAMES = {arch: f"Emulated {arch}" for arch in ARCHES}
MEMORY_BYTES = 80 << 30  # what get_device_properties and mem_get_info say; the host's memory is the true limit


def install(device: Device, patches: Patches) -> None:
    """Makes torch's "cuda" device the emulated one until `patches` are restored, where the device is to be that."""
    if not device.torch_cuda:
        return
    _torch_cuda_module(device, patches)
    _driver_bindings(patches)
    _autograd(patches)
    modes = contextlib.ExitStack()
    modes.enter_context(_modes_on())
    patches.on_restore(modes.close)


@contextlib.contextmanager
def _modes_on() -> Iterator[None]:
    """Script code runs in this: a mode is off while it handles something, and script code may be called from there."""
    with contextlib.ExitStack() as stack:
        if not any(isinstance(mode, _Marks) for mode in _get_current_dispatch_mode_stack()):
            stack.enter_context(_Marks())
        if not any(isinstance(mode, _CudaTensors) for mode in _get_current_function_mode_stack()):
            stack.enter_context(_CudaTensors())
        yield


# --- marks ---------------------------------------------------------------------------------------------------------


def mark(value: Any, cuda: bool = True) -> Any:
    """Sets or removes the mark of every tensor in an operator's result; returns the result."""
    for tensor in _tensors(value):
        with torch._C.DisableTorchFunction():
            if memory.is_plain(tensor):
                tensor.untyped_storage()._emulated_cuda = cuda
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _is_cuda(device: Any) -> bool:
    return device is not None and not isinstance(device, int) and torch.device(device).type == "cuda"


class _Marks(TorchDispatchMode):
    """An operator with a marked operand has marked results."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        cuda = _is_cuda(kwargs.get("device"))  # from factory calls in Python code that the function mode did not see
        if cuda:
            kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        cuda = cuda or any(map(is_marked, _tensors([*args, *kwargs.values()])))
        is_torchs_own = func.namespace in ("aten", "prim", "prims")
        result = func(*args, **kwargs) if is_torchs_own else _run_custom_operator(func, args, kwargs, cuda)
        return mark(result) if cuda else result


def _run_custom_operator(func: Any, args: tuple, kwargs: dict, cuda: bool) -> Any:
    """An operator of torch.library: by its kernel for the device that the script means."""
    definition = OPDEFS.get(func.name().partition(".")[0])
    if definition is not None:  # made by torch.library.custom_op: Python code of the script
        body = definition._backend_fns.get("cuda" if cuda else "cpu") or definition._backend_fns.get(None)
        if body is not None:
            with _modes_on():
                return body(*args, **kwargs)
    if cuda and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CUDA"):
        return func._op_dk(torch._C.DispatchKey.CUDA, *args, **kwargs)
    return func(*args, **kwargs)


# --- tensors -------------------------------------------------------------------------------------------------------


class _CudaTensors(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        answer = ANSWERS.get(func)
        if answer is not None:
            return answer(*args, **kwargs)
        device = kwargs.get("device")
        if device is None or isinstance(device, int):
            return func(*args, **kwargs)
        cuda = _is_cuda(device)
        if cuda:
            _require_first_device(device)
            kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return mark(func(*args, **kwargs), cuda)


def _require_first_device(device: Any) -> None:
    index = torch.device(device).index
    if index not in (None, 0):
        raise RuntimeError(f"CUDA error: invalid device ordinal {index}: the emulator has one device, cuda:0")


def _device(tensor: torch.Tensor) -> torch.device:
    return CUDA if is_marked(tensor) else memory.true_device(tensor)


def _to(tensor: torch.Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> torch.Tensor:
    if args and isinstance(args[0], torch.Tensor) or isinstance(kwargs.get("other"), torch.Tensor):
        other = args[0] if args else kwargs["other"]
        device, dtype, non_blocking, layout = _device(other), other.dtype, False, None
    else:
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
    cuda = is_marked(tensor) if device is None else _is_cuda(device)
    if cuda and device is not None:
        _require_first_device(device)
    if cuda != is_marked(tensor):
        tensor, copy = _Move.apply(tensor, cuda), False
    arguments = {} if layout is None else {"memory_format": layout}
    if dtype is not None:
        arguments["dtype"] = dtype
    target = memory.true_device(tensor) if cuda or device is None else device  # "meta" stays what it is
    return tensor.to(device=target, copy=copy, **arguments)


class _Move(torch.autograd.Function):
    """Copies between "cuda" and the CPU; a gradient travels back."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, cuda: bool) -> torch.Tensor:
        ctx.back_to_cuda = is_marked(tensor)
        return mark(tensor.clone(), cuda)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        return mark(gradient.clone(), ctx.back_to_cuda), None


def _autograd(patches: Patches) -> None:
    """Backward functions are script code."""

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        with _modes_on():
            return run(*args, **kwargs)

    run = patches.set(torch.autograd, "_engine_run_backward", run_backward)


def _cuda(tensor: torch.Tensor, device: Any = None, non_blocking: bool = False, **kwargs: Any) -> torch.Tensor:
    if isinstance(device, int):
        device = torch.device("cuda", device)
    return _to(tensor, device if device is not None else CUDA, **kwargs)


def _cpu(tensor: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return _to(tensor, torch.device("cpu"), **kwargs)


def _as_tensor(data: Any, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
    tensor = torch.as_tensor(data, dtype=dtype)
    return tensor if device is None else _to(tensor, device)


def _numpy(tensor: torch.Tensor, **kwargs: Any) -> Any:
    if is_marked(tensor):
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. "
            "Use Tensor.cpu() to copy the tensor to host memory first."
        )
    return tensor.numpy(**kwargs)


def _dlpack(tensor: torch.Tensor, **kwargs: Any) -> Any:
    return memory.AsCudaTensor(tensor).__dlpack__() if is_marked(tensor) else tensor.__dlpack__(**kwargs)


def _dlpack_device(tensor: torch.Tensor) -> Any:
    return (memory.CUDA, 0) if is_marked(tensor) else tensor.__dlpack_device__()


def _repr(tensor: torch.Tensor, **kwargs: Any) -> str:
    text = torch.Tensor.__repr__(tensor, **kwargs)
    if not is_marked(tensor):
        return text
    end = text.rfind("]") + 1 or min(i for i in (text.find(","), text.find(")")) if i > 0)
    return f"{text[:end]}, device='{CUDA}'{text[end:]}"


# What a script asks of a tensor. Answers run with the function mode off: inside, tensors are the CPU's.
ANSWERS: dict[Any, Callable] = {
    torch.Tensor.is_cuda.__get__: is_marked,
    torch.Tensor.device.__get__: _device,
    torch.Tensor.get_device: lambda tensor: 0 if is_marked(tensor) else -1,
    torch.Tensor.to: _to,
    torch.Tensor.cuda: _cuda,
    torch.Tensor.cpu: _cpu,
    torch.Tensor.numpy: _numpy,
    torch.Tensor.pin_memory: lambda tensor, device=None: tensor.clone(),
    torch.Tensor.is_pinned: lambda tensor, device=None: False,
    torch.Tensor.record_stream: lambda tensor, stream: None,
    torch.Tensor.__dlpack__: _dlpack,
    torch.Tensor.__dlpack_device__: _dlpack_device,
    torch.Tensor.__repr__: _repr,
    torch.as_tensor: _as_tensor,
}


# --- torch.cuda ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Properties:
    """What torch.cuda.get_device_properties tells."""

    name: str
    major: int
    minor: int
    multi_processor_count: int
    total_memory: int = MEMORY_BYTES
    warp_size: int = 32
    max_threads_per_multi_processor: int = 2048
    max_threads_per_block: int = 1024
    regs_per_multiprocessor: int = 65536
    shared_memory_per_block: int = 49152
    shared_memory_per_block_optin: int = 232448
    shared_memory_per_multiprocessor: int = 233472
    L2_cache_size: int = 50 << 20
    is_integrated: bool = False
    is_multi_gpu_board: bool = False


class Stream:
    """Every stream is the default stream: a launch is over when its call returns."""

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any):
        self.device, self.priority, self.cuda_stream, self.stream_id = CUDA, priority, 0, 0

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = event if event is not None else Event()
        event.record(self)
        return event

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: Any) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0


class Event:
    """Holds the host's time; elapsed_time is emulation time, which says nothing of a GPU's."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, **kwargs: Any):
        self._time: float | None = None

    def record(self, stream: Any = None) -> None:
        self._time = time.perf_counter()

    def elapsed_time(self, end_event: Event) -> float:
        if self._time is None or end_event._time is None:
            raise RuntimeError("Both events must be recorded before calculating elapsed time.")
        return (end_event._time - self._time) * 1e3

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def wait(self, stream: Any = None) -> None: ...


# Of torch.cuda.cudart(): a script may say which part of it a profiler is to record.
PROFILER = SimpleNamespace(cudaProfilerStart=lambda: 0, cudaProfilerStop=lambda: 0)


class Generator(torch.Generator):
    """torch.Generator that takes device="cuda": CUDA's random numbers are the CPU generator's here."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls, "cpu" if _is_cuda(device) else device)


def _unsupported(name: str) -> Callable:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{name} is not emulated: launches run at once, so there is nothing to capture")

    return refuse


def _only_first_device(device: Any = None) -> None:
    index = device if isinstance(device, int) or device is None else torch.device(device).index
    if index not in (None, 0, -1):
        raise RuntimeError(f"CUDA error: invalid device ordinal {index}: the emulator has one device, cuda:0")


def _torch_cuda_module(device: Device, patches: Patches) -> None:
    major, minor = device.capability
    properties = Properties(NAMES[device.arch], major, minor, device.sms)
    stream = Stream()
    generator = torch.default_generator

    def of_device(value: Any) -> Callable:
        def answer(device: Any = None) -> Any:
            _only_first_device(device)
            return value

        return answer

    def nothing(*args: Any, **kwargs: Any) -> None: ...

    def context(*args: Any, **kwargs: Any) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": nothing,
        "_lazy_init": nothing,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": _only_first_device,
        "device": context,
        "device_of": context,
        "get_device_capability": of_device((major, minor)),
        "get_device_name": of_device(properties.name),
        "get_device_properties": of_device(properties),
        "get_arch_list": lambda: [device.arch.removesuffix("a")],
        "is_bf16_supported": lambda including_emulation=True: True,
        "can_device_access_peer": lambda device, peer: False,
        "Stream": Stream,
        "ExternalStream": lambda stream_ptr, device=None: stream,
        "Event": Event,
        "stream": context,
        "current_stream": of_device(stream),
        "default_stream": of_device(stream),
        "set_stream": nothing,
        "synchronize": of_device(None),
        "is_current_stream_capturing": lambda: False,
        # torch.manual_seed calls manual_seed_all, so these go to the generator itself.
        "manual_seed": lambda seed: generator.manual_seed(int(seed)) and None,
        "manual_seed_all": lambda seed: generator.manual_seed(int(seed)) and None,
        "seed": lambda: generator.seed() and None,
        "seed_all": lambda: generator.seed() and None,
        "initial_seed": generator.initial_seed,
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
        "mem_get_info": of_device((MEMORY_BYTES, MEMORY_BYTES)),
        "memory_stats": of_device({}),
        "memory_summary": lambda device=None, abbreviated=False: "emulated: tensors are in host memory",
        "cudart": lambda: PROFILER,
        "CUDAGraph": _unsupported("torch.cuda.CUDAGraph"),
        "graph": _unsupported("torch.cuda.graph"),
        "make_graphed_callables": _unsupported("torch.cuda.make_graphed_callables"),
    }
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved", "utilization"):
        answers[name] = of_device(0)
    for name in ("empty_cache", "ipc_collect", "reset_peak_memory_stats", "reset_max_memory_allocated"):
        answers[name] = nothing
    for name, value in answers.items():
        patches.set(torch.cuda, name, value)
    for name in ("range_push", "range_pop", "mark", "range_start", "range_end"):
        patches.set(torch.cuda.nvtx, name, nothing)
    patches.set(torch.cuda.nvtx, "range", context)
    patches.set(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)
    patches.set(torch, "Generator", Generator)
    patches.set(torch.version, "cuda", torch.version.cuda or "13.0")
    for name, value in (
        ("is_available", lambda: True),
        ("device_count", lambda: 1),
        ("current_accelerator", lambda check_available=False: torch.device("cuda")),
        ("current_device_index", lambda: 0),
        ("current_stream", of_device(stream)),
        ("synchronize", of_device(None)),
    ):
        patches.set(torch.accelerator, name, value)
    _autocast(patches)


def _autocast(patches: Patches) -> None:
    """torch.autocast("cuda") acts on the tensors where they are: on the CPU."""
    autocast = torch.amp.autocast_mode.autocast

    def init(self: Any, device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None) -> None:
        if device_type == "cuda":
            device_type, dtype = "cpu", dtype if dtype is not None else torch.float16
        original(self, device_type, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)

    original = patches.set(autocast, "__init__", init)


# --- cuda.bindings -------------------------------------------------------------------------------------------------


def _driver_bindings(patches: Patches) -> None:
    """The calls of cuda-python by which scripts create streams, synchronise and take times."""
    from cuda.bindings import driver, runtime

    ok, fine = driver.CUresult.CUDA_SUCCESS, runtime.cudaError_t.cudaSuccess
    times: dict[int, float] = {}

    def create_event(flags: int) -> tuple:
        event = driver.CUevent(len(times) + 1)
        times[int(event)] = time.perf_counter()
        return ok, event

    def record_event(event: Any, stream: Any) -> tuple:
        times[int(event)] = time.perf_counter()
        return (ok,)

    done: dict[str, Any] = {
        "cuInit": lambda flags: (ok,),
        "cuDriverGetVersion": lambda: (ok, 13000),
        "cuDeviceGetCount": lambda: (ok, 1),
        "cuDeviceGet": lambda ordinal: (ok, driver.CUdevice(0)),
        "cuCtxGetCurrent": lambda: (ok, driver.CUcontext(0)),
        "cuCtxSetCurrent": lambda context: (ok,),
        "cuCtxSynchronize": lambda: (ok,),
        "cuDevicePrimaryCtxRetain": lambda device: (ok, driver.CUcontext(0)),
        "cuDevicePrimaryCtxRelease": lambda device: (ok,),
        "cuStreamCreate": lambda flags: (ok, driver.CUstream(0)),
        "cuStreamSynchronize": lambda stream: (ok,),
        "cuStreamDestroy": lambda stream: (ok,),
        "cuEventCreate": create_event,
        "cuEventRecord": record_event,
        "cuEventSynchronize": lambda event: (ok,),
        "cuEventElapsedTime": lambda start, end: (ok, (times[int(end)] - times[int(start)]) * 1e3),
        "cuEventDestroy": lambda event: (ok,),
    }
    for name, function in done.items():
        patches.set(driver, name, function)
    for name, function in {
        "cudaDeviceSynchronize": lambda: (fine,),
        "cudaStreamSynchronize": lambda stream: (fine,),
        "cudaStreamCreate": lambda: (fine, runtime.cudaStream_t(0)),
        "cudaStreamDestroy": lambda stream: (fine,),
        "cudaGetDevice": lambda: (fine, 0),
        "cudaSetDevice": lambda device: (fine,),
        "cudaGetDeviceCount": lambda: (fine, 1),
    }.items():
        patches.set(runtime, name, function)
