"""The built core as Python sees it: core/c_api.h through ctypes."""

from __future__ import annotations

import ctypes
import json
from functools import lru_cache
from pathlib import Path

from cute_sparse.emulator import errors

ORDERS = ("eager", "late", "random")  # enum Order in core/machine.h


class Core:
    """One per process: the library holds the state."""

    def __init__(self, path: Path):
        self.path = path
        lib = self._lib = ctypes.CDLL(str(path))
        u32, u64, text = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_char_p
        lib.emulator_enter.argtypes = [text, u32, ctypes.c_int, u64, u32, ctypes.c_int, u64]
        lib.emulator_add_memory.argtypes = [u64, u64, text, ctypes.c_int]
        lib.emulator_remove_memory.argtypes = [u64]
        lib.emulator_add_program.argtypes = [text, ctypes.c_size_t, text, ctypes.c_size_t]
        lib.emulator_unload_library.argtypes = [ctypes.c_void_p]
        dimensions, pointers = ctypes.POINTER(u32), ctypes.POINTER(ctypes.c_void_p)
        lib.emulator_launch_ptx.argtypes = [text, text, dimensions, u32, pointers]
        lib.emulator_record.argtypes = [ctypes.c_int]
        lib.emulator_recorded_ptx.restype = ctypes.c_void_p
        lib.emulator_replay.argtypes = [text, ctypes.c_int, u64]
        lib.emulator_trace.argtypes = [ctypes.c_int64]
        lib.emulator_traced_launches.restype = ctypes.c_size_t
        lib.emulator_traced_clusters.argtypes = [ctypes.c_size_t]
        lib.emulator_traced_clusters.restype = ctypes.c_size_t
        lib.emulator_estimate.argtypes = [ctypes.c_size_t, ctypes.c_size_t, text, ctypes.c_int]
        lib.emulator_estimate.restype = ctypes.c_void_p
        lib.emulator_launch_count.restype = ctypes.c_size_t
        lib.emulator_launch.argtypes = [ctypes.c_size_t]
        lib.emulator_launch.restype = ctypes.c_void_p
        lib.emulator_take_error.restype = ctypes.c_void_p
        lib.emulator_free.argtypes = [ctypes.c_void_p]

    def enter(
        self, arch: str, sms: int, order: str, seed: int, threads: int, checks: bool, max_warp_instructions: int
    ) -> None:
        status = self._lib.emulator_enter(
            arch.encode(), sms, ORDERS.index(order), seed, threads, checks, max_warp_instructions
        )
        if status != 0:
            raise self.take_error()

    def leave(self) -> None:
        self._lib.emulator_leave()

    def add_memory(self, address: int, size_bytes: int, name: str, writable: bool = True) -> None:
        self._lib.emulator_add_memory(address, size_bytes, name.encode(), writable)

    def remove_memory(self, address: int) -> None:
        self._lib.emulator_remove_memory(address)

    def add_program(self, cubin: bytes, ptx: str) -> None:
        encoded = ptx.rstrip("\0").encode()
        self._lib.emulator_add_program(cubin, len(cubin), encoded, len(encoded))

    def unload_library(self, handle: int) -> None:
        self._lib.emulator_unload_library(handle)

    def launch_ptx(self, ptx: str, kernel: str, dimensions: object, shared_bytes: int, arguments: object) -> None:
        """Launches a kernel of a PTX text; an error stays pending (take_error)."""
        self._lib.emulator_launch_ptx(ptx.encode(), kernel.encode(), dimensions, shared_bytes, arguments)

    def record(self, records: bool) -> None:
        """From now on the last launch is kept, with all memory before and after it, for `replay`."""
        self._lib.emulator_record(records)

    def recorded_ptx(self) -> str:
        return self._text(self._lib.emulator_recorded_ptx())

    def replay(self, ptx: str, order: str, seed: int) -> bool:
        """Runs the recorded launch with another PTX; True if it leaves the same memory. Raises what it raises."""
        status = self._lib.emulator_replay(ptx.encode(), ORDERS.index(order), seed)
        if status > 1:
            raise self.take_error() from None
        return status == 0

    def trace(self, cluster: int) -> None:
        """From now on launches are traced: one cluster of each, all (-1), or none (-2), which forgets the traces."""
        self._lib.emulator_trace(cluster)

    def traced_launches(self) -> int:
        return self._lib.emulator_traced_launches()

    def traced_clusters(self, launch: int) -> int:
        return self._lib.emulator_traced_clusters(launch)

    def estimate(self, launch: int, cluster: int, settings: str, events: bool) -> dict:
        """The timing of a traced cluster as core/timing.h describes it."""
        pointer = self._lib.emulator_estimate(launch, cluster, settings.encode(), events)
        if pointer is None:
            raise self.take_error()
        return json.loads(self._text(pointer))

    def launch_count(self) -> int:
        return self._lib.emulator_launch_count()

    def launch(self, index: int) -> dict:
        """One launch as core/c_api.h describes it."""
        return json.loads(self._text(self._lib.emulator_launch(index)))

    def take_error(self) -> errors.EmulatorError | None:
        """This thread's pending error, which the core then forgets."""
        pointer = self._lib.emulator_take_error()
        return None if pointer is None else errors.from_core(json.loads(self._text(pointer)))

    def _text(self, pointer: int) -> str:
        try:
            return ctypes.string_at(pointer).decode(errors="replace")
        finally:
            self._lib.emulator_free(pointer)


@lru_cache(maxsize=1)
def load(path: Path) -> Core:
    return Core(path)
