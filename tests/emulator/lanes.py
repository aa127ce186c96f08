"""One instruction applied to 32 lanes: operands from tensors, the result to a tensor."""

from __future__ import annotations

import torch

REGISTER = {2: ("b16", "%h"), 4: ("b32", "%r"), 8: ("b64", "%d")}  # by bytes: type of ld/st, register prefix
REGISTERS = (
    ".reg .pred %p<8>; .reg .b16 %h<16>; .reg .b32 %r<32>; .reg .b64 %d<16>; .reg .b64 %a<16>; .reg .b32 %lane;"
)


def apply(run, instruction: str, *sources: torch.Tensor, result: torch.dtype) -> torch.Tensor:
    """`instruction` with {d} and {0}, {1}, ... standing for the registers of the result and of the sources.

    Each source is a tensor of 32 elements of 2, 4 or 8 bytes, one for each lane.
    """
    out = torch.zeros(32, dtype=result)
    names, body = [], ["mov.u32 %lane, %laneid;"]
    for index, source in enumerate([*sources, out]):
        size = source.element_size()
        body += [
            f"ld.param.b64 %a{index}, [p{index}];",
            f"mul.wide.u32 %a10, %lane, {size};",
            f"add.s64 %a{index}, %a{index}, %a10;",
        ]
        type_, prefix = REGISTER[size]
        names.append(f"{prefix}{index}")
        if index < len(sources):
            body.append(f"ld.global.{type_} {names[index]}, [%a{index}];")
    body.append(instruction.format(*names[:-1], d=names[-1]))
    body.append(f"st.global.{REGISTER[out.element_size()][0]} [%a{len(sources)}], {names[-1]};")
    parameters = ", ".join(f".param .u64 p{index}" for index in range(len(sources) + 1))
    run("\n".join(body), [*sources, out], parameters=parameters, registers=REGISTERS)
    return out
