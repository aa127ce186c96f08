"""A word that no family knows makes a statement unknown, wherever it stands: nothing is dropped in silence."""

from __future__ import annotations

import pytest

from cute_sparse.emulator import errors

REGISTERS = ".reg .pred %p<3>; .reg .b16 %h<3>; .reg .b32 %r<5>; .reg .f32 %f<4>; .reg .b64 %d<4>; "

STATEMENTS = """
add.f32 %f1, %f2, %f3
add.rn.f32x2 %d1, %d2, %d3
add.s32 %r1, %r2, %r3
and.b32 %r1, %r2, %r3
atom.global.add.u32 %r1, [%d1], %r2
cvt.rn.f32.s32 %f1, %r2
div.rn.f32 %f1, %f2, %f3
ex2.approx.ftz.f32 %f1, %f2
fma.rn.f32 %f1, %f2, %f3, %f1
ld.global.b32 %r1, [%d1]
lg2.approx.ftz.f32 %f1, %f2
lop3.b32 %r1, %r2, %r3, %r4, 1
mapa.shared::cluster.u32 %r1, %r2, %r3
max.f32 %f1, %f2, %f3
mov.b32 %r1, %r2
mul.f32 %f1, %f2, %f3
mul.lo.s32 %r1, %r2, %r3
popc.b32 %r1, %r2
prefetch.global.L2 [%d1]
prmt.b32 %r1, %r2, %r3, 1
rcp.approx.ftz.f32 %f1, %f2
red.global.add.u32 [%d1], %r2
selp.b32 %r1, %r2, %r3, %p1
setp.lt.s32 %p1, %r2, %r3
shf.l.wrap.b32 %r1, %r2, %r3, %r4
shl.b32 %r1, %r2, %r3
shr.u32 %r1, %r2, %r3
st.global.b32 [%d1], %r1
sub.f32 %f1, %f2, %f3
tanh.approx.f32 %f1, %f2
"""


@pytest.mark.parametrize("statement", STATEMENTS.strip().splitlines(), ids=lambda text: text.split()[0])
def test_an_unknown_word_makes_a_statement_unknown(run, statement):
    opcode, _, operands = statement.partition(" ")
    words = opcode.split(".")
    run(f"bra OVER;\n{statement};\nOVER:", registers=REGISTERS)  # known as it is
    for place in range(1, len(words)):
        changed = ".".join([*words[:place], "enormous", *words[place:]])
        with pytest.raises(errors.UnknownOpcode, match=changed.replace(".", r"\.")):
            run(f"bra OVER;\n{changed} {operands};\nOVER:", registers=REGISTERS)
