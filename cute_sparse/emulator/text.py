"""Kernels given as PTX text: for tests of single instructions, and for looking at one statement's effect."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cute_sparse.emulator.counts import Launch
    from cute_sparse.emulator.devices import Device

Dimensions = int | tuple[int, ...]
Argument = "torch.Tensor | int | bytes | ctypes._SimpleCData"


def run_ptx(
    device: Device,
    ptx: str,
    arguments: Sequence[Argument] = (),
    *,
    grid: Dimensions = 1,
    block: Dimensions = 32,
    cluster: Dimensions = 1,
    shared_bytes: int = 0,
    kernel: str | None = None,
) -> Launch:
    """Launches a kernel of a PTX module on an entered device and returns its record.

    arguments, one for each parameter: a CPU tensor (its address), an int (64 bits), bytes (as they are: a tensor
    map, a struct) or a ctypes scalar. kernel: the module's first entry if not named. Raises what the kernel raises.
    """
    if kernel is None:
        found = re.search(r"\.entry\s+([\w$]+)", ptx)
        if found is None:
            raise ValueError("the PTX has no .entry")
        kernel = found.group(1)
    values = [_as_ctypes(device, argument) for argument in arguments]
    pointers = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(value) for value in values))
    dimensions = (ctypes.c_uint32 * 9)(*_three(grid), *_three(block), *_three(cluster))
    device.core.launch_ptx(ptx, kernel, dimensions, shared_bytes, pointers)
    device.raise_pending()
    return device.launches[-1]


def module(arch: str, body: str, *, parameters: str = "", registers: str = "", shared: str = "") -> str:
    """A PTX module with one kernel `test` around `body`."""
    return (
        f".version 8.8\n.target {arch}\n.address_size 64\n{shared}\n"
        f".visible .entry test({parameters})\n{{\n{registers}\n{body}\nret;\n}}\n"
    )


def _three(dimensions: Dimensions) -> tuple[int, int, int]:
    given = (dimensions,) if isinstance(dimensions, int) else tuple(dimensions)
    return (*given, *(1,) * (3 - len(given)))


def _as_ctypes(device: Device, argument: Argument) -> object:
    if isinstance(argument, bytes):
        return ctypes.create_string_buffer(argument, len(argument))
    if isinstance(argument, int):
        return ctypes.c_uint64(argument & (1 << 64) - 1)
    if hasattr(argument, "data_ptr"):
        device.register(argument)
        return ctypes.c_uint64(argument.data_ptr())
    return argument
