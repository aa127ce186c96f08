// cvt between every pair of formats, cvta, mapa, isspacep (PTX ISA 9.7.9.20 to 9.7.9.24).
#include <algorithm>
#include <cmath>
#include <map>

#include "formats.h"
#include "lanes.h"
#include "memory.h"

namespace emu {
namespace {

struct NumberType {
  enum class Kind : uint8_t { integer, floating } kind = Kind::integer;
  uint32_t bits = 32;
  bool is_signed = false;
  bool is_f64 = false;
  Format format = Format::f32;
  uint32_t elements = 1;
};

bool parse_type(const std::string& name, NumberType& t) {
  static const std::map<std::string, NumberType> types = [] {
    using K = NumberType::Kind;
    std::map<std::string, NumberType> m;
    for (uint32_t bits : {8u, 16u, 32u, 64u}) {
      m["u" + std::to_string(bits)] = {K::integer, bits, false, false, Format::f32, 1};
      m["s" + std::to_string(bits)] = {K::integer, bits, true, false, Format::f32, 1};
    }
    m["f64"] = {K::floating, 64, true, true, Format::f32, 1};
    m["f32"] = {K::floating, 32, true, false, Format::f32, 1};
    m["tf32"] = {K::floating, 32, true, false, Format::tf32, 1};
    m["f16"] = {K::floating, 16, true, false, Format::f16, 1};
    m["bf16"] = {K::floating, 16, true, false, Format::bf16, 1};
    m["f16x2"] = {K::floating, 16, true, false, Format::f16, 2};
    m["bf16x2"] = {K::floating, 16, true, false, Format::bf16, 2};
    m["e4m3x2"] = {K::floating, 8, true, false, Format::e4m3, 2};
    m["e5m2x2"] = {K::floating, 8, true, false, Format::e5m2, 2};
    m["e2m3x2"] = {K::floating, 8, true, false, Format::e2m3, 2};
    m["e3m2x2"] = {K::floating, 8, true, false, Format::e3m2, 2};
    m["ue8m0x2"] = {K::floating, 8, true, false, Format::ue8m0, 2};
    return m;
  }();
  const auto it = types.find(name);
  if (it == types.end()) return false;
  t = it->second;
  return true;
}

enum class ToInteger : uint8_t { none, nearest, zero, down, up };

struct CvtDetail {
  NumberType from, to;
  Rounding rounding = Rounding::rn;
  ToInteger to_integer = ToInteger::none;
  bool ftz = false, saturate = false, satfinite = false, relu = false;
  bool two_sources = false;  // cvt.*x2.f32 d, a, b: a becomes the upper half
};

template <class To, class From> Step exec_integer(Warp& w, const Instr& i) {
  return unary<To, From>(w, i, [](From a) { return To(a); });
}

template <class From> Exec pick_to(const NumberType& to) {
  switch (to.bits) {
    case 8: return to.is_signed ? exec_integer<int8_t, From> : exec_integer<uint8_t, From>;
    case 16: return to.is_signed ? exec_integer<int16_t, From> : exec_integer<uint16_t, From>;
    case 32: return to.is_signed ? exec_integer<int32_t, From> : exec_integer<uint32_t, From>;
    default: return to.is_signed ? exec_integer<int64_t, From> : exec_integer<uint64_t, From>;
  }
}

Exec pick_integer(const NumberType& from, const NumberType& to) {
  switch (from.bits) {
    case 8: return from.is_signed ? pick_to<int8_t>(to) : pick_to<uint8_t>(to);
    case 16: return from.is_signed ? pick_to<int16_t>(to) : pick_to<uint16_t>(to);
    case 32: return from.is_signed ? pick_to<int32_t>(to) : pick_to<uint32_t>(to);
    default: return from.is_signed ? pick_to<int64_t>(to) : pick_to<uint64_t>(to);
  }
}

// The common packing: two f32 to a pair of 16-bit values, nearest.
template <Format FORMAT> Step exec_pack16(Warp& w, const Instr& i) {
  uint32_t* d = w.u32(i.d[0]);
  const float *high = w.f32(i.s[0]), *low = w.f32(i.s[1]);
  for_lanes(w, [&](uint32_t l) {
    if constexpr (FORMAT == Format::bf16)
      d[l] = uint32_t(float_to_bf16(high[l])) << 16 | float_to_bf16(low[l]);
    else
      d[l] = uint32_t(float_to_f16(high[l])) << 16 | float_to_f16(low[l]);
  });
  return Step::next;
}

__int128 read_integer(Warp& w, uint32_t slot, uint32_t lane, const NumberType& t) {
  const uint64_t raw = t.bits == 64 ? w.u64(slot)[lane] : w.u32(slot)[lane];
  if (t.bits == 64) return t.is_signed ? __int128(int64_t(raw)) : __int128(raw);
  const uint64_t value = raw & ((1ull << t.bits) - 1);
  if (t.is_signed && value >> (t.bits - 1)) return __int128(value) - (__int128(1) << t.bits);
  return __int128(value);
}

double read_floating(Warp& w, uint32_t slot, uint32_t lane, uint32_t element, const NumberType& t) {
  if (t.is_f64) {
    double d;
    std::memcpy(&d, &w.u64(slot)[lane], 8);
    return d;
  }
  const uint32_t word = w.u32(slot)[lane] >> (t.bits * element % 32);
  return double(to_float(t.format, t.bits == 32 ? word : word & ((1u << t.bits) - 1)));
}

double round_to_integral(double x, ToInteger how) {
  switch (how) {
    case ToInteger::nearest: return std::nearbyint(x);
    case ToInteger::zero: return std::trunc(x);
    case ToInteger::down: return std::floor(x);
    case ToInteger::up: return std::ceil(x);
    default: return x;
  }
}

void clamp_to(const NumberType& t, __int128& low, __int128& high) {
  low = t.is_signed ? -(__int128(1) << (t.bits - 1)) : 0;
  high = (__int128(1) << (t.is_signed ? t.bits - 1 : t.bits)) - 1;
}

uint64_t integer_result(__int128 value, const NumberType& t, bool saturate) {
  __int128 low, high;
  clamp_to(t, low, high);
  if (saturate) value = std::clamp(value, low, high);
  const uint64_t raw = uint64_t(value);
  if (t.bits == 64) return raw;
  if (t.bits == 32) return raw & 0xffffffffu;
  return raw & ((1ull << t.bits) - 1);
}

// Float to integer always clamps; NaN becomes 0 (of 64-bit results: the most negative / largest pattern, ISA note).
uint64_t float_to_integer(double x, const NumberType& t, ToInteger how) {
  if (x != x) return t.bits == 64 ? 1ull << 63 : 0;
  x = round_to_integral(x, how);
  __int128 low, high;
  clamp_to(t, low, high);
  if (x <= double(low)) return integer_result(low, t, false);
  if (x >= double(high)) return integer_result(high, t, false);
  return integer_result(__int128(x), t, false);
}

float round_to_f32(double x, Rounding rounding) {
  float f = float(x);
  if (double(f) == x || x != x) return f;
  const bool too_low = double(f) < x;
  if (rounding == Rounding::rm && !too_low) return std::nextafterf(f, -INFINITY);
  if (rounding == Rounding::rp && too_low) return std::nextafterf(f, INFINITY);
  if (rounding == Rounding::rz && (std::fabs(double(f)) > std::fabs(x))) return std::nextafterf(f, 0.0f);
  return f;
}

uint64_t floating_result(double x, const CvtDetail& detail) {
  const NumberType& t = detail.to;
  if (detail.to_integer != ToInteger::none) x = round_to_integral(x, detail.to_integer);
  if (detail.saturate) x = x > 0 ? (x < 1 ? x : 1) : 0;
  if (t.is_f64) {
    uint64_t bits;
    std::memcpy(&bits, &x, 8);
    return bits;
  }
  if (t.format == Format::f32) {
    float f = round_to_f32(x, detail.rounding);
    if (detail.ftz && std::fabs(f) < 1.17549435e-38f) f = std::copysign(0.0f, f);
    if (detail.relu && f < 0) f = 0;
    return bits_of_float(f == f ? f : float_of_bits(CANONICAL_NAN_F32));
  }
  if (t.format == Format::ue8m0) return float_to_ue8m0(float(x), detail.rounding);
  Encoding how;
  how.rounding = detail.rounding;
  how.satfinite = detail.satfinite;
  how.relu = detail.relu;
  return encode_float(float(x), t.format, how);
}

Step exec_cvt(Warp& w, const Instr& i) {
  const auto& detail = *static_cast<const CvtDetail*>(i.detail);
  const NumberType &from = detail.from, &to = detail.to;
  for_lanes(w, [&](uint32_t l) {
    uint64_t r = 0;
    for (uint32_t e = 0; e < to.elements; ++e) {
      uint64_t element;
      const uint32_t slot = detail.two_sources ? i.s[1 - e] : i.s[0];
      const uint32_t source_element = detail.two_sources ? 0 : e;
      if (from.kind == NumberType::Kind::integer) {
        const __int128 value = read_integer(w, slot, l, from);
        element = to.kind == NumberType::Kind::integer ? integer_result(value, to, detail.saturate)
                                                       : floating_result(double(value), detail);
      } else {
        double value = read_floating(w, slot, l, source_element, from);
        if (detail.ftz && !from.is_f64 && std::fabs(value) < 1.17549435e-38) value = std::copysign(0.0, value);
        element = to.kind == NumberType::Kind::integer ? float_to_integer(value, to, detail.to_integer)
                                                       : floating_result(value, detail);
      }
      r |= element << (e * to.bits);
    }
    if (to.bits == 64) w.u64(i.d[0])[l] = r; else w.u32(i.d[0])[l] = uint32_t(r);
  });
  return Step::next;
}

RegClass class_of_number(const NumberType& t) {
  const uint32_t bits = t.bits * t.elements;
  return bits == 64 ? RegClass::b64 : bits == 32 ? RegClass::b32 : RegClass::b16;
}

bool decode_cvt(const Statement& s, Builder& b) {
  CvtDetail detail;
  if (s.modifiers.size() < 3 || !parse_type(s.modifiers[s.modifiers.size() - 2], detail.to) ||
      !parse_type(s.modifiers.back(), detail.from))
    return false;
  for (size_t k = 1; k + 2 < s.modifiers.size(); ++k) {
    const std::string& m = s.modifiers[k];
    if (m == "rn") detail.rounding = Rounding::rn;
    else if (m == "rna") detail.rounding = Rounding::rna;
    else if (m == "rz") detail.rounding = Rounding::rz;
    else if (m == "rm") detail.rounding = Rounding::rm;
    else if (m == "rp") detail.rounding = Rounding::rp;
    else if (m == "rni") detail.to_integer = ToInteger::nearest;
    else if (m == "rzi") detail.to_integer = ToInteger::zero;
    else if (m == "rmi") detail.to_integer = ToInteger::down;
    else if (m == "rpi") detail.to_integer = ToInteger::up;
    else if (m == "ftz") detail.ftz = true;
    else if (m == "sat") detail.saturate = true;
    else if (m == "satfinite") detail.satfinite = true;
    else if (m == "relu") detail.relu = true;
    else return false;  // .rs (stochastic), .scaled, ...
  }
  detail.two_sources = detail.to.elements == 2 && detail.from.elements == 1;
  if (s.operands.size() != (detail.two_sources ? 3u : 2u)) return false;
  for (size_t k = 1; k < s.operands.size(); ++k) b.out.s[k - 1] = b.read(s.operands[k], class_of_number(detail.from));
  b.out.d[0] = b.write(s.operands[0]);
  const bool integers = detail.from.kind == NumberType::Kind::integer && detail.to.kind == NumberType::Kind::integer;
  const bool packs16 = detail.two_sources && detail.from.format == Format::f32 && detail.rounding == Rounding::rn &&
                       !detail.relu && !detail.satfinite;
  if (integers && !detail.saturate) b.out.exec = pick_integer(detail.from, detail.to);
  else if (packs16 && detail.to.format == Format::bf16) b.out.exec = exec_pack16<Format::bf16>;
  else if (packs16 && detail.to.format == Format::f16) b.out.exec = exec_pack16<Format::f16>;
  else b.out.exec = exec_cvt;
  b.out.detail = b.keep(detail);
  return true;
}

// ---------------------------------------------------------------------------------------------------------
// Addresses. Global and parameter addresses are generic addresses as they are; shared and local memory have windows.

template <uint64_t WINDOW> Step exec_to_generic(Warp& w, const Instr& i) {
  uint64_t* d = w.u64(i.d[0]);
  for_lanes(w, [&](uint32_t l) {
    const uint64_t a = i.imm ? w.u64(i.s[0])[l] : w.u32(i.s[0])[l];
    d[l] = WINDOW | (a & 0xffffffffu);
  });
  return Step::next;
}

template <uint64_t WINDOW> Step exec_from_generic(Warp& w, const Instr& i) {
  const uint64_t* a = w.u64(i.s[0]);
  for_lanes(w, [&](uint32_t l) {
    if ((a[l] & ~0xffffffffull) != WINDOW)
      w.fail(ErrorKind::invalid_operand, "cvta.to: the generic address is not in that space", int(l));
    w.u64(i.d[0])[l] = a[l] & 0xffffffffu;
  });
  return Step::next;
}

Step exec_copy64(Warp& w, const Instr& i) {
  uint64_t* d = w.u64(i.d[0]);
  const uint64_t* a = w.u64(i.s[0]);
  for_lanes(w, [&](uint32_t l) { d[l] = a[l]; });
  return Step::next;
}

// cvta.space.u64 d, a (to generic) and cvta.to.space.u64 d, a (from generic)
bool decode_cvta(const Statement& s, Builder& b) {
  if (s.type() != "u64" || s.operands.size() != 2) return false;
  const bool from_generic = s.modifiers.size() > 2 && s.modifiers[1] == "to";
  const std::string& space = s.modifiers[from_generic ? 2 : 1];
  const Operand& source = s.operands[1];
  const bool narrow_source = source.kind == Operand::Kind::reg && source.reg.cls != RegClass::b64;
  b.out.imm = !narrow_source;
  b.out.s[0] = b.read(source, narrow_source ? RegClass::b32 : RegClass::b64);
  b.out.d[0] = b.write(s.operands[0]);
  if (space == "global" || space == "param" || space == "const") {
    b.out.exec = exec_copy64;
  } else if (space == "shared" || space == "shared::cta" || space == "shared::cluster") {
    b.out.exec = from_generic ? exec_from_generic<SHARED_WINDOW> : exec_to_generic<SHARED_WINDOW>;
  } else if (space == "local") {
    b.out.exec = from_generic ? exec_from_generic<LOCAL_WINDOW> : exec_to_generic<LOCAL_WINDOW>;
  } else {
    return false;
  }
  return true;
}

// mapa{.space}.type d, a, cta: the address of the same offset in another CTA of the cluster (PTX ISA 9.7.9.23)
Step exec_mapa32(Warp& w, const Instr& i) {
  return binary<uint32_t, uint32_t, uint32_t>(w, i, [](uint32_t a, uint32_t rank) {
    return (a & 0x00ffffffu) | rank << 24;
  });
}
Step exec_mapa64(Warp& w, const Instr& i) {
  return binary<uint64_t, uint64_t, uint32_t>(w, i, [](uint64_t a, uint32_t rank) {
    return (a & ~0xff000000ull) | uint64_t(rank) << 24;
  });
}

bool decode_mapa(const Statement& s, Builder& b) {
  if (s.operands.size() != 3 || (s.type() != "u32" && s.type() != "u64")) return false;
  const bool wide = s.type() == "u64";
  b.out.s[0] = b.read(s.operands[1], wide ? RegClass::b64 : RegClass::b32);
  b.out.s[1] = b.read(s.operands[2], RegClass::b32);
  b.out.d[0] = b.write(s.operands[0]);
  b.out.exec = wide ? exec_mapa64 : exec_mapa32;
  return true;
}

}  // namespace

bool decode_convert(const Statement& s, Builder& b) {
  const std::string& m = s.mnemonic();
  if (m == "cvt") return decode_cvt(s, b);
  if (m == "cvta") return decode_cvta(s, b);
  if (m == "mapa") return decode_mapa(s, b);
  return false;
}

}  // namespace emu
