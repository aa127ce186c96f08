// Matrix operands in shared memory, and fast fp32 products of unpacked tiles. Used by wgmma, tcgen05.mma and
// mma.sync.
//
// A shared-memory operand is a matrix of (mn, k) elements, mn being M for A and N for B. In memory it consists of
// lines of 16-byte chunks: K-major, a line is one mn and runs along k; MN-major, a line is one k and runs along mn.
// Eight lines form a group. PTX ISA 9.7.15.5.1.2 (wgmma) and 9.7.16.5 (tcgen05), canonical layouts.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "formats.h"

namespace emu {

// b128_atom32: 128-byte swizzle of 32-byte atoms (sm_100, MN-major 32-bit elements).
enum class Swizzle : uint8_t { none, b32, b64, b128, b128_atom32 };

struct SharedOperand {
  Format format = Format::bf16;
  bool mn_major = false;
  Swizzle swizzle = Swizzle::none;
  uint32_t start = 0;    // offset in the CTA's shared memory (SHARED_BASE included), a multiple of 16
  uint32_t leading = 0;  // LBO in bytes
  uint32_t stride = 0;   // SBO in bytes
  uint32_t mn = 0, k = 0;  // extent in elements, multiples of 8
};

// Fill start, leading, stride and swizzle from a descriptor; the caller sets format, mn_major, mn and k. The answer
// is empty, or says what is wrong with the descriptor.
std::string decode_wgmma_descriptor(uint64_t descriptor, SharedOperand& operand);    // sm_90
std::string decode_tcgen05_descriptor(uint64_t descriptor, SharedOperand& operand);  // sm_100

// Where chunks of an operand lie. Address of a chunk:
//   swizzle(start + (line / rows) * group_stride + (line % rows) * pitch + (chunk >> atom_shift) * atom_stride
//           + (chunk % (1 << atom_shift)) * 16)
class ChunkMap {
 public:
  explicit ChunkMap(const SharedOperand& operand);
  uint32_t lines() const { return lines_; }
  uint32_t chunks() const { return chunks_; }  // 16-byte chunks of a line
  uint32_t offset(uint32_t line, uint32_t chunk) const {
    return swizzled(start_ + (line >> row_shift_) * group_stride_ + (line & ((1u << row_shift_) - 1)) * pitch_ +
                    (chunk >> atom_shift_) * atom_stride_ + (chunk & ((1u << atom_shift_) - 1)) * 16);
  }
  // Lowest byte, and one past the highest byte, that the operand can occupy.
  uint64_t begin() const;
  uint64_t end() const;

  // The same chunk of eight lines, from a multiple of eight on: line i's is at base + rows[i].
  struct Column {
    const uint8_t* base;
    const uint32_t* rows;
    uint32_t scratch[8];
    const uint8_t* at(uint32_t i) const { return base + rows[i]; }
  };
  void column(const uint8_t* shared, uint32_t line, uint32_t chunk, Column& out) const {
    if (regular_) {
      out.base = shared + (line >> 3) * group_stride_ + (chunk >> atom_shift_) * atom_stride_;
      out.rows = table_[chunk & ((1u << atom_shift_) - 1)];
      return;
    }
    for (uint32_t i = 0; i < 8; ++i) out.scratch[i] = offset(line + i, chunk);
    out.base = shared;
    out.rows = out.scratch;
  }

 private:
  friend class Footprint;
  uint32_t swizzled(uint32_t address) const;
  uint64_t highest(uint32_t line, uint32_t chunk) const;

  Swizzle swizzle_;
  uint32_t start_, lines_, chunks_;
  uint32_t row_shift_, pitch_, group_stride_, atom_shift_, atom_stride_;
  // Groups of eight lines whose strides keep the swizzle's phase: the table of one group and atom, [column][row],
  // holds for all of them.
  bool regular_;
  uint32_t table_[8][8];
};

// The set of 16-byte chunks that operands occupy in a CTA's shared memory, given back as contiguous runs. Every
// operand added must end at or below LIMIT.
class Footprint {
 public:
  static constexpr uint32_t LIMIT = 1u << 18;  // what a 14-bit descriptor address can reach
  // The part of an operand with mn in [first, first + count); multiples of 8.
  void add(const SharedOperand& operand, const ChunkMap& map, uint32_t first, uint32_t count);
  void add(const SharedOperand& operand, const ChunkMap& map) { add(operand, map, 0, operand.mn); }
  bool empty() const { return low_ > high_; }
  void clear();
  // f(address, bytes) for every maximal run, ascending.
  template <class F>
  void for_each_run(F f) const {
    uint32_t begin = 0;
    bool open = false;
    for (uint32_t word = low_; word <= high_ && !empty(); ++word) {
      uint64_t bits = bits_[word];
      if (bits == (open ? ~0ull : 0ull)) continue;
      for (uint32_t position = 0; position < 64;) {
        const uint64_t rest = (open ? ~bits : bits) >> position;
        if (rest == 0) break;
        position += uint32_t(__builtin_ctzll(rest));
        const uint32_t chunk = word * 64 + position;
        if (open) f(begin * 16, (chunk - begin) * 16);
        else begin = chunk;
        open = !open;
      }
    }
    if (open) f(begin * 16, ((high_ + 1) * 64 - begin) * 16);
  }

 private:
  void add_regular(const ChunkMap& map, uint32_t first_line, uint32_t end_line, uint32_t first_chunk,
                   uint32_t end_chunk);
  void set(uint32_t word, uint64_t bits) {
    bits_[word] |= bits;
    if (word < low_) low_ = word;
    if (word > high_) high_ = word;
  }
  static constexpr uint32_t WORDS = LIMIT / 16 / 64;
  std::array<uint64_t, WORDS> bits_{};
  uint32_t low_ = LIMIT, high_ = 0;  // words in use; low_ > high_: none
};

// Order of the columns of an unpacked tile inside each group of eight: as they are, or 0 2 4 6 1 3 5 7, which is
// how the lanes of a fragment hold them (multiply_fragment).
enum class Columns : uint8_t { natural, even_odd };

// Unpack mn in [first, first + count) and all k of an operand to floats. `shared`: the CTA's shared memory, indexed by
// offset. first and count are multiples of 8.
//   unpack_rows:     out[(mn - first) * pitch + k]
//   unpack_columns:  out[k * pitch + (mn - first)]
void unpack_rows(const uint8_t* shared, const SharedOperand&, const ChunkMap&, uint32_t first, uint32_t count,
                 float* out, uint32_t pitch);
void unpack_columns(const uint8_t* shared, const SharedOperand&, const ChunkMap&, uint32_t first, uint32_t count,
                    float* out, uint32_t pitch, Columns columns = Columns::natural);

// d[i * ldd + j] (+)= sum over k of a[i * lda + k] * b[k * ldb + j], for i < m, j < n; n a multiple of 8.
// Without `accumulate`, d is overwritten.
void multiply(uint32_t m, uint32_t n, uint32_t k, const float* a, uint32_t lda, const float* b, uint32_t ldb, float* d,
              uint32_t ldd, bool accumulate);

// The 16 x n product of one warp, accumulators in the register file. Registers 4j .. 4j+3 hold the 16 x 8 block of
// columns 8j on: register 4j + r of lane l is row l / 4 + 8 * (r / 2), column 8j + 2 * (l % 4) + r % 2, so eight
// consecutive lanes of a register are two rows of four even (or odd) columns.
// `a_pairs` comes from pack_row_pairs; b[k * n + j] with columns in even_odd order; d[r]: the 32 lanes of register r.
void multiply_fragment(uint32_t n, uint32_t k, const float* a_pairs, const float* b, float* const* d, bool accumulate);

// a[row * lda + k] of 16 rows -> for each half of 8 rows, each k and each pair of rows, the even row's value four times
// and the odd row's four times: out[((half * k_count + k) * 4 + pair) * 8]. Values are multiplied by `sign`.
void pack_row_pairs(const float* a, uint32_t lda, uint32_t k, float sign, float* out);

// Fragments of one warp (PTX ISA 9.7.14.5, 9.7.15.5.1.1). registers[r] points at register r's 32 lanes; a register
// holds `per` elements, those of 32 bits.
//   A: register r of lane l: row l / 4 + 8 * (r % 2), k from per * (l % 4) + 4 * per * (r / 2) on -> out[row * k + k']
//   B: register r of lane l: column l / 4, k from per * (l % 4) + 4 * per * r on -> out[k' * 8 + column], the
//      columns in even_odd order
void unpack_a_fragment(const uint32_t* const* registers, uint32_t count, Format format, uint32_t k, float* out);
void unpack_b_fragment(const uint32_t* const* registers, uint32_t count, Format format, float* out);

// Accumulators of two f16 each: register 2j + h holds what f32 registers 4j + 2h (low half) and 4j + 2h + 1 would.
// floats: 32 lanes for each f32 register.
void load_half_accumulators(const uint32_t* const* registers, uint32_t count, float* floats);
void store_half_accumulators(const float* floats, uint32_t count, uint32_t* const* registers);

// The floating-point operand types of MMA instructions by their PTX names: bf16, f16, tf32, e4m3, e5m2.
bool mma_format(const std::string& type, Format& format);

}  // namespace emu
