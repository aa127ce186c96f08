"""Links the DSL's host code to the emulator instead of CUDA.

A compiled function's host code calls the CUDA runtime by names such as _cudaLaunchKernelEx. Which library answers
would depend on which one the process loaded first, so the names are changed in the object code before it is linked:
each name that core/shim.cpp defines becomes one of equal length that nobody else has.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
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


def engine_class(binary_engine: type, core: str) -> Callable[[bytes, Sequence[str], bool], Any]:
    """A constructor like the DSL's BinaryExecutionEngine(object_code, libraries, use_jit_link) that redirects."""

    def construct(object_code: bytes, libraries: Sequence[str], use_jit_link: bool) -> Any:
        return binary_engine(redirect(object_code), [*libraries, core], use_jit_link)

    return construct


class HostCodeEngine:
    """The host code of one compiled module; the part of the DSL's ExecutionEngine that compiled functions use."""

    def __init__(self, module: Any, construct: Callable[[bytes, Sequence[str], bool], Any], libraries: Sequence[str]):
        from cutlass._mlir._mlir_libs._cutlass_ir import _aot_support

        object_code = _aot_support.export_module_to_bytes(module, format="o", opt_level=3, enable_pic=True)
        self._engine = construct(object_code, libraries, True)

    def raw_lookup(self, name: str) -> int:
        return self._engine.lookup(name)

    def lookup(self, name: str) -> Callable:
        """A function that was emitted with a C interface, as a ctypes callable."""
        address = self.raw_lookup(f"_mlir_ciface_{name}")
        if not address:
            raise RuntimeError(f"Unknown function {name}")
        return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
