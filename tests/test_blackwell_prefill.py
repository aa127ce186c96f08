"""The Blackwell prefill kernel, beyond what every kernel is tested for: its configurations, and its exact work."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile

import pytest
import torch

import cute_sparse
from cute_sparse.problem import HEAD_DIM_MAX, HEAD_DIM_MULTIPLE, Problem
from tests.cases import CASES, Case, make_inputs
from tests.conftest import ORDERS
from tests.test_attention import call, check

pytest.importorskip("cutlass")

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cute_sparse.kernels.blackwell import config as blackwell_config
from cute_sparse.kernels.blackwell import exp2
from cute_sparse.kernels.blackwell.prefill import DECISIONS, Prefill
from cutlass import Float32, Int32

from cute_sparse import emulator
from cute_sparse.device.schedule import TileOrder, dealt
from cute_sparse.launch import Launcher
from cute_sparse.operands import Operand

ARCHS = ("sm_100a", "sm_103a")
HEAD_DIMS = [(d, d) for d in range(HEAD_DIM_MULTIPLE, HEAD_DIM_MAX + 1, HEAD_DIM_MULTIPLE)] + [(192, 128)]
SPARSITIES = (None, "threshold")


def problem(head_dim: int = 128, head_dim_v: int | None = None, **more) -> Problem:
    return Problem("prefill", "bfloat16", head_dim, head_dim if head_dim_v is None else head_dim_v, **more)


@pytest.fixture
def configured(monkeypatch):
    """Call it with changes to a config: from then on every problem gets its own choice, so changed."""
    choose = blackwell_config.choose

    def change(**changes):
        def changed(*args, **options):
            return dataclasses.replace(choose(*args, **options), **changes)

        monkeypatch.setattr(blackwell_config, "choose", changed)

    return change


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_every_head_dim_has_a_config_within_the_machine(arch, sparsity):
    for head_dims in HEAD_DIMS:
        configs = blackwell_config.candidates(problem(*head_dims, sparsity=sparsity), arch)
        assert configs, head_dims
        for config in configs:  # each asserts for itself that it fits
            assert config.registers_total <= blackwell_config.SM_REGISTERS
            assert config.shared_bytes <= blackwell_config.SM_SHARED_BYTES
            assert arch != "sm_103a" or config.exp2_emulated == 0


def test_a_config_that_does_not_fit_is_refused():
    config = blackwell_config.choose(problem())
    unfit = dict(registers_softmax=208), dict(k_stages=7), dict(head_dim_v=256), dict(v_stages=0), dict(ctas=3)
    for changes in unfit:
        with pytest.raises(AssertionError):
            dataclasses.replace(config, **changes)


# One of every kind of code: two and one query tiles, with and without the vote, every mask, padded and packed.
COMPILED = {
    "dense": dict(),
    "lse, stats": dict(return_lse=True, return_stats=True),
    "causal, lse": dict(mask="causal", return_lse=True),
    "skip": dict(mask="causal", sparsity="threshold"),
    "skip, everything": dict(
        mask="band", sparsity="threshold", softcap=True, varlen=True, return_lse=True, return_stats=True
    ),
    "192/128": dict(head_dim=192, head_dim_v=128, mask="causal"),
    "256": dict(head_dim=256, mask="causal"),
    "256, skip": dict(head_dim=256, sparsity="threshold", return_stats=True),
}
COMPILE = """
import json, sys
from cute_sparse.kernels.blackwell import config, prefill
from cute_sparse.problem import Problem
problems = [Problem(**fields) for fields in json.loads(sys.argv[1])]
print(json.dumps([prefill.compile(p, config.choose(p, sys.argv[2])).__ptx__ for p in problems]))
"""


def compiled_ptx(problems: list[Problem], arch: str) -> list[str]:
    """The PTX that another process compiles: the DSL reads the architecture and what to keep at its import."""
    environment = os.environ | {"CUTE_DSL_ARCH": arch, "CUTE_DSL_KEEP": "ptx"}
    fields = json.dumps([dataclasses.asdict(problem) for problem in problems])
    with tempfile.TemporaryDirectory() as folder:  # where the DSL leaves what it keeps
        arguments = [sys.executable, "-c", COMPILE, fields, arch]
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return [ptx.rstrip("\0") for ptx in json.loads(done.stdout.splitlines()[-1])]


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="no ptxas")
@pytest.mark.parametrize("arch", ARCHS)
def test_neither_spills_nor_local_memory(arch, tmp_path):
    problems = [problem(**fields) for fields in COMPILED.values()]
    for name, ptx in zip(COMPILED, compiled_ptx(problems, arch), strict=True):
        source, output = tmp_path / "kernel.ptx", tmp_path / "kernel.cubin"
        source.write_text(ptx)
        command = ["ptxas", f"-arch={arch}", "-v", str(source), "-o", str(output)]
        assembled = subprocess.run(command, capture_output=True, text=True)
        assert assembled.returncode == 0, assembled.stderr
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in assembled.stderr, name


def test_a_dense_kernel_contains_no_vote():
    dense, sparse = compiled_ptx([problem(96, sparsity=sparsity) for sparsity in SPARSITIES], "sm_100a")
    assert sparse.count("vote.sync") - dense.count("vote.sync") == 1
    assert "st.shared.b8" in sparse and "st.shared.b8" not in dense
    # Nor the barriers that tell of it.
    assert sparse.count("mbarrier.init") - dense.count("mbarrier.init") == 2 * DECISIONS


SEVERAL_TILES = "packed", "head dim 64", "head dim 96", "skip", "skip, head dim 64", "skip, causal", "skip, window"
ONE_CTA = {name: CASES[name] for name in SEVERAL_TILES} | {
    "skip, several sequences": Case(lengths_q=(300,) * 2, lengths_k=(600,) * 2, threshold=0.05),
    "skip, one query tile": Case(
        lengths_q=(300,), lengths_k=(700,), head_dim=256, head_dim_v=256, threshold=0.05, mixed=True
    ),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ONE_CTA)
def test_one_cta_that_computes_all_work_tiles(name, order, configured):
    configured(ctas=1)
    case = ONE_CTA[name]
    inputs = make_inputs(case)
    with cute_sparse.emulated("sm_100a", order=order, seed=3) as device:
        got = call(case, inputs, return_lse=True, return_stats=True)
        (launch,) = device.launches
    assert launch.grid == (1, 1, 1)
    check(case, inputs, got)


# The CTAs of a pair have two query heads of a group in common, or where a group is an odd number, twice the rows.
PAIRED = {
    "heads": Case(lengths_q=(200,) * 2, lengths_k=(150,) * 2, heads_q=4, heads_kv=2),
    "rows": Case(lengths_q=(600,), lengths_k=(300,), heads_q=3, heads_kv=3),
    "rows, the second CTA has none": Case(
        lengths_q=(100,), lengths_k=(300,), heads_q=1, head_dim=192, head_dim_v=128, causal=True
    ),
    "head dim 256": Case(lengths_q=(300,), lengths_k=(500,), head_dim=256, head_dim_v=256),
    "head dim 256, rows, causal": Case(
        lengths_q=(600,), lengths_k=(600,), heads_q=1, head_dim=256, head_dim_v=256, causal=True
    ),
    "head dim 192 and 128, heads, causal": Case(
        lengths_q=(200,) * 2, lengths_k=(333,) * 2, heads_q=4, heads_kv=2, head_dim=192, head_dim_v=128, causal=True
    ),
    "head dim 192 and 128, rows, causal": Case(
        lengths_q=(700,), lengths_k=(600,), heads_q=3, heads_kv=1, head_dim=192, head_dim_v=128, causal=True
    ),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ctas", [0, 2, 4])
@pytest.mark.parametrize("name", PAIRED)
def test_pairs_of_ctas_with_a_work_tile_each_and_pairs_that_compute_several(name, ctas, order, configured):
    configured(ctas=ctas)
    case = PAIRED[name]
    inputs = make_inputs(case)
    with cute_sparse.emulated("sm_100a", order=order, seed=3) as device:
        got = call(case, inputs, return_lse=True, return_stats=True)
        (launch,) = device.launches
    assert launch.cluster == (2, 1, 1)
    assert ctas == 0 or launch.grid[0] <= ctas
    check(case, inputs, got)


def test_work_tiles_that_are_dealt_out_are_dealt_evenly():
    blocks, heads, hands = 64, 12, 37
    order = TileOrder(blocks, heads, 1, heads_per_group=3, longest_first=True, turning=True)
    tiles = [order.tile(number) for number in range(blocks * heads)]
    assert len({(int(tile.m_block), int(tile.head_idx)) for tile in tiles}) == len(tiles)
    keys = [0] * hands  # under a causal mask, in blocks
    for round_ in range(-(-len(tiles) // hands)):
        for hand in range(hands):
            keys[hand] += sum(int(tile.m_block) + 1 for tile in tiles[dealt(round_, hand, hands) :][:1])
    assert max(keys) < 1.01 * sum(keys) / hands


def test_what_a_config_cannot_do_for_a_problem_is_refused_by_name():
    pair = dataclasses.replace(blackwell_config.choose(problem()), ctas=0)
    assert pair.cta_pair
    for fields in (dict(sparsity="threshold"), dict(varlen=True), dict(mask="band")):
        with pytest.raises(NotImplementedError, match="pairs of CTAs compute dense problems"):
            Prefill(problem(**fields), pair)
    with pytest.raises(NotImplementedError, match="a pair of CTAs has P inside S"):
        Prefill(problem(), dataclasses.replace(pair, p_early_columns=pair.tile_n))
    early = dataclasses.replace(pair, cta_pair=False, first_early=True, k_stages=1, v_stages=1)
    for fields, config in ((dict(mask="band"), early), (dict(), dataclasses.replace(pair, first_early=True))):
        with pytest.raises(NotImplementedError, match="the first KV tile is visited early by"):
            Prefill(problem(**fields), config)
    sparse = problem(sparsity="threshold", varlen=True)
    with pytest.raises(NotImplementedError, match="one work tile"):
        Prefill(sparse, dataclasses.replace(blackwell_config.choose(sparse), ctas=2))


def test_another_share_of_emulated_exponentials(configured):
    configured(exp2_emulated=3)
    case = CASES["causal"]
    inputs = make_inputs(case)
    with cute_sparse.emulated("sm_100a", order="random", seed=5):
        got = call(case, inputs, return_lse=True, return_stats=True)
    check(case, inputs, got)


WARPS, INSTRUCTION_K, TILE = 4, 16, 128
# One query tile or two; long enough that V of some tiles is known to be unwanted before it is fetched.
LONG = {
    "two query tiles": Case(lengths_q=(256,), lengths_k=(2560,), heads_q=1, threshold=0.9),
    "one query tile": Case(lengths_q=(128,), lengths_k=(2560,), heads_q=1, threshold=0.9, head_dim=256, head_dim_v=256),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", LONG)
def test_a_skipped_tile_costs_no_value_product_no_exponential_and_mostly_no_v(name, order):
    case = LONG[name]
    inputs = make_inputs(case)
    with cute_sparse.emulated("sm_100a", order=order, seed=1) as device:
        got = call(case, inputs, return_lse=True, return_stats=True)
        (launch,) = device.launches
    check(case, inputs, got)
    config = blackwell_config.choose(
        problem(case.head_dim, case.head_dim_v, sparsity="threshold", return_lse=True, return_stats=True)
    )
    kept, visited = got.stats.tile_counts.sum(dim=(1, 2)).tolist()
    assert kept < visited / 2

    score_steps, value_steps = case.head_dim // INSTRUCTION_K, TILE // INSTRUCTION_K * config.v_chunks
    assert launch.counts.mma_instructions == {"tcgen05.mma": visited * score_steps + kept * value_steps}

    # Of 128 columns, pairs in three of four fragments of 32; not in a row's first tile, which is compiled with a mask.
    emulated = 3 * 2 * config.exp2_emulated * (kept - config.query_tiles)
    rescales = launch.counts.exponentials - WARPS * (kept * TILE - emulated)
    assert 0 <= rescales <= kept * WARPS  # at most one for each warp of a tile that moved a reference

    wanted = (got.stats.skip_map[0, 0] == 1).any(dim=0)
    as_visited = torch.cat([wanted[:1], wanted[1:].flip(0)]).tolist()
    unwanted_runs = [len(list(run)) for keeps, run in itertools.groupby(as_visited) if not keeps]
    fetched = launch.counts.tma_bytes_loaded - 2 * case.head_dim * (case.lengths_q[0] + case.lengths_k[0])
    fetched //= 2 * TILE * case.head_dim_v
    lag = -(-config.v_stages // config.v_chunks)
    in_vain = sum(min(run, config.hold_v_after + lag) for run in unwanted_runs)
    assert sum(as_visited) <= fetched <= sum(as_visited) + in_vain < case.lengths_k[0] // TILE


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("row", [None, 0, 77, 127])
def test_each_query_tile_of_a_cta_decides_alone_and_one_row_keeps_a_tile(row, order):
    """Rows of the first query tile attend to one KV tile, rows of the second, and `row`, to another."""
    case = Case(lengths_q=(256,), lengths_k=(512,), heads_q=1, threshold=0.01)
    inputs = make_inputs(case)
    inputs.q.zero_()
    inputs.k.zero_()
    inputs.q[0, :128, 0, 0] = inputs.q[0, 128:, 0, 1] = 16.0
    if row is not None:
        inputs.q[0, row, 0, :2] = torch.tensor([0.0, 16.0])
    inputs.k[0, :128, 0, :2] = 4.0  # the first tile is visited first, then from the last down: a quarter of the way up
    inputs.k[0, 384:, 0, 0] = 16.0
    inputs.k[0, 256:384, 0, 1] = 16.0
    with cute_sparse.emulated("sm_100a", order=order, seed=1):
        got = call(case, inputs, return_lse=True, return_stats=True)
    check(case, inputs, got)
    first = [1, 2, 2, 1] if row is None else [1, 2, 1, 1]
    assert got.stats.skip_map[0, 0].tolist() == [first, [1, 2, 1, 2]]


@pytest.mark.parametrize("head_dim, second", [(64, [1, 2, 2, 1, 1]), (256, [1, 2, 2, 2, 1])])
def test_the_tile_with_the_sinks_is_visited_right_after_those_at_the_edge_of_the_cta(head_dim, second):
    """Two query tiles of one CTA, whose first rows do not see the last two tiles whole; or of two CTAs."""
    lengths = dict(lengths_q=(256,), lengths_k=(640,), heads_q=1)
    case = Case(**lengths, head_dim=head_dim, head_dim_v=head_dim, threshold=0.01, causal=True)
    inputs = make_inputs(case)
    inputs.q.fill_(1.0)
    inputs.k.zero_()
    inputs.k[0, :128] = 8.0
    with cute_sparse.emulated("sm_100a", order="random", seed=1):
        got = call(case, inputs, return_lse=True, return_stats=True)
    check(case, inputs, got)
    assert got.stats.skip_map[0, 0].tolist() == [[1, 2, 2, 1, 0], second]


class Exponentials:
    """Two to each element of x, by `exp2_pair`, two elements a thread."""

    @cute.jit
    def __call__(self, x: cute.Pointer, y: cute.Pointer, count: Int32, stream):
        self.kernel(cute.make_tensor(x, count), cute.make_tensor(y, count)).launch(
            grid=(count // 64, 1, 1), block=(32, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(self, x: cute.Tensor, y: cute.Tensor):
        block, _, _ = cute.arch.block_idx()
        i = block * 64 + 2 * cute.arch.lane_idx()
        y[i], y[i + 1] = exp2.exp2_pair(x[i], x[i + 1])


def test_the_emulated_exponential_is_within_its_bound():
    """Over the exponents that occur: [-126, 8], below it, and -inf."""
    x = torch.cat([torch.linspace(-126, 8, 64 * 60), torch.linspace(-1, 1, 64 * 60), torch.arange(-120.0, 8.0)])
    x = torch.cat([x, torch.full((64,), -torch.inf)])
    y = torch.full_like(x, torch.nan)
    with emulator.device("sm_100a") as device:
        pointer = cute.runtime.make_ptr(Float32, 16, cute.AddressSpace.gmem, assumed_align=16)
        compiled = cute.compile(Exponentials(), pointer, pointer, Int32(64), cuda.CUstream(0))
        launch_with_tensors(compiled, x, y, device)
    small = x < -126
    exact = torch.exp2(x.double())
    error = (y.double() / exact - 1).abs()[~small]
    assert error.max() <= exp2.MAX_RELATIVE_ERROR
    assert error.max() >= exp2.MAX_RELATIVE_ERROR / 2, "the bound is stated too loosely"
    assert (y[small].abs() <= 2.0**-126).all()
    whole = x == x.round()
    assert torch.equal(y[whole & ~small], exact[whole & ~small].float()), "powers of two are exact"


def launch_with_tensors(compiled, x: torch.Tensor, y: torch.Tensor, device) -> None:
    operands = [Operand("x", "pointer"), Operand("y", "pointer"), Operand("count", "int32")]
    Launcher(compiled, operands)((x.data_ptr(), y.data_ptr(), x.numel()), 0)
    device.raise_pending()


# FlashAttention-4 4.0.0b36, counted in this emulator: 2 query heads on 1 KV head, 1024 x 1024, BF16; warp instructions
# per tile of 128 x 128 scores of its softmax warps, its correction warps and its MMA warp.
FLASH_ATTENTION_4 = {
    # head_dim, head_dim_v, causal
    (64, 64, True): (4308, 293, 110.6),
    (128, 128, False): (4344, 242, 70.1),
    (192, 128, True): (4003, 460, 165.4),
    (256, 256, False): (4400, 509, 126.9),
}


@pytest.mark.parametrize("head_dim, head_dim_v, causal", FLASH_ATTENTION_4)
def test_no_role_takes_more_instructions_than_flash_attention_4(head_dim, head_dim_v, causal):
    inputs = make_inputs(Case(lengths_q=(1024,), lengths_k=(1024,), head_dim=head_dim, head_dim_v=head_dim_v))
    with cute_sparse.emulated("sm_100a", checks=False) as device:
        cute_sparse.attention(inputs.q, inputs.k, inputs.v, causal=causal)
        (launch,) = device.launches
    config = blackwell_config.choose(problem(head_dim, head_dim_v, mask="causal" if causal else "full"))
    tiles = 2 * (8 * 9 // 2 if causal else 8 * 8)
    roles = range(config.softmax_warps), range(config.correction_warp, config.mma_warp), [config.mma_warp]
    for role, theirs in zip(roles, FLASH_ATTENTION_4[head_dim, head_dim_v, causal], strict=True):
        assert sum(launch.warps[warp].warp_instructions for warp in role) / tiles <= theirs


@pytest.mark.parametrize(
    "options", [dict(window_size=(128, 0), threshold=1e-30), dict(causal=True, threshold=1e-30)], ids=str
)
def test_a_warp_computes_only_what_the_mask_leaves_of_a_tile(options):
    """Of four fragments of 32 columns, warp w sees w + 1 on the diagonal and 4 - w of the tile at the window's end."""
    inputs = make_inputs(Case(lengths_q=(256,), lengths_k=(256,), heads_q=1, head_dim=64, head_dim_v=64))
    with cute_sparse.emulated("sm_103a") as device:  # which emulates no exponentials, not in a whole tile either
        cute_sparse.attention(inputs.q, inputs.k, inputs.v, **options)
        (launch,) = device.launches
    for warp in range(WARPS):
        first, second = (launch.warps[query_tile * WARPS + warp].exponentials for query_tile in range(2))
        before = WARPS - warp if "window_size" in options else WARPS  # fragments of the tile before the diagonal's
        assert 0 <= first - 32 * (warp + 1) <= 1  # and one for a reference that moved
        assert 0 <= second - 32 * (warp + 1 + before) <= 2


def test_a_warp_that_is_a_tile_ahead_does_not_arrive_for_another():
    """With one query tile. The last warp's rows outgrow their reference in every tile, so that it rescales O while
    others are done with their next tile; had P's rest one barrier for both buffers of S, MMA would start early."""
    case = Case(lengths_q=(128,), lengths_k=(700,), heads_q=1, head_dim=256, head_dim_v=256, packed=True)
    inputs = make_inputs(case)
    inputs.q.zero_()
    inputs.k.zero_()
    inputs.q[96:, 0, 0] = 16.0
    inputs.k[:, 0, 0] = 8.0 * (6 - torch.arange(700) // TILE)
    with cute_sparse.emulated("sm_100a"):  # the eager order is one that shows it
        got = call(case, inputs, return_lse=True, return_stats=True)
    check(case, inputs, got)


def test_a_row_without_a_key_in_a_tile_survives_a_neighbour_whose_reference_moves():
    """At a window's left edge: row 352 sees keys up to 253 of the tile before 256, the rows from 356 on see none."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 512, 1, 64, generator=generator) for _ in range(3))
    k *= 0.01
    k[0, 128:256] = 0
    k[0, 253] = 4 * q[0, 352]
    q, k, v = (tensor.bfloat16() for tensor in (q, k, v))
    with cute_sparse.emulated("sm_100a"):
        got = cute_sparse.attention(q, k, v, window_size=(100, 0))
    assert got.isfinite().all()
