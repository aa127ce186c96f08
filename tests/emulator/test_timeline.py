"""The timeline command: a script's launch as a Chrome trace, and what it refuses."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest

from cute_sparse.emulator import timeline

# A kernel that loads, waits, computes and stores; the script knows nothing of the emulator but its launcher of texts.
SCRIPT = """
import torch
from cute_sparse.emulator.text import module, run_ptx
from cute_sparse.emulator import devices

BODY = '''
  mov.u32 %r0, %tid.x; mov.u32 %r2, smem; setp.eq.u32 %p0, %r0, 0; ld.param.b64 %d0, [data];
  @%p0 mbarrier.init.shared.b64 [%r2], 1;
  fence.mbarrier_init.release.cluster;
  bar.sync 0;
  @!%p0 bra LOADED;
  mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 4096;
  cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2+1024], [%d0], 2048, [%r2];
  cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2+3072], [%d0], 2048, [%r2];
LOADED:
WAIT: mbarrier.try_wait.parity.shared.b64 %p1, [%r2], 0; @!%p1 bra WAIT;
  ld.shared.f32 %f0, [%r2+1024];
  ex2.approx.ftz.f32 %f1, %f0; ex2.approx.ftz.f32 %f2, %f1;
  mov.u32 %r3, %ctaid.x; mad.lo.u32 %r0, %r3, 64, %r0; mul.wide.u32 %d1, %r0, 4; add.s64 %d0, %d0, %d1; st.global.f32 [%d0+8192], %f2;
'''
REGISTERS = ".reg .pred %p<4>; .reg .b32 %r<8>; .reg .f32 %f<4>; .reg .b64 %d<4>;"
SHARED = ".extern .shared .align 1024 .b8 smem[];"
ptx = module(ARCH, BODY, parameters=".param .u64 data", registers=REGISTERS, shared=SHARED)
data = torch.zeros(4096)
run_ptx(devices._entered, ptx, [data], grid=(2, 1, 1), block=(64, 1, 1), shared_bytes=8192)
run_ptx(devices._entered, ptx.replace("test(", "other("), [data], block=(32, 1, 1), shared_bytes=8192)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.replace("ARCH", repr("sm_90a")))
    return path


def run(script, out, *more: str) -> int:
    return timeline.main(["--arch", "sm_90a", "--out", str(out), *more, str(script)])


def events_of(trace: dict, phase: str) -> list[dict]:
    return [event for event in trace["traceEvents"] if event["ph"] == phase]


def test_waits_exponentials_and_loads_are_on_their_tracks(script, tmp_path, capsys):
    out = tmp_path / "timeline.json"
    assert run(script, out) == 0
    assert "modelled clocks on H200" in capsys.readouterr().out
    trace = json.loads(out.read_text())
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events_of(trace, "M") if e["name"] == "thread_name"}
    assert "warp 0: exponentials, load, store" in names.values()
    assert "warp 1: exponentials, store" in names.values()

    on = defaultdict(list)
    for event in events_of(trace, "X"):
        on[names[event["pid"], event["tid"]]].append(event)
    begins, ends = ({e["id"]: e["ts"] for e in events_of(trace, phase)} for phase in "be")
    assert len(begins) == len(ends) == 2  # the two copies
    loaded = max(ends.values())
    for warp, role in ((0, "exponentials, load, store"), (1, "exponentials, store")):
        (wait,) = [e for e in on[f"warp {warp}: {role}"] if "mbarrier" in e["name"]]
        assert "PTX line" in wait["name"]
        assert wait["ts"] + wait["dur"] == loaded
        (burst,) = on[f"warp {warp}, its exponentials"]
        assert burst["ts"] > loaded
    assert trace["otherData"]["clocks"] >= loaded


def test_a_launch_is_chosen_by_its_kernels_name_and_a_cluster_by_its_number(script, tmp_path):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    assert run(script, first, "--cluster", "1") == 0
    assert json.loads(first.read_text())["otherData"]["kernel"] == "test"
    assert run(script, second, "--kernel", "oth") == 0
    assert json.loads(second.read_text())["otherData"]["kernel"] == "other"
    assert len(events_of(json.loads(second.read_text()), "M")) < len(events_of(json.loads(first.read_text()), "M"))


@pytest.mark.parametrize("more", [("--kernel", "nothing"), ("--cluster", "7")])
def test_what_no_launch_has_is_told_with_what_was_seen(script, tmp_path, capsys, more):
    assert run(script, tmp_path / "timeline.json", *more) == 1
    told = capsys.readouterr().err
    assert "test with grid (2, 1, 1)" in told and "other with grid (1, 1, 1)" in told
    assert not (tmp_path / "timeline.json").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--chip", "B200"), "H100, H200"),
        (("--cluster", "-1"), "at least 0"),
        (("--arch", "sm_80"), "sm_90a"),
        (("--out", "/nowhere/timeline.json"), "no such folder"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(script, tmp_path, capsys, more, told):
    with pytest.raises(SystemExit) as left:
        run(script, tmp_path / "timeline.json", *more)
    assert left.value.code == 2
    assert told in capsys.readouterr().err
