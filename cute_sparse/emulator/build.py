"""Builds the emulator's core with the machine's C++ compiler, once, into the user's cache directory.

The result is one shared library, which depends on nothing but the C++ runtime.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from cute_sparse.emulator.errors import BuildError

CORE = Path(__file__).resolve().parent / "core"
# No contraction of a*b+c: PTX says where a fused operation is meant. x86-64-v3 (AVX2, FMA) is every x86-64 server of
# the last ten years; not "native", so that a cache directory can be shared between machines.
COMPILE_FLAGS = (
    "-std=c++17", "-O3", "-march=x86-64-v3", "-ffp-contract=off", "-frounding-math",
    "-fPIC", "-fvisibility=hidden", "-pthread",
)  # fmt: skip
# What nearly every source includes, parsed once (31.8 s to build everything without it, 25 s with it, on two cores). It
# takes 90 MB on disk and 3 s, too much for a few sources; and clang has another way to precompile.
PRECOMPILED = ("algorithm", "map", "set", "sstream", "machine.h")
PRECOMPILE_FROM = 6  # sources to compile
COMPILERS_AT_ONCE = max(1, min(4, os.cpu_count() or 1))  # each takes up to 0.4 GB


def find_compiler() -> str:
    """The C++ compiler: $CXX, or g++, or clang++. Raises BuildError naming what to install."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    for name in names:
        path = shutil.which(name)
        if path is not None:
            return path
    raise BuildError(
        f"cute_sparse.emulator builds its core with a C++17 compiler, and {' and '.join(names)} is not on the PATH: "
        "install g++ 9 or newer (Debian and Ubuntu: apt install g++; Fedora: dnf install gcc-c++; "
        "conda: conda install gxx), or set CXX"
    )


def cache_directory() -> Path:
    """Where built libraries live: $CUTE_SPARSE_EMULATOR_DIR, or in $XDG_CACHE_HOME or ~/.cache.

    Not in $CUTE_SPARSE_CACHE_DIR: those who empty the kernel cache (or test with a fresh one) want no new build.
    """
    if os.environ.get("CUTE_SPARSE_EMULATOR_DIR"):
        return Path(os.environ["CUTE_SPARSE_EMULATOR_DIR"])
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "cute_sparse" / "emulator"


def build(dsl_version: str, sources: Sequence[Path] | None = None) -> Path:
    """Returns the built library's path; builds it first if these sources were not built before.

    sources: the core's .cpp files (all of core/ by default). Several processes may call this at once: one builds,
    the others wait. Raises BuildError.
    """
    sources = sorted(CORE.glob("*.cpp")) if sources is None else sorted(sources)
    headers = sorted(CORE.glob("*.h"))
    key = _digest([*sources, *headers], *COMPILE_FLAGS, dsl_version)
    target = cache_directory() / key / "libcute_sparse_emulator.so"
    if target.exists():
        return target
    compiler = find_compiler()
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_directory() / "build.lock"):
        if not target.exists():
            print("cute_sparse.emulator: building the core (once)", file=sys.stderr)
            objects = _compile(compiler, sources, headers)
            _link(compiler, objects, target)
    return target


def _digest(files: Sequence[Path], *texts: str) -> str:
    digest = hashlib.sha256("\0".join(texts).encode())
    for file in files:
        digest.update(b"\0" + file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:20]


def _compile(compiler: str, sources: Sequence[Path], headers: Sequence[Path]) -> list[Path]:
    """One object file for each source, kept by content, so that a changed file recompiles alone."""
    directory = cache_directory() / "objects"
    directory.mkdir(exist_ok=True)
    objects = [directory / f"{source.stem}-{_digest([source, *headers], *COMPILE_FLAGS)}.o" for source in sources]

    missing = [pair for pair in zip(sources, objects, strict=True) if not pair[1].exists()]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(COMPILERS_AT_ONCE) as pool:
        command = [compiler, *COMPILE_FLAGS, f"-I{CORE}"]
        if len(missing) >= PRECOMPILE_FROM and _is_gcc(compiler):
            command += ["-include", str(_precompile(command, Path(scratch)))]
        largest_first = sorted(missing, key=lambda pair: -pair[0].stat().st_size)
        list(pool.map(lambda pair: _run([*command, "-c", str(pair[0]), "-o"], pair[1]), largest_first))
    return objects


def _is_gcc(compiler: str) -> bool:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    return "Free Software Foundation" in version


def _precompile(command: list[str], folder: Path) -> Path:
    """A header that includes PRECOMPILED, with its precompiled form beside it, where GCC looks for it."""
    header = folder / "core.h"
    header.write_text("".join(f'#include "{name}"\n' for name in PRECOMPILED))
    _run([*command, "-x", "c++-header", str(header), "-o"], folder / "core.h.gch")
    return header


def _link(compiler: str, objects: Sequence[Path], target: Path) -> None:
    _run([compiler, "-shared", "-pthread", "-Wl,--no-undefined", *map(str, objects), "-o"], target)


def _run(command: list[str], target: Path) -> None:
    """Runs a compiler that writes `target`; the file appears under its name only when it is complete."""
    partial = target.with_name(f".{os.getpid()}-{target.name}")
    result = subprocess.run([*command, str(partial)], capture_output=True, text=True)
    if result.returncode != 0:
        partial.unlink(missing_ok=True)
        raise BuildError(f"{' '.join(command)} failed:\n{result.stderr[-8000:]}")
    os.replace(partial, target)
