"""decode against the oracle, decision by decision and split by split, on every runner."""

from __future__ import annotations

import math

import pytest
import torch

import cute_sparse
from cute_sparse import dispatch, reference
from cute_sparse.problem import TileGeometry
from tests.conftest import Runner
from tests.decode_cases import CASES, DecodeCase, DecodeInputs, make_decode_inputs
from tests.test_attention import TANH_ERROR, check_lse, tanh_slack


def arguments(case: DecodeCase, inputs: DecodeInputs) -> dict:
    return dict(
        seqused_k=inputs.seqused_k, page_table=inputs.page_table, causal=case.causal, window_size=case.window,
        softcap=case.softcap, softmax_scale=case.softmax_scale, threshold=inputs.threshold,
        num_splits=case.num_splits, share_max=case.share_max,
    )  # fmt: skip


def call(case: DecodeCase, inputs: DecodeInputs, **more):
    return cute_sparse.decode(inputs.q, inputs.k_cache, inputs.v_cache, **arguments(case, inputs), **more)


def splitting_of(case: DecodeCase, inputs: DecodeInputs) -> dict:
    """How the device that is entered cuts this call."""
    more = dict(out=None, return_lse=True, return_stats=True)
    plan = dispatch.plan_decode(inputs.q, inputs.k_cache, inputs.v_cache, **arguments(case, inputs), **more)
    return plan.splitting


def oracle(case, inputs, geometry, splitting, skip_map=None, dtype=torch.float64) -> reference.DecodeOracle:
    threshold = inputs.threshold
    if isinstance(threshold, float):
        threshold = torch.tensor(threshold, dtype=torch.float64)
    elif threshold is not None:
        threshold = {"batch": threshold[..., None], "heads": threshold[None]}.get(case.threshold, threshold).cpu()
    left, right = case.window
    return reference.decode(
        inputs.q.cpu(), inputs.k_cache.cpu(), inputs.v_cache.cpu(),
        seqused_k=inputs.seqused_k.tolist(), page_table=None if inputs.page_table is None else inputs.page_table.cpu(),
        softmax_scale=case.scale, window_left=left, window_right=0 if case.causal else right, softcap=case.softcap,
        threshold=threshold, geometry=geometry, dtype=dtype, skip_map=None if skip_map is None else skip_map.cpu(),
        share_max=case.share_max, **splitting,
    )  # fmt: skip


def check(case: DecodeCase, inputs: DecodeInputs, got: cute_sparse.AttentionOutput, splitting: dict) -> None:
    geometry, skip_map = got.stats.geometry, got.stats.skip_map.cpu()
    replayed = oracle(case, inputs, geometry, splitting, skip_map)
    check_decisions(case, inputs, geometry, splitting, skip_map, replayed)
    assert torch.equal(got.stats.tile_counts.cpu(), replayed.tile_counts)
    kept, visited = replayed.tile_counts.long()
    v_tile_bytes = geometry.tile_n * case.head_dim_v * 2
    assert torch.equal(got.stats.v_bytes_not_read.cpu(), (visited - kept) * v_tile_bytes)
    check_output(case, inputs, geometry, got.out.cpu(), replayed)
    check_lse(case, got.lse.cpu(), replayed)
    if case.mixed:
        firsts = int((replayed.margin == math.inf).sum())
        assert firsts < kept.sum() < visited.sum(), "the case skips nothing, or all that it can"


def check_decisions(case, inputs, geometry, splitting, skip_map, replayed) -> None:
    assert skip_map.shape == replayed.skip_map.shape and skip_map.dtype == torch.uint8
    visited = ~replayed.margin.isnan()
    assert torch.equal(skip_map > 0, visited), "visited other tiles than the mask asks for"
    skipped = skip_map == reference.SKIPPED
    kept_wrongly = visited & ~skipped & (replayed.margin < 0)
    # A split that shares its maximum may skip what it could not by itself, if another one's is high enough.
    needed = replayed.least_margin if case.share_max else replayed.margin
    skipped_wrongly = skipped & (needed >= 0)
    in_float32 = oracle(case, inputs, geometry, splitting, skip_map, dtype=torch.float32)
    finite = replayed.margin.isfinite()
    difference = (in_float32.margin.double() - replayed.margin)[finite].abs()
    rounding = 4 * difference.max().item() if difference.numel() else 0.0
    rounding += 2 * case.softcap * TANH_ERROR
    wrong = torch.cat([replayed.margin[kept_wrongly], needed[skipped_wrongly]])
    assert (wrong.abs() <= rounding).all(), (
        f"{len(wrong)} decisions against the rule, up to {wrong.abs().max()} from the threshold"
    )


def check_output(case, inputs, geometry: TileGeometry, out: torch.Tensor, replayed) -> None:
    """The error is that of PyTorch computing the same tiles with probabilities and output rounded to the dtype."""
    assert out.dtype == case.dtype and out.shape == replayed.out.shape
    assert not out.isnan().any()
    error = out.double() - replayed.out
    rounded = error_of_the_same_in_dtype(case, inputs, geometry, replayed)
    assert error.norm() <= 1.5 * rounded.norm() + tanh_slack(case, replayed)
    assert error.abs().max() <= 3 * rounded.abs().max() + tanh_slack(case, replayed)
    # A bias: rounding errors of n elements average out to about rms / sqrt(n).
    unbiased = rounded.square().mean().sqrt() / math.sqrt(error.numel())
    assert error.mean().abs() <= 2 * rounded.mean().abs() + 8 * unbiased + tanh_slack(case, replayed)
    no_key = (replayed.lse == -math.inf).transpose(1, 2)
    assert (out[no_key] == 0).all(), "a row without a key must be 0"


def error_of_the_same_in_dtype(case, inputs, geometry: TileGeometry, replayed) -> torch.Tensor:
    """The error of PyTorch attending to the same keys, with the weights and the output rounded to the dtype."""
    out = torch.zeros(replayed.out.shape, dtype=torch.float64)
    for index, length in enumerate(inputs.seqused_k.tolist()):
        k, v = (tokens_of(case, inputs, cache, index) for cache in (inputs.k_cache, inputs.v_cache))
        scores = torch.einsum("qhd,khd->hqk", inputs.q[index].cpu().float(), k.float()) * case.scale
        if case.softcap:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        lse = replayed.lse[index].float()
        weights = torch.exp(scores - torch.where(lse == -math.inf, math.inf, lse)[..., None])
        kept = kept_elements(case, geometry, replayed.skip_map[index], length)
        weights = torch.where(kept, weights, 0.0).to(case.dtype).double()
        out[index] = torch.einsum("hqk,khd->qhd", weights, v.double()).to(case.dtype).double()
    return out - replayed.out


def tokens_of(case: DecodeCase, inputs: DecodeInputs, cache: torch.Tensor, index: int) -> torch.Tensor:
    """(length, heads_q, n), 0 where no query looks."""
    length = inputs.seqused_k.tolist()[index]
    first = case.first_key(length)
    pages = None if inputs.page_table is None else inputs.page_table[index].cpu()
    tokens = cache.new_zeros((length, case.heads_kv, cache.shape[3])).cpu()
    if length > first:
        tokens[first:] = reference.cached_tokens(cache.cpu(), pages, index, slice(first, length)).transpose(0, 1)
    return tokens.repeat_interleave(case.group, dim=1)


def kept_elements(case: DecodeCase, geometry: TileGeometry, skip_map: torch.Tensor, length: int) -> torch.Tensor:
    """(heads_q, seqlen_q, length) bool: in a kept tile and inside the mask. skip_map (heads_kv, row blocks, tiles)."""
    kept_rows = (skip_map == reference.KEPT).repeat_interleave(geometry.tile_rows, 1)
    kept_rows = kept_rows[:, : case.seqlen_q * case.group].repeat_interleave(geometry.tile_n, 2)[..., :length]
    kept = kept_rows.unflatten(1, (case.seqlen_q, case.group)).transpose(1, 2).flatten(0, 1)
    distance = torch.arange(length) - torch.arange(case.seqlen_q)[:, None] - (length - case.seqlen_q)
    left, right = case.window
    right = 0 if case.causal else right
    visible = torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        visible &= distance >= -left
    if right is not None:
        visible &= distance <= right
    return kept & visible


@pytest.fixture
def decoder(runner: Runner) -> Runner:
    """A runner whose architecture has a decode kernel."""
    if runner.arch is not None and not dispatch.has_kernel("decode", runner.arch):
        pytest.skip(f"no decode kernel for {runner.arch} yet")
    return runner


def skip_if_unsupported(runner: Runner, case: DecodeCase) -> None:
    """What a kernel does not declare is refused by name, which other tests check; here it is shown as skipped."""


@pytest.mark.parametrize("name", CASES)
def test_decode_equals_the_oracle_that_takes_its_decisions(decoder, name):
    case = CASES[name]
    inputs = make_decode_inputs(case, device=decoder.device)
    for order in decoder.orders:
        with decoder.in_order(order):
            got = call(case, inputs, return_lse=True, return_stats=True)
            splitting = splitting_of(case, inputs)
        check(case, inputs, got, splitting)
