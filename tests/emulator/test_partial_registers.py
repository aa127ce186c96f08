"""Compilers pack a register that nothing wrote beside one that they use: harmless until somebody looks at it."""

from __future__ import annotations

import pytest
import torch

from cute_sparse.emulator import errors

REGISTERS = ".reg .b32 %r<5>; .reg .b64 %d<4>;"
PARAMETERS = ".param .u64 out"


def test_the_written_half_of_a_pair_can_be_used(run):
    out = torch.zeros(1, dtype=torch.int32)
    run(
        """
        ld.param.u64 %d1, [out];
        mov.b32 %r1, 42;
        mov.b64 %d2, {%r1, %r2};
        mov.b64 {%r3, _}, %d2;
        st.global.b32 [%d1], %r3;
        """,
        [out], parameters=PARAMETERS, registers=REGISTERS, block=1,
    )  # fmt: skip
    assert out.item() == 42


def test_a_pair_of_which_nothing_was_written_cannot(run):
    with pytest.raises(errors.Uninitialised, match="register"):
        run(
            """
            ld.param.u64 %d1, [out];
            mov.b64 %d2, {%r1, %r2};
            mov.b64 {%r3, _}, %d2;
            st.global.b32 [%d1], %r3;
            """,
            [torch.zeros(1, dtype=torch.int32)], parameters=PARAMETERS, registers=REGISTERS, block=1,
        )  # fmt: skip
