"""Rows of measurements: one line of JSON each, appended and flushed one by one, so that an error later loses none.

A row is one number: its median and quantiles over repeated runs (all three equal where there was one).

    op        "prefill", "decode"; "host" for what a call costs the host (profiling/host.py)
    provider  whose code ran: "cute_sparse", or a peer's name (profiling/peers.py); "gpu" for the machine's own state
    case      name of a case (profiling/bench.py)
    mode      "dense" on random input; on structured input "structured, dense", or "sparsity 0.75": that share of the
              tiles was to be skipped
    metric    time (ms), rate (TFLOP/s of the dense work), bandwidth (TB/s, of decode: bytes of K and V, each once, per
              time; a copy's are those that it reads and writes), error (relative L2 against fp32, same tiles),
              error_dense (the same against all tiles), sparsity (share skipped of the tiles visited),
              threshold (lambda), import, first_call (s), host_time (us per warm call), sm_clock (MHz),
              memory_clock (MHz), power (W), temperature (C)
    gpu, driver, torch, cutlass_dsl, commit, time    where, with what and when; rows of one run share their time.
              cutlass_dsl: the version of the DSL and of its CUDA toolkit
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
UNITS = {
    "time": "ms",
    "rate": "TFLOP/s",
    "bandwidth": "TB/s",
    "error": "relative L2",
    "error_dense": "relative L2",
    "sparsity": "share",
    "threshold": "lambda",
    "import": "s",
    "first_call": "s",
    "host_time": "us",
    "sm_clock": "MHz",
    "memory_clock": "MHz",
    "power": "W",
    "temperature": "C",
}


@dataclass(frozen=True)
class Origin:
    """Where a row comes from: the fields that all rows of one run share."""

    gpu: str
    driver: str
    torch: str
    cutlass_dsl: str
    commit: str
    time: str


@dataclass(frozen=True)
class Row:
    op: str
    provider: str
    case: str
    mode: str
    metric: str
    unit: str
    p20: float
    p50: float
    p80: float
    gpu: str
    driver: str
    torch: str
    cutlass_dsl: str
    commit: str
    time: str

    def __post_init__(self) -> None:
        if UNITS.get(self.metric) != self.unit:
            raise ValueError(f"metric={self.metric!r} in unit={self.unit!r}; the metrics are {UNITS}")
        for name, value in asdict(self).items():
            wanted = (int, float) if name in ("p20", "p50", "p80") else str
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise ValueError(f"{name}={value!r} is not a {'number' if wanted is not str else 'string'}")
        if not self.p20 <= self.p50 <= self.p80:  # false for NaN, too
            raise ValueError(f"p20={self.p20}, p50={self.p50}, p80={self.p80} do not ascend")


FIELDS = tuple(field.name for field in fields(Row))


class BadRow(ValueError):
    """A line that is no row of this schema; the message names the file and the line."""


def row(origin: Origin, op: str, provider: str, case: str, mode: str, metric: str, quantiles: Iterable[float]) -> Row:
    return Row(op, provider, case, mode, metric, UNITS[metric], *quantiles, **asdict(origin))


class Writer:
    """Appends rows to a file, which is made if absent.

    Raises, before anything is measured, OSError where the folder cannot be written, and BadRow where the file holds
    anything but rows of this schema.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a"):
                pass
        except OSError as error:
            raise OSError(f"{path.parent}: results cannot be written there: {error.strerror or error}") from error
        for _ in read(path):
            pass

    def write(self, row: Row) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read(path: Path) -> Iterator[Row]:
    """The rows of a file, in the order written. Raises BadRow at a line of another schema."""
    with path.open() as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
                if set(values) != set(FIELDS):
                    difference = sorted(set(values) ^ set(FIELDS))
                    raise ValueError(f"missing or unknown fields: {', '.join(difference)}")
                yield Row(**values)
            except (ValueError, TypeError) as error:
                raise BadRow(f"{path}:{number}: not a row of this schema: {error}") from error


def folder_name(gpu: str) -> str:
    """A GPU's name as a folder: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
