"""Everything a GPU can tell, the most worth first: python -m profiling.gpu_check [--budget SECONDS] [--out DIR]
[--only TEXT] [--again TEXT] [--dry-run]

Steps, each a process of its own with a time limit, its output in DIR/log.txt; one that fails does not stop the next:
  1. the benchmark's kernels are compiled, by all cores
  2. the tests marked gpu: every kernel case against the oracle
  3. the headlines: prefill and decode beside the peers; every result is checked against float32
  4. the emulator against silicon
  5. prefill at 64K and decode with tiles skipped, then the rest of prefill's tables and decode cases of most worth, a
     few a step
  6. compute-sanitizer on one case of every head dim, dense and skipping
  7. what a call costs the host
  8. Nsight Compute on one dense and one skipping case
  9. FlexAttention, with the block mask of the tiles kept and dense; in-kernel event tracing of one case; the rest of
     decode
The limits of 1 to 3 add up to one call: it says whether all kernels are right, and the headline tables.
A call takes at most --budget seconds (9 minutes), and the next one goes on: DIR/state.json says which steps have
ended with these sources. A step that the budget cut off is tried again in its place, one that has not ended in its
limit behind all others; one that failed is not, unless named with --again. Steps of which the rest of the budget
holds less than half the limit wait for the next call. On a machine that has compiled nothing yet, compiling comes
again before what is left. At the end the tables of what was measured are printed. Nothing is installed. The variable
CUTE_SPARSE_COMMIT names the commit for the rows where git cannot. DIR (profiling/results/<gpu> by default) holds at
most 8 files of less than 16 MiB: state.json, log.txt, host.jsonl, prefill.jsonl, decode.jsonl and the profiler's. A
DIR without a state begins as a copy of the default folder.

Exit status: 0 when every step has ended and passed; 1 when one has failed; 3 when steps are left; 2 for no GPU.
--dry-run prints the steps, what each needs and whether it is here, and runs none.

The steps' commands have not run on a GPU yet; their order, limits, states and files are tested without one, and the
benchmark's and the tests' code has run on an emulated one.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cute_sparse import cache
from profiling import bench, decode, report, rows

ROOT = bench.ROOT
BUDGET_S = 540.0
FILES_MAX, FILE_BYTES_MAX = 8, 16 << 20
LOG_BYTES_MAX = 15 << 20
STATE, LOG, WARM = "state.json", "log.txt", "warm"
PASSED, FAILED, TIMED_OUT, CUT_OFF, UNAVAILABLE = "passed", "failed", "timed out", "cut off", "unavailable"
HEADLINES = {
    "prefill": ("d128-8k-causal", "d128-8k-full"),
    "decode": ("b128-16k-32q8kv-pages", "b32-4k-32q8kv-pages", "b8-32k-32q8kv"),
}
BENCH_CASES_BY_WORTH = (
    "d128-16k-causal", "d128-4k-causal", "d256-16k-causal", "d192-128-8k-causal", "d128-32k-causal", "d128-2k-causal",
    "dit-17k-full", "d64-8k-window128",
)  # fmt: skip
DECODE_CASES_BY_WORTH = (
    "b1-128k-32q8kv-pages", "one-256k-127-1k-32q8kv-pages", "b8-32k-64q4kv-pages", "b1-512k-64q4kv", "b8-4k-32q8kv",
    "b1-4k-32q8kv-pages",
)  # fmt: skip
CASES_AT_ONCE = {"prefill": 4, "decode": 6}  # of one step: starting a process takes longer than most cases
# Without FlexAttention, which compiles for long.
TABLE_PEERS = {"prefill": "cudnn,flash,fa4,fa4-unpacked", "decode": "copy,flash,fa4,flashinfer"}
# A lambda of 1 skips at least 0.95 of the tiles (computed from the scores).
SPARSITIES = {
    "d128-64k-causal": "0,0.25,0.5,0.75,0.9", "b8-32k-32q8kv-pages": "0,0.5,0.73,0.9",
    "b1-128k-64q4kv-pages": "0,0.5,0.73,0.9",
}  # fmt: skip
GPU_TESTS = ("tests/test_attention.py", "tests/test_decode.py")
SILICON_TESTS = ("tests/emulator/test_silicon.py",)
TEST_PROCESSES = 12


@dataclass(frozen=True)
class Step:
    """command, with {out} for the results' folder; limit_s of the process; tool: a program that must be on the PATH."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    tool: str | None = None
    environment: tuple[tuple[str, str], ...] = field(default=())


def steps(python: str = sys.executable) -> list[Step]:
    """In the order of their worth."""
    first_tables = table_steps(python, "prefill", 1, [*BENCH_CASES_BY_WORTH, *bench.TABLES])
    first_tables.insert(1, *table_steps(python, "decode", 1, DECODE_CASES_BY_WORTH))
    rest = [name for name in decode.TABLES if name not in DECODE_CASES_BY_WORTH]
    return [
        Step(WARM, (python, "-m", "profiling.warm"), 150.0),
        tests(python, "tests", GPU_TESTS, 200.0),
        headline(python, "prefill", 100.0),
        headline(python, "decode", 90.0),
        tests(python, "tests-silicon", SILICON_TESTS, 200.0),
        *sparsity_steps(python, "prefill", bench.LONG, "cudnn,fa4,fa4-unpacked"),
        *sparsity_steps(python, "decode", decode.LONG, TABLE_PEERS["decode"]),
        *first_tables,
        sanitizer(python, "prefill", bench.SMALL),
        sanitizer(python, "decode", decode.SMALL),
        Step("host", (python, "-m", "profiling.host", "--out", "{out}"), 150.0),
        profile(python, "d128-8k-causal", "dense"),
        profile(python, "d128-8k-causal", "sparsity", "--sparsity", "0.75"),
        profile(python, "b8-32k-32q8kv-pages", "decode"),
        *sparsity_steps(python, "prefill", bench.LONG, "flex"),
        bench_step(python, "headline-flex", "prefill", HEADLINES["prefill"], 150.0),  # all peers again, in one run
        trace(python, "small-d128"),
        *table_steps(python, "decode", 2, rest),
    ]  # fmt: skip


def headline(python: str, op: str, limit_s: float) -> Step:
    return bench_step(python, f"headline-{op}", op, HEADLINES[op], limit_s, "--peers", TABLE_PEERS[op])


def sparsity_steps(python: str, op: str, names: Iterable[str], peers: str) -> list[Step]:
    flex = "-flex" if peers == "flex" else ""
    return [
        bench_step(python, f"sparsity-{name}{flex}", op, [name], 150.0,
                   "--sparsity", SPARSITIES[name], "--peers", peers)
        for name in names
    ]  # fmt: skip


def table_steps(python: str, op: str, number: int, names: Iterable[str]) -> list[Step]:
    """Of those cases that are no headline, CASES_AT_ONCE in each; numbered from `number`."""
    names = [name for name in dict.fromkeys(names) if name not in HEADLINES[op]]
    size = CASES_AT_ONCE[op]
    parts = [names[first : first + size] for first in range(0, len(names), size)]
    return [
        bench_step(python, f"{op}-{index}", op, part, 150.0, "--peers", TABLE_PEERS[op])
        for index, part in enumerate(parts, number)
    ]


def tests(python: str, name: str, files: tuple[str, ...], limit_s: float) -> Step:
    """In several processes where pytest-xdist is there: an error of one that the GPU keeps spares the others."""
    several = ("-n", str(TEST_PROCESSES)) if importlib.util.find_spec("xdist") else ()
    command = (python, "-m", "pytest", "-v", "--tb=short", *several, "-m", "gpu", *files)
    return Step(name, command, limit_s, environment=(("OMP_NUM_THREADS", "2"),))


def bench_step(python: str, name: str, op: str, cases: Iterable[str], limit_s: float, *more: str) -> Step:
    return Step(f"bench-{name}", bench_command(python, op, cases, "{out}", *more), limit_s)


def bench_command(python: str, op: str, cases: Iterable[str], out: str, *more: str) -> tuple[str, ...]:
    return (python, "-m", "profiling.bench", op, "--case", ",".join(cases), *more, "--out", out)


def sanitizer(python: str, op: str, cases: Iterable[str]) -> Step:
    """PyTorch's allocator would hide what lies beyond a tensor: without its cache, each is an allocation of its own.

    Errors of API calls are not counted: libraries probe for functions that the driver may lack; a launch's are raised.
    """
    tool = ("compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9")
    command = bench_command(python, op, cases, "{scratch}", "--peers", "", "--sparsity", "0.25")
    environment = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"), (bench.timing.PROFILED_VARIABLE, "1"))
    return Step(f"memcheck-{op}", (*tool, *command), 240.0, tool[0], environment)


def profile(python: str, case: str, name: str, *more: str) -> Step:
    """Only the text comes to the results: a report of ncu is large."""
    text = f'{{ echo "==== {name}: {case}"; cat "$1/ncu-{case}.txt"; }} >>"$2/ncu.txt"'
    script = f'profiling/ncu.sh {case} "$1" {shlex.join(more)} && {text}'
    command = ("sh", "-c", script, "sh", "{scratch}", "{out}")
    return Step(f"ncu-{name}", command, 180.0, "ncu", (("PYTHON", python),))


def trace(python: str, case: str) -> Step:
    """In-kernel event tracing; its Perfetto trace comes to the results."""
    script = f'profiling/iket.sh {case} "$1" && cp "$(find "$1" -name "*.pftrace" | head -n 1)" "$2/iket.pftrace"'
    command = ("sh", "-c", script, "sh", "{scratch}", "{out}")
    return Step(f"iket-{case}", command, 180.0, environment=(("PYTHON", python),))


# ---- The state -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a step ended, with which sources (a digest)."""

    status: str
    seconds: float
    sources: str


class State:
    """Which steps have ended, in DIR/state.json. Raises ValueError where the file is not one of this version."""

    def __init__(self, folder: Path, sources: str) -> None:
        self.path, self.sources = folder / STATE, sources
        self.ended: dict[str, Ended] = {}
        if self.path.exists():
            try:
                self.ended = {name: Ended(**value) for name, value in json.loads(self.path.read_text()).items()}
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{self.path} is no state of this version, remove it to begin anew: {error}") from None

    def set(self, step: Step, status: str, seconds: float) -> None:
        self.ended[step.name] = Ended(status, round(seconds, 1), self.sources)
        replacement = self.path.with_suffix(".tmp")
        content = {name: asdict(value) for name, value in self.ended.items()}
        replacement.write_text(json.dumps(content, indent=1) + "\n")
        replacement.replace(self.path)

    def status(self, step: Step) -> str | None:
        """None where the step never ended with these sources."""
        ended = self.ended.get(step.name)
        return ended.status if ended and ended.sources == self.sources else None

    def to_do(self, all_steps: list[Step], again: str | None = None, cold: bool = False) -> list[Step]:
        """Steps that never had their whole limit first, then those that timed out. cold: nothing is compiled on this
        machine, and so that comes before what is left."""
        new = [s for s in all_steps if self.status(s) in (None, CUT_OFF) or (again and again in s.name)]
        left = new + [s for s in all_steps if self.status(s) == TIMED_OUT and s not in new]
        first = [s for s in all_steps if s.name == WARM and s not in new] if cold and left else []
        return first + [s for s in left if s not in first]


# ---- Running -------------------------------------------------------------------------------------------------------

Runner = Callable[[Step, float, Path], int | None]


def run_process(step: Step, limit_s: float, folder: Path) -> int | None:
    """Runs a step with its output in the log; its exit status, or None where it was ended at the limit."""
    import tempfile

    with tempfile.TemporaryDirectory() as scratch, (folder / LOG).open("ab") as log:
        command = [part.replace("{out}", str(folder)).replace("{scratch}", scratch) for part in step.command]
        log.write(f"\n{_head(step)}{shlex.join(command)}\n".encode())
        log.flush()
        environment = os.environ | kernel_cache() | dict(step.environment) | {"PYTHONUNBUFFERED": "1"}
        # A group of its own, to be ended as one; no session of its own: who ends ours must reach it.
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=os.setpgrp
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end_group(process)


def kernel_cache() -> dict[str, str]:
    """The variable by which all steps share one cache of kernels; the tests' own would begin empty."""
    folder = cache.directory()
    return {} if folder is None else {"CUTE_SPARSE_CACHE_DIR": str(folder.parent)}


def is_cold() -> bool:
    """Whether this machine holds no kernel of these sources: a state may have been made on another."""
    folder = cache.directory()
    return folder is not None and not any(folder.glob("*.o"))


def _leave(number: int, frame: object) -> None:
    """On a signal: as Ctrl-C does, through what ends the step that runs; it is to do in the next call."""
    sys.exit(128 + number)


END_S = 20.0  # for a killed process to end; behind it the next step begins anyhow


def _end_group(process: subprocess.Popen) -> None:
    """The process and what it started, which is its process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    with contextlib.suppress(subprocess.TimeoutExpired):  # the driver may hold on to one whose kernel hangs
        process.wait(END_S)


def check(
    all_steps: list[Step], state: State, folder: Path, budget_s: float, runner: Runner = run_process,
    clock: Callable[[], float] = time.monotonic, again: str | None = None, cold: bool = False,
) -> None:  # fmt: skip
    """Runs what is to do while the budget lasts; the state is written after every step."""
    begin = clock()
    for step in state.to_do(all_steps, again, cold):
        left = budget_s - (clock() - begin)
        if left < step.limit_s / 2:
            continue
        if step.tool is not None and shutil.which(step.tool) is None:
            print(f"{step.name}: {step.tool} is not on the PATH", flush=True)
            state.set(step, UNAVAILABLE, 0.0)
            continue
        started = clock()
        code = runner(step, min(step.limit_s, left), folder)
        seconds = clock() - started
        ended = PASSED if code == 0 else FAILED
        status = ended if code is not None else TIMED_OUT if left >= step.limit_s else CUT_OFF
        state.set(step, status, seconds)
        exit_status = f", exit status {code}" if code else ""
        print(f"{step.name}: {status} after {seconds:.0f} s{exit_status}", flush=True)
        if status != PASSED:
            print(last_lines(folder / LOG, step), flush=True)
        shorten(folder / LOG)


LINES_SHOWN, COLUMNS_SHOWN = 12, 160  # of a step that did not pass: who runs this may see but the end of its output


def last_lines(log: Path, step: Step) -> str:
    """Of what the step wrote, which is the last part of the log."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - (1 << 16)))
        text = file.read().decode(errors="replace")
    lines = text[max(0, text.rfind(_head(step))) :].splitlines()[1:]
    return "\n".join(f"    {line[:COLUMNS_SHOWN]}" for line in lines[-LINES_SHOWN:])


def _head(step: Step) -> str:
    """With which the step's part of the log begins; the rest of its line is the command."""
    return f"==== {step.name}: "


def shorten(log: Path) -> None:
    """Keeps the end of a log that has grown too large."""
    if log.exists() and log.stat().st_size > LOG_BYTES_MAX:
        content = log.read_bytes()[-LOG_BYTES_MAX // 2 :]
        log.write_bytes(b"[the beginning was cut off]\n" + content)


def too_much(folder: Path) -> list[str]:
    """What is wrong with the folder's files, for who must carry them."""
    files = [path for path in folder.iterdir() if path.is_file()]
    found = [f"{path.name} has {path.stat().st_size} bytes" for path in files if path.stat().st_size >= FILE_BYTES_MAX]
    return found + ([f"{len(files)} files, more than {FILES_MAX}"] if len(files) > FILES_MAX else [])


def begin_folder(folder: Path, earlier: Path) -> None:
    """Makes the folder; one without a state gets the files of the earlier one, so that work goes on there."""
    folder.mkdir(parents=True, exist_ok=True)
    if folder.resolve() != earlier.resolve() and not (folder / STATE).exists() and earlier.is_dir():
        for path in earlier.iterdir():
            if path.is_file() and path.suffix in (".json", ".jsonl", ".txt"):
                shutil.copy2(path, folder)


def check_installed() -> None:
    """Raises RuntimeError where this Python does not have the project's packages."""
    if importlib.util.find_spec("cute_sparse.kernels") is None:
        command = "-m pip install --no-index --no-deps --no-build-isolation -e ."
        raise RuntimeError(f"the project is not installed for this Python: {sys.executable} {command}")


def plan(all_steps: list[Step]) -> str:
    lines = []
    for number, step in enumerate(all_steps, 1):
        missing = step.tool is not None and shutil.which(step.tool) is None
        need = f"; {step.tool} is not on the PATH" if missing else ""
        variables = "".join(f"{name}={value} " for name, value in step.environment)
        lines.append(f"{number:3} {step.name} (at most {step.limit_s:.0f} s{need})\n      {variables}"
                     f"{shlex.join(step.command)}")  # fmt: skip
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m profiling.gpu_check", description=__doc__.split("\n\n")[0])
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds that this call may take")
    parser.add_argument("--out", type=Path, help="results' folder; default: profiling/results/<gpu>")
    parser.add_argument("--only", default="", help="steps whose name contains this")
    parser.add_argument("--again", help="also run steps whose name contains this and which have ended")
    parser.add_argument("--dry-run", action="store_true", help="print the steps, run none")
    options = parser.parse_args(arguments)
    chosen = [step for step in steps() if options.only in step.name]
    if not chosen:
        parser.error(f"--only {options.only!r}: no step; there are {', '.join(step.name for step in steps())}")
    if options.dry_run:
        print(plan(chosen))
        return 0
    try:
        check_installed()
        earlier = rows.RESULTS / rows.folder_name(bench.gpu_name())
        folder = (options.out or earlier).resolve()
        begin_folder(folder, earlier)
        state = State(folder, bench.source_digest())
    except (RuntimeError, OSError, ValueError) as error:
        print(f"gpu_check.py: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _leave)
    check(chosen, state, folder, options.budget, again=options.again, cold=is_cold())
    print_tables(folder)
    return summary(chosen, state, folder)


def print_tables(folder: Path) -> None:
    """What the folder's rows say so far; bad rows are told, and no error."""
    for op in report.OPS:
        path = folder / f"{op}.jsonl"
        try:
            if path.exists() and path.stat().st_size:
                print(report.tables(report.Measured(rows.read(path), op)))
        except ValueError as error:
            print(f"no table of {path.name}: {error}")


def summary(all_steps: list[Step], state: State, folder: Path) -> int:
    """Prints what ended how; the exit status."""
    by_status: dict[str, list[str]] = {}
    for step in all_steps:
        by_status.setdefault(state.status(step) or "to do", []).append(step.name)
    for status, names in by_status.items():
        print(f"{status}: {len(names)}" + ("" if status == PASSED else f" ({', '.join(names)})"))
    for line in too_much(folder):
        print(f"too much for one folder: {line}")
    print(f"results: {folder}")
    if FAILED in by_status:
        return 1
    return 3 if {"to do", TIMED_OUT, CUT_OFF} & by_status.keys() else 0


if __name__ == "__main__":
    sys.exit(main())
