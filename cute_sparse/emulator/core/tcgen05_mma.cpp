// tcgen05.mma (PTX ISA, "TensorCore 5th Generation Matrix Multiply and accumulate Operations"): D = A * B (+ D) with D
// in tensor memory, A in shared or tensor memory, B in shared memory; of one CTA or of a CTA pair. Products are summed
// in fp32, one k after the other; hardware's order differs.
//
// Not here, and unknown at load: .ws, .sp, .block_scale, .ashift. Refused by name at run time: sparsity, the six- and
// four-bit formats, disable-output-lane masks other than of whole warps' lanes of one CTA's D with M = 128.
#include <algorithm>

#include "formats.h"
#include "machine.h"
#include "matmul.h"
#include "tensor_memory.h"

namespace emu {

namespace {

enum class Kind : uint8_t { f16, tf32, f8f6f4, i8 };

const char* tally_name(Kind kind) {
  switch (kind) {
    case Kind::f16: return "tcgen05.f16";
    case Kind::tf32: return "tcgen05.tf32";
    case Kind::f8f6f4: return "tcgen05.f8f6f4";
    case Kind::i8: return "tcgen05.i8";
  }
  return "";
}

enum class Accumulator : uint8_t { f16, f32, s32 };

// What the statement says.
struct Mma {
  Kind kind = Kind::f16;
  uint32_t cta_group = 1;
  bool a_in_tensor = false;
  int64_t d_offset = 0, a_offset = 0;
  uint32_t scale_input_d = 0;  // D is multiplied by 2^-scale_input_d first
};

// What the instruction descriptor says.
struct Shape {
  uint32_t m = 0, n = 0, k = 0;
  Format a = Format::f16, b = Format::f16;
  Accumulator d = Accumulator::f32;
  bool a_mn_major = false, b_mn_major = false;
  bool negative = false;  // the products are negated
  bool saturate = false;  // s32
  uint32_t disabled = 0;  // bit w: D is not updated in the lanes of warp w (PTX ISA, "disable-output-lane")
};

// ---------------------------------------------------------------------------------------------------------
// Instruction descriptor (PTX ISA, "Instruction descriptor", table for .kind::tf32, f16, f8f6f4 and i8)

uint32_t field(uint32_t descriptor, int bit, int width) { return descriptor >> bit & ((1u << width) - 1); }

// Empty, or what is wrong.
std::string decode_format(Kind kind, uint32_t code, Format& format) {
  switch (kind) {
    case Kind::f16:
      if (code > 1) return "operand type " + std::to_string(code) + " of .kind::f16 (0 f16, 1 bf16)";
      format = code ? Format::bf16 : Format::f16;
      return "";
    case Kind::tf32:
      if (code != 2) return "operand type " + std::to_string(code) + " of .kind::tf32 (2 tf32)";
      format = Format::tf32;
      return "";
    case Kind::f8f6f4: {
      static const char* const NAMES[] = {"e4m3", "e5m2", "?", "e2m3", "e3m2", "e2m1", "?", "?"};
      if (code > 1)
        return std::string(".kind::f8f6f4 with operand type ") + NAMES[code] + "; supported are e4m3 and e5m2";
      format = code ? Format::e5m2 : Format::e4m3;
      return "";
    }
    case Kind::i8:
      if (code > 1) return "operand type " + std::to_string(code) + " of .kind::i8 (0 u8, 1 s8)";
      format = code ? Format::s8 : Format::u8;
      return "";
  }
  return "";
}

std::string decode_accumulator(Kind kind, uint32_t code, Accumulator& d) {
  const bool fits = kind == Kind::i8 ? code == 2 : kind == Kind::tf32 ? code == 1 : code <= 1;
  if (!fits) return "accumulator type " + std::to_string(code) + " does not go with the instruction's .kind";
  d = code == 0 ? Accumulator::f16 : code == 1 ? Accumulator::f32 : Accumulator::s32;
  return "";
}

// PTX ISA, "Shape": the valid combinations of M, N and the CTA group.
std::string check_shape(uint32_t cta_group, uint32_t m, uint32_t n) {
  const bool m_fits = cta_group == 1 ? m == 64 || m == 128 : m == 128 || m == 256;
  const uint32_t step = m == 64 ? 8 : 16;
  if (m_fits && n >= step && n <= 256 && n % step == 0) return "";
  return "shape M=" + std::to_string(m) + " N=" + std::to_string(n) + " does not exist for .cta_group::" +
         std::to_string(cta_group);
}

std::string decode_descriptor(uint32_t descriptor, const Mma& mma, Shape& shape) {
  if (field(descriptor, 2, 1)) return "sparse A is not supported";
  if (field(descriptor, 30, 2)) return "a maximum shift belongs to .ws, which is not supported";
  if (mma.kind != Kind::i8 && field(descriptor, 3, 1)) return "saturation belongs to .kind::i8";
  std::string wrong = decode_format(mma.kind, field(descriptor, 7, 3), shape.a);
  if (wrong.empty()) wrong = decode_format(mma.kind, field(descriptor, 10, 3), shape.b);
  if (wrong.empty()) wrong = decode_accumulator(mma.kind, field(descriptor, 4, 2), shape.d);
  if (!wrong.empty()) return wrong;
  shape.saturate = field(descriptor, 3, 1);
  shape.negative = field(descriptor, 13, 1) != field(descriptor, 14, 1);
  if (shape.negative && mma.kind == Kind::i8) return "negation does not go with .kind::i8";
  shape.a_mn_major = field(descriptor, 15, 1);
  shape.b_mn_major = field(descriptor, 16, 1);
  if (shape.a_mn_major && mma.a_in_tensor) return "A in tensor memory cannot be transposed";
  shape.n = field(descriptor, 17, 6) * 8;
  shape.m = field(descriptor, 24, 5) * 16;
  shape.k = 32 / format_bytes(shape.a);  // PTX ISA, "Shape": 32 bytes of k
  return check_shape(mma.cta_group, shape.m, shape.n);
}

// ---------------------------------------------------------------------------------------------------------
// Where D and A lie in a CTA's tensor memory (PTX ISA, "Data path layout organization")

// Rows [row, row + rows) of the CTA's part of A times columns [n, n + columns) of B: from `lane` on, one per row.
struct Block {
  uint32_t row, rows, lane, n, columns;
};

struct Blocks {
  Block of[4];
  uint32_t count;
  const Block* begin() const { return of; }
  const Block* end() const { return of + count; }
};

// Blocks whose lanes are disabled are left out.
Blocks blocks_of(uint32_t cta_group, const Shape& shape) {
  const uint32_t n = shape.n;
  if (shape.disabled) {
    Blocks enabled{};
    for (uint32_t warp = 0; warp < 4; ++warp)
      if (!(shape.disabled >> warp & 1)) enabled.of[enabled.count++] = {32 * warp, 32, 32 * warp, 0, n};
    return enabled;
  }
  if (shape.m == 64)  // 16 rows in each warp's lanes
    return {{{0, 16, 0, 0, n}, {16, 16, 32, 0, n}, {32, 16, 64, 0, n}, {48, 16, 96, 0, n}}, 4};
  if (cta_group == 2 && shape.m == 128)  // 64 rows of each CTA, the upper lanes hold the upper half of N
    return {{{0, 64, 0, 0, n / 2}, {0, 64, 64, n / 2, n / 2}}, 2};
  return {{{0, 128, 0, 0, n}}, 1};
}

// ---------------------------------------------------------------------------------------------------------
// The operation

// 32-byte aligned scratch of one host thread.
struct Scratch {
  alignas(32) float a[32 * 128];     // [k][row]
  alignas(32) float b[256 * 32];     // [n][k]
  alignas(32) float sum[256 * 128];  // [n][row], where D is not fp32
};

Scratch& scratch() {
  static thread_local auto buffers = std::make_unique<Scratch>();
  return *buffers;
}

// A of one block from tensor memory: a word holds neighbouring k's, the first in the low bits.
void unpack_from_tensor(const uint32_t* words, const Block& block, const Shape& shape, float* out, uint32_t pitch) {
  const uint32_t bits = 8 * format_bytes(shape.a), per_word = 32 / bits;
  for (uint32_t k = 0; k < shape.k; ++k) {
    const uint32_t* column = words + (k / per_word) * TENSOR_LANES + block.lane;
    const uint32_t shift = k % per_word * bits;
    float* to = out + k * pitch + block.row;
    if (shape.a == Format::bf16) {  // the common one, vectorised
      for (uint32_t r = 0; r < block.rows; ++r)
        to[r] = float_of_bits(shift ? column[r] & 0xffff0000u : column[r] << 16);
    } else {
      const uint32_t mask = bits == 32 ? ~0u : (1u << bits) - 1;
      for (uint32_t r = 0; r < block.rows; ++r) to[r] = to_float(shape.a, column[r] >> shift & mask);
    }
  }
}

int32_t add_s32(int32_t d, float product, bool saturate) {
  const int64_t sum = int64_t(d) + int64_t(product);  // a product of K = 32 bytes is exact in fp32
  if (!saturate) return int32_t(uint32_t(sum));
  return int32_t(std::clamp<int64_t>(sum, INT32_MIN, INT32_MAX));
}

struct MmaOp : AsyncOp {
  Mma mma;
  Shape shape;
  CtaGroup group;
  TensorAddress d{0}, a_tensor{0};
  SharedOperand a, b;  // of one CTA; the same offsets in both
  bool accumulate = false;

  void complete(Cluster&) override {
    Scratch& s = scratch();
    const uint32_t n_part = shape.n / group.size;
    const ChunkMap b_map(b);
    for (uint32_t c = 0; c < group.size; ++c)
      unpack_rows(group.ctas[c]->shared.data(), b, b_map, 0, n_part, s.b + c * n_part * shape.k, shape.k);
    if (shape.negative)
      for (uint32_t x = 0; x < shape.n * shape.k; ++x) s.b[x] = -s.b[x];
    for (uint32_t c = 0; c < group.size; ++c) multiply_in(*group.ctas[c], s);
  }

  void multiply_in(Cta& cta, Scratch& s) const {
    TensorMemory& memory = tensor_memory(cta);
    const uint32_t rows = shape.m / group.size;
    if (!mma.a_in_tensor) unpack_columns(cta.shared.data(), a, ChunkMap(a), 0, rows, s.a, rows);
    for (const Block& block : blocks_of(group.size, shape)) {
      if (mma.a_in_tensor)
        unpack_from_tensor(memory.at(a_tensor.lane, a_tensor.column), block, shape, s.a, rows);
      const float* a_rows = s.a + block.row;
      const float* b_rows = s.b + block.n * shape.k;
      uint32_t* words = memory.at(d.lane + block.lane, d.column);
      if (shape.d == Accumulator::f32) {
        float* sums = reinterpret_cast<float*>(words);
        if (accumulate && mma.scale_input_d) scale_input(sums, block);
        multiply(block.columns, block.rows, shape.k, b_rows, shape.k, a_rows, rows, sums, TENSOR_LANES, accumulate);
      } else {
        multiply(block.columns, block.rows, shape.k, b_rows, shape.k, a_rows, rows, s.sum, block.rows, false);
        add_products(words, block, s.sum);
      }
    }
  }

  float input_scale() const { return power_of_two(-int(mma.scale_input_d)); }

  void scale_input(float* d, const Block& block) const {
    for (uint32_t n = 0; n < block.columns; ++n)
      for (uint32_t r = 0; r < block.rows; ++r) d[n * TENSOR_LANES + r] *= input_scale();
  }

  // f16: the low half of the word, the upper half becomes 0. s32: the word.
  void add_products(uint32_t* d, const Block& block, const float* products) const {
    for (uint32_t n = 0; n < block.columns; ++n)
      for (uint32_t r = 0; r < block.rows; ++r) {
        uint32_t& word = d[n * TENSOR_LANES + r];
        const float product = products[n * block.rows + r];
        if (shape.d == Accumulator::s32)
          word = uint32_t(add_s32(accumulate ? int32_t(word) : 0, product, shape.saturate));
        else
          word = float_to_f16(accumulate ? product + f16_to_float(uint16_t(word)) * input_scale() : product);
      }
  }
};

// ---------------------------------------------------------------------------------------------------------
// Issue

uint64_t uniform64(Warp& warp, uint32_t slot, const char* what) {
  const uint64_t* values = warp.u64(slot);
  const uint64_t first = values[warp.first_lane()];
  for (uint32_t lane = 0; lane < LANES; ++lane)
    if ((warp.mask >> lane & 1) && values[lane] != first)
      warp.fail(ErrorKind::invalid_operand, std::string(what) + " must be the same in every lane", int(lane));
  return first;
}

SharedOperand shared_operand(Warp& warp, uint64_t descriptor, Format format, bool mn_major, uint32_t mn, uint32_t k,
                             const char* what) {
  SharedOperand operand;
  const std::string wrong = decode_tcgen05_descriptor(descriptor, operand);
  if (!wrong.empty()) warp.fail(ErrorKind::invalid_operand, std::string(what) + ": " + wrong);
  operand.format = format;
  operand.mn_major = mn_major;
  operand.mn = mn;
  operand.k = k;
  return operand;
}

void check_bounds(Warp& warp, const ChunkMap& map, const char* what) {
  if (map.begin() >= SHARED_BASE && map.end() <= warp.cta->shared.size()) return;
  warp.fail(ErrorKind::out_of_bounds, std::string(what) + " at shared memory offsets " + std::to_string(map.begin()) +
                                          ".." + std::to_string(map.end()) + " leaves the CTA's " +
                                          std::to_string(warp.cta->shared_bytes) + " bytes");
}

void touch_shared_operands(Warp& warp, const MmaOp& op, const Stamp& stamp) {
  static thread_local Footprint footprint;
  footprint.clear();
  const ChunkMap b_map(op.b);
  check_bounds(warp, b_map, "B");
  footprint.add(op.b, b_map);
  if (!op.mma.a_in_tensor) {
    const ChunkMap a_map(op.a);
    check_bounds(warp, a_map, "A");
    footprint.add(op.a, a_map);
  }
  if (!warp.cluster->race.enabled) return;
  for (uint32_t c = 0; c < op.group.size; ++c) {
    const uint32_t window = op.group.ctas[c]->rank << SHARED_RANK_SHIFT;
    footprint.for_each_run([&](uint32_t address, uint32_t bytes) {
      touch_shared_async(warp, stamp, window | address, bytes, false);
    });
  }
}

// The lanes at which D and A in tensor memory may start: M = 64 fits into the lower or the upper half of every warp's.
void check_start_lane(Warp& warp, const Shape& shape, TensorAddress address, const char* what) {
  if (address.lane == 0 || (shape.m == 64 && address.lane == 16)) return;
  warp.fail(ErrorKind::invalid_operand, std::string(what) + " starts at tensor memory lane " +
                                            std::to_string(address.lane) + ", M=" + std::to_string(shape.m) +
                                            " must start at lane 0" + (shape.m == 64 ? " or 16" : ""));
}

void touch_tensor_operands(Warp& warp, const MmaOp& op, const Stamp& stamp) {
  const bool updates = op.accumulate;
  for (uint32_t c = 0; c < op.group.size; ++c) {
    Cta& cta = *op.group.ctas[c];
    for (const Block& block : blocks_of(op.group.size, op.shape)) {
      if (op.mma.a_in_tensor) {
        const TensorRegion a{op.a_tensor.lane + block.lane, block.rows, op.a_tensor.column, 8};
        check_allocated(warp, cta, a);
        touch_tensor(warp, cta, stamp, a, Touch::read);
      }
      const TensorRegion d{op.d.lane + block.lane, block.rows, op.d.column, block.columns};
      check_allocated(warp, cta, d);
      touch_tensor(warp, cta, stamp, d, updates ? Touch::update : Touch::write);
    }
  }
}

// Shape::disabled; word k of the operand masks the lanes of warp k.
uint32_t disabled_warps(Warp& warp, const Instr& i, const Mma& mma, const Shape& shape) {
  const uint32_t* slots = warp.program->slot_lists.data() + i.list;
  uint32_t disabled = 0;
  for (uint32_t k = 0; k < i.n_list; ++k) {
    const uint32_t mask = uniform(warp, slots[k], "a disable-output-lane mask");
    if (mask && (mask != ~0u || mma.cta_group != 1 || shape.m != 128))
      warp.fail(ErrorKind::invalid_operand,
                "disable-output-lane masks are supported of all 32 lanes of a warp, with M=128 and cta_group::1");
    if (mask) disabled |= 1u << k;
  }
  return disabled;
}

// Issued once, however many lanes execute it: SASS takes the operands from uniform registers.
Step exec_mma(Warp& warp, const Instr& i) {
  auto op = std::make_unique<MmaOp>();
  op->mma = *static_cast<const Mma*>(i.detail);
  const Mma& mma = op->mma;
  Shape& shape = op->shape;
  const std::string wrong = decode_descriptor(uniform(warp, i.s[3], "the instruction descriptor"), mma, shape);
  if (!wrong.empty()) warp.fail(ErrorKind::invalid_operand, "instruction descriptor: " + wrong);
  shape.disabled = disabled_warps(warp, i, mma, shape);
  op->group = cta_group(warp, mma.cta_group);
  op->accumulate = warp.pred(i.s[4]) >> warp.first_lane() & 1;
  op->d = TensorAddress(uniform(warp, i.s[0], "the address of D") + uint32_t(mma.d_offset));
  check_start_lane(warp, shape, op->d, "D");
  if (mma.a_in_tensor) {
    op->a_tensor = TensorAddress(uniform(warp, i.s[1], "the address of A") + uint32_t(mma.a_offset));
    check_start_lane(warp, shape, op->a_tensor, "A");
  } else {
    op->a = shared_operand(warp, uniform64(warp, i.s[1], "the descriptor of A"), shape.a, shape.a_mn_major,
                           shape.m / mma.cta_group, shape.k, "A");
  }
  op->b = shared_operand(warp, uniform64(warp, i.s[2], "the descriptor of B"), shape.b, shape.b_mn_major,
                         shape.n / mma.cta_group, shape.k, "B");
  const TensorWarp& state = tensor_warp(warp);
  touch_shared_operands(warp, *op, Stamp{state.tensor_actor, state.tensor_epoch, Proxy::async});
  touch_tensor_operands(warp, *op, Stamp{state.tensor_actor, state.tensor_epoch, Proxy::tensor});
  warp.tally.macs[tally_name(mma.kind)] += uint64_t(shape.m) * shape.n * shape.k;
  if (warp.cluster->trace)  // what each CTA reads: its rows of A, its part of B
    warp.cluster->trace->amount(Note::Kind::mma, uint64_t(shape.m) * shape.n * shape.k,
                                32 * ((mma.a_in_tensor ? 0 : shape.m) + shape.n) / mma.cta_group);
  op->queue = tensor_queue(op->group);
  op->statement = i.statement;
  warp.cluster->issue(std::move(op));
  return Step::next;
}

// ---------------------------------------------------------------------------------------------------------
// Decoding

bool decode_kind(const std::string& modifier, Kind& kind) {
  if (modifier == "kind::f16") kind = Kind::f16;
  else if (modifier == "kind::tf32") kind = Kind::tf32;
  else if (modifier == "kind::f8f6f4") kind = Kind::f8f6f4;
  else if (modifier == "kind::i8") kind = Kind::i8;
  else return false;
  return true;
}

// Whether A stays in the collector buffer is a hint (PTX ISA, "Matrix A collector").
bool is_hint(const std::string& modifier) {
  return modifier == "collector::a::fill" || modifier == "collector::a::use" || modifier == "collector::a::lastuse" ||
         modifier == "collector::a::discard";
}

}  // namespace

// tcgen05.mma.cta_group.kind{.collector} [d], a, b-desc, idesc{, disable-output-lane}, enable-input-d{, scale-input-d};
bool decode_tcgen05_mma(const Statement& s, Builder& b) {
  Mma mma;
  const auto& modifiers = s.modifiers;
  if (modifiers[1] != "mma" || modifiers.size() < 4 || modifiers.size() > 5) return false;
  if (modifiers[2] != "cta_group::1" && modifiers[2] != "cta_group::2") return false;
  mma.cta_group = modifiers[2] == "cta_group::2" ? 2 : 1;
  if (!decode_kind(modifiers[3], mma.kind)) return false;
  if (modifiers.size() == 5 && !is_hint(modifiers[4])) return false;
  if (s.operands.size() < 5) b.fail("expected at least five operands");
  b.out.s[0] = b.address(s.operands[0]);
  mma.d_offset = b.out.offset;
  mma.a_in_tensor = s.operands[1].kind == Operand::Kind::address;
  if (mma.a_in_tensor) {
    b.out.s[1] = b.address(s.operands[1]);
    mma.a_offset = b.out.offset;
  } else {
    b.out.s[1] = b.read(s.operands[1], RegClass::b64);
  }
  b.out.s[2] = b.read(s.operands[2], RegClass::b64);
  b.out.s[3] = b.read(s.operands[3], RegClass::b32);
  size_t at = 4;
  if (s.operands[at].kind == Operand::Kind::vector) {
    b.list(s.operands[at]);
    b.also_reads(s.operands[at]);
    ++at;
  }
  if (at >= s.operands.size()) b.fail("no enable-input-d operand");
  b.out.s[4] = b.read(s.operands[at++], RegClass::pred);
  if (at < s.operands.size()) {
    const int64_t scale = b.integer(s.operands[at++]);
    if (scale < 0 || scale > 15 || (mma.kind != Kind::f16 && mma.kind != Kind::tf32))
      b.fail("scale-input-d must be 0 to 15 and goes with .kind::f16 and .kind::tf32");
    mma.scale_input_d = uint32_t(scale);
  }
  if (at != s.operands.size()) b.fail("too many operands");
  b.out.detail = b.keep(mma);
  b.out.exec = exec_mma;
  return true;
}

}  // namespace emu
