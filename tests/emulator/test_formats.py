"""Narrow floating-point formats through cvt: every code, and every rounding, against torch's conversions."""

from __future__ import annotations

import pytest
import torch

from tests.emulator.lanes import apply

I16, I32 = torch.int16, torch.int32
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def samples() -> torch.Tensor:
    """Floats of every magnitude that the formats tell apart, ties and neighbours of ties, both signs."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-26, 18, (416,), generator=generator)
    significands = 1 + torch.rand(416, generator=generator)
    anything = torch.ldexp(significands, exponents)
    ties = torch.ldexp(1 + torch.arange(64) / 32 + 1 / 64, torch.arange(64) % 20 - 10)  # halfway for 5 bits
    neighbours = [ties, torch.nextafter(ties, torch.tensor(9e9)), torch.nextafter(ties, torch.tensor(0.0))]
    values = torch.cat([anything, *neighbours, torch.zeros(32)]).float()
    return torch.cat([values, -values])


def in_lanes(run, instruction: str, *sources: torch.Tensor, result: torch.dtype) -> torch.Tensor:
    """`apply` over sources of any multiple of 32 elements."""
    pieces = zip(*(source.split(32) for source in sources), strict=True)
    return torch.cat([apply(run, instruction, *piece, result=result) for piece in pieces])


@pytest.mark.parametrize("type_", FLOAT8)
def test_every_8_bit_code_widens_exactly(run, type_):
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    pairs = codes.view(I16)
    halves = in_lanes(run, f"cvt.rn.f16x2.{type_}x2 {{d}}, {{0}};", pairs, result=I32).view(torch.float16)
    expected = codes.view(FLOAT8[type_]).to(torch.float16)
    assert torch.equal(halves.isnan(), expected.isnan())
    assert torch.equal(halves[~expected.isnan()].view(I16), expected[~expected.isnan()].view(I16))


@pytest.mark.parametrize("type_", FLOAT8)
def test_8_bit_codes_round_to_nearest_even_and_saturate(run, type_):
    values = samples()
    low, high = values[0::2].contiguous(), values[1::2].contiguous()
    instruction = f"cvt.rn.satfinite.{type_}x2.f32 {{d}}, {{0}}, {{1}};"  # the first source is the upper element
    codes = in_lanes(run, instruction, high, low, result=I16).view(torch.uint8)
    expected = values.clamp(-LARGEST[type_], LARGEST[type_]).to(FLOAT8[type_]).view(torch.uint8)
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("type_, infinite", [("e4m3", 0x7E), ("e5m2", 0x7B)])
def test_8_bit_infinities_and_nan(run, type_, infinite):
    given = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e30] * 8)
    codes = apply(run, f"cvt.rn.satfinite.{type_}x2.f32 {{d}}, {{0}}, {{0}};", given, result=I16).view(torch.uint8)
    assert codes[0:8:2].tolist() == [infinite, 0x80 | infinite, 0x7F, infinite]


@pytest.mark.parametrize("type_, dtype", [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_16_bit_values_round_to_nearest_even(run, type_, dtype):
    values = samples()
    bits = in_lanes(run, f"cvt.rn.{type_}.f32 {{d}}, {{0}};", values, result=I16)
    assert torch.equal(bits, values.to(dtype).view(I16))


def towards_zero(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    nearest = values.to(dtype)
    too_far = nearest.float().abs() > values.abs()
    return nearest.view(I16) - too_far.to(I16)  # the magnitude one code less


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_roundings(run, mode):
    values = samples()
    bits = in_lanes(run, f"cvt.{mode}.f16.f32 {{d}}, {{0}};", values, result=I16)
    down = towards_zero(values, torch.float16)
    inexact = down.view(torch.float16).float() != values
    away = inexact & {"rz": torch.zeros_like(inexact), "rm": values < 0, "rp": values > 0}[mode]
    assert torch.equal(bits, down + away.to(I16))


def test_tf32_rounds_ties_away(run):
    values = samples()
    bits = in_lanes(run, "cvt.rna.tf32.f32 {d}, {0};", values, result=I32)
    assert torch.equal(bits & ~0x1FFF, (values.view(I32) + 0x1000) & ~0x1FFF)


@pytest.mark.parametrize("type_, largest", [("f16", 0x7BFF), ("bf16", 0x7F7F)])
def test_relu_and_satfinite(run, type_, largest):
    given = torch.tensor([-1.0, -0.0, 1.0, float("nan"), float("inf"), float("-inf"), 3.4e38, -3.4e38] * 4)
    relu = apply(run, f"cvt.rn.relu.{type_}.f32 {{d}}, {{0}};", given, result=I16)[:8].tolist()
    one = torch.tensor([1.0]).to(torch.float16 if type_ == "f16" else torch.bfloat16).view(I16).item()
    infinity = 0x7C00 if type_ == "f16" else 0x7F80
    assert relu == [0, 0, one, 0x7FFF, infinity, 0, infinity, 0]  # 3.4e38 rounds past the largest bf16, too
    saturated = apply(run, f"cvt.rn.satfinite.{type_}.f32 {{d}}, {{0}};", given, result=I16)[4:8]
    assert [bits & 0xFFFF for bits in saturated.tolist()] == [largest, 0x8000 | largest] * 2
