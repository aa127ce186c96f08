"""The emulator against silicon: the same PTX and the same kernels, on both, compared word for word where the documents
leave nothing open.

Without a GPU the other side is the emulator again, in another order: that exercises these tests, and says nothing about
silicon. With one, the driver compiles the PTX and encodes the tensor maps.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct

import numpy as np
import pytest
import torch

import cute_sparse
from cute_sparse import emulator
from cute_sparse.emulator.text import module, run_ptx
from tests import conftest, decode_cases, test_decode
from tests.cases import CASES, make_inputs
from tests.decode_cases import make_decode_inputs
from tests.emulator import test_tma as tma
from tests.emulator.tensor_maps import SWIZZLES, Descriptor, boxed, swizzled, tensor_map
from tests.test_attention import call, check, error_of_the_same_in_dtype, oracle, tanh_slack

NO_GPU = conftest._no_gpu()
SIDES = [
    "emulated",
    pytest.param("silicon", marks=[pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))]),
]
MAP_BYTES, MAP_LIVE_BYTES = 128, 64


class Emulated:
    """Runs PTX on the emulated device of an order."""

    def __init__(self, arch: str, order: str) -> None:
        self.arch, self.order, self.place = arch, order, "cpu"

    def run(self, ptx: str, arguments: list, grid: int = 1, block: int = 32, shared_bytes: int = 0) -> None:
        with emulator.device(self.arch, order=self.order, seed=5, sms=2, threads=1) as device:
            for argument in arguments:
                if isinstance(argument, Descriptor):
                    device.register(argument.tensor)
            run_ptx(device, ptx, arguments, grid=grid, block=block, shared_bytes=shared_bytes)

    def tensor_map(self, tensor: torch.Tensor, box: list[int], swizzle: int) -> bytes:
        return tensor_map(tensor, box, swizzle=swizzle)


class Silicon:
    """Runs PTX on the GPU, through the driver."""

    def __init__(self) -> None:
        self.arch, self.place = conftest.gpu_arch(), "cuda"
        torch.zeros(1, device="cuda")  # makes the context current

    def run(self, ptx: str, arguments: list, grid: int = 1, block: int = 32, shared_bytes: int = 0) -> None:
        from cuda.bindings import driver

        loaded = called(driver.cuModuleLoadData(ptx.encode() + b"\0"))
        function = called(driver.cuModuleGetFunction(loaded, b"test"))
        values = [self._value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        torch.cuda.synchronize()
        called(driver.cuLaunchKernel(function, grid, 1, 1, block, 1, 1, shared_bytes, 0, ctypes.addressof(pointers), 0))
        torch.cuda.synchronize()
        called(driver.cuModuleUnload(loaded))

    @staticmethod
    def _value(argument):
        if isinstance(argument, bytes):
            return ctypes.create_string_buffer(argument, len(argument))
        return ctypes.c_uint64(argument.data_ptr())

    def tensor_map(self, tensor: torch.Tensor, box: list[int], swizzle: int) -> bytes:
        from cuda.bindings import driver

        rank = tensor.ndim
        strides = [stride * tensor.element_size() for stride in tensor.stride()[::-1][1:]]
        encoded = called(driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            rank,
            tensor.data_ptr(),
            [driver.cuuint64_t(size) for size in tensor.shape[::-1]],
            [driver.cuuint64_t(stride) for stride in strides],
            [driver.cuuint32_t(size) for size in box],
            [driver.cuuint32_t(1)] * rank,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle(SWIZZLES[swizzle]),
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_NONE,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ))  # fmt: skip
        return ctypes.string_at(encoded.getPtr(), MAP_BYTES)


def called(answer: tuple):
    """What a driver's function returned after its status, which must be 0."""
    assert int(answer[0]) == 0, answer[0]
    return answer[1] if len(answer) > 1 else None


@pytest.fixture(params=SIDES)
def other(request: pytest.FixtureRequest):
    return Silicon() if request.param == "silicon" else Emulated("sm_90a", "late")


@pytest.fixture
def emulated(other) -> Emulated:
    return Emulated(other.arch, "eager")


# ---- TMA -----------------------------------------------------------------------------------------------------------


def image_of_a_load(side, tensor: torch.Tensor, box: list[int], start: list[int], swizzle: int) -> np.ndarray:
    """The bytes that a TMA load leaves in shared memory."""
    nbytes = 2 * box[0] * box[1]
    tensor = tensor.to(side.place)
    out = torch.full((nbytes,), 0xAB, dtype=torch.uint8, device=side.place)
    body = tma.PROLOGUE + tma.INIT_BARRIER + "bar.warp.sync -1;\n"
    body += tma.load(start, nbytes) + "bar.warp.sync -1;\n" + tma.WAIT + tma.dump(nbytes)
    ptx = module(side.arch, body, parameters=tma.PARAMETERS, registers=tma.REGISTERS, shared=tma.SHARED)
    side.run(ptx, [side.tensor_map(tensor, box, swizzle), out], shared_bytes=40960)
    return out.cpu().numpy()


@pytest.mark.parametrize("start", [[32, 5], [96, 30], [-8, -3]], ids=["inside", "over the end", "before the start"])
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_shared_memory_after_a_load(emulated, other, swizzle, start):
    tensor = tma.numbers(40, 128)
    box = [(swizzle or 64) // 2, 24]
    got = image_of_a_load(other, tensor, box, start, swizzle)
    assert np.array_equal(got, image_of_a_load(emulated, tensor, box, start, swizzle))
    assert np.array_equal(got, swizzled(boxed(tensor, box, start), swizzle, tma.BASE + tma.TILE))


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_the_tensor_maps_that_the_driver_encodes_are_those_that_the_emulator_reads(other, swizzle):
    tensor = tma.numbers(40, 128).to(other.place)
    box = [(swizzle or 64) // 2, 24]
    live = [struct.unpack("<16I", m[:MAP_LIVE_BYTES]) for m in (
        other.tensor_map(tensor, box, swizzle), tensor_map(tensor, box, swizzle=swizzle),
    )]  # fmt: skip
    assert [hex(word) for word in live[0]] == [hex(word) for word in live[1]]


# ---- Arithmetic ----------------------------------------------------------------------------------------------------

ELEMENTS = 4096
ELEMENTWISE = """
    mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mov.u32 %r3, %tid.x;
    mad.lo.u32 %r4, %r1, %r2, %r3;
    mul.wide.u32 %d4, %r4, 4;
    ld.param.u64 %d1, [x]; ld.param.u64 %d2, [y]; ld.param.u64 %d3, [out];
    add.u64 %d1, %d1, %d4; add.u64 %d2, %d2, %d4; add.u64 %d3, %d3, %d4;
    ld.global.f32 %f1, [%d1]; ld.global.f32 %f2, [%d2];
    {operation}
    st.global.b32 [%d3], %r5;
"""
EXACT = {
    "add.rn.f32": "add.rn.f32 %f3, %f1, %f2; mov.b32 %r5, %f3;",
    "add.rm.f32": "add.rm.f32 %f3, %f1, %f2; mov.b32 %r5, %f3;",
    "add.rm.ftz.f32": "add.rm.ftz.f32 %f3, %f1, %f2; mov.b32 %r5, %f3;",
    "mul.rn.ftz.f32": "mul.rn.ftz.f32 %f3, %f1, %f2; mov.b32 %r5, %f3;",
    "fma.rn.f32": "fma.rn.f32 %f3, %f1, %f2, %f1; mov.b32 %r5, %f3;",
    "fma.rn.ftz.f32": "fma.rn.ftz.f32 %f3, %f1, %f2, %f1; mov.b32 %r5, %f3;",
    "max.f32": "max.f32 %f3, %f1, %f2; mov.b32 %r5, %f3;",
    "max.NaN.f32": "max.NaN.f32 %f3, %f1, %f2; mov.b32 %r5, %f3;",
}
CONVERSIONS = {
    "cvt.rn.bf16x2.f32": "cvt.rn.bf16x2.f32 %r5, %f1, %f2;",
    "cvt.rn.f16x2.f32": "cvt.rn.f16x2.f32 %r5, %f1, %f2;",
}
# Largest relative errors, from the PTX ISA; the emulator's value is the correctly rounded one.
APPROXIMATIONS = {
    "ex2.approx.ftz.f32": ("ex2.approx.ftz.f32 %f3, %f1; mov.b32 %r5, %f3;", 2.0**-22),
    "rcp.approx.ftz.f32": ("rcp.approx.ftz.f32 %f3, %f1; mov.b32 %r5, %f3;", 2.0**-23),
    "tanh.approx.f32": ("tanh.approx.f32 %f3, %f1; mov.b32 %r5, %f3;", 2.0**-10.987),
}


def elementwise(side, operation: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """int32 results of an operation on %f1 and %f2 that leaves %r5."""
    ptx = module(
        side.arch, ELEMENTWISE.replace("{operation}", operation),
        parameters=".param .u64 x, .param .u64 y, .param .u64 out",
        registers=".reg .b32 %r<8>; .reg .b64 %d<8>; .reg .f32 %f<8>;",
    )  # fmt: skip
    out = torch.full((ELEMENTS,), -1, dtype=torch.int32, device=side.place)
    side.run(ptx, [x.to(side.place), y.to(side.place), out], grid=ELEMENTS // 128, block=128)
    return out.cpu()


def random_bits() -> tuple[torch.Tensor, torch.Tensor]:
    """Every kind of float, a quarter of the pairs of similar size."""
    generator = torch.Generator().manual_seed(3)
    x, y = (
        torch.randint(-(2**31), 2**31, (ELEMENTS,), dtype=torch.int64, generator=generator).to(torch.int32)
        for _ in range(2)
    )
    special = torch.tensor([0, -(2**31), 0x7F800000, 0xFF800000 - 2**32, 0x7FC00000, 1, 0x007FFFFF, 0x7F7FFFFF])
    x[:8], y[8:16] = special.to(torch.int32), special.to(torch.int32)
    x, y = x.view(torch.float32), y.view(torch.float32)
    y[::4] = x[::4] * torch.linspace(-2, 2, ELEMENTS)[::4]
    return x, y


def assert_same_floats(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Bits, or both NaN: the payload of a NaN is open."""
    both_nan = got.view(torch.float32).isnan() & expected.view(torch.float32).isnan()
    assert torch.equal(got[~both_nan], expected[~both_nan])


@pytest.mark.parametrize("name", EXACT)
def test_exact_arithmetic_is_the_same_bits(emulated, other, name):
    x, y = random_bits()
    assert_same_floats(elementwise(other, EXACT[name], x, y), elementwise(emulated, EXACT[name], x, y))


@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversions_are_the_same_bits(emulated, other, name):
    x, y = random_bits()
    results = [elementwise(side, CONVERSIONS[name], x, y) for side in (other, emulated)]
    dtype = torch.bfloat16 if "bf16" in name else torch.float16
    got, expected = (result.view(dtype) for result in results)
    both_nan = got.isnan() & expected.isnan()
    assert torch.equal(got[~both_nan].view(torch.int16), expected[~both_nan].view(torch.int16))


@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_approximations_are_as_near_as_the_isa_says(emulated, other, name):
    operation, bound = APPROXIMATIONS[name]
    x, y = random_bits()
    x[1024:] = torch.linspace(-130, 130, ELEMENTS - 1024)
    got, exact = (elementwise(side, operation, x, y).view(torch.float32).double() for side in (other, emulated))
    assert torch.equal(got.isnan(), exact.isnan()) and torch.equal(got.isinf(), exact.isinf())
    finite = exact.isfinite()
    rounding = 2.0**-24  # of the emulator's value
    smallest = torch.finfo(torch.float32).tiny
    assert ((got - exact)[finite].abs() <= exact[finite].abs() * (bound + rounding) + smallest).all()


# ---- The kernels ---------------------------------------------------------------------------------------------------

KERNEL_CASES = [
    "causal", "window", "softcap", "rows without a key", "head dim 64", "head dim 192 and 128", "head dim 256",
    "skip, causal", "skip, float16", "skip, head dim 64", "skip, head dim 192 and 128", "skip, head dim 256",
    "skip, packed", "skip, ragged",
]  # fmt: skip
DECODE_CASES = ["paged", "skip, ragged", "contiguous, skip"]
EMULATED_SMS = 4  # where nothing else is asked for


def attention_on(side, case):
    inputs = make_inputs(case, device=side.place)
    if isinstance(side, Silicon):
        return call(case, inputs, return_lse=True, return_stats=True)
    with cute_sparse.emulated(side.arch, order=side.order, seed=1):
        return call(case, inputs, return_lse=True, return_stats=True)


@pytest.mark.parametrize("name", KERNEL_CASES)
def test_attention_is_the_same(emulated, other, name):
    case = CASES[name]
    got, expected = attention_on(other, case), attention_on(emulated, case)
    inputs = make_inputs(case)
    check(case, inputs, got)  # each of its decisions is the rule's, to rounding
    if decisions_are_the_same(got, expected):
        geometry = expected.stats.geometry
        replayed = oracle(case, inputs, geometry, expected.stats.skip_map)
        rounded = error_of_the_same_in_dtype(case, inputs, geometry, replayed)
        assert_near(got, expected, 2 * rounded.norm() + 2 * tanh_slack(case, replayed))


def decode_on(side, case, sms: int):
    """The result, and how the call was split over the multiprocessors."""
    inputs = make_decode_inputs(case, device=side.place)
    on_silicon = isinstance(side, Silicon)
    with contextlib.nullcontext() if on_silicon else cute_sparse.emulated(side.arch, order=side.order, seed=1, sms=sms):
        got = test_decode.call(case, inputs, return_lse=True, return_stats=True)
        return got, test_decode.splitting_of(case, inputs)


@pytest.mark.parametrize("name", DECODE_CASES)
def test_decode_is_the_same(emulated, other, name):
    case = decode_cases.CASES[name]
    sms = torch.cuda.get_device_properties().multi_processor_count if isinstance(other, Silicon) else EMULATED_SMS
    got, splitting = decode_on(other, case, sms)
    expected, expected_splitting = decode_on(emulated, case, sms)
    assert splitting == expected_splitting
    inputs = make_decode_inputs(case)
    test_decode.check(case, inputs, got, splitting)
    if decisions_are_the_same(got, expected):
        geometry = expected.stats.geometry
        replayed = test_decode.oracle(case, inputs, geometry, splitting, expected.stats.skip_map)
        rounded = test_decode.error_of_the_same_in_dtype(case, inputs, geometry, replayed)
        assert_near(got, expected, 2 * rounded.norm() + 2 * tanh_slack(case, replayed))


def decisions_are_the_same(got, expected) -> bool:
    """The tensor cores' order of summation is their own: rounding differs, and a few decisions at the threshold may.
    Then both were checked against the oracle that takes their decisions, and their outputs need not agree."""
    assert got.stats.geometry == expected.stats.geometry
    differing = got.stats.skip_map.cpu() != expected.stats.skip_map
    assert differing.float().mean() <= 0.01
    return not differing.any()


def assert_near(got, expected, largest: torch.Tensor) -> None:
    assert (got.out.cpu().double() - expected.out.double()).norm() <= largest
    torch.testing.assert_close(got.lse.cpu(), expected.lse, rtol=1e-5, atol=1e-3)
