"""The cheapest configuration is chosen, explained on request; where there is none, the error says for what."""

from __future__ import annotations

import pytest
from cute_sparse.kernels.blackwell import config as blackwell_config
from cute_sparse.kernels.blackwell import decode_config as blackwell_decode_config
from cute_sparse.kernels.hopper import config as hopper_config
from cute_sparse.kernels.hopper import decode_config as hopper_decode_config

from cute_sparse.device.choice import EXPLAIN_VARIABLE, cheapest
from cute_sparse.problem import Problem

KERNELS = [
    ("prefill", hopper_config), ("decode", hopper_decode_config),
    ("prefill", blackwell_config), ("decode", blackwell_decode_config),
]  # fmt: skip


@pytest.mark.parametrize("kind, config", KERNELS)
def test_the_cheapest_is_chosen_and_explained_on_request(kind, config, monkeypatch, capsys):
    problem = Problem(kind, "bfloat16", 128, 128)
    chosen = config.choose(problem)
    assert capsys.readouterr().err == ""
    costs = {candidate: config.cost(problem, candidate) for candidate in config.candidates(problem)}
    assert costs[chosen] == min(costs.values())
    monkeypatch.setenv(EXPLAIN_VARIABLE, "1")
    assert config.choose(problem) == chosen
    *each, last = capsys.readouterr().err.splitlines()
    assert len(each) == len(costs) and f"chose {chosen}" in last


def test_of_equally_cheap_ones_the_first_is_chosen():
    problem = Problem("prefill", "bfloat16", 128, 128)
    assert cheapest(problem, "sm_90a", ["long", "one", "two"], lambda _, word: len(word)) == "one"


def test_without_a_candidate_the_head_dims_are_named():
    with pytest.raises(NotImplementedError, match="of decode for sm_100a fits head dims 192/128"):
        cheapest(Problem("decode", "bfloat16", 192, 128), "sm_100a", [], lambda *_: 0.0)
