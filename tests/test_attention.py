"""attention and attention_varlen against the oracle, decision by decision, on every runner.

The oracle replays the decisions that were taken: so the output must agree with it to rounding whatever they were, and
each decision must be the rule's except where the margin is within the rounding of the scores.
"""

from __future__ import annotations

import math

import pytest
import torch

import cute_sparse
from cute_sparse import reference
from cute_sparse import threshold as thresholds
from cute_sparse.problem import TileGeometry
from tests.cases import CASES, Case, Inputs, make_inputs
from tests.conftest import reason_to_skip

# tanh.approx.f32: absolute error 2^-10.987 (PTX ISA, "tanh"); scores are softcap * tanh(..).
TANH_ERROR = 2.0**-10
# ex2.approx.ftz.f32 has relative error 2^-22 (PTX ISA), a cubic polynomial in its place 8.8e-5 (anchors of
# FlashAttention-4); the sum of positive terms keeps it.
EXP_ERROR = 1e-4


def call(case: Case, inputs: Inputs, **more):
    options = dict(
        causal=case.causal, window_size=case.window, softcap=case.softcap, softmax_scale=case.softmax_scale,
        learnable_sink=inputs.learnable_sink, threshold=inputs.threshold, **more,
    )  # fmt: skip
    if not case.packed:
        return cute_sparse.attention(inputs.q, inputs.k, inputs.v, **options)
    return cute_sparse.attention_varlen(
        inputs.q, inputs.k, inputs.v,
        cu_seqlens_q=inputs.cu_seqlens_q, cu_seqlens_k=inputs.cu_seqlens_k,
        max_seqlen_q=max(case.lengths_q, default=0), max_seqlen_k=max(case.lengths_k, default=0), **options,
    )  # fmt: skip


def oracle(case: Case, inputs: Inputs, geometry, skip_map=None, dtype=torch.float64) -> reference.Oracle:
    threshold = inputs.threshold
    if isinstance(threshold, float):
        threshold = torch.tensor(threshold, dtype=torch.float64)
    elif threshold is not None:
        threshold = {"batch": threshold[..., None], "heads": threshold[None]}.get(case.threshold, threshold).cpu()
    left, right = case.window
    options = dict(
        softmax_scale=case.scale, window_left=left, window_right=0 if case.causal else right, softcap=case.softcap,
        threshold=threshold, sink=None if inputs.learnable_sink is None else inputs.learnable_sink.cpu(),
        geometry=geometry, dtype=dtype, skip_map=None if skip_map is None else skip_map.cpu(),
    )  # fmt: skip
    q, k, v = inputs.q.cpu(), inputs.k.cpu(), inputs.v.cpu()
    if not case.packed:
        return reference.attention(q, k, v, **options)
    return reference.attention_varlen(
        q, k, v,
        cu_seqlens_q=inputs.cu_seqlens_q.tolist(), cu_seqlens_k=inputs.cu_seqlens_k.tolist(),
        max_seqlen_q=max(case.lengths_q, default=0), max_seqlen_k=max(case.lengths_k, default=0), **options,
    )  # fmt: skip


def check(case: Case, inputs: Inputs, got: cute_sparse.AttentionOutput) -> None:
    geometry, skip_map = got.stats.geometry, got.stats.skip_map.cpu()
    replayed = oracle(case, inputs, geometry, skip_map)
    check_decisions(case, inputs, geometry, skip_map, replayed)
    assert torch.equal(got.stats.tile_counts.cpu(), replayed.tile_counts)
    check_output(case, inputs, geometry, got.out.cpu(), replayed)
    check_lse(case, got.lse.cpu(), replayed)
    if case.mixed:
        kept, visited = replayed.tile_counts.sum(dim=(1, 2)).tolist()
        ranges = visited - (replayed.margin == math.inf).sum().item()
        assert visited - ranges < kept < visited, "the case skips nothing, or all that it can"


def check_decisions(case, inputs, geometry, skip_map, replayed) -> None:
    assert skip_map.shape == replayed.skip_map.shape and skip_map.dtype == torch.uint8
    visited = ~replayed.margin.isnan()
    assert torch.equal(skip_map > 0, visited), "visited other tiles than the mask asks for"
    wrong = visited & ((replayed.margin < 0) != (skip_map == reference.SKIPPED))
    in_float32 = oracle(case, inputs, geometry, skip_map, dtype=torch.float32)
    difference = (in_float32.margin.double() - replayed.margin)[replayed.margin.isfinite()].abs()
    rounding = 4 * difference.max().item() if difference.numel() else 0.0
    rounding += 2 * case.softcap * TANH_ERROR
    assert (replayed.margin[wrong].abs() <= rounding).all(), (
        f"{int(wrong.sum())} decisions against the rule, up to {replayed.margin[wrong].abs().max()} from the threshold"
    )


def check_output(
    case: Case, inputs: Inputs, geometry: TileGeometry, out: torch.Tensor, replayed: reference.Oracle
) -> None:
    """The error is that of PyTorch computing the same tiles with probabilities and output rounded to the dtype."""
    assert out.dtype == case.dtype and out.shape == replayed.out.shape
    assert not out.isnan().any()
    if out.numel() == 0:
        return
    error = out.double() - replayed.out
    rounded = error_of_the_same_in_dtype(case, inputs, geometry, replayed)
    assert error.norm() <= 1.5 * rounded.norm() + tanh_slack(case, replayed)
    assert error.abs().max() <= 3 * rounded.abs().max() + tanh_slack(case, replayed)
    # A bias: rounding errors of n elements average out to about rms / sqrt(n).
    unbiased = rounded.square().mean().sqrt() / math.sqrt(error.numel())
    assert error.mean().abs() <= 2 * rounded.mean().abs() + 8 * unbiased + tanh_slack(case, replayed)
    no_key = replayed.lse == -math.inf
    no_key = no_key.transpose(-1, -2)
    assert (out[no_key] == 0).all(), "a row without a key must be 0"


def tanh_slack(case: Case, replayed: reference.Oracle) -> float:
    """An error of d in every score changes a weighted mean of values by at most 2 d times their size."""
    return 2 * case.softcap * TANH_ERROR * replayed.out.abs().max().item() if case.softcap else 1e-30


def error_of_the_same_in_dtype(
    case: Case, inputs: Inputs, geometry: TileGeometry, replayed: reference.Oracle
) -> torch.Tensor:
    """The error of PyTorch attending to the same tiles, with the weights and the output rounded to the dtype."""
    out = torch.zeros(replayed.out.shape, dtype=torch.float64)
    for queries, keys, batch in sequences(case):
        q, k, v = inputs.q.cpu(), inputs.k.cpu(), inputs.v.cpu()
        q, k, v = (q[queries], k[keys], v[keys]) if case.packed else (q[batch], k[batch], v[batch])
        group = case.heads_q // case.heads_kv
        scores = torch.einsum("qhd,khd->hqk", q.float(), k.float().repeat_interleave(group, 1)) * case.scale
        if case.softcap:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        lse = (replayed.lse[:, queries] if case.packed else replayed.lse[batch]).float()
        weights = torch.exp(scores - torch.where(lse == -math.inf, math.inf, lse)[..., None])
        kept = kept_elements(case, geometry, replayed.skip_map[batch], q.shape[0], k.shape[0])
        weights = torch.where(kept, weights, 0.0)  # of a row with a sink alone, exp(score - lse) may overflow
        rounded = weights.to(case.dtype).double()
        result = torch.einsum("hqk,khd->qhd", rounded, v.double().repeat_interleave(group, 1)).to(case.dtype).double()
        if case.packed:
            out[queries] = result
        else:
            out[batch] = result
    return out - replayed.out


def sequences(case: Case):
    """(slice of packed queries, slice of packed keys, index) of each sequence."""
    start_q = start_k = 0
    for index, (length_q, length_k) in enumerate(zip(case.lengths_q, case.lengths_k, strict=True)):
        yield slice(start_q, start_q + length_q), slice(start_k, start_k + length_k), index
        start_q, start_k = start_q + length_q, start_k + length_k


def kept_elements(
    case: Case, geometry: TileGeometry, skip_map: torch.Tensor, length_q: int, length_k: int
) -> torch.Tensor:
    """(heads_q, length_q, length_k) bool: in a kept tile and inside the mask."""
    kept = (skip_map == reference.KEPT).repeat_interleave(geometry.tile_rows, 1).repeat_interleave(geometry.tile_n, 2)
    kept = kept[:, :length_q, :length_k]
    distance = torch.arange(length_k) - torch.arange(length_q)[:, None] - (length_k - length_q)
    left, right = case.window
    right = 0 if case.causal else right
    visible = torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        visible &= distance >= -left
    if right is not None:
        visible &= distance <= right
    return kept & visible


def check_lse(case: Case, lse: torch.Tensor, replayed: reference.Oracle) -> None:
    assert lse.dtype == torch.float32 and lse.shape == replayed.lse.shape
    no_key = replayed.lse == -math.inf
    assert torch.equal(lse == -math.inf, no_key)
    error = (lse.double() - replayed.lse)[~no_key]
    tolerance = EXP_ERROR + 1e-6 * replayed.lse[~no_key].abs() + case.softcap * TANH_ERROR
    assert (error.abs() <= tolerance).all(), f"lse is off by {error.abs().max()}"


@pytest.mark.parametrize("name", CASES)
def test_attention_equals_the_oracle_that_takes_its_decisions(runner, name):
    case = CASES[name]
    inputs = make_inputs(case, device=runner.device)
    for order in runner.orders:
        with runner.in_order(order):
            got = call(case, inputs, return_lse=True, return_stats=True)
        check(case, inputs, got)


@pytest.mark.parametrize("name", ["causal", "skip, causal", "packed"])
def test_without_more_asked_only_the_output_is_returned_and_it_is_the_same(runner, name):
    case = CASES[name]
    inputs = make_inputs(case, device=runner.device)
    with runner.in_order(runner.orders[0]):
        out = call(case, inputs)
        more = call(case, inputs, return_lse=True, return_stats=True)
        with_lse = call(case, inputs, return_lse=True)
    assert isinstance(out, torch.Tensor)
    assert with_lse.stats is None
    torch.testing.assert_close(out, more.out, rtol=2.0**-7, atol=2.0**-10)
    torch.testing.assert_close(with_lse.lse, more.lse, rtol=1e-5, atol=1e-4)


def test_out_is_honoured_and_nothing_around_it_is_written(runner):
    case = CASES["causal"]
    inputs = make_inputs(case, device=runner.device)
    room = torch.full((3, 260, 4, 144), 7.0, dtype=case.dtype, device=runner.device)
    view = room[1:2, 2:258, 1:3, 8:136]
    with runner.in_order(runner.orders[0]):
        got = call(case, inputs, out=view, return_lse=True, return_stats=True)
    assert got.out.data_ptr() == view.data_ptr()
    check(case, inputs, got)
    view.fill_(7.0)
    assert (room == 7.0).all()


@pytest.mark.parametrize("name", ["causal", "skip, packed"])
def test_strided_inputs(runner, name):
    """Q, K and V as slices of one projection, head dims padded, heads and tokens transposed."""
    case = CASES[name]
    inputs = make_inputs(case, device=runner.device)
    strided = Inputs(
        q=_transposed_in_memory(inputs.q), k=_inside_a_wider_one(inputs.k), v=_transposed_in_memory(inputs.v),
        threshold=inputs.threshold, cu_seqlens_q=inputs.cu_seqlens_q, cu_seqlens_k=inputs.cu_seqlens_k,
    )  # fmt: skip
    assert not strided.q.is_contiguous() and not strided.k.is_contiguous()
    with runner.in_order(runner.orders[0]):
        got = call(case, strided, return_lse=True, return_stats=True)
    check(case, inputs, got)


def _transposed_in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, its heads outside its tokens in memory."""
    return tensor.transpose(-2, -3).contiguous().transpose(-2, -3)


def _inside_a_wider_one(tensor: torch.Tensor) -> torch.Tensor:
    wider = torch.full((*tensor.shape[:-2], tensor.shape[-2] + 1, tensor.shape[-1] + 16), float("nan")).to(tensor)
    wider[..., 1:, 8:-8] = tensor
    return wider[..., 1:, 8:-8]


def test_one_key_head_expanded_to_all(runner):
    """Stride 0 along the heads of K and V."""
    case = CASES["one key head for each query head"]
    inputs = make_inputs(case, device=runner.device)
    k, v = (tensor[:, :, :1].expand(-1, -1, 3, -1) for tensor in (inputs.k, inputs.v))
    expanded = Inputs(inputs.q, k, v, None, None, None)
    with runner.in_order(runner.orders[0]):
        got = call(case, expanded, return_lse=True, return_stats=True)
    check(case, Inputs(inputs.q, k.contiguous(), v.contiguous(), None, None, None), got)


def test_heads_that_all_fit_the_cache(runner):
    """Of one key, K and V of 2^32 heads would: more than a number of heads can be."""
    q = torch.randn(1, 1, 4096, 8, device=runner.device).bfloat16()
    k = torch.randn(1, 1, 1, 8, device=runner.device).bfloat16()
    with runner.in_order(runner.orders[0]):
        out = cute_sparse.attention(q, k, k, causal=True, out=torch.full_like(q, math.nan))
    assert torch.equal(out, k.expand_as(q))


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_propagate_as_in_torch(runner, where, value):
    case = CASES["full"]
    inputs = make_inputs(case, device=runner.device)
    getattr(inputs, where)[0, 70, 0, 5] = value
    with runner.in_order(runner.orders[0]):
        out = call(case, inputs)
    q, k, v = (tensor.double().transpose(1, 2) for tensor in (inputs.q, inputs.k, inputs.v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=case.scale, enable_gqa=True)
    expected = expected.transpose(1, 2)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())
    finite = expected.isfinite()
    torch.testing.assert_close(out[finite].double(), expected[finite], rtol=2.0**-6, atol=2.0**-6)


def test_a_nan_score_never_skips(runner):
    case = CASES["skip"]
    inputs = make_inputs(case, device=runner.device)
    with runner.in_order(runner.orders[0]):
        clean = call(case, inputs, return_stats=True).stats
        groups_with_a_skip = (clean.skip_map[0, 1] == reference.SKIPPED).any(dim=1).nonzero().flatten()
        row = int(groups_with_a_skip[0]) * clean.geometry.tile_rows + 3
        inputs.q[0, row, 1, 0] = math.nan
        got = call(case, inputs, return_stats=True, return_lse=True)
    group = row // clean.geometry.tile_rows
    assert (got.stats.skip_map[0, 1, group] == reference.KEPT).all()
    assert got.out[0, row, 1].isnan().all() and got.out.isnan().sum() == case.head_dim_v


def test_a_neighbour_s_nan_does_not_leak_into_a_packed_sequence(runner):
    """The last tile of a sequence reaches into the next one, whose values have weight 0; 0 times NaN is NaN."""
    case = CASES["packed"]
    inputs = make_inputs(case, device=runner.device)
    for tensor in (inputs.q, inputs.k, inputs.v):
        tensor[100:137] = math.nan  # all of the second sequence
    with runner.in_order(runner.orders[0]):
        out = call(case, inputs)
    assert out[100:137].isnan().all()
    assert not out[:100].isnan().any() and not out[137:].isnan().any()


def test_a_threshold_tensor_is_read_at_each_call(runner):
    case = CASES["skip, lambda per head"]
    inputs = make_inputs(case, device=runner.device)
    with runner.in_order(runner.orders[0]):
        inputs.threshold.fill_(1e-30)
        before = call(case, inputs, return_stats=True).stats.tile_counts
        inputs.threshold.fill_(1.0)
        after = call(case, inputs, return_stats=True).stats.tile_counts
    assert torch.equal(before[0], before[1])
    assert (after[0] < after[1]).all()


def test_thresholds_that_nobody_checked_are_safe(runner, monkeypatch):
    """On a GPU the values are not read: above 1 counts as 1, which keeps new maxima; NaN and below 0 skip nothing."""
    if runner.arch is None:
        pytest.skip("the reference checks every value")
    monkeypatch.setattr(thresholds, "check_values", lambda tensor: None)
    case = CASES["skip, lambda per head"]
    inputs = make_inputs(case, device=runner.device)
    with runner.in_order(runner.orders[0]):
        inputs.threshold.copy_(torch.tensor([1.0, 1.0, 1.0, 1.0]))
        ones = call(case, inputs, return_stats=True).stats
        inputs.threshold.copy_(torch.tensor([2.0, math.inf, math.nan, -0.5]))
        odd = call(case, inputs, return_stats=True).stats
    assert torch.equal(odd.skip_map[:, :2], ones.skip_map[:, :2])
    kept, visited = odd.tile_counts
    assert torch.equal(kept[:, 2:], visited[:, 2:])
    assert (ones.tile_counts[0] < ones.tile_counts[1]).all()


# ---- What a GPU alone can tell ----


@pytest.mark.gpu
def test_a_captured_graph_takes_new_inputs_and_thresholds_at_each_replay():
    """With more work tiles than multiprocessors: a counter hands them out, which each replay must find at zero."""
    reason = reason_to_skip("gpu")
    if reason is not None:
        pytest.skip(reason)
    case = Case(lengths_q=(1024, 1024), lengths_k=(1024, 1024), heads_q=16, causal=True, threshold="heads")
    inputs = make_inputs(case, device="cuda")
    call(case, inputs)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(case, inputs)
    for factor in (1.0, 0.1, 10.0):
        inputs.q.copy_(inputs.q.flip(1))
        inputs.threshold.mul_(factor)
        captured.fill_(math.nan)
        graph.replay()
        torch.testing.assert_close(captured, call(case, inputs), rtol=0, atol=0)


@pytest.mark.gpu
def test_a_call_that_torch_compile_captures_equals_the_eager_one():
    """Its warm-up takes memory from the graph's pool, in which nothing but results may be left."""
    reason = reason_to_skip("gpu")
    if reason is not None:
        pytest.skip(reason)
    case = Case(lengths_q=(1024, 1024), lengths_k=(1024, 1024), heads_q=16, causal=True, threshold="heads")
    inputs = make_inputs(case, device="cuda")
    compiled = torch.compile(lambda: call(case, inputs) * 2, backend="cudagraphs")
    for _ in range(4):  # warms up, captures, replays
        inputs.q.copy_(inputs.q.flip(1))
        torch.testing.assert_close(compiled(), call(case, inputs) * 2, rtol=0, atol=0)
    torch.compiler.reset()
