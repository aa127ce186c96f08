"""`make demo`: attention on input that is structured like a real model's, dense and with tiles skipped.

On a GPU, the table shows times; on a CPU, the real kernels run in the emulator, and it shows their exact work.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import dataclass
from typing import NamedTuple

import torch

import cute_sparse

THRESHOLDS = (None, 1e-4, 1e-3, 1e-2, 1e-1)
EMULATED_ARCHS = ("sm_90a", "sm_100a")


class Inputs(NamedTuple):
    """q, k, v as `attention` takes them; needle (1, heads_kv, head_dim): the value that the last query looks for."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    needle: torch.Tensor


@dataclass(frozen=True)
class Size:
    seqlen: int
    heads_q: int
    heads_kv: int
    head_dim: int = 128


GPU_SIZE = Size(seqlen=65536, heads_q=32, heads_kv=8)
EMULATED_SIZE = Size(seqlen=2048, heads_q=4, heads_kv=2)


def structured_inputs(size: Size, device: str = "cpu", seed: int = 0) -> Inputs:
    """Queries and keys with what makes real attention sparse; batch 1, bfloat16. All figures are of scores.

    Positions, in the first half of the head dim: a rotary embedding that peaks at 20 on the diagonal, times the head's
    pace, and falls off with distance. Content, in the other half: normal, of deviation 1. Attention sinks: the first
    four keys get 6 from every query. A needle: one key in the first third that only the last query looks for, at 30.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    half, root = size.head_dim // 2, math.sqrt(size.head_dim)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def direction() -> torch.Tensor:
        vector = normal(half)
        return vector / vector.norm()

    spread = (root / math.sqrt(half)) ** 0.5  # of both contents: their dot product deviates by root
    q_content, k_content = (normal(1, size.seqlen, heads, half) * spread for heads in (size.heads_q, size.heads_kv))
    positions = _rotary(size.seqlen, half, device) * (20.0 * root / (half // 2)) ** 0.5
    sink, needle = direction(), direction()
    q_content += sink * root**0.5
    k_content[:, :4] = sink * root**0.5 * 6.0
    place = size.seqlen // 3
    q_content[:, -1] = needle * (30.0 * root) ** 0.5
    k_content[:, place] = needle * (30.0 * root) ** 0.5
    q = torch.cat([positions * _paces(size.heads_q, device), q_content], dim=-1)
    k = torch.cat([positions.expand(-1, -1, size.heads_kv, -1), k_content], dim=-1)
    v = normal(1, size.seqlen, size.heads_kv, size.head_dim)
    return Inputs(*(tensor.to(torch.bfloat16) for tensor in (q, k, v)), v[:, place])


def _rotary(seqlen: int, head_dim: int, device: str) -> torch.Tensor:
    """(1, seqlen, 1, head_dim): one vector of unit pairs, turned by each position; base 10000 as in RoPE."""
    pairs = head_dim // 2
    angle = torch.arange(seqlen, device=device)[:, None] * 10000.0 ** (-torch.arange(pairs, device=device) / pairs)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).flatten(1)[None, :, None]


def _paces(heads: int, device: str) -> torch.Tensor:
    """(1, 1, heads, 1): from a head that looks everywhere to one that looks around itself."""
    return torch.linspace(0.3, 1.5, heads, device=device)[None, None, :, None]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cute_sparse.demo", description=__doc__)
    parser.add_argument("--seqlen", type=int, help="tokens; by default 65536 on a GPU, 2048 in the emulator")
    options = parser.parse_args()
    if torch.cuda.is_available():
        show_gpu(_resized(GPU_SIZE, options.seqlen))
    else:
        print("No CUDA device: the kernels themselves run, instruction by instruction, in the emulator.\n")
        for arch in EMULATED_ARCHS:
            show_emulated(arch, _resized(EMULATED_SIZE, options.seqlen))


def _resized(size: Size, seqlen: int | None) -> Size:
    return size if seqlen is None else Size(seqlen, size.heads_q, size.heads_kv, size.head_dim)


# ---- What every row shows ----


class Row(NamedTuple):
    threshold: float | None
    skipped: float
    error: float
    needle_error: float


def row_of(threshold: float | None, got: cute_sparse.AttentionOutput, dense: torch.Tensor, inputs: Inputs) -> Row:
    """Fraction of tiles skipped; relative L2 error against the dense output; how far the needle's finder is off."""
    kept, visited = got.stats.tile_counts.sum(dim=(1, 2)).tolist()
    error = (got.out.float() - dense.float()).norm() / dense.float().norm()
    needle = inputs.needle.repeat_interleave(inputs.q.shape[2] // inputs.k.shape[2], dim=1).float()
    needle_error = (got.out[:, -1].float() - needle).norm() / needle.norm()
    return Row(threshold, 1 - kept / visited, error.item(), needle_error.item())


def _name(threshold: float | None) -> str:
    return "dense" if threshold is None else f"lambda {threshold:g}"


def _describe(size: Size) -> str:
    heads = f"{size.heads_q} query and {size.heads_kv} key heads of {size.head_dim}"
    return f"causal, {size.seqlen} tokens, {heads}, bfloat16; sinks, locality, rotary positions, a needle"


# ---- Emulator: exact work ----


def show_emulated(arch: str, size: Size) -> None:
    inputs = structured_inputs(size)
    print(f"{arch} in the emulator: {_describe(size)}")
    print(
        f"{'':14} {'tiles':>8} {'MMA':>9} {'exponen-':>10} {'TMA bytes':>10} {'warp in-':>11} {'work':>7} "
        f"{'error vs':>9} {'error of':>9}"
    )
    print(
        f"{'':14} {'skipped':>8} {'(MMAC)':>9} {'tials':>10} {'loaded':>10} {'structions':>11} {'saved':>7} "
        f"{'dense':>9} {'needle':>9}"
    )
    dense_out, dense_instructions = None, None
    for threshold in THRESHOLDS:
        with cute_sparse.emulated(arch) as device:
            got = _attention(inputs, threshold)
            counts = device.launches[-1].counts
        if threshold is None:
            dense_out, dense_instructions = got.out, counts.warp_instructions
        row = row_of(threshold, got, dense_out, inputs)
        saved = 1 - counts.warp_instructions / dense_instructions
        print(
            f"{_name(threshold):14} {row.skipped:8.1%} {sum(counts.macs.values()) / 1e6:9.1f} "
            f"{counts.exponentials * 32:10d} {counts.tma_bytes_loaded:10d} {counts.warp_instructions:11d} {saved:7.1%} "
            f"{row.error:9.1e} {row.needle_error:9.1e}"
        )
    print()


def _attention(inputs: Inputs, threshold: float | None) -> cute_sparse.AttentionOutput:
    return cute_sparse.attention(
        inputs.q, inputs.k, inputs.v, causal=True, threshold=threshold, return_lse=True, return_stats=True
    )


# ---- GPU: time ----


def show_gpu(size: Size) -> None:
    inputs = structured_inputs(size, device="cuda")
    print(f"{torch.cuda.get_device_name()}: {_describe(size)}")
    print(f"{'':14} {'tiles skipped':>14} {'ms':>8} {'speed-up':>9} {'error vs dense':>15} {'error of needle':>16}")
    dense_out, dense_ms = None, None
    for threshold in THRESHOLDS:
        got = _attention(inputs, threshold)
        milliseconds = median_ms(lambda threshold=threshold: cute_sparse.attention(
            inputs.q, inputs.k, inputs.v, causal=True, threshold=threshold
        ))  # fmt: skip
        if threshold is None:
            dense_out, dense_ms = got.out, milliseconds
        row = row_of(threshold, got, dense_out, inputs)
        print(
            f"{_name(threshold):14} {row.skipped:14.1%} {milliseconds:8.3f} {dense_ms / milliseconds:8.2f}x "
            f"{row.error:15.1e} {row.needle_error:16.1e}"
        )
    sdpa_ms = median_ms(lambda: torch.nn.functional.scaled_dot_product_attention(
        *(tensor.transpose(1, 2) for tensor in inputs[:3]), is_causal=True, enable_gqa=True
    ))  # fmt: skip
    print(f"{'PyTorch SDPA':14} {'':14} {sdpa_ms:8.3f} {dense_ms / sdpa_ms:8.2f}x\n")


def median_ms(call, repeats: int = 11) -> float:
    """Median time of one call by CUDA events, after three calls to warm up."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


if __name__ == "__main__":
    main()
