"""Compiles each (problem, config, architecture) once: in this process, and, by the disk cache, on this machine."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import threading
from collections.abc import Callable, Iterator, Sequence

from cute_sparse import cache
from cute_sparse.launch import Launcher
from cute_sparse.operands import Operand
from cute_sparse.problem import Problem

DSL = "nvidia-cutlass-dsl"
# Variables of the DSL that do not change the code it generates.
HARMLESS_VARIABLES = {f"CUTE_DSL_{name}" for name in ("LIBS", "CACHE_DIR", "NO_CACHE", "DUMP_DIR", "KEEP", "ARCH")}

_launchers: dict[tuple, Launcher] = {}
_compiling = threading.RLock()


def launcher(
    problem: Problem,
    config: object,
    arch: str,
    compile: Callable,
    operands: Sequence[Operand],
    emulator_device: object | None = None,
) -> Launcher:
    """The launcher of `compile(problem, config)` for `arch`, loaded for CUDA or for an emulated device."""
    key = (problem, config, arch, compile, emulator_device)
    found = _launchers.get(key)
    if found is None:
        with _compiling:
            found = _launchers.get(key)
            if found is None:
                function = _from_disk_or_compiler(problem, config, arch, compile, emulator_device)
                found = _launchers[key] = Launcher(function, operands)
    return found


def compile_to_disk(problem: Problem, config: object, arch: str, compile: Callable) -> None:
    """Have the disk cache hold the function; it is not loaded, so no device is needed."""
    if cache.directory() is None:
        raise RuntimeError("the disk cache is off or unusable; compiling ahead for another process needs it")
    _from_disk_or_compiler(problem, config, arch, compile, None)


def forget(emulator_device: object) -> None:
    """Drop the launchers of an emulated device that is no more."""
    for key in [key for key in _launchers if key[-1] is emulator_device]:
        del _launchers[key]


def _from_disk_or_compiler(problem: Problem, config: object, arch: str, compile: Callable, emulator_device):
    folder = cache.directory()
    if folder is None:
        return _compile(problem, config, arch, compile)
    name = cache.key(
        problem, config, arch, importlib.metadata.version(DSL), _compiler_variables(), emulator_device is not None
    )
    path = folder / f"{problem.kind}-{arch}-{name[:32]}.o"
    function = _load(path, name, emulator_device)
    if function is not None:
        return function
    with cache.one_compiler(path):
        function = _load(path, name, emulator_device)  # another process may have compiled it meanwhile
        if function is None:
            function = _compile(problem, config, arch, compile)
            cache.write(path, _entry(function, name, emulator_device))
    return function


def _compiler_variables() -> list[tuple[str, str]]:
    return sorted(
        (name, value)
        for name, value in os.environ.items()
        if name.startswith("CUTE_DSL_") and name not in HARMLESS_VARIABLES
    )


def _compile(problem: Problem, config: object, arch: str, compile: Callable):
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


def _entry(function, name: str, emulator_device) -> cache.Entry:
    exported = function.dump_to_object(_symbol(name))
    if emulator_device is None:
        return cache.Entry(exported, b"", "")
    return cache.Entry(exported, function.__cubin__, function.__ptx__)


def _load(path, name: str, emulator_device):
    """The function in the file at `path`, or None where there is none that can be used."""
    entry = cache.read(path)
    if entry is None:
        return None
    import cutlass.cute as cute

    if emulator_device is not None:
        emulator_device.register_program(entry.cubin, entry.ptx)
    try:
        return getattr(cute.runtime.load_module(str(path)), _symbol(name))
    except Exception as error:  # whatever the DSL's loader finds wrong, compiling anew mends it
        cache.discard(path, f"it does not load ({error})")
        return None


def _symbol(name: str) -> str:
    """Prefix of the exported symbols: objects share one process, so each has its own."""
    return f"cute_sparse_{name[:16]}"
