"""CPU tensors as the emulated device's global memory: which of the host's memory a kernel may touch, and the DLPack
capsules by which CuTe-DSL takes a CPU tensor for a CUDA one."""

from __future__ import annotations

import ctypes
from collections import deque
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

from cute_sparse.emulator.errors import WrongDevice
from cute_sparse.emulator.library import Core

CUDA = 2  # DLDeviceType.kDLCUDA
CPU = 1
# Offset of DLTensor.device: behind the data pointer; a versioned capsule has a header of 32 bytes before the DLTensor.
DEVICE_OFFSET = {b"dltensor": 8, b"dltensor_versioned": 40}

_capsule_name = ctypes.pythonapi.PyCapsule_GetName
_capsule_name.restype, _capsule_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def true_device(tensor: torch.Tensor) -> torch.device:
    """Where a tensor is, whatever torch_cuda.py makes a script believe."""
    with torch._C.DisableTorchFunction():
        return tensor.device


def is_plain(tensor: torch.Tensor) -> bool:
    """A CPU tensor with memory of its own: not a fake, functional or otherwise wrapped one."""
    return (
        true_device(tensor).type == "cpu"
        and tensor.layout == torch.strided
        and not isinstance(tensor, FakeTensor)
        and not torch._is_functional_tensor(tensor)
    )


def is_marked(tensor: torch.Tensor) -> bool:
    """Whether a script takes this tensor for a CUDA tensor: torch_cuda.py marks their storages."""
    with torch._C.DisableTorchFunction():
        return is_plain(tensor) and getattr(tensor.untyped_storage(), "_emulated_cuda", False)


@dataclass
class _Range:
    storage: StorageWeakRef
    size_bytes: int
    name: str
    given: bool  # the name is the user's, or an argument's: a description does not replace it


class Registry:
    """The storages that kernels may access. A storage leaves when it is freed, moved or resized."""

    def __init__(self, core: Core):
        self._core = core
        self._ranges: dict[int, _Range] = {}
        self._freed: deque[tuple[int, _Range]] = deque(maxlen=64)

    def add(self, tensor: torch.Tensor, name: str | None = None) -> None:
        """Registers the whole storage of a CPU tensor. Raises WrongDevice for any other."""
        require_cpu(tensor)
        storage = tensor.untyped_storage()
        address, size_bytes = storage.data_ptr(), storage.nbytes()
        if size_bytes == 0:
            return
        known = self._ranges.get(address)
        if known is not None and known.size_bytes == size_bytes and self._alive(address, known):
            if name is None or known.name == name:
                return
        if known is not None:
            self._core.remove_memory(address)
        label = name if name is not None else describe(tensor)
        self._ranges[address] = _Range(StorageWeakRef(storage), size_bytes, label, name is not None)
        self._core.add_memory(address, size_bytes, label)

    def name_if_nameless(self, tensor: torch.Tensor, name: str) -> None:
        """Registers; takes `name` (an argument's) unless the storage has a given one already."""
        known = self._ranges.get(tensor.untyped_storage().data_ptr())
        nameless = known is None or not known.given or not self._alive(tensor.untyped_storage().data_ptr(), known)
        self.add(tensor, name if nameless else None)

    def sweep(self) -> None:
        """Drops what has been freed, moved or resized since."""
        for address, known in list(self._ranges.items()):
            if not self._alive(address, known):
                del self._ranges[address]
                self._core.remove_memory(address)
                self._freed.append((address, known))

    def freed_at(self, address: int) -> str | None:
        """The name of a tensor that was at an address and is not any more."""
        for begin, known in reversed(self._freed):
            if begin <= address < begin + known.size_bytes:
                return known.name
        return None

    def clear(self) -> None:
        for address in self._ranges:
            self._core.remove_memory(address)
        self._ranges.clear()

    @staticmethod
    def _alive(address: int, known: _Range) -> bool:
        if known.storage.expired():
            return False
        storage = torch.UntypedStorage._new_with_weak_ptr(known.storage.cdata)
        return storage is not None and storage.data_ptr() == address


def describe(tensor: torch.Tensor) -> str:
    """A nameless tensor in an error message: 'bfloat16[2, 128, 64]'."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def require_cpu(tensor: torch.Tensor) -> None:
    device = true_device(tensor)
    if device.type != "cpu":
        raise WrongDevice(
            f"tensor {describe(tensor)} is on {device}: the emulated device works on CPU tensors (use tensor.cpu())"
        )


class AsCudaTensor:
    """A CPU tensor that exports itself through DLPack as one on CUDA device 0."""

    def __init__(self, tensor: torch.Tensor):
        require_cpu(tensor)
        self.tensor = tensor

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, 0

    def __dlpack__(self, **_arguments):  # stream, max_version: nothing to wait for, and the plain capsule is allowed
        if self.tensor.requires_grad:
            raise BufferError("Can't export tensors that require gradient, use tensor.detach()")
        capsule = torch._C._to_dlpack(self.tensor)
        name = _capsule_name(capsule)
        device = _capsule_pointer(capsule, name) + DEVICE_OFFSET[name]
        ctypes.c_int32.from_address(device).value = CUDA
        return capsule


def as_tensor(exporter: object) -> torch.Tensor | None:
    """The torch tensor over the memory of any CPU object that speaks DLPack (a numpy array); None if it does not."""
    if isinstance(exporter, torch.Tensor):
        return exporter
    if not (hasattr(exporter, "__dlpack__") and hasattr(exporter, "__dlpack_device__")):
        return None
    device_type = int(exporter.__dlpack_device__()[0])
    if device_type != CPU:
        raise WrongDevice(f"{type(exporter).__name__} is on DLPack device type {device_type}, and not on the CPU (1)")
    return torch.from_dlpack(exporter)
