"""Spans of a kernel's time, for the DSL's in-kernel event tracing (IKET, profiling/iket.sh).

The compiler drops them unless CUTE_DSL_COMPILER_OPT names "iket"; then each begin and end is recorded with its warp and
the SM's clock.
"""

import contextlib
from collections.abc import Iterator

from cutlass.cute.experimental import iket


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
    """What the warp does inside is shown under `name`; spans may nest, and hold whole loops and branches only."""
    iket.range_push(name)
    yield
    iket.range_pop()
