"""Bad input, each kind with its error by name; what is returned; conventions of the arguments."""

from __future__ import annotations

import math
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import cute_sparse
from cute_sparse import inputs, reference


def tensors(batch=2, seqlen_q=20, seqlen_k=30, heads_q=4, heads_kv=2, head_dim=16, head_dim_v=16, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, seqlen_q, heads_q, head_dim, generator=generator).to(dtype)
    k = torch.randn(batch, seqlen_k, heads_kv, head_dim, generator=generator).to(dtype)
    v = torch.randn(batch, seqlen_k, heads_kv, head_dim_v, generator=generator).to(dtype)
    return q, k, v


def call(**changes):
    q, k, v = tensors()
    given = dict(q=q, k=k, v=v) | changes
    return cute_sparse.attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)


def call_varlen(**changes):
    """Three sequences: 10, 0 and 20 queries, 25, 5 and 10 keys."""
    q, k, v = (tensor.flatten(0, 1) for tensor in tensors(batch=1, seqlen_q=30, seqlen_k=40))
    given = dict(
        q=q, k=k, v=v,
        cu_seqlens_q=int32(0, 10, 10, 30), cu_seqlens_k=int32(0, 25, 30, 40), max_seqlen_q=20, max_seqlen_k=25,
    )  # fmt: skip
    given |= changes
    return cute_sparse.attention_varlen(given.pop("q"), given.pop("k"), given.pop("v"), **given)


def call_decode(**changes):
    """Two sequences of 25 and 30 keys; with a page table, eight pages of 16."""
    q, k, v = tensors(seqlen_q=3)
    given = dict(q=q, k_cache=k, v_cache=v, seqused_k=int32(25, 30)) | changes
    if "page_table" in given:
        pages = tensors(batch=8, seqlen_k=16)
        given = dict(given, k_cache=pages[1], v_cache=pages[2]) | changes
    return cute_sparse.decode(given.pop("q"), given.pop("k_cache"), given.pop("v_cache"), **given)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def bf16(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)


def misaligned(*shape):
    """Starts 2 bytes into its memory."""
    return torch.zeros(math.prod(shape) + 1, dtype=torch.bfloat16)[1:].view(shape)


def huge():
    """Over 2^31 elements, of memory that is never touched."""
    return torch.empty((1, 2**22 + 1, 4, 128), dtype=torch.bfloat16)


Q, K, V = tensors()
ROOM = bf16(3, 20, 4, 16)
JAGGED = torch.nested.nested_tensor([V[0], V[0, :5]], layout=torch.jagged)
BAD = {
    "a sink that is no tensor": (dict(learnable_sink=0.5), TypeError, "learnable_sink is a float"),
    "a sink of rank 2": (dict(learnable_sink=torch.zeros(2, 4)), ValueError, "learnable_sink has shape.*heads_q=4"),
    "a sink of another dtype": (
        dict(learnable_sink=torch.zeros(4).bfloat16()), ValueError, "learnable_sink has dtype torch.bfloat16.*float32"
    ),
    "a sink elsewhere": (dict(learnable_sink=torch.zeros(4, device="meta")), ValueError, "learnable_sink is on meta"),
    "a sink with gaps": (dict(learnable_sink=torch.zeros(8)[::2]), ValueError, "learnable_sink has strides"),
    "a sink that wants a gradient": (
        dict(learnable_sink=torch.zeros(4, requires_grad=True)), NotImplementedError, "learnable_sink requires grad"
    ),
    "q is no tensor": (dict(q=[1.0]), TypeError, "q is a list"),
    "q of rank 3": (dict(q=bf16(20, 4, 16)), ValueError, r"q has shape \(20, 4, 16\); it must have 4 dimensions"),
    "v of rank 5": (dict(v=bf16(2, 30, 2, 16, 1)), ValueError, "v has shape .* 4 dimensions"),
    "k of another dtype": (dict(k=K.half()), ValueError, "k has dtype torch.float16, q has torch.bfloat16"),
    "v of another dtype": (dict(v=V.half()), ValueError, "v has dtype torch.float16, q has torch.bfloat16"),
    "float32": (dict(q=Q.float(), k=K.float(), v=V.float()), NotImplementedError, "float32; supported are .*bfloat16"),
    "float8": (dict(q=Q.to(torch.float8_e4m3fn)), NotImplementedError, "float8_e4m3fn; supported are .*bfloat16"),
    "mixed devices": (dict(k=K.to("meta")), ValueError, "k is on meta, q on cpu"),
    "batches differ": (dict(q=bf16(3, 20, 4, 16)), ValueError, "q has batch 3, k and v have 2"),
    "lengths of k and v differ": (dict(v=bf16(2, 31, 2, 16)), ValueError, r"k has shape .*30.*v has .*31"),
    "heads of k and v differ": (dict(v=bf16(2, 30, 4, 16)), ValueError, "k has shape .* v has "),
    "heads do not divide": (dict(k=bf16(2, 30, 3, 16), v=bf16(2, 30, 3, 16)), ValueError, "heads_q=4 .* heads_kv=3"),
    "no key heads": (dict(k=bf16(2, 30, 0, 16), v=bf16(2, 30, 0, 16)), ValueError, "heads_kv=0"),
    "head dims of q and k differ": (dict(k=bf16(2, 30, 2, 24)), ValueError, "q has head_dim 16, k has 24"),
    "head dim 7": (dict(q=bf16(2, 20, 4, 7), k=bf16(2, 30, 2, 7)), ValueError, "head_dim=7 .*multiple of 8 up to 256"),
    "head dim 264": (dict(q=bf16(2, 20, 4, 264), k=bf16(2, 30, 2, 264)), ValueError, "head_dim=264 .*up to 256"),
    "head dim 0": (dict(q=bf16(2, 20, 4, 0), k=bf16(2, 30, 2, 0)), ValueError, "head_dim=0 .*multiple of 8"),
    "head dim of v 12": (dict(v=bf16(2, 30, 2, 12)), ValueError, "head_dim_v=12 .*multiple of 8"),
    "head dim of v 264": (dict(v=bf16(2, 30, 2, 264)), ValueError, "head_dim_v=264"),
    "last stride not 1": (dict(q=bf16(2, 20, 16, 4).transpose(2, 3)), ValueError, "q has strides .*last one must be 1"),
    "stride not 16 bytes": (dict(k=bf16(2, 30, 2, 20)[..., :16]), ValueError, "k has strides .*multiples of 8"),
    "address not 16 bytes": (dict(v=misaligned(2, 30, 2, 16)), ValueError, "v starts at .*16-byte aligned"),
    "q requires grad": (dict(q=Q.clone().requires_grad_()), NotImplementedError, "q requires grad.*no backward"),
    "v requires grad": (dict(v=V.clone().requires_grad_()), NotImplementedError, "v requires grad.*no backward"),
    "lambda 0": (dict(threshold=0.0), ValueError, r"threshold=0.0 must be in \(0, 1\]"),
    "lambda negative": (dict(threshold=-0.5), ValueError, r"threshold=-0.5 must be in \(0, 1\]"),
    "lambda above 1": (dict(threshold=1.5), ValueError, r"threshold=1.5 must be in \(0, 1\]"),
    "lambda NaN": (dict(threshold=math.nan), ValueError, r"threshold=nan must be in \(0, 1\]"),
    "lambda a string": (dict(threshold="0.1"), TypeError, "threshold is a str"),
    "lambda of a wrong shape": (dict(threshold=torch.full((3,), 0.1)), ValueError, r"threshold .*shape \(3,\)"),
    "lambda of a wrong dtype": (dict(threshold=torch.full((2,), 0.1).double()), ValueError, "float64.*torch.float32"),
    "lambda on another device": (dict(threshold=torch.ones(2, device="meta")), ValueError, "threshold .*meta.*cpu"),
    "lambda 0 in a tensor": (dict(threshold=torch.tensor([0.1, 0.0])), ValueError, r"holds 0.0; .*\(0, 1\]"),
    "lambda requires grad": (dict(threshold=torch.ones(2, requires_grad=True)), NotImplementedError, "threshold"),
    "sparse": (dict(q=Q.to_sparse()), NotImplementedError, "q is a torch.sparse_coo tensor"),
    "nested": (dict(v=JAGGED), NotImplementedError, "v is a nested tensor"),
    "scale 0": (dict(softmax_scale=0.0), ValueError, "softmax_scale=0.0 must be positive"),
    "scale negative": (dict(softmax_scale=-1.0), ValueError, "softmax_scale=-1.0 must be positive"),
    "scale too large": (dict(softmax_scale=2e8), ValueError, r"softmax_scale=200000000.0 must be .* to 1e\+08"),
    "scale 0 in float32": (dict(softmax_scale=1e-46), ValueError, "softmax_scale=1e-46 must be .* from 1.2e-38"),
    "scale a tensor": (dict(softmax_scale=torch.tensor(0.5)), TypeError, "softmax_scale is a Tensor.* a number"),
    "scale a string": (dict(softmax_scale="0.5"), TypeError, "softmax_scale is a str.* a number"),
    "softcap None": (dict(softcap=None), TypeError, "softcap is a NoneType.* a number"),
    "softcap a tensor": (dict(softcap=torch.tensor(20.0)), TypeError, "softcap is a Tensor.* a number"),
    "causal a string": (dict(causal="no"), TypeError, "causal is a str.* True or False"),
    "causal a tensor": (dict(causal=torch.tensor(True)), TypeError, "causal is a Tensor.* True or False"),
    "causal of NumPy": (dict(causal=np.True_), TypeError, "causal is a bool.* Python's True or False"),
    "return_lse None": (dict(return_lse=None), TypeError, "return_lse is a NoneType.* True or False"),
    "return_stats a number": (dict(return_stats=1), TypeError, "return_stats is a int.* True or False"),
    "scale NaN": (dict(softmax_scale=math.nan), ValueError, "softmax_scale=nan must be positive"),
    "softcap negative": (dict(softcap=-1.0), ValueError, "softcap=-1.0 must be positive, .*or 0 for none"),
    "softcap infinite": (dict(softcap=math.inf), ValueError, "softcap=inf must be positive, .* to 10000"),
    "softcap that costs precision": (dict(softcap=1.1e4), ValueError, "softcap=11000.0 must be .* to 10000"),
    "softcap 0 in float32": (dict(softcap=1e-46), ValueError, "softcap=1e-46 must be .* from 1.2e-38"),
    "window no pair": (dict(window_size=5), ValueError, "window_size=5 must be a pair"),
    "window of three": (dict(window_size=(1, 2, 3)), ValueError, "must be a pair"),
    "window below -1": (dict(window_size=(-2, 0)), ValueError, r"window_size=\(-2, 0\)"),
    "window of a fraction": (dict(window_size=(1.5, 0)), ValueError, r"window_size=\(1.5, 0\)"),
    "window a tensor": (dict(window_size=torch.tensor([-1, -1])), ValueError, r"window_size=tensor"),
    "window of a bool": (dict(window_size=(True, 0)), ValueError, r"window_size=\(True, 0\)"),
    "out no tensor": (dict(out=3), TypeError, "out is a int"),
    "out of a wrong shape": (dict(out=bf16(2, 20, 4, 8)), ValueError, r"out has shape .* must be \(2, 20, 4, 16\)"),
    "out of a wrong dtype": (dict(out=bf16(2, 20, 4, 16).half()), ValueError, "out has dtype torch.float16"),
    "out on another device": (dict(out=bf16(2, 20, 4, 16).to("meta")), ValueError, "out is on meta"),
    "out with a wrong stride": (dict(out=bf16(2, 20, 16, 4).transpose(2, 3)), ValueError, "out has strides"),
    "out on its own memory": (dict(out=bf16(2, 20, 1, 16).expand(2, 20, 4, 16)), ValueError, "out .*share memory"),
    "rows of out overlap": (dict(out=bf16(2600).as_strided((2, 20, 4, 16), (1280, 64, 8, 1))), ValueError, "share mem"),
    "out requires grad": (dict(out=bf16(2, 20, 4, 16).requires_grad_()), NotImplementedError, "out requires grad"),
    "out on q": (dict(q=Q, out=Q), ValueError, "out .*memory of its own"),
    "out on a part of q": (dict(q=ROOM[:2], out=ROOM[1:]), ValueError, "out .*memory of its own"),
    "out on rows of v": (
        dict(v=ROOM[:2].view(2, 40, 2, 16)[:, 10:], out=ROOM[:2]), ValueError, "out .*memory of its own",
    ),
    "an unknown option": (dict(dropout_p=0.1), TypeError, "dropout_p"),
}


@pytest.mark.parametrize("changes, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_by_name(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


BAD_VARLEN = {
    "rank 4": (dict(q=bf16(1, 30, 4, 16)), ValueError, "q has shape .*3 dimensions"),
    "cu_seqlens_q missing": (dict(cu_seqlens_q=None), TypeError, "cu_seqlens_q"),
    "cu_seqlens_k missing": (dict(cu_seqlens_k=None), TypeError, "cu_seqlens_k"),
    "cu_seqlens no tensor": (dict(cu_seqlens_k=[0, 25, 30, 40]), TypeError, "cu_seqlens_k is a list"),
    "cu_seqlens int64": (dict(cu_seqlens_q=int32(0, 10, 10, 30).long()), ValueError, "_q .*int64.*torch.int32"),
    "cu_seqlens of rank 2": (dict(cu_seqlens_q=int32(0, 10, 10, 30)[None]), ValueError, "cu_seqlens_q has shape"),
    "cu_seqlens empty": (dict(cu_seqlens_q=int32(), cu_seqlens_k=int32()), ValueError, "cu_seqlens_q has 0 entries"),
    "cu_seqlens with gaps": (dict(cu_seqlens_q=int32(0, 9, 10, 9, 10, 9, 30)[::2]), ValueError, "_q has strides"),
    "cu_seqlens on another device": (dict(cu_seqlens_q=int32(0, 1).to("meta")), ValueError, "cu_seqlens_q is on meta"),
    "batches differ": (dict(cu_seqlens_k=int32(0, 25, 40)), ValueError, "4 entries, cu_seqlens_k 3"),
    "cu_seqlens decrease": (dict(cu_seqlens_k=int32(0, 25, 20, 40)), ValueError, "cu_seqlens_k=.* decreases"),
    "cu_seqlens do not start at 0": (dict(cu_seqlens_q=int32(1, 10, 10, 30)), ValueError, "cu_seqlens_q starts with 1"),
    "cu_seqlens exceed the total": (dict(cu_seqlens_k=int32(0, 25, 30, 41)), ValueError, "ends with 41, .* 40 tokens"),
    "max_seqlen_q too small": (dict(max_seqlen_q=19), ValueError, "max_seqlen_q=19 is less .*20"),
    "max_seqlen_k too small": (dict(max_seqlen_k=24), ValueError, "max_seqlen_k=24 is less .*25"),
    "max_seqlen_q missing": (dict(max_seqlen_q=None), ValueError, "max_seqlen_q=None"),
    "max_seqlen_k negative": (dict(max_seqlen_k=-1), ValueError, "max_seqlen_k=-1"),
    "max_seqlen_k a tensor": (dict(max_seqlen_k=int32(25)[0]), ValueError, "max_seqlen_k=tensor.* an integer"),
    "max_seqlen_k over 2^28": (dict(max_seqlen_k=2**33), NotImplementedError, "max_seqlen_k=8589934592; .*268435455"),
    "heads do not divide": (dict(k=bf16(40, 3, 16), v=bf16(40, 3, 16)), ValueError, "heads_q=4 .* heads_kv=3"),
    "out of a wrong shape": (dict(out=bf16(31, 4, 16)), ValueError, r"out has shape .*\(30, 4, 16\)"),
}


@pytest.mark.parametrize("changes, error, message", BAD_VARLEN.values(), ids=BAD_VARLEN.keys())
def test_bad_packed_input_is_refused_by_name(changes, error, message):
    with pytest.raises(error, match=message):
        call_varlen(**changes)


TABLE = torch.tensor([[0, 1, 9], [7, 2, -5]], dtype=torch.int32)  # of 8 pages; the last column is not used
BAD_DECODE = {
    "a sink of another shape": (dict(learnable_sink=torch.zeros(2)), ValueError, "learnable_sink has shape.*heads_q=4"),
    "no query": (dict(q=bf16(2, 0, 4, 16)), ValueError, "seqlen_q=0 must be from 1 to 16"),
    "17 queries": (dict(q=bf16(2, 17, 4, 16)), ValueError, "seqlen_q=17 must be from 1 to 16.*attention for many"),
    "q of rank 3": (dict(q=bf16(2, 4, 16)), ValueError, r"q has shape \(2, 4, 16\).*4 dimensions.*\(batch, capacity"),
    "k_cache no tensor": (dict(k_cache=3), TypeError, "k_cache is a int"),
    "v_cache of another dtype": (dict(v_cache=V.half()), ValueError, "v_cache has dtype torch.float16, q has"),
    "caches of different lengths": (dict(v_cache=bf16(2, 31, 2, 16)), ValueError, "k_cache has shape.*v_cache has"),
    "batches differ": (dict(q=bf16(3, 1, 4, 16), seqused_k=int32(1, 2, 3)), ValueError, "batch 3, k_cache and v_cache"),
    "heads do not divide": (dict(q=bf16(2, 3, 3, 16)), ValueError, "heads_q=3 .* heads_kv=2"),
    "head dims of q and k": (dict(k_cache=bf16(2, 30, 2, 24)), ValueError, "q has head_dim 16, k_cache has 24"),
    "a cache's strides": (dict(k_cache=bf16(2, 30, 2, 20)[..., :16]), ValueError, "k_cache has strides .*multiples of"),
    "a cache's address": (dict(v_cache=misaligned(2, 30, 2, 16)), ValueError, "v_cache starts at .*16-byte aligned"),
    "no lengths": (dict(seqused_k=None), TypeError, "seqused_k is a NoneType"),
    "lengths a list": (dict(seqused_k=[25, 30]), TypeError, "seqused_k is a list"),
    "lengths int64": (dict(seqused_k=int32(25, 30).long()), ValueError, "seqused_k has dtype torch.int64.*int32"),
    "lengths of a wrong shape": (dict(seqused_k=int32(1, 2, 3)), ValueError, r"seqused_k has .*\(3,\).*\(batch=2,\)"),
    "lengths on another device": (dict(seqused_k=int32(1, 2).to("meta")), ValueError, "seqused_k is on meta"),
    "lengths with gaps": (dict(seqused_k=int32(1, 0, 2, 0)[::2]), ValueError, r"seqused_k has strides \(2,\).*1"),
    "longer than the capacity": (dict(seqused_k=int32(25, 31)), ValueError, r"seqused_k\[1\]=31 .*\[0, 30\]"),
    "a negative length": (dict(seqused_k=int32(-1, 3)), ValueError, r"seqused_k\[0\]=-1 .*\[0, 30\]"),
    "page table no tensor": (dict(page_table=[[0]]), TypeError, "page_table is a list"),
    "page table int64": (dict(page_table=TABLE.long()), ValueError, "page_table has dtype torch.int64.*int32"),
    "page table of rank 1": (dict(page_table=TABLE[0]), ValueError, r"page_table has shape \(3,\).*\(batch=2, pages\)"),
    "page table of another batch": (dict(page_table=TABLE[:1]), ValueError, r"page_table has shape \(1, 3\).*batch=2"),
    "page table on another device": (dict(page_table=TABLE.to("meta")), ValueError, "page_table is on meta"),
    "page table transposed": (dict(page_table=TABLE.T.contiguous().T), ValueError, "page_table has strides"),
    "pages of 48": (
        dict(page_table=TABLE, k_cache=bf16(8, 48, 2, 16), v_cache=bf16(8, 48, 2, 16)), NotImplementedError,
        "pages of 48 tokens; supported are 16, 32, 64, 128, 256",
    ),
    "a page that does not exist": (
        dict(page_table=TABLE, seqused_k=int32(33, 3)), ValueError, r"page_table\[0, 2\]=9, .* 8 pages",
    ),
    "a negative page": (
        dict(page_table=TABLE, seqused_k=int32(3, 40)), ValueError, r"page_table\[1, 2\]=-5, .* 8 pages",
    ),
    "a table of 2^31 tokens": (
        dict(page_table=torch.empty((2, 2**23), dtype=torch.int32), k_cache=bf16(1, 256, 2, 16),
             v_cache=bf16(1, 256, 2, 16)), NotImplementedError, r"2147483648 keys; at most 2\*\*31 - 1",
    ),
    "longer than the table": (dict(page_table=TABLE, seqused_k=int32(3, 49)), ValueError, r"=49 .*\[0, 48\]"),
    "no split": (dict(num_splits=0), ValueError, "num_splits=0 must be a positive integer, or None"),
    "splits a fraction": (dict(num_splits=2.0), ValueError, "num_splits=2.0 must be a positive integer"),
    "splits a bool": (dict(num_splits=True), ValueError, "num_splits=True must be a positive integer"),
    "share_max a string": (dict(share_max="no", threshold=0.1), TypeError, "share_max is a str.* True or False"),
    "maxima shared without a threshold": (dict(share_max=True), ValueError, "share_max=True needs a threshold"),
    "lambda above 1": (dict(threshold=1.5), ValueError, r"threshold=1.5 must be in \(0, 1\]"),
    "lambda of a wrong shape": (dict(threshold=torch.full((3,), 0.1)), ValueError, r"threshold .*shape \(3,\)"),
    "scale 0": (dict(softmax_scale=0.0), ValueError, "softmax_scale=0.0 must be positive"),
    "softcap negative": (dict(softcap=-1.0), ValueError, "softcap=-1.0 must be positive"),
    "window no pair": (dict(window_size=5), ValueError, "window_size=5 must be a pair"),
    "q requires grad": (dict(q=tensors(seqlen_q=3)[0].requires_grad_()), NotImplementedError, "q requires grad"),
    "out of a wrong shape": (dict(out=bf16(2, 3, 4, 8)), ValueError, r"out has shape .* must be \(2, 3, 4, 16\)"),
    "out on a cache": (dict(k_cache=K, q=K[:, :3].repeat(1, 1, 2, 1), out=K.view(2, 15, 4, 16)[:, :3]), ValueError,
                       "out .*memory of its own"),
    "an unknown option": (dict(cu_seqlens_q=0.1), TypeError, "cu_seqlens_q"),
}  # fmt: skip


@pytest.mark.parametrize("changes, error, message", BAD_DECODE.values(), ids=BAD_DECODE.keys())
def test_bad_decode_input_is_refused_by_name(changes, error, message):
    with pytest.raises(error, match=message):
        call_decode(**changes)


def test_what_a_page_table_does_not_use_may_hold_anything():
    call_decode(page_table=TABLE)
    call_decode(page_table=TABLE.flip(1), seqused_k=int32(48, 48), window_size=(28, None))
    call_decode(page_table=TABLE[:, ::3], seqused_k=int32(16, 16))  # one column: its stride means nothing


def test_more_splits_than_tiles_are_as_many_as_tiles():
    torch.testing.assert_close(call_decode(num_splits=10**6), call_decode())


def test_a_cache_may_be_larger_than_other_tensors():
    """Only TMA reaches it, by coordinates. Its memory is never touched here: the sequences are empty."""
    big = huge()
    q = bf16(1, 1, 4, 128)
    assert (cute_sparse.decode(q, big, big, seqused_k=int32(0)) == 0).all()


def test_a_bad_length_or_page_is_found_also_when_the_same_shapes_were_checked_before():
    lengths, table = int32(16, 32), TABLE.clone()
    call_decode(seqused_k=lengths, page_table=table)
    lengths[0] = 33
    with pytest.raises(ValueError, match=r"page_table\[0, 2\]=9"):
        call_decode(seqused_k=lengths, page_table=table)
    table[0, 2] = 3
    call_decode(seqused_k=lengths, page_table=table)
    lengths[1] = 100
    with pytest.raises(ValueError, match=r"seqused_k\[1\]=100"):
        call_decode(seqused_k=lengths, page_table=table)


def test_what_decode_returns():
    assert isinstance(call_decode(), torch.Tensor)
    got = call_decode(return_lse=True, return_stats=True, threshold=0.5)
    assert got.out.shape == (2, 3, 4, 16) and got.lse.shape == (2, 4, 3) and got.lse.dtype == torch.float32
    stats = got.stats
    assert stats.tile_counts.shape == (2, 2, 2) and stats.tile_counts.dtype == torch.int32
    assert stats.skip_map.shape == (2, 2, 1, -(-30 // stats.geometry.tile_n)) and stats.skip_map.dtype == torch.uint8
    assert stats.v_bytes_not_read.shape == (2, 2)
    out = bf16(2, 3, 4, 16)
    assert call_decode(out=out) is out
    torch.testing.assert_close(out, call_decode())


def test_decode_is_causal_unless_told_otherwise():
    torch.testing.assert_close(call_decode(), call_decode(window_size=(None, 0), causal=False))
    assert not torch.allclose(call_decode(), call_decode(causal=False))


@pytest.mark.parametrize("which", ["q", "k"])
def test_tensors_over_2_to_31_elements_are_refused_by_name(which):
    """Memory that is never touched costs nothing; k and v are one tensor, so that their lengths agree."""
    q, big = bf16(1, 20, 4, 128), huge()
    given = dict(q=big if which == "q" else q, k=big if which != "q" else q, v=big if which != "q" else q)
    with pytest.raises(NotImplementedError, match=r"over \d{10} elements; .*2\*\*31 - 1"):
        call(**given)


def test_a_broadcast_tensor_counts_with_all_its_elements():
    with pytest.raises(NotImplementedError, match=r"k .* over 2147484160 elements"):
        inputs._check_memory("k", bf16(1, 1, 4, 128).expand(1, 2**22 + 1, 4, 128))


def test_a_bad_value_is_found_also_when_the_same_shapes_were_checked_before():
    """Plans are kept per shapes and options; what a plan depends on beyond them is checked at every call."""
    threshold, cu_seqlens = torch.full((2,), 0.1), int32(0, 25, 30, 40)
    call(threshold=threshold)
    call_varlen(cu_seqlens_k=cu_seqlens)
    threshold[1] = 2.0
    cu_seqlens[1] = 35
    with pytest.raises(ValueError, match="holds 2.0"):
        call(threshold=threshold)
    with pytest.raises(ValueError, match="decreases"):
        call_varlen(cu_seqlens_k=cu_seqlens)
    call(q=bf16(2, 20, 4, 16))
    with pytest.raises(ValueError, match="q starts at .*16-byte aligned"):
        call(q=misaligned(2, 20, 4, 16))
    q = tensors()[0]
    with torch.no_grad():
        call(q=q.requires_grad_())
    with pytest.raises(NotImplementedError, match="q requires grad"):
        call(q=q)


def test_an_out_that_lies_on_an_input_is_found_also_when_the_same_shapes_were_checked_before():
    q, _, _ = tensors()
    call(q=q, out=torch.empty_like(q))
    with pytest.raises(ValueError, match="out .*memory of its own"):
        call(q=q, out=q)


def test_out_may_lie_between_the_inputs():
    """As a fourth slice of one projection: their addresses alternate."""
    q, _, _ = tensors()
    fused = torch.zeros(2, 20, 8, 16, dtype=torch.bfloat16)
    fused[:, :, :4] = q
    torch.testing.assert_close(call(q=fused[:, :, :4], out=fused[:, :, 4:]), call())


@pytest.mark.parametrize("name, value, equal", [("threshold", 1, True), ("causal", True, 1)])
def test_an_equal_value_of_a_wrong_type_is_refused_also_after_the_right_one(name, value, equal):
    call(**{name: value})
    with pytest.raises(TypeError, match=name):
        call(**{name: equal})


def test_numpy_s_numbers_are_numbers():
    same = dict(softmax_scale=0.5, softcap=8.0, window_size=(5, 3), threshold=0.25)
    numpy = dict(softmax_scale=np.float32(0.5), softcap=np.float64(8), window_size=(np.int64(5), np.int32(3)))
    torch.testing.assert_close(call(**numpy, threshold=np.float32(0.25)), call(**same))
    torch.testing.assert_close(call_varlen(max_seqlen_q=np.int64(20), max_seqlen_k=np.int32(25)), call_varlen())
    torch.testing.assert_close(call_decode(num_splits=np.int64(2)), call_decode(num_splits=2))


@pytest.mark.parametrize(
    "context", [torch.autocast("cpu", torch.bfloat16), torch.device("meta")], ids=["autocast", "another default device"]
)
def test_the_reference_does_not_depend_on_what_surrounds_it(context):
    """As the kernels do not: another default device is not the tensors', an autocast not for their float32."""
    q, k, v = tensors()
    lengths, cumulated = int32(25, 30), int32(0, 20, 40)
    packed = dict(cu_seqlens_q=cumulated, cu_seqlens_k=cumulated, max_seqlen_q=20, max_seqlen_k=20)

    def results():
        yield cute_sparse.attention(q, k, v, threshold=0.5, return_lse=True, return_stats=True)
        yield cute_sparse.attention_varlen(*(x.flatten(0, 1)[:40] for x in (q, k, v)), **packed, return_lse=True)
        yield cute_sparse.decode(q[:, :3], k, v, seqused_k=lengths, threshold=0.5, num_splits=2, return_lse=True)

    expected = list(results())
    with context:
        got = list(results())
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.out, other.out) and torch.equal(one.lse, other.lse)


def test_another_thread_s_autocast_stays_with_it(monkeypatch):
    """A call of a thread with autocast, from its begin to its end while one without is computed."""
    attention = reference.attention

    @torch.autocast("cpu", torch.bfloat16)
    def call_with_autocast():
        call()

    def attention_meanwhile(*arguments, **options):
        monkeypatch.setattr(reference, "attention", attention)
        thread = threading.Thread(target=call_with_autocast)
        thread.start()
        thread.join()
        return attention(*arguments, **options)

    monkeypatch.setattr(reference, "attention", attention_meanwhile)
    call()
    assert reference.attention is attention and not torch.is_autocast_enabled("cpu")


def test_a_device_without_a_kernel_is_named():
    with pytest.raises(RuntimeError, match="meta.*9.0.*10.0.*10.3.*cpu"):
        call(**{name: tensor.to("meta") for name, tensor in zip("qkv", tensors(), strict=True)})


def test_a_gpu_without_a_kernel_is_named(monkeypatch):
    from cute_sparse import targets

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "an older one")
    with pytest.raises(RuntimeError, match="an older one.*8.6.*9.0.*10.0.*10.3"):
        targets.gpu_target.__wrapped__(0)


# ---- What is returned ----


def test_the_output_alone_unless_more_is_asked():
    assert isinstance(call(), torch.Tensor)
    got = call(return_lse=True)
    assert got.out.shape == (2, 20, 4, 16) and got.lse.shape == (2, 4, 20) and got.stats is None
    got = call(return_stats=True)
    assert got.lse is None
    stats = got.stats
    assert stats.tile_counts.shape == (2, 2, 4) and stats.tile_counts.dtype == torch.int32
    rows, cols = -(-20 // stats.geometry.tile_rows), -(-30 // stats.geometry.tile_n)
    assert stats.skip_map.shape == (2, 4, rows, cols) and stats.skip_map.dtype == torch.uint8


def test_packed_shapes():
    got = call_varlen(return_lse=True, return_stats=True)
    assert got.out.shape == (30, 4, 16) and got.lse.shape == (4, 30) and got.stats.tile_counts.shape == (2, 3, 4)


def test_out_is_returned():
    out = bf16(2, 20, 4, 16)
    assert call(out=out) is out
    torch.testing.assert_close(out, call())


def test_the_scale_is_one_over_the_root_of_the_head_dim():
    torch.testing.assert_close(call(), call(softmax_scale=0.25))
    assert not torch.allclose(call(), call(softmax_scale=1.0))


@pytest.mark.parametrize("unbounded", [None, -1])
def test_an_unbounded_window(unbounded):
    torch.testing.assert_close(call(window_size=(unbounded, unbounded)), call())
    torch.testing.assert_close(call(window_size=(unbounded, 0)), call(causal=True))
    torch.testing.assert_close(call(window_size=[unbounded, 0]), call(causal=True))


def test_causal_sets_the_right_of_the_window_to_0():
    torch.testing.assert_close(call(causal=True, window_size=(5, 7)), call(window_size=(5, 0)))


@pytest.mark.parametrize(
    "causal, window_size, expected",
    [
        (False, (None, None), ("full", 30, 20)),
        (False, (-1, -1), ("full", 30, 20)),
        (True, (None, None), ("causal", 30, 0)),
        (True, (-1, 99), ("causal", 30, 0)),
        (True, (5, None), ("band", 5, 0)),
        (False, (5, 6), ("band", 5, 6)),
        (False, (1000, 1000), ("band", 30, 20)),
        (False, (None, 0), ("band", 30, 0)),
    ],
)
def test_the_band_of_a_call(causal, window_size, expected):
    assert inputs.band(causal, window_size, 20, 30) == expected


def test_every_public_name_exists_and_is_documented():
    for name in cute_sparse.__all__:
        value = getattr(cute_sparse, name)
        assert name == "__version__" or value.__doc__, name
    with pytest.raises(AttributeError, match="nothing_like_this"):
        cute_sparse.nothing_like_this  # noqa: B018


# ---- NVTX ----

LISTENING = """
import contextlib, nvtx
heard = []
class Heard(contextlib.ContextDecorator):
    def __init__(self, name, domain):
        self.name = f"{domain}:{name}"
    def __enter__(self):
        heard.append("+" + self.name)
    def __exit__(self, *error):
        heard.append("-" + self.name)
nvtx.annotate = Heard

import torch, cute_sparse
q = torch.randn(1, 4, 2, 16).bfloat16()
lengths = torch.tensor([0, 4], dtype=torch.int32)
cute_sparse.attention(q, q, q)
packed = dict(cu_seqlens_q=lengths, cu_seqlens_k=lengths, max_seqlen_q=4, max_seqlen_k=4)
cute_sparse.attention_varlen(q[0], q[0], q[0], **packed)
cute_sparse.decode(q, q, q, seqused_k=lengths[1:])
print(*heard)
"""


def test_each_call_is_an_nvtx_range():
    """The profiler's side is replaced: nvtx gives the functions back unchanged where no profiler listens."""
    done = subprocess.run([sys.executable, "-c", LISTENING], capture_output=True, text=True, check=True)
    names = ("attention", "attention_varlen", "decode")
    assert done.stdout.split() == [f"{sign}cute_sparse:{name}" for name in names for sign in "+-"]
