"""The emulated device: entering it, its memory, its launches."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

from cute_sparse.emulator import build, errors, library
from cute_sparse.emulator.counts import Launch, launch_from_core
from cute_sparse.emulator.library import ORDERS, Core
from cute_sparse.emulator.memory import Registry, is_marked
from cute_sparse.emulator.patches import Patches

DSL_PACKAGE = "nvidia-cutlass-dsl"
DSL_VERSION = "4.8.1"
FFI_PACKAGE = "apache-tvm-ffi"
ARCHES = {"sm_90a": (9, 0), "sm_100a": (10, 0), "sm_103a": (10, 3)}  # compute capability

_entered: Device | None = None
_entering = threading.Lock()
_core: Core | None = None


class Device:
    """An emulated GPU, to be entered with `with`; `emulator.device` is its other name.

    arch: "sm_90a", "sm_100a" or "sm_103a". order: when asynchronous work completes and which warp runs first: "eager",
    "late" (as late as anything allows) or "random" (by `seed`). sms: the number of multiprocessors that persistent
    kernels see; a small one gives each CTA many tiles. threads: of the host (all of them by default); independent
    clusters run in parallel. checks: races, uninitialised reads and data in flight are reported; bounds always are.
    max_warp_instructions: of one launch, no limit by default. torch_cuda: torch's "cuda" device is this one, too.
    Raises UnknownArch, ValueError; on entering also UnsupportedVersion, BuildError, AlreadyEntered.

    Inside it, CuTe-DSL compiles for `arch`, takes CPU tensors for device tensors and launches into the emulator.
    launches: what ran so far, readable behind the `with` block, too. on_launch: called with each launch that ended.
    """

    def __init__(
        self,
        arch: str,
        *,
        order: str = "eager",
        seed: int = 0,
        sms: int = 4,
        threads: int | None = None,
        checks: bool = True,
        max_warp_instructions: int | None = None,
        torch_cuda: bool = False,
    ):
        if arch not in ARCHES:
            raise errors.UnknownArch(f"{arch=} is not emulated; these are: {', '.join(ARCHES)}")
        if order not in ORDERS:
            raise ValueError(f"{order=} must be one of {', '.join(ORDERS)}")
        if sms < 1:
            raise ValueError(f"{sms=} must be at least 1")
        if threads is not None and threads < 1:
            raise ValueError(f"{threads=} must be at least 1")
        if max_warp_instructions is not None and max_warp_instructions < 1:
            raise ValueError(f"{max_warp_instructions=} must be at least 1")
        self.arch, self.order, self.seed, self.sms = arch, order, seed, sms
        self.threads = threads if threads is not None else os.cpu_count() or 1
        self.checks, self.max_warp_instructions, self.torch_cuda = checks, max_warp_instructions, torch_cuda
        self.capability = ARCHES[arch]
        self.on_launch: Callable[[Launch], None] | None = None
        self._launches: list[Launch] = []

    installs: tuple[Callable[[Device, Patches], None], ...] = ()  # what entering changes; the package names them
    core: Core
    memory: Registry
    dump_directory: Path  # where the compiler leaves PTX and cubin for a moment

    def __enter__(self) -> Device:
        global _entered
        with _entering:
            if _entered is not None:
                raise errors.AlreadyEntered(f"an emulated {_entered.arch} is entered already: leave it first")
            self.core = load_core()
            self.memory = Registry(self.core)
            self._launches = []
            self._temporary = tempfile.TemporaryDirectory(prefix="cute_sparse_emulator_")
            self.dump_directory = Path(self._temporary.name)
            self._patches = Patches()
            try:
                self.core.enter(
                    self.arch, self.sms, self.order, self.seed, self.threads, self.checks,
                    self.max_warp_instructions or 0,
                )  # fmt: skip
                for install in self.installs:
                    install(self, self._patches)
            except BaseException:
                self._leave()
                raise
            _entered = self
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        global _entered
        with _entering:
            self._collect()
            self._leave()
            _entered = None

    def _leave(self) -> None:
        self._patches.restore()
        self.memory.clear()
        self.core.leave()
        self._temporary.cleanup()

    @property
    def launches(self) -> list[Launch]:
        """Every launch since the device was entered, oldest first."""
        if _entered is self:
            self._collect()
        return list(self._launches)

    def _collect(self) -> None:
        for index in range(len(self._launches), self.core.launch_count()):
            launch = launch_from_core(self.core.launch(index))
            self._launches.append(launch)
            if self.on_launch is not None:
                self.on_launch(launch)

    def report_launches(self) -> None:
        """Tells on_launch, if there is one, what has ended since the last time."""
        if self.on_launch is not None:
            self._collect()

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor counts as one on this device: any, or with `torch_cuda` those that a script calls "cuda"."""
        return not self.torch_cuda or is_marked(tensor)

    def register(self, tensor: torch.Tensor, name: str | None = None) -> None:
        """Lets kernels access a CPU tensor's storage; `name` stands for it in error messages.

        Tensors that are passed to a kernel, and those whose data_ptr() is taken inside the device, are registered
        without this. Raises WrongDevice for a tensor that is not on the CPU.
        """
        self.memory.add(tensor, name)

    def raise_pending(self) -> None:
        """Raises the error that the core has left for this thread, if any.

        Called behind every emulated function; a program that reaches the core by another way calls it itself.
        """
        error = self.core.take_error()
        if error is None:
            return
        address = re.search(r"\bat 0x([0-9a-f]+)", error.message)
        if isinstance(error, errors.OutOfBounds) and address is not None:
            freed = self.memory.freed_at(int(address.group(1), 16))
            if freed is not None:
                error.message += f"; tensor {freed!r} was there and has been freed"
        raise error from None


def require_dsl() -> None:
    """Raises UnsupportedVersion unless the pinned DSL is installed, and the package that its hooked classes need."""
    found = _installed(DSL_PACKAGE)
    if found != DSL_VERSION:
        raise errors.UnsupportedVersion(
            f"cute_sparse.emulator hooks into {DSL_PACKAGE} {DSL_VERSION}, and {found} is installed: "
            f"pip install {DSL_PACKAGE}=={DSL_VERSION}"
        )
    if _installed(FFI_PACKAGE) == "no version":
        raise errors.UnsupportedVersion(
            f"cute_sparse.emulator needs {FFI_PACKAGE}, which is not installed: pip install 'cute-sparse[emulator]'"
        )


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "no version"


def load_core() -> Core:
    """Builds the core if need be, and loads it."""
    global _core
    if _core is None:
        require_dsl()
        _core = library.load(build.build(DSL_VERSION))
    return _core


def loaded_core() -> Core | None:
    """The core, if anything has loaded it."""
    return _core


def entered() -> Device | None:
    """The device that is entered now, or None."""
    return _entered
