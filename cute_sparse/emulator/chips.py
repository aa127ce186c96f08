"""What the timing model (timing.py) knows of each chip: rates per SM and clock, and latencies in clocks.

Where the figures are from:
  [A] NVIDIA's architecture white papers and data sheets (H100, H200, Blackwell): SM counts, clocks, HBM, and the dense
      tensor rates, which divided by SMs and boost clock give 2048 16-bit multiply-accumulates a clock and SM on Hopper,
      4096 on Blackwell.
  [B] CUDA C++ programming guide, "Throughput of native arithmetic instructions", 9.0 and 10.0: 128 fp32 fma, 64
      integer, compare and convert, 16 special functions (B300: 32, NVIDIA's "Inside Blackwell Ultra"), 32 shuffles,
      all per clock and SM.
  [C] "Dissecting the NVIDIA Hopper architecture through microbenchmarking" (arXiv 2501.12084, 2402.13499) and
      "Microbenchmarking NVIDIA's Blackwell architecture" (arXiv 2512.02189): orders of magnitude of the latencies.
  [E] Measured by others: a copy on an H200, reads and writes together. The share is taken for all chips.
  [D] Assumed: no public figure was at hand. Kept the same for all chips where possible.
A latency is what a dependent instruction waits, without queues. None of them was fitted to a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Chip:
    """One product. Lanes, bytes, columns and multiply-accumulates are per clock, of one SM or (*) of one of its four
    sub-partitions."""

    name: str
    arch: str
    sms: int  # [A]
    clock_ghz: float  # the highest that it runs at [A]
    hbm_bytes_per_s: float  # [A]
    mma_macs: float  # 16-bit operands [A]; 8-bit twice, 32-bit half of it
    mufu_lanes: float  # (*) [B]
    l2_bytes: float  # that one SM gets when all ask [C]: about 5120 bytes a clock for all of Hopper
    fma_lanes: float = 32  # (*) [B]; a packed f32x2 instruction takes two turns and one issue slot
    alu_lanes: float = 16  # (*) [B]
    shared_bytes: float = 128  # [B]
    port_bytes: float = 64  # that enter one SM from L2, multicasts of other SMs included [D]
    tensor_load_columns: float = 1  # (*) of 32 lanes x 32 bits [C]
    tensor_store_columns: float = 1  # (*) [D]
    alu_latency: float = 4  # [C]
    mufu_latency: float = 18  # [D]
    shuffle_latency: float = 24  # [C]
    shared_latency: float = 29  # [C]
    global_latency: float = 600  # [C]
    tma_latency: float = 600  # from L2, and sometimes HBM [C]
    wgmma_latency: float = 32  # behind the multiplications themselves [C]
    commit_latency: float = 64  # from the last multiplication to the mbarrier's arrival [D]
    tensor_memory_latency: float = 24  # [D]
    arrive_latency: float = 16  # from an arrival to those who poll [D]
    barrier_latency: float = 20  # of a poll or a barrier that need not wait [D]
    hbm_share: float = 0.9  # of `hbm_bytes_per_s` that a copy reaches: on an H200 about 4.3 of 4.8 TB/s [E]
    hbm_bytes: float = 0  # that one SM gets of memory; 0: whatever TMA loads is in L2
    hbm_latency: float = 300  # of memory beyond L2's, for TMA, if `hbm_bytes` is not 0 [C]
    window: float = 64  # instructions among which the assembler is taken to reorder [D]

    @property
    def copied_bytes_per_s(self) -> float:
        """What a copy within the chip's memory reaches, reads and writes together."""
        return self.hbm_bytes_per_s * self.hbm_share

    def streaming(self, sms: int) -> Chip:
        """The same where memory, at a copy's speed, is shared evenly by as many SMs, which all load at once."""
        return replace(self, hbm_bytes=self.copied_bytes_per_s / (self.clock_ghz * 1e9) / sms)

    def settings(self) -> str:
        """What core/timing.cpp reads: a name and a value on each line."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return "\n".join(f"{name} {value}" for name, value in values.items() if not isinstance(value, str))


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("H100", "sm_90a", 132, 1.98, 3.35e12, 2048, 4, 38.8),
        Chip("H200", "sm_90a", 132, 1.98, 4.8e12, 2048, 4, 38.8),
        Chip("B200", "sm_100a", 148, 1.965, 8.0e12, 4096, 4, 64),
        Chip("B300", "sm_103a", 148, 1.92, 8.0e12, 4096, 8, 64),
    )
}
DEFAULT_CHIP = {"sm_90a": "H200", "sm_100a": "B200", "sm_103a": "B300"}


def chip_of(arch: str) -> Chip:
    """The chip that stands for an architecture. Raises ValueError naming those that are known."""
    if arch not in DEFAULT_CHIP:
        raise ValueError(f"{arch=} has no chip in the model; these have: {', '.join(DEFAULT_CHIP)}")
    return CHIPS[DEFAULT_CHIP[arch]]
