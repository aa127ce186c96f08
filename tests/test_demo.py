"""The demo's input is structured as it says, and its rows are what the calls count; on the reference."""

from __future__ import annotations

import torch

import cute_sparse
from cute_sparse import demo
from cute_sparse.workloads import SINK_TOKENS, in_shuffled_pages, structured_qkv


def nothing(call) -> dict:
    return {}


def test_structured_input_has_sinks_locality_and_a_needle():
    seqlen = 256
    q, k, v = structured_qkv(1, seqlen, 4, 2, 64, head_dim_v=32, dtype=torch.float32)
    assert q.shape == (1, seqlen, 4, 64) and k.shape == (1, seqlen, 2, 64) and v.shape == (1, seqlen, 2, 32)
    logits = torch.einsum("qhd,khd->hqk", q[0], k[0].repeat_interleave(2, dim=1)) / 64**0.5
    late, at = logits[:, -seqlen // 8 :], seqlen // 3  # the queries that look for the needle
    sinks, beside_sinks = late[:, :, :SINK_TOKENS].mean(), late[:, :, SINK_TOKENS : 2 * SINK_TOKENS].mean()
    assert (sinks - beside_sinks - 14).abs() < 1
    assert (late[:, :, at].mean() - late[:, :, [at - 1, at + 1]].mean() - 18).abs() < 1
    own = logits.diagonal(dim1=1, dim2=2).mean(dim=1)  # a key at the query's own position, per head
    torch.testing.assert_close(own, torch.linspace(0.5, 1.5, 4) * 20, rtol=0, atol=1.0)
    assert (own > late[:, :, at + 1].mean(dim=1) + 5).all()
    step, _, _ = structured_qkv(1, seqlen, 4, 2, 64, seqlen_q=1)
    assert step.shape == (1, 1, 4, 64)


def test_shuffled_pages_hold_the_same_tokens():
    q, k, v = structured_qkv(3, 100, 4, 2, 32, seqlen_q=1)
    lengths = torch.tensor([100, 37, 64], dtype=torch.int32)
    k_cache, v_cache, page_table = in_shuffled_pages(k, v, 16)
    assert not torch.equal(page_table.flatten(), torch.arange(21, dtype=torch.int32))
    paged = cute_sparse.decode(q, k_cache, v_cache, seqused_k=lengths, page_table=page_table)
    torch.testing.assert_close(paged, cute_sparse.decode(q, k, v, seqused_k=lengths), rtol=0, atol=0)


def test_larger_thresholds_skip_more_and_cost_a_little():
    prefill, decode = demo.structured_rows(768, "cpu", nothing), demo.decode_rows(4096, "cpu", nothing)
    for rows in (prefill, decode):
        assert [row.label for row in rows] == ["dense", "threshold 0.001", "threshold 0.01", "threshold 0.05"]
        skipped, errors = [row.skipped for row in rows], [row.error for row in rows]
        assert skipped[0] == errors[0] == 0 and 0.1 < skipped[1] < skipped[2] < skipped[3] < 0.9
        assert all(0 < error < 0.02 for error in errors[1:])
    assert decode[0].v_bytes_not_read == 0 < decode[1].v_bytes_not_read < decode[3].v_bytes_not_read


def test_a_table_of_counts_and_one_of_times(capsys):
    counted = [
        demo.Row("dense", 0.0, 0.0, macs=10**8, exponentials=2000, loaded_bytes=3_000_000, instructions=4000),
        demo.Row("skipping", 0.5, 1e-3, macs=6 * 10**7, exponentials=1000, loaded_bytes=2_000_000, instructions=3000),
    ]
    demo.print_rows("counted", counted, "error")
    assert "50.0%      1.00e-03         0.060         1,000          2.00         3,000          0.75" in (
        capsys.readouterr().out
    )
    timed = [demo.Row("dense", 0.0, 0.0, milliseconds=3.0), demo.Row("threshold 0.1", 0.5, 1e-3, milliseconds=2.0)]
    demo.print_rows("timed", timed, "error")
    assert "2.000         1.50x" in capsys.readouterr().out
