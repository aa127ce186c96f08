"""Runs CuTe-DSL kernels on the CPU: their own PTX, interpreted, checked and counted, for sm_90a, sm_100a, sm_103a.

    from cute_sparse import emulator

    with emulator.device("sm_100a", order="random", seed=3) as device:
        compiled = cute.compile(kernel, from_dlpack(x))  # any CuTe-DSL code, CPU tensors
        compiled(from_dlpack(x))
    for launch in device.launches:
        print(launch)

`python -m cute_sparse.emulator --arch sm_90a script.py` runs an unmodified script that uses torch's "cuda" device.
It knows nothing of attention. The first use builds a C++ core (see build.py); importing this does not.
"""

from __future__ import annotations

from cute_sparse.emulator import errors, hooks, torch_cuda
from cute_sparse.emulator.counts import Counts, Launch
from cute_sparse.emulator.devices import ARCHES, Device, entered, load_core
from cute_sparse.emulator.errors import EmulatorError

__all__ = ["ARCHES", "Counts", "Device", "EmulatorError", "Launch", "device", "entered", "errors", "register"]

device = Device  # with emulator.device("sm_90a"): ..
Device.installs = hooks.install, torch_cuda.install


def register(cubin: bytes, ptx: str) -> None:
    """Tells the emulator the PTX of a cubin that was compiled elsewhere (for kernels from a disk cache).

    The same cubin again replaces its PTX, also for functions that are loaded already.
    """
    load_core().add_program(cubin, ptx)
