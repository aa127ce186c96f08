"""Where kernels are launched: a GPU or the emulated device, each with its streams and its memory for counters."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

# Capability -> architecture to compile for.
ARCH_OF_CAPABILITY = {(9, 0): "sm_90a", (10, 0): "sm_100a", (10, 3): "sm_103a"}


class GpuTarget:
    """One CUDA device; launches go to PyTorch's current stream of it."""

    def __init__(self, index: int, arch: str) -> None:
        self.index, self.arch = index, arch
        self.emulated = _emulator_plays_cuda()
        self.sms = torch.cuda.get_device_properties(index).multi_processor_count
        self._memory = ZeroedMemory(torch.device("cuda", index), lasting=self._lasting_zeros)

    @contextlib.contextmanager
    def _switched(self) -> Iterator[None]:
        with torch.cuda.device(self.index):
            yield

    def ready(self, names, tensors) -> contextlib.AbstractContextManager:
        return _NOTHING if torch.cuda.current_device() == self.index else self._switched()

    def _lasting_zeros(self, size_bytes: int) -> torch.Tensor:
        """Asked for by a thread of its own: the caller's may take memory from a pool that is lent for a while only, as
        what torch.compile(mode="reduce-overhead") warms up does, which must leave nothing there but its results."""
        if self.emulated:
            return _zeros(size_bytes, self._memory.device)
        with ThreadPoolExecutor(max_workers=1) as thread:
            return thread.submit(self._zeros_by_now, size_bytes).result()

    def _zeros_by_now(self, size_bytes: int) -> torch.Tensor:
        memory = _zeros(size_bytes, self._memory.device)
        torch.cuda.current_stream(self.index).synchronize()  # of this thread, and not the launch's
        return memory

    def stream(self) -> int:
        return torch._C._cuda_getCurrentRawStream(self.index)

    def zeroed(self, stream: int, size_bytes: int) -> torch.Tensor:
        return self._memory.of(stream, size_bytes, torch.cuda.is_current_stream_capturing())


class EmulatedTarget:
    """The emulated device; one stream, CPU tensors."""

    emulated = True

    def __init__(self, arch: str, device) -> None:
        self.arch, self.device = arch, device
        self.sms = device.sms
        self._memory = ZeroedMemory(torch.device("cpu"))

    @contextlib.contextmanager
    def ready(self, names, tensors) -> Iterator[None]:
        for name, tensor in zip(names, tensors, strict=False):
            if tensor is not None:
                self.device.register(tensor, name)
        try:
            try:
                yield
            finally:
                self.device.raise_pending()  # what the emulator found wrong, rather than its error code
        except BaseException:
            self._memory.of_stream.clear()  # a launch that was stopped half way has not left its counters zero
            raise

    def stream(self) -> int:
        return 0

    def zeroed(self, stream: int, size_bytes: int) -> torch.Tensor:
        memory = self._memory.of(stream, size_bytes, capturing=False)
        self.device.register(memory, "counters between CTAs")
        return memory


Target = GpuTarget | EmulatedTarget
_NOTHING = contextlib.nullcontext()


class ZeroedMemory:
    """Memory through which the CTAs of a launch coordinate: zero before a launch, which leaves it zero.

    Launches on one stream run one after the other and share it; other streams have their own. A launch that is being
    captured gets memory of its own from the graph's pool, zeroed by the graph: graphs that were captured on one stream
    may replay at once, and also beside launches on that stream.
    """

    STREAMS_MAX = 1024
    LEAST_BYTES = 4096

    def __init__(self, device: torch.device, lasting: Callable[[int], torch.Tensor] | None = None) -> None:
        """lasting: zeroed memory of at least so many bytes that is no part of a graph; by default a plain tensor."""
        self.device = device
        self.of_stream: dict[int, torch.Tensor] = {}
        self._lasting = lasting or functools.partial(_zeros, device=device)
        self._outgrown: list[torch.Tensor] = []  # which launches may still use; together smaller than what replaced it
        self._growing = threading.Lock()

    def of(self, stream: int, size_bytes: int, capturing: bool) -> torch.Tensor:
        """At least as many bytes, for a launch on this stream, which must be the current one."""
        if capturing:
            return _zeros(size_bytes, self.device)
        memory = self.of_stream.get(stream)
        if memory is None or memory.numel() * 4 < size_bytes:
            with self._growing:
                memory = self._larger(stream, size_bytes)
        return memory

    def _larger(self, stream: int, size_bytes: int) -> torch.Tensor:
        memory = self.of_stream.get(stream)
        if memory is not None and memory.numel() * 4 >= size_bytes:
            return memory  # by another thread
        if memory is not None:
            self._outgrown.append(memory)
        elif len(self.of_stream) >= self.STREAMS_MAX:
            raise RuntimeError(f"kernels were launched on more than {self.STREAMS_MAX} CUDA streams of one device")
        memory = self.of_stream[stream] = self._lasting(max(self.LEAST_BYTES, 1 << (size_bytes - 1).bit_length()))
        return memory


def _zeros(size_bytes: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(-(-size_bytes // 4), dtype=torch.int32, device=device)


@functools.cache
def gpu_target(index: int) -> GpuTarget:
    capability = torch.cuda.get_device_capability(index)
    if capability not in ARCH_OF_CAPABILITY:
        raise RuntimeError(
            f"cuda:{index} ({torch.cuda.get_device_name(index)}) has compute capability {capability[0]}."
            f"{capability[1]}; there are kernels for {capabilities()}"
        )
    return GpuTarget(index, ARCH_OF_CAPABILITY[capability])


def _emulator_plays_cuda() -> bool:
    """Whether torch's "cuda" device is the emulated one: python -m cute_sparse.emulator script.py."""
    emulator = sys.modules.get("cute_sparse.emulator")
    device = emulator.entered() if emulator is not None else None
    return device is not None and device.torch_cuda


def capabilities() -> str:
    return ", ".join(f"{major}.{minor} ({arch})" for (major, minor), arch in ARCH_OF_CAPABILITY.items())
