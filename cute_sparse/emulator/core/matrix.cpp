// Matrices in the registers of one warp: ldmatrix, stmatrix, movmatrix (PTX ISA 9.7.14.5.15 to .17) and the synchronous
// mma.sync of floating-point types (9.7.14.5.14).
#include <algorithm>

#include "matmul.h"
#include "spaces.h"

namespace emu {

namespace {

constexpr uint32_t ROW_BYTES = 16, ROWS = 8;  // of an 8x8 matrix of 16-bit elements

void require_full_warp(Warp& warp) {
  if (warp.mask != ALL_LANES)
    warp.fail(ErrorKind::convergence, "needs all 32 lanes of the warp, " +
                                          std::to_string(__builtin_popcount(warp.mask)) + " execute it");
}

const uint32_t* list_of(const Warp& warp, const Instr& i) { return warp.program->slot_lists.data() + i.list; }

// ---------------------------------------------------------------------------------------------------------
// 8x8 matrices of 16-bit elements. Register r belongs to matrix r; lane l holds row l / 4, columns 2 * (l % 4) and the
// next; transposed: column l / 4, rows 2 * (l % 4) and the next. The row addresses of matrix r come from lanes 8r on.

struct Tiles {
  uint32_t count = 1;
  bool transposed = false;
  bool wide = false;     // the address register has 64 bits
  bool generic = false;  // no state space given
};

uint32_t row_address(Warp& warp, const Instr& i, const Tiles& tiles, uint32_t lane) {
  if (!tiles.wide) return warp.address32(i, i.s[0], lane);
  const uint64_t address = warp.address64(i, i.s[0], lane);
  if (tiles.generic && !in_shared_window(address))
    warp.fail(ErrorKind::out_of_bounds, "the generic address of a matrix row is not in shared memory", int(lane));
  return uint32_t(address);
}

// The 16 bytes of row `row` of matrix `matrix`, checked and entered into the race detector.
uint16_t* matrix_row(Warp& warp, const Instr& i, const Tiles& tiles, uint32_t matrix, uint32_t row, bool write) {
  const uint32_t lane = matrix * ROWS + row;
  const uint32_t address = row_address(warp, i, tiles, lane);
  uint8_t* at = shared_at(warp, address, ROW_BYTES, ROW_BYTES, int(lane));
  touch_shared(warp, address, ROW_BYTES, write);
  return reinterpret_cast<uint16_t*>(at);
}

struct Place { uint32_t row, column; };

Place element_place(const Tiles& tiles, uint32_t lane, uint32_t half) {
  const uint32_t major = lane / 4, minor = 2 * (lane % 4) + half;
  return tiles.transposed ? Place{minor, major} : Place{major, minor};
}

Step exec_ldmatrix(Warp& warp, const Instr& i) {
  require_full_warp(warp);
  const Tiles& tiles = *static_cast<const Tiles*>(i.detail);
  const uint32_t* slots = list_of(warp, i);
  uint16_t elements[4][ROWS][8];  // all rows are read before a register is written: it may hold the addresses
  for (uint32_t m = 0; m < tiles.count; ++m)
    for (uint32_t row = 0; row < ROWS; ++row)
      std::memcpy(elements[m][row], matrix_row(warp, i, tiles, m, row, false), ROW_BYTES);
  for (uint32_t m = 0; m < tiles.count; ++m) {
    uint32_t* words = warp.u32(slots[m]);
    for (uint32_t lane = 0; lane < LANES; ++lane) {
      const Place low = element_place(tiles, lane, 0), high = element_place(tiles, lane, 1);
      words[lane] = elements[m][low.row][low.column] | uint32_t(elements[m][high.row][high.column]) << 16;
    }
  }
  warp.tally.shared_bytes_read += tiles.count * ROWS * ROW_BYTES;
  return Step::next;
}

Step exec_stmatrix(Warp& warp, const Instr& i) {
  require_full_warp(warp);
  const Tiles& tiles = *static_cast<const Tiles*>(i.detail);
  const uint32_t* slots = list_of(warp, i);
  for (uint32_t m = 0; m < tiles.count; ++m) {
    const uint32_t* words = warp.u32(slots[m]);
    uint16_t elements[ROWS][8];
    for (uint32_t lane = 0; lane < LANES; ++lane) {
      const Place low = element_place(tiles, lane, 0), high = element_place(tiles, lane, 1);
      elements[low.row][low.column] = uint16_t(words[lane]);
      elements[high.row][high.column] = uint16_t(words[lane] >> 16);
    }
    for (uint32_t row = 0; row < ROWS; ++row)
      std::memcpy(matrix_row(warp, i, tiles, m, row, true), elements[row], ROW_BYTES);
  }
  warp.tally.shared_bytes_written += tiles.count * ROWS * ROW_BYTES;
  return Step::next;
}

Step exec_movmatrix(Warp& warp, const Instr& i) {
  require_full_warp(warp);
  uint16_t elements[ROWS][8];
  const uint32_t* from = warp.u32(i.s[0]);
  uint32_t* to = warp.u32(i.d[0]);
  for (uint32_t lane = 0; lane < LANES; ++lane)
    for (uint32_t half = 0; half < 2; ++half)
      elements[lane / 4][2 * (lane % 4) + half] = uint16_t(from[lane] >> (16 * half));
  for (uint32_t lane = 0; lane < LANES; ++lane)
    to[lane] = elements[2 * (lane % 4)][lane / 4] | uint32_t(elements[2 * (lane % 4) + 1][lane / 4]) << 16;
  return Step::next;
}

bool parse_tiles(const Statement& s, Tiles& tiles) {
  size_t known = 0;
  for (const std::string& modifier : s.modifiers) {
    if (modifier == "x1" || modifier == "x2" || modifier == "x4") tiles.count = uint32_t(modifier[1] - '0');
    else if (modifier == "trans") tiles.transposed = true;
    else if (modifier != "m8n8" && modifier != "sync" && modifier != "aligned" && modifier != "b16" &&
             modifier != "shared" && modifier != "shared::cta" && modifier != s.mnemonic())
      return false;
    ++known;
  }
  tiles.generic = !s.has("shared") && !s.has("shared::cta");
  return s.has("m8n8") && s.has("sync") && s.has("aligned") && s.type() == "b16" && known >= 6;
}

bool decode_tiles(const Statement& s, Builder& builder, bool load) {
  Tiles tiles;
  if (!parse_tiles(s, tiles) || s.operands.size() != 2) return false;
  const Operand& registers = s.operands[load ? 0 : 1];
  const Operand& address = s.operands[load ? 1 : 0];
  const size_t count = registers.kind == Operand::Kind::vector ? registers.parts.size() : 1;
  if (count != tiles.count) builder.fail("needs " + std::to_string(tiles.count) + " registers");
  builder.out.s[0] = builder.address(address);
  tiles.wide = builder.wide(address);
  builder.list(registers);
  if (load) builder.also_writes(registers);
  else builder.also_reads(registers);
  builder.out.aligned = true;
  builder.out.detail = builder.keep(tiles);
  builder.out.exec = load ? exec_ldmatrix : exec_stmatrix;
  return true;
}

bool decode_movmatrix(const Statement& s, Builder& builder) {
  if (s.opcode != "movmatrix.sync.aligned.m8n8.trans.b16" || s.operands.size() != 2) return false;
  builder.out.s[0] = builder.read(s.operands[1], RegClass::b32);
  builder.out.d[0] = builder.write(s.operands[0]);
  builder.out.aligned = true;
  builder.out.exec = exec_movmatrix;
  return true;
}

// ---------------------------------------------------------------------------------------------------------
// mma.sync.aligned.m16n8kK.row.col.dtype.atype.btype.ctype d, a, b, c

constexpr uint32_t MMA_M = 16, MMA_N = 8, MMA_MAX_K = 32;

struct Mma {
  uint32_t k = 0;
  Format a = Format::bf16, b = Format::bf16;
  bool half_result = false, half_addend = false;
  std::string kind;  // "mma.bf16"
  // The list holds D, A, B, C in this order.
  uint32_t d_registers() const { return half_result ? 2 : 4; }
  uint32_t a_registers() const { return k * format_bytes(a) / 8; }
  uint32_t b_registers() const { return a_registers() / 2; }
  uint32_t c_registers() const { return half_addend ? 2 : 4; }
};

Step exec_mma(Warp& warp, const Instr& i) {
  require_full_warp(warp);
  const Mma& mma = *static_cast<const Mma*>(i.detail);
  uint32_t* registers[14];
  for (uint32_t r = 0; r < i.n_list; ++r) registers[r] = warp.u32(list_of(warp, i)[r]);
  uint32_t* const* d = registers;
  uint32_t* const* a = d + mma.d_registers();
  uint32_t* const* b = a + mma.a_registers();
  uint32_t* const* c = b + mma.b_registers();

  float a_rows[MMA_M * MMA_MAX_K], b_columns[MMA_MAX_K * MMA_N];
  alignas(32) float a_pairs[MMA_M * MMA_MAX_K * 4], sums[4][LANES];
  unpack_a_fragment(a, mma.a_registers(), mma.a, mma.k, a_rows);
  unpack_b_fragment(b, mma.b_registers(), mma.b, b_columns);
  pack_row_pairs(a_rows, mma.k, mma.k, 1, a_pairs);
  if (mma.half_addend) load_half_accumulators(c, 2, sums[0]);
  else for (uint32_t r = 0; r < 4; ++r) std::memcpy(sums[r], c[r], sizeof sums[r]);
  float* results[4] = {sums[0], sums[1], sums[2], sums[3]};
  multiply_fragment(MMA_N, mma.k, a_pairs, b_columns, results, true);
  if (mma.half_result) store_half_accumulators(sums[0], 2, d);
  else for (uint32_t r = 0; r < 4; ++r) std::memcpy(d[r], sums[r], sizeof sums[r]);
  warp.tally.macs[mma.kind] += MMA_M * MMA_N * mma.k;
  return Step::next;
}

bool half_or_single(const std::string& type, bool& half) {
  half = type == "f16";
  return half || type == "f32";
}

// 128 or 256 bits of K in a row: k4 and k8 for tf32, k8 and k16 for 16-bit, k16 and k32 for 8-bit types.
bool parse_mma(const Statement& s, Mma& mma) {
  static const std::string PREFIX = "mma.sync.aligned.m16n8k";
  if (s.modifiers.size() != 10 || s.opcode.compare(0, PREFIX.size(), PREFIX) != 0) return false;
  if (s.modifiers[4] != "row" || s.modifiers[5] != "col") return false;
  mma.k = uint32_t(std::stoul("0" + s.modifiers[3].substr(6)));
  if (!half_or_single(s.modifiers[6], mma.half_result) || !half_or_single(s.modifiers[9], mma.half_addend))
    return false;
  if (!mma_format(s.modifiers[7], mma.a) || !mma_format(s.modifiers[8], mma.b)) return false;
  if (mma.a != mma.b && format_bytes(mma.a) + format_bytes(mma.b) != 2) return false;
  const bool single_only = mma.a == Format::bf16 || mma.a == Format::tf32;
  if (single_only && (mma.half_result || mma.half_addend)) return false;
  const uint32_t bytes = mma.k * format_bytes(mma.a);
  return bytes == 16 || bytes == 32;
}

bool decode_mma(const Statement& s, Builder& builder) {
  Mma mma;
  if (!parse_mma(s, mma) || s.operands.size() != 4) return false;
  const uint32_t expected[4] = {mma.d_registers(), mma.a_registers(), mma.b_registers(), mma.c_registers()};
  for (size_t o = 0; o < 4; ++o) {
    const Operand& op = s.operands[o];
    const size_t count = op.kind == Operand::Kind::vector ? op.parts.size() : 1;
    if (count != expected[o])
      builder.fail(std::string("operand ") + "DABC"[o] + " needs " + std::to_string(expected[o]) + " registers");
    builder.list(op);
    if (o == 0) builder.also_writes(op);
    else builder.also_reads(op);
  }
  mma.kind = std::string("mma.") + format_name(mma.a);
  if (mma.b != mma.a) mma.kind += std::string(".") + format_name(mma.b);
  builder.out.aligned = true;
  builder.out.detail = builder.keep(std::move(mma));
  builder.out.exec = exec_mma;
  return true;
}

}  // namespace

bool decode_matrix(const Statement& s, Builder& builder) {
  if (s.mnemonic() == "ldmatrix") return decode_tiles(s, builder, true);
  if (s.mnemonic() == "stmatrix") return decode_tiles(s, builder, false);
  if (s.mnemonic() == "movmatrix") return decode_movmatrix(s, builder);
  if (s.mnemonic() == "mma") return decode_mma(s, builder);
  return false;
}

}  // namespace emu
