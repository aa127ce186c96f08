"""The way from a call to a launch, without a GPU: the operands that arrive, what is refused, what is kept."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import struct
import subprocess
import sys
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch

import cute_sparse
from cute_sparse import compiled, dispatch, plans, targets
from cute_sparse.launch import Launcher, LaunchError
from cute_sparse.operands import DECODE, PREFILL
from cute_sparse.problem import Problem, TileGeometry, UnsupportedProblem, check_supported, required

C_TYPES = {"pointer": ctypes.c_uint64, "int32": ctypes.c_int32, "int64": ctypes.c_int64, "float32": ctypes.c_float}


class FakeCompiled:
    """Stands for what the DSL compiles: a C function of `void** args`, here one that notes what it is given."""

    def __init__(self, result: int = 0, operands=PREFILL) -> None:
        self.calls: list[dict] = []
        self.result = result
        self.operands = operands
        self.capi_func = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p)(self._entry)

    def to(self, device):
        return self

    def _entry(self, arguments) -> int:
        count = len(self.operands) + 2
        addresses = (ctypes.c_uint64 * count).from_address(arguments)
        values = {}
        for operand, address in zip(self.operands, addresses, strict=False):
            kind = C_TYPES[operand.type]
            assert address % ctypes.sizeof(kind) == 0, "the generated code loads aligned values"
            values[operand.name] = kind.from_address(address).value
        values["stream"] = ctypes.c_uint64.from_address(addresses[-2]).value
        ctypes.c_int32.from_address(addresses[-1]).value = self.result
        self.calls.append(values)
        return 0


class FakeTarget:
    """A device with one stream, 77, whose tensors are the CPU's."""

    arch = "sm_90a"
    emulated = False
    sms = 5

    def __init__(self) -> None:
        self.memory = torch.zeros(1 << 16, dtype=torch.int32)

    def ready(self, names, tensors):
        return contextlib.nullcontext()

    def stream(self) -> int:
        return 77

    def zeroed(self, stream: int, size_bytes: int) -> torch.Tensor:
        assert size_bytes <= self.memory.nbytes
        return self.memory


GEOMETRY = TileGeometry(tile_m=128, tile_rows=64, tile_n=96)


@pytest.fixture
def kernel(monkeypatch) -> FakeCompiled:
    """Calls reach a fake kernel, with real plans, checks and launcher."""
    fake = FakeCompiled()
    launcher = Launcher(fake, PREFILL)
    target = FakeTarget()
    monkeypatch.setattr(dispatch, "_plans", {})
    monkeypatch.setattr(dispatch, "_target", lambda device: target)
    made = plans.Kernel(SimpleNamespace(geometry=GEOMETRY), launcher)
    monkeypatch.setattr(dispatch, "compiled_kernel", lambda problem, target: made)
    return fake


@pytest.fixture
def decode_kernel(monkeypatch) -> FakeCompiled:
    """As `kernel`, for decode."""
    fake = FakeCompiled(operands=DECODE)
    target = FakeTarget()
    config = SimpleNamespace(geometry=TileGeometry(64, 64, 96), min_tiles=3)
    made = plans.Kernel(config, Launcher(fake, DECODE))
    monkeypatch.setattr(dispatch, "_plans", {})
    monkeypatch.setattr(dispatch, "_target", lambda device: target)
    monkeypatch.setattr(dispatch, "compiled_kernel", lambda problem, target: made)
    return fake


def bf16(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)


# ---- Operands ----


def test_every_operand_arrives_as_itself(kernel):
    q, k, v = bf16(2, 200, 6, 64), bf16(2, 300, 3, 64), bf16(2, 300, 3, 32)
    sink = torch.zeros(6)
    got = cute_sparse.attention(
        q, k, v, causal=True, window_size=(50, None), softcap=5.0, softmax_scale=0.3, threshold=0.25,
        learnable_sink=sink,
        return_lse=True, return_stats=True,
    )  # fmt: skip
    (values,) = kernel.calls
    scale = struct.unpack("f", struct.pack("f", 0.3))[0]
    assert values == {
        "q": q.data_ptr(), "k": k.data_ptr(), "v": v.data_ptr(), "out": got.out.data_ptr(), "lse": got.lse.data_ptr(),
        "threshold": 0, "learnable_sink": sink.data_ptr(), "cu_seqlens_q": 0, "cu_seqlens_k": 0,
        "tile_counts": got.stats.tile_counts.data_ptr(), "skip_map": got.stats.skip_map.data_ptr(),
        "work_counter": dispatch._target(q.device).memory.data_ptr(),
        "batch": 2, "heads_q": 6, "heads_kv": 3, "seqlen_q": 200, "seqlen_k": 300, "total_q": 400, "total_k": 600,
        "window_left": 50, "window_right": 0, "threshold_stride_batch": 0, "threshold_stride_head": 0,
        "map_rows": 4, "map_cols": 4,
        "q_stride_batch": 200 * 6 * 64, "q_stride_seq": 6 * 64, "q_stride_head": 64,
        "k_stride_batch": 300 * 3 * 64, "k_stride_seq": 3 * 64, "k_stride_head": 64,
        "v_stride_batch": 300 * 3 * 32, "v_stride_seq": 3 * 32, "v_stride_head": 32,
        "out_stride_batch": 200 * 6 * 32, "out_stride_seq": 6 * 32, "out_stride_head": 32,
        "softmax_scale": scale, "softcap": 5.0, "threshold_log2": -2.0, "stream": 77,
    }  # fmt: skip
    assert got.stats.skip_map.shape == (2, 6, 4, 4) and got.stats.geometry == GEOMETRY
    assert (got.stats.skip_map == 0).all() and (got.stats.tile_counts == 0).all(), "the kernel adds to zeros"


def test_what_is_not_asked_for_is_a_null_pointer(kernel):
    q = bf16(1, 8, 2, 64)
    cute_sparse.attention(q, q, q)
    values = kernel.calls[0]
    absent = ("lse", "threshold", "cu_seqlens_q", "cu_seqlens_k", "tile_counts", "skip_map")
    assert [values[name] for name in absent] == [0] * 6
    assert values["window_left"] == 8 and values["window_right"] == 8


def test_strides_of_single_rows_heads_and_sequences_are_aligned(decode_kernel):
    """What torch reports of a dimension of size 1 means nothing, but TMA refuses strides that are not 16-byte ones."""
    q = bf16(200).as_strided((1, 1, 1, 64), (3, 5, 7, 1))
    cute_sparse.decode(q, q, q, seqused_k=int32(1))
    (values,) = decode_kernel.calls
    strides = [f"{name}_stride_{dim}" for name in ("q", "out") for dim in ("batch", "seq", "head")]
    strides += [f"{name}_stride_{dim}" for name in "kv" for dim in ("block", "seq", "head")]
    assert {values[name] for name in strides} == {64}


def test_packed_operands(kernel):
    q, k = bf16(50, 4, 64), bf16(70, 2, 64)
    cu_q, cu_k = (torch.tensor(values, dtype=torch.int32) for values in ([0, 20, 50], [0, 0, 70]))
    out = bf16(50, 5, 72)[:, :4, :64]
    cute_sparse.attention_varlen(
        q, k, k, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=30, max_seqlen_k=99, out=out
    )
    values = kernel.calls[0]
    expected = dict(
        cu_seqlens_q=cu_q.data_ptr(), cu_seqlens_k=cu_k.data_ptr(), batch=2, seqlen_q=30, seqlen_k=99, total_q=50,
        total_k=70, q_stride_batch=0, q_stride_seq=4 * 64, out_stride_batch=0, out_stride_seq=5 * 72,
        out_stride_head=72, out=out.data_ptr(), map_rows=1, map_cols=2,
    )  # fmt: skip
    assert {name: values[name] for name in expected} == expected


@pytest.mark.parametrize(
    "shape, strides", {(2,): (1, 0), (4,): (0, 1), (2, 4): (4, 1), (2, 1): (1, 0), (1, 4): (0, 1)}.items(), ids=str
)
def test_a_threshold_tensor_goes_by_address_and_strides(kernel, shape, strides):
    q = bf16(2, 8, 4, 64)
    threshold = torch.full(shape, 0.5)
    cute_sparse.attention(q, q, q, threshold=threshold)
    values = kernel.calls[0]
    assert values["threshold"] == threshold.data_ptr()
    assert (values["threshold_stride_batch"], values["threshold_stride_head"]) == strides


def test_the_same_plan_takes_the_tensors_of_each_call(kernel):
    calls = []
    for fill in (1, 2, 3):
        q, k, v = bf16(1, 8, 2, 64) + fill, bf16(1, 9, 2, 64), bf16(1, 9, 2, 64)
        threshold, out = torch.full((2,), 0.5), bf16(1, 8, 2, 64)
        cute_sparse.attention(q, k, v, threshold=threshold, out=out)
        calls.append((q, k, v, threshold, out))
    assert len(dispatch._plans) == 1
    for values, (q, k, v, threshold, out) in zip(kernel.calls, calls, strict=True):
        tensors = dict(q=q, k=k, v=v, threshold=threshold, out=out)
        assert {name: values[name] for name in tensors} == {name: t.data_ptr() for name, t in tensors.items()}


def test_plans_hold_no_tensor_and_are_bounded(kernel, monkeypatch):
    monkeypatch.setattr(dispatch, "PLANS_MAX", 3)
    threshold = torch.full((2,), 0.5)
    q = bf16(1, 8, 2, 64)
    cute_sparse.attention(q, q, q, threshold=threshold)
    alive = weakref.ref(threshold), weakref.ref(q)
    del threshold, q
    gc.collect()
    assert [reference() for reference in alive] == [None, None]
    for length in range(1, 20):
        q = bf16(1, length, 2, 64)
        cute_sparse.attention(q, q, q)
        assert len(dispatch._plans) <= 3


@pytest.mark.parametrize("shape_q, shape_k", [((0, 8, 2, 64), (0, 8, 2, 64)), ((2, 0, 2, 64), (2, 8, 2, 64))])
def test_nothing_is_launched_where_there_is_nothing_to_write(kernel, shape_q, shape_k):
    got = cute_sparse.attention(bf16(*shape_q), bf16(*shape_k), bf16(*shape_k), return_lse=True, return_stats=True)
    assert got.out.shape == shape_q and got.stats.tile_counts.shape == (2, shape_q[0], 2)
    assert kernel.calls == []


def test_nothing_is_launched_where_there_is_no_key(kernel):
    out = bf16(2, 8, 2, 64) + 7
    got = cute_sparse.attention(out + 1, bf16(2, 0, 2, 64), bf16(2, 0, 2, 64), out=out, return_lse=True)
    assert (out == 0).all() and (got.lse == -torch.inf).all()
    assert kernel.calls == []


def test_nothing_is_launched_for_packed_sequences_that_are_all_empty(kernel):
    """Tokens behind the last sequence belong to none."""
    tokens, cu_none, cu_all = bf16(8, 2, 64) + 7, int32(0, 0), int32(0, 8)
    got = cute_sparse.attention_varlen(
        tokens, tokens, tokens, cu_seqlens_q=cu_all, cu_seqlens_k=cu_none, max_seqlen_q=8, max_seqlen_k=0,
        return_lse=True,
    )  # fmt: skip
    assert (got.out == 0).all() and (got.lse == -torch.inf).all()
    cute_sparse.attention_varlen(
        tokens, tokens, tokens, cu_seqlens_q=cu_none, cu_seqlens_k=cu_all, max_seqlen_q=0, max_seqlen_k=8
    )
    assert kernel.calls == []


def test_lengths_that_change_in_cpu_memory_are_checked_before_each_launch(kernel):
    tokens, cu_seqlens = bf16(8, 2, 64), int32(0, 4, 8)
    options = dict(cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=8, max_seqlen_k=8)
    cute_sparse.attention_varlen(tokens, tokens, tokens, **options)
    cu_seqlens[1] = 9
    with pytest.raises(ValueError, match="decreases"):
        cute_sparse.attention_varlen(tokens, tokens, tokens, **options)
    assert len(kernel.calls) == 1


def test_lengths_and_pages_that_change_in_cpu_memory_are_checked_before_each_launch(decode_kernel):
    q, cache, lengths, table = bf16(1, 1, 2, 64), bf16(3, 16, 2, 64), int32(20), int32(2, 1)[None]
    options = dict(seqused_k=lengths, page_table=table)
    cute_sparse.decode(q, cache, cache, **options)
    table[0, 1] = 3
    with pytest.raises(ValueError, match="there are 3 pages"):
        cute_sparse.decode(q, cache, cache, **options)
    lengths[0] = 33
    with pytest.raises(ValueError, match=r"seqused_k\[0\]=33"):
        cute_sparse.decode(q, cache, cache, **options)
    assert len(decode_kernel.calls) == 1


# ---- Operands of decode ----


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_every_decode_operand_arrives_as_itself(decode_kernel, monkeypatch):
    allocated = []
    real = torch.Tensor.new_empty

    def new_empty(self, *given, **more):
        allocated.append(real(self, *given, **more))
        return allocated[-1]

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    q, k, v = bf16(2, 9, 48, 64), bf16(20, 32, 3, 64), bf16(20, 32, 3, 32)
    lengths, table = int32(100, 120), torch.zeros((2, 7), dtype=torch.int32)[:, :4]
    sink = torch.zeros(48)
    got = cute_sparse.decode(
        q, k, v, seqused_k=lengths, page_table=table, window_size=(50, None), softcap=5.0, softmax_scale=0.3,
        threshold=0.25, learnable_sink=sink, num_splits=7, share_max=True, return_lse=True, return_stats=True,
    )  # fmt: skip
    (values,) = decode_kernel.calls
    scale = struct.unpack("f", struct.pack("f", 0.3))[0]
    zeroed = dispatch._target(q.device).memory.data_ptr()
    items, slot_rows = 2 * 3 * 3, 64  # 9 queries of 16 heads are 144 rows: 3 blocks
    partials = allocated[-1]
    assert values == {
        "q": q.data_ptr(), "k": k.data_ptr(), "v": v.data_ptr(), "out": got.out.data_ptr(), "lse": got.lse.data_ptr(),
        "threshold": 0, "learnable_sink": sink.data_ptr(),
        "seqused_k": lengths.data_ptr(), "page_table": table.data_ptr(),
        "tile_counts": got.stats.tile_counts.data_ptr(), "skip_map": got.stats.skip_map.data_ptr(),
        "partials": partials.data_ptr(), "arrivals": zeroed, "shared_max": zeroed + 256,
        "batch": 2, "heads_q": 48, "heads_kv": 3, "seqlen_q": 9, "capacity": 128, "blocks": 20, "page_table_stride": 7,
        "window_left": 50, "window_right": 0, "threshold_stride_batch": 0, "threshold_stride_head": 0,
        "map_rows": 3, "map_cols": 2, "partial_slots": items * 2, "slot_rows": slot_rows,
        "num_splits": 2, "ctas": 5,  # no more splits than tiles
        "q_stride_batch": 9 * 48 * 64, "q_stride_seq": 48 * 64, "q_stride_head": 64,
        "k_stride_block": 32 * 3 * 64, "k_stride_seq": 3 * 64, "k_stride_head": 64,
        "v_stride_block": 32 * 3 * 32, "v_stride_seq": 3 * 32, "v_stride_head": 32,
        "out_stride_batch": 9 * 48 * 32, "out_stride_seq": 48 * 32, "out_stride_head": 32,
        "softmax_scale": scale, "softcap": 5.0, "threshold_log2": -2.0, "stream": 77,
    }  # fmt: skip
    assert partials.dtype == torch.float32 and partials.numel() == items * 2 * slot_rows * (32 + 4)
    assert got.stats.skip_map.shape == (2, 3, 3, 2) and got.stats.tile_counts.shape == (2, 2, 3)
    assert (got.stats.skip_map == 0).all() and (got.stats.tile_counts == 0).all(), "the kernel adds to zeros"
    assert got.stats.v_tile_bytes == 96 * 32 * 2


def test_decode_operands_that_are_not_asked_for(decode_kernel):
    q, k = bf16(2, 1, 8, 64), bf16(2, 200, 2, 64)
    lengths = int32(100, 120)
    cute_sparse.decode(q, k, k, seqused_k=lengths)
    (values,) = decode_kernel.calls
    absent = "lse threshold learnable_sink page_table tile_counts skip_map shared_max page_table_stride".split()
    assert [values[name] for name in absent] == [0] * len(absent)
    expected = dict(capacity=200, blocks=2, num_splits=0, partial_slots=10, slot_rows=4, map_rows=1, map_cols=3)
    assert {name: values[name] for name in expected} == expected


def test_decode_zeroes_as_much_as_the_ctas_coordinate_through(decode_kernel, monkeypatch):
    """arrivals for each slot, two for each CTA, and behind a whole line of them the maxima of each item's rows."""
    sizes = []
    monkeypatch.setattr(FakeTarget, "zeroed", lambda self, stream, size: sizes.append(size) or self.memory)
    q, k = bf16(40, 3, 8, 64), bf16(40, 200, 2, 64)
    lengths = int32(*[100] * 40)
    cute_sparse.decode(q, k, k, seqused_k=lengths)
    cute_sparse.decode(q, k, k, seqused_k=lengths, threshold=0.1, share_max=True)
    assert sizes == [10 * 4, 128 + 80 * 12 * 4]


def test_nothing_is_decoded_where_there_is_nothing_to_write_or_read(decode_kernel):
    got = cute_sparse.decode(bf16(0, 1, 2, 64), bf16(0, 9, 2, 64), bf16(0, 9, 2, 64), seqused_k=int32())
    assert got.shape == (0, 1, 2, 64)
    table = torch.zeros((2, 0), dtype=torch.int32)
    no_pages = bf16(0, 16, 2, 64)
    for cache, more in ((bf16(2, 0, 2, 64), {}), (no_pages, dict(page_table=table))):
        out = bf16(2, 1, 2, 64) + 7
        got = cute_sparse.decode(
            out + 1, cache, cache, seqused_k=int32(0, 0), out=out, return_lse=True, return_stats=True, **more
        )
        assert (out == 0).all() and (got.lse == -torch.inf).all() and got.stats.skip_map.shape == (2, 2, 1, 0)
    assert decode_kernel.calls == []



# ---- Launcher ----


def test_a_refused_launch_raises():
    launcher = Launcher(FakeCompiled(result=700), PREFILL)
    with pytest.raises(LaunchError, match="700"):
        launcher([0] * len(PREFILL), 0)


def test_threads_do_not_mix_their_arguments():
    """The arguments' memory is shared; a foreign call releases the interpreter's lock."""
    fake = FakeCompiled()
    launcher = Launcher(fake, PREFILL)

    def launch_many(value: int) -> None:
        for _ in range(300):
            launcher([value] * len(PREFILL), value)

    threads = [threading.Thread(target=launch_many, args=(value,)) for value in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fake.calls) == 1200
    assert all(len(set(values.values())) == 1 for values in fake.calls)



# ---- Compiled once ----


def test_each_kind_of_problem_is_compiled_once_whatever_the_sizes(monkeypatch):
    loads = []

    def compile_or_load(problem, config, arch, compile, emulated):
        loads.append((problem, arch))
        return FakeCompiled()

    monkeypatch.setattr(compiled, "_launchers", {})
    monkeypatch.setattr(compiled, "_from_disk_or_compiler", compile_or_load)
    monkeypatch.setattr(dispatch, "_plans", {})
    monkeypatch.setattr(dispatch, "_target", lambda device: FakeTarget())
    config = SimpleNamespace(geometry=GEOMETRY)
    monkeypatch.setattr(dispatch, "chosen_kernel", lambda problem, arch: ("config", lambda problem, config: None))
    monkeypatch.setattr(
        dispatch,
        "compiled_kernel",
        lambda problem, target: plans.Kernel(
            config, compiled.launcher(problem, "config", target.arch, None, PREFILL, target.emulated)
        ),
    )
    for batch, length_q, length_k, heads in ((1, 8, 8, 2), (2, 100, 9, 4), (1, 1, 1000, 6)):
        q, k = bf16(batch, length_q, heads, 64), bf16(batch, length_k, 2, 64)
        cute_sparse.attention(q, k, k, causal=True, threshold=0.1 * batch)
        cute_sparse.attention(q, k, k, window_size=(length_k, 0), softmax_scale=0.1 * heads)
    assert len(loads) == 2 and len(set(loads)) == 2


def test_two_threads_compile_one_kernel_once_and_never_at_the_same_time(monkeypatch):
    """Neither ahead: the DSL has one architecture to compile for, and one place where it compiles."""
    loads, at_once = [], []

    def slow(problem, config, arch, compile, emulated):
        at_once.append(arch)
        loads.append(sorted(at_once))
        time.sleep(0.1)
        at_once.remove(arch)
        return FakeCompiled()

    monkeypatch.setattr(compiled, "_launchers", {})
    monkeypatch.setattr(compiled, "_from_disk_or_compiler", slow)
    monkeypatch.setattr(compiled.cache, "directory", lambda: "somewhere")
    problem = Problem("prefill", "bfloat16", 64, 64)
    calls = [(compiled.launcher, (problem, "config", "sm_90a", None, PREFILL))] * 3
    calls.append((compiled.compile_to_disk, (problem, "config", "sm_100a", None)))
    threads = [threading.Thread(target=function, args=arguments) for function, arguments in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(loads) == [["sm_100a"], ["sm_90a"]]


# ---- What is required and what is refused ----


def test_required_names_every_feature():
    plain = Problem("prefill", "bfloat16", 128, 128)
    assert required(plain) == {"dtype:bfloat16", "head_dim:128", "mask:full"}
    everything = Problem("prefill", "float16", 192, 128, "band", True, True, "threshold", True, True, sink=True)
    assert required(everything) == {
        "dtype:float16", "head_dim:192/128", "mask:band", "varlen", "softcap", "sparsity:threshold", "lse", "stats",
        "sink",
    }  # fmt: skip


def test_what_a_kernel_lacks_is_refused_by_name_with_what_there_is():
    problem = Problem("prefill", "bfloat16", 96, 96, softcap=True)
    supports = frozenset({"dtype:bfloat16", "head_dim:128", "head_dim:64", "mask:full"})
    with pytest.raises(UnsupportedProblem, match="sm_90a prefill .*head_dim:96, softcap; .* head_dim:64, head_dim:128"):
        check_supported(problem, supports, "sm_90a")
    check_supported(Problem("prefill", "bfloat16", 64, 64), supports, "sm_90a")


def test_a_call_that_an_architecture_lacks_is_refused_and_never_computed_otherwise(monkeypatch):
    pytest.importorskip("cutlass")
    prefill = importlib.import_module(f"{dispatch.ROOM_OF_ARCH['sm_90a']}.prefill")
    monkeypatch.setattr(prefill, "SUPPORTS", frozenset({"dtype:bfloat16", "head_dim:64", "mask:full"}))
    monkeypatch.setattr(dispatch, "_plans", {})
    monkeypatch.setattr(dispatch, "_target", lambda device: FakeTarget())
    q = bf16(1, 8, 2, 64)
    with pytest.raises(NotImplementedError, match="does not support sparsity:threshold"):
        cute_sparse.attention(q, q, q, threshold=0.1)


@pytest.mark.parametrize("kind", ["prefill", "decode"])
@pytest.mark.parametrize("arch", dispatch.ROOM_OF_ARCH)
def test_every_declared_head_dim_and_the_rest_has_a_config(arch, kind):
    """SUPPORTS is no wish: choose() finds a config for whatever it declares."""
    pytest.importorskip("cutlass")
    supports = cute_sparse.support_matrix(kind)[arch]
    head_dims = [name.partition(":")[2].split("/") for name in supports if name.startswith("head_dim:")]
    assert head_dims
    for pair in head_dims:
        for sparsity in (None, "threshold"):
            problem = Problem(kind, "bfloat16", int(pair[0]), int(pair[-1]), "causal", sparsity=sparsity)
            config, _ = dispatch.chosen_kernel(problem, arch)
            assert config.geometry.tile_rows in (64, 128)
            hash((problem, config))


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_an_architecture_without_a_kernel_is_refused_by_name(monkeypatch, kind):
    monkeypatch.setattr(dispatch, "_kernel_module", lambda kind, arch: object() if arch == "sm_90a" else None)
    with pytest.raises(UnsupportedProblem, match=f"no {kind} kernel for sm_100a; there is one for sm_90a"):
        dispatch.chosen_kernel(Problem(kind, "bfloat16", 64, 64), "sm_100a")


# ---- Devices ----


def test_a_launch_that_was_stopped_half_way_leaves_no_counters_behind():
    class Stopped:
        sms = 1

        def register(self, tensor, name):
            pass

        def raise_pending(self):
            raise RuntimeError("stopped")

    target = targets.EmulatedTarget("sm_90a", Stopped())
    target.zeroed(0, 8).fill_(3)
    with pytest.raises(RuntimeError, match="stopped"), target.ready((), ()):
        pass
    assert not target.zeroed(0, 8).any()


def test_warmup_says_what_is_wrong(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no CUDA device; .*arch= .sm_90a"):
        cute_sparse.warmup()
    with pytest.raises(ValueError, match="sm_80.*sm_90a"):
        cute_sparse.warmup(arch="sm_80")
    with pytest.raises(ValueError, match="not both"):
        cute_sparse.warmup(arch="sm_90a", device="cuda")
    with pytest.raises(NotImplementedError, match="float32.*bfloat16"):
        cute_sparse.warmup(dtype=torch.float32)
    with pytest.raises(ValueError, match="reference"):
        cute_sparse.warmup(device="cpu")
    with pytest.raises(ValueError, match="kind='backward' must be one of prefill, decode"):
        cute_sparse.warmup(kind="backward")
    with pytest.raises(ValueError, match="varlen is for attention_varlen"):
        cute_sparse.warmup(kind="decode", varlen=True)
    with pytest.raises(ValueError, match="page_size=16.* for decode, not for prefill"):
        cute_sparse.warmup(page_size=16)
    with pytest.raises(NotImplementedError, match="page_size:-1; it supports page_size:16"):
        cute_sparse.warmup(kind="decode", page_size=-1, arch="sm_90a")
    for name in ("causal", "window", "varlen", "softcap", "sink", "threshold", "return_lse", "share_max"):
        with pytest.raises(TypeError, match=f"{name} is a float; it must be Python's True or False"):
            cute_sparse.warmup(arch="sm_90a", **{name: 20.0})


def test_warmup_compiles_what_the_call_will_ask_for(monkeypatch):
    """The default mask of each kind of call included."""
    asked = []
    target = FakeTarget()
    monkeypatch.setattr(dispatch, "_plans", {})
    monkeypatch.setattr(dispatch, "_target", lambda device: target)
    config = SimpleNamespace(geometry=TileGeometry(64, 64, 96), min_tiles=3)

    def note(problem, target):
        asked.append(problem)
        operands = dispatch.OPERANDS[problem.kind]
        return plans.Kernel(config, Launcher(FakeCompiled(operands=operands), operands))

    monkeypatch.setattr(dispatch, "compiled_kernel", note)
    q, k, lengths = bf16(1, 1, 2, 64), bf16(1, 16, 2, 64), int32(9)
    table = torch.zeros((1, 1), dtype=torch.int32)
    cute_sparse.warmup(kind="decode", head_dim=64, device="cuda")
    cute_sparse.decode(q, k, k, seqused_k=lengths)
    cute_sparse.warmup(kind="decode", head_dim=64, page_size=16, threshold=True, share_max=True, device="cuda")
    cute_sparse.decode(q, k, k, seqused_k=lengths, page_table=table, threshold=0.1, share_max=True)
    cute_sparse.warmup(head_dim=64, device="cuda")
    cute_sparse.attention(q, k, k)
    assert asked[0::2] == asked[1::2] and len(set(asked)) == 3


def test_an_unknown_device_in_the_environment_is_refused_with_the_choices():
    code = """
import torch, cute_sparse
q = torch.zeros(1, 8, 2, 8, dtype=torch.bfloat16)
cute_sparse.attention(q, q, q)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"CUTE_SPARSE_DEVICE": "emulated:sm_80"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert "CUTE_SPARSE_DEVICE='emulated:sm_80' must be one of emulated:sm_90a, emulated:sm_100a" in done.stderr


def test_streams_have_zeroed_memory_of_their_own():
    memory = targets.ZeroedMemory(torch.device("cpu"))
    given = [memory.of(stream, 100, capturing=False) for stream in range(memory.STREAMS_MAX)]
    assert len({tensor.data_ptr() for tensor in given}) == memory.STREAMS_MAX
    assert memory.of(5, 8, capturing=False) is given[5], "the next launch takes what the last one left zero"
    assert all(tensor.nbytes >= 100 and not tensor.any() for tensor in given)
    with pytest.raises(RuntimeError, match="1024 CUDA streams"):
        memory.of(-1, 8, capturing=False)


def test_zeroed_memory_grows():
    memory = targets.ZeroedMemory(torch.device("cpu"))
    small = memory.of(0, 8, capturing=False)
    large = memory.of(0, 50000, capturing=False)
    assert large.nbytes >= 50000 > small.nbytes and not large.any()
    assert memory.of(0, 8, capturing=False) is large
    assert memory._outgrown[0] is small, "a launch on another stream than the allocator knows may still use it"


def test_memory_that_outlasts_a_call_is_asked_for_by_a_thread_of_its_own(monkeypatch):
    """PyTorch lends a thread's allocations to a pool while torch.compile warms up what it will capture."""
    zeroed, synchronised = [], []

    def zeros(size_bytes: int, device: torch.device) -> torch.Tensor:
        zeroed.append(threading.get_ident())
        return torch.zeros(size_bytes, dtype=torch.uint8)

    stream = SimpleNamespace(synchronize=lambda: synchronised.append(threading.get_ident()))
    monkeypatch.setattr(targets, "_zeros", zeros)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: stream)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(multi_processor_count=132))
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    target = targets.GpuTarget(0, "sm_90a")
    memory = target.zeroed(7, 8)
    assert target.zeroed(7, 8) is memory
    assert zeroed == synchronised and zeroed[0] != threading.get_ident()
    capturing = True
    assert target.zeroed(7, 8) is not memory
    assert zeroed[1:] == [threading.get_ident()], "a graph's own memory comes from its pool"


def test_a_launch_that_is_captured_gets_zeroed_memory_of_its_own():
    """Two graphs captured on one stream may replay at once."""
    memory = targets.ZeroedMemory(torch.device("cpu"))
    shared = memory.of(0, 8, capturing=False)
    captured = [memory.of(0, 8, capturing=True) for _ in range(2)]
    assert len({tensor.data_ptr() for tensor in (shared, *captured)}) == 3
    assert not any(tensor.any() for tensor in captured)
    assert memory.of(0, 8, capturing=False) is shared


# ---- The kernels, by way of the emulator ----


@pytest.mark.parametrize("arch", ["sm_90a", "sm_103a"])
def test_the_environment_sends_cpu_tensors_through_the_kernels(arch):
    pytest.importorskip("cutlass")
    code = """
import torch, cute_sparse
from cute_sparse import emulator, reference
q = torch.randn(1, 70, 2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
out = cute_sparse.attention(q, q, q)
expected = reference.attention(q, q, q, softmax_scale=0.125).out
device = emulator.entered()
print(device.arch, len(device.launches), (out.double() - expected).abs().max().item() < 0.02)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"CUTE_SPARSE_DEVICE": f"emulated:{arch}"},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [arch, "1", "True"]


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("threshold", [None, 0.01])
def test_a_launch_leaves_the_work_counter_zero(arch, threshold):
    """The next launch on the stream starts from it, and nobody zeroes it in between."""
    pytest.importorskip("cutlass")
    q = torch.randn(2, 400, 4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with cute_sparse.emulated(arch, sms=2):
        first = cute_sparse.attention(q, q, q, causal=True, threshold=threshold)
        (counters,) = dispatch._emulation._memory.of_stream.values()
        assert (counters == 0).all()
        second = cute_sparse.attention(q, q, q, causal=True, threshold=threshold)
    assert torch.equal(first, second)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_new_sizes_do_not_recompile(arch, monkeypatch):
    pytest.importorskip("cutlass")
    compilations = []
    real = compiled.compile_now
    monkeypatch.setattr(compiled, "_launchers", {})
    monkeypatch.setenv("CUTE_SPARSE_CACHE", "0")
    monkeypatch.setattr(compiled, "compile_now", lambda *given: (compilations.append(given), real(*given))[1])
    with cute_sparse.emulated(arch):
        for batch, length_q, length_k, heads, heads_kv in ((1, 70, 200, 2, 1), (2, 1, 33, 6, 3), (1, 129, 129, 1, 1)):
            q, k = torch.ones(batch, length_q, heads, 64), torch.ones(batch, length_k, heads_kv, 64)
            out = cute_sparse.attention(q.bfloat16(), k.bfloat16(), k.bfloat16(), causal=True, threshold=0.1 * batch)
            assert (out == 1).all()
    assert len(compilations) == 1
