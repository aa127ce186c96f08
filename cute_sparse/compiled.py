"""Compiles each (problem, config, architecture) once: in this process, and, by the disk cache, on this machine."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import threading
from collections.abc import Callable, Iterator, Sequence

import nvtx

from cute_sparse import cache
from cute_sparse.launch import Launcher
from cute_sparse.operands import Operand
from cute_sparse.problem import Problem

DSL = "nvidia-cutlass-dsl"
# Variables of the DSL that do not change the code it generates.
HARMLESS_VARIABLES = {f"CUTE_DSL_{name}" for name in ("LIBS", "CACHE_DIR", "NO_CACHE", "DUMP_DIR", "KEEP", "ARCH")}

_launchers: dict[tuple, Launcher] = {}
_compiling = threading.RLock()  # the DSL compiles in one thread at a time, for one architecture


def launcher(
    problem: Problem,
    config: object,
    arch: str,
    compile: Callable,
    operands: Sequence[Operand],
    emulated: bool = False,
) -> Launcher:
    """The launcher of `compile(problem, config)` for `arch`, loaded for CUDA or for the emulator that is entered."""
    key = (problem, config, arch, compile, emulated)
    found = _launchers.get(key)
    if found is None:
        with _compiling:
            found = _launchers.get(key)
            if found is None:
                function = _from_disk_or_compiler(problem, config, arch, compile, emulated)
                found = _launchers[key] = Launcher(function, operands)
    return found


def compile_to_disk(problem: Problem, config: object, arch: str, compile: Callable) -> None:
    """Have the disk cache hold the function; it is not loaded, so no device is needed."""
    if cache.directory() is None:
        raise RuntimeError("the disk cache is off or unusable; compiling ahead for another process needs it")
    with _compiling:
        _from_disk_or_compiler(problem, config, arch, compile, emulated=False)


def _from_disk_or_compiler(problem: Problem, config: object, arch: str, compile: Callable, emulated: bool):
    folder = cache.directory()
    if folder is None:
        return compile_now(problem, config, arch, compile)
    name = cache.key(problem, config, arch, compiler_version(), _compiler_variables(), emulated)
    path = folder / f"{problem.kind}-{arch}-{name[:32]}.o"
    function = _load(path, name, emulated)
    if function is not None:
        return function
    with cache.one_compiler(path):
        function = _load(path, name, emulated)  # another process may have compiled it meanwhile
        if function is None:
            function = compile_now(problem, config, arch, compile)
            cache.write(path, _entry(function, name, emulated))
    return function


def compiler_version() -> str:
    """Of the DSL, and of the CUDA toolkit whose assembler it holds: one version of the DSL comes with several."""
    import cutlass

    toolkit = cutlass.CUDA_VERSION
    return f"{importlib.metadata.version(DSL)} (CUDA {toolkit.major}.{toolkit.minor})"


def _compiler_variables() -> list[tuple[str, str]]:
    return sorted(
        (name, value)
        for name, value in os.environ.items()
        if name.startswith("CUTE_DSL_") and name not in HARMLESS_VARIABLES
    )


@nvtx.annotate("compile", domain="cute_sparse")
def compile_now(problem: Problem, config: object, arch: str, compile: Callable):
    """What `compile(problem, config)` returns, compiled for `arch` whatever device this machine has, if any."""
    with _compiling_for(arch):
        return compile(problem, config)


@contextlib.contextmanager
def _compiling_for(arch: str) -> Iterator[None]:
    """Have the DSL compile for `arch`, whatever device this machine has, if any."""
    from cutlass.cutlass_dsl import CuTeDSL

    variables = CuTeDSL._get_dsl().envar
    before = variables._arch
    variables.arch = arch
    try:
        yield
    finally:
        variables.arch = before


def _entry(function, name: str, emulated: bool) -> cache.Entry:
    exported = function.dump_to_object(_symbol(name))
    if not emulated:
        return cache.Entry(exported, b"", "")
    return cache.Entry(exported, function.__cubin__, function.__ptx__)


def _load(path, name: str, emulated: bool):
    """The function in the file at `path`, or None where there is none that can be used."""
    entry = cache.read(path)
    if entry is None:
        return None
    import cutlass.cute as cute

    if emulated:
        importlib.import_module("cute_sparse.emulator").register(entry.cubin, entry.ptx)
    try:
        return getattr(cute.runtime.load_module(str(path)), _symbol(name))
    except Exception as error:  # whatever the DSL's loader finds wrong, compiling anew mends it
        cache.discard(path, f"it does not load ({error})")
        return None


def _symbol(name: str) -> str:
    """Prefix of the exported symbols: objects share one process, so each has its own."""
    return f"cute_sparse_{name[:16]}"
