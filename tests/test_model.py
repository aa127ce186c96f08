"""The model of whole launches: how pieces become launches, with tiles skipped or not, the comparison with published
figures, bad requests.

No test reads a clock of the host.
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("cutlass", reason="pieces are compiled")

from cute_sparse.emulator import chips
from cute_sparse.problem import Problem, TileGeometry
from profiling import model, model_decode, skipping
from profiling.bench import flops
from profiling.decode import DecodeShape
from profiling.model import Fitted, Kind, Line
from profiling.peers import Shape


@pytest.fixture
def lines(monkeypatch):
    """lines[provider] = Line: what the pieces of a kernel would have given."""
    given: dict[str, Line] = {}
    monkeypatch.setattr(model, "line", lambda provider, arch, kind: given[provider])
    return given


def shape(seqlen: int, *, causal: bool = False, batch: int = 1, heads: int = 8) -> Shape:
    return Shape(batch, seqlen, heads, 1, 128, 128, causal)


# ---- From pieces to launches ---------------------------------------------------------------------------------------


def test_work_is_handed_to_whoever_is_free():
    assert model._handed_out(iter([5, 4, 3, 2, 1]), 2, saved=0) == 8  # 5 + 2 + 1 beside 4 + 3
    assert model._handed_out(iter([10, 10, 10]), 3, saved=4) == 10
    assert model._handed_out(iter([10, 10, 10]), 1, saved=4) == 10 + 6 + 6
    assert model._handed_out(iter([10, 10]), 1, saved=-1) == 21  # a gap between two


def test_a_cta_claims_its_next_work_tile_as_it_begins_one():
    """The first CTA claims 5 as it begins 4, though the second will be free earlier."""
    assert model._claimed([4, 1, 5, 1], 2, saved=0) == 4 + 5
    assert model._handed_out(iter([4, 1, 5, 1]), 2, saved=0) == 1 + 5
    assert model._claimed([10, 10, 10], 5, saved=4) == 10
    assert model._claimed([10, 10, 10], 1, saved=4) == 10 + 6 + 6


def test_a_launch_is_its_blocks_over_the_chips_sms(lines):
    """A chip's worth of equal tiles takes one tile's time, one more tile takes two."""
    chip = chips.chip_of("sm_90a")
    lines["ours"] = Line(fixed=1000, per_key=10, clusters=1, ctas=1, saved=0)
    one_wave = shape(model.BLOCK, batch=chip.sms)
    assert model.launch("ours", "sm_90a", one_wave).cycles == 1000 + 10 * model.BLOCK
    assert model.launch("ours", "sm_90a", one_wave._replace(batch=chip.sms + 1)).cycles == 2 * (1000 + 10 * model.BLOCK)
    lines["ours"] = Line(fixed=1000, per_key=10, clusters=1, ctas=2, saved=0)  # clusters of two SMs
    assert model.launch("ours", "sm_90a", one_wave).cycles == 2 * (1000 + 10 * model.BLOCK)


def test_a_causal_block_has_the_keys_up_to_its_end(lines):
    lines["ours"] = Line(fixed=0, per_key=1, clusters=1, ctas=1, saved=0)
    one_head = shape(4 * model.BLOCK, causal=True)
    assert model.launch("ours", "sm_90a", one_head).cycles == 4 * model.BLOCK  # the longest, each on its own SM
    many = one_head._replace(batch=132 * 4)
    mean = model.BLOCK * (1 + 2 + 3 + 4) / 4
    assert model.launch("ours", "sm_90a", many).cycles == pytest.approx(4 * 4 * mean, rel=0.01)


def test_kernels_rank_as_their_pieces_do(lines):
    lines["slow prologue"] = Line(fixed=9000, per_key=10, clusters=4, ctas=1, saved=0)
    lines["slow tiles"] = Line(fixed=1000, per_key=15, clusters=4, ctas=1, saved=0)

    def ratio(seqlen: int) -> float:
        times = [model.launch(name, "sm_100a", shape(seqlen)).seconds for name in ("slow prologue", "slow tiles")]
        return times[0] / times[1]

    assert ratio(512) > 1 > ratio(8192)


def test_time_is_at_least_that_of_moving_every_tensor_once(lines):
    lines["free"] = Line(fixed=0, per_key=0, clusters=1, ctas=1, saved=0)
    big = shape(65536, batch=64)
    moved = 2 * big.batch * big.seqlen * (big.heads_q + big.heads_kv) * (128 + 128)
    assert model.launch("free", "sm_90a", big).seconds == pytest.approx(moved / chips.CHIPS["H200"].hbm_bytes_per_s)


def test_the_clock_falls_with_the_length_of_a_launch():
    fitted = Fitted(cold_ghz=2.0, hot_ghz=1.0, heating_ms=10, launch_us=0)
    short, middle, long = (cycles / fitted.seconds(cycles) * 1e-9 for cycles in (1e3, 2e7, 1e12))
    assert short == pytest.approx(2.0, rel=1e-3)
    assert middle == pytest.approx(1 + 2.718281828**-1, rel=1e-6)
    assert long == pytest.approx(1.0, rel=1e-3)
    assert Fitted(2.0, 1.0, 10, launch_us=5).seconds(0) == pytest.approx(5e-6)


def test_ranks_and_their_correlation():
    assert model.spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert model.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert model.spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9487, abs=1e-4)  # ties share a rank


# ---- Tiles skipped -------------------------------------------------------------------------------------------------

TILES = TileGeometry(tile_m=128, tile_rows=64, tile_n=128, order="first_early", cta_m=128)
CAUSAL = (None, 0)


def drawn(maps: str, seqlen: int, heads: int = 4) -> torch.Tensor:
    return skipping.critical_rates(skipping.LAWS[maps], TILES, seqlen, seqlen, CAUSAL, heads)


@pytest.mark.parametrize("maps", skipping.LAWS)
@pytest.mark.parametrize("share", [0, 0.5, 0.75])
def test_a_launch_skips_the_share_that_was_asked_for(maps, share):
    critical = drawn(maps, 4096)
    visited = critical < math.inf
    assert torch.equal(visited[0], torch.ones(64, 32).tril_().bool()[torch.arange(64) // 2])
    kept = skipping.kept_tiles(critical, share)
    assert not (kept & ~visited).any()
    assert skipping.skipped_share(critical, kept) == pytest.approx(share, abs=1 / visited.sum().item())
    assert kept[:, :, 0].all() and kept[:, torch.arange(64), torch.arange(64) // 2].all()  # sinks, diagonal


def test_structured_maps_keep_near_tiles_differ_between_heads_and_agree_between_groups():
    def found(maps):
        kept = skipping.kept_tiles(drawn(maps, 8192), 0.5)[:, 64:]
        near, far = kept[:, :, 24:30].float().mean(), kept[:, :, 1:7].float().mean()
        disagree = (kept[:, 0::2] != kept[:, 1::2]).float().mean()
        return near / far, kept.float().mean((1, 2)).std(), disagree

    structured, random = found("structured"), found("random")
    assert structured[0] > 1.2 > 1.1 > random[0]
    assert structured[1] > 0.1 > 0.02 > random[1]
    assert structured[2] < 0.5 * random[2]


def test_more_than_the_diagonal_and_the_sinks_cannot_be_kept_away():
    with pytest.raises(skipping.Unreachable, match="90% of the tiles cannot be skipped, 65% at most"):
        skipping.kept_tiles(drawn("structured", 1280), 0.9)


def test_the_features_of_a_work_tile():
    """A CTA of two groups; the second sees as many tiles; its tile 0 comes early and follows no skipped one."""
    critical = torch.zeros(1, 2, 8)
    critical[..., 6:] = math.inf
    kept = torch.tensor([[[1, 0, 1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 1, 1, 0, 0]]]).bool()
    (found,) = skipping.features(TILES, critical, kept)[0].tolist()
    expected = {"keys": 6 * 128, "skips": 1, "skipped": 2.5 * 128, "not fetched": 2 * 128}
    expected |= {"starts": 0.5, "fetched starts": 1}
    assert dict(zip(skipping.FEATURES, found, strict=True)) == expected


def test_work_tiles_are_ordered_as_the_kernels_number_them():
    """Under a causal mask the last rows of all heads first; else, on Hopper, one head after the other."""
    config = type("Config", (), {"geometry": TILES})
    for mask, expected in {
        "causal": ([0, 1, 0, 1, 0, 1], [2, 2, 1, 1, 0, 0]), "full": ([0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2])
    }.items():  # fmt: skip
        problem = Problem("prefill", "bfloat16", 128, 128, mask=mask, sparsity="threshold")
        heads, blocks = model.work_order("sm_90a", problem, config, Shape(1, 384, 2, 1, 128, 128, True), 384)
        assert (heads.tolist(), blocks.tolist()) == expected


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(model, "SKIPPING_HEADS", 2)
    monkeypatch.setattr(model, "SKIPPING_KEYS", (512, 768))


@pytest.mark.parametrize("arch", model.PUBLISHED)
def test_tiles_skipped_are_modelled_and_must_have_been_skipped(arch, small_pieces, monkeypatch):
    kind = Kind(64, 64, 1, causal=False, window_left=None)
    kernel = model.skipping_kernel.__wrapped__(arch, kind, "structured")
    assert kernel.mean_error < 0.05
    features, cycles = model.skipping_piece(arch, kind, "structured", 768)
    skips = features[:, skipping.FEATURES.index("skips")] > 0
    assert skips.any() and not skips.all()
    assert cycles[skips].max() < cycles[~skips].min()
    launches = model.skipping_launches(arch, Shape(16, 1024, 16, 1, 64, 64, False), "structured", (0, 0.3))
    dense, some = launches
    assert (dense.skipped, dense.fetched) == (0, 1) and dense.cycles > some.cycles
    assert some.skipped == pytest.approx(0.3, abs=0.01) and 0.7 < some.fetched < 1
    # If the kernel skipped nothing, its clocks would be taken for those of a kernel that does.
    monkeypatch.setattr(skipping, "THRESHOLD", 1e-30)
    with pytest.raises(RuntimeError, match="did not skip what it should have"):
        model.skipping_piece(arch, kind, "structured", 768)


def test_published_speed_ups_lie_between_those_measured():
    assert model.published_skipping("sm_90a", 0.492) == pytest.approx(1.27)
    assert model.published_skipping("sm_90a", (0.492 + 0.573) / 2) == pytest.approx((1.27 + 1.35) / 2)
    assert model.published_skipping("sm_90a", 0.99) == 1.84


# ---- Real kernels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", model.PUBLISHED)
def test_our_kernel_lies_between_a_third_of_the_chips_peak_and_all_of_it(arch):
    """The longest piece cannot be faster than the tensor core, whose work is known exactly."""
    kind = Kind(64, 64, 1, causal=False, window_left=None)
    fitted = model.line(model.OURS, arch, kind)
    chip = chips.chip_of(arch)
    macs_per_key = 2 * kind.block * 64  # Q K^T and P V
    fastest = macs_per_key / chip.mma_macs / (fitted.clusters * fitted.ctas)
    assert fastest <= fitted.per_key <= 3 * fastest
    assert fitted.fixed > 0
    longest = model.piece(model.OURS, arch, kind, kind.keys[-1])
    assert {"MMA", "exponentials"} <= {part for role in longest.roles for part in role.split(", ")}
    for estimate in longest.estimates:
        for cta in estimate.ctas:
            assert 0 < cta.tensor < estimate.cycles
            assert max(w.end for w in cta.warps) <= estimate.cycles


@pytest.fixture
def published(monkeypatch):
    """Of the published figures, those of one kind of kernel: the causal ones with head dim 128."""
    some = {
        name: value for name, value in model.PUBLISHED["sm_90a"].items() if name.endswith("k-causal") and "d128" in name
    }
    assert len(some) == 5
    monkeypatch.setitem(model.PUBLISHED, "sm_90a", some)


def test_flash_attention_4_is_modelled_as_published(published, monkeypatch, capsys):
    pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed")
    assert model.calibrate("sm_90a") == 0
    told = capsys.readouterr().out
    assert "for comparisons on one chip only" in told and "within the bounds" in told
    # With another clock the bounds are not kept, and that is told.
    fitted = model.FITTED["sm_90a"]
    monkeypatch.setitem(
        model.FITTED, "sm_90a", Fitted(fitted.cold_ghz / 1.5, fitted.hot_ghz / 1.5, fitted.heating_ms, 6)
    )
    assert model.calibrate("sm_90a") == 1
    assert "OUTSIDE the bounds" in capsys.readouterr().out


# ---- Bad requests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["prefill", "--arch", "sm_80"], "sm_90a, sm_100a, sm_103a"),
        (["calibrate", "--arch", "h100"], "sm_90a, sm_100a"),
        (["calibrate", "--arch", "sm_103a"], "nothing is published of sm_103a"),
        (["prefill", "--arch", "sm_90a", "--peers", "cudnn"], "fa4"),
        (["prefill", "--arch", "sm_90a", "--peers", "fa4,cute_sparse"], "cute_sparse is not modelled"),
        (["prefill", "--arch", "sm_90a", "--case", "d999"], "d128-2k-causal"),
        (["prefill", "--arch", "sm_90a", "--sparsity", "1"], "a sparsity lies in [0, 1)"),
    ],
)
def test_unknown_names_are_refused_with_those_that_are_known(arguments, told, capsys):
    with pytest.raises(SystemExit) as left:
        model.main(arguments)
    assert left.value.code == 2
    assert told in capsys.readouterr().err


def test_a_missing_peer_is_named(monkeypatch, capsys, lines):
    def missing(provider, arch, shape):
        if provider == "fa4":
            raise model.Missing("pip install flash-attn-4: no such module")
        return model.Launch(1, 1, 1, 1, 1)

    monkeypatch.setattr(model, "launch", missing)
    assert model.main(["prefill", "--arch", "sm_90a", "--case", "d128-2k-full"]) == 1
    assert "d128-2k-full           not modelled: pip install flash-attn-4" in capsys.readouterr().out


def test_operations_are_counted_as_the_benchmark_does(lines):
    lines["ours"] = Line(fixed=1000, per_key=10, clusters=1, ctas=1, saved=0)
    causal = shape(2048, causal=True)
    result = model.launch("ours", "sm_90a", causal)
    assert result.tflops == pytest.approx(flops(causal) / result.seconds / 1e12)


# ---- Decode --------------------------------------------------------------------------------------------------------


def test_a_decode_launch_takes_its_bytes_and_the_excess_of_its_worst_cta(monkeypatch):
    """16384 tiles of 32 KB on 132 CTAs, half of their V not read; the mean excess grows by 2 clocks for each tile."""
    excess = {tiles: (1000.0, 1200 + 4.0 * tiles) for tiles in model_decode.TILES}

    def traced(arch, shape, skipped):
        tiles = model_decode.split_of(arch, shape, True).tiles_per_cta
        return model_decode.Traced(tiles, excess[min(excess, key=lambda t: abs(t - tiles))], 0.5)

    monkeypatch.setattr(model_decode, "traced", traced)
    case = DecodeShape((16384 * 64,), 4, 1)
    chip, launch = chips.chip_of("sm_90a"), model_decode.launch("sm_90a", case, 0.5)
    beyond = 16384 / chip.sms - 32
    assert launch.clocks - launch.bytes_clocks == pytest.approx(excess[32][1] + 2 * beyond, rel=0.05)
    seconds = launch.bytes_clocks / (chip.clock_ghz * 1e9)
    assert seconds == pytest.approx(0.75 * case.kv_bytes / chip.copied_bytes_per_s)


@pytest.mark.parametrize("lengths", [(512 * 1024,), (16384,) * 128, (256 * 1024, *[1024] * 127)])
def test_what_is_emulated_of_a_decode_case_is_cut_as_the_case_is(lengths):
    """As many CTAs, items for each tile, and parts of an item; fewer tiles."""
    case = DecodeShape(lengths, 32, 8)
    whole = model_decode.split_of("sm_90a", case, False)
    part = model_decode.split_of("sm_90a", model_decode.reduced("sm_90a", case, False, 32), False)
    assert part.busy == whole.busy and part.tiles < whole.tiles / 8
    assert part.parts == pytest.approx(whole.parts, abs=1)


def test_a_modelled_decode_launch_skips_as_many_tiles_as_it_was_asked_to():
    case = DecodeShape((4096,), 4, 1, page_size=64)
    none, half = (model_decode.launch("sm_90a", case, skipped) for skipped in (0.0, 0.5))
    assert none.skipped == 0 and half.skipped == pytest.approx(0.5, abs=0.1)
    assert half.clocks < none.clocks
    assert none.clocks > none.bytes_clocks + model_decode.chips.chip_of("sm_90a").hbm_latency
