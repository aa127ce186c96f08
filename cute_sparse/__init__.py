"""Sparse attention in CuTe-DSL: tiles whose softmax weight is provably negligible are skipped.

Importing it needs no DSL: that, the kernels and the emulator load when a call needs them. The names are plain
attributes, not loaded on first use, because torch.compile does not trace a module's `__getattr__`.
"""

from cute_sparse.api import attention, attention_varlen, decode
from cute_sparse.calls import AttentionOutput, DecodeStats, Stats
from cute_sparse.dispatch import emulated, support_matrix, warmup
from cute_sparse.problem import UnsupportedProblem
from cute_sparse.threshold import threshold_from_model, threshold_from_scale_factor

__version__ = "0.1.0"
__all__ = [
    "AttentionOutput",
    "DecodeStats",
    "Stats",
    "UnsupportedProblem",
    "attention",
    "attention_varlen",
    "decode",
    "emulated",
    "support_matrix",
    "threshold_from_model",
    "threshold_from_scale_factor",
    "warmup",
]
