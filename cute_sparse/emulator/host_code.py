"""Links the DSL's host code to the emulator instead of CUDA.

A compiled function's host code calls the CUDA runtime by names such as _cudaLaunchKernelEx. Left to the linker, the
library that the process loaded first would answer. So object code (TVM-FFI functions, exported files) has the names
that core/shim.cpp defines replaced by names of equal length that nobody else has; an execution engine that makes its
own code (plain functions) is given their addresses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# What core/shim.cpp defines, by CUDA's names (CuTe-DSL writes an underscore before those of CUDA's own).
REDIRECTED = (
    "_cudaGetDevice", "_cudaGetDeviceCount", "_cudaSetDevice", "_cudaDeviceGetAttribute", "_cudaLibraryLoadData",
    "_cudaLibraryGetKernel", "_cudaLibraryUnload", "_cuKernelGetAttribute", "_cudaFuncSetAttribute",
    "_cudaKernelSetAttributeForDevice", "_cudaLaunchKernelEx", "_cudaStreamSynchronize", "_cudaDeviceSynchronize",
    "_cudaMemsetAsync", "cuda_dialect_init_library_once", "cuda_dialect_unload_library_once",
)  # fmt: skip


def redirected_name(name: str) -> str:
    """_cudaGetDevice -> _emulGetDevice, _cuKernelGetAttribute -> _emKernelGetAttribute: of equal length."""
    return name.replace("cuda", "emul", 1) if "cuda" in name else name.replace("cu", "em", 1)


def redirect(object_code: bytes) -> bytes:
    """An object file with the CUDA names in its string table changed."""
    for name in REDIRECTED:
        old, new = (b"\0" + text.encode() + b"\0" for text in (name, redirected_name(name)))
        object_code = object_code.replace(old, new)
    return object_code


def engine_class(binary_engine: type, core: Path) -> Callable[[bytes, Sequence[str], bool], Any]:
    """A constructor like the DSL's BinaryExecutionEngine(object_code, libraries, use_jit_link) that redirects."""

    def construct(object_code: bytes, libraries: Sequence[str], use_jit_link: bool) -> Any:
        return binary_engine(redirect(object_code), [*libraries, str(core)], use_jit_link)

    return construct


def redirect_engine(engine: Any, core: Path) -> None:
    """The same for an ExecutionEngine that has not linked its code yet: symbols given to it come before libraries'."""
    library = ctypes.CDLL(str(core))
    for name in REDIRECTED:
        address = ctypes.cast(getattr(library, redirected_name(name)), ctypes.c_void_p)
        engine.raw_register_runtime(name, address)
