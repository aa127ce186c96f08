"""What a call costs the host: python -m profiling.host [--out DIR] [--runs N]

Two fresh processes share a new cache folder: in the first, the first call compiles ("cold"), in the second it finds the
kernel on disk ("disk"). Each measures, in this order,

    import      loading nvidia-cutlass-dsl and the kernels, once per process, after torch and CUDA are up
    first_call  from there until the first call's result is there
    host_time   of a warm call, until it returns: the mean over CALLS calls, behind each of which nothing waits for the
                GPU, so few that its queue does not fill; quantiles over RUNS such means

The aims are 3 s cold, 50 ms from disk, and 15 us. Rows go to DIR/host.jsonl, profiling/results/<gpu> by default.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import cute_sparse
from cute_sparse import dispatch, targets
from profiling import bench, rows, timing

CALLS, RUNS = 32, 101
SHAPE = (1, 64, 4, 128)  # batch, seqlen, heads, head_dim: the GPU is done before the host
CASE = "x".join(map(str, SHAPE))
CHILD_LIMIT_S = 120.0
MODES = {"dense": {}, "threshold": {"threshold": 0.01}}


def warm_us(call: Callable[[], object], finish: Callable[[], object], runs: int = RUNS) -> list[float]:
    """Microseconds per call, of `runs` times CALLS calls; `finish` waits for the device in between."""
    found = []
    for _ in range(runs):
        finish()
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        found.append((time.perf_counter() - begin) / CALLS * 1e6)
    finish()
    return found


def measure(device: str, arch: str, runs: int = RUNS) -> dict[str, dict[str, list[float]]]:
    """{mode: {metric: values}} of this process, which must not have called a kernel before.

    device "cuda"; or "cpu", within `cute_sparse.emulated(arch)`, which tests only that all of this works
    """
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    q = torch.randn(SHAPE, device=device).to(torch.bfloat16)
    finish()
    found: dict[str, dict[str, list[float]]] = {}
    begin = time.perf_counter()
    importlib.import_module("cutlass.cute")
    importlib.import_module(f"{dispatch.ROOM_OF_ARCH[arch]}.prefill")
    imported = time.perf_counter() - begin
    for mode, options in MODES.items():

        def call(options=options):
            return cute_sparse.attention(q, q, q, causal=True, **options)

        begin = time.perf_counter()
        call()
        finish()
        found[mode] = {"import": [imported], "first_call": [time.perf_counter() - begin]}
        found[mode]["host_time"] = warm_us(call, finish, runs)
    return found


def in_a_fresh_process(device: str, arch: str, cache: str, runs: int) -> dict[str, dict[str, list[float]]]:
    """What `measure` finds in a process of its own. Raises RuntimeError with what it printed if it fails."""
    command = [sys.executable, "-m", "profiling.host", "--measure", device, "--arch", arch, "--runs", str(runs)]
    environment = os.environ | {"CUTE_SPARSE_CACHE_DIR": cache, "CUTE_SPARSE_CACHE": "1"}
    done = subprocess.run(
        command, cwd=bench.ROOT, env=environment, capture_output=True, text=True, timeout=CHILD_LIMIT_S
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run(write: Callable[[str, str, timing.Quantiles], None], device: str, arch: str, runs: int = RUNS) -> None:
    """Measure cold and from disk; `write(mode, metric, quantiles)` takes each result."""
    with tempfile.TemporaryDirectory() as cache:
        for start in ("cold", "disk"):
            for mode, metrics in in_a_fresh_process(device, arch, cache, runs).items():
                for metric, values in metrics.items():
                    write(f"{mode}, {start}", metric, timing.quantiles(values))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m profiling.host", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder of the rows; default: profiling/results/<gpu>")
    parser.add_argument("--measure", choices=("cuda", "cpu"), help=argparse.SUPPRESS)
    parser.add_argument("--arch", help=argparse.SUPPRESS)
    parser.add_argument("--runs", type=int, default=RUNS, help=f"of {CALLS} warm calls each; default: {RUNS}")
    options = parser.parse_args(arguments)
    if options.measure:
        emulated = cute_sparse.emulated(options.arch) if options.measure == "cpu" else contextlib.nullcontext()
        with emulated:
            print(json.dumps(measure(options.measure, options.arch, options.runs)))
        return 0
    try:
        gpu = bench.gpu_name()
        writer = rows.Writer((options.out or rows.RESULTS / rows.folder_name(gpu)) / "host.jsonl")
        origin = bench.find_origin(gpu)

        def write(mode: str, metric: str, found: timing.Quantiles) -> None:
            writer.write(rows.row(origin, "host", "cute_sparse", CASE, mode, metric, found))
            print(f"{mode:20} {metric:10} {found.p50:10.3f} {rows.UNITS[metric]}")

        run(write, "cuda", targets.ARCH_OF_CAPABILITY[torch.cuda.get_device_capability()], options.runs)
    except (RuntimeError, OSError, rows.BadRow, subprocess.TimeoutExpired) as error:
        print(f"host.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
