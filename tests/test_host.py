"""profiling.host: what it measures, without a GPU."""

from __future__ import annotations

import pytest

from profiling import host, timing


def test_both_starts_of_every_mode_are_measured(monkeypatch):
    caches = []

    def measured(device, arch, cache, runs):
        caches.append(cache)
        return {mode: {"first_call": [2.0], "host_time": [7.0, 8.0, 9.0]} for mode in host.MODES}

    monkeypatch.setattr(host, "in_a_fresh_process", measured)
    found: dict[tuple[str, str], timing.Quantiles] = {}
    host.run(lambda mode, metric, quantiles: found.update({(mode, metric): quantiles}), "cuda", "sm_90a")
    assert {mode for mode, _ in found} == {f"{mode}, {start}" for mode in host.MODES for start in ("cold", "disk")}
    assert found["dense, disk", "host_time"].p50 == 8.0
    assert len(caches) == 2 and caches[0] == caches[1]


def test_the_second_process_compiles_nothing(tmp_path):
    def kernels() -> dict:
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.o")}

    first = host.in_a_fresh_process("cpu", "sm_90a", str(tmp_path), 1)
    compiled = kernels()
    assert len(compiled) == len(host.MODES)
    assert first.keys() == host.MODES.keys()
    assert all(metrics.keys() == {"import", "first_call", "host_time"} for metrics in first.values())
    host.in_a_fresh_process("cpu", "sm_90a", str(tmp_path), 1)
    assert kernels() == compiled


def test_a_process_that_fails_is_shown():
    with pytest.raises(RuntimeError, match="sm_70"):
        host.in_a_fresh_process("cpu", "sm_70", "/nowhere", 1)


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(host.torch.cuda, "is_available", lambda: False)
    assert host.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_waiting_for_the_device_is_not_part_of_a_warm_call():
    events = []
    found = host.warm_us(lambda: events.append("call"), lambda: events.append("finish"), runs=2)
    assert len(found) == 2
    assert events == ["finish", *["call"] * host.CALLS] * 2 + ["finish"]
