"""make gpu-check, with a clock and a runner that are given, and with processes that need no GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cute_sparse import cache
from profiling import bench, decode, gpu_check, rows, warm
from profiling.gpu_check import CUT_OFF, FAILED, PASSED, TIMED_OUT, UNAVAILABLE, State, Step


class FakeGpu:
    """Steps take the seconds and end with the status that they are told; time is what they took."""

    def __init__(self, seconds: dict[str, float], status: dict[str, int | None] | None = None) -> None:
        self.seconds, self.status = seconds, status or {}
        self.now, self.ran = 0.0, []

    def clock(self) -> float:
        return self.now

    def run(self, step: Step, limit_s: float, folder) -> int | None:
        self.ran.append(step.name)
        took = self.seconds.get(step.name, 10.0)
        self.now += min(took, limit_s)
        return None if took > limit_s else self.status.get(step.name, 0)

    def check(self, steps, state, folder, budget_s=540.0, again=None):
        self.ran.clear()
        gpu_check.check(steps, state, folder, budget_s, self.run, self.clock, again)
        return list(self.ran)


def three(limit_s: float = 100.0) -> list[Step]:
    return [Step(name, ("true",), limit_s) for name in ("first", "second", "third")]


def test_everything_runs_in_order_and_what_failed_stops_nothing(tmp_path, capsys):
    gpu, state = FakeGpu({}, {"second": 1}), State(tmp_path, "s")
    assert gpu.check(three(), state, tmp_path) == ["first", "second", "third"]
    assert [state.status(step) for step in three()] == [PASSED, FAILED, PASSED]
    assert "second: failed after 10 s" in capsys.readouterr().out
    assert gpu_check.summary(three(), state, tmp_path) == 1


def test_the_end_of_what_a_failed_step_printed_is_shown(tmp_path, capsys):
    quiet, loud = Step("quiet", ("sh", "-c", "kill -9 $$"), 60.0), Step("loud", ("sh", "-c", "seq 1100; exit 4"), 60.0)
    state = State(tmp_path, "s")
    gpu_check.check([loud], state, tmp_path, 540.0)
    out = capsys.readouterr().out
    assert out.startswith("loud: failed after ") and out.splitlines()[0].endswith("s, exit status 4")
    assert "    1100" in out and "    1089" in out and "1088" not in out
    gpu_check.check([quiet], state, tmp_path, 540.0)
    (told,) = filter(None, capsys.readouterr().out.splitlines())
    assert told.startswith("quiet: failed") and told.endswith("exit status -9")


def test_the_next_call_goes_on_where_the_budget_ended(tmp_path):
    gpu = FakeGpu({"first": 90.0, "second": 90.0, "third": 90.0})
    assert gpu.check(three(), State(tmp_path, "s"), tmp_path, budget_s=200) == ["first", "second"]
    assert gpu_check.summary(three(), State(tmp_path, "s"), tmp_path) == 3
    assert gpu.check(three(), State(tmp_path, "s"), tmp_path, budget_s=200) == ["third"]
    assert gpu.check(three(), State(tmp_path, "s"), tmp_path) == []
    assert gpu_check.summary(three(), State(tmp_path, "s"), tmp_path) == 0


def test_a_call_never_takes_longer_than_its_budget(tmp_path):
    gpu = FakeGpu({name: 1e9 for name in ("first", "second", "third")})
    gpu.check(three(), State(tmp_path, "s"), tmp_path, budget_s=270)
    assert gpu.ran == ["first", "second", "third"] and gpu.now == 270
    assert gpu_check.summary(three(), State(tmp_path, "s"), tmp_path) == 3


def test_a_step_that_the_budget_cut_off_is_tried_again_in_its_place(tmp_path):
    gpu = FakeGpu({"first": 90.0, "second": 90.0})
    assert gpu.check(three(), State(tmp_path, "s"), tmp_path, budget_s=150) == ["first", "second"]
    assert [State(tmp_path, "s").status(step) for step in three()] == [PASSED, CUT_OFF, None]
    assert gpu_check.summary(three()[:2], State(tmp_path, "s"), tmp_path) == 3
    assert gpu.check(three(), State(tmp_path, "s"), tmp_path) == ["second", "third"]
    assert gpu_check.summary(three(), State(tmp_path, "s"), tmp_path) == 0


def test_a_step_beyond_its_limit_is_tried_again_after_those_that_never_ran(tmp_path):
    gpu = FakeGpu({"first": 1e9})
    gpu.check(three()[:1], State(tmp_path, "s"), tmp_path)
    assert State(tmp_path, "s").status(three()[0]) == TIMED_OUT
    assert FakeGpu({}).check(three(), State(tmp_path, "s"), tmp_path) == ["second", "third", "first"]
    assert State(tmp_path, "s").status(three()[0]) == PASSED


def test_a_failed_step_is_run_again_on_request_only(tmp_path):
    FakeGpu({}, {"second": 1}).check(three(), State(tmp_path, "s"), tmp_path)
    assert FakeGpu({}).check(three(), State(tmp_path, "s"), tmp_path) == []
    assert FakeGpu({}).check(three(), State(tmp_path, "s"), tmp_path, again="sec") == ["second"]
    assert State(tmp_path, "s").status(three()[1]) == PASSED


def test_on_a_bare_machine_the_kernels_are_compiled_before_what_is_left(tmp_path):
    warm_, *others = steps = [Step(gpu_check.WARM, ("true",), 100.0), *three()]
    FakeGpu({}).check([warm_, others[0]], State(tmp_path, "s"), tmp_path)
    state = State(tmp_path, "s")
    assert state.to_do(steps) == others[1:]
    assert state.to_do(steps, cold=True) == [warm_, *others[1:]]
    FakeGpu({}).check(steps, state, tmp_path)
    assert state.to_do(steps, cold=True) == []


def test_a_machine_is_cold_until_a_kernel_is_in_its_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "directory", lambda: tmp_path)
    assert gpu_check.is_cold()
    (tmp_path / "prefill.o").write_bytes(b"")
    assert not gpu_check.is_cold()
    monkeypatch.setattr(cache, "directory", lambda: None)
    assert not gpu_check.is_cold()


def test_other_sources_begin_anew(tmp_path):
    FakeGpu({}).check(three(), State(tmp_path, "s"), tmp_path)
    assert FakeGpu({}).check(three(), State(tmp_path, "changed"), tmp_path) == ["first", "second", "third"]


def test_a_step_whose_tool_is_missing_is_told_and_left_out(tmp_path, capsys):
    steps = [Step("profile", ("true",), 10.0, "no-such-profiler"), *three()]
    state = State(tmp_path, "s")
    assert FakeGpu({}).check(steps, state, tmp_path) == ["first", "second", "third"]
    assert state.status(steps[0]) == UNAVAILABLE
    assert "no-such-profiler is not on the PATH" in capsys.readouterr().out
    assert gpu_check.summary(steps, state, tmp_path) == 0
    assert "unavailable: 1 (profile)" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{", "[]", '{"first": {"status": "passed"}}', '{"first": 1}'])
def test_a_state_of_another_version_is_an_error_and_kept(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(ValueError, match="remove it to begin anew"):
        State(tmp_path, "s")
    assert (tmp_path / "state.json").read_text() == content


# ---- Processes -----------------------------------------------------------------------------------------------------


def test_a_process_writes_to_the_log_and_gets_its_folders(tmp_path):
    code = "import os, sys; print(os.environ['MINE'], sys.argv[1], os.path.isdir(sys.argv[2])); sys.exit(5)"
    step = Step("p", (sys.executable, "-c", code, "{out}/x", "{scratch}"), 60.0, environment=(("MINE", "set"),))
    assert gpu_check.run_process(step, 60.0, tmp_path) == 5
    assert gpu_check.run_process(Step("q", ("sh", "-c", "echo to stderr >&2"), 60.0), 60.0, tmp_path) == 0
    log = (tmp_path / "log.txt").read_text()
    assert f"set {tmp_path}/x True" in log and "==== q: sh -c" in log and "\nto stderr\n" in log


def test_a_process_at_its_limit_ends_with_its_children(tmp_path):
    step = Step("p", ("sh", "-c", "echo begun; sleep 300 & echo $! > '{out}/child'; wait"), 60.0)
    begin = time.monotonic()
    assert gpu_check.run_process(step, 3.0, tmp_path) is None
    assert time.monotonic() - begin < 60
    assert "begun" in (tmp_path / "log.txt").read_text()
    child = int((tmp_path / "child").read_text())
    assert ended(child)


def test_a_check_that_is_ended_ends_its_step_which_is_to_do(tmp_path, monkeypatch):
    """As by who lent the machine; a step that outlived it would be timed beside the next one."""
    step = Step("p", ("sh", "-c", "sleep 300 & echo $! > '{out}/child'; wait"), 60.0)
    before = signal.signal(signal.SIGTERM, gpu_check._leave)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    try:
        with pytest.raises(SystemExit) as left:
            gpu_check.check([step], State(tmp_path, "s"), tmp_path, 540.0)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left.value.code == 128 + signal.SIGTERM
    assert ended(int((tmp_path / "child").read_text()))
    assert State(tmp_path, "s").to_do([step]) == [step]


def test_a_step_belongs_to_the_session_of_the_check(tmp_path):
    step = Step("p", (sys.executable, "-c", "import os; print(os.getsid(0), os.getpgrp() == os.getpid())"), 60.0)
    assert gpu_check.run_process(step, 60.0, tmp_path) == 0
    assert f"\n{os.getsid(0)} True\n" in (tmp_path / "log.txt").read_text()


def test_a_killed_process_that_does_not_end_holds_nothing_up(monkeypatch):
    class Stuck:
        pid = 2**22 + 1  # above any

        def wait(self, seconds):
            raise subprocess.TimeoutExpired("stuck", seconds)

    gpu_check._end_group(Stuck())


def ended(pid: int) -> bool:
    """Gone, or a zombie that nobody has waited for."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.1)
    return False


# ---- The folder ----------------------------------------------------------------------------------------------------


def test_an_empty_folder_begins_as_the_earlier_one_and_a_used_one_stays(tmp_path):
    earlier, folder = tmp_path / "earlier", tmp_path / "out"
    earlier.mkdir()
    (earlier / "state.json").write_text("{}")
    (earlier / "prefill.jsonl").write_text("rows\n")
    (earlier / "rate.png").write_text("a plot")
    gpu_check.begin_folder(folder, earlier)
    assert sorted(path.name for path in folder.iterdir()) == ["prefill.jsonl", "state.json"]
    (folder / "prefill.jsonl").write_text("more rows\n")
    gpu_check.begin_folder(folder, earlier)
    assert (folder / "prefill.jsonl").read_text() == "more rows\n"


def test_too_many_or_too_large_files_are_named(tmp_path, monkeypatch):
    assert gpu_check.too_much(tmp_path) == []
    monkeypatch.setattr(gpu_check, "FILE_BYTES_MAX", 100)
    (tmp_path / "big").write_bytes(bytes(100))
    for index in range(8):
        (tmp_path / str(index)).write_text("")
    assert gpu_check.too_much(tmp_path) == ["big has 100 bytes", "9 files, more than 8"]


def test_a_log_that_grows_keeps_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "LOG_BYTES_MAX", 100)
    log = tmp_path / "log.txt"
    log.write_bytes(b"x" * 200 + b"the end")
    gpu_check.shorten(log)
    assert log.read_bytes().endswith(b"the end") and log.stat().st_size <= 100


# ---- The steps and the command -------------------------------------------------------------------------------------


def cases_of(step: Step) -> list[str]:
    """Of a step that benchmarks."""
    command = list(step.command)
    return command[command.index("--case") + 1].split(",") if "--case" in command else []


def test_the_steps_are_ordered_by_worth_and_cover_every_table():
    steps = gpu_check.steps("python3")
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert names[:6] == [
        "warm", "tests", "bench-headline-prefill", "bench-headline-decode", "tests-silicon",
        "bench-sparsity-d128-64k-causal",
    ]  # fmt: skip
    assert sum(step.limit_s for step in steps[:4]) <= gpu_check.BUDGET_S
    timed = [case for step in steps if step.name.startswith("bench-") for case in cases_of(step)]
    dense = [case for step in steps if step.name.startswith("bench-") and "--sparsity" not in step.command
             and step.name != "bench-headline-flex" for case in cases_of(step)]  # fmt: skip
    assert sorted(dense) == sorted([*bench.TABLES, *decode.TABLES])
    assert {*bench.LONG, *decode.LONG} <= set(timed)
    checked = [case for step in steps if step.name.startswith("memcheck") for case in cases_of(step)]
    assert sorted(checked) == sorted([*bench.SMALL, *decode.SMALL])
    first = [dense.index(case) for case in (*gpu_check.BENCH_CASES_BY_WORTH, *gpu_check.DECODE_CASES_BY_WORTH)]
    assert max(first) < len(first) + sum(map(len, gpu_check.HEADLINES.values()))
    for step in steps:
        assert step.limit_s <= gpu_check.BUDGET_S


def test_the_benchmarks_steps_are_requests_that_the_benchmark_takes():
    for step in gpu_check.steps("python3"):
        if "profiling.bench" in step.command:
            bench.parse(list(step.command[step.command.index("profiling.bench") + 1 :]))


BREAK_DOWN = """
import time
import pytest
import torch
from tests import conftest
conftest.GPU_TEST_S = 0.5

def lost():
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

@pytest.mark.gpu
def test_hangs(): time.sleep(20)

@pytest.mark.gpu
def test_breaks(monkeypatch):
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, lost
    lost()
"""


@pytest.mark.parametrize("name", ["test_hangs", "test_breaks"])
def test_a_gpu_test_that_hangs_or_breaks_its_process_ends_it(tmp_path, name):
    """In a process as pytest-xdist starts them, which then starts another: the other tests are spared."""
    path = tmp_path / "test_break_down.py"
    path.write_text(BREAK_DOWN)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "tests.conftest", "-p", "no:cacheprovider", "-k", name, path]
    environment = os.environ | {"PYTEST_XDIST_WORKER": "gw0"}
    done = subprocess.run(command, cwd=bench.ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "1 failed" not in done.stdout and "passed" not in done.stdout
    assert ("in test_hangs" in done.stderr) == (name == "test_hangs")  # where it hung


def test_every_file_with_tests_for_a_gpu_is_in_a_step():
    """By their text: collecting all tests takes long."""
    root = bench.ROOT / "tests"
    marked = {
        str(path.relative_to(bench.ROOT)) for path in root.rglob("test_*.py")
        if path.name != "test_gpu_check.py" and ("mark.gpu" in path.read_text() or "(runner" in path.read_text())
    }  # fmt: skip
    assert marked == {*gpu_check.GPU_TESTS, *gpu_check.SILICON_TESTS}


def test_the_kernels_of_every_timed_case_are_compiled_ahead():
    found = warm.calls()
    assert all(found.count(call) == 1 for call in found)
    shapes = bench.CASES | decode.CASES
    for step in gpu_check.steps("python3"):
        for name in cases_of(step):
            of_case = [call for call in found if call["head_dim"] == shapes[name].head_dim
                       and call["kind"] == ("prefill" if name in bench.CASES else "decode")]  # fmt: skip
            assert any(not call.get("threshold") for call in of_case)
            if "--sparsity" in step.command:
                assert {call.get("return_stats", False) for call in of_case if call.get("threshold")} == {False, True}


def test_what_does_not_compile_is_named_and_the_rest_is_compiled(monkeypatch, capsys):
    monkeypatch.setattr(warm, "ProcessPoolExecutor", lambda processes, context: ThreadPoolExecutor(processes))
    monkeypatch.setattr(warm, "compile_one", lambda arch, call: 1 / call["head_dim"])
    failures = warm.warm("sm_90a", [{"head_dim": 0}, {"head_dim": 8}], 3)
    assert failures == ["head_dim=0: ZeroDivisionError: division by zero"]
    assert "head_dim=8" in capsys.readouterr().out


def test_the_results_are_at_most_eight_files():
    written = {gpu_check.STATE, gpu_check.LOG, "host.jsonl", "prefill.jsonl", "decode.jsonl", "iket.pftrace", "ncu.txt"}
    assert len(written) <= gpu_check.FILES_MAX


def test_a_dry_run_prints_the_steps_and_runs_none(capsys, monkeypatch):
    monkeypatch.setattr(gpu_check, "run_process", None)
    assert gpu_check.main(["--dry-run"]) == 0
    out = capsys.readouterr().out
    assert all(step.name in out for step in gpu_check.steps())
    assert gpu_check.main(["--dry-run", "--only", "memcheck"]) == 0
    assert "bench-" not in capsys.readouterr().out


def test_requests_that_cannot_be_run_are_refused(capsys, monkeypatch, tmp_path):
    with pytest.raises(SystemExit) as exit_:
        gpu_check.main(["--only", "nothing"])
    assert exit_.value.code == 2 and "there are warm, tests, bench-headline" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_a_whole_call_with_a_given_gpu(tmp_path, monkeypatch, capsys):
    """From the command to the folder, with steps that need no GPU."""
    steps = [Step("good", ("sh", "-c", "echo fine > '{out}/ncu-x.txt'"), 60.0), Step("bad", ("false",), 60.0)]
    monkeypatch.setattr(gpu_check, "steps", lambda: steps)
    monkeypatch.setattr(bench, "gpu_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    assert gpu_check.main([]) == 1
    folder = tmp_path / "nvidia-h200"
    assert sorted(path.name for path in folder.iterdir()) == ["log.txt", "ncu-x.txt", "state.json"]
    state = json.loads((folder / "state.json").read_text())
    assert {name: value["status"] for name, value in state.items()} == {"good": "passed", "bad": "failed"}
    out = capsys.readouterr().out
    assert "failed: 1 (bad)" in out and f"results: {folder}" in out
