#include "matmul.h"

#include <algorithm>
#include <type_traits>

namespace emu {

// ---------------------------------------------------------------------------------------------------------
// Descriptors

static uint32_t descriptor_field(uint64_t descriptor, int bit) { return uint32_t(descriptor >> bit & 0x3fff) << 4; }

static void decode_addresses(uint64_t descriptor, SharedOperand& operand) {
  operand.start = descriptor_field(descriptor, 0);
  operand.leading = descriptor_field(descriptor, 16);
  operand.stride = descriptor_field(descriptor, 32);
}

// PTX ISA 9.7.15.5.1.2.2, "Matrix descriptor format": type in bits 62-63, base offset in bits 49-51.
std::string decode_wgmma_descriptor(uint64_t descriptor, SharedOperand& operand) {
  static constexpr Swizzle TYPES[4] = {Swizzle::none, Swizzle::b128, Swizzle::b64, Swizzle::b32};
  decode_addresses(descriptor, operand);
  operand.swizzle = TYPES[descriptor >> 62];
  if (descriptor >> 49 & 7) return "matrix descriptor with a base offset: only 0 is supported";
  constexpr uint64_t USED = 0x3fffull | 0x3fffull << 16 | 0x3fffull << 32 | 7ull << 49 | 3ull << 62;
  if (descriptor & ~USED) return "matrix descriptor with reserved bits set";
  return "";
}

// PTX ISA 9.7.16.4.1, "Shared memory descriptor": type in bits 61-63, constant 0b001 in bits 46-48, base offset in bits
// 49-51, leading-dimension mode in bit 52.
std::string decode_tcgen05_descriptor(uint64_t descriptor, SharedOperand& operand) {
  decode_addresses(descriptor, operand);
  switch (descriptor >> 61) {
    case 0: operand.swizzle = Swizzle::none; break;
    case 1: operand.swizzle = Swizzle::b128_atom32; break;
    case 2: operand.swizzle = Swizzle::b128; break;
    case 4: operand.swizzle = Swizzle::b64; break;
    case 6: operand.swizzle = Swizzle::b32; break;
    default: return "shared memory descriptor with the invalid swizzle type " + std::to_string(descriptor >> 61);
  }
  if ((descriptor >> 46 & 7) != 1) return "shared memory descriptor without the constant 0b001 in bits 46-48";
  if (descriptor >> 49 & 7) return "shared memory descriptor with a base offset: only 0 is supported";
  if (descriptor >> 52 & 1) return "shared memory descriptor with an absolute leading-dimension address: unsupported";
  return "";
}

// ---------------------------------------------------------------------------------------------------------
// Where chunks lie

static uint32_t swizzle_bits(Swizzle swizzle) {  // log2 of the 16-byte chunks of a swizzled row
  switch (swizzle) {
    case Swizzle::none: return 0;
    case Swizzle::b32: return 1;
    case Swizzle::b64: return 2;
    case Swizzle::b128: case Swizzle::b128_atom32: return 3;
  }
  return 0;
}

// Bytes after which the swizzle pattern repeats.
static uint32_t swizzle_period(Swizzle swizzle) {
  switch (swizzle) {
    case Swizzle::none: return 16;
    case Swizzle::b32: return 256;
    case Swizzle::b64: return 512;
    case Swizzle::b128: return 1024;
    case Swizzle::b128_atom32: return 512;
  }
  return 16;
}

uint32_t ChunkMap::swizzled(uint32_t address) const {
  switch (swizzle_) {
    case Swizzle::none: return address;
    case Swizzle::b32: return address ^ (address >> 3 & 0x10);
    case Swizzle::b64: return address ^ (address >> 3 & 0x30);
    case Swizzle::b128: return address ^ (address >> 3 & 0x70);
    case Swizzle::b128_atom32: return address ^ (address >> 2 & 0x60);
  }
  return address;
}

ChunkMap::ChunkMap(const SharedOperand& operand) : swizzle_(operand.swizzle), start_(operand.start) {
  const uint32_t bytes = format_bytes(operand.format);
  const uint32_t line_bytes = (operand.mn_major ? operand.mn : operand.k) * bytes;
  lines_ = operand.mn_major ? operand.k : operand.mn;
  chunks_ = (line_bytes + 15) / 16;
  row_shift_ = swizzle_ == Swizzle::b128_atom32 ? 2 : 3;
  atom_shift_ = swizzle_bits(swizzle_);
  pitch_ = 16u << atom_shift_;
  const bool plain = swizzle_ == Swizzle::none;
  if (operand.mn_major) {  // without swizzle the two strides change roles
    group_stride_ = plain ? operand.leading : operand.stride;
    atom_stride_ = plain ? operand.stride : operand.leading;
  } else {  // a swizzled row holds all of k: its chunks are neighbours
    group_stride_ = operand.stride;
    atom_stride_ = plain ? operand.leading : pitch_;
  }
  const uint32_t period = swizzle_period(swizzle_), atoms = (chunks_ - 1) >> atom_shift_;
  const uint32_t groups = (lines_ - 1) >> row_shift_;
  regular_ = row_shift_ == 3 && (group_stride_ % period == 0 || groups == 0) &&
             (atom_stride_ % period == 0 || atoms == 0);
  if (!regular_) return;
  for (uint32_t column = 0; column < std::min(chunks_, 1u << atom_shift_); ++column)
    for (uint32_t row = 0; row < 8; ++row) table_[column][row] = swizzled(start_ + row * pitch_ + column * 16);
}

uint64_t ChunkMap::begin() const { return start_ & ~(swizzle_ == Swizzle::none ? 0u : pitch_ - 1); }

uint64_t ChunkMap::highest(uint32_t line, uint32_t chunk) const {
  const uint32_t row = line & ((1u << row_shift_) - 1), column = chunk & ((1u << atom_shift_) - 1);
  return uint64_t(start_) + row * pitch_ + column * 16 + uint64_t(line >> row_shift_) * group_stride_ +
         uint64_t(chunk >> atom_shift_) * atom_stride_;
}

uint64_t ChunkMap::end() const {
  uint64_t top = 0;  // the last line is not the highest one if a stride is small: look at every corner
  const uint32_t group_end = std::min(lines_, 1u << row_shift_), last_group = (lines_ - 1) >> row_shift_ << row_shift_;
  for (uint32_t line : {lines_ - 1, group_end - 1, last_group - 1})
    for (uint32_t chunk : {chunks_ - 1, std::min(chunks_, 1u << atom_shift_) - 1})
      if (line < lines_) top = std::max(top, highest(line, chunk));
  const uint64_t unit = swizzle_ == Swizzle::none ? 16 : pitch_;  // a swizzle permutes the chunks of its row
  return (top / unit + 1) * unit;
}

// ---------------------------------------------------------------------------------------------------------
// Footprint

void Footprint::add(const SharedOperand& operand, const ChunkMap& map, uint32_t first, uint32_t count) {
  const uint32_t bytes = format_bytes(operand.format);
  const uint32_t first_line = operand.mn_major ? 0 : first, end_line = operand.mn_major ? map.lines() : first + count;
  const uint32_t first_chunk = operand.mn_major ? first * bytes / 16 : 0;
  const uint32_t end_chunk = operand.mn_major ? (((first + count) * bytes) + 15) / 16 : map.chunks();
  if (map.regular_) return add_regular(map, first_line, end_line, first_chunk, end_chunk);
  for (uint32_t line = first_line; line < end_line; ++line)
    for (uint32_t chunk = first_chunk; chunk < end_chunk; ++chunk) {
      const uint32_t offset = map.offset(line, chunk);
      set(offset >> 10, 1ull << (offset >> 4 & 63));
    }
}

// The chunks of one group and atom span less than two words' worth of bytes; the other groups and atoms are copies of
// that pattern, moved by the strides.
void Footprint::add_regular(const ChunkMap& map, uint32_t first_line, uint32_t end_line, uint32_t first_chunk,
                            uint32_t end_chunk) {
  const uint32_t width = 1u << map.atom_shift_;
  const uint32_t base = map.start_ & ~1023u;
  for (uint32_t chunk = first_chunk; chunk < end_chunk;) {
    const uint32_t atom = chunk >> map.atom_shift_;
    const uint32_t atom_end = std::min(end_chunk, (atom + 1) * width);
    uint64_t pattern[2] = {0, 0};
    for (; chunk < atom_end; ++chunk)
      for (uint32_t row = 0; row < 8; ++row) {
        const uint32_t position = (map.table_[chunk & (width - 1)][row] - base) >> 4;
        pattern[position >> 6] |= 1ull << (position & 63);
      }
    for (uint32_t line = first_line; line < end_line; line += 8) {
      const uint32_t moved = (base + (line >> 3) * map.group_stride_ + atom * map.atom_stride_) >> 4;
      const uint32_t word = moved >> 6, shift = moved & 63;
      if (pattern[0]) set(word, pattern[0] << shift);
      const uint64_t second = pattern[1] << shift | (shift ? pattern[0] >> (64 - shift) : 0);
      if (second) set(word + 1, second);
      const uint64_t third = shift ? pattern[1] >> (64 - shift) : 0;
      if (third) set(word + 2, third);
    }
  }
}

void Footprint::clear() {
  for (uint32_t word = low_; word <= high_ && !empty(); ++word) bits_[word] = 0;
  low_ = LIMIT;
  high_ = 0;
}

// ---------------------------------------------------------------------------------------------------------
// Unpacking

static inline __m256 even_columns_first(__m256 v) {
  return _mm256_permutevar8x32_ps(v, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
}

static inline void transpose8(__m256 row[8]) {
  __m256 a[8], b[8];
  #pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  #pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
      b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
    }
  #pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    row[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    row[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

// Elements [8 * group, 8 * group + 8) of the eight lines from `line` on. `order`: see Columns.
template <Format format, Columns order>
static inline void load_block(const uint8_t* shared, const ChunkMap& map, uint32_t line, uint32_t group,
                              __m256 row[8]) {
  static constexpr uint32_t EVEN_ODD[8] = {0, 2, 4, 6, 1, 3, 5, 7};
  constexpr uint32_t bytes = format_bytes(format);
  ChunkMap::Column first, second;
  map.column(shared, line, group * bytes / 2, first);
  if constexpr (bytes == 4) map.column(shared, line, group * 2 + 1, second);
  #pragma GCC unroll 8
  for (uint32_t i = 0; i < 8; ++i) {
    const uint32_t from = order == Columns::even_odd ? EVEN_ODD[i] : i;
    if constexpr (bytes == 1) {
      row[i] = load8<format>(first.at(from) + group % 2 * 8);
    } else if constexpr (bytes == 2) {
      row[i] = load8<format>(first.at(from));
    } else {  // the swizzle may part the two chunks
      alignas(32) uint8_t both[32];
      std::memcpy(both, first.at(from), 16);
      std::memcpy(both + 16, second.at(from), 16);
      row[i] = load8<format>(both);
    }
  }
}

// A rectangle of lines and groups (of eight elements): out[line * pitch + element], or transposed
// out[element * pitch + line]. `order` is that of the inner index of `out`.
template <Format format, bool transposed, Columns order>
static void unpack_blocks(const uint8_t* shared, const ChunkMap& map, uint32_t first_line, uint32_t lines,
                          uint32_t first_group, uint32_t groups, float* out, uint32_t pitch) {
  for (uint32_t line = 0; line < lines; line += 8)
    for (uint32_t group = 0; group < groups; ++group) {
      __m256 row[8];
      load_block<format, transposed ? order : Columns::natural>(shared, map, first_line + line, first_group + group,
                                                                row);
      if constexpr (transposed) transpose8(row);
      float* corner = transposed ? out + group * 8 * pitch + line : out + line * pitch + group * 8;
      #pragma GCC unroll 8
      for (uint32_t i = 0; i < 8; ++i) {
        const bool reorder = !transposed && order == Columns::even_odd;
        _mm256_storeu_ps(corner + i * pitch, reorder ? even_columns_first(row[i]) : row[i]);
      }
    }
}

// Calls f with the format as a compile-time constant.
template <class F>
static void with_format(Format format, F f) {
  switch (format) {
    case Format::bf16: return f(std::integral_constant<Format, Format::bf16>());
    case Format::f16: return f(std::integral_constant<Format, Format::f16>());
    case Format::tf32: return f(std::integral_constant<Format, Format::tf32>());
    case Format::e4m3: return f(std::integral_constant<Format, Format::e4m3>());
    case Format::e5m2: return f(std::integral_constant<Format, Format::e5m2>());
    case Format::s8: return f(std::integral_constant<Format, Format::s8>());
    case Format::u8: return f(std::integral_constant<Format, Format::u8>());
    default: return f(std::integral_constant<Format, Format::f32>());
  }
}

void unpack_rows(const uint8_t* shared, const SharedOperand& operand, const ChunkMap& map, uint32_t first,
                 uint32_t count, float* out, uint32_t pitch) {
  with_format(operand.format, [&](auto format) {
    constexpr Format F = format();
    constexpr Columns order = Columns::natural;
    if (operand.mn_major)
      unpack_blocks<F, true, order>(shared, map, 0, operand.k, first / 8, count / 8, out, pitch);
    else
      unpack_blocks<F, false, order>(shared, map, first, count, 0, operand.k / 8, out, pitch);
  });
}

template <Columns order>
static void unpack_columns_in(const uint8_t* shared, const SharedOperand& operand, const ChunkMap& map, uint32_t first,
                              uint32_t count, float* out, uint32_t pitch) {
  with_format(operand.format, [&](auto format) {
    constexpr Format F = format();
    if (operand.mn_major)
      unpack_blocks<F, false, order>(shared, map, 0, operand.k, first / 8, count / 8, out, pitch);
    else
      unpack_blocks<F, true, order>(shared, map, first, count, 0, operand.k / 8, out, pitch);
  });
}

void unpack_columns(const uint8_t* shared, const SharedOperand& operand, const ChunkMap& map, uint32_t first,
                    uint32_t count, float* out, uint32_t pitch, Columns columns) {
  if (columns == Columns::even_odd)
    unpack_columns_in<Columns::even_odd>(shared, operand, map, first, count, out, pitch);
  else
    unpack_columns_in<Columns::natural>(shared, operand, map, first, count, out, pitch);
}

// ---------------------------------------------------------------------------------------------------------
// Products

// ROWS x (8 * VECTORS) block of d.
template <int ROWS, int VECTORS>
static inline void multiply_block(uint32_t k, const float* a, uint32_t lda, const float* b, uint32_t ldb, float* d,
                                  uint32_t ldd, bool accumulate) {
  __m256 sum[ROWS][VECTORS];
  #pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
    #pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j)
      sum[i][j] = accumulate ? _mm256_loadu_ps(d + i * ldd + 8 * j) : _mm256_setzero_ps();
  for (uint32_t x = 0; x < k; ++x) {
    __m256 column[VECTORS];
    #pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) column[j] = _mm256_loadu_ps(b + x * ldb + 8 * j);
    #pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const __m256 row = _mm256_broadcast_ss(a + i * lda + x);
      #pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) sum[i][j] = _mm256_fmadd_ps(row, column[j], sum[i][j]);
    }
  }
  #pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
    #pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) _mm256_storeu_ps(d + i * ldd + 8 * j, sum[i][j]);
}

template <int VECTORS>
static void multiply_strip(uint32_t m, uint32_t k, const float* a, uint32_t lda, const float* b, uint32_t ldb, float* d,
                           uint32_t ldd, bool accumulate) {
  uint32_t i = 0;
  for (; i + 4 <= m; i += 4) multiply_block<4, VECTORS>(k, a + i * lda, lda, b, ldb, d + i * ldd, ldd, accumulate);
  for (; i < m; ++i) multiply_block<1, VECTORS>(k, a + i * lda, lda, b, ldb, d + i * ldd, ldd, accumulate);
}

void multiply(uint32_t m, uint32_t n, uint32_t k, const float* a, uint32_t lda, const float* b, uint32_t ldb, float* d,
              uint32_t ldd, bool accumulate) {
  uint32_t j = 0;
  while (j < n) {
    const uint32_t vectors = (n - j) / 8;
    if (vectors == 1) {
      multiply_strip<1>(m, k, a, lda, b + j, ldb, d + j, ldd, accumulate);
      j += 8;
    } else if (vectors == 2 || vectors == 4) {  // 4 as 2 + 2 rather than 3 + 1
      multiply_strip<2>(m, k, a, lda, b + j, ldb, d + j, ldd, accumulate);
      j += 16;
    } else {
      multiply_strip<3>(m, k, a, lda, b + j, ldb, d + j, ldd, accumulate);
      j += 24;
    }
  }
}

void pack_row_pairs(const float* a, uint32_t lda, uint32_t k, float sign, float* out) {
  for (uint32_t half = 0; half < 2; ++half)
    for (uint32_t x = 0; x < k; ++x)
      for (uint32_t pair = 0; pair < 4; ++pair, out += 8) {
        const float* even = a + (half * 8 + pair * 2) * lda + x;
        _mm_storeu_ps(out, _mm_set1_ps(sign * even[0]));
        _mm_storeu_ps(out + 4, _mm_set1_ps(sign * even[lda]));
      }
}

// QUADS registers (four columns each) of one half of the rows; d[i]: the i-th of them.
template <int QUADS>
static inline void multiply_quads(uint32_t n, uint32_t k, const float* a_pairs, const float* b, float* const* d,
                                  bool accumulate) {
  __m256 sum[QUADS][4];
  #pragma GCC unroll 8
  for (int q = 0; q < QUADS; ++q)
    #pragma GCC unroll 8
    for (int pair = 0; pair < 4; ++pair)
      sum[q][pair] = accumulate ? _mm256_loadu_ps(d[q] + 8 * pair) : _mm256_setzero_ps();
  for (uint32_t x = 0; x < k; ++x) {
    __m256 columns[QUADS];
    #pragma GCC unroll 8
    for (int q = 0; q < QUADS; ++q)
      columns[q] = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(b + x * n + 4 * q));
    #pragma GCC unroll 8
    for (int pair = 0; pair < 4; ++pair) {
      const __m256 rows = _mm256_loadu_ps(a_pairs + (x * 4 + pair) * 8);
      #pragma GCC unroll 8
      for (int q = 0; q < QUADS; ++q) sum[q][pair] = _mm256_fmadd_ps(rows, columns[q], sum[q][pair]);
    }
  }
  #pragma GCC unroll 8
  for (int q = 0; q < QUADS; ++q)
    #pragma GCC unroll 8
    for (int pair = 0; pair < 4; ++pair) _mm256_storeu_ps(d[q] + 8 * pair, sum[q][pair]);
}

void multiply_fragment(uint32_t n, uint32_t k, const float* a_pairs, const float* b, float* const* d, bool accumulate) {
  const uint32_t quads = n / 4;
  for (uint32_t half = 0; half < 2; ++half) {
    const float* rows = a_pairs + half * k * 32;
    for (uint32_t q = 0; q < quads;) {
      float* registers[3];
      for (uint32_t i = 0; i < 3 && q + i < quads; ++i) registers[i] = d[(q + i) / 2 * 4 + half * 2 + (q + i) % 2];
      const uint32_t left = quads - q;
      if (left == 2 || left == 4) {
        multiply_quads<2>(n, k, rows, b + 4 * q, registers, accumulate);
        q += 2;
      } else {
        multiply_quads<3>(n, k, rows, b + 4 * q, registers, accumulate);
        q += 3;
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------
// Fragments in registers

constexpr uint32_t FRAGMENT_LANES = 32;

template <Format format>
static inline float register_element(uint32_t word, uint32_t element) {
  constexpr uint32_t bits = 8 * format_bytes(format);
  if constexpr (bits == 32) return to_float(format, word);
  else return to_float(format, word >> (bits * element) & ((1u << bits) - 1));
}

void unpack_a_fragment(const uint32_t* const* registers, uint32_t count, Format format, uint32_t k, float* out) {
  with_format(format, [&](auto constant) {
    constexpr Format F = constant();
    constexpr uint32_t per = 4 / format_bytes(F);
    for (uint32_t r = 0; r < count; ++r)
      for (uint32_t lane = 0; lane < FRAGMENT_LANES; ++lane) {
        float* row = out + (lane / 4 + 8 * (r % 2)) * k + per * (lane % 4) + 4 * per * (r / 2);
        for (uint32_t e = 0; e < per; ++e) row[e] = register_element<F>(registers[r][lane], e);
      }
  });
}

void unpack_b_fragment(const uint32_t* const* registers, uint32_t count, Format format, float* out) {
  with_format(format, [&](auto constant) {
    constexpr Format F = constant();
    constexpr uint32_t per = 4 / format_bytes(F);
    for (uint32_t r = 0; r < count; ++r)
      for (uint32_t lane = 0; lane < FRAGMENT_LANES; ++lane) {
        const uint32_t column = lane / 4, place = column % 2 * 4 + column / 2;
        for (uint32_t e = 0; e < per; ++e)
          out[(per * (lane % 4) + 4 * per * r + e) * 8 + place] = register_element<F>(registers[r][lane], e);
      }
  });
}

void load_half_accumulators(const uint32_t* const* registers, uint32_t count, float* floats) {
  for (uint32_t r = 0; r < count; ++r, floats += 2 * FRAGMENT_LANES)
    for (uint32_t lane = 0; lane < FRAGMENT_LANES; ++lane) {
      floats[lane] = f16_to_float(uint16_t(registers[r][lane]));
      floats[FRAGMENT_LANES + lane] = f16_to_float(uint16_t(registers[r][lane] >> 16));
    }
}

void store_half_accumulators(const float* floats, uint32_t count, uint32_t* const* registers) {
  for (uint32_t r = 0; r < count; ++r, floats += 2 * FRAGMENT_LANES)
    for (uint32_t lane = 0; lane < FRAGMENT_LANES; ++lane)
      registers[r][lane] = float_to_f16(floats[lane]) | uint32_t(float_to_f16(floats[FRAGMENT_LANES + lane])) << 16;
}

bool mma_format(const std::string& type, Format& format) {
  for (Format known : {Format::bf16, Format::f16, Format::tf32, Format::e4m3, Format::e5m2})
    if (type == format_name(known)) {
      format = known;
      return true;
    }
  return false;
}

}  // namespace emu
