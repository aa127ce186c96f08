"""The measuring: what of it does not need a GPU, with a clock that is given."""

from __future__ import annotations

import json
import math
import sys
import types
from dataclasses import asdict, replace

import pytest
import torch

import cute_sparse
from profiling import bench, decode, peers, rows, timing
from profiling.peers import KeptTiles, Missing, Shape

ORIGIN = rows.Origin("Some GPU", "580.1", "2.13", "4.8.1", "abc", "2026-01-01T00:00:00+00:00")
SHAPE = Shape(1, 256, 2, 1, 64, 64, True)


class GivenTimer:
    """Each call runs, and took as long as it is told; it notes the order."""

    def __init__(self, durations: dict[str, float] | None = None) -> None:
        self.durations = durations or {}
        self.order: list[object] = []

    def milliseconds(self, call) -> float:
        self.order.append(call)
        name = call()
        return self.durations.get(name, 1.0) if isinstance(name, str) else 1.0


@pytest.fixture
def quick(monkeypatch):
    """No GPU's state, few rounds, and ours is the reference."""
    monkeypatch.setattr(timing, "state_under_load", lambda call, ms: {"sm_clock": 1980.0, "power": 650.5})
    monkeypatch.setattr(timing, "rounds", lambda ms: 3)


def make_bench(tmp_path, peer_names=()) -> bench.Bench:
    return bench.Bench(rows.Writer(tmp_path / "prefill.jsonl"), ORIGIN, GivenTimer(), "cpu", peer_names)


def written(tmp_path) -> list[rows.Row]:
    return list(rows.read(tmp_path / "prefill.jsonl"))


def torch_attention(shape, q, k, v, kept):
    """A peer that computes what it should."""
    heads = [x.transpose(1, 2) for x in (q, k, v)]

    def call():
        out = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=shape.causal, enable_gqa=True)
        return out.transpose(1, 2)

    return call


def checked_error(shape, q, k, v, out, kept):
    expected = (shape.batch, shape.seqlen, shape.heads_q, shape.head_dim_v)
    return bench.checked_error(expected, out, lambda: bench.sampled_error(shape, q, k, v, out, kept))


# ---- Cases ---------------------------------------------------------------------------------------------------------


def test_the_tables_hold_every_published_shape():
    assert len(bench.TABLES) == 16
    for seqlen in (2, 4, 8, 16, 32):
        for mask in ("causal", "full"):
            shape = bench.TABLES[f"d128-{seqlen}k-{mask}"]
            assert shape == Shape(2, seqlen * 1024, 64, 8, 128, 128, mask == "causal")
    assert bench.TABLES["d192-128-8k-full"] == Shape(2, 8192, 128, 128, 192, 128, False)
    assert bench.TABLES["d256-16k-causal"] == Shape(1, 16384, 32, 2, 256, 256, True)
    assert bench.TABLES["d64-8k-window128"].window_left == 127
    assert bench.LONG["d128-64k-causal"].seqlen == 65536


@pytest.mark.parametrize(
    "shape, pairs",
    [
        (Shape(1, 64, 1, 1, 8, 8, False), 64 * 64),
        (Shape(1, 64, 1, 1, 8, 8, True), 64 * 64 // 2),
        (Shape(1, 64, 1, 1, 8, 8, True, 9), sum(min(i + 1, 10) for i in range(64))),
        (Shape(1, 64, 1, 1, 8, 8, True, 1000), sum(range(65))),
    ],
)
def test_flops_count_the_visible_pairs(shape, pairs):
    assert bench.flops(shape) == 4 * 8 * pairs
    assert bench.flops(shape._replace(batch=3, heads_q=5, head_dim_v=4)) == 2 * 12 * 15 * pairs


# ---- Statistics and clocks -----------------------------------------------------------------------------------------


def test_quantiles_are_those_of_the_values():
    assert timing.quantiles([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == (2.0, 3.5, 5.0)
    assert timing.quantiles([7.0]) == (7.0, 7.0, 7.0)
    assert timing.quantiles([1.0, 2.0]) == pytest.approx((1.2, 1.5, 1.8))
    with pytest.raises(ValueError, match="no value"):
        timing.quantiles([])


def test_providers_take_turns_and_another_begins_each_round(monkeypatch):
    monkeypatch.setattr(timing, "rounds", lambda ms: 4)
    calls = {name: (lambda name=name: name) for name in "abc"}
    timer = GivenTimer({"a": 1.0, "b": 2.0, "c": 3.0})
    times = timing.interleaved(calls, timer)
    assert times == {"a": [1.0] * 4, "b": [2.0] * 4, "c": [3.0] * 4}
    order = "".join(call() for call in timer.order)
    assert order == "aaabbbccc" + "abc" + "bca" + "cab" + "abc"


def test_rounds_follow_from_the_budget_and_are_odd():
    assert timing.rounds(1e-9) == timing.ROUNDS_MAX and timing.rounds(1e9) == timing.ROUNDS_MIN
    assert timing.rounds(timing.CASE_BUDGET_MS / 20) == 21
    assert all(timing.rounds(ms) % 2 for ms in (1.0, 10.0, 80.0, 200.0, 300.0))


def test_the_state_is_empty_where_nothing_can_be_asked(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert timing._state_of_smi() == {} and timing.smi("driver_version") == []


def test_the_state_is_read_before_the_calls_and_while_the_last_of_them_run(monkeypatch):
    events = []
    mark = types.SimpleNamespace(record=lambda: events.append("mark"), synchronize=lambda: events.append("reached"))
    monkeypatch.setattr(torch.cuda, "Event", lambda: mark)
    monkeypatch.setattr(timing, "gpu_state", lambda: events.append("state") or {"power": float(len(events))})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("synchronize"))
    assert timing.state_under_load(lambda: events.append("call"), timing.LOAD_MS / 10) == {"power": 14.0}
    assert events == ["state", *["call"] * 8, "mark", "call", "call", "reached", "state", "synchronize"]


def test_l2_is_flushed_before_the_clock_starts_and_by_reading_alone(monkeypatch):
    from cute_sparse import emulator

    monkeypatch.setattr(timing, "FLUSH_BYTES", 64)
    with emulator.device("sm_90a", torch_cuda=True):
        timer, events = timing.EventTimer(), []
        flushed, amax = timer._flush.copy_(torch.arange(8)), torch.amax
        monkeypatch.setattr(torch, "amax", lambda *args, **options: events.append("flush") or amax(*args, **options))
        event = torch.cuda.Event
        monkeypatch.setattr(event, "record", lambda self: events.append("event"))
        monkeypatch.setattr(event, "elapsed_time", lambda self, end: 2.5)
        assert timer.milliseconds(lambda: events.append("call")) == 2.5
        assert events == ["flush", "event", "call", "event"]
        assert flushed.tolist() == list(range(8)) and timer._largest.item() == 7


def test_what_nvml_does_not_know_is_absent(monkeypatch):
    class Failed(Exception):
        pass

    def power(gpu):
        raise Failed

    nvml = types.SimpleNamespace(
        NVMLError=Failed, NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2, nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid, nvmlDeviceGetPowerUsage=power,
        nvmlDeviceGetClockInfo=lambda gpu, clock: 1000 * clock if gpu == "GPU-12-34" else 0,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: types.SimpleNamespace(uuid="12-34"))
    assert timing.gpu_state() == {"sm_clock": 1000.0, "memory_clock": 2000.0}


def test_what_nvidia_smi_does_not_know_is_absent(monkeypatch):
    monkeypatch.setattr(timing, "smi", lambda query: ["1980", "3201", "[N/A]", "44"])
    assert timing._state_of_smi() == {"sm_clock": 1980.0, "memory_clock": 3201.0, "temperature": 44.0}


# ---- Rows ----------------------------------------------------------------------------------------------------------


def a_row(**changes) -> rows.Row:
    return replace(rows.row(ORIGIN, "prefill", "cute_sparse", "c", "dense", "time", (1.0, 2.0, 3.0)), **changes)


def test_rows_come_back_as_they_were_written_and_are_appended(tmp_path):
    path = tmp_path / "made" / "prefill.jsonl"
    rows.Writer(path).write(a_row())
    rows.Writer(path).write(a_row(provider="fa4"))
    assert list(rows.read(path)) == [a_row(), a_row(provider="fa4")]
    assert set(json.loads(path.read_text().splitlines()[0])) == {
        "op", "provider", "case", "mode", "metric", "unit", "p20", "p50", "p80", "gpu", "driver", "torch",
        "cutlass_dsl", "commit", "time",
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(unit="s"), "metric='time'"),
        (dict(metric="speed"), "metric='speed'"),
        (dict(p50=4.0), "do not ascend"),
        (dict(p50=math.nan), "do not ascend"),
        (dict(p80="3"), "p80='3' is not a number"),
        (dict(gpu=None), "gpu=None is not a string"),
    ],
)
def test_a_row_that_says_nothing_sound_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        a_row(**changes)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not a row"),
        ("[1]", "not a row"),
        (json.dumps(asdict(a_row()) | {"speed": 1}), "fields: speed"),
        (json.dumps({k: v for k, v in asdict(a_row()).items() if k != "gpu"}), "fields: gpu"),
        (json.dumps(asdict(a_row()) | {"unit": "s"}), "metric='time'"),
    ],
)
def test_rows_of_another_schema_are_named_and_kept(tmp_path, line, message):
    path = tmp_path / "prefill.jsonl"
    rows.Writer(path).write(a_row())
    with path.open("a") as file:
        file.write(line + "\n")
    before = path.read_bytes()
    with pytest.raises(rows.BadRow, match=rf"prefill\.jsonl:2: .*{message}"):
        list(rows.read(path))
    with pytest.raises(rows.BadRow, match=":2:"):
        rows.Writer(path)
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_written_is_an_error_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file: results cannot be written there"):
        rows.Writer(tmp_path / "file" / "prefill.jsonl")


# ---- The search of a threshold -------------------------------------------------------------------------------------


def rising(threshold: float) -> float:
    """0.05 of the tiles have no visible key, 0.9 can be skipped: linear in ln(lambda) over [1e-9, 1]."""
    return 0.05 + 0.85 * min(1.0, max(0.0, 1 + math.log(threshold) / math.log(1e9)))


@pytest.mark.parametrize("target", [0.1, 0.5, 0.75, 0.9])
def test_the_threshold_found_gives_the_sparsity_wished(target):
    threshold, achieved = bench.search_threshold(rising, target)
    assert 0 < threshold <= 1 and achieved == rising(threshold)
    assert abs(achieved - target) <= bench.SPARSITY_TOLERANCE


def test_a_sparsity_of_zero_asks_for_the_smallest_threshold():
    assert bench.search_threshold(rising, 0.0) == (bench.LAMBDA_MIN, 0.05)


def test_a_sparsity_out_of_reach_is_an_error_that_says_what_is_in_reach():
    with pytest.raises(bench.Unreachable, match=r"0\.95 is out of reach.*0\.050 to 0\.900"):
        bench.search_threshold(rising, 0.95)
    with pytest.raises(bench.Unreachable, match="out of reach"):
        bench.search_threshold(rising, 0.01)
    with pytest.raises(bench.Unreachable, match="no threshold gives"):
        bench.search_threshold(lambda threshold: 0.8 if threshold > 0.1 else 0.0, 0.5)


# ---- Checking results ----------------------------------------------------------------------------------------------


def attended(shape: Shape, threshold: float | None = None):
    qkv = bench.structured_qkv(1, shape.seqlen, shape.heads_q, shape.heads_kv, shape.head_dim)
    return qkv, bench.ours(shape, *qkv)(threshold=threshold, return_stats=True)


@pytest.mark.parametrize("shape", [SHAPE, SHAPE._replace(causal=False), SHAPE._replace(window_left=100)])
def test_a_right_result_passes_and_a_wrong_one_does_not(shape):
    qkv, got = attended(shape)
    error = checked_error(shape, *qkv, got.out, None)
    assert 0 < error < 1e-2
    with pytest.raises(bench.Wrong, match="relative error"):
        checked_error(shape, *qkv, got.out * 1.02, None)
    with pytest.raises(bench.Wrong, match="relative error"):
        checked_error(shape._replace(causal=not shape.causal), *qkv, got.out, None)
    with pytest.raises(bench.Wrong, match="not finite"):
        checked_error(shape, *qkv, got.out.index_fill(1, torch.tensor([77]), math.nan), None)
    with pytest.raises(bench.Wrong, match="shape"):
        checked_error(shape, *qkv, got.out[:, 1:], None)


def test_the_first_sequence_is_looked_at_as_the_last_is():
    shape = SHAPE._replace(batch=2)
    qkv = bench.random_qkv(shape, "cpu")
    out = bench.ours(shape, *qkv)()
    checked_error(shape, *qkv, out, None)
    for index in range(2):
        with pytest.raises(bench.Wrong, match="relative error"):
            checked_error(shape, *qkv, out.index_fill(0, torch.tensor([index]), 0.0), None)


def kept_tiles(stats: cute_sparse.Stats) -> KeptTiles:
    return KeptTiles(stats.skip_map == bench.KEPT, stats.geometry.tile_rows, stats.geometry.tile_n)


def test_skipped_tiles_are_left_out_of_the_expectation():
    shape = SHAPE._replace(seqlen=1024)
    qkv, got = attended(shape, threshold=0.9)
    assert bench.skipped_share(got.stats) > 0.2
    checked_error(shape, *qkv, got.out, kept_tiles(got.stats))
    with pytest.raises(bench.Wrong, match="relative error"):
        checked_error(shape, *qkv, got.out, None)


# ---- A run ---------------------------------------------------------------------------------------------------------


def test_a_dense_case_leaves_its_rows(tmp_path, quick, monkeypatch):
    monkeypatch.setitem(peers.PEERS, "fa4", torch_attention)
    run = make_bench(tmp_path, ["fa4"])
    run.run("tiny", SHAPE, None)
    assert not run.failures and not run.missing
    found = {(row.provider, row.metric): row for row in written(tmp_path)}
    assert set(found) == {(p, m) for p in ("cute_sparse", "fa4") for m in ("error", "time", "rate")} | {
        ("gpu", "sm_clock"), ("gpu", "power"),
    }  # fmt: skip
    assert found["cute_sparse", "time"].p50 == 1.0
    assert found["cute_sparse", "rate"].p50 == pytest.approx(bench.flops(SHAPE) / 1e9)
    assert {row.case for row in found.values()} == {"tiny"} and found["gpu", "power"].p50 == 650.5


def masked_attention(shape, q, k, v, kept):
    """A peer that attends to the kept blocks alone."""
    at = torch.arange(shape.seqlen)
    mask = peers.mask_of(shape)(0, 0, at[:, None], at[None])
    if kept is not None:
        mask = mask & kept.keep.repeat_interleave(kept.rows, 2).repeat_interleave(kept.keys, 3)
    heads = [x.transpose(1, 2) for x in (q, k, v)]

    def call():
        out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2)

    return call


def test_a_sparse_case_reports_what_was_skipped(tmp_path, quick, monkeypatch):
    monkeypatch.setitem(peers.PEERS, "flex", masked_attention)
    run = make_bench(tmp_path, ["flex"])
    monkeypatch.setattr(bench, "SPARSITY_TOLERANCE", 0.05)  # of 80 tiles
    run.run("tiny", SHAPE._replace(seqlen=512), (0.0, 0.2))
    assert not run.failures and not run.missing
    found = {(row.provider, row.mode, row.metric): row.p50 for row in written(tmp_path)}
    assert found["cute_sparse", "sparsity 0.2", "sparsity"] == pytest.approx(0.2, abs=0.05)
    assert 0 < found["cute_sparse", "sparsity 0.2", "threshold"] <= 1
    assert found["cute_sparse", "sparsity 0.2", "error_dense"] >= found["cute_sparse", "sparsity 0.2", "error"]
    assert ("flex", "sparsity 0.2", "time") in found and ("flex", "structured, dense", "time") in found
    assert ("cute_sparse", "structured, dense", "time") in found and ("cute_sparse", "sparsity 0", "time") in found


def test_a_peer_that_fails_or_is_wrong_or_missing_is_named_and_the_rest_is_measured(tmp_path, quick, monkeypatch):
    def breaks(*_):
        raise RuntimeError("it broke")

    def absent(*_):
        raise Missing("pip install it")

    monkeypatch.setitem(peers.PEERS, "cudnn", lambda *_: breaks)
    monkeypatch.setitem(peers.PEERS, "flash", lambda shape, q, k, v, kept: lambda: q * 0)
    monkeypatch.setitem(peers.PEERS, "fa4", absent)
    run = make_bench(tmp_path, ["cudnn", "flash", "fa4"])
    run.run("tiny", SHAPE, None)
    run.run("again", SHAPE, None)
    assert run.missing == ["tiny, dense: fa4: pip install it", "again, dense: fa4: pip install it"]
    assert ["it broke" in line for line in run.failures] == [True, False] * 2
    assert "tiny, flash, dense: Wrong: relative error" in run.failures[1]
    timed = [(row.case, row.provider) for row in written(tmp_path) if row.metric == "time"]
    assert timed == [("tiny", "cute_sparse"), ("again", "cute_sparse")]


def test_a_result_that_is_wrong_after_timing_has_no_time(tmp_path, quick, monkeypatch):
    """As of a kernel whose counters a launch leaves as they are: the first call alone is right."""

    def right_once(shape, q, k, v, kept):
        calls, attend = [], torch_attention(shape, q, k, v, kept)
        return lambda: attend() * (1.0 if not calls.append(1) and len(calls) == 1 else 1.1)

    monkeypatch.setitem(peers.PEERS, "fa4", right_once)
    run = make_bench(tmp_path, ["fa4"])
    run.run("tiny", SHAPE, None)
    assert len(run.failures) == 1 and "tiny, fa4, dense, after timing: Wrong: relative error" in run.failures[0]
    assert {row.provider for row in written(tmp_path) if row.metric in ("time", "rate")} == {"cute_sparse"}


def test_memory_that_a_checked_call_may_be_given_holds_nan_and_no_earlier_result(tmp_path, quick, monkeypatch):
    events, full = [], torch.full

    def poison(size, value, **options):
        events.append((tuple(size), math.isnan(value), options["dtype"]))
        return full(size, value, **options)

    def noted(shape, q, k, v, kept=None):
        return lambda: events.append("call") or torch_attention(shape, q, k, v, kept)()

    monkeypatch.setitem(peers.PEERS, "fa4", noted)
    monkeypatch.setattr(bench, "ours", noted)
    monkeypatch.setattr(torch, "full", poison)
    make_bench(tmp_path, ["fa4"]).run("tiny", SHAPE, None)
    first_check, last_check = events[:4], events[-4:]
    assert first_check == last_check == [((1, 256, 2, 64), True, torch.bfloat16), "call"] * 2


def test_an_error_while_timing_keeps_the_earlier_rows_and_goes_on(tmp_path, quick, monkeypatch):
    run = make_bench(tmp_path)
    run.run("first", SHAPE, None)
    interleaved = timing.interleaved
    monkeypatch.setattr(timing, "interleaved", lambda *_: 1 / 0)
    run.run("second", SHAPE, None)
    monkeypatch.setattr(timing, "interleaved", interleaved)
    run.run("third", SHAPE, None)
    assert run.failures == ["second: ZeroDivisionError: division by zero"]
    assert [row.case for row in written(tmp_path) if row.metric == "time"] == ["first", "third"]


def test_an_unreachable_sparsity_fails_alone(tmp_path, quick):
    run = make_bench(tmp_path)
    run.run("tiny", SHAPE._replace(seqlen=512), (0.0, 0.99))
    assert len(run.failures) == 1 and "sparsity 0.99: Unreachable" in run.failures[0]
    assert "sparsity 0" in {row.mode for row in written(tmp_path) if row.metric == "time"}


def test_under_a_profiler_nothing_is_timed(tmp_path, quick, monkeypatch):
    captured = []

    class Range:
        def __init__(self, name):
            captured.append(name)

        def __enter__(self):
            pass

        def __exit__(self, *_):
            pass

    monkeypatch.setenv(timing.PROFILED_VARIABLE, "1")
    monkeypatch.setattr(timing, "captured", Range)
    run = make_bench(tmp_path)
    run.run("tiny", SHAPE, None)
    assert captured == ["tiny, cute_sparse, dense"] and not run.timer.order
    assert {row.metric for row in written(tmp_path)} == {"error"}


def test_what_a_profiler_records_lies_between_marks(monkeypatch):
    from cute_sparse import emulator

    events = []
    with emulator.device("sm_90a", torch_cuda=True):
        runtime = torch.cuda.cudart()
        monkeypatch.setattr(runtime, "cudaProfilerStart", lambda: events.append("start"))
        monkeypatch.setattr(runtime, "cudaProfilerStop", lambda: events.append("stop"))
        with pytest.raises(ValueError, match="of the call"), timing.captured("a call"):
            events.append("call")
            raise ValueError("of the call")
    assert events == ["start", "call", "stop"]


# ---- Peers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SHAPE._replace(seqlen=640), SHAPE._replace(seqlen=640, causal=False),
                                   SHAPE._replace(seqlen=640, window_left=200)])  # fmt: skip
def test_flex_attentions_blocks_are_those_of_the_mask(shape):
    at = torch.arange(shape.seqlen)
    mask = peers.mask_of(shape)(0, 0, at[:, None], at[None]).broadcast_to(shape.seqlen, shape.seqlen)
    blocks = mask.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).transpose(1, 2).flatten(2)
    some, whole = peers.visible_blocks(shape, torch.device("cpu"))
    assert torch.equal(some[0, 0], blocks.any(-1)) and torch.equal(whole[0, 0], blocks.all(-1))


def test_block_lists_name_the_blocks():
    counts, indices = peers.block_list(torch.tensor([[[[1, 0, 1], [0, 0, 0]]]], dtype=torch.bool))
    assert counts.tolist() == [[[2, 0]]] and indices[0, 0, 0, :2].tolist() == [0, 2] and indices.dtype == torch.int32


def test_tiles_become_flex_attentions_blocks_of_which_half_is_kept():
    def blocks(keep, rows, keys):
        keep = torch.tensor(keep, dtype=torch.bool)[None, None]
        return peers.in_flex_blocks(KeptTiles(keep, rows, keys), 256).keep[0, 0].tolist()

    assert blocks([[1, 0], [0, 0], [0, 0], [1, 1]], 64, 128) == [[True, False], [True, True]]
    assert blocks([[1, 1], [1, 0], [1, 1], [0, 0]], 64, 128) == [[True, True], [True, True]]  # half of one suffices
    assert blocks([[0, 1], [0, 1]], 128, 128) == [[False, True], [False, True]]
    assert blocks([[1, 0, 0, 1]] * 4, 64, 80) == [[True, False]] * 2  # 80 of the first block's keys, 16 of the second's
    assert blocks([[0, 0, 1, 0]] * 4, 64, 80) == [[False, True]] * 2
    assert blocks([[0, 1, 0, 0]] + [[0] * 4] * 3, 64, 80)[0] == [True, False]  # less than half, but the most
    for rows_, keys, seqlen in ((96, 128, 256), (64, 72, 256), (64, 128, 200)):
        with pytest.raises(Missing, match=f"{rows_} rows and {keys} keys of {seqlen} tokens"):
            peers.in_flex_blocks(KeptTiles(torch.ones(1, 1, 4, 2, dtype=torch.bool), rows_, keys), seqlen)


@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_a_window_is_no_case_for_pytorchs_attention(name):
    q = torch.zeros(1, 256, 2, 64)
    with pytest.raises(Missing, match="window"):
        peers.PEERS[name](SHAPE._replace(window_left=10), q, q, q, None)


@pytest.mark.parametrize("name, packs", [("fa4", None), ("fa4-unpacked", False)])
def test_flash_attention_4_packs_heads_as_it_chooses_or_not_at_all(name, packs, monkeypatch):
    asked = []
    interface = types.SimpleNamespace(flash_attn_func=lambda *_, pack_gqa, **__: asked.append(pack_gqa))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", interface)
    peers.PEERS[name](SHAPE, None, None, None, None)()
    assert asked == [packs]
    with pytest.raises(Missing, match="no query heads to pack"):
        peers.PEERS["fa4-unpacked"](SHAPE._replace(heads_kv=2), None, None, None, None)


CUDNN_SAYS = "cuDNN Frontend error: [cudnn_frontend] Error: No execution plans support the graph."


@pytest.mark.parametrize("refusal", [None, CUDNN_SAYS], ids=["by PyTorch", "by cuDNN"])
def test_a_backend_that_does_not_take_a_shape_is_missing_rather_than_failed(tmp_path, quick, monkeypatch, refusal):
    def refuses(*_, **__):
        raise RuntimeError(refusal)

    if refusal is not None:
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuses)
    run = make_bench(tmp_path, ["cudnn"])
    run.run("tiny", SHAPE, None)
    assert not run.failures and len(run.missing) == 1
    assert "tiny, dense: cudnn: PyTorch" in run.missing[0] and "CUDNN_ATTENTION" in run.missing[0]


# ---- The command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["decode", "--case", "d128-2k-causal"], "unknown case 'd128-2k-causal'; there are b1-4k-32q8kv"),
        (["decode", "--peers", "cudnn"], "unknown peer cudnn; there are copy, flash, fa4, flashinfer"),
        (["prefill", "--case", "none"], "unknown case 'none'; there are d128-2k-causal"),
        (["prefill", "--case", "d128-2k-causal,x,y"], "unknown case 'x, y'; there are"),
        (["prefill", "--case", ""], "unknown case ''; there are"),
        (["prefill", "--peers", "cudnn,xformers"], "unknown peer xformers; there are cudnn, flash, fa4, fa4-unpacked"),
        (["prefill", "--sparsity", "0,x"], "not a list of numbers"),
        (["prefill", "--sparsity", "1"], "in [0, 1)"),
        (["backward"], "invalid choice"),
    ],
)
def test_requests_that_make_no_sense_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        bench.main(arguments)
    assert exit_.value.code == 2 and message in capsys.readouterr().err


@pytest.fixture
def emulated_gpu(monkeypatch):
    """torch's "cuda" device, played by the emulator, and times that say nothing."""
    pytest.importorskip("cutlass")
    from cute_sparse import dispatch, emulator, targets

    for name, value in dict(FLUSH_BYTES=64, LOAD_MS=0.0, WARMUP_RUNS=1, ROUNDS_MIN=1, ROUNDS_MAX=1).items():
        monkeypatch.setattr(timing, name, value)
    monkeypatch.setattr(dispatch, "_plans", {})
    targets.gpu_target.cache_clear()
    with emulator.device("sm_90a", torch_cuda=True):
        yield
    targets.gpu_target.cache_clear()


@pytest.mark.parametrize(
    "op, case, shape, peer, metric",
    [
        ("prefill", "small-d64", SHAPE, "flash", "rate"),
        ("decode", "decode-small-d64", decode.DecodeShape((300, 65), 2, 1, 64, 64, 64), "copy", "bandwidth"),
    ],
    ids=["prefill", "decode"],
)
def test_the_whole_command_runs_on_an_emulated_gpu(op, case, shape, peer, metric, tmp_path, emulated_gpu, monkeypatch):
    monkeypatch.setitem(bench.CASES_OF[op], case, shape)
    assert bench.main([op, "--case", case, "--peers", peer, "--out", str(tmp_path)]) == 0
    found = {(row.provider, row.metric) for row in rows.read(tmp_path / f"{op}.jsonl")}
    assert {(name, of_time) for name in ("cute_sparse", peer) for of_time in ("time", metric)} <= found
    assert ("cute_sparse", "error") in found


def test_several_cases_run_in_their_order_and_what_was_compiled_for_one_is_forgotten(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(bench, "gpu_name", lambda: "Some GPU")
    monkeypatch.setattr(timing, "EventTimer", GivenTimer)
    monkeypatch.setattr(bench.Bench, "run", lambda self, name, shape, sparsities: events.append(name))
    monkeypatch.setattr(bench, "forget_compiled", lambda: events.append("forgotten"))
    assert bench.main(["prefill", "--case", "small-d64,d128-2k-causal", "--out", str(tmp_path)]) == 0
    assert events == ["small-d64", "forgotten", "d128-2k-causal", "forgotten"]


def test_flex_attention_compiles_anew_only_where_it_was_compiled(monkeypatch):
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    peers.forget_compiled()
    assert resets == []
    peers._compiled_flex()
    peers.forget_compiled()
    peers.forget_compiled()
    assert resets == [1]


def test_without_a_gpu_the_bench_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["prefill", "--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_commit_is_told_or_found_or_a_digest_of_the_sources(monkeypatch):
    monkeypatch.setenv(bench.COMMIT_VARIABLE, "given")
    assert bench.find_commit() == "given"
    monkeypatch.delenv(bench.COMMIT_VARIABLE)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert bench.find_commit() == f"sources-{bench.source_digest()[:12]}"
