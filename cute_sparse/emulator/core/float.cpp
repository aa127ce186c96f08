// Floating-point arithmetic in f32, f64, f16, bf16 and their packed pairs (PTX ISA 9.7.3 to 9.7.5). Rounding is true:
// directed modes run under the processor's own rounding mode. The build forbids contraction, so a multiplication and
// an addition fuse only where the PTX says fma.
#include <cmath>
#include <map>

#include "formats.h"
#include "lanes.h"

namespace emu {
namespace {

constexpr float SMALLEST_NORMAL = 1.17549435e-38f;

inline float flush(float x) { return std::fabs(x) < SMALLEST_NORMAL ? std::copysign(0.0f, x) : x; }
template <bool FTZ> inline float maybe_flush(float x) { return FTZ ? flush(x) : x; }
inline float saturate(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }  // NaN becomes 0

// NaN results are canonical (PTX ISA 9.7.3): arithmetic does not hand on payloads.
inline float canonical(float x) { return x != x ? float_of_bits(CANONICAL_NAN_F32) : x; }

struct RoundingScope {  // of the SSE control register
  uint32_t saved;
  explicit RoundingScope(Rounding rounding) : saved(_mm_getcsr()) {
    const uint32_t mode = rounding == Rounding::rm ? _MM_ROUND_DOWN
                          : rounding == Rounding::rp ? _MM_ROUND_UP
                          : rounding == Rounding::rz ? _MM_ROUND_TOWARD_ZERO : _MM_ROUND_NEAREST;
    _mm_setcsr((saved & ~uint32_t(_MM_ROUND_MASK)) | mode);
  }
  ~RoundingScope() { _mm_setcsr(saved); }
};

// The operands pass through `opaque`, so that the compiler neither folds nor moves the operation across the change of
// rounding mode.
inline float opaque(float x) { asm volatile("" : "+x"(x)); return x; }
inline double opaque(double x) { asm volatile("" : "+x"(x)); return x; }

struct ArithmeticDetail {
  Rounding rounding = Rounding::rn;
  bool ftz = false, saturate = false;
  Format format = Format::f32;       // of each element
  uint32_t elements = 1;             // 2: packed
  Format sources[3] = {Format::f32, Format::f32, Format::f32};  // mixed precision: add.f32.bf16, fma.f32.f16
  bool nan = false, xorsign = false, absolute = false, relu = false;  // min and max
};

enum class Op : uint8_t { add, sub, mul, fma };

template <Op OP, class T> inline T apply(T a, T b, T c) {
  if constexpr (OP == Op::add) return a + b;
  if constexpr (OP == Op::sub) return a - b;
  if constexpr (OP == Op::mul) return a * b;
  return std::fma(a, b, c);
}

constexpr size_t source_count(Op op) { return op == Op::fma ? 3 : 2; }

// The common case: f32 or a packed pair of them, nearest, denormals kept or flushed. Elements are 32 bits apart.
template <Op OP, uint32_t ELEMENTS, bool FTZ> Step exec_f32(Warp& w, const Instr& i) {
  float* d = w.f32(i.d[0]);
  const float *a = w.f32(i.s[0]), *b = w.f32(i.s[1]), *c = w.f32(i.s[OP == Op::fma ? 2 : 0]);
  for_lanes(w, [&](uint32_t l) {
    for (uint32_t e = 0; e < ELEMENTS; ++e) {
      const uint32_t at = l * ELEMENTS + e;
      float r = apply<OP>(maybe_flush<FTZ>(a[at]), maybe_flush<FTZ>(b[at]), maybe_flush<FTZ>(c[at]));
      d[at] = maybe_flush<FTZ>(canonical(r));
    }
  });
  return Step::next;
}

// Any rounding, saturation, and 16-bit addends (sources converted to f32 first: exact).
template <Op OP> Step exec_f32_general(Warp& w, const Instr& i) {
  const auto& detail = *static_cast<const ArithmeticDetail*>(i.detail);
  const uint32_t n = detail.elements;
  auto source = [&](uint32_t k, uint32_t at) {
    if (detail.sources[k] == Format::bf16) return bf16_to_float(uint16_t(w.u32(i.s[k])[at]));
    if (detail.sources[k] == Format::f16) return f16_to_float(uint16_t(w.u32(i.s[k])[at]));
    return w.f32(i.s[k])[at];
  };
  float* d = w.f32(i.d[0]);
  RoundingScope scope(detail.rounding);
  for_lanes(w, [&](uint32_t l) {
    for (uint32_t e = 0; e < n; ++e) {
      const uint32_t at = l * n + e;
      float x[3] = {0, 0, 0};
      for (uint32_t k = 0; k < source_count(OP); ++k) {
        x[k] = source(k, at);
        if (detail.ftz) x[k] = flush(x[k]);
      }
      float r = opaque(apply<OP>(opaque(x[0]), opaque(x[1]), opaque(x[2])));
      r = canonical(r);
      if (detail.ftz) r = flush(r);
      if (detail.saturate) r = saturate(r);
      d[at] = r;
    }
  });
  return Step::next;
}

template <Op OP> Step exec_f64(Warp& w, const Instr& i) {
  const auto& detail = *static_cast<const ArithmeticDetail*>(i.detail);
  auto* d = reinterpret_cast<double*>(w.u64(i.d[0]));
  const auto *a = reinterpret_cast<double*>(w.u64(i.s[0])), *b = reinterpret_cast<double*>(w.u64(i.s[1])),
             *c = reinterpret_cast<double*>(w.u64(i.s[OP == Op::fma ? 2 : 0]));
  RoundingScope scope(detail.rounding);
  for_lanes(w, [&](uint32_t l) { d[l] = opaque(apply<OP>(opaque(a[l]), opaque(b[l]), opaque(c[l]))); });
  return Step::next;
}

inline float element16(uint32_t word, uint32_t e, Format format) {
  const uint16_t bits = uint16_t(word >> (16 * e));
  return format == Format::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
}
inline uint32_t round16(double x, Format format) {
  // float(x) is exact enough to be rounded again only if the first rounding was exact; sums and products of 16-bit
  // values fit a double exactly, so round once, from double, to odd in float and then to the format.
  float f = float(x);
  if (double(f) != x && x == x && std::fabs(f) <= 3.4e38f) {
    uint32_t bits = bits_of_float(f);
    const bool toward_zero_is_smaller = std::fabs(double(f)) > std::fabs(x);
    if (toward_zero_is_smaller) --bits;  // now truncated
    f = float_of_bits(bits | 1);         // sticky
  }
  return format == Format::bf16 ? float_to_bf16(f) : float_to_f16(f);
}

// f16, bf16 and their pairs: exact in double, then one rounding.
template <Op OP> Step exec_f16(Warp& w, const Instr& i) {
  const auto& detail = *static_cast<const ArithmeticDetail*>(i.detail);
  const uint32_t *a = w.u32(i.s[0]), *b = w.u32(i.s[1]), *c = w.u32(i.s[OP == Op::fma ? 2 : 0]);
  uint32_t* d = w.u32(i.d[0]);
  for_lanes(w, [&](uint32_t l) {
    uint32_t r = 0;
    for (uint32_t e = 0; e < detail.elements; ++e) {
      double x = apply<OP>(double(element16(a[l], e, detail.format)), double(element16(b[l], e, detail.format)),
                           double(element16(c[l], e, detail.format)));
      if (detail.saturate) x = saturate(float(x));
      if (detail.relu && !(x > 0)) x = x != x ? x : 0;
      r |= (x != x ? CANONICAL_NAN_16 : round16(x, detail.format)) << (16 * e);
    }
    d[l] = r;
  });
  return Step::next;
}

// ---------------------------------------------------------------------------------------------------------
// min and max (PTX ISA 9.7.3.11, .12): the number wins over a NaN unless .NaN; -0 < +0

template <bool MAX> inline float extremum(float a, float b, bool nan) {
  if (a != a || b != b) {
    if (nan || (a != a && b != b)) return float_of_bits(CANONICAL_NAN_F32);
    return a != a ? b : a;
  }
  if (a == b) return (std::signbit(a) != 0) == MAX ? b : a;
  return (a > b) == MAX ? a : b;
}

template <bool MAX> Step exec_extremum(Warp& w, const Instr& i) {
  float* d = w.f32(i.d[0]);
  const float *a = w.f32(i.s[0]), *b = w.f32(i.s[1]);
  for_lanes(w, [&](uint32_t l) { d[l] = extremum<MAX>(a[l], b[l], false); });
  return Step::next;
}

template <bool MAX> Step exec_extremum_general(Warp& w, const Instr& i) {
  const auto& detail = *static_cast<const ArithmeticDetail*>(i.detail);
  const uint32_t sources = uint32_t(i.imm);
  auto* d = w.u32(i.d[0]);
  auto load = [&](uint32_t k, uint32_t l, uint32_t e) {
    float x = detail.format == Format::f32 ? w.f32(i.s[k])[l] : element16(w.u32(i.s[k])[l], e, detail.format);
    if (detail.ftz) x = flush(x);
    return x;
  };
  for_lanes(w, [&](uint32_t l) {
    uint32_t r = 0;
    for (uint32_t e = 0; e < detail.elements; ++e) {
      float x = load(0, l, e);
      bool sign = std::signbit(x);
      if (detail.absolute) x = std::fabs(x);
      for (uint32_t k = 1; k < sources; ++k) {
        float y = load(k, l, e);
        sign ^= std::signbit(y);
        if (detail.absolute) y = std::fabs(y);
        x = extremum<MAX>(x, y, detail.nan);
      }
      if (detail.xorsign && x == x) x = sign ? -std::fabs(x) : std::fabs(x);
      if (detail.relu && x < 0) x = 0;
      if (detail.format == Format::f32) r = bits_of_float(x);
      else r |= (x != x ? CANONICAL_NAN_16 : detail.format == Format::bf16 ? float_to_bf16(x) : float_to_f16(x)) << (16 * e);
    }
    d[l] = r;
  });
  return Step::next;
}

// ---------------------------------------------------------------------------------------------------------
// One-operand functions. The approximations (.approx) return the correctly rounded value, which lies within every
// error bound of the ISA; special values follow its tables.

template <float (*F)(float), bool FTZ> Step exec_function(Warp& w, const Instr& i) {
  float* d = w.f32(i.d[0]);
  const float* a = w.f32(i.s[0]);
  for_lanes(w, [&](uint32_t l) { d[l] = maybe_flush<FTZ>(canonical(F(maybe_flush<FTZ>(a[l])))); });
  return Step::next;
}

float reciprocal(float x) { return 1.0f / x; }
float reciprocal_root(float x) { return x < 0 ? float_of_bits(CANONICAL_NAN_F32) : 1.0f / std::sqrt(x); }
float exp2_of(float x) { return std::exp2(x); }
float log2_of(float x) { return x == 0 ? -INFINITY : x < 0 ? float_of_bits(CANONICAL_NAN_F32) : std::log2(x); }
float sine(float x) { return std::sin(x); }
float cosine(float x) { return std::cos(x); }
float hyperbolic_tangent(float x) { return std::tanh(x); }
float square_root(float x) { return std::sqrt(x); }
float negated(float x) { return -x; }
float absolute(float x) { return std::fabs(x); }

template <float (*F)(float)> Step exec_function16(Warp& w, const Instr& i) {  // f16x2, bf16x2 and singles
  const auto& detail = *static_cast<const ArithmeticDetail*>(i.detail);
  uint32_t* d = w.u32(i.d[0]);
  const uint32_t* a = w.u32(i.s[0]);
  for_lanes(w, [&](uint32_t l) {
    uint32_t r = 0;
    for (uint32_t e = 0; e < detail.elements; ++e) {
      const float y = F(element16(a[l], e, detail.format));
      r |= (y != y ? CANONICAL_NAN_16 : detail.format == Format::bf16 ? float_to_bf16(y) : float_to_f16(y)) << (16 * e);
    }
    d[l] = r;
  });
  return Step::next;
}

template <bool FTZ> Step exec_div(Warp& w, const Instr& i) {
  float* d = w.f32(i.d[0]);
  const float *a = w.f32(i.s[0]), *b = w.f32(i.s[1]);
  for_lanes(w, [&](uint32_t l) {
    d[l] = maybe_flush<FTZ>(canonical(maybe_flush<FTZ>(a[l]) / maybe_flush<FTZ>(b[l])));
  });
  return Step::next;
}

Step exec_copysign(Warp& w, const Instr& i) {  // the sign of a, the magnitude of b
  float* d = w.f32(i.d[0]);
  const float *a = w.f32(i.s[0]), *b = w.f32(i.s[1]);
  for_lanes(w, [&](uint32_t l) { d[l] = std::copysign(b[l], a[l]); });
  return Step::next;
}

// ---------------------------------------------------------------------------------------------------------
// Decoding

bool packed_format(const std::string& type, ArithmeticDetail& detail) {
  static const std::map<std::string, std::pair<Format, uint32_t>> formats = {
      {"f32", {Format::f32, 1}},   {"f32x2", {Format::f32, 2}},   {"f16", {Format::f16, 1}},
      {"f16x2", {Format::f16, 2}}, {"bf16", {Format::bf16, 1}},   {"bf16x2", {Format::bf16, 2}}};
  const auto it = formats.find(type);
  if (it == formats.end()) return false;
  detail.format = it->second.first;
  detail.elements = it->second.second;
  return true;
}

ArithmeticDetail modifiers_of(const Statement& s) {
  ArithmeticDetail detail;
  detail.ftz = s.has("ftz");
  detail.saturate = s.has("sat");
  detail.rounding = s.has("rz") ? Rounding::rz : s.has("rm") ? Rounding::rm : s.has("rp") ? Rounding::rp : Rounding::rn;
  detail.nan = s.has("NaN");
  detail.xorsign = s.has("xorsign");
  detail.absolute = s.has("abs");
  detail.relu = s.has("relu");
  return detail;
}

template <Op OP> Exec pick_f32(const ArithmeticDetail& detail) {
  const bool plain = detail.rounding == Rounding::rn && !detail.saturate && detail.sources[0] == Format::f32 &&
                     detail.sources[1] == Format::f32 && detail.sources[2] == Format::f32;
  if (!plain) return exec_f32_general<OP>;
  if (detail.elements == 2) return detail.ftz ? exec_f32<OP, 2, true> : exec_f32<OP, 2, false>;
  return detail.ftz ? exec_f32<OP, 1, true> : exec_f32<OP, 1, false>;
}

template <Op OP> bool decode_arithmetic(const Statement& s, Builder& b) {
  if (s.operands.size() != source_count(OP) + 1) return false;
  ArithmeticDetail detail = modifiers_of(s);
  const std::string& type = s.type();
  if (type == "f64") {
    b.out.detail = b.keep(detail);
    return decode_uniform(s, b, exec_f64<OP>, source_count(OP));
  }
  if (!packed_format(type, detail)) return false;
  const bool mixed = s.modifiers.size() > 2 && s.modifiers[s.modifiers.size() - 2] == "f32";  // add.f32.bf16
  if (mixed && detail.elements == 1 && detail.format != Format::f32) {
    // the 16-bit type is that of a (and of b in fma); the last source and the result are f32
    detail.sources[0] = detail.format;
    if (OP == Op::fma) detail.sources[1] = detail.format;
    for (uint32_t k = 0; k < source_count(OP); ++k)
      b.out.s[k] = b.read(s.operands[k + 1], detail.sources[k] == Format::f32 ? RegClass::b32 : RegClass::b16);
    b.out.d[0] = b.write(s.operands[0]);
    b.out.exec = exec_f32_general<OP>;
    b.out.detail = b.keep(detail);
    return true;
  }
  b.out.detail = b.keep(detail);
  return decode_uniform(s, b, detail.format == Format::f32 ? pick_f32<OP>(detail) : exec_f16<OP>, source_count(OP));
}

template <bool MAX> bool decode_extremum(const Statement& s, Builder& b) {
  ArithmeticDetail detail = modifiers_of(s);
  if (!packed_format(s.type(), detail)) return false;
  if (detail.format == Format::f32 && detail.elements != 1) return false;
  const size_t sources = s.operands.size() - 1;
  const bool plain = detail.format == Format::f32 && sources == 2 && !detail.nan && !detail.ftz && !detail.xorsign &&
                     !detail.absolute && !detail.relu;
  b.out.imm = sources;
  b.out.detail = b.keep(detail);
  return decode_uniform(s, b, plain ? exec_extremum<MAX> : exec_extremum_general<MAX>, sources);
}

template <float (*F)(float)> bool decode_function(const Statement& s, Builder& b) {
  ArithmeticDetail detail = modifiers_of(s);
  if (!packed_format(s.type(), detail) || (detail.format == Format::f32 && detail.elements != 1)) return false;
  b.out.detail = b.keep(detail);
  if (detail.format != Format::f32) return decode_uniform(s, b, exec_function16<F>, 1);
  return decode_uniform(s, b, detail.ftz ? exec_function<F, true> : exec_function<F, false>, 1);
}

}  // namespace

bool decode_float(const Statement& s, Builder& b) {
  const std::string& m = s.mnemonic();
  const std::string& type = s.type();
  if (type != "f32" && type != "f64" && type != "f32x2" && type != "f16" && type != "f16x2" && type != "bf16" &&
      type != "bf16x2")
    return false;
  if (m == "add") return decode_arithmetic<Op::add>(s, b);
  if (m == "sub") return decode_arithmetic<Op::sub>(s, b);
  if (m == "mul") return decode_arithmetic<Op::mul>(s, b);
  if (m == "fma" || (m == "mad" && type == "f32")) return decode_arithmetic<Op::fma>(s, b);
  if (m == "max") return decode_extremum<true>(s, b);
  if (m == "min") return decode_extremum<false>(s, b);
  if (m == "neg") return decode_function<negated>(s, b);
  if (m == "abs") return decode_function<absolute>(s, b);
  if (m == "ex2" && s.has("approx")) return decode_function<exp2_of>(s, b);
  if (m == "tanh" && s.has("approx")) return decode_function<hyperbolic_tangent>(s, b);
  if (type != "f32") return false;
  const bool nearest = !s.has("rz") && !s.has("rm") && !s.has("rp");
  if (m == "lg2") return decode_function<log2_of>(s, b);
  if (m == "rcp" && nearest) return decode_function<reciprocal>(s, b);
  if (m == "sqrt" && nearest) return decode_function<square_root>(s, b);
  if (m == "rsqrt") return decode_function<reciprocal_root>(s, b);
  if (m == "sin") return decode_function<sine>(s, b);
  if (m == "cos") return decode_function<cosine>(s, b);
  if (m == "div" && nearest) return decode_uniform(s, b, s.has("ftz") ? exec_div<true> : exec_div<false>, 2);
  if (m == "copysign") return decode_uniform(s, b, exec_copysign, 2);
  return false;
}

}  // namespace emu
