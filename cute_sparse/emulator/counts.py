"""What a launch did, exactly: a view over the core's record (core/c_api.h, emulator_launch)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

MMA_MNEMONICS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
PACKED_EXPONENTIALS = ("f16x2", "bf16x2")


@dataclass(frozen=True)
class Counts:
    """Work of some warps. Equal in every completion order for a deterministic kernel.

    instructions: warp instructions issued, by opcode as PTX spells it. executed: the same without those whose guard
    was false in every lane. mma_instructions: executed, by "wgmma.mma_async", "tcgen05.mma" or "mma.sync"; macs:
    multiply-accumulates, by kind such as "wgmma.bf16". exponentials: executed ex2 warp instructions (a packed one
    counts as two). The rest is in bytes.
    """

    instructions: Mapping[str, int] = field(default_factory=dict)
    executed: Mapping[str, int] = field(default_factory=dict)
    mma_instructions: Mapping[str, int] = field(default_factory=dict)
    macs: Mapping[str, int] = field(default_factory=dict)
    exponentials: int = 0
    tma_bytes_loaded: int = 0
    tma_bytes_stored: int = 0
    tma_bytes_reduced: int = 0
    shared_bytes_read: int = 0
    shared_bytes_written: int = 0
    global_bytes_read: int = 0
    global_bytes_written: int = 0

    @property
    def warp_instructions(self) -> int:
        return sum(self.instructions.values())


BYTE_COUNTS = (
    "tma_bytes_loaded", "tma_bytes_stored", "tma_bytes_reduced", "shared_bytes_read", "shared_bytes_written",
    "global_bytes_read", "global_bytes_written",
)  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One kernel launch. shared_memory: bytes per CTA, static and dynamic. warps[i]: warp i of every CTA together.

    lines: how often warps executed each line of the PTX (1-based); a line that is missing was never reached.
    unheard: lines that made no difference to this launch: mbarrier waits that only ever passed a barrier as it was
    initialised (the first lap of a pipeline) or after which the warp only ended, arrivals that no wait learned of (the
    last lap), wgmma.fences with another between each two uses of a register.
    """

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    shared_memory: int
    seconds: float
    counts: Counts
    warps: tuple[Counts, ...]
    lines: Mapping[int, int]
    unheard: frozenset[int] = frozenset()

    def __str__(self) -> str:
        """One line: geometry and the main counts."""
        c = self.counts
        mma = sum(c.mma_instructions.values())
        return (
            f"{self.name} grid={self.grid} block={self.block} cluster={self.cluster} shared={self.shared_memory}B "
            f"instructions={c.warp_instructions} mma={mma} macs={sum(c.macs.values())} ex2={c.exponentials} "
            f"tma_loaded={c.tma_bytes_loaded}B tma_stored={c.tma_bytes_stored}B tma_reduced={c.tma_bytes_reduced}B "
            f"shared_read={c.shared_bytes_read}B shared_written={c.shared_bytes_written}B seconds={self.seconds:.3f}"
        )


def launch_from_core(record: dict) -> Launch:
    warps = tuple(_warp_counts(warp) for warp in record["warps"])
    return Launch(
        name=record["kernel"],
        grid=tuple(record["grid"]),
        block=tuple(record["block"]),
        cluster=tuple(record["cluster"]),
        shared_memory=record["shared_bytes"],
        seconds=record["seconds"],
        counts=total(warps),
        warps=warps,
        lines={int(line): times for line, times in record["lines"].items()},
        unheard=frozenset(record["unheard"]),
    )


def total(counts: Iterable[Counts]) -> Counts:
    """The sum over warps (or launches)."""
    counts = list(counts)

    def summed(name: str) -> dict[str, int]:
        result: Counter[str] = Counter()
        for c in counts:
            result.update(getattr(c, name))
        return dict(result)

    return Counts(
        **{name: summed(name) for name in ("instructions", "executed", "mma_instructions", "macs")},
        **{name: sum(getattr(c, name) for c in counts) for name in ("exponentials", *BYTE_COUNTS)},
    )


def _warp_counts(warp: dict) -> Counts:
    executed = {opcode: times for opcode, (_, times) in warp["opcodes"].items() if times}
    mma: Counter[str] = Counter()
    exponentials = 0
    for opcode, times in executed.items():
        mnemonic = ".".join(opcode.split(".")[:2])
        if mnemonic in MMA_MNEMONICS:
            mma[mnemonic] += times
        if opcode.startswith("ex2."):
            exponentials += times * (2 if opcode.endswith(PACKED_EXPONENTIALS) else 1)
    return Counts(
        instructions={opcode: issued for opcode, (issued, _) in warp["opcodes"].items()},
        executed=executed,
        mma_instructions=dict(mma),
        macs=warp["macs"],
        exponentials=exponentials,
        **{name: warp[name] for name in BYTE_COUNTS},
    )
