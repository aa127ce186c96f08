"""Tensor maps for tests, and what a box looks like in shared memory, both written from the documents alone: the bits
from the descriptor's table, the swizzles from the CUDA C++ Programming Guide ("TMA swizzle")."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence

import numpy as np
import torch

ELEMENT_TYPES = {
    torch.uint8: 0, torch.uint16: 1, torch.uint32: 2, torch.int32: 3, torch.uint64: 4, torch.int64: 5,
    torch.float16: 6, torch.float32: 7, torch.float64: 9, torch.bfloat16: 10,
}  # fmt: skip
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}  # bytes of the swizzled span


class Descriptor(bytes):
    """A tensor map that keeps its tensor alive."""

    tensor: torch.Tensor


def tensor_map(
    tensor: torch.Tensor,
    box: Sequence[int],
    *,
    swizzle: int = 0,
    steps: Sequence[int] | None = None,
    nan_fill: bool = False,
    element_type: int | None = None,
    tf32: bool = False,
    atomicity: int = 0,
    interleave: int = 0,
    always: int = 1 << 1 | 1 << 18,
    address: int | None = None,
    dims: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Descriptor:
    """The 128-byte descriptor of a whole tensor. The tensor's last dimension is the map's dimension 0; so is box[0].

    dims, strides (bytes): others than the tensor's, dimension 0 first. steps: element strides. atomicity: 1 swizzles
    chunks of 32 bytes. always: bits that every tiled map has.
    """
    rank, size = tensor.ndim, tensor.element_size()
    dims = tensor.shape[::-1] if dims is None else dims
    strides = [stride * size for stride in tensor.stride()[::-1]] if strides is None else strides
    steps = [1] * rank if steps is None else steps
    address = tensor.data_ptr() if address is None else address
    code = ELEMENT_TYPES[tensor.dtype] if element_type is None else element_type
    w = [0] * 32
    w[0], w[1] = address & 0xFFFFFFFF, address >> 32
    w[2] = (
        always | (rank - 1) << 4 | code << 7 | interleave << 11 | SWIZZLES[swizzle] << 13 | nan_fill << 15
        | tf32 << 16 | atomicity << 19
    )  # fmt: skip
    for d in range(1, rank):
        units = strides[d] // 16
        w[2 + d] = units & 0xFFFFFFFF
        w[7] |= (units >> 32) << 4 * (d - 1)
    for d in range(rank):
        w[8 + d] = dims[d] - 1
        w[13] |= (steps[d] - 1) << 3 * d
    w[13] |= (box[0] - 1) << 24
    for d in range(1, rank):
        w[14] |= (box[d] - 1) << 8 * (d - 1)
    w[16:] = [0xDEADBEEF] * 16  # the hardware's descriptor ends with words that the host never writes
    descriptor = Descriptor(struct.pack("<32I", *w))
    descriptor.tensor = tensor
    return descriptor


def raw(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's elements as unsigned integers of the same size."""
    return tensor.contiguous().view(torch.uint8).numpy().view(f"u{tensor.element_size()}").reshape(tensor.shape)


def boxed(tensor: torch.Tensor, box: Sequence[int], start: Sequence[int], fill: int = 0, steps=None) -> np.ndarray:
    """The box's elements (as unsigned integers), the last axis is dimension 0; `fill` outside the tensor."""
    source = raw(tensor)
    steps = [1] * tensor.ndim if steps is None else steps
    counts = [-(-b // s) for b, s in zip(box, steps, strict=True)]
    result = np.full(counts[::-1], fill, dtype=source.dtype)
    for index in itertools.product(*(range(n) for n in counts[::-1])):
        place = [s + i * step for s, i, step in zip(start[::-1], index, list(steps)[::-1], strict=True)]
        if all(0 <= p < n for p, n in zip(place, source.shape, strict=True)):
            result[index] = source[tuple(place)]
    return result


def swizzled(rows: np.ndarray, span: int, address: int, atom: int = 16) -> np.ndarray:
    """Bytes of a box as they lie in shared memory from `address` on.

    In each 128-byte line of shared memory, the 16-byte chunk x goes to x ^ (line % n): n = 8, 4, 2 for spans of 128,
    64 and 32 bytes (and 32-byte chunks to x ^ (line % 4) with atom 32).
    """
    flat = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
    if span == 0:
        return flat
    n = span // atom
    image = np.empty_like(flat)
    for offset in range(0, flat.size, atom):
        line, inside = divmod(address + offset, 128)
        to = line * 128 + ((inside // atom) ^ (line % n)) * atom - address
        image[to : to + atom] = flat[offset : offset + atom]
    return image
