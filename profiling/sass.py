"""What the assembler made of each kernel: python -m profiling.sass [--arch ARCH] [--match TEXT] [--out DIR]

Compiles every audited problem (profiling/kernels.py) for sm_90a, sm_100a and sm_103a, without a GPU, and prints from
the cubin: registers, stack, shared memory, code size, and of its loops: local-memory instructions (spills), matrix and
exponential instructions. Exits with 1 if a main loop touches local memory or has serialised wgmma, or if setmaxnreg
does not deal out all registers of an SM: the assembler drops it where it knows no bound on a kernel's threads, and the
emulator, which waits for registers as an SM does, takes it that a kernel begins with as many as fit.

nvdisasm is NVIDIA's (package nvidia-cuda-nvdisasm, or on the PATH). A main loop is one that holds an MMA or an
exponential. wgmma is serialised where the assembler waits for each (HGMMA) before it issues the next.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from profiling import kernels

MMA = re.compile(r"\b(HGMMA|QGMMA|IGMMA|UTCHMMA|UTCQMMA|UTCIMMA|HMMA)")
EXPONENTIAL = re.compile(r"\bMUFU\.EX2")
LOCAL = re.compile(r"\b(LDL|STL)\b")
WGMMA = re.compile(r"\bHGMMA|\bQGMMA")
WGMMA_WAIT = re.compile(r"\bWARPGROUP\.DEPBAR")
SETMAXNREG = re.compile(r"\bUSETMAXREG\b")
THREADS = re.compile(r"\.(?:req|max)ntid (\d+)(?:, (\d+))?(?:, (\d+))?")
SM_REGISTERS, REGISTERS_STEP = 65536, 8
DROPPED = -1
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(.*?);")
LABEL = re.compile(r"^\s*(\.L_x?_?\d+|\.L[\w.$]*):")
BRANCH = re.compile(r"\bBRA(?:\.\w+)*\b.*?`\(([^)]+)\)")


@dataclass(frozen=True)
class Audit:
    """One kernel. bytes and counts; loops: those with MMA or exponentials.

    registers  of a thread at launch
    dealt_out  the same as setmaxnreg needs it: as many as fit an SM; 0 without setmaxnreg, DROPPED if the assembler did
    """

    name: str
    config: str
    registers: int
    dealt_out: int
    stack_bytes: int
    code_bytes: int
    loops: int
    local_in_loops: int
    serialised_wgmma: int
    mma_in_loops: int
    exponentials_in_loops: int
    compile_seconds: float

    @property
    def faults(self) -> list[str]:
        found = []
        if self.local_in_loops:
            found.append(f"{self.local_in_loops} local-memory instructions in main loops")
        if self.serialised_wgmma:
            found.append(f"{self.serialised_wgmma} serialised wgmma")
        if self.dealt_out == DROPPED:
            found.append("setmaxnreg without effect")
        elif self.dealt_out not in (0, self.registers):
            found.append(f"{self.registers} registers at launch, not {self.dealt_out}, for setmaxnreg to deal out")
        return found


@functools.cache
def find_nvdisasm() -> str:
    """Path of nvdisasm: from NVIDIA's Python package, or the PATH. Raises RuntimeError naming the package."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        for path in sorted(Path(folder).glob("**/bin/nvdisasm")):
            return str(path)
    path = shutil.which("nvdisasm")
    if path is None:
        raise RuntimeError("nvdisasm was not found: pip install nvidia-cuda-nvdisasm")
    return path


def disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([find_nvdisasm(), "-c", file.name], check=True, capture_output=True, text=True).stdout


def instructions(sass: str) -> tuple[list[str], dict[str, int]]:
    """The instructions in order, and the index that each label stands before."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if found := LABEL.match(line):
            labels[found[1]] = len(code)
        elif found := INSTRUCTION.match(line):
            code.append(found[2])
    return code, labels


def loops(code: list[str], labels: dict[str, int]) -> Iterator[tuple[int, int]]:
    """[first, last] of each backward branch; of loops with the same head, the longest."""
    longest: dict[int, int] = {}
    for index, text in enumerate(code):
        found = BRANCH.search(text)
        target = labels.get(found[1]) if found else None
        if target is not None and target <= index:
            longest[target] = max(longest.get(target, 0), index)
    yield from sorted(longest.items())


def main_loops(code: list[str], labels: dict[str, int]) -> list[tuple[int, int]]:
    """Innermost loops that hold an MMA or an exponential."""
    hot = [
        (first, last)
        for first, last in loops(code, labels)
        if any(MMA.search(text) or EXPONENTIAL.search(text) for text in code[first : last + 1])
    ]
    return [
        (first, last)
        for first, last in hot
        if not any(other != (first, last) and first <= other[0] and other[1] <= last for other in hot)
    ]


def count(pattern: re.Pattern, code: list[str], ranges: list[tuple[int, int]]) -> int:
    return sum(bool(pattern.search(text)) for first, last in ranges for text in code[first : last + 1])


def serialised(code: list[str], ranges: list[tuple[int, int]]) -> int:
    """wgmmas directly followed by a wait for all of them and by another wgmma of the same chain."""
    total = 0
    for first, last in ranges:
        relevant = [text for text in code[first : last + 1] if WGMMA.search(text) or WGMMA_WAIT.search(text)]
        waits = sum(bool(WGMMA_WAIT.search(text)) for text in relevant)
        mmas = len(relevant) - waits
        if mmas > 2 and waits >= mmas - 1:
            total += waits
    return total


def dealt_out(ptx: str, code: list[str]) -> int:
    """`Audit.dealt_out` of a module with one kernel."""
    if "setmaxnreg." not in ptx:
        return 0
    threads = THREADS.search(ptx)
    if threads is None or not any(SETMAXNREG.search(text) for text in code):
        return DROPPED
    return SM_REGISTERS // math.prod(int(size or 1) for size in threads.groups()) // REGISTERS_STEP * REGISTERS_STEP


# ---- The cubin: an ELF file whose .nv.info sections hold what the driver must know ----------------------------------

SHT_CUDA_INFO = 0x70000000
EIATTR_REGCOUNT, EIATTR_MIN_STACK_SIZE = 0x2F, 0x12
EIFMT_SVAL = 0x04


def resources(cubin: bytes) -> dict[str, int]:
    """registers per thread, stack_bytes per thread, code_bytes of the cubin's kernels (the largest of each)."""
    found = {"registers": 0, "stack_bytes": 0, "code_bytes": 0}
    (offset,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_size, section_count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, offset + i * entry_size) for i in range(section_count)]
    strings = sections[names]
    for section in sections:
        begin = strings[4] + section[0]
        name = cubin[begin : cubin.index(b"\0", begin)].decode()
        data = cubin[section[4] : section[4] + section[5]] if section[1] != 8 else b""
        if name.startswith(".text."):
            found["code_bytes"] = max(found["code_bytes"], len(data))
        elif section[1] == SHT_CUDA_INFO and name == ".nv.info":
            _read_info(data, found)
    return found


def _read_info(data: bytes, found: dict[str, int]) -> None:
    at = 0
    while at + 4 <= len(data):
        kind, attribute, size = struct.unpack_from("<BBH", data, at)
        at += 4
        if kind != EIFMT_SVAL:
            continue
        if size >= 8 and attribute in (EIATTR_REGCOUNT, EIATTR_MIN_STACK_SIZE):
            value = struct.unpack_from("<I", data, at + 4)[0]
            key = "registers" if attribute == EIATTR_REGCOUNT else "stack_bytes"
            found[key] = max(found[key], value)
        at += size


def audit(kernel: kernels.Compiled) -> Audit:
    code, labels = instructions(disassemble(kernel.cubin))
    hot = main_loops(code, labels)
    return Audit(
        name=kernel.name,
        config=str(kernel.config),
        **resources(kernel.cubin),
        dealt_out=dealt_out(kernel.ptx, code),
        loops=len(hot),
        local_in_loops=count(LOCAL, code, hot),
        serialised_wgmma=serialised(code, hot),
        mma_in_loops=count(MMA, code, hot),
        exponentials_in_loops=count(EXPONENTIAL, code, hot),
        compile_seconds=round(kernel.seconds, 2),
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m profiling.sass", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", choices=kernels.ARCHES, action="append", help="default: all")
    parser.add_argument("--match", default="", help="only kernels whose name contains this")
    parser.add_argument("--out", type=Path, help="also write each kernel's SASS and PTX there")
    options = parser.parse_args()
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    chosen = [
        (arch, problem) for arch in options.arch or kernels.ARCHES for problem in kernels.problems(arch)
        if options.match in kernels.name_of(arch, problem)
    ]  # fmt: skip
    if not chosen:
        parser.error(f"--match {options.match!r}: no kernel's name contains it")
    columns = [name for name in Audit.__annotations__ if name not in ("name", "config")]
    print(f"{'kernel':60}", *(f"{name.replace('_', ' ')[:14]:>14}" for name in columns))
    bad = 0
    for arch, problem in chosen:
        kernel = kernels.compile_kernel(problem, arch)
        row = audit(kernel)
        values = asdict(row)
        print(f"{row.name:60}", *(f"{values[name]:>14}" for name in columns), *row.faults, flush=True)
        bad += bool(row.faults)
        if options.out:
            stem = options.out / row.name.replace(" ", "_").replace("/", "-")
            stem.with_suffix(".sass").write_text(disassemble(kernel.cubin))
            stem.with_suffix(".ptx").write_text(kernel.ptx)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
