"""The rooms' doors: who may import whom, read from the source without running it."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DSL = "cutlass"

# Room -> the rooms of this project it may import, besides itself. A file of cute_sparse/ is a room of its own.
DOORS = {
    "cute_sparse": {
        "cute_sparse.api",
        "cute_sparse.calls",
        "cute_sparse.dispatch",
        "cute_sparse.problem",
        "cute_sparse.threshold",
    },
    "cute_sparse.api": {"cute_sparse.calls", "cute_sparse.operators"},
    "cute_sparse.operators": {"cute_sparse.calls", "cute_sparse.inputs", "cute_sparse.untraced"},
    "cute_sparse.untraced": {"cute_sparse.calls", "cute_sparse.inputs"},
    "cute_sparse.calls": {"cute_sparse.dispatch", "cute_sparse.problem"},
    "cute_sparse.dispatch": {
        "cute_sparse.compiled",
        "cute_sparse.inputs",
        "cute_sparse.operands",
        "cute_sparse.plans",
        "cute_sparse.problem",
        "cute_sparse.targets",
    },
    "cute_sparse.plans": {
        "cute_sparse.inputs",
        "cute_sparse.launch",
        "cute_sparse.operands",
        "cute_sparse.problem",
        "cute_sparse.reference",
        "cute_sparse.splits",
        "cute_sparse.targets",
        "cute_sparse.threshold",
    },
    "cute_sparse.targets": set(),
    "cute_sparse.inputs": {"cute_sparse.problem", "cute_sparse.threshold"},
    "cute_sparse.compiled": {"cute_sparse.cache", "cute_sparse.launch", "cute_sparse.operands", "cute_sparse.problem"},
    "cute_sparse.cache": set(),
    "cute_sparse.launch": {"cute_sparse.operands"},
    "cute_sparse.operands": set(),
    "cute_sparse.problem": set(),
    "cute_sparse.threshold": set(),
    "cute_sparse.reference": {"cute_sparse.problem", "cute_sparse.splits"},
    "cute_sparse.splits": set(),
    "cute_sparse.calibration": {"cute_sparse.reference", "cute_sparse.threshold", "cute_sparse.problem"},
    "cute_sparse.support": {"cute_sparse.dispatch"},
    "cute_sparse.demo": {
        "cute_sparse",
        "cute_sparse.integrations",
        "cute_sparse.targets",
        "cute_sparse.workloads",
    },
    "cute_sparse.workloads": set(),
    "cute_sparse.integrations": {"cute_sparse", "cute_sparse.api", "cute_sparse.threshold"},
    "cute_sparse.emulator": set(),
    "cute_sparse.device": {
        "cute_sparse.operands",
        "cute_sparse.problem",
        "cute_sparse.splits",
        "cute_sparse.threshold",
    },
    "cute_sparse.kernels": set(),
    "cute_sparse.kernels.hopper": {"cute_sparse.device", "cute_sparse.problem", "cute_sparse.operands"},
    "cute_sparse.kernels.blackwell": {"cute_sparse.device", "cute_sparse.problem", "cute_sparse.operands"},
}
# Only these may import the DSL when they are loaded; others import it inside a function, or not at all.
DSL_ROOMS = {"cute_sparse.device", "cute_sparse.kernels.hopper", "cute_sparse.kernels.blackwell"}


def modules() -> dict[str, Path]:
    """Every module of the package by its import name."""
    found = {}
    for folder, prefix in ((ROOT / "cute_sparse", "cute_sparse"), (ROOT / "kernels", "cute_sparse.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = [prefix, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def room_of(module: str) -> str | None:
    """The longest listed room that holds the module."""
    parts = module.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in names if name in DOORS and (name != "cute_sparse" or len(parts) == 1)), None)


def imports(path: Path, loaded_only: bool = False) -> set[str]:
    """The modules that a file names in its import statements; with `loaded_only`, only those outside functions."""
    found = set()
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if loaded_only and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in MODULES else node.module)
    return found


def own(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] in ("cute_sparse", "kernels", "tests", "profiling")}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_through_its_room_s_doors(module):
    room = room_of(module)
    assert room is not None, f"{module} belongs to no room of this test's list"
    for name in own(imports(MODULES[module])):
        target = room_of(name)
        assert target is not None and name.startswith("cute_sparse"), f"{module} imports {name}"
        assert target == room or target in DOORS[room], f"{module} imports {name}, but {room} has no door to {target}"


def test_no_files_import_each_other_in_a_circle():
    """Neither when they are loaded nor from within a function, nor for a type's name."""
    graph = {module: imports(path) & MODULES.keys() - {module} for module, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names them


@pytest.mark.parametrize("module", MODULES)
def test_only_the_kernels_load_the_dsl(module):
    room = room_of(module)
    loads_it = any(name.split(".")[0] == DSL for name in imports(MODULES[module], loaded_only=True))
    assert not loads_it or room in DSL_ROOMS or room == "cute_sparse.emulator"


def test_the_arch_rooms_have_the_same_files_and_do_not_import_each_other():
    for one, other in (("hopper", "blackwell"), ("blackwell", "hopper")):
        for module, path in MODULES.items():
            if module.startswith(f"cute_sparse.kernels.{one}"):
                assert not any(f".{other}" in name for name in imports(path)), f"{module} imports from {other}"
    operations = {"config", "prefill", "decode_config", "decode"}
    for arch in ("hopper", "blackwell"):
        present = {module.rsplit(".", 1)[1] for module in MODULES if module.startswith(f"cute_sparse.kernels.{arch}.")}
        assert operations <= present


def run(code: str, *flags: str) -> str:
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_nothing_that_only_a_call_needs():
    """Neither the DSL nor what compiles and traces: each takes seconds."""
    code = "import sys, torch; before = {*sys.modules}; import cute_sparse; print(*{*sys.modules} - before)"
    loaded = run(code).split()
    assert "cute_sparse.api" in loaded
    heavy = "cutlass torch._dynamo torch._inductor transformers cute_sparse.emulator cute_sparse.kernels"
    assert not [name for name in loaded if name.startswith(tuple(heavy.split()))]


def test_the_reference_runs_without_the_dsl_installed():
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("cutlass", "nvidia_cutlass_dsl", "cuda"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch, cute_sparse
q = torch.randn(1, 20, 2, 8, dtype=torch.bfloat16)
print(cute_sparse.attention(q, q, q, threshold=0.1).shape)
"""
    assert run(code).strip() == "torch.Size([1, 20, 2, 8])"
