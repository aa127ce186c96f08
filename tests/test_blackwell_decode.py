"""The Blackwell decode kernel, beyond what every kernel is tested for: its configurations, and its exact work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cute_sparse
from cute_sparse import splits
from cute_sparse.problem import HEAD_DIM_MAX, HEAD_DIM_MULTIPLE, Problem
from tests.conftest import ORDERS
from tests.decode_cases import DecodeCase, make_decode_inputs
from tests.test_decode import call, check, splitting_of

pytest.importorskip("cutlass")

from cute_sparse.kernels.blackwell import config as blackwell_config
from cute_sparse.kernels.blackwell import decode as blackwell_decode
from cute_sparse.kernels.blackwell import decode_config

from profiling import kernels, sass

ARCH = "sm_100a"
ARCHS = ("sm_100a", "sm_103a")
SOFTMAX_WARPS, CORRECTION_WARPS = slice(0, 4), slice(4, 8)
HEAD_DIMS = [(d, d) for d in range(HEAD_DIM_MULTIPLE, HEAD_DIM_MAX + 1, HEAD_DIM_MULTIPLE)] + [(192, 128)]
# Query heads of a KV head: the 16, 48 or 80 rows of two queries have the keys of a tile divided into 4, 2 or 1 parts.
PARTS_OF_GROUP = {8: 4, 24: 2, 40: 1}

SKIPPING = DecodeCase(lengths=(900, 0, 70, 300), seqlen_q=2, heads_q=16, heads_kv=2, threshold=0.03, spread=2.0)
# How the chosen config is changed.
CONFIGS = {
    "one slot of each kind": dict(k_stages=1, v_stages=1, s_stages=1, p_stages=1),
    "two slots of each kind": dict(k_stages=2, v_stages=2, s_stages=2, p_stages=2),
    "more slots for P than for V": dict(v_stages=2, p_stages=4),
    "one tile for a CTA": dict(min_tiles=1),
    "many tiles for a CTA": dict(min_tiles=100),
}


def with_heads(case: DecodeCase, group: int) -> DecodeCase:
    return replace(case, heads_q=group * case.heads_kv)


@pytest.fixture
def configured(monkeypatch):
    """Call it with changes to a config: from then on every problem gets its own choice, so changed."""
    choose = decode_config.choose

    def change(**changes):
        monkeypatch.setattr(decode_config, "choose", lambda *args, **more: replace(choose(*args, **more), **changes))

    return change


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("sparsity", [None, "threshold"])
def test_every_head_dim_has_a_config_within_the_machine(arch, sparsity):
    for head_dim, head_dim_v in HEAD_DIMS:
        problem = Problem("decode", "bfloat16", head_dim, head_dim_v, sparsity=sparsity)
        chosen = decode_config.choose(problem, arch)  # which asserts for itself that it fits
        assert chosen in decode_config.candidates(problem, arch)
        assert chosen.shared_bytes <= blackwell_config.SM_SHARED_BYTES and chosen.tmem.used <= 512


def test_a_config_that_does_not_fit_is_refused():
    config = decode_config.choose(Problem("decode", "bfloat16", 128, 128))
    for changes in (
        dict(k_stages=config.k_stages + 2), dict(v_stages=0), dict(p_stages=8), dict(registers_softmax=232),
        dict(tile_n=60),
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            replace(config, **changes)


@pytest.mark.parametrize("head_dim, head_dim_v", [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_enough_bytes_are_under_way(head_dim, head_dim_v):
    """With one slot of each ring being read; of V, as many tiles are fetched ahead as there are slots of P."""
    config = decode_config.choose(Problem("decode", "bfloat16", head_dim, head_dim_v))
    v_ahead = min(config.v_stages, config.p_stages) - 1
    in_flight = (config.k_stages - 1) * config.k_slot_bytes + v_ahead * config.v_slot_bytes
    assert in_flight >= decode_config.BYTES_IN_FLIGHT


@pytest.mark.parametrize("group", PARTS_OF_GROUP)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_way_of_configuring_it_equals_the_oracle(name, group, configured):
    configured(**CONFIGS[name])
    case = with_heads(replace(SKIPPING, page_size=16), group)
    inputs = make_decode_inputs(case)
    for order in ORDERS:
        with cute_sparse.emulated(ARCH, order=order, seed=2) as device:
            got = call(case, inputs, return_lse=True, return_stats=True)
            launch = device.launches[-1]
            splitting = splitting_of(case, inputs)
        check(case, inputs, got, splitting)
        assert launch.grid == (splitting["ctas"], 1, 1)


@pytest.mark.parametrize("rows", [31, 32, 33, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_every_number_of_rows(rows, num_splits):
    """Where the number of warps with rows changes, and the way the work is divided among them."""
    case = DecodeCase(lengths=(200, 3), heads_q=rows, threshold=0.5, num_splits=num_splits)
    inputs = make_decode_inputs(case)
    with cute_sparse.emulated(ARCH, order="random", seed=rows):
        got = call(case, inputs, return_lse=True, return_stats=True)
        splitting = splitting_of(case, inputs)
    check(case, inputs, got, splitting)


def run_counted(case: DecodeCase, inputs=None, **more):
    """(result, the launch), with one CTA, which then has every item's only split."""
    inputs = inputs or make_decode_inputs(case)
    with cute_sparse.emulated(ARCH, sms=1) as device:
        got = call(case, inputs, return_lse=True, return_stats=True, **more)
        (launch,) = device.launches
        splitting = splitting_of(case, inputs)
    check(case, inputs, got, splitting)
    return got, launch


def exponentials(launch) -> int:
    return sum(warp.exponentials for warp in launch.warps[SOFTMAX_WARPS])


@pytest.mark.parametrize("group", PARTS_OF_GROUP)
@pytest.mark.parametrize("page_size, head_dim, head_dim_v", [(None, 128, 128), (16, 128, 128), (256, 192, 128)])
def test_a_skipped_tile_costs_its_k_and_its_scores_and_nothing_else(page_size, group, head_dim, head_dim_v):
    case = replace(SKIPPING, page_size=page_size, head_dim=head_dim, head_dim_v=head_dim_v, mixed=True)
    got, launch = run_counted(with_heads(case, group))
    kept, visited = got.stats.tile_counts.sum(dim=(1, 2)).tolist()
    assert 0 < kept < 0.8 * visited
    tile_n, counts = got.stats.geometry.tile_n, launch.counts
    assert counts.tma_bytes_loaded == tile_n * 2 * (visited * head_dim + kept * head_dim_v)
    assert counts.mma_instructions == {"tcgen05.mma": visited * head_dim // 16 + kept * tile_n // 16}
    # All four warps have their part of the keys; with one part, three have rows.
    expected = kept * tile_n * {4: 1, 2: 2, 1: 3}[PARTS_OF_GROUP[group]]
    # and one more where a warp moves its references, at most once for each kept tile
    assert expected < exponentials(launch) <= expected + 4 * kept


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("group", [4, 34, 66])
def test_at_nothing_skipped_the_work_is_that_of_the_dense_kernel(causal, group):
    dense = DecodeCase(lengths=(1024,), causal=causal, heads_q=group)
    _, dense_launch = run_counted(dense)
    _, sparse_launch = run_counted(replace(dense, threshold=1e-30))
    dense_counts, sparse_counts = dense_launch.counts, sparse_launch.counts
    assert sparse_counts.mma_instructions == dense_counts.mma_instructions
    assert sparse_counts.tma_bytes_loaded == dense_counts.tma_bytes_loaded


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("group", PARTS_OF_GROUP)
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_scores_that_grow_rescale_the_output(group, order, threshold):
    """From each tile visited to the next, every row's maximum grows by more than 8 exponents of 2."""
    case = with_heads(DecodeCase(lengths=(400,), threshold=threshold, num_splits=1, head_dim=64, head_dim_v=64), group)
    inputs = make_decode_inputs(case)
    ones = torch.ones(case.head_dim) / case.head_dim**0.25  # its product with itself is 1 when scaled
    tiles = -(-case.lengths[0] // 64)
    visited = list(range(tiles - 1, -1, -1)) if threshold is None else splits.visiting_order(0, tiles)
    positions = torch.tensor(visited).argsort()
    exponent = 10.0 * positions[torch.arange(case.lengths[0]) // 64]  # natural units: 14 exponents of 2 more each time
    inputs.k_cache[0, :, 0] = (inputs.k_cache[0, :, 0] * 0.1 + ones * exponent[:, None]).to(case.dtype)
    inputs.q[:] = (inputs.q * 0.1 + ones).to(case.dtype)
    with cute_sparse.emulated(ARCH, order=order, seed=4) as device:
        got = call(case, inputs, return_lse=True, return_stats=True)
        splitting = splitting_of(case, inputs)
    check(case, inputs, got, splitting)
    assert got.stats.tile_counts[0].item() == 7
    stores = sum(
        times
        for warp in device.launches[-1].warps[CORRECTION_WARPS]
        for opcode, times in warp.executed.items()
        if opcode.startswith("tcgen05.st")
    )
    # Each of the six tiles after the first; four warps, 64 columns, 16 at a time.
    assert stores == 6 * 4 * 4


ROLES = ("softmax",) * 4 + ("correction",) * 4 + ("score_mma", "value_mma", "load_k", "load_v", "load_q")


def instructions_per_tile(case: DecodeCase) -> list[float]:
    """Warp instructions that each warp adds with one more tile."""
    launches = []
    for length in (1024, 2048):
        longer = replace(case, lengths=(length,))
        with cute_sparse.emulated(ARCH, sms=1) as device:
            call(longer, make_decode_inputs(longer))
            launches.append(device.launches[-1])
    short, long = launches
    return [
        (b.warp_instructions - a.warp_instructions) / (1024 // 64)
        for a, b in zip(short.warps, long.warps, strict=True)
    ]  # fmt: skip


# Warp instructions per tile of 64 keys, head dim 128, 8 rows, as PTX counts them: the most of each role's warps.
MOST = {
    None: dict(softmax=170, correction=1, score_mma=64, value_mma=80, load_k=40, load_v=40, load_q=1),
    1e-30: dict(softmax=195, correction=1, score_mma=64, value_mma=80, load_k=44, load_v=56, load_q=1),
}


@pytest.mark.parametrize("threshold", MOST)
def test_a_tile_takes_few_instructions(threshold):
    """A tile's bytes take 1100 clocks."""
    found = instructions_per_tile(DecodeCase(heads_q=8, spread=0.1, threshold=threshold))
    for role, most in MOST[threshold].items():
        assert max(count for name, count in zip(ROLES, found, strict=False) if name == role) <= most, found


def test_warps_without_rows_compute_nothing():
    for heads_q, warps in ((65, 3), (96, 3), (97, 4)):
        _, launch = run_counted(DecodeCase(lengths=(300,), heads_q=heads_q))
        counts = [warp.exponentials for warp in launch.warps[SOFTMAX_WARPS]]
        assert [count > 0 for count in counts] == [i < warps for i in range(4)]


def test_the_dense_kernel_has_no_vote_in_it():
    """One barrier.red there, of the last to arrive; with a threshold also a vote, for 4, 2 and 1 parts."""
    ptx, barriers = [], []
    for sparsity in (None, "threshold"):
        with cute_sparse.emulated(ARCH):
            problem = Problem("decode", "bfloat16", 128, 128, sparsity=sparsity)
            ptx.append(blackwell_decode.compile(problem).__ptx__)
        config = decode_config.choose(problem)
        slots = 1 + config.k_stages + config.v_stages + config.s_stages + config.p_stages  # 1: Q's
        barriers.append(2 * slots + 2)  # 2: the events'
    dense, sparse = ptx
    assert dense.count("barrier.red.or") == 1 and sparse.count("barrier.red.or") == 4
    # Nor the barriers that tell the V loader of it.
    barriers[1] += config.p_stages
    assert [code.count("mbarrier.init") for code in ptx] == barriers


EVERYTHING = dict(
    mask="band", softcap=True, sparsity="threshold", return_lse=True, return_stats=True, page_size=16, share_max=True
)
PROBLEMS = {
    "everything": Problem("decode", "bfloat16", 128, 128, **EVERYTHING),
    "everything, wide": Problem("decode", "float16", 256, 256, **EVERYTHING),
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_it_does_not_spill(name, arch):
    row = sass.audit(kernels.compile_kernel(PROBLEMS[name], arch))
    assert not row.faults and row.stack_bytes == 0, row
    assert row.mma_in_loops > 0 and row.exponentials_in_loops > 0  # the loops that were looked at are the right ones
