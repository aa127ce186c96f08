"""Blackwell kernels compiled for sm_103a, in the emulator."""

from __future__ import annotations

import pytest

import cute_sparse
from tests.cases import CASES, make_inputs
from tests.test_attention import call, check, kept_elements

pytest.importorskip("cutlass")


@pytest.mark.parametrize("name", ["packed", "head dim 96", "skip", "skip, head dim 64"])
def test_prefill_equals_the_oracle(name):
    case = CASES[name]
    inputs = make_inputs(case)
    with cute_sparse.emulated("sm_103a", order="random", seed=7) as device:
        got = call(case, inputs, return_lse=True, return_stats=True)
        (launch,) = device.launches
    check(case, inputs, got)
    # sm_103's exponential unit is fast enough: unlike on sm_100a, every exponential is its work.
    geometry, skip_map = got.stats.geometry, got.stats.skip_map
    visible = sum(
        int(kept_elements(case, geometry, skip_map[index], length_q, length_k).sum())
        for index, (length_q, length_k) in enumerate(zip(case.lengths_q, case.lengths_k, strict=True))
    )
    assert launch.counts.exponentials >= visible // 32
