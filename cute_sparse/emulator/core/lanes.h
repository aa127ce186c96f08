// Element-wise execution: a C++ function of scalars applied to every executing lane.
#pragma once
#include <type_traits>

#include "machine.h"

namespace emu {

// Registers of 16 bits live zero-extended in 32-bit words; 64-bit ones in 64-bit words.
template <class T> using Word = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <class T> inline Word<T>* words(Warp& w, uint32_t slot) {
  if constexpr (sizeof(T) == 8) return w.u64(slot); else return w.u32(slot);
}

template <class T> inline T from_word(Word<T> word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));  // the low bytes: little-endian
  return value;
}

template <class T> inline Word<T> to_word(T value) {
  Word<T> word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}

// `lane_function(lane)` for every executing lane; the full-warp loop is the one that vectorises.
template <class F> inline void for_lanes(const Warp& w, F lane_function) {
  if (w.mask == ALL_LANES) {
    for (uint32_t l = 0; l < LANES; ++l) lane_function(l);
  } else {
    for (uint32_t m = w.mask; m; m &= m - 1) lane_function(uint32_t(__builtin_ctz(m)));
  }
}

template <class D, class A, class F> inline Step unary(Warp& w, const Instr& i, F f) {
  Word<D>* d = words<D>(w, i.d[0]);
  const Word<A>* a = words<A>(w, i.s[0]);
  for_lanes(w, [&](uint32_t l) { d[l] = to_word<D>(f(from_word<A>(a[l]))); });
  return Step::next;
}

template <class D, class A, class B, class F> inline Step binary(Warp& w, const Instr& i, F f) {
  Word<D>* d = words<D>(w, i.d[0]);
  const Word<A>* a = words<A>(w, i.s[0]);
  const Word<B>* b = words<B>(w, i.s[1]);
  for_lanes(w, [&](uint32_t l) { d[l] = to_word<D>(f(from_word<A>(a[l]), from_word<B>(b[l]))); });
  return Step::next;
}

template <class D, class A, class B, class C, class F> inline Step ternary(Warp& w, const Instr& i, F f) {
  Word<D>* d = words<D>(w, i.d[0]);
  const Word<A>* a = words<A>(w, i.s[0]);
  const Word<B>* b = words<B>(w, i.s[1]);
  const Word<C>* c = words<C>(w, i.s[2]);
  for_lanes(w, [&](uint32_t l) {
    d[l] = to_word<D>(f(from_word<A>(a[l]), from_word<B>(b[l]), from_word<C>(c[l])));
  });
  return Step::next;
}

// Register class in which a value of a PTX type lives.
inline RegClass class_of(const std::string& type) {
  if (type == "pred") return RegClass::pred;
  if (type.size() >= 3 && type.compare(type.size() - 2, 2, "64") == 0) return RegClass::b64;
  if (type == "f32x2") return RegClass::b64;
  if (type == "b128") return RegClass::b128;
  if (type == "f16x2" || type == "bf16x2" || type == "u16x2" || type == "s16x2") return RegClass::b32;
  if (type.size() >= 3 && type.compare(type.size() - 2, 2, "16") == 0) return RegClass::b16;
  if (type == "b8" || type == "u8" || type == "s8") return RegClass::b16;
  return RegClass::b32;
}

// Decodes `op d, s0, s1, ...` where every source has the class of the last modifier's type.
inline bool decode_uniform(const Statement& s, Builder& b, Exec exec, size_t sources) {
  if (!exec || s.operands.size() != sources + 1) return false;
  const RegClass cls = class_of(s.type());
  for (size_t k = 0; k < sources; ++k) b.out.s[k] = b.read(s.operands[k + 1], cls);
  b.out.d[0] = b.write(s.operands[0]);
  b.out.exec = exec;
  return true;
}

}  // namespace emu
