"""The emulator around its core: building, hooks into CuTe-DSL, tensors as device memory, errors, scripts."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading
from importlib import metadata
from pathlib import Path

import pytest
import torch

from cute_sparse import emulator
from cute_sparse.emulator import build, devices, errors

pytest.importorskip("cutlass")

import cutlass  # noqa: E402
import cutlass.cute as cute  # noqa: E402
from cutlass.cute.runtime import from_dlpack, make_ptr  # noqa: E402

from tests.emulator import shell_kernels as kernels  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
ARCHES = list(emulator.ARCHES)


@pytest.fixture(params=ARCHES)
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def device(arch):
    with emulator.device(arch, sms=2, threads=1) as entered:
        yield entered


@pytest.fixture
def x() -> torch.Tensor:
    return torch.arange(64, dtype=torch.float32)


def compile_scale(x, **options):
    return cute.compile(kernels.scale, from_dlpack(x), from_dlpack(torch.empty_like(x)), 1.0, **options)


def run_python(code: str, *, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


# --- launches ------------------------------------------------------------------------------------------------------


def test_a_plain_function_runs_on_cpu_tensors_and_is_recorded(device, x):
    y = torch.zeros_like(x)
    assert from_dlpack(x).memspace == cute.AddressSpace.gmem
    compiled = compile_scale(x)
    compiled(from_dlpack(x), from_dlpack(y), 3.0)
    assert torch.equal(y, x * 3)
    (launch,) = device.launches
    assert launch.name.startswith("kernel_") and "scale" in launch.name
    assert (launch.grid, launch.block, launch.cluster) == ((1, 1, 1), (64, 1, 1), (1, 1, 1))
    assert launch.counts.executed["st.global.b32"] == 2  # one for each of two warps
    assert [warp.executed["st.global.b32"] for warp in launch.warps] == [1, 1]
    assert launch.counts.global_bytes_written == 4 * 64
    (store_line,) = [i for i, line in enumerate(compiled.__ptx__.splitlines(), 1) if "st.global" in line]
    assert launch.lines[store_line] == 2


def test_a_tvm_ffi_function_takes_cpu_tensors(device, x):
    y = torch.zeros_like(x)
    compiled = cute.compile(
        kernels.scale,
        from_dlpack(x, enable_tvm_ffi=True),
        from_dlpack(y, enable_tvm_ffi=True),
        1.0,
        options="--enable-tvm-ffi",
    )
    compiled(x, y, 2.0)
    assert torch.equal(y, x * 2)
    assert len(device.launches) == 1


def test_a_tvm_ffi_function_takes_tensors_inside_containers(device, x):
    y = torch.zeros_like(x)
    example = kernels.Pair(from_dlpack(x, enable_tvm_ffi=True), from_dlpack(y, enable_tvm_ffi=True))
    compiled = cute.compile(kernels.scale_pair, example, 1.0, options="--enable-tvm-ffi")
    compiled(kernels.Pair(x, y), 2.0)
    assert torch.equal(y, x * 2)


def test_an_executor_runs(device, x):
    y = torch.zeros_like(x)
    compile_scale(x).to(0)(from_dlpack(x), from_dlpack(y), 3.0)
    assert torch.equal(y, x * 3)


def test_a_jit_function_that_is_called_without_compiling_runs(device, x):
    y = torch.zeros_like(x)
    for _ in range(2):
        kernels.scale(from_dlpack(x), from_dlpack(y), 3.0)
    assert torch.equal(y, x * 3)
    assert len(device.launches) == 2


def test_two_kernels_of_one_library_run(device, x):
    expected = -x * 2
    cute.compile(kernels.scale_then_negate, from_dlpack(x), 1.0)(from_dlpack(x), 2.0)
    assert torch.equal(x, expected)
    assert len(device.launches) == 2


def test_variants_that_share_a_kernel_name_keep_their_own_code(device, x):
    zeros = torch.zeros(64)
    variants = [cute.compile(kernels.AddConstant(constant), from_dlpack(zeros)) for constant in (1.0, 10.0)]
    for compiled in (*variants, *reversed(variants)):
        compiled(from_dlpack(zeros))
    assert torch.equal(zeros, torch.full((64,), 22.0))
    assert len({launch.name for launch in device.launches}) == 1


def test_pointers_run_and_a_freed_tensor_is_named(device, x):
    pointers = [make_ptr(cutlass.Float32, t.data_ptr(), cute.AddressSpace.gmem, 16) for t in (x, torch.zeros_like(x))]
    compiled = cute.compile(kernels.scale_pointers, *pointers, 1.0)
    y = torch.zeros(64)
    device.register(y, name="the result")
    pointer = make_ptr(cutlass.Float32, y.data_ptr(), cute.AddressSpace.gmem, 16)
    compiled(pointers[0], pointer, 2.0)
    assert torch.equal(y, x * 2)
    del y
    gc.collect()
    with pytest.raises(errors.OutOfBounds, match="'the result' was there and has been freed"):
        compiled(pointers[0], pointer, 2.0)
    y = torch.zeros(64)
    compiled(pointers[0], make_ptr(cutlass.Float32, y.data_ptr(), cute.AddressSpace.gmem, 16), 2.0)
    assert torch.equal(y, x * 2)


def test_an_access_beyond_a_tensor_names_it_and_its_place_and_the_next_launch_works(device, x):
    short = torch.zeros(60)
    compiled = compile_scale(x)
    with pytest.raises(errors.OutOfBounds) as caught:
        compiled(from_dlpack(x), from_dlpack(short), 2.0)
    error = caught.value
    assert "'y'" in str(error)  # the function's parameter
    assert (error.cta, error.warp, error.lane) == (0, 1, 28)
    assert "st.global" in error.ptx_text and "st.global" in compiled.__ptx__.splitlines()[error.ptx_line - 1]
    assert "scale" in error.kernel
    assert not device.launches
    y = torch.zeros_like(x)
    compiled(from_dlpack(x), from_dlpack(y), 2.0)
    assert torch.equal(y, x * 2)


def test_errors_of_tvm_ffi_functions_are_the_emulators_own(device, x):
    example = [from_dlpack(t, enable_tvm_ffi=True) for t in (x, torch.zeros(64))]
    compiled = cute.compile(kernels.scale, *example, 1.0, options="--enable-tvm-ffi")
    emulator.register(compiled.__cubin__, broken(compiled.__ptx__))
    with pytest.raises(errors.UnknownOpcode):
        compiled(x, torch.zeros(64), 2.0)
    emulator.register(compiled.__cubin__, compiled.__ptx__)
    y = torch.zeros(64)
    compiled(x, y, 2.0)
    assert torch.equal(y, x * 2)


def test_an_error_names_the_source_line_where_the_ptx_carries_it():
    done = run_python(
        """
        import torch, cutlass.cute as cute
        from cutlass.cute.runtime import from_dlpack
        from cute_sparse import emulator
        from tests.emulator import shell_kernels as kernels
        x = torch.arange(64.0)
        with emulator.device("sm_90a"):
            compiled = cute.compile(kernels.scale, from_dlpack(x), from_dlpack(x), 1.0)
            try:
                compiled(from_dlpack(x), from_dlpack(torch.zeros(60)), 2.0)
            except emulator.errors.OutOfBounds as error:
                print(error.source)
        """,
        CUTE_DSL_LINEINFO="1",
    )
    file, line = done.stdout.strip().rsplit(":", 1)
    assert Path(file).name == "shell_kernels.py"
    assert "y[i] = x[i] * factor" in Path(file).read_text().splitlines()[int(line) - 1]


def broken(ptx: str) -> str:
    """The same PTX with two statements that no one knows."""
    return ptx.replace("ret;", "frobnicate.b32 %r1, %r1;\n\tcrush.f32 %r1, %r1, %r1;\n\tret;", 1)


def test_unknown_opcodes_are_listed_all_at_once(device, x):
    compiled = compile_scale(x)
    emulator.register(compiled.__cubin__, broken(compiled.__ptx__))
    with pytest.raises(errors.UnknownOpcode) as caught:
        compiled(from_dlpack(x), from_dlpack(torch.zeros(64)), 2.0)
    assert "frobnicate.b32" in str(caught.value) and "crush.f32" in str(caught.value)
    assert not device.launches


def test_numpy_arrays_are_device_tensors_too(device, x):
    numpy = pytest.importorskip("numpy")
    y = numpy.zeros(64, dtype=numpy.float32)
    compile_scale(x)(from_dlpack(x), from_dlpack(y), 2.0)
    assert (y == (x * 2).numpy()).all()


def test_persistent_kernels_see_the_devices_multiprocessors():
    with emulator.device("sm_90a", sms=6):
        info = cutlass.utils.HardwareInfo()
        assert info.get_device_multiprocessor_count() == 6
        assert [info.get_max_active_clusters(size) for size in (1, 2, 8)] == [6, 3, 1]


# --- entering and leaving ------------------------------------------------------------------------------------------


def test_a_device_leaves_the_process_as_it_was(tmp_path, monkeypatch, x):
    from cutlass.base_dsl.compiler import KeepPTX

    settings = cute._dsl.CuTeDSL._get_dsl().envar
    monkeypatch.setattr(settings, "dump_dir", str(tmp_path))

    def state() -> dict:
        return {
            "settings": {name: value for name, value in vars(settings).items() if name != "_arch"},
            "tensor": (cute.runtime._Tensor.__init__, torch.Tensor.data_ptr),
            "environment": os.environ.get("CUTE_DSL_ARCH"),
            "kept": cute.compile._compile_options.options[KeepPTX].value,
            "hardware": cutlass.utils.HardwareInfo.__init__,
        }

    before = state()
    with emulator.device("sm_90a"):
        compile_scale(x)
        compile_scale(x)
        assert state() != before
    assert state() == before
    with pytest.raises(ZeroDivisionError), emulator.device("sm_90a"):
        raise ZeroDivisionError
    assert state() == before and emulator.entered() is None
    assert not list(tmp_path.iterdir())


def test_functions_refuse_the_wrong_device_by_name(x):
    arguments = (from_dlpack(x), from_dlpack(torch.zeros(64)), 1.0)
    before = cute.compile(kernels.scale, *arguments)  # for a real GPU
    with emulator.device("sm_90a"):
        arguments = (from_dlpack(x), from_dlpack(torch.zeros(64)), 1.0)
        hopper = compile_scale(x)
        executor = hopper.to(None)
        with pytest.raises(errors.NotCompiledHere, match="before the emulated device was entered"):
            before(*arguments)
        with pytest.raises(errors.AlreadyEntered, match="sm_90a"), emulator.device("sm_100a"):
            pass
        hopper(*arguments)
    with pytest.raises(errors.NotEntered, match="scale"):
        hopper(*arguments)
    with emulator.device("sm_100a"):
        for function in (hopper, executor):
            with pytest.raises(errors.WrongArch, match="compiled for sm_90a.*sm_100a"):
                function(*arguments)
        with pytest.raises(errors.WrongArch, match="sm_80"):
            compile_scale(x, options="--gpu-arch sm_80")(*arguments)
    with emulator.device("sm_90a", order="late") as again:  # a second device of its arch is as good
        y = torch.zeros(64)
        hopper(from_dlpack(x), from_dlpack(y), 2.0)
        assert torch.equal(y, x * 2) and len(again.launches) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"arch": "sm_80"}, errors.UnknownArch, "sm_80.*sm_90a, sm_100a"),
        ({"arch": "sm_90a", "order": "sometimes"}, ValueError, "eager, late, random"),
        ({"arch": "sm_90a", "sms": 0}, ValueError, "sms=0"),
        ({"arch": "sm_90a", "threads": 0}, ValueError, "threads=0"),
        ({"arch": "sm_90a", "max_warp_instructions": 0}, ValueError, "max_warp_instructions=0"),
    ],
)
def test_bad_devices_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        emulator.device(**arguments)


def test_another_dsl_version_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "4.9.0")
    with pytest.raises(errors.UnsupportedVersion, match=r"4\.8\.1.*4\.9\.0 is installed"):
        devices.require_dsl()


def test_a_package_alone_names_the_extra_that_the_emulator_needs(monkeypatch):
    monkeypatch.setattr(devices, "FFI_PACKAGE", "a-package-that-nobody-has")
    with pytest.raises(errors.UnsupportedVersion, match=r"nobody-has, which is not installed.*cute-sparse\[emulator\]"):
        devices.require_dsl()


def test_tensors_elsewhere_are_refused(device):
    with pytest.raises(errors.WrongDevice, match="meta"):
        from_dlpack(torch.empty(4, device="meta"))
    with pytest.raises(errors.WrongDevice, match="meta"):
        device.register(torch.empty(4, device="meta"))


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        (kernels.Geometry(cluster=(3, 1, 1), grid=(4, 1, 1)), r"\(4, 1, 1\) is not a multiple of cluster \(3, 1, 1\)"),
        (kernels.Geometry(cluster=(32, 1, 1), grid=(32, 1, 1)), r"cluster \(32, 1, 1\) is impossible"),
        (kernels.Geometry(block=(1025, 1, 1)), r"block \(1025, 1, 1\)"),
        (kernels.Geometry(grid=(1, 70000, 1)), r"grid \(1, 70000, 1\)"),
    ],
)
def test_impossible_geometry_is_refused(device, geometry, message):
    compiled = cute.compile(kernels.nothing, geometry)
    with pytest.raises(errors.BadLaunch, match=message):
        compiled()
    cute.compile(kernels.nothing, kernels.Geometry())()
    assert len(device.launches) == 1


def test_too_much_shared_memory_is_refused(device):
    compiled = cute.compile(kernels.nothing_with_shared_bytes, 0)
    compiled(1024)
    assert device.launches[0].shared_memory == 1024
    with pytest.raises(errors.BadLaunch, match="300000 dynamic bytes; a CTA has 232448"):
        compiled(300000)


# --- functions from a disk cache -----------------------------------------------------------------------------------

STORE = """
    import sys, torch, cutlass.cute as cute
    from cutlass.cute.runtime import from_dlpack
    from pathlib import Path
    from cute_sparse import emulator
    from tests.emulator import shell_kernels as kernels
    folder = Path({folder!r})
    x = torch.arange(64.0)
    with emulator.device("sm_90a"):
        plain = cute.compile(kernels.scale, from_dlpack(x), from_dlpack(x), 1.0)
        (folder / "plain.o").write_bytes(plain.dump_to_object("plain"))
        tensor = from_dlpack(x, enable_tvm_ffi=True)
        ffi = cute.compile(kernels.scale, tensor, tensor, 1.0, options="--enable-tvm-ffi")
        ffi.export_to_c(str(folder / "ffi.o"), "ffi")
        for name, function in (("plain", plain), ("ffi", ffi)):
            (folder / (name + ".cubin")).write_bytes(function.__cubin__)
            (folder / (name + ".ptx")).write_text(function.__ptx__)
"""
RESTORE = """
    import torch, cutlass.cute as cute
    from cutlass.cute.runtime import from_dlpack
    from pathlib import Path
    from cute_sparse import emulator
    folder = Path({folder!r})
    x, y = torch.arange(64.0), torch.zeros(64)
    with emulator.device("sm_90a") as device:
        for name in ("plain", "ffi"):
            module = cute.runtime.load_module(str(folder / (name + ".o")), enable_tvm_ffi=name == "ffi")
            function = getattr(module, name)
            arguments = (x, y, 2.0) if name == "ffi" else (from_dlpack(x), from_dlpack(y), 2.0)
            try:
                function(*arguments)
            except emulator.errors.BadLaunch as error:
                print("refused", "emulator.register(cubin, ptx)" in str(error))
            emulator.register((folder / (name + ".cubin")).read_bytes(), (folder / (name + ".ptx")).read_text())
            y.zero_()
            function(*arguments)
            print("runs", torch.equal(y, x * 2), len(device.launches))
"""


def test_stored_functions_need_their_ptx_and_run_with_it(tmp_path):
    run_python(STORE.format(folder=str(tmp_path)))
    lines = run_python(RESTORE.format(folder=str(tmp_path))).stdout.splitlines()
    # The second function has the first one's cubin: its PTX is known by then.
    assert lines == ["refused True", "runs True 1", "runs True 3"] or lines == [
        "refused True", "runs True 1", "refused True", "runs True 2",
    ]  # fmt: skip


# --- memory --------------------------------------------------------------------------------------------------------


class RecordedCore:
    """What the registry tells the core."""

    def __init__(self):
        self.ranges: dict[int, tuple[int, str]] = {}

    def add_memory(self, address, size_bytes, name):
        assert address not in self.ranges
        self.ranges[address] = (size_bytes, name)

    def remove_memory(self, address):
        del self.ranges[address]


@pytest.fixture
def registry():
    from cute_sparse.emulator.memory import Registry

    return Registry(RecordedCore())


def test_views_share_their_storages_range(registry):
    whole = torch.zeros(4, 8)
    registry.add(whole[2:], name="a view")
    registry.add(whole)
    assert registry._core.ranges == {whole.data_ptr(): (4 * 8 * 4, "a view")}


def test_freed_moved_and_resized_storages_leave(registry):
    tensor, resized = torch.zeros(16), torch.zeros(16)
    registry.add(tensor)
    registry.add(resized)
    resized.untyped_storage().resize_(1 << 20)
    registry.sweep()
    assert list(registry._core.ranges) == [tensor.data_ptr()]
    del tensor
    registry.sweep()
    assert not registry._core.ranges


def test_a_given_name_outlives_an_arguments_name(registry):
    tensor, other = torch.zeros(16), torch.zeros(16)
    registry.add(tensor, name="mine")
    registry.add(other)
    registry.name_if_nameless(tensor, "q")
    registry.name_if_nameless(other, "q")
    assert registry._core.ranges[tensor.data_ptr()][1] == "mine"
    assert registry._core.ranges[other.data_ptr()][1] == "q"


# --- building ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_source(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CUTE_SPARSE_EMULATOR_DIR", str(tmp_path / "cache"))
    source = tmp_path / "tiny.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n')
    return source


def test_importing_the_emulator_neither_builds_nor_loads_anything_heavy(tmp_path):
    done = run_python(
        """
        import sys
        import cute_sparse.emulator
        print([name for name in ("cutlass", "triton") if name in sys.modules])
        """,
        CUTE_SPARSE_EMULATOR_DIR=str(tmp_path / "cache"),
    )
    assert done.stdout.strip() == "[]"
    assert not (tmp_path / "cache").exists()


def test_rivals_build_once(tiny_source, tmp_path, monkeypatch):
    log = tmp_path / "log"
    compiler = tmp_path / "counting-compiler"
    compiler.write_text(f'#!/bin/sh\necho run >> "{log}"\nexec {build.find_compiler()} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    built: list[Path] = []
    rivals = [threading.Thread(target=lambda: built.append(build.build("1", [tiny_source]))) for _ in range(3)]
    for rival in rivals:
        rival.start()
    for rival in rivals:
        rival.join()
    assert len(built) == 3 and len(set(built)) == 1
    assert log.read_text().count("run") == 2  # one to compile, one to link
    tiny_source.write_text('extern "C" int answer() { return 43; }\n')
    assert build.build("1", [tiny_source]) != built[0]
    assert build.build("2", [tiny_source]) != build.build("1", [tiny_source])  # another version of the DSL


def test_a_compilers_complaint_is_shown(tiny_source):
    tiny_source.write_text("this is not C++\n")
    with pytest.raises(errors.BuildError, match=r"(?s)tiny\.cpp.*error"):
        build.build("1", [tiny_source])


def test_without_a_compiler_the_error_says_what_to_install(tiny_source, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(errors.BuildError, match="install g\\+\\+ 9"):
        build.build("1", [tiny_source])


def test_every_redirected_name_is_defined_and_of_equal_length():
    import ctypes

    from cute_sparse.emulator import host_code

    library = ctypes.CDLL(str(devices.load_core().path))
    for name in host_code.REDIRECTED:
        assert len(host_code.redirected_name(name)) == len(name)
        assert getattr(library, host_code.redirected_name(name))


# --- scripts -------------------------------------------------------------------------------------------------------


def run_script(folder: Path, code: str, *options: str, arguments: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    script = folder / "script.py"
    script.write_text(textwrap.dedent(code))
    return subprocess.run(
        [sys.executable, "-m", "cute_sparse.emulator", *options, str(script), *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("arch", ["sm_103a"], indirect=True)  # the others' scripts are somebody else's, below
def test_a_script_sees_a_gpu_and_its_launches_are_printed(tmp_path, arch):
    done = run_script(
        tmp_path,
        """
        import sys
        import torch
        import cutlass.cute as cute
        from cutlass.cute.runtime import from_dlpack
        from tests.emulator import shell_kernels as kernels

        assert sys.argv[1:] == ["--order", "mine"] and __name__ == "__main__"
        assert torch.cuda.is_available() and torch.cuda.device_count() == 1
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        print("capability", torch.cuda.get_device_capability(), properties.multi_processor_count)
        x = torch.arange(64, dtype=torch.float32, device="cuda")
        y = torch.zeros(64).cuda()
        compiled = cute.compile(kernels.scale, from_dlpack(x), from_dlpack(y), 1.0)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(torch.cuda.Stream()):
            start.record()
            compiled(from_dlpack(x), from_dlpack(y), 2.0)
            end.record()
        torch.cuda.synchronize()
        assert start.elapsed_time(end) > 0
        assert torch.equal(y.cpu(), torch.arange(64) * 2.0)
        sys.exit(7)
        """,
        "--arch", arch, "--sms", "3", "--order", "late", arguments=("--order", "mine"),
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    assert f"capability {emulator.ARCHES[arch]} 3" in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("[emulator]")]
    assert "scale" in line and "grid=(1, 1, 1)" in line and "block=(64, 1, 1)" in line and "mma=0" in line


def test_a_scripts_exception_is_its_status(tmp_path):
    done = run_script(tmp_path, "raise ValueError('mine')", "--arch", "sm_90a")
    assert done.returncode == 1 and "ValueError: mine" in done.stderr
    assert run_script(tmp_path, "", "--arch", "sm_80").returncode == 2


@pytest.fixture
def cuda():
    with emulator.device("sm_90a", torch_cuda=True) as entered:
        yield entered


def test_cuda_tensors_know_that_they_are(cuda):
    host = torch.ones(4)
    for tensor in (
        torch.ones(4, device="cuda"), torch.tensor([1.0], device="cuda"), host.cuda(), host.to("cuda"),
        host.to(torch.device("cuda", 0), torch.bfloat16), torch.as_tensor([1], device="cuda"),
        torch.ones(4, device="cuda") + 1, torch.ones(4, device="cuda")[1:], torch.empty_like(host.cuda()),
        host.cuda().new_zeros(3), torch.nn.Linear(2, 2, device="cuda").weight, torch.nn.Linear(2, 2).cuda().weight,
        torch.cat([host.cuda(), host.cuda()]), torch.zeros_like(host, device="cuda"), host.to(host.cuda()),
        torch.randn(3, generator=torch.Generator("cuda").manual_seed(1), device="cuda"),
    ):  # fmt: skip
        assert tensor.is_cuda and tensor.device == torch.device("cuda", 0) and tensor.get_device() == 0
    for tensor in (
        host, host + 1, host.cuda().cpu(), host.cuda().to("cpu"), torch.empty_like(host.cuda(), device="cpu"),
        host.cuda().to(host),
    ):  # fmt: skip
        assert not tensor.is_cuda and tensor.device == torch.device("cpu") and tensor.get_device() == -1


def test_a_copy_to_the_host_is_a_copy_and_a_move_to_where_it_is_is_not(cuda):
    tensor = torch.zeros(4, device="cuda")
    on_host = tensor.cpu()
    same = tensor.to("cuda")
    tensor += 1
    assert torch.equal(on_host, torch.zeros(4)) and torch.equal(same.cpu(), torch.ones(4))
    assert "cuda:0" in repr(tensor)
    with pytest.raises(TypeError, match="cpu"):
        tensor.numpy()
    with pytest.raises(RuntimeError, match="ordinal 1"):
        torch.zeros(1, device="cuda:1")


def test_gradients_flow_through_cuda_tensors(cuda):
    weight = torch.ones(3, device="cuda", requires_grad=True)
    (weight.to(torch.float64).cpu() * 2).sum().backward()
    assert weight.grad is not None and weight.grad.is_cuda and torch.equal(weight.grad.cpu(), torch.full((3,), 2.0))


def test_a_cpu_tensor_in_a_script_is_not_device_memory(cuda, x):
    on_device = [from_dlpack(t.cuda(), enable_tvm_ffi=True) for t in (x, x)]
    compiled = cute.compile(kernels.scale, *on_device, 1.0, options="--enable-tvm-ffi")
    with pytest.raises(ValueError, match="(?i)device"):
        compiled(x.cuda(), torch.zeros(64), 2.0)
    y = torch.zeros(64, device="cuda")
    compiled(x.cuda(), y, 2.0)
    assert torch.equal(y.cpu(), x * 2)


def test_an_operator_that_exists_for_cuda_alone_runs_on_cuda_tensors(cuda):
    @torch.library.custom_op("cute_sparse_test::double_on_cuda", mutates_args=(), device_types="cuda")
    def double(x: torch.Tensor) -> torch.Tensor:
        assert x.is_cuda
        return x * 2

    assert torch.equal(double(torch.ones(3, device="cuda")).cpu(), torch.full((3,), 2.0))


def test_seeds_and_generators_repeat(cuda):
    torch.cuda.manual_seed_all(5)
    first = torch.randn(4, device="cuda")
    torch.manual_seed(5)
    assert torch.equal(first.cpu(), torch.randn(4, device="cuda").cpu())


def test_what_has_no_meaning_here_is_refused(cuda):
    with pytest.raises(NotImplementedError, match="CUDAGraph"):
        torch.cuda.CUDAGraph()


def test_torch_is_itself_again_behind_the_device(x):
    before = (torch.cuda.is_available, torch.Generator, torch.cuda.Stream, torch.version.cuda)
    with emulator.device("sm_90a", torch_cuda=True):
        tensor = torch.ones(3, device="cuda")
        assert tensor.is_cuda
    assert (torch.cuda.is_available, torch.Generator, torch.cuda.Stream, torch.version.cuda) == before
    assert not tensor.is_cuda


FLASH_ATTENTION = """
    import sys
    import torch
    from flash_attn.cute import flash_attn_func

    torch.manual_seed(0)
    q = torch.randn(1, 128, 2, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 128, 1, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = flash_attn_func(q, k, v, causal=True)
    out = (out[0] if isinstance(out, tuple) else out).float().cpu()
    heads = [t.float().cpu().transpose(1, 2) for t in (q, k, v)]
    reference = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    reference = reference.transpose(1, 2)
    print("error", ((out - reference).norm() / reference.norm()).item())
    sys.exit(0 if (out - reference).norm() < 4e-3 * reference.norm() else 1)
"""


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"], indirect=True)
def test_somebody_elses_attention_script_runs(tmp_path, arch):
    pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed")
    done = run_script(tmp_path, FLASH_ATTENTION, "--arch", arch, "--order", "random", "--seed", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("[emulator]") and "FlashAttention" in line]


def test_what_sm_103a_alone_has_is_refused_by_name(tmp_path):
    """FlashAttention-4 uses it; the emulator runs what sm_103a has in common with sm_100a."""
    pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed")
    done = run_script(tmp_path, FLASH_ATTENTION, "--arch", "sm_103a")
    assert done.returncode != 0 and "tcgen05.ld.red.sync.aligned" in done.stderr
