"""Rings of shared-memory slots between warps: one mbarrier says a slot is full, another that it is empty.

A role walks a ring with a `Cursor`; advancing returns a new cursor, which the caller must rebind, because a
cursor is a value that loops carry. Arrivals are fixed when the ring is made: `fills` per slot, by the roles that
call `expect` or `publish`, and one drain per consuming warp, by `release`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr


class Cursor(NamedTuple):
    """A position in a ring: the slot, and the parity of the phase to wait for."""

    index: Any
    phase: Any


def producer_cursor() -> Cursor:
    """Before the first fill: every slot counts as drained, so that the first waits pass at once."""
    return Cursor(Int32(0), Int32(1))


def consumer_cursor() -> Cursor:
    return Cursor(Int32(0), Int32(0))


@dataclass(frozen=True)
class Ring:
    """`stages` slots; `barriers` points at 2 * stages mbarriers, the full ones first.

    drains  arrivals that empty a slot: the number of warps that call `release`
    fills   arrivals that fill a slot
    """

    barriers: Any
    stages: cutlass.Constexpr[int]
    drains: cutlass.Constexpr[int]
    fills: cutlass.Constexpr[int] = 1

    def full(self, cursor: Cursor):
        return self.barriers + cursor.index

    def empty(self, cursor: Cursor):
        return self.barriers + (cursor.index + self.stages)

    def advanced(self, cursor: Cursor) -> Cursor:
        """The next slot; the phase flips where the ring wraps."""
        if const_expr(self.stages == 1):
            return Cursor(cursor.index, cursor.phase ^ 1)
        if const_expr(self.stages == 2):
            return Cursor(cursor.index ^ 1, cursor.phase ^ cursor.index)
        wraps = cursor.index == self.stages - 1
        index = cutlass.select_(wraps, Int32(0), cursor.index + 1)
        return Cursor(index, cursor.phase ^ Int32(wraps))

    def initialise(self) -> None:
        """By one thread of the CTA, before a fence and a CTA barrier."""
        for slot in range(self.stages):
            cute.arch.mbarrier_init(self.barriers + slot, self.fills)
            cute.arch.mbarrier_init(self.barriers + self.stages + slot, self.drains)

    def acquire(self, cursor: Cursor) -> None:
        """Producer: wait until every consumer has released the slot."""
        cute.arch.mbarrier_wait(self.empty(cursor), cursor.phase)

    @cute.jit
    def expect(self, cursor: Cursor, tx_bytes: cutlass.Constexpr[int]):
        """Producer, whole warp: announce the bytes that TMA will deliver; the slot is full once they are there."""
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(self.full(cursor), tx_bytes)

    @cute.jit
    def publish(self, cursor: Cursor):
        """Producer, one thread: its part of the slot's contents is complete."""
        cute.arch.mbarrier_arrive(self.full(cursor))

    def wait(self, cursor: Cursor) -> None:
        """Consumer: wait until the slot is full."""
        cute.arch.mbarrier_wait(self.full(cursor), cursor.phase)

    @cute.jit
    def release(self, cursor: Cursor):
        """Consumer, whole warp: this warp no longer reads the slot."""
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(self.empty(cursor))
