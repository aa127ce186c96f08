"""Which kernels a change altered: python -m profiling.ptx_diff REV [--arch ARCH] [--match TEXT]

Compiles every audited kernel from the working tree and from REV (a git revision, checked out beside it), compares
their PTX up to the names of registers and labels, and prints the kernels that differ, with a short diff. A refactor
prints none. Exits with 1 if any differs.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from profiling import kernels

ROOT = Path(__file__).resolve().parent.parent
DIFF_LINES = 12

DUMP = """
import json, sys
from profiling import kernels
match, arches = sys.argv[1], sys.argv[2:]
found = {}
problems = getattr(kernels, "problems", lambda arch: kernels.prefill_problems())  # earlier revisions have no other
for arch in arches or kernels.ARCHES:
    for problem in problems(arch):
        name = kernels.Compiled(arch, problem, None, 0, "", b"").name
        if match in name:
            found[name] = kernels.compile_kernel(problem, arch).ptx
json.dump(found, sys.stdout)
"""


def normalised(ptx: str) -> list[str]:
    """The statements with registers and labels numbered in the order of their first appearance."""
    names: dict[str, str] = {}

    def rename(found: re.Match) -> str:
        word = found[0]
        kind = re.match(r"[%$A-Za-z_]+", word)[0]
        return names.setdefault(word, f"{kind}#{len(names)}")

    body = re.sub(r"kernel_cutlass_[\w$]+", "KERNEL", ptx)
    lines = [line.strip() for line in body.splitlines()]
    kept = [line for line in lines if line and not line.startswith(("//", ".loc", ".reg"))]
    return [re.sub(r"%(?:rd|rs|r|f|fd|p|h|hh|rq)\d+|\$L_\w+", rename, line) for line in kept]


def dump(tree: Path, match: str, arches: list[str]) -> dict[str, str]:
    """The PTX of every kernel of a source tree, by name."""
    paths = f"import sys; sys.path[:0] = [{str(tree)!r}]; "
    alias = (
        "import importlib.util as u, pathlib; "
        f"s = u.spec_from_file_location('cute_sparse.kernels', {str(tree / 'kernels/__init__.py')!r}, "
        f"submodule_search_locations=[{str(tree / 'kernels')!r}]); import cute_sparse; "
        "m = u.module_from_spec(s); sys.modules['cute_sparse.kernels'] = m; s.loader.exec_module(m)\n"
    )
    command = [sys.executable, "-c", paths + alias + DUMP, match, *arches]
    result = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"compiling {tree} failed:\n{result.stderr[-4000:]}")
    return json.loads(result.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m profiling.ptx_diff", description=__doc__.split("\n")[0])
    parser.add_argument("revision")
    parser.add_argument("--arch", choices=kernels.ARCHES, action="append", default=[], help="default: all")
    parser.add_argument("--match", default="", help="only kernels whose name contains this")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        before_tree = Path(folder) / "before"
        add = ["git", "worktree", "add", "--detach", str(before_tree), options.revision]
        added = subprocess.run(add, cwd=ROOT, capture_output=True, text=True)
        if added.returncode:
            parser.error(f"git does not know {options.revision!r}: {added.stderr.strip()}")
        try:
            before = dump(before_tree, options.match, options.arch)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(before_tree)], cwd=ROOT, check=True)
    after = dump(ROOT, options.match, options.arch)
    if not before.keys() | after.keys():
        parser.error(f"--match {options.match!r}: no kernel's name contains it")
    changed = 0
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            print(f"{name}: {'new' if name in after else 'gone'}")
            changed += 1
            continue
        old, new = normalised(before[name]), normalised(after[name])
        if old == new:
            continue
        changed += 1
        print(f"{name}: {len(old)} -> {len(new)} lines")
        delta = difflib.unified_diff(old, new, lineterm="", n=0)
        for line in [line[:150] for line in delta][2 : 2 + DIFF_LINES]:
            print(f"    {line}")
    print(f"{changed} of {len(before.keys() | after.keys())} kernels differ from {options.revision}")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
