"""The disk cache: whole files or none, what is damaged is dropped, one compiler at a time, and a key that forgets
nothing."""

from __future__ import annotations

import logging
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cute_sparse import cache, compiled
from cute_sparse.cache import Entry
from cute_sparse.problem import Problem

ENTRY = Entry(b"\x7fELF object" * 100, b"\x7fELF cubin" * 50, "// ptx: \N{GREEK SMALL LETTER LAMDA}\n" * 30)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CUTE_SPARSE_CACHE_DIR", str(tmp_path))
    cache._usable.cache_clear()
    yield cache.directory()
    cache._usable.cache_clear()


def test_what_is_written_is_read(folder):
    path = folder / "a.o"
    assert cache.read(path) is None
    cache.write(path, ENTRY)
    assert cache.read(path) == ENTRY
    cache.write(path, ENTRY._replace(cubin=b"", ptx=""))
    assert cache.read(path) == Entry(ENTRY.object, b"", "")
    assert [file.name for file in folder.iterdir()] == ["a.o"], "nothing else is left"


def test_any_damage_is_noticed_said_and_removed(folder, caplog):
    path = folder / "a.o"
    cache.write(path, ENTRY)
    whole = path.read_bytes()
    damages = [whole[:-1], whole[: len(whole) // 2], b"", b"x", whole + b"x", whole[::-1]]
    damages += [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole), 97)]
    for damaged in damages:
        caplog.clear()
        path.write_bytes(damaged)
        assert cache.read(path) is None
        assert "checksum" in caplog.text
        assert not path.exists()


@pytest.mark.parametrize("place, name", [(os, "replace"), (os, "fsync"), (tempfile, "NamedTemporaryFile")])
def test_a_full_disk_costs_only_the_cache(folder, monkeypatch, caplog, place, name):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(place, name, full)
    cache.write(folder / "a.o", ENTRY)
    assert "No space left" in caplog.text
    assert list(folder.iterdir()) == []


def test_an_entry_that_cannot_be_read_counts_as_none_and_is_said(folder, caplog):
    (folder / "a.o").mkdir()
    assert cache.read(folder / "a.o") is None
    assert "cannot read" in caplog.text


@pytest.mark.parametrize("what", ["a file in its place", "writable by others"])
def test_an_unusable_folder_turns_the_cache_off_and_is_said(tmp_path, monkeypatch, caplog, what):
    root = tmp_path / "root"
    if what == "a file in its place":
        root.write_text("not a folder")
    else:
        (root / cache.source_fingerprint()[:16]).mkdir(parents=True)
        (root / cache.source_fingerprint()[:16]).chmod(0o777)
    monkeypatch.setenv("CUTE_SPARSE_CACHE_DIR", str(root))
    cache._usable.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert cache.directory() is None
    assert "no disk cache" in caplog.text


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.delenv("CUTE_SPARSE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.directory().parent == tmp_path / "cute_sparse"
    assert cache.directory().stat().st_mode & 0o077 == 0
    monkeypatch.setenv("CUTE_SPARSE_CACHE", "0")
    assert cache.directory() is None


def test_folders_that_nobody_uses_any_more_go(tmp_path, monkeypatch):
    monkeypatch.setenv("CUTE_SPARSE_CACHE_DIR", str(tmp_path))
    names = ["0123456789abcdef", "0123456789abcde0", "fedcba9876543210", "emulator"]
    foreign, recent, unused, emulator = folders = [tmp_path / name for name in names]
    for folder in folders:
        folder.mkdir()
        for name in ("prefill-sm_90a.o", "prefill-sm_90a.lock", ".a.tmp"):
            (folder / name).touch()
    (foreign / "readme.txt").touch()
    now = time.time()
    for folder, days in ((foreign, 40), (recent, 20), (unused, 40), (emulator, 40)):
        os.utime(folder, (now - days * 86400,) * 2)
    used = tmp_path / cache.source_fingerprint()[:16]
    used.mkdir(mode=0o700)
    os.utime(used, (now - 40 * 86400,) * 2)
    cache._usable.cache_clear()
    assert cache.directory() == used and used.stat().st_mtime > now - 60
    assert {path.name for path in tmp_path.iterdir()} == {foreign.name, recent.name, emulator.name, used.name}
    cache._usable.cache_clear()


# ---- The key ----

PROBLEM = Problem("prefill", "bfloat16", 128, 128)


def test_the_key_depends_on_all_its_parts():
    parts = [PROBLEM, "config", "sm_90a", "4.8.1", [("CUTE_DSL_LINEINFO", "1")], False]
    keys = {cache.key(*parts)}
    for index, other in enumerate(
        [Problem("prefill", "float16", 128, 128), "config 2", "sm_100a", "4.8.2", [], True]
    ):
        keys.add(cache.key(*parts[:index], other, *parts[index + 1 :]))
    assert len(keys) == 7
    assert cache.key(*parts) in keys


def test_the_key_holds_the_cpu_and_the_dsl_s_options(monkeypatch):
    before = cache.key()
    assert platform.machine() in cache.host_fingerprint()
    monkeypatch.setattr(cache, "host_fingerprint", lambda: "another CPU")
    assert cache.key() != before
    monkeypatch.setenv("CUTE_DSL_LINEINFO", "1")
    monkeypatch.setenv("CUTE_DSL_LIBS", "elsewhere")
    variables = dict(compiled._compiler_variables())
    assert variables.get("CUTE_DSL_LINEINFO") == "1" and "CUTE_DSL_LIBS" not in variables


def test_the_fingerprint_covers_the_kernels_and_what_they_import():
    """Every Python file of the package but the emulator's, by name and content; found through the folders, whatever the
    install."""
    package = Path(cache.__file__).parent
    assert (cache.kernel_folder(package) / "hopper" / "__init__.py").is_file()
    seen = []
    real = Path.read_bytes

    def spy(path):
        seen.append(path)
        return real(path)

    def edited(path):
        return real(path) + (b"#" if path.name == "tmem.py" else b"")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", spy)
        assert cache.source_fingerprint.__wrapped__() == cache.source_fingerprint()
        patch.setattr(Path, "read_bytes", edited)
        assert cache.source_fingerprint.__wrapped__() != cache.source_fingerprint()
        patch.setattr(Path, "read_bytes", lambda path: b"")
        emptied = cache.source_fingerprint.__wrapped__()
        patch.setattr(cache, "kernel_folder", lambda package: package / "device")
        assert cache.source_fingerprint.__wrapped__() != emptied
    names = {path.relative_to(package.parent).as_posix() for path in seen}
    assert {"cute_sparse/problem.py", "cute_sparse/operands.py", "cute_sparse/device/__init__.py"} <= names
    assert any("hopper/config.py" in name for name in names) and any("blackwell/config.py" in name for name in names)
    assert not any("emulator" in name for name in names)


# ---- Processes ----


def _write_many(path: str, seed: int, seconds: float) -> None:
    entry = Entry(bytes([seed]) * 200_000, b"", "")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        cache.write(Path(path), entry)


def test_readers_see_whole_entries_while_others_write(folder):
    path = folder / "a.o"
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=_write_many, args=(str(path), seed, 2.0)) for seed in (1, 2)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        entry = cache.read(path)
        if entry is not None:
            assert len(set(entry.object)) == 1 and len(entry.object) == 200_000
            seen.add(entry.object[0])
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert seen == {1, 2}


def test_a_writer_killed_at_any_moment_leaves_a_whole_entry_or_none(folder):
    path = folder / "a.o"
    code = "import sys; from tests.test_cache import _write_many; _write_many(sys.argv[1], 3, 60)"
    for attempt in range(4):
        writer = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=Path(__file__).parent.parent)
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.013 * attempt)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        entry = cache.read(path)
        assert entry is not None and set(entry.object) == {3} and len(entry.object) == 200_000
        path.unlink()


COMPILE = """
import sys, time
from pathlib import Path
from cute_sparse import cache
path, log, behaviour = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
if cache.read(path) is None:
    with cache.one_compiler(path):
        if cache.read(path) is None:
            with log.open("a") as file:
                file.write("compiled\\n")
            if behaviour == "hang":
                time.sleep(600)
            time.sleep(1.0)
            cache.write(path, cache.Entry(b"object", b"", ""))
assert cache.read(path).object == b"object"
"""


def _compiler(path: Path, log: Path, behaviour: str = "") -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", COMPILE, str(path), str(log), behaviour])


def test_of_several_processes_one_compiles(folder, tmp_path):
    path, log = folder / "a.o", tmp_path / "log"
    processes = [_compiler(path, log) for _ in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert log.read_text() == "compiled\n"


def test_a_compiler_that_is_killed_lets_the_next_one_compile(folder, tmp_path):
    path, log = folder / "a.o", tmp_path / "log"
    first = _compiler(path, log, "hang")
    deadline = time.monotonic() + 60
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    second = _compiler(path, log)
    time.sleep(0.5)
    assert second.poll() is None, "it waits for the first"
    first.kill()
    first.wait()
    assert second.wait(timeout=60) == 0
    assert log.read_text() == "compiled\n" * 2


def test_a_lock_that_cannot_be_had_costs_only_the_wait(folder, monkeypatch, caplog):
    monkeypatch.setattr(cache, "LOCK_TIMEOUT_S", 0.05)
    path = folder / "a.o"
    with cache.one_compiler(path):
        with cache.one_compiler(path):
            pass
    assert "without the lock" in caplog.text


# ---- With the DSL: what is stored is what runs ----


def count_compilations(monkeypatch):
    compilations = []
    real = compiled.compile_now
    monkeypatch.setattr(compiled, "compile_now", lambda *given: (compilations.append(given), real(*given))[1])
    return compilations


def test_another_toolkit_of_the_same_dsl_has_files_of_its_own(folder, monkeypatch):
    """Its assembler is another, and a driver may refuse what it makes."""
    cutlass = pytest.importorskip("cutlass")
    written = []
    monkeypatch.setattr(compiled, "compile_now", lambda *_: None)
    monkeypatch.setattr(compiled, "_entry", lambda *_: ENTRY)
    monkeypatch.setattr(cache, "write", lambda path, entry: written.append(path.name))
    for toolkit in ((12, 9), (13, 4), (13, 4)):
        monkeypatch.setattr(cutlass, "CUDA_VERSION", SimpleNamespace(major=toolkit[0], minor=toolkit[1]))
        compiled.compile_to_disk(PROBLEM, "config", "sm_90a", None)
    assert written[1] == written[2] != written[0]


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a", "sm_103a"])
def test_a_kernel_is_compiled_once_ahead_without_a_gpu(folder, monkeypatch, arch):
    pytest.importorskip("cutlass")
    import cute_sparse

    compilations = count_compilations(monkeypatch)
    for _ in range(2):
        cute_sparse.warmup(arch=arch, head_dim=64, causal=True)
        assert len(compilations) == 1


def test_what_is_damaged_does_not_load_or_is_for_another_problem_is_compiled_anew(folder, monkeypatch, caplog):
    pytest.importorskip("cutlass")
    import cute_sparse

    cute_sparse.warmup(arch="sm_90a", head_dim=64)
    (path,) = folder.glob("*.o")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    compilations = count_compilations(monkeypatch)
    cute_sparse.warmup(arch="sm_90a", head_dim=64)
    assert len(compilations) == 1 and "fails its checksum" in caplog.text
    cache.write(path, Entry(b"not an object", b"", ""))
    cute_sparse.warmup(arch="sm_90a", head_dim=64)
    assert len(compilations) == 2 and "does not load" in caplog.text
    cute_sparse.warmup(arch="sm_90a", head_dim=64, causal=True)
    assert len(compilations) == 3


EMULATED = """
import sys, torch, cute_sparse
from cute_sparse import compiled
count = 0
real = compiled.compile_now
def counting(*given):
    global count
    count += 1
    return real(*given)
compiled.compile_now = counting
q = torch.randn(1, 70, 2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
with cute_sparse.emulated(sys.argv[1]) as device:
    out = cute_sparse.attention(q, q, q, causal=True, threshold=0.1)
    print(count, len(device.launches), (out.float() - cute_sparse_reference(q)).abs().max().item() < 0.02)
"""
REFERENCE = """
def cute_sparse_reference(q):
    from cute_sparse import reference
    return reference.attention(
        q, q, q, softmax_scale=0.125, window_right=0, threshold=torch.tensor(1e-30), dtype=torch.float32
    ).out
"""


SCRIPT = """
import torch, cute_sparse
from cute_sparse import compiled
def none(*given):
    raise AssertionError("compiled again")
compiled.compile_now = none
q = torch.randn(1, 70, 2, 64, dtype=torch.bfloat16, device="cuda")
print(cute_sparse.attention(q, q, q, causal=True, threshold=0.1).device)
"""


def test_an_emulated_kernel_comes_from_disk_in_the_next_process(folder, tmp_path):
    """Its PTX travels with it: the emulator runs that, also for a script whose "cuda" device it is."""
    pytest.importorskip("cutlass")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    here, there = ["-c", REFERENCE + EMULATED, "sm_100a"], ["-m", "cute_sparse.emulator", "--arch", "sm_100a", script]
    outputs = []
    for command in (here, here, there):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.split())
    assert outputs[:2] == [["1", "1", "True"], ["0", "1", "True"]]
    assert outputs[2][-1] == "cuda:0"
