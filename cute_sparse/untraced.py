"""Calls that break a traced graph. A module of its own: `torch.compiler.disable` loads the whole tracer."""

from __future__ import annotations

import torch

import cute_sparse


@torch.compiler.disable(reason="cute_sparse: return_stats and gradients are not part of its operators")
def call(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict):
    return getattr(cute_sparse, name)(q, k, v, **options)
