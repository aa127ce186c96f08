"""Calls a compiled host function with a few microseconds of Python: one packed struct, one foreign call.

What the DSL generates takes `void** args`, one pointer per run-time argument in order, then one to an int32 for the
CUDA result. Its own Python path marshals every argument anew for each call; here the pointers are set once, to the
fields of a struct, and a call only fills the struct.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence

from cute_sparse.operands import Operand

_CODE = {"pointer": "Q", "int32": "i", "int64": "q", "float32": "f"}
_STREAM, _RESULT = "P", "i"


class LaunchError(RuntimeError):
    """The CUDA runtime refused a launch."""


class Launcher:
    """A compiled host function, loaded, with its argument memory laid out.

    Calls may come from several threads: the arguments are shared, so a lock covers filling them and the call, which
    copies them.
    """

    def __init__(self, compiled, operands: Sequence[Operand]) -> None:
        executor = compiled.to(None)  # loads the device code
        self._alive = (compiled, executor)
        self._entry = executor.capi_func
        codes = [_CODE[operand.type] for operand in operands] + [_STREAM, _RESULT]
        self._fields = struct.Struct("@" + "".join(codes))  # native alignment, as the generated code loads them
        self._memory = ctypes.create_string_buffer(self._fields.size)
        base = ctypes.addressof(self._memory)
        ends = [struct.calcsize("@" + "".join(codes[: count + 1])) for count in range(len(codes))]
        offsets = [end - struct.calcsize(code) for end, code in zip(ends, codes, strict=True)]
        self._result_offset = offsets[-1]
        self._arguments = (ctypes.c_void_p * len(codes))(*(base + offset for offset in offsets))
        self._lock = threading.Lock()

    def __call__(self, values: Sequence[int | float], stream: int) -> None:
        """Launch with the operands' values, in the operands' order, on a raw CUDA stream."""
        with self._lock:
            self._fields.pack_into(self._memory, 0, *values, stream, 0)
            self._entry(self._arguments)
            (result,) = struct.unpack_from("i", self._memory, self._result_offset)
        if result:
            raise LaunchError(f"the CUDA runtime returned error {result} ({_name_of(result)}) to a kernel launch")


def _name_of(error: int) -> str:
    from cuda.bindings import runtime

    try:
        return runtime.cudaError_t(error).name
    except ValueError:
        return "unknown to cuda-bindings"
