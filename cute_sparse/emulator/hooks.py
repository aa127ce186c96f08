"""Where the emulator reaches into CuTe-DSL 4.8.1: its settings, compiled functions, tensors and hardware queries.

Everything here touches private classes, so the version is pinned; all of it is put back by `Patches.restore`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cute_sparse.emulator import devices, errors, memory
from cute_sparse.emulator.devices import Device
from cute_sparse.emulator.host_code import engine_class, redirect_engine
from cute_sparse.emulator.patches import Patches

# H100/H200 and B200 data sheets; a B300 is taken to have a B200's.
L2_BYTES = {"sm_90a": 50 << 20, "sm_100a": 126 << 20, "sm_103a": 126 << 20}


def install(device: Device, patches: Patches) -> None:
    """Makes CuTe-DSL compile for `device`, launch into it and take CPU tensors."""
    _settings(device, patches)
    _artifacts(device, patches)
    _host_code(device, patches)
    _compiled_functions(patches)
    _stored_functions(patches)
    _tensors(device, patches)
    _hardware(device, patches)


# --- settings ------------------------------------------------------------------------------------------------------


def _settings(device: Device, patches: Patches) -> None:
    """The DSL reads its environment once, when its singletons are made: the singletons' settings are what counts."""
    import cutlass.cute as cute

    for dsl in (cute._dsl.CuTeDSL._get_dsl(), cute._dsl.CuteExperimentalDSL._get_dsl()):
        patches.set(dsl.envar, "_arch", device.arch)
        # Part of the DSL's cache key: keeps modules apart whose PTX the core does not know.
        patches.set(dsl.envar, "shared_libs", os.pathsep.join([dsl.envar.shared_libs, str(device.core.path)]))
        # A module from the DSL's disk cache comes without its PTX.
        patches.set(dsl.envar, "disable_file_caching", True)
    patches.set_environment("CUTE_DSL_ARCH", device.arch)  # cutlass.utils.blackwell_helpers reads it at trace time


def _artifacts(device: Device, patches: Patches) -> None:
    """Every compilation keeps its PTX and cubin, which the core learns as a pair."""
    from cutlass.base_dsl.compiler import CompileOptions, KeepCUBIN, KeepPTX
    from cutlass.base_dsl.jit_executor import JitFunctionArtifacts

    ours: list[Any] = []  # options that we have switched on; cute.compile uses the same ones again

    def let_go() -> None:
        while ours:
            ours.pop().value = False

    def apply_envar_settings(options: CompileOptions, envar: Any, function_name: str) -> None:
        let_go()
        apply(options, envar, function_name)
        arch = options.gpu_arch or envar.arch
        for option, suffix, attribute in ((KeepPTX, "ptx", "full_ptx_path"), (KeepCUBIN, "cubin", "full_cubin_path")):
            keep = options.options[option]
            if not keep.value:  # a user who keeps them has named a place already
                keep.value = True
                ours.append(keep)
                options._set_artifact_dump_paths(
                    keep, str(device.dump_directory), function_name, arch, suffix, attribute
                )

    def post_init(artifacts: JitFunctionArtifacts) -> None:
        paths = [path for path in (artifacts.PTX, artifacts.CUBIN) if isinstance(path, str)]
        read(artifacts)
        if isinstance(artifacts.PTX, str) and isinstance(artifacts.CUBIN, bytes):
            device.core.add_program(artifacts.CUBIN, artifacts.PTX)
        for path in map(Path, paths):
            if path.parent == device.dump_directory:
                path.unlink(missing_ok=True)

    apply = patches.set(CompileOptions, "apply_envar_settings", apply_envar_settings)
    read = patches.set(JitFunctionArtifacts, "__post_init__", post_init)
    patches.on_restore(let_go)


def _host_code(device: Device, patches: Patches) -> None:
    """Host code is linked to the core: of plain functions (compiler.jit), TVM-FFI functions and object files."""
    from cutlass._mlir._mlir_libs._cutlass_ir import _execution_engine
    from cutlass.base_dsl.compiler import Compiler
    from cutlass.base_dsl.export.external_binary_module import ExternalBinaryModule

    def jit(compiler: Compiler, *args: Any, **kwargs: Any) -> Any:
        engine = make_engine(compiler, *args, **kwargs)
        redirect_engine(engine, device.core.path)
        return engine

    make_engine = patches.set(Compiler, "jit", jit)
    construct = engine_class(_execution_engine.BinaryExecutionEngine, device.core.path)
    patches.set(_execution_engine, "BinaryExecutionEngine", construct)
    patches.set(ExternalBinaryModule.load_provider, "execution_engine_constructor", construct)


# --- compiled functions --------------------------------------------------------------------------------------------


def _compiled_functions(patches: Patches) -> None:
    """What is compiled now is an emulated function (for good); what was compiled before refuses to run now."""
    from cutlass.base_dsl.dsl import BaseDSL
    from cutlass.base_dsl.jit_executor import JitExecutor
    from cutlass.cutlass_dsl import cuda_jit_executor, tvm_ffi_provider

    def build_jit_function(dsl: BaseDSL, *args: Any, **kwargs: Any) -> Any:
        function = build(dsl, *args, **kwargs)
        function.__class__ = emulated_class(type(function))
        function.emulated_arch = _target(function.artifacts.PTX) if function.artifacts is not None else None
        return function

    build = patches.set(BaseDSL, "_build_jit_function", build_jit_function)
    patches.set(cuda_jit_executor, "CudaDialectJitModule", _emulated_module_class())
    patches.set(cuda_jit_executor.CudaDialectJitCompiledFunction, "num_devices", property(lambda self: 1))
    for owner, name in (
        (cuda_jit_executor.CudaDialectJitCompiledFunction, "to"),
        (JitExecutor, "run_compiled_program"),
        (tvm_ffi_provider.TVMFFIJitCompiledFunction, "__call__"),
        (tvm_ffi_provider.TVMFFIJitCompiledFunctionWithKwargs, "__call__"),
    ):
        patches.set(owner, name, _emulated_only(getattr(owner, name)))


def _target(ptx: str | None) -> str | None:
    """The architecture that PTX text names."""
    match = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE) if ptx is not None else None
    return match.group(1) if match else None


def _emulated_only(method: Callable) -> Callable:
    """A method of the DSL's own class, which refuses objects that are not emulated ones."""

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, Emulated):
            name = getattr(self, "function_name", type(self).__name__)
            raise errors.NotCompiledHere(
                f"{name} was compiled before the emulated device was entered, for a real GPU: "
                "compile it inside `with emulator.device(...)`"
            )
        return method(self, *args, **kwargs)

    return guarded


class Emulated:
    """Marks functions and executors that launch into the emulator."""

    emulated_arch: str | None = None  # what they were compiled for; None: nothing to launch


class _EmulatedFunction(Emulated):
    """A plain cute.compile function: its tensors are already cute tensors."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _launching(self) as device:
            _name_arguments(self, args, kwargs, device)
            return super().__call__(*args, **kwargs)

    def run_compiled_program(self, exe_args: list[Any]) -> Any:
        with _launching(self):
            return super().run_compiled_program(exe_args)

    def to(self, device: int | None = None) -> Any:
        with _launching(self):
            executor = super().to(device)
        executor.__class__ = emulated_class(type(executor))
        executor.emulated_arch, executor.function_name = self.emulated_arch, self.function_name
        executor.capi_func = _guarded_entry(executor, executor.capi_func)
        return executor


def _guarded_entry(executor: Emulated, entry: Callable) -> Callable:
    """The host code's entry for those who call it themselves, without the executor's marshalling."""

    def call(arguments: Any) -> Any:
        with _launching(executor):
            return entry(arguments)

    call.restype = entry.restype  # type: ignore[attr-defined]
    return call


class _EmulatedExecutor(Emulated):
    """What `compiled.to(device)` returns."""

    def run_compiled_program(self, exe_args: list[Any]) -> Any:
        with _launching(self):
            return super().run_compiled_program(exe_args)


class _EmulatedTvmFunction(Emulated):
    """A TVM-FFI function: it takes torch tensors, which become CUDA tensors here."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _launching(self) as device:
            _name_arguments(self, args, kwargs, device)
            args = tuple(_as_device_argument(arg, device) for arg in args)
            kwargs = {name: _as_device_argument(arg, device) for name, arg in kwargs.items()}
            return super().__call__(*args, **kwargs)


@functools.cache
def emulated_class(cls: type) -> type:
    """The subclass of one of the DSL's classes that launches into the emulator."""
    from cutlass.base_dsl.jit_executor import JitExecutor
    from cutlass.cutlass_dsl.tvm_ffi_provider import TVMFFIJitCompiledFunctionBase

    if issubclass(cls, Emulated):
        return cls
    if issubclass(cls, JitExecutor):
        kind: type = _EmulatedExecutor
    elif issubclass(cls, TVMFFIJitCompiledFunctionBase):
        kind = _EmulatedTvmFunction
    else:
        kind = _EmulatedFunction

    class EmulatedClass(kind, cls):
        pass

    EmulatedClass.__name__ = EmulatedClass.__qualname__ = f"Emulated{cls.__name__}"
    return EmulatedClass


@functools.cache
def _emulated_module_class() -> type:
    from cutlass.cutlass_dsl.cuda_jit_executor import CudaDialectJitModule

    class EmulatedJitModule(CudaDialectJitModule):
        """Its library handles are the core's: the CUDA runtime must never see them."""

        def unload(self) -> None:
            core = devices.loaded_core()
            for library in self.cuda_library:
                if core is not None:
                    core.unload_library(int(library))
            self.cuda_library.clear()
            self._unloaded = True

    return EmulatedJitModule


class _launching:
    """Around everything that may reach the core: checks who calls, and turns the core's error into an exception."""

    def __init__(self, function: Emulated):
        self._function = function

    def __enter__(self) -> Device:
        device = devices.entered()
        name = getattr(self._function, "function_name", "this function")
        if device is None:
            raise errors.NotEntered(f"{name} was compiled for the emulator: call it inside `with emulator.device(...)`")
        arch = self._function.emulated_arch
        if arch is not None and arch != device.arch:
            raise errors.WrongArch(f"{name} was compiled for {arch}, and the entered device is {device.arch}")
        device.memory.sweep()
        self._device = device
        return device

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        self._device.report_launches()
        self._device.raise_pending()
        wrapped = _emulator_error_in(error)
        if wrapped is not None and wrapped is not error:
            raise wrapped from None


def _emulator_error_in(error: BaseException | None) -> errors.EmulatorError | None:
    """The emulator's error inside the one that the DSL made of it."""
    while error is not None and not isinstance(error, errors.EmulatorError):
        error = getattr(error, "cause", None) or error.__cause__
    return error


# --- arguments -----------------------------------------------------------------------------------------------------


def _name_arguments(function: Any, args: tuple, kwargs: dict[str, Any], device: Device) -> None:
    """Tensors in error messages bear the names of the function's parameters."""
    named = dict(zip(function.execution_args._meta.pos_names, args, strict=False)) | kwargs
    for name, value in named.items():
        for path, tensor in _tensors_in(value, name):
            if device.holds(tensor):
                device.memory.name_if_nameless(tensor, path)


def _tensors_in(value: Any, name: str) -> list[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        return [(name, value)]
    source = getattr(value, "_emulated_tensor", None)
    if source is not None:
        return [(name, source)]
    return [found for child, item in _children(value) for found in _tensors_in(item, f"{name}{child}")]


def _children(value: Any) -> list[tuple[str, Any]]:
    """Parts of a container that may hold tensors, with how they are reached."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{field}", item) for field, item in zip(value._fields, value, strict=True)]
    if isinstance(value, list | tuple):
        return [(f"[{i}]", item) for i, item in enumerate(value)]
    if isinstance(value, dict):
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f".{field.name}", getattr(value, field.name, None)) for field in dataclasses.fields(value)]
    return []


def _as_device_argument(value: Any, device: Device) -> Any:
    """The same argument with every torch tensor as a TVM-FFI tensor on CUDA device 0."""
    import tvm_ffi

    if isinstance(value, torch.Tensor):
        if not device.holds(value):
            return value
        device.memory.add(value)
        return tvm_ffi.from_dlpack(memory.AsCudaTensor(value.detach()))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_as_device_argument(item, device) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_as_device_argument(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _as_device_argument(item, device) for key, item in value.items()}
    if _tensors_in(value, ""):
        return _dataclass_as_device_argument(value, device)
    return value


def _dataclass_as_device_argument(value: Any, device: Device) -> Any:
    if not dataclasses.is_dataclass(value):
        return value  # a cute tensor, which is a device tensor already
    converted = copy.copy(value)
    for field in dataclasses.fields(value):
        object.__setattr__(converted, field.name, _as_device_argument(getattr(value, field.name), device))
    return converted


def _tensors(device: Device, patches: Patches) -> None:
    """CPU tensors that are handed over (as cute tensors, or by their address) become device memory."""
    import cutlass.cute.runtime as cute_runtime
    import tvm_ffi

    def init(cute_tensor: Any, tensor: Any, *args: Any, **kwargs: Any) -> None:
        # A TVM-FFI tensor says itself where it is.
        source = None if isinstance(tensor, tvm_ffi.Tensor) else memory.as_tensor(tensor)
        if source is None or not device.holds(source):
            return tensor_init(cute_tensor, tensor, *args, **kwargs)
        device.memory.add(source)
        cute_tensor._emulated_tensor = source
        tensor_init(cute_tensor, memory.AsCudaTensor(source), *args, **kwargs)

    def data_ptr(tensor: torch.Tensor) -> int:
        address = tensor_address(tensor)
        if address and memory.is_plain(tensor) and device.holds(tensor):
            device.memory.add(tensor)
        return address

    tensor_init = patches.set(cute_runtime._Tensor, "__init__", init)
    tensor_address = patches.set(torch.Tensor, "data_ptr", data_ptr)


# --- functions that come from a disk cache -------------------------------------------------------------------------


class StoredFunction(Emulated):
    """A TVM-FFI function from an exported object file: takes CPU tensors, raises the emulator's errors."""

    def __init__(self, function: Any):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        with _launching(self) as device:
            return self._function(*(_as_device_argument(arg, device) for arg in args))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)


def _stored_functions(patches: Patches) -> None:
    from cutlass.base_dsl.export.external_binary_module import ExternalBinaryModule
    from cutlass.base_dsl.jit_executor import JitCompiledFunction

    def load_function(module: ExternalBinaryModule, name: str) -> Any:
        function = load(module, name)
        if isinstance(function, JitCompiledFunction):
            function.__class__ = emulated_class(type(function))
            return function
        return StoredFunction(function)

    load = patches.set(ExternalBinaryModule, "__getattr__", load_function)


# --- hardware queries ----------------------------------------------------------------------------------------------


def _hardware(device: Device, patches: Patches) -> None:
    """cutlass.utils.HardwareInfo asks the driver; persistent kernels size their grid by it."""
    from cutlass.utils.hardware_info import HardwareInfo

    def init(info: HardwareInfo, device_id: int = 0) -> None:
        if device_id != 0:
            raise ValueError(f"{device_id=}: the emulator has one device, 0")
        info.device_id = device_id

    def get_max_active_clusters(info: HardwareInfo, cluster_size: int, stream: Any = None) -> int:
        if not 1 <= cluster_size <= 32:
            raise ValueError(f"Cluster size must be between 1 and 32, {cluster_size} is not supported")
        return max(1, device.sms // cluster_size)

    patches.set(HardwareInfo, "__init__", init)
    patches.set(HardwareInfo, "get_max_active_clusters", get_max_active_clusters)
    patches.set(HardwareInfo, "get_l2_cache_size_in_bytes", lambda info: L2_BYTES[device.arch])
    patches.set(HardwareInfo, "get_device_multiprocessor_count", lambda info: device.sms)
