"""decode against the oracle, decision by decision and split by split, on every runner."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import cute_sparse
from cute_sparse import dispatch, reference, splits
from cute_sparse import inputs as checks
from cute_sparse import threshold as thresholds
from cute_sparse.emulator import chips, timing
from cute_sparse.problem import TileGeometry
from tests.conftest import EMULATED_ARCHS, Runner, reason_to_skip
from tests.decode_cases import CASES, PAGED, DecodeCase, DecodeInputs, make_decode_inputs
from tests.test_attention import TANH_ERROR, check_lse, tanh_slack


def arguments(case: DecodeCase, inputs: DecodeInputs) -> dict:
    return dict(
        seqused_k=inputs.seqused_k, page_table=inputs.page_table, causal=case.causal, window_size=case.window,
        softcap=case.softcap, softmax_scale=case.softmax_scale, threshold=inputs.threshold,
        learnable_sink=inputs.learnable_sink, num_splits=case.num_splits, share_max=case.share_max,
    )  # fmt: skip


def call(case: DecodeCase, inputs: DecodeInputs, **more):
    return cute_sparse.decode(inputs.q, inputs.k_cache, inputs.v_cache, **arguments(case, inputs), **more)


def splitting_of(case: DecodeCase, inputs: DecodeInputs) -> dict:
    """How the device that is entered cuts this call."""
    more = dict(out=None, return_lse=True, return_stats=True)
    plan = dispatch.plan_decode(inputs.q, inputs.k_cache, inputs.v_cache, arguments(case, inputs) | more)
    return plan.splitting


def seeds_of(case: DecodeCase, inputs: DecodeInputs, geometry: TileGeometry, splitting: dict) -> int:
    """How many tiles the splits of a call look at before their own."""
    left, right = case.window
    bounds = (10**6 if left is None else left, 0 if case.causal else right)
    items = [
        max(len(reference.tiles_of(keys, geometry.tile_n)), 1)
        for length in inputs.seqused_k.tolist()
        for keys in [reference.visible_keys(case.seqlen_q, length, *bounds)]
        for _ in range(case.heads_kv * -(-case.seqlen_q * case.group // geometry.tile_rows))
    ]
    return sum(splits.seeds(begin) for cuts in splits.item_cuts(items, **splitting) for begin in cuts[:-1])


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
        sink=None if inputs.learnable_sink is None else inputs.learnable_sink.cpu(), share_max=case.share_max,
        **splitting,
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


@pytest.mark.parametrize("name", CASES)
def test_decode_equals_the_oracle_that_takes_its_decisions(decoder, name):
    case = CASES[name]
    inputs = make_decode_inputs(case, device=decoder.device)
    first = None
    for order in decoder.orders:
        with decoder.in_order(order):
            got = call(case, inputs, return_lse=True, return_stats=True)
            splitting = splitting_of(case, inputs)
        if first is None or case.share_max:
            first = got
            check(case, inputs, got, splitting)
        else:
            assert same_bits(got, first), "the result depends on the order in which the device works"


def same_bits(one: cute_sparse.AttentionOutput, other: cute_sparse.AttentionOutput) -> bool:
    pairs = ((one.out, other.out), (one.lse, other.lse), (one.stats.skip_map, other.stats.skip_map),
             (one.stats.tile_counts, other.stats.tile_counts))  # fmt: skip
    return all(torch.equal(a, b) for a, b in pairs)


def run_checked(case: DecodeCase, inputs: DecodeInputs, decoder: Runner, **more) -> cute_sparse.AttentionOutput:
    with decoder.in_order(decoder.orders[0]):
        got = call(case, inputs, return_lse=True, return_stats=True, **more)
        splitting = splitting_of(case, inputs)
    check(case, inputs, got, splitting)
    return got


@pytest.mark.parametrize("name", ["paged", "skip, ragged"])
def test_without_more_asked_only_the_output_is_returned_and_it_is_the_same(decoder, name):
    case = CASES[name]
    inputs = make_decode_inputs(case, device=decoder.device)
    with decoder.in_order(decoder.orders[0]):
        out = call(case, inputs)
        more = call(case, inputs, return_lse=True, return_stats=True)
    assert isinstance(out, torch.Tensor) and torch.equal(out, more.out)


def test_out_is_honoured_and_nothing_around_it_is_written(decoder):
    case = CASES["skip, ragged"]
    inputs = make_decode_inputs(case, device=decoder.device)
    room = torch.full((case.batch + 1, 3, 10, 144), 7.0, dtype=case.dtype, device=decoder.device)
    view = room[1:, 1:2, 1:9, 8:136]
    got = run_checked(case, inputs, decoder, out=view)
    assert got.out.data_ptr() == view.data_ptr()
    view.fill_(7.0)
    assert (room == 7.0).all()


@pytest.mark.parametrize("layout", ["heads outside tokens", "K and V in one tensor"])
def test_strided_caches(decoder, layout):
    """As serving engines keep them: pages of heads of tokens, or K beside V in each page."""
    case = CASES["skip, ragged"]
    inputs = make_decode_inputs(case, device=decoder.device)
    if layout == "heads outside tokens":
        k, v = (cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in (inputs.k_cache, inputs.v_cache))
    else:
        k, v = torch.stack([inputs.k_cache, inputs.v_cache], dim=1).unbind(dim=1)
    projected = torch.full((case.batch, case.seqlen_q, case.heads_q + 2, case.head_dim + 16), math.nan).to(inputs.q)
    projected[:, :, 1:-1, 8:-8] = inputs.q
    wide_table = torch.full((case.batch, inputs.page_table.shape[1] + 5), -7, dtype=torch.int32).to(inputs.page_table)
    wide_table[:, :-5] = inputs.page_table
    strided = replace(
        inputs, q=projected[:, :, 1:-1, 8:-8], k_cache=k, v_cache=v, page_table=wide_table[:, :-5]
    )  # fmt: skip
    assert not any(x.is_contiguous() for x in (strided.q, k, v, strided.page_table))
    run_checked(case, strided, decoder)


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_propagate_as_in_torch(decoder, where, value):
    case = replace(CASES["three splits"], lengths=(257, 70))
    inputs = make_decode_inputs(case, device=decoder.device)
    if where == "q":
        inputs.q[0, 0, 2, 5] = value
    else:
        cache = inputs.k_cache if where == "k" else inputs.v_cache
        cache[inputs.page_table[0, 1], 9, 0, 5] = value
    with decoder.in_order(decoder.orders[0]):
        out = call(case, inputs).cpu()
    for index, length in enumerate(case.lengths):
        k, v = (
            reference.cached_tokens(cache.cpu(), inputs.page_table[index].cpu(), index, slice(0, length))
            for cache in (inputs.k_cache, inputs.v_cache)
        )
        q = inputs.q[index].cpu().double().transpose(0, 1)
        expected = torch.nn.functional.scaled_dot_product_attention(
            q, k.double(), v.double(), scale=case.scale, enable_gqa=True
        ).transpose(0, 1)
        assert torch.equal(out[index].isnan(), expected.isnan())
        assert torch.equal(out[index].isinf(), expected.isinf())
        finite = expected.isfinite()
        torch.testing.assert_close(out[index][finite].double(), expected[finite], rtol=2.0**-6, atol=2.0**-6)


def test_a_nan_score_never_skips(decoder):
    """From the tile with the NaN on, to the end of its split."""
    case = CASES["skip, one split"]
    inputs = make_decode_inputs(case, device=decoder.device)
    inputs.q[0, 0, 1, 0] = math.nan
    with decoder.in_order(decoder.orders[0]):
        clean = call(case, make_decode_inputs(case, device=decoder.device), return_lse=True, return_stats=True)
        got = call(case, inputs, return_lse=True, return_stats=True)
    assert (clean.stats.skip_map == reference.SKIPPED).any()
    assert not (got.stats.skip_map == reference.SKIPPED).any()
    assert got.out[0, 0, 1].isnan().all() and got.out.isnan().sum() == case.head_dim_v


def test_lengths_page_table_and_threshold_are_read_at_each_call(decoder):
    """The same tensors with other values: what a CUDA graph's replay relies on."""
    case = CASES["skip, lambda per head"]
    inputs = make_decode_inputs(case, device=decoder.device)
    run_checked(case, inputs, decoder)
    pages = inputs.k_cache.shape[0]
    for cache in (inputs.k_cache, inputs.v_cache):
        cache.copy_(cache.roll(1, dims=0))
    used = (inputs.page_table >= 0) & (inputs.page_table < pages)
    inputs.page_table.copy_(torch.where(used, (inputs.page_table + 1) % pages, inputs.page_table))
    inputs.seqused_k.copy_(torch.tensor([470, 1]))
    inputs.threshold.copy_(inputs.threshold.flip(0))
    run_checked(replace(case, lengths=(470, 1)), inputs, decoder)


def test_thresholds_that_nobody_checked_are_safe(decoder, monkeypatch):
    """On a GPU the values are not read: above 1 counts as 1, which keeps new maxima; NaN and below 0 skip nothing."""
    if decoder.arch is None:
        pytest.skip("the reference checks every value")
    monkeypatch.setattr(thresholds, "check_values", lambda tensor: None)
    case = replace(CASES["skip, lambda per head"], heads_q=4, heads_kv=4)
    inputs = make_decode_inputs(case, device=decoder.device)
    with decoder.in_order(decoder.orders[0]):
        inputs.threshold.copy_(torch.tensor([1.0, 1.0, 1.0, 1.0]))
        ones = call(case, inputs, return_lse=True, return_stats=True).stats
        inputs.threshold.copy_(torch.tensor([2.0, math.inf, math.nan, -0.5]))
        odd = call(case, inputs, return_lse=True, return_stats=True).stats
    assert torch.equal(odd.skip_map[:, :2], ones.skip_map[:, :2])
    kept, visited = odd.tile_counts
    assert torch.equal(kept[:, 2:], visited[:, 2:])
    assert (ones.tile_counts[0] < ones.tile_counts[1]).all()


@pytest.mark.parametrize("num_splits", [None, 2])
def test_lengths_and_pages_that_nobody_checked_are_safe(decoder, monkeypatch, num_splits):
    """On a GPU they are not read: a length counts as at least 0 and at most the capacity, a page that does not exist
    as zeros."""
    if decoder.arch is None:
        pytest.skip("the reference checks every value")
    case = replace(PAGED, lengths=(300, 256, 0), num_splits=num_splits)
    inputs = make_decode_inputs(case, device=decoder.device)
    pages = inputs.k_cache.shape[0]
    bad_table = inputs.page_table.clone()
    bad_table[0, 2], bad_table[1, 1] = pages, 2**31 - 1
    bad_table[1, 4:] = pages + 5  # the capacity, of six pages, is more than the tokens that there are
    zeroed = replace(
        inputs, k_cache=torch.cat([inputs.k_cache, inputs.k_cache[:1] * 0]).nan_to_num(0.0),
        v_cache=torch.cat([inputs.v_cache, inputs.v_cache[:1] * 0]).nan_to_num(0.0),
        seqused_k=torch.tensor([300, 384, 0], dtype=torch.int32, device=decoder.device),
        page_table=torch.where((bad_table < 0) | (bad_table >= pages), pages, bad_table),
    )  # fmt: skip
    with decoder.in_order(decoder.orders[0]):
        expected = call(case, zeroed, return_lse=True, return_stats=True)
        monkeypatch.setattr(checks, "check_decode_values", lambda *given: None)
        wrong = replace(
            inputs, page_table=bad_table,
            seqused_k=torch.tensor([300, 10**6, -5], dtype=torch.int32, device=decoder.device),
        )  # fmt: skip
        got = call(case, wrong, return_lse=True, return_stats=True)
    assert same_bits(got, expected)


def test_splits_that_share_their_maxima_skip_more(decoder):
    """With the splits one after the other (one SM), each knows the maxima of all before it: of the tile in which all
    have their highest scores, and that is not among the two at which every split looks."""
    case = CASES["shared maxima, many splits"]
    inputs = make_decode_inputs(case, device=decoder.device)
    pages = inputs.page_table[0, : case.lengths[0] // 64 + 1]
    inputs.k_cache[pages[8], 5] = 1.5 * inputs.k_cache[pages[-1], (case.lengths[0] - 1) % 64]
    skipped = {}
    for share_max in (False, True):
        now = replace(case, share_max=share_max)
        with decoder.in_order(decoder.orders[0], **(dict(sms=1) if decoder.name.startswith("emulated") else {})):
            got = call(now, inputs, return_lse=True, return_stats=True)
            splitting = splitting_of(now, inputs)
        check(now, inputs, got, splitting)
        skipped[share_max] = int((got.stats.skip_map == reference.SKIPPED).sum())
    if decoder.name == "gpu":
        assert skipped[False] <= skipped[True]  # who hears of what depends on time
    else:
        assert skipped[False] < skipped[True]


# ---- What the emulator alone can tell ----


@pytest.fixture(params=EMULATED_ARCHS)
def arch(request: pytest.FixtureRequest) -> str:
    if not dispatch.has_kernel("decode", request.param):
        pytest.skip(f"no decode kernel for {request.param} yet")
    return request.param


COUNTED = ("paged", "skip, ragged", "skip, several blocks of rows", "skip, pages of 16", "pages of 256, window",
           "contiguous, skip", "contiguous, head dim 192 and 128", "shared maxima, many splits")  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_k_is_loaded_of_every_tile_visited_and_v_of_every_tile_kept_and_nothing_else(arch, name):
    case = CASES[name]
    inputs = make_decode_inputs(case)
    with cute_sparse.emulated(arch) as device:
        got = call(case, inputs, return_lse=True, return_stats=True)
        (launch,) = device.launches
        splitting = splitting_of(case, inputs)
    kept, visited = got.stats.tile_counts.sum(dim=(1, 2)).tolist()
    keys_bytes = got.stats.geometry.tile_n * 2
    seeds = seeds_of(case, inputs, got.stats.geometry, splitting) if case.threshold else 0
    expected = keys_bytes * ((visited + seeds) * case.head_dim + kept * case.head_dim_v)
    assert launch.counts.tma_bytes_loaded == expected
    assert got.stats.v_bytes_not_read.sum() == (visited - kept) * keys_bytes * case.head_dim_v


@pytest.mark.parametrize("name", ["paged", "skip, pages of 16", "pages of 32, window to both sides"])
def test_neither_unused_entries_of_the_page_table_nor_the_pages_that_they_name_are_read(arch, name, monkeypatch):
    """They are taken out of the device's memory, where any access is an error; all name one page that exists."""
    case = CASES[name]
    inputs = make_decode_inputs(case)
    columns = [
        slice(case.first_key(length) // case.page_size, -(-length // case.page_size)) for length in case.lengths
    ]
    unused = inputs.k_cache.shape[0]
    table = torch.full_like(inputs.page_table, unused)
    for index, used in enumerate(columns):
        table[index, used] = inputs.page_table[index, used]
    k, v = (torch.cat([cache, cache[:1]]) for cache in (inputs.k_cache, inputs.v_cache))
    inputs = replace(inputs, k_cache=k, v_cache=v, page_table=table)
    with cute_sparse.emulated(arch) as device:
        expected = call(case, inputs, return_lse=True, return_stats=True)
        accessible = [(k, [k[:-1]]), (v, [v[:-1]]), (table, [table[i, used] for i, used in enumerate(columns)])]
        for tensor, parts in accessible:
            device.memory._core.remove_memory(tensor.untyped_storage().data_ptr())
            for part in parts:
                if part.numel():
                    device.memory._core.add_memory(part.data_ptr(), part.nbytes, "what may be read")
        add = type(device.memory).add

        def add_others(self, tensor, name=None):
            if not any(tensor is other for other, _ in accessible):
                add(self, tensor, name)

        monkeypatch.setattr(type(device.memory), "add", add_others)
        got = call(case, inputs, return_lse=True, return_stats=True)
    assert same_bits(got, expected)


def test_at_nothing_skipped_the_loads_and_matrix_instructions_are_those_of_the_dense_kernel(arch):
    case = CASES["paged"]
    inputs = make_decode_inputs(case)
    counts = {}
    for threshold in (None, 1e-30):
        with cute_sparse.emulated(arch) as device:
            call(case, replace(inputs, threshold=threshold))
            counts[threshold] = device.launches[0].counts
    assert counts[None].tma_bytes_loaded == counts[1e-30].tma_bytes_loaded
    assert counts[None].mma_instructions == counts[1e-30].mma_instructions


@pytest.mark.parametrize("share_max", [False, True])
def test_a_launch_leaves_the_counters_between_ctas_zero(arch, share_max):
    """The next launch on the stream starts from them, and nobody zeroes them in between."""
    case = replace(CASES["skip, ragged"], share_max=share_max, num_splits=3)
    inputs = make_decode_inputs(case)
    with cute_sparse.emulated(arch, sms=3):
        first = call(case, inputs, return_lse=True, return_stats=True)
        (counters,) = dispatch._emulation._memory.of_stream.values()
        assert (counters == 0).all()
        second = call(case, inputs, return_lse=True, return_stats=True)
    assert share_max or same_bits(first, second)


@pytest.mark.parametrize("sms", [1, 2, 7, 64])
def test_any_number_of_sms_gives_the_oracle_s_result(arch, sms):
    case = CASES["skip, ragged"]
    case = replace(case, num_splits=None, lengths=(0, 700, 1, 450, 64, 1300))
    inputs = make_decode_inputs(case)
    with cute_sparse.emulated(arch, sms=sms, order="random", seed=2):
        got = call(case, inputs, return_lse=True, return_stats=True)
        splitting = splitting_of(case, inputs)
    assert splitting["ctas"] == sms
    check(case, inputs, got, splitting)


def test_more_partial_results_than_can_be_kept_are_refused_by_their_bytes(arch):
    """The most that are allowed are planned; one part more is an error that names what it would take."""
    pages = torch.zeros(1, 64, 1, 128, dtype=torch.bfloat16)
    table = torch.zeros(64, 4096, dtype=torch.int32)  # 4096 tiles of a sequence
    q = torch.zeros(64, 16, 16, 128, dtype=torch.bfloat16)  # 256 rows of one KV head
    given = dict(seqused_k=torch.zeros(64, dtype=torch.int32), page_table=table)
    per_split = 64 * 256 * (128 + 4) * 4
    most = (4 << 30) // per_split
    with cute_sparse.emulated(arch):
        with pytest.raises(ValueError, match=f"num_splits={most + 1} .* {per_split * (most + 1)} bytes"):
            cute_sparse.decode(q, pages, pages, num_splits=most + 1, return_lse=True, return_stats=True, **given)
        options = dict(num_splits=most, causal=True, window_size=(None, None), softcap=0.0, softmax_scale=None)
        options |= dict(threshold=None, learnable_sink=None, share_max=False)
        options |= dict(out=None, return_lse=True, return_stats=True)
        plan = dispatch.plan_decode(q, pages, pages, given | options)
        assert 4 * plan.partials_shape[0] == per_split * most


@pytest.mark.parametrize(
    ("heads_q", "num_splits", "group", "trips_of_group", "trips_of_all"),
    [
        (4, 16, 16, 1, 1),  # 16 results' vectors at once
        (16, 24, 8, 2 + 1, 2 + 1 + 2),  # two of a thread's four vectors of 8 results; a counter; as many of 3 groups
    ],
)
def test_combining_takes_few_trips_to_global_memory(arch, heads_q, num_splits, group, trips_of_group, trips_of_all):
    """By how much the last CTA of a group to arrive, the last of all, and any other, are later if a trip takes longer.
    Without groups, the 24 splits' 16 rows would take eight."""
    case = replace(PAGED, lengths=(64 * num_splits,), heads_q=heads_q, heads_kv=1, num_splits=num_splits)
    chip, longer = chips.chip_of(arch), 100_000
    far = replace(chip, global_latency=chip.global_latency + longer)
    with cute_sparse.emulated(arch, sms=num_splits, threads=1) as device, timing.traced(device):
        call(case, make_decode_inputs(case), return_lse=True, return_stats=True)
        trips = [
            (timing.estimate(device, far, cluster=cta).cycles - timing.estimate(device, chip, cluster=cta).cycles)
            / longer
            for cta in range(timing.traced_clusters(device))
        ]
    combined = [round(more - trips[0]) for more in trips]
    expected = [trips_of_group if cta % group == group - 1 else 0 for cta in range(num_splits)]
    assert combined == [*expected[:-1], trips_of_all]


# ---- What a GPU alone can tell ----


@pytest.mark.gpu
def test_a_captured_graph_takes_new_lengths_pages_and_thresholds_at_each_replay():
    reason = reason_to_skip("gpu")
    if reason is not None:
        pytest.skip(reason)
    case = replace(CASES["skip, lambda per head"], num_splits=None)
    inputs = make_decode_inputs(case, device="cuda")
    call(case, inputs)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(case, inputs)
    for lengths, factor in ((case.lengths, 1.0), ((470, 1), 0.1), ((0, 500), 1.0)):
        inputs.seqused_k.copy_(torch.tensor(lengths))
        inputs.threshold.mul_(factor)
        captured.fill_(math.nan)
        graph.replay()
        torch.testing.assert_close(captured, call(case, inputs), rtol=0, atol=0)
