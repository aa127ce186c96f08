// Integer arithmetic, logic and shifts, comparison, selection and data movement (PTX ISA 9.7.1, 9.7.5 to 9.7.9).
#include <algorithm>
#include <map>

#include "lanes.h"

namespace emu {
namespace {

template <class T> using Wide = std::conditional_t<
    sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
    std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
                       std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>>>;
template <class T> using Unsigned = std::make_unsigned_t<T>;

// The ISA's integers wrap; C++'s signed ones must not overflow, so arithmetic is done unsigned.
template <class T> T wrap_add(T a, T b) { return T(Unsigned<T>(a) + Unsigned<T>(b)); }
template <class T> T wrap_sub(T a, T b) { return T(Unsigned<T>(a) - Unsigned<T>(b)); }
template <class T> T mul_lo(T a, T b) { return T(Unsigned<Wide<T>>(a) * Unsigned<Wide<T>>(b)); }
template <> int64_t mul_lo(int64_t a, int64_t b) { return int64_t(uint64_t(a) * uint64_t(b)); }
template <> uint64_t mul_lo(uint64_t a, uint64_t b) { return a * b; }
template <class T> T mul_hi(T a, T b) { return T((Wide<T>(a) * Wide<T>(b)) >> (8 * sizeof(T))); }

template <class T> T divide(T a, T b) {
  if (b == 0) return T(~T(0));  // unspecified by the ISA; hardware gives all ones
  if constexpr (std::is_signed_v<T>) if (b == T(-1)) return wrap_sub(T(0), a);
  return T(a / b);
}
template <class T> T remainder(T a, T b) {
  if (b == 0) return a;  // unspecified by the ISA
  if constexpr (std::is_signed_v<T>) if (b == T(-1)) return 0;
  return T(a % b);
}

// Shift amounts above the width clamp to it (PTX ISA 9.7.8.7, 9.7.8.8).
template <class T> T shift_left(T a, uint32_t n) { return n >= 8 * sizeof(T) ? T(0) : T(Unsigned<T>(a) << n); }
template <class T> T shift_right(T a, uint32_t n) {
  constexpr uint32_t width = 8 * sizeof(T);
  if (n >= width) return std::is_signed_v<T> && a < 0 ? T(-1) : T(0);
  return T(a >> n);
}

template <class T> Step exec_add(Warp& w, const Instr& i) { return binary<T, T, T>(w, i, wrap_add<T>); }
template <class T> Step exec_sub(Warp& w, const Instr& i) { return binary<T, T, T>(w, i, wrap_sub<T>); }
template <class T> Step exec_mul_lo(Warp& w, const Instr& i) { return binary<T, T, T>(w, i, mul_lo<T>); }
template <class T> Step exec_mul_hi(Warp& w, const Instr& i) { return binary<T, T, T>(w, i, mul_hi<T>); }
template <class T> Step exec_mul_wide(Warp& w, const Instr& i) {
  return binary<Wide<T>, T, T>(w, i, [](T a, T b) { return Wide<T>(Wide<T>(a) * Wide<T>(b)); });
}
template <class T> Step exec_mad_lo(Warp& w, const Instr& i) {
  return ternary<T, T, T, T>(w, i, [](T a, T b, T c) { return wrap_add(mul_lo(a, b), c); });
}
template <class T> Step exec_mad_hi(Warp& w, const Instr& i) {
  return ternary<T, T, T, T>(w, i, [](T a, T b, T c) { return wrap_add(mul_hi(a, b), c); });
}
template <class T> Step exec_mad_wide(Warp& w, const Instr& i) {
  return ternary<Wide<T>, T, T, Wide<T>>(
      w, i, [](T a, T b, Wide<T> c) { return wrap_add(Wide<T>(Wide<T>(a) * Wide<T>(b)), c); });
}
template <class T> Step exec_div(Warp& w, const Instr& i) { return binary<T, T, T>(w, i, divide<T>); }
template <class T> Step exec_rem(Warp& w, const Instr& i) { return binary<T, T, T>(w, i, remainder<T>); }
template <class T> Step exec_min(Warp& w, const Instr& i) {
  return binary<T, T, T>(w, i, [](T a, T b) { return std::min(a, b); });
}
template <class T> Step exec_max(Warp& w, const Instr& i) {
  return binary<T, T, T>(w, i, [](T a, T b) { return std::max(a, b); });
}
template <class T> Step exec_min_relu(Warp& w, const Instr& i) {
  return binary<T, T, T>(w, i, [](T a, T b) { return std::max(std::min(a, b), T(0)); });
}
template <class T> Step exec_max_relu(Warp& w, const Instr& i) {
  return binary<T, T, T>(w, i, [](T a, T b) { return std::max(std::max(a, b), T(0)); });
}
template <class T> Step exec_abs(Warp& w, const Instr& i) {
  return unary<T, T>(w, i, [](T a) { return a < 0 ? wrap_sub(T(0), a) : a; });
}
template <class T> Step exec_neg(Warp& w, const Instr& i) {
  return unary<T, T>(w, i, [](T a) { return wrap_sub(T(0), a); });
}
template <class T> Step exec_shl(Warp& w, const Instr& i) { return binary<T, T, uint32_t>(w, i, shift_left<T>); }
template <class T> Step exec_shr(Warp& w, const Instr& i) { return binary<T, T, uint32_t>(w, i, shift_right<T>); }
template <class T> Step exec_and(Warp& w, const Instr& i) {
  return binary<T, T, T>(w, i, [](T a, T b) { return T(a & b); });
}
template <class T> Step exec_or(Warp& w, const Instr& i) {
  return binary<T, T, T>(w, i, [](T a, T b) { return T(a | b); });
}
template <class T> Step exec_xor(Warp& w, const Instr& i) {
  return binary<T, T, T>(w, i, [](T a, T b) { return T(a ^ b); });
}
template <class T> Step exec_not(Warp& w, const Instr& i) {
  return unary<T, T>(w, i, [](T a) { return T(~a); });
}
template <class T> Step exec_popc(Warp& w, const Instr& i) {
  return unary<uint32_t, T>(w, i, [](T a) { return uint32_t(__builtin_popcountll(a)); });
}
template <class T> Step exec_clz(Warp& w, const Instr& i) {
  return unary<uint32_t, T>(w, i, [](T a) {
    constexpr uint32_t width = 8 * sizeof(T);
    return a ? uint32_t(__builtin_clzll(uint64_t(a)) - (64 - width)) : width;
  });
}
template <class T> Step exec_brev(Warp& w, const Instr& i) {
  return unary<T, T>(w, i, [](T a) {
    T r = 0;
    for (uint32_t b = 0; b < 8 * sizeof(T); ++b) r = T(r | (T(a >> b & 1) << (8 * sizeof(T) - 1 - b)));
    return r;
  });
}
// Position of the most significant set bit (of a negative number: unset bit), all ones if none.
template <class T> Step exec_bfind(Warp& w, const Instr& i) {
  return unary<uint32_t, T>(w, i, [](T a) {
    const Unsigned<T> v = Unsigned<T>(std::is_signed_v<T> && a < 0 ? ~a : a);
    return v ? uint32_t(63 - __builtin_clzll(uint64_t(v))) : ~0u;
  });
}
template <class T> Step exec_bfe(Warp& w, const Instr& i) {
  return ternary<T, T, uint32_t, uint32_t>(w, i, [](T a, uint32_t position, uint32_t length) {
    constexpr uint32_t width = 8 * sizeof(T);
    position &= 0xff;
    length &= 0xff;
    if (length == 0) return T(0);
    const bool sign = std::is_signed_v<T> && (Unsigned<T>(a) >> std::min(position + length - 1, width - 1) & 1);
    T r = sign ? T(~T(0)) : T(0);
    for (uint32_t b = 0; b < length && b < width && position + b < width; ++b) {
      const Unsigned<T> bit = Unsigned<T>(a) >> (position + b) & 1;
      r = T((Unsigned<T>(r) & ~(Unsigned<T>(1) << b)) | bit << b);
    }
    return r;
  });
}
template <class T> Step exec_bfi(Warp& w, const Instr& i) {  // d, a (field), b (base), position, length
  Word<T>* d = words<T>(w, i.d[0]);
  const Word<T>*a = words<T>(w, i.s[0]), *base = words<T>(w, i.s[1]);
  const uint32_t *position = w.u32(i.s[2]), *length = w.u32(i.s[3]);
  for_lanes(w, [&](uint32_t l) {
    const uint32_t p = position[l] & 0xff, n = length[l] & 0xff;
    Word<T> r = base[l];
    for (uint32_t b = 0; b < n && p + b < 8 * sizeof(T); ++b)
      r = (r & ~(Word<T>(1) << (p + b))) | (a[l] >> b & 1) << (p + b);
    d[l] = r;
  });
  return Step::next;
}

#define EMU_TYPES_SIGNED(f) {"s16", f<int16_t>}, {"s32", f<int32_t>}, {"s64", f<int64_t>}
#define EMU_TYPES_UNSIGNED(f) {"u16", f<uint16_t>}, {"u32", f<uint32_t>}, {"u64", f<uint64_t>}
#define EMU_TYPES_BITS(f) {"b16", f<uint16_t>}, {"b32", f<uint32_t>}, {"b64", f<uint64_t>}
using ByType = std::map<std::string, Exec>;

Exec by_type(const ByType& table, const std::string& type) {
  const auto it = table.find(type);
  return it == table.end() ? nullptr : it->second;
}

// ---------------------------------------------------------------------------------------------------------
// Three-input logic, funnel shifts, byte permutation, packed dot products

Step exec_lop3(Warp& w, const Instr& i) {  // the immediate is the truth table: bit (a<<2 | b<<1 | c)
  const uint32_t table = uint32_t(i.imm);
  return ternary<uint32_t, uint32_t, uint32_t, uint32_t>(w, i, [table](uint32_t a, uint32_t b, uint32_t c) {
    uint32_t r = 0;
    for (uint32_t m = 0; m < 8; ++m)
      if (table >> m & 1) r |= (m & 4 ? a : ~a) & (m & 2 ? b : ~b) & (m & 1 ? c : ~c);
    return r;
  });
}

template <bool LEFT, bool CLAMP> Step exec_shf(Warp& w, const Instr& i) {
  return ternary<uint32_t, uint32_t, uint32_t, uint32_t>(w, i, [](uint32_t lo, uint32_t hi, uint32_t n) {
    n = CLAMP ? std::min(n, 32u) : n & 31;
    const uint64_t both = uint64_t(hi) << 32 | lo;
    return LEFT ? uint32_t((both << n) >> 32) : uint32_t(both >> n);
  });
}

uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {  // PTX ISA, prmt, default mode
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t r = 0;
  for (uint32_t k = 0; k < 4; ++k) {
    const uint32_t select = selector >> (4 * k) & 0xf;
    uint32_t byte = uint32_t(bytes >> (8 * (select & 7))) & 0xff;
    if (select & 8) byte = byte & 0x80 ? 0xff : 0;
    r |= byte << (8 * k);
  }
  return r;
}
Step exec_prmt(Warp& w, const Instr& i) {
  return ternary<uint32_t, uint32_t, uint32_t, uint32_t>(w, i, permute_bytes);
}

// dp2a: two 16-bit values of a times two bytes of b (the low or the high pair); dp4a: four bytes times four.
template <class A, class B, bool HIGH> Step exec_dp2a(Warp& w, const Instr& i) {
  return ternary<uint32_t, uint32_t, uint32_t, uint32_t>(w, i, [](uint32_t a, uint32_t b, uint32_t c) {
    for (uint32_t k = 0; k < 2; ++k)
      c += uint32_t(int32_t(A(a >> (16 * k))) * int32_t(B(b >> (8 * (k + (HIGH ? 2 : 0))))));
    return c;
  });
}
template <class A, class B> Step exec_dp4a(Warp& w, const Instr& i) {
  return ternary<uint32_t, uint32_t, uint32_t, uint32_t>(w, i, [](uint32_t a, uint32_t b, uint32_t c) {
    for (uint32_t k = 0; k < 4; ++k) c += uint32_t(int32_t(A(a >> (8 * k))) * int32_t(B(b >> (8 * k))));
    return c;
  });
}

Exec pick_dot(const Statement& s) {
  const auto& m = s.modifiers;
  if (m[0] == "dp4a" && m.size() == 3) {
    const bool a = m[1] == "s32", b = m[2] == "s32";
    return a ? (b ? exec_dp4a<int8_t, int8_t> : exec_dp4a<int8_t, uint8_t>)
             : (b ? exec_dp4a<uint8_t, int8_t> : exec_dp4a<uint8_t, uint8_t>);
  }
  if (m[0] == "dp2a" && m.size() == 4) {
    const bool high = m[1] == "hi", a = m[2] == "s32", b = m[3] == "s32";
    if (high)
      return a ? (b ? exec_dp2a<int16_t, int8_t, true> : exec_dp2a<int16_t, uint8_t, true>)
               : (b ? exec_dp2a<uint16_t, int8_t, true> : exec_dp2a<uint16_t, uint8_t, true>);
    return a ? (b ? exec_dp2a<int16_t, int8_t, false> : exec_dp2a<int16_t, uint8_t, false>)
             : (b ? exec_dp2a<uint16_t, int8_t, false> : exec_dp2a<uint16_t, uint8_t, false>);
  }
  return nullptr;
}

// ---------------------------------------------------------------------------------------------------------
// Predicates: a register's word 0 is a lane mask

template <class F> Step predicate_binary(Warp& w, const Instr& i, F f) {
  const uint32_t r = f(w.pred(i.s[0]), w.pred(i.s[1]));
  uint32_t& d = w.pred(i.d[0]);
  d = (d & ~w.mask) | (r & w.mask);
  return Step::next;
}
Step exec_and_pred(Warp& w, const Instr& i) {
  return predicate_binary(w, i, [](uint32_t a, uint32_t b) { return a & b; });
}
Step exec_or_pred(Warp& w, const Instr& i) {
  return predicate_binary(w, i, [](uint32_t a, uint32_t b) { return a | b; });
}
Step exec_xor_pred(Warp& w, const Instr& i) {
  return predicate_binary(w, i, [](uint32_t a, uint32_t b) { return a ^ b; });
}
Step exec_not_pred(Warp& w, const Instr& i) {
  uint32_t& d = w.pred(i.d[0]);
  d = (d & ~w.mask) | (~w.pred(i.s[0]) & w.mask);
  return Step::next;
}
Step exec_mov_pred(Warp& w, const Instr& i) {
  uint32_t& d = w.pred(i.d[0]);
  d = (d & ~w.mask) | (w.pred(i.s[0]) & w.mask);
  return Step::next;
}

// ---------------------------------------------------------------------------------------------------------
// setp (PTX ISA 9.7.6.1): comparison, optionally combined with a predicate, to one or two predicates

enum class Compare : uint8_t { eq, ne, lt, le, gt, ge, num, nan };
struct SetpDetail {
  Compare compare;
  bool unordered = false;  // equ, neu, ...: true where an operand is NaN
  bool flush = false;      // .ftz
  enum class Combine : uint8_t { none, and_, or_, xor_ } combine = Combine::none;
  bool negate_c = false;
  bool second = false;     // a second destination takes the complement
};

template <class T> bool compare_values(Compare c, T a, T b) {
  switch (c) {
    case Compare::eq: return a == b;
    case Compare::ne: return a != b;
    case Compare::lt: return a < b;
    case Compare::le: return a <= b;
    case Compare::gt: return a > b;
    case Compare::ge: return a >= b;
    default: return false;
  }
}

template <class T> uint32_t compare_lanes(Warp& w, const Instr& i, const SetpDetail& detail) {
  const Word<T>*a = words<T>(w, i.s[0]), *b = words<T>(w, i.s[1]);
  uint32_t r = 0;
  for_lanes(w, [&](uint32_t l) {
    T x = from_word<T>(a[l]), y = from_word<T>(b[l]);
    bool result;
    if constexpr (std::is_floating_point_v<T>) {
      if (detail.flush) {
        if (x > T(-1.17549435e-38f) && x < T(1.17549435e-38f)) x = 0;
        if (y > T(-1.17549435e-38f) && y < T(1.17549435e-38f)) y = 0;
      }
      const bool nan = x != x || y != y;
      if (detail.compare == Compare::nan) result = nan;
      else if (detail.compare == Compare::num) result = !nan;
      else result = nan ? detail.unordered : compare_values(detail.compare, x, y);
    } else {
      result = compare_values(detail.compare, x, y);
    }
    r |= uint32_t(result) << l;
  });
  return r;
}

template <class T> Step exec_setp(Warp& w, const Instr& i) {
  const auto& detail = *static_cast<const SetpDetail*>(i.detail);
  const uint32_t compared = compare_lanes<T>(w, i, detail);
  uint32_t first = compared, second = ~compared;
  if (detail.combine != SetpDetail::Combine::none) {
    const uint32_t c = detail.negate_c ? ~w.pred(i.s[2]) : w.pred(i.s[2]);
    auto combine = [&](uint32_t value) {
      return detail.combine == SetpDetail::Combine::and_ ? value & c
             : detail.combine == SetpDetail::Combine::or_ ? value | c : value ^ c;
    };
    first = combine(compared);
    second = combine(~compared);
  }
  uint32_t& p = w.pred(i.d[0]);
  p = (p & ~w.mask) | (first & w.mask);
  if (detail.second) {
    uint32_t& q = w.pred(i.d[1]);
    q = (q & ~w.mask) | (second & w.mask);
  }
  return Step::next;
}

bool decode_setp(const Statement& s, Builder& b) {
  static const std::map<std::string, std::pair<Compare, bool>> comparisons = {
      {"eq", {Compare::eq, false}},  {"ne", {Compare::ne, false}},  {"lt", {Compare::lt, false}},
      {"le", {Compare::le, false}},  {"gt", {Compare::gt, false}},  {"ge", {Compare::ge, false}},
      {"lo", {Compare::lt, false}},  {"ls", {Compare::le, false}},  {"hi", {Compare::gt, false}},
      {"hs", {Compare::ge, false}},  {"equ", {Compare::eq, true}},  {"neu", {Compare::ne, true}},
      {"ltu", {Compare::lt, true}},  {"leu", {Compare::le, true}},  {"gtu", {Compare::gt, true}},
      {"geu", {Compare::ge, true}},  {"num", {Compare::num, false}}, {"nan", {Compare::nan, false}}};
  static const ByType execs = {EMU_TYPES_SIGNED(exec_setp), EMU_TYPES_UNSIGNED(exec_setp), EMU_TYPES_BITS(exec_setp),
                               {"f32", exec_setp<float>}, {"f64", exec_setp<double>}};
  const Exec exec = by_type(execs, s.type());
  const auto comparison = s.modifiers.size() > 2 ? comparisons.find(s.modifiers[1]) : comparisons.end();
  if (!exec || comparison == comparisons.end() || s.operands.size() < 3) return false;
  SetpDetail detail;
  detail.compare = comparison->second.first;
  detail.unordered = comparison->second.second;
  detail.flush = s.has("ftz");
  const RegClass cls = class_of(s.type());
  b.out.s[0] = b.read(s.operands[1], cls);
  b.out.s[1] = b.read(s.operands[2], cls);
  if (s.operands.size() == 4) {
    detail.combine = s.has("and") ? SetpDetail::Combine::and_ : s.has("or") ? SetpDetail::Combine::or_
                                                                            : SetpDetail::Combine::xor_;
    Operand c = s.operands[3];
    detail.negate_c = c.negated;
    c.negated = false;
    b.out.s[2] = b.read(c, RegClass::pred);
  }
  if (s.operands[0].kind == Operand::Kind::pair) {
    detail.second = true;
    b.out.d[0] = b.write(s.operands[0].parts[0]);
    b.out.d[1] = b.write(s.operands[0].parts[1]);
  } else {
    b.out.d[0] = b.write(s.operands[0]);
  }
  b.out.detail = b.keep(detail);
  b.out.exec = exec;
  return true;
}

template <class T> Step exec_selp(Warp& w, const Instr& i) {
  Word<T>* d = words<T>(w, i.d[0]);
  const Word<T>*a = words<T>(w, i.s[0]), *b = words<T>(w, i.s[1]);
  const uint32_t p = w.pred(i.s[2]);
  for_lanes(w, [&](uint32_t l) { d[l] = p >> l & 1 ? a[l] : b[l]; });
  return Step::next;
}

bool decode_selp(const Statement& s, Builder& b) {
  if (s.operands.size() != 4) return false;
  const RegClass cls = class_of(s.type());
  b.out.s[0] = b.read(s.operands[1], cls);
  b.out.s[1] = b.read(s.operands[2], cls);
  b.out.s[2] = b.read(s.operands[3], RegClass::pred);
  b.out.d[0] = b.write(s.operands[0]);
  b.out.exec = cls == RegClass::b64 ? exec_selp<uint64_t> : exec_selp<uint32_t>;
  return true;
}

// ---------------------------------------------------------------------------------------------------------
// mov, with packing and unpacking of vectors (PTX ISA 9.7.9.1, 9.7.9.2)

template <class T> Step exec_mov(Warp& w, const Instr& i) {
  Word<T>* d = words<T>(w, i.d[0]);
  const Word<T>* a = words<T>(w, i.s[0]);
  if (w.mask == ALL_LANES) {
    std::memcpy(d, a, sizeof(Word<T>) * LANES);
  } else {
    for_lanes(w, [&](uint32_t l) { d[l] = a[l]; });
  }
  return Step::next;
}

uint32_t class_bits(RegClass cls) {
  return cls == RegClass::b16 ? 16 : cls == RegClass::b32 ? 32 : cls == RegClass::b64 ? 64 : 128;
}

// Packs n parts of `imm` bits, lowest first, into the destination; unpacks likewise.
Step exec_pack(Warp& w, const Instr& i) {
  const uint32_t* parts = w.program->slot_lists.data() + i.list;
  const uint32_t bits = uint32_t(i.imm), total = bits * i.n_list;
  for_lanes(w, [&](uint32_t l) {
    uint64_t low = 0, high = 0;
    for (uint32_t k = 0; k < i.n_list; ++k) {
      const uint64_t part = bits == 64 ? w.u64(parts[k])[l] : w.u32(parts[k])[l];
      const uint32_t at = k * bits;
      if (at < 64) low |= part << at; else high |= part << (at - 64);
    }
    if (total <= 32) w.u32(i.d[0])[l] = uint32_t(low); else w.u64(i.d[0])[l] = low;
    if (total == 128) w.u64(i.d[0] + 2)[l] = high;
  });
  return Step::next;
}
Step exec_pack_32x2(Warp& w, const Instr& i) {
  const uint32_t* parts = w.program->slot_lists.data() + i.list;
  const uint32_t *lo = w.u32(parts[0]), *hi = w.u32(parts[1]);
  uint64_t* d = w.u64(i.d[0]);
  for_lanes(w, [&](uint32_t l) { d[l] = uint64_t(hi[l]) << 32 | lo[l]; });
  return Step::next;
}
Step exec_unpack(Warp& w, const Instr& i) {
  const uint32_t* parts = w.program->slot_lists.data() + i.list;
  const uint32_t bits = uint32_t(i.imm), total = bits * i.n_list;
  for_lanes(w, [&](uint32_t l) {
    const uint64_t low = total <= 32 ? w.u32(i.s[0])[l] : w.u64(i.s[0])[l];
    const uint64_t high = total == 128 ? w.u64(i.s[0] + 2)[l] : 0;
    for (uint32_t k = 0; k < i.n_list; ++k) {
      const uint32_t at = k * bits;
      const uint64_t value = at < 64 ? low >> at : high >> (at - 64);
      if (bits == 64) w.u64(parts[k])[l] = value;
      else w.u32(parts[k])[l] = bits == 16 ? uint32_t(value & 0xffff) : bits == 8 ? uint32_t(value & 0xff) : uint32_t(value);
    }
  });
  return Step::next;
}

bool decode_vector_mov(const Statement& s, Builder& b) {
  const bool packs = s.operands[1].kind == Operand::Kind::vector;
  const Operand& vector = s.operands[packs ? 1 : 0];
  const uint32_t total = s.type() == "b128" ? 128 : class_bits(class_of(s.type()));
  b.out.imm = total / vector.parts.size();
  b.list(vector);
  if (packs) {
    b.also_reads(vector);
    b.out.d[0] = b.write(s.operands[0]);
    b.out.exec = b.out.imm == 32 && total == 64 ? exec_pack_32x2 : exec_pack;
  } else {
    b.out.s[0] = b.read(s.operands[1], class_of(s.type()));
    b.also_writes(vector);
    b.out.exec = exec_unpack;
  }
  b.out.moves = true;
  return true;
}

// Clocks advance with the instructions of the launch; they order events, they do not measure time.
Step exec_clock(Warp& w, const Instr& i) {
  const uint64_t now = w.cluster->events + w.cluster->launch->instructions.load(std::memory_order_relaxed);
  for_lanes(w, [&](uint32_t l) {
    if (i.imm == 64) w.u64(i.d[0])[l] = now; else w.u32(i.d[0])[l] = uint32_t(now);
  });
  return Step::next;
}

bool decode_mov(const Statement& s, Builder& b) {
  if (s.operands.size() != 2) return false;
  if (s.operands[0].kind == Operand::Kind::vector || s.operands[1].kind == Operand::Kind::vector)
    return decode_vector_mov(s, b);
  const std::string& type = s.type();
  const std::string& source = s.operands[1].name;
  if (s.operands[1].kind == Operand::Kind::symbol &&
      (source == "%clock" || source == "%clock64" || source == "%globaltimer" || source == "%clock_hi" ||
       source == "%globaltimer_lo" || source == "%globaltimer_hi")) {
    b.out.imm = class_of(type) == RegClass::b64 ? 64 : 32;
    b.out.d[0] = b.write(s.operands[0]);
    b.out.exec = exec_clock;
    return true;
  }
  const RegClass cls = class_of(type);
  b.out.s[0] = b.read(s.operands[1], cls);
  b.out.d[0] = b.write(s.operands[0]);
  b.out.moves = true;
  b.out.exec = cls == RegClass::pred ? exec_mov_pred : cls == RegClass::b64 ? exec_mov<uint64_t> : exec_mov<uint32_t>;
  return cls != RegClass::b128;
}

// ---------------------------------------------------------------------------------------------------------

struct Uniform { ByType execs; size_t sources; };

const std::map<std::string, Uniform>& uniform_table() {  // by the opcode without its type
  static const std::map<std::string, Uniform> table = {
      {"add", {{EMU_TYPES_SIGNED(exec_add), EMU_TYPES_UNSIGNED(exec_add)}, 2}},
      {"sub", {{EMU_TYPES_SIGNED(exec_sub), EMU_TYPES_UNSIGNED(exec_sub)}, 2}},
      {"mul.lo", {{EMU_TYPES_SIGNED(exec_mul_lo), EMU_TYPES_UNSIGNED(exec_mul_lo)}, 2}},
      {"mul.hi", {{EMU_TYPES_SIGNED(exec_mul_hi), EMU_TYPES_UNSIGNED(exec_mul_hi)}, 2}},
      {"mul.wide", {{{"s16", exec_mul_wide<int16_t>}, {"u16", exec_mul_wide<uint16_t>},
                     {"s32", exec_mul_wide<int32_t>}, {"u32", exec_mul_wide<uint32_t>}}, 2}},
      {"mad.lo", {{EMU_TYPES_SIGNED(exec_mad_lo), EMU_TYPES_UNSIGNED(exec_mad_lo)}, 3}},
      {"mad.hi", {{EMU_TYPES_SIGNED(exec_mad_hi), EMU_TYPES_UNSIGNED(exec_mad_hi)}, 3}},
      {"div", {{EMU_TYPES_SIGNED(exec_div), EMU_TYPES_UNSIGNED(exec_div)}, 2}},
      {"rem", {{EMU_TYPES_SIGNED(exec_rem), EMU_TYPES_UNSIGNED(exec_rem)}, 2}},
      {"min", {{EMU_TYPES_SIGNED(exec_min), EMU_TYPES_UNSIGNED(exec_min)}, 2}},
      {"max", {{EMU_TYPES_SIGNED(exec_max), EMU_TYPES_UNSIGNED(exec_max)}, 2}},
      {"min.relu", {{{"s32", exec_min_relu<int32_t>}}, 2}},
      {"max.relu", {{{"s32", exec_max_relu<int32_t>}}, 2}},
      {"abs", {{EMU_TYPES_SIGNED(exec_abs)}, 1}},
      {"neg", {{EMU_TYPES_SIGNED(exec_neg)}, 1}},
      {"and", {{EMU_TYPES_BITS(exec_and), {"pred", exec_and_pred}}, 2}},
      {"or", {{EMU_TYPES_BITS(exec_or), {"pred", exec_or_pred}}, 2}},
      {"xor", {{EMU_TYPES_BITS(exec_xor), {"pred", exec_xor_pred}}, 2}},
      {"not", {{EMU_TYPES_BITS(exec_not), {"pred", exec_not_pred}}, 1}},
      {"brev", {{{"b32", exec_brev<uint32_t>}, {"b64", exec_brev<uint64_t>}}, 1}},
      {"prmt", {{{"b32", exec_prmt}}, 3}},
      {"shf.l.wrap", {{{"b32", exec_shf<true, false>}}, 3}},
      {"shf.l.clamp", {{{"b32", exec_shf<true, true>}}, 3}},
      {"shf.r.wrap", {{{"b32", exec_shf<false, false>}}, 3}},
      {"shf.r.clamp", {{{"b32", exec_shf<false, true>}}, 3}},
  };
  return table;
}

// Sources of a width of their own: shift amounts, bit positions, counts.
bool decode_mixed_width(const Statement& s, Builder& b, Exec exec, const std::vector<RegClass>& sources) {
  if (!exec || s.operands.size() != sources.size() + 1) return false;
  for (size_t k = 0; k < sources.size(); ++k) b.out.s[k] = b.read(s.operands[k + 1], sources[k]);
  b.out.d[0] = b.write(s.operands[0]);
  b.out.exec = exec;
  return true;
}

}  // namespace

bool decode_integer(const Statement& s, Builder& b) {
  const std::string& m = s.mnemonic();
  const std::string& type = s.type();
  const RegClass cls = class_of(type);
  if (m == "mov") return decode_mov(s, b);
  if (m == "setp") return decode_setp(s, b);
  if (m == "selp") return decode_selp(s, b);
  static const ByType shl = {EMU_TYPES_BITS(exec_shl)};
  static const ByType shr = {EMU_TYPES_BITS(exec_shr), EMU_TYPES_SIGNED(exec_shr), EMU_TYPES_UNSIGNED(exec_shr)};
  static const ByType popc = {{"b32", exec_popc<uint32_t>}, {"b64", exec_popc<uint64_t>}};
  static const ByType clz = {{"b32", exec_clz<uint32_t>}, {"b64", exec_clz<uint64_t>}};
  static const ByType bfind = {{"u32", exec_bfind<uint32_t>}, {"s32", exec_bfind<int32_t>},
                               {"u64", exec_bfind<uint64_t>}, {"s64", exec_bfind<int64_t>}};
  static const ByType bfe = {{"u32", exec_bfe<uint32_t>}, {"s32", exec_bfe<int32_t>},
                             {"u64", exec_bfe<uint64_t>}, {"s64", exec_bfe<int64_t>}};
  static const ByType bfi = {{"b32", exec_bfi<uint32_t>}, {"b64", exec_bfi<uint64_t>}};
  static const ByType mad_wide = {{"s16", exec_mad_wide<int16_t>}, {"u16", exec_mad_wide<uint16_t>},
                                  {"s32", exec_mad_wide<int32_t>}, {"u32", exec_mad_wide<uint32_t>}};
  if (m == "shl") return decode_mixed_width(s, b, by_type(shl, type), {cls, RegClass::b32});
  if (m == "shr") return decode_mixed_width(s, b, by_type(shr, type), {cls, RegClass::b32});
  if (m == "popc") return decode_mixed_width(s, b, by_type(popc, type), {cls});
  if (m == "clz") return decode_mixed_width(s, b, by_type(clz, type), {cls});
  if (m == "bfind" && !s.has("shiftamt")) return decode_mixed_width(s, b, by_type(bfind, type), {cls});
  if (m == "bfe") return decode_mixed_width(s, b, by_type(bfe, type), {cls, RegClass::b32, RegClass::b32});
  if (m == "bfi") return decode_mixed_width(s, b, by_type(bfi, type), {cls, cls, RegClass::b32, RegClass::b32});
  if (m == "dp2a" || m == "dp4a")
    return decode_mixed_width(s, b, pick_dot(s), {RegClass::b32, RegClass::b32, RegClass::b32});
  if (m == "mad" && s.has("wide"))
    return decode_mixed_width(s, b, by_type(mad_wide, type), {cls, cls, cls == RegClass::b16 ? RegClass::b32 : RegClass::b64});
  if (m == "lop3" && s.opcode == "lop3.b32" && s.operands.size() == 5) {
    for (size_t k = 0; k < 3; ++k) b.out.s[k] = b.read(s.operands[k + 1], RegClass::b32);
    b.out.imm = uint64_t(b.integer(s.operands[4]));
    b.out.d[0] = b.write(s.operands[0]);
    b.out.exec = exec_lop3;
    return true;
  }
  const size_t type_at = s.opcode.rfind('.');
  if (type_at == std::string::npos) return false;
  const auto it = uniform_table().find(s.opcode.substr(0, type_at));
  if (it == uniform_table().end()) return false;
  return decode_uniform(s, b, by_type(it->second.execs, type), it->second.sources);
}

}  // namespace emu
