"""The choice among a kernel's configurations: the cheapest; with CUTE_SPARSE_EXPLAIN set, all are printed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

from cute_sparse.problem import Problem

EXPLAIN_VARIABLE = "CUTE_SPARSE_EXPLAIN"  # set it to see which config is chosen, and why, on stderr

Config = TypeVar("Config")


def cheapest(
    problem: Problem, arch: str, configs: Iterable[Config], cost: Callable[[Problem, Config], float]
) -> Config:
    """The first of those whose `cost` is lowest. Raises NotImplementedError where there is none."""
    costs = [(cost(problem, config), config) for config in configs]
    if not costs:
        raise NotImplementedError(
            f"no configuration of {problem.kind} for {arch} fits head dims {problem.head_dim}/{problem.head_dim_v}"
        )
    costs.sort(key=lambda pair: pair[0])
    if os.environ.get(EXPLAIN_VARIABLE):
        for clocks, config in costs:
            print(f"{arch} {problem.kind}: cost {clocks:.5g} of {config}", file=sys.stderr)
        print(f"{arch} {problem.kind}: chose {costs[0][1]} for {problem}", file=sys.stderr)
    return costs[0][1]
