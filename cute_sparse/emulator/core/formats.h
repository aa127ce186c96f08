// Element formats: bits -> float (exact for every format here), and float -> bits with the roundings of the PTX
// ISA (9.7.9.21 "cvt"; formats: 5.2.3 "Alternate floating-point data formats").
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace emu {

enum class Format : uint8_t { f32, tf32, bf16, f16, e4m3, e5m2, e2m3, e3m2, e2m1, ue8m0, s8, u8 };

enum class Rounding : uint8_t {
  rn,   // nearest, ties to even
  rna,  // nearest, ties away from zero
  rz,   // towards zero
  rm,   // towards minus infinity
  rp,   // towards plus infinity
};

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

constexpr uint32_t CANONICAL_NAN_F32 = 0x7fffffffu;
constexpr uint16_t CANONICAL_NAN_16 = 0x7fffu;  // f16 and bf16
constexpr uint8_t CANONICAL_NAN_8 = 0x7fu;      // e4m3 and e5m2

// Bytes of one element in shared memory (the sub-byte formats stand for their 8-bit containers).
constexpr uint32_t format_bytes(Format format) {
  switch (format) {
    case Format::f32: case Format::tf32: return 4;
    case Format::bf16: case Format::f16: return 2;
    default: return 1;
  }
}

constexpr const char* format_name(Format format) {
  switch (format) {
    case Format::f32: return "f32";
    case Format::tf32: return "tf32";
    case Format::bf16: return "bf16";
    case Format::f16: return "f16";
    case Format::e4m3: return "e4m3";
    case Format::e5m2: return "e5m2";
    case Format::e2m3: return "e2m3";
    case Format::e3m2: return "e3m2";
    case Format::e2m1: return "e2m1";
    case Format::ue8m0: return "ue8m0";
    case Format::s8: return "s8";
    case Format::u8: return "u8";
  }
  return "?";
}

// ---------------------------------------------------------------------------------------------------------
// Bits -> float

inline float bf16_to_float(uint16_t bits) { return float_of_bits(uint32_t(bits) << 16); }
inline float f16_to_float(uint16_t bits) { return _cvtsh_ss(bits); }
// The matrix units ignore the low 13 bits of a .tf32 operand.
inline uint32_t tf32_truncate(uint32_t f32_bits) { return f32_bits & 0xffffe000u; }

// Shape of a format with sign, `exponent` and `mantissa` bits.
struct FloatShape {
  int exponent, mantissa, bias;
  uint32_t max_finite;   // magnitude code of the largest finite value
  uint32_t infinity;     // magnitude code, 0: the format has none
  uint32_t nan;          // canonical NaN, 0: the format has none
};

constexpr FloatShape float_shape(Format format) {
  switch (format) {
    case Format::f32: case Format::tf32: return {8, 10, 127, 0x3fbff, 0x3fc00, 0x3ffff};  // tf32: top 19 bits
    case Format::bf16: return {8, 7, 127, 0x7f7f, 0x7f80, 0x7fff};
    case Format::f16: return {5, 10, 15, 0x7bff, 0x7c00, 0x7fff};
    case Format::e4m3: return {4, 3, 7, 0x7e, 0, 0x7f};
    case Format::e5m2: return {5, 2, 15, 0x7b, 0x7c, 0x7f};
    case Format::e2m3: return {2, 3, 1, 0x1f, 0, 0};
    case Format::e3m2: return {3, 2, 3, 0x1f, 0, 0};
    case Format::e2m1: return {2, 1, 1, 0x7, 0, 0};
    default: return {0, 0, 0, 0, 0, 0};
  }
}

inline float power_of_two(int exponent) { return float_of_bits(uint32_t(exponent + 127) << 23); }  // -126..127

// Generic decoding of an 8-bit (or narrower) format; the fast paths below agree with it.
inline float small_float_to_float(Format format, uint32_t bits) {
  const FloatShape shape = float_shape(format);
  const uint32_t magnitude_bits = uint32_t(shape.exponent + shape.mantissa);
  const uint32_t magnitude = bits & ((1u << magnitude_bits) - 1);
  const uint32_t sign = (bits >> magnitude_bits & 1) << 31;
  if (format == Format::e4m3 && magnitude == 0x7f) return float_of_bits(sign | CANONICAL_NAN_F32);
  if (shape.infinity && magnitude == shape.infinity) return float_of_bits(sign | 0x7f800000u);
  if (shape.infinity && magnitude > shape.infinity) return float_of_bits(sign | CANONICAL_NAN_F32);
  const uint32_t exponent = magnitude >> shape.mantissa;
  const uint32_t fraction = magnitude & ((1u << shape.mantissa) - 1);
  const uint32_t significand = exponent ? fraction | 1u << shape.mantissa : fraction;
  const float value = float(significand) * power_of_two(int(exponent ? exponent : 1) - shape.bias - shape.mantissa);
  return sign ? -value : value;
}

inline float e4m3_to_float(uint8_t bits) { return small_float_to_float(Format::e4m3, bits); }
inline float e5m2_to_float(uint8_t bits) { return f16_to_float(uint16_t(bits << 8)); }

inline float ue8m0_to_float(uint8_t bits) {
  if (bits == 0xff) return float_of_bits(CANONICAL_NAN_F32);
  return bits ? float_of_bits(uint32_t(bits) << 23) : float_of_bits(0x00400000u);  // 2^-127 is subnormal
}

inline float to_float(Format format, uint32_t bits) {
  switch (format) {
    case Format::f32: return float_of_bits(bits);
    case Format::tf32: return float_of_bits(tf32_truncate(bits));
    case Format::bf16: return bf16_to_float(uint16_t(bits));
    case Format::f16: return f16_to_float(uint16_t(bits));
    case Format::ue8m0: return ue8m0_to_float(uint8_t(bits));
    case Format::s8: return float(int8_t(bits));
    case Format::u8: return float(uint8_t(bits));
    default: return small_float_to_float(format, bits);
  }
}

// Eight consecutive elements -> eight floats; `source` need not be aligned.
inline __m256 load8_bf16(const uint8_t* source) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

inline __m256 load8_f16(const uint8_t* source) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
}

inline __m256 load8_tf32(const uint8_t* source) {
  const __m256 value = _mm256_loadu_ps(reinterpret_cast<const float*>(source));
  return _mm256_and_ps(value, _mm256_castsi256_ps(_mm256_set1_epi32(int(0xffffe000u))));
}

inline __m256 load8_e5m2(const uint8_t* source) {
  const __m128i wide = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source)));
  return _mm256_cvtph_ps(_mm_slli_epi16(wide, 8));
}

// e4m3 moved into f16's fields is the value times 2^-8 (bias 7 against 15), subnormals included.
inline __m256 load8_e4m3(const uint8_t* source) {
  const __m128i wide = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source)));
  const __m128i sign = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x80)), 8);
  const __m128i magnitude = _mm_and_si128(wide, _mm_set1_epi16(0x7f));
  const __m128i nan = _mm_and_si128(_mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f)), _mm_set1_epi16(0x7e00));
  const __m128i half = _mm_or_si128(_mm_or_si128(sign, _mm_slli_epi16(magnitude, 7)), nan);
  return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f));
}

inline __m256 load8_s8(const uint8_t* source) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source))));
}

inline __m256 load8_u8(const uint8_t* source) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source))));
}

// The 8-element loader of a format as a compile-time choice.
template <Format format>
inline __m256 load8(const uint8_t* source) {
  if constexpr (format == Format::bf16) return load8_bf16(source);
  else if constexpr (format == Format::f16) return load8_f16(source);
  else if constexpr (format == Format::tf32) return load8_tf32(source);
  else if constexpr (format == Format::e4m3) return load8_e4m3(source);
  else if constexpr (format == Format::e5m2) return load8_e5m2(source);
  else if constexpr (format == Format::s8) return load8_s8(source);
  else if constexpr (format == Format::u8) return load8_u8(source);
  else return _mm256_loadu_ps(reinterpret_cast<const float*>(source));
}

// ---------------------------------------------------------------------------------------------------------
// Float -> bits

// `magnitude` shifted right by `shift` bits (0..63), rounded; `negative` decides the directed roundings.
inline uint64_t shift_rounded(uint64_t magnitude, int shift, Rounding rounding, bool negative) {
  if (shift == 0) return magnitude;
  const uint64_t kept = magnitude >> shift;
  const uint64_t rest = magnitude & ((1ull << shift) - 1);
  const uint64_t half = 1ull << (shift - 1);
  switch (rounding) {
    case Rounding::rn: return kept + (rest > half || (rest == half && (kept & 1)));
    case Rounding::rna: return kept + (rest >= half);
    case Rounding::rz: return kept;
    case Rounding::rm: return kept + (negative && rest != 0);
    case Rounding::rp: return kept + (!negative && rest != 0);
  }
  return kept;
}

// Code of |value| in a format, where codes simply go on counting above the largest finite value. `value` is finite.
inline uint32_t magnitude_code(float value, const FloatShape& shape, Rounding rounding) {
  const uint32_t bits = bits_of_float(value);
  const bool negative = bits >> 31;
  const int exponent_field = int(bits >> 23 & 0xff);
  const int exponent = exponent_field ? exponent_field - 127 : -126;  // of the significand's leading (24th) bit
  const uint64_t significand = (bits & 0x7fffffu) | (exponent_field ? 0x800000u : 0u);
  const int smallest = 1 - shape.bias;  // exponent of the smallest normal value
  int shift = 23 - shape.mantissa;
  if (exponent < smallest) {  // subnormal in the target
    shift += smallest - exponent;
    if (shift > 62) shift = 62;
    return uint32_t(shift_rounded(significand, shift, rounding, negative));
  }
  // The leading one adds 1 to the exponent field, and so does a carry out of the rounding. (A subnormal float whose
  // format shares f32's exponent range has no leading one and stays subnormal.)
  return uint32_t(shift_rounded(significand, shift, rounding, negative) +
                  (uint64_t(exponent - smallest) << shape.mantissa));
}

struct Encoding {
  Rounding rounding = Rounding::rn;
  bool satfinite = false;  // infinities and overflow become the largest finite value (always so without infinity)
  bool relu = false;       // negative values and -0 become +0; NaN stays NaN
};

// float -> tf32 (in the top 19 bits of the result), bf16, f16, e4m3, e5m2, e2m3, e3m2, e2m1.
// NaN becomes the canonical NaN (formats without NaN: the largest finite value, PTX ISA "cvt", .satfinite).
inline uint32_t encode_float(float value, Format format, Encoding how = {}) {
  const FloatShape shape = float_shape(format);
  const int position = format == Format::tf32 ? 13 : 0;
  const uint32_t sign_bit = 1u << (shape.exponent + shape.mantissa);
  const uint32_t bits = bits_of_float(value);
  const uint32_t magnitude_bits = bits & 0x7fffffffu;
  if (magnitude_bits > 0x7f800000u) {
    if (format == Format::tf32) return CANONICAL_NAN_F32;
    return shape.nan ? shape.nan : shape.max_finite;
  }
  if (how.relu && (bits >> 31)) return 0;
  const uint32_t sign = (bits >> 31) ? sign_bit : 0;
  const bool saturate = how.satfinite || shape.infinity == 0;
  if (magnitude_bits == 0x7f800000u) return (sign | (saturate ? shape.max_finite : shape.infinity)) << position;
  uint32_t code = magnitude_code(value, shape, how.rounding);
  if (code > shape.max_finite) {
    const bool up = how.rounding == Rounding::rn || how.rounding == Rounding::rna ||
                    how.rounding == (sign ? Rounding::rm : Rounding::rp);
    code = saturate || !up ? shape.max_finite : shape.infinity;
  }
  return (sign | code) << position;
}

// Branch-free round to nearest even, for loops over lanes.
inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? CANONICAL_NAN_16 : uint16_t(rounded);
}

inline uint16_t float_to_f16(float value) {
  const uint16_t rounded = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
  return (bits_of_float(value) & 0x7fffffffu) > 0x7f800000u ? CANONICAL_NAN_16 : rounded;
}

// float -> ue8m0, rounding rz or rp; the sign is ignored, NaN is 0xff, results saturate to the finite range.
inline uint8_t float_to_ue8m0(float value, Rounding rounding) {
  const uint32_t magnitude = bits_of_float(value) & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0xff;
  if (magnitude == 0x7f800000u) return 0xfe;
  uint32_t exponent = magnitude >> 23;
  const uint32_t fraction = magnitude & 0x7fffffu;
  if (rounding == Rounding::rp && (exponent ? fraction != 0 : fraction > 0x400000u)) ++exponent;
  return uint8_t(exponent > 0xfe ? 0xfe : exponent);
}

}  // namespace emu
