"""Cluster launch control and griddepcontrol.

A worker runs one tile for each CTA coordinate that it is given: its own, then those of the launches it cancels. Every
tile of the grid must be worked on exactly once, whoever does it.
"""

from __future__ import annotations

import pytest
import torch

from cute_sparse import emulator
from cute_sparse.emulator import errors
from cute_sparse.emulator.text import module, run_ptx

ORDERS = ("eager", "late", "random")
PARAMETERS = ".param .u64 out"
REGISTERS = ".reg .pred %p<8>; .reg .b32 %r<32>; .reg .b64 %d<8>; .reg .b128 %q<2>;"
SHARED = ".extern .shared .align 1024 .b8 smem[];"

# One warp per CTA. Shared memory: mbarrier at 0, response at 16. %r4..%r6: the tile's CTA coordinates; out[tile] += 1
# and out[tiles + tile] = the worker's cluster, +1.
WORKER = """
  mov.u32 %r3, smem;
  ld.param.b64 %d0, [out];
  mov.u32 %r0, %laneid;
  setp.eq.u32 %p0, %r0, 0;
  @%p0 mbarrier.init.shared.b64 [%r3], 1;
  @%p0 fence.mbarrier_init.release.cluster;
  mov.u32 %r4, %ctaid.x;
  mov.u32 %r5, %ctaid.y;
  mov.u32 %r6, %ctaid.z;
  mov.b32 %r7, 0;
  barrier.cluster.arrive;
  barrier.cluster.wait;
TILE:
  @!%p0 bra WORKED;
  mov.u32 %r10, %nctaid.x;
  mov.u32 %r11, %nctaid.y;
  mad.lo.s32 %r12, %r6, %r11, %r5;
  mad.lo.s32 %r12, %r12, %r10, %r4;
  mul.wide.u32 %d1, %r12, 4;
  add.s64 %d1, %d0, %d1;
  red.global.add.u32 [%d1], 1;
WORKED:
  bar.warp.sync -1;
  REQUEST
WAITING:
  mbarrier.try_wait.parity.shared.b64 %p2, [%r3], %r7;
  @!%p2 bra WAITING;
  xor.b32 %r7, %r7, 1;
  ld.shared.b128 %q0, [%r3+16];
  barrier.cluster.arrive;
  barrier.cluster.wait;
  clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p3, %q0;
  QUERY
  @%p3 bra TILE;
"""
OWN_REQUEST = """
  @%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%r3], 16;
  add.s32 %r13, %r3, 16;
  @%p0 clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.b128 [%r13], [%r3];
"""
# the first CTA asks for the cluster; every CTA waits for the 16 bytes on a barrier of its own
CLUSTER_REQUEST = """
  @%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%r3], 16;
  barrier.cluster.arrive;
  barrier.cluster.wait;
  mov.u32 %r13, %cluster_ctarank;
  setp.eq.and.u32 %p4, %r13, 0, %p0;
  add.s32 %r13, %r3, 16;
  @%p4 clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.multicast::cluster::all.b128
    [%r13], [%r3];
"""
AS_VECTOR = "@%p3 clusterlaunchcontrol.query_cancel.get_first_ctaid.v4.b32.b128 {%r4, %r5, %r6, _}, %q0;\n"
ONE_BY_ONE = "".join(
    f"@%p3 clusterlaunchcontrol.query_cancel.get_first_ctaid::{axis}.b32.b128 %r{4 + k}, %q0;\n"
    for k, axis in enumerate("xyz")
)
OWN_PLACE = """
  mov.u32 %r14, %cluster_ctaid.x;
  add.s32 %r4, %r4, %r14;
  mov.u32 %r14, %cluster_ctaid.y;
  add.s32 %r5, %r5, %r14;
"""


def launch(body: str, tiles: int, *, order: str = "eager", sms: int = 2, threads: int = 1, **options):
    out = torch.zeros(2 * tiles, dtype=torch.int32)
    ptx = module("sm_100a", body, parameters=PARAMETERS, registers=REGISTERS, shared=SHARED)
    with emulator.device(
        "sm_100a", order=order, seed=5, sms=sms, threads=threads, max_warp_instructions=200_000
    ) as device:
        record = run_ptx(device, ptx, [out], shared_bytes=64, **options)
    return out[:tiles], record


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("query", [AS_VECTOR, ONE_BY_ONE], ids=["vector", "one_by_one"])
def test_every_tile_is_worked_on_once(query, order):
    body = WORKER.replace("REQUEST", OWN_REQUEST).replace("QUERY", query)
    worked, record = launch(body, 24, order=order, grid=(4, 3, 2))
    assert worked.tolist() == [1] * 24
    # on two multiprocessors a running CTA takes the others' launches, and some CTA was refused
    cancels = sum(n for opcode, n in record.counts.executed.items() if "try_cancel" in opcode)
    assert cancels >= 24 - 2 + 1


@pytest.mark.parametrize("order", ORDERS)
def test_a_cluster_takes_over_whole_clusters(order):
    body = WORKER.replace("REQUEST", CLUSTER_REQUEST).replace("QUERY", AS_VECTOR + OWN_PLACE)
    worked, _ = launch(body, 16, order=order, grid=(4, 4), cluster=(2, 1), sms=4)
    assert worked.tolist() == [1] * 16


def test_the_first_worker_takes_the_launches_in_grid_order():
    """On one multiprocessor, one CTA works on everything."""
    body = WORKER.replace("REQUEST", OWN_REQUEST).replace("QUERY", AS_VECTOR)
    worked, record = launch(body, 6, grid=(3, 2), sms=1)
    assert worked.tolist() == [1] * 6
    assert sum(n for opcode, n in record.counts.executed.items() if "try_cancel" in opcode) == 6


@pytest.mark.parametrize("order", ORDERS)
def test_a_response_that_nothing_waited_for_is_a_race(order):
    body = WORKER.replace("REQUEST", OWN_REQUEST).replace("QUERY", AS_VECTOR)
    body = body.replace("mbarrier.try_wait.parity.shared.b64 %p2, [%r3], %r7;", "").replace("@!%p2 bra WAITING;", "")
    with pytest.raises(errors.RaceDetected, match="try_cancel"):
        launch(body, 4, grid=4, order=order)


def test_lanes_that_tell_each_other_of_their_reads_may_ask_again():
    """All lanes read the response and arrive on an mbarrier; behind it, one of them may ask for the next."""
    body = WORKER.replace("REQUEST", OWN_REQUEST).replace("QUERY", AS_VECTOR).replace("bar.warp.sync -1;", "")
    init = "@%p0 mbarrier.init.shared.b64 [%r3], 1;"
    body = body.replace(init, init + "@%p0 mbarrier.init.shared.b64 [%r3+8], 32;")
    cluster_barrier = "barrier.cluster.arrive;\n  barrier.cluster.wait;\n  clusterl"
    assert cluster_barrier in body
    all_have_read = """mbarrier.arrive.shared.b64 _, [%r3+8];
  xor.b32 %r15, %r7, 1;
READ:
  mbarrier.try_wait.parity.shared.b64 %p2, [%r3+8], %r15;
  @!%p2 bra READ;
  clusterl"""
    body = body.replace("setp.eq.u32 %p0, %r0, 0;", "setp.eq.u32 %p0, %r0, 5;")
    worked, _ = launch(body.replace(cluster_barrier, all_have_read), 4, grid=4)
    assert worked.tolist() == [1] * 4
    with pytest.raises(errors.RaceDetected, match="ld.shared.b128"):
        launch(body.replace(cluster_barrier, "clusterl"), 4, grid=4)


def test_a_misaligned_response():
    body = WORKER.replace("REQUEST", OWN_REQUEST.replace("%r13, %r3, 16", "%r13, %r3, 24")).replace("QUERY", AS_VECTOR)
    with pytest.raises(errors.Misaligned):
        launch(body, 4, grid=4)


def test_a_request_without_its_barrier():
    body = WORKER.replace("REQUEST", OWN_REQUEST).replace("@%p0 mbarrier.init.shared.b64 [%r3], 1;", "")
    body = body.replace("@%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%r3], 16;", "").replace("QUERY", AS_VECTOR)
    with pytest.raises(errors.BarrierError):
        launch(body, 4, grid=4)


@pytest.mark.parametrize("opcode", ["clusterlaunchcontrol.query_cancel.get_first_ctaid::w.b32.b128 %r4, %q0"])
def test_queries_that_do_not_exist_are_unknown_at_load(opcode):
    with pytest.raises(errors.UnknownOpcode, match="get_first_ctaid::w"):
        launch(f"{opcode};\n", 4)


def test_dependent_launches_find_their_prerequisites_complete():
    body = "griddepcontrol.wait;\ngriddepcontrol.launch_dependents;\n"
    _, record = launch(body, 1)
    assert record.counts.executed["griddepcontrol.wait"] == 1
