"""Calls that break a traced graph. A module of its own: `torch.compiler.disable` loads the whole tracer."""

from __future__ import annotations

import torch

from cute_sparse import calls, inputs


@torch.compiler.disable(reason="cute_sparse: return_stats and gradients are not part of its operators")
def call(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict):
    """One of `calls`."""
    inputs.check_in_memory("q", q)  # before a plan is looked for, which asks for the address
    return getattr(calls, name)(q, k, v, options)
