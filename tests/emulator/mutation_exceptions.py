"""Removals that nobody notices, and why they should not matter: read off the PTX, not proven. By architecture and by the statement without its registers.

Statements that a launch itself shows to make no difference (a first lap's waits, a last lap's arrivals, doubled fences)
are not listed: `emulator.mutate` tells them apart as idle.
"""

from __future__ import annotations

from collections import Counter

from cute_sparse.emulator.mutate import Survey

PING_PONG = "the warpgroups take turns on the tensor core: a schedule for speed; no data passes under it"
LAST_STORE = "the wait for a store's reads guards the memory against the next work tile; this launch has none behind it"
RELEASE_ONLY = (
    "a slot whose tile was skipped is only handed back; what fills it next is ordered behind the other warpgroups' "
    "arrivals, too, in this launch"
)
NOT_EXPLAINED = "not explained yet: a bound that may only fall"
BEFORE_IDLE_ARRIVAL = (
    "orders the lanes before an arrival that nobody waits for in this launch (its last lap), or after a read by all lanes "
    "of one word, which counts as the first lane's"
)
SCOREBOARD = (
    "a loaded register is consumed before anything is handed on, and the assembler makes that wait for the load "
    "(FlashAttention-4's forward has no tcgen05.wait::ld at all)"
)
TCGEN05_FENCE = (
    "a kernel that has both kinds of this fence is held to them, and no access in this launch depended on this one; "
    "that it is doubled has not been proven"
)

# (reason, how many statements of this shape may survive in one kernel)
EXCEPTIONS: dict[str, dict[str, tuple[str, int]]] = {
    "sm_90a": {
        "bar.sync %, 256;": (PING_PONG, 2),
        "bar.sync %, 128;": (LAST_STORE, 1),
        "cp.async.bulk.wait_group.read 0;": (LAST_STORE, 1),
        "mbarrier.try_wait.parity.shared.b64 P1, [%], %, 10000000;": (RELEASE_ONLY, 1),
        "bar.warp.sync -1;": (BEFORE_IDLE_ARRIVAL, 2),
    },
    "sm_100a": {
        "tcgen05.wait::ld.sync.aligned;": (SCOREBOARD, 14),
        "tcgen05.fence::before_thread_sync;": (TCGEN05_FENCE, 2),
        "tcgen05.fence::after_thread_sync;": (TCGEN05_FENCE, 3),
        "bar.warp.sync -1;": (BEFORE_IDLE_ARRIVAL, 6),
        "mbarrier.try_wait.parity.shared.b64 P1, [%], %, 10000000;": (NOT_EXPLAINED, 1),
    },
}


def unexplained(arch: str, survey: Survey) -> list[str]:
    """The surviving statements beyond those that EXCEPTIONS explains."""
    survived = Counter(mutation.shape for mutation in survey.survived)
    return [shape for shape, count in survived.items() if count > EXCEPTIONS[arch].get(shape, ("", 0))[1]]
