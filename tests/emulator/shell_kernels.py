"""Small CuTe-DSL kernels for test_shell.py: what they compute is obvious, how they get there is not the point."""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute

THREADS = 64


@cute.kernel
def scale_kernel(x: cute.Tensor, y: cute.Tensor, factor: cutlass.Float32):
    i = cute.arch.thread_idx()[0]
    y[i] = x[i] * factor


@cute.jit
def scale(x: cute.Tensor, y: cute.Tensor, factor: cutlass.Float32):
    """y = x * factor, 64 elements."""
    scale_kernel(x, y, factor).launch(grid=[1, 1, 1], block=[THREADS, 1, 1])


@cute.jit
def scale_pointers(x: cute.Pointer, y: cute.Pointer, factor: cutlass.Float32):
    layout = cute.make_layout(THREADS)
    scale_kernel(cute.make_tensor(x, layout), cute.make_tensor(y, layout), factor).launch(
        grid=[1, 1, 1], block=[THREADS, 1, 1]
    )


class AddConstant:
    """x += constant: every constant is a kernel of its own, all of one name."""

    def __init__(self, constant: float):
        self.constant = constant

    @cute.jit
    def __call__(self, x: cute.Tensor):
        self.kernel(x).launch(grid=[1, 1, 1], block=[THREADS, 1, 1])

    @cute.kernel
    def kernel(self, x: cute.Tensor):
        i = cute.arch.thread_idx()[0]
        x[i] = x[i] + cutlass.Float32(self.constant)


@cute.kernel
def negate_kernel(x: cute.Tensor):
    i = cute.arch.thread_idx()[0]
    x[i] = -x[i]


@cute.jit
def scale_then_negate(x: cute.Tensor, factor: cutlass.Float32):
    """Two launches, two kernels in one library."""
    scale_kernel(x, x, factor).launch(grid=[1, 1, 1], block=[THREADS, 1, 1])
    negate_kernel(x).launch(grid=[1, 1, 1], block=[THREADS, 1, 1])


class Pair(NamedTuple):
    x: cute.Tensor
    y: cute.Tensor


@cute.jit
def scale_pair(pair: Pair, factor: cutlass.Float32):
    scale_kernel(pair.x, pair.y, factor).launch(grid=[1, 1, 1], block=[THREADS, 1, 1])


@cute.kernel
def nothing_kernel():
    pass


@dataclass(frozen=True)
class Geometry:
    grid: tuple = (1, 1, 1)
    block: tuple = (32, 1, 1)
    cluster: tuple | None = None
    shared_bytes: int = 0


@cute.jit
def nothing(geometry: cutlass.Constexpr):
    """Launches an empty kernel with a geometry."""
    nothing_kernel().launch(
        grid=geometry.grid, block=geometry.block, cluster=geometry.cluster, smem=geometry.shared_bytes
    )


@cute.jit
def nothing_with_shared_bytes(shared_bytes: cutlass.Int32):
    nothing_kernel().launch(grid=[1, 1, 1], block=[32, 1, 1], smem=shared_bytes)


@cute.jit
def nothing_on_grid(blocks: cutlass.Int32):
    nothing_kernel().launch(grid=[blocks, 1, 1], block=[32, 1, 1], cluster=[2, 1, 1])
