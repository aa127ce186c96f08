"""The Hopper prefill kernel, beyond what every kernel is tested for: its configurations, and its exact work."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

import cute_sparse
from cute_sparse import reference
from cute_sparse.calls import Stats
from cute_sparse.emulator import chips, timing
from cute_sparse.problem import Problem
from profiling import kernels, sass
from tests.cases import CASES, Case, make_inputs
from tests.conftest import ORDERS
from tests.test_attention import call, check, oracle

pytest.importorskip("cutlass")

from cute_sparse.kernels.hopper import config as hopper_config
from cute_sparse.kernels.hopper import prefill as hopper_prefill

ARCH = "sm_90a"

# How the chosen config is changed. Two CTAs have many work tiles each, of which some are empty.
CONFIGS = {
    "one work tile per CTA": dict(ctas=0),
    "two CTAs": dict(ctas=2),
    "two CTAs, out in the memory of Q": dict(ctas=2, out_aliases_q=True, k_stages=2, hold_v_after=0),
    "two warpgroups": dict(ctas=2, warpgroups=2, tile_n=128, k_stages=3, hold_v_after=2, own_ranges=False),
    "no turns": dict(ctas=2, ping_pong=False),
    "three warpgroups": dict(ctas=2, warpgroups=3, tile_n=64),
    "three warpgroups, each with a range of its own": dict(ctas=2, warpgroups=3, tile_n=64, own_ranges=True),
    "ranges of their own, V never held, no turns": dict(
        ctas=2, tile_n=64, own_ranges=True, hold_v_after=0, ping_pong=False
    ),
    "three V slots": dict(ctas=2, tile_n=64, v_stages=3, hold_v_after=0),
    "narrow tiles, V held after one skip": dict(ctas=2, tile_n=64, hold_v_after=1),
    "narrow tiles, V never held": dict(ctas=2, tile_n=64, hold_v_after=0),
}
SEVERAL = Case(lengths_q=(400, 400), lengths_k=(450, 450), threshold=0.01, mixed=True, causal=True)


@pytest.fixture
def configured(monkeypatch):
    """Call it with changes to a `Config`: from then on every problem gets its own choice, so changed."""
    choose = hopper_config.choose

    def change(**changes):
        monkeypatch.setattr(hopper_config, "choose", lambda problem: replace(choose(problem), **changes))

    return change


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_way_of_configuring_it_equals_the_oracle(name, order, configured):
    configured(**CONFIGS[name])
    inputs = make_inputs(SEVERAL)
    with cute_sparse.emulated(ARCH, order=order, seed=2):
        got = call(SEVERAL, inputs, return_lse=True, return_stats=True)
    check(SEVERAL, inputs, got)


@pytest.mark.parametrize("name", ["rows without a key", "packed, empty sequences", "packed, other lengths of keys"])
@pytest.mark.parametrize("out_aliases_q", [False, True])
def test_work_tiles_without_keys_between_others(name, out_aliases_q, configured):
    configured(ctas=1, tile_n=128, out_aliases_q=out_aliases_q)
    case = CASES[name]
    inputs = make_inputs(case)
    with cute_sparse.emulated(ARCH, order="random", seed=3):
        got = call(case, inputs, return_lse=True, return_stats=True)
    check(case, inputs, got)


def test_of_a_packed_batch_only_blocks_with_rows_are_claimed(configured):
    configured(ctas=2)
    case = Case(lengths_q=(640, 0, 5, 130, 0), lengths_k=(640, 7, 5, 130, 0), packed=True, causal=True)
    inputs = make_inputs(case)
    with cute_sparse.emulated(ARCH, order="random", seed=4) as device:
        got = call(case, inputs, return_lse=True, return_stats=True)
        counts = device.launches[0].counts
    check(case, inputs, got)
    tile_m = got.stats.geometry.tile_m
    tiles = case.heads_q * sum(-(-length // tile_m) for length in case.lengths_q)
    atomics = sum(number for opcode, number in counts.executed.items() if opcode.startswith("atom."))
    assert atomics == tiles + 2  # one claim with each tile, and each CTA's farewell


def run_counted(case: Case, **more):
    """(result, counts of the launch)."""
    inputs = make_inputs(case)
    with cute_sparse.emulated(ARCH) as device:
        got = call(case, inputs, **more)
        (launch,) = device.launches
    return got, launch.counts


WARPS, MMA_K, ROWS = 4, 16, 64


@pytest.mark.parametrize("causal", [False, True])
def test_a_skipped_tile_costs_its_scores_and_nothing_else(causal):
    case = Case(lengths_q=(960,), lengths_k=(960,), threshold=0.01, causal=causal)  # 5 CTAs of 192 rows, 12 KV tiles
    got, counts = run_counted(case, return_stats=True)
    kept, visited = got.stats.tile_counts.sum(dim=(1, 2)).tolist()
    assert 0.2 * visited < kept < 0.9 * visited
    tile_n = got.stats.geometry.tile_n
    scores = visited * WARPS * case.head_dim // MMA_K
    products = kept * WARPS * tile_n // MMA_K
    assert counts.mma_instructions == {"wgmma.mma_async": scores + products}
    exponentials = kept * ROWS * tile_n // 32
    # and two for each warp that moves its reference, at most once for each kept tile
    assert exponentials <= counts.exponentials <= exponentials + kept * WARPS * 2


# Of 12 warpgroups of 64 rows, each sees three tiles of 64 keys in a window of 128, but the first two at the sequence's
# begin. Three of them, a CTA, see five together, the first CTA three.
@pytest.mark.parametrize("own_ranges, tiles", [(True, 1 + 2 + 10 * 3), (False, 3 * (3 + 3 * 5))])
def test_a_warpgroup_multiplies_the_tiles_of_its_range_alone(own_ranges, tiles, configured):
    configured(warpgroups=3, tile_n=64, own_ranges=own_ranges)
    case = Case(lengths_q=(768,), lengths_k=(768,), heads_q=1, head_dim=64, head_dim_v=64, window=(127, 0))
    got, counts = run_counted(case, return_stats=True)
    assert got.stats.tile_counts.flatten().tolist() == [tiles, tiles]
    assert counts.mma_instructions == {"wgmma.mma_async": tiles * WARPS * (64 + 64) // MMA_K}


def test_v_of_tiles_that_every_warpgroup_skips_is_not_loaded(configured):
    case = Case(lengths_q=(1024,), lengths_k=(1024,), threshold=0.01, causal=True)
    configured(hold_v_after=2)
    got, held = run_counted(case, return_stats=True)
    configured(hold_v_after=0)
    same, loaded = run_counted(case, return_stats=True)
    assert torch.equal(got.out, same.out) and torch.equal(got.stats.skip_map, same.stats.skip_map)
    v_bytes = got.stats.geometry.tile_n * case.head_dim_v * 2
    not_loaded, rest = divmod(loaded.tma_bytes_loaded - held.tma_bytes_loaded, v_bytes)
    assert rest == 0 and not_loaded == tiles_held_back(got.stats, case, after=2) > 0


def tiles_held_back(stats: Stats, case: Case, after: int) -> int:
    """How many tiles a CTA skips whole, after as many in a row that it skipped whole."""
    cta = replace(stats.geometry, tile_m=stats.geometry.cta_m)
    (seqlen_q,), (seqlen_k,) = case.lengths_q, case.lengths_k
    walks = reference.tile_walks(cta, seqlen_q, seqlen_k, seqlen_k, 0 if case.causal else seqlen_q)
    count = 0
    for head in stats.skip_map.flatten(0, 1):
        for groups, walk in zip(head.split(cta.tile_m // cta.tile_rows), walks, strict=True):
            skipped = (groups != reference.KEPT).all(dim=0)[list(itertools.chain(*walk))]
            count += sum(bool(skipped[i - after : i + 1].all()) for i in range(after + 1, len(skipped)))
    return count


@pytest.mark.parametrize("causal", [False, True])
def test_of_the_tiles_that_all_rows_see_whole_the_first_is_visited_first(causal, configured):
    """Every query likes keys the better the further to the left they are: from the right, each tile is a new best."""
    tile_n, cta_rows = 96, 128
    configured(tile_n=tile_n, warpgroups=2, own_ranges=causal)
    case = Case(lengths_q=(300,), lengths_k=(400,), heads_q=1, threshold=0.01, causal=causal)
    inputs = make_inputs(case)
    inputs.q.fill_(1.0)
    inputs.k[:] = (60.0 - 12.0 * (torch.arange(400) // tile_n))[:, None, None] / case.scale / case.head_dim
    with cute_sparse.emulated(ARCH):
        kept = call(case, inputs, return_stats=True).stats.skip_map[0, 0] == reference.KEPT
    for group, tiles in enumerate(kept):
        first_row = group * 64 // cta_rows * cta_rows
        whole = (first_row + 1 + 400 - 300 if causal else 400) // tile_n
        assert tiles[:whole].tolist() == [True] + [False] * (whole - 1)


def test_a_row_whose_maximum_is_nan_keeps_the_tiles_of_its_window_alone(configured):
    """The last row of each warpgroup: to the left of its window others still see keys."""
    configured(tile_n=64)
    case = Case(lengths_q=(512,), lengths_k=(512,), threshold=0.3, window=(100, 300))
    inputs = make_inputs(case)
    inputs.q[0, 63::64, :, 0] = math.nan
    with cute_sparse.emulated(ARCH):
        stats = call(case, inputs, return_stats=True).stats
    expected = oracle(case, inputs, stats.geometry)
    assert (expected.skip_map == reference.SKIPPED).any()
    assert torch.equal(stats.skip_map, expected.skip_map)


@pytest.mark.parametrize("causal", [False, True])
def test_at_nothing_skipped_the_work_is_that_of_the_dense_kernel(causal, configured):
    configured(warpgroups=3, tile_n=80, k_stages=4, first_early=False, own_ranges=causal)
    dense = Case(lengths_q=(576,), lengths_k=(576,), causal=causal)
    _, dense_counts = run_counted(dense)
    _, sparse_counts = run_counted(replace(dense, threshold=1e-30))
    assert sparse_counts.mma_instructions == dense_counts.mma_instructions
    assert sparse_counts.tma_bytes_loaded == dense_counts.tma_bytes_loaded
    assert sparse_counts.exponentials == dense_counts.exponentials


# early: of the next work tile, a tile of K and Q for each warpgroup, or two of K where out is staged in Q's memory.
@pytest.mark.parametrize("out_aliases_q, early", [(False, 1 + 3), (True, 2)])
def test_the_next_work_tile_is_being_loaded_when_the_last_one_is_stored(out_aliases_q, early, configured):
    """And its first K before V of the last KV tile, so early that nobody has begun with that tile's scores."""
    configured(ctas=1, warpgroups=3, tile_n=128, out_aliases_q=out_aliases_q)
    case = Case(lengths_q=(2 * 192,), lengths_k=(3 * 128,), heads_q=1, head_dim=64, head_dim_v=64)
    inputs = make_inputs(case)
    with cute_sparse.emulated(ARCH) as device, timing.traced(device):
        call(case, inputs)
        events = timing.estimate(device, chips.chip_of(ARCH), events=True).events
    loads = sorted(event.begin for event in events if event.track == "TMA loads")
    assert len(loads) == 2 * (3 + 3 + 3)
    assert sum(begin < min(e.begin for e in events if e.track == "TMA stores") for begin in loads) >= 3 + 3 + 3 + early
    products = sorted(event.begin for event in events if event.name == "wgmma from warp 4")
    of_two_tiles = (64 + 64 + 128) // MMA_K  # two of scores, one of values
    assert loads[3 + 3 + 2] < products[of_two_tiles]


# FlashAttention-4 4.0.0b36 on sm_90, counted in an emulator: 2 query heads on 1 KV head, 1024 x 1024, BF16; warp
# instructions per tile of 128 x 128 scores, everything included.
FLASH_ATTENTION_4 = {
    # (head_dim, head_dim_v, causal)
    (64, 64, False): 4485,
    (64, 64, True): 5681,
    (128, 128, False): 4761,
    (128, 128, True): 5420,
    (192, 128, False): 4809,
    (192, 128, True): 5475,
    (256, 256, False): 7087,
    (256, 256, True): 8001,
}


@pytest.mark.parametrize("head_dim, head_dim_v, causal", FLASH_ATTENTION_4)
def test_it_takes_fewer_instructions_than_flash_attention_4(head_dim, head_dim_v, causal):
    case = Case(lengths_q=(1024,), lengths_k=(1024,), head_dim=head_dim, head_dim_v=head_dim_v, causal=causal)
    _, counts = run_counted(case)
    blocks = 1024 // 128
    tiles = case.heads_q * (blocks * (blocks + 1) // 2 if causal else blocks * blocks)
    assert counts.warp_instructions / tiles < FLASH_ATTENTION_4[head_dim, head_dim_v, causal]


def test_the_dense_kernel_has_no_vote_in_it():
    """Nor barriers beyond the ping-pong's and the store's."""
    ptx = {}
    for sparsity in (None, "threshold"):
        problem = Problem("prefill", "bfloat16", 128, 128, mask="causal", sparsity=sparsity)
        with cute_sparse.emulated(ARCH):
            ptx[sparsity] = hopper_prefill.compile(problem).__ptx__
    assert ptx["threshold"].count("barrier.cta.red.or") == 1
    assert "barrier.cta.red" not in ptx[None]


def test_a_capped_tile_as_wide_as_the_registers_let_it_be_is_not_spilled():
    """Its scores are the most that a consumer holds, and tanh wants more for each that it works on."""
    everything = dict(sparsity="threshold", softcap=True, sink=True, return_lse=True, return_stats=True)
    row = sass.audit(kernels.compile_kernel(Problem("prefill", "bfloat16", 64, 64, mask="full", **everything), ARCH))
    assert not row.faults and row.stack_bytes == 0, row


def test_every_problem_has_a_config_that_fits():
    for head_dim in range(8, 257, 8):
        for mask in ("full", "causal", "band"):
            for sparsity in (None, "threshold"):
                problem = Problem("prefill", "bfloat16", head_dim, head_dim, mask=mask, sparsity=sparsity)
                chosen = hopper_config.choose(problem)
                assert hopper_config.fits(problem, chosen)
                assert chosen in hopper_config.candidates(problem)


def test_a_config_too_large_for_an_sm_is_refused():
    problem = Problem("prefill", "bfloat16", 256, 256)
    with pytest.raises(ValueError, match="bytes of shared memory"):
        hopper_prefill.compile(problem, hopper_config.Config(2, 128))


@pytest.mark.parametrize("slots", [dict(k_stages=2), dict(k_stages=3, v_stages=3)])
def test_v_is_held_back_only_with_three_slots_for_k_and_two_for_v(slots):
    with pytest.raises(ValueError, match="needs three K slots and two V slots"):
        hopper_config.Config(2, 128, hold_v_after=2, **slots)
