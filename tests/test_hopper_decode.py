"""The Hopper decode kernel, beyond what every kernel is tested for: its configurations, and its exact work."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import cute_sparse
from cute_sparse import compiled
from cute_sparse.problem import Problem
from tests.conftest import ORDERS
from tests.decode_cases import DecodeCase, make_decode_inputs
from tests.test_decode import call, check, splitting_of

pytest.importorskip("cutlass")

from cute_sparse.kernels.hopper import decode as hopper_decode
from cute_sparse.kernels.hopper import decode_config

from profiling import kernels, sass

ARCH = "sm_90a"
WARPS, WARP_ROWS, MMA_K = 4, 16, 16

SKIPPING = DecodeCase(lengths=(900, 0, 70, 300), seqlen_q=2, heads_q=8, heads_kv=2, threshold=0.03, spread=2.0)
# How the chosen config is changed.
CONFIGS = {
    "the fewest slots": dict(k_stages=1, v_stages=1, p_stages=2, q_stages=1),
    "two slots": dict(k_stages=2, v_stages=2, p_stages=2, q_stages=1),
    "more slots for V than for P": dict(k_stages=3, v_stages=4, p_stages=2),
    "one tile for a CTA": dict(min_tiles=1),
    "many tiles for a CTA": dict(min_tiles=100),
    "wide tiles": dict(tile_n=128, k_stages=2, v_stages=2, p_stages=2),
    "wide tiles, the fewest slots": dict(tile_n=128, k_stages=1, v_stages=1, p_stages=2, q_stages=1),
}


@pytest.fixture
def configured(monkeypatch):
    """Call it with changes to a `Config`: from then on every problem gets its own choice, so changed."""
    choose = decode_config.choose

    def change(**changes):
        monkeypatch.setattr(decode_config, "choose", lambda problem: replace(choose(problem), **changes))

    return change


@pytest.mark.parametrize("name, page_size", list(zip(CONFIGS, itertools.cycle([None, 16]), strict=False)))
def test_every_way_of_configuring_it_equals_the_oracle(name, page_size, configured):
    configured(**CONFIGS[name])
    case = replace(SKIPPING, page_size=page_size)
    inputs = make_decode_inputs(case)
    for order in ORDERS:
        with cute_sparse.emulated(ARCH, order=order, seed=2) as device:
            got = call(case, inputs, return_lse=True, return_stats=True)
            launch = device.launches[-1]
            splitting = splitting_of(case, inputs)
        check(case, inputs, got, splitting)
        assert launch.grid == (splitting["ctas"], 1, 1)


def run_checked(case: DecodeCase, inputs):
    with cute_sparse.emulated(ARCH) as device:
        got = call(case, inputs, return_lse=True, return_stats=True)
        splitting = splitting_of(case, inputs)
        counts = device.launches[0].counts
    check(case, inputs, got, splitting)
    return got, counts


def test_a_splits_first_tile_is_kept_by_rows_that_see_nothing_of_it():
    """Only the last of nine queries sees the last key, which is alone in its tile; its rows are in the third block."""
    case = DecodeCase(lengths=(705,), seqlen_q=9, heads_q=16, threshold=0.03, spread=2.0, num_splits=1)
    got, _ = run_checked(case, make_decode_inputs(case))
    assert (got.stats.skip_map[0, 0, :, 705 // 64] == 1).all()


@pytest.mark.parametrize("page_size", [16, 32])
def test_nothing_behind_the_page_table_is_read(page_size):
    """The table ends with the last page, which is not the last of its tile."""
    case = DecodeCase(lengths=(40, 3 * page_size), page_size=page_size, seqlen_q=2)
    inputs = make_decode_inputs(case)
    inputs = replace(inputs, page_table=inputs.page_table[:, :3].contiguous())
    run_checked(case, inputs)


def run_counted(case: DecodeCase, **more):
    """(result, the launch), with one CTA, which then has every item's only split."""
    inputs = make_decode_inputs(case)
    with cute_sparse.emulated(ARCH, sms=1) as device:
        got = call(case, inputs, return_stats=True, **more)
        (launch,) = device.launches
    return got, launch


@pytest.mark.parametrize("page_size", [None, 16, 256])
@pytest.mark.parametrize("head_dim, head_dim_v", [(128, 128), (192, 128)])
def test_a_skipped_tile_costs_its_k_and_its_scores_and_nothing_else(page_size, head_dim, head_dim_v):
    case = replace(SKIPPING, page_size=page_size, head_dim=head_dim, head_dim_v=head_dim_v, mixed=True)
    got, launch = run_counted(case)
    kept, visited = got.stats.tile_counts.sum(dim=(1, 2)).tolist()
    assert 0 < kept < 0.8 * visited
    tile_n, counts = got.stats.geometry.tile_n, launch.counts
    assert counts.tma_bytes_loaded == tile_n * 2 * (visited * head_dim + kept * head_dim_v)
    scores = visited * WARPS * head_dim // MMA_K
    products = kept * WARPS * tile_n // MMA_K
    assert counts.mma_instructions == {"wgmma.mma_async": scores + products}
    exponentials = kept * WARP_ROWS * tile_n // 32  # of one warp: there are 8 rows
    # and two where the warp moves its references, at most once for each kept tile
    assert exponentials < counts.exponentials <= exponentials + kept * 2


def test_v_of_skipped_tiles_is_not_read_whatever_it_holds():
    """Memory that is not there cannot be read: V's pages of skipped tiles are taken out of the page table."""
    case = replace(SKIPPING, page_size=64, num_splits=1, mixed=True)
    inputs = make_decode_inputs(case)
    with cute_sparse.emulated(ARCH) as device:
        got = call(case, inputs, return_lse=True, return_stats=True)
        poisoned = inputs.v_cache.clone()
        skipped = (got.stats.skip_map == 2).all(dim=2)  # (batch, heads_kv, tiles): a tile is a page
        assert skipped.any()
        for batch_idx, head, tile in skipped.nonzero().tolist():
            poisoned[inputs.page_table[batch_idx, tile], :, head] = torch.nan
        again = call(case, replace(inputs, v_cache=poisoned), return_lse=True, return_stats=True)
        loaded = [launch.counts.tma_bytes_loaded for launch in device.launches]
    assert torch.equal(got.out, again.out) and torch.equal(got.lse, again.lse) and loaded[0] == loaded[1]


@pytest.mark.parametrize("causal", [False, True])
def test_at_nothing_skipped_the_work_is_that_of_the_dense_kernel(causal):
    dense = DecodeCase(lengths=(1024,), causal=causal, heads_q=8)
    _, dense_launch = run_counted(dense)
    _, sparse_launch = run_counted(replace(dense, threshold=1e-30))
    dense_counts, sparse_counts = dense_launch.counts, sparse_launch.counts
    assert sparse_counts.mma_instructions == dense_counts.mma_instructions
    assert sparse_counts.tma_bytes_loaded == dense_counts.tma_bytes_loaded
    assert sparse_counts.exponentials == dense_counts.exponentials


ROLES = ("load_k", "load_v", "load_q", "load_q", *["score"] * 4, *["value"] * 4)


def instructions_per_tile(case: DecodeCase) -> list[float]:
    """Warp instructions that each warp adds with one more tile."""
    short, long = (run_counted(replace(case, lengths=(length,)))[1] for length in (1024, 2048))
    return [
        (b.warp_instructions - a.warp_instructions) / (1024 // 64)
        for a, b in zip(short.warps, long.warps, strict=True)
    ]  # fmt: skip


# Warp instructions per tile of 64 keys, head dim 128, 8 rows, as PTX counts them: the most of each role's warps.
MOST = {
    None: dict(load_k=40, load_v=41, load_q=0, score=310, value=92),
    1e-30: dict(load_k=44, load_v=66, load_q=0, score=350, value=92),
}


@pytest.mark.parametrize("threshold", MOST)
def test_a_tile_takes_few_instructions(threshold):
    """A tile's bytes take 1700 clocks, and a scheduler issues the work of three warps, one of each kind."""
    found = instructions_per_tile(DecodeCase(heads_q=8, threshold=threshold))
    for role, most in MOST[threshold].items():
        assert max(count for name, count in zip(ROLES, found, strict=True) if name == role) <= most, found


def test_warps_without_rows_compute_nothing():
    for heads_q, warps in ((8, 1), (17, 2), (48, 3), (64, 4)):
        _, launch = run_counted(DecodeCase(lengths=(300,), heads_q=heads_q))
        exponentials = [warp.exponentials for warp in launch.warps[4:8]]
        assert [count > 0 for count in exponentials] == [i < warps for i in range(4)]


def ptx_of(problem: Problem) -> str:
    with cute_sparse.emulated(ARCH):
        return hopper_decode.compile(problem).__ptx__


def test_the_dense_kernel_has_no_vote_in_it():
    """One barrier.cta.red there, of the last to arrive; with a threshold also a vote, in the loop and behind it."""
    dense, sparse = (ptx_of(Problem("decode", "bfloat16", 128, 128, sparsity=s)) for s in (None, "threshold"))
    assert dense.count("barrier.cta.red.or") == 1
    assert sparse.count("barrier.cta.red.or") == 3


EVERYTHING = dict(
    mask="band", softcap=True, sparsity="threshold", return_lse=True, return_stats=True, page_size=16, share_max=True
)
PROBLEMS = {
    "everything, narrow": Problem("decode", "bfloat16", 64, 64, **EVERYTHING),
    "everything, wide": Problem("decode", "float16", 256, 256, **EVERYTHING),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_it_neither_spills_nor_serialises(name):
    problem = PROBLEMS[name]
    with kernels.kept_code():
        function = compiled.compile_now(problem, decode_config.choose(problem), ARCH, hopper_decode.compile)
    row = sass.audit(kernels.Compiled(ARCH, problem, None, 0.0, function.__ptx__, bytes(function.__cubin__)))
    assert not row.faults and row.stack_bytes == 0, row
    assert row.mma_in_loops > 0 and row.exponentials_in_loops > 0  # the loops that were looked at are the right ones


def test_every_problem_has_a_config_that_fits():
    for head_dim in range(8, 257, 8):
        for sparsity in (None, "threshold"):
            problem = Problem("decode", "bfloat16", head_dim, head_dim, sparsity=sparsity)
            chosen = decode_config.choose(problem)
            assert decode_config.fits(problem, chosen) and chosen in decode_config.candidates(problem)


@pytest.mark.parametrize("head_dim, head_dim_v", [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_enough_bytes_are_under_way(head_dim, head_dim_v):
    """With one slot of each ring being read."""
    problem = Problem("decode", "bfloat16", head_dim, head_dim_v)
    config = decode_config.choose(problem)
    slots = (config.k_stages - 1) * head_dim + (config.v_stages - 1) * head_dim_v
    assert slots * config.tile_n * 2 >= decode_config.BYTES_IN_FLIGHT


def test_a_config_too_large_for_an_sm_is_refused():
    problem = Problem("decode", "bfloat16", 256, 256)
    with pytest.raises(ValueError, match="bytes of shared memory"):
        hopper_decode.compile(problem, decode_config.Config(128, 4, 4))


@pytest.mark.parametrize("wrong", [dict(tile_n=80), dict(p_stages=1), dict(v_stages=0), dict(min_tiles=0)])
def test_a_config_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        decode_config.Config(**dict(tile_n=64, k_stages=4, v_stages=4) | wrong)
