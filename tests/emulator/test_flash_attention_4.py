"""FlashAttention-4 as its package ships it, on both architectures: kernels that no one here wrote.

Not here: three query heads to a KV head on sm_100, whose rows TMA cannot pack. That forward fills Q by cp.async, a
generic-proxy write, and multiplies it behind the mbarrier alone: the only fence.proxy.async of its PTX are the
epilogue's. The emulator reports MissingProxyFence.
"""

from __future__ import annotations

import pytest
import torch

from cute_sparse import emulator
from tests.emulator.flash_attention_4 import forget_the_gpu

pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed")

from flash_attn.cute import flash_attn_func, flash_attn_varlen_func  # noqa: E402

# Relative L2 distance of bf16 attention from fp32: P and the output are rounded to 8 bits, 2^-9 on average each.
TOLERANCE = 4e-3


@pytest.fixture(params=["sm_90a", "sm_100a"])
def arch(request: pytest.FixtureRequest) -> str:
    yield request.param
    forget_the_gpu()


def inputs(seqlen_q: int, seqlen_k: int, heads_q: int, heads_kv: int, head_dim: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, seqlen_q, heads_q, head_dim), (1, seqlen_k, heads_kv, head_dim), (1, seqlen_k, heads_kv, head_dim))
    return [torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in shapes]


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v in fp32; causal is aligned bottom-right, a row without keys gives 0."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (t.float().transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
        scores = scores.masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1).nan_to_num(0) @ v).transpose(1, 2)


def run(function, *tensors: torch.Tensor, **arguments) -> torch.Tensor:
    result = function(*(t.cuda() for t in tensors), **arguments)
    return (result[0] if isinstance(result, tuple) else result).float().cpu()


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    assert (out - expected).norm() <= TOLERANCE * expected.norm()
    assert (out - expected).abs().max() <= 0.05
    assert (out - expected).mean().abs() <= 1e-3


@pytest.mark.parametrize("order", ["eager", "late", "random"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_forward_matches_fp32(arch, head_dim, causal, order):
    with emulator.device(arch, order=order, seed=11, torch_cuda=True) as device:
        for seqlen_q, seqlen_k, heads_q, heads_kv in ((256, 256, 2, 1), (200, 333, 2, 1), (129, 64, 2, 1)):
            q, k, v = inputs(seqlen_q, seqlen_k, heads_q, heads_kv, head_dim)
            assert_close(run(flash_attn_func, q, k, v, causal=causal), reference(q, k, v, causal))
        launch = device.launches[0]
    # Every tile of the attention matrix that the mask leaves, twice (Q K^T and P V), is multiplied.
    assert sum(launch.counts.macs.values()) >= 2 * 2 * head_dim * 256 * 256 // (2 if causal else 1)
    assert launch.counts.exponentials >= 2 * 256 * 256 // 32 // (4 if causal else 2)  # some are polynomials on sm_100


def test_a_kv_head_for_each_query_head_matches_fp32(arch):
    q, k, v = inputs(129, 64, 2, 2, 64)
    with emulator.device(arch, order="random", seed=11, torch_cuda=True):
        assert_close(run(flash_attn_func, q, k, v), reference(q, k, v, causal=False))


def test_ragged_batches_match_fp32(arch):
    lengths = [70, 1, 130]
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    q, k, v = (t[0] for t in inputs(sum(lengths), sum(lengths), 2, 1, 64))
    with emulator.device(arch, order="random", seed=5, torch_cuda=True):
        out = run(
            flash_attn_varlen_func, q, k, v, causal=True,
            cu_seqlens_q=starts.cuda(), cu_seqlens_k=starts.cuda(),
            max_seqlen_q=max(lengths), max_seqlen_k=max(lengths),
        )  # fmt: skip
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        sequence = [t[None, begin:end] for t in (q, k, v)]
        assert_close(out[None, begin:end], reference(*sequence, causal=True))


def test_twenty_random_schedules_raise_no_false_alarm_and_change_neither_output_nor_counts(arch):
    q, k, v = inputs(200, 333, 2, 1, 64)
    outputs, counts = [], []
    for seed in range(20):
        with emulator.device(arch, order="random", seed=seed, sms=2, torch_cuda=True) as device:
            outputs.append(run(flash_attn_func, q, k, v, causal=True))
        (launch,) = device.launches
        counts.append((launch.counts.mma_instructions, launch.counts.macs, launch.counts.exponentials,
                       launch.counts.tma_bytes_loaded, launch.counts.tma_bytes_stored))  # fmt: skip
    assert all(torch.equal(out, outputs[0]) for out in outputs)
    assert all(count == counts[0] for count in counts)
