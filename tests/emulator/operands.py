"""Where the elements of an MMA operand lie in shared memory, and the descriptors that say so.

Written down from the PTX ISA's canonical layouts (9.7.15.5.1.2 for wgmma, 9.7.16.5 for tcgen05): in units of T = 16
bytes, with S = 1, 2, 4, 8 chunks in a row for no, 32-, 64- and 128-byte swizzle,
    K-major    ((8, m), (T, 2)):  row pitch S chunks, groups of 8 rows at SBO; chunks along k adjacent (S = 1: at LBO)
    MN-major   ((T, S, m), (8, k)): S chunks along mn, then LBO; k pitch S chunks, groups of 8 k at SBO
               (S = 1: the next chunk along mn at SBO, the next 8 k at LBO)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

CHUNKS = {"none": 1, "32B": 2, "64B": 4, "128B": 8}
SWIZZLE_TYPE_SM90 = {"none": 0, "128B": 1, "64B": 2, "32B": 3}


def swizzled(address: torch.Tensor, swizzle: str) -> torch.Tensor:
    """Byte addresses with the 16-byte chunk number XORed by the address bits from 7 on."""
    return address ^ ((address >> 7) & (CHUNKS[swizzle] - 1)) << 4


@dataclass(frozen=True)
class Layout:
    """mn, k: extent in elements of `bytes`. leading, stride: LBO and SBO in bytes. start: byte address."""

    mn: int
    k: int
    bytes: int
    mn_major: bool
    swizzle: str
    start: int
    leading: int
    stride: int

    def addresses(self) -> torch.Tensor:
        """(mn, k) -> byte address."""
        mn, k = torch.arange(self.mn)[:, None], torch.arange(self.k)[None, :]
        elements, row = 16 // self.bytes, 16 * CHUNKS[self.swizzle]  # of a chunk; bytes of a row
        if self.mn_major:
            atom = elements * CHUNKS[self.swizzle]
            along_mn, along_k = (self.stride, self.leading) if self.swizzle == "none" else (self.leading, self.stride)
            address = mn % atom * self.bytes + mn // atom * along_mn + k % 8 * row + k // 8 * along_k
        elif self.swizzle == "none":
            address = mn % 8 * row + mn // 8 * self.stride + k % elements * self.bytes + k // elements * self.leading
        else:
            address = mn % 8 * row + mn // 8 * self.stride + k * self.bytes
        return swizzled(self.start + address, self.swizzle)

    def descriptor_sm90(self) -> int:
        return (
            (self.start >> 4) | (self.leading >> 4) << 16 | (self.stride >> 4) << 32
            | SWIZZLE_TYPE_SM90[self.swizzle] << 62
        )  # fmt: skip


def packed(mn: int, k: int, bytes: int, mn_major: bool, swizzle: str, start: int = 0) -> Layout:
    """The operand of one MMA with its atoms one behind the other."""
    row = 16 * CHUNKS[swizzle]
    if mn_major and swizzle == "none":
        return Layout(mn, k, bytes, mn_major, swizzle, start, leading=128, stride=128 * (k // 8))
    if mn_major:
        return Layout(mn, k, bytes, mn_major, swizzle, start, leading=row * k, stride=row * 8)
    if swizzle == "none":
        return Layout(mn, k, bytes, mn_major, swizzle, start, leading=128, stride=256)
    return Layout(mn, k, bytes, mn_major, swizzle, start, leading=16, stride=row * 8)
