"""What FlashAttention-4's package needs between tests that emulate different GPUs."""

from __future__ import annotations

import sys

LIBRARIES = ("flash_attn.", "quack.")


def forget_the_gpu() -> None:
    """The library asks for the GPU once and keeps the answer: empties its caches, compiled kernels too."""
    for name, module in list(sys.modules.items()):
        for value in vars(module).values() if name.startswith(LIBRARIES) else ():
            if hasattr(value, "cache_clear") and getattr(value, "__module__", "").startswith(LIBRARIES):
                value.cache_clear()
