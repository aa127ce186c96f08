"""Removals that nobody notices, and why they do not matter: read off the PTX. By kernel and by the statement without its registers.

Statements that a launch itself shows to make no difference (a first lap's waits, a last lap's arrivals, doubled fences)
are not listed: `emulator.mutate` tells them apart as idle.
"""

from __future__ import annotations

from collections import Counter

from cute_sparse.emulator.mutate import Survey

MEET_AGAIN = (
    "all lanes of a load or softmax warp read the votes on a KV tile, whose slot is written again eight KV tiles "
    "later; they meet between the two in any case, at the other query tile's votes or the next ones"
)
WAIT_FOR_ONE = (
    "the lanes of the MMA warp wait for the one that multiplies a work tile; else they would poll for the next work tile"
)
LAST_BEFORE_THE_END = (
    "the last wait of the softmax and of the correction warps, for a barrier of another role; the warp then tells that its "
    "tensor memory may be freed, and ends. It orders shared memory that nobody touches any more"
)

PASSED_BY = (
    "a warpgroup waits for K or V of a tile of which it reads nothing, lest its release come a lap early (`_pass_by`). "
    "Under a causal mask that cannot be: such tiles come first in a work tile, the first of them behind the new Q, for "
    "which the others have released all K and all but the last V; each further one in the warpgroup's turn, behind their "
    "release of what was in its slots before. Under a window, tiles passed by at the end need the wait"
)
MET_AT_THE_TURN = (
    "all lanes read the first work tile, and its slot is written again two work tiles later, behind the wait for its Q to be "
    "released: each warp's lanes have met at a turn by then. A work tile without keys has none, but is never the first"
)
COMMITTED_TOGETHER = (
    "the load warp waits for one query tile's buffer, then for the other's: both are released by two commits in a row, "
    "behind the last Q K^T of both, so that whoever has waited for one may write the other"
)
FENCED_AGAIN = (
    "it follows the initialisation of one barrier; all warps execute another one behind the rest of the barriers and "
    "before the cluster's barrier"
)
BEHIND_A_DECISION = (
    "it follows the initialisation of V's ring, whose first copy is behind a decision on a tile, and that behind the "
    "fence of those who have loaded Q, which comes behind the start of all"
)
WAIT = "mbarrier.try_wait.parity.shared.b64 P1, [%], %, 10000000;"

# (reason, how many statements of this shape may survive in one kernel)
EXCEPTIONS: dict[str, dict[str, tuple[str, int]]] = {
    "our prefill, sm_90a, dense": {WAIT: (PASSED_BY, 1), "bar.warp.sync -1;": (MET_AT_THE_TURN, 1)},
    "our prefill, sm_90a, threshold": {WAIT: (PASSED_BY, 2), "bar.warp.sync -1;": (MET_AT_THE_TURN, 1)},
    "our prefill, sm_100a, dense": {"bar.warp.sync -1;": (WAIT_FOR_ONE, 1)},
    "our prefill, sm_100a, pairs of CTAs": {"bar.warp.sync -1;": (WAIT_FOR_ONE, 1)},
    "our prefill, sm_100a, threshold": {"bar.warp.sync -1;": (f"{MEET_AGAIN}. And one: {WAIT_FOR_ONE}", 5)},
    "our decode, sm_90a, dense": {},
    "our decode, sm_90a, threshold": {"fence.mbarrier_init.release.cluster;": (BEHIND_A_DECISION, 1)},
    "our decode, sm_100a, dense": {},
    "our decode, sm_100a, threshold": {"fence.mbarrier_init.release.cluster;": (BEHIND_A_DECISION, 1)},
    "FlashAttention-4, sm_90a": {},
    "FlashAttention-4, sm_100a": {WAIT: (LAST_BEFORE_THE_END, 2)},
    "FlashAttention-4, sm_100a, head dim 64, full": {WAIT: (f"{LAST_BEFORE_THE_END}. And one: {COMMITTED_TOGETHER}", 3)},
    "FlashAttention-4, sm_100a, pairs of CTAs": {
        WAIT: (f"{LAST_BEFORE_THE_END}. And one: {COMMITTED_TOGETHER}", 3),
        "fence.mbarrier_init.release.cluster;": (FENCED_AGAIN, 1),
    },
}


def unexplained(kernel: str, survey: Survey) -> list[str]:
    """The surviving statements beyond those that EXCEPTIONS explains."""
    survived = Counter(mutation.shape for mutation in survey.survived)
    return [shape for shape, count in survived.items() if count > EXCEPTIONS[kernel].get(shape, ("", 0))[1]]
