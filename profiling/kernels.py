"""The kernels that the audits look at: which problems, compiled how, for which architectures."""

from __future__ import annotations

import contextlib
import importlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

from cute_sparse import compiled
from cute_sparse.dispatch import CHOOSE_OPTIONS, ROOM_OF_ARCH
from cute_sparse.problem import Problem

ARCHES = tuple(ROOM_OF_ARCH)
HEAD_DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))
MASKS = ("full", "causal", "band")
SPARSITIES = (None, "threshold")


def prefill_problems() -> Iterator[Problem]:
    """Head dims, masks and sparsity in every combination; and one problem with everything else."""
    for head_dim, head_dim_v in HEAD_DIMS:
        for mask in MASKS:
            for sparsity in SPARSITIES:
                yield Problem("prefill", "bfloat16", head_dim, head_dim_v, mask=mask, sparsity=sparsity)
    yield Problem(
        "prefill", "float16", 128, 128, mask="causal", varlen=True, softcap=True, sparsity="threshold",
        return_lse=True, return_stats=True,
    )  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    arch: str
    problem: Problem
    config: object
    seconds: float
    ptx: str
    cubin: bytes

    @property
    def name(self) -> str:
        p = self.problem
        dims = f"d{p.head_dim}" if p.head_dim == p.head_dim_v else f"d{p.head_dim}/{p.head_dim_v}"
        extras = [name for name in ("varlen", "softcap", "return_lse", "return_stats") if getattr(p, name)]
        return " ".join([self.arch, p.kind, dims, p.dtype, p.mask, p.sparsity or "dense", *extras])


@contextlib.contextmanager
def kept_code() -> Iterator[None]:
    """The DSL keeps the PTX and the cubin of what it compiles."""
    from cutlass.cutlass_dsl import CuTeDSL

    variables = CuTeDSL._get_dsl().envar
    names = ("keep_ptx", "keep_cubin", "dump_dir")
    before = [getattr(variables, name) for name in names]
    with tempfile.TemporaryDirectory() as folder:
        for name, value in zip(names, (True, True, folder), strict=True):
            setattr(variables, name, value)
        try:
            yield
        finally:
            for name, value in zip(names, before, strict=True):
                setattr(variables, name, value)


def compile_kernel(problem: Problem, arch: str) -> Compiled:
    """The kernel that dispatch would choose, compiled anew. Needs no GPU."""
    room = ROOM_OF_ARCH[arch]
    config = importlib.import_module(f"{room}.config").choose(problem, **CHOOSE_OPTIONS.get(arch, {}))
    kernel = importlib.import_module(f"{room}.{problem.kind}")
    with kept_code():
        begin = time.perf_counter()
        function = compiled.compile_now(problem, config, arch, kernel.compile)
        seconds = time.perf_counter() - begin
    return Compiled(arch, problem, config, seconds, function.__ptx__, bytes(function.__cubin__))
