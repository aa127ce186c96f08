"""Calls that torch.compile or torch.export traced: one operator in the graph, the results of the eager call."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import cute_sparse

BACKEND = "aot_eager"  # traces, makes mutation functional, and generates no code


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    yield
    torch.compiler.reset()


def qkv(seqlen_q=20, seqlen_k=30):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, seqlen_q, 4, 16, generator=generator).bfloat16()
    k, v = (torch.randn(2, seqlen_k, 2, 16, generator=generator).bfloat16() for _ in "kv")
    return q, k, v


def attend(q, k, v, threshold):
    out, lse, stats = cute_sparse.attention(q * 2, k, v, causal=True, threshold=threshold, return_lse=True)
    assert stats is None
    return out + 1, lse


def attend_packed(q, k, v):
    lengths = dict(cu_seqlens_q=torch.tensor([0, 15, 40], dtype=torch.int32), max_seqlen_q=25)
    lengths |= dict(cu_seqlens_k=torch.tensor([0, 20, 60], dtype=torch.int32), max_seqlen_k=40)
    packed = (tensor.flatten(0, 1) for tensor in (q, k, v))
    return cute_sparse.attention_varlen(*packed, softcap=3.0, return_lse=True, **lengths)[:2]


def attend_with_a_window(q, k, v):
    return cute_sparse.attention(q, k, v, window_size=(5, None), threshold=0.5, learnable_sink=torch.arange(4.0))


def decode(q, k, v):
    lengths = torch.tensor([25, 30], dtype=torch.int32)
    return cute_sparse.decode(q[:, :1], k, v, seqused_k=lengths, num_splits=2, threshold=0.1, return_lse=True)[:2]


def decode_paged(q, k, v):
    k_pages, v_pages = (tensor.flatten(0, 1)[:48].reshape(3, 16, 2, 16) for tensor in (k, v))
    table = torch.tensor([[2, 0], [1, 2]], dtype=torch.int32)
    lengths = torch.tensor([20, 32], dtype=torch.int32)
    return cute_sparse.decode(q[:, :2], k_pages, v_pages, seqused_k=lengths, page_table=table, causal=False)


def compiled(call, **options):
    return torch.compile(call, fullgraph=True, backend=BACKEND, **options)


@pytest.mark.parametrize("call", (attend_packed, attend_with_a_window, decode, decode_paged))
def test_a_compiled_call_is_the_eager_call(call):
    torch.testing.assert_close(compiled(call)(*qkv()), call(*qkv()), rtol=0, atol=0)


@pytest.mark.parametrize("threshold", (1.0, torch.ones(4)), ids=("number", "tensor"))
def test_the_threshold_of_a_compiled_call_skips_tiles(threshold):
    def attend_or_skip(q, k, v):
        return cute_sparse.attention(q * 8, k, v, threshold=threshold)

    q, k, v = qkv(1, 600)
    expected = attend_or_skip(q, k, v)
    assert not torch.equal(expected, cute_sparse.attention(q * 8, k, v)), "nothing is skipped"
    torch.testing.assert_close(compiled(attend_or_skip)(q, k, v), expected, rtol=0, atol=0)


def test_one_graph_serves_other_lengths_and_thresholds():
    graphs = []

    def note(graph, inputs):
        graphs.append(graph)
        return graph.forward

    call = torch.compile(attend, fullgraph=True, backend=note, dynamic=True)
    for seqlen_q, seqlen_k, threshold in ((20, 30, 0.5), (17, 40, 0.01)):
        given = (*qkv(seqlen_q, seqlen_k), torch.full((4,), threshold))
        torch.testing.assert_close(call(*given), attend(*given), rtol=0, atol=0)
    assert len(graphs) == 1


def test_a_given_out_is_written_and_returned():
    def attend_into(q, k, v, out):
        return cute_sparse.attention(q, k, v, out=out), out * 2

    out = torch.zeros(2, 20, 4, 16, dtype=torch.bfloat16)
    result, doubled = compiled(attend_into)(*qkv(), out)
    expected = cute_sparse.attention(*qkv())
    for found in (out, result, doubled / 2):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_on_kernels_too():
    """Traced under the emulator, as on a GPU, the operator runs the kernel."""
    pytest.importorskip("cutlass")
    with cute_sparse.emulated("sm_90a") as device:
        compiled(lambda q, k, v: cute_sparse.attention(q, k, v))(*qkv())
        assert len(device.launches) == 1


def fake(*tensors):
    with FakeTensorMode() as mode:
        return tuple(mode.from_tensor(tensor) for tensor in tensors)


@pytest.mark.filterwarnings("error:Accessing the data pointer of FakeTensor")
def test_a_call_of_tensors_without_memory_has_a_result_without_memory():
    cute_sparse.attention(*qkv(), return_stats=True)  # leaves a plan for such shapes
    out, lse, _ = cute_sparse.attention(*fake(*qkv()), return_lse=True)
    assert isinstance(out, FakeTensor) and out.shape == (2, 20, 4, 16) and lse.shape == (2, 4, 20)
    with pytest.raises(NotImplementedError, match="q is a FakeTensor.* in memory"):
        cute_sparse.attention(*fake(*qkv()), return_stats=True)


def test_a_tensor_of_vmap_and_an_option_without_memory_are_named():
    """On a kernel, an `out` at address 0 would be written to."""
    q, k, v = qkv()
    with pytest.raises(NotImplementedError, match="k is one of torch.vmap's; .* a batch dimension"):
        torch.vmap(lambda k: cute_sparse.attention(q, k, v))(k[None])
    with pytest.raises(NotImplementedError, match="threshold is one of torch.vmap's"):
        torch.vmap(lambda threshold: cute_sparse.attention(q, k, v, threshold=threshold))(torch.ones(1, 2, 4))
    with pytest.raises(NotImplementedError, match="out is a FakeTensor.* in memory"):
        cute_sparse.attention(q, k, v, out=fake(q)[0])


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx_keeps_the_operator(mode):
    traced = make_fx(lambda q, k, v: cute_sparse.attention(q, k, v), tracing_mode=mode)(*qkv())
    assert "torch.ops.cute_sparse.attention.default" in traced.code


def test_kernels_run_on_memory_alone_and_say_what_they_write():
    """A FakeTensor's address is 0, also where a plan for its shape is at hand. A given `out` counts as changed, so that
    autograd refuses a gradient that needs what it held before."""
    pytest.importorskip("cutlass")
    out = torch.zeros(2, 20, 4, 16, dtype=torch.bfloat16)
    with cute_sparse.emulated("sm_90a") as device:
        cute_sparse.attention(*qkv(), out=out)
        cute_sparse.attention(*qkv())
        assert isinstance(cute_sparse.attention(*fake(*qkv())), FakeTensor)
        assert len(device.launches) == 2
    assert out._version == 1


def test_a_tangent_is_refused():
    q, k, v = qkv()
    cute_sparse.attention(q, k, v)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="k has a tangent"):
        cute_sparse.attention(q, forward_ad.make_dual(k, torch.ones_like(k)), v)


def test_an_exported_program_keeps_the_operator():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return cute_sparse.attention(q, k, v, causal=True)

    program = torch.export.export(Attention(), qkv())
    assert "torch.ops.cute_sparse.attention.default" in program.graph_module.code
    torch.testing.assert_close(program.module()(*qkv()), cute_sparse.attention(*qkv(), causal=True), rtol=0, atol=0)


@pytest.mark.parametrize("return_lse", (False, True))
def test_the_operators_keep_their_promises(return_lse):
    """Schema, mutation and the shapes that tracing assumes, as torch.library checks them."""
    q, k, v = qkv()
    common = dict(softmax_scale=None, causal=True, window_size=[-1, -1], softcap=0.0, threshold=None)
    common |= dict(threshold_number=0.5, learnable_sink=torch.zeros(4), return_lse=return_lse)
    unpacked = dict(cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None)
    torch.library.opcheck(torch.ops.cute_sparse.attention, (q, k, v, torch.empty_like(q)), common | unpacked)
    sequences = dict(seqused_k=torch.tensor([25, 30], dtype=torch.int32), page_table=None)
    sequences |= dict(num_splits=None, share_max=False)
    step = q[:, :2].contiguous()
    torch.library.opcheck(torch.ops.cute_sparse.decode, (step, k, v, torch.empty_like(step)), common | sequences)


def test_counts_break_the_graph_and_say_why():
    def counts(q, k, v):
        return cute_sparse.attention(q, k, v, threshold=0.5, return_stats=True).stats.tile_counts

    with pytest.raises(torch._dynamo.exc.Unsupported, match="return_stats"):
        compiled(counts)(*qkv())
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(counts, backend=BACKEND)(*qkv()), counts(*qkv()))


def test_training_is_refused_when_traced_too():
    q, k, v = qkv()
    with pytest.raises(NotImplementedError, match="backward"):
        torch.compile(attend_with_a_window, backend=BACKEND)(q.requires_grad_(), k, v)
    torch.testing.assert_close(
        torch.no_grad()(compiled(attend_with_a_window))(q, k, v), attend_with_a_window(q.detach(), k, v)
    )


def test_bad_input_is_named_when_the_operator_runs():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="threshold"):
        compiled(attend)(q, k, v, torch.full((4,), 2.0))
