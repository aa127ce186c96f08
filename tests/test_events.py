"""The kernels' spans: in the code that is compiled for in-kernel event tracing, and in no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from cute_sparse.problem import Problem
from profiling import kernels

MARK = "pmevent.mask"  # the tracer's, once at each end of a span
PROBLEMS = [
    ("sm_90a", Problem("prefill", "bfloat16", 128, 128, mask="causal", sparsity="threshold")),
    ("sm_90a", Problem("decode", "bfloat16", 128, 128, mask="causal", sparsity="threshold", page_size=64)),
    ("sm_100a", Problem("prefill", "bfloat16", 128, 128, mask="causal", sparsity="threshold")),
    ("sm_100a", Problem("prefill", "bfloat16", 256, 256)),
    ("sm_100a", Problem("decode", "bfloat16", 128, 128, mask="causal", sparsity="threshold", page_size=64)),
]
MARKS_MIN = 2 * 5  # five spans: what loads, what multiplies, what the softmax does

PRINT_MARKS = """
import json
from profiling import kernels
from tests.test_events import MARK, PROBLEMS
print(json.dumps([kernels.compile_kernel(problem, arch).ptx.count(MARK) for arch, problem in PROBLEMS]))
"""


@pytest.fixture(scope="module")
def traced_marks() -> list[int]:
    """How many marks each of PROBLEMS' kernels has, compiled in a process that traces."""
    environment = os.environ | {"CUTE_DSL_COMPILER_OPT": "iket"}
    done = subprocess.run(
        [sys.executable, "-c", PRINT_MARKS], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("index", range(len(PROBLEMS)), ids=[f"{arch}-{p.kind}-{p.head_dim}" for arch, p in PROBLEMS])
def test_spans_are_in_traced_kernels_only(index, traced_marks):
    assert traced_marks[index] >= MARKS_MIN and traced_marks[index] % 2 == 0
    arch, problem = PROBLEMS[index]
    assert MARK not in kernels.compile_kernel(problem, arch).ptx
