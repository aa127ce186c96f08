"""The forms of the threshold, its sources, and every malformed one refused by name."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cute_sparse.threshold import Threshold, resolve, threshold_from_model, threshold_from_scale_factor

CPU = torch.device("cpu")


def expanded_lambdas(got: Threshold, batch: int, heads_q: int) -> torch.Tensor:
    """As the kernels read them."""
    return got.tensor.as_strided((batch, heads_q), (got.stride_batch, got.stride_head))


def test_none_stays_none():
    assert resolve(None, 2, 3, CPU) is None


@pytest.mark.parametrize("value", [1e-30, 1e-3, 0.5, 1.0, 1, np.float32(0.5)])
def test_a_number_becomes_log2(value):
    got = resolve(value, 2, 3, CPU)
    assert got.tensor is None and got.log2 == math.log2(value)
    assert (got.stride_batch, got.stride_head) == (0, 0)


@pytest.mark.parametrize("value", [0.0, -0.1, 1.0001, 2, math.nan, math.inf, -math.inf])
def test_a_number_outside_zero_to_one_is_refused(value):
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
        resolve(value, 2, 3, CPU)


@pytest.mark.parametrize("value", ["0.1", True, np.True_, [0.1], 1j])
def test_another_type_is_refused(value):
    with pytest.raises(TypeError, match=type(value).__name__):
        resolve(value, 2, 3, CPU)


@pytest.mark.parametrize(
    "shape, expanded",
    {
        (2,): [[1, 1, 1], [2, 2, 2]],
        (3,): [[1, 2, 3], [1, 2, 3]],
        (2, 3): [[1, 2, 3], [4, 5, 6]],
        (2, 1): [[1, 1, 1], [2, 2, 2]],
        (1, 3): [[1, 2, 3], [1, 2, 3]],
        (1, 1): [[1, 1, 1], [1, 1, 1]],
    }.items(),
    ids=str,
)
@pytest.mark.parametrize("strided", [False, True])
def test_a_tensor_reads_per_sequence_and_head(shape, expanded, strided):
    tensor = (torch.arange(math.prod(shape), dtype=torch.float32) + 1).reshape(shape) / 6
    if strided:
        tensor = torch.stack([tensor, tensor / 2], dim=-1)[..., 0]
    got = resolve(tensor, 2, 3, CPU)
    assert torch.equal(expanded_lambdas(got, 2, 3), torch.tensor(expanded) / 6)
    tensor /= 2  # updated in place between CUDA-graph replays
    assert torch.equal(expanded_lambdas(got, 2, 3), torch.tensor(expanded) / 6 / 2)


def test_a_tensor_that_wants_a_gradient_is_refused():
    with pytest.raises(NotImplementedError, match="requires grad"):
        resolve(torch.full((2,), 0.1, requires_grad=True), 2, 3, CPU)


def test_a_vector_that_could_be_batch_or_heads_is_refused():
    with pytest.raises(ValueError, match=r"ambiguous.*\(3, 1\).*\(1, 3\)"):
        resolve(torch.full((3,), 0.1), 3, 3, CPU)
    assert expanded_lambdas(resolve(torch.full((1,), 0.5), 1, 1, CPU), 1, 1).item() == 0.5


@pytest.mark.parametrize("shape", [(), (4,), (3, 2), (2, 3, 1), (0,)], ids=str)
def test_a_tensor_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="shape"):
        resolve(torch.full(shape, 0.1), 2, 3, CPU)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int32])
def test_a_tensor_of_another_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match=str(dtype)):
        resolve(torch.ones(2, dtype=dtype), 2, 3, CPU)


def test_a_tensor_on_another_device_is_refused():
    with pytest.raises(ValueError, match="meta.*cpu"):
        resolve(torch.ones(2, device="meta"), 2, 3, CPU)


@pytest.mark.parametrize("value", [0.0, -0.1, 1.5, math.nan, math.inf])
def test_a_cpu_tensor_with_one_bad_value_is_refused(value):
    with pytest.raises(ValueError, match=rf"holds {value:.3}\d*; .* must be in \(0, 1\]"):
        resolve(torch.tensor([1.0, value]), 2, 3, CPU)


def test_the_values_of_a_device_tensor_are_not_read():
    """Reading one would wait for the device; on the meta device it would raise."""
    assert resolve(torch.ones(2, device="meta"), 2, 3, torch.device("meta")).stride_batch == 1


def test_scale_factor_is_divided_by_each_sequence_s_own_length():
    number = threshold_from_scale_factor(8.0, 1024)
    assert isinstance(number, float) and number == 8.0 / 1024
    got = threshold_from_scale_factor(8.0, torch.tensor([1024, 16, 4, 0]))
    assert got.dtype == torch.float32 and torch.equal(got, torch.tensor([8 / 1024, 0.5, 1.0, 1.0]))
    got = threshold_from_scale_factor(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([8, 16])[:, None])
    assert torch.equal(got, torch.tensor([[0.125, 0.25, 0.5], [0.0625, 0.125, 0.25]]))
    assert resolve(got, 2, 3, CPU) is not None


def test_a_threshold_from_a_source_never_exceeds_one():
    assert threshold_from_scale_factor(1000.0, 10) == 1.0
    assert threshold_from_scale_factor(1000.0, 0) == 1.0
    assert threshold_from_model(7.93, 8.61, 0.9, 100) == 1.0


def test_the_calibrated_model():
    """Qwen3-30B-A3B-2507, prefill, as published: a = 7.93, b = 8.61."""
    assert threshold_from_model(7.93, 8.61, 0.5, 65536) == pytest.approx(7.93 * math.exp(8.61 * 0.5) / 65536)
    assert threshold_from_model(0.5, 0.0, 0.0, 2) == threshold_from_model(0.5, 0.0, 1.0, 2) == 0.25
    got = threshold_from_model(7.93, 8.61, 0.5, torch.tensor([4096, 65536]))
    assert got[0].item() == pytest.approx(16 * got[1].item())


@pytest.mark.parametrize(
    "call",
    [
        lambda: threshold_from_scale_factor(0.0, 10),
        lambda: threshold_from_scale_factor(-1.0, 10),
        lambda: threshold_from_scale_factor(math.nan, 10),
        lambda: threshold_from_scale_factor(math.inf, 10),
        lambda: threshold_from_scale_factor(1.0, -1),
        lambda: threshold_from_model(0.0, 1.0, 0.5, 10),
        lambda: threshold_from_model(1.0, math.nan, 0.5, 10),
        lambda: threshold_from_model(1.0, 1e4, 0.9, 10),
        lambda: threshold_from_model(1.0, -1e4, 0.9, 10),
        lambda: threshold_from_model(1.0, 1.0, 1.5, 10),
        lambda: threshold_from_model(1.0, 1.0, math.nan, 10),
    ],
)
def test_a_malformed_source_is_refused(call):
    with pytest.raises(ValueError, match="must"):
        call()
