"""What the assembler made of the kernels as most calls want them: no spill in a main loop, no serialised wgmma. Those
with everything in them are in the tests of each kernel."""

from __future__ import annotations

import pytest

from cute_sparse.problem import Problem
from profiling import kernels, sass

cute = pytest.importorskip("cutlass.cute")
from cutlass.base_dsl.compiler import KeepCUBIN, KeepPTX  # noqa: E402

PROBLEMS = {
    "dense": Problem("prefill", "bfloat16", 128, 128, mask="causal"),
    "threshold": Problem("prefill", "bfloat16", 128, 128, mask="causal", sparsity="threshold"),
    "wide": Problem("prefill", "bfloat16", 256, 256, mask="full"),
    "decode, dense": Problem("decode", "bfloat16", 128, 128, mask="causal", page_size=64),
    "decode, threshold": Problem("decode", "bfloat16", 128, 128, mask="causal", sparsity="threshold", page_size=64),
}


@pytest.mark.parametrize("arch", kernels.ARCHES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_main_loops_neither_spill_nor_serialise(arch, name):
    options = cute.compile._compile_options.options
    before = options[KeepPTX].value, options[KeepCUBIN].value
    row = sass.audit(kernels.compile_kernel(PROBLEMS[name], arch))
    assert (options[KeepPTX].value, options[KeepCUBIN].value) == before, "kernels compiled later are kept, too"
    assert not row.faults and row.stack_bytes == 0, row
    assert row.mma_in_loops > 0 and row.exponentials_in_loops > 0  # the loops that were looked at are the right ones
    assert 64 <= row.registers <= 255


SPILLING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4] ;
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4] ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4] ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/                   STL [R1], R24 ;
        /*0080*/              @!P0 BRA `(.L_x_0) ;
        /*0090*/                   STL [R1], R24 ;
        /*00a0*/                   EXIT ;
"""


def test_spills_and_waits_are_found_in_loops_alone():
    code, labels = sass.instructions(SPILLING)
    loops = sass.main_loops(code, labels)
    assert loops == [(1, 8)]
    assert sass.count(sass.LOCAL, code, loops) == 1
    assert sass.serialised(code, loops) == 3


PTX = """
.visible .entry kernel()
.reqntid 384, 1, 1
{
    setmaxnreg.dec.sync.aligned.u32 40;
}
"""


def test_registers_that_setmaxnreg_cannot_deal_out_are_found():
    code = ["USETMAXREG.DEALLOC.CTAPOOL 0x28 ", "EXIT "]
    assert sass.dealt_out(PTX, code) == 168
    assert sass.dealt_out(PTX, ["EXIT "]) == sass.DROPPED
    assert sass.dealt_out("ret;", ["EXIT "]) == 0
    fields = dict.fromkeys(sass.Audit.__annotations__, 0)
    faults = {taken: sass.Audit(**fields | dict(registers=taken, dealt_out=168)).faults for taken in (168, 160)}
    assert not faults[168] and "160 registers" in faults[160][0]
    assert sass.Audit(**fields | dict(registers=168, dealt_out=sass.DROPPED)).faults == ["setmaxnreg without effect"]
