"""Compiles ahead, one process per core: python -m profiling.warm [--arch sm_90a] [--jobs N]

Into the disk cache come the kernels of every case of the benchmark (profiling/bench.py), and the emulator's core is
built. Needs no GPU if the architecture is given. Exit status: 1 if something did not compile, and the rest is there; 2
for a request that cannot be run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

import cute_sparse
from cute_sparse.dispatch import ROOM_OF_ARCH
from cute_sparse.targets import ARCH_OF_CAPABILITY
from profiling import bench, decode

EMULATOR = {"emulator": "core"}
STATS = dict(threshold=True, return_stats=True)  # with which the benchmark searches thresholds


def calls() -> list[dict]:
    """The arguments of `cute_sparse.warmup`, each once, in the order in which the benchmark comes to them."""
    found: dict[tuple, dict] = {}
    for kind, cases, sparse in (
        ("prefill", bench.CASES, bench.LONG | bench.SMALL), ("decode", decode.CASES, decode.LONG | decode.SMALL),
    ):  # fmt: skip
        for name, shape in cases.items():
            call = dict(kind=kind, head_dim=shape.head_dim, head_dim_v=shape.head_dim_v)
            if kind == "prefill":
                call |= dict(causal=shape.causal, window=shape.window_left is not None)
            else:
                call |= dict(page_size=shape.page_size)
            for more in ({}, dict(threshold=True), STATS) if name in sparse else ({},):
                found.setdefault(tuple((call | more).items()), call | more)
    return list(found.values())


def compile_one(arch: str, call: dict) -> float:
    """Seconds."""
    begin = time.perf_counter()
    if call == EMULATOR:
        from cute_sparse.emulator.devices import load_core

        load_core()
    else:
        cute_sparse.warmup(arch=arch, **call)
    return time.perf_counter() - begin


def warm(arch: str, jobs: list[dict], processes: int) -> list[str]:
    """What did not compile, a line each."""
    failures = []
    fresh = multiprocessing.get_context("spawn")  # a fork would share what the DSL and PyTorch hold
    with ProcessPoolExecutor(min(processes, len(jobs)), fresh) as pool:
        futures = {pool.submit(compile_one, arch, call): call for call in jobs}
        for future in as_completed(futures):
            text = " ".join(f"{name}={value}" for name, value in futures[future].items())
            try:
                print(f"{future.result():6.1f} s  {text}", flush=True)
            except Exception as error:
                failures.append(f"{text}: {type(error).__name__}: {error}")
    return failures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m profiling.warm", description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", choices=tuple(ROOM_OF_ARCH), help="default: this GPU's")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; default: the cores")
    options = parser.parse_args(arguments)
    arch = options.arch
    if arch is None:
        try:
            bench.gpu_name()
        except RuntimeError as error:
            print(f"warm.py: {error}", file=sys.stderr)
            return 2
        arch = ARCH_OF_CAPABILITY[torch.cuda.get_device_capability()]
    failures = warm(arch, [EMULATOR, *calls()], options.jobs)
    for line in failures:
        print(f"FAILED: {line}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
