"""Modelled cycles of a launch: its trace (core/trace.h) run through a model of one chip (core/timing.h, chips.py).

    with emulator.device("sm_100a") as device:
        with timing.traced(device):
            kernel(...)
            estimate = timing.estimate(device, chips.CHIPS["B200"])
    print(estimate.cycles)

For comparing kernels on one chip. What it leaves out is listed in core/timing.h; nothing of it was measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cute_sparse.emulator.chips import Chip
from cute_sparse.emulator.counts import Counts, Launch
from cute_sparse.emulator.devices import Device
from cute_sparse.emulator.errors import EmulatorError

ALL_CLUSTERS = -1
NOT_TRACED = -2


@dataclass(frozen=True)
class WarpTime:
    """One warp, in clocks. end: when its last instruction issued. issued: instructions that took an issue slot. units:
    clocks for which it kept a unit busy ("fma", "alu", "mufu": its sub-partition's). waits: clocks held by "mbarrier",
    "bar.sync", "cluster", "wgmma", "tensor memory", "bulk group" (cp.async's, too); lines: the same by the
    PTX line of the wait."""

    warp: int
    end: float
    issued: int
    units: Mapping[str, float]
    waits: Mapping[str, float]
    lines: Mapping[int, float]


@dataclass(frozen=True)
class CtaTime:
    """tensor, tma, shared: busy clocks of the SM's tensor core, TMA and shared memory (warps' own accesses).
    fresh_bytes: that TMA loaded and no CTA before it in the launch, among those traced, had loaded."""

    tensor: float
    tma: float
    shared: float
    fresh_bytes: float
    warps: tuple[WarpTime, ...]


@dataclass(frozen=True)
class Event:
    """For a timeline: `track` (a warp or an engine) of a CTA of the cluster did `name` from `begin` to `end` clocks."""

    cta: int
    track: str
    name: str
    begin: float
    end: float


@dataclass(frozen=True)
class Estimate:
    """One cluster. cycles: until everything it started has ended."""

    cycles: float
    ctas: tuple[CtaTime, ...]
    events: tuple[Event, ...]


@contextlib.contextmanager
def traced(device: Device, cluster: int = ALL_CLUSTERS) -> Iterator[None]:
    """Launches of an entered device are traced: one cluster of each (its number in the launch), or all.

    The traces live until the context ends. Raises EmulatorError if the device's order is not "eager".
    """
    if device.order != "eager":
        raise EmulatorError(f"launches are traced in the eager order, this device's is {device.order!r}")
    device.core.trace(cluster)
    try:
        yield
    finally:
        device.core.trace(NOT_TRACED)


def traced_clusters(device: Device, launch: int = -1) -> int:
    """How many clusters of a traced launch (the last one by default) there are estimates of."""
    return device.core.traced_clusters(_index(device, launch))


def estimate(device: Device, chip: Chip, *, launch: int = -1, cluster: int = 0, events: bool = False) -> Estimate:
    """The modelled time of one traced cluster, as if it had its SMs to itself.

    launch: among the traced ones, the last by default. cluster: its position among the launch's traced clusters.
    Raises EmulatorError if nothing was traced, IndexError for what is not there.
    """
    index = _index(device, launch)
    if not 0 <= cluster < device.core.traced_clusters(index):
        raise IndexError(f"{cluster=}: {device.core.traced_clusters(index)} clusters were traced")
    record = device.core.estimate(index, cluster, chip.settings(), events)
    ctas = tuple(
        CtaTime(c["tensor"], c["tma"], c["shared"], c["fresh_bytes"], tuple(_warp(w) for w in c["warps"]))
        for c in record["ctas"]
    )
    return Estimate(record["cycles"], ctas, tuple(Event(*event) for event in record["events"]))


def roles(launch: Launch) -> tuple[str, ...]:
    """What the warps of each index do, by their instructions: "MMA, exponentials", "load", "idle"."""
    return tuple(_role(counts) for counts in launch.warps)


def _role(counts: Counts) -> str:
    does = {
        "MMA": counts.mma_instructions,
        "exponentials": counts.exponentials,
        "load": counts.tma_bytes_loaded,
        "store": counts.tma_bytes_stored or counts.global_bytes_written,
        "tensor memory": any(opcode.startswith("tcgen05.ld") for opcode in counts.executed),
    }
    return ", ".join(name for name, happens in does.items() if happens) or "idle"


def _warp(w: dict) -> WarpTime:
    lines = {int(line): clocks for line, clocks in w["lines"].items()}
    return WarpTime(w["warp"], w["end"], w["issued"], w["units"], w["waits"], lines)


def _index(device: Device, launch: int) -> int:
    launches = device.core.traced_launches()
    if launches == 0:
        raise EmulatorError("no launch has been traced: launch inside `with timing.traced(device)`")
    if not -launches <= launch < launches:
        raise IndexError(f"{launch=}: {launches} launches were traced")
    return launch % launches
