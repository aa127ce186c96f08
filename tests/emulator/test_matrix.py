"""ldmatrix, stmatrix, movmatrix and mma.sync against the fragment layouts of PTX ISA 9.7.14.5."""

from __future__ import annotations

import pytest
import torch

from cute_sparse import emulator

# One warp; `rows`: 32 row addresses, one for each lane; matrices and registers go through global memory.
PROLOGUE = """
mov.u32 %lane, %laneid; mov.b32 %base, smem; mul.wide.u32 %rd9, %lane, 4;
ld.param.b64 %rd0, [rows]; add.s64 %rd0, %rd0, %rd9; ld.global.b32 %row, [%rd0]; add.u32 %row, %row, %base;
ld.param.b64 %in, [input]; add.s64 %in, %in, %rd9; ld.param.b64 %out, [output]; add.s64 %out, %out, %rd9;
"""
REGISTERS = (
    ".reg .b32 %r<32>; .reg .b32 %lane, %base, %row, %at; .reg .b64 %rd<10>; .reg .b64 %in, %out; .reg .pred %p<2>;"
)
PARAMETERS = ".param .u64 rows, .param .u64 input, .param .u64 output"
SHARED_BYTES = 4096
# words of shared memory from the input, [word // 32][lane], and back
WORD = "shl.b32 %at, %lane, 2; add.u32 %at, %at, %base;"
FILL = WORD + "".join(f"ld.global.b32 %r9, [%in+{128 * i}]; st.shared.b32 [%at+{128 * i}], %r9;" for i in range(32))
DUMP = f"bar.warp.sync -1; {WORD}" + "".join(
    f"ld.shared.b32 %r9, [%at+{128 * i}]; st.global.b32 [%out+{128 * i}], %r9;" for i in range(32)
)
ROWS = torch.randperm(128, generator=torch.Generator().manual_seed(0))[:32].to(torch.int32) * 16  # 16-byte rows


def load(count: int, first: int = 0) -> str:
    return "".join(f"ld.global.b32 %r{r}, [%in+{128 * (r - first)}];" for r in range(first, first + count))


def store(count: int, first: int = 0) -> str:
    return "".join(f"st.global.b32 [%out+{128 * (r - first)}], %r{r};" for r in range(first, first + count))


def registers(count: int, first: int = 0) -> str:
    return "{" + ", ".join(f"%r{r}" for r in range(first, first + count)) + "}"


def launch(run, body: str, given: torch.Tensor, rows: torch.Tensor = ROWS, words: int = 1024, **options):
    """Returns ([register or word // 32][lane] int32, launch)."""
    out = torch.zeros(words // 32, 32, dtype=torch.int32)
    record = run(
        PROLOGUE + body,
        [rows, given.contiguous(), out],
        parameters=PARAMETERS,
        registers=REGISTERS,
        shared=".extern .shared .align 1024 .b8 smem[];",
        **{"shared_bytes": SHARED_BYTES, **options},
    )
    return out, record


def elements(generator_seed: int = 1) -> torch.Tensor:
    """4096 bytes as distinct 16-bit elements."""
    order = torch.randperm(2048, generator=torch.Generator().manual_seed(generator_seed))
    return order.to(torch.int16)


def place(lane: int, half: int, transposed: bool) -> tuple[int, int]:
    """(row, column) of the 8x8 matrix that the half of a register holds."""
    major, minor = lane // 4, 2 * (lane % 4) + half
    return (minor, major) if transposed else (major, minor)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(run, count, transposed):
    memory = elements()
    suffix = f"x{count}{'.trans' if transposed else ''}.shared.b16"
    body = (
        FILL + "bar.warp.sync -1;" + f"ldmatrix.sync.aligned.m8n8.{suffix} {registers(count)}, [%row];" + store(count)
    )
    out, record = launch(run, body, memory.view(torch.int32), words=32 * count)
    halves = out.view(torch.int16).reshape(count, 32, 2)
    for matrix in range(count):
        for lane in range(32):
            for half in range(2):
                row, column = place(lane, half, transposed)
                assert halves[matrix, lane, half] == memory[ROWS[8 * matrix + row] // 2 + column]
    assert record.counts.shared_bytes_read == 128 * count


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(run, count, transposed):
    given, filler = elements(2)[: 64 * count], elements(3)
    suffix = f"x{count}{'.trans' if transposed else ''}.shared::cta.b16"
    # the registers to store follow the filler of shared memory in the input
    body = FILL + f"add.s64 %in, %in, {SHARED_BYTES};" + load(count) + "bar.warp.sync -1;"
    body += f"stmatrix.sync.aligned.m8n8.{suffix} [%row], {registers(count)};" + DUMP
    out, record = launch(run, body, torch.cat([filler, given]).view(torch.int32))
    expected = filler.clone()
    halves = given.reshape(count, 32, 2)
    for matrix in range(count):
        for lane in range(32):
            for half in range(2):
                row, column = place(lane, half, transposed)
                expected[ROWS[8 * matrix + row] // 2 + column] = halves[matrix, lane, half]
    assert torch.equal(out.view(torch.int16).flatten(), expected)
    assert record.counts.shared_bytes_written == SHARED_BYTES + 128 * count


def test_a_generic_row_address(run):
    memory = elements()
    body = FILL + "bar.warp.sync -1; cvt.u64.u32 %rd1, %row; cvta.shared.u64 %rd1, %rd1;"
    body += "ldmatrix.sync.aligned.m8n8.x1.b16 {%r0}, [%rd1];" + store(1)
    out, _ = launch(run, body, memory.view(torch.int32), words=32)
    assert out.view(torch.int16).flatten()[0] == memory[ROWS[0] // 2]
    with pytest.raises(emulator.errors.OutOfBounds, match="not in shared memory"):
        launch(run, FILL + "ldmatrix.sync.aligned.m8n8.x1.b16 {%r0}, [%in];", memory.view(torch.int32))


def test_movmatrix_transposes(run):
    given = elements()[:64]
    out, _ = launch(
        run,
        load(1) + "movmatrix.sync.aligned.m8n8.trans.b16 %r1, %r0;" + store(1, 1),
        given.view(torch.int32),
        words=32,
    )
    assert torch.equal(out.view(torch.int16).reshape(8, 8), given.reshape(8, 8).T)


# ---------------------------------------------------------------------------------------------------------
# What row addresses must be


LDMATRIX = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r0}, [%row];"


def test_rows_must_be_aligned(run):
    with pytest.raises(emulator.errors.Misaligned):
        launch(run, FILL + "bar.warp.sync -1;" + LDMATRIX, elements().view(torch.int32), ROWS + 8)


def test_rows_must_lie_in_shared_memory(run):
    with pytest.raises(emulator.errors.OutOfBounds):
        launch(run, FILL + "bar.warp.sync -1;" + LDMATRIX, elements().view(torch.int32), ROWS + SHARED_BYTES)


def test_rows_that_nothing_wrote(run):
    with pytest.raises(emulator.errors.Uninitialised, match="shared memory"):
        launch(run, LDMATRIX, elements().view(torch.int32))


def test_registers_that_nothing_wrote(run):
    with pytest.raises(emulator.errors.Uninitialised, match="register"):
        launch(run, "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%row], {%r0};", elements().view(torch.int32))


def test_rows_written_by_another_warp_need_a_barrier(run):
    write = (
        "setp.lt.u32 %p0, %lane, 32; mov.u32 %at, %tid.x; shr.u32 %at, %at, 5; setp.eq.u32 %p1, %at, 0; @!%p1 bra READ;"
    )
    body = write + FILL + "READ: bar.sync 0;" + LDMATRIX
    launch(run, body, elements().view(torch.int32), block=64)
    with pytest.raises((emulator.errors.RaceDetected, emulator.errors.Uninitialised)):
        launch(run, body.replace("bar.sync 0;", "bar.warp.sync -1;"), elements().view(torch.int32), block=64)


def test_all_lanes_take_part(run):
    body = FILL + "setp.lt.u32 %p0, %lane, 16; @%p0 " + LDMATRIX
    with pytest.raises(emulator.errors.ConvergenceError):
        launch(run, body, elements().view(torch.int32))


@pytest.mark.parametrize("statement", ["ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r0, %r1}, [%row];"])
def test_unknown_forms_are_refused_at_load(run, statement):
    with pytest.raises(emulator.errors.UnknownOpcode):
        launch(run, statement, elements().view(torch.int32))


# ---------------------------------------------------------------------------------------------------------
# mma.sync.m16n8kK: fragments of PTX ISA 9.7.14.5.7 and after


TYPES = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "tf32": torch.float32,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}


def words_along_k(matrix: torch.Tensor) -> torch.Tensor:
    """(rows, k) -> (rows, words) of 32 bits."""
    return matrix.contiguous().view(torch.uint8).reshape(matrix.shape[0], -1, 4).view(torch.int32)[..., 0]


@pytest.mark.parametrize("sums", ["f32", "f16"])
@pytest.mark.parametrize("bits_of_k", [128, 256])
@pytest.mark.parametrize("type_", TYPES)
def test_mma_sync(run, type_, bits_of_k, sums):
    if sums == "f16" and type_ in ("bf16", "tf32"):
        pytest.skip("no such instruction")
    k = bits_of_k // 8 // TYPES[type_].itemsize
    generator = torch.Generator().manual_seed(4)
    a, b, c = (torch.randint(-3, 4, shape, generator=generator).float() for shape in ((16, k), (8, k), (16, 8)))
    lane = torch.arange(32)
    group, member = lane // 4, lane % 4
    # A: registers (row, word) = (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); B: (column g, word t), (g, t + 4)
    a_words, b_words = words_along_k(a.to(TYPES[type_])), words_along_k(b.to(TYPES[type_]))
    halves = range(2 if bits_of_k == 256 else 1)
    a_registers = [a_words[group + 8 * r, member + 4 * h] for h in halves for r in range(2)]
    b_registers = [b_words[group, member + 4 * h] for h in halves]
    if sums == "f32":
        c_registers = [c[group + 8 * (r // 2), 2 * member + r % 2].view(torch.int32) for r in range(4)]
    else:
        pairs = c.half().view(torch.int32)  # (row, pair of columns)
        c_registers = [pairs[group + 8 * r, member] for r in range(2)]
    given = torch.stack([*a_registers, *b_registers, *c_registers])
    na, nb, nc = len(a_registers), len(b_registers), len(c_registers)
    mma = (
        f"mma.sync.aligned.m16n8k{k}.row.col.{sums}.{type_}.{type_}.{sums} {registers(nc, 16)}, {registers(na)}, "
        f"{registers(nb, na)}, {registers(nc, na + nb)};"
    )
    out, record = launch(run, load(na + nb + nc) + mma + store(nc, 16), given, words=32 * nc)
    expected = a @ b.T + c
    for r in range(nc):
        if sums == "f32":
            assert torch.equal(out[r].view(torch.float32), expected[group + 8 * (r // 2), 2 * member + r % 2])
        else:
            pair = out[r].view(torch.float16).reshape(32, 2).float()
            assert torch.equal(pair, expected.reshape(16, 4, 2)[group + 8 * r, member])
    assert record.counts.macs == {f"mma.{type_}": 16 * 8 * k}


def test_mma_sync_of_half_sums_onto_single_ones_is_rounded_at_the_end(run):
    """d f16, c f32: 2047 and 16 products of 1; f16 has steps of 2 from 2048 on."""
    ones = torch.tensor([0x3C003C00], dtype=torch.int32).expand(32)
    given = torch.stack([ones] * 6 + [torch.full((32,), 2047.0).view(torch.int32)] * 4)
    fragments = f"{registers(2, 16)}, {registers(4)}, {registers(2, 4)}, {registers(4, 6)}"
    mma = f"mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f32 {fragments};"
    out, _ = launch(run, load(10) + mma + store(2, 16), given, words=64)
    assert torch.equal(out.view(torch.float16).float(), torch.full((2, 64), 2064.0))  # 2063 is a tie to even


@pytest.mark.parametrize(
    "opcode",
    [
        "m16n8k16.row.col.f16.bf16.bf16.f32",
        "m16n8k16.row.row.f32.bf16.bf16.f32",
        "m16n8k16.row.col.f32.bf16.f16.f32",
        "m16n8k32.row.col.s32.s8.s8.s32",
    ],
)
def test_unknown_mma_forms_are_refused_at_load(run, opcode):
    statement = f"mma.sync.aligned.{opcode} {registers(4, 16)}, {registers(4)}, {registers(2, 4)}, {registers(4, 6)};"
    with pytest.raises(emulator.errors.UnknownOpcode):
        launch(run, statement, elements().view(torch.int32))
