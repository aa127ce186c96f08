"""Timing on a GPU: interleaved runs with a flushed L2, their quantiles, and the state the GPU was in.

Under a profiler (PROFILED_VARIABLE set, as ncu.sh and nsys.sh do) nothing here times anything: bench.py then runs
each provider once between `profiled` marks.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

import torch

PROFILED_VARIABLE = "CUTE_SPARSE_PROFILED"
# Many times any L2 there is (B200: 126 MB), so that reading them, 0.5 ms at H200's 4.3 TB/s, outlasts what a call costs
# the host: a peer of slow Python (FlexAttention's guards) would be timed with a GPU that waits for it.
FLUSH_BYTES = 2 << 30
LOAD_MS = 1300.0  # how long the GPU is busy for its state to be read: the power told is an average over one second
LOAD_SHARE_LEFT = 0.2
LOAD_CALLS_MAX = 50_000
WARMUP_RUNS = 3
ROUNDS_MIN, ROUNDS_MAX = 7, 51
CASE_BUDGET_MS = 4000.0  # of one case's timed runs, all providers together

Call = Callable[[], object]


class Quantiles(NamedTuple):
    p20: float
    p50: float
    p80: float


def quantiles(values: list[float]) -> Quantiles:
    """Of at least one value, linear between neighbours."""
    if not values:
        raise ValueError("no value to take quantiles of")
    if len(values) == 1:
        return Quantiles(*values * 3)
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Quantiles(fifths[0], statistics.median(values), fifths[3])


def once(value: float) -> Quantiles:
    return Quantiles(value, value, value)


class Timer(Protocol):
    def milliseconds(self, call: Call) -> float: ...


class EventTimer:
    """One call between CUDA events, behind a read of FLUSH_BYTES: it evicts L2, and outlasts the host's launch.

    A write would leave L2 full of lines to be written back, at the expense of the call: tens of megabytes beside a
    decode call that reads no more.
    """

    def __init__(self) -> None:
        self._flush = torch.ones(FLUSH_BYTES // 8, dtype=torch.int64, device="cuda")
        self._largest = self._flush.amax()

    def milliseconds(self, call: Call) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.amax(self._flush, dim=0, out=self._largest)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def interleaved(calls: Mapping[str, Call], timer: Timer, tick: Call = lambda: None) -> dict[str, list[float]]:
    """Milliseconds of each call: after a warm-up, rounds in which each runs once, and another goes first each time.

    The number of rounds is odd and follows from the warm-up's times, so that a case takes about CASE_BUDGET_MS.
    """
    total = 0.0
    for call in calls.values():
        total += [timer.milliseconds(call) for _ in range(WARMUP_RUNS)][-1]
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds(total)):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(timer.milliseconds(calls[name]))
        tick()
    return times


def rounds(round_ms: float) -> int:
    affordable = int(CASE_BUDGET_MS / max(round_ms, 1e-3))
    return min(max(affordable, ROUNDS_MIN), ROUNDS_MAX) | 1


# ---- Profilers -----------------------------------------------------------------------------------------------------


def profiled() -> bool:
    return bool(os.environ.get(PROFILED_VARIABLE))


def phase(name: str) -> contextlib.AbstractContextManager:
    """An NVTX range, for Nsight Systems' timeline."""
    import nvtx

    return nvtx.annotate(name, domain="cute_sparse")


@contextlib.contextmanager
def captured(name: str) -> Iterator[None]:
    """What a profiler started with "capture from cudaProfilerStart" records, as an NVTX range of this name."""
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    try:
        with phase(name):
            yield
            torch.cuda.synchronize()
    finally:
        torch.cuda.cudart().cudaProfilerStop()


# ---- The GPU's state -----------------------------------------------------------------------------------------------

SMI_FIELDS = {
    "sm_clock": "clocks.sm",
    "memory_clock": "clocks.mem",
    "power": "power.draw",
    "temperature": "temperature.gpu",
}


def gpu_state() -> dict[str, float]:
    """sm_clock, memory_clock (MHz), power (W), temperature (C), through NVML or nvidia-smi; what neither tells is
    absent."""
    return _state_of_nvml() or _state_of_smi()


def _state_of_nvml() -> dict[str, float]:
    try:
        import pynvml
    except ImportError:
        return {}
    reads = {
        "sm_clock": lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
        "memory_clock": lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM),
        "power": lambda gpu: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
        "temperature": lambda gpu: pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
    }
    found = {}
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties().uuid}"  # NVML counts GPUs that this process may not see
        gpu = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except (pynvml.NVMLError, AttributeError):
        return {}
    for name, read in reads.items():
        with contextlib.suppress(pynvml.NVMLError, AttributeError):  # what this GPU, or this version, does not tell
            found[name] = float(read(gpu))
    return found


def _state_of_smi() -> dict[str, float]:
    query = ",".join(SMI_FIELDS.values())
    values = smi(query)
    found = {}
    for name, value in zip(SMI_FIELDS, values, strict=False):
        with contextlib.suppress(ValueError):
            found[name] = float(value)
    return found


def smi(query: str) -> list[str]:
    """The first GPU's answer to nvidia-smi --query-gpu; empty where there is none."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = done.stdout.strip().splitlines()
    return [value.strip() for value in lines[0].split(",")] if lines else []


def state_under_load(call: Call, call_ms: float) -> dict[str, float]:
    """`gpu_state` while the GPU repeats the call: an idle one would show other clocks.

    The state is read once before, because the first reading starts NVML, which outlasts the calls that a queue holds,
    and then when the last LOAD_SHARE_LEFT of the calls are to run.
    """
    gpu_state()
    calls = min(LOAD_CALLS_MAX, max(2, int(LOAD_MS / max(call_ms, 1e-3))))
    nearly_done = torch.cuda.Event()
    for left in range(calls, 0, -1):
        if left == max(1, int(calls * LOAD_SHARE_LEFT)):
            nearly_done.record()
        call()
    nearly_done.synchronize()
    state = gpu_state()
    torch.cuda.synchronize()
    return state
