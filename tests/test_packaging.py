"""What pyproject.toml says against the folders, and what an install contains."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def package_folders() -> dict[str, Path]:
    """Every folder that holds Python files, by the package name it must have."""
    folders = {}
    for top, name in ((ROOT / "cute_sparse", "cute_sparse"), (ROOT / "kernels", "cute_sparse.kernels")):
        for path in [top, *top.rglob("*")]:
            if path.is_dir() and any(path.glob("*.py")):
                folders[".".join([name, *path.relative_to(top).parts])] = path
    return folders


def test_the_packages_listed_are_the_folders_there_are():
    """One that is missing still works in an editable install, and fails in the wheel."""
    assert sorted(SETUPTOOLS["packages"]) == sorted(package_folders())


def test_every_package_has_an_init():
    assert all((folder / "__init__.py").is_file() for folder in package_folders().values())


def test_a_wheel_holds_every_module_and_nothing_at_the_top_level_but_the_package(tmp_path):
    """Another distribution owns the name `kernels`: ours must not be importable under it."""
    build = pytest.importorskip("setuptools.build_meta")
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("cute_sparse", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "build"))
    wheel = _build_wheel(build, copy, tmp_path)
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert tops == {"cute_sparse", next(top for top in tops if top.endswith(".dist-info"))}
    for package, folder in package_folders().items():
        for path in folder.glob("*.py"):
            assert f"{package.replace('.', '/')}/{path.name}" in names
    core = ROOT / "cute_sparse" / "emulator"
    for path in core.rglob("*"):
        if path.suffix in (".cpp", ".hpp", ".h"):
            assert f"cute_sparse/emulator/{path.relative_to(core).as_posix()}" in names, "the emulator's source"


def _build_wheel(build, source: Path, folder: Path) -> Path:
    before = os.getcwd()
    os.chdir(source)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return folder / build.build_wheel(str(folder))
    finally:
        os.chdir(before)


# ---- README ----


def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_the_readme_s_support_matrix_is_what_the_kernels_declare():
    pytest.importorskip("cutlass")
    from cute_sparse import support

    shown = readme().partition(support.BEGIN)[2].partition(support.END)[0].strip()
    assert shown == support.markdown(), "paste the output of: python -m cute_sparse.support"


def test_the_readme_s_example_runs():
    """On a CPU, with shorter sequences: every call that it shows, and the shapes that its comments say."""
    code = readme().partition("```python\n")[2].partition("```")[0]
    assert 'device="cuda"' in code and "8192" in code
    names: dict = {}
    exec(code.replace('device="cuda"', 'device="cpu"').replace("8192", "256"), names)
    assert names["out"].shape == (1, 256, 32, 128) and names["lse"].shape == (1, 32, 256)
    assert names["kept"].shape == names["visited"].shape == (1, 32)
    assert names["new"].shape == (2, 1, 32, 128)


def test_every_path_of_the_readme_s_map_exists():
    table = readme().partition("## Map")[2]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    paths = [path for row in rows for path in row.split("`")[1::2]]
    folder = ""
    assert len(paths) > 10
    for path in paths:
        folder = path.rpartition("/")[0] if "/" in path else folder
        assert (ROOT / (path if "/" in path else f"{folder}/{path}")).exists(), path


def test_the_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    assert "make test" in readme() and "make demo" in readme()
    assert "\ntest:" in makefile and "\ndemo:" in makefile
    assert "make test" in (ROOT / ".ci" / "run").read_text()
