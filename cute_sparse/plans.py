"""What a call's plan is: the oracle with its options, or a compiled kernel with all operands but the addresses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd.graph import increment_version

from cute_sparse import inputs, reference, splits, threshold
from cute_sparse.inputs import DecodeRequest, Request
from cute_sparse.launch import Launcher
from cute_sparse.operands import DECODE, PREFILL, Operand
from cute_sparse.problem import Problem
from cute_sparse.targets import Target


class Result(NamedTuple):
    """lse is None where the problem does not ask for it; so are a kernel's tile_counts and skip_map."""

    out: torch.Tensor
    lse: torch.Tensor | None
    tile_counts: torch.Tensor | None
    skip_map: torch.Tensor | None


# ---- The reference -----------------------------------------------------------------------------------------------


def _in_the_types_asked_for(run: Callable) -> Callable:
    """Kernels do not heed a caller's autocast either. Each call has an instance of its own, which keeps what it found:
    another thread's would leave this one with that thread's autocast."""

    @functools.wraps(run)
    def run_without_autocast(*arguments) -> Result:
        with torch.autocast("cpu", enabled=False):
            return run(*arguments)

    return run_without_autocast



class ReferencePlan:
    """The oracle on the CPU, in float32, with Hopper's tiles for head dim 128."""

    geometry = reference.DEFAULT_GEOMETRY

    def __init__(self, request: Request) -> None:
        self.request = request

    @_in_the_types_asked_for
    def run(self, q, k, v, out, given_threshold, sink, cu_seqlens_q, cu_seqlens_k) -> Result:
        request, problem = self.request, self.request.problem
        options = _reference_options(request, q, given_threshold, sink, self.geometry)
        if problem.varlen:
            _check_varlen_values(request, cu_seqlens_q, cu_seqlens_k)
            options |= dict(cu_seqlens_q=cu_seqlens_q.tolist(), cu_seqlens_k=cu_seqlens_k.tolist())
            options |= dict(max_seqlen_q=request.seqlen_q, max_seqlen_k=request.seqlen_k)
            computed = reference.attention_varlen(q, k, v, **options)
        else:
            computed = reference.attention(q, k, v, **options)
        return _reference_result(computed, problem, q, out)


def _reference_options(request: Request | DecodeRequest, q, given_threshold, sink, geometry) -> dict:
    """What `reference.attention` and `reference.decode` are given alike."""
    problem = request.problem
    lambdas = None
    if isinstance(given_threshold, torch.Tensor):
        threshold.check_values(given_threshold)
        form = request.threshold
        lambdas = given_threshold.as_strided((request.batch, request.heads_q), (form.stride_batch, form.stride_head))
    elif given_threshold is not None:
        lambdas = q.new_full((request.batch, request.heads_q), float(given_threshold), dtype=torch.float64)
    return dict(
        softmax_scale=request.softmax_scale,
        window_left=request.window_left if problem.mask == "band" else None,
        window_right=None if problem.mask == "full" else request.window_right,
        softcap=request.softcap,
        threshold=lambdas,
        sink=sink,
        geometry=geometry,
        dtype=torch.float32,
    )


def _reference_result(computed, problem: Problem, q: torch.Tensor, out: torch.Tensor | None) -> Result:
    out = computed.out.to(q.dtype) if out is None else out.copy_(computed.out)
    lse = computed.lse.float() if problem.return_lse else None
    return Result(out, lse, computed.tile_counts, computed.skip_map)


class DecodeReferencePlan:
    """The oracle on the CPU, in float32, with Hopper's tiles for head dim 128; not split unless `num_splits` says so.

    With share_max, the splits of an item run one after the other.
    """

    geometry = reference.DECODE_GEOMETRY

    def __init__(self, request: DecodeRequest) -> None:
        self.request = request
        self.splitting = dict(num_splits=request.num_splits, ctas=1, min_tiles=1)

    @_in_the_types_asked_for
    def run(self, q, k_cache, v_cache, out, given_threshold, sink, seqused_k, page_table) -> Result:
        request = self.request
        inputs.check_decode_values(request, seqused_k, page_table)
        computed = reference.decode(
            q, k_cache, v_cache,
            seqused_k=seqused_k.tolist(), page_table=page_table, share_max=request.problem.share_max,
            **self.splitting, **_reference_options(request, q, given_threshold, sink, self.geometry),
        )  # fmt: skip
        return _reference_result(computed, request.problem, q, out)


def _check_varlen_values(request: Request, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor) -> None:
    inputs.check_cu_seqlens_values(
        cu_seqlens_q, cu_seqlens_k, request.total_q, request.total_k, request.seqlen_q, request.seqlen_k
    )


# ---- Kernels -----------------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    config: object
    launcher: Launcher


def _pointers(operands: tuple[Operand, ...]) -> tuple[str, ...]:
    names = tuple(operand.name for operand in operands if operand.type == "pointer")
    assert names == tuple(operand.name for operand in operands[: len(names)])
    return names


class KernelPlan:
    """A compiled kernel with every operand but the addresses filled in; one of the two kinds below."""

    pointers: tuple[str, ...]  # the kernel's operands that are addresses, by name
    operands: tuple[Operand, ...]  # all of them

    def __init__(
        self, request: Request | DecodeRequest, target: Target, kernel: Kernel, heads: int, map_shape: Callable
    ) -> None:
        """heads: those that decide apart; map_shape: from the geometry, of the skip map behind (batch, heads)."""
        self.request = request
        self.target = target
        self.config, self.launcher = kernel
        self.geometry = self.config.geometry
        self.counts_shape = (2, request.batch, heads)
        self.map_shape = (request.batch, heads, *map_shape(self.geometry))
        self.out_shape, self.lse_shape = request.out_shape, request.lse_shape
        self.return_lse, self.return_stats = request.problem.return_lse, request.problem.return_stats
        self.values_are_near = request.device.type == "cpu"  # in the emulator
        self._constants: tuple[int | float, ...] | None = None

    def run(self, q, k, v, out, given_threshold, sink, *sequences) -> Result:
        """`sequences` are the tensors that tell each sequence's place, as the kind of call has them, or None."""
        threshold_tensor = given_threshold if isinstance(given_threshold, torch.Tensor) else None
        if self.values_are_near:
            self._check_values(*sequences)
            if threshold_tensor is not None:
                threshold.check_values(threshold_tensor)
        if out is None:
            out = q.new_empty(self.out_shape)
        else:
            increment_version(out)  # as PyTorch's own operators do, for autograd to notice the change
        lse = q.new_empty(self.lse_shape, dtype=torch.float32) if self.return_lse else None
        tile_counts = skip_map = None
        if self.return_stats:
            tile_counts = q.new_zeros(self.counts_shape, dtype=torch.int32)
            skip_map = q.new_zeros(self.map_shape, dtype=torch.uint8)
        if self.nothing_to_write:
            pass
        elif self.nothing_to_read:
            out.zero_()
            if lse is not None:
                lse.copy_(sink[:, None]) if self.request.problem.sink else lse.fill_(-torch.inf)
        else:
            self._launch((q, k, v, out, lse, threshold_tensor, sink, *sequences, tile_counts, skip_map))
        return Result(out, lse, tile_counts, skip_map)

    def _launch(self, tensors: tuple[torch.Tensor | None, ...]) -> None:
        """Launch with the tensors that the caller sees; the plan adds those for the kernel alone."""
        if self._constants is None:  # the same at every run: strides are part of what a plan is made for
            values = self._common_values(*tensors[:4]) | self._values(tensors)
            self._constants = tuple(values[operand.name] for operand in self.operands[len(self.pointers) :])
        tensors += self._scratch(tensors[0])
        target = self.target
        with target.ready(self.pointers, tensors):
            stream = target.stream()
            counters = self._counters(target.zeroed(stream, self.zeroed_bytes).data_ptr())
            addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
            self.launcher((*addresses, *counters, *self._constants), stream)

    def _common_values(self, q, k, v, out) -> dict[str, int | float]:
        """The operands that both kinds of kernel have, by name; only the strides need the tensors."""
        request, form = self.request, self.request.threshold
        names = "batch heads_q heads_kv seqlen_q window_left window_right softmax_scale softcap"
        values = {name: getattr(request, name) for name in names.split()}
        for name, tensor in {"q": q, "k": k, "v": v, "out": out}.items():
            values[f"{name}_stride_seq"], values[f"{name}_stride_head"] = _stride(tensor, -3), _stride(tensor, -2)
        return values | {
            "threshold_stride_batch": form.stride_batch if form else 0,
            "threshold_stride_head": form.stride_head if form else 0,
            "threshold_log2": form.log2 if form else 0.0,
            "map_rows": self.map_shape[2],
            "map_cols": self.map_shape[3],
        }


class PrefillKernelPlan(KernelPlan):
    pointers, operands = _pointers(PREFILL), PREFILL
    zeroed_bytes = 8  # the scheduler's counter of work tiles, and of CTAs that are done

    def __init__(self, request: Request, target: Target, kernel: Kernel) -> None:
        def map_shape(geometry):
            return -(-request.seqlen_q // geometry.tile_rows), -(-request.seqlen_k // geometry.tile_n)

        super().__init__(request, target, kernel, request.heads_q, map_shape)
        self.nothing_to_read = request.batch == 0 or request.total_k == 0 or request.seqlen_k == 0
        self.nothing_to_write = 0 in self.out_shape or request.seqlen_q == 0

    def _check_values(self, cu_seqlens_q, cu_seqlens_k) -> None:
        if cu_seqlens_q is not None:
            _check_varlen_values(self.request, cu_seqlens_q, cu_seqlens_k)

    def _scratch(self, q: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ()

    def _counters(self, address: int) -> tuple[int, ...]:
        return (address,)

    def _values(self, tensors: tuple[torch.Tensor | None, ...]) -> dict[str, int]:
        values = {name: getattr(self.request, name) for name in ("seqlen_k", "total_q", "total_k")}
        for name, tensor in zip("q k v out".split(), tensors, strict=False):
            values[f"{name}_stride_batch"] = 0 if self.request.problem.varlen else _stride(tensor, 0)
        return values


class DecodeKernelPlan(KernelPlan):
    """Nothing here depends on lengths.

    splitting  how the tiles of a call are cut, as `splits.item_cuts` takes it
    """

    pointers, operands = _pointers(DECODE), DECODE
    SHARED_MAX_ALIGN_BYTES = 128  # of shared_max behind arrivals: a cache line of its own

    def __init__(self, request: DecodeRequest, target: Target, kernel: Kernel) -> None:
        def map_shape(geometry):
            return -(-request.rows // geometry.tile_rows), -(-request.capacity // geometry.tile_n)

        super().__init__(request, target, kernel, request.heads_kv, map_shape)
        problem = request.problem
        row_blocks, map_cols = self.map_shape[2:]
        self.nothing_to_write = 0 in self.out_shape
        self.nothing_to_read = request.capacity == 0 or request.blocks == 0
        items = request.batch * request.heads_kv * row_blocks
        # An item has at most map_cols tiles, and so at most as many parts.
        self.num_splits = min(request.num_splits, max(map_cols, 1))
        self.splitting = dict(num_splits=self.num_splits, ctas=target.sms, min_tiles=self.config.min_tiles)
        self.slot_rows = min(request.rows, self.geometry.tile_rows)
        self.partial_slots = splits.partial_slots(items, target.sms, self.num_splits)
        self.partials_shape = (self.partial_slots * self.slot_rows * (problem.head_dim_v + 4),)
        partial_bytes = 4 * self.partials_shape[0]
        if partial_bytes > splits.PARTIAL_BYTES_MAX:
            raise ValueError(
                f"num_splits={request.num_splits} of {items} blocks of rows takes {partial_bytes} bytes of partial "
                f"results, more than the {splits.PARTIAL_BYTES_MAX} allowed; num_splits=None takes no more of them "
                "than two for each SM"
            )
        arrivals_bytes = 4 * self.partial_slots
        self.shared_max_offset = -(-arrivals_bytes // self.SHARED_MAX_ALIGN_BYTES) * self.SHARED_MAX_ALIGN_BYTES
        self.zeroed_bytes = arrivals_bytes
        if problem.share_max:
            self.zeroed_bytes = self.shared_max_offset + 4 * items * self.slot_rows

    def _check_values(self, seqused_k, page_table) -> None:
        inputs.check_decode_values(self.request, seqused_k, page_table)

    def _scratch(self, q: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (q.new_empty(self.partials_shape, dtype=torch.float32),)

    def _counters(self, address: int) -> tuple[int, ...]:
        """arrivals, shared_max"""
        return address, address + self.shared_max_offset if self.request.problem.share_max else 0

    def _values(self, tensors: tuple[torch.Tensor | None, ...]) -> dict[str, int]:
        q, k, v, out = tensors[:4]
        page_table = tensors[self.pointers.index("page_table")]
        return {
            "capacity": self.request.capacity,
            "blocks": self.request.blocks,
            "page_table_stride": 0 if page_table is None else page_table.stride(0),
            "partial_slots": self.partial_slots,
            "slot_rows": self.slot_rows,
            "num_splits": self.num_splits,
            "ctas": self.target.sms,
            "q_stride_batch": _stride(q, 0),
            "k_stride_block": _stride(k, 0),
            "v_stride_block": _stride(v, 0),
            "out_stride_batch": _stride(out, 0),
        }


def _stride(tensor: torch.Tensor, dim: int) -> int:
    """In elements. That of a dimension of size 1 means nothing and may be anything: TMA wants a multiple of 16 bytes,
    as every row's length is one."""
    return tensor.stride(dim) if tensor.shape[dim] > 1 else tensor.shape[-1]
