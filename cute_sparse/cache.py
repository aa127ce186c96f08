"""Compiled kernels on disk, so that a process pays for compilation only where no process did before.

One file per kernel: the object that the DSL exports, then, for the emulator, the cubin in it and the PTX it is made
from, then a trailer with their lengths and a SHA-256.
A file appears by rename, so no reader sees half of one; what a kill or a full disk left is never under the final
name; what fails its checksum is compiled again and replaced. A lock per kernel lets one process compile while
the others wait; the system drops it when its holder dies.

Each state of the source has a folder of its own; those that no process has used for KEEP_DAYS go.

CUTE_SPARSE_CACHE_DIR moves the cache, CUTE_SPARSE_CACHE=0 turns it off. The files hold native code: the folder is
created for its user alone, and one that others can write to is not used.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import stat
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import filelock

LOG = logging.getLogger("cute_sparse")
FORMAT = 1
TRAILER = struct.Struct("<QQQ32s8s")  # lengths of object, cubin and PTX, SHA-256 of the three, magic
MAGIC = b"CUTESPRS"
LOCK_TIMEOUT_S = 900.0  # far above any compile; after it, compile without the lock
KEEP_DAYS = 30
OWN_SUFFIXES = {".o", ".lock", ".tmp"}


class Entry(NamedTuple):
    """object is ELF with the host function and the cubin; cubin and ptx are empty where no emulator needs them."""

    object: bytes
    cubin: bytes
    ptx: str


def directory() -> Path | None:
    """The folder of this source tree's kernels, created; None where the cache is off or unusable (said once)."""
    if os.environ.get("CUTE_SPARSE_CACHE", "1") == "0":
        return None
    chosen = os.environ.get("CUTE_SPARSE_CACHE_DIR")
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return _usable(Path(chosen) if chosen else Path(user_cache) / "cute_sparse")


@functools.cache
def _usable(root: Path) -> Path | None:
    folder = root / source_fingerprint()[:16]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
        if state.st_uid != os.getuid() or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f"{folder} can be written by others")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} cannot be written")
        os.utime(folder)  # when a process last used it
    except OSError as error:
        LOG.warning("no disk cache, every process compiles its kernels: %s", error)
        return None
    _remove_unused(root)
    return folder


def _remove_unused(root: Path) -> None:
    """A process that still has such a folder loses no kernel that it has loaded, and compiles those that it has not."""
    oldest = time.time() - KEEP_DAYS * 86400
    for other in root.iterdir():
        with contextlib.suppress(OSError):  # another process removes it, or holds a file of it open
            if re.fullmatch("[0-9a-f]{16}", other.name) and other.stat().st_mtime < oldest:
                if all(file.suffix in OWN_SUFFIXES for file in other.iterdir()):
                    shutil.rmtree(other)


@functools.cache
def source_fingerprint() -> str:
    """SHA-256 over the Python files that decide what is generated: cute_sparse (but not the emulator) and kernels."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for room, files in {"cute_sparse": package, "kernels": kernel_folder(package)}.items():
        for path in sorted(files.rglob("*.py")):
            relative = path.relative_to(files)
            if room == "cute_sparse" and relative.parts[0] in ("emulator", "kernels"):
                continue
            content = path.read_bytes()
            digest.update(f"{room}/{relative.as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def kernel_folder(package: Path) -> Path:
    """Where cute_sparse.kernels lives: inside the package when installed, beside it in a working tree."""
    installed = package / "kernels"
    return installed if installed.is_dir() else package.parent / "kernels"


def key(*parts: object) -> str:
    """The file name of a kernel: a SHA-256 over what decides its code, besides the source."""
    described = [FORMAT, host_fingerprint(), *parts]
    return hashlib.sha256("\n".join(repr(part) for part in described).encode()).hexdigest()


@functools.cache
def host_fingerprint() -> str:
    """The host function is native code: the machine and its CPU's features."""
    features = ""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as cpuinfo:
        features = next((line for line in cpuinfo if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {hashlib.sha256(features.encode()).hexdigest()}"


def read(path: Path) -> Entry | None:
    """The entry at `path`; None where there is none, or where it is not what was written (said, and removed)."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        LOG.warning("cannot read the cached kernel: %s", error)
        return None
    body, trailer = content[: -TRAILER.size], content[-TRAILER.size :]
    if len(trailer) == TRAILER.size:
        *lengths, checksum, magic = TRAILER.unpack(trailer)
        if magic == MAGIC and sum(lengths) == len(body) and hashlib.sha256(body).digest() == checksum:
            end_of_object, end_of_cubin = lengths[0], lengths[0] + lengths[1]
            return Entry(body[:end_of_object], body[end_of_object:end_of_cubin], body[end_of_cubin:].decode())
    discard(path, "it fails its checksum")
    return None


def discard(path: Path, reason: str) -> None:
    LOG.warning("dropping the cached kernel %s: %s", path, reason)
    with contextlib.suppress(OSError):
        path.unlink()


def write(path: Path, entry: Entry) -> None:
    """Put the entry at `path`, whole or not at all; a failure (a full disk) is said and costs only the cache."""
    sections = [entry.object, entry.cubin, entry.ptx.encode()]
    body = b"".join(sections)
    trailer = TRAILER.pack(*(len(section) for section in sections), hashlib.sha256(body).digest(), MAGIC)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".tmp", delete=False) as file:
            temporary = file.name
            file.write(body + trailer)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        LOG.warning("cannot cache the kernel: %s", error)
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


@contextlib.contextmanager
def one_compiler(path: Path) -> Iterator[None]:
    """Hold the right to compile the kernel of `path`; other processes wait here meanwhile."""
    lock = filelock.FileLock(path.with_suffix(".lock"), timeout=LOCK_TIMEOUT_S)
    try:
        lock.acquire()
    except (OSError, filelock.Timeout) as error:
        LOG.warning("compiling without the lock: %s", error)
    try:
        yield
    finally:
        lock.release()
