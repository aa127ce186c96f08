"""The measuring of decode: cases, bytes, inputs, checks, and rows of a case, with a clock that is given."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch

from cute_sparse.reference import KEPT
from profiling import bench, decode, rows, timing
from profiling.decode import DecodeInputs, DecodeShape, KeptDecodeTiles
from tests.test_profiling import ORIGIN, GivenTimer

RAGGED = DecodeShape((300, 64, 1), 4, 2, 64, 32, page_size=16)
SAME = DecodeShape((700, 700), 4, 1, 64, 64, page_size=64)
CONTIGUOUS = DecodeShape((200, 200), 4, 2, 64, 64)


@pytest.fixture
def quick(monkeypatch):
    """No GPU's state, few rounds, and ours is the reference."""
    monkeypatch.setattr(timing, "state_under_load", lambda call, ms: {"sm_clock": 1980.0})
    monkeypatch.setattr(timing, "rounds", lambda ms: 3)


def test_the_cases_are_those_that_were_asked_for():
    for heads in ("32q8kv", "64q4kv"):
        for pages in ("", "-pages"):
            assert {f"b{batch}-{k}k-{heads}{pages}" for batch, k in decode.SIZES} <= set(decode.TABLES)
        one = decode.TABLES[f"one-256k-127-1k-{heads}-pages"]
        assert one.batch == 128 and max(one.lengths) == 256 * 1024 and set(one.lengths[1:]) == {1024}
    batches, thousands = zip(*decode.SIZES, strict=True)
    assert {1, 128} <= set(batches) and {4, 512} <= set(thousands)
    assert all(shape.head_dim == 128 for shape in decode.TABLES.values())
    assert max(shape.kv_bytes for shape in decode.TABLES.values()) < 20e9


def test_bytes_count_k_and_v_of_every_sequence_once():
    assert RAGGED.kv_bytes == 365 * 2 * (64 + 32) * 2


@pytest.mark.parametrize("shape", [RAGGED, SAME, CONTIGUOUS], ids=["ragged", "pages", "contiguous"])
def test_random_inputs_have_the_shape(shape):
    inputs = decode.random_inputs(shape, torch.bfloat16, "cpu")
    assert inputs.q.shape == (shape.batch, 1, shape.heads_q, shape.head_dim)
    assert inputs.seqused_k.tolist() == list(shape.lengths)
    if not shape.page_size:
        assert inputs.page_table is None and inputs.k_cache.shape == (2, 200, 2, 64)
        return
    used = [-(-length // shape.page_size) for length in shape.lengths]
    numbers = [page for row, count in zip(inputs.page_table.tolist(), used, strict=True) for page in row[:count]]
    assert sorted(numbers) == list(range(sum(used))) and numbers != sorted(numbers)
    assert inputs.v_cache.shape == (sum(used), shape.page_size, shape.heads_kv, shape.head_dim_v)


def test_structured_inputs_are_the_same_tokens_in_pages_or_not():
    paged = decode.structured_inputs(SAME, torch.bfloat16, "cpu")
    plain = decode.structured_inputs(SAME._replace(page_size=0), torch.bfloat16, "cpu")
    assert torch.equal(decode.ours(paged)(), decode.ours(plain)())
    with pytest.raises(ValueError, match="one length"):
        decode.structured_inputs(RAGGED, torch.bfloat16, "cpu")


@pytest.mark.parametrize("shape", [RAGGED, CONTIGUOUS, SAME._replace(seqlen_q=3)])
def test_the_check_accepts_attention_and_nothing_else(shape):
    inputs = decode.random_inputs(shape, torch.bfloat16, "cpu")
    out = decode.ours(inputs)()
    error, rounded = decode.sampled_error(shape, inputs, out, None)
    assert error <= 2 * rounded < 0.02
    longer = inputs._replace(seqused_k=(inputs.seqused_k - 5).clamp(min=1))
    error, rounded = decode.sampled_error(shape, inputs, decode.ours(longer)(), None)
    assert error > 2 * rounded
    error, rounded = decode.sampled_error(shape, inputs, out * 1.02, None)
    assert error > 2 * rounded


def test_the_check_of_skipping_is_against_the_kept_tiles():
    inputs = decode.structured_inputs(SAME._replace(seqlen_q=3), torch.bfloat16, "cpu")
    got = decode.ours(inputs)(threshold=0.5, return_stats=True)
    kept = KeptDecodeTiles(got.stats.skip_map == KEPT, got.stats.geometry.tile_rows, got.stats.geometry.tile_n)
    assert not kept.keep.all()
    shape = SAME._replace(seqlen_q=3)
    error, rounded = decode.sampled_error(shape, inputs, got.out, kept)
    assert error <= 2 * rounded
    fewer = kept._replace(keep=kept.keep & (torch.arange(kept.keep.shape[-1]) != kept.keep.shape[-1] - 1))
    error, rounded = decode.sampled_error(shape, inputs, got.out, fewer)
    assert not error <= 2 * rounded


def test_a_case_gives_rows_of_time_bandwidth_and_error(tmp_path, quick):
    run = bench.DecodeBench(rows.Writer(tmp_path / "decode.jsonl"), ORIGIN, GivenTimer(), "cpu", ["copy", "flash"])
    run.run("tiny", CONTIGUOUS, None)
    assert not run.failures
    found = {(row.provider, row.metric): row for row in rows.read(tmp_path / "decode.jsonl")}
    assert all(row.op == "decode" and row.case == "tiny" for row in found.values())
    for provider in ("cute_sparse", "copy"):
        assert found[provider, "time"].p50 == 1.0
        assert found[provider, "bandwidth"].p50 == pytest.approx(CONTIGUOUS.kv_bytes / 1e9)
    assert found["cute_sparse", "error"].p50 < 0.01 and ("copy", "error") not in found


def test_skipping_gives_rows_of_the_threshold_and_the_share_that_it_skips(tmp_path, quick):
    run = bench.DecodeBench(rows.Writer(tmp_path / "decode.jsonl"), ORIGIN, GivenTimer(), "cpu", [])
    run.run("tiny", SAME._replace(lengths=(6400, 6400)), (0.0, 0.8))
    assert not run.failures
    found = {(row.mode, row.metric): row for row in rows.read(tmp_path / "decode.jsonl") if row.provider != "gpu"}
    assert abs(found["sparsity 0.8", "sparsity"].p50 - 0.8) <= bench.SPARSITY_TOLERANCE
    assert found["sparsity 0", "sparsity"].p50 < 0.01
    assert found["sparsity 0.8", "error"].p50 < found["sparsity 0.8", "error_dense"].p50
    assert ("structured, dense", "bandwidth") in found


def test_a_small_case_can_skip_the_share_that_memory_is_checked_with(tmp_path, quick):
    run = bench.DecodeBench(rows.Writer(tmp_path / "decode.jsonl"), ORIGIN, GivenTimer(), "cpu", [])
    run.run("small", decode.SMALL["decode-small-d64"], (0.25,))
    assert not run.failures


def test_a_wrong_result_is_not_timed(tmp_path, quick, monkeypatch):
    def wrong(shape: DecodeShape, inputs: DecodeInputs):
        return lambda: decode.ours(inputs)() * 1.05

    monkeypatch.setitem(decode.PEERS, "fa4", wrong)
    run = bench.DecodeBench(rows.Writer(tmp_path / "decode.jsonl"), ORIGIN, GivenTimer(), "cpu", ["fa4"])
    run.run("tiny", CONTIGUOUS, None)
    assert len(run.failures) == 1 and "Wrong" in run.failures[0]
    assert all(row.provider != "fa4" for row in rows.read(tmp_path / "decode.jsonl"))


@pytest.mark.parametrize("shape", [RAGGED, CONTIGUOUS._replace(seqlen_q=2)])
def test_pytorch_has_no_such_decode(shape):
    inputs = decode.random_inputs(shape, torch.bfloat16, "cpu")
    with pytest.raises(decode.Missing, match="PyTorch"):
        decode.PEERS["flash"](shape, inputs)


@pytest.mark.parametrize("capability, num_splits", [((9, 0), 1), ((10, 0), 0)])
def test_flash_attention_4_is_asked_to_split_only_where_it_can(capability, num_splits, monkeypatch):
    asked = []
    interface = types.SimpleNamespace(flash_attn_varlen_func=lambda *_, num_splits, **__: asked.append(num_splits))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", interface)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    decode.PEERS["fa4"](CONTIGUOUS, decode.random_inputs(CONTIGUOUS, torch.bfloat16, "cpu"))()
    assert asked == [num_splits]


def test_the_copy_moves_as_many_bytes_as_k_and_v_have():
    inputs = decode.random_inputs(CONTIGUOUS, torch.bfloat16, "cpu")
    copied = decode.PEERS["copy"](CONTIGUOUS, inputs)()
    assert 2 * copied.nbytes == CONTIGUOUS.kv_bytes and math.isfinite(copied.sum())


def test_without_a_gpu_the_decode_bench_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["decode", "--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err and not list(tmp_path.iterdir())
