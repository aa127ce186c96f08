"""Sparse attention in CuTe-DSL: tiles whose softmax weight is provably negligible are skipped.

The public names load on first use, so that `import cute_sparse` costs nothing and needs no DSL.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_HOME = {
    "attention": "api",
    "attention_varlen": "api",
    "decode": "api",
    "AttentionOutput": "api",
    "Stats": "api",
    "DecodeStats": "api",
    "warmup": "dispatch",
    "emulated": "dispatch",
    "support_matrix": "dispatch",
    "threshold_from_scale_factor": "threshold",
    "threshold_from_model": "threshold",
    "UnsupportedProblem": "problem",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
