"""Runners: the same test body on the reference, on the real kernels in the emulator, and on a GPU."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

EMULATED_ARCHS = ("sm_90a", "sm_100a")
ORDERS = ("eager", "late", "random")  # in which asynchronous work completes; see the emulator


def pytest_configure(config: pytest.Config) -> None:
    """A cache of its own: tests must neither use nor fill the user's. And one thread for PyTorch: threads that wait
    for each other cost these small tensors five times their work."""
    config.stash[STDERR] = os.dup(2)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start
    torch.set_num_threads(1)
    if "CUTE_SPARSE_CACHE_DIR" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="cute-sparse-tests-")
        config.add_cleanup(folder.cleanup)
        os.environ["CUTE_SPARSE_CACHE_DIR"] = folder.name


GPU_TEST_S = 90.0  # of which most is compiling
STDERR = pytest.StashKey[int]()  # the process's own, beside the one that pytest captures


@pytest.fixture(autouse=True)
def _spares_the_other_tests(request: pytest.FixtureRequest) -> Iterator[None]:
    """A kernel that hangs cannot be interrupted, and behind one that touched what it must not every CUDA call of the
    process fails: the process says where and ends, and of pytest-xdist's another takes its place."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    faulthandler.dump_traceback_later(GPU_TEST_S, exit=True, file=request.config.stash[STDERR])
    yield
    faulthandler.cancel_dump_traceback_later()
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


@dataclass(frozen=True)
class Runner:
    """name; the device for tensors; the architecture whose kernels run, None for the reference."""

    name: str
    device: str
    arch: str | None

    @property
    def orders(self) -> tuple[str, ...]:
        """The completion orders to try."""
        return ORDERS if self.name.startswith("emulated") else ("only",)

    @contextlib.contextmanager
    def in_order(self, order: str, **options) -> Iterator[object | None]:
        """Calls within it run on this runner; yields the emulated device, or None."""
        if not self.name.startswith("emulated"):
            yield None
            return
        import cute_sparse

        with cute_sparse.emulated(self.arch, order=order, seed=1, **options) as device:
            yield device


def reason_to_skip(name: str) -> str | None:
    kind, _, arch = name.partition(":")
    if kind == "emulated":
        return _no_emulator() or _no_kernel(arch)
    if kind == "gpu":
        return _no_gpu()
    return None


def _no_emulator() -> str | None:
    emulator = importlib.import_module("cute_sparse.emulator")
    return None if hasattr(emulator, "device") else "the emulator has no device yet"


def _no_kernel(arch: str) -> str | None:
    from cute_sparse.dispatch import ROOM_OF_ARCH

    try:
        prefill = importlib.import_module(f"{ROOM_OF_ARCH[arch]}.prefill")
    except ModuleNotFoundError as error:
        return f"no kernel for {arch} yet: {error}"
    return None if hasattr(prefill, "compile") else f"no kernel for {arch} yet"


def _no_gpu() -> str | None:
    from cute_sparse.targets import ARCH_OF_CAPABILITY

    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability()
    return None if capability in ARCH_OF_CAPABILITY else f"no kernel for compute capability {capability}"


def gpu_arch() -> str:
    from cute_sparse.targets import ARCH_OF_CAPABILITY

    return ARCH_OF_CAPABILITY[torch.cuda.get_device_capability()]


RUNNERS = ("reference", *(f"emulated:{arch}" for arch in EMULATED_ARCHS), pytest.param("gpu", marks=pytest.mark.gpu))


@pytest.fixture(params=RUNNERS)
def runner(request: pytest.FixtureRequest) -> Runner:
    name = request.param
    reason = reason_to_skip(name)
    if reason is not None:
        pytest.skip(reason)
    kind, _, arch = name.partition(":")
    if kind == "gpu":
        return Runner(name, "cuda", gpu_arch())
    return Runner(name, "cpu", arch or None)
