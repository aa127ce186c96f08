"""The host code of the kernels against a CUDA runtime that a few lines of C play: what a launch hands to it.

The emulator has one stream; here a launch says which one it goes to.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import pytest

import cute_sparse
from cute_sparse import compiled, dispatch
from cute_sparse.emulator.host_code import REDIRECTED
from cute_sparse.launch import Launcher, LaunchError
from cute_sparse.problem import Problem

pytest.importorskip("cutlass")

RUNTIME = """
#include <stdint.h>
struct config { uint32_t grid[3], block[3]; uint64_t shared_bytes; void *stream, *attributes; uint32_t count; };
int answer, launches;
uint64_t stream;
int _mockGetDevice(int *device) { *device = 0; return 0; }
int _mockGetDeviceCount(int *count) { *count = 1; return 0; }
int _mockSetDevice(int device) { return 0; }
int _mockDeviceGetAttribute(int *value) { *value = 132; return 0; }
int _mockLibraryLoadData(void **library) { *library = (void *)1; return 0; }
int _mockLibraryGetKernel(void **kernel) { *kernel = (void *)2; return 0; }
int _mockLibraryUnload(void *library) { return 0; }
int _mkKernelGetAttribute(int *value) { *value = 1024; return 0; }
int _mockFuncSetAttribute() { return 0; }
int _mockKernelSetAttributeForDevice() { return 0; }
int _mockLaunchKernelEx(const struct config *config) { launches++; stream = (uint64_t)config->stream; return answer; }
int _mockStreamSynchronize() { return 0; }
int _mockDeviceSynchronize() { return 0; }
int _mockMemsetAsync() { return 0; }
int mock_dialect_init_library_once() { return 0; }
int mock_dialect_unload_library_once() { return 0; }
"""


@pytest.fixture(scope="module")
def runtime(tmp_path_factory) -> ctypes.CDLL:
    compiler = shutil.which("cc") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("runtime")
    (folder / "runtime.c").write_text(RUNTIME)
    command = [compiler, "-x", "c", "-w", "-shared", "-fPIC", "-o", folder / "runtime.so", folder / "runtime.c"]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "runtime.so"))


def redirect(object_code: bytes) -> bytes:
    """With the names that RUNTIME defines in place of CUDA's."""
    for name in REDIRECTED:
        mock = name.replace("cuda", "mock", 1) if "cuda" in name else name.replace("cu", "mk", 1)
        object_code = object_code.replace(b"\0" + name.encode() + b"\0", b"\0" + mock.encode() + b"\0")
    return object_code


def launcher(kind: str, arch: str, runtime: ctypes.CDLL, monkeypatch) -> Launcher:
    """Of host code from an object file, which is linked to the library instead of CUDA."""
    from cutlass._mlir._mlir_libs._cutlass_ir import _execution_engine
    from cutlass.base_dsl.export.external_binary_module import ExternalBinaryModule
    from cutlass.cutlass_dsl import cuda_jit_executor

    def engine(object_code, libraries, use_jit_link):
        return _execution_engine.BinaryExecutionEngine(redirect(object_code), [*libraries, runtime._name], use_jit_link)

    problem = Problem(kind, "bfloat16", 64, 64, mask="causal")
    with cute_sparse.emulated(arch):  # as other tests do: the file may be there already
        dispatch.compiled_kernel(problem, dispatch._emulation)
    config, compile = dispatch.chosen_kernel(problem, arch)
    monkeypatch.setattr(ExternalBinaryModule.load_provider, "execution_engine_constructor", engine)
    monkeypatch.setattr(compiled, "compile_now", None)
    monkeypatch.setattr(cuda_jit_executor.CudaDialectJitCompiledFunction, "num_devices", 1)
    function = compiled._from_disk_or_compiler(problem, config, arch, compile, emulated=True)
    made = Launcher(function, dispatch.OPERANDS[kind])
    function.jit_module.cuda_library.clear()  # CUDA's own runtime would unload it
    return made


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("kind", dispatch.OPERANDS)
def test_a_kernel_is_launched_on_the_stream_given_and_an_error_is_raised(kind, arch, runtime, monkeypatch):
    launch = launcher(kind, arch, runtime, monkeypatch)
    values = [
        4096 * number if operand.type == "pointer" else 64 if operand.name.endswith(("seq", "head")) else 1
        for number, operand in enumerate(dispatch.OPERANDS[kind], 1)
    ]
    launches = ctypes.c_int.in_dll(runtime, "launches")
    answer = ctypes.c_int.in_dll(runtime, "answer")
    launches.value, answer.value = 0, 0
    for stream in (0x12345678ABC0, 0):
        launch(values, stream)
        assert ctypes.c_uint64.in_dll(runtime, "stream").value == stream
    assert launches.value == 2
    answer.value = 719
    with pytest.raises(LaunchError, match="719 .cudaErrorLaunchFailure"):
        launch(values, 0)
    answer.value = 123456
    with pytest.raises(LaunchError, match="123456 .unknown"):
        launch(values, 0)
