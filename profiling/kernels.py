"""The kernels that the audits look at: which problems, compiled how, for which architectures."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

from cute_sparse import compiled
from cute_sparse.dispatch import ROOM_OF_ARCH, chosen_kernel, has_kernel
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
        "prefill", "float16", 128, 128, mask="causal", varlen=True, softcap=True, sink=True, sparsity="threshold",
        return_lse=True, return_stats=True,
    )  # fmt: skip


def decode_problems() -> Iterator[Problem]:
    """Head dims and sparsity in every combination, paged; and one problem with everything else, one contiguous."""
    for head_dim, head_dim_v in HEAD_DIMS:
        for sparsity in SPARSITIES:
            yield Problem("decode", "bfloat16", head_dim, head_dim_v, mask="causal", sparsity=sparsity, page_size=64)
    yield Problem("decode", "bfloat16", 128, 128, mask="causal")
    yield Problem(
        "decode", "float16", 128, 128, mask="band", softcap=True, sink=True, sparsity="threshold", return_lse=True,
        return_stats=True, page_size=16, share_max=True,
    )  # fmt: skip


def problems(arch: str) -> Iterator[Problem]:
    """Of every kind of kernel that the architecture has."""
    for kind, some in (("prefill", prefill_problems), ("decode", decode_problems)):
        if has_kernel(kind, arch):
            yield from some()


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
        return name_of(self.arch, self.problem)


def name_of(arch: str, problem: Problem) -> str:
    dims = f"d{problem.head_dim}" + (f"/{problem.head_dim_v}" if problem.head_dim_v != problem.head_dim else "")
    extras = [f"page{problem.page_size}"] if problem.page_size else []
    flags = ("varlen", "softcap", "sink", "return_lse", "return_stats", "share_max")
    extras += [name for name in flags if getattr(problem, name)]
    return " ".join([arch, problem.kind, dims, problem.dtype, problem.mask, problem.sparsity or "dense", *extras])


@contextlib.contextmanager
def kept_code() -> Iterator[None]:
    """The DSL keeps the PTX and the cubin of what it compiles."""
    import cutlass.cute as cute
    from cutlass.base_dsl.compiler import KeepCUBIN, KeepPTX
    from cutlass.cutlass_dsl import CuTeDSL

    variables = CuTeDSL._get_dsl().envar
    names = ("keep_ptx", "keep_cubin", "dump_dir")
    before = [getattr(variables, name) for name in names]
    # The variables switch these on, and nothing switches them off again.
    options = [cute.compile._compile_options.options[option] for option in (KeepPTX, KeepCUBIN)]
    options_before = [option.value for option in options]
    with tempfile.TemporaryDirectory() as folder:
        for name, value in zip(names, (True, True, folder), strict=True):
            setattr(variables, name, value)
        try:
            yield
        finally:
            for name, value in zip(names, before, strict=True):
                setattr(variables, name, value)
            for option, value in zip(options, options_before, strict=True):
                option.value = value


def compile_kernel(problem: Problem, arch: str) -> Compiled:
    """The kernel that dispatch would choose, compiled anew. Needs no GPU."""
    config, compile = chosen_kernel(problem, arch)
    with kept_code():
        begin = time.perf_counter()
        function = compiled.compile_now(problem, config, arch, compile)
        seconds = time.perf_counter() - begin
    return Compiled(arch, problem, config, seconds, function.__ptx__, bytes(function.__cubin__))
